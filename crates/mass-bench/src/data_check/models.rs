use std::fs;
use std::path::{Path, PathBuf};

use mass_model::ModelError;
use mass_model::bert::BertClassifier;
use mass_model::pretrained::{Weights, weight_files};
use mass_model::vit::VitClassifier;
use serde_json::Value;

use super::{Group, Item, Status, item, json};
use crate::dg::features::check_channels;
use crate::glue::tokenize::TextTokenizer;
use crate::rng::{Purpose, stream};

/// Tokens of a sequence in the GLUE study.
const LENGTH: usize = 128;

/// What a study needs at least one of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Text,
    Images,
}

const KINDS: [(Kind, &str); 2] = [
    (Kind::Text, "a text encoder (BERT)"),
    (Kind::Images, "an image encoder (ViT)"),
];

pub(super) fn group(models: Option<&Path>) -> Group {
    let mut items = Vec::new();
    let mut kinds = Vec::new();
    for dir in models.map(folders).unwrap_or_default() {
        let name = dir.file_name().unwrap_or_default().to_string_lossy();
        let found = item(name, Some(dir.clone()), |dir| {
            let (kind, summary) = model(dir)?;
            kinds.push(kind);
            Ok(summary)
        });
        items.push(found);
    }
    for (kind, name) in KINDS {
        if !kinds.contains(&kind) {
            items.push(Item {
                name: name.to_owned(),
                path: models.map(Path::to_owned),
                status: Status::Missing,
            });
        }
    }
    Group {
        title: "Models (studies glue, dg)",
        layout: "MODELS/<name>/{config.json,model.safetensors} (or model.safetensors.index.json and the files it names), and \
                 tokenizer.json or vocab.txt for text",
        source: "`cargo xtask data fetch NAME --models MODELS` with minilm-l6 or bert-large-cased, vit-s14 or deit-small-patch16-224, or any owner/name of https://huggingface.co",
        items,
    }
}

fn folders(models: &Path) -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> = fs::read_dir(models)
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            // A download under way is no model yet.
            let hidden = path
                .file_name()
                .is_some_and(|n| n.to_string_lossy().starts_with('.'));
            path.is_dir() && !hidden
        })
        .collect();
    folders.sort();
    folders
}

/// A few words on the model in a folder, or what is wrong with it.
#[cfg(feature = "hub")]
pub(crate) fn inspect(dir: &Path) -> Result<String, String> {
    Ok(model(dir)?.1)
}

/// Reads a folder as the study of its kind does, and says what is in it.
fn model(dir: &Path) -> Result<(Kind, String), String> {
    let config = json(&dir.join("config.json"))?;
    let name = |key: &str| config[key].as_str().map(str::to_lowercase);
    // Exports of timm name an architecture instead.
    let name = name("model_type").or_else(|| name("architecture"));
    let (kind, read) = match name.as_deref() {
        Some("bert") => (Kind::Text, text(dir, &config)?),
        _ => (Kind::Images, images(dir)?),
    };
    let weights = Weights::open(dir).map_err(|e| e.to_string())?;
    let files = weight_files(dir).map_err(|e| e.to_string())?;
    let sizes = files.iter().map(|f| Ok(fs::metadata(f)?.len()));
    let bytes: u64 = sizes
        .sum::<std::io::Result<u64>>()
        .map_err(|e| e.to_string())?;
    let mut summary = format!(
        "{}, {} tensors, {:.1} MiB",
        name.unwrap_or_default(),
        weights.names().count(),
        bytes as f64 / (1 << 20) as f64
    );
    if files.len() > 1 {
        summary += &format!(" in {} files", files.len());
    }
    Ok((kind, summary + &read))
}

/// As the study `glue` begins: a new head on the encoder, and the tokenizer beside it.
fn text(dir: &Path, config: &Value) -> Result<String, String> {
    let mut rng = stream(0, Purpose::Weights, 0);
    let model = BertClassifier::load_with_new_head(dir, 2, &mut rng).map_err(said)?;
    drop(model);
    let tokenizer = TextTokenizer::open(dir, LENGTH).map_err(|e| e.to_string())?;
    let size = config["vocab_size"].as_u64();
    tokenizer.check_fits(size).map_err(|e| e.to_string())?;
    let name = tokenizer.path().file_name().unwrap_or_default();
    Ok(format!(", {}", name.to_string_lossy()))
}

/// As the study `dg` begins: a new head on a model of images with three channels.
fn images(dir: &Path) -> Result<String, String> {
    let mut rng = stream(0, Purpose::Weights, 0);
    let model = VitClassifier::load_with_new_head(dir, 2, &mut rng).map_err(said)?;
    check_channels(model.config()).map_err(said)?;
    Ok(String::new())
}

/// The error itself: a configuration's is not one of the caller here.
fn said(error: ModelError) -> String {
    error.to_string()
}

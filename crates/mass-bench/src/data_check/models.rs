use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

use super::{Group, Item, Status, item, json, text};

/// A kind of model that a study needs at least one of.
struct Kind {
    name: &'static str,
    is: fn(&str) -> bool,
}

const KINDS: [Kind; 2] = [
    Kind {
        name: "a text encoder (BERT)",
        is: |t| t.contains("bert"),
    },
    Kind {
        name: "an image encoder (ViT)",
        is: |t| t.contains("vit") || t.contains("deit") || t.contains("dino"),
    },
];

pub(super) fn group(models: Option<&Path>) -> Group {
    let mut items = Vec::new();
    let mut types = Vec::new();
    for dir in models.map(folders).unwrap_or_default() {
        let name = dir.file_name().unwrap_or_default().to_string_lossy();
        let found = item(name, Some(dir.clone()), |dir| model(dir, &mut types));
        items.push(found);
    }
    for kind in KINDS {
        if !types.iter().any(|t| (kind.is)(t)) {
            items.push(Item {
                name: kind.name.to_owned(),
                path: models.map(Path::to_owned),
                status: Status::Missing,
            });
        }
    }
    Group {
        title: "Models (studies glue, dg)",
        layout: "MODELS/<name>/{config.json,model.safetensors}, and tokenizer.json or vocab.txt for text",
        source: "`cargo xtask data fetch NAME --models MODELS` with minilm-l6 or bert-large-cased, vit-s14 or deit-small-patch16-224, or any owner/name of https://huggingface.co",
        items,
    }
}

fn folders(models: &Path) -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> = std::fs::read_dir(models)
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
    model(dir, &mut Vec::new())
}

/// Checks one folder and notes its model type.
fn model(dir: &Path, types: &mut Vec<String>) -> Result<String, String> {
    let config = json(&dir.join("config.json"))?;
    // Exports of timm name an architecture instead.
    let kind = ["model_type", "architecture"]
        .iter()
        .find_map(|key| config[*key].as_str())
        .ok_or("config.json: neither `model_type` nor `architecture`")?
        .to_lowercase();
    let (tensors, bytes) = safetensors_header(&dir.join("model.safetensors"))?;
    let image = (KINDS[1].is)(&kind);
    let tokenizer = ["tokenizer.json", "vocab.txt"]
        .into_iter()
        .find(|name| dir.join(name).exists());
    match tokenizer {
        Some("tokenizer.json") => drop(json(&dir.join("tokenizer.json"))?),
        Some(name) => drop(text(&dir.join(name))?),
        None if image => {}
        None => return Err("no tokenizer.json or vocab.txt".into()),
    }
    let tokenizer = tokenizer.map_or_else(String::new, |name| format!(", {name}"));
    let mib = bytes as f64 / (1 << 20) as f64;
    let summary = format!("{kind}, {tensors} tensors, {mib:.1} MiB{tokenizer}");
    types.push(kind);
    Ok(summary)
}

/// Tensors and data bytes of a safetensors file whose header fits its size: 8 bytes of length, a JSON
/// header, then data up to the greatest end offset and not a byte more.
fn safetensors_header(path: &Path) -> Result<(usize, u64), String> {
    let show = path.display();
    let io = |e: std::io::Error| format!("{show}: {e}");
    let mut file = File::open(path).map_err(io)?;
    let size = file.metadata().map_err(io)?.len();
    let mut length = [0; 8];
    if size < 8 {
        return Err(format!("{show}: {size} bytes are too few for a header"));
    }
    file.read_exact(&mut length).map_err(io)?;
    let length = u64::from_le_bytes(length);
    if length > size - 8 {
        return Err(format!(
            "{show}: the header says {length} bytes, the file has {} after it: truncated or no safetensors file",
            size - 8
        ));
    }
    let mut header = Vec::new();
    file.take(length).read_to_end(&mut header).map_err(io)?;
    let header: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(&header).map_err(|e| format!("{show}: header: {e}"))?;
    let mut end = 0;
    let mut tensors = 0;
    for (name, tensor) in header.iter().filter(|(name, _)| *name != "__metadata__") {
        tensors += 1;
        let offset = tensor["data_offsets"][1]
            .as_u64()
            .ok_or_else(|| format!("{show}: tensor {name} has no data_offsets"))?;
        end = end.max(offset);
    }
    if tensors == 0 {
        return Err(format!("{show}: no tensors"));
    }
    match size - 8 - length {
        data if data == end => Ok((tensors, data)),
        data => Err(format!(
            "{show}: {end} bytes of tensors expected, {data} there: truncated"
        )),
    }
}

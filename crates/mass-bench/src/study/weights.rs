//! Pretrained models as input: whether they are there, and which they are.

use std::io::Read;
use std::path::{Path, PathBuf};

use mass_model::ModelError;
use mass_model::pretrained::weight_files;
use serde_json::{Value, json};

use crate::BenchError;
use crate::cli::ReproduceArgs;

/// A model's files are input: which one, and what is wrong with it.
pub(crate) fn unusable_model(error: ModelError, doing: impl Into<String>) -> BenchError {
    match error {
        ModelError::Io { path, source } => BenchError::input(path, source),
        ModelError::Checkpoint { path, why } => BenchError::input(path, why),
        other => BenchError::failed(doing, other),
    }
}

/// The directory of a model, which must be there; `tokenizer` says that it needs one.
pub(super) fn directory(
    args: &ReproduceArgs,
    name: &str,
    tokenizer: bool,
) -> Result<PathBuf, BenchError> {
    let (study, preset) = (&args.study, args.preset);
    let weights = "model.safetensors or its index and the files it names";
    let files = match tokenizer {
        true => format!("config.json, {weights}, and tokenizer.json or vocab.txt"),
        false => format!("config.json, and {weights}"),
    };
    let Some(models) = &args.models else {
        return Err(BenchError::Usage(format!(
            "{study}, preset {preset}, needs a pretrained model: give --models DIR (or $MASS_MODELS_DIR) with DIR/{name}/ \
             ({files}), or --preset smoke, which needs none"
        )));
    };
    let dir = models.join(name);
    let any = |names: &[&str]| names.iter().any(|name| dir.join(name).is_file());
    let there = any(&["config.json"])
        && any(&["model.safetensors", "model.safetensors.index.json"])
        && (!tokenizer || any(&["tokenizer.json", "vocab.txt"]));
    if there {
        return Ok(dir);
    }
    let problem = format!(
        "no model there; preset {preset} needs {files}, as https://huggingface.co has them; \
         `cargo xtask data fetch {name}` gets them"
    );
    Err(BenchError::input(dir, problem))
}

/// A model's directory as settings keep it: what is in it matters, and not where it is, so that results go on elsewhere.
pub(super) fn settings(dir: &Path) -> Result<Value, BenchError> {
    let mut settings =
        json!({ "directory": dir.file_name().unwrap_or_default().to_string_lossy() });
    let weights = weight_files(dir).map_err(|e| unusable_model(e.into(), "reading the model"))?;
    for path in [dir.join("config.json")].iter().chain(&weights) {
        let file = path.file_name().unwrap_or_default().to_string_lossy();
        let summed = std::fs::File::open(path).and_then(summed);
        let (bytes, sum) = summed.map_err(|e| BenchError::input(path, e))?;
        settings[&*file] = json!({ "bytes": bytes, "crc32": format!("{sum:08x}") });
    }
    Ok(settings)
}

/// Length and CRC-32 of what a reader gives.
fn summed(mut reader: impl Read) -> std::io::Result<(u64, u32)> {
    let (mut sum, mut bytes) = (crc32fast::Hasher::new(), 0);
    let mut piece = vec![0; 1 << 20];
    loop {
        match reader.read(&mut piece)? {
            0 => return Ok((bytes, sum.finalize())),
            n => {
                sum.update(&piece[..n]);
                bytes += n as u64;
            }
        }
    }
}

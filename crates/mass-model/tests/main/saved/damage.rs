//! Ways to damage a checkpoint.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test file uses a part of it"
)]

use std::path::Path;

use mass_model::ModelError;
use mass_model::checkpoint::{self, CheckpointError};
use mass_model::lm::LanguageModel;

use super::saved;

/// Writes the list of checksums anew, so that what is wrong has to be found by other means.
pub fn seal(folder: &Path) {
    let mut text = String::new();
    for name in [
        "model.safetensors",
        "optimizer.safetensors",
        "ema.safetensors",
        "state.json",
    ] {
        if let Ok(bytes) = std::fs::read(folder.join(name)) {
            let crc = crc32fast::hash(&bytes);
            text += &format!("{crc:08x} {} {name}\n", bytes.len());
        }
    }
    let own = crc32fast::hash(text.as_bytes());
    text += &format!("{own:08x} {} checksums\n", text.len());
    std::fs::write(folder.join("checksums"), text).unwrap();
}

/// A tensor of a file: type, shape, bytes.
pub type Raw = (safetensors::Dtype, Vec<usize>, Vec<u8>);

/// Rewrites the tensors of a file through a filter, and seals it.
pub fn rewrite(folder: &Path, file: &str, edit: &dyn Fn(&str, Raw) -> Option<Raw>) {
    let path = folder.join(file);
    let bytes = std::fs::read(&path).unwrap();
    let parsed = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut kept = Vec::new();
    for (name, view) in parsed.iter() {
        let raw = (view.dtype(), view.shape().to_vec(), view.data().to_vec());
        kept.extend(edit(name, raw).map(|raw| (name.to_owned(), raw)));
    }
    let views = kept.iter().map(|(name, (dtype, shape, data))| {
        let view = safetensors::tensor::TensorView::new(*dtype, shape.clone(), data);
        (name, view.unwrap())
    });
    std::fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
    seal(folder);
}

/// Edits the bytes of a file.
pub fn bytes(folder: &Path, file: &str, edit: &dyn Fn(&mut Vec<u8>)) {
    let path = folder.join(file);
    let mut bytes = std::fs::read(&path).unwrap();
    edit(&mut bytes);
    std::fs::write(&path, bytes).unwrap();
}

/// Edits the JSON beside the tensors, and seals it.
pub fn manifest(folder: &Path, edit: &dyn Fn(&mut serde_json::Value)) {
    bytes(folder, "state.json", &|bytes| {
        let mut json = serde_json::from_slice(bytes).unwrap();
        edit(&mut json);
        *bytes = serde_json::to_vec(&json).unwrap();
    });
    seal(folder);
}

/// Replaces the tensor that most cases aim at and leaves the others.
pub fn only(name: &str, raw: Raw, new: Raw) -> Option<Raw> {
    Some(if name == VICTIM { new } else { raw })
}

/// Zeros in double precision.
pub fn f64_of(bytes: usize) -> Raw {
    (safetensors::Dtype::F64, vec![bytes / 8], vec![0; bytes])
}

/// The tensor that most cases aim at.
pub const VICTIM: &str = "blocks.1.moe.experts.2.fc1.bias";

/// A way to damage a checkpoint.
pub struct Case {
    pub what: &'static str,
    /// The file that the error has to name.
    pub file: &'static str,
    /// Given the folder that `latest` names.
    pub damage: Box<dyn Fn(&Path)>,
    /// Whether an error is the right one.
    pub expected: Box<dyn Fn(&CheckpointError) -> bool>,
}

pub fn case(
    what: &'static str,
    file: &'static str,
    damage: impl Fn(&Path) + 'static,
    expected: impl Fn(&CheckpointError) -> bool + 'static,
) -> Case {
    Case {
        what,
        file,
        damage: Box::new(damage),
        expected: Box::new(expected),
    }
}

/// Damages a checkpoint for every case and looks at the error.
pub fn refuse_all(cases: Vec<Case>) {
    for Case {
        what,
        file,
        damage,
        expected,
    } in cases
    {
        let dir = tempfile::tempdir().unwrap();
        let folder = saved(dir.path(), 3);
        damage(&folder);
        match checkpoint::load::<LanguageModel, String>(dir.path()) {
            Err(ModelError::Checkpoint { path, why }) => {
                assert!(path.ends_with(file), "{what}: {} is blamed", path.display());
                assert!(expected(&why), "{what}: {why:?}");
            }
            Err(e) => panic!("{what}: another error: {e}"),
            Ok(_) => panic!("{what}: it was read"),
        }
    }
}

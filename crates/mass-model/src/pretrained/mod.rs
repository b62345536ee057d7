//! Pretrained weights in Hugging Face's layout: a folder with `config.json` and `model.safetensors`.
//!
//! Weights stored as `F32`, `F16` or `BF16` are read as `f32`. A model in several files is read through its
//! `model.safetensors.index.json`; a `model.safetensors` beside it that the index does not name is refused, since either could be
//! meant. Files are read tensor by tensor, so a model needs no second copy of itself in memory,
//! and nothing is allocated before a file has been seen to hold it.
//!
//! ```no_run
//! use mass_model::pretrained::Weights;
//! use std::path::Path;
//!
//! let weights = Weights::open(Path::new("bert-base-cased"))?;
//! let table = weights.read("bert.embeddings.word_embeddings.weight", &[28996, 768])?;
//! assert_eq!(table.len(), 28996 * 768);
//! # Ok::<(), mass_model::pretrained::PretrainedError>(())
//! ```

pub(crate) mod activation;
mod config;
mod source;
mod weights;

use std::fs::{self, File};
use std::path::{Path, PathBuf};

pub use config::read_config;
pub(crate) use config::{config_file, field_error, from_fields, present};
pub(crate) use source::{Blank, Drawn, Head, Kind, Part, Source, Stored};
pub use weights::{Weights, shards, weight_files};

use crate::checkpoint::CheckpointError;
use crate::error::ModelError;

/// What can be wrong with a folder of pretrained weights.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PretrainedError {
    /// A file could not be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A field of `config.json` that has no value or one that cannot be meant.
    #[error("{}: field {field:?}: {why}", path.display())]
    Field {
        /// Which file.
        path: PathBuf,
        /// Which field.
        field: String,
        /// What is wrong with it.
        why: String,
    },
    /// A file that is not what its name says: no JSON, a damaged header, fewer bytes than the header promises.
    #[error("{}: {why}", path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What is wrong, naming the tensor where there is one.
        why: String,
    },
    /// A tensor that should be there.
    #[error("{}: tensor {tensor} is missing", path.display())]
    Missing {
        /// Which file, or the folder of several.
        path: PathBuf,
        /// Which tensor.
        tensor: String,
    },
    /// A tensor of another shape than the configuration says.
    #[error("{}: tensor {tensor} is {actual:?}, the configuration says {expected:?}", path.display())]
    Shape {
        /// Which file.
        path: PathBuf,
        /// Which tensor.
        tensor: String,
        /// Its shape by the configuration.
        expected: Vec<usize>,
        /// Its shape in the file.
        actual: Vec<usize>,
    },
    /// A tensor of a type that is not read as `f32`.
    #[error("{}: tensor {tensor} is {dtype}; F32, F16 and BF16 can be read", path.display())]
    Dtype {
        /// Which file.
        path: PathBuf,
        /// Which tensor.
        tensor: String,
        /// Its type.
        dtype: String,
    },
    /// A tensor that holds a NaN or an infinity.
    #[error("{}: tensor {tensor} is not finite at element {position}", path.display())]
    NonFinite {
        /// Which file.
        path: PathBuf,
        /// Which tensor.
        tensor: String,
        /// The first such element.
        position: usize,
    },
    /// A tensor of the model that the configuration has no place for.
    #[error("{}: tensor {tensor} has no place in a model of this configuration", path.display())]
    Unused {
        /// Which file.
        path: PathBuf,
        /// Which tensor.
        tensor: String,
    },
}

impl PretrainedError {
    fn path(&self) -> &Path {
        match self {
            Self::Io { path, .. }
            | Self::Field { path, .. }
            | Self::Damaged { path, .. }
            | Self::Missing { path, .. }
            | Self::Shape { path, .. }
            | Self::Dtype { path, .. }
            | Self::NonFinite { path, .. }
            | Self::Unused { path, .. } => path,
        }
    }
}

impl From<PretrainedError> for ModelError {
    fn from(e: PretrainedError) -> Self {
        match e {
            PretrainedError::Io { path, source } => Self::Io { path, source },
            e => {
                let (path, message) = (e.path().to_owned(), e.to_string());
                // The message begins with the path, which the model's error puts there itself.
                let start = format!("{}: ", path.display());
                let why = message.strip_prefix(&start).unwrap_or(&message).to_owned();
                let why = CheckpointError::Pretrained(why);
                Self::Checkpoint { path, why }
            }
        }
    }
}

fn io(path: &Path) -> impl Fn(std::io::Error) -> PretrainedError + '_ {
    move |source| PretrainedError::Io {
        path: path.to_owned(),
        source,
    }
}

/// Opens a regular file. Another kind is refused unopened: reading a pipe or a device could wait for ever.
fn open(path: &Path) -> Result<File, PretrainedError> {
    if !fs::metadata(path).map_err(io(path))?.is_file() {
        return Err(damaged(path, "not a regular file"));
    }
    File::open(path).map_err(io(path))
}

fn damaged(path: &Path, why: impl std::fmt::Display) -> PretrainedError {
    PretrainedError::Damaged {
        path: path.to_owned(),
        why: why.to_string(),
    }
}

/// A configuration that was read and that no model can have: which file it is in.
pub(crate) fn checked(dir: &Path, check: Result<(), ModelError>) -> Result<(), ModelError> {
    check.map_err(|e| match e {
        ModelError::Config(why) => damaged(&config_file(dir), why).into(),
        other => other,
    })
}

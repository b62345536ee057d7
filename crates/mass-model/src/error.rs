//! What can go wrong in a model.

use std::path::PathBuf;

use dfdx::tensor::CpuError;

use crate::checkpoint::CheckpointError;

/// An error of a layer, an optimiser or a checkpoint.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// A tensor or slice has another shape than the operation needs.
    #[error("{what}: expected shape {expected:?}, got {actual:?}")]
    Shape {
        /// Which input.
        what: String,
        /// The shape needed.
        expected: Vec<usize>,
        /// The shape given.
        actual: Vec<usize>,
    },
    /// A configuration value that no model can have.
    #[error("configuration: {0}")]
    Config(String),
    /// A class or token index past the end of its table.
    #[error("{what} {index} at position {position} is out of range (there are {len})")]
    Index {
        /// What the index counts ("token", "class").
        what: &'static str,
        /// The index.
        index: u32,
        /// Where it stands in the input.
        position: usize,
        /// Size of the table.
        len: usize,
    },
    /// An expert that is not in the pool.
    #[error("no expert {0} in this layer")]
    NoSuchExpert(u32),
    /// A NaN or infinity where a number is needed.
    #[error("{0} is not finite")]
    NonFinite(String),
    /// The router refused its input.
    #[error("routing: {0}")]
    Routing(#[from] mass_routing::RoutingError),
    /// The expansion engine refused its input.
    #[error("expansion: {0}")]
    Expand(#[from] mass_expand::ExpandError),
    /// The tensor library failed.
    #[error("tensor library: {0}")]
    Tensor(#[from] CpuError),
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A checkpoint that does not hold what it should.
    #[error("checkpoint {}: {why}", path.display())]
    Checkpoint {
        /// Which file.
        path: PathBuf,
        /// What is wrong, naming the tensor where there is one.
        why: CheckpointError,
    },
}

impl ModelError {
    pub(crate) fn shape(what: impl Into<String>, expected: &[usize], actual: &[usize]) -> Self {
        Self::Shape {
            what: what.into(),
            expected: expected.to_vec(),
            actual: actual.to_vec(),
        }
    }
}

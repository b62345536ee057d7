//! What can go wrong in a model.

mod checkpoint;

use std::cell::Cell;
use std::path::PathBuf;

use dfdx::tensor::CpuError;

pub use checkpoint::{CheckpointError, ExpertCounts};

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
    /// A gradient was asked for that no operation of a backward pass has written.
    #[error("{0} has no gradient: no operation of the backward pass wrote one, or it was used up")]
    NoGradient(String),
    /// A NaN or infinity where a number is needed.
    #[error("{0} is not finite")]
    NonFinite(String),
    /// The router refused its input.
    #[error("routing: {0}")]
    Routing(#[from] mass_routing::RoutingError),
    /// The expansion engine refused its input.
    #[error("expansion: {0}")]
    Expand(#[from] mass_expand::ExpandError),
    /// Ranks that train together failed, or parted.
    #[error("{0}")]
    Parallel(#[from] crate::parallel::ParallelError),
    /// The tensor library failed.
    #[error("tensor library: {0}")]
    Tensor(#[from] CpuError),
    /// The CUDA device refused its input, ran out of memory or failed.
    #[cfg(feature = "cuda")]
    #[error("{0}")]
    Cuda(#[from] mass_cuda::CudaError),
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

thread_local! {
    static LAST: Cell<Option<ModelError>> = const { Cell::new(None) };
}

/// What dfdx can be told of an error: its own has no room for more. [`last_error`] knows the rest.
pub(crate) fn into_dfdx(error: ModelError) -> CpuError {
    match error {
        ModelError::Tensor(error) => error,
        other => {
            LAST.set(Some(other));
            CpuError::WrongNumElements
        }
    }
}

/// What a layer of this crate refused last on this thread inside a model of dfdx, which knows `CpuError` alone; none if nothing
/// was refused since this was asked last. Call `try_forward` of such a model: `Module::forward` panics on every error.
///
/// ```
/// use dfdx::prelude::*;
/// use mass_model::nn::LayerNorm;
///
/// let model = (LayerNorm::new(4, 1e-5)?, ReLU);
/// assert!(model.try_forward(Cpu::default().ones_like(&(2, 3))).is_err());
/// let refused = mass_model::last_error().unwrap().to_string();
/// assert_eq!(refused, "input of layer norm: expected shape [2, 4], got [2, 3]");
/// # Ok::<(), mass_model::ModelError>(())
/// ```
pub fn last_error() -> Option<ModelError> {
    LAST.take()
}

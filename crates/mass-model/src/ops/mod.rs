//! Fused differentiable operations on dfdx tensors.
//!
//! Each takes its input by value with its tape, as dfdx's own operations do, and its parameters by reference. The
//! gradient of an operation's output is consumed by the operation itself during the backward pass (its memory is reused),
//! so ask dfdx for gradients of parameters and inputs, not of intermediate results.

mod activations;
mod add;
mod apart;
mod assemble;
mod attention;
mod cross_entropy;
#[cfg(feature = "cuda")]
mod cuda;
mod embedding;
mod feed_forward;
mod gate;
mod layer_norm;
mod linear;
mod moe;
mod network;
mod pass;
mod routing_loss;
mod rows;
mod sequences;

pub(crate) use activations::{Activations, enter, on_tensors};
pub use add::{add, dropout};
pub(crate) use assemble::Taps;
pub use attention::{Attention, self_attention};
pub use cross_entropy::{MeanAndRows, cross_entropy, token_losses};
pub(crate) use cross_entropy::{ROW, Scalar};
#[cfg(feature = "cuda")]
pub(crate) use cuda::Cuda;
#[cfg(feature = "cuda")]
pub use cuda::CudaGradients;
pub use embedding::embedding;
pub use feed_forward::feed_forward;
pub use gate::Gate;
pub(crate) use gate::set_thresholds;
pub use layer_norm::layer_norm;
pub use linear::linear;
pub use moe::{MoeExpert, moe_ffn};
pub use network::Network;
#[cfg(feature = "cuda")]
pub(crate) use pass::Ahead;
pub(crate) use pass::{Host, Pass, Route, Routing, Training, check_loss};
pub use routing_loss::RoutingLoss;
pub use rows::{pick_rows, scale_rows};
pub use sequences::Sequences;

use dfdx::prelude::{Cpu, Tensor};

use crate::error::ModelError;

/// A batch of vectors, one a row: the shape in which activations travel.
pub type Rows<T> = Tensor<(usize, usize), f32, Cpu, T>;

pub(crate) fn expect_width(
    what: &str,
    &(rows, cols): &(usize, usize),
    width: usize,
) -> Result<(), ModelError> {
    if rows == 0 || cols != width {
        return Err(ModelError::shape(
            what,
            &[rows.max(1), width],
            &[rows, cols],
        ));
    }
    Ok(())
}

/// Takes a tensor's gradient out of the gradients, leaving an empty one behind.
macro_rules! take_gradient {
    ($gradients:expr, $ghost:expr) => {
        std::mem::take(&mut **$gradients.get_or_alloc_mut(&$ghost)?)
    };
}
pub(crate) use take_gradient;

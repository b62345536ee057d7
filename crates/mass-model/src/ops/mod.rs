//! Fused differentiable operations on dfdx tensors.
//!
//! Each takes its input by value with its tape, as dfdx's own operations do, and its parameters by reference. The
//! gradient of an operation's output is consumed by the operation itself during the backward pass (its memory is reused),
//! so ask dfdx for gradients of parameters and inputs, not of intermediate results.

mod add;
mod attention;
mod cross_entropy;
mod embedding;
mod feed_forward;
mod gate;
mod layer_norm;
mod linear;
mod moe;
mod network;
mod routing_loss;
mod rows;
mod sequences;

pub use add::{add, dropout};
pub use attention::{Attention, self_attention};
pub use cross_entropy::{MeanAndRows, cross_entropy, token_losses};
pub use embedding::embedding;
pub use feed_forward::feed_forward;
pub use gate::Gate;
pub(crate) use gate::set_thresholds;
pub use layer_norm::layer_norm;
pub use linear::linear;
pub(crate) use moe::moe_ffn_with;
pub use moe::{MoeExpert, moe_ffn};
pub use network::Network;
pub use routing_loss::RoutingLoss;
pub use rows::{pick_rows, scale_rows};
pub use sequences::Sequences;

use dfdx::prelude::{Cpu, HasShape, Tape, Tensor};

use crate::error::ModelError;
use crate::kernels::scratch::Scratch;

/// A batch of vectors, one a row: the shape in which activations travel.
pub type Rows<T> = Tensor<(usize, usize), f32, Cpu, T>;

/// Copies a tensor's elements, in row-major order. `x` must be contiguous.
pub(crate) fn read<T: Tape<f32, Cpu>>(x: &Rows<T>) -> Scratch {
    let (rows, cols) = *x.shape();
    let mut data = Scratch::take(rows * cols);
    x.copy_into(&mut data);
    data
}

pub(crate) fn expect_width<T: Tape<f32, Cpu>>(
    what: &str,
    x: &Rows<T>,
    width: usize,
) -> Result<(), ModelError> {
    let (rows, cols) = *x.shape();
    if rows == 0 || cols != width {
        return Err(ModelError::shape(
            what,
            &[rows.max(1), width],
            &[rows, cols],
        ));
    }
    Ok(())
}

/// Adds to a gradient, in as many threads as there are.
pub(crate) fn add_gradient(upstream: Vec<f32>, gradient: &mut [f32]) {
    crate::kernels::dropout::add_masked(None, &upstream, gradient);
}

/// Takes a tensor's gradient out of the gradients, leaving an empty one behind.
macro_rules! take_gradient {
    ($gradients:expr, $ghost:expr) => {
        std::mem::take(&mut **$gradients.get_or_alloc_mut(&$ghost)?)
    };
}
pub(crate) use take_gradient;

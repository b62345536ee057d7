//! Layers: dfdx modules whose sizes are known at run time.

mod attention;
mod block;
mod feed_forward;
mod in_dfdx;
mod layer_norm;
mod linear;
mod moe;

pub use attention::SelfAttention;
pub use block::{Block, BlockConfig};
pub use feed_forward::FeedForward;
pub use in_dfdx::{Unbuilt, Widened};
pub use layer_norm::LayerNorm;
pub use linear::Linear;
pub use moe::{GateConfig, MoeConfig, MoeLayer, Routed};

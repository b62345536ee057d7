//! Optimisers and averages whose parameter set can grow, and what goes with them.

mod accumulate;
mod adamw;
mod ema;
mod groups;
mod schedule;

pub use accumulate::GradientAccumulator;
pub(crate) use adamw::sum_of_squares;
pub use adamw::{AdamW, AdamWConfig, Gradients, ParameterState};
pub use ema::{Ema, EmaConfig};
pub use groups::{Group, Select};
pub use schedule::{Decay, Schedule};

//! Optimisers and averages whose parameter set can grow, and what goes with them.

mod accumulate;
mod adamw;
mod ema;
mod gradients;
mod groups;
mod schedule;

pub use accumulate::GradientAccumulator;
pub use adamw::{AdamW, AdamWConfig, ParameterState};
pub(crate) use adamw::{Due, Rule};
pub use ema::{Ema, EmaConfig};
pub use gradients::Gradients;
pub(crate) use gradients::Sealed;
pub use groups::{Group, Select};
pub use schedule::{Decay, Schedule};

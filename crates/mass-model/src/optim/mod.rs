//! Optimisers whose parameter set can grow.

mod adamw;
mod schedule;

pub(crate) use adamw::sum_of_squares;
pub use adamw::{AdamW, AdamWConfig, ParameterState};
pub use schedule::Schedule;

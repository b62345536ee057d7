//! Tests of `mass-routing` from outside, in one binary: each binary is linked by itself.

#[cfg(feature = "real-data")]
#[path = "../golden/main.rs"]
mod golden;
mod gradients;
mod losses;
mod own_plans;
mod parts;
mod routing;
mod settings;
mod statistics;
mod steady_state;

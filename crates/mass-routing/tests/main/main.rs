//! Tests of `mass-routing` from outside, in one binary: each binary is linked by itself.

mod golden;
mod golden_gates;
mod golden_top_p;
mod gradients;
mod losses;
mod own_plans;
mod routing;
mod settings;
mod statistics;
mod steady_state;

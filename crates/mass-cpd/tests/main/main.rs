//! Tests of `mass-cpd` from outside, in one binary: each binary is linked by itself.

mod bank;
mod changes;
mod detectors;
mod explosion;
#[cfg(feature = "real-data")]
#[path = "../golden/main.rs"]
mod golden;
mod horizon;
mod interface;
mod lagged;
mod offline;
mod readiness;
mod run_length;
mod segmentation;
mod simulation;

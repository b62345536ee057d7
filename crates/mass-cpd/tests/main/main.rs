//! Tests of `mass-cpd` from outside, in one binary: each binary is linked by itself.

mod bank;
mod changes;
mod detectors;
mod explosion;
mod golden_run_length;
mod golden_windowed_z;
mod interface;
mod lagged;
mod offline;
mod readiness;
mod real_gradient_norms;
mod real_tcpd;
mod run_length;
mod segmentation;
mod simulation;

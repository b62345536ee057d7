//! Tests of `mass-bench` from outside, in one binary: each binary is linked by itself.

#[cfg(feature = "browser")]
mod browser;
mod cli;
mod configurations;
#[cfg(feature = "cuda")]
mod cuda;
mod data_check;
// It asks the registry about packages of every platform.
#[cfg(feature = "hub")]
mod dependencies;
mod dg_data;
mod dg_study;
mod documents;
mod dynmoe;
mod fuzz;
mod ginc;
mod glue_data;
mod glue_metrics;
mod glue_study;
mod glue_tokenise;
#[cfg(feature = "real-data")]
#[path = "../golden/main.rs"]
mod golden;
mod hub;
mod models;
#[cfg(feature = "mpi")]
mod mpi;
mod process;
mod report;
mod shards;
mod synthetic;
mod text;

//! Tests of `mass-expand` from outside, in one binary: each binary is linked by itself.

mod arithmetic;
mod configuration;
mod controller_alarms;
mod controller_detectors;
mod controller_diagnoses;
mod controller_plateau;
mod controller_properties;
mod controller_reach;
mod controller_refusals;
mod controller_rules;
mod controller_selection;
mod controller_trace;
mod controller_variants;
mod drive;
#[cfg(feature = "real-data")]
#[path = "../golden/main.rs"]
mod golden;

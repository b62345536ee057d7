//! Tests of `mass-cpd` on golden values and real data, which $MASS_GOLDEN_DIR, $MASS_DATA_DIR and $MASS_MODELS_DIR name: what is
//! missing fails its test. `cargo test --test golden` runs them, and the feature `real-data` puts them among the others.

// With the feature it is beside the others' too.
#[allow(clippy::duplicate_mod)]
#[path = "../main/horizon.rs"]
mod horizon;
mod real_gradient_norms;
#[cfg(feature = "offline")]
mod real_tcpd;
mod run_length;
mod windowed_z;

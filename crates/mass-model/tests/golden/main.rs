//! Tests of `mass-model` on golden values and real data, which $MASS_GOLDEN_DIR, $MASS_DATA_DIR and $MASS_MODELS_DIR name: what is
//! missing fails its test. `cargo test --test golden` runs them, and the feature `real-data` puts them among the others.

// With the feature it is beside the others' too.
#[allow(clippy::duplicate_mod)]
#[path = "../main/hf_names/mod.rs"]
mod hf_names;
mod layers;
mod pretrained;

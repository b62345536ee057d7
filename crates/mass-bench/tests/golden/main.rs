//! Tests of `mass-bench` on golden values and real data, which $MASS_GOLDEN_DIR, $MASS_DATA_DIR and $MASS_MODELS_DIR name: what is
//! missing fails its test. `cargo test --test golden` runs them, and the feature `real-data` puts them among the others.

mod data;
mod ginc;
mod images;
mod tokenise;

#![doc = include_str!("../README.md")]

pub mod bert;
pub mod checkpoint;
mod encoder;
mod error;
pub mod growth;
pub mod kernels;
mod lineage;
pub mod lm;
pub mod nn;
pub mod ops;
pub mod optim;
mod param;
pub mod pretrained;
pub mod vit;

pub use dfdx;
pub use error::ModelError;
pub use kernels::activation::Activation;
pub use kernels::dropout::{Dropout, DropoutKeys};
pub use kernels::scratch::release_scratch;
pub use param::{CpuGradients, Param, Parameters};

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

/// The random number generator that weights are drawn from: the same values on every machine.
pub fn seeded_rng(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

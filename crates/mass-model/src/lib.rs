#![doc = include_str!("../README.md")]

pub mod bert;
pub mod checkpoint;
mod encoder;
mod error;
mod gradients;
pub mod growth;
#[doc(hidden)]
pub mod kernels;
mod lineage;
pub mod lm;
mod mirror;
mod mixtures;
pub mod nn;
pub mod ops;
pub mod optim;
pub mod parallel;
mod param;
mod pass;
mod place;
pub mod pretrained;
pub mod vit;

pub use dfdx;
pub use error::{ModelError, last_error};
pub use gradients::CpuGradients;
pub use kernels::activation::Activation;
pub use kernels::dropout::{Dropout, DropoutKeys};
pub use kernels::scratch::release_scratch;
#[cfg(feature = "cuda")]
pub use mass_cuda;
pub use mirror::Mirror;
#[doc(hidden)]
pub use param::join;
pub use param::{Param, Parameters};
pub use pass::{GateInput, LayerTrace, Masked, TrainPass};
pub use place::{Place, PlacedGradients};

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

/// The random number generator that weights are drawn from: the same values on every machine.
pub fn seeded_rng(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

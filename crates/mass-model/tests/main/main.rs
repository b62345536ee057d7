//! Tests of `mass-model` from outside, in one binary: each binary is linked by itself.

mod bert;
mod checkpoint;
mod configurations;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "cuda")]
mod cuda_faults;
#[cfg(feature = "cuda")]
mod cuda_growth;
mod damage;
mod encoder_checkpoints;
mod experts;
mod followed;
mod fuzz;
#[cfg(feature = "real-data")]
#[path = "../golden/main.rs"]
mod golden;
mod gradients;
mod growing;
mod growth;
mod growth_diagnoses;
mod growth_entropy;
mod growth_gradients;
mod hf_names;
mod hostile;
mod in_dfdx;
mod kill;
mod layers;
mod optim;
mod own_models;
mod parallel;
mod passed_over;
mod pretrained;
mod refused;
mod routers;
mod saved;
mod vit;
mod vit_files;

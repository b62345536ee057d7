//! Tests of `mass-model` from outside, in one binary: each binary is linked by itself.

mod allocations;
mod bert;
mod checkpoint;
mod configurations;
mod damage;
mod encoder_checkpoints;
mod experts;
mod fuzz;
mod golden;
mod golden_pretrained;
mod gradients;
mod growing;
mod growth;
mod growth_gradients;
mod hf_names;
mod hostile;
mod kill;
mod layers;
mod optim;
mod pretrained;
mod saved;
mod vit;
mod vit_files;

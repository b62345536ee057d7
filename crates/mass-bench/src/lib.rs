//! Data, baselines, experiments and reports for MASS.
//!
//! | module | what it holds |
//! |---|---|
//! | [`dg`] | image sets of several domains: files, augmentation, splits, features of a frozen trunk |
//! | [`dynmoe`] | DynMoE's changes to a pool while it trains |
//! | [`glue`] | the nine GLUE tasks: files, metrics, tokenisation, batches |
//! | [`ginc`] | the GINC generator (a mixture of hidden Markov models), its Bayes filter and its loss floors |
//! | [`text`] | any text file as a byte-level data set |
//! | [`batch`] | token batches that are a pure function of a seed and a step |
//! | [`report`] | results.json, metrics.jsonl, events.jsonl, the terminal table and report.html |
//! | [`study`] | the experiments by name |
//! | [`method`] | what is compared, as data: MASS and its ablations, static pools, DynMoE, GMoE |
//! | [`task`] | what a run is of: batches, model, loss, score |
//! | [`trainer`] | the training loop, of every task and method, that can stop at any step and go on |
//! | [`sweep`] | many independent runs on a few threads |
//! | [`language`] | next-token prediction, the task of the synthetic study and of `train` |
//! | [`prefetch`] | batches made ahead by a thread of their own |
//! | [`train`] | a byte-level language model on one's own text |
//! | [`score`] | a text scored by a model that `train` has left |
//! | [`mod@bench`] | short timings of what this crate does itself |
//! | `hub` | models from the Hugging Face Hub (feature `hub`) |
//! | [`data_check`] | which data sets and models are there, and where to get the rest |
//! | [`cli`] | the arguments of the `mass-bench` binary, checked, and its progress display |
//!
//! Nothing in here is needed to use a MASS layer: models live in `mass-model`.
#![forbid(unsafe_code)]

pub mod batch;
pub mod bench;
pub mod cli;
pub mod data_check;
pub mod dg;
mod durable;
pub mod dynmoe;
mod error;
mod fnv;
pub mod ginc;
pub mod glue;
#[cfg(feature = "hub")]
pub mod hub;
pub mod language;
pub mod method;
pub mod prefetch;
pub mod report;
pub mod rng;
pub mod score;
pub mod study;
pub mod sweep;
pub mod task;
pub mod text;
pub mod train;
pub mod trainer;

pub use error::BenchError;

/// Compiles and runs the example of the project's README.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct ProjectReadme;

//! The arguments of the `mass-bench` binary, checked once, and what a running command needs.

mod context;
mod device;
mod parallel;
mod parse;
mod progress;
mod reproduce;
mod score;
mod train;

pub use context::RunContext;
pub use device::Device;
pub use parallel::Parallel;
pub use parse::{BenchCommand, Cli, Command, DataCommand, ReportCommand, main};
pub use progress::Progress;
pub(crate) use reproduce::directory;
pub use reproduce::{ReproduceArgs, Shard};
pub use score::ScoreArgs;
pub use train::TrainArgs;

use std::{fmt, num::NonZeroUsize};

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::BenchError;

/// How much of a study is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Preset {
    /// Under 60 s: does everything connect? Its figures mean nothing.
    Smoke,
    /// Under 10 minutes on two cores; glue and dg: under 30.
    Quick,
    /// The best honest study a workstation does in a night.
    Full,
    /// The paper's own settings, for a GPU.
    Paper,
}

/// Whose rules an expansion follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Variant {
    /// What the paper writes.
    Paper,
    /// What the authors' released code does.
    Reference,
    /// The paper's aim with a known false-alarm rate.
    Calibrated,
    /// This project's own rules.
    Ours,
}

impl Variant {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Paper, Self::Reference, Self::Calibrated, Self::Ours];
}

macro_rules! display_as_value {
    ($($name:ty),*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                // Every variant has a name: none is hidden.
                f.write_str(self.to_possible_value().as_ref().map_or("", |v| v.get_name()))
            }
        }
    )*};
}
display_as_value!(Preset, Variant);

/// An error that names the flag unless `value` is within `1..=most`.
fn within(flag: &str, value: usize, most: usize) -> Result<(), BenchError> {
    if (1..=most).contains(&value) {
        Ok(())
    } else {
        Err(BenchError::Usage(format!(
            "{flag} is {value}; it must be between 1 and {most}"
        )))
    }
}

/// As many threads as the machine has.
fn all_threads() -> usize {
    std::thread::available_parallelism().map_or(1, NonZeroUsize::get)
}

use std::path::PathBuf;

use clap::Args;

use super::{Device, all_threads, within};
use crate::BenchError;

/// `score` as typed.
#[derive(Debug, Clone, Args)]
pub struct ScoreArgs {
    /// What `train` had as --out, one run of its checkpoints, or one step-N of a run
    #[arg(value_name = "CHECKPOINT")]
    pub checkpoint: PathBuf,
    /// The text, of one window of the model at least
    #[arg(value_name = "TEXT")]
    pub text: PathBuf,
    /// Threads [default: all]
    #[arg(long, value_name = "N", default_value_t = all_threads(), hide_default_value = true)]
    pub threads: usize,
    /// What computes: cpu, cuda (the first GPU) or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "cpu", value_parser = Device::parse)]
    pub device: Device,
    /// Print the figures as JSON
    #[arg(long)]
    pub json: bool,
}

impl ScoreArgs {
    /// # Errors
    /// [`BenchError::Usage`], which names the flag.
    pub(crate) fn check(&self) -> Result<(), BenchError> {
        within("--threads", self.threads, 1024)
    }
}

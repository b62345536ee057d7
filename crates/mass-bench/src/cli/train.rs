use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use clap::Args;
use mass_routing::RouterConfig;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::reproduce::{existing, not_a_file};
use super::{Device, Parallel, Variant, all_threads, within};
use crate::method::MASS;
use crate::report::Existing;
use crate::{BenchError, method};

/// The method unless another is named.
fn mass() -> String {
    MASS.into()
}

fn is_mass(method: &str) -> bool {
    method == MASS
}

/// Experts at the start unless told otherwise.
const EXPERTS: usize = 4;

/// Experts at most unless told otherwise.
const EXPERTS_MAX: usize = 16;

/// Writes a number that may be given, else its default.
fn or<S: Serializer, const N: usize>(given: &Option<usize>, to: S) -> Result<S::Ok, S::Error> {
    given.unwrap_or(N).serialize(to)
}

/// Reads a number; its default is none that was given.
fn unless<'a, D: Deserializer<'a>, const N: usize>(from: D) -> Result<Option<usize>, D::Error> {
    usize::deserialize(from).map(|n| Some(n).filter(|n| *n != N))
}

/// `train`, whose ranges [`check`](Self::check) looks at. Serialises as the settings that decide its figures.
#[derive(Debug, Clone, PartialEq, Args, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[command(allow_negative_numbers = true)]
pub struct TrainArgs {
    /// The text: any file of text without NUL bytes (UTF-8, Latin-1 and so on, but not UTF-16)
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    pub text: PathBuf,
    /// What takes the place of the feed-forward networks: mass, static, dense, dynmoe, gmoe, or an ablation of MASS by name
    #[arg(long, value_name = "METHOD", default_value = MASS)]
    #[serde(default = "mass", skip_serializing_if = "is_mass")]
    pub method: String,
    /// Training steps; learning rate and growth follow from their number, so --resume cannot change it
    #[arg(long, value_name = "N", default_value_t = 1000)]
    pub steps: usize,
    /// Routing mass p of Top-p, in (0, 1] [default: 0.5]
    #[arg(long, value_name = "P")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub p: Option<f64>,
    /// How tokens choose experts, instead of Top-p of mass --p: NAME:SETTING=VALUE,... with top_p, top_k, top_any, bias_balanced,
    /// target_k, expert_choice or noisy, such as bias_balanced:k=2,rate=0.001 or noisy:std=0.25/top_k:k=2,combine=raw
    #[arg(long, value_name = "ROUTER", conflicts_with = "p", value_parser = method::parse_router)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub router: Option<RouterConfig>,
    /// Experts at the start [default: 4]
    #[arg(long, value_name = "N")]
    #[serde(
        serialize_with = "or::<_, EXPERTS>",
        deserialize_with = "unless::<_, EXPERTS>"
    )]
    pub experts: Option<usize>,
    /// Experts at most [default: 16]
    #[arg(long, value_name = "N")]
    #[serde(
        serialize_with = "or::<_, EXPERTS_MAX>",
        deserialize_with = "unless::<_, EXPERTS_MAX>"
    )]
    pub experts_max: Option<usize>,
    /// Width of the model
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub dim: usize,
    /// Transformer layers
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub layers: usize,
    /// Attention heads; they divide --dim
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub heads: usize,
    /// Hidden width of one expert
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub hidden: usize,
    /// Bytes in a window
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub seq: usize,
    /// Windows in a batch
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub batch: usize,
    /// Peak learning rate
    #[arg(long, value_name = "LR", default_value_t = 3e-3)]
    pub lr: f64,
    /// Seed
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Threads [default: all]
    #[arg(long, value_name = "N", default_value_t = all_threads(), hide_default_value = true)]
    #[serde(skip)]
    pub threads: usize,
    /// Where results and checkpoints go, ten of these in a run, but at least 50 steps apart
    #[arg(long, value_name = "DIR", default_value = "target/train")]
    #[serde(skip)]
    pub out: PathBuf,
    /// Go on from the checkpoint in --out, if there is one
    #[arg(long)]
    #[serde(skip)]
    pub resume: bool,
    /// Delete what an earlier run has left in --out and begin anew
    #[arg(long, conflicts_with = "resume")]
    #[serde(skip)]
    pub fresh: bool,
    /// Whose expansion rules [default: ours; for ablations, and for routers whose experts cannot be bisected: paper]
    #[arg(long, value_enum)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<Variant>,
    /// What computes: cpu, cuda (the first GPU) or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "cpu", value_parser = Device::parse)]
    #[serde(skip)]
    pub device: Device,
    /// Share of the text, at its end, that is never trained on
    #[arg(long, value_name = "FRACTION", default_value_t = 0.1)]
    pub held_out: f64,
    /// Which processes train together
    #[arg(long, value_enum, default_value_t)]
    #[serde(skip)]
    pub parallel: Parallel,
    /// Processes of a group, among which experts are divided; every group has all of them
    #[arg(long, value_name = "N", default_value_t = 1)]
    #[serde(skip)]
    pub expert_parallel: usize,
    /// Sum gradients over processes while the backward pass goes on, as soon as VALUES of them are complete (1048576 is a good
    /// number); by default they are summed after it
    #[arg(long, value_name = "VALUES")]
    #[serde(skip)]
    pub overlap: Option<NonZeroUsize>,
    /// Print results.json alone on standard output
    #[arg(long)]
    #[serde(skip)]
    pub json: bool,
}

impl TrainArgs {
    /// What becomes of what `out` holds.
    #[must_use]
    pub fn existing(&self) -> Existing {
        existing(self.resume, self.fresh)
    }

    /// Experts at the start and at most.
    #[must_use]
    pub fn pool(&self) -> (usize, usize) {
        (
            self.experts.unwrap_or(EXPERTS),
            self.experts_max.unwrap_or(EXPERTS_MAX),
        )
    }

    /// Checks every range; the text itself is read later.
    ///
    /// # Errors
    /// [`BenchError::Usage`], saying what to give instead.
    pub fn check(&self) -> Result<(), BenchError> {
        let usage = |message: String| Err(BenchError::Usage(message));
        // Routers compute in f32.
        if let Some(p) = self.p.filter(|p| !(*p as f32 > 0.0 && *p <= 1.0)) {
            return usage(format!("--p is {p}; it must be above 0 and at most 1"));
        }
        if !(self.lr > 0.0 && self.lr.is_finite()) {
            return usage(format!(
                "--lr is {}; it must be above 0 and finite",
                self.lr
            ));
        }
        if !(self.held_out > 0.0 && self.held_out < 1.0) {
            return usage(format!(
                "--held-out is {}; it must be strictly between 0 and 1",
                self.held_out
            ));
        }
        let (experts, experts_max) = self.pool();
        for (flag, value, most) in [
            ("--steps", self.steps, 1_000_000_000),
            ("--experts", experts, 65_536),
            ("--experts-max", experts_max, 65_536),
            ("--dim", self.dim, 16_384),
            ("--layers", self.layers, 256),
            ("--heads", self.heads, 1024),
            ("--hidden", self.hidden, 65_536),
            ("--seq", self.seq, 65_536),
            ("--batch", self.batch, 65_536),
            ("--threads", self.threads, 1024),
        ] {
            within(flag, value, most)?;
        }
        if experts_max < experts
            && !matches!(self.method.as_str(), "static" | "gmoe" | "dense" | "erm")
        {
            return usage(format!(
                "--experts-max is {experts_max}, below --experts {experts}; raise it or start with fewer"
            ));
        }
        if !self.dim.is_multiple_of(self.heads) {
            return usage(format!(
                "--heads {} does not divide --dim {}",
                self.heads, self.dim
            ));
        }
        if Path::new("") == self.text {
            return usage("--text is empty; give the path of a text file".into());
        }
        not_a_file("--out", &self.out)
    }
}

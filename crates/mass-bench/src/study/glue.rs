//! The GLUE study: MASS in one layer of a pretrained BERT, beside the dense model, static pools and DynMoE.
//!
//! Every run fine-tunes the same pretrained model with the same settings; what differs is one layer, whose feed-forward
//! network is copied into a pool of experts behind a gate drawn at random. A run's figures are those of the epoch that scores
//! best on the development set, as the paper's are: selection and report share that set, for every method alike.

mod data;
mod finetune;
mod plan;
mod score;
#[cfg(test)]
mod tests;

use std::sync::OnceLock;

use serde_json::{Value, json};

use super::plan::{Assignment, Family, Planned};
use super::synthetic::DATA_SEED;
use super::unusable_model;
use crate::BenchError;
use crate::cli::{Preset, ReproduceArgs, RunContext};
use crate::glue::data::Dataset;
use crate::glue::sample;
use crate::glue::task::Task;
use crate::glue::tokenize::TextTokenizer;
use crate::rng::{Purpose, stream};
use crate::sweep::Side;
use crate::text::regular;
use data::TaskData;
use finetune::{FineTune, Pretrained};
pub(super) use plan::family;
pub use plan::plan;

/// What `--task` may name.
pub const TASKS: &[&str] = &Task::NAMES;

/// Tasks of GLUE for one pretrained model.
#[derive(Debug)]
pub struct Glue {
    args: ReproduceArgs,
    pretrained: Pretrained,
    /// Which model that is; see [`Glue::model`].
    model: OnceLock<Value>,
    pub(super) sets: Vec<Set>,
    batch: usize,
    max_length: usize,
    learning_rate: f64,
    /// Epochs without gain on the development set after which a run stops.
    patience: u64,
    /// Whether a run's figures are those of its last epoch, not of its best.
    pub(super) last: bool,
    log_every: u64,
    checkpoint_every: u64,
}

impl Glue {
    /// The model as settings keep it, read once.
    fn model(&self) -> Result<&Value, BenchError> {
        if let Some(model) = self.model.get() {
            return Ok(model);
        }
        let model = self.pretrained.settings()?;
        Ok(self.model.get_or_init(|| model))
    }

    /// The set of that name.
    fn set(&self, name: &str) -> Result<&Set, BenchError> {
        let found = self.sets.iter().find(|set| set.to_string() == name);
        found.ok_or_else(|| BenchError::Usage(format!("no set {name} in this study")))
    }

    /// The directory of data sets, which must have been given.
    fn data_dir(&self) -> Result<&std::path::Path, BenchError> {
        self.args.data.as_deref().ok_or_else(|| {
            BenchError::Usage(format!(
                "{}, preset {}, needs data: give --data DIR (or $MASS_DATA_DIR) with DIR/glue/<Task>/{{train,dev}}.tsv, or \
                 --preset smoke, which needs none",
                self.args.study, self.args.preset
            ))
        })
    }
}

/// A task's examples.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Set {
    pub(super) task: Task,
    pub(super) epochs: u64,
    /// Of the training labels, so many percent are wrong.
    pub(super) wrong: u64,
}

impl Set {
    pub(super) const fn new(task: Task, epochs: u64) -> Self {
        Self {
            task,
            epochs,
            wrong: 0,
        }
    }
}

/// "MRPC", or "MRPC-wrong-20".
impl std::fmt::Display for Set {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.wrong {
            0 => write!(f, "{}", self.task),
            wrong => write!(f, "{}-wrong-{wrong}", self.task),
        }
    }
}

impl Family for Glue {
    type Data = TaskData;
    type Task<'a> = FineTune<'a>;

    const SIDE: Side = Side::Alone;

    fn settings(&self) -> Result<Value, BenchError> {
        let mut settings = json!({
            "pretrained": self.model()?,
            "batch": self.batch,
            "max_length": self.max_length,
            "learning_rate": self.learning_rate,
            "patience": self.patience,
            "log_every": self.log_every,
        });
        for set in &self.sets {
            settings["tasks"][set.to_string()] = json!({ "epochs": set.epochs });
        }
        // Results of before there was a choice have nothing there.
        if self.last {
            settings["last"] = json!(true);
        }
        Ok(settings)
    }

    fn assignments(&self) -> Result<Vec<Assignment>, BenchError> {
        let assignment = |set: &Set| Assignment {
            set: set.to_string(),
            part: 0,
            task: Some(set.to_string()),
            metric: Some(set.task.metric_name()),
        };
        Ok(self.sets.iter().map(assignment).collect())
    }

    fn there(&self, set: &str) -> Result<(), BenchError> {
        if self.args.preset == Preset::Smoke {
            return Ok(());
        }
        Ok(Dataset::there(self.data_dir()?, self.set(set)?.task)?)
    }

    fn readable(&self, set: &str) -> Result<(), BenchError> {
        let (set, mut rng) = (self.set(set)?, stream(0, Purpose::Weights, 0));
        let read = self.pretrained.build(set.task.outputs(), &mut rng);
        read.map(drop)
            .map_err(|e| unusable_model(e, "reading the model"))
    }

    fn read(&self, set: &str, ctx: &mut RunContext) -> Result<TaskData, BenchError> {
        let &Set { task, wrong, .. } = self.set(set)?;
        let tokenizer = match &self.pretrained {
            Pretrained::Drawn(_) => {
                TextTokenizer::from_vocabulary(&sample::vocabulary(), true, self.max_length)?
            }
            Pretrained::Directory(dir) => TextTokenizer::open(dir, self.max_length)?,
        };
        let mut data = match self.args.preset {
            Preset::Smoke => sample::dataset(task),
            _ => Dataset::read(self.data_dir()?, task)?,
        };
        data.mislabel(wrong, DATA_SEED)?;
        if let Some(first) = data.skipped.first() {
            ctx.progress.note(&format!(
                "{task}: {} broken lines left out, the first {}, line {}: {}",
                data.skipped.len(),
                first.path.display(),
                first.line,
                first.problem
            ));
        }
        let data = TaskData::new(&tokenizer, &data)?;
        if let Pretrained::Directory(dir) = &self.pretrained {
            check_vocabulary(dir, &tokenizer)?;
        }
        Ok(data)
    }

    fn digest(&self, data: &TaskData) -> Option<u64> {
        Some(data.digest)
    }

    fn task<'a>(
        &'a self,
        data: &'a TaskData,
        planned: &'a Planned,
    ) -> Result<FineTune<'a>, BenchError> {
        let epochs = self.set(&planned.assignment.set)?.epochs;
        let (method, seed) = (&planned.method, planned.run.seed);
        FineTune::new(self, data, method, (seed, epochs))
    }
}

/// Whether the tokenizer's ids fit the model beside it.
fn check_vocabulary(dir: &std::path::Path, tokenizer: &TextTokenizer) -> Result<(), BenchError> {
    let path = dir.join("config.json");
    let input = |problem: String| BenchError::input(&path, problem);
    let text = regular(&path).map_err(|e| input(e.to_string()))?;
    let config: Value = serde_json::from_slice(&text).map_err(|e| input(e.to_string()))?;
    let size = config["vocab_size"].as_u64();
    let size = size.ok_or_else(|| input("no vocab_size".into()))?;
    Ok(tokenizer.check_fits(Some(size))?)
}

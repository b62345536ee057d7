//! What a run is of: its batches, its model, its loss and its score.

use std::path::Path;

use mass_model::checkpoint::Checkpointed;
use mass_model::growth::{GrowerConfig, LossOn};
use mass_model::optim::{AdamW, AdamWConfig, Schedule};
use mass_model::parallel::Ranks;
use mass_model::{LayerTrace, Masked, ModelError, Place, PlacedGradients, TrainPass};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::BenchError;
use crate::dynmoe::DynMoeConfig;
use crate::report::Run;

/// How long a task is trained, by which optimiser, and how often it is looked at.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Optimiser, with what it clips gradients to.
    pub adamw: AdamWConfig,
    /// Learning rate; its `steps` is the length of the run.
    pub schedule: Schedule,
    /// Steps between lines of metrics.jsonl.
    pub log_every: u64,
    /// Steps between checkpoints.
    pub checkpoint_every: u64,
}

/// A score on the way, as metrics.jsonl has it.
#[derive(Debug, Default)]
pub struct Scored {
    /// Loss on held-out data.
    pub test_loss: Option<f64>,
    /// What else the line says.
    pub extra: Map<String, Value>,
    /// Whether the run ends here, before its last step.
    pub stop: bool,
}

/// A finished run, for its last figures.
#[derive(Debug)]
pub struct Finished<'r, T: Task + ?Sized> {
    /// The model at the end.
    pub model: &'r T::Model,
    /// What scoring has left.
    pub progress: &'r T::Progress,
    /// The part of the time of training steps that was spent waiting for batches.
    pub waiting: Option<f64>,
}

/// The first of the largest values.
pub(crate) fn largest(row: &[f32]) -> usize {
    let mut best = 0;
    for (i, value) in row.iter().enumerate() {
        if *value > row[best] {
            best = i;
        }
    }
    best
}

/// How many experts tokens have, over mixtures and batches.
#[derive(Default)]
pub(crate) struct Active {
    assignments: usize,
    tokens: usize,
}

impl Active {
    pub(crate) fn add(&mut self, layers: &[LayerTrace]) {
        for layer in layers {
            self.assignments += layer.plan.num_assignments();
            self.tokens += layer.plan.num_tokens();
        }
    }

    /// Mean experts a token; `None` without a mixture.
    pub(crate) fn mean(&self) -> Option<f64> {
        (self.tokens > 0).then(|| self.assignments as f64 / self.tokens as f64)
    }
}

/// Data with a model for them: all that differs between studies in a run. The [`Trainer`](crate::trainer::Trainer) does the rest.
pub trait Task: Sync {
    /// The model, which may have no mixture.
    type Model: Checkpointed;
    /// What a step learns from.
    type Batch: Send;
    /// What scoring on the way leaves, of which checkpoints keep what is serialised.
    type Progress: Default + Serialize + DeserializeOwned;

    /// Whether lines of metrics.jsonl have the experts of each mixture layer instead of those of the largest.
    const LAYERS_APART: bool = false;

    /// How it is trained.
    fn recipe(&self) -> &Recipe;

    /// Where it is trained and scored. Checkpoints do not keep it: a run may go on elsewhere.
    fn place(&self) -> &Place;

    /// What else fixes a run: sizes, and digests of data and weights. A checkpoint of another is refused.
    fn identity(&self) -> Value;

    /// The model that a run begins with.
    ///
    /// # Errors
    /// [`ModelError`]: why there is none.
    fn model(&self) -> Result<Self::Model, ModelError>;

    /// What the task changes in the rules of MASS.
    fn tune(&self, rules: &mut GrowerConfig) {
        let _ = rules;
    }

    /// The rules of DynMoE for a pool of at most so many experts.
    fn dynmoe(&self, experts_max: usize) -> DynMoeConfig;

    /// A maker of batches, each a pure function of its step: a run that goes on needs no state of a sampler.
    fn batches(&self) -> Box<dyn FnMut(u64) -> Result<Self::Batch, BenchError> + Send + '_>;

    /// Tokens that a batch trains on.
    fn tokens(&self, batch: &Self::Batch) -> u64;

    /// A rank's share of a batch and how many targets it has, of which its loss is the mean; `None` if batches of this task cannot
    /// be shared.
    fn share(&self, batch: &Self::Batch, ranks: &Ranks) -> Option<(Self::Batch, u64)> {
        let _ = (batch, ranks);
        None
    }

    /// What is done to the gradients of a whole batch before anybody looks at them.
    ///
    /// # Errors
    /// The gradients'.
    fn disturb(
        &self,
        model: &Self::Model,
        gradients: &mut PlacedGradients,
        step: u64,
    ) -> Result<(), ModelError> {
        let _ = (model, gradients, step);
        Ok(())
    }

    /// Loss and gradients of a step.
    ///
    /// # Errors
    /// The model's.
    fn pass(
        &self,
        model: &Self::Model,
        batch: &Self::Batch,
        step: u64,
    ) -> Result<TrainPass<PlacedGradients>, ModelError>;

    /// Losses that the expansion engine asks for: of the batch, or of data that nobody trains on.
    ///
    /// # Errors
    /// The model's.
    fn losses(
        &self,
        model: &Self::Model,
        batch: &Self::Batch,
        on: LossOn,
        masked: Option<Masked>,
    ) -> Result<Vec<f64>, ModelError>;

    /// Applies gradients to what is trained: all of the model, unless a part is frozen. Returns their norm.
    ///
    /// # Errors
    /// The optimiser's.
    fn update(
        &self,
        optimizer: &mut AdamW,
        model: &mut Self::Model,
        gradients: &mut PlacedGradients,
        rate: f64,
    ) -> Result<f64, ModelError> {
        optimizer.step(model, gradients, rate)
    }

    /// Whether [`score`](Self::score) looks at the model after so many steps: experts that are on several processes are brought
    /// together for that.
    fn scores_after(&self, step: u64) -> bool {
        let _ = step;
        true
    }

    /// Scores the model after `step` steps, if it is time.
    ///
    /// # Errors
    /// [`BenchError::Failed`] for a model that cannot be scored.
    fn score(
        &self,
        model: &Self::Model,
        step: u64,
        progress: &mut Self::Progress,
    ) -> Result<Option<Scored>, BenchError> {
        let _ = (model, step, progress);
        Ok(None)
    }

    /// Writes to the folder of a checkpoint what the checkpoint itself does not hold: before it, or after it, when no older one
    /// is needed any more.
    ///
    /// # Errors
    /// [`BenchError::Failed`] if that cannot be written.
    fn save(
        &self,
        dir: &Path,
        step: u64,
        progress: &Self::Progress,
        written: bool,
    ) -> Result<(), BenchError> {
        let _ = (dir, step, progress, written);
        Ok(())
    }

    /// Reads that back.
    ///
    /// # Errors
    /// [`BenchError::Input`] if it is damaged.
    fn load(
        &self,
        dir: &Path,
        step: u64,
        model: &Self::Model,
        progress: &mut Self::Progress,
    ) -> Result<(), BenchError> {
        let _ = (dir, step, model, progress);
        Ok(())
    }

    /// Writes the figures of a finished run into its row.
    ///
    /// # Errors
    /// [`BenchError::Failed`] for a model that cannot be scored.
    fn finish(&self, end: &Finished<'_, Self>, run: &mut Run) -> Result<(), BenchError>;
}

//! Fine-tuning: epochs over shuffled batches, scored on the development set after each, stopped early.

use std::path::PathBuf;

use mass_model::bert::{BertClassifier, BertConfig, TextBatch};
use mass_model::growth::{LossOn, Mixtures};
use mass_model::optim::{AdamWConfig, Decay, Schedule};
use mass_model::{DropoutKeys, Masked, ModelError, Place, PlacedGradients, TrainPass};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::Glue;
use super::data::{Examples, Labelled, TaskData};
use super::score::{self, DevScore};
use crate::BenchError;
use crate::dynmoe::DynMoeConfig;
use crate::glue::batch::epoch_batches;
use crate::glue::task::Task as GlueTask;
use crate::method::Method;
use crate::report::Run;
use crate::rng::{Purpose, stream};
use crate::study::weights;
use crate::task::{Finished, Recipe, Scored, Task};

/// Batches that are sorted by length together. One: sequences lie end to end, without padding, so that batches of mixed
/// lengths cost nothing, and batches of like lengths would be a worse sample.
const SORTED_TOGETHER: usize = 1;

/// Where the pretrained weights come from.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Pretrained {
    /// None: a small model with drawn weights.
    Drawn(BertConfig),
    /// A directory in Hugging Face layout.
    Directory(PathBuf),
}

impl Pretrained {
    /// As settings keep it.
    pub(super) fn settings(&self) -> Result<Value, BenchError> {
        match self {
            Self::Drawn(config) => Ok(json!({ "drawn": config })),
            Self::Directory(dir) => weights::settings(dir),
        }
    }

    /// The dense model, with a classifier head of `outputs`.
    pub(super) fn build(
        &self,
        outputs: usize,
        rng: &mut ChaCha8Rng,
    ) -> Result<BertClassifier, ModelError> {
        match self {
            Self::Drawn(config) => BertClassifier::new(config, outputs, rng),
            Self::Directory(dir) => BertClassifier::load_with_new_head(dir, outputs, rng),
        }
    }
}

/// The epoch that counts so far. Pool and routing are those of that epoch.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Best {
    pub(super) epoch: u64,
    pub(super) score: DevScore,
    pub(super) experts: Option<usize>,
}

/// A model on a task of GLUE.
#[derive(Debug)]
pub struct FineTune<'a> {
    glue: &'a Glue,
    data: &'a TaskData,
    method: &'a Method,
    seed: u64,
    per_epoch: u64,
    recipe: Recipe,
    identity: Value,
}

impl<'a> FineTune<'a> {
    pub(super) fn new(
        glue: &'a Glue,
        data: &'a TaskData,
        method: &'a Method,
        (seed, epochs): (u64, u64),
    ) -> Result<Self, BenchError> {
        let mut task = Self {
            glue,
            data,
            method,
            seed,
            per_epoch: 0,
            recipe: Recipe {
                adamw: AdamWConfig::default().decaying_everything(),
                schedule: Schedule {
                    peak: glue.learning_rate,
                    warmup: 0,
                    steps: 0,
                    floor: 0.0,
                    decay: Decay::Linear,
                },
                log_every: glue.log_every,
                checkpoint_every: glue.checkpoint_every,
            },
            identity: json!({
                "model": glue.model()?,
                "layer": authors_layer(data.task),
                "data": data.digest,
                "batch": glue.batch,
                "patience": glue.patience,
            }),
        };
        task.per_epoch = task.examples().len().div_ceil(glue.batch) as u64;
        task.recipe.schedule.steps = epochs * task.per_epoch;
        Ok(task)
    }

    /// The examples that it is trained on.
    pub(super) fn examples(&self) -> &'a Examples {
        match self.method.needs_probe() {
            true => &self.data.held_out.0,
            false => &self.data.train,
        }
    }
}

impl Task for FineTune<'_> {
    type Model = BertClassifier;
    type Batch = (TextBatch, Labelled);
    type Progress = Option<Best>;

    fn recipe(&self) -> &Recipe {
        &self.recipe
    }

    fn place(&self) -> &Place {
        &self.glue.args.place
    }

    fn identity(&self) -> Value {
        self.identity.clone()
    }

    /// A new head, and in one layer a mixture whose experts are copies of its feed-forward network, with gate rows drawn at random.
    fn model(&self) -> Result<BertClassifier, ModelError> {
        let mut rng = stream(self.seed, Purpose::Weights, 0);
        let outputs = self.data.task.outputs();
        let mut model = self.glue.pretrained.build(outputs, &mut rng)?;
        let bert = model.config();
        let (dim, hidden) = (bert.hidden_size, bert.intermediate_size);
        let mixture = self.method.mixture(dim, hidden, bert.hidden_act, self.seed);
        let layer = at_depth(authors_layer(self.data.task), bert.num_hidden_layers);
        if let Some(mixture) = mixture {
            model.convert_to(layer, &mixture, &mut rng)?;
        }
        Ok(model)
    }

    fn dynmoe(&self, experts_max: usize) -> DynMoeConfig {
        DynMoeConfig::language(self.per_epoch, experts_max)
    }

    fn batches(&self) -> Box<dyn FnMut(u64) -> Result<Self::Batch, BenchError> + Send + '_> {
        let (examples, size) = (self.examples(), self.glue.batch);
        let mut order: (u64, Vec<Vec<usize>>) = (u64::MAX, Vec::new());
        Box::new(move |step| {
            let (epoch, within) = (step / self.per_epoch, step % self.per_epoch);
            if order.0 != epoch {
                let lengths = examples.lengths();
                let batches = epoch_batches(lengths, size, SORTED_TOGETHER, self.seed, epoch);
                order = (epoch, batches);
            }
            Ok(examples.batch(&order.1[within as usize]))
        })
    }

    fn tokens(&self, (batch, _): &Self::Batch) -> u64 {
        batch.ids.len() as u64
    }

    fn pass(
        &self,
        model: &BertClassifier,
        (batch, labels): &Self::Batch,
        step: u64,
    ) -> Result<TrainPass<PlacedGradients>, ModelError> {
        let mut keys = DropoutKeys::new(self.seed, step);
        model.train_pass_at(self.place(), batch, labels.targets(), Some(&mut keys))
    }

    /// An example each.
    fn losses(
        &self,
        model: &BertClassifier,
        batch: &Self::Batch,
        on: LossOn,
        masked: Option<Masked>,
    ) -> Result<Vec<f64>, ModelError> {
        let of = |(batch, labels): &Self::Batch| {
            model.losses_at(self.place(), batch, labels.targets(), masked)
        };
        let mut found = Vec::new();
        match on {
            LossOn::Batch => found = of(batch)?,
            LossOn::Probe => {
                let probe = &self.data.held_out.1;
                let all: Vec<usize> = (0..probe.len()).collect();
                for which in all.chunks(self.glue.batch) {
                    found.extend(of(&probe.batch(which))?);
                }
            }
        }
        Ok(found.into_iter().map(f64::from).collect())
    }

    /// On the development sets after each epoch, and decides whether to go on.
    fn score(
        &self,
        model: &BertClassifier,
        step: u64,
        best: &mut Option<Best>,
    ) -> Result<Option<Scored>, BenchError> {
        if !step.is_multiple_of(self.per_epoch) {
            return Ok(None);
        }
        let epoch = step / self.per_epoch;
        let score = score::evaluate(self.place(), model, self.data)?;
        let mut extra = Map::new();
        extra.insert("epoch".into(), json!(epoch));
        for (name, value) in &score.metrics {
            extra.insert(name.clone(), json!(value));
        }
        extra.insert("metric".into(), json!(score.metric));
        let test_loss = Some(score.loss);
        // A metric that is undefined (a constant prediction's correlation) is no gain over anything.
        let gained = |best: &Best| {
            score
                .metric
                .is_some_and(|m| best.score.metric.is_none_or(|b| m > b))
        };
        if self.glue.last || best.as_ref().is_none_or(gained) {
            *best = Some(Best {
                epoch,
                score,
                experts: (model.mixtures() > 0).then(|| model.mixture(0).ids().len()),
            });
        }
        let since = epoch - best.as_ref().map_or(0, |b| b.epoch);
        Ok(Some(Scored {
            test_loss,
            extra,
            stop: since >= self.glue.patience,
        }))
    }

    fn finish(&self, end: &Finished<'_, Self>, run: &mut Run) -> Result<(), BenchError> {
        if let Some(Best {
            epoch,
            score,
            experts,
        }) = end.progress.clone()
        {
            run.best_epoch = Some(epoch);
            run.experts = experts;
            run.active_per_token = score.mean_k;
            run.test_loss = Some(score.loss);
            (run.accuracy, run.metric) = (score.accuracy, score.metric);
            run.metrics = score.metrics;
        }
        Ok(())
    }
}

/// The layer of BERT-large that the paper replaces, counted from 0.
pub(super) fn authors_layer(task: GlueTask) -> usize {
    match task {
        GlueTask::Mrpc => 11,
        _ => 10,
    }
}

/// The layer at the same part of another depth than BERT-large's 24.
pub(super) fn at_depth(authors_layer: usize, depth: usize) -> usize {
    let layer = (authors_layer as f64 / 24.0 * depth as f64).round() as usize;
    layer.min(depth.saturating_sub(1))
}

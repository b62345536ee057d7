//! The fine-tuning loop: epochs over shuffled batches, scored on the development set after each, stopped early.

use std::path::Path;
use std::time::Instant;

use mass_expand::Diagnosis;
use mass_model::bert::{BertClassifier, TextBatch};
use mass_model::growth::{Grower, LossOn, Mixtures};
use mass_model::lm::Masked;
use mass_model::ops::MoeExpert;
use mass_model::optim::{AdamW, AdamWConfig, Decay, Schedule};
use mass_model::{DropoutKeys, ModelError};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::data::{Examples, Labelled, TaskData};
use super::method::{Method, Pretrained, growth};
use super::score::{self, DevScore};
use crate::BenchError;
use crate::dynmoe::{DynMoe, DynMoeConfig};
use crate::glue::batch::epoch_batches;
use crate::report::{Expansion, MetricLine, expansions};
use crate::rng::{Purpose, stream};
use crate::run_checkpoint;
use crate::study::unusable_model;

/// Everything that fixes a run but for its data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FineTuneConfig {
    /// Name of the run in metrics.jsonl and events.jsonl.
    pub(super) run: String,
    pub(super) seed: u64,
    pub(super) method: Method,
    /// The model, but not where it lies; see [`model_settings`](crate::study::model_settings).
    pub(super) model: Value,
    /// Of tokens and labels: a checkpoint of other data is refused.
    pub(super) data: u64,
    /// The layer that the paper replaces, of the 24 of BERT-large; ours is the same part of the depth.
    pub(super) authors_layer: usize,
    pub(super) outputs: usize,
    pub(super) epochs: u64,
    /// Epochs without gain after which a run stops.
    pub(super) patience: u64,
    pub(super) batch: usize,
    /// Batches that are sorted by length together. One: sequences lie end to end, without padding, so that batches of mixed
    /// lengths cost nothing, and batches of like lengths would be a worse sample.
    pub(super) sorted_together: usize,
    pub(super) learning_rate: f64,
    pub(super) adamw: AdamWConfig,
    pub(super) log_every: u64,
    pub(super) checkpoint_every: u64,
}

impl FineTuneConfig {
    /// Steps of the whole run if it is not stopped early.
    pub(super) fn steps(&self, data: &TaskData) -> u64 {
        self.epochs * train_of(self, data).len().div_ceil(self.batch) as u64
    }
}

/// The best epoch so far. Pool and routing are those of that epoch.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Best {
    pub(super) epoch: u64,
    pub(super) score: DevScore,
    pub(super) experts: Option<usize>,
}

/// What a checkpoint holds beside model and optimiser.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Saved {
    config: FineTuneConfig,
    grower: Option<Grower>,
    dynmoe: Option<DynMoe>,
    metrics: Vec<MetricLine>,
    growth_events: Vec<mass_expand::Event>,
    events: Vec<Value>,
    best: Option<Best>,
    stopped: bool,
    tokens: u64,
    /// Sums since the last line of metrics: steps, loss, mean k.
    since_log: (u64, f64, f64),
    wall_s: f64,
}

/// A run under way.
pub(super) struct FineTuner<'a> {
    config: FineTuneConfig,
    data: &'a TaskData,
    model: BertClassifier,
    optimizer: AdamW,
    /// The network that every expert starts from.
    template: Option<MoeExpert>,
    schedule: Schedule,
    step: u64,
    saved: Saved,
}

impl<'a> FineTuner<'a> {
    /// A run at its beginning, or where its checkpoint in `dir` left it if `resume` is set and there is one.
    pub(super) fn open(
        config: FineTuneConfig,
        pretrained: &Pretrained,
        data: &'a TaskData,
        dir: &Path,
        resume: bool,
    ) -> Result<Self, BenchError> {
        let mut tuner = Self::new(config, pretrained, data)?;
        let same = |saved: &Saved| saved.config == tuner.config;
        if let Some(read) = run_checkpoint::read(dir, resume, same)? {
            (tuner.model, tuner.optimizer) = (read.model, read.optimizer);
            (tuner.step, tuner.saved) = (read.step, read.state);
        }
        Ok(tuner)
    }

    fn new(
        config: FineTuneConfig,
        pretrained: &Pretrained,
        data: &'a TaskData,
    ) -> Result<Self, BenchError> {
        let made = |e: ModelError| unusable_model(e, format!("setting up {}", config.run));
        let mut rng = stream(config.seed, Purpose::Weights, 0);
        let model = pretrained
            .build(
                &config.method,
                config.outputs,
                config.authors_layer,
                &mut rng,
            )
            .map_err(made)?;
        let steps = config.steps(data);
        let steps_per_epoch = steps / config.epochs;
        let (mut grower, mut dynmoe) = (None, None);
        match &config.method {
            Method::Mass(m) => {
                grower = Some(Grower::new(growth(m, steps, config.seed)).map_err(made)?);
            }
            Method::DynMoe { experts_max, .. } => {
                let rules = DynMoeConfig::language(steps_per_epoch, *experts_max);
                dynmoe = Some(DynMoe::new(rules, model.mixtures()).map_err(made)?);
            }
            Method::Dense | Method::Static { .. } => {}
        }
        Ok(Self {
            template: dynmoe
                .is_some()
                .then(|| model.mixture(0).experts()[0].clone()),
            optimizer: AdamW::new(config.adamw.clone()).map_err(made)?,
            schedule: Schedule {
                peak: config.learning_rate,
                warmup: 0,
                steps,
                floor: 0.0,
                decay: Decay::Linear,
            },
            saved: Saved {
                config: config.clone(),
                grower,
                dynmoe,
                metrics: Vec::new(),
                growth_events: Vec::new(),
                events: Vec::new(),
                best: None,
                stopped: false,
                tokens: 0,
                since_log: (0, 0.0, 0.0),
                wall_s: 0.0,
            },
            config,
            data,
            model,
            step: 0,
        })
    }

    fn train(&self) -> &'a Examples {
        train_of(&self.config, self.data)
    }

    /// Trains to the end, or until `on_step` (told the number of steps made and the loss) returns false, saving
    /// checkpoints to `dir` on the way and when asked to stop.
    ///
    /// Returns whether the run is complete.
    pub(super) fn run(
        &mut self,
        dir: &Path,
        on_step: &mut dyn FnMut(u64, f64) -> bool,
    ) -> Result<bool, BenchError> {
        let per_epoch = self.steps() / self.config.epochs;
        let mut order: (u64, Vec<Vec<usize>>) = (u64::MAX, Vec::new());
        let (mut saved_at, mut started) = (self.step, Instant::now());
        let mut go_on = true;
        while go_on && self.step < self.steps() && !self.saved.stopped {
            let (epoch, within) = (self.step / per_epoch, self.step % per_epoch);
            if order.0 != epoch {
                let lengths = self.train().lengths();
                let FineTuneConfig {
                    batch,
                    sorted_together,
                    seed,
                    ..
                } = self.config;
                let batches = epoch_batches(lengths, batch, sorted_together, seed, epoch);
                order = (epoch, batches);
            }
            let loss = self.advance(&order.1[within as usize])?;
            if within + 1 == per_epoch {
                self.end_epoch(epoch + 1)?;
            }
            go_on = on_step(self.step, loss);
            self.saved.wall_s += started.elapsed().as_secs_f64();
            started = Instant::now();
            if !go_on || self.step - saved_at >= self.config.checkpoint_every {
                let (model, optimizer) = (&self.model, &self.optimizer);
                run_checkpoint::write(dir, self.step, model, optimizer, &self.saved)?;
                saved_at = self.step;
            }
        }
        Ok(self.step == self.steps() || self.saved.stopped)
    }

    fn advance(&mut self, which: &[usize]) -> Result<f64, BenchError> {
        let step = self.step;
        let run = self.config.run.clone();
        let failed = |e: ModelError| BenchError::failed(format!("{run} at step {step}"), e);
        let (batch, labels) = self.train().batch(which);
        let mut keys = DropoutKeys::new(self.config.seed, step);
        let mut pass = self
            .model
            .train_pass(&batch, labels.targets(), Some(&mut keys))
            .map_err(failed)?;
        self.model.adapt(&pass.layers).map_err(failed)?;
        if let Some(grower) = &mut self.saved.grower {
            let probe = &self.data.held_out.1;
            let size = self.config.batch;
            let losses = |model: &BertClassifier, on, masked| {
                losses(model, (on, masked), (&batch, &labels), probe, size)
            };
            let (model, optimizer) = (&mut self.model, &mut self.optimizer);
            let events = grower
                .step(step, model, optimizer, &mut pass, losses)
                .map_err(failed)?;
            self.saved.growth_events.extend(&events);
            for event in &events {
                self.saved.events.push(json!(event));
            }
        }
        if let Some(dynmoe) = &self.saved.dynmoe {
            let gradients = &mut pass.gradients;
            dynmoe.add_loss(&self.model, gradients).map_err(failed)?;
        }
        let lr = self.schedule.at(step);
        self.optimizer
            .step(&mut self.model, &mut pass.gradients, lr)
            .map_err(failed)?;
        if let (Some(dynmoe), Some(template)) = (&mut self.saved.dynmoe, &self.template) {
            let (model, optimizer) = (&mut self.model, &mut self.optimizer);
            let events = dynmoe
                .step(step, model, optimizer, &pass, template)
                .map_err(failed)?;
            self.saved.events.extend(events.iter().map(|e| json!(e)));
        }
        self.step += 1;
        self.saved.tokens += batch.ids.len() as u64;

        let loss = f64::from(pass.loss);
        let sums = &mut self.saved.since_log;
        sums.0 += 1;
        sums.1 += loss;
        sums.2 += pass.layers.iter().map(|l| l.plan.mean_k()).sum::<f64>();
        if self.step.is_multiple_of(self.config.log_every) || self.step == self.schedule.steps {
            let (n, loss, k) = std::mem::take(sums);
            let experts = self.experts();
            self.saved.metrics.push(MetricLine {
                run: self.config.run.clone(),
                step: self.step,
                train_loss: Some(loss / n as f64),
                learning_rate: Some(lr),
                experts,
                active_per_token: experts.map(|_| k / n as f64),
                ..MetricLine::default()
            });
        }
        Ok(loss)
    }

    /// Scores the development sets after `epoch` epochs, and decides whether to go on.
    fn end_epoch(&mut self, epoch: u64) -> Result<(), BenchError> {
        let score = score::evaluate(&self.model, self.data)?;
        let mut extra = serde_json::Map::new();
        extra.insert("epoch".into(), json!(epoch));
        for (name, value) in &score.metrics {
            extra.insert(name.clone(), json!(value));
        }
        extra.insert("metric".into(), json!(score.metric));
        self.saved.metrics.push(MetricLine {
            run: self.config.run.clone(),
            step: self.step,
            test_loss: Some(score.loss),
            extra,
            ..MetricLine::default()
        });
        let experts = self.experts();
        // A metric that is undefined (a constant prediction's correlation) is no gain over anything.
        let gained = |best: &Best| {
            score
                .metric
                .is_some_and(|m| best.score.metric.is_none_or(|b| m > b))
        };
        if self.saved.best.as_ref().is_none_or(gained) {
            self.saved.best = Some(Best {
                epoch,
                score,
                experts,
            });
        }
        let best = self.saved.best.as_ref().map_or(0, |b| b.epoch);
        self.saved.stopped = epoch - best >= self.config.patience;
        Ok(())
    }

    /// Steps of the whole run if it is not stopped early.
    pub(super) fn steps(&self) -> u64 {
        self.schedule.steps
    }

    /// Steps made.
    pub(super) fn step(&self) -> u64 {
        self.step
    }

    /// Experts of the mixture; `None` for the dense model.
    fn experts(&self) -> Option<usize> {
        (self.model.mixtures() > 0).then(|| self.model.mixture(0).ids().len())
    }

    #[cfg(test)]
    pub(super) fn model(&self) -> &BertClassifier {
        &self.model
    }

    pub(super) fn best(&self) -> Option<&Best> {
        self.saved.best.as_ref()
    }

    pub(super) fn metrics(&self) -> &[MetricLine] {
        &self.saved.metrics
    }

    pub(super) fn events(&self) -> &[Value] {
        &self.saved.events
    }

    pub(super) fn tokens(&self) -> u64 {
        self.saved.tokens
    }

    pub(super) fn wall_s(&self) -> f64 {
        self.saved.wall_s
    }

    /// For how many steps a split could have been triggered; `None` but for MASS.
    pub(super) fn live_steps(&self) -> Option<u64> {
        let grower = self.saved.grower.as_ref();
        grower.map(|g| g.controller().live_steps())
    }

    pub(super) fn expansions(&self) -> Vec<Expansion> {
        expansions(&self.saved.growth_events)
    }

    /// Known ways to fail that the controller saw; empty but for MASS.
    pub(super) fn diagnoses(&self) -> Vec<Diagnosis> {
        let grower = self.saved.grower.as_ref();
        grower.map_or_else(Vec::new, |g| g.controller().diagnoses())
    }
}

/// The examples that a method is trained on.
pub(super) fn train_of<'a>(config: &FineTuneConfig, data: &'a TaskData) -> &'a Examples {
    if config.method.needs_probe() {
        &data.held_out.0
    } else {
        &data.train
    }
}

/// Losses that the expansion engine asks for, an example each.
fn losses(
    model: &BertClassifier,
    (on, masked): (LossOn, Option<Masked>),
    (batch, labels): (&TextBatch, &Labelled),
    probe: &Examples,
    size: usize,
) -> Result<Vec<f64>, ModelError> {
    let of = |batch: &TextBatch, labels: &Labelled| model.losses(batch, labels.targets(), masked);
    let mut found = Vec::new();
    match on {
        LossOn::Batch => found = of(batch, labels)?,
        LossOn::Probe => {
            let all: Vec<usize> = (0..probe.len()).collect();
            for which in all.chunks(size) {
                let (batch, labels) = probe.batch(which);
                found.extend(of(&batch, &labels)?);
            }
        }
    }
    Ok(found.into_iter().map(f64::from).collect())
}

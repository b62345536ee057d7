//! The training loop of a language model, with or without growth, that can stop at any step and go on.

use std::path::Path;
use std::time::Instant;

use mass_expand::{Diagnosis, Event};
use mass_model::growth::{Grower, GrowerConfig, LossOn, Mixtures};
use mass_model::lm::{LanguageModel, LanguageModelConfig, Masked};
use mass_model::optim::{AdamW, AdamWConfig, Schedule};
use serde::{Deserialize, Serialize};

use crate::BenchError;
use crate::batch::TokenBatch;
use crate::report::{Expansion, MetricLine, expansions};
use crate::rng::{Purpose, stream};
use crate::run_checkpoint;

/// Everything that fixes a run but for its data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainerConfig {
    /// Name of the run in metrics.jsonl and events.jsonl.
    pub run: String,
    /// Sizes of the model.
    pub model: LanguageModelConfig,
    /// Optimiser.
    pub adamw: AdamWConfig,
    /// Learning rate; its `steps` is the length of the run.
    pub schedule: Schedule,
    /// Rules of growth; `None` for a static pool.
    pub growth: Option<GrowerConfig>,
    /// Seed of the weights.
    pub seed: u64,
    /// Steps between lines of metrics.jsonl.
    pub log_every: u64,
    /// Steps between checkpoints.
    pub checkpoint_every: u64,
}

/// Where a run stands.
#[derive(Debug)]
pub struct Trainer {
    config: TrainerConfig,
    /// The model.
    pub model: LanguageModel,
    optimizer: AdamW,
    step: u64,
    progress: Saved,
}

/// What a checkpoint holds beside model and optimiser.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Saved {
    config: TrainerConfig,
    grower: Option<Grower>,
    metrics: Vec<MetricLine>,
    events: Vec<Event>,
    /// Sums since the last line of metrics: loss and mean k.
    since_log: (u64, f64, f64),
    wall_s: f64,
}

/// What a training step needs from outside.
pub struct Feed<'a> {
    /// The batch of a step, a pure function of it.
    pub batch: &'a dyn Fn(u64) -> Result<TokenBatch, BenchError>,
    /// Held-out sequences for the checks of the expansion engine.
    pub probe: &'a TokenBatch,
    /// Told each step's number and loss; `false` asks to stop.
    pub on_step: &'a mut dyn FnMut(u64, f64) -> bool,
}

impl Trainer {
    /// A run at its beginning, or where its checkpoint in `dir` left it if `resume` is set and there is one.
    ///
    /// # Errors
    /// [`BenchError::Input`] if the checkpoint is of another run or damaged; [`BenchError::Failed`] if the sizes are not
    /// those of a model.
    pub fn open(config: TrainerConfig, dir: &Path, resume: bool) -> Result<Self, BenchError> {
        let same = |saved: &Saved| saved.config == config;
        if let Some(read) = run_checkpoint::read(dir, resume, same)? {
            return Ok(Self {
                config,
                model: read.model,
                optimizer: read.optimizer,
                step: read.step,
                progress: read.state,
            });
        }
        let made = |e| BenchError::failed(format!("setting up {}", config.run), e);
        let model =
            LanguageModel::new(&config.model, &mut stream(config.seed, Purpose::Weights, 0))
                .map_err(made)?;
        let grower = config
            .growth
            .clone()
            .map(Grower::new)
            .transpose()
            .map_err(made)?;
        let optimizer = AdamW::new(config.adamw.clone()).map_err(made)?;
        let progress = Saved {
            config: config.clone(),
            grower,
            metrics: Vec::new(),
            events: Vec::new(),
            since_log: (0, 0.0, 0.0),
            wall_s: 0.0,
        };
        Ok(Self {
            config,
            model,
            optimizer,
            step: 0,
            progress,
        })
    }

    /// Trains to the last step, saving checkpoints to `dir` on the way, at the end and when asked to stop.
    ///
    /// Returns whether the run is complete.
    ///
    /// # Errors
    /// [`BenchError::Failed`] if training breaks down (a loss that is not a number) or a checkpoint cannot be written.
    pub fn run(&mut self, feed: &mut Feed<'_>, dir: &Path) -> Result<bool, BenchError> {
        let steps = self.config.schedule.steps;
        let mut saved_at = self.step;
        let mut started = Instant::now();
        while self.step < steps {
            let loss = self.advance(feed)?;
            let last = self.step == steps;
            let go_on = (feed.on_step)(self.step, loss);
            if last || !go_on || self.step - saved_at >= self.config.checkpoint_every {
                self.progress.wall_s += started.elapsed().as_secs_f64();
                started = Instant::now();
                run_checkpoint::write(
                    dir,
                    self.step,
                    &self.model,
                    &self.optimizer,
                    &self.progress,
                )?;
                saved_at = self.step;
            }
            if !go_on {
                break;
            }
        }
        Ok(self.step == steps)
    }

    fn advance(&mut self, feed: &mut Feed<'_>) -> Result<f64, BenchError> {
        let step = self.step;
        let failed = |e| BenchError::failed(format!("{} at step {step}", self.config.run), e);
        let batch = (feed.batch)(step)?;
        let mut pass = self
            .model
            .train_pass(&batch.inputs, &batch.targets, batch.length)
            .map_err(failed)?;
        self.model.adapt(&pass.layers).map_err(failed)?;
        if let Some(grower) = &mut self.progress.grower {
            let losses =
                |model: &LanguageModel, on, masked| losses(model, (on, masked), &batch, feed.probe);
            let events = grower
                .step(
                    step,
                    &mut self.model,
                    &mut self.optimizer,
                    &mut pass,
                    losses,
                )
                .map_err(failed)?;
            self.progress.events.extend(events);
        }
        let lr = self.config.schedule.at(step);
        self.optimizer
            .step(&mut self.model, &mut pass.gradients, lr)
            .map_err(failed)?;
        self.step += 1;

        let loss = f64::from(pass.loss);
        let layers = pass.layers.len() as f64;
        let sums = &mut self.progress.since_log;
        sums.0 += 1;
        sums.1 += loss;
        sums.2 += pass.layers.iter().map(|l| l.plan.mean_k()).sum::<f64>() / layers;
        if self.step.is_multiple_of(self.config.log_every)
            || self.step == self.config.schedule.steps
        {
            let (n, loss, k) = std::mem::take(sums);
            self.progress.metrics.push(MetricLine {
                run: self.config.run.clone(),
                step: self.step,
                train_loss: Some(loss / n as f64),
                learning_rate: Some(lr),
                experts: Some(self.experts()),
                active_per_token: Some(k / n as f64),
                ..MetricLine::default()
            });
        }
        Ok(loss)
    }

    /// Steps made.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Experts of the layer that has most.
    pub fn experts(&self) -> usize {
        self.experts_by_layer().into_iter().max().unwrap_or(0)
    }

    /// Experts of each mixture layer.
    pub fn experts_by_layer(&self) -> Vec<usize> {
        (0..self.model.mixtures())
            .map(|l| self.model.mixture(l).ids().len())
            .collect()
    }

    /// Lines of metrics.jsonl so far.
    pub fn metrics(&self) -> &[MetricLine] {
        &self.progress.metrics
    }

    /// Events of the expansion engine so far.
    pub fn events(&self) -> &[Event] {
        &self.progress.events
    }

    /// Seconds spent training, over all sittings.
    pub fn wall_s(&self) -> f64 {
        self.progress.wall_s
    }

    /// For how many steps a split could have been triggered; `None` for a static pool.
    pub fn live_steps(&self) -> Option<u64> {
        self.progress
            .grower
            .as_ref()
            .map(|g| g.controller().live_steps())
    }

    /// The splits, each with the alarm that set it off.
    pub fn expansions(&self) -> Vec<Expansion> {
        expansions(&self.progress.events)
    }

    /// Known ways to fail that the controller saw; empty for a static pool.
    pub fn diagnoses(&self) -> Vec<Diagnosis> {
        let grower = self.progress.grower.as_ref();
        grower.map_or_else(Vec::new, |g| g.controller().diagnoses())
    }
}

/// Losses that the expansion engine asks for: of the batch by token, of the probe by sequence.
fn losses(
    model: &LanguageModel,
    (on, masked): (LossOn, Option<Masked>),
    batch: &TokenBatch,
    probe: &TokenBatch,
) -> Result<Vec<f64>, mass_model::ModelError> {
    let score = |of: &TokenBatch| model.score(&of.inputs, &of.targets, of.length, masked);
    Ok(match on {
        LossOn::Batch => score(batch)?.0.into_iter().map(f64::from).collect(),
        LossOn::Probe => score(probe)?.0.chunks(probe.length).map(mean).collect(),
    })
}

/// Mean of negative log-likelihoods.
pub fn mean(nll: &[f32]) -> f64 {
    nll.iter().map(|&x| f64::from(x)).sum::<f64>() / nll.len() as f64
}

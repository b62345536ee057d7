//! The training loop: batches from every source domain, scored now and then on what the sources hold out.

use std::path::Path;
use std::time::Instant;

use mass_expand::Diagnosis;
use mass_model::growth::{Grower, LossOn, Mixtures};
use mass_model::lm::Masked;
use mass_model::ops::MoeExpert;
use mass_model::optim::{AdamW, AdamWConfig, Schedule};
use mass_model::vit::VitClassifier;
use mass_model::{DropoutKeys, ModelError};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::data::{Input, Set};
use super::layerwise::LayerwiseDynMoe;
use super::method::{Method, growth, mixture_blocks};
use super::patches::{self, PatchRouting};
use super::score::{Score, evaluate};
use super::selected::Selected;
use crate::BenchError;
use crate::dg::prefetch::{Prefetched, prefetch};
use crate::dg::split::Split;
use crate::report::{Expansion, MetricLine, expansions};
use crate::rng::{Purpose, stream};
use crate::run_checkpoint;

/// Batches made ahead.
const AHEAD: usize = 2;
/// Images of each source domain that judge newcomers.
const PROBE: usize = 32;

/// Everything that fixes a run but for its data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct TrainerConfig {
    /// Name of the run in metrics.jsonl and events.jsonl.
    pub(super) run: String,
    pub(super) seed: u64,
    pub(super) method: Method,
    /// Index of the domain that is left out.
    pub(super) target: usize,
    /// Part of each source domain that is held out.
    pub(super) held_out: f64,
    pub(super) steps: u64,
    /// Images of each source domain in a batch.
    pub(super) per_domain: usize,
    pub(super) learning_rate: f64,
    pub(super) adamw: AdamWConfig,
    pub(super) evaluate_every: u64,
    pub(super) log_every: u64,
    pub(super) checkpoint_every: u64,
    /// Of the images: a checkpoint of others is refused.
    pub(super) images: u64,
    pub(super) frozen: usize,
}

/// A model as it was scored during training.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(super) struct Scored {
    pub(super) step: u64,
    /// On what the source domains hold out.
    pub(super) sources: Score,
    /// On the domain that was left out; `None` as long as training goes on.
    pub(super) target: Option<Score>,
    /// Mean experts of a mixture layer; `None` for a dense model.
    pub(super) experts: Option<f64>,
}

/// What a checkpoint holds beside model and optimiser.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Saved {
    config: TrainerConfig,
    grower: Option<Grower>,
    dynmoe: Option<LayerwiseDynMoe>,
    metrics: Vec<MetricLine>,
    growth_events: Vec<mass_expand::Event>,
    events: Vec<Value>,
    best: Option<Scored>,
    last: Option<Scored>,
    /// Sums since the last line of metrics: steps, loss, mean k.
    since_log: (u64, f64, f64),
    wall_s: f64,
    /// Time of training steps, and of waiting for their batches, seconds.
    training_s: f64,
    waited_s: f64,
}

/// The images of a run.
fn split(config: &TrainerConfig, set: &Set) -> Result<Split, BenchError> {
    let split = Split::leave_out(&set.images, config.target, config.held_out, config.seed)?;
    if !config.method.needs_probe() {
        return Ok(split);
    }
    let split = split.with_probe(PROBE);
    // The spread of their losses is needed too.
    if split.probe.len() < 2 {
        return Err(BenchError::Usage(format!(
            "{}: the source domains of {} are too small to keep two training images for judging newcomers by, which MASS's \
             variant `ours` does; --methods or --variant leave it out",
            config.run, set.name
        )));
    }
    Ok(split)
}

/// Refuses a run that its set or its model does not allow, before anything is computed for it.
pub(super) fn check(config: &TrainerConfig, set: &Set) -> Result<(), BenchError> {
    let depth = set.base.config().num_hidden_layers;
    let first = config.method.first_mixture(depth);
    if first.is_some_and(|block| block < set.frozen) {
        return Err(BenchError::Usage(format!(
            "{}: in a model of {depth} blocks the mixtures are blocks {:?}, counted from 0, and this preset does not train the \
             first {}; it needs a deeper model",
            config.run,
            mixture_blocks(depth),
            set.frozen
        )));
    }
    split(config, set).map(drop)
}

/// A run under way.
pub(super) struct Trainer<'a> {
    config: TrainerConfig,
    set: &'a Set,
    split: Split,
    model: VitClassifier,
    optimizer: AdamW,
    /// For each layer the network that its experts started from.
    templates: Vec<MoeExpert>,
    schedule: Schedule,
    step: u64,
    saved: Saved,
    /// The model of `saved.best`.
    selected: Option<Selected>,
}

impl<'a> Trainer<'a> {
    /// A run at its beginning, or where its checkpoint in `dir` left it if `resume` is set and there is one.
    pub(super) fn open(
        config: TrainerConfig,
        set: &'a Set,
        dir: &Path,
        resume: bool,
    ) -> Result<Self, BenchError> {
        let mut trainer = Self::new(config, set)?;
        let same = |saved: &Saved| saved.config == trainer.config;
        if let Some(read) = run_checkpoint::read(dir, resume, same)? {
            (trainer.model, trainer.optimizer) = (read.model, read.optimizer);
            (trainer.step, trainer.saved) = (read.step, read.state);
            trainer.selected = match trainer.saved.best {
                Some(best) if best.step == trainer.step => {
                    Some(Selected::new(best.step, &trainer.model))
                }
                Some(best) => Some(Selected::read(dir, best.step)?),
                None => None,
            };
        } else if dir.is_dir() {
            // Nothing that goes on: what an earlier run left there must not be taken for this one's.
            std::fs::remove_dir_all(dir)
                .map_err(|e| BenchError::failed("removing an older checkpoint", e))?;
        }
        Ok(trainer)
    }

    fn new(config: TrainerConfig, set: &'a Set) -> Result<Self, BenchError> {
        let made = |e: ModelError| BenchError::failed(format!("setting up {}", config.run), e);
        let mut model = set.base.clone();
        let rng = &mut stream(config.seed, Purpose::Weights, 0);
        model.draw_head(rng).map_err(made)?;
        let mut rng = stream(config.seed, Purpose::Weights, 1);
        config
            .method
            .convert(&mut model, config.seed, &mut rng)
            .map_err(made)?;
        let split = split(&config, set)?;
        let layers = model.mixtures();
        let (mut grower, mut dynmoe) = (None, None);
        match &config.method {
            Method::Mass(m) => {
                let rules = growth(m, layers, config.steps, set.delta, config.seed);
                grower = Some(Grower::new(rules).map_err(made)?);
            }
            Method::DynMoe { experts_max, .. } => {
                dynmoe = Some(LayerwiseDynMoe::new(layers, *experts_max).map_err(made)?);
            }
            Method::Erm | Method::Gmoe { .. } => {}
        }
        let first = |layer| model.mixture(layer).experts()[0].clone();
        Ok(Self {
            templates: (0..layers).map(first).collect(),
            optimizer: AdamW::new(config.adamw.clone()).map_err(made)?,
            schedule: Schedule::constant(config.learning_rate, config.steps),
            saved: Saved {
                config: config.clone(),
                grower,
                dynmoe,
                metrics: Vec::new(),
                growth_events: Vec::new(),
                events: Vec::new(),
                best: None,
                last: None,
                since_log: (0, 0.0, 0.0),
                wall_s: 0.0,
                training_s: 0.0,
                waited_s: 0.0,
            },
            config,
            set,
            split,
            model,
            step: 0,
            selected: None,
        })
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
        let (set, split) = (self.set, self.split.clone());
        let (seed, per_domain) = (self.config.seed, self.config.per_domain);
        let make = move |step| {
            let which = split.batch(seed, step, per_domain);
            set.training(&which, seed, step)
        };
        prefetch(self.step..self.config.steps, AHEAD, make, |batches| {
            self.steps_on(batches, dir, on_step)
        })
    }

    fn steps_on(
        &mut self,
        batches: &mut Prefetched<Result<Input, BenchError>>,
        dir: &Path,
        on_step: &mut dyn FnMut(u64, f64) -> bool,
    ) -> Result<bool, BenchError> {
        let (mut saved_at, mut started) = (self.step, Instant::now());
        let mut waited = batches.waited();
        while self.step < self.config.steps {
            let input = batches.next().ok_or_else(|| {
                BenchError::failed("making batches", "their thread has ended early")
            })??;
            let loss = self.advance(&input)?;
            self.saved.training_s += started.elapsed().as_secs_f64();
            self.saved.waited_s += (batches.waited() - waited).as_secs_f64();
            waited = batches.waited();
            let ended = self.step == self.config.steps;
            if ended || self.step.is_multiple_of(self.config.evaluate_every) {
                self.score()?;
            }
            let go_on = on_step(self.step, loss);
            self.saved.wall_s += started.elapsed().as_secs_f64();
            started = Instant::now();
            if !go_on || self.step - saved_at >= self.config.checkpoint_every {
                self.save(dir)?;
                saved_at = self.step;
            }
            if !go_on {
                break;
            }
        }
        Ok(self.step == self.config.steps)
    }

    fn save(&self, dir: &Path) -> Result<(), BenchError> {
        // The model itself is the selected one as long as no step has been made since.
        let before = self.selected.as_ref().filter(|s| s.step() < self.step);
        if let Some(selected) = before {
            selected.write(dir)?;
        }
        let (model, optimizer) = (&self.model, &self.optimizer);
        run_checkpoint::write(dir, self.step, model, optimizer, &self.saved)?;
        // No checkpoint is left that needs another.
        Selected::remove_others(dir, before.map(Selected::step))
    }

    fn advance(&mut self, input: &Input) -> Result<f64, BenchError> {
        let (step, set) = (self.step, self.set);
        let run = self.config.run.clone();
        let failed = |e: ModelError| BenchError::failed(format!("{run} at step {step}"), e);
        let mut keys = DropoutKeys::new(self.config.seed, step);
        let batch = set.batch(input);
        let mut pass = self
            .model
            .train_pass(batch, &input.classes, Some(&mut keys))
            .map_err(failed)?;
        self.model.adapt(&pass.layers).map_err(failed)?;
        if let Some(grower) = &mut self.saved.grower {
            let probe = &self.split.probe;
            let losses =
                |model: &VitClassifier, on, masked| losses(model, (on, masked), set, input, probe);
            let (model, optimizer) = (&mut self.model, &mut self.optimizer);
            let events = grower
                .step(step, model, optimizer, &mut pass, losses)
                .map_err(failed)?;
            self.saved.growth_events.extend(&events);
            self.saved.events.extend(events.iter().map(|e| json!(e)));
        }
        if let Some(dynmoe) = &self.saved.dynmoe {
            let gradients = &mut pass.gradients;
            dynmoe.add_loss(&self.model, gradients).map_err(failed)?;
        }
        let lr = self.schedule.at(step);
        let mut trainable = self.model.trainable(set.frozen).map_err(failed)?;
        self.optimizer
            .step(&mut trainable, &mut pass.gradients, lr)
            .map_err(failed)?;
        self.step += 1;
        let loss = f64::from(pass.loss);
        let k = pass.layers.iter().map(|l| l.plan.mean_k()).sum::<f64>() / pass.layers.len() as f64;
        if let Some(dynmoe) = &mut self.saved.dynmoe {
            let (model, optimizer) = (&mut self.model, &mut self.optimizer);
            let events = dynmoe
                .step(step, model, optimizer, pass, &self.templates)
                .map_err(failed)?;
            self.saved.events.extend(events.iter().map(|e| json!(e)));
        }
        self.log(loss, k, lr);
        Ok(loss)
    }

    fn log(&mut self, loss: f64, k: f64, lr: f64) {
        let experts = self.experts();
        let sums = &mut self.saved.since_log;
        sums.0 += 1;
        sums.1 += loss;
        sums.2 += if experts.is_some() { k } else { 0.0 };
        if self.step.is_multiple_of(self.config.log_every) || self.step == self.config.steps {
            let (n, loss, k) = std::mem::take(sums);
            let mut extra = serde_json::Map::new();
            if experts.is_some() {
                extra.insert("experts_by_layer".into(), json!(self.experts_by_layer()));
            }
            self.saved.metrics.push(MetricLine {
                run: self.config.run.clone(),
                step: self.step,
                train_loss: Some(loss / n as f64),
                learning_rate: Some(lr),
                active_per_token: experts.map(|_| k / n as f64),
                extra,
                ..MetricLine::default()
            });
        }
    }

    /// Scores the model on what the sources hold out; at the end, the selected model and the last on the target.
    fn score(&mut self) -> Result<(), BenchError> {
        let sources = evaluate(&self.model, self.set, &self.split.held_out)?;
        let mut extra = serde_json::Map::new();
        extra.insert("source_validation".into(), json!(sources.accuracy));
        extra.insert("source_validation_loss".into(), json!(sources.loss));
        let scored = Scored {
            step: self.step,
            sources,
            target: None,
            experts: self.experts(),
        };
        let best = self.saved.best.as_ref();
        if best.is_none_or(|best| sources.accuracy > best.sources.accuracy) {
            self.saved.best = Some(scored);
            self.selected = Some(Selected::new(self.step, &self.model));
        }
        let mut test_loss = None;
        if self.step == self.config.steps {
            let on_target = |model| evaluate(model, self.set, &self.split.test);
            let last = on_target(&self.model)?;
            extra.insert("target_accuracy".into(), json!(last.accuracy));
            test_loss = Some(last.loss);
            self.saved.last = Some(Scored {
                target: Some(last),
                ..scored
            });
            if let (Some(best), Some(selected)) = (&mut self.saved.best, &self.selected) {
                best.target = Some(if best.step == self.step {
                    last
                } else {
                    on_target(selected.model())?
                });
            }
        }
        self.saved.metrics.push(MetricLine {
            run: self.config.run.clone(),
            step: self.step,
            test_loss,
            extra,
            ..MetricLine::default()
        });
        Ok(())
    }

    /// How the model at the end routes patches of images that it was not trained on.
    pub(super) fn patches(&self) -> Result<Vec<PatchRouting>, BenchError> {
        let split = &self.split;
        let of: Vec<usize> = [&split.held_out[..], &split.test].concat();
        patches::route(&self.model, self.set, &of)
    }

    fn experts_by_layer(&self) -> Vec<usize> {
        let layers = 0..self.model.mixtures();
        layers.map(|l| self.model.mixture(l).ids().len()).collect()
    }

    /// Mean experts of a mixture layer; `None` for the dense model.
    fn experts(&self) -> Option<f64> {
        let layers = self.experts_by_layer();
        let sum: usize = layers.iter().sum();
        (!layers.is_empty()).then(|| sum as f64 / layers.len() as f64)
    }

    /// Steps made.
    pub(super) fn step(&self) -> u64 {
        self.step
    }

    /// The model that the source domains chose: the first of those that scored best on what they hold out.
    pub(super) fn best(&self) -> Option<Scored> {
        self.saved.best
    }

    /// The model at the end.
    pub(super) fn last(&self) -> Option<Scored> {
        self.saved.last
    }

    /// Training images seen, as often as they were.
    pub(super) fn images(&self) -> u64 {
        self.step * (self.split.train.len() * self.config.per_domain) as u64
    }

    pub(super) fn metrics(&self) -> &[MetricLine] {
        &self.saved.metrics
    }

    pub(super) fn events(&self) -> &[Value] {
        &self.saved.events
    }

    pub(super) fn wall_s(&self) -> f64 {
        self.saved.wall_s
    }

    /// The part of the time of training steps that was spent waiting for batches.
    pub(super) fn waiting(&self) -> Option<f64> {
        let total = self.saved.training_s;
        (total > 0.0).then(|| self.saved.waited_s / total)
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

/// Losses that the expansion engine asks for, an image each.
fn losses(
    model: &VitClassifier,
    (on, masked): (LossOn, Option<Masked>),
    set: &Set,
    input: &Input,
    probe: &[usize],
) -> Result<Vec<f64>, ModelError> {
    let of = |input: &Input| model.losses(set.batch(input), &input.classes, masked);
    let mut found = Vec::new();
    match on {
        LossOn::Batch => found = of(input)?,
        LossOn::Probe => {
            for part in probe.chunks(input.classes.len().max(1)) {
                let plain = set.plain(part);
                found.extend(of(&plain.map_err(|e| ModelError::Config(e.to_string()))?)?);
            }
        }
    }
    Ok(found.into_iter().map(f64::from).collect())
}

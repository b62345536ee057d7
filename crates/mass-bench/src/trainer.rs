//! The training loop, of every task and every method: it can stop at any step and go on to the same bits.

use std::path::Path;
use std::time::Instant;

use mass_expand::ExpertId;
use mass_model::checkpoint::{self, Snapshot};
use mass_model::growth::{Grower, LossOn, Mixtures, pair_figures_among};
use mass_model::ops::MoeExpert;
use mass_model::optim::AdamW;
use mass_model::parallel::{self, ParallelError, Ranks};
use mass_model::{ModelError, Parameters as _, Place, PlacedGradients, TrainPass};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::BenchError;
use crate::dynmoe::DynMoe;
use crate::method::Method;
use crate::prefetch::{Prefetched, prefetch};
use crate::report::{
    Decisions, Expansion, MetricLine, PairSums, Run, expansions, peak_rss_mib, write_lines,
};
use crate::task::{Finished, Task};

/// Batches made ahead.
const AHEAD: usize = 2;

/// What a finished run leaves.
#[derive(Debug)]
pub struct Outcome {
    /// Its row in results.json.
    pub run: Run,
    /// Its lines in metrics.jsonl.
    pub metrics: Vec<MetricLine>,
    /// Its lines in events.jsonl.
    pub events: Vec<Value>,
}

/// What a checkpoint holds beside model and optimiser.
#[derive(Default, Serialize, Deserialize)]
struct Saved<P> {
    /// All that fixes the run.
    settings: Value,
    grower: Option<Grower>,
    dynmoe: Option<DynMoe>,
    metrics: Vec<MetricLine>,
    events: Vec<Value>,
    expansions: Vec<Expansion>,
    #[serde(default)]
    pairs: PairSums,
    progress: P,
    /// The run has ended before its last step.
    stopped: bool,
    tokens: u64,
    /// Sums since the last line of metrics: steps, loss, mean k.
    since_log: (u64, f64, f64),
    wall_s: f64,
    /// Time of training steps, and of waiting for their batches, seconds.
    training_s: f64,
    waited_s: f64,
    /// What has computed it, in order; what was saved before there was a choice is the processor's.
    #[serde(default = "processor")]
    devices: Vec<String>,
}

fn processor() -> Vec<String> {
    vec![Place::Cpu.to_string()]
}

/// The kind of the event that ends a run which has diverged.
pub(crate) const DIVERGED: &str = "diverged";

/// Whether numbers have left the range that numbers have.
fn is_not_finite(error: &ModelError) -> bool {
    use mass_expand::ExpandError;
    use mass_routing::RoutingError;
    matches!(
        error,
        ModelError::NonFinite(_)
            | ModelError::Routing(
                RoutingError::NonFiniteLogit { .. } | RoutingError::NonFinite { .. }
            )
            | ModelError::Expand(ExpandError::NonFinite { .. })
    )
}

/// An error by its cause.
fn sorted(error: BenchError) -> BenchError {
    match error {
        BenchError::Failed { doing, source }
            if source.downcast_ref().is_some_and(is_not_finite) =>
        {
            BenchError::Diverged { doing, source }
        }
        other => other,
    }
}

/// A run under way.
pub struct Trainer<'t, T: Task> {
    task: &'t T,
    run: Run,
    model: T::Model,
    optimizer: AdamW,
    /// For each layer the network that its experts started from.
    templates: Vec<MoeExpert>,
    step: u64,
    saved: Saved<T::Progress>,
    ranks: Ranks,
}

impl<'t, T: Task> Trainer<'t, T> {
    /// A run at its beginning, or where its checkpoint in `dir` left it if `resume` is set and there is one. `run` says what it
    /// is called, and by which seed it is made.
    ///
    /// # Errors
    /// [`BenchError::Input`] if the checkpoint is of another run or damaged; [`BenchError::Usage`] or [`BenchError::Failed`] if
    /// there is no such model.
    pub fn open(
        task: &'t T,
        run: &Run,
        method: &Method,
        dir: &Path,
        resume: bool,
    ) -> Result<Self, BenchError> {
        Self::open_among(&Ranks::default(), task, (run, method), dir, resume)
    }

    /// [`open`](Self::open) on one of several ranks that train together: each computes its share of every batch, all decide the
    /// same, and the first alone writes checkpoints and scores. All of them read the same checkpoint.
    ///
    /// # Errors
    /// As there, and [`BenchError::Usage`] for a task or a method that several ranks cannot share, [`BenchError::Parallel`] where
    /// ranks differ.
    pub fn open_among(
        ranks: &Ranks,
        task: &'t T,
        (run, method): (&Run, &Method),
        dir: &Path,
        resume: bool,
    ) -> Result<Self, BenchError> {
        let name = run.key().to_string();
        let made = |e: ModelError| crate::study::unusable_model(e, format!("setting up {name}"));
        let recipe = task.recipe();
        let mut settings = json!({ "run": name, "method": method, "recipe": recipe });
        settings["task"] = task.identity();
        let mut device = task.place().to_string();
        if !ranks.is_alone() {
            device = format!("{device}, {} ranks", ranks.size());
            if *task.place() != Place::Cpu {
                let what = "several ranks train on processors alone; use --device cpu";
                return Err(BenchError::Usage(what.into()));
            }
        }
        let model = task.model().map_err(made)?;
        parallel::check(ranks, &model).map_err(|e| match e {
            ModelError::Parallel(e) => BenchError::Parallel(e),
            e => made(e),
        })?;
        let (layers, steps) = (model.mixtures(), recipe.schedule.steps);
        let grower = method.growth(layers, steps, run.seed, |rules| task.tune(rules))?;
        let (mut dynmoe, mut templates) = (None, Vec::new());
        if let Method::DynMoe { experts_max, .. } = method {
            let rules = task.dynmoe(*experts_max);
            dynmoe = Some(DynMoe::new(rules, model.mixtures()).map_err(made)?);
            let first = |l| model.mixture(l).experts()[0].clone();
            templates = (0..model.mixtures()).map(first).collect();
        }
        let saved = Saved {
            settings,
            grower: grower.map(Grower::new).transpose().map_err(made)?,
            dynmoe,
            devices: vec![device.clone()],
            ..Saved::default()
        };
        let mut trainer = Self {
            optimizer: AdamW::new(recipe.adamw.clone()).map_err(made)?,
            run: run.clone(),
            task,
            model,
            templates,
            step: 0,
            saved,
            ranks: ranks.clone(),
        };
        if resume && (checkpoint::exists(dir) || !checkpoint::steps(dir).is_empty()) {
            trainer.go_on(dir)?;
            let devices = &mut trainer.saved.devices;
            if devices.last() != Some(&device) {
                devices.push(device);
            }
        } else if dir.is_dir() && ranks.is_first() {
            // Nothing that goes on: what an earlier run left there must not be taken for this one's.
            std::fs::remove_dir_all(dir)
                .map_err(|e| BenchError::failed("removing an older checkpoint", e))?;
        }
        trainer.model.set_ranks(ranks);
        let divided = parallel::divide(ranks, &mut trainer.model, &mut trainer.optimizer);
        divided.map_err(made)?;
        if ranks.divides_experts() && trainer.saved.dynmoe.is_some() {
            let what = "DynMoE, whose newcomers are drawn anew, with --expert-parallel";
            return Err(ParallelError::Unsupported(what.into()).into());
        }
        ranks.agree(&[
            (
                "the settings of the run",
                trainer.saved.settings.to_string(),
            ),
            ("steps made", trainer.step.to_string()),
        ])?;
        Ok(trainer)
    }

    fn go_on(&mut self, dir: &Path) -> Result<(), BenchError> {
        let input = |problem: String| BenchError::input(dir, problem);
        let read = match checkpoint::load::<T::Model, Saved<T::Progress>>(dir) {
            Ok(read) => read,
            Err(e) => {
                let whole = checkpoint::steps(dir)
                    .into_iter()
                    .rev()
                    .find_map(|step| Some((checkpoint::load_step(&step).ok()?, step)));
                match whole {
                    // The first one may have been written and not yet named.
                    Some((read, _)) if !checkpoint::exists(dir) => read,
                    Some((_, step)) => {
                        let (latest, step) = (dir.join("latest"), step.display());
                        return Err(input(format!(
                            "{e}; {step} is whole: without {} --resume goes on from there, if what it kept is there still; --fresh deletes both and begins anew",
                            latest.display()
                        )));
                    }
                    None => {
                        return Err(input(format!("{e}; --fresh deletes it and begins anew")));
                    }
                }
            }
        };
        if read.state.settings != self.saved.settings {
            return Err(input(
                "the checkpoint is of a run with other settings or other data; give another --out, or --fresh, which deletes \
                 everything in this one"
                    .into(),
            ));
        }
        (self.model, self.optimizer) = (read.model, read.optimizer);
        (self.step, self.saved) = (read.step, read.state);
        let progress = &mut self.saved.progress;
        self.task.load(dir, self.step, &self.model, progress)
    }

    /// Trains to the end, or until `on_step` (told the number of steps made and the loss) returns false, saving checkpoints to
    /// `dir` on the way and when asked to stop; at the end too if `keep` is set.
    ///
    /// Returns whether the run is complete.
    ///
    /// # Errors
    /// [`BenchError::Failed`] if training breaks down (a loss that is not a number) or a checkpoint cannot be written.
    pub fn train(
        &mut self,
        dir: &Path,
        keep: bool,
        on_step: &mut dyn FnMut(u64, f64) -> bool,
    ) -> Result<bool, BenchError> {
        if self.saved.stopped {
            return Ok(true);
        }
        let make = self.task.batches();
        prefetch(self.step..self.steps(), AHEAD, make, |batches| {
            self.train_on(batches, dir, keep, on_step)
        })
    }

    fn train_on(
        &mut self,
        batches: &mut Prefetched<Result<T::Batch, BenchError>>,
        dir: &Path,
        keep: bool,
        on_step: &mut dyn FnMut(u64, f64) -> bool,
    ) -> Result<bool, BenchError> {
        let (mut saved_at, mut started) = (self.step, Instant::now());
        let mut waited = batches.waited();
        let mut ended = self.step == self.steps();
        while !ended {
            let batch = batches.next().ok_or_else(|| {
                BenchError::failed("making batches", "their thread has ended early")
            })??;
            let loss = self.advance(&batch)?;
            self.saved.training_s += started.elapsed().as_secs_f64();
            self.saved.waited_s += (batches.waited() - waited).as_secs_f64();
            waited = batches.waited();
            self.score()?;
            ended = self.saved.stopped || self.step == self.steps();
            let mut go_on = on_step(self.step, loss);
            if !self.ranks.is_alone() {
                let mut ends = [!go_on, self.saved.stopped].map(|end| f64::from(u8::from(end)));
                self.ranks.sum(&mut ends)?;
                (go_on, ended) = (ends[0] == 0.0, ended || ends[1] > 0.0);
                self.saved.stopped |= ends[1] > 0.0;
            }
            self.saved.wall_s += started.elapsed().as_secs_f64();
            started = Instant::now();
            let due = self.step - saved_at >= self.task.recipe().checkpoint_every;
            if !go_on || due || (ended && keep) {
                self.save(dir)?;
                saved_at = self.step;
            }
            if !go_on {
                break;
            }
        }
        self.compare()?;
        Ok(ended)
    }

    fn advance(&mut self, batch: &T::Batch) -> Result<f64, BenchError> {
        let loss = self.step_on(batch).map_err(|e| match e {
            ModelError::Parallel(e) => BenchError::Parallel(e),
            e => {
                let doing = format!("{} at step {}", self.name(), self.step);
                sorted(BenchError::failed(doing, e))
            }
        })?;
        self.step += 1;
        self.saved.tokens += self.task.tokens(batch);
        self.log();
        Ok(loss)
    }

    fn step_on(&mut self, batch: &T::Batch) -> Result<f64, ModelError> {
        let (step, task, ranks) = (self.step, self.task, &self.ranks);
        let (model, optimizer, saved) = (&mut self.model, &mut self.optimizer, &mut self.saved);
        let own = match ranks.is_alone() {
            true => None,
            false => Some(share(task, batch, ranks)?),
        };
        let (batch, weight) = own.as_ref().map_or((batch, 1), |(own, n)| (own, *n));
        let mut pass = task.pass(model, batch, step)?;
        parallel::reduce(ranks, model, &mut pass, weight)?;
        task.disturb(model, &mut pass.gradients, step)?;
        model.adapt_among(ranks, &pass.layers)?;
        let (splits, pairs) = (&saved.expansions, &mut saved.pairs);
        look_at_pairs((ranks, step), model, &mut pass, splits, pairs)?;
        if let Some(grower) = &mut saved.grower {
            let losses = |model: &T::Model, on, masked| match on {
                _ if ranks.is_alone() => task.losses(model, batch, on, masked),
                // Where experts are divided all ranks have to take part.
                LossOn::Probe if !ranks.is_first() => {
                    if ranks.divides_experts() {
                        task.losses(model, batch, on, masked)?;
                    }
                    Ok(ranks.gather_f64(&[])?)
                }
                _ => Ok(ranks.gather_f64(&task.losses(model, batch, on, masked)?)?),
            };
            let events = grower.step_among(ranks, step, model, optimizer, &mut pass, losses)?;
            saved.expansions.extend(expansions(&events));
            saved.events.extend(events.iter().map(|e| json!(e)));
        }
        if let Some(dynmoe) = &saved.dynmoe {
            dynmoe.add_loss(model, &mut pass.gradients)?;
        }
        let rate = task.recipe().schedule.at(step);
        task.update(optimizer, model, &mut pass.gradients, rate)?;
        if let Some(dynmoe) = &mut saved.dynmoe {
            let events =
                dynmoe.step_among((ranks, step), model, optimizer, &pass, &self.templates)?;
            saved.events.extend(events.iter().map(|e| json!(e)));
        }
        let mut counts: Vec<f64> = Vec::new();
        for layer in &pass.layers {
            let (assignments, tokens) = (layer.plan.num_assignments(), layer.plan.num_tokens());
            counts.extend([assignments as f64, tokens as f64]);
        }
        ranks.sum(&mut counts)?;
        let mean_k = |of: &[f64]| if of[1] > 0.0 { of[0] / of[1] } else { 0.0 };
        let k: f64 = counts.chunks_exact(2).map(mean_k).sum();
        let sums = &mut saved.since_log;
        sums.0 += 1;
        sums.1 += f64::from(pass.loss);
        // A dense model has no layer to take a mean over.
        sums.2 += k / pass.layers.len().max(1) as f64;
        Ok(f64::from(pass.loss))
    }

    fn log(&mut self) {
        let recipe = self.task.recipe();
        let last = self.step == recipe.schedule.steps;
        if !(last || self.step.is_multiple_of(recipe.log_every)) {
            return;
        }
        let (n, loss, k) = std::mem::take(&mut self.saved.since_log);
        let layers: Vec<usize> = self.experts().iter().map(|ids| ids.len()).collect();
        let active = (!layers.is_empty()).then_some(k / n as f64);
        let mut line = MetricLine {
            train_loss: Some(loss / n as f64),
            learning_rate: Some(recipe.schedule.at(self.step - 1)),
            experts: layers.iter().copied().max(),
            active_per_token: active,
            ..self.line()
        };
        if T::LAYERS_APART && line.experts.take().is_some() {
            line.extra.insert("experts_by_layer".into(), json!(layers));
        }
        self.saved.metrics.push(line);
    }

    fn score(&mut self) -> Result<(), BenchError> {
        let apart = self.ranks.divides_experts();
        if apart && !self.task.scores_after(self.step) {
            return Ok(());
        }
        if apart {
            self.bring_together()?;
        }
        let progress = &mut self.saved.progress;
        let scored = match self.ranks.is_first() {
            true => {
                let scored = self.task.score(&self.model, self.step, progress);
                scored.map_err(sorted)?
            }
            false => None,
        };
        parallel::release(&self.ranks, &mut self.model, &mut self.optimizer);
        let Some(scored) = scored else {
            return Ok(());
        };
        self.saved.stopped |= scored.stop;
        self.saved.metrics.push(MetricLine {
            test_loss: scored.test_loss,
            extra: scored.extra,
            ..self.line()
        });
        Ok(())
    }

    /// A line of metrics that says nothing yet.
    fn line(&self) -> MetricLine {
        MetricLine {
            run: self.name(),
            step: self.step,
            extra: Map::new(),
            ..MetricLine::default()
        }
    }

    /// Refuses ranks that have come apart: their processors round in another way.
    fn compare(&self) -> Result<(), BenchError> {
        if self.ranks.is_alone() {
            return Ok(());
        }
        let mut sum = crc32fast::Hasher::new();
        self.model.visit("", &mut |name, param| {
            // What some ranks have and others do not cannot be compared.
            if param.is_divided() {
                return;
            }
            sum.update(name.as_bytes());
            param
                .values()
                .iter()
                .for_each(|x| sum.update(&x.to_le_bytes()));
        });
        let events = serde_json::to_string(&self.saved.events).unwrap_or_default();
        sum.update(events.as_bytes());
        let what = format!("weights and events after step {} of checksum", self.step);
        Ok(self
            .ranks
            .agree(&[(&what, format!("{:08x}", sum.finalize()))])?)
    }

    /// Gives the first rank all experts; those that are others' are given up by [`parallel::release`].
    fn bring_together(&mut self) -> Result<(), BenchError> {
        let (ranks, model, optimizer) = (&self.ranks, &mut self.model, &mut self.optimizer);
        parallel::whole(ranks, model, optimizer).map_err(|e| match e {
            ModelError::Parallel(e) => BenchError::Parallel(e),
            e => BenchError::failed("bringing experts together", e),
        })
    }

    fn save(&mut self, dir: &Path) -> Result<(), BenchError> {
        self.compare()?;
        self.bring_together()?;
        let saved = match self.ranks.is_first() {
            true => self.write(dir),
            false => Ok(()),
        };
        parallel::release(&self.ranks, &mut self.model, &mut self.optimizer);
        saved
    }

    fn write(&self, dir: &Path) -> Result<(), BenchError> {
        let progress = &self.saved.progress;
        self.task.save(dir, self.step, progress, false)?;
        let (model, optimizer) = (&self.model, &self.optimizer);
        let snapshot = Snapshot::new(self.step, model, optimizer, &self.saved);
        checkpoint::save(dir, &snapshot)
            .map_err(|e| sorted(BenchError::failed("saving a checkpoint", e)))?;
        // Those of the study are written when the run is done. Who waits for it can look at these.
        write_lines(&dir.join("metrics.jsonl"), &self.saved.metrics)
            .map_err(|e| BenchError::failed("writing the metrics of a run under way", e))?;
        self.task.save(dir, self.step, progress, true)
    }

    /// The row and the lines of a run that is complete.
    ///
    /// # Errors
    /// [`BenchError::Diverged`] or [`BenchError::Failed`] for a model that cannot be scored.
    pub fn finish(self) -> Result<Outcome, BenchError> {
        let (outcome, judged) = self.end(true)?;
        judged.map(|()| outcome)
    }

    /// The same of a run of a study, by how [`train`](Self::train) ended: `None` if it was stopped. One that has diverged, alone, is a
    /// run without figures, and its last event says why: others go on.
    ///
    /// # Errors
    /// What training ended with, or as [`finish`](Self::finish).
    pub fn conclude(
        self,
        trained: Result<bool, BenchError>,
    ) -> Result<Option<Outcome>, BenchError> {
        let (step, alone) = (self.step, self.ranks.is_alone());
        let (mut outcome, ended) = match trained {
            Ok(false) => return Ok(None),
            Err(e @ BenchError::Diverged { .. }) if alone => (self.end(false)?.0, Err(e)),
            trained => {
                trained?;
                self.end(true)?
            }
        };
        match ended {
            Err(e @ BenchError::Diverged { .. }) if alone => {
                (outcome.run.test_loss, outcome.run.metric) = (None, None);
                outcome
                    .events
                    .push(json!({ "step": step, "kind": DIVERGED, "why": e.to_string() }));
            }
            ended => ended?,
        }
        Ok(Some(outcome))
    }

    /// The row and the lines of a run, and whether its model could be scored, if it is to be.
    fn end(mut self, judge: bool) -> Result<(Outcome, Result<(), BenchError>), BenchError> {
        self.bring_together()?;
        let saved = self.saved;
        let Saved { tokens, wall_s, .. } = saved;
        let controller = saved.grower.as_ref().map(Grower::controller);
        let decisions = controller.map(|c| {
            let moe = self.model.mixture(0).config();
            let found = Decisions::of(&saved.events, c.params(), (moe.hidden, moe.dim));
            found.map_err(|e| BenchError::failed("counting what tests said", e))
        });
        let mut run = Run {
            steps: Some(self.step),
            tokens: Some(tokens),
            detection_live_steps: controller.map(|c| c.live_steps()),
            wall_s: Some(wall_s),
            tokens_per_s: (wall_s > 0.0).then(|| tokens as f64 / wall_s),
            expansions: saved.expansions,
            pairs: saved.pairs.means(),
            decisions: decisions.transpose()?.flatten(),
            diagnoses: controller.map_or_else(Vec::new, |c| c.diagnoses()),
            devices: match saved.devices {
                several if several.len() > 1 => several,
                _ => Vec::new(),
            },
            ..self.run
        };
        let end = Finished {
            model: &self.model,
            progress: &saved.progress,
            waiting: (saved.training_s > 0.0).then(|| saved.waited_s / saved.training_s),
        };
        let judged = match judge && self.ranks.is_first() {
            true => self.task.finish(&end, &mut run).map_err(sorted),
            false => Ok(()),
        };
        run.peak_rss_mib = peak_rss_mib();
        let (metrics, events) = (saved.metrics, saved.events);
        let outcome = Outcome {
            run,
            metrics,
            events,
        };
        Ok((outcome, judged))
    }

    /// Its name in metrics.jsonl and events.jsonl.
    fn name(&self) -> String {
        self.run.key().to_string()
    }

    /// Steps of the whole run if it is not stopped early.
    fn steps(&self) -> u64 {
        self.task.recipe().schedule.steps
    }

    /// Steps made.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// The model as it is.
    pub fn model(&self) -> &T::Model {
        &self.model
    }

    /// Experts of each mixture layer.
    pub fn experts(&self) -> Vec<&[ExpertId]> {
        let layers = 0..self.model.mixtures();
        layers.map(|l| self.model.mixture(l).ids()).collect()
    }
}

/// This rank's share of a batch, and its number of targets.
fn share<T: Task>(
    task: &T,
    batch: &T::Batch,
    ranks: &Ranks,
) -> Result<(T::Batch, u64), ModelError> {
    let refused = |what: String| ParallelError::Unsupported(what).into();
    match task.share(batch, ranks) {
        None => Err(refused("batches of this study cannot be shared".into())),
        Some((_, 0)) => Err(refused(format!(
            "a batch has fewer sequences than there are ranks, {}; start fewer",
            ranks.size()
        ))),
        Some(own) => Ok(own),
    }
}

/// Adds the figures of this step's pairs: those that were split so many steps ago, and whose halves are both there.
fn look_at_pairs<M: Mixtures>(
    (ranks, step): (&Ranks, u64),
    model: &M,
    pass: &mut TrainPass<PlacedGradients>,
    splits: &[Expansion],
    sums: &mut PairSums,
) -> Result<(), ModelError> {
    for split in splits {
        let age = step - split.step;
        let layer = model.mixture(split.layer);
        let [source, new] = [split.source, split.new].map(|e| ExpertId(e as u32));
        let there = |id| layer.ids().contains(id);
        if PairSums::looks_at(age) && [source, new].iter().all(there) {
            let (trace, gradients) = (&pass.layers[split.layer], &mut pass.gradients);
            let figures = pair_figures_among(ranks, layer, trace, gradients, (source, new))?;
            sums.add(age, &figures);
        }
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use mass_model::Parameters;

    use super::*;

    /// What a run leaves: weights, and all it would write but what a clock says.
    fn left<T: Task>(trainer: Trainer<'_, T>) -> (Vec<f32>, String) {
        let mut weights = Vec::new();
        let model = trainer.model();
        model.visit("", &mut |_, p| weights.extend(p.values()));
        let Outcome {
            mut run,
            metrics,
            events,
        } = trainer.finish().unwrap();
        (run.wall_s, run.tokens_per_s, run.peak_rss_mib) = (None, None, None);
        run.metrics.remove("waiting_for_data");
        (weights, format!("{run:?} {metrics:?} {events:?}"))
    }

    /// A run that stops at some steps and goes on ends as one that never stopped, and leaves nothing to be done again.
    pub(crate) fn resumes_to_the_same_bits<T: Task>(task: &T, method: &Method, stops: &[u64]) {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (dir.path().join("one"), dir.path().join("two"));
        let run = method.run(4);
        let open = |dir: &Path| Trainer::open(task, &run, method, dir, true).unwrap();
        let mut whole = open(&one);
        assert!(whole.train(&one, false, &mut |_, _| true).unwrap());
        for &stop in stops {
            let complete = open(&two).train(&two, false, &mut |step, _| step < stop);
            assert!(!complete.unwrap());
        }
        let mut rest = open(&two);
        assert_eq!(Some(&rest.step()), stops.last());
        assert!(rest.train(&two, true, &mut |_, _| true).unwrap());
        let (whole, rest) = (left(whole), left(rest));
        assert_eq!(whole.1, rest.1, "{method:?}");
        assert!(whole.0 == rest.0, "weights of {method:?}");
        // Whoever is killed between the last step and the results makes no step again.
        let mut again = open(&two);
        assert!(
            again
                .train(&two, true, &mut |_, _| panic!("a step"))
                .unwrap()
        );
        assert!(left(again) == whole, "{method:?}");
    }
}

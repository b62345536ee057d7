//! The scale study: what pools of 8 to 4096 experts cost, and what breaks first.
//!
//! The model and the batch are those of the synthetic study, so that what is seen to grow is what depends on the number of experts:
//! routing, watching, a split, checkpoints and their reading. Each is timed on its own, on a model that was trained for a few steps.

use std::path::{Path, PathBuf};
use std::time::Instant;

use mass_expand::{AlignmentThreshold, ControllerParams, StopRule, Trigger};
use mass_model::checkpoint::{self, Snapshot};
use mass_model::growth::{Grower, GrowerConfig, LossOn, Mixtures};
use mass_model::lm::LanguageModel;
use mass_model::optim::AdamW;
use mass_model::{Masked, ModelError, Place};
use mass_routing::{Combine, Router, RoutingPlan};
use ndarray_rand::rand::Rng;
use ndarray_rand::rand_distr::StandardNormal;
use serde_json::{Value, json};

use super::plan::{Assignment, Family, Plan, Planned};
use super::synthetic::{Data, POOL, Regime, Synthetic, TASKS, regime};
use crate::BenchError;
use crate::batch::TokenBatch;
use crate::cli::{Preset, ReproduceArgs, RunContext};
use crate::language::Language;
use crate::method::{Method, Pool};
use crate::report::peak_rss_mib;
use crate::rng::{Purpose, stream};
use crate::sweep::Side;

/// Steps before anything is timed.
const STEPS: u64 = 20;

/// Sizes of pools.
const SIZES: [usize; 10] = [8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096];

/// The task of the synthetic study, of which costs are taken.
#[derive(Debug, Clone)]
pub struct Scale {
    task: Synthetic,
    /// How often each is timed; the median counts.
    repeats: usize,
    /// Where checkpoints are written that are timed.
    out: PathBuf,
}

/// The plan of a preset.
///
/// # Errors
/// None: nothing has to be there.
pub fn plan(args: &ReproduceArgs) -> Result<Plan<Scale>, BenchError> {
    let (sizes, repeats, seeds) = match args.preset {
        Preset::Smoke => (&[4, 8][..], 1, 1),
        Preset::Quick => (&SIZES[..], 9, 1),
        Preset::Full | Preset::Paper => (&SIZES[..], 15, 5),
    };
    let mut task = Synthetic::fresh(args, &TASKS[..1]).smoke();
    task.regime = regime!(steps: STEPS);
    let pool = Pool {
        experts: sizes[0],
        experts_max: sizes[0] + 1,
        live_percent: None,
        ..POOL
    };
    let methods = sizes
        .iter()
        .map(|&experts| Method::top_p(experts, pool.p, Combine::Renormalised));
    let family = Scale {
        task,
        repeats,
        out: args.out.clone(),
    };
    Ok(Plan::new(family, methods.collect(), pool, seeds))
}

impl Family for Scale {
    type Data = Data;
    type Task<'a> = Language<'a>;

    const SIDE: Side = Side::Alone;

    fn settings(&self) -> Result<Value, BenchError> {
        let mut settings = self.task.settings()?;
        settings["repeats"] = json!(self.repeats);
        Ok(settings)
    }

    fn assignments(&self) -> Result<Vec<Assignment>, BenchError> {
        self.task.assignments()
    }

    fn read(&self, set: &str, ctx: &mut RunContext) -> Result<Data, BenchError> {
        self.task.read(set, ctx)
    }

    fn digest(&self, data: &Data) -> Option<u64> {
        self.task.digest(data)
    }

    fn task<'a>(
        &'a self,
        data: &'a Data,
        planned: &'a Planned,
    ) -> Result<Language<'a>, BenchError> {
        let mut task = self.task.task(data, planned)?;
        let batch = (task.draw)(0)?;
        let adamw = task.recipe.adamw.clone();
        let score = std::mem::replace(&mut task.judge, Box::new(|_, _, _| Ok(())));
        task.judge = Box::new(move |place, model, run| {
            score(place, model, run)?;
            let optimizer = AdamW::new(adamw.clone());
            let costs = optimizer.and_then(|optimizer| self.costs(place, model, optimizer, &batch));
            let costs = costs.map_err(|e| BenchError::failed("timing", e))?;
            let named = costs
                .into_iter()
                .map(|(name, cost)| (name.to_owned(), cost));
            run.metrics.extend(named);
            Ok(())
        });
        Ok(task)
    }
}

impl Scale {
    /// What a model's pool costs, in milliseconds unless the name says otherwise:
    ///
    /// - `step_ms`: forward, backward and AdamW, without growth.
    /// - `routing_ms`: from logits to the plan by which tokens are grouped.
    /// - `watching_ms`: norms of all experts' gradients, and their detectors; what a step of the paper's rules adds.
    /// - `split_ms`: a bisection with the optimiser's moments.
    /// - `save_ms`, `load_ms`, `checkpoint_mib`: a checkpoint with model, optimiser and controller.
    /// - `controller_kib`: the controller with its detectors, as a checkpoint has it.
    /// - `resident_mib`: the most memory until then.
    fn costs(
        &self,
        place: &Place,
        model: &LanguageModel,
        mut optimizer: AdamW,
        batch: &TokenBatch,
    ) -> Result<Vec<(&'static str, f64)>, ModelError> {
        let mut model = model.clone();
        let experts = model.mixture(0).ids().len();
        let (mut steps, mut watching, mut splits) = (Vec::new(), Vec::new(), Vec::new());
        let mut watcher = watcher(experts, self.repeats)?;
        let pass = |model: &LanguageModel| {
            model.train_pass_at(place, &batch.inputs, &batch.targets, batch.length)
        };
        for step in 0..self.repeats as u64 {
            let start = Instant::now();
            let mut passed = pass(&model)?;
            let before = Instant::now();
            watcher.step(step, &mut model, &mut optimizer, &mut passed, worth)?;
            watching.push(milliseconds(before));
            optimizer.step(&mut model, &mut passed.gradients, 1e-3)?;
            steps.push(milliseconds(start) - watching[watching.len() - 1]);
        }
        let routing = routing(&model, batch.inputs.len(), self.repeats)?;
        let (save, load, mib) = self.checkpoint(&model, &optimizer, &watcher)?;
        let controller = serde_json::to_vec(&watcher).map_or(f64::NAN, |bytes| bytes.len() as f64);
        let mut splitter = splitter(experts, self.repeats)?;
        for step in 0..self.repeats as u64 {
            let mut passed = pass(&model)?;
            let before = Instant::now();
            splitter.step(step, &mut model, &mut optimizer, &mut passed, worth)?;
            splits.push(milliseconds(before));
            optimizer.step(&mut model, &mut passed.gradients, 1e-3)?;
        }
        Ok(vec![
            ("step_ms", median(steps)),
            ("routing_ms", routing),
            ("watching_ms", median(watching)),
            ("split_ms", median(splits)),
            ("save_ms", save),
            ("load_ms", load),
            ("checkpoint_mib", mib),
            ("controller_kib", controller / 1024.0),
            ("resident_mib", peak_rss_mib().unwrap_or(f64::NAN)),
        ])
    }

    /// Times of writing and reading a checkpoint, and its size.
    fn checkpoint(
        &self,
        model: &LanguageModel,
        optimizer: &AdamW,
        state: &Grower,
    ) -> Result<(f64, f64, f64), ModelError> {
        let dir = self.out.join("checkpoints").join("timed");
        let (mut save, mut load) = (Vec::new(), Vec::new());
        for step in 0..self.repeats as u64 {
            let start = Instant::now();
            checkpoint::save(&dir, &Snapshot::new(step, model, optimizer, state))?;
            save.push(milliseconds(start));
            let start = Instant::now();
            checkpoint::load::<LanguageModel, Grower>(&dir)?;
            load.push(milliseconds(start));
        }
        // The one before the last is there too, for readers.
        let last = dir.join(format!("step-{:010}", self.repeats - 1));
        let bytes = size(&last).unwrap_or(f64::NAN);
        // It is not missed if it stays.
        let _ = std::fs::remove_dir_all(&dir);
        Ok((median(save), median(load), bytes / f64::from(1 << 20)))
    }
}

/// Losses that make every expert worth something.
fn worth(_: &LanguageModel, _: LossOn, masked: Option<Masked>) -> Result<Vec<f64>, ModelError> {
    let worse = if masked.is_some() { 1.0 } else { 0.0 };
    Ok(vec![worse, worse + 0.1])
}

/// The paper's rules, which watch every expert in every step and split none: nothing passes the test.
fn watcher(experts: usize, steps: usize) -> Result<Grower, ModelError> {
    let mut controller = ControllerParams::paper(1, experts, experts + 1, 2000);
    controller.phase.live_until = steps as u64;
    controller.trigger = Trigger::DetectorAndAlignment;
    controller.alignment = AlignmentThreshold::Absolute(f64::MIN_POSITIVE);
    Grower::new(GrowerConfig::new(controller))
}

/// A split in every step.
fn splitter(experts: usize, steps: usize) -> Result<Grower, ModelError> {
    let mut controller = ControllerParams::ours(1, experts, experts + steps, 2000);
    controller = controller.with_schedule(0, 1);
    controller.stop = StopRule::Never;
    let mut config = GrowerConfig::new(controller);
    config.redundancy_weight = 0.0;
    Grower::new(config)
}

/// Time of routing so many tokens by logits of one size.
fn routing(model: &LanguageModel, tokens: usize, repeats: usize) -> Result<f64, ModelError> {
    let layer = model.mixture(0);
    let experts = layer.ids().len();
    let mut rng = stream(0, Purpose::Noise, experts as u64);
    let logits: Vec<f32> = (0..tokens * experts)
        .map(|_| 2.0 * rng.sample::<f32, _>(StandardNormal))
        .collect();
    let (mut times, mut plan) = (Vec::new(), RoutingPlan::default());
    for _ in 0..repeats {
        let start = Instant::now();
        let mut router = layer.router();
        router.route_slice(&logits, experts, None, &mut plan)?;
        times.push(milliseconds(start));
    }
    Ok(median(times))
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Bytes of the files in a folder.
fn size(folder: &Path) -> Option<f64> {
    let files = std::fs::read_dir(folder).ok()?;
    let sizes = files.map(|file| Some(file.ok()?.metadata().ok()?.len() as f64));
    sizes.sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_all_studies_a_small_one_has_nothing_for_some_shards() {
        let args = ReproduceArgs::parsed(&["scale", "--preset", "smoke", "--shard", "3/3"]);
        let plan = plan(&args).unwrap();
        assert!(plan.check(&args).is_err());
        let any = |shard: &str| {
            let mut args = ReproduceArgs::parsed(&["scale", "--preset", "smoke", "--shard", shard]);
            args.of_all = true;
            plan.check(&args).unwrap()
        };
        assert_eq!(["2/3", "3/3"].map(any), [true, false]);
    }

    #[test]
    fn pools_grow_by_what_is_split_and_none_is_split_by_watching() {
        let args = ReproduceArgs::parsed(&["scale", "--preset", "full"]);
        let plan = plan(&args).unwrap();
        assert_eq!(plan.runs(&args).unwrap().len(), SIZES.len() * 5);
        let dir = tempfile::tempdir().unwrap();
        let scale = Scale {
            out: dir.path().to_owned(),
            repeats: 3,
            ..plan.family
        };
        let mut ctx = RunContext::new(crate::cli::Progress::new(true));
        let data = scale.read(TASKS[0], &mut ctx).unwrap();
        let planned = plan_of(&args);
        let task = scale.task(&data, &planned).unwrap();
        let model = crate::task::Task::model(&task).unwrap();
        let batch = (task.draw)(0).unwrap();
        let optimizer = AdamW::new(task.recipe.adamw.clone()).unwrap();
        let costs = scale.costs(&Place::Cpu, &model, optimizer, &batch).unwrap();
        assert!(costs.iter().all(|(_, cost)| *cost > 0.0), "{costs:?}");
        // Weights and two moments of each.
        let mut values = 0;
        mass_model::Parameters::visit(&model, "", &mut |_, p| values += p.len());
        let mib = costs.iter().find(|(name, _)| *name == "checkpoint_mib");
        let least = 12.0 * values as f64 / f64::from(1 << 20);
        let found = mib.unwrap().1;
        assert!(found > least && found < 1.2 * least, "{found} and {least}");
        assert_eq!(
            std::fs::read_dir(dir.path().join("checkpoints"))
                .unwrap()
                .count(),
            0
        );
    }

    fn plan_of(args: &ReproduceArgs) -> Planned {
        plan(args).unwrap().runs(args).unwrap().remove(0)
    }
}

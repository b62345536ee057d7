//! The domain-generalisation study: MASS in two blocks of a pretrained vision transformer, beside the dense model (ERM), GMoE and
//! DynMoE, on image sets in DomainBed's layout.
//!
//! One domain is left out; a model is trained on the others together, a fifth of each held out. Of the models scored on the way the
//! first that does best on what is held out is the run's, and its accuracy on the domain that was left out is the run's figure:
//! nothing is chosen by the target. Where the first blocks are frozen, what they make of every image is computed once and kept.

mod data;
mod layerwise;
mod method;
mod patches;
mod plan;
mod score;
mod selected;
#[cfg(test)]
mod tests;
mod trainer;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::Ordering;

use crate::BenchError;
use crate::cli::{ReproduceArgs, RunContext};
use crate::dg::features::Features;
use crate::dg::images::Source;
use crate::report::{LEFT_OUT, Results, Run, peak_rss_mib};
use crate::sweep::checkpoint_dir;
use data::Set;
use plan::{Plan, Planned};
use trainer::Trainer;

/// What `--methods` may name; `dense` is another name of `erm`.
pub const METHODS: &[&str] = &["mass", "erm", "dense", "gmoe", "dynmoe"];

/// What `--task` may name: a set, or a set and the domain that is left out. Other folders in DomainBed's layout may be named too.
pub const TASKS: &[&str] = &[
    "pacs",
    "pacs/art_painting",
    "pacs/cartoon",
    "pacs/photo",
    "pacs/sketch",
    "vlcs",
    "vlcs/Caltech101",
    "vlcs/LabelMe",
    "vlcs/SUN09",
    "vlcs/VOC2007",
    "office_home",
    "office_home/Art",
    "office_home/Clipart",
    "office_home/Product",
    "office_home/Real World",
    "terra_incognita",
    "terra_incognita/location_100",
    "terra_incognita/location_38",
    "terra_incognita/location_43",
    "terra_incognita/location_46",
    "sample",
    "sample/bright",
    "sample/dark",
    "sample/noisy",
    "sample/striped",
];

/// Features that would take more than this are computed with each batch instead of being kept.
const MOST_FEATURES: u64 = 4 << 30;

/// Whether images and model are there.
///
/// # Errors
/// [`BenchError`]: which is not.
pub fn check(args: &ReproduceArgs) -> Result<(), BenchError> {
    planned(args).map(drop)
}

/// The plan and its runs, at least one.
fn planned(args: &ReproduceArgs) -> Result<(Plan, Vec<Planned>), BenchError> {
    let plan = Plan::of(args)?;
    let runs = plan.runs(args)?;
    super::some_run(!runs.is_empty())?;
    let mut folders = BTreeMap::new();
    for run in &runs {
        let key = run.run.key();
        let folder = RunContext::checkpoint_dir(Path::new(""), &key);
        if let Some(other) = folders.insert(folder, key.to_string()) {
            return Err(BenchError::Usage(format!(
                "{other} and {key} would share a folder for what they keep; give one of the domains a name that differs in more \
                 than punctuation"
            )));
        }
    }
    Ok((plan, runs))
}

/// Makes the runs, one after another, each on all threads.
///
/// # Errors
/// [`BenchError`]: images or a model that are missing or damaged, whatever the first failing run ends with, or that it was
/// interrupted.
pub fn run(args: &ReproduceArgs, ctx: &mut RunContext) -> Result<Results, BenchError> {
    let (plan, mut runs) = planned(args)?;
    let mut settings = serde_json::to_value(&plan)
        .map_err(|e| BenchError::failed("describing the settings", e))?;
    // More seeds, targets or sets of the same plan only add runs; how often a run is saved changes none.
    for changes_no_run in ["seeds", "targets", "sets", "checkpoint_every"] {
        settings.as_object_mut().map(|s| s.remove(changes_no_run));
    }
    if let Some(dir) = plan.directory() {
        settings["model"] = super::model_settings(dir)?;
    }
    ctx.check_store(args, &settings)?;
    // Everything is read before the first run: a damaged file of the last set should not show after hours. And before anything
    // of an earlier run is replaced. The second reading is from the cache.
    let mut sets: Vec<&str> = runs.iter().map(|r| r.set.as_str()).collect();
    sets.dedup();
    for name in sets {
        let set = plan.read(args, name, ctx)?;
        settings["data"][name] = super::data_settings(set.digest);
        for planned in runs.iter().filter(|r| r.set == name) {
            trainer::check(&plan.config(planned, &set), &set)?;
        }
    }
    let mut store = ctx.open_store(args, &settings)?;
    runs.retain(|planned| store.finished(&planned.run.key()).is_none());
    if !args.resume {
        let patches = store.dir().join("patches");
        if patches.is_dir() {
            std::fs::remove_dir_all(&patches)
                .map_err(|e| BenchError::failed("removing pictures of earlier runs", e))?;
        }
    }

    let mut current: Option<Set> = None;
    for index in 0..runs.len() {
        let planned = &runs[index];
        // Sets come one after another, and only one is in memory.
        if current.as_ref().is_none_or(|set| set.name != planned.set) {
            drop(current.take());
            current = Some(read(&plan, args, &planned.set, ctx)?);
        }
        let Some(set) = current.as_ref() else {
            continue;
        };
        if index == 0 || runs[index - 1].set != planned.set {
            let of_set = runs.iter().filter(|r| r.set == planned.set).count() as u64;
            ctx.progress.start("steps", of_set * plan.steps());
        }
        let before = runs[..index]
            .iter()
            .filter(|r| r.set == planned.set)
            .count();
        let done = before as u64 * plan.steps();
        super::begin_run();
        let folder = checkpoint_dir(&store, &planned.run);
        let mut trainer = Trainer::open(plan.config(planned, set), set, &folder, args.resume)?;
        let key = planned.run.key().to_string();
        let (flag, progress) = (ctx.interrupt_flag(), &mut ctx.progress);
        let complete = trainer.run(&folder, &mut |step, loss| {
            progress.tick(done + step, || format!("{key}: loss {loss:.3}"));
            !flag.load(Ordering::SeqCst)
        })?;
        if !complete {
            return Err(interrupted(args));
        }
        let mut run = finished(planned, &trainer, set);
        let layers = trainer.patches()?;
        for (name, which) in [("nmi_class", 0), ("nmi_domain", 1)] {
            let of = layers.iter().filter_map(|l| l.information()[which]);
            let values: Vec<f64> = of.collect();
            if !values.is_empty() {
                let mean = values.iter().sum::<f64>() / values.len() as f64;
                run.metrics.insert(name.into(), mean);
            }
        }
        if !layers.is_empty() {
            let name = folder.file_name().unwrap_or_default();
            patches::write(&layers, set, &store.dir().join("patches").join(name))?;
        }
        ctx.progress.note(&describe(&run));
        let lines = (trainer.metrics(), trainer.events());
        super::keep(&mut store, run, lines, &folder)?;
    }
    Ok(store.into_results())
}

fn interrupted(args: &ReproduceArgs) -> BenchError {
    BenchError::Interrupted {
        out: args.out.clone(),
    }
}

/// A set, and what the frozen blocks make of it.
fn read(
    plan: &Plan,
    args: &ReproduceArgs,
    name: &str,
    ctx: &mut RunContext,
) -> Result<Set, BenchError> {
    let mut set = plan.read(args, name, ctx)?;
    let images = &set.images;
    let from = match &images.source {
        Source::Generated => "generated".to_owned(),
        Source::Decoded => "decoded".to_owned(),
        Source::Cache => "from the cache".to_owned(),
        Source::Repaired(why) => format!("decoded again: {why}"),
    };
    ctx.progress.note(&format!(
        "{name}: {} images of {} classes in {} domains, {from}; {} other files passed over",
        images.len(),
        images.classes.len(),
        images.domains.len(),
        images.passed_over
    ));
    for file in &images.left_out {
        let (path, problem) = (file.path.display(), &file.problem);
        ctx.progress
            .note(&format!("{name}: left out: {path}: {problem}"));
    }
    if set.frozen == 0 || set.augment.is_some() {
        return Ok(set);
    }
    let bytes = Features::bytes(&set.base, images)?;
    if bytes > MOST_FEATURES {
        ctx.progress.note(&format!(
            "{name}: the features of the frozen blocks would take {} MiB; they are computed with each batch",
            bytes >> 20
        ));
        return Ok(set);
    }
    let (flag, progress) = (ctx.interrupt_flag(), &mut ctx.progress);
    progress.start("images", images.len() as u64);
    let mut done = 0;
    // Generated images are quicker through the blocks than through a disk.
    let cache = (name != plan::SAMPLE).then(|| plan::cache(args));
    let features = Features::compute(
        &set.base,
        images,
        set.frozen,
        cache.as_deref(),
        &mut |more| {
            done += more;
            progress.tick(done, || format!("{name}: features"));
            !flag.load(Ordering::SeqCst)
        },
    )?;
    let Some(features) = features else {
        return Err(interrupted(args));
    };
    if features.from_cache {
        progress.note(&format!("{name}: features from the cache"));
    }
    set.features = Some(features);
    Ok(set)
}

/// The row of a finished run.
fn finished(planned: &Planned, trainer: &Trainer<'_>, set: &Set) -> Run {
    let best = trainer.best();
    let target = best.and_then(|b| b.target);
    let (steps, wall_s) = (trainer.step(), trainer.wall_s());
    let tokens = trainer.images() * set.tokens as u64;
    let mut metrics = BTreeMap::new();
    let mut put = |name: &str, value: Option<f64>| {
        if let Some(value) = value {
            metrics.insert(name.to_owned(), value);
        }
    };
    put("selected_step", best.map(|b| b.step as f64));
    put("source_validation", best.map(|b| b.sources.accuracy));
    put("experts_mean", best.and_then(|b| b.experts));
    let last = trainer.last();
    put(
        "last_accuracy",
        last.and_then(|l| l.target).map(|t| t.accuracy),
    );
    put("last_source_validation", last.map(|l| l.sources.accuracy));
    put("waiting_for_data", trainer.waiting());
    let left_out = set.images.left_out.len();
    put(LEFT_OUT, (left_out > 0).then_some(left_out as f64));
    Run {
        // Of two layers the mean; the exact figure is among the metrics.
        experts: best.and_then(|b| b.experts).map(|e| e.round() as usize),
        active_per_token: target.and_then(|t| t.mean_k),
        test_loss: target.map(|t| t.loss),
        accuracy: target.map(|t| t.accuracy),
        metric: target.map(|t| t.accuracy),
        metrics,
        steps: Some(steps),
        tokens: Some(tokens),
        detection_live_steps: trainer.live_steps(),
        wall_s: Some(wall_s),
        tokens_per_s: (wall_s > 0.0).then(|| tokens as f64 / wall_s),
        peak_rss_mib: peak_rss_mib(),
        expansions: trainer.expansions(),
        diagnoses: trainer.diagnoses(),
        ..planned.run.clone()
    }
}

/// The line that stays when a run is done.
fn describe(run: &Run) -> String {
    let figure = |name: &str| run.metrics.get(name).copied().unwrap_or(f64::NAN);
    format!(
        "{}: accuracy {:.4} at step {} (sources {:.4}; at the last step {:.4} and {:.4}), {:.1} s, {:.1} % of training waited for data",
        run.key(),
        run.accuracy.unwrap_or(f64::NAN),
        figure("selected_step"),
        figure("source_validation"),
        figure("last_accuracy"),
        figure("last_source_validation"),
        run.wall_s.unwrap_or(0.0),
        100.0 * figure("waiting_for_data"),
    )
}

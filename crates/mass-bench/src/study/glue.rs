//! The GLUE study: MASS in one layer of a pretrained BERT, beside the dense model, static pools and DynMoE.
//!
//! Every run fine-tunes the same pretrained model with the same settings; what differs is one layer, whose feed-forward
//! network is copied into a pool of experts behind a gate drawn at random. A run's figures are those of the epoch that scores
//! best on the development set, as the paper's are: selection and report share that set, for every method alike.

mod data;
mod finetune;
mod method;
mod plan;
mod score;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use crate::BenchError;
use crate::cli::{Preset, ReproduceArgs, RunContext};
use crate::glue::GlueError;
use crate::glue::data::Dataset;
use crate::glue::sample;
use crate::glue::task::Task;
use crate::glue::tokenize::TextTokenizer;
use crate::report::{Results, Run, peak_rss_mib};
use crate::sweep::checkpoint_dir;
use data::TaskData;
use finetune::FineTuner;
use method::Pretrained;
use plan::{Plan, Planned};

/// What `--methods` may name.
pub const METHODS: &[&str] = &["mass", "static", "dense", "dynmoe"];

/// What `--task` may name.
pub const TASKS: &[&str] = &[
    "CoLA", "SST-2", "MRPC", "STS-B", "QQP", "MNLI", "QNLI", "RTE", "WNLI",
];

/// Whether data and model are there.
///
/// # Errors
/// [`BenchError`]: which is not.
pub fn check(args: &ReproduceArgs) -> Result<(), BenchError> {
    let (_, runs) = planned(args)?;
    if args.preset == Preset::Smoke {
        return Ok(());
    }
    let data = data_dir(args)?;
    let missing = |task: Task| {
        Dataset::files(data, task)
            .into_iter()
            .find(|f| !f.is_file())
    };
    match runs.iter().find_map(|r| missing(r.task)) {
        Some(path) => Err(BenchError::Glue(GlueError::Io {
            path,
            source: std::io::ErrorKind::NotFound.into(),
        })),
        None => Ok(()),
    }
}

/// The plan and its runs, at least one.
fn planned(args: &ReproduceArgs) -> Result<(Plan, Vec<Planned>), BenchError> {
    let plan = Plan::of(args)?;
    let runs = plan.runs(args);
    super::some_run(!runs.is_empty())?;
    Ok((plan, runs))
}

/// Makes the runs, one after another, each on all threads.
///
/// # Errors
/// [`BenchError`]: data or a model that is missing or damaged, whatever the first failing run ends with, or that it was
/// interrupted.
pub fn run(args: &ReproduceArgs, ctx: &mut RunContext) -> Result<Results, BenchError> {
    let (plan, mut runs) = planned(args)?;
    // All data before the first run: a damaged file of the last task should not show after hours.
    let tasks = read(args, &plan, &runs, ctx)?;
    if !args.resume {
        // Nor should a model that cannot be read show after the results of an earlier run are gone.
        plan.pretrained.check(runs[0].task)?;
    }
    let mut settings = serde_json::to_value(&plan)
        .map_err(|e| BenchError::failed("describing the settings", e))?;
    // More seeds or tasks of the same plan only add runs.
    for only_adds in ["seeds", "tasks"] {
        settings.as_object_mut().map(|s| s.remove(only_adds));
    }
    let model = plan.pretrained.settings()?;
    settings["pretrained"] = model.clone();
    for (task, data) in &tasks {
        settings["data"][task] = super::data_settings(data.digest);
    }
    let mut store = ctx.open_store(args, &settings)?;
    runs.retain(|planned| store.finished(&planned.run.key()).is_none());

    let mut tuners = Vec::new();
    for planned in &runs {
        tuners.push((planned, &tasks[planned.task.name()]));
    }
    let config = |planned: &Planned, data: &TaskData| plan.config(planned, data, &model);
    let total = |(planned, data): &(&Planned, &TaskData)| config(planned, data).steps(data);
    ctx.progress.start("steps", tuners.iter().map(total).sum());
    let flag = ctx.interrupt_flag();
    let mut done = 0;
    for (planned, data) in tuners {
        super::begin_run();
        let folder = checkpoint_dir(&store, &planned.run);
        let config = config(planned, data);
        let mut tuner = FineTuner::open(config, &plan.pretrained, data, &folder, args.resume)?;
        let (steps, key) = (tuner.steps(), planned.run.key().to_string());
        let progress = &mut ctx.progress;
        let complete = tuner.run(&folder, &mut |step, loss| {
            progress.tick(done + step, || format!("{key}: loss {loss:.3}"));
            !flag.load(Ordering::SeqCst)
        })?;
        if !complete {
            return Err(BenchError::Interrupted {
                out: args.out.clone(),
            });
        }
        // A run that stopped early counts in full.
        done += steps;
        let run = finished(planned, &tuner);
        ctx.progress.note(&describe(&run));
        let lines = (tuner.metrics(), tuner.events());
        super::keep(&mut store, run, lines, &folder)?;
    }
    Ok(store.into_results())
}

/// The data of every task that a run needs.
fn read(
    args: &ReproduceArgs,
    plan: &Plan,
    runs: &[Planned],
    ctx: &RunContext,
) -> Result<BTreeMap<&'static str, TaskData>, BenchError> {
    let tokenizer = match &plan.pretrained {
        Pretrained::Drawn(_) => {
            TextTokenizer::from_vocabulary(&sample::vocabulary(), true, plan.max_length)?
        }
        Pretrained::Directory(dir) => TextTokenizer::open(dir, plan.max_length)?,
    };
    let needed = |task: &Task| runs.iter().any(|r| r.task == *task);
    let mut tasks = BTreeMap::new();
    for task in Task::ALL.into_iter().filter(needed) {
        let data = if args.preset == Preset::Smoke {
            sample::dataset(task)
        } else {
            Dataset::read(data_dir(args)?, task)?
        };
        if let Some(first) = data.skipped.first() {
            ctx.progress.note(&format!(
                "{task}: {} broken lines left out, the first {}, line {}: {}",
                data.skipped.len(),
                first.path.display(),
                first.line,
                first.problem
            ));
        }
        tasks.insert(task.name(), TaskData::new(&tokenizer, &data)?);
    }
    if let Pretrained::Directory(dir) = &plan.pretrained {
        check_vocabulary(dir, &tokenizer)?;
    }
    Ok(tasks)
}

/// The directory of data sets, which must have been given.
fn data_dir(args: &ReproduceArgs) -> Result<&std::path::Path, BenchError> {
    args.data.as_deref().ok_or_else(|| {
        BenchError::Usage(format!(
            "glue, preset {}, needs data: give --data DIR (or $MASS_DATA_DIR) with DIR/glue/<Task>/{{train,dev}}.tsv, or \
             --preset smoke, which needs none",
            args.preset
        ))
    })
}

/// Whether the tokenizer's ids fit the model beside it.
fn check_vocabulary(dir: &std::path::Path, tokenizer: &TextTokenizer) -> Result<(), BenchError> {
    let path = dir.join("config.json");
    let input = |problem: String| BenchError::Input {
        path: path.clone(),
        problem,
    };
    let text = std::fs::read_to_string(&path).map_err(|e| input(e.to_string()))?;
    let config: serde_json::Value =
        serde_json::from_str(&text).map_err(|e| input(e.to_string()))?;
    let size = config["vocab_size"].as_u64();
    let size = size.ok_or_else(|| input("no vocab_size".into()))?;
    Ok(tokenizer.check_fits(Some(size))?)
}

/// The row of a finished run.
fn finished(planned: &Planned, tuner: &FineTuner<'_>) -> Run {
    let best = tuner.best();
    let score = best.map(|b| &b.score);
    let (steps, tokens, wall_s) = (tuner.step(), tuner.tokens(), tuner.wall_s());
    Run {
        experts: best.and_then(|b| b.experts),
        active_per_token: score.and_then(|s| s.mean_k),
        test_loss: score.map(|s| s.loss),
        accuracy: score.and_then(|s| s.accuracy),
        metric: score.and_then(|s| s.metric),
        metrics: score.map(|s| s.metrics.clone()).unwrap_or_default(),
        best_epoch: best.map(|b| b.epoch),
        steps: Some(steps),
        tokens: Some(tokens),
        detection_live_steps: tuner.live_steps(),
        wall_s: Some(wall_s),
        tokens_per_s: (wall_s > 0.0).then(|| tokens as f64 / wall_s),
        peak_rss_mib: peak_rss_mib(),
        expansions: tuner.expansions(),
        diagnoses: tuner.diagnoses(),
        ..planned.run.clone()
    }
}

/// The line that stays when a run is done.
fn describe(run: &Run) -> String {
    let metric = run
        .metric
        .map_or_else(|| "undefined".to_owned(), |m| format!("{m:.4}"));
    format!(
        "{}: {} {metric} after epoch {}, {:.1} s",
        run.key(),
        run.metric_name.as_deref().unwrap_or("metric"),
        run.best_epoch.unwrap_or(0),
        run.wall_s.unwrap_or(0.0)
    )
}

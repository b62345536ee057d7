//! The experiments by name.
//!
//! A study is a function that makes its runs one after another, asks
//! [`ResultStore::finished`](crate::report::ResultStore::finished) before each, pushes each when it is
//! done and looks at [`RunContext::check_interrupt`] between steps. Adding one means a file here and a
//! line in [`STUDIES`].

pub mod dg;
pub mod glue;
mod mass;
pub mod synthetic;

use std::path::Path;

use mass_model::ModelError;
use serde_json::{Value, json};

use crate::{
    BenchError,
    cli::{ReproduceArgs, RunContext},
    report::{MetricLine, ResultStore, Results, Run, reset_peak_rss},
};

/// A study that can be run.
#[derive(Debug, Clone, Copy)]
pub struct Study {
    /// Its name on the command line.
    pub name: &'static str,
    /// One line for the help text.
    pub about: &'static str,
    /// What `--methods` may name.
    pub methods: &'static [&'static str],
    /// What `--task` may name; empty when the study has no tasks.
    pub tasks: &'static [&'static str],
    /// Whether `--task` may name others too: folders of data, which the study looks for.
    pub other_tasks: bool,
    /// Makes the runs.
    pub run: fn(&ReproduceArgs, &mut RunContext) -> Result<Results, BenchError>,
}

/// Every study that exists.
pub const STUDIES: &[Study] = &[
    Study {
        name: "synthetic",
        about: "GINC: MASS beside static top-k pools and the Bayes floor",
        methods: synthetic::METHODS,
        tasks: synthetic::TASKS,
        other_tasks: false,
        run: synthetic::run,
    },
    Study {
        name: "glue",
        about: "GLUE: MASS in a pretrained BERT beside the dense model, static pools and DynMoE",
        methods: glue::METHODS,
        tasks: glue::TASKS,
        other_tasks: false,
        run: glue::run,
    },
    Study {
        name: "dg",
        about: "Domain generalisation (PACS): MASS in a pretrained ViT beside ERM, GMoE and DynMoE",
        methods: dg::METHODS,
        tasks: dg::TASKS,
        other_tasks: true,
        run: dg::run,
    },
];

/// The study of that name.
#[must_use]
pub fn find(name: &str) -> Option<&'static Study> {
    STUDIES.iter().find(|study| study.name == name)
}

/// Runs the study that the arguments name.
///
/// # Errors
/// [`BenchError::Usage`] for a study that does not exist, else whatever the study ends with.
pub fn run(args: &ReproduceArgs, ctx: &mut RunContext) -> Result<Results, BenchError> {
    let study = find(&args.study).ok_or_else(|| unknown_study(&args.study))?;
    (study.run)(args, ctx)
}

/// The error for a study that does not exist; it lists those that do.
#[must_use]
pub fn unknown_study(name: &str) -> BenchError {
    let names: Vec<&str> = STUDIES.iter().map(|s| s.name).chain(["all"]).collect();
    BenchError::Usage(format!(
        "unknown study `{name}`; there are: {}",
        names.join(", ")
    ))
}

/// Gives back what runs before have kept for use again, so that the memory of a run is its own.
fn begin_run() {
    mass_model::release_scratch();
    reset_peak_rss();
}

/// Writes what a finished run leaves, and removes its checkpoint: nothing goes on from it, it would only fill the disk.
fn keep(
    store: &mut ResultStore,
    run: Run,
    (metrics, events): (&[MetricLine], &[Value]),
    checkpoint: &Path,
) -> Result<(), BenchError> {
    let key = run.key().to_string();
    // Lines that it left before a crash, if it did.
    store.rewind(&run.key(), 0)?;
    for line in metrics {
        store.metric(line)?;
    }
    for event in events {
        store.event(&key, event)?;
    }
    store.push(run)?;
    if checkpoint.is_dir() {
        std::fs::remove_dir_all(checkpoint)
            .map_err(|e| BenchError::failed("removing a checkpoint", e))?;
    }
    Ok(())
}

/// A model's files are input: which one, and what is wrong with it.
fn unusable_model(error: ModelError, doing: impl Into<String>) -> BenchError {
    match error {
        ModelError::Io { path, source } => BenchError::Input {
            path,
            problem: source.to_string(),
        },
        ModelError::Checkpoint { path, why } => BenchError::Input {
            path,
            problem: why.to_string(),
        },
        other => BenchError::failed(doing, other),
    }
}

/// A model's directory as settings keep it: what is in it matters, and not where it is, so that results go on elsewhere.
fn model_settings(dir: &Path) -> Value {
    let weights = std::fs::metadata(dir.join("model.safetensors"));
    json!({
        "directory": dir.file_name().unwrap_or_default().to_string_lossy(),
        "bytes": weights.map(|m| m.len()).ok(),
    })
}

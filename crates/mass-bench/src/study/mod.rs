//! The experiments by name.
//!
//! A study is a function that makes its runs, asks
//! [`ResultStore::finished`](crate::report::ResultStore::finished) before each, pushes each when it is
//! done and looks at [`RunContext::check_interrupt`] between steps. Adding one means a file here and a
//! line in [`STUDIES`].

pub mod dg;
pub mod glue;
mod mass;
pub mod synthetic;

use std::io::Read;
use std::path::Path;

use mass_model::ModelError;
use mass_model::pretrained::weight_files;
use serde_json::{Value, json};

use crate::{
    BenchError,
    cli::{Preset, ReproduceArgs, RunContext},
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
    /// What a preset takes from directories.
    pub inputs: fn(Preset) -> Inputs,
    /// Whether its inputs are named and there, without reading them.
    pub check: fn(&ReproduceArgs) -> Result<(), BenchError>,
    /// Makes the runs.
    pub run: fn(&ReproduceArgs, &mut RunContext) -> Result<Results, BenchError>,
}

/// What a study takes from directories. A flag for anything else is refused: it would be passed over without a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Inputs {
    /// Data sets, from --data.
    pub data: bool,
    /// Pretrained models, from --models.
    pub models: bool,
    /// Whether the data are images, of which damaged ones can be left out.
    pub images: bool,
}

impl Inputs {
    /// Nothing: all is generated.
    pub const NONE: Self = Self {
        data: false,
        models: false,
        images: false,
    };

    /// Everything, but nothing for a check that all is connected.
    fn but_for_smoke(preset: Preset) -> Self {
        let reads = preset != Preset::Smoke;
        Self {
            data: reads,
            models: reads,
            images: reads,
        }
    }
}

/// Every study that exists.
pub const STUDIES: &[Study] = &[
    Study {
        name: "synthetic",
        about: "GINC: MASS beside static top-k pools and the Bayes floor",
        methods: synthetic::METHODS,
        tasks: synthetic::TASKS,
        other_tasks: false,
        inputs: |_| Inputs::NONE,
        check: synthetic::check,
        run: synthetic::run,
    },
    Study {
        name: "glue",
        about: "GLUE: MASS in a pretrained BERT beside the dense model, static pools and DynMoE",
        methods: glue::METHODS,
        tasks: glue::TASKS,
        other_tasks: false,
        inputs: |preset| Inputs {
            images: false,
            ..Inputs::but_for_smoke(preset)
        },
        check: glue::check,
        run: glue::run,
    },
    Study {
        name: "dg",
        about: "Domain generalisation (PACS): MASS in a pretrained ViT beside ERM, GMoE and DynMoE",
        methods: dg::METHODS,
        tasks: dg::TASKS,
        other_tasks: true,
        inputs: Inputs::but_for_smoke,
        check: dg::check,
        run: dg::run,
    },
];

/// The studies and what each is about, for the help text.
#[must_use]
pub fn list() -> String {
    let lines = STUDIES
        .iter()
        .map(|s| format!("  {:10} {}\n", s.name, s.about));
    format!("Studies:\n{}", lines.collect::<String>())
}

/// The study of that name.
#[must_use]
pub fn find(name: &str) -> Option<&'static Study> {
    STUDIES.iter().find(|study| study.name == name)
}

/// Checks what can be checked before hours of other studies: names, and inputs that should be there.
///
/// # Errors
/// As [`run`].
pub fn check(args: &ReproduceArgs) -> Result<(), BenchError> {
    let study = find(&args.study).ok_or_else(|| unknown_study(&args.study))?;
    (study.check)(args)?;
    Ok(ResultStore::check_kept(&args.out, args.existing())?)
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

/// Whether the choices on the command line leave a run.
fn some_run(any: bool) -> Result<(), BenchError> {
    if any {
        return Ok(());
    }
    Err(BenchError::Usage(
        "these choices of --methods, --variant, --task and --shard leave no run".into(),
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
    store.keep(run, metrics, events)?;
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

/// Whether a directory has the files of a model, in one file of weights or in several.
fn has_model(dir: &Path) -> bool {
    let there = |name: &str| dir.join(name).is_file();
    let weights = ["model.safetensors", "model.safetensors.index.json"];
    there("config.json") && weights.into_iter().any(there)
}

/// A model's directory as settings keep it: what is in it matters, and not where it is, so that results go on elsewhere.
fn model_settings(dir: &Path) -> Result<Value, BenchError> {
    let mut settings =
        json!({ "directory": dir.file_name().unwrap_or_default().to_string_lossy() });
    let weights = weight_files(dir).map_err(|e| unusable_model(e.into(), "reading the model"))?;
    for path in [dir.join("config.json")].iter().chain(&weights) {
        let file = path.file_name().unwrap_or_default().to_string_lossy();
        let summed = std::fs::File::open(path).and_then(summed);
        let (bytes, sum) = summed.map_err(|e| BenchError::Input {
            path: path.clone(),
            problem: e.to_string(),
        })?;
        settings[&*file] = json!({ "bytes": bytes, "crc32": format!("{sum:08x}") });
    }
    Ok(settings)
}

/// Length and CRC-32 of what a reader gives.
fn summed(mut reader: impl Read) -> std::io::Result<(u64, u32)> {
    let (mut sum, mut bytes) = (crc32fast::Hasher::new(), 0);
    let mut piece = vec![0; 1 << 20];
    loop {
        match reader.read(&mut piece)? {
            0 => return Ok((bytes, sum.finalize())),
            n => {
                sum.update(&piece[..n]);
                bytes += n as u64;
            }
        }
    }
}

/// A digest of data as settings keep it.
fn data_settings(digest: u64) -> Value {
    json!(format!("{digest:016x}"))
}

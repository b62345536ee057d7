//! The experiments by name.
//!
//! A study is a [`Plan`](plan::Plan): methods, which are data, on the tasks of a [`Family`](plan::Family). Adding one means a file
//! here with its plan and a line in [`STUDIES`]; the runs are made, kept and gone on with as those of any other.

pub mod ablation;
pub mod continual;
pub mod dg;
pub mod glue;
pub mod labels;
pub mod noise;
pub mod plan;
pub mod regime;
pub mod scale;
pub mod sensitivity;
pub mod size;
pub mod synthetic;
mod weights;

pub(crate) use weights::unusable_model;

use mass_model::parallel::Ranks;

use crate::{
    BenchError,
    cli::{Preset, ReproduceArgs, RunContext},
    report::{ResultStore, Results},
};

/// A study that can be run.
#[derive(Debug, Clone, Copy)]
pub struct Study {
    /// Its name on the command line.
    pub name: &'static str,
    /// One line for the help text.
    pub about: &'static str,
    /// What `--task` may name; empty when the study has no tasks.
    pub tasks: &'static [&'static str],
    /// Whether `--task` may name others too: folders of data, which the study looks for.
    pub other_tasks: bool,
    /// The names of methods that other studies do not have.
    pub own_methods: fn() -> Vec<String>,
    /// Whether several processes can train a run together.
    pub shared: bool,
    /// What a preset takes from directories, of one task or of all.
    pub inputs: fn(Preset, Option<&str>) -> Inputs,
    /// Whether there is a run, whose inputs are named and there, without reading them.
    pub check: fn(&ReproduceArgs) -> Result<bool, BenchError>,
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

    /// Texts and models, but nothing for a check that all is connected.
    fn texts(preset: Preset, task: Option<&str>) -> Self {
        Self {
            images: false,
            ..Self::but_for_smoke(preset, task)
        }
    }

    /// Everything, but nothing for a check that all is connected.
    fn but_for_smoke(preset: Preset, _: Option<&str>) -> Self {
        let reads = preset != Preset::Smoke;
        Self {
            data: reads,
            models: reads,
            images: reads,
        }
    }
}

/// A study by its name, what it is about, its plan and the names of its tasks; and in what it differs from one of generated data.
macro_rules! study {
    ($name:literal, $about:literal, $plan:path, $tasks:expr $(, $field:ident: $value:expr)* $(,)?) => {
        Study {
            $($field: $value,)*
            ..Study {
                name: $name,
                about: $about,
                tasks: $tasks,
                other_tasks: false,
                own_methods: Vec::new,
                shared: true,
                inputs: |_, _| Inputs::NONE,
                check: |args| $plan(args)?.check(args),
                run: |args, ctx| $plan(args)?.run(args, ctx),
            }
        }
    };
}

/// Every study that exists.
pub const STUDIES: &[Study] = &[
    study!(
        "synthetic",
        "GINC: MASS beside static top-k pools and the Bayes floor",
        synthetic::plan,
        synthetic::TASKS,
    ),
    study!(
        "ablation",
        "GINC: every ingredient of growth apart, on fresh and on finite data",
        ablation::plan,
        synthetic::TASKS,
        own_methods: ablation::names,
    ),
    study!(
        "regime",
        "GINC: where, if anywhere, static pools have the losses that the paper reports",
        regime::plan,
        regime::TASKS,
    ),
    study!(
        "size",
        "GINC: how many experts are enough, by the size of the data and the width of an expert",
        size::plan,
        size::TASKS,
    ),
    study!(
        "sensitivity",
        "GINC: the paper's method by each of its settings",
        sensitivity::plan,
        synthetic::TASKS,
    ),
    study!(
        "noise",
        "GINC: noise, small batches, large learning rates: which splits help, and are found",
        noise::plan,
        noise::TASKS,
    ),
    study!(
        "scale",
        "What pools of 8 to 4096 experts cost: routing, watching, splits, checkpoints",
        scale::plan,
        &[],
        shared: false,
    ),
    study!(
        "glue",
        "GLUE: MASS in a pretrained BERT beside the dense model, static pools and DynMoE",
        glue::plan,
        glue::TASKS,
        shared: false,
        inputs: Inputs::texts,
    ),
    study!(
        "labels",
        "GLUE with wrong labels: which splits help, and are found",
        labels::plan,
        labels::TASKS,
        shared: false,
        inputs: Inputs::texts,
    ),
    study!(
        "dg",
        "Domain generalisation (PACS): MASS in a pretrained ViT beside ERM, GMoE and DynMoE",
        dg::plan,
        dg::TASKS,
        other_tasks: true,
        shared: false,
        inputs: Inputs::but_for_smoke,
    ),
    study!(
        "continual",
        "Concepts and texts that appear after growth, or follow one another: delay, forgetting",
        continual::plan,
        continual::TASKS,
        inputs: |preset, task| Inputs {
            data: match task {
                Some(task) => continual::is_of_texts(task),
                None => matches!(preset, Preset::Full | Preset::Paper),
            },
            ..Inputs::NONE
        },
    ),
    study!(
        "domains",
        "Domains of PACS one after the other, in a pretrained ViT: delay, forgetting",
        dg::in_turn::plan,
        dg::in_turn::TASKS,
        other_tasks: true,
        shared: false,
        inputs: Inputs::but_for_smoke,
    ),
];

/// The studies, what each is about, and its tasks, for the help text.
#[must_use]
pub fn list() -> String {
    let line = |s: &Study| {
        let tasks = match s.tasks {
            [] => String::new(),
            tasks => format!("{:14}--task: {}\n", "", tasks.join(", ")),
        };
        format!("  {:11} {}\n{tasks}", s.name, s.about)
    };
    let lines: String = STUDIES.iter().map(line).collect();
    format!("Studies:\n{lines}")
}

/// The study of that name.
#[must_use]
pub fn find(name: &str) -> Option<&'static Study> {
    STUDIES.iter().find(|study| study.name == name)
}

/// Checks what can be checked before hours of other studies: names, and inputs that should be there. Of all studies one may have
/// no run for a shard.
///
/// # Errors
/// As [`run`].
pub fn check(args: &ReproduceArgs, ranks: &Ranks) -> Result<bool, BenchError> {
    let study = find(&args.study).ok_or_else(|| unknown_study(&args.study))?;
    if !ranks.is_alone() && !study.shared {
        return Err(BenchError::Usage(format!(
            "{} is not made by several processes together; start one, or give --parallel none",
            study.name
        )));
    }
    let any = (study.check)(args)?;
    // Others may be so late that the first has begun to write.
    if any && ranks.is_first() {
        ResultStore::check_kept(&args.out, args.existing())?;
    }
    Ok(any)
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

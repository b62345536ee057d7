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
    /// Whether it has a method of that name that other studies do not have.
    pub has_method: fn(&str) -> bool,
    /// Whether several processes can train a run together.
    pub shared: bool,
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

    /// Texts and models, but nothing for a check that all is connected.
    fn texts(preset: Preset) -> Self {
        Self {
            images: false,
            ..Self::but_for_smoke(preset)
        }
    }

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
        tasks: synthetic::TASKS,
        other_tasks: false,
        has_method: |_| false,
        shared: true,
        inputs: |_| Inputs::NONE,
        check: |args| synthetic::plan(args)?.check(args),
        run: |args, ctx| synthetic::plan(args)?.run(args, ctx),
    },
    Study {
        name: "ablation",
        about: "GINC: every ingredient of growth apart, on fresh and on finite data",
        tasks: synthetic::TASKS,
        other_tasks: false,
        has_method: ablation::is_own,
        shared: true,
        inputs: |_| Inputs::NONE,
        check: |args| ablation::plan(args)?.check(args),
        run: |args, ctx| ablation::plan(args)?.run(args, ctx),
    },
    Study {
        name: "regime",
        about: "GINC: where, if anywhere, static pools have the losses that the paper reports",
        tasks: regime::TASKS,
        other_tasks: false,
        has_method: |_| false,
        shared: true,
        inputs: |_| Inputs::NONE,
        check: |args| regime::plan(args)?.check(args),
        run: |args, ctx| regime::plan(args)?.run(args, ctx),
    },
    Study {
        name: "sensitivity",
        about: "GINC: the paper's method by each of its settings",
        tasks: synthetic::TASKS,
        other_tasks: false,
        has_method: |_| false,
        shared: true,
        inputs: |_| Inputs::NONE,
        check: |args| sensitivity::plan(args)?.check(args),
        run: |args, ctx| sensitivity::plan(args)?.run(args, ctx),
    },
    Study {
        name: "noise",
        about: "GINC: noise, small batches, large learning rates: which splits help, and are found",
        tasks: noise::TASKS,
        other_tasks: false,
        has_method: |_| false,
        shared: true,
        inputs: |_| Inputs::NONE,
        check: |args| noise::plan(args)?.check(args),
        run: |args, ctx| noise::plan(args)?.run(args, ctx),
    },
    Study {
        name: "scale",
        about: "What pools of 8 to 4096 experts cost: routing, watching, splits, checkpoints",
        tasks: &[],
        other_tasks: false,
        has_method: |_| false,
        shared: false,
        inputs: |_| Inputs::NONE,
        check: |args| scale::plan(args)?.check(args),
        run: |args, ctx| scale::plan(args)?.run(args, ctx),
    },
    Study {
        name: "glue",
        about: "GLUE: MASS in a pretrained BERT beside the dense model, static pools and DynMoE",
        tasks: glue::TASKS,
        other_tasks: false,
        has_method: |_| false,
        shared: false,
        inputs: Inputs::texts,
        check: |args| glue::plan(args)?.check(args),
        run: |args, ctx| glue::plan(args)?.run(args, ctx),
    },
    Study {
        name: "labels",
        about: "GLUE with wrong labels: which splits help, and are found",
        tasks: labels::TASKS,
        other_tasks: false,
        has_method: |_| false,
        shared: false,
        inputs: Inputs::texts,
        check: |args| labels::plan(args)?.check(args),
        run: |args, ctx| labels::plan(args)?.run(args, ctx),
    },
    Study {
        name: "dg",
        about: "Domain generalisation (PACS): MASS in a pretrained ViT beside ERM, GMoE and DynMoE",
        tasks: dg::TASKS,
        other_tasks: true,
        has_method: |_| false,
        shared: false,
        inputs: Inputs::but_for_smoke,
        check: |args| dg::plan(args)?.check(args),
        run: |args, ctx| dg::plan(args)?.run(args, ctx),
    },
    Study {
        name: "continual",
        about: "Concepts and texts that appear after growth, or follow one another: delay, forgetting",
        tasks: continual::TASKS,
        other_tasks: false,
        has_method: |_| false,
        shared: true,
        inputs: |preset| Inputs {
            data: matches!(preset, Preset::Full | Preset::Paper),
            ..Inputs::NONE
        },
        check: |args| continual::plan(args)?.check(args),
        run: |args, ctx| continual::plan(args)?.run(args, ctx),
    },
    Study {
        name: "domains",
        about: "Domains of PACS one after the other, in a pretrained ViT: delay, forgetting",
        tasks: dg::in_turn::TASKS,
        other_tasks: true,
        has_method: |_| false,
        shared: false,
        inputs: Inputs::but_for_smoke,
        check: |args| dg::in_turn::plan(args)?.check(args),
        run: |args, ctx| dg::in_turn::plan(args)?.run(args, ctx),
    },
];

/// The studies and what each is about, for the help text.
#[must_use]
pub fn list() -> String {
    let lines = STUDIES
        .iter()
        .map(|s| format!("  {:11} {}\n", s.name, s.about));
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
pub fn check(args: &ReproduceArgs, ranks: &Ranks) -> Result<(), BenchError> {
    let study = find(&args.study).ok_or_else(|| unknown_study(&args.study))?;
    if !ranks.is_alone() && !study.shared {
        return Err(BenchError::Usage(format!(
            "{} is not made by several processes together; start one, or give --parallel none",
            study.name
        )));
    }
    (study.check)(args)?;
    // Others may be so late that the first has begun to write.
    if ranks.is_first() {
        ResultStore::check_kept(&args.out, args.existing())?;
    }
    Ok(())
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

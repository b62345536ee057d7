use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use clap::Args;
use mass_model::Place;
use mass_routing::RouterConfig;

use super::{Device, Parallel, Preset, Variant, all_threads, within};
use crate::{
    BenchError, method,
    report::{Existing, Header, Part},
    study::{self, Inputs, Study},
};

/// `reproduce`, as typed until [`check`](Self::check) makes it usable.
#[derive(Debug, Clone, PartialEq, Args)]
#[command(after_help = study::list(), allow_negative_numbers = true)]
pub struct ReproduceArgs {
    /// The study, or `all` for every one there is
    #[arg(default_value = "synthetic")]
    pub study: String,
    /// How much of it
    #[arg(long, value_enum, default_value_t = Preset::Quick)]
    pub preset: Preset,
    /// Seeds of each method [default: the preset's]
    #[arg(long, value_name = "N")]
    pub seeds: Option<usize>,
    /// Only these methods, separated by commas: the preset's, or any other by its name
    #[arg(long, value_name = "A,B", value_delimiter = ',')]
    pub methods: Option<Vec<String>>,
    /// Only methods in whose setting, as tables show it, this stands
    #[arg(long, value_name = "TEXT")]
    pub setting: Option<String>,
    /// Only this task of the study
    #[arg(long, value_name = "T")]
    pub task: Option<String>,
    /// Whose expansion rules [default: all that the preset has; quick of glue and dg: paper]
    #[arg(long, value_enum)]
    pub variant: Option<Variant>,
    /// How tokens choose experts in the methods mass and static, as for `train`; the others are what their routing is
    #[arg(long, value_name = "ROUTER", value_parser = method::parse_router)]
    pub router: Option<RouterConfig>,
    /// Data sets [default: $MASS_DATA_DIR]
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Models [default: $MASS_MODELS_DIR]
    #[arg(long, value_name = "DIR")]
    pub models: Option<PathBuf>,
    /// Where results go [default: target/reproduce/STUDY/PRESET]
    #[arg(long = "out", value_name = "DIR")]
    out_asked: Option<PathBuf>,
    /// Where they go in the end.
    #[arg(skip)]
    pub out: PathBuf,
    /// Threads [default: all]
    #[arg(long, value_name = "N", default_value_t = all_threads(), hide_default_value = true)]
    pub threads: usize,
    /// Keep the finished runs of --out and go on from its checkpoints
    #[arg(long)]
    pub resume: bool,
    /// Delete what an earlier run has left in --out and begin anew
    #[arg(long, conflicts_with = "resume")]
    pub fresh: bool,
    /// Leave out images that are damaged, instead of ending with their names; the report counts them
    #[arg(long)]
    pub leave_out_damaged: bool,
    /// Only every N-th run, beginning with the I-th (counted from 1)
    #[arg(long, value_name = "I/N", default_value = "1/1", hide_default_value = true, value_parser = Shard::parse)]
    pub shard: Shard,
    /// What computes: cpu, cuda (the first GPU) or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "cpu", value_parser = Device::parse)]
    pub device: Device,
    /// That, opened.
    #[arg(skip)]
    pub place: Place,
    /// Whether the study is one of `all`: then what it does not heed is meant for others.
    #[arg(skip)]
    pub of_all: bool,
    /// Which processes train together
    #[arg(long, value_enum, default_value_t)]
    pub parallel: Parallel,
    /// Processes of a group, among which experts are divided; every group has all of them
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub expert_parallel: usize,
    /// Sum gradients over processes while the backward pass goes on, as soon as VALUES of them are complete (1048576 is a good
    /// number); by default they are summed after it
    #[arg(long, value_name = "VALUES")]
    pub overlap: Option<NonZeroUsize>,
    /// Print results.json alone on standard output
    #[arg(long)]
    pub json: bool,
}

/// Every `count`-th run from the `index`-th on, so that several processes share a study.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shard {
    index: usize,
    count: usize,
}

impl Shard {
    /// All runs.
    pub const ALL: Self = Self { index: 1, count: 1 };

    /// Reads "I/N" with 1 <= I <= N.
    ///
    /// # Errors
    /// [`BenchError::Usage`].
    pub fn parse(text: &str) -> Result<Self, BenchError> {
        let parts = text
            .split_once('/')
            .and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
        match parts {
            Some((index, count)) if index >= 1 && index <= count => Ok(Self { index, count }),
            _ => Err(BenchError::Usage(format!(
                "{text} must be I/N with 1 <= I <= N, such as 2/4"
            ))),
        }
    }

    /// What results of its runs say of themselves, if all runs have these names; `None` for all runs.
    fn part(self, plan: Vec<String>) -> Option<Part> {
        (self != Self::ALL).then_some(Part {
            shards: vec![self.index],
            of: self.count,
            plan,
        })
    }

    /// Whether the run numbered `run` (from 0, in the study's own order) is this process's.
    ///
    /// ```
    /// use mass_bench::cli::Shard;
    /// let shard = Shard::parse("2/3")?;
    /// let mine: Vec<usize> = (0..8).filter(|&run| shard.owns(run)).collect();
    /// assert_eq!(mine, [1, 4, 7]);
    /// # Ok::<(), mass_bench::BenchError>(())
    /// ```
    #[must_use]
    pub fn owns(&self, run: usize) -> bool {
        run % self.count == self.index - 1
    }
}

impl ReproduceArgs {
    /// What the results say of themselves, of a study whose runs have these names.
    pub(crate) fn header(&self, plan: Vec<String>) -> Header {
        Header {
            part: self.shard.part(plan),
            ..Header::new(&self.study, &self.preset.to_string(), self.threads).on(&self.place)
        }
    }

    /// What becomes of what `out` holds.
    #[must_use]
    pub fn existing(&self) -> Existing {
        existing(self.resume, self.fresh)
    }
}

/// What two flags say, of which clap refuses both together.
pub(super) fn existing(resume: bool, fresh: bool) -> Existing {
    match (resume, fresh) {
        (true, _) => Existing::Resume,
        (false, true) => Existing::Replace,
        (false, false) => Existing::Refuse,
    }
}

impl ReproduceArgs {
    /// Checks everything; `all` becomes one entry for each study there is.
    ///
    /// # Errors
    /// [`BenchError::Usage`] or [`BenchError::Input`], saying what to give instead.
    pub fn check(&self) -> Result<Vec<ReproduceArgs>, BenchError> {
        let studies: Vec<&Study> = match self.study.as_str() {
            "all" => study::STUDIES.iter().collect(),
            name => vec![study::find(name).ok_or_else(|| study::unknown_study(name))?],
        };
        let all = self.study == "all";
        let of_one = [
            self.methods.is_some(),
            self.setting.is_some(),
            self.task.is_some(),
        ];
        if all && of_one.contains(&true) {
            return Err(BenchError::Usage(
                "--methods, --setting and --task belong to one study; name it instead of `all`"
                    .into(),
            ));
        }
        let checked = studies.iter().map(|s| self.check_for(s, all));
        let mut checked = checked.collect::<Result<Vec<_>, _>>()?;
        self.check_inputs(&studies)?;
        let place = self.device.open()?;
        for args in &mut checked {
            args.place = place.clone();
        }
        Ok(checked)
    }

    /// Refuses a flag that none of the studies would heed. A variable of the environment is no such word: it is there for all.
    fn check_inputs(&self, studies: &[&Study]) -> Result<(), BenchError> {
        let task = self.task.as_deref();
        let some = |takes: fn(&Inputs) -> bool| {
            let mut inputs = studies.iter().map(|s| (s.inputs)(self.preset, task));
            inputs.any(|inputs| takes(&inputs))
        };
        let (study, preset) = (&self.study, self.preset);
        let of = task.map_or_else(String::new, |task| format!(", task {task}"));
        for (given, flag, taken, what) in [
            (self.data.is_some(), "--data", some(|i| i.data), "data sets"),
            (
                self.models.is_some(),
                "--models",
                some(|i| i.models),
                "pretrained models",
            ),
            (
                self.leave_out_damaged,
                "--leave-out-damaged",
                some(|i| i.images),
                "files of images",
            ),
        ] {
            if given && !taken {
                return Err(BenchError::Usage(format!(
                    "{flag}: {study}{of}, preset {preset}, reads no {what}; drop {flag}, or choose another study, task or preset"
                )));
            }
        }
        Ok(())
    }

    fn check_for(&self, study: &Study, all: bool) -> Result<ReproduceArgs, BenchError> {
        if let Some(seeds) = self.seeds {
            within("--seeds", seeds, 10_000)?;
        }
        if let Some(methods) = &self.methods {
            let own = (study.own_methods)();
            for (index, method) in methods.iter().enumerate() {
                if !method::is_known(method) && !own.contains(method) {
                    return Err(method::unknown(method, &own));
                }
                if methods[..index].contains(method) {
                    return Err(BenchError::Usage(format!(
                        "--methods names `{method}` twice"
                    )));
                }
            }
        }
        if let Some(task) = &self.task
            && !study.tasks.contains(&task.as_str())
            && !study.other_tasks
        {
            return Err(BenchError::Usage(if study.tasks.is_empty() {
                format!("--task {task}: {} has no tasks; drop --task", study.name)
            } else {
                let tasks = study.tasks.join(", ");
                format!("unknown task `{task}`; {} has: {tasks}", study.name)
            }));
        }
        within("--threads", self.threads, 1024)?;
        let inputs = (study.inputs)(self.preset, self.task.as_deref());
        // What is given is looked at; a variable of the environment where it is read.
        let found = |flag, given: &Option<PathBuf>, variable, taken: bool| match given {
            None if !taken => Ok(None),
            given => directory(flag, given.as_deref(), variable),
        };
        Ok(Self {
            study: study.name.to_owned(),
            data: found("--data", &self.data, "MASS_DATA_DIR", inputs.data)?,
            models: found("--models", &self.models, "MASS_MODELS_DIR", inputs.models)?,
            out: self.out_dir(study.name, all)?,
            of_all: all,
            ..self.clone()
        })
    }

    /// Shards of one study must not write over each other, so the default names the shard too.
    fn out_dir(&self, study: &str, all: bool) -> Result<PathBuf, BenchError> {
        let shard = self.shard;
        let out = match &self.out_asked {
            Some(out) if all => out.join(study),
            Some(out) => out.clone(),
            None => {
                let mut out = Path::new("target/reproduce").join(study);
                out.push(self.preset.to_string());
                if shard != Shard::ALL {
                    out.push(format!("shard-{}-of-{}", shard.index, shard.count));
                }
                out
            }
        };
        not_a_file("--out", &out)?;
        Ok(out)
    }
}

/// An output directory may be missing, but not be a file.
pub(super) fn not_a_file(flag: &str, path: &Path) -> Result<(), BenchError> {
    if path.exists() && !path.is_dir() {
        return Err(BenchError::Usage(format!(
            "{flag} {}: is a file; give a directory",
            path.display()
        )));
    }
    Ok(())
}

/// The directory that the flag gives, else the variable, else none. One that is given must exist.
pub(crate) fn directory(
    flag: &str,
    given: Option<&Path>,
    variable: &str,
) -> Result<Option<PathBuf>, BenchError> {
    let (path, from) = match given {
        Some(path) => (path.to_owned(), flag.to_owned()),
        None => match std::env::var_os(variable).filter(|value| !value.is_empty()) {
            Some(value) => (PathBuf::from(value), format!("${variable}")),
            None => return Ok(None),
        },
    };
    if path.is_dir() {
        Ok(Some(path))
    } else {
        Err(BenchError::Usage(format!(
            "{from} {}: no such directory; `cargo xtask data check` lists what it should hold",
            path.display()
        )))
    }
}

#[cfg(test)]
impl ReproduceArgs {
    /// What `reproduce` makes of these arguments, for its first study.
    pub(crate) fn parsed(arguments: &[&str]) -> Self {
        use clap::Parser;
        let line = ["mass-bench", "reproduce"].iter().chain(arguments);
        match super::Cli::try_parse_from(line).unwrap().command {
            super::Command::Reproduce(args) => args.check().unwrap().remove(0),
            other => panic!("{other:?}"),
        }
    }
}

use std::{
    ffi::OsString,
    io::Write,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Parser, Subcommand, error::ErrorKind};
use mass_model::parallel::Ranks;

#[cfg(feature = "hub")]
use super::reproduce::not_a_file;
use super::{Progress, ReproduceArgs, RunContext, ScoreArgs, TrainArgs};
use crate::{
    BenchError, bench, data_check,
    report::{Results, join, pretty, table},
    score, study, train,
};

/// Experiments on mixtures of experts that grow while they learn.
#[derive(Debug, Clone, Parser)]
#[command(name = "mass-bench", version)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Clone, Subcommand)]
pub enum Command {
    /// Run a study and print its table beside the paper's figures
    Reproduce(ReproduceArgs),
    /// Train a byte-level language model with MASS layers on a text of your own
    Train(TrainArgs),
    /// Score a text with a model that `train` has left: bits per byte
    Score(ScoreArgs),
    /// Join the shards of a study, or make the summary and report of one directory anew
    Report(ReportCommand),
    /// Time what this crate does itself
    Bench(BenchCommand),
    /// Data sets and models
    #[command(subcommand)]
    Data(DataCommand),
}

/// `report` as typed.
#[derive(Debug, Clone, clap::Args)]
pub struct ReportCommand {
    /// Directories of results
    #[arg(required = true, value_name = "DIR")]
    pub dirs: Vec<PathBuf>,
    /// Where the report goes [default: of one directory that one, of several target/reproduce/STUDY/PRESET]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Print results.json alone on standard output
    #[arg(long)]
    pub json: bool,
}

/// `bench` as typed.
#[derive(Debug, Clone, clap::Args)]
pub struct BenchCommand {
    /// Only this one
    pub name: Option<String>,
    /// Time rivals beside it, where there are any
    #[arg(long)]
    pub peers: bool,
}

/// What to do with data.
#[derive(Debug, Clone, Subcommand)]
pub enum DataCommand {
    /// List what is there, what is missing and where to get it
    Check {
        /// Data sets [default: $MASS_DATA_DIR]
        #[arg(long, value_name = "DIR")]
        data: Option<PathBuf>,
        /// Models [default: $MASS_MODELS_DIR]
        #[arg(long, value_name = "DIR")]
        models: Option<PathBuf>,
    },
    /// Download a model from the Hugging Face Hub (`cargo xtask data fetch`, or a build with the feature `hub`)
    Fetch {
        /// minilm-l6, bert-large-cased, vit-s14, deit-small-patch16-224, or a repository, owner/name
        model: String,
        /// Where models are kept; it gets a directory of the model's name [default: $MASS_MODELS_DIR]
        #[arg(long, value_name = "DIR")]
        models: Option<PathBuf>,
    },
}

/// The binary: parses, runs, prints, and returns the exit code.
///
/// 0 done; 2 bad arguments or input; 1 anything else. An error is one line on standard error.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) if !error.use_stderr() => {
            // --help and --version; a closed pipe is no failure.
            error.print().ok();
            return ExitCode::SUCCESS;
        }
        Err(error) => return fail(&BenchError::Usage(one_line(&error))),
    };
    let ranks = match &cli.command {
        Command::Reproduce(args) => args.parallel.join(args.expert_parallel, args.overlap),
        Command::Train(args) => args.parallel.join(args.expert_parallel, args.overlap),
        _ => Ok(Ranks::default()),
    };
    let ranks = match ranks {
        Ok(ranks) => ranks,
        Err(error) => return fail(&error),
    };
    let done = run(&cli.command, &ranks).and_then(|()| Ok(ranks.finish()?));
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The others stop wherever they are; those that know it already do not listen any more.
            ranks.fail(&error.one_line());
            fail(&error)
        }
    }
}

fn fail(error: &BenchError) -> ExitCode {
    // At once: other processes may write to the same place. It may be closed; the exit code still says it.
    let line = format!("error: {}\n", error.one_line());
    std::io::stderr().write_all(line.as_bytes()).ok();
    ExitCode::from(error.exit_code())
}

/// clap's message without usage and hints over several lines.
fn one_line(error: &clap::Error) -> String {
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        return "no command given; there are: reproduce, report, train, score, bench, data check, data fetch (see --help)"
            .into();
    }
    let text = error.render().to_string();
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    let parts: Vec<&str> = text
        .lines()
        .map(str::trim)
        .take_while(|line| !line.starts_with("Usage:"))
        .filter(|line| !line.is_empty() && !line.starts_with("For more information"))
        .collect();
    let joined = parts.join(" ").replace(" tip: ", "; ");
    if matches!(error.kind(), ErrorKind::InvalidSubcommand) {
        format!(
            "{joined}; there are: reproduce, report, train, score, bench, data check, data fetch"
        )
    } else {
        format!("{joined} (see --help)")
    }
}

/// What a command has beside its arguments. The first of several processes alone says how it goes.
fn context(silent: bool, ranks: &Ranks) -> Result<RunContext, BenchError> {
    let mut ctx = RunContext::new(Progress::new(silent || !ranks.is_first()));
    ctx.ranks = ranks.clone();
    ctx.watch_signals()?;
    Ok(ctx)
}

fn run(command: &Command, ranks: &Ranks) -> Result<(), BenchError> {
    match command {
        Command::Reproduce(command) => {
            let studies = command.check()?;
            let mut ctx = context(command.json, ranks)?;
            set_threads(studies.first().map_or(1, |args| args.threads))?;
            if let Some(args) = studies.first() {
                ctx.say_where(&args.place);
            }
            reproduce(&studies, &mut ctx, command)
        }
        Command::Train(args) => {
            args.check()?;
            let mut ctx = context(args.json, ranks)?;
            set_threads(args.threads)?;
            let results = train::run(args, &mut ctx)?;
            if !ranks.is_first() {
                Ok(())
            } else if args.json {
                print(&pretty(&results))
            } else {
                let out = args.out.display();
                print(&format!(
                    "{}Results: {out}/results.json, {out}/report.html\n",
                    table(&results)
                ))
            }
        }
        Command::Score(args) => {
            args.check()?;
            set_threads(args.threads)?;
            let score = score::run(args)?;
            match args.json {
                true => print(&pretty(&score)),
                false => print(&format!("{score}\n")),
            }
        }
        Command::Report(command) => {
            let (results, out) = join(&command.dirs, command.out.as_deref())?;
            if command.json {
                print(&pretty(&results))
            } else {
                print(&summary(&results, &out))
            }
        }
        Command::Bench(command) => print(&bench::run(command.name.as_deref(), command.peers)?),
        Command::Data(DataCommand::Check { data, models }) => {
            let report = data_check::check(data.as_deref(), models.as_deref())?;
            print(&report.to_string())?;
            report.verdict()
        }
        Command::Data(DataCommand::Fetch { model, models }) => fetch(model, models.as_deref()),
    }
}

#[cfg(feature = "hub")]
fn fetch(model: &str, models: Option<&Path>) -> Result<(), BenchError> {
    let variable = std::env::var_os("MASS_MODELS_DIR").filter(|value| !value.is_empty());
    let Some(models) = models.map(Path::to_owned).or(variable.map(PathBuf::from)) else {
        return Err(BenchError::Usage(
            "where to? give --models DIR (or $MASS_MODELS_DIR)".into(),
        ));
    };
    not_a_file("--models", &models)?;
    let fetched = crate::hub::fetch(model, &models, None)?;
    print(&format!("{}: {}\n", fetched.dir.display(), fetched.summary))
}

#[cfg(not(feature = "hub"))]
fn fetch(model: &str, _: Option<&Path>) -> Result<(), BenchError> {
    Err(BenchError::Usage(format!(
        "this build cannot download; use `cargo xtask data fetch {model}`, or build mass-bench with --features hub"
    )))
}

fn reproduce(
    studies: &[ReproduceArgs],
    ctx: &mut RunContext,
    command: &ReproduceArgs,
) -> Result<(), BenchError> {
    let mut all = Vec::new();
    let ranks = ctx.ranks.clone();
    let mut some = Vec::new();
    for args in studies {
        match study::check(args, &ranks)? {
            true => some.push(args),
            false => ctx.progress.note(&format!(
                "{}: it has fewer runs than there are shards, and none for this one",
                args.study
            )),
        }
    }
    for args in some {
        let results = study::run(args, ctx)?;
        if !command.json && ranks.is_first() {
            print(&summary(&results, &args.out))?;
        }
        all.push(results);
    }
    match (command.json && ranks.is_first(), all.as_slice()) {
        (false, _) => Ok(()),
        // results.json as it is; `all` gives a list of them.
        (true, [one]) if command.study != "all" => print(&pretty(one)),
        (true, many) => print(&pretty(many)),
    }
}

/// What is printed of a study.
fn summary(results: &Results, out: &Path) -> String {
    let (machine, out) = (&results.machine, out.display());
    format!(
        "\n{} ({}), {machine}\n\n{}Results: {out}/results.json, {out}/report.html\n",
        results.study,
        results.preset,
        table(results)
    )
}

/// Standard output; a reader that has gone away (`| head`) is no failure.
fn print(text: &str) -> Result<(), BenchError> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(BenchError::failed("writing to standard output", e))
        }
        _ => Ok(()),
    }
}

/// One pool for the process: rayon's global one.
fn set_threads(threads: usize) -> Result<(), BenchError> {
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build_global()
        .map_err(|e| BenchError::failed("starting the thread pool", e))
}

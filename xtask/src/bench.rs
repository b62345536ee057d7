//! `cargo xtask bench [NAME | all] [--peers]`: each crate's benches, with `--peers` beside its Python rivals.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use crate::{
    forward,
    run::{cargo, exit_code, root},
};

/// The benches of a crate.
struct Bench {
    /// Name on the command line: a crate's without `mass-`, or a task of mass-model's example `compare`.
    name: &'static str,
    about: &'static str,
    /// Arguments of cargo, one command after another.
    cargo: &'static [&'static [&'static str]],
    /// Whether the name is the program's argument.
    task: bool,
    peers: Option<Peers>,
}

/// The rivals of a bench.
struct Peers {
    /// What those in Python need.
    packages: &'static [&'static str],
    /// The script that times them; none where a cargo command of the bench runs it.
    script: Option<&'static str>,
    /// What runs those in Rust.
    cargo: &'static [&'static [&'static str]],
}

/// The program that takes turns with PyTorch.
const MODEL_COMPARE: &[&str] = &[
    "run",
    "--release",
    "-p",
    "mass-model",
    "--example",
    "compare",
];
const TORCH: Peers = Peers {
    packages: &["torch", "numpy"],
    script: None,
    cargo: &[],
};

const BENCHES: [Bench; 10] = [
    Bench {
        name: "cpd",
        about: "detector updates, banks, offline segmentation; rivals: river, ruptures",
        cargo: &[&["bench", "-p", "mass-cpd", "--features", "offline"]],
        task: false,
        peers: Some(Peers {
            packages: &["river", "ruptures", "numpy"],
            script: Some("crates/mass-cpd/benches/peers.py"),
            cargo: &[&[
                "bench",
                "--manifest-path",
                "crates/mass-cpd/benches/rivals/Cargo.toml",
                "--target-dir",
                "target",
            ]],
        }),
    },
    Bench {
        name: "routing",
        about: "Top-p from logits to plan; rival: the authors' gate in PyTorch, before it",
        cargo: &[&[
            "run",
            "--release",
            "-p",
            "mass-routing",
            "--example",
            "compare_gate",
        ]],
        task: false,
        peers: Some(TORCH),
    },
    Bench {
        name: "expand",
        about: "alignment and decomposition against memory bandwidth; the controller's cost per step",
        cargo: &[&["bench", "-p", "mass-expand"]],
        task: false,
        peers: None,
    },
    Bench {
        name: "moe",
        about: "the mixture layer, forward and backward, against the matrix products it is made of; rival: PyTorch, interleaved",
        cargo: &[MODEL_COMPARE],
        task: true,
        peers: Some(TORCH),
    },
    Bench {
        name: "step",
        about: "a training step of a one-layer transformer; rival: PyTorch, interleaved",
        cargo: &[MODEL_COMPARE],
        task: true,
        peers: Some(TORCH),
    },
    Bench {
        name: "bert",
        about: "a training step of a 6-layer BERT; rival: PyTorch, interleaved",
        cargo: &[MODEL_COMPARE],
        task: true,
        peers: Some(TORCH),
    },
    Bench {
        name: "vit",
        about: "a training step of the last blocks of a ViT-S; rival: PyTorch, interleaved",
        cargo: &[MODEL_COMPARE],
        task: true,
        peers: Some(TORCH),
    },
    Bench {
        name: "trunk",
        about: "the first blocks of a ViT-S, forward only; rival: PyTorch, interleaved",
        cargo: &[MODEL_COMPARE],
        task: true,
        peers: Some(TORCH),
    },
    Bench {
        name: "memory",
        about: "peak memory of both steps; rival: PyTorch",
        cargo: &[MODEL_COMPARE],
        task: true,
        peers: Some(TORCH),
    },
    Bench {
        name: "overhead",
        about: "what watching the experts costs a training step",
        cargo: &[MODEL_COMPARE],
        task: true,
        peers: None,
    },
];

/// Timings that mass-bench makes.
const OF_MASS_BENCH: [&str; 3] = ["ginc-sampling", "bayes-filter", "bayes-filter-long"];

/// What the arguments ask for.
enum Request {
    Help,
    /// One bench, by name.
    One(&'static Bench),
    All,
    /// A timing of mass-bench itself.
    OfMassBench,
}

impl Request {
    /// From what follows `bench`, without `--peers`.
    fn parse(arguments: &[&OsString]) -> Result<Self, String> {
        if arguments.iter().any(|a| *a == "--help" || *a == "-h") {
            return Ok(Self::Help);
        }
        let name = match arguments {
            [] => return Ok(Self::All),
            [name] => name.to_string_lossy(),
            [_, second, ..] => {
                let second = second.to_string_lossy();
                return Err(format!("bench takes one name, `{second}` is another"));
            }
        };
        if name == "all" {
            return Ok(Self::All);
        }
        if OF_MASS_BENCH.contains(&name.as_ref()) {
            return Ok(Self::OfMassBench);
        }
        let bench = BENCHES.iter().find(|b| b.name == name);
        bench.map(Self::One).ok_or_else(|| {
            let names = BENCHES.iter().map(|b| b.name).chain(OF_MASS_BENCH);
            let names: Vec<&str> = std::iter::once("all").chain(names).collect();
            format!("unknown bench `{name}`; there are: {}", names.join(", "))
        })
    }
}

/// Runs the named bench, or all of them; other names are those of mass-bench itself.
pub(crate) fn run(arguments: &[OsString]) -> ExitCode {
    let rest = &arguments[1..];
    let peers = rest.iter().any(|a| a == "--peers");
    let others: Vec<&OsString> = rest.iter().filter(|a| *a != "--peers").collect();
    match Request::parse(&others) {
        Ok(Request::Help) => {
            println!("Usage: cargo xtask bench [NAME | all] [--peers]\n");
            for bench in &BENCHES {
                println!("  {:8} {}", bench.name, bench.about);
            }
            println!(
                "\nTimings of mass-bench itself: {}",
                OF_MASS_BENCH.join(", ")
            );
            ExitCode::SUCCESS
        }
        Ok(Request::One(bench)) => match one(bench, peers) {
            Outcome::Done => ExitCode::SUCCESS,
            Outcome::Failed(code) => code,
            Outcome::NoRival => {
                eprintln!(
                    "error: {}: without --peers it runs without its rivals",
                    bench.name
                );
                ExitCode::FAILURE
            }
        },
        Ok(Request::All) => all(peers),
        Ok(Request::OfMassBench) => forward::run(arguments),
        Err(message) => {
            eprintln!("error: {message}");
            ExitCode::from(2)
        }
    }
}

/// How a bench ended.
enum Outcome {
    Done,
    /// The rivals cannot be set up; nothing was run.
    NoRival,
    Failed(ExitCode),
}

/// Every bench, whatever becomes of the others; at the end, what was not run.
fn all(peers: bool) -> ExitCode {
    let mut code = ExitCode::SUCCESS;
    let mut missing = Vec::new();
    for bench in &BENCHES {
        println!("\n## {}: {}\n", bench.name, bench.about);
        let mut outcome = one(bench, peers);
        if let Outcome::NoRival = outcome {
            missing.push(format!("the rivals of {}", bench.name));
            outcome = one(bench, false);
        }
        if let Outcome::Failed(failure) = outcome {
            missing.push(format!("{}, or not to its end", bench.name));
            code = failure;
        }
    }
    if !missing.is_empty() {
        eprintln!("\nnot run: {}", missing.join("; "));
    }
    code
}

fn one(bench: &Bench, peers: bool) -> Outcome {
    let mut python = None;
    let rivals = bench.peers.as_ref().filter(|_| peers);
    match rivals {
        Some(rivals) => match environment(rivals.packages) {
            Ok(path) => python = Some(path),
            Err(()) => return Outcome::NoRival,
        },
        None if peers => eprintln!("{}: no rival is measured yet", bench.name),
        None => {}
    }
    let commands = bench
        .cargo
        .iter()
        .chain(rivals.map_or(&[][..], |r| r.cargo));
    let mut code = own(bench, commands, python.as_deref());
    let script = rivals.and_then(|r| r.script);
    if let (true, Some(python), Some(script)) = (code == ExitCode::SUCCESS, python, script) {
        println!("\n{} (Python)", bench.name);
        let mut command = Command::new(python);
        command.arg(root().join(script));
        code = exit_code(command);
    }
    if code == ExitCode::SUCCESS {
        Outcome::Done
    } else {
        Outcome::Failed(code)
    }
}

fn own(
    bench: &Bench,
    commands: impl Iterator<Item = &'static &'static [&'static str]>,
    python: Option<&Path>,
) -> ExitCode {
    for arguments in commands {
        let mut command = cargo();
        command.args(*arguments).current_dir(root());
        if bench.task {
            command.args(["--", bench.name]);
        }
        if let Some(python) = python {
            command.env("MASS_PEER_PYTHON", python);
        }
        let code = exit_code(command);
        if code != ExitCode::SUCCESS {
            return code;
        }
    }
    ExitCode::SUCCESS
}

/// A virtual environment with these packages under `target/peers`, made when it is first asked for; what fails is said.
fn environment(packages: &[&str]) -> Result<PathBuf, ()> {
    let folder = root().join("target/peers").join(packages[0]);
    let python = folder.join("bin/python");
    let run = |command: &mut Command| match command.status() {
        Ok(status) if status.success() => Ok(()),
        Ok(_) => {
            eprintln!(
                "error: setting up the rivals in {} failed",
                folder.display()
            );
            Err(())
        }
        Err(error) => {
            eprintln!("error: python3, which the rivals need, does not run: {error}");
            Err(())
        }
    };
    run(Command::new("python3").args(["-m", "venv"]).arg(&folder))?;
    run(Command::new(&python)
        .args(["-m", "pip", "install", "--quiet"])
        .args(packages))?;
    Ok(python)
}

#[cfg(test)]
mod tests {
    use super::{BENCHES, OF_MASS_BENCH, Request};
    use std::ffi::OsString;

    fn parse(arguments: &[&str]) -> Result<Request, String> {
        let arguments: Vec<OsString> = arguments.iter().map(OsString::from).collect();
        Request::parse(&arguments.iter().collect::<Vec<_>>())
    }

    #[test]
    fn all_is_what_no_name_is() {
        assert!(matches!(parse(&["all"]), Ok(Request::All)));
        assert!(matches!(parse(&[]), Ok(Request::All)));
    }

    #[test]
    fn every_name_is_found() {
        for bench in &BENCHES {
            assert!(matches!(parse(&[bench.name]), Ok(Request::One(b)) if b.name == bench.name));
        }
        for name in OF_MASS_BENCH {
            assert!(matches!(parse(&[name]), Ok(Request::OfMassBench)));
        }
        assert!(matches!(parse(&["moe", "--help"]), Ok(Request::Help)));
    }

    #[test]
    fn unknown_and_second_names_are_refused() {
        let Err(message) = parse(&["meo"]) else {
            panic!("a name that does not exist was taken");
        };
        assert!(message.contains("`meo`") && message.contains("all, cpd"));
        let Err(message) = parse(&["all", "moe"]) else {
            panic!("two names were taken");
        };
        assert!(message.contains("`moe`"));
    }
}

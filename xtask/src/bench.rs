//! `cargo xtask bench [NAME] [--peers]`: each crate's benches, with `--peers` beside its Python rivals.

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
    /// Packages that the rivals need, and the script that times them (none where a cargo command above runs it).
    peers: Option<(&'static [&'static str], Option<&'static str>)>,
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
const TORCH: (&[&str], Option<&str>) = (&["torch", "numpy"], None);

const BENCHES: [Bench; 10] = [
    Bench {
        name: "cpd",
        about: "detector updates, banks, offline segmentation; rivals: river, ruptures",
        cargo: &[&["bench", "-p", "mass-cpd", "--features", "offline"]],
        task: false,
        peers: Some((
            &["river", "ruptures", "numpy"],
            Some("crates/mass-cpd/benches/peers.py"),
        )),
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
            "compare",
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

/// Runs the named benches, or all of them; other names are those of mass-bench itself.
pub(crate) fn run(arguments: &[OsString]) -> ExitCode {
    let rest = &arguments[1..];
    let peers = rest.iter().any(|a| a == "--peers");
    let mut names = rest.iter().filter(|a| *a != "--peers");
    let (name, more) = (names.next(), names.next());
    let chosen: Vec<&Bench> = match name.and_then(|n| n.to_str()) {
        None if name.is_none() => BENCHES.iter().collect(),
        Some(name) if more.is_none() => BENCHES.iter().filter(|b| b.name == name).collect(),
        _ => Vec::new(),
    };
    if rest.iter().any(|a| a == "--help" || a == "-h") {
        println!("Usage: cargo xtask bench [NAME] [--peers]\n");
        for bench in &BENCHES {
            println!("  {:8} {}", bench.name, bench.about);
        }
        println!(
            "\nTimings of mass-bench itself: {}",
            OF_MASS_BENCH.join(", ")
        );
        return ExitCode::SUCCESS;
    }
    if let Some(second) = more {
        let second = second.to_string_lossy();
        eprintln!("error: bench takes one name, `{second}` is another");
        return ExitCode::from(2);
    }
    if chosen.is_empty() {
        if let Some(unknown) = name.filter(|n| !OF_MASS_BENCH.iter().any(|own| *n == own)) {
            let names: Vec<&str> = BENCHES
                .iter()
                .map(|b| b.name)
                .chain(OF_MASS_BENCH)
                .collect();
            let (unknown, names) = (unknown.to_string_lossy(), names.join(", "));
            eprintln!("error: unknown bench `{unknown}`; there are: {names}");
            return ExitCode::from(2);
        }
        return forward::run(arguments);
    }
    for bench in chosen {
        let code = one(bench, peers);
        if code != ExitCode::SUCCESS {
            return code;
        }
    }
    ExitCode::SUCCESS
}

fn one(bench: &Bench, peers: bool) -> ExitCode {
    let mut python = None;
    let mut script = None;
    if peers {
        let Some((packages, peer)) = bench.peers else {
            eprintln!("{}: no rival is measured yet", bench.name);
            return own(bench, None);
        };
        match environment(packages) {
            Ok(path) => python = Some(path),
            Err(code) => return code,
        }
        script = peer;
    }
    let code = own(bench, python.as_deref());
    match (code == ExitCode::SUCCESS, python, script) {
        (true, Some(python), Some(script)) => {
            println!("\n{} (Python)", bench.name);
            let mut command = Command::new(python);
            command.arg(root().join(script));
            exit_code(command)
        }
        _ => code,
    }
}

fn own(bench: &Bench, python: Option<&Path>) -> ExitCode {
    for arguments in bench.cargo {
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

/// A virtual environment with these packages under `target/peers`, made when it is first asked for.
fn environment(packages: &[&str]) -> Result<PathBuf, ExitCode> {
    let folder = root().join("target/peers").join(packages[0]);
    let python = folder.join("bin/python");
    let run = |command: &mut Command| match command.status() {
        Ok(status) if status.success() => Ok(()),
        Ok(_) => {
            eprintln!(
                "error: setting up the rivals in {} failed",
                folder.display()
            );
            Err(ExitCode::FAILURE)
        }
        Err(error) => {
            eprintln!("error: python3, which the rivals need, does not run: {error}");
            Err(ExitCode::FAILURE)
        }
    };
    run(Command::new("python3").args(["-m", "venv"]).arg(&folder))?;
    run(Command::new(&python)
        .args(["-m", "pip", "install", "--quiet"])
        .args(packages))?;
    Ok(python)
}

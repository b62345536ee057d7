//! `cargo xtask reproduce | report | train | score | bench | data`: builds mass-bench and hands the arguments on.

use std::{
    ffi::OsString,
    io::IsTerminal,
    path::PathBuf,
    process::{Command, ExitCode},
};

use crate::run::{become_program, cargo, root, target};

/// Builds the release binary (cargo's progress goes to standard error), then runs it here. With `MASS_XTASK_PROFILE=dev` it is
/// the one that tests use: where they have been built, it is there.
///
/// Two steps, so that a build that fails is told from a command that fails, and so that relative paths
/// mean what they mean in the user's directory.
pub(crate) fn run(arguments: &[OsString]) -> ExitCode {
    // With --json standard error is the caller's too. A log wants the command's own lines alone, but not
    // minutes of silence while everything is built for the first time.
    let json = arguments.iter().any(|a| a == "--json");
    // Only a download needs what speaks to a server.
    let fetch = arguments[0] == "data" && arguments.iter().any(|a| a == "fetch");
    let quiet = json || (!std::io::stderr().is_terminal() && built_before() && !fetch);
    let manifest = root().join("Cargo.toml");
    let tested = std::env::var_os("MASS_XTASK_PROFILE").is_some_and(|profile| profile == "dev");
    let cargo_run = |command: &str| {
        let mut cargo = cargo();
        cargo.arg(command).arg("--manifest-path").arg(&manifest);
        match tested {
            // Of one package, other features of its dependencies would be wanted.
            true => cargo.args(["--workspace", "--tests", "--bins"]),
            false => cargo.args([
                "--release",
                "--package",
                "mass-bench",
                "--bin",
                "mass-bench",
            ]),
        };
        if fetch {
            cargo.args(["--features", "mass-bench/hub"]);
        }
        cargo
    };
    let mut build = cargo_run("build");
    if quiet {
        build.arg("--quiet");
    }
    match build.status() {
        Ok(status) if status.success() => {}
        Ok(_) => {
            eprintln!("error: mass-bench does not build");
            return ExitCode::FAILURE;
        }
        Err(error) => {
            eprintln!("error: cannot run cargo: {error}");
            return ExitCode::FAILURE;
        }
    }
    let mut run = match tested {
        true => Command::new(binary("debug")),
        false => {
            let mut run = cargo_run("run");
            run.arg("--quiet").arg("--");
            run
        }
    };
    run.args(arguments);
    become_program(run)
}

fn binary(profile: &str) -> PathBuf {
    let name = format!("mass-bench{}", std::env::consts::EXE_SUFFIX);
    target().join(profile).join(name)
}

/// Whether a release binary is there, up to date or not.
fn built_before() -> bool {
    binary("release").exists()
}

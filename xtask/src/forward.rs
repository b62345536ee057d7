//! `cargo xtask reproduce | train | bench | data`: builds mass-bench and hands the arguments on.

use std::{ffi::OsString, process::ExitCode};

use crate::run::{cargo, exit_code, root};

/// Builds the release binary (cargo's progress goes to standard error), then runs it here.
///
/// Two steps, so that a build that fails is told from a command that fails, and so that relative paths
/// mean what they mean in the user's directory.
pub(crate) fn run(arguments: &[OsString]) -> ExitCode {
    // With --json standard error is the caller's too: say nothing but errors.
    let quiet = arguments.iter().any(|a| a == "--json");
    let manifest = root().join("Cargo.toml");
    let cargo_run = |command: &str| {
        let mut cargo = cargo();
        cargo.arg(command).args(["--release", "--manifest-path"]);
        cargo.arg(&manifest);
        cargo.args(["--package", "mass-bench", "--bin", "mass-bench"]);
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
    let mut run = cargo_run("run");
    run.arg("--quiet").arg("--").args(arguments);
    exit_code(run)
}

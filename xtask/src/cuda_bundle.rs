//! `cargo xtask cuda-bundle`: what checks and measures a GPU, for a machine with a driver and nothing else.

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
};

use crate::cuda::{build_driver, home, report};
use crate::run::{Outcome, cargo, must, root, target, write};

const HELP: &str = "\
Usage: cargo xtask cuda-bundle [--try]

Makes target/cuda-bundle.tar.gz: the tests of mass-cuda and mass-model, what measures speed, mass-bench, and a script. On a machine
with a driver and a shell (x86-64 Linux; no Rust, no network), in what is meant to be under six minutes:

  tar xf cuda-bundle.tar.gz && ./cuda-bundle/run.sh

It checks every kernel, passes, growth and checkpoints against the processor, that three runs have the same bits, measures the
mixture layer, a language model and BERT-large beside what the card can do and beside PyTorch where python3 has it, trains with
growth, and goes on from its checkpoint on the processor. Its tables go to cuda.md.

  --try   build as for tests, and run the script with tiny sizes on the emulated driver";

pub(crate) fn run(arguments: &[OsString]) -> ExitCode {
    let all = arguments.iter().map(|a| a.to_str());
    let tries = match all.collect::<Option<Vec<_>>>().as_deref() {
        Some([]) => false,
        Some(["--try"]) => true,
        Some(["--help" | "-h"]) => {
            println!("{HELP}");
            return ExitCode::SUCCESS;
        }
        _ => {
            eprintln!("error: cuda-bundle takes --try or nothing");
            return ExitCode::from(2);
        }
    };
    report(make(tries))
}

fn make(tries: bool) -> Outcome<ExitCode> {
    let folder = target().join("cuda-bundle");
    let bin = folder.join("bin");
    if folder.exists() {
        fs::remove_dir_all(&folder)
            .map_err(|e| format!("cannot remove {}: {e}", folder.display()))?;
    }
    fs::create_dir_all(&bin).map_err(|e| format!("cannot make {}: {e}", bin.display()))?;
    let profile: &[&str] = if tries { &[] } else { &["--release"] };
    for (name, arguments) in [
        (
            "mass-cuda",
            "test --no-run -p mass-cuda --features emulated --test main",
        ),
        (
            "mass-model",
            "test --no-run -p mass-model --features cuda --test main",
        ),
        ("speed", "build -p mass-cuda --example speed"),
        (
            "cuda_steps",
            "build -p mass-model --features cuda --example cuda_steps",
        ),
        ("mass-bench", "build -p mass-bench --bin mass-bench"),
    ] {
        let built = build(arguments, profile)?;
        copy(&built, &bin.join(name))?;
    }
    for file in ["run.sh", "peer.py"] {
        copy(&home().join("bundle").join(file), &folder.join(file))?;
    }
    write(&folder.join("version"), &version())?;
    let archive = target().join("cuda-bundle.tar.gz");
    let mut tar = Command::new("tar");
    tar.arg("-czf").arg(&archive).arg("-C").arg(target());
    must(tar.arg("cuda-bundle"))?;
    let bytes = fs::metadata(&archive).map_or(0, |m| m.len());
    println!("{} ({} MiB)", archive.display(), bytes >> 20);
    match tries {
        true => try_it(&folder),
        false => Ok(ExitCode::SUCCESS),
    }
}

/// Builds what cargo's arguments say, and returns the program.
fn build(arguments: &str, profile: &[&str]) -> Outcome<PathBuf> {
    let mut command = cargo();
    command.current_dir(root()).args(arguments.split(' '));
    command.args(profile).arg("--message-format=json");
    let output = command.stderr(Stdio::inherit()).output();
    let output = output.map_err(|e| format!("cannot run cargo: {e}"))?;
    if !output.status.success() {
        return Err(format!("cargo {arguments} failed: {}", output.status));
    }
    program(&String::from_utf8_lossy(&output.stdout))
        .ok_or_else(|| format!("cargo {arguments} names no program"))
}

/// The last program that cargo's messages name.
fn program(messages: &str) -> Option<PathBuf> {
    let start = "\"executable\":\"";
    let named = messages.lines().rev().find_map(|line| {
        let (_, rest) = line.split_once(start)?;
        Some(rest.split_once('"')?.0.replace("\\\\", "\\"))
    });
    named.map(PathBuf::from)
}

/// Copies a program, without what a debugger needs where there is something that takes it out.
fn copy(from: &Path, to: &Path) -> Outcome<()> {
    fs::copy(from, to).map_err(|e| format!("cannot copy {}: {e}", from.display()))?;
    let script = to.extension().is_some();
    if !script {
        let strip = Command::new("strip").arg(to).stderr(Stdio::null()).status();
        // Larger, but as good.
        drop(strip);
    }
    Ok(())
}

/// Which state of the sources it is of.
fn version() -> String {
    let git = |arguments: &[&str]| {
        let output = Command::new("git")
            .current_dir(root())
            .args(arguments)
            .output();
        let output = output.ok().filter(|o| o.status.success())?;
        Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let commit = git(&["rev-parse", "--short=12", "HEAD"]).unwrap_or_else(|| "no commit".into());
    match git(&["status", "--porcelain", "--untracked-files=no"]) {
        Some(changes) if !changes.is_empty() => format!("{commit} with changes"),
        _ => commit,
    }
}

/// Runs the script on the emulated driver, with tiny sizes.
fn try_it(folder: &Path) -> Outcome<ExitCode> {
    let driver = target().join("cuda-emu");
    build_driver(&home().join("src/kernels"), &driver, false)?;
    let mut path = OsString::from(&driver);
    if let Some(there) = std::env::var_os("LD_LIBRARY_PATH") {
        path.push(":");
        path.push(there);
    }
    let control = driver.join("bundle-control");
    write(&control, "")?;
    let mut command = Command::new(folder.join("run.sh"));
    command.arg(folder.join("cuda.md")).current_dir(folder);
    command.env("MASS_BUNDLE_SMALL", "1");
    command.env("LD_LIBRARY_PATH", path);
    command.env("EMU_CONTROL", control);
    must(&mut command)?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::program;

    #[test]
    fn programs_are_found_in_cargo_s_messages() {
        let messages = "{\"reason\":\"compiler-artifact\",\"executable\":null,\"fresh\":true}\n\
                        {\"reason\":\"compiler-artifact\",\"executable\":\"/a/b-1\",\"fresh\":true}\n\
                        {\"reason\":\"build-finished\",\"success\":true}";
        assert_eq!(program(messages).unwrap().to_str(), Some("/a/b-1"));
        assert!(program("{\"executable\":null}").is_none());
    }
}

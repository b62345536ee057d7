//! Running other programs, and what else commands share.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

/// The cargo that runs us.
pub(crate) fn cargo() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// The workspace's root.
pub(crate) fn root() -> PathBuf {
    let here = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    here.parent().map_or(here.clone(), PathBuf::from)
}

/// Becomes a program, where the system has that: Ctrl-C then reaches it alone, and the prompt comes back when it has ended.
pub(crate) fn become_program(command: Command) -> ExitCode {
    #[cfg(unix)]
    {
        let mut command = command;
        let error = std::os::unix::process::CommandExt::exec(&mut command);
        let program = command.get_program().to_string_lossy();
        eprintln!("error: cannot run {program}: {error}");
        ExitCode::FAILURE
    }
    #[cfg(not(unix))]
    exit_code(command)
}

/// Runs a program to its end and hands its exit code on.
pub(crate) fn exit_code(mut command: Command) -> ExitCode {
    match command.status() {
        // A program ended by a signal has no code.
        Ok(status) => ExitCode::from(
            status
                .code()
                .map_or(1, |code| u8::try_from(code).unwrap_or(1)),
        ),
        Err(error) => {
            let program = command.get_program().to_string_lossy();
            eprintln!("error: cannot run {program}: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Where cargo builds.
pub(crate) fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// What ended a command early: it has been told.
pub(crate) type Outcome<T> = Result<T, String>;

pub(crate) fn read(path: &Path) -> Outcome<String> {
    fs::read_to_string(path).map_err(|e| format!("cannot read {}: {e}", path.display()))
}

pub(crate) fn write(path: &Path, text: &str) -> Outcome<()> {
    fs::write(path, text).map_err(|e| format!("cannot write {}: {e}", path.display()))
}

/// Runs a program that has to succeed.
pub(crate) fn must(command: &mut Command) -> Outcome<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    match command.status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("{program} failed: {status}")),
        Err(e) => Err(format!("cannot run {program}: {e}")),
    }
}

/// A folder under the target directory with these pinned packages of PyPI in it. They come by pip: that of a virtual
/// environment, or where Python has no such module, its own.
pub(crate) fn wheels(name: &str, wanted: &[&str]) -> Outcome<PathBuf> {
    let folder = target().join(name);
    let (stamp, packages) = (folder.join("wheels"), folder.join("packages"));
    let list = wanted.join("\n");
    if fs::read_to_string(&stamp).is_ok_and(|there| there == list) {
        return Ok(packages);
    }
    let environment = folder.join("venv");
    let made = Command::new("python3")
        .args(["-m", "venv"])
        .arg(&environment)
        .status();
    let mut pip = match made {
        Ok(status) if status.success() => Command::new(environment.join("bin/python")),
        Ok(_) => Command::new("python3"),
        Err(e) => {
            return Err(format!(
                "cannot run python3, which installs {}: {e}",
                wanted.join(" and ")
            ));
        }
    };
    pip.args([
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--upgrade",
        "--target",
    ]);
    must(pip.arg(&packages).args(wanted))?;
    write(&stamp, &list)?;
    Ok(packages)
}

//! Running other programs.

use std::{
    path::PathBuf,
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

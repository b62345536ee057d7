//! The built binary: what it is given, says and leaves, and how it is interrupted on its way.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Output};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Without the variables that say where data and models are.
pub(crate) fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mass-bench"));
    command.args(arguments);
    for variable in ["MASS_DATA_DIR", "MASS_MODELS_DIR"] {
        command.env_remove(variable);
    }
    command
}

/// What it says, where it does what it is asked.
pub(crate) fn done(command: &mut Command) -> Output {
    let output = command.output().expect("the binary runs");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {error}");
    output
}

/// Fails unless it exits 2 with one line on standard error that holds every one of `parts`, and prints nothing.
pub(crate) fn refused(command: &mut Command, parts: &[&str]) {
    let output = command.output().expect("the binary runs");
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{command:?}: {error}");
    assert_eq!(error.lines().count(), 1, "{command:?}: {error}");
    let whole = error.ends_with('\n') && error.starts_with("error: ");
    assert!(whole, "{error}");
    for part in parts {
        assert!(error.contains(part), "{command:?}: no `{part}` in {error}");
    }
    assert!(output.stdout.is_empty(), "{command:?}");
}

pub(crate) fn json(dir: &Path, name: &str) -> Value {
    serde_json::from_slice(&fs::read(dir.join(name)).unwrap()).unwrap()
}

pub(crate) fn lines(dir: &Path, name: &str) -> Vec<Value> {
    let text = fs::read_to_string(dir.join(name)).unwrap();
    let lines = text.lines();
    lines.map(|l| serde_json::from_str(l).unwrap()).collect()
}

/// The runs of a directory without what a clock or the system wrote.
pub(crate) fn runs(dir: &Path) -> Vec<Value> {
    let runs = figures(json(dir, "results.json")["runs"].take());
    runs.as_array().unwrap().clone()
}

/// A value without what a clock or the system wrote.
pub(crate) fn figures(mut value: Value) -> Value {
    let clocks = ["wall_s", "tokens_per_s", "peak_rss_mib", "waiting_for_data"];
    match &mut value {
        Value::Object(fields) => {
            fields.retain(|name, _| !clocks.iter().any(|clock| name.starts_with(clock)));
            fields.values_mut().for_each(|v| *v = figures(v.take()));
        }
        Value::Array(values) => values.iter_mut().for_each(|v| *v = figures(v.take())),
        _ => {}
    }
    value
}

/// Waits for something that a program does on its way.
pub(crate) fn wait_for(child: &mut Child, reached: impl Fn() -> bool) {
    let started = Instant::now();
    while !reached() {
        assert!(child.try_wait().unwrap().is_none(), "it has ended");
        assert!(started.elapsed() < Duration::from_secs(60), "it never came");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Kills a program (-9) as soon as it is there.
pub(crate) fn killed_when(mut child: Child, reached: impl Fn() -> bool) {
    wait_for(&mut child, reached);
    child.kill().unwrap();
    child.wait().unwrap();
}

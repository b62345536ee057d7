//! `mpirun -n R mass-bench ...`: several processes do what one does, and end together.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// A run of 200 steps in which experts are split and removed.
const TRAIN: &str = "--text text --method schedule --steps 200 --dim 16 --layers 2 --heads 2 --hidden 16 --experts 2 \
                     --experts-max 6 --seq 16 --batch 8 --lr 1e-3 --threads 1";

fn text(dir: &Path) {
    let line = "to route or not to route, that is the question of experts; ";
    std::fs::write(dir.join("text"), line.repeat(60)).unwrap();
}

/// Several processes, each of whose arguments may differ: one colon-separated group of processes after another.
fn launch(groups: &[(usize, String)], dir: &Path) -> Child {
    let mut command = Command::new("mpirun");
    command.args(["--oversubscribe", "--bind-to", "none"]);
    for (index, (processes, arguments)) in groups.iter().enumerate() {
        if index > 0 {
            command.arg(":");
        }
        command.arg("-n").arg(processes.to_string());
        command.arg(env!("CARGO_BIN_EXE_mass-bench"));
        command.args(arguments.split_whitespace());
    }
    command
        .current_dir(dir)
        .env("OMPI_ALLOW_RUN_AS_ROOT", "1")
        .env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
        // A container may forbid one process to read another's memory.
        .env("OMPI_MCA_btl_vader_single_copy_mechanism", "none")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("mpirun, which openmpi-bin brings")
}

fn mpirun(processes: usize, arguments: &str, dir: &Path) -> Output {
    let child = launch(&[(processes, arguments.to_owned())], dir);
    child.wait_with_output().unwrap()
}

fn alone(arguments: &str, dir: &Path) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mass-bench"));
    command.args(arguments.split_whitespace()).current_dir(dir);
    command.output().unwrap()
}

fn done(output: &Output) {
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
}

fn lines(path: PathBuf) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

/// Losses by step.
fn losses(out: &Path) -> Vec<(u64, f64)> {
    let all = lines(out.join("metrics.jsonl")).into_iter();
    let loss = |line: Value| Some((line["step"].as_u64()?, line["train_loss"].as_f64()?));
    all.filter_map(loss).collect()
}

/// What happened, to whom, and when.
fn events(out: &Path) -> Vec<String> {
    let all = lines(out.join("events.jsonl")).into_iter();
    let what = |e: Value| {
        let of = |key: &str| e[key].to_string();
        ["step", "kind", "layer", "source", "newcomer", "expert"].map(of).join(" ")
    };
    all.map(what).collect()
}

fn largest_difference(one: &Path, other: &Path) -> f64 {
    let (one, other) = (losses(one), losses(other));
    assert_eq!(one.len(), other.len());
    let pairs = one.iter().zip(&other);
    pairs.fold(0.0, |most, (a, b)| {
        assert_eq!(a.0, b.0);
        most.max((a.1 - b.1).abs())
    })
}

#[test]
fn a_text_is_learnt_alike_by_1_2_and_4_processes() {
    let dir = tempfile::tempdir().unwrap();
    text(dir.path());
    done(&alone(&format!("train {TRAIN} --out 1"), dir.path()));
    for processes in [2, 4] {
        let out = processes.to_string();
        let output = mpirun(processes, &format!("train {TRAIN} --out {out}"), dir.path());
        done(&output);
        // The first alone prints.
        let printed = String::from_utf8_lossy(&output.stdout);
        assert_eq!(printed.matches("Results:").count(), 1, "{printed}");
        let (one, several) = (dir.path().join("1"), dir.path().join(out));
        assert_eq!(losses(&one).len(), 200);
        let difference = largest_difference(&one, &several);
        assert!(difference < 1e-5, "{processes} processes: {difference}");
        assert_eq!(events(&one), events(&several));
        let of = |kind: &str| events(&one).iter().filter(|e| e.contains(kind)).count();
        assert!(of("expand") > 0 && of("remove") > 0, "{:?}", events(&one));
    }
}

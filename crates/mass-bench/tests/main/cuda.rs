//! `--device`: without a driver, and on a device, which `cargo xtask cuda-emu` emulates. Where there is none, the tests that need
//! one do nothing and say so.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::process::{self, json};

fn command(arguments: &[&str], dir: &Path) -> Command {
    let mut command = process::command(arguments);
    command.current_dir(dir);
    command
}

fn run(arguments: &[&str], dir: &Path) -> Output {
    command(arguments, dir).output().unwrap()
}

fn done(arguments: &[&str], dir: &Path) -> String {
    let output = process::done(&mut command(arguments, dir));
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The words that the emulated driver shares: see mass-cuda's `emu/README.md`. A real one has none.
fn control() -> Option<File> {
    let path = std::env::var_os("EMU_CONTROL")?;
    Some(File::options().read(true).write(true).open(path).unwrap())
}

/// What a command has launched on the emulated device; `None` on a real one.
fn launches_of(command: impl FnOnce()) -> Option<u64> {
    let launches = || {
        let mut word = [0; 8];
        control()?.read_exact_at(&mut word, 0).unwrap();
        Some(u64::from_ne_bytes(word))
    };
    let before = launches();
    command();
    Some(launches()? - before?)
}

/// Whether a device was promised.
fn promised() -> bool {
    let there = ["EMU_CONTROL", "MASS_CUDA_REAL"]
        .iter()
        .any(|name| std::env::var_os(name).is_some());
    if !there {
        let what = "NOT RUN: it needs a device, which `cargo xtask cuda-emu` emulates";
        let _ = writeln!(std::io::stderr(), "a test was {what}");
    }
    there
}

fn text(dir: &Path) {
    let line = "to route or not to route, that is the question of experts; ";
    std::fs::write(dir.join("text"), line.repeat(60)).unwrap();
}

/// A small run that grows. One thread: it is compared to the bit with itself, and shares the machine with others.
const TRAIN: &str = "train --text text --dim 16 --layers 2 --heads 2 --hidden 16 --seq 16 --batch 2 --lr 1e-3 --threads 1";

fn train<'a>(more: &[&'a str]) -> Vec<&'a str> {
    // A flag that a method does not heed is refused.
    let pool = match more {
        ["--method", "dense", ..] => "",
        ["--method", "gmoe", ..] => "--experts 2",
        _ => "--experts 2 --experts-max 4",
    };
    let words = TRAIN.split_whitespace().chain(pool.split_whitespace());
    words.chain(more.iter().copied()).collect()
}

/// A folder to look for libraries in, where under the names of a driver there is nothing that can be opened.
fn without_driver() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in ["libcuda.so", "libcuda.so.1"] {
        std::fs::write(folder.path().join(name), "no library").unwrap();
    }
    folder
}

#[test]
fn without_a_driver_one_line_says_so_and_nothing_is_written() {
    let dir = tempfile::tempdir().unwrap();
    text(dir.path());
    let none = without_driver();
    for arguments in [
        &train(&["--device", "cuda", "--out", "out"])[..],
        &[
            "reproduce",
            "--preset",
            "smoke",
            "--device",
            "cuda",
            "--out",
            "out",
        ],
        &[
            "reproduce",
            "all",
            "--preset",
            "smoke",
            "--device",
            "cuda:1",
            "--out",
            "out",
        ],
    ] {
        let output = command(arguments, dir.path())
            .env("LD_LIBRARY_PATH", none.path())
            .output()
            .unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{error}");
        assert_eq!(error.lines().count(), 1, "{error}");
        assert!(error.starts_with("error: --device cuda"), "{error}");
        assert!(error.contains("no CUDA driver"), "{error}");
        assert!(error.contains("--device cpu"), "{error}");
        assert!(!dir.path().join("out").exists());
    }
}

#[test]
fn a_device_that_is_not_there_is_refused_with_those_that_are() {
    let dir = tempfile::tempdir().unwrap();
    text(dir.path());
    for name in [
        "gpu",
        "CUDA",
        "cuda:",
        "cuda:-1",
        "cuda:1.0",
        "0",
        "cuda:18446744073709551616",
    ] {
        for arguments in [
            &train(&["--out", "out", "--device", name])[..],
            &["reproduce", "--out", "out", "--device", name],
        ] {
            let output = run(arguments, dir.path());
            let error = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(2), "{name}: {error}");
            assert_eq!(error.lines().count(), 1, "{name}: {error}");
            assert!(error.contains(&format!("`{name}`")), "{name}: {error}");
            assert!(error.contains("cpu"), "{name}: {error}");
        }
    }
    if promised() && std::env::var_os("EMU_CONTROL").is_some() {
        let output = run(&train(&["--out", "out", "--device", "cuda:3"]), dir.path());
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{error}");
        for part in ["cuda:3", "there are 1", "cpu", "cuda:0"] {
            assert!(error.contains(part), "{part}: {error}");
        }
    }
    assert!(!dir.path().join("out").exists());
}

#[test]
fn a_text_is_trained_on_as_on_the_processor() {
    if !promised() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    text(at);
    let steps = ["--steps", "40"];
    done(&train(&[&steps[..], &["--out", "cpu"]].concat()), at);
    let device = ["--device", "cuda"];
    let said = done(
        &train(&[&steps[..], &device, &["--out", "gpu"]].concat()),
        at,
    );
    assert!(said.contains("on cuda:0 "), "{said}");
    assert!(said.contains("compute capability"), "{said}");
    assert!(said.contains("GiB"), "{said}");
    done(
        &train(&[&steps[..], &device, &["--out", "again"]].concat()),
        at,
    );
    let [cpu, gpu, again] = ["cpu", "gpu", "again"].map(|out| json(&at.join(out), "results.json"));
    // Of the processor nothing is said.
    assert!(cpu["machine"]["device"].is_null());
    let device = gpu["machine"]["device"].as_str().unwrap();
    assert!(device.starts_with("cuda:0 "), "{device}");
    let settings = json(&at.join("gpu"), "settings.json");
    assert_eq!(settings["devices"], serde_json::json!([device]));
    let run = |results: &Value| results["runs"][0].clone();
    let loss = |results: &Value| run(results)["test_loss"].as_f64().unwrap();
    assert!(
        (loss(&cpu) - loss(&gpu)).abs() < 1e-3,
        "{} and {}",
        loss(&cpu),
        loss(&gpu)
    );
    let splits = |results: &Value| -> Vec<[Value; 4]> {
        let all = run(results)["expansions"].as_array().unwrap().clone();
        let of = |e: &Value| ["step", "layer", "source", "new"].map(|key| e[key].clone());
        all.iter().map(of).collect()
    };
    assert_eq!(splits(&cpu).len(), 4);
    assert_eq!(splits(&cpu), splits(&gpu));
    // The same bits twice.
    assert_eq!(loss(&again).to_bits(), loss(&gpu).to_bits());
    assert_eq!(run(&again)["expansions"], run(&gpu)["expansions"]);
}

#[test]
fn a_run_that_was_interrupted_goes_on_elsewhere() {
    if !promised() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    text(at);
    let steps = ["--steps", "400", "--out", "out"];
    let mut begun = command(&train(&[&steps[..], &["--device", "cuda"]].concat()), at)
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let (start, checkpoints) = (Instant::now(), at.join("out/checkpoints"));
    while !checkpoints.exists() && start.elapsed() < Duration::from_secs(120) {
        std::thread::sleep(Duration::from_millis(20));
        assert!(
            begun.try_wait().unwrap().is_none(),
            "it ended before its first checkpoint"
        );
    }
    let killed = Command::new("kill")
        .args(["-TERM", &begun.id().to_string()])
        .status();
    assert!(killed.unwrap().success());
    assert_eq!(begun.wait().unwrap().code(), Some(1));
    let other = run(&train(&["--steps", "401", "--out", "out", "--resume"]), at);
    assert_eq!(
        other.status.code(),
        Some(2),
        "other settings are refused as ever"
    );

    done(&train(&[&steps[..], &["--resume"]].concat()), at);
    let results = json(&at.join("out"), "results.json");
    assert!(results["machine"]["device"].is_null());
    let devices = results["runs"][0]["devices"].as_array().unwrap();
    assert_eq!(devices.len(), 2);
    assert!(devices[0].as_str().unwrap().starts_with("cuda:0 "));
    assert_eq!(devices[1], "cpu");
    assert_eq!(
        &json(&at.join("out"), "settings.json")["devices"],
        &results["runs"][0]["devices"]
    );
    assert_eq!(results["runs"][0]["steps"], 400);
}

#[test]
fn every_method_trains_on_a_device() {
    if !promised() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    text(dir.path());
    for choices in [
        "--method dynmoe",
        "--method gmoe",
        "--method dense",
        "--router top_any",
        "--router expert_choice:capacity=1.1,combine=raw",
        "--router noisy:std=0.3/bias_balanced:k=2",
    ] {
        let run = |device: &str| {
            let out = format!("out {choices} {device}").replace([' ', '/', ':'], "-");
            let more = ["--steps", "8", "--device", device, "--out", &out];
            let arguments: Vec<&str> = choices.split(' ').chain(more).collect();
            let launched = launches_of(|| {
                done(&train(&arguments), dir.path());
            });
            if let Some(launched) = launched {
                assert_eq!(launched > 0, device != "cpu", "{choices} {device}");
            }
            let results = json(&dir.path().join(&out), "results.json");
            results["runs"][0]["test_loss"].as_f64().unwrap()
        };
        let (here, there) = (run("cpu"), run("cuda:0"));
        assert!(
            (here - there).abs() < 1e-3,
            "{choices}: {there}, on the processor {here}"
        );
    }
}

#[test]
fn a_study_runs_on_a_device() {
    if !promised() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let study = "reproduce glue --methods mass --variant paper --task CoLA --preset smoke --seeds 1 --threads 1";
    let mut arguments: Vec<&str> = study.split(' ').collect();
    arguments.extend(["--device", "cuda", "--out", "out"]);
    let launched = launches_of(|| {
        let said = done(&arguments, dir.path());
        assert!(said.contains("on cuda:0 "), "{said}");
    });
    let results = json(&dir.path().join("out"), "results.json");
    let device = results["machine"]["device"].as_str().unwrap();
    assert!(device.starts_with("cuda:0 "));
    let run = &results["runs"][0];
    assert!(run["test_loss"].as_f64().unwrap() > 0.0, "{run}");
    // A line that names the device computes nothing; kernels do.
    let steps = run["steps"].as_u64().unwrap();
    assert!(
        launched.is_none_or(|n| n > 50 * steps),
        "{launched:?} launches in {steps} steps"
    );
}

#[test]
fn memory_that_does_not_suffice_is_an_error_that_says_how_much() {
    let Some(control) = control() else {
        promised();
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    text(dir.path());
    let limit = |bytes: u64| control.write_all_at(&bytes.to_ne_bytes(), 8 * 19).unwrap();
    limit(300_000);
    let output = run(
        &train(&["--steps", "40", "--out", "out", "--device", "cuda"]),
        dir.path(),
    );
    limit(0);
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    let last = error.lines().last().unwrap();
    for part in ["out of memory", "bytes wanted", "of 300000 are free"] {
        assert!(last.contains(part), "{part}: {error}");
    }
}

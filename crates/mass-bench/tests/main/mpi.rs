//! `mpirun -n R mass-bench ...`: several processes do what one does, and end together.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use mass_model::checkpoint::{self, Snapshot};
use mass_model::lm::LanguageModel;
use serde_json::Value;

use crate::process::{command, lines, wait_for};

/// A run of 200 steps in which experts are split and removed.
const TRAIN: &str = "--text text --method schedule --variant calibrated --steps 200 --dim 16 --layers 2 --heads 2 --hidden 16 --experts 2 \
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
        // Whoever waits gives its core away.
        .env("OMPI_MCA_mpi_yield_when_idle", "1")
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
    let mut command = command(&[]);
    command.args(arguments.split_whitespace()).current_dir(dir);
    command.output().unwrap()
}

fn done(output: &Output) {
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
}

/// Losses by step.
fn losses(out: &Path) -> Vec<(u64, f64)> {
    let all = lines(out, "metrics.jsonl").into_iter();
    let loss = |line: Value| Some((line["step"].as_u64()?, line["train_loss"].as_f64()?));
    all.filter_map(loss).collect()
}

/// What happened, to whom, and when.
fn events(out: &Path) -> Vec<String> {
    let all = lines(out, "events.jsonl").into_iter();
    let what = |e: Value| {
        let of = |key: &str| e[key].to_string();
        ["step", "kind", "layer", "source", "newcomer", "expert"]
            .map(of)
            .join(" ")
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
    for (processes, group) in [(2, 1), (4, 1), (2, 2), (4, 4), (4, 2)] {
        let out = format!("{processes}-{group}");
        let arguments = format!("train {TRAIN} --expert-parallel {group} --out {out}");
        let output = mpirun(processes, &arguments, dir.path());
        done(&output);
        // The first alone prints.
        let printed = String::from_utf8_lossy(&output.stdout);
        assert_eq!(printed.matches("Results:").count(), 1, "{printed}");
        let (one, several) = (dir.path().join("1"), dir.path().join(out));
        assert_eq!(losses(&one).len(), 200);
        let difference = largest_difference(&one, &several);
        assert!(
            difference < 1e-5,
            "{processes} processes in groups of {group}: {difference}"
        );
        assert_eq!(events(&one), events(&several));
        let of = |kind: &str| events(&one).iter().filter(|e| e.contains(kind)).count();
        assert!(of("split") > 0 && of("remove") > 0, "{:?}", events(&one));
    }
}

#[test]
fn the_synthetic_study_gives_the_same_on_2_processes() {
    let dir = tempfile::tempdir().unwrap();
    let study = "reproduce synthetic --preset smoke --methods mass --variant ours --threads 1";
    done(&alone(&format!("{study} --out 1"), dir.path()));
    done(&mpirun(2, &format!("{study} --out 2"), dir.path()));
    let (one, two) = (dir.path().join("1"), dir.path().join("2"));
    let difference = largest_difference(&one, &two);
    assert!(difference < 1e-5, "{difference}");
    assert_eq!(events(&one), events(&two));
    let tests = |out: &Path| {
        let results: Value =
            serde_json::from_slice(&std::fs::read(out.join("results.json")).unwrap()).unwrap();
        let runs = results["runs"].as_array().unwrap().clone();
        let loss = |run: &Value| run["test_loss"].as_f64().unwrap();
        runs.iter().map(loss).collect::<Vec<f64>>()
    };
    let (one, two) = (tests(&one), tests(&two));
    assert!(one.len() == 1 && one.len() == two.len(), "{one:?} {two:?}");
    let far = one.iter().zip(&two).any(|(a, b)| (a - b).abs() > 1e-5);
    assert!(!far, "{one:?} {two:?}");
}

#[test]
fn a_run_goes_on_on_any_other_number_of_processes() {
    let dir = tempfile::tempdir().unwrap();
    text(dir.path());
    done(&alone(&format!("train {TRAIN} --out whole"), dir.path()));
    // A process that is asked to stop stops all, after the same step: that of the checkpoint.
    for next in [1, 2, 4] {
        let out = dir.path().join(next.to_string());
        let arguments = format!("train {TRAIN} --out {next}");
        let first = if next == 4 { 2 } else { 4 };
        // Whether experts were divided is nothing that a checkpoint knows of.
        let divided = format!(
            "{arguments} --expert-parallel {}",
            if next == 2 { 1 } else { 2 }
        );
        let mut child = launch(&[(first, divided)], dir.path());
        wait_for(&mut child, || latest(&out).is_some());
        kill(&children(child.id())[1], "-TERM");
        let ended = child.wait_with_output().unwrap();
        let error = String::from_utf8_lossy(&ended.stderr);
        assert!(
            !ended.status.success() && error.contains("interrupted"),
            "{error}"
        );
        let resume = format!("{arguments} --resume");
        done(&match next {
            1 => alone(&resume, dir.path()),
            n => mpirun(n, &format!("{resume} --expert-parallel 2"), dir.path()),
        });
        let difference = largest_difference(&dir.path().join("whole"), &out);
        assert!(difference < 1e-5, "on {next}: {difference}");
        assert_eq!(events(&dir.path().join("whole")), events(&out));
    }
}

/// The newest checkpoint of a run.
fn latest(out: &Path) -> Option<PathBuf> {
    let mut runs = std::fs::read_dir(out.join("checkpoints")).ok()?;
    let latest = runs.next()?.ok()?.path().join("latest");
    latest.exists().then_some(latest)
}

/// The processes that mpirun has started.
fn children(mpirun: u32) -> Vec<String> {
    let path = format!("/proc/{mpirun}/task/{mpirun}/children");
    let all = std::fs::read_to_string(path).unwrap();
    all.split_whitespace().map(str::to_owned).collect()
}

fn kill(process: &str, signal: &str) {
    let done = Command::new("kill").args([signal, process]).status();
    assert!(done.unwrap().success());
}

#[test]
fn a_process_that_dies_ends_the_others_and_leaves_a_good_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    text(dir.path());
    let arguments = format!("train {TRAIN} --steps 1000 --out out").replace("--steps 200 ", "");
    let mut child = launch(&[(2, arguments.clone())], dir.path());
    let out = dir.path().join("out");
    wait_for(&mut child, || latest(&out).is_some());
    kill(&children(child.id())[1], "-KILL");
    let killed = Instant::now();
    let ended = child.wait_with_output().unwrap();
    assert!(!ended.status.success());
    assert!(killed.elapsed() < Duration::from_secs(15));
    done(&alone(&format!("{arguments} --resume"), dir.path()));
    assert!(losses(&out).last().unwrap().0 == 1000);
}

/// Every process ends with an error of its own, and nothing hangs.
fn ends(groups: &[(usize, String)], dir: &Path, each: &[&str]) {
    let started = Instant::now();
    let output = launch(groups, dir).wait_with_output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(started.elapsed() < Duration::from_secs(30));
    assert!(!output.status.success());
    for what in each {
        assert!(error.contains(what), "no `{what}` in {error}");
    }
    let own = error.lines().filter(|l| l.starts_with("error: ")).count();
    let processes: usize = groups.iter().map(|(n, _)| n).sum();
    assert_eq!(own, processes, "{error}");
}

#[test]
fn processes_that_were_given_different_things_end_with_what_differs() {
    let dir = tempfile::tempdir().unwrap();
    text(dir.path());
    let other = "to be or not to be, that is another question of mixtures; ";
    std::fs::write(dir.path().join("other"), other.repeat(60)).unwrap();
    let train = |more: &str| format!("train {TRAIN} --out out {more}");
    let plain = (1, train(""));
    for (others, what) in [
        (
            (1, train("--overlap 1000")),
            "--overlap 1000, and rank 0 has nothing",
        ),
        (
            (1, train("--expert-parallel 2")),
            "--expert-parallel 2, and rank 0 has 1",
        ),
        ((1, train("--seed 3")), "arguments.seed 3, and rank 0 has 0"),
        (
            (1, train("--p 0.25")),
            "arguments.p 0.25, and rank 0 has nothing",
        ),
        (
            (1, train("").replace("--text text", "--text other")),
            "settings.text",
        ),
        (
            (1, train("--fresh")),
            "existing results Replace, and rank 0 has Refuse",
        ),
        (
            (
                1,
                "reproduce synthetic --preset smoke --threads 1 --out other-out".into(),
            ),
            "study synthetic, and rank 0 has train",
        ),
    ] {
        ends(&[plain.clone(), others], dir.path(), &[what]);
        assert!(!dir.path().join("out/results.json").exists());
    }
}

#[test]
fn what_one_process_cannot_do_ends_all() {
    let dir = tempfile::tempdir().unwrap();
    text(dir.path());
    let train = |more: &str| format!("train {TRAIN} --out out {more}");
    // Data that one of them does not have.
    let lacks = train("").replace("--text text", "--text missing");
    let groups = [(1, train("")), (1, lacks), (1, train(""))];
    ends(
        &groups,
        dir.path(),
        &["rank 1 has failed: missing: ", "error: missing: "],
    );
    // What cannot be shared.
    let groups = [(2, train("--router expert_choice:capacity=1.1"))];
    ends(&groups, dir.path(), &["expert-choice routing"]);
    std::fs::remove_dir_all(dir.path().join("out")).unwrap();
    let groups = [(3, train("").replace("--batch 8", "--batch 2"))];
    ends(
        &groups,
        dir.path(),
        &["fewer sequences than there are ranks"],
    );
    std::fs::remove_dir_all(dir.path().join("out")).unwrap();
    for study in ["scale", "glue", "dg"] {
        let groups = [(2, format!("reproduce {study} --preset smoke --out {study}"))];
        ends(
            &groups,
            dir.path(),
            &["is not made by several processes together"],
        );
    }
    // A checkpoint that cannot be written: something is in the way, once the run has begun.
    let long = train("").replace("--steps 200", "--steps 2000");
    let mut child = launch(&[(2, long)], dir.path());
    let out = dir.path().join("out");
    wait_for(&mut child, || out.join("settings.json").exists());
    std::fs::write(out.join("checkpoints"), "in the way").unwrap();
    let ended = child.wait_with_output().unwrap();
    let error = String::from_utf8_lossy(&ended.stderr);
    let told = error.contains("rank 0 has failed: saving a checkpoint");
    assert!(!ended.status.success() && told, "{error}");
}

/// One process reads a checkpoint in which a weight is no number: it fails in its first step, and so do the others.
#[test]
fn a_loss_that_is_no_number_on_one_process_ends_all() {
    let dir = tempfile::tempdir().unwrap();
    text(dir.path());
    let train = |out: &str| format!("train {TRAIN} --out {out}");
    let mut child = launch(&[(2, train("good"))], dir.path());
    let good = dir.path().join("good");
    wait_for(&mut child, || latest(&good).is_some());
    kill(&children(child.id())[0], "-TERM");
    assert!(!child.wait_with_output().unwrap().status.success());
    let copied = Command::new("cp")
        .args(["-r", "good", "bad"])
        .current_dir(dir.path())
        .status();
    assert!(copied.unwrap().success());
    let run = latest(&dir.path().join("bad")).unwrap();
    let run = run.parent().unwrap();
    let mut read = checkpoint::load::<LanguageModel, Value>(run).unwrap();
    // Logits that overflow.
    read.model.head.weight.values_mut().fill(f32::MAX);
    let bad = Snapshot::new(read.step, &read.model, &read.optimizer, &read.state);
    checkpoint::save(run, &bad).unwrap();

    for overlap in ["--overlap 1000", ""] {
        let resume = |out: &str| format!("{} --resume {overlap}", train(out));
        let groups = [(1, resume("good")), (1, resume("bad")), (1, resume("good"))];
        let what = format!("at step {}: the training loss is not finite", read.step);
        ends(&groups, dir.path(), &[&what, "rank 1 has failed: "]);
    }
    done(&alone(&format!("{} --resume", train("good")), dir.path()));
    done(&alone(&train("whole"), dir.path()));
    let difference = largest_difference(&dir.path().join("whole"), &good);
    assert!(difference < 1e-5, "{difference}");
}

/// Gradients that travel before the backward pass has ended, one block's after another's: losses have the same bits.
#[test]
fn when_gradients_travel_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    text(dir.path());
    let left = ["", "--overlap 1000"].map(|overlap| {
        let out = format!("out{}", overlap.len());
        let output = mpirun(
            2,
            &format!("train {TRAIN} {overlap} --out {out}"),
            dir.path(),
        );
        done(&output);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let (_, messages) = said.split_once(" kB in ").expect("what was sent");
        let messages: f64 = messages.split(' ').next().unwrap().parse().unwrap();
        let out = dir.path().join(out);
        (losses(&out), events(&out), messages)
    });
    let [after, meanwhile] = left;
    assert_eq!(after.0.len(), 200);
    assert_eq!((after.0, after.1), (meanwhile.0, meanwhile.1));
    // There are more of them, if some travel on the way.
    assert!(meanwhile.2 > after.2, "{} {}", meanwhile.2, after.2);
}

/// Two hosts: namespaces of this machine's network with a cable between them.
struct Hosts {
    names: [String; 2],
}

/// Runs a command of the system; whether it could.
fn system(command: &str) -> bool {
    let mut words = command.split_whitespace();
    let mut command = Command::new(words.next().unwrap());
    command.args(words).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

impl Hosts {
    /// `None` where this is not allowed, or there is no `ip`.
    fn new() -> Option<Self> {
        let id = std::process::id() % 100_000;
        let hosts = Self {
            names: [1, 2].map(|host| format!("mass{id}h{host}")),
        };
        let [one, two] = &hosts.names;
        let all = hosts
            .names
            .iter()
            .all(|name| system(&format!("ip netns add {name}")));
        let cable = format!("ip link add v1 netns {one} type veth peer name v2 netns {two}");
        let up = |host: usize| {
            let name = &hosts.names[host - 1];
            let address = format!("ip -n {name} addr add 10.77.0.{host}/24 dev v{host}");
            ["lo".to_owned(), format!("v{host}")]
                .iter()
                .all(|device| system(&format!("ip -n {name} link set {device} up")))
                && system(&address)
        };
        (all && system(&cable) && up(1) && up(2)).then_some(hosts)
    }

    /// Bytes that have left the first host, and bytes that have come to it.
    fn crossed(&self) -> [f64; 2] {
        ["tx", "rx"].map(|way| {
            let file = format!("/sys/class/net/v1/statistics/{way}_bytes");
            let mut cat = Command::new("ip");
            let output = cat
                .args(["netns", "exec", &self.names[0], "cat", &file])
                .output();
            let text = String::from_utf8(output.unwrap().stdout).unwrap();
            text.trim().parse().unwrap()
        })
    }

    /// One process on each host.
    fn mpirun(&self, arguments: &str, dir: &Path) -> Output {
        let agent = dir.join("agent.sh");
        // In the place of ssh: each host has a name of its own, by which Open MPI tells them apart.
        let script = format!(
            "#!/bin/sh\nshift\nexec ip netns exec {} unshare --uts sh -c \"hostname host2; $*\"\n",
            self.names[1]
        );
        std::fs::write(&agent, script).unwrap();
        assert!(system(&format!("chmod +x {}", agent.display())));
        let program = env!("CARGO_BIN_EXE_mass-bench");
        let line = format!(
            "hostname host1; exec mpirun --host 10.77.0.1,10.77.0.2 -n 2 --bind-to none --mca plm_rsh_agent {} \
             --mca pml ob1 --mca btl tcp,self --mca btl_tcp_if_include 10.77.0.0/24 \
             --mca oob_tcp_if_include 10.77.0.0/24 {program} {arguments}",
            agent.display()
        );
        let mut command = Command::new("ip");
        command
            .args([
                "netns",
                "exec",
                &self.names[0],
                "unshare",
                "--uts",
                "sh",
                "-c",
                &line,
            ])
            .current_dir(dir)
            .env("OMPI_ALLOW_RUN_AS_ROOT", "1")
            .env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
        command.output().unwrap()
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for name in &self.names {
            system(&format!("ip netns del {name}"));
        }
    }
}

#[test]
fn two_hosts_train_together_and_what_crosses_the_network_is_what_ranks_count() {
    use std::io::Write;
    let Some(hosts) = Hosts::new() else {
        // Not captured, unlike what tests print.
        let what = "NOT RUN: it needs network namespaces (root, and `ip` of iproute2)";
        let _ = writeln!(std::io::stderr(), "a test of two hosts was {what}");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    text(dir.path());
    let steps = 40;
    let train = format!(
        "train --text text --method static --steps {steps} --dim 64 --layers 2 --hidden 128 --experts 6 --seq 32 --batch 8 \
         --lr 1e-3 --threads 1"
    );
    done(&alone(&format!("{train} --out alone"), dir.path()));
    for group in [1, 2] {
        let before = hosts.crossed();
        let arguments = format!("{train} --expert-parallel {group} --out {group}");
        let output = hosts.mpirun(&arguments, dir.path());
        done(&output);
        let [sent, received] = hosts.crossed();
        let (sent, received) = (sent - before[0], received - before[1]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let (_, said) = said.split_once("the first sent ").expect("what was sent");
        let counted = said.split(' ').next().unwrap().parse::<f64>().unwrap() * 1e3;
        let ratio = sent / (counted * f64::from(steps));
        assert!(
            (ratio - 1.0).abs() < 0.1,
            "groups of {group}: {sent} bytes, {ratio} of {counted}"
        );
        assert!(received > 0.5 * sent);
        let difference = largest_difference(
            &dir.path().join("alone"),
            &dir.path().join(group.to_string()),
        );
        assert!(difference < 1e-5, "groups of {group}: {difference}");
    }
}

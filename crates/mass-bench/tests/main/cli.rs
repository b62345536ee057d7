//! The built binary: exit codes, and errors that are one line.

use std::{path::Path, process::Output};

use crate::process::{self, command};

fn bench(arguments: &[&str], dir: &Path) -> Output {
    let output = command(arguments).current_dir(dir).output();
    output.expect("the binary runs")
}

fn refused(arguments: &[&str], dir: &Path, parts: &[&str]) {
    process::refused(command(arguments).current_dir(dir), parts);
}

/// `srun -n 2` without a protocol of MPI: two processes that would both write into one directory.
#[test]
fn processes_that_srun_has_not_told_of_each_other_do_not_begin() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut two = command(&[
        "reproduce",
        "synthetic",
        "--preset",
        "smoke",
        "--out",
        "out",
    ]);
    two.current_dir(dir.path()).env("SLURM_STEP_NUM_TASKS", "2");
    process::refused(&mut two, &["2 processes that do not know each other"]);
    assert!(!dir.path().join("out").exists());
}

#[test]
fn bad_arguments_exit_2_with_one_line() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let at = dir.path();
    std::fs::write(at.join("file"), "text").expect("a write");
    let cases: &[(&str, &[&str])] = &[
        ("fly", &["fly", "reproduce"]),
        (
            "reproduce alchemy",
            &["unknown study `alchemy`", "synthetic"],
        ),
        (
            "reproduce glue",
            &["--models", "minilm-l6", "--preset smoke"],
        ),
        ("reproduce --preset huge", &["huge", "smoke"]),
        (
            "train --text file --overlap 1000",
            &["--overlap 1000", "one process"],
        ),
        ("reproduce --overlap 0", &["--overlap", "zero"]),
        ("reproduce --variant mine", &["mine", "reference"]),
        (
            "reproduce --methods mass,magic",
            &["unknown method `magic`", "static"],
        ),
        ("reproduce --methods mass,mass", &["twice"]),
        ("reproduce --methods ", &["unknown method"]),
        ("reproduce --task RTE", &["unknown task `RTE`", "vocab50"]),
        (
            "reproduce glue --task SNLI",
            &["unknown task `SNLI`", "WNLI"],
        ),
        (
            "reproduce glue --methods gmo",
            &["unknown method `gmo`", "dynmoe"],
        ),
        (
            "reproduce glue --models .",
            &["minilm-l6", "config.json", "vocab.txt"],
        ),
        (
            "reproduce glue --preset paper --models .",
            &["bert-large-cased", "config.json"],
        ),
        ("reproduce all --methods mass", &["--methods"]),
        ("reproduce --seeds 0", &["--seeds is 0"]),
        ("reproduce --seeds -1", &["-1"]),
        ("reproduce --seeds many", &["many", "--seeds"]),
        ("reproduce --threads 0", &["--threads is 0"]),
        ("reproduce --shard 0/4", &["--shard", "I/N"]),
        ("reproduce --shard 5/4", &["5/4"]),
        ("reproduce --shard x", &["x"]),
        ("reproduce --device tpu", &["tpu", "cuda"]),
        (
            "reproduce --data absent",
            &["--data absent", "no such directory"],
        ),
        ("reproduce --models file", &["--models file"]),
        ("reproduce --out file", &["--out file"]),
        ("reproduce --no-such-flag", &["--no-such-flag"]),
        // What nobody would read is not passed over.
        (
            "reproduce glue --preset smoke --data .",
            &["--data", "glue, preset smoke", "reads no data sets"],
        ),
        (
            "reproduce glue --preset smoke --models .",
            &["--models", "no pretrained models"],
        ),
        (
            "reproduce dg --preset smoke --data .",
            &["--data", "dg, preset smoke"],
        ),
        ("reproduce --data .", &["--data", "synthetic"]),
        ("reproduce --models .", &["--models", "synthetic"]),
        (
            "reproduce all --preset smoke --data .",
            &["--data", "all, preset smoke"],
        ),
        (
            "reproduce continual --preset full --task appear --data .",
            &[
                "--data",
                "continual, task appear, preset full",
                "reads no data sets",
            ],
        ),
        (
            "reproduce continual --task texts",
            &["needs data", "--data DIR"],
        ),
        (
            "reproduce continual --task texts --data .",
            &["CoLA", "no such file"],
        ),
        (
            "reproduce glue --leave-out-damaged",
            &["--leave-out-damaged", "no files of images"],
        ),
        ("train", &["--text"]),
        ("train --text absent", &["absent", "no such file"]),
        ("train --text .", &["not a regular file"]),
        ("train --text file", &["too few"]),
        ("train --text file --p 0", &["--p is 0"]),
        ("train --text file --p 1.5", &["--p is 1.5"]),
        ("train --text file --p nan", &["--p is NaN"]),
        ("train --text file --experts 0", &["--experts is 0"]),
        (
            "train --text file --experts 9 --experts-max 8",
            &["--experts-max is 8"],
        ),
        ("train --text file --steps 0", &["--steps is 0"]),
        ("train --text file --heads 3", &["--heads 3", "--dim"]),
        ("train --text file --layers 0", &["--layers is 0"]),
        ("train --text file --hidden 0", &["--hidden is 0"]),
        ("train --text file --seq 0", &["--seq is 0"]),
        ("train --text file --batch 0", &["--batch is 0"]),
        ("train --text file --lr 0", &["--lr is 0"]),
        ("train --text file --lr inf", &["--lr is inf", "finite"]),
        ("train --text file --lr -1", &["--lr is -1"]),
        ("reproduce --seeds -1", &["--seeds", "'-1'"]),
        (
            "reproduce ablation --methods grows",
            &["unknown method `grows`", "grow_to_12"],
        ),
        ("train --text file --held-out 1", &["--held-out is 1"]),
        ("train --text file --variant best", &["best", "paper"]),
        ("bench speed", &["unknown bench `speed`", "ginc-sampling"]),
        ("bench ginc-sampling --peers", &["--peers", "ginc-sampling"]),
        ("data", &["check"]),
        ("data check --data absent", &["absent", "no such directory"]),
    ];
    refused(&[], at, &["reproduce", "train"]);
    refused(&["train", "--text", "a  b"], at, &["a  b: no such file"]);
    for (arguments, parts) in cases {
        let arguments: Vec<&str> = arguments.split(' ').collect();
        refused(&arguments, at, parts);
    }
    // Found out only once the text is read, and still before anything is replaced: 0 in f32, a window too long to count in.
    std::fs::write(at.join("file"), "a text of some length. ".repeat(400)).expect("a write");
    let train = |rest: &[&str], part: &str| {
        let given = [&["train", "--text", "file", "--seq", "8"], rest].concat();
        refused(&given, at, &[part]);
    };
    train(&["--p", "1e-50"], "--p is 0.0");
    for (method, flag) in [
        ("dense", "--router top_k:k=1"),
        ("dynmoe", "--router top_k:k=1"),
        ("gmoe", "--router top_k:k=1"),
        ("static", "--p 0.7"),
        ("dense", "--p 0.7"),
        ("dense", "--experts 9"),
        ("erm", "--experts-max 16"),
        ("static", "--experts-max 20"),
        ("gmoe", "--experts-max 20"),
        ("dynmoe", "--variant ours"),
        ("static", "--variant paper"),
    ] {
        let given: Vec<&str> = flag.split(' ').chain(["--method", method]).collect();
        let name = given[0];
        train(
            &given,
            &format!("{name} changes nothing of --method {method}"),
        );
    }
    for flags in [
        "synthetic --methods dense --router top_k:k=1",
        "synthetic --methods dynmoe,gmoe --router top_k:k=1",
        "regime --variant ours",
        "synthetic --methods static,dynmoe --variant ours",
    ] {
        let given: Vec<&str> = flags.split(' ').collect();
        let given = [&["reproduce"], &given[..]].concat();
        refused(
            &given,
            at,
            &["changes nothing of these methods", "--methods"],
        );
    }
    train(&["--variant", "paper", "--steps", "900000000"], "window");
    // Nothing was left behind by a refused command.
    let left = std::fs::read_dir(at).expect("the directory").count();
    assert_eq!(left, 1);
}

#[test]
fn unusable_texts_exit_2_and_say_where() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    for (name, bytes, part) in [
        ("empty", Vec::new(), "empty"),
        (
            "nul",
            [vec![b'a'; 70], vec![0], vec![b'b'; 70]].concat(),
            "byte 70",
        ),
        (
            "controls",
            [vec![b'a'; 5], vec![0x02; 2]].concat(),
            "byte 5",
        ),
    ] {
        std::fs::write(dir.path().join(name), bytes).expect("a write");
        refused(&["train", "--text", name], dir.path(), &[name, part]);
    }
}

#[test]
fn directory_variables_are_checked_too() {
    let mut check = command(&["data", "check"]);
    check.env("MASS_DATA_DIR", "/nowhere/at/all");
    process::refused(&mut check, &["$MASS_DATA_DIR"]);
}

#[test]
fn help_and_version_exit_0() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    for arguments in [
        vec!["--help"],
        vec!["--version"],
        vec!["reproduce", "--help"],
        vec!["train", "--help"],
        vec!["data", "check", "--help"],
    ] {
        let output = bench(&arguments, dir.path());
        assert_eq!(output.status.code(), Some(0), "{arguments:?}");
        assert!(output.stderr.is_empty() && !output.stdout.is_empty());
    }
}

#[test]
fn all_studies_are_checked_before_the_first_begins() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let all = ["reproduce", "all", "--preset", "full", "--out", "out"];
    refused(&all, dir.path(), &["--models"]);
    assert!(!dir.path().join("out").exists());
}

#[test]
fn help_says_what_the_studies_are() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let output = bench(&["reproduce", "--help"], dir.path());
    let help = String::from_utf8_lossy(&output.stdout);
    for study in mass_bench::study::STUDIES {
        assert!(help.contains(study.about), "{help}");
        assert!(study.tasks.iter().all(|task| help.contains(task)), "{help}");
    }
}

#[test]
fn a_run_that_diverges_says_so_and_leaves_a_directory_that_can_be_reported_on() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let at = dir.path();
    std::fs::write(at.join("text"), "a text of some length. ".repeat(400)).expect("a write");
    // On the way, and in the last step.
    for steps in ["--steps 2000 --fresh", "--steps 1 --fresh"] {
        let train = format!(
            "train --text text --seq 8 --dim 8 --hidden 8 --layers 1 --lr 1e30 --out out {steps}"
        );
        let output = bench(&train.split(' ').collect::<Vec<_>>(), at);
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{error}");
        let last = error.lines().last().unwrap_or_default();
        assert!(
            last.starts_with("error: ") && last.contains("a smaller learning rate"),
            "{error}"
        );
    }
    let report = bench(&["report", "out"], at);
    let text = String::from_utf8_lossy(&report.stdout);
    assert!(report.status.success() && text.contains("No run is finished yet."));
}

/// The other runs of a study go on, and the one is finished: it has no figures, and an event that says why.
#[test]
fn a_run_that_diverges_does_not_end_its_study() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let study = "reproduce synthetic --preset smoke --methods static,dense --router noisy:std=1e38/top_k:k=2 --out out --json";
    let made = |more: &[&str]| {
        let given = [&study.split(' ').collect::<Vec<_>>(), more].concat();
        let output = bench(&given, dir.path());
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice::<serde_json::Value>(&output.stdout).expect("results")
    };
    let results = made(&[]);
    let runs = results["runs"].as_array().expect("runs");
    assert!(runs.len() >= 2);
    for run in runs {
        let figure = run["test_loss"].is_number();
        assert_eq!(figure, run["method"] == "dense", "{run}");
    }
    let events = std::fs::read_to_string(dir.path().join("out/events.jsonl")).expect("events");
    assert!(
        events.contains(r#""kind":"diverged""#) && events.contains("the logit of token"),
        "{events}"
    );
    assert_eq!(made(&["--resume"])["runs"], results["runs"]);
}

/// A directory of `train`, its run and a step of it are one model, whose score is that of its windows.
#[test]
fn a_text_is_scored_by_what_train_has_left() {
    use mass_model::{checkpoint, lm::LanguageModel};
    let dir = tempfile::tempdir().expect("a temporary directory");
    let at = dir.path();
    let write = |name: &str, text: &[u8]| std::fs::write(at.join(name), text).expect("a write");
    write("text", "a text of some length. ".repeat(400).as_bytes());
    write(
        "other",
        "some text of another length. ".repeat(20).as_bytes(),
    );
    write("short", b"12345678");
    write("binary", b"a byte \0 that no text has");
    let train = "train --text text --seq 8 --dim 8 --hidden 8 --layers 1 --steps 2 --out out";
    assert!(
        bench(&train.split(' ').collect::<Vec<_>>(), at)
            .status
            .success()
    );
    let only = |dir: &Path| -> std::path::PathBuf {
        let mut entries = std::fs::read_dir(dir).expect("a directory").flatten();
        entries
            .find(|entry| entry.path().is_dir())
            .expect("a run")
            .path()
    };
    let run = only(&at.join("out/checkpoints"));
    let places = [at.join("out"), run.clone(), only(&run)];
    let scores = places.map(|place| {
        let output = bench(&["score", place.to_str().unwrap(), "other", "--json"], at);
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice::<serde_json::Value>(&output.stdout).expect("JSON")
    });
    assert!(
        scores[0] == scores[1] && scores[1] == scores[2],
        "{scores:?}"
    );

    let model: LanguageModel = checkpoint::load_model(&run).expect("a model");
    let text: Vec<u32> = std::fs::read(at.join("other"))
        .unwrap()
        .into_iter()
        .map(u32::from)
        .collect();
    let mut nats = Vec::new();
    for window in text.windows(9).step_by(8) {
        nats.extend(
            model
                .score(&window[..8], &window[1..], 8, None)
                .expect("a score")
                .0,
        );
    }
    let bits = nats.iter().map(|&x| f64::from(x)).sum::<f64>()
        / nats.len() as f64
        / std::f64::consts::LN_2;
    assert_eq!(scores[0]["bytes"], nats.len());
    assert_eq!(scores[0]["left_out"], text.len() - 1 - nats.len());
    let told = scores[0]["bits_per_byte"].as_f64().expect("a number");
    assert!((told - bits).abs() < 1e-6 * bits, "{told} {bits}");

    refused(
        &["score", "nowhere", "other"],
        at,
        &["nowhere", "no checkpoint"],
    );
    refused(&["score", "out", "absent"], at, &["absent", "no such file"]);
    refused(
        &["score", "out", "short"],
        at,
        &["short", "8 bytes are too few"],
    );
    refused(&["score", "out", "binary"], at, &["binary", "NUL"]);
    refused(
        &["score", "out", "other", "--threads", "0"],
        at,
        &["--threads is 0"],
    );
    std::fs::write(only(&run).join("model.safetensors"), b"damaged").expect("a write");
    refused(&["score", "out", "other"], at, &["model.safetensors"]);
}

/// Runs that are finished, or under way, are deleted by `--fresh` alone.
#[test]
fn finished_runs_are_not_deleted_unasked() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let at = dir.path();
    std::fs::write(at.join("text"), "a text of some length. ".repeat(400)).expect("a write");
    let train = "train --text text --seq 8 --dim 8 --hidden 8 --layers 1 --steps 2 --out out";
    let study = "reproduce synthetic --preset smoke --methods static --seeds 1 --out study";
    for command in [train, study] {
        let given = |more: &[&'static str]| {
            let words = command.split(' ').chain(more.iter().copied());
            words.collect::<Vec<_>>()
        };
        let out = at.join(given(&[]).last().expect("a directory"));
        let results = || std::fs::read(out.join("results.json")).expect("results");
        let done = |more: &[&'static str]| {
            let output = bench(&given(more), at);
            let error = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(output.status.success(), "{command} {more:?}: {error}");
        };
        done(&[]);
        let first = results();
        refused(
            &given(&[]),
            at,
            &["finished run", "--out", "--resume", "--fresh"],
        );
        refused(&given(&["--resume", "--fresh"]), at, &["--fresh"]);
        assert_eq!(results(), first, "{command}");
        done(&["--resume"]);
        // No run was made again: its time is the same.
        assert_eq!(results(), first, "{command}");
        done(&["--fresh"]);
        assert_ne!(results(), first, "{command}");
    }
    // What was mistyped is said first: who is told to delete a run would delete it.
    let mistyped = train.replace("--text text", "--text txt");
    let mistyped: Vec<&str> = mistyped.split(' ').collect();
    refused(&mistyped, at, &["txt", "no such file"]);
    // `all` is refused before its first study, whichever of them is finished.
    let all = ["reproduce", "all", "--preset", "smoke", "--out", "every"];
    std::fs::create_dir_all(at.join("every/dg")).expect("a directory");
    let earlier = r#"{"study": "dg", "runs": [{}, {}]}"#;
    std::fs::write(at.join("every/dg/results.json"), earlier).expect("a write");
    refused(&all, at, &["every/dg", "2 finished runs", "--fresh"]);
    assert!(!at.join("every/synthetic").exists());
}

/// A method is known by its name in every study, whether a preset lists it or not, and its name says what it is.
#[test]
fn every_study_takes_any_method() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let at = dir.path();
    for (study, methods, keys) in [
        (
            "synthetic",
            "dense,dynmoe,gmoe,plain_cloning",
            "dense dynmoe/3 gmoe/3 plain_cloning/3",
        ),
        ("glue --task RTE", "gmoe,schedule", "gmoe/3 schedule/3"),
        ("dg", "static,random_expert", "static/3 random_expert/3"),
    ] {
        let line = format!(
            "reproduce {study} --preset smoke --methods {methods} --json --fresh --out out"
        );
        let output = bench(&line.split(' ').collect::<Vec<_>>(), at);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{line}: {error}");
        let results: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        let of = |run: &serde_json::Value| {
            let method = run["method"].as_str().expect("a method");
            let experts = run["experts_init"].as_u64().map(|n| format!("/{n}"));
            assert!(run["test_loss"].is_f64(), "{run}");
            format!("{method}{}", experts.unwrap_or_default())
        };
        let runs = results["runs"].as_array().expect("runs").iter();
        assert_eq!(runs.map(of).collect::<Vec<_>>().join(" "), keys);
    }
}

/// A variable of the environment is there for all studies: what it says is looked at by those that read it.
#[test]
fn a_variable_is_looked_at_where_it_is_read() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let error = |line: &str, part: &str| {
        let mut command = command(&["reproduce"]);
        command.args(line.split(' ')).current_dir(dir.path());
        command.env("MASS_DATA_DIR", "nowhere");
        process::refused(command.env("MASS_MODELS_DIR", "nowhere"), &[part]);
    };
    error("synthetic --preset smoke --shard 999/999", "leave no run");
    error("synthetic --preset smoke --setting such", "leave no run");
    error("all --preset smoke --setting p", "belong to one study");
    error("glue", "$MASS_DATA_DIR nowhere: no such");
}

#[test]
fn results_do_not_go_among_the_images() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    for folder in ["data/pacs/art/dog", "vit-s14"] {
        std::fs::create_dir_all(dir.path().join(folder)).expect("folders");
    }
    for file in ["config.json", "model.safetensors"] {
        std::fs::write(dir.path().join("vit-s14").join(file), "").expect("a write");
    }
    for out in ["data/pacs", "data/pacs/out/deep", "data/../data/pacs/out"] {
        let given = [
            "reproduce",
            "dg",
            "--data",
            "data",
            "--models",
            ".",
            "--out",
            out,
        ];
        refused(
            &given,
            dir.path(),
            &["--out", "is within the images of pacs"],
        );
    }
    // Nor where the command itself is given among them.
    let given = "reproduce dg --data .. --models ../.. --out new";
    let given: Vec<&str> = given.split(' ').collect();
    let among = dir.path().join("data/pacs");
    refused(&given, &among, &["--out new: is within the images of pacs"]);
}

//! The GLUE study, run through the built binary.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

use crate::process::{self, command, done, json, killed_when, lines, runs};

fn bench(arguments: &[&str]) -> Command {
    command(&[&["reproduce", "glue"], arguments].concat())
}

fn smoke(out: &Path, more: &[&str]) -> Output {
    let mut smoke = bench(&["--preset", "smoke", "--out", out.to_str().unwrap()]);
    done(smoke.args(more))
}

#[test]
fn a_smoke_run_learns_grows_and_repeats_itself_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (dir.path().join("one"), dir.path().join("two"));
    let table = smoke(&one, &["--threads", "1"]);
    let table = String::from_utf8_lossy(&table.stdout).into_owned();
    for part in ["matthews", "0.6562 (K 9.5 to 12.7", "against dynmoe"] {
        assert!(table.contains(part), "no `{part}` in {table}");
    }
    smoke(&two, &["--threads", "3"]);
    assert_eq!(runs(&one), runs(&two));
    for name in ["metrics.jsonl", "events.jsonl"] {
        assert!(!lines(&one, name).is_empty(), "{name}");
        assert_eq!(lines(&one, name), lines(&two, name), "{name}");
    }

    let (mut grown, mut live) = (0, 0);
    for run in runs(&one) {
        if run["task"] == "CoLA" {
            assert!(run["metric"].as_f64().unwrap() > 0.5, "{run}");
        }
        assert_eq!(run["accuracy"].is_null(), run["task"] == "STS-B", "{run}");
        let dense = run["method"] == "dense";
        assert_eq!(run["experts"].is_null(), dense, "{run}");
        assert_eq!(run["active_per_token"].is_null(), dense, "{run}");
        assert_eq!(
            run["detection_live_steps"].is_null(),
            run["method"] != "mass"
        );
        grown += run["expansions"].as_array().unwrap().len();
        for split in run["expansions"].as_array().unwrap() {
            // A detector's alarm has a p-value, whoever was split; a schedule has none.
            let by_alarm = run["variant"] != "ours" && run["variant"] != "calibrated";
            assert_eq!(split["p_value"].is_f64(), by_alarm, "{split}");
            assert_eq!(split["watched"] == "expert", by_alarm, "{split}");
        }
        live += run["detection_live_steps"].as_u64().unwrap_or(0);
        if run["method"] == "static" {
            assert_eq!(
                (run["experts"].as_u64(), run["active_per_token"].as_f64()),
                (Some(3), Some(2.0))
            );
        }
    }
    assert!(
        grown >= 9 && live > 0,
        "{grown} splits in {live} live steps"
    );
    let events = lines(&one, "events.jsonl");
    let of = |method: &str| {
        let mine = events
            .iter()
            .filter(|e| e["run"].as_str().unwrap().starts_with(method));
        mine.map(|e| e["kind"].as_str().unwrap())
            .collect::<Vec<_>>()
    };
    assert!(
        of("mass/paper").contains(&"flag"),
        "no detector raised an alarm"
    );
    assert!(
        of("mass/calibrated").contains(&"check"),
        "no newcomer was checked on the probe"
    );
    assert!(!of("dynmoe").is_empty(), "DynMoE's pool never changed");
    // Every epoch is scored.
    let scored = |l: &&Value| l["run"] == "dense/CoLA/seed0" && l["epoch"].is_u64();
    let metrics = lines(&one, "metrics.jsonl");
    let epochs: Vec<u64> = metrics
        .iter()
        .filter(scored)
        .map(|l| l["epoch"].as_u64().unwrap())
        .collect();
    assert!(epochs.iter().copied().eq(1..=epochs.len() as u64) && !epochs.is_empty());
}

#[test]
fn an_interrupted_study_resumes_to_the_same_results() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, cut) = (dir.path().join("whole"), dir.path().join("cut"));
    let choice = ["--task", "STS-B", "--seeds", "2", "--threads", "1"];
    smoke(&whole, &choice);
    let child = bench(&["--preset", "smoke", "--out", cut.to_str().unwrap()])
        .args(choice)
        .stderr(std::process::Stdio::null())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    // A first run is in the results.
    killed_when(child, || {
        let runs = std::fs::read(cut.join("results.json")).ok();
        let runs = runs.and_then(|r| serde_json::from_slice::<Value>(&r).ok());
        runs.is_some_and(|r| !r["runs"].as_array().unwrap().is_empty())
    });
    assert!(runs(&cut).len() < runs(&whole).len(), "killed too late");
    smoke(&cut, &[&choice[..], &["--resume"]].concat());
    assert_eq!(runs(&cut), runs(&whole));
    assert_eq!(json(&cut, "results.json")["summary"][0]["n"], 2);
}

#[test]
fn every_task_runs_on_the_sample() {
    let dir = tempfile::tempdir().unwrap();
    for task in mass_bench::study::glue::TASKS {
        let out = dir.path().join(task);
        smoke(&out, &["--task", task, "--methods", "static"]);
        let runs = runs(&out);
        assert_eq!(runs.len(), 1, "{task}");
        assert_eq!(runs[0]["task"], *task);
        assert!(runs[0]["metric_name"].is_string());
        let metrics = runs[0]["metrics"].as_object().unwrap();
        assert_eq!(
            metrics.contains_key("dev_mismatched.accuracy"),
            *task == "MNLI",
            "{task}"
        );
    }
}

/// A model in several files gives what it gives in one, and the head of another task is not gone on with, whatever its size.
#[test]
fn a_model_is_read_from_several_files_and_without_its_old_head() {
    use mass_bench::glue::{sample, task::Target, task::Task};
    let dir = tempfile::tempdir().unwrap();
    let glue = dir.path().join("glue/CoLA");
    std::fs::create_dir_all(&glue).unwrap();
    let data = sample::dataset(Task::Cola);
    for (name, examples) in [("train.tsv", &data.train), ("dev.tsv", &data.dev[0].1)] {
        let line = |e: &mass_bench::glue::data::Example| match e.target {
            Target::Class(class) => format!("a\t{class}\t\t{}\n", e.first),
            Target::Value(_) => panic!("CoLA has classes"),
        };
        let text: String = examples.iter().map(line).collect();
        std::fs::write(glue.join(name), text).unwrap();
    }
    let run = |name: &str, prepare: &dyn Fn(&Path)| {
        let models = dir.path().join(name);
        let model = models.join("minilm-l6");
        prepare(&model);
        let out = dir.path().join(format!("{name}-out"));
        let (data, models) = (dir.path().to_str().unwrap(), models.to_str().unwrap());
        let dense = "--task CoLA --methods dense --threads 1".split(' ');
        let places = [
            "--data",
            data,
            "--models",
            models,
            "--out",
            out.to_str().unwrap(),
        ];
        done(bench(&places).args(dense));
        (runs(&out), lines(&out, "metrics.jsonl"))
    };
    let one = run("one", &|dir| crate::models::bert(dir, 2));
    let several = run("several", &|dir| {
        crate::models::bert(dir, 2);
        crate::models::split(dir);
    });
    assert_eq!(several, one);
    // CoLA has two labels; this model was tuned for seven.
    let tuned = run("tuned", &|dir| crate::models::bert(dir, 7));
    assert_eq!(tuned, one);
}

#[test]
fn unusable_data_and_models_exit_2_and_name_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    let refused = |arguments: &[&str], part: &str| {
        let out = at.join("out");
        let mut quick = bench(&["--preset", "quick", "--out", out.to_str().unwrap()]);
        process::refused(quick.args(arguments), &[part]);
    };
    // Whatever is wrong, what an earlier run left there is not lost.
    std::fs::create_dir(at.join("out")).unwrap();
    std::fs::write(at.join("out/results.json"), "of an earlier run").unwrap();
    let model = at.join("minilm-l6");
    std::fs::create_dir(&model).unwrap();
    let models = ["--models", at.to_str().unwrap()];
    refused(&models, "config.json");
    let vocabulary = mass_bench::glue::sample::vocabulary();
    std::fs::write(
        model.join("config.json"),
        r#"{"model_type": "bert", "vocab_size": 20}"#,
    )
    .unwrap();
    std::fs::write(model.join("model.safetensors"), b"").unwrap();
    std::fs::write(model.join("vocab.txt"), vocabulary.join("\n")).unwrap();
    refused(&models, "--data");
    let both = [&models[..], &["--data", at.to_str().unwrap()]].concat();
    refused(&both, "CoLA/train.tsv");
    let glue = at.join("glue/CoLA");
    std::fs::create_dir_all(&glue).unwrap();
    for name in ["train.tsv", "dev.tsv"] {
        std::fs::write(
            glue.join(name),
            "a\t1\t\tThe cat sees the dog.\na\t5\t\tNo.\n",
        )
        .unwrap();
    }
    let one = [&both[..], &["--task", "CoLA"]].concat();
    refused(&one, "train.tsv, line 2");
    for name in ["train.tsv", "dev.tsv"] {
        std::fs::write(glue.join(name), "a\t1\t\tThe cat sees the dog.\n").unwrap();
    }
    // Ids of the tokenizer that the model has no embedding for.
    refused(&one, "vocabulary has 20");
    std::fs::write(
        model.join("config.json"),
        r#"{"model_type": "bert", "vocab_size": 300}"#,
    )
    .unwrap();
    refused(&one, "model.safetensors");
    let left = std::fs::read(at.join("out/results.json")).unwrap();
    assert_eq!(left, b"of an earlier run");
}

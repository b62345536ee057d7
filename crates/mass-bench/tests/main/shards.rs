//! Studies in parts, through the built binary: `--shard`, and `report`, which joins them.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::process::{self, command, figures, json};

pub(crate) fn done(arguments: &[&str]) -> String {
    let output = process::done(&mut command(arguments));
    String::from_utf8(output.stdout).unwrap()
}

fn refused(arguments: &[&str], part: &str) {
    process::refused(&mut command(arguments), &[part]);
}

/// Names and contents of the files below a directory.
fn files(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        let name = entry.file_name().to_string_lossy().into_owned();
        if path.is_dir() {
            let inside = files(&path).into_iter();
            found.extend(inside.map(|(file, bytes)| (format!("{name}/{file}"), bytes)));
        } else {
            found.push((name, fs::read(path).unwrap()));
        }
    }
    found.sort();
    found
}

#[test]
fn shards_joined_are_the_study_that_was_not_split() {
    let dir = tempfile::tempdir().unwrap();
    for (study, choice) in [
        ("synthetic", &["--seeds", "2", "--threads", "2"][..]),
        ("glue", &["--task", "STS-B", "--seeds", "2"]),
        ("dg", &["--methods", "erm,gmoe,mass"]),
    ] {
        let at = |name: &str| dir.path().join(study).join(name);
        let run = |name: &str, more: &[&str]| {
            let out = at(name);
            let line = ["reproduce", study, "--preset", "smoke", "--out"];
            done(&[&line[..], &[out.to_str().unwrap()], choice, more].concat())
        };
        run("whole", &[]);
        for (name, shard) in [("one", "1/2"), ("two", "2/2")] {
            let table = run(name, &["--shard", shard]);
            let index = &shard[..1];
            let part = format!("Only a part of the study: shard {index} of 2");
            assert!(table.contains(&part), "{table}");
            assert_eq!(json(&at(name), "results.json")["part"]["of"], 2);
            let report = fs::read_to_string(at(name).join("report.html")).unwrap();
            assert!(report.contains(&part));
        }
        let [whole, one, two, both] = ["whole", "one", "two", "both"].map(at);
        let [a, b, out] = [&one, &two, &both].map(|dir| dir.to_str().unwrap());
        // In any order of the directories.
        let table = done(&["report", b, a, "--out", out]);
        assert!(!table.contains("Only a part"), "{table}");
        for name in ["results.json", "settings.json"] {
            let (whole, both) = (json(&whole, name), json(&both, name));
            assert_eq!(figures(whole), figures(both), "{study}: {name}");
        }
        for name in ["metrics.jsonl", "events.jsonl"] {
            let [whole, both] = [&whole, &both].map(|dir| fs::read(dir.join(name)).unwrap());
            assert!(!whole.is_empty() && whole == both, "{study}: {name}");
        }
        assert_eq!(files(&whole.join("patches")), files(&both.join("patches")));
        // A run that both have alike is there once, and what is joined can be joined again, and gone on with.
        done(&["report", out, a, b, "--out", out]);
        let before = fs::read(both.join("results.json")).unwrap();
        run("both", &["--resume"]);
        assert_eq!(fs::read(both.join("results.json")).unwrap(), before);
    }
}

#[test]
fn a_part_says_so_until_all_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let run = |name: &str, more: &str| {
        let line = format!(
            "reproduce --preset smoke --methods static{} {more} --out {}",
            if more.contains("--seeds") {
                ""
            } else {
                " --seeds 2"
            },
            at(name).display()
        );
        line.split_whitespace()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let words = |line: &[String]| -> Vec<String> { line.to_vec() };
    let ok = |name: &str, more: &str| {
        let line = words(&run(name, more));
        done(&line.iter().map(String::as_str).collect::<Vec<_>>())
    };
    let no = |name: &str, more: &str, part: &str| {
        let line = words(&run(name, more));
        refused(&line.iter().map(String::as_str).collect::<Vec<_>>(), part);
    };
    for i in 1..=3 {
        ok(&format!("s{i}"), &format!("--shard {i}/3"));
    }
    let path = |name: &str| at(name).to_str().unwrap().to_owned();
    let (s1, s2, s3, out) = (path("s1"), path("s2"), path("s3"), path("out"));
    let table = done(&["report", &s1, &s3, "--out", &out]);
    // Four runs: the first shard has two of them.
    let part = "Only a part of the study: shards 1, 3 of 3, 3 of 3 runs";
    assert!(table.contains(part), "{table}");
    assert_eq!(
        json(&at("out"), "results.json")["part"]["shards"],
        serde_json::json!([1, 3])
    );
    let table = done(&["report", &out, &s2, "--out", &out]);
    assert!(!table.contains("Only a part"), "{table}");
    assert_eq!(
        json(&at("out"), "results.json")["summary"][0]["n"],
        serde_json::json!(2)
    );
    let keys = |name: &str| {
        let results = json(&at(name), "results.json");
        let key = |run: &Value| (run["experts_init"].as_u64(), run["seed"].as_u64());
        results["runs"]
            .as_array()
            .unwrap()
            .iter()
            .map(key)
            .collect::<Vec<_>>()
    };
    ok("unsplit", "");
    // In the study's order, joined in one go or in two.
    assert_eq!(keys("out"), keys("unsplit"));

    // Shards of different splits are not a study, and neither are those of different lists of runs.
    ok("half", "--shard 1/2");
    refused(&["report", &path("half"), &s2], "another split");
    ok("longer", "--shard 2/3 --seeds 3");
    refused(&["report", &s1, &path("longer")], "of other runs");
    no(
        "s2",
        "--shard 2/3 --resume --seeds 3",
        "the runs that were split (4 of them, 6 now)",
    );
    // A directory that is given twice counts once.
    let table = done(&["report", &s1, &s3, &s1, "--out", &path("twice")]);
    assert!(table.contains("shards 1, 3 of 3, 3 of 3 runs"), "{table}");

    // Of one directory all is made anew, to the same bytes.
    let [results, report] = ["results.json", "report.html"].map(|name| at("s1").join(name));
    let before = [&results, &report].map(|path| fs::read(path).unwrap());
    fs::remove_file(&report).unwrap();
    assert!(done(&["report", &s1]).contains("shard 1 of 3"));
    assert_eq!(
        [&results, &report].map(|path| fs::read(path).unwrap()),
        before
    );
    let printed = done(&["report", &s1, "--json"]);
    assert_eq!(printed.as_bytes(), before[0]);

    // A directory is of one shard; without one the rest is made.
    no("s1", "--shard 2/3 --resume", "shard (shard 1 of 3)");
    ok("s1", "--resume");
    let whole = json(&at("s1"), "results.json");
    assert!(whole.get("part").is_none());
    assert_eq!(whole["runs"].as_array().unwrap().len(), 4);
    no("s1", "--shard 1/3 --resume", "shard (all runs)");

    // What does not belong together is not joined, and nothing is lost.
    refused(&["report"], "DIR");
    refused(&["report", &path("none")], "results.json");
    let other = path("other");
    done(&[
        "reproduce",
        "glue",
        "--preset",
        "smoke",
        "--methods",
        "dense",
        "--task",
        "RTE",
        "--out",
        &other,
    ]);
    refused(&["report", &s2, &other, "--out", &out], "is of glue");
    refused(&["report", &s2, "--out", &s3], "would be lost");
    let mut settings = json(&at("s2"), "settings.json");
    settings["steps"] = 7.into();
    fs::write(at("s2").join("settings.json"), settings.to_string()).unwrap();
    refused(&["report", &s2, &s3, "--out", &out], "steps was 7, now 120");
    let mut results = json(&at("s3"), "results.json");
    results["runs"][0]["test_loss"] = 1.0.into();
    fs::write(at("s3").join("results.json"), results.to_string()).unwrap();
    refused(&["report", &out, &s3, "--out", &out], "another run static");
    // Settings of another program are kept as they are.
    let odd = r#"{"mass":[1],"experts_init":5}"#;
    fs::write(at("s1").join("settings.json"), odd).unwrap();
    done(&["report", &s1]);
    fs::write(at("s3").join("results.json"), "{\"study\"").unwrap();
    refused(&["report", &s3], "not readable as results");
}

/// Old results are read, reported on and gone on with: those that the documents quote.
#[test]
fn published_results_are_kept_and_recognised() {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/results");
    let dir = tempfile::tempdir().unwrap();
    for name in [
        "synthetic-quick",
        "synthetic-quick-packed",
        "ablation-full",
        "glue-full",
        "dg-full",
    ] {
        let (from, out) = (docs.join(name), dir.path().join(name));
        let [from_text, out_text] = [&from, &out].map(|path| path.to_str().unwrap());
        done(&["report", from_text, "--out", out_text]);
        let [old, new] = [&from, &out].map(|dir| json(dir, "results.json"));
        assert_eq!(old["runs"], new["runs"], "{name}");
        assert_eq!(old["summary"], new["summary"], "{name}");
        // Settings are of the form that they have now, with every run's method, and read again as they are.
        let settings = json(&out, "settings.json");
        let methods = settings["methods"].as_object().unwrap();
        for run in old["runs"].as_array().unwrap() {
            let text = |name: &str| run[name].as_str().map(|s| format!("/{s}"));
            let number = |name: &str, mark| run[name].as_u64().map(|n| format!("/{mark}{n}"));
            let parts = [
                text("variant"),
                text("setting"),
                number("experts_init", 'K'),
                number("k", 'k'),
            ];
            let parts: String = parts.into_iter().flatten().collect();
            let key = format!("{}{parts}", run["method"].as_str().unwrap());
            assert!(methods.contains_key(&key), "{name}: {key}");
        }
        done(&["report", from_text, out_text, "--out", out_text]);
        // The runs of older kernels are not gone on with.
        if name != "synthetic-quick-packed" {
            continue;
        }
        // Nothing is left to be made, whichever form the settings have.
        for form in [&settings, &json(&from, "settings.json")] {
            fs::write(out.join("settings.json"), form.to_string()).unwrap();
            let line = ["reproduce", "--preset", "quick", "--resume", "--out"];
            done(&[&line[..], &[out_text]].concat());
            let again = json(&out, "results.json");
            let times = |results: &Value| -> Vec<Value> {
                let runs = results["runs"].as_array().unwrap().iter();
                runs.map(|run| run["wall_s"].clone()).collect()
            };
            assert_eq!(times(&again), times(&old));
            // What a name means was not written down at first.
            let mut now = json(&out, "settings.json");
            let rules = now.as_object_mut().unwrap().remove("rules");
            assert_eq!(now, settings, "{name}");
            assert!(rules.unwrap()["static/K5/k2"].is_string());
        }
        // Other settings are not.
        let now = json(&out, "settings.json");
        for (part, value) in [("methods", json!({ "k": 3 })), ("rules", json!("0"))] {
            let mut other = now.clone();
            other[part]["static/K5/k2"] = value;
            fs::write(out.join("settings.json"), other.to_string()).unwrap();
            let line = ["reproduce", "--preset", "quick", "--resume", "--out"];
            let what = format!("{part} (static/K5/k2 has changed)");
            refused(&[&line[..], &[out_text]].concat(), &what);
        }
    }
}

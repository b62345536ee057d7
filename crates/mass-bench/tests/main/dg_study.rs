//! The domain-generalisation study, run through the built binary.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

use crate::process::{self, command, done, json, killed_when, lines, runs};

fn bench() -> Command {
    command(&["reproduce", "dg"])
}

fn smoke(out: &Path, more: &[&str]) -> Output {
    let mut smoke = bench();
    smoke.args(["--preset", "smoke", "--out"]).arg(out);
    done(smoke.args(more))
}

/// What a run says about its patches: 4 classes in 4 domains, at least 4 images of 16 patches each, in one layer.
fn routed_patches(dir: &Path) {
    let text = fs::read(dir.join("patches.json")).unwrap();
    let layers: Value = serde_json::from_slice(&text).unwrap();
    assert_eq!(layers.as_array().unwrap().len(), 1);
    let layer = &layers[0];
    let experts = layer["experts"].as_array().unwrap().len();
    let total = |name: &str| {
        let rows = layer[name].as_object().unwrap();
        assert_eq!(rows.len(), 4, "{name}");
        let counts = rows.values().map(|row| row.as_array().unwrap());
        counts
            .map(|row| {
                assert_eq!(row.len(), experts);
                row.iter().map(|c| c.as_f64().unwrap()).sum::<f64>()
            })
            .sum::<f64>()
    };
    let by_class = total("assignments_by_class");
    assert!(by_class >= 16.0 * 4.0 * 16.0, "{by_class}");
    assert_eq!(by_class, total("assignments_by_domain"));
    for name in ["nmi_class", "nmi_domain"] {
        // Not defined where one expert takes everything.
        let value = layer[name].as_f64();
        assert!(value.is_none_or(|v| (0.0..=1.0).contains(&v)), "{name}");
    }
    let name = format!("{}.png", layer["layer"].as_str().unwrap());
    let picture = image::open(dir.join(name)).unwrap();
    // Two pictures for each of four classes, one row for each of four domains.
    assert!(picture.width() >= 8 * 16 && picture.height() >= 4 * 16);
}

#[test]
fn a_smoke_run_learns_grows_and_repeats_itself_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (dir.path().join("one"), dir.path().join("two"));
    smoke(&one, &["--threads", "1"]);
    smoke(&two, &["--threads", "3"]);
    assert_eq!(runs(&one), runs(&two));
    for name in ["metrics.jsonl", "events.jsonl"] {
        assert!(!lines(&one, name).is_empty(), "{name}");
        assert_eq!(lines(&one, name), lines(&two, name), "{name}");
    }
    assert!(one.join("report.html").is_file());

    let (mut grown, mut live) = (0, 0);
    for run in json(&one, "results.json")["runs"].as_array().unwrap() {
        let waiting = run["metrics"]["waiting_for_data"].as_f64().unwrap();
        assert!((0.0..=1.0).contains(&waiting), "{waiting}");
        assert_eq!(run["task"], "sample/bright");
        assert_eq!(
            (&run["metric_name"], &run["metric"]),
            (&"accuracy".into(), &run["accuracy"])
        );
        // Four classes: chance is a quarter.
        let figure = |name: &str| run["metrics"][name].as_f64().unwrap();
        assert!(figure("source_validation") > 0.35, "{run}");
        assert!(
            figure("source_validation") >= figure("last_source_validation"),
            "{run}"
        );
        let dense = run["method"] == "erm";
        assert_eq!(run["experts"].is_null(), dense, "{run}");
        assert_eq!(run["active_per_token"].is_null(), dense, "{run}");
        assert_eq!(
            run["detection_live_steps"].is_null(),
            run["method"] != "mass"
        );
        if run["method"] == "gmoe" {
            assert_eq!(run["active_per_token"], 1.0);
        }
        grown += run["expansions"].as_array().unwrap().len();
        for split in run["expansions"].as_array().unwrap() {
            // A detector's alarm has a p-value, whoever was split; a schedule has none.
            let by_alarm = run["variant"] != "ours" && run["variant"] != "calibrated";
            assert_eq!(split["p_value"].is_f64(), by_alarm, "{split}");
            assert_eq!(split["watched"] == "expert", by_alarm, "{split}");
        }
        live += run["detection_live_steps"].as_u64().unwrap_or(0);
    }
    assert!(
        grown >= 3 && live > 0,
        "{grown} splits in {live} live steps"
    );
    let patches = fs::read_dir(one.join("patches")).unwrap();
    let patches: Vec<_> = patches.map(|e| e.unwrap().path()).collect();
    assert_eq!(patches.len(), 6, "every method but ERM: {patches:?}");
    for dir in patches {
        routed_patches(&dir);
    }
    let events = lines(&one, "events.jsonl");
    let of = |method: &str| {
        let mine = |e: &&Value| e["run"].as_str().unwrap().starts_with(method);
        let mine = events.iter().filter(mine);
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
    // Every scoring is logged, and the selected one is the first of the best.
    let metrics = lines(&one, "metrics.jsonl");
    let scored: Vec<(u64, f64)> = metrics
        .iter()
        .filter(|l| l["run"] == "erm/sample/bright/seed0")
        .filter_map(|l| Some((l["step"].as_u64()?, l["source_validation"].as_f64()?)))
        .collect();
    let best = scored.iter().map(|s| s.1).fold(0.0, f64::max);
    let first = scored.iter().find(|s| s.1 == best).unwrap().0;
    assert!(scored.len() > 3, "{scored:?}");
    assert_eq!(runs(&one)[0]["metrics"]["selected_step"], first as f64);
}

#[test]
fn a_killed_study_resumes_within_a_run_to_the_same_results() {
    let dir = tempfile::tempdir().unwrap();
    // Killed as soon as a run has left a checkpoint, or one whose model is not the one that the sources chose.
    for (methods, selected_earlier) in [
        ("gmoe,dynmoe", false),
        ("gmoe,dynmoe", true),
        ("mass", false),
    ] {
        let (whole, cut) = (dir.path().join("whole"), dir.path().join("cut"));
        let choice = ["--methods", methods, "--seeds", "2", "--threads", "1"];
        smoke(&whole, &choice);
        let child = bench()
            .args(["--preset", "smoke", "--out"])
            .arg(&cut)
            .args(choice)
            .stderr(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let checkpointed = || {
            let mut runs = fs::read_dir(cut.join("checkpoints"))
                .into_iter()
                .flatten()
                .flatten();
            runs.any(|run| {
                let mut inside = fs::read_dir(run.path()).into_iter().flatten().flatten();
                let selected = |name: &OsStr| name.to_string_lossy().starts_with("selected-");
                mass_model::checkpoint::exists(&run.path())
                    && (!selected_earlier || inside.any(|f| selected(&f.file_name())))
            })
        };
        killed_when(child, checkpointed);
        smoke(&cut, &[&choice[..], &["--resume"]].concat());
        assert_eq!(runs(&cut), runs(&whole), "{methods}");
        assert_eq!(lines(&cut, "metrics.jsonl"), lines(&whole, "metrics.jsonl"));
        assert_eq!(lines(&cut, "events.jsonl"), lines(&whole, "events.jsonl"));
        fs::remove_dir_all(&whole).unwrap();
        fs::remove_dir_all(&cut).unwrap();
    }
}

#[test]
fn a_target_can_be_chosen() {
    let dir = tempfile::tempdir().unwrap();
    smoke(
        dir.path(),
        &["--task", "sample/striped", "--methods", "erm"],
    );
    let runs = runs(dir.path());
    assert_eq!(
        (runs.len(), &runs[0]["task"]),
        (1, &"sample/striped".into())
    );
}

#[test]
fn unusable_images_and_models_exit_2_and_name_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    let refused = |arguments: &[&str], part: &str| {
        let mut command = bench();
        command.arg("--out").arg(at.join("out")).args(arguments);
        process::refused(&mut command, &[part]);
    };
    refused(&[], "--models");
    refused(&["--preset", "smoke", "--task", "pacs"], "sample");
    let models = ["--models", at.to_str().unwrap()];
    refused(&models, "vit-s14");
    let model = at.join("vit-s14");
    fs::create_dir(&model).unwrap();
    fs::write(model.join("config.json"), "{}").unwrap();
    fs::write(model.join("model.safetensors"), "").unwrap();
    refused(&models, "--data");
    let both = [&models[..], &["--data", at.to_str().unwrap()]].concat();
    refused(&both, "pacs");
    for domain in ["here", "there"] {
        let class = at.join("pacs").join(domain).join("dog");
        fs::create_dir_all(&class).unwrap();
        image::RgbImage::new(4, 4)
            .save(class.join("a.png"))
            .unwrap();
    }
    let target = [&both[..], &["--task", "pacs/sketch"]].concat();
    refused(&target, "here, there");
    let bad = at.join("pacs/there/dog/b.jpg");
    fs::write(&bad, [0xff, 0xd8, 0xff, 0xdb, 0x00]).unwrap();
    // What an earlier run left there is not lost to a set that cannot be read.
    fs::create_dir_all(at.join("out")).unwrap();
    let earlier = r#"{"study": "dg", "runs": ["of an earlier run"]}"#;
    fs::write(at.join("out/results.json"), earlier).unwrap();
    refused(&both, "a finished run; --out DIR");
    let fresh = [&both[..], &["--fresh"]].concat();
    refused(&fresh, "pacs/there/dog/b.jpg");
    fs::remove_file(&bad).unwrap();
    refused(&fresh, "vit-s14");
    let left = fs::read(at.join("out/results.json")).unwrap();
    assert_eq!(left, earlier.as_bytes());
    fs::remove_dir_all(at.join("out")).unwrap();
    // DomainBed's own spelling, and another folder; but not a way to one.
    fs::rename(at.join("pacs"), at.join("PACS")).unwrap();
    refused(&both, "vit-s14");
    fs::rename(at.join("PACS"), at.join("toys")).unwrap();
    let task = |name: &'static str| [&both[..], &["--task", name]].concat();
    refused(&task("toys/there"), "vit-s14");
    refused(&task("toys/nowhere"), "here, there");
    refused(&task("none"), "none");
    refused(&task("../toys"), "named by its folder");
    fs::rename(at.join("toys"), at.join("pacs")).unwrap();
    fs::remove_dir_all(at.join("pacs/there/dog")).unwrap();
    refused(&both, "pacs/there/dog");
}

/// A damaged image is named with all others, and `--leave-out-damaged` goes on without them and says so.
#[test]
fn damaged_images_are_all_named_and_can_be_left_out() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    let model = at.join("vit-s14");
    crate::models::vit(&model);
    crate::models::split(&model);
    for (d, domain) in ["here", "there", "yonder"].into_iter().enumerate() {
        for (c, class) in ["cat", "dog"].into_iter().enumerate() {
            // torchvision reads folders below a class.
            let folder = at.join("toys").join(domain).join(class).join("more");
            fs::create_dir_all(&folder).unwrap();
            for i in 0..10 {
                let pixel = image::Rgb([90 * d as u8, 200 * c as u8, 20 * i]);
                let name = folder.join(format!("{i}.jpg"));
                image::RgbImage::from_pixel(20, 20, pixel)
                    .save(name)
                    .unwrap();
            }
        }
    }
    let damaged = [
        "here/cat/more/3.jpg",
        "there/dog/more/0.jpg",
        "yonder/cat/more/9.jpg",
    ];
    for name in damaged {
        let path = at.join("toys").join(name);
        let bytes = fs::read(&path).unwrap();
        // Without its end-of-image marker.
        fs::write(&path, &bytes[..bytes.len() - 2]).unwrap();
    }
    let study = |out: &str, more: &[&str]| {
        let mut command = bench();
        command.arg("--data").arg(at).arg("--models").arg(at);
        command.args(["--task", "toys", "--methods", "erm", "--threads", "1"]);
        command.arg("--out").arg(at.join(out)).args(more);
        command
    };
    // Named together the first time, and from the cache of a run that left them out.
    for out in ["first", "second", "first"] {
        let parts = [&damaged[..], &["3 files", "--leave-out-damaged"]].concat();
        process::refused(&mut study(out, &["--fresh"]), &parts);
        if out == "first" {
            continue;
        }
        let output = done(&mut study("first", &["--fresh", "--leave-out-damaged"]));
        let error = String::from_utf8_lossy(&output.stderr);
        for part in damaged.iter().chain(&["57 images"]) {
            assert!(error.contains(part), "no `{part}` in {error}");
        }
        let table = String::from_utf8_lossy(&output.stdout);
        assert!(
            table.contains("Damaged images left out of toys: 3"),
            "{table}"
        );
        let run = &runs(&at.join("first"))[0];
        assert_eq!(run["metrics"]["images_left_out"], 3.0);
        let report = fs::read_to_string(at.join("first/report.html")).unwrap();
        assert!(report.contains("left out of toys: 3"));
    }
}

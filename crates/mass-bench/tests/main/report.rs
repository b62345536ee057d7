//! results.json, the line files and the report.

use mass_bench::report::{
    EventLine, Existing, Expansion, Header, MetricLine, PairMeans, ReportError, ResultStore,
    Results, Run, Usage, join, paired, reported, table,
};
use mass_expand::{Diagnosis, Watched};
use proptest::prelude::*;
use serde_json::{Value, json};

fn header() -> Header {
    Header::new("synthetic", "quick", 2)
}

fn mass(seed: u64, loss: f64) -> Run {
    Run {
        variant: Some("paper".into()),
        experts_init: Some(5),
        experts: Some(12),
        active_per_token: Some(3.9),
        test_loss: Some(loss),
        bayes_loss: Some(1.335),
        detection_live_steps: Some(600),
        steps: Some(2000),
        expansions: vec![Expansion {
            step: 61,
            layer: 0,
            source: 2,
            new: 5,
            watched: Some(Watched::Expert),
            flagged: Some(2),
            p_value: Some(0.004),
            cosine: Some(0.0007),
        }],
        ..Run::new("mass", seed)
    }
}

fn open(
    dir: &std::path::Path,
    settings: &Value,
    existing: Existing,
) -> Result<ResultStore, ReportError> {
    ResultStore::open(dir, header(), settings, existing)
}

fn read(dir: &std::path::Path, name: &str) -> String {
    std::fs::read_to_string(dir.join(name)).expect(name)
}

#[test]
fn results_json_has_every_key_of_the_contract_and_null_for_what_is_absent() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut store = open(dir.path(), &json!({}), Existing::Refuse).expect("a store");
    store.push(mass(0, 2.15)).expect("a run");
    let value: Value = serde_json::from_str(&read(dir.path(), "results.json")).expect("JSON");
    for key in ["study", "preset", "version", "machine", "runs", "summary"] {
        assert!(!value[key].is_null(), "{key}");
    }
    assert!(value["machine"]["cpu"].is_string() && value["machine"]["threads"] == 2);
    let run = value["runs"][0].as_object().expect("a run");
    let keys = "method variant task seed experts_init experts active_per_token test_loss bayes_loss \
        accuracy metric metric_name jsd_entity jsd_property nmi steps tokens detection_live_steps \
        wall_s tokens_per_s peak_rss_mib expansions k";
    for key in keys.split_whitespace() {
        assert!(run.contains_key(key), "{key}");
    }
    for absent in ["task", "accuracy", "metric", "nmi", "tokens", "wall_s", "k"] {
        assert!(run[absent].is_null(), "{absent}");
    }
    assert_eq!(
        run["expansions"][0],
        json!({"step": 61, "layer": 0, "source": 2, "new": 5, "watched": "expert", "flagged": 2, "p_value": 0.004, "cosine": 0.0007})
    );
    let summary = &value["summary"][0];
    assert_eq!(summary["method"], "mass");
    assert_eq!(summary["n"], 1);
    assert_eq!(summary["test_loss_mean"], 2.15);
    assert!(summary["test_loss_std"].is_null());
}

#[test]
fn finished_runs_survive_a_resume_and_others_are_refused() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let settings = json!({"steps": 2000, "p": 0.5});
    let mut store = open(dir.path(), &settings, Existing::Refuse).expect("a store");
    store.push(mass(0, 2.1)).expect("a run");
    store.push(mass(1, 2.3)).expect("a run");
    assert!(matches!(
        store.push(mass(1, 2.3)),
        Err(ReportError::Duplicate(_))
    ));
    drop(store);

    let store = open(dir.path(), &settings, Existing::Resume).expect("the same settings");
    assert_eq!(store.finished(&mass(1, 0.0).key()), Some(&mass(1, 2.3)));
    assert_eq!(store.finished(&mass(2, 0.0).key()), None);
    assert_eq!(store.results().summary[0].n, 2);
    drop(store);

    // Elsewhere: the runs say where they were made, and no longer once the study is back.
    let elsewhere = Header::new("synthetic", "quick", 7);
    let mut store = ResultStore::open(dir.path(), elsewhere, &settings, Existing::Resume)
        .expect("another machine");
    store.push(mass(2, 2.0)).expect("a run");
    let made_with = |store: &ResultStore| {
        let runs = store.results().runs.iter();
        runs.map(|r| r.machine.as_ref().map(|m| m.threads))
            .collect::<Vec<_>>()
    };
    assert_eq!(made_with(&store), [Some(2), Some(2), None]);
    assert!(read(dir.path(), "report.html").contains("2 of the runs on"));
    drop(store);
    let store = open(dir.path(), &settings, Existing::Resume).expect("back again");
    assert_eq!(made_with(&store), [None, None, Some(7)]);
    drop(store);

    let error = open(dir.path(), &json!({"steps": 9, "p": 0.5}), Existing::Resume)
        .expect_err("other steps");
    assert_eq!(error.exit_code(), 2);
    assert!(
        error.to_string().contains("steps was 2000, now 9"),
        "{error}"
    );
    let other = Header::new("noise", "quick", 2);
    assert!(matches!(
        ResultStore::open(dir.path(), other, &settings, Existing::Resume),
        Err(ReportError::OtherSettings { .. })
    ));
    let other = Header::new("synthetic", "smoke", 2);
    assert!(matches!(
        ResultStore::open(dir.path(), other, &settings, Existing::Resume),
        Err(ReportError::OtherSettings { .. })
    ));
    std::fs::write(dir.path().join("results.json"), "{\"study\": 3").expect("a write");
    assert!(matches!(
        open(dir.path(), &settings, Existing::Resume),
        Err(ReportError::Malformed { .. })
    ));

    std::fs::write(
        dir.path().join("results.json"),
        r#"{"study": "x", "runs": []}"#,
    )
    .expect("a write");

    // With --fresh the directory starts anew, checkpoints included.
    let checkpoint = dir.path().join("checkpoints/mass");
    std::fs::create_dir_all(&checkpoint).expect("a directory");
    let store = open(dir.path(), &settings, Existing::Replace).expect("a fresh store");
    assert!(store.results().runs.is_empty());
    assert!(!dir.path().join("report.html").exists());
    assert_eq!(read(dir.path(), "metrics.jsonl"), "");
    assert!(!checkpoint.exists());

    // An opening that was cut short leaves a directory that can be opened.
    let cut = tempfile::tempdir().expect("a temporary directory");
    std::fs::write(
        cut.path().join("results.json"),
        r#"{"study": "x", "runs": []}"#,
    )
    .expect("a write");
    open(cut.path(), &settings, Existing::Refuse).expect("results alone");
    ResultStore::check(
        cut.path(),
        Header::new("synthetic", "quick", 2),
        &settings,
        Existing::Resume,
    )
    .expect("a check");
    // Checkpoints of unknown settings are not gone on from.
    std::fs::create_dir(cut.path().join("checkpoints")).expect("a directory");
    std::fs::remove_file(cut.path().join("settings.json")).expect("a removal");
    open(cut.path(), &settings, Existing::Resume).expect_err("a checkpoint without settings");

    // Settings without results that they belong to are no reason to lose results.
    std::fs::remove_file(dir.path().join("settings.json")).expect("a removal");
    drop(store);
    let mut store = open(dir.path(), &settings, Existing::Resume).expect("a store");
    store.push(mass(0, 1.0)).expect("a run");
    drop(store);
    std::fs::remove_file(dir.path().join("settings.json")).expect("a removal");
    let error =
        open(dir.path(), &settings, Existing::Resume).expect_err("runs of unknown settings");
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().contains("settings.json"), "{error}");
}

/// Hours of work are not deleted by a command that says nothing about them.
#[test]
fn what_is_finished_is_kept_until_someone_says_otherwise() {
    let settings = json!({"steps": 2000});
    let refused = |dir: &std::path::Path, settings: &Value, part: &str| {
        let error = open(dir, settings, Existing::Refuse).expect_err(part);
        assert_eq!(error.exit_code(), 2);
        let error = error.to_string();
        for part in [part, "--resume", "--fresh"] {
            assert!(error.contains(part), "no `{part}` in {error}");
        }
    };
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut store = open(dir.path(), &settings, Existing::Refuse).expect("a store");
    store.push(mass(0, 2.1)).expect("a run");
    drop(store);
    let before = read(dir.path(), "results.json");
    refused(dir.path(), &settings, "a finished run");
    // Whatever the settings are now, and whoever made the runs.
    refused(dir.path(), &json!({"steps": 1}), "a finished run");
    let other = Header::new("noise", "smoke", 2);
    ResultStore::open(dir.path(), other, &settings, Existing::Refuse).expect_err("another study");
    assert_eq!(read(dir.path(), "results.json"), before);
    let mut store = open(dir.path(), &settings, Existing::Resume).expect("a store");
    store.push(mass(1, 2.1)).expect("a run");
    drop(store);
    refused(dir.path(), &settings, "2 finished runs");
    let store = open(dir.path(), &settings, Existing::Replace).expect("a store");
    assert!(store.results().runs.is_empty());
    drop(store);
    // Nothing is lost of a directory without runs, and the checkpoint of one that was interrupted would be.
    drop(open(dir.path(), &settings, Existing::Refuse).expect("a store"));
    let run = dir.path().join("checkpoints/mass");
    std::fs::create_dir_all(&run).expect("a directory");
    // The first could not be written.
    drop(open(dir.path(), &settings, Existing::Refuse).expect("a store"));
    let checkpoint = run.join("step-0000000050");
    std::fs::create_dir_all(&checkpoint).expect("a directory");
    refused(dir.path(), &settings, "checkpoint");
    assert!(checkpoint.exists());
}

/// A directory by another path is still the one that is reported on, and a picture may be its own copy by another name.
#[cfg(unix)]
#[test]
fn a_report_in_its_place_keeps_pictures_and_unfinished_lines() {
    use std::os::unix::fs::symlink;
    let root = tempfile::tempdir().expect("a temporary directory");
    let [dir, link, linked] = ["dir", "link", "linked"].map(|name| root.path().join(name));
    let mut store = open(&dir, &json!({}), Existing::Refuse).expect("a store");
    store.push(mass(0, 2.15)).expect("a run");
    let line = MetricLine {
        run: mass(1, 0.0).key().to_string(),
        ..MetricLine::default()
    };
    store.metric(&line).expect("a line");
    drop(store);
    let picture = dir.join("patches/mass/layer0.png");
    std::fs::create_dir_all(picture.parent().expect("a parent")).expect("a directory");
    std::fs::write(&picture, "a picture").expect("a write");
    symlink(&dir, &link).expect("a link");
    join(std::slice::from_ref(&dir), Some(&linked)).expect("a report elsewhere");
    let copy = linked.join("patches/mass/layer0.png");
    std::fs::remove_file(&copy).expect("a picture");
    std::fs::hard_link(&picture, &copy).expect("a link");
    let lines = read(&dir, "metrics.jsonl");
    for out in [&link.join("../dir"), &link, &linked] {
        join(std::slice::from_ref(&dir), Some(out)).expect("a report");
        assert_eq!(read(&dir, "metrics.jsonl"), lines, "{out:?}");
        for picture in [&picture, &copy] {
            assert_eq!(std::fs::read(picture).expect("a picture"), b"a picture");
        }
    }
    // Pictures are not copied into themselves.
    let within = dir.join("patches/mass/report");
    let refused = join(std::slice::from_ref(&dir), Some(&within)).expect_err("no such place");
    assert!(
        refused.to_string().contains("within the pictures"),
        "{refused}"
    );
    assert!(!within.join("results.json").exists());
}

#[test]
fn a_directory_has_one_writer_at_a_time() {
    let settings = json!({"steps": 1});
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut store = open(dir.path(), &settings, Existing::Refuse).expect("a store");
    store.push(mass(0, 2.1)).expect("a run");
    let before = read(dir.path(), "results.json");
    let in_use = |error: ReportError| {
        assert_eq!(error.exit_code(), 2);
        let process = format!("in use by process {}", std::process::id());
        assert!(error.to_string().contains(&process), "{error}");
    };
    for existing in [Existing::Refuse, Existing::Resume, Existing::Replace] {
        in_use(open(dir.path(), &settings, existing).expect_err("another process"));
        in_use(ResultStore::check_kept(dir.path(), existing).expect_err("another process"));
    }
    in_use(join(&[dir.path().to_owned()], None).expect_err("a report in its place"));
    let elsewhere = dir.path().join("report");
    join(&[dir.path().to_owned()], Some(&elsewhere)).expect("a report elsewhere");
    assert_eq!(read(dir.path(), "results.json"), before);
    drop(store);
    open(dir.path(), &settings, Existing::Resume).expect("nobody's");
}

#[test]
fn a_directory_of_someone_else_keeps_what_it_holds() {
    let settings = json!({"steps": 1});
    for name in [
        "checkpoints/theirs",
        "patches/theirs",
        "results.json",
        "settings.json",
        "report.html",
        "frontier.svg",
        "metrics.jsonl",
    ] {
        let foreign = tempfile::tempdir().expect("a temporary directory");
        let theirs = foreign.path().join(name);
        std::fs::create_dir_all(theirs.parent().expect("a parent")).expect("a directory");
        std::fs::write(&theirs, "{}").expect("a write");
        // Again and again: what is refused once does not become ours.
        for existing in [Existing::Refuse, Existing::Replace, Existing::Resume] {
            let error = open(foreign.path(), &settings, existing).expect_err(name);
            assert_eq!(error.exit_code(), 2, "{name}: {error}");
            assert_eq!(std::fs::read(&theirs).expect(name), b"{}", "{name}");
        }
    }
    // Other files beside are no obstacle, and stay.
    let shared = tempfile::tempdir().expect("a temporary directory");
    let notes = ["notes.txt", "results.json.tmp", "report.html.tmp"];
    for name in notes {
        std::fs::write(shared.path().join(name), "mine").expect("a write");
    }
    for _ in 0..2 {
        let mut store = open(shared.path(), &settings, Existing::Refuse).expect("a store");
        store.push(mass(0, 2.1)).expect("a run");
        drop(store);
        open(shared.path(), &settings, Existing::Replace).expect("a store");
    }
    assert!(notes.iter().all(|name| read(shared.path(), name) == "mine"));
    // A directory that cannot be made.
    let file = shared.path().join("notes.txt/out");
    let error = open(&file, &settings, Existing::Refuse).expect_err("below a file");
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().contains("--out"), "{error}");
    // One in which nobody makes a file.
    #[cfg(target_os = "linux")]
    {
        let error = open("/sys".as_ref(), &settings, Existing::Refuse).expect_err("/sys");
        assert_eq!(error.exit_code(), 2, "{error}");
        assert!(error.to_string().contains("--out"), "{error}");
    }
}

/// What has the name of the lock is written to only by those who take it, and only if a study has made it.
#[test]
fn a_lock_of_someone_else_keeps_what_it_holds() {
    let settings = json!({"steps": 1});
    let dir = tempfile::tempdir().expect("a temporary directory");
    let out = dir.path().join("out");
    let lock = out.join(".lock");
    drop(open(&out, &settings, Existing::Refuse).expect("a store"));
    let ours = read(&out, "results.json");
    // Left by another process, and looked at by one that is refused.
    for theirs in ["", "17"] {
        std::fs::write(&lock, theirs).expect("a write");
        std::fs::write(out.join("results.json"), "{}").expect("a write");
        open(&out, &settings, Existing::Replace).expect_err("results of no study");
        assert_eq!(read(&out, ".lock"), theirs);
    }
    let refused = || {
        for existing in [Existing::Refuse, Existing::Replace, Existing::Resume] {
            let error = open(&out, &settings, existing).expect_err("a lock of someone else");
            assert!(matches!(error, ReportError::Foreign { .. }), "{error}");
        }
        join(std::slice::from_ref(&out), None).expect_err("a lock of someone else");
    };
    std::fs::write(out.join("results.json"), ours).expect("a write");
    std::fs::write(&lock, "mine\n").expect("a write");
    refused();
    assert_eq!(read(&out, ".lock"), "mine\n");
    #[cfg(unix)]
    for target in ["numbers", "nothing"] {
        std::fs::write(dir.path().join("numbers"), "123").expect("a write");
        std::fs::remove_file(&lock).expect("a removal");
        std::os::unix::fs::symlink(dir.path().join(target), &lock).expect("a link");
        refused();
        assert_eq!(read(dir.path(), "numbers"), "123");
        assert!(!dir.path().join("nothing").exists());
    }
}

#[test]
fn runs_of_other_data_are_not_mixed() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let of = |data: Value| json!({"steps": 1, "data": data});
    let mut store = open(dir.path(), &of(json!({"a": "1"})), Existing::Refuse).expect("a store");
    store.push(mass(0, 1.0)).expect("a run");
    drop(store);
    open(dir.path(), &of(json!({"b": "2"})), Existing::Resume).expect("another task");
    let error = open(
        dir.path(),
        &of(json!({"a": "3", "b": "2"})),
        Existing::Resume,
    )
    .expect_err("other data");
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().contains("a has changed"), "{error}");
    let error = open(dir.path(), &of(json!({"b": "3"})), Existing::Resume).expect_err("other data");
    assert!(error.to_string().contains("b has changed"), "{error}");
    open(
        dir.path(),
        &of(json!({"a": "1", "b": "2"})),
        Existing::Resume,
    )
    .expect("the same");
    let kept: Value = serde_json::from_str(&read(dir.path(), "settings.json")).expect("JSON");
    assert_eq!(kept, of(json!({"a": "1", "b": "2"})));
}

#[test]
fn a_run_done_again_leaves_no_line_twice() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut store = open(dir.path(), &json!({}), Existing::Refuse).expect("a store");
    let (a, b) = (mass(0, 1.0).key(), mass(1, 1.0).key());
    for key in [&a, &b] {
        for step in 0..10 {
            let line = MetricLine {
                run: key.to_string(),
                step,
                train_loss: Some(3.0 - step as f64 / 10.0),
                experts: Some(5),
                ..MetricLine::default()
            };
            store.metric(&line).expect("a line");
        }
        let event = json!({"step": 7, "layer": 0, "kind": "flag", "p_value": 0.01});
        store.event(&key.to_string(), &event).expect("a line");
    }
    store.flush().expect("a flush");
    drop(store);
    // A crash in the middle of a line, and a disk that gives back something else.
    for (name, damage) in [
        ("metrics.jsonl", &b"{\"run\": \"ma"[..]),
        ("events.jsonl", b"{\"run\": \"\xff\xfe"),
    ] {
        let mut bytes = std::fs::read(dir.path().join(name)).expect("a file");
        bytes.extend(damage);
        std::fs::write(dir.path().join(name), bytes).expect("a write");
    }

    let mut store = open(dir.path(), &json!({}), Existing::Resume).expect("a store");
    store.rewind(&b, 4).expect("a rewind");
    let steps = |store: &ResultStore, run: &str| -> Vec<u64> {
        let lines = store.metrics().expect("lines");
        lines
            .iter()
            .filter(|l| l.run == run)
            .map(|l| l.step)
            .collect()
    };
    assert_eq!(steps(&store, &a.to_string()), (0..10).collect::<Vec<_>>());
    assert_eq!(steps(&store, &b.to_string()), (0..4).collect::<Vec<_>>());
    let events = read(dir.path(), "events.jsonl");
    assert_eq!(events.lines().count(), 1);
    let line: EventLine<Value> = serde_json::from_str(events.trim()).expect("an event");
    assert_eq!(line.run, a.to_string());
    assert_eq!(line.event["p_value"], 0.01);
    let line = MetricLine {
        run: b.to_string(),
        step: 4,
        ..MetricLine::default()
    };
    store.metric(&line).expect("a line");
    store.flush().expect("a flush");
    assert_eq!(steps(&store, &b.to_string()), (0..5).collect::<Vec<_>>());
}

/// What no study has written is refused by name, and the page of what is odd is made all the same.
#[test]
fn results_that_no_study_wrote_are_refused() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut store = open(dir.path(), &json!({}), Existing::Refuse).expect("a store");
    store.push(mass(0, 2.15)).expect("a run");
    store.push(mass(1, 2.15)).expect("a run");
    drop(store);
    let whole: Value = serde_json::from_str(&read(dir.path(), "results.json")).expect("JSON");
    let with = |change: &dyn Fn(&mut Value)| {
        let mut changed = whole.clone();
        change(&mut changed);
        std::fs::write(dir.path().join("results.json"), changed.to_string()).expect("a write");
        join(&[dir.path().to_owned()], None).map(drop)
    };
    let part =
        |shards: Value, of: usize| json!({ "shards": shards, "of": of, "plan": ["x/seed0"] });
    type Change<'c> = (&'c str, &'c dyn Fn(&mut Value));
    let changes: [Change<'_>; 10] = [
        ("missing field `method`", &|all| all["runs"][0] = json!({})),
        ("missing field `seed`", &|all| {
            all["runs"][0] = json!({ "method": "mass" })
        }),
        ("is there twice", &|all| {
            all["runs"][1] = all["runs"][0].clone()
        }),
        ("shard 1 of 0", &|all| all["part"] = part(json!([1]), 0)),
        ("shard 3 of 2", &|all| all["part"] = part(json!([3]), 2)),
        ("shard 0 of 2", &|all| all["part"] = part(json!([0]), 2)),
        // They become part of a path.
        ("`/tmp` is no name", &|all| all["study"] = json!("/tmp")),
        ("`../x` is no name", &|all| all["preset"] = json!("../x")),
        ("`..` is no name", &|all| all["preset"] = json!("..")),
        ("`` is no name", &|all| all["study"] = json!("")),
    ];
    for (what, change) in changes {
        let error = with(change).expect_err(what);
        assert!(matches!(error, ReportError::Malformed { .. }), "{error}");
        assert!(error.to_string().contains(what), "{error}");
        let again = ResultStore::open(dir.path(), header(), &json!({}), Existing::Resume);
        assert!(again.is_err(), "{what}");
    }
    for name in ["", "\u{e9}cart", "accuracy"] {
        let named = with(&|all| {
            all["runs"][0]["metric"] = json!(0.5);
            all["runs"][0]["metric_name"] = json!(name);
        });
        named.expect("a report");
    }
}

/// No flag replaces what may be the work of hours, and none is advised.
#[test]
fn damaged_results_are_to_be_removed_by_hand() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut store = open(dir.path(), &json!({}), Existing::Refuse).expect("a store");
    store.push(mass(0, 2.15)).expect("a run");
    drop(store);
    let whole = read(dir.path(), "results.json");
    let refused = |name: &str, error: ReportError| {
        assert_eq!(error.exit_code(), 2);
        let error = error.to_string();
        let advice = "remove its directory yourself";
        assert!(error.contains(name) && error.contains(advice), "{error}");
        assert!(!error.contains("--out"), "{error}");
    };
    std::fs::write(dir.path().join("results.json"), &whole[..99]).expect("a write");
    for existing in [Existing::Refuse, Existing::Replace, Existing::Resume] {
        let error = open(dir.path(), &json!({}), existing).expect_err("damaged results");
        refused("results.json", error);
    }
    let report = || join(&[dir.path().to_owned()], None).expect_err("a damaged directory");
    refused("results.json", report());
    std::fs::write(dir.path().join("results.json"), whole).expect("a write");
    std::fs::remove_file(dir.path().join("settings.json")).expect("a removal");
    refused("settings.json", report());
}

#[test]
fn a_row_says_of_how_many_runs_its_figures_are() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut store = open(dir.path(), &json!({}), Existing::Refuse).expect("a store");
    for (seed, loss) in [(0, 2.1), (1, f64::NAN), (2, 2.2)] {
        store.push(mass(seed, loss)).expect("a run");
    }
    let table = table(store.results());
    assert!(
        table.lines().any(|line| line.ends_with("2 of 3")),
        "{table}"
    );
}

/// A chart for each task, and one for the runs that have none.
#[test]
fn runs_without_a_task_are_drawn_beside_others() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut store = open(dir.path(), &json!({}), Existing::Refuse).expect("a store");
    store.push(mass(0, 2.15)).expect("a run");
    let picture = read(dir.path(), "frontier.svg");
    let of_task = Run {
        task: Some("51k".into()),
        ..mass(0, 2.05)
    };
    store.push(of_task).expect("a run");
    assert_eq!(read(dir.path(), "frontier.svg"), picture);
    let page = read(dir.path(), "report.html");
    for title in [
        "Loss against the number of experts<",
        "Loss against the number of experts: 51k<",
    ] {
        assert!(page.contains(title), "{title}");
    }
}

#[test]
fn figures_that_are_not_finite_become_null_and_are_told() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut store = open(dir.path(), &json!({}), Existing::Refuse).expect("a store");
    let mut run = mass(0, f64::NAN);
    run.expansions[0].cosine = Some(f64::INFINITY);
    let dropped = store.push(run).expect("a run");
    assert_eq!(dropped, ["test_loss", "expansions.cosine"]);
    assert_eq!(store.results().runs[0].test_loss, None);
    let events = read(dir.path(), "events.jsonl");
    assert!(events.contains("non_finite") && events.contains("test_loss"));
    let back: Results = serde_json::from_str(&read(dir.path(), "results.json")).expect("JSON");
    assert_eq!(&back, store.results());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn results_round_trip_exactly(
        losses in proptest::collection::vec(proptest::option::of(-1e300..1e300f64), 1..8),
        name in "[a-z]{1,8}", k in proptest::option::of(1usize..9)
    ) {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let mut store = open(dir.path(), &json!({}), Existing::Refuse).expect("a store");
        for (seed, &test_loss) in losses.iter().enumerate() {
            store.push(Run { test_loss, k, ..Run::new(&name, seed as u64) }).expect("a run");
        }
        let back: Results = serde_json::from_str(&read(dir.path(), "results.json")).expect("JSON");
        prop_assert_eq!(&back, store.results());
        let all = store.into_results();
        let again = open(dir.path(), &json!({}), Existing::Resume).expect("a store");
        prop_assert_eq!(again.results(), &all);
    }
}

#[test]
fn a_split_is_shown_with_its_stream_and_a_run_with_its_diagnoses() {
    let mut run = mass(0, 2.15);
    let split = run.expansions[0].clone();
    for (watched, flagged, p_value) in [
        (Some(Watched::Loss), None, Some(1e-5)),
        (Some(Watched::Layer), None, Some(2e-5)),
        (Some(Watched::Expert), Some(4), Some(3e-5)),
        (None, None, None),
    ] {
        run.expansions.push(Expansion {
            watched,
            flagged,
            p_value,
            ..split.clone()
        });
    }
    run.diagnoses = vec![Diagnosis::NoSplitReachable {
        ready: Some(72),
        end: 60,
        room: 2,
    }];
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut store = open(dir.path(), &json!({}), Existing::Refuse).expect("a store");
    store.push(run.clone()).expect("a run");
    store.push(mass(1, 2.2)).expect("a run");
    let shown = table(store.results());
    for text in [
        "step 61: 2 -> 5 p 4.00e-3 (expert 2);",
        "p 1.00e-5 (loss);",
        "p 2.00e-5 (layer);",
        "p 3.00e-5 (expert 4); step 61: 2 -> 5\n",
        "mass/paper/K5/seed0: no split can be reached: the trigger cannot be satisfied before step 72",
    ] {
        assert!(shown.contains(text), "{text} is not in\n{shown}");
    }
    assert!(read(dir.path(), "report.html").contains("no split can be reached"));
    // Absent where there is nothing to say, and read back as it was.
    let written: Value = serde_json::from_str(&read(dir.path(), "results.json")).expect("JSON");
    assert!(written["runs"][1].get("diagnoses").is_none());
    let again: Results = serde_json::from_value(written).expect("results");
    assert_eq!(again.runs[0], run);
    let healthy = Results {
        runs: vec![mass(1, 2.2)],
        ..again
    };
    assert!(!table(&healthy).contains("Diagnoses"));
}

#[test]
fn table_sets_the_papers_figures_and_the_floor_beside_ours() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut store = open(dir.path(), &json!({}), Existing::Refuse).expect("a store");
    store.push(mass(0, 2.1)).expect("a run");
    store.push(mass(1, 2.2)).expect("a run");
    for experts in [5, 7] {
        let run = Run {
            k: Some(2),
            experts_init: Some(experts),
            experts: Some(experts),
            test_loss: Some(1.9),
            ..Run::new("static", 0)
        };
        store.push(run).expect("a run");
    }
    let text = table(store.results());
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines[0].starts_with("method  variant"), "{text}");
    assert!(
        lines[2].contains("5 -> 12") && lines[2].contains("2.150 ± 0.071"),
        "{text}"
    );
    assert!(
        lines[2].contains("2.15 (K 12.4, k 3.9)") && lines[2].contains("600"),
        "{text}"
    );
    assert!(lines[3].contains("2.6 (K 5)"), "{text}");
    assert!(!lines[4].contains('('), "{text}");
    assert!(
        text.contains("Bayes floor (no model can do better): 1.335"),
        "{text}"
    );
    assert!(
        text.contains("mass/paper/K5/seed0: step 61: 2 -> 5 p 4.00e-3"),
        "{text}"
    );
    assert!(!text.contains("accuracy"), "{text}");
    // GLUE's figures are a task's.
    let mut row = store.results().summary[0].clone();
    assert_eq!(reported("glue", &row), None);
    row.task = Some("RTE".into());
    let rte = reported("glue", &row).expect("the paper's RTE");
    assert_eq!((rte.figure, rte.experts), (0.7533, Some((9.5, 12.7))));
    assert_eq!(reported("scale", &row), None);

    let html = read(dir.path(), "report.html");
    assert!(html.starts_with("<!doctype html>") && html.contains("5 -&gt; 12"));
    assert!(!html.contains("http://") && !html.contains("https://") && !html.contains("<script"));
}

#[test]
fn report_plots_what_metrics_hold() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut store = open(dir.path(), &json!({}), Existing::Refuse).expect("a store");
    for step in 0..2000 {
        let line = MetricLine {
            run: "mass/paper/K5/seed0".into(),
            step,
            train_loss: Some(3.0 / (1.0 + step as f64 / 100.0)),
            experts: Some(5 + step as usize / 500),
            ..MetricLine::default()
        };
        store.metric(&line).expect("a line");
    }
    store.push(mass(0, 1.9)).expect("a run");
    let html = read(dir.path(), "report.html");
    // The loss; how the pool grew is told by events, of which there are none. And the two of the frontier.
    assert_eq!(html.matches("<figure>").count(), 3);
    assert_eq!(html.matches("class=\"line\"").count(), 1);
    assert!(html.contains("Bayes floor 1.335"));
    // Thinned: not one point a step.
    assert!(html.len() < 30_000, "{}", html.len());

    // Seeds make one line, their mean; a task has plots of its own; one point is no line.
    let lines = |run: &str, from: u64, loss: f64| {
        let line = |step| MetricLine {
            run: run.into(),
            step,
            train_loss: Some(loss + step as f64),
            ..MetricLine::default()
        };
        (from..2).map(line).collect::<Vec<_>>()
    };
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut store = open(dir.path(), &json!({}), Existing::Refuse).expect("a store");
    let of = |task: &str, seed| Run {
        task: Some(task.into()),
        ..Run::new("erm", seed)
    };
    for (run, from, loss) in [
        (of("a", 0), 0, 2.0),
        (of("a", 1), 0, 4.0),
        (of("b", 0), 0, 7.0),
        (of("c", 0), 1, 9.0),
    ] {
        for line in lines(&run.key().to_string(), from, loss) {
            store.metric(&line).expect("a line");
        }
        store.push(run).expect("a run");
    }
    let html = read(dir.path(), "report.html");
    assert_eq!(html.matches("class=\"line\"").count(), 2);
    assert!(html.contains(": a</figcaption>") && html.contains(": b</figcaption>"));
    assert!(!html.contains(": c</figcaption>"));
    // From 3 to 4, which ticks of 0.2 show.
    assert!(html.contains(">3.2</text>") && html.contains(">3.8</text>"));
}

/// A directory with every kind of chart.
pub(crate) fn report_with_everything(dir: &std::path::Path) -> std::path::PathBuf {
    let dir = dir.join("everything");
    let mut store = open(&dir, &json!({}), Existing::Refuse).expect("a store");
    for experts in [5, 10, 15, 20] {
        for k in [1, 2] {
            for seed in 0..3 {
                // More than 15 are of no use.
                let useful = experts.min(15) as f64;
                let loss = 1.7 + 1.0 / useful - 0.01 * k as f64 + 0.004 * seed as f64;
                let run = Run {
                    k: Some(k),
                    experts_init: Some(experts),
                    experts: Some(experts),
                    active_per_token: Some(k as f64),
                    test_loss: Some(loss),
                    bayes_loss: Some(1.335),
                    ..Run::new("static", seed)
                };
                store.push(run).expect("a run");
            }
        }
    }
    for seed in 0..3 {
        let mut run = mass(seed, 1.8 + 0.01 * seed as f64);
        let key = run.key().to_string();
        for step in (0..2000).step_by(20) {
            let line = MetricLine {
                run: key.clone(),
                step,
                train_loss: Some(4.0 - (step as f64).ln_1p() / 4.0),
                ..MetricLine::default()
            };
            store.metric(&line).expect("a line");
        }
        for event in events().into_iter().chain(observations(seed)) {
            store.event(&key, &event).expect("a line");
        }
        // The second pair is gone after four steps, and the first step has no gradient of the source.
        run.pairs = (0..=6)
            .map(|power| PairMeans {
                age: 1 << power,
                pairs: if power < 3 { 2 } else { 1 },
                source_alignment: (power > 0).then(|| 0.4 / f64::from(1 << power)),
                new_alignment: Some(0.4 / f64::from(1 << power)),
                routing_overlap: Some(0.25),
                new_share: Some(0.5),
                gate_cosine: Some(0.9),
            })
            .collect();
        run.usage = (seed == 0).then(|| Usage {
            entity: (0..12)
                .map(|e| (0..10).map(|l| f64::from(u8::from(l % 12 == e))).collect())
                .collect(),
            property: (0..12)
                .map(|e| {
                    (0..10)
                        .map(|l| if e < 4 { 0.25 } else { 0.0 * l as f64 })
                        .collect()
                })
                .collect(),
        });
        run.diagnoses = vec![Diagnosis::NoSplitReachable {
            ready: Some(72),
            end: 60,
            room: 2,
        }];
        store.push(run).expect("a run");
    }
    dir.join("report.html")
}

/// Two splits, a removal and the end, and lines that no chart knows.
fn events() -> Vec<Value> {
    vec![
        json!({"step": 61, "layer": 0, "kind": "split", "source": 2, "new": 5, "experts": 6, "watched": "expert", "flagged": 2}),
        json!({"step": 90, "layer": 0, "kind": "split", "source": 5, "new": 6, "experts": 7}),
        json!({"step": 95, "layer": 0, "kind": "remove", "expert": 6, "reason": "unused", "experts": 6}),
        json!({"step": 100, "layer": null, "kind": "stop", "reason": "phase_end"}),
        json!({"step": null, "kind": "non_finite", "figure": "nmi"}),
        json!({"kind": "what comes next", "experts": "many"}),
    ]
}

/// What a first seed's detectors saw of those splits.
fn observations(seed: u64) -> Vec<Value> {
    let mut lines = Vec::new();
    for step in (31..=120).filter(|_| seed == 0) {
        let statistic = (step > 35).then_some(f64::from(step % 7) / 2.0);
        for expert in [2, 5] {
            if expert == 2 && step <= 91 || expert == 5 && step > 61 {
                let line = json!({"step": step, "layer": 0, "kind": "observation", "watched": "expert", "expert": expert,
                    "value": 0.1, "statistic": statistic, "p_value": null});
                lines.push(line);
            }
        }
    }
    lines
}

#[test]
fn detectors_are_drawn_around_each_split_and_pairs_by_age() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let html = std::fs::read_to_string(report_with_everything(dir.path())).expect("a report");
    let detectors = section(&html, "detectors");
    assert_eq!(detectors.matches("<figure>").count(), 1, "the first seed's");
    assert_eq!(detectors.matches("class=\"line\"").count(), 2);
    assert!(
        detectors.contains("step 61: 2 \u{2192} 5 (expert 2)")
            && detectors.contains("step 90: 5 \u{2192} 6<")
    );
    // From 25 steps before a split, when there is a statistic, to 30 after it.
    assert!(detectors.contains(">-20</text>") && detectors.contains(">20</text>"));

    let pairs = section(&html, "pairs");
    assert_eq!(pairs.matches("<figure>").count(), 5);
    // Ages as powers of two; the first has no gradient of the source.
    assert_eq!(pairs.matches(">64</text>").count(), 5);
    let figures: Vec<&str> = pairs.split("<figure>").skip(1).collect();
    let begins_at_1 = |figure: &str| figure.contains("class=\"m\">1</text>");
    assert!(!begins_at_1(figures[0]) && figures[1..].iter().all(|f| begins_at_1(f)));

    let maps = section(&html, "specialisation");
    assert_eq!(maps.matches("<figure>").count(), 1);
    // Ten entities of one expert each, ten properties of four, and the key.
    assert_eq!(maps.matches("class=\"heat\"").count(), 10 + 40 + 1);
    let written: Value =
        serde_json::from_str(&read(&dir.path().join("everything"), "results.json")).expect("JSON");
    let with_usage = |run: &&Value| run.get("usage").is_some();
    assert_eq!(
        written["runs"]
            .as_array()
            .expect("runs")
            .iter()
            .filter(with_usage)
            .count(),
        1
    );
}

/// The charts of a section.
fn section<'h>(html: &'h str, id: &str) -> &'h str {
    let found = html.split(&format!("<section id=\"{id}\">")).nth(1);
    found
        .unwrap_or_default()
        .split("</section>")
        .next()
        .unwrap_or_default()
}

#[test]
fn the_frontier_has_every_method_and_the_elbow_of_static_pools() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let html = std::fs::read_to_string(report_with_everything(dir.path())).expect("a report");
    let frontier = section(&html, "frontier");
    assert_eq!(frontier.matches("<figure>").count(), 2);
    // Against K two lines of four pools and MASS, against k four of two and MASS, each with its deviation.
    assert_eq!(frontier.matches("class=\"line\"").count(), 2 + 4);
    let marks = (8 + 1) * 2 + (2 + 1) + (4 + 1);
    assert_eq!(frontier.matches("class=\"mark\"").count(), marks);
    assert_eq!(frontier.matches("class=\"ring\"").count(), 2 + 2);
    // Whatever grows has one colour in both, although there are two and four lines of static pools.
    let drawn = frontier.split("<g class=\"series ").skip(1);
    let grown = drawn.filter(|s| s.contains("<title>mass"));
    assert_eq!(grown.map(|s| &s[..2]).collect::<Vec<_>>(), ["c0", "c0"]);
    assert!(
        frontier.contains("Bayes floor 1.335")
            && frontier.contains("static/<wbr>k2: elbow at K 15 (15 in 100 % of draws)")
    );
    let store =
        open(&dir.path().join("everything"), &json!({}), Existing::Resume).expect("a store");
    let note = "Elbow of static/k1: K 15 (within one standard error of the best: 15, 20; paired bootstrap over 3 seeds: 15 in 100 %)";
    assert!(
        table(store.results()).contains(note),
        "{}",
        table(store.results())
    );
}

#[test]
fn pools_are_drawn_over_time_with_their_events() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let html = std::fs::read_to_string(report_with_everything(dir.path())).expect("a report");
    let pools = section(&html, "pools-over-time");
    assert_eq!(
        pools.matches("<figure>").count(),
        1,
        "static pools have no events"
    );
    let names = [
        "other seeds",
        "seed 0",
        "split",
        "removal",
        "end of expansion",
    ];
    for name in names {
        assert_eq!(
            pools.matches(&format!("<span>{name}</span>")).count(),
            1,
            "{name}"
        );
    }
    // Two splits, a removal and the end, each beside its sign in the legend.
    assert_eq!(pools.matches("class=\"sign s2\"").count(), 2);
    assert_eq!(pools.matches("class=\"mark\"").count(), 4 + 3);
    let bare = read(&dir.path().join("everything"), "report.html");
    assert_eq!(bare, html);
    // Results of a time without events, or of a study without any.
    std::fs::write(dir.path().join("everything/events.jsonl"), "").expect("a write");
    mass_bench::report::join(&[dir.path().join("everything")], None).expect("a report");
    let html = read(&dir.path().join("everything"), "report.html");
    assert_eq!(section(&html, "pools-over-time"), "");
    assert!(html.contains("id=\"frontier\""));
}

/// Whatever a run has found is drawn, and can be read again.
#[test]
fn figures_of_any_size_are_kept_and_drawn() {
    let large = |metric: f64| Run {
        metric: Some(metric),
        ..Run::default()
    };
    let named = |method: &str, experts, test_loss| Run {
        experts: Some(experts),
        test_loss: Some(test_loss),
        ..Run::new(method, 0)
    };
    let pairs = vec![PairMeans {
        age: 1,
        pairs: usize::MAX,
        gate_cosine: Some(0.5),
        ..PairMeans::default()
    }];
    let by_seed = |method: &str, seed, metric| Run {
        metric: Some(metric),
        ..Run::new(method, seed)
    };
    for runs in [
        vec![Run {
            test_loss: Some(1.0),
            ..Run::default()
        }],
        vec![named("mass", usize::MAX, 1.0)],
        vec![named("mass", 1 << 60, 1.0)],
        vec![Run {
            active_per_token: Some(1e17),
            ..named("mass", 4, 1.0)
        }],
        vec![named("mass", 4, 0.0), named("static", 5, 5e-324)],
        vec![Run {
            pairs,
            ..named("mass", 4, 1.0)
        }],
        vec![
            by_seed("mass", 0, 1e308),
            by_seed("mass", 1, 1e308),
            by_seed("static", 0, 0.0),
            by_seed("static", 1, 0.0),
        ],
        vec![
            by_seed("mass", 0, 1e200),
            by_seed("mass", 1, -1e200),
            by_seed("static", 0, 0.0),
            by_seed("static", 1, 0.0),
        ],
        vec![Run {
            usage: Some(Usage {
                entity: vec![vec![f64::NAN]],
                property: Vec::new(),
            }),
            ..large(1.0)
        }],
    ] {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let mut store = open(dir.path(), &json!({}), Existing::Refuse).expect("a store");
        for run in runs {
            store.push(run).expect("a run");
        }
        let kept = store.results().clone();
        drop(store);
        let again = open(dir.path(), &json!({}), Existing::Resume).expect("a store");
        assert_eq!(again.results(), &kept);
    }
    assert_eq!(paired(&[(1e308, 0.0), (1e308, 0.0)]), None);
    assert_eq!(paired(&[(1e200, 0.0), (-1e200, 0.0)]), None);
}

#[test]
fn an_event_that_cannot_be_written_leaves_the_next_line_whole() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut store = open(dir.path(), &json!({}), Existing::Refuse).expect("a store");
    store.event("r", &5).expect_err("no object");
    store.event("r", &json!({ "step": 7 })).expect("a line");
    store.flush().expect("a flush");
    let line: Value = serde_json::from_str(&read(dir.path(), "events.jsonl")).expect("one line");
    assert_eq!(line, json!({ "run": "r", "step": 7 }));
}

#[test]
fn joining_loses_nothing_of_what_is_there() {
    use std::fs;
    use std::os::unix::fs::symlink;
    let root = tempfile::tempdir().expect("a temporary directory");
    let dirs = ["a", "b", "c", "d"].map(|name| root.path().join(name));
    let [a, b, c, d] = &dirs;
    let line = |seed| MetricLine {
        run: mass(seed, 0.0).key().to_string(),
        ..MetricLine::default()
    };
    for (dir, seeds) in [(a, 0..1), (b, 1..2)] {
        let mut store = open(dir, &json!({}), Existing::Refuse).expect("a store");
        for seed in seeds {
            store.metric(&line(seed)).expect("a line");
            store.push(mass(seed, 2.0)).expect("a run");
        }
    }
    // As a joining leaves it that is killed between results and lines.
    let lines = read(a, "metrics.jsonl");
    join(&[a.clone(), b.clone()], Some(a)).expect("a join");
    fs::write(a.join("metrics.jsonl"), &lines).expect("a write");
    join(&[a.clone(), b.clone()], Some(a)).expect("a join");
    assert_eq!(read(a, "metrics.jsonl").lines().count(), 2);

    // A run under way, of another study.
    drop(open(c, &json!({ "steps": 5 }), Existing::Refuse).expect("a store"));
    let settings = read(c, "settings.json");
    fs::create_dir_all(c.join("checkpoints/run/step-0000000001")).expect("a folder");
    let refused = join(std::slice::from_ref(b), Some(c)).expect_err("it would be lost");
    assert!(refused.to_string().contains("interrupted"), "{refused}");
    assert_eq!(read(c, "settings.json"), settings);

    // A folder that leads into itself.
    fs::create_dir(b.join("patches")).expect("a folder");
    symlink(".", b.join("patches/x")).expect("a link");
    let refused = join(std::slice::from_ref(b), Some(d)).expect_err("no picture");
    assert!(refused.to_string().contains("remove it"), "{refused}");
}

#[test]
fn results_that_are_no_text_are_malformed() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    drop(open(dir.path(), &json!({}), Existing::Refuse).expect("a store"));
    std::fs::write(dir.path().join("results.json"), b"{\"study\": \"\xe2").expect("a write");
    for existing in [Existing::Refuse, Existing::Resume, Existing::Replace] {
        let refused = open(dir.path(), &json!({}), existing).expect_err("no text");
        let named = matches!(refused, ReportError::Malformed { .. });
        assert!(named, "{existing:?}: {refused}");
    }
}

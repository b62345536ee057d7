//! The windowed z detector against values computed by the authors' code.

use std::{env, fs, path::PathBuf};

use mass_cpd::{Detector, WindowedZParams};
use serde_json::Value;

fn golden(name: &str) -> Value {
    let dir =
        env::var("MASS_GOLDEN_DIR").expect("MASS_GOLDEN_DIR names the folder of golden values");
    let path = PathBuf::from(dir).join(name);
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).expect("golden file is JSON")
}

fn numbers(value: &Value) -> Vec<Option<f64>> {
    value
        .as_array()
        .expect("an array")
        .iter()
        .map(Value::as_f64)
        .collect()
}

/// Scores and p-values are those of the file, and an alarm is a p-value of the file under the level.
#[test]
fn golden_windowed_z_scores_and_p_values() {
    const ALPHA: f64 = 0.01;
    let file = golden("cpd_windowed_z.json");
    let cases = file["cases"].as_array().expect("cases");
    assert!(!cases.is_empty());
    let (mut alarms, mut silences) = (0, 0);
    for case in cases {
        let kind = case["kind"].as_str().unwrap_or("?");
        let size = |key: &str| case[key].as_u64().unwrap_or_else(|| panic!("{key}")) as usize;
        let mut detector = WindowedZParams::reference(size("warmup"), size("window"), ALPHA)
            .check()
            .expect("golden parameters are valid");
        let (series, z, p) = (
            numbers(&case["series"]),
            numbers(&case["z"]),
            numbers(&case["p"]),
        );
        assert!(series.len() == z.len() && z.len() == p.len() && !z.is_empty());
        // The file was computed in f32: scores are as exact as their largest value allows.
        let largest = z.iter().flatten().fold(1.0f64, |a, b| a.max(b.abs()));
        for (t, x) in series.iter().enumerate() {
            let step = detector.update(x.expect("a number")).expect("finite");
            let score = detector.last_score();
            assert_eq!(score.is_some(), z[t].is_some(), "{kind}: z at {t}");
            if let (Some(got), Some(want)) = (score, z[t]) {
                assert!(
                    (got - want).abs() <= 1e-5 * largest,
                    "{kind}: z at {t}: {got}, not {want}"
                );
            }
            assert_eq!(step.p_value.is_some(), p[t].is_some(), "{kind}: p at {t}");
            if let (Some(got), Some(want)) = (step.p_value, p[t]) {
                assert!(
                    (got - want).abs() <= 1e-5,
                    "{kind}: p at {t}: {got}, not {want}"
                );
                // As near to the level as the file is exact, either would do.
                if (want - ALPHA).abs() > 1e-5 {
                    assert_eq!(step.alarm, want < ALPHA, "{kind}: alarm at {t}, p {want}");
                    if step.alarm {
                        alarms += 1;
                    } else {
                        silences += 1;
                    }
                }
            } else {
                assert!(!step.alarm, "{kind}: alarm at {t} without a p-value");
            }
        }
    }
    assert!(
        alarms > 0 && silences > 0,
        "{alarms} alarms, {silences} p-values without"
    );
}

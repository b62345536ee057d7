//! The run-length solver against published tables.

use std::{env, fs, path::PathBuf};

use mass_cpd::run_length::{
    RunLength, Sides, exact_threshold_for_horizon, siegmund_threshold_for_horizon,
    threshold_for_horizon, two_sided_average,
};
use serde_json::Value;

use super::horizon::ratio;

fn golden() -> Value {
    let dir =
        env::var("MASS_GOLDEN_DIR").expect("MASS_GOLDEN_DIR names the folder of golden values");
    let path = PathBuf::from(dir).join("arl.json");
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).expect("golden file is JSON")
}

fn number(value: &Value) -> f64 {
    value
        .as_f64()
        .unwrap_or_else(|| panic!("{value} is not a number"))
}

/// Half of the last digit that a printed number shows, or 0.1 %, whichever is larger.
fn tolerance(printed: &Value) -> f64 {
    let text = printed.to_string();
    let places = text
        .split_once('.')
        .map_or(0, |(_, d)| if d == "0" { 0 } else { d.len() });
    // A JSON number drops trailing zeros (8.40 reads 8.4), which only makes this wider.
    (1e-3 * number(printed)).max(0.500_001 * 10f64.powi(-(places as i32)))
}

#[test]
fn golden_one_sided_average_run_lengths() {
    let file = golden();
    let rows = file["one_sided"].as_array().expect("one_sided");
    assert!(!rows.is_empty());
    for row in rows {
        let [k, h, mu] = ["k", "h", "mu"].map(|key| number(&row[key]));
        let got = RunLength::new(k, h, mu).expect("valid chart").average();
        assert!(
            (got - number(&row["arl"])).abs() <= tolerance(&row["arl"]),
            "k {k}, h {h}, mu {mu}: {got}, not {}",
            row["arl"]
        );
    }
}

#[test]
fn golden_two_sided_average_run_lengths() {
    let file = golden();
    let tables = file["two_sided"].as_array().expect("two_sided");
    assert!(!tables.is_empty());
    for table in tables {
        let [k, h] = ["k", "h"].map(|key| number(&table[key]));
        let (mu, arl) = (&table["mu"], &table["arl"]);
        let (mu, arl) = (mu.as_array().expect("mu"), arl.as_array().expect("arl"));
        assert!(mu.len() == arl.len() && !mu.is_empty());
        for (mu, arl) in mu.iter().zip(arl) {
            let got = two_sided_average(k, h, number(mu)).expect("valid chart");
            assert!(
                (got - number(arl)).abs() <= tolerance(arl),
                "k {k}, h {h}, mu {mu}: {got}, not {arl}"
            );
        }
    }
}

#[test]
fn golden_thresholds_for_a_horizon() {
    let file = golden();
    let table = &file["thresholds_for_horizon"];
    let k = number(&table["k"]);
    let rows = table["rows"].as_array().expect("rows");
    assert!(!rows.is_empty());
    for row in rows {
        let n = row["N"].as_u64().expect("N");
        let (alpha, want) = (number(&row["alpha"]), number(&row["h"]));
        let got = threshold_for_horizon(k, n, alpha, Sides::One).expect("exists");
        assert!(
            (got - want).abs() <= tolerance(&row["h"]),
            "N {n}, alpha {alpha}: {got}, not {want}"
        );
        // A chart that starts at zero signals a little less often, by what the way to its steady state takes.
        let from_zero = exact_threshold_for_horizon(k, n, alpha, Sides::One).expect("exists");
        let a = -(-alpha).ln_1p();
        let found = -RunLength::new(k, got, 0.0).expect("valid").survival(n).ln() / a;
        let (low, high) = ratio(k, got, n, a);
        assert!(
            from_zero < got && (low..=high).contains(&found),
            "N {n}, alpha {alpha}: {from_zero}, {got}, {found}, not {low} to {high}"
        );
        let cheap = siegmund_threshold_for_horizon(k, n, alpha).expect("exists");
        assert!(
            (cheap - want).abs() <= 0.02,
            "Siegmund, N {n}, alpha {alpha}: {cheap}"
        );
    }
}

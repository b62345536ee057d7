//! One setting, real training runs: quiet while the data do not change, prompt when they do.

use std::{env, fs, path::PathBuf};

use mass_cpd::{AnyDetector, CalibratedCusumParams, Detector};

/// The step at which the data change in the `late_` runs.
const CHANGE: usize = 1000;

struct Run {
    name: String,
    /// Gradient norm of each expert.
    norms: Vec<Vec<f64>>,
    loss: Option<Vec<f64>>,
}

impl Run {
    /// Frobenius norm of all experts' gradients together.
    fn pooled(&self) -> Vec<f64> {
        (0..self.norms[0].len())
            .map(|t| self.norms.iter().map(|n| n[t] * n[t]).sum::<f64>().sqrt())
            .collect()
    }

    /// The experts, the layer, the loss.
    fn streams(&self) -> usize {
        self.norms.len() + 2
    }
}

/// The runs whose file name begins with `prefix`.
fn runs(prefix: &str) -> Vec<Run> {
    let dir = env::var("MASS_DATA_DIR").expect("MASS_DATA_DIR names the folder of data");
    let dir = PathBuf::from(dir).join("gradient_norms");
    let listing = fs::read_dir(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    let mut runs: Vec<Run> = listing
        .map(|entry| entry.expect("readable folder").path())
        .filter(|path| path.extension().is_some_and(|e| e == "csv"))
        .filter_map(|path| {
            let name = path.file_stem()?.to_str()?.to_owned();
            name.starts_with(prefix).then(|| read(name, &path))
        })
        .collect();
    assert!(!runs.is_empty(), "no {prefix}*.csv in {}", dir.display());
    runs.sort_by(|a, b| a.name.cmp(&b.name));
    runs
}

fn read(name: String, path: &std::path::Path) -> Run {
    let text = fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut lines = text.lines();
    let header: Vec<&str> = lines.next().expect("a header").split(',').collect();
    let mut columns = vec![Vec::new(); header.len()];
    for line in lines {
        for (column, field) in columns.iter_mut().zip(line.split(',')) {
            column.push(
                field
                    .parse::<f64>()
                    .unwrap_or_else(|e| panic!("{name}: {field}: {e}")),
            );
        }
    }
    let mut run = Run {
        name,
        norms: Vec::new(),
        loss: None,
    };
    for (name, column) in header.into_iter().zip(columns) {
        if name == "loss" {
            run.loss = Some(column);
        } else if name.starts_with("norm_") {
            run.norms.push(column);
        }
    }
    run
}

/// The 0-based steps at which the detector alarms. A gradient of exactly zero (no token) is not an observation.
fn alarms(series: &[f64], streams: usize) -> Vec<usize> {
    let mut detector = AnyDetector::from(
        CalibratedCusumParams::training(streams)
            .check()
            .expect("the preset is valid"),
    );
    series
        .iter()
        .enumerate()
        .filter(|&(_, &x)| x != 0.0)
        .filter_map(|(t, &x)| detector.update(x).expect("a norm").alarm.then_some(t))
        .collect()
}

#[test]
fn runs_without_a_change_raise_at_most_one_alarm_over_all_experts() {
    for run in runs("K") {
        let found: Vec<Vec<usize>> = run.norms.iter().map(|n| alarms(n, run.streams())).collect();
        println!("{}: {found:?}", run.name);
        let after_200 = found.iter().flatten().filter(|&&t| t >= 200).count();
        assert!(after_200 <= 1, "{}: {found:?}", run.name);
        let pooled = alarms(&run.pooled(), run.streams());
        assert!(pooled.len() <= 1, "{}, pooled: {pooled:?}", run.name);
    }
}

#[test]
fn a_change_of_the_data_is_found_in_the_loss_within_5_steps_and_in_the_layer_within_25() {
    for run in runs("late") {
        let loss = run.loss.as_ref().expect("late runs have a loss");
        let found = alarms(loss, run.streams());
        let first = found.first().copied();
        assert!(
            first.is_some_and(|t| (CHANGE..=CHANGE + 5).contains(&t)),
            "{}, loss: {found:?}",
            run.name
        );
        let pooled = alarms(&run.pooled(), run.streams());
        let first = pooled.first().copied();
        assert!(
            first.is_some_and(|t| (CHANGE..=CHANGE + 25).contains(&t)),
            "{}, pooled: {pooled:?}",
            run.name
        );
        println!("{}: loss {found:?}, pooled {pooled:?}", run.name);
        for (e, norm) in run.norms.iter().enumerate() {
            println!("  expert {e}: {:?}", alarms(norm, run.streams()));
        }
    }
}

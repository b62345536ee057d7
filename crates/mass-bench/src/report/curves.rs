//! What was logged, over training steps.

use std::collections::{BTreeMap, HashMap};

use super::svg::{Chart, Draw, Point, Series, in_parts};
use super::{MetricLine, Results};

type Figure = fn(&MetricLine) -> Option<f64>;

/// A chart for each task and figure that was logged, with a line for each method and setting, the mean of its seeds.
pub(super) fn curves(results: &Results, metrics: &[MetricLine]) -> String {
    // GLUE's losses are means over examples.
    let [test, training] = match results.study.as_str() {
        "glue" | "labels" => [
            "Development loss",
            "Training loss (mean of neighbouring lines)",
        ],
        "dg" | "domains" => [
            "Loss on the target domain (where it was scored)",
            "Training loss (mean of neighbouring lines)",
        ],
        _ => [
            "Test loss, nats a token",
            "Training loss, nats a token (mean of neighbouring lines)",
        ],
    };
    // Whether the floor of the best possible predictor belongs to it.
    let charts: [(&str, Figure, bool); 7] = [
        (test, |m| m.test_loss, true),
        (
            "Validation loss, nats a token",
            |m| of(m, "validation_loss"),
            true,
        ),
        ("The task's metric", |m| of(m, "metric"), false),
        (
            "Accuracy on what the source domains hold out",
            |m| of(m, "source_validation"),
            false,
        ),
        (
            "Accuracy on the target domain (where it was scored)",
            |m| of(m, "target_accuracy"),
            false,
        ),
        (training, |m| m.train_loss, true),
        ("Experts a token", |m| m.active_per_token, false),
    ];
    let keys = Keys::of(results);
    let mut html = String::new();
    for (name, figure, floored) in charts {
        let values = metrics
            .iter()
            .map(|m| (m.run.as_str(), m.step, figure(m), 1));
        for (task, mut series) in series_of(&keys, values, true) {
            if name.starts_with("Training") {
                series.iter_mut().for_each(smooth);
            }
            html.push_str(&in_parts(Chart {
                floor: floor(results, task.as_deref()).filter(|_| floored),
                title: task.map_or(name.to_owned(), |task| format!("{name}: {task}")),
                x_label: "training step",
                series,
                ..Chart::default()
            }));
        }
    }
    html
}

/// The Bayes floor of a task, as a level.
pub(super) fn floor(results: &Results, task: Option<&str>) -> Option<(String, f64)> {
    let of_task = results.runs.iter().filter(|r| r.task.as_deref() == task);
    let floor = of_task.filter_map(|r| r.bayes_loss).reduce(f64::min)?;
    Some((format!("Bayes floor {floor:.3}"), floor))
}

/// A figure that one study alone has.
fn of(line: &MetricLine, name: &str) -> Option<f64> {
    line.extra.get(name).and_then(serde_json::Value::as_f64)
}

/// Which line of which task's plot a run belongs to.
#[derive(Default)]
pub(super) struct Keys {
    tasks: Vec<Option<String>>,
    /// Task and name.
    lines: Vec<(usize, String)>,
    /// Index of the line of each run.
    runs: HashMap<String, usize>,
}

impl Keys {
    pub(super) fn of(results: &Results) -> Self {
        let mut keys = Self::default();
        for run in &results.runs {
            let key = run.key();
            let task = index_of(&mut keys.tasks, key.task.clone());
            let text = key.to_string();
            let line = (task, key.over_tasks().without_seed());
            keys.runs.insert(text, index_of(&mut keys.lines, line));
        }
        keys
    }
}

/// Where a value stands, at the end if it is new.
fn index_of<T: PartialEq>(values: &mut Vec<T>, value: T) -> usize {
    values.iter().position(|v| *v == value).unwrap_or_else(|| {
        values.push(value);
        values.len() - 1
    })
}

/// For each task the lines of its methods, in the order of the results: means of values, each with its run, its place and how often it
/// counts; if `shared` is set, at the places that all seeds have.
///
/// Lines of a single point are left out: they would not show.
pub(super) fn series_of<'r>(
    keys: &Keys,
    values: impl Iterator<Item = (&'r str, u64, Option<f64>, usize)>,
    shared: bool,
) -> Vec<(Option<String>, Vec<Series>)> {
    // Of each line, at each place a sum and how many values it has.
    let mut sums: Vec<BTreeMap<u64, (f64, usize)>> = vec![BTreeMap::new(); keys.lines.len()];
    for (run, place, value, times) in values {
        let value = value.filter(|v| v.is_finite() && times > 0);
        if let (Some(value), Some(&at)) = (value, keys.runs.get(run)) {
            let sum = sums[at].entry(place).or_default();
            (sum.0, sum.1) = (sum.0 + value * times as f64, sum.1.saturating_add(times));
        }
    }
    let mut tasks: Vec<_> = keys.tasks.iter().map(|t| (t.clone(), Vec::new())).collect();
    for ((task, name), sums) in keys.lines.iter().zip(sums) {
        let seeds = sums.values().map(|s| s.1).max().unwrap_or(0);
        let kept = sums
            .into_iter()
            .filter(|(_, (_, n))| !shared || *n == seeds);
        let points: Vec<_> = kept
            .map(|(place, (sum, n))| (place as f64, sum / n as f64))
            .collect();
        if points.len() > 1 {
            let series = Series::new(name.clone(), Draw::Line, points.into_iter());
            tasks[*task].1.push(series);
        }
    }
    tasks
}

/// Means over a fiftieth of the line: single batches are noisy.
fn smooth(series: &mut Series) {
    let width = series.points.len() / 50;
    if width > 1 {
        let mean = |chunk: &[Point]| {
            let of = |figure: fn(&Point) -> f64| {
                chunk.iter().map(figure).sum::<f64>() / chunk.len() as f64
            };
            (of(|p| p.x), of(|p| p.y))
        };
        let name = std::mem::take(&mut series.name);
        *series = Series::new(name, Draw::Line, series.points.chunks(width).map(mean));
    }
}

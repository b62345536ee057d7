use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;

use super::{
    MetricLine, Results,
    svg::{Series, escape, line_plot},
    table::{cells, notes},
};

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;\
color:#222;background:#fff}table{border-collapse:collapse;margin:1rem 0}th,td{padding:.25rem .7rem;\
border-bottom:1px solid #ddd;text-align:left;font-variant-numeric:tabular-nums}svg{width:100%;height:auto}\
svg text{font-size:11px;fill:#333}svg .title{font-size:13px;font-weight:600}.grid{stroke:#e5e5e5}\
.level{stroke:#888;stroke-dasharray:4 3}pre{overflow-x:auto}";

/// report.html: the table, plots of loss and expert count over steps, every run. One file, no network.
///
/// `metrics` are the lines of metrics.jsonl, in any order. Each task has plots of its own, with a line for each method and
/// setting, the mean of its seeds.
#[must_use]
pub fn report_html(results: &Results, metrics: &[MetricLine]) -> String {
    let title = format!("{} ({})", results.study, results.preset);
    let mut html = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width\"><title>{0}</title>\
         <style>{STYLE}</style></head><body>\n<h1>{0}</h1>\n\
         <p>mass-bench {1}; {2}, {3} threads; {4} runs</p>\n",
        escape(&title),
        escape(&results.version),
        escape(&results.machine.cpu),
        results.machine.threads,
        results.runs.len()
    );
    let elsewhere: Vec<_> = results
        .runs
        .iter()
        .filter_map(|r| r.machine.as_ref())
        .collect();
    for (i, machine) in elsewhere.iter().enumerate() {
        if !elsewhere[..i].contains(machine) {
            let runs = elsewhere.iter().filter(|m| *m == machine).count();
            let (cpu, threads) = (escape(&machine.cpu), machine.threads);
            let _ = writeln!(
                html,
                "<p>{runs} of the runs on {cpu}, {threads} threads</p>"
            );
        }
    }
    let (header, rows) = cells(results);
    html.push_str(&html_table(&header, &rows));
    let notes = notes(results);
    if !notes.is_empty() {
        let _ = writeln!(html, "<pre>{}</pre>", escape(&notes.join("\n")));
    }

    type Figure = fn(&MetricLine) -> Option<f64>;
    // Whether the floor of the best possible predictor belongs to it.
    type Plot<'a> = (&'a str, Figure, bool);
    // GLUE's losses are means over examples.
    let [test, training] = match results.study.as_str() {
        "glue" => [
            "Development loss",
            "Training loss (mean of neighbouring lines)",
        ],
        "dg" => [
            "Loss on the target domain (where it was scored)",
            "Training loss (mean of neighbouring lines)",
        ],
        _ => [
            "Test loss, nats a token",
            "Training loss, nats a token (mean of neighbouring lines)",
        ],
    };
    let plots: [Plot<'_>; 7] = [
        (test, |m| m.test_loss, true),
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
        ("Experts", |m| m.experts.map(|e| e as f64), false),
        ("Experts a token", |m| m.active_per_token, false),
    ];
    let keys = Keys::of(results);
    for (name, figure, floored) in plots {
        for (task, mut series) in series_of(&keys, metrics, figure) {
            let of_task = results.runs.iter().filter(|r| floored && r.task == task);
            let floor = of_task.filter_map(|r| r.bayes_loss).reduce(f64::min);
            let level = floor.map(|floor| (format!("Bayes {floor:.3}"), floor));

            if name.starts_with("Training") {
                series.iter_mut().for_each(smooth);
            }
            let title = task.map_or(name.to_owned(), |task| format!("{name}: {task}"));
            let levels: Vec<_> = level.into_iter().collect();
            html.push_str(&line_plot(&title, "training step", &series, &levels));
        }
    }

    html.push_str("<h2>Runs</h2>\n");
    let header = [
        "run",
        "K",
        "k",
        "test loss",
        "metric",
        "expansions",
        "steps",
        "s",
        "tokens/s",
        "peak MiB",
    ];
    let show = |v: Option<f64>, digits: usize| v.map_or("".into(), |v| format!("{v:.digits$}"));
    let rows: Vec<Vec<String>> = results
        .runs
        .iter()
        .map(|r| {
            vec![
                r.key().to_string(),
                r.experts.map_or("".into(), |e| e.to_string()),
                show(r.active_per_token, 2),
                show(r.test_loss, 4),
                show(r.metric, 4),
                r.expansions.len().to_string(),
                r.steps.map_or("".into(), |s| s.to_string()),
                show(r.wall_s, 1),
                show(r.tokens_per_s, 0),
                show(r.peak_rss_mib, 0),
            ]
        })
        .collect();
    html.push_str(&html_table(&header.map(str::to_owned), &rows));
    html.push_str("</body></html>\n");
    html
}

/// A figure that one study alone has.
fn of(line: &MetricLine, name: &str) -> Option<f64> {
    line.extra.get(name).and_then(serde_json::Value::as_f64)
}

fn html_table(header: &[String], rows: &[Vec<String>]) -> String {
    let line = |cells: &[String], tag: &str| {
        let cells: Vec<String> = cells
            .iter()
            .map(|c| format!("<{tag}>{}</{tag}>", escape(c)))
            .collect();
        format!("<tr>{}</tr>\n", cells.concat())
    };
    let body: String = rows.iter().map(|row| line(row, "td")).collect();
    format!("<table>\n{}{body}</table>\n", line(header, "th"))
}

/// Which line of which task's plot a run belongs to.
struct Keys {
    tasks: Vec<Option<String>>,
    /// Task and name.
    lines: Vec<(usize, String)>,
    /// Index of the line of each run.
    runs: HashMap<String, usize>,
}

impl Keys {
    fn of(results: &Results) -> Self {
        let mut keys = Self {
            tasks: Vec::new(),
            lines: Vec::new(),
            runs: HashMap::new(),
        };
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

/// For each task the lines of its methods, in the order of the results: means over seeds, at the steps that all of them have.
///
/// Lines of a single point are left out: they would not show.
fn series_of(
    keys: &Keys,
    metrics: &[MetricLine],
    figure: fn(&MetricLine) -> Option<f64>,
) -> Vec<(Option<String>, Vec<Series>)> {
    // Of each line, at each step a sum and how many values it has.
    let mut sums: Vec<BTreeMap<u64, (f64, usize)>> = vec![BTreeMap::new(); keys.lines.len()];
    for line in metrics {
        let value = figure(line).filter(|v| v.is_finite());
        if let (Some(value), Some(&at)) = (value, keys.runs.get(&line.run)) {
            let sum = sums[at].entry(line.step).or_default();
            (sum.0, sum.1) = (sum.0 + value, sum.1 + 1);
        }
    }
    let mut tasks: Vec<_> = keys.tasks.iter().map(|t| (t.clone(), Vec::new())).collect();
    for ((task, name), sums) in keys.lines.iter().zip(sums) {
        let seeds = sums.values().map(|s| s.1).max().unwrap_or(0);
        let of_all = sums.into_iter().filter(|(_, (_, n))| *n == seeds);
        let points: Vec<_> = of_all
            .map(|(step, (sum, n))| (step as f64, sum / n as f64))
            .collect();
        if points.len() > 1 {
            let name = name.clone();
            tasks[*task].1.push(Series { name, points });
        }
    }
    tasks
}

/// Means over a fiftieth of the line: single batches are noisy.
fn smooth(series: &mut Series) {
    let width = series.points.len() / 50;
    if width > 1 {
        series.points = series
            .points
            .chunks(width)
            .map(|chunk| {
                let n = chunk.len() as f64;
                let sum = chunk.iter().fold((0.0, 0.0), |s, p| (s.0 + p.0, s.1 + p.1));
                (sum.0 / n, sum.1 / n)
            })
            .collect();
    }
}

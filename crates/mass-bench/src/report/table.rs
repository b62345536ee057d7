use std::collections::BTreeMap;

use mass_expand::{Diagnosis, Watched};

use super::by_method::{own, tests};
use super::elbow::{Elbow, elbows};
use super::paired::show_p;
use super::{
    Comparison, Expansion, OverTasks, Paired, Results, Run, Summary, over_tasks, reported,
};

/// Among a run's figures: how many damaged images its set was read without; absent where none was left out.
pub const LEFT_OUT: &str = "images_left_out";

/// The summary as aligned plain text, the paper's figures beside it and the Bayes floor below.
///
/// Columns that no row has a value for are left out.
#[must_use]
pub fn table(results: &Results) -> String {
    let (header, rows) = cells(results);
    let mut text = match rows.is_empty() {
        true => "No run is finished yet.\n".to_owned(),
        false => align(&header, &rows),
    };
    for note in notes(results) {
        text.push_str(&note);
        text.push('\n');
    }
    text
}

/// Header and rows of the summary table, without columns that are empty throughout.
pub(super) fn cells(results: &Results) -> (Vec<String>, Vec<Vec<String>>) {
    type Column = (&'static str, fn(&str, &Summary) -> String);
    let columns: [Column; 17] = [
        ("method", |_, s| s.method.clone()),
        ("variant", |_, s| s.variant.clone().unwrap_or_default()),
        ("setting", |_, s| s.setting.clone().unwrap_or_default()),
        ("task", |_, s| s.task.clone().unwrap_or_default()),
        ("K", |_, s| pool(s)),
        ("k", |_, s| match (s.k, s.active_per_token_mean) {
            (_, Some(mean)) => format!("{mean:.2}"),
            (Some(k), None) => k.to_string(),
            (None, None) => String::new(),
        }),
        ("test loss", |_, s| {
            plus_minus(s.test_loss_mean, s.test_loss_std, 3)
        }),
        // Beside the figure that it is of.
        ("paper", |study, s| paper(study, s, s.metric_mean.is_none())),
        ("accuracy", |_, s| {
            plus_minus(s.accuracy_mean, s.accuracy_std, 3)
        }),
        ("metric", |_, s| match &s.metric_name {
            Some(name) => format!("{} {name}", plus_minus(s.metric_mean, s.metric_std, 3)),
            None => plus_minus(s.metric_mean, s.metric_std, 3),
        }),
        ("paper", |study, s| paper(study, s, s.metric_mean.is_some())),
        ("live steps", |_, s| number(s.detection_live_steps_mean, 0)),
        ("JSD entity", |_, s| number(s.jsd_entity_mean, 2)),
        ("property", |_, s| number(s.jsd_property_mean, 2)),
        ("NMI", |_, s| number(s.nmi_mean, 2)),
        ("s/run", |_, s| number(s.wall_s_mean, 1)),
        ("n", |_, s| match s.judged {
            Some(judged) => format!("{judged} of {}", s.n),
            None => s.n.to_string(),
        }),
    ];
    let all: Vec<Vec<String>> = results
        .summary
        .iter()
        .map(|row| {
            columns
                .iter()
                .map(|(_, f)| f(&results.study, row))
                .collect()
        })
        .collect();
    let used: Vec<usize> = (0..columns.len())
        .filter(|&c| all.iter().any(|row| !row[c].is_empty()))
        .collect();
    let header = used.iter().map(|&c| columns[c].0.to_owned()).collect();
    let rows = all
        .iter()
        .map(|row| used.iter().map(|&c| row[c].clone()).collect())
        .collect();
    (header, rows)
}

/// What is said once below the table.
fn notes(results: &Results) -> Vec<String> {
    let mut notes = facts(results);
    let means = over_tasks(&results.study, &results.runs);
    notes.extend(means.iter().map(mean_over_tasks));
    notes.extend(results.comparisons.iter().flat_map(comparison));
    if let Some(count) = expansion_count(results) {
        notes.push(count);
    }
    let lines = |lines: Vec<(String, String)>| {
        lines
            .into_iter()
            .map(|(run, of_it)| format!("  {run}: {of_it}"))
    };
    notes.extend(lines(expansions(results)));
    notes.extend(lines(tests(&results.runs)));
    notes.extend(lines(own(results).1));
    let diagnoses = diagnoses(results);
    if !diagnoses.is_empty() {
        notes.push(DIAGNOSES.into());
    }
    notes.extend(lines(diagnoses));
    notes
}

/// What there is to say of all runs together.
pub(super) fn facts(results: &Results) -> Vec<String> {
    let mut facts = Vec::new();
    if let Some(part) = &results.part {
        facts.push(format!(
            "Only a part of the study: {part}, {} of {} runs. All figures above and below are of these alone; \
             `cargo xtask report DIR...` joins shards.",
            results.runs.len(),
            part.planned()
        ));
    }
    let floors: Vec<f64> = results.runs.iter().filter_map(|r| r.bayes_loss).collect();
    let least = floors.iter().copied().fold(f64::INFINITY, f64::min);
    let most = floors.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if least.is_finite() {
        let floor = match format!("{least:.3}") {
            same if same == format!("{most:.3}") => same,
            low => format!("{low} to {most:.3}"),
        };
        facts.push(format!("Bayes floor (no model can do better): {floor}"));
    }
    facts.extend(elbows(results).iter().map(Elbow::to_string));
    let mut left_out = BTreeMap::new();
    for run in &results.runs {
        if let (Some(task), Some(files)) = (&run.task, run.metrics.get(LEFT_OUT)) {
            let set = task.split('/').next().unwrap_or(task);
            left_out.insert(set, *files);
        }
    }
    for (set, files) in left_out {
        facts.push(format!("Damaged images left out of {set}: {files}"));
    }
    facts
}

/// How many splits there were, in a study whose detectors could have set some off.
pub(super) fn expansion_count(results: &Results) -> Option<String> {
    let live = |r: &Run| r.detection_live_steps.is_some();
    let expansions: usize = results.runs.iter().map(|r| r.expansions.len()).sum();
    let any = results.runs.iter().any(live);
    any.then(|| format!("Expansions in all runs (expert -> newcomer): {expansions}"))
}

/// The splits of each run that has some.
pub(super) fn expansions(results: &Results) -> Vec<(String, String)> {
    let runs = results.runs.iter().filter(|r| !r.expansions.is_empty());
    let layered = runs
        .clone()
        .flat_map(|r| &r.expansions)
        .any(|e| e.layer > 0);
    runs.map(|run| {
        let list: Vec<String> = run
            .expansions
            .iter()
            .map(|e| {
                let p = e
                    .p_value
                    .map_or_else(String::new, |p| format!(" p {p:.2e}"));
                let layer = match layered {
                    true => format!(", layer {}", e.layer),
                    false => String::new(),
                };
                format!(
                    "step {}{layer}: {} -> {}{p}{}",
                    e.step,
                    e.source,
                    e.new,
                    cause(e)
                )
            })
            .collect();
        (run.key().to_string(), list.join("; "))
    })
    .collect()
}

/// What stands above [`diagnoses`].
pub(super) const DIAGNOSES: &str = "Diagnoses (known ways to fail that the controller saw):";

/// What the controllers of growing pools have found wrong, by run.
pub(super) fn diagnoses(results: &Results) -> Vec<(String, String)> {
    let of_run = |run: &Run| {
        let key = run.key().to_string();
        let with_key = move |d: &Diagnosis| (key.clone(), d.to_string());
        run.diagnoses.iter().map(with_key).collect::<Vec<_>>()
    };
    results.runs.iter().flat_map(of_run).collect()
}

/// " (loss)", " (expert 4)": the stream whose alarm set a split off.
fn cause(e: &Expansion) -> String {
    match (e.watched, e.flagged) {
        (None, _) => String::new(),
        (Some(Watched::Loss), _) => " (loss)".into(),
        (Some(Watched::Layer), _) => " (layer)".into(),
        (Some(Watched::Expert), Some(expert)) => format!(" (expert {expert})"),
        (Some(Watched::Expert), None) => " (expert)".into(),
    }
}

/// "2.15 (K 12.4, k 3.9)", "0.656 (K 9.5 to 12.7, k 2.6 to 3.2)"; nothing of a figure that another column has.
fn paper(study: &str, row: &Summary, here: bool) -> String {
    let Some(reported) = reported(study, row).filter(|_| here) else {
        return String::new();
    };
    let range = |name: &str, (low, high): (f64, f64)| {
        if low == high {
            format!("{name} {low}")
        } else {
            format!("{name} {low} to {high}")
        }
    };
    let of = [
        reported.experts.map(|r| range("K", r)),
        reported.active_per_token.map(|r| range("k", r)),
    ];
    let of: Vec<String> = of.into_iter().flatten().collect();
    // Four digits of a fraction are two of the percentage that it was printed as.
    let figure = (reported.figure * 1e4).round() / 1e4;
    if of.is_empty() {
        figure.to_string()
    } else {
        format!("{figure} ({})", of.join(", "))
    }
}

/// "5 -> 12" of a pool that may grow, "10" of one that did not.
fn pool(row: &Summary) -> String {
    match (row.experts_init, row.experts_mean) {
        (Some(from), Some(to)) if to != from as f64 => format!("{from} -> {}", trimmed(to)),
        (_, Some(to)) => trimmed(to),
        (Some(from), None) => from.to_string(),
        (None, None) => String::new(),
    }
}

/// "mass/ours against dynmoe: +0.0120 [-0.0110, +0.0350] over 9 pairs (t 1.20, p 0.26; 6 won, 1 tied, 2 lost, sign test p
/// 0.29)", and before it the means over tasks where there are some: "mass/ours against dynmoe, means over tasks: +0.0120 ...
/// over 3 seeds (...)".
fn comparison(c: &Comparison) -> Vec<String> {
    let of_set = match c.set.as_str() {
        "" => String::new(),
        set => format!(", of {set}"),
    };
    let passed_over = match c.passed_over.as_slice() {
        [] => String::new(),
        some => format!("; better on fewer pairs: {}", some.join(", ")),
    };
    let line = |what: &str, of: &str, p: &Paired| {
        let t = match (p.t, p.p_value) {
            (Some(t), Some(p)) => format!("t {t:.2}, p {}; ", show_p(p)),
            _ => String::new(),
        };
        let interval = p.interval.map_or_else(String::new, |[low, high]| {
            format!(" [{low:+.4}, {high:+.4}]")
        });
        format!(
            "{} against {}{of_set}{what}: {:+.4}{interval} over {} {of} ({t}{} won, {} tied, {} lost, sign test p {}){passed_over}",
            c.method,
            c.against,
            p.mean_difference,
            p.n,
            p.wins,
            p.ties,
            p.losses,
            show_p(p.sign_p_value)
        )
    };
    let by_seed = c.by_seed.as_ref();
    by_seed
        .map(|p| line(", means over tasks", "seeds", p))
        .into_iter()
        .chain([line("", "pairs", &c.paired)])
        .collect()
}

/// "dense over CoLA, RTE: 0.412 ± 0.010 (3 seeds; the paper reports 0.7)".
fn mean_over_tasks(m: &OverTasks) -> String {
    let paper = m.reported.map_or_else(String::new, |figure| {
        format!("; the paper reports {}", (figure * 1e4).round() / 1e4)
    });
    format!(
        "{} over {}: {} ({} seeds{paper})",
        m.method,
        m.tasks.join(", "),
        plus_minus(Some(m.mean), m.std, 3),
        m.seeds
    )
}

/// "12" or "12.4".
fn trimmed(value: f64) -> String {
    let text = format!("{value:.1}");
    text.strip_suffix(".0").map_or(text.clone(), str::to_owned)
}

pub(super) fn number(value: Option<f64>, digits: usize) -> String {
    value.map_or_else(String::new, |v| format!("{v:.digits$}"))
}

pub(super) fn plus_minus(mean: Option<f64>, std: Option<f64>, digits: usize) -> String {
    match (mean, std) {
        (Some(mean), Some(std)) => format!("{mean:.digits$} ± {std:.digits$}"),
        (mean, _) => number(mean, digits),
    }
}

/// Left-aligned columns two spaces apart, a rule below the header.
fn align(header: &[String], rows: &[Vec<String>]) -> String {
    let width = |c: usize| {
        let cells = rows.iter().map(|row| row[c].chars().count());
        cells.chain([header[c].chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let line = |cells: &[String]| {
        let padded: Vec<String> = cells
            .iter()
            .zip(&widths)
            .map(|(cell, &w)| format!("{cell:<w$}"))
            .collect();
        format!("{}\n", padded.join("  ").trim_end())
    };
    let rule: Vec<String> = widths.iter().map(|&w| "-".repeat(w)).collect();
    let mut text = line(header);
    text.push_str(&line(&rule));
    for row in rows {
        text.push_str(&line(row));
    }
    text
}

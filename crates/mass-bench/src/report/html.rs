use std::path::Path;

use super::curves::curves;
use super::frontier::{frontier, picture};
use super::growth::{Drawn, by_run, growth, pairs, traces, usage};
use super::paired::show_p;
use super::store::write_atomically;
use super::svg::{breakable, escape};
use super::table::{
    DIAGNOSES, cells, diagnoses, expansion_count, expansions, facts, number, plus_minus,
};
use super::{Comparison, MetricLine, Paired, ReportError, Results, by_method, over_tasks};

/// What keeps the page from asking for anything.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'";

/// Writes report.html and frontier.svg.
///
/// # Errors
/// [`ReportError`] if they cannot be written.
pub(super) fn write_reports(
    dir: &Path,
    results: &Results,
    metrics: &[MetricLine],
    events: &[Drawn],
) -> Result<(), ReportError> {
    let html = report_html(results, metrics, events);
    write_atomically(&dir.join("report.html"), &html)?;
    match picture(results, STYLE) {
        Some(picture) => write_atomically(&dir.join("frontier.svg"), &picture),
        None => Ok(()),
    }
}

/// report.html: tables beside the paper's figures, and charts. One file without a script, that asks no network for anything and is
/// read on a telephone as on a wide screen.
///
/// `metrics` are the lines of metrics.jsonl, in any order, `events` those of events.jsonl.
fn report_html(results: &Results, metrics: &[MetricLine], events: &[Drawn]) -> String {
    let title = escape(&format!("{} ({})", results.study, results.preset));
    let events = by_run(events);
    let charts = [
        ("Frontier", FRONTIER, frontier(results)),
        ("Pools over time", GROWTH, growth(results, &events)),
        ("Detectors", DETECTORS, traces(results, &events)),
        ("Pairs", PAIRS, pairs(results)),
        ("Specialisation", SPECIALISATION, usage(results)),
        ("Curves", CURVES, curves(results, metrics)),
    ];
    let mut parts = vec![("Results", summary(results))];
    for (name, about, figures) in charts {
        if !figures.is_empty() {
            let figures = format!("<p>{about}</p>\n<div class=\"figures\">\n{figures}</div>\n");
            parts.push((name, figures));
        }
    }
    parts.push(("Runs", runs(results)));
    let id = |name: &str| name.to_lowercase().replace(' ', "-");
    let links = parts
        .iter()
        .map(|(name, _)| format!("<a href=\"#{}\">{name}</a>\n", id(name)));
    let links: String = links.collect();
    let part = |(name, html): &(&str, String)| {
        format!(
            "<section id=\"{}\">\n<h2>{name}</h2>\n{html}</section>\n",
            id(name)
        )
    };
    let body: String = parts.iter().map(part).collect();
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"{POLICY}\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n<title>{title}</title>\n\
         <style>\n{STYLE}</style>\n</head>\n<body>\n<header>\n<h1>{title}</h1>\n{}</header>\n\
         <nav aria-label=\"Contents\">\n{links}</nav>\n<main>\n{body}</main>\n</body>\n</html>\n",
        made(results)
    )
}

/// What the columns of the first table are.
const LEGEND: &str = "<p>K: experts, start -> end. k: experts that a token has. Live steps: those in which a split could be \
    triggered. JSD: divergence of the experts' shares between entities, and between properties. NMI: what experts tell of hidden \
    states, 0 to 1. s/run: seconds. n: seeds; &plusmn; is the standard deviation over them.</p>\n";

const STYLE: &str = include_str!("report.css");

const FRONTIER: &str =
    "Means over seeds with standard deviations. Points of one place stand beside each other.";
const GROWTH: &str =
    "The first seed of each method whose pool changes, with the events of its layer.";
const DETECTORS: &str = "What the detector behind each split had for a statistic around it, in the first seed of each method.";
const PAIRS: &str = "What the two halves of a split have in common, by the steps since: means over pairs and seeds.";
const SPECIALISATION: &str =
    "Which experts (rows) the slots of each entity and of each property (columns) went to.";
const CURVES: &str = "Means over seeds.";

/// By what, where, and how much.
fn made(results: &Results) -> String {
    let machine = &results.machine;
    let mut html = format!(
        "<p>mass-bench {}; {}; {} run{}</p>\n",
        escape(&results.version),
        escape(&machine.to_string()),
        results.runs.len(),
        if results.runs.len() == 1 { "" } else { "s" }
    );
    let elsewhere = results.runs.iter().filter_map(|r| r.machine.as_ref());
    let elsewhere: Vec<_> = elsewhere.collect();
    for (i, machine) in elsewhere.iter().enumerate() {
        if !elsewhere[..i].contains(machine) {
            let runs = elsewhere.iter().filter(|m| *m == machine).count();
            let machine = escape(&machine.to_string());
            html += &format!("<p>{runs} of the runs on {machine}</p>\n");
        }
    }
    html
}

/// The table of means, what there is to say of it, means over tasks, and comparisons.
fn summary(results: &Results) -> String {
    let (mut header, mut rows) = cells(results);
    // What tells rows apart is one column here, which stays when the others are scrolled: a telephone has no room for three.
    let apart = header
        .iter()
        .take_while(|name| ["method", "variant", "setting"].contains(&name.as_str()));
    let apart = apart.count();
    let mut html = "<p>No run is finished yet.</p>\n".to_owned();
    if !rows.is_empty() {
        if apart == 0 {
            header.insert(0, "method".into());
        }
        header.drain(1..apart.max(1));
        for row in &mut rows {
            let name: Vec<String> = row.drain(..apart).filter(|part| !part.is_empty()).collect();
            row.insert(0, name.join("/"));
        }
        html = table("Means over seeds", &header, &rows) + LEGEND;
    }
    let facts: String = facts(results)
        .iter()
        .map(|f| format!("<li>{}</li>\n", escape(f)))
        .collect();
    if !facts.is_empty() {
        html += &format!("<ul>\n{facts}</ul>\n");
    }
    let means = over_tasks(&results.study, &results.runs);
    if !means.is_empty() {
        let header = ["method", "mean over tasks", "paper", "seeds", "tasks"].map(str::to_owned);
        let row = |m: &super::OverTasks| {
            vec![
                m.method.clone(),
                plus_minus(Some(m.mean), m.std, 3),
                number(m.reported, 3),
                m.seeds.to_string(),
                m.tasks.join(", "),
            ]
        };
        html += &table(
            "Means over tasks",
            &header,
            &means.iter().map(row).collect::<Vec<_>>(),
        );
    }
    if !results.comparisons.is_empty() {
        html += &comparisons(&results.comparisons);
    }
    html
}

fn comparisons(comparisons: &[Comparison]) -> String {
    let header = [
        "method",
        "against",
        "pairs of",
        "difference",
        "95 % interval",
        "t",
        "p",
        "won",
        "tied",
        "lost",
        "sign test p",
        "n",
    ];
    let row = |c: &Comparison, of: &str, p: &Paired| {
        let interval = p
            .interval
            .map(|[low, high]| format!("{low:+.4} to {high:+.4}"));
        vec![
            c.method.clone(),
            c.against.clone(),
            match c.set.as_str() {
                "" => of.to_owned(),
                set => format!("{of} of {set}"),
            },
            format!("{:+.4}", p.mean_difference),
            interval.unwrap_or_default(),
            number(p.t, 2),
            p.p_value.map_or_else(String::new, show_p),
            p.wins.to_string(),
            p.ties.to_string(),
            p.losses.to_string(),
            show_p(p.sign_p_value),
            p.n.to_string(),
        ]
    };
    let rows = comparisons.iter().flat_map(|c| {
        let by_seed = c.by_seed.as_ref().map(|p| row(c, "means over tasks", p));
        by_seed.into_iter().chain([row(c, "runs", &c.paired)])
    });
    let name = "Paired comparisons by the task's metric";
    table(name, &header.map(str::to_owned), &rows.collect::<Vec<_>>())
}

/// Every run, its splits and what was found wrong with it.
fn runs(results: &Results) -> String {
    let header = [
        "run",
        "K",
        "k",
        "test loss",
        "metric",
        "splits",
        "steps",
        "s",
        "tokens/s",
        "peak MiB",
    ];
    let rows = results.runs.iter().map(|r| {
        vec![
            r.key().to_string(),
            r.experts.map_or(String::new(), |e| e.to_string()),
            number(r.active_per_token, 2),
            number(r.test_loss, 4),
            number(r.metric, 4),
            r.expansions.len().to_string(),
            r.steps.map_or(String::new(), |s| s.to_string()),
            number(r.wall_s, 1),
            number(r.tokens_per_s, 0),
            number(r.peak_rss_mib, 0),
        ]
    });
    let mut html = table(
        "Every run",
        &header.map(str::to_owned),
        &rows.collect::<Vec<_>>(),
    );
    for (name, lines) in [
        (
            expansion_count(results).unwrap_or_else(|| "Expansions".into()),
            expansions(results),
        ),
        (
            "Alarms and alignment tests".into(),
            by_method::tests(&results.runs),
        ),
        by_method::own(results),
        (
            DIAGNOSES.trim_end_matches(':').to_owned(),
            diagnoses(results),
        ),
    ] {
        if !lines.is_empty() {
            let line = |(run, of_it): &(String, String)| {
                format!("<dt>{}</dt><dd>{}</dd>\n", escape(run), escape(of_it))
            };
            let lines: String = lines.iter().map(line).collect();
            html += &format!(
                "<details>\n<summary>{}</summary>\n<dl>\n{lines}</dl>\n</details>\n",
                escape(&name)
            );
        }
    }
    html
}

/// A table that scrolls within a box of its own; columns of numbers are set flush right.
fn table(caption: &str, header: &[String], rows: &[Vec<String>]) -> String {
    let is_number = |cell: &String| {
        cell.is_empty() || cell.starts_with(|c: char| c.is_ascii_digit() || "+-".contains(c))
    };
    let numbers: Vec<bool> = (0..header.len())
        .map(|c| rows.iter().all(|row| is_number(&row[c])))
        .collect();
    let class = |c: usize| if numbers[c] { " class=\"n\"" } else { "" };
    let head: String = (0..header.len())
        .map(|c| format!("<th scope=\"col\"{}>{}</th>", class(c), escape(&header[c])))
        .collect();
    let row = |row: &Vec<String>| {
        let cells = row.iter().enumerate().skip(1);
        let cells: String = cells
            .map(|(c, cell)| format!("<td{}>{}</td>", class(c), escape(cell)))
            .collect();
        format!(
            "<tr><th scope=\"row\"><span>{}</span></th>{cells}</tr>\n",
            breakable(&row[0])
        )
    };
    let body: String = rows.iter().map(row).collect();
    let caption = escape(caption);
    format!(
        "<div class=\"scroll\" role=\"region\" aria-label=\"{caption}\" tabindex=\"0\">\n<table>\n<caption>{caption}</caption>\n\
         <thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n</div>\n"
    )
}

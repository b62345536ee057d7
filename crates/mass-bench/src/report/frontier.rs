//! What experts buy: loss against how many there are, and against how many a token uses.

use super::curves::floor;
use super::elbow::{by_metric, elbows};
use super::svg::{Chart, Draw, Point, Series};
use super::{Results, RunKey, Summary};

/// Two charts for each task, with a point for each method and setting.
pub(super) fn frontier(results: &Results) -> String {
    let mut html = String::new();
    for task in tasks(results) {
        let rows = results.summary.iter().filter(|s| s.task == task);
        let rows: Vec<&Summary> = rows.collect();
        for by_experts in [true, false] {
            html.push_str(&chart(results, task.as_deref(), &rows, by_experts).figure());
        }
    }
    html
}

/// Loss against the number of experts as a picture of its own, of the first task.
pub(super) fn picture(results: &Results, style: &str) -> Option<String> {
    let task = tasks(results).into_iter().next()?;
    let rows = results.summary.iter().filter(|s| s.task == task);
    let rows: Vec<&Summary> = rows.collect();
    chart(results, task.as_deref(), &rows, true).picture(style)
}

/// The tasks of all rows, in their order; of runs that have none, that.
fn tasks(results: &Results) -> Vec<Option<String>> {
    let mut tasks: Vec<Option<String>> = Vec::new();
    for row in &results.summary {
        if !tasks.contains(&row.task) {
            tasks.push(row.task.clone());
        }
    }
    tasks
}

/// What of a row is drawn: x, if it has experts, with the figure and its deviation.
fn place(row: &Summary, by_metric: bool, by_experts: bool) -> Option<(Option<f64>, Point)> {
    let x = if by_experts {
        row.experts_mean
    } else {
        row.active_per_token_mean
    };
    let (mean, std) = match by_metric {
        true => (row.metric_mean, row.metric_std),
        false => (row.test_loss_mean, row.test_loss_std),
    };
    let x = x.filter(|x| *x > 0.0);
    let bar = std.unwrap_or(0.0);
    Some((
        x,
        Point {
            x: x.unwrap_or(0.0),
            y: mean?,
            bar,
        },
    ))
}

fn chart<'a>(
    results: &Results,
    task: Option<&str>,
    rows: &[&Summary],
    by_experts: bool,
) -> Chart<'a> {
    let by_metric = by_metric(results);
    let figure = match (
        by_metric,
        rows.iter().find_map(|r| r.metric_name.as_deref()),
    ) {
        (true, Some(name)) => {
            let mut letters = name.chars();
            let first = letters.next().into_iter().flat_map(char::to_uppercase);
            first.chain(letters).collect()
        }
        (true, None) => "Metric".to_owned(),
        _ => "Loss".to_owned(),
    };
    let of_task = task.map_or(String::new(), |task| format!(": {task}"));
    let (against, x_label) = match by_experts {
        true => ("the number of experts", "experts K"),
        false => ("active experts a token", "active experts a token k"),
    };
    let mut chart = Chart {
        title: format!("{figure} against {against}{of_task}"),
        x_label,
        floor: floor(results, task).filter(|_| !by_metric),
        ..Chart::default()
    };
    for row in rows {
        let Some((x, point)) = place(row, by_metric, by_experts) else {
            continue;
        };
        let fixed = row.method == "static";
        let key = RunKey {
            method: row.method.clone(),
            variant: row.variant.clone(),
            setting: row.setting.clone(),
            task: None,
            // Pools of one routing are joined over K, those of one K over k.
            experts_init: row
                .experts_init
                .filter(|_| !fixed || (!by_experts && row.k.is_some())),
            k: row.k.filter(|_| !fixed || by_experts),
            seed: 0,
        };
        let name = key.without_seed();
        if x.is_none() {
            chart
                .levels
                .push((format!("{name} {:.3}", point.y), point.y));
            continue;
        }
        let draw = match fixed && (by_experts || row.k.is_some()) {
            true => Draw::Joined,
            false => Draw::Markers,
        };
        match chart.series.iter_mut().find(|s| s.name == name) {
            Some(series) => series.points.push(point),
            None => chart.series.push(Series {
                name,
                draw,
                points: vec![point],
            }),
        }
    }
    for series in &mut chart.series {
        series.points.sort_by(|a, b| a.x.total_cmp(&b.x));
    }
    // How many series static pools are differs between the two charts: after all others they change no one's colour.
    chart.series.sort_by_key(|s| s.name.starts_with("static"));
    let (least, most) = chart.x_span();
    chart.log2 = !by_experts && most > 2.5 * least;
    if by_experts {
        for elbow in elbows(results)
            .iter()
            .filter(|e| e.is_one() && e.pools.task.as_deref() == task)
        {
            let pools = RunKey {
                task: None,
                ..elbow.pools.clone()
            };
            let name = pools.without_seed();
            let series = chart.series.iter().find(|s| s.name == name);
            let at = |p: &&Point| p.x == elbow.experts as f64;
            if let Some(point) = series.and_then(|s| s.points.iter().find(at)) {
                chart
                    .rings
                    .push((format!("{name}: {}", elbow.short()), *point));
            }
        }
    }
    chart
}

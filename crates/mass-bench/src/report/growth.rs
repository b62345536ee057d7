//! Charts of events: how pools grow.

use std::collections::{BTreeSet, HashMap};

use serde::Deserialize;

use super::summary::groups;
use super::svg::{Chart, Draw, Point, Series};
use super::{Results, Run};

/// What of a line of events.jsonl is drawn, whatever wrote it.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(super) struct Drawn {
    pub(super) run: String,
    step: u64,
    layer: Option<usize>,
    kind: String,
    /// Experts of the layer afterwards.
    experts: Option<usize>,
}

/// The events of a file that are drawn; what is not readable is left out.
pub(super) fn drawn<'l>(lines: impl Iterator<Item = &'l str>) -> Vec<Drawn> {
    const KINDS: [&str; 4] = ["split", "add", "remove", "stop"];
    let events = lines.flat_map(serde_json::from_str);
    events
        .filter(|e: &Drawn| KINDS.contains(&e.kind.as_str()))
        .collect()
}

/// Events by the name of their run.
pub(super) type ByRun<'e> = HashMap<&'e str, Vec<&'e Drawn>>;

pub(super) fn by_run(events: &[Drawn]) -> ByRun<'_> {
    let mut by_run = ByRun::new();
    for event in events {
        by_run.entry(&event.run).or_default().push(event);
    }
    by_run
}

/// A chart of each method with events: the pool of its first seed with the events on it, and those of its other seeds behind it; of
/// several mixture layers, those of the first seed alone.
pub(super) fn growth(results: &Results, events: &ByRun<'_>) -> String {
    let mut html = String::new();
    for (key, runs) in groups(&results.runs) {
        let of = |run: &Run| events.get(run.key().to_string().as_str());
        if runs.iter().all(|run| of(run).is_none()) {
            continue;
        }
        let events = |run: &Run| of(run).map_or(&[][..], Vec::as_slice);
        let layers: BTreeSet<usize> = runs
            .iter()
            .flat_map(|r| events(r))
            .filter_map(|e| e.layer)
            .collect();
        let layers = if layers.is_empty() {
            BTreeSet::from([0])
        } else {
            layers
        };
        let mut chart = Chart {
            title: key.without_seed(),
            x_label: "training step",
            counts: true,
            ..Chart::default()
        };
        let one_layer = layers.len() == 1;
        for (place, run) in runs.iter().enumerate().rev() {
            for &layer in layers.iter().filter(|_| one_layer || place == 0) {
                let Some((steps, signs)) = pool(run, events(run), layer) else {
                    continue;
                };
                let (draw, name) = match (place, one_layer) {
                    (0, true) => (Draw::Steps, format!("seed {}", run.seed)),
                    (0, false) => (
                        Draw::Steps,
                        format!("mixture layer {layer}, seed {}", run.seed),
                    ),
                    _ => (Draw::Faint, "other seeds".to_owned()),
                };
                chart
                    .series
                    .push(Series::new(name, draw, steps.into_iter()));
                if place == 0 {
                    chart.signs.extend(signs);
                }
            }
        }
        html.push_str(&chart.figure());
    }
    html
}

type Signs = Vec<(&'static str, Point)>;

/// The pool of a layer over steps, and signs of what happened to it.
fn pool(run: &Run, events: &[&Drawn], layer: usize) -> Option<(Vec<(f64, f64)>, Signs)> {
    let mut experts = run.experts_init? as f64;
    let mut steps = vec![(0.0, experts)];
    let mut signs = Signs::new();
    for event in events.iter().filter(|e| e.layer.is_none_or(|l| l == layer)) {
        let x = event.step as f64;
        if let Some(after) = event.experts {
            experts = after as f64;
            steps.push((x, experts));
        }
        let sign = match event.kind.as_str() {
            "split" | "add" => "split",
            "remove" => "removal",
            _ => "end of expansion",
        };
        signs.push((
            sign,
            Point {
                x,
                y: experts,
                bar: 0.0,
            },
        ));
    }
    steps.push((
        run.steps.unwrap_or(0).max(steps[steps.len() - 1].0 as u64) as f64,
        experts,
    ));
    Some((steps, signs))
}

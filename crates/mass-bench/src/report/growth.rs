//! Charts of pools: how they grow, what detectors saw of it, what becomes of pairs, and which experts took what.

use std::collections::{BTreeSet, HashMap};

use mass_expand::Watched;
use serde::Deserialize;

use super::curves::{Keys, series_of};
use super::summary::groups;
use super::svg::{Chart, Draw, Point, Series, heat_maps, in_parts};
use super::{PairMeans, Results, Run};
use crate::method::TRACE;

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
    /// Of a split and of what detectors saw.
    watched: Option<Watched>,
    expert: Option<usize>,
    flagged: Option<usize>,
    source: Option<usize>,
    new: Option<usize>,
    statistic: Option<f64>,
}

/// Events of a pool's size.
const POOL: [&str; 4] = ["split", "add", "remove", "stop"];

/// Events of what a detector saw.
const SEEN: &str = "observation";

/// The events of a file that are drawn; what is not readable is left out.
pub(super) fn drawn<'l>(lines: impl Iterator<Item = &'l str>) -> Vec<Drawn> {
    let is_known = |kind: &str| kind == SEEN || POOL.contains(&kind);
    // Most lines are of alarms and tests, which are not worth parsing.
    let may_be = |line: &&str| line.split('"').any(is_known);
    let events = lines.filter(may_be).flat_map(serde_json::from_str);
    events.filter(|e: &Drawn| is_known(&e.kind)).collect()
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
        let events = |run: &Run| -> Vec<&Drawn> {
            let all = events
                .get(run.key().to_string().as_str())
                .into_iter()
                .flatten();
            all.copied()
                .filter(|e| POOL.contains(&e.kind.as_str()))
                .collect()
        };
        if runs.iter().all(|run| events(run).is_empty()) {
            continue;
        }
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
                let Some((steps, signs)) = pool(run, &events(run), layer) else {
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

/// A chart for each run whose detectors are in the record: their statistics around every split.
pub(super) fn traces(results: &Results, events: &ByRun<'_>) -> String {
    let mut html = String::new();
    for run in &results.runs {
        let key = run.key().to_string();
        let of_run = events.get(key.as_str()).map_or(&[][..], Vec::as_slice);
        let of_kind = |kind: &'static str| of_run.iter().filter(move |e| e.kind == kind);
        let trace = |split: &&&Drawn| {
            let points = of_kind(SEEN)
                .filter(|seen| seen.is_of(split))
                .filter_map(|seen| {
                    let offset = seen.step as f64 - split.step as f64;
                    Some((offset, seen.statistic?))
                });
            let [source, new] =
                [split.source, split.new].map(|e| e.map_or("?".to_owned(), |e| e.to_string()));
            let name = format!(
                "step {}: {source} \u{2192} {new}{}",
                split.step,
                split.stream()
            );
            Series::new(name, Draw::Line, points)
        };
        let mut series: Vec<Series> = of_kind("split").map(|split| trace(&split)).collect();
        series.retain(|series| series.points.len() > 1);
        html.push_str(&in_parts(Chart {
            title: key,
            x_label: "steps from the split",
            series,
            origin: true,
            ..Chart::default()
        }));
    }
    html
}

impl Drawn {
    /// Whether this was seen around a split, of the stream behind it: of its alarm, or of whatever is in the record.
    fn is_of(&self, split: &Self) -> bool {
        let stream = match split.watched {
            Some(_) => (self.watched, self.expert) == (split.watched, split.flagged),
            None => self.expert.is_none() || self.expert == split.source,
        };
        let layer = self.layer.is_none() || self.layer == split.layer;
        stream && layer && self.step.abs_diff(split.step) <= TRACE
    }

    /// " (expert 4)", " (loss)": what set a split off.
    fn stream(&self) -> String {
        match (self.watched, self.flagged) {
            (Some(Watched::Expert), Some(expert)) => format!(" (expert {expert})"),
            (Some(Watched::Layer), _) => " (layer)".to_owned(),
            (Some(Watched::Loss), _) => " (loss)".to_owned(),
            _ => String::new(),
        }
    }
}

/// Charts for each task of what the halves of splits have in common as they grow older, a line for each method.
pub(super) fn pairs(results: &Results) -> String {
    type Figure = fn(&PairMeans) -> Option<f64>;
    let charts: [(&str, Figure); 5] = [
        ("Source's gradient and weights, |cosine|", |m| {
            m.source_alignment
        }),
        ("Newcomer's gradient and weights, |cosine|", |m| {
            m.new_alignment
        }),
        ("Overlap of the pair's routing", |m| m.routing_overlap),
        ("Newcomer's part of the pair's tokens", |m| m.new_share),
        ("Gates of the pair, cosine", |m| m.gate_cosine),
    ];
    let keys = Keys::of(results);
    let named: Vec<(String, &Run)> = results
        .runs
        .iter()
        .map(|r| (r.key().to_string(), r))
        .collect();
    let mut html = String::new();
    for (name, figure) in charts {
        // A mean counts as often as it has pairs.
        let values = named.iter().flat_map(|(run, r)| {
            let means = r.pairs.iter();
            means.map(move |m| (run.as_str(), m.age, figure(m), m.pairs))
        });
        for (task, series) in series_of(&keys, values, false) {
            html.push_str(&in_parts(Chart {
                title: task.map_or(name.to_owned(), |task| format!("{name}: {task}")),
                x_label: "steps since the split",
                series,
                log2: true,
                ..Chart::default()
            }));
        }
    }
    html
}

/// Which experts took what, for each run that was counted.
pub(super) fn usage(results: &Results) -> String {
    let of_run = |run: &Run| {
        let usage = run.usage.as_ref()?;
        let maps = [
            ("entities", &usage.entity[..]),
            ("properties", &usage.property[..]),
        ];
        Some(heat_maps(&run.key().to_string(), &maps))
    };
    results.runs.iter().filter_map(of_run).collect()
}

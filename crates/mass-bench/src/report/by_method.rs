use std::collections::{BTreeMap, BTreeSet};

use super::summary::{grouped_by, groups, mean_std};
use super::{Decisions, Results, Run, RunKey, paired};
use crate::study::noise;

/// "mass/paper/p 0.5, live 30 %/K5: 812 alarms, 30 of 801 alignment tests passed (3.7 %; random directions 3.6 %)", over all seeds.
pub(super) fn tests(runs: &[Run]) -> Vec<(String, String)> {
    let methods = by_method(runs, |run| run.decisions.as_ref());
    let line = |(name, all): (String, Vec<&Decisions>)| {
        let sum = |of: fn(&Decisions) -> usize| all.iter().map(|d| of(d)).sum::<usize>();
        let (alarms, tests, passed) = (sum(|d| d.alarms), sum(|d| d.tests), sum(|d| d.passed));
        // Without a detector the record has those alone that were passed.
        let tested = if alarms == 0 && tests > 0 {
            format!(", {passed} alignment tests passed")
        } else if tests > 0 {
            format!(
                ", {passed} of {tests} alignment tests passed ({:.1} %; random directions {:.1} %)",
                100.0 * passed as f64 / tests as f64,
                100.0 * all[0].by_chance
            )
        } else {
            String::new()
        };
        (name, format!("{alarms} alarms{tested}"))
    };
    methods.into_iter().map(line).collect()
}

/// What a study alone asks: its name, and an answer for each method.
pub(super) fn own(results: &Results) -> (String, Vec<(String, String)>) {
    let (name, lines) = match results.study.as_str() {
        "continual" | "domains" => ("Kinds of data, old and new", metrics(&results.runs)),
        "noise" | "labels" => ("What splits did", splits(&results.runs)),
        "scale" => {
            let costs = metrics(&results.runs).into_iter();
            let lines = costs.chain(exponents(&results.runs)).collect();
            ("What a pool costs", lines)
        }
        _ => ("", Vec::new()),
    };
    (name.to_owned(), lines)
}

/// "mass/paper/p 0.5, live 30 %, one split/base/K5: split in 4 of 5 runs, first at step 201.5; without it, test loss +0.004
/// [-0.003, +0.011] (3 higher, 1 lower)", of the runs that split, beside those of the same seed that had no room to.
fn splits(runs: &[Run]) -> Vec<(String, String)> {
    let groups = groups(runs);
    let line = |(key, own): &(RunKey, Vec<&Run>)| {
        let (rules, label) = key.setting.as_deref()?.rsplit_once(", ")?;
        let without = RunKey {
            method: "mass".into(),
            setting: Some(format!("{rules}, {}", noise::WITHOUT)),
            ..key.clone()
        };
        let (_, without) = groups.iter().find(|(key, _)| *key == without)?;
        if label == noise::WITHOUT {
            return None;
        }
        let split: Vec<&&Run> = own.iter().filter(|r| !r.expansions.is_empty()).collect();
        let counted = format!("split in {} of {} runs", split.len(), own.len());
        let first = split.iter().map(|run| run.expansions[0].step as f64);
        let compared = |what: &str, of: fn(&Run) -> Option<f64>| {
            let pairs = split.iter().filter_map(|run| {
                let same = without.iter().find(|other| other.seed == run.seed)?;
                of(same).zip(of(run))
            });
            paired(&pairs.collect::<Vec<_>>()).map(|p| {
                let interval = p.interval.map_or_else(String::new, |[low, high]| {
                    format!(" [{low:+.3}, {high:+.3}]")
                });
                format!(
                    "{what} {:+.3}{interval} ({} higher, {} lower)",
                    p.mean_difference, p.wins, p.losses
                )
            })
        };
        let text = match compared("test loss", |run| run.test_loss) {
            Some(loss) => format!(
                "{counted}, first at step {:.1}; without it, {}",
                first.sum::<f64>() / split.len() as f64,
                [Some(loss), compared("metric", |run| run.metric)]
                    .into_iter()
                    .flatten()
                    .collect::<Vec<_>>()
                    .join(", ")
            ),
            None => counted,
        };
        Some((key.without_seed(), text))
    };
    groups.iter().filter_map(line).collect()
}

/// "grows with the number of experts as its power of: routing_ms 0.98, step_ms 0.61": least squares of logarithms, of
/// pools from 64 on where there are three, since small ones cost what does not depend on their size. One line for pools
/// that differ by their size alone.
fn exponents(runs: &[Run]) -> Vec<(String, String)> {
    let pools = grouped_by(runs, |run| RunKey {
        experts_init: None,
        seed: 0,
        ..run.key()
    });
    let several = pools.len() > 1;
    let line = |(key, own): (RunKey, Vec<&Run>)| {
        let what = "grows with the number of experts as its power of";
        let what = match several {
            true => format!("{} {what}", key.without_seed()),
            false => what.to_owned(),
        };
        Some((what, exponents_of(&own)?))
    };
    pools.into_iter().filter_map(line).collect()
}

fn exponents_of(runs: &[&Run]) -> Option<String> {
    let names: BTreeSet<&String> = runs.iter().flat_map(|run| run.metrics.keys()).collect();
    let of = |name: &&String| {
        let at = |run: &Run| {
            let cost = run.metrics.get(*name)?;
            Some(((run.experts? as f64).ln(), cost.ln()))
        };
        let large = |run: &&&Run| run.experts.is_some_and(|experts| experts >= 64);
        let large = runs.iter().filter(large).filter_map(|run| at(run));
        let mut points: Vec<(f64, f64)> = large.collect();
        if points.len() < 3 {
            points = runs.iter().filter_map(|run| at(run)).collect();
        }
        let n = points.len() as f64;
        let (x, y) = points
            .iter()
            .fold((0.0, 0.0), |(x, y), p| (x + p.0 / n, y + p.1 / n));
        let spread: f64 = points.iter().map(|p| (p.0 - x).powi(2)).sum();
        let slope = points.iter().map(|p| (p.0 - x) * (p.1 - y)).sum::<f64>() / spread;
        slope.is_finite().then(|| format!("{name} {slope:.2}"))
    };
    let all: Vec<String> = names.iter().filter_map(of).collect();
    (!all.is_empty()).then(|| all.join(", "))
}

/// "static/appear/K5: forgetting -0.012, new_loss 1.912, old_loss 1.899", means over seeds.
fn metrics(runs: &[Run]) -> Vec<(String, String)> {
    let line = |(name, all): (String, Vec<&BTreeMap<String, f64>>)| {
        let names: BTreeSet<&String> = all.iter().flat_map(|metrics| metrics.keys()).collect();
        let means = names.into_iter().map(|metric| {
            let values: Vec<f64> = all.iter().filter_map(|m| m.get(metric)).copied().collect();
            let mean = mean_std(values.iter().copied()).0.unwrap_or(f64::NAN);
            let of = match values.len() {
                n if n < all.len() => format!(" (in {n} of {})", all.len()),
                _ => String::new(),
            };
            format!("{metric} {mean:.3}{of}")
        });
        (name, means.collect::<Vec<_>>().join(", "))
    };
    by_method(runs, |run| Some(&run.metrics))
        .into_iter()
        .map(line)
        .collect()
}

/// What runs have, those that differ by their seed together.
fn by_method<'r, T>(
    runs: &'r [Run],
    has: impl Fn(&'r Run) -> Option<&'r T>,
) -> Vec<(String, Vec<&'r T>)> {
    let of_group = |(key, runs): (RunKey, Vec<&'r Run>)| {
        let own: Vec<&T> = runs.into_iter().filter_map(&has).collect();
        (!own.is_empty()).then(|| (key.without_seed(), own))
    };
    groups(runs).into_iter().filter_map(of_group).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Expansion;

    #[test]
    fn costs_grow_by_a_power_that_is_found() {
        let run = |experts: usize, a: f64, b: f64| Run {
            experts: Some(experts),
            metrics: [("a_ms".to_owned(), a), ("b_ms".to_owned(), b)].into(),
            ..Run::new("static", 0)
        };
        let runs = [
            run(8, 3.0, 64.0),
            run(64, 3.0, 4096.0),
            run(512, 3.0, 262_144.0),
        ];
        let power = "grows with the number of experts as its power of";
        let of = |what: String, powers: &str| (what, powers.to_owned());
        let found = of(power.to_owned(), "a_ms 0.00, b_ms 2.00");
        assert_eq!(exponents(&runs), [found]);
        assert_eq!(exponents(&runs[..1]), []);
        // Pools that are routed otherwise grow otherwise.
        let routed = runs.clone().map(|run| Run {
            setting: Some("top_k:k=2".into()),
            metrics: [("a_ms".to_owned(), run.metrics["b_ms"])].into(),
            ..run
        });
        let both = [runs, routed].concat();
        let lines = [
            of(format!("static {power}"), "a_ms 0.00, b_ms 2.00"),
            of(format!("static/top_k:k=2 {power}"), "a_ms 2.00"),
        ];
        assert_eq!(exponents(&both), lines);
    }

    #[test]
    fn a_split_is_weighed_against_the_run_of_its_seed_that_had_no_room_for_it() {
        let run = |label: &str, seed, loss, step: Option<u64>| Run {
            variant: Some("paper".into()),
            setting: Some(format!("p 0.5, live 30 %, {label}")),
            experts_init: Some(5),
            test_loss: Some(loss),
            expansions: step
                .map(|step| Expansion {
                    step,
                    layer: 0,
                    source: 0,
                    new: 5,
                    watched: None,
                    flagged: None,
                    p_value: None,
                    cosine: None,
                })
                .into_iter()
                .collect(),
            ..Run::new("mass", seed)
        };
        let runs = [
            run("no split", 0, 2.0, None),
            run("no split", 1, 1.9, None),
            run("no split", 2, 1.8, None),
            run("one split", 0, 1.9, Some(100)),
            run("one split", 1, 1.92, Some(200)),
            // Never split: the same run, which says nothing of splits.
            run("one split", 2, 1.8, None),
            run("all splits", 0, 2.0, None),
        ];
        let found = splits(&runs);
        let of = |name: &str, text: &str| {
            (
                format!("mass/paper/p 0.5, live 30 %, {name}/K5"),
                text.to_owned(),
            )
        };
        let one = "split in 2 of 3 runs, first at step 150.0; without it, test loss +0.040 [-0.722, +0.802] (1 higher, 1 lower)";
        assert_eq!(
            found,
            [
                of("one split", one),
                of("all splits", "split in 0 of 1 runs")
            ]
        );
    }
}

use std::collections::{BTreeMap, BTreeSet};

use super::summary::groups;
use super::{Decisions, Run, RunKey};

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

/// "static/appear/K5: forgetting -0.012, new_loss 1.912, old_loss 1.899", means over seeds.
pub(super) fn metrics(runs: &[Run]) -> Vec<(String, String)> {
    let line = |(name, all): (String, Vec<&BTreeMap<String, f64>>)| {
        let names: BTreeSet<&String> = all.iter().flat_map(|metrics| metrics.keys()).collect();
        let means = names.into_iter().map(|metric| {
            let values: Vec<f64> = all.iter().filter_map(|m| m.get(metric)).copied().collect();
            let mean = values.iter().sum::<f64>() / values.len() as f64;
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

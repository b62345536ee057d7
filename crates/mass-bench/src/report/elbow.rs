//! Where more experts stop paying.

use std::collections::BTreeMap;
use std::fmt;

use ndarray_rand::rand::Rng;

use super::over_tasks::seeds;
use super::summary::{groups, mean_std};
use super::{Results, Run, RunKey};
use crate::rng::{Purpose, stream};

/// Draws of the bootstrap.
const DRAWS: usize = 2000;

/// Losses by number of experts, then by seed.
type Pools = BTreeMap<usize, BTreeMap<u64, f64>>;

/// The elbow of the static pools of one task that route alike, by the one-standard-error rule.
///
/// # Formula
/// With `m_K` the mean and `s_K` the sample standard deviation over n seeds of the loss of a pool of K, and `K*` the pool of the least
/// mean, the elbow is `min {K : m_K <= m_K* + s_K* / √n}`. A figure of which more is better counts with its sign turned. The bootstrap draws
/// n seeds with replacement, the same ones for every pool, and finds the elbow again.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Elbow {
    /// The pools, without experts and seed.
    pub(super) pools: RunKey,
    /// The smallest pool within one standard error of the best.
    pub(super) experts: usize,
    /// All pools within it.
    within: Vec<usize>,
    /// The largest pool there is: it is no elbow.
    most: usize,
    seeds: usize,
    /// How many draws have their elbow where.
    draws: BTreeMap<usize, usize>,
}

impl Elbow {
    /// "20 (71 % of 2000 draws), 15 (29 %)".
    fn shares(&self) -> String {
        let share = |(experts, n): (&usize, &usize)| {
            format!("{experts} in {:.0} %", *n as f64 / DRAWS as f64 * 100.0)
        };
        let shares: Vec<String> = self.draws.iter().map(share).collect();
        shares.join(", ")
    }

    /// Whether more experts stop paying before there are no larger pools.
    pub(super) fn is_one(&self) -> bool {
        self.experts < self.most
    }

    /// "elbow at K 15 (10 in 3 %, 15 in 71 %, 20 in 26 % of draws)".
    pub(super) fn short(&self) -> String {
        format!("elbow at K {} ({} of draws)", self.experts, self.shares())
    }
}

impl fmt::Display for Elbow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let within: Vec<String> = self.within.iter().map(usize::to_string).collect();
        write!(
            f,
            "Elbow of {}: {} (within one standard error of the best: {}; paired bootstrap over {} seeds: {})",
            self.pools.without_seed(),
            match self.is_one() {
                true => format!("K {}", self.experts),
                false => format!("none up to K {}", self.most),
            },
            within.join(", "),
            self.seeds,
            self.shares()
        )
    }
}

/// Whether runs are compared by their task's metric, of which more is better, and not by their loss.
pub(super) fn by_metric(results: &Results) -> bool {
    results.runs.iter().any(|r| r.metric.is_some())
}

/// The elbows of a study: of every task and way of routing with three static pools or more on three seeds or more.
pub(super) fn elbows(results: &Results) -> Vec<Elbow> {
    let loss = |r: &Run| match by_metric(results) {
        true => r.metric.map(|m| -m),
        false => r.test_loss,
    };
    let mut pools: Vec<(RunKey, Pools)> = Vec::new();
    for (key, runs) in groups(&results.runs) {
        let (Some(experts), "static") = (key.experts_init, key.method.as_str()) else {
            continue;
        };
        // Where data follow one another the loss at the end is that of what was forgotten.
        let stays = results.study != "continual" || key.task.as_deref() == Some("appear");
        if results.study == "domains" || !stays {
            continue;
        }
        let of_seed = |seed| {
            Some((
                seed,
                runs.iter().find(|r| r.seed == seed).and_then(|r| loss(r))?,
            ))
        };
        let losses: BTreeMap<u64, f64> = seeds(&runs).into_iter().filter_map(of_seed).collect();
        let key = RunKey {
            experts_init: None,
            ..key
        };
        match pools.iter_mut().find(|(k, _)| *k == key) {
            Some((_, pool)) => drop(pool.insert(experts, losses)),
            None => pools.push((key, BTreeMap::from([(experts, losses)]))),
        }
    }
    pools
        .into_iter()
        .filter_map(|(key, pools)| elbow(key, &pools))
        .collect()
}

fn elbow(key: RunKey, pools: &Pools) -> Option<Elbow> {
    let first = pools.values().next()?;
    let shared: Vec<u64> = first
        .keys()
        .copied()
        .filter(|seed| pools.values().all(|l| l.contains_key(seed)))
        .collect();
    let seeds = shared.len();
    if pools.len() < 3 || seeds < 3 {
        return None;
    }
    let table: Vec<(usize, Vec<f64>)> = pools
        .iter()
        .map(|(k, l)| (*k, shared.iter().map(|s| l[s]).collect()))
        .collect();
    let all: Vec<usize> = (0..seeds).collect();
    let within = within(&table, &all);
    let mut rng = stream(0, Purpose::Method, 0);
    let mut draws = BTreeMap::new();
    for _ in 0..DRAWS {
        let drawn: Vec<usize> = all.iter().map(|_| rng.random_range(0..seeds)).collect();
        *draws.entry(self::within(&table, &drawn)[0]).or_default() += 1;
    }
    Some(Elbow {
        pools: key,
        experts: within[0],
        within,
        most: *pools.keys().next_back()?,
        seeds,
        draws,
    })
}

/// The pools within one standard error of the best, by the seeds at some places: in ascending order, and at least one.
fn within(table: &[(usize, Vec<f64>)], places: &[usize]) -> Vec<usize> {
    let of_places = |losses: &[f64]| {
        let (mean, std) = mean_std(places.iter().map(|&i| losses[i]));
        (
            mean.unwrap_or(f64::INFINITY),
            std.unwrap_or(0.0) / (places.len() as f64).sqrt(),
        )
    };
    let means: Vec<(usize, (f64, f64))> = table.iter().map(|(k, l)| (*k, of_places(l))).collect();
    let least = |a: (f64, f64), b: &(usize, (f64, f64))| if b.1.0 < a.0 { b.1 } else { a };
    let best = means.iter().fold((f64::INFINITY, 0.0), least);
    means
        .iter()
        .filter(|(_, (mean, _))| *mean <= best.0 + best.1)
        .map(|(k, _)| *k)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Header;

    fn results(losses: &[(usize, &[f64])], metric: bool) -> Results {
        let mut results = Results::new(Header::new("synthetic", "quick", 1));
        for (experts, losses) in losses {
            for (seed, &loss) in losses.iter().enumerate() {
                results.push(Run {
                    experts_init: Some(*experts),
                    k: Some(2),
                    test_loss: (!metric).then_some(loss),
                    metric: metric.then_some(-loss),
                    ..Run::new("static", seed as u64)
                });
            }
        }
        results
    }

    #[test]
    fn the_elbow_is_the_smallest_pool_within_one_standard_error_of_the_best() {
        // Standard error of the best, 20: .02 / √4 = .01.
        let best: &[f64] = &[1.78, 1.82, 1.78 + 0.04 / 2.0, 1.80];
        let pools: &[(usize, &[f64])] = &[
            (20, best),
            (5, &[1.9; 4]),
            (10, &[1.83; 4]),
            (15, &[1.807; 4]),
        ];
        for metric in [false, true] {
            let found = elbows(&results(pools, metric));
            assert_eq!(found.len(), 1);
            assert_eq!(
                (found[0].experts, &found[0].within[..]),
                (15, &[15, 20][..])
            );
            assert_eq!(found[0].draws.values().sum::<usize>(), DRAWS);
            // A draw may miss the spread of the best, and never reaches the pools that are far off.
            assert_eq!(found[0].draws.keys().collect::<Vec<_>>(), [&15, &20]);
            assert_eq!(found, elbows(&results(pools, metric)), "drawn anew");
            let text = found[0].to_string();
            assert!(
                text.starts_with(
                    "Elbow of static/k2: K 15 (within one standard error of the best: 15, 20;"
                ),
                "{text}"
            );
        }
    }

    #[test]
    fn pairs_of_seeds_decide_and_not_their_spread() {
        // All seeds agree on the order, by more than the standard error within any draw but one of the same seed throughout.
        let shift = |by: f64| [1.0 + by, 1.001 + by, 1.002 + by];
        let (a, b, c) = (shift(0.2), shift(0.1), shift(0.0));
        let found = elbows(&results(&[(4, &a), (8, &b), (16, &c)], false));
        assert_eq!(found[0].draws, BTreeMap::from([(16, DRAWS)]));
    }

    #[test]
    fn what_was_forgotten_has_no_elbow() {
        let pools: &[(usize, &[f64])] = &[
            (5, &[4.0, 4.1, 4.2]),
            (12, &[4.2, 4.3, 4.4]),
            (20, &[4.3, 4.4, 4.5]),
        ];
        for (study, task, number) in [
            ("continual", "appear", 1),
            ("continual", "switch", 0),
            ("continual", "stream", 0),
            ("domains", "pacs", 0),
        ] {
            let mut results = results(pools, false);
            study.clone_into(&mut results.study);
            results
                .runs
                .iter_mut()
                .for_each(|run| run.task = Some(task.to_owned()));
            assert_eq!(elbows(&results).len(), number, "{study}, {task}");
        }
    }

    #[test]
    fn two_pools_or_two_seeds_have_no_elbow_and_the_largest_pool_is_none() {
        let five: &[f64] = &[1.0, 1.1, 1.2];
        let ten: &[f64] = &[0.9, 1.0, 1.1];
        let none = |pools: &[(usize, &[f64])]| elbows(&results(pools, false)).is_empty();
        assert!(none(&[(5, five), (10, ten)]));
        assert!(none(&[(5, &five[..2]), (10, &ten[..2]), (15, &[0.8, 0.9])]));
        // Only seeds that every pool has are compared.
        assert!(none(&[(5, five), (10, ten), (15, &[0.8, 0.9])]));

        let found = elbows(&results(
            &[(5, five), (10, ten), (15, &[0.7, 0.71, 0.72])],
            false,
        ));
        assert!(!found[0].is_one());
        let text = found[0].to_string();
        assert!(
            text.starts_with("Elbow of static/k2: none up to K 15 ("),
            "{text}"
        );
    }
}

//! Paired comparisons over tasks and seeds.

use serde::{Deserialize, Serialize};
use statrs::distribution::{Binomial, ContinuousCDF, DiscreteCDF, StudentsT};

use super::over_tasks::{mean_of_seed, seeds, sets_of};
use super::summary::grouped_by;
use super::{Run, RunKey};

/// The method that others are compared with.
const METHOD: &str = "mass";

/// One way to run MASS against another method, by the task's metric.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// Which runs, without task and seed.
    pub method: String,
    /// Against which.
    pub against: String,
    /// The set of tasks that both are compared on, where the study has several: of images, or with a share of labels wrong.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub set: String,
    /// Of the same method, with fewer pairs, and better than `against` on the pairs that it shares with it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub passed_over: Vec<String>,
    /// Run by run with the same task and seed.
    #[serde(flatten)]
    pub paired: Paired,
    /// Seed by seed, means over all tasks of the set (domains, in the study dg); `None` for one task, or if no seed has them all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by_seed: Option<Paired>,
}

/// What is told from paired differences.
///
/// # Formula
/// `t = d̄ / (s / √n)` with the mean d̄ and sample standard deviation s of n differences, two-sided in Student's t of n - 1
/// degrees of freedom; the interval is `d̄ ± t_0.975 s / √n`; the sign test is two-sided in Binomial(wins + losses, 1/2). Pairs
/// of one task share its data: where pairs are of tasks and seeds, they are not independent, and both tests are too bold.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Paired {
    /// Pairs.
    pub n: usize,
    /// Mean difference, of the first less the second.
    pub mean_difference: f64,
    /// Sample standard deviation of the differences; `None` for fewer than two.
    pub std: Option<f64>,
    /// Student's t; `None` where the deviation is zero or missing.
    pub t: Option<f64>,
    /// Its two-sided p-value.
    pub p_value: Option<f64>,
    /// The mean difference's interval of 95 % confidence; `None` where there is no t.
    #[serde(default)]
    pub interval: Option<[f64; 2]>,
    /// Pairs in which the first is greater.
    pub wins: usize,
    /// Equal pairs.
    pub ties: usize,
    /// Pairs in which the second is greater.
    pub losses: usize,
    /// Two-sided p-value of the sign test; 1 without a pair that differs.
    pub sign_p_value: f64,
}

/// Paired t-test and sign test of the first of each pair against the second; `None` without pairs, for a value that is not
/// finite, or where differences or their squares add up to none.
///
/// ```
/// use mass_bench::report::paired;
/// let test = paired(&[(3.0, 2.0), (4.0, 2.0), (6.0, 3.0)]).ok_or("no pairs")?;
/// // Differences 1, 2, 3: mean 2, deviation 1.
/// assert!((test.t.ok_or("no t")? - 2.0 * 3f64.sqrt()).abs() < 1e-12);
/// assert!((test.p_value.ok_or("no p")? - 0.0741799).abs() < 1e-6);
/// let [low, high] = test.interval.ok_or("no interval")?;
/// assert!((low + 0.4841377).abs() < 1e-6 && (high - 4.4841377).abs() < 1e-6);
/// assert_eq!((test.wins, test.ties, test.losses), (3, 0, 0));
/// assert!((test.sign_p_value - 0.25).abs() < 1e-12);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[must_use]
pub fn paired(pairs: &[(f64, f64)]) -> Option<Paired> {
    let differences: Vec<f64> = pairs.iter().map(|(a, b)| a - b).collect();
    if differences.is_empty() || differences.iter().any(|d| !d.is_finite()) {
        return None;
    }
    let n = differences.len();
    let mean = differences.iter().sum::<f64>() / n as f64;
    let squares: f64 = differences.iter().map(|d| (d - mean).powi(2)).sum();
    if !(mean.is_finite() && squares.is_finite()) {
        return None;
    }
    let std = (n > 1).then(|| (squares / (n as f64 - 1.0)).sqrt());
    // Equal figures, and equal differences of figures, differ in their last bits once they were rounded.
    let largest = pairs.iter().map(|(a, b)| a.abs().max(b.abs()));
    let rounding = 1e-12 * largest.fold(0.0, f64::max);
    let error = std.filter(|s| *s > rounding);
    let error = error.map(|s| s / (n as f64).sqrt());
    let student = StudentsT::new(0.0, 1.0, (n as f64 - 1.0).max(1.0)).ok();
    let (t, student) = (error.map(|e| mean / e), error.and(student));
    let p_value = (t.zip(student)).map(|(t, student)| 2.0 * student.sf(t.abs()));
    let interval = (error.zip(student)).map(|(error, student)| {
        let reach = student.inverse_cdf(0.975) * error;
        [mean - reach, mean + reach]
    });
    let count = |sign: f64| differences.iter().filter(|d| *d * sign > rounding).count();
    let (wins, losses) = (count(1.0), count(-1.0));
    let signs = (wins + losses) as u64;
    let tail = Binomial::new(0.5, signs).map_or(1.0, |b| b.cdf(wins.min(losses) as u64));
    Some(Paired {
        n,
        mean_difference: mean,
        std,
        t,
        p_value,
        interval,
        wins,
        ties: n - wins - losses,
        losses,
        sign_p_value: (2.0 * tail).min(1.0),
    })
}

/// A p-value to two digits, but never zero.
pub(super) fn show_p(p: f64) -> String {
    match p < 0.005 {
        true => format!("{p:.0e}"),
        false => format!("{p:.2}"),
    }
}

/// Runs of one method and setting, over tasks and seeds.
struct Group<'a> {
    key: RunKey,
    runs: Vec<&'a Run>,
}

impl Group<'_> {
    /// Whether it has a run of that task and seed.
    fn has(&self, run: &Run) -> bool {
        let same = |o: &&Run| o.task == run.task && o.seed == run.seed;
        self.runs.iter().any(same)
    }

    /// Metrics of this group and of another for each task and seed that both have.
    fn pairs(&self, other: &Self) -> Vec<(f64, f64)> {
        let of = |run: &&Run| {
            let same = |o: &&&Run| o.task == run.task && o.seed == run.seed;
            Some((run.metric?, other.runs.iter().find(same)?.metric?))
        };
        self.runs.iter().filter_map(of).collect()
    }

    /// Means over `tasks` of this group and of another for each seed for which both have them all.
    fn pairs_by_seed(&self, other: &Self, tasks: &[String]) -> Vec<(f64, f64)> {
        let of = |seed| {
            let mean = |group: &Self| mean_of_seed(&group.runs, tasks, seed);
            Some((mean(self)?, mean(other)?))
        };
        seeds(&self.runs).into_iter().filter_map(of).collect()
    }
}

/// Every way to run MASS against the dense model (ERM), DynMoE, and the best static and the best GMoE pool, over the tasks and
/// seeds that both have; in every set of images apart, and with every share of labels that is wrong.
///
/// The best pool is found among those with the most pairs: the one whose metric is best on average over the pairs that all of
/// them have. It is found after the fact on the same scores, and so it is favoured. Runs without a metric take no part.
#[must_use]
pub fn comparisons(study: &str, runs: &[Run]) -> Vec<Comparison> {
    let sets = sets_of(study, runs);
    let several = sets.len() > 1;
    let of_set = |(set, tasks): (String, Vec<String>)| {
        let inside = |run: &&Run| match &run.task {
            Some(task) => tasks.contains(task),
            None => set.is_empty(),
        };
        let name = if several { set.as_str() } else { "" };
        of_one_set(name, &tasks, runs.iter().filter(inside))
    };
    sets.into_iter().flat_map(of_set).collect()
}

fn of_one_set<'r>(
    set: &str,
    tasks: &[String],
    runs: impl Iterator<Item = &'r Run>,
) -> Vec<Comparison> {
    let judged = runs.filter(|run| run.metric.is_some());
    let groups = grouped_by(judged, |run| run.key().over_tasks());
    let groups: Vec<Group<'_>> = groups
        .into_iter()
        .map(|(key, runs)| Group { key, runs })
        .collect();
    let mut found = Vec::new();
    for group in groups.iter().filter(|g| g.key.method == METHOD) {
        for method in ["dense", "erm", "static", "gmoe", "dynmoe"] {
            let mut rivals: Vec<_> = groups
                .iter()
                .filter(|g| g.key.method == method)
                .filter_map(|g| Some((g, paired(&group.pairs(g))?)))
                .collect();
            let most = rivals.iter().map(|(_, p)| p.n).max();
            let fewer = rivals.extract_if(.., |(_, p)| Some(p.n) < most);
            let fewer: Vec<&Group<'_>> = fewer.map(|(g, _)| g).collect();
            let shared = |run: &Run| group.has(run) && rivals.iter().all(|(g, _)| g.has(run));
            // The first of equals.
            let best = rivals.iter().rev().max_by(|(a, _), (b, _)| {
                let mean = |g: &Group<'_>| {
                    let own = g.runs.iter().filter(|run| shared(run));
                    own.filter_map(|run| run.metric).sum::<f64>()
                };
                mean(a).total_cmp(&mean(b))
            });
            if let Some((other, test)) = best {
                let better = |g: &&Group<'_>| {
                    paired(&g.pairs(other)).is_some_and(|p| p.mean_difference > 0.0)
                };
                found.push(Comparison {
                    method: group.key.without_seed(),
                    against: other.key.without_seed(),
                    set: set.to_owned(),
                    passed_over: (fewer.iter().copied().filter(better))
                        .map(|g| g.key.without_seed())
                        .collect(),
                    paired: test.clone(),
                    by_seed: paired_by_seed(group, other, tasks),
                });
            }
        }
    }
    found
}

fn paired_by_seed(group: &Group<'_>, other: &Group<'_>, tasks: &[String]) -> Option<Paired> {
    (tasks.len() > 1)
        .then(|| group.pairs_by_seed(other, tasks))
        .and_then(|pairs| paired(&pairs))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(method: &str, k: Option<usize>, task: &str, seed: u64, metric: f64) -> Run {
        Run {
            k,
            task: Some(task.to_owned()),
            metric: Some(metric),
            ..Run::new(method, seed)
        }
    }

    #[test]
    fn no_test_where_there_is_nothing_to_test() {
        assert_eq!(paired(&[]), None);
        assert_eq!(paired(&[(f64::NAN, 1.0)]), None);
        let one = paired(&[(2.0, 1.0)]).unwrap();
        assert_eq!((one.std, one.t, one.p_value), (None, None, None));
        assert_eq!(one.interval, None);
        assert!((one.sign_p_value - 1.0).abs() < 1e-12);
        let same = paired(&[(1.0, 1.0), (2.0, 2.0)]).unwrap();
        assert_eq!((same.t, same.ties, same.sign_p_value), (None, 2, 1.0));
        // Means of .1, .2 and .3 in two orders are one figure.
        let means = [0.1 + 0.2 + 0.3, 0.3 + 0.2 + 0.1].map(|sum: f64| sum / 3.0);
        assert!(means[0] != means[1]);
        let rounded = paired(&[(means[0], means[1]), (means[1], means[0])]).unwrap();
        assert_eq!((rounded.wins, rounded.ties, rounded.losses), (0, 2, 0));
        assert_eq!(
            [0.5, 0.005, 0.0049, 1e-12].map(show_p),
            ["0.50", "0.01", "5e-3", "1e-12"]
        );
    }

    #[test]
    fn mass_meets_the_best_static_pool_and_each_rival() {
        let mut runs = Vec::new();
        for (task, base) in [("CoLA", 0.4), ("RTE", 0.6)] {
            for seed in 0..2 {
                let noise = seed as f64 * 0.01;
                runs.push(run("mass", None, task, seed, base + 0.1 + noise));
                runs.push(run("static", Some(1), task, seed, base));
                runs.push(run("static", Some(2), task, seed, base + 0.05));
                runs.push(run("dynmoe", None, task, seed, base + 0.2));
            }
        }
        // Better, but on one pair alone.
        runs.push(run("static", Some(4), "CoLA", 0, 0.9));
        let found = comparisons("glue", &runs);
        let named: Vec<&str> = found.iter().map(|c| c.against.as_str()).collect();
        assert_eq!(named, ["static/k2", "dynmoe"]);
        assert_eq!(found[0].passed_over, ["static/k4"]);
        assert_eq!((found[0].paired.n, found[0].paired.wins), (4, 4));
        assert!((found[0].paired.mean_difference - 0.055).abs() < 1e-12);
        assert_eq!((found[1].paired.wins, found[1].paired.losses), (0, 4));
        // Of means over both tasks there are two.
        let by_seed = found[0].by_seed.as_ref().unwrap();
        assert_eq!((by_seed.n, by_seed.wins), (2, 2));
        assert!((by_seed.mean_difference - 0.055).abs() < 1e-12);
        // A seed without one of the tasks has no mean.
        runs.retain(|r| !(r.method == "dynmoe" && r.seed == 1 && r.task.as_deref() == Some("RTE")));
        let found = comparisons("glue", &runs);
        assert_eq!(
            (found[1].paired.n, found[1].by_seed.as_ref().unwrap().n),
            (3, 1)
        );
        // Nor do runs of one task.
        let one: Vec<Run> = runs
            .into_iter()
            .filter(|r| r.task.as_deref() == Some("RTE"))
            .collect();
        assert!(
            comparisons("glue", &one)
                .iter()
                .all(|c| c.by_seed.is_none())
        );
        assert!(comparisons("glue", &[Run::new("mass", 0)]).is_empty());
    }

    /// Two pools with equally many pairs are ranked where both have one: the seed that one of them lacks was a hard one.
    #[test]
    fn the_strongest_pool_is_found_where_all_have_runs() {
        let runs: Vec<Run> = [
            ("mass", None, vec![(0, 0.7), (1, 0.4), (2, 0.9)]),
            ("static", Some(1), vec![(0, 0.6), (1, 0.1)]),
            ("static", Some(2), vec![(0, 0.5), (2, 0.8)]),
        ]
        .into_iter()
        .flat_map(|(method, k, seeds)| {
            let of = move |(seed, metric)| run(method, k, "CoLA", seed, metric);
            seeds.into_iter().map(of)
        })
        .collect();
        let found = comparisons("glue", &runs);
        assert_eq!((found.len(), found[0].against.as_str()), (1, "static/k1"));
        assert_eq!(found[0].paired.n, 2);
    }

    #[test]
    fn sets_are_compared_apart() {
        let runs: Vec<Run> = ["pacs/photo", "pacs/sketch", "vlcs/a", "vlcs/b"]
            .into_iter()
            .flat_map(|task| {
                let metric = if task.starts_with("pacs") { 0.5 } else { 0.9 };
                ["mass", "erm"].map(|method| run(method, None, task, 0, metric))
            })
            .collect();
        let found = comparisons("dg", &runs);
        let sets: Vec<_> = found.iter().map(|c| (c.set.as_str(), c.paired.n)).collect();
        assert_eq!(sets, [("pacs", 2), ("vlcs", 2)]);
        assert!(found.iter().all(|c| c.by_seed.is_some()));
        // Of one set it has no name.
        assert_eq!(comparisons("dg", &runs[..4])[0].set, "");
    }
}

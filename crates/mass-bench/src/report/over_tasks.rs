//! Means over tasks, or over the domains of a set of images.

use std::collections::BTreeSet;

use super::summary::{grouped_by, mean_std};
use super::{Run, Summary, reported};
use crate::dg::reported::{DOMAINS, accuracy};

/// The metric of one method and setting, averaged over tasks seed by seed.
#[derive(Debug, Clone, PartialEq)]
pub struct OverTasks {
    /// Which runs, without task and seed.
    pub method: String,
    /// The tasks, in order of first appearance.
    pub tasks: Vec<String>,
    /// Seeds that have all of them.
    pub seeds: usize,
    /// Mean over tasks and seeds.
    pub mean: f64,
    /// Sample standard deviation over seeds of the mean over tasks; `None` for one seed.
    pub std: Option<f64>,
    /// What the paper reports, a mean over the same tasks; of domains, only where all of a set are there.
    pub reported: Option<f64>,
}

/// The means of every method that was run on more than one task; in the study dg, of every set of images apart, and in the study
/// labels, of every part of the labels that is wrong.
///
/// A seed counts if it has a metric for every task that any method was run on.
#[must_use]
pub fn over_tasks(study: &str, runs: &[Run]) -> Vec<OverTasks> {
    let named = runs.iter().filter(|run| run.task.is_some());
    let groups = grouped_by(named, |run| {
        let task = run.task.as_deref().unwrap_or_default();
        (run.key().over_tasks(), set_of(study, task))
    });
    let sets = sets_of(study, runs);
    let mut found = Vec::new();
    for ((key, set), runs) in groups {
        let tasks = sets.iter().find(|(name, _)| *name == set);
        let tasks = tasks.map_or_else(Vec::new, |(_, tasks)| tasks.clone());
        let of_seed = |seed| mean_of_seed(&runs, &tasks, seed);
        let means: Vec<f64> = seeds(&runs).into_iter().filter_map(of_seed).collect();
        let (mean, std) = mean_std(means.iter().copied());
        let (Some(mean), true) = (mean, tasks.len() > 1) else {
            continue;
        };
        found.push(OverTasks {
            method: key.without_seed(),
            seeds: means.len(),
            mean,
            std,
            reported: paper(study, runs[0], &set, &tasks),
            tasks,
        });
    }
    found
}

/// The tasks of some runs, in order of first appearance, of every set apart over which figures are averaged: of images, or with one
/// share of labels wrong. Runs without a task are in a set without one.
pub(super) fn sets_of(study: &str, runs: &[Run]) -> Vec<(String, Vec<String>)> {
    let mut sets: Vec<(String, Vec<String>)> = Vec::new();
    for run in runs {
        let task = run.task.as_deref();
        let set = task.map_or_else(String::new, |task| set_of(study, task));
        let at = sets.iter().position(|(name, _)| *name == set);
        let at = at.unwrap_or_else(|| {
            sets.push((set, Vec::new()));
            sets.len() - 1
        });
        let tasks = &mut sets[at].1;
        if let Some(task) = task
            && !tasks.iter().any(|t| t == task)
        {
            tasks.push(task.to_owned());
        }
    }
    sets
}

fn set_of(study: &str, task: &str) -> String {
    let of = match study {
        "dg" => task.split_once('/').map(|(set, _)| set),
        "labels" => task.split_once("-wrong-").map(|(_, percent)| percent),
        _ => None,
    };
    of.unwrap_or_default().to_owned()
}

/// The seeds of some runs, in order.
pub(super) fn seeds(runs: &[&Run]) -> Vec<u64> {
    let seeds: BTreeSet<u64> = runs.iter().map(|r| r.seed).collect();
    seeds.into_iter().collect()
}

/// The mean of a seed's metric over `tasks`; `None` without a metric for each.
pub(super) fn mean_of_seed(runs: &[&Run], tasks: &[String], seed: u64) -> Option<f64> {
    let metric = |task: &String| {
        let of_task = |r: &&&Run| r.task.as_ref() == Some(task) && r.seed == seed;
        runs.iter().find(of_task)?.metric
    };
    let values: Option<Vec<f64>> = tasks.iter().map(metric).collect();
    values.map(|v| v.iter().sum::<f64>() / tasks.len() as f64)
}

fn paper(study: &str, run: &Run, set: &str, tasks: &[String]) -> Option<f64> {
    if study == "dg" {
        // Of a part of the domains the paper says nothing.
        let whole = tasks.len() == DOMAINS;
        return accuracy(&run.method, run.experts_init, set).filter(|_| whole);
    }
    let figure = |task: &String| {
        let row = Summary {
            method: run.method.clone(),
            k: run.k,
            task: Some(task.clone()),
            ..Summary::default()
        };
        reported(study, &row).map(|r| r.figure)
    };
    let figures: Option<Vec<f64>> = tasks.iter().map(figure).collect();
    figures.map(|f| f.iter().sum::<f64>() / tasks.len() as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(method: &str, task: &str, seed: u64, metric: f64) -> Run {
        Run {
            task: Some(task.to_owned()),
            metric: Some(metric),
            k: (method == "static").then_some(2),
            ..Run::new(method, seed)
        }
    }

    #[test]
    fn seeds_with_every_task_are_averaged_beside_the_papers_mean() {
        let runs = [
            run("static", "CoLA", 0, 0.2),
            run("static", "RTE", 0, 0.6),
            run("static", "CoLA", 1, 0.4),
            run("static", "RTE", 1, 0.6),
            // A third seed without its second task.
            run("static", "CoLA", 2, 0.9),
            // One task only: no seed of it counts.
            run("dense", "CoLA", 0, 0.3),
        ];
        let found = over_tasks("glue", &runs);
        assert_eq!(found.len(), 1);
        assert_eq!(
            (found[0].seeds, &found[0].tasks[..]),
            (2, &["CoLA".into(), "RTE".into()][..])
        );
        assert!((found[0].mean - 0.45).abs() < 1e-12);
        assert!((found[0].std.unwrap() - 0.1 / 2f64.sqrt()).abs() < 1e-12);
        assert!((found[0].reported.unwrap() - (0.6471 + 0.7232) / 2.0).abs() < 1e-12);
        assert!(over_tasks("glue", &runs[..1]).is_empty());
    }

    #[test]
    fn tasks_are_averaged_apart_by_how_many_labels_are_wrong() {
        let tasks = ["CoLA", "CoLA-wrong-20", "RTE", "RTE-wrong-20"];
        let runs = tasks.map(|task| run("mass", task, 0, task.len() as f64));
        let found: Vec<f64> = over_tasks("labels", &runs).iter().map(|o| o.mean).collect();
        assert_eq!(found, [3.5, 12.5]);
        assert!(over_tasks("labels", &runs[..2]).is_empty());
    }

    #[test]
    fn domains_are_averaged_set_by_set() {
        let mut runs = vec![
            run("erm", "pacs/photo", 0, 0.8),
            run("erm", "pacs/sketch", 0, 0.4),
            run("erm", "vlcs/SUN09", 0, 0.1),
        ];
        let found = over_tasks("dg", &runs);
        assert_eq!(found.len(), 1);
        assert!((found[0].mean - 0.6).abs() < 1e-12);
        // The paper's is a mean over all four domains.
        assert_eq!((found[0].std, found[0].reported), (None, None));
        runs.push(run("erm", "pacs/cartoon", 0, 0.5));
        runs.push(run("erm", "pacs/art_painting", 0, 0.7));
        assert_eq!(over_tasks("dg", &runs)[0].reported, Some(0.862));
    }
}

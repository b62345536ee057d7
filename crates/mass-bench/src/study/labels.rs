//! The study of wrong labels: false and missed splits where a part of the training labels of GLUE's tasks is wrong.
//!
//! As in [the noise study](super::noise), whether a split helps is measured by running both ways to the end: figures are those of
//! the last epoch. Development sets keep their labels.

use super::glue::{Glue, Set, family};
use super::noise::both_ways;
use super::plan::Plan;
use crate::BenchError;
use crate::cli::{Preset, ReproduceArgs, Variant};
use crate::glue::task::Task;

/// What `--task` may name: a task as it is, or with so many percent of its training labels wrong.
pub const TASKS: &[&str] = &[
    "CoLA",
    "CoLA-wrong-10",
    "CoLA-wrong-20",
    "CoLA-wrong-40",
    "MRPC",
    "MRPC-wrong-10",
    "MRPC-wrong-20",
    "MRPC-wrong-40",
    "RTE",
    "RTE-wrong-10",
    "RTE-wrong-20",
    "RTE-wrong-40",
];

/// How much of the training labels is wrong, in percent.
const WRONG: [u64; 4] = [0, 10, 20, 40];

/// The plan of a preset.
///
/// # Errors
/// [`BenchError`] if the model that it fine-tunes is not there.
pub fn plan(args: &ReproduceArgs) -> Result<Plan<Glue>, BenchError> {
    let (mut family, pool) = family(args)?;
    let [cola, mrpc, rte] = [(Task::Cola, 3), (Task::Mrpc, 2), (Task::Rte, 2)];
    let (tasks, wrong, variants, seeds) = match args.preset {
        Preset::Smoke => (&[cola][..], &[0, 20][..], &[Variant::Paper][..], 1),
        Preset::Quick => (
            &[mrpc][..],
            &[0, 20, 40][..],
            &[Variant::Paper, Variant::Ours][..],
            1,
        ),
        Preset::Full | Preset::Paper => (
            &[cola, mrpc, rte][..],
            &WRONG[..],
            &[Variant::Paper, Variant::Reference, Variant::Ours][..],
            3,
        ),
    };
    let sets = |tasks: &[(Task, u64)], wrong: &[u64]| -> Vec<Set> {
        let of = |&(task, epochs): &(Task, u64)| {
            let set = move |&wrong: &u64| Set {
                wrong,
                ..Set::new(task, epochs)
            };
            wrong.iter().map(set)
        };
        tasks.iter().flat_map(of).collect()
    };
    family.last = true;
    family.sets = match &args.task {
        None => sets(tasks, wrong),
        Some(name) => {
            let mut sets = sets(&[cola, mrpc, rte], &WRONG);
            sets.retain(|set| set.to_string() == *name);
            sets
        }
    };
    let methods = both_ways(&pool, variants, args.preset);
    Ok(Plan::new(family, methods, pool, seeds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_that_may_be_named_has_runs() {
        for task in TASKS {
            let line = ["labels", "--preset", "smoke", "--task", task];
            let args = ReproduceArgs::parsed(&line);
            let runs = plan(&args).unwrap().runs(&args).unwrap();
            assert_eq!(runs.len(), 6, "{task}");
            assert!(runs.iter().all(|r| r.assignment.set == **task));
        }
        assert_eq!(TASKS.len(), 3 * WRONG.len());
    }
}

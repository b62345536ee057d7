//! The noise study: false and missed splits where gradients are noisy, batches small or large, and learning rates at their edge.
//!
//! Whether a split helps is measured by running both ways to the end: a pool by the rules of a variant that has no room for another
//! expert, and the same with room for one. Both are the same run up to that split. A split that the rules find, and
//! after which the loss ends no lower, is a false one; where none is found, and one of a random expert, or of that with the
//! largest share of the loss, would have helped, it is a missed one. Whether the expert was the right one is asked by a pool that
//! splits one drawn at random, which may be the same, at the step at which the paper's rule has found one.

use serde_json::{Value, json};

use super::plan::Plan;
use super::synthetic::{POOL, Regime, Synthetic, names, regime};
use crate::BenchError;
use crate::cli::{Preset, ReproduceArgs, Variant};
use crate::method::{Mass, Method, Pool};

/// The regimes by the name of their task. A batch of the base has 16 sequences, and its largest learning rate is 1e-2.
const REGIMES: &[(&str, Regime); 10] = &[
    ("base", Regime::BASE),
    ("noise-1", regime!(gradient_noise: 1.0)),
    ("noise-3", regime!(gradient_noise: 3.0)),
    ("noise-10", regime!(gradient_noise: 10.0)),
    ("batch-1", regime!(batch: 1)),
    ("batch-4", regime!(batch: 4)),
    ("batch-64", regime!(batch: 64)),
    ("rate-1e-3", regime!(peak: 1e-3)),
    ("rate-3e-2", regime!(peak: 3e-2)),
    ("rate-1e-1", regime!(peak: 1e-1)),
];

/// What `--task` may name.
pub const TASKS: &[&str] = &names(REGIMES);

/// What the runs are called that have no room for a split. Others of the same variant are compared with them.
pub(crate) const WITHOUT: &str = "no split";

/// The plan of a preset.
///
/// # Errors
/// None: nothing has to be there.
pub fn plan(args: &ReproduceArgs) -> Result<Plan<Synthetic>, BenchError> {
    let seeds = match args.preset {
        Preset::Smoke | Preset::Quick => 1,
        Preset::Full | Preset::Paper => 5,
    };
    let family = Synthetic::in_regimes(args, TASKS, REGIMES);
    let methods = both_ways(&POOL, &VARIANTS, args.preset);
    Ok(Plan::new(family, methods, POOL, seeds))
}

/// Those whose splits are weighed.
const VARIANTS: [Variant; 3] = [Variant::Paper, Variant::Reference, Variant::Ours];

/// Runs of each variant without a split, with the first that its rules find, and with all; and with one of an expert that no rule
/// has chosen, in the middle of the paper's phase, and when its rules find one. In `smoke` thresholds are such that they do.
pub(super) fn both_ways(pool: &Pool, variants: &[Variant], preset: Preset) -> Vec<Method> {
    let of = |variant, experts_max, label: &str| Mass {
        live_percent: pool.live_percent.filter(|_| variant != Variant::Ours),
        experts_max,
        label: label.to_owned(),
        ..Mass::of(variant, pool)
    };
    let (none, one) = (pool.experts, pool.experts + 1);
    let middle = pool.live_percent.map_or(5, |percent| percent / 2);
    let middle = format!("{middle} %");
    let once = || {
        (
            "trigger",
            json!({ "schedule": { "first": middle, "every": middle } }),
        )
    };
    let chosen = |choice: &str, trigger: Option<(&str, Value)>, label| Mass {
        overrides: [("choice", json!(choice))]
            .into_iter()
            .chain(trigger)
            .map(|(rule, value)| (format!("controller.{rule}"), value))
            .collect(),
        ..of(Variant::Paper, one, label)
    };
    let mut all = vec![
        chosen("random", Some(once()), "random expert"),
        chosen("loss_share", Some(once()), "largest loss"),
        chosen("random", None, "one random split"),
    ];
    for &variant in variants {
        all.extend([
            of(variant, none, WITHOUT),
            of(variant, one, "one split"),
            of(variant, pool.experts_max, "all splits"),
        ]);
    }
    if preset == Preset::Smoke {
        for mass in &mut all {
            // What a method is about stays.
            let mut rules = mass.loose();
            rules.append(&mut mass.overrides);
            mass.overrides = rules;
        }
    }
    all.into_iter().map(Method::Mass).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_run_is_another_and_has_one_without_a_split_beside_it() {
        let args = ReproduceArgs::parsed(&["noise", "--preset", "full"]);
        let runs = plan(&args).unwrap().runs(&args).unwrap();
        assert_eq!(runs.len(), REGIMES.len() * 12 * 5);
        let names: BTreeSet<String> = runs.iter().map(|r| r.run.key().to_string()).collect();
        assert_eq!(names.len(), runs.len());
        let different: BTreeSet<String> = REGIMES.iter().map(|(_, r)| format!("{r:?}")).collect();
        assert_eq!(different.len(), REGIMES.len());
        let all = both_ways(&POOL, &VARIANTS, Preset::Full);
        let mass = |method| match method {
            Method::Mass(mass) => mass,
            other => panic!("{other:?} does not grow"),
        };
        let all: Vec<Mass> = all.into_iter().map(mass).collect();
        for method in &all {
            let room = |m: &&Mass| m.variant == method.variant && m.label == WITHOUT;
            let without = all.iter().find(room).unwrap();
            assert_eq!((without.experts, without.experts_max), (5, 5));
            assert_eq!(
                (without.p, without.live_percent),
                (method.p, method.live_percent)
            );
        }
    }
}

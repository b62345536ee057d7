//! The ablation study: every ingredient of growth apart, beside static pools of the same size and routing.
//!
//! All pools here route by Top-p of mass 0.5 with raw weights, so that a token has about one expert and its gate learns from it. What
//! is compared at the same number of experts then has the same number of experts a token. The grown pool splits on a schedule, the
//! expert with the largest share of the loss, by a bisection whose boundary is soft, and gives the newcomer the moments of its source;
//! each ablation changes one of these.

use mass_routing::{Combine, RouterConfig};
use serde_json::{Value, json};

use super::plan::Plan;
use super::synthetic::{Synthetic, TASKS};
use crate::BenchError;
use crate::cli::{Preset, ReproduceArgs, Variant};
use crate::method::{Mass, Method, Pool};

/// Experts at the start and at most.
const EXPERTS: (usize, usize) = (5, 20);

/// Steps at which the pool grows: from 3 % of 2000 on, every nine steps, so that fifteen newcomers are there by a tenth of the run.
const FIRST: &str = "3 %";
const EVERY: u64 = 9;

/// How sharp the boundary of a bisection is: see [`BisectParams`](mass_expand::BisectParams).
const STRENGTH: f64 = 1.5;

/// The plan of a preset: fresh data, and in `full` three finite sets, where a run is judged at its best held-out step.
///
/// # Errors
/// None: nothing has to be there.
pub fn plan(args: &ReproduceArgs) -> Result<Plan<Synthetic>, BenchError> {
    let (fresh, finite) = (&TASKS[..1], &["vocab50", "51k", "410k", "1.6m"]);
    let (family, seeds) = match args.preset {
        Preset::Smoke => (Synthetic::fresh(args, fresh).smoke(), 1),
        Preset::Quick => (Synthetic::fresh(args, fresh), 2),
        Preset::Full | Preset::Paper => (Synthetic::fresh(args, finite), 5),
    };
    let mut methods: Vec<Method> = Vec::new();
    for experts in [5, 8, 12, 16, 20, 32] {
        methods.push(Method::Static {
            experts,
            k: 1,
            router: Some(top_p(0.5, Combine::Raw)),
        });
    }
    methods.extend(ablations().into_iter().map(Method::Mass));
    Ok(Plan {
        family,
        methods,
        pool: Pool {
            experts: EXPERTS.0,
            experts_max: EXPERTS.1,
            k: 2,
            p: 0.5,
            live_percent: Some(30),
        },
        seeds,
        variant: None,
    })
}

/// Whether a name is that of one of these ablations.
pub(super) fn is_own(name: &str) -> bool {
    ablations().iter().any(|m| m.ablation == name)
}

fn top_p(p: f32, combine: Combine) -> RouterConfig {
    RouterConfig::TopP { p, combine }
}

/// Splits from [`FIRST`] on, every so many steps.
fn schedule(every: u64) -> Value {
    json!({ "schedule": { "first": FIRST, "every": every } })
}

/// A bisection of that strength along that direction.
fn bisect(strength: f64, direction: &str) -> Value {
    json!({ "bisect": { "strength": strength, "direction": direction } })
}

fn clone(decomposition: &Value, preserve_mass: bool) -> Value {
    json!({ "clone": { "decomposition": decomposition, "preserve_mass": preserve_mass } })
}

/// Takes out every 20 steps an expert that is worth less than `price` nats of held-out loss, in turn, from 15 % of the run on.
fn prune(price: f64) -> Value {
    json!({
        "min_experts": 2, "min_age": "15 %", "unused": null,
        "redundant": { "every": 20, "margin": price, "z": 0.0 },
    })
}

/// Growth on a schedule, and what differs from it in one rule or two.
fn ablations() -> Vec<Mass> {
    const OPERATOR: &str = "controller.operator";
    const CHOICE: &str = "controller.choice";
    const TRIGGER: &str = "controller.trigger";
    const PRUNING: &str = "controller.pruning";
    let grow = |name: &str, rule: Option<(&str, Value)>| {
        let rules = [
            (TRIGGER, schedule(EVERY)),
            (OPERATOR, bisect(STRENGTH, "principal")),
            ("controller.moments", json!("inherit")),
            ("controller.stop", json!("never")),
        ];
        let rules = rules.into_iter().chain(rule);
        Mass {
            router: Some(top_p(0.5, Combine::Raw)),
            ablation: name.to_owned(),
            experts_max: EXPERTS.1,
            live_percent: Some(60),
            overrides: rules
                .map(|(rule, value)| (rule.to_owned(), value))
                .collect(),
            ..Mass::new(Variant::Ours, 0.5, EXPERTS.0)
        }
    };
    let mut all = vec![
        grow("grow", None),
        Mass {
            experts_max: 12,
            ..grow("grow_to_12", None)
        },
        Mass {
            experts_max: 32,
            ..grow("grow_to_32", Some((TRIGGER, schedule(5))))
        },
        Mass {
            router: Some(top_p(0.5, Combine::Renormalised)),
            ..grow("renormalised", None)
        },
    ];
    for (name, strength) in [("a_0.3", 0.3), ("a_0.75", 0.75), ("a_3", 3.0), ("a_6", 6.0)] {
        all.push(grow(name, Some((OPERATOR, bisect(strength, "principal")))));
    }
    let rules = [
        ("random_direction", OPERATOR, bisect(STRENGTH, "random")),
        ("gate_direction", OPERATOR, bisect(STRENGTH, "gate_row")),
        ("clone_rowwise", OPERATOR, clone(&json!("rowwise"), false)),
        ("clone_plain", OPERATOR, clone(&Value::Null, false)),
        ("clone_half_mass", OPERATOR, clone(&Value::Null, true)),
        ("split_most_loaded", CHOICE, json!("most_loaded")),
        ("split_random", CHOICE, json!("random")),
        ("moments_zero", "controller.moments", json!("zero")),
        ("no_redundancy_term", "redundancy_weight", json!(0.0)),
        ("all_at_once", TRIGGER, schedule(1)),
        ("slowly", TRIGGER, schedule(36)),
        ("prune_0", PRUNING, prune(0.0)),
        ("prune_0.0005", PRUNING, prune(0.0005)),
        ("prune_0.001", PRUNING, prune(0.001)),
        ("prune_0.002", PRUNING, prune(0.002)),
        ("prune_0.004", PRUNING, prune(0.004)),
    ];
    all.extend(rules.map(|(name, rule, value)| grow(name, Some((rule, value)))));
    all
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_ablation_has_rules_and_a_name_of_its_own() {
        let args = ReproduceArgs::parsed(&["ablation", "--preset", "full"]);
        let plan = plan(&args).unwrap();
        let methods = plan.methods(&args).unwrap();
        let rules = methods.iter().map(|m| {
            let rules = m.growth(1, 2000, 0, |_| ()).unwrap();
            if let Some(rules) = &rules {
                rules.controller.check().unwrap();
            }
            let mixture = m.mixture(4, 4, mass_model::Activation::Relu, 0);
            format!("{rules:?} {mixture:?}")
        });
        assert_eq!(rules.collect::<BTreeSet<_>>().len(), methods.len());
        let names: BTreeSet<String> = methods.iter().map(|m| m.run(0).key().to_string()).collect();
        assert_eq!(names.len(), methods.len());
        assert_eq!(plan.runs(&args).unwrap().len(), 4 * 5 * methods.len());
    }

    #[test]
    fn growth_ends_within_a_tenth_of_the_run() {
        let last = |m: &Mass| {
            let growth = Method::Mass(m.clone()).growth(1, 2000, 0, |_| ());
            growth.unwrap().unwrap().controller.trigger
        };
        let all = ablations();
        assert_eq!(
            last(&all[0]),
            mass_expand::Trigger::Schedule {
                first: 60,
                every: EVERY,
                splits: 1
            }
        );
        assert!(60 + EVERY * (EXPERTS.1 - EXPERTS.0 - 1) as u64 <= 200);
    }
}

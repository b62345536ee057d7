//! The ablation study: every ingredient of growth apart, beside static pools of the same size and routing.
//!
//! All pools here route by Top-p of mass 0.5 with raw weights, so that a token has about one expert and its gate learns from it. What
//! is compared at the same number of experts then has the same number of experts a token. The grown pool splits on a schedule, the
//! expert with the largest share of the loss, by a bisection whose boundary is soft; each ablation changes one of these.

use mass_routing::{Combine, RouterConfig};
use serde_json::{Value, json};

use super::plan::Plan;
use super::synthetic::{Synthetic, TASKS};
use crate::BenchError;
use crate::cli::{Preset, ReproduceArgs, Variant};
use crate::method::{Mass, Method, Overrides, Pool};

/// Experts at the start and at most.
const EXPERTS: (usize, usize) = (5, 20);

/// Steps at which the pool grows: from 3 % of 2000 on, every nine steps, so that fifteen newcomers are there by a tenth of the run.
const FIRST: &str = "3 %";
const EVERY: u64 = 9;

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

fn top_p(p: f32, combine: Combine) -> RouterConfig {
    RouterConfig::TopP { p, combine }
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

/// Growth on a schedule, and what differs from it in one rule.
fn ablations() -> Vec<Mass> {
    let grow = |name: &str, rules: &[(&str, Value)], router: RouterConfig, experts_max: usize| {
        let mut overrides = Overrides::from(
            [
                (
                    "trigger",
                    json!({ "schedule": { "first": FIRST, "every": EVERY } }),
                ),
                ("operator", bisect(1.5, "principal")),
                ("stop", json!("never")),
            ]
            .map(|(rule, value)| (format!("controller.{rule}"), value)),
        );
        overrides.extend(
            rules
                .iter()
                .map(|(rule, value)| ((*rule).to_owned(), value.clone())),
        );
        Mass {
            router: Some(router),
            ablation: name.to_owned(),
            experts_max,
            live_percent: Some(60),
            overrides,
            ..Mass::new(Variant::Ours, 0.5, EXPERTS.0)
        }
    };
    let raw = || top_p(0.5, Combine::Raw);
    let mut all = vec![
        grow("grow", &[], raw(), EXPERTS.1),
        grow("grow_to_12", &[], raw(), 12),
        grow(
            "grow_to_32",
            &[(
                "controller.trigger",
                json!({ "schedule": { "first": FIRST, "every": 5 } }),
            )],
            raw(),
            32,
        ),
    ];
    let one = |name: &str, rule: &str, value: Value| grow(name, &[(rule, value)], raw(), EXPERTS.1);
    for (name, strength) in [("a_0.3", 0.3), ("a_0.75", 0.75), ("a_3", 3.0), ("a_6", 6.0)] {
        all.push(one(
            name,
            "controller.operator",
            bisect(strength, "principal"),
        ));
    }
    all.extend([
        one(
            "random_direction",
            "controller.operator",
            bisect(1.5, "random"),
        ),
        one(
            "gate_direction",
            "controller.operator",
            bisect(1.5, "gate_row"),
        ),
        one(
            "clone_rowwise",
            "controller.operator",
            clone(&json!("rowwise"), false),
        ),
        one(
            "clone_plain",
            "controller.operator",
            clone(&Value::Null, false),
        ),
        one(
            "clone_half_mass",
            "controller.operator",
            clone(&Value::Null, true),
        ),
        one(
            "split_most_loaded",
            "controller.choice",
            json!("most_loaded"),
        ),
        one("split_random", "controller.choice", json!("random")),
        one(
            "split_entropy",
            "controller.choice",
            json!("routing_entropy"),
        ),
        one("moments_of_source", "controller.moments", json!("inherit")),
        one("no_redundancy_term", "redundancy_weight", json!(0.0)),
        one(
            "all_at_once",
            "controller.trigger",
            json!({ "schedule": { "first": FIRST, "every": 1 } }),
        ),
        one(
            "slowly",
            "controller.trigger",
            json!({ "schedule": { "first": FIRST, "every": 36 } }),
        ),
        grow(
            "renormalised",
            &[],
            top_p(0.5, Combine::Renormalised),
            EXPERTS.1,
        ),
    ]);
    for (name, price) in [
        ("prune_0", 0.0),
        ("prune_0.0005", 0.0005),
        ("prune_0.001", 0.001),
        ("prune_0.002", 0.002),
        ("prune_0.004", 0.004),
    ] {
        all.push(one(name, "controller.pruning", prune(price)));
    }
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
                every: EVERY
            }
        );
        assert!(60 + EVERY * (EXPERTS.1 - EXPERTS.0 - 1) as u64 <= 200);
    }
}

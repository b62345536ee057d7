//! The ablation study: every ingredient of growth apart, beside static pools of the same size and routing.
//!
//! The pools that grow here are those of the variant `ours`, at most 20 experts, with Top-p of mass 0.5, so that a token has about one
//! expert; each ablation changes one rule. Beside them are static pools with the same routing or with weights of another kind, and
//! the paper's method with its own ablations. What is compared at the same number of experts has the same number of experts a
//! token.

use mass_routing::{Combine, RouterConfig};
use serde_json::{Value, json};

use super::plan::Plan;
use super::synthetic::{POOL, Synthetic, TASKS, on_plateau};
use crate::BenchError;
use crate::cli::{Preset, ReproduceArgs, Variant};
use crate::method::{Mass, Method, named};

/// The paper's method and its ablations.
const PAPER: [&str; 9] = [
    "mass",
    "detector_only",
    "alignment_only",
    "plain_cloning",
    "no_redundancy_loss",
    "no_stop",
    "inherit_moments",
    "schedule",
    "random_expert",
];

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
    let statics = [5, 8, 12, 16, 20, 32].map(|experts| (experts, Combine::Renormalised));
    let others =
        [Combine::StraightThrough, Combine::Raw].map(|combine| (POOL.experts_max, combine));
    for (experts, combine) in statics.into_iter().chain(others) {
        methods.push(Method::top_p(experts, 0.5, combine));
    }
    methods.extend(ablations().into_iter().map(Method::Mass));
    for name in PAPER {
        let of_paper = named(name, &POOL, Some(Variant::Paper));
        methods.extend(of_paper.into_iter().flatten());
    }
    Ok(Plan::new(family, methods, POOL, seeds))
}

/// What these ablations are called.
pub(super) fn names() -> Vec<String> {
    ablations().into_iter().map(|m| m.ablation).collect()
}

fn top_p(combine: Combine) -> RouterConfig {
    RouterConfig::TopP { p: 0.5, combine }
}

/// Splits from `first` on, every so many steps, several on steps in a row.
fn schedule(first: u64, every: u64, splits: u64) -> Value {
    json!({ "schedule": { "first": first, "every": every, "splits": splits } })
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

/// The variant `ours`, and what differs from it in one rule.
fn ablations() -> Vec<Mass> {
    const OPERATOR: &str = "controller.operator";
    const CHOICE: &str = "controller.choice";
    const TRIGGER: &str = "controller.trigger";
    const PRUNING: &str = "controller.pruning";
    let grow = |name: &str, rule: Option<(&str, Value)>| Mass {
        ablation: name.to_owned(),
        experts_max: POOL.experts_max,
        overrides: rule.map(|(at, v)| (at.to_owned(), v)).into_iter().collect(),
        ..Mass::new(Variant::Ours, POOL.p, POOL.experts)
    };
    let sized = |name, experts_max| Mass {
        experts_max,
        ..grow(name, None)
    };
    let routed = |name, router| Mass {
        router: Some(router),
        ..grow(name, None)
    };
    // Growth that takes longer than a tenth of the run.
    let late = |name, trigger| Mass {
        live_percent: Some(60),
        ..grow(name, Some((TRIGGER, trigger)))
    };
    let top_1 = RouterConfig::TopK {
        k: 1,
        combine: Combine::StraightThrough,
    };
    let mut all = vec![
        grow("grow", None),
        sized("grow_to_12", 12),
        sized("grow_to_32", 32),
        routed("renormalised", top_p(Combine::Renormalised)),
        routed("raw", top_p(Combine::Raw)),
        routed("top_1", top_1),
        late("from_3_percent", schedule(60, 9, 1)),
        late("slowly", schedule(60, 36, 1)),
        late("on_plateau", on_plateau()),
    ];
    for (name, strength) in [("a_0.3", 0.3), ("a_1.5", 1.5), ("a_3", 3.0), ("a_6", 6.0)] {
        all.push(grow(name, Some((OPERATOR, bisect(strength, "principal")))));
    }
    let rules = [
        ("random_direction", OPERATOR, bisect(0.75, "random")),
        ("gate_direction", OPERATOR, bisect(0.75, "gate_row")),
        ("clone_rowwise", OPERATOR, clone(&json!("rowwise"), false)),
        ("clone_plain", OPERATOR, clone(&Value::Null, false)),
        ("clone_half_mass", OPERATOR, clone(&Value::Null, true)),
        ("split_most_loaded", CHOICE, json!("most_loaded")),
        ("split_least_used", CHOICE, json!("least_used")),
        ("split_entropy", CHOICE, json!("routing_entropy")),
        ("split_random", CHOICE, json!("random")),
        ("moments_zero", "controller.moments", json!("zero")),
        ("without_redundancy_term", "redundancy_weight", json!(0.0)),
        ("five_at_once", TRIGGER, schedule(10, 10, 5)),
        ("all_at_once", TRIGGER, schedule(10, 15, 15)),
        ("prune_0", PRUNING, prune(0.0)),
        ("prune_0.0005", PRUNING, prune(0.0005)),
        ("prune_0.002", PRUNING, prune(0.002)),
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
    fn ours_grows_within_a_tenth_of_the_run() {
        let growth = Method::Mass(ablations().remove(0)).growth(1, 2000, 0, |_| ());
        let reach = growth.unwrap().unwrap().controller.reach();
        assert_eq!(reach.first_split, Some(10));
        assert_eq!(reach.end, 200);
    }
}

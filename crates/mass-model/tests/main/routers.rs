//! Routers that learn as they go, gates of other kinds and losses on the routing, all from a layer's settings.

use dfdx::prelude::*;
use mass_expand::{BisectParams, ExpertId, SplitOperator};
use mass_model::growth::{Mixtures, split_expert};
use mass_model::nn::{GateConfig, MoeConfig, MoeLayer};
use mass_model::ops::RoutingLoss;
use mass_model::optim::{AdamW, AdamWConfig};
use mass_model::{Activation, ModelError, Parameters, seeded_rng};
use mass_routing::losses::{BalanceCount, dirichlet_prior, diverse_and_simple};
use mass_routing::{AnyRouter, Combine, RouterConfig, RoutingError, RoutingPlan, TopK, TopP};
use ndarray::{Array2, ArrayView2};

use crate::growing::{SEQ, batch, model};

fn bias(layer: &MoeLayer) -> Vec<f32> {
    match &*layer.router() {
        AnyRouter::BiasBalanced(router) => router.bias().to_vec(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_model_lets_every_router_learn_from_a_pass() {
    let mut balanced = model("bias_balanced:k=1,rate=0.05,combine=raw".parse().unwrap());
    let (tokens, targets) = batch(0);
    let pass = balanced.train_pass(&tokens, &targets, SEQ).unwrap();
    balanced.adapt(&pass.layers).unwrap();
    for (l, trace) in pass.layers.iter().enumerate() {
        let mean = trace.plan.num_assignments() as f64 / trace.plan.num_experts() as f64;
        let wanted = |e| match (trace.plan.load(e) as f64).partial_cmp(&mean) {
            Some(std::cmp::Ordering::Less) => 0.05,
            Some(std::cmp::Ordering::Greater) => -0.05,
            _ => 0.0,
        };
        let wanted: Vec<f32> = (0..trace.plan.num_experts()).map(wanted).collect();
        assert_eq!(bias(balanced.mixture(l)), wanted);
        assert!(wanted.iter().any(|&b| b != 0.0));
    }
    let too_few = balanced.adapt(&pass.layers[1..]).unwrap_err();
    assert!(matches!(too_few, ModelError::Shape { .. }), "{too_few}");

    let mut steered = model("target_k:target=1.2,p=0.9,combine=raw".parse().unwrap());
    let pass = steered.train_pass(&tokens, &targets, SEQ).unwrap();
    steered.adapt(&pass.layers).unwrap();
    match &*steered.mixture(0).router() {
        AnyRouter::TargetK(router) => assert!(router.p() < 0.9, "{}", router.p()),
        other => panic!("{other:?}"),
    };
}

#[test]
fn a_newcomer_has_the_balancing_bias_of_its_source() {
    let clone = SplitOperator::Clone {
        decomposition: None,
        preserve_mass: true,
    };
    for operator in [SplitOperator::Bisect(BisectParams::default()), clone] {
        let mut model = model("bias_balanced:k=1,rate=0.05,combine=raw".parse().unwrap());
        let (tokens, targets) = batch(0);
        let mut pass = model.train_pass(&tokens, &targets, SEQ).unwrap();
        model.adapt(&pass.layers).unwrap();
        let moe = model.mixture_mut(0);
        let before = bias(moe);
        let source = (0..3).max_by_key(|&e| pass.layers[0].plan.load(e)).unwrap();
        let id = moe.ids()[source];
        split_expert(moe, id, operator, &pass.layers[0], &mut pass.gradients).unwrap();
        assert!(before[source] < 0.0);
        assert_eq!(bias(moe), [&before[..], &before[source..=source]].concat());
        // The plan is of the pool as it was: too late to learn from it.
        let late = model.adapt(&pass.layers).unwrap_err();
        assert!(
            matches!(
                late,
                ModelError::Routing(RoutingError::ShapeMismatch { .. })
            ),
            "{late}"
        );
        // A stranger starts at zero.
        let moe = model.mixture_mut(0);
        let stranger = moe.experts()[0].clone();
        moe.push(stranger).unwrap();
        let pass = model.train_pass(&tokens, &targets, SEQ).unwrap();
        assert_eq!(bias(model.mixture(0))[4], 0.0);
        model.adapt(&pass.layers).unwrap();
        let stranger = model.mixture(0).experts()[0].clone();
        let unknown = model.mixture_mut(0).push_split(stranger, ExpertId(99));
        assert!(matches!(unknown, Err(ModelError::NoSuchExpert(99))));
    }
}

fn input(n: usize, dim: usize) -> Vec<f32> {
    (0..n * dim)
        .map(|i| ((i * 13 + i / dim) % 17) as f32 * 0.11 - 0.8)
        .collect()
}

const N: usize = 9;
const DIM: usize = 5;

fn traced(
    layer: &MoeLayer,
) -> Result<(f32, mass_model::CpuGradients, std::sync::Arc<RoutingPlan>), ModelError> {
    let x = Cpu::default().tensor_from_vec(input(N, DIM), (N, DIM));
    let routed = layer.forward_routed(x.leaky_traced(), None)?;
    let plan = routed.plan;
    let loss = routed.output.square().mean();
    Ok((loss.array(), loss.backward(), plan))
}

fn plain(layer: &MoeLayer) -> f64 {
    let x = Cpu::default().tensor_from_vec(input(N, DIM), (N, DIM));
    let y = layer.forward_routed(x, None).unwrap().output.as_vec();
    y.iter().map(|&y| f64::from(y).powi(2)).sum::<f64>() / y.len() as f64
}

fn config(gate: GateConfig, router: RouterConfig, losses: Vec<RoutingLoss>) -> MoeConfig {
    MoeConfig {
        gate,
        losses,
        ..MoeConfig::new(DIM, 7, 4, Activation::GeluErf, router)
    }
}

#[test]
fn a_router_that_cannot_run_backward_says_so_in_the_forward_pass() {
    let raw = Combine::Raw;
    let routers = [
        AnyRouter::TopP(TopP::new(0.7, raw).unwrap().with_probabilities(false)),
        AnyRouter::TopK(TopK::new(2, raw).unwrap().with_probabilities(false)),
    ];
    for router in routers {
        let config = config(
            GateConfig::Linear,
            RouterConfig::TopP {
                p: 0.7,
                combine: raw,
            },
            vec![],
        );
        let mut layer = MoeLayer::new(&config, &mut seeded_rng(1)).unwrap();
        *layer.router_mut() = router;
        let refused = traced(&layer).unwrap_err();
        assert!(
            matches!(
                refused,
                ModelError::Routing(RoutingError::ProbabilitiesNotKept)
            ),
            "{refused}"
        );
        // Without a tape there is nothing to run backward.
        plain(&layer);
    }
    // Nor can a loss that needs what the router does not keep, even where the weights do not.
    let renormalised = TopP::new(0.7, Combine::Renormalised)
        .unwrap()
        .with_probabilities(false);
    for (loss, works) in [
        (RoutingLoss::Entropy { weight: 0.1 }, false),
        (
            RoutingLoss::Balance {
                weight: 0.1,
                count: BalanceCount::First,
            },
            false,
        ),
        (
            RoutingLoss::Dirichlet {
                weight: 0.1,
                alpha: 0.5,
            },
            false,
        ),
        (RoutingLoss::RouterZ { weight: 0.1 }, true),
        (RoutingLoss::Importance { weight: 0.1 }, true),
    ] {
        let router = RouterConfig::TopP {
            p: 0.7,
            combine: Combine::Renormalised,
        };
        let mut layer = MoeLayer::new(
            &config(GateConfig::Linear, router, vec![loss]),
            &mut seeded_rng(1),
        )
        .unwrap();
        traced(&layer).unwrap();
        *layer.router_mut() = AnyRouter::TopP(renormalised);
        match traced(&layer) {
            Ok(_) => assert!(works, "{loss:?}"),
            Err(e) => {
                assert!(
                    !works && matches!(e, ModelError::Routing(RoutingError::ProbabilitiesNotKept)),
                    "{loss:?}: {e}"
                );
            }
        }
        plain(&layer);
    }
    // A prior over one expert is undefined, which is known before the backward pass.
    let one = MoeConfig {
        experts: 1,
        ..config(
            GateConfig::Linear,
            "top_p:p=1".parse().unwrap(),
            vec![RoutingLoss::Dirichlet {
                weight: 1.0,
                alpha: 1.0,
            }],
        )
    };
    let refused = traced(&MoeLayer::new(&one, &mut seeded_rng(1)).unwrap()).unwrap_err();
    assert!(
        matches!(refused, ModelError::Routing(RoutingError::Undefined(_))),
        "{refused}"
    );
}

const LOW_RANK: GateConfig = GateConfig::LowRank {
    rank: 2,
    anchors: 3,
    scale: 2.5,
};

#[test]
fn a_layer_with_a_low_rank_gate_has_the_gradients_of_differences() {
    // All experts at their probability: nothing steps.
    let router = RouterConfig::TopP {
        p: 1.0,
        combine: Combine::Raw,
    };
    let mut layer = MoeLayer::new(&config(LOW_RANK, router, vec![]), &mut seeded_rng(2)).unwrap();
    layer.expert_mut(ExpertId(2)).unwrap().logit_offset = -0.4;
    let (_, mut gradients, _) = traced(&layer).unwrap();
    let mut names = Vec::new();
    layer.visit("", &mut |name, p| {
        if name.contains("gate") {
            names.push((name, p.len(), p.gradient(&mut gradients).unwrap().clone()));
        }
    });
    assert_eq!(names.len(), 5);
    assert!(
        names
            .iter()
            .any(|(name, len, _)| name == "gate.query" && *len == 2 * DIM)
    );
    for (name, _, gradient) in names {
        let size = gradient.iter().fold(0.0f32, |m, g| m.max(g.abs()));
        assert!(size > 0.0, "{name}");
        for (i, &found) in gradient.iter().enumerate() {
            let at = |step: f32| {
                let mut moved = layer.clone();
                moved.visit_mut("", &mut |n, p| {
                    if n == name {
                        p.values_mut()[i] += step;
                    }
                });
                plain(&moved)
            };
            let h = 1e-2;
            let difference = (at(h) - at(-h)) / (2.0 * f64::from(h));
            let gap = (difference - f64::from(found)).abs();
            assert!(
                gap < 0.02 * f64::from(size) + 1e-6,
                "{name}[{i}]: {difference} and {found}"
            );
        }
    }
}

#[test]
fn a_low_rank_gate_trains_grows_and_is_checked() {
    let router = RouterConfig::TopP {
        p: 0.8,
        combine: Combine::Raw,
    };
    let mut layer = MoeLayer::new(
        &config(LOW_RANK, router.clone(), vec![]),
        &mut seeded_rng(2),
    )
    .unwrap();
    let mut optimizer = AdamW::new(AdamWConfig::default()).unwrap();
    let first = traced(&layer).unwrap().0;
    for _ in 0..20 {
        let (_, mut gradients, _) = traced(&layer).unwrap();
        optimizer.step(&mut layer, &mut gradients, 1e-2).unwrap();
    }
    assert!(traced(&layer).unwrap().0 < first);
    let source = layer.experts()[1].offspring();
    layer.push_split(source, ExpertId(1)).unwrap();
    assert_eq!(traced(&layer).unwrap().2.num_experts(), 5);

    for gate in [
        GateConfig::LowRank {
            rank: 0,
            anchors: 1,
            scale: 1.0,
        },
        GateConfig::LowRank {
            rank: 1,
            anchors: 0,
            scale: 1.0,
        },
        GateConfig::LowRank {
            rank: 1,
            anchors: 1,
            scale: f32::NAN,
        },
        GateConfig::LowRank {
            rank: 1,
            anchors: 1,
            scale: 0.0,
        },
    ] {
        let refused =
            MoeLayer::new(&config(gate, router.clone(), vec![]), &mut seeded_rng(2)).unwrap_err();
        assert!(
            refused.to_string().contains("a low-rank gate with rank"),
            "{refused}"
        );
    }
    let text = serde_json::to_value(config(LOW_RANK, router, vec![])).unwrap();
    assert_eq!(
        text["gate"],
        serde_json::json!({ "gate": "low_rank", "rank": 2, "anchors": 3, "scale": 2.5 })
    );
    let mut more = text.clone();
    more["gate"]["surplus"] = 1.into();
    assert!(serde_json::from_value::<MoeConfig>(more).is_err());
    let mut more = text;
    more["surplus"] = 1.into();
    assert!(serde_json::from_value::<MoeConfig>(more).is_err());
}

/// The gradients of all gate rows, `[experts, width]`.
fn row_gradients(layer: &MoeLayer) -> (Array2<f32>, std::sync::Arc<RoutingPlan>) {
    let (_, mut gradients, plan) = traced(layer).unwrap();
    let rows: Vec<f32> = layer
        .experts()
        .iter()
        .flat_map(|e| e.gate.gradient(&mut gradients).unwrap().clone())
        .collect();
    let width = rows.len() / layer.experts().len();
    (
        Array2::from_shape_vec((layer.experts().len(), width), rows).unwrap(),
        plan,
    )
}

fn with_losses(gate: GateConfig, router: &RouterConfig, losses: Vec<RoutingLoss>) -> MoeLayer {
    MoeLayer::new(&config(gate, router.clone(), losses), &mut seeded_rng(4)).unwrap()
}

#[test]
fn dynmoes_loss_and_a_dirichlet_prior_reach_the_gate() {
    let router = RouterConfig::TopP {
        p: 0.8,
        combine: Combine::Raw,
    };
    let cosine = GateConfig::Cosine {
        projection: None,
        temperature: None,
    };
    let any = RouterConfig::TopAny { experts: 4 };
    for (gate, router) in [(GateConfig::Linear, &router), (cosine, &any)] {
        let (without, _) = row_gradients(&with_losses(gate, router, vec![]));
        let layer = with_losses(
            gate,
            router,
            vec![RoutingLoss::DiverseAndSimple { weight: 0.3 }],
        );
        let (with, _) = row_gradients(&layer);
        let rows = Array2::from_shape_fn((DIM, 4), |(i, e)| layer.experts()[e].gate.values()[i]);
        let mut wanted = Array2::zeros(rows.dim());
        diverse_and_simple(rows.view(), None, 0.3, &mut wanted.view_mut()).unwrap();
        let gap = (&with - &without - wanted.t())
            .iter()
            .fold(0.0f32, |m, g| m.max(g.abs()));
        assert!(gap < 1e-5, "{gap}");
        assert!(wanted.iter().any(|w| w.abs() > 1e-2));
    }

    let (without, plan) = row_gradients(&with_losses(GateConfig::Linear, &router, vec![]));
    let prior = RoutingLoss::Dirichlet {
        weight: 0.5,
        alpha: 0.7,
    };
    let (with, _) = row_gradients(&with_losses(GateConfig::Linear, &router, vec![prior]));
    let mut d_logits = Array2::zeros((N, 4));
    dirichlet_prior(&plan, &[0.7; 4], 0.5, &mut d_logits.view_mut()).unwrap();
    let x = input(N, DIM);
    let wanted = d_logits
        .t()
        .dot(&ArrayView2::from_shape((N, DIM), &x).unwrap());
    let gap = (&with - &without - &wanted)
        .iter()
        .fold(0.0f32, |m, g| m.max(g.abs()));
    let largest = wanted.iter().fold(0.0f32, |m, g| m.max(g.abs()));
    assert!(gap < 1e-4 * largest.max(0.01), "{gap} of {largest}");
}

#[test]
fn losses_that_a_layer_cannot_have_are_refused_when_it_is_made() {
    let router = RouterConfig::TopP {
        p: 0.8,
        combine: Combine::Raw,
    };
    let any = RouterConfig::TopAny { experts: 4 };
    let refused = |gate, router: &RouterConfig, loss| {
        let config = config(gate, router.clone(), vec![loss]);
        MoeLayer::new(&config, &mut seeded_rng(0))
            .unwrap_err()
            .to_string()
    };
    for alpha in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let text = refused(
            GateConfig::Linear,
            &router,
            RoutingLoss::Dirichlet { weight: 0.1, alpha },
        );
        assert!(text.contains("alpha must be positive"), "{text}");
    }
    let nan = RoutingLoss::DiverseAndSimple { weight: f32::NAN };
    assert!(refused(GateConfig::Linear, &router, nan).contains("weight must be finite"));
    let prior = RoutingLoss::Dirichlet {
        weight: 0.1,
        alpha: 1.0,
    };
    assert!(refused(GateConfig::Linear, &any, prior).contains("needs routing by a softmax"));
    let diverse = RoutingLoss::DiverseAndSimple { weight: 0.1 };
    assert!(refused(LOW_RANK, &router, diverse).contains("needs a gate of one row an expert"));
    for text in [
        r#"{ "loss": "dirichlet", "weight": 0.1, "alpha": 1.0, "beta": 2.0 }"#,
        r#"{ "loss": "diverse_and_simple", "weight": 0.1, "alpha": 1.0 }"#,
        r#"{ "loss": "entropy", "weight": 0.1, "wight": 0.1 }"#,
    ] {
        assert!(serde_json::from_str::<RoutingLoss>(text).is_err(), "{text}");
    }
    for text in [r#"{ "beta3": 0.1 }"#, r#"{ "decays": 0.1 }"#] {
        assert!(serde_json::from_str::<mass_model::optim::EmaConfig>(text).is_err());
        let mut adamw = serde_json::to_value(AdamWConfig::default()).unwrap();
        adamw["beta3"] = 0.1.into();
        assert!(serde_json::from_value::<AdamWConfig>(adamw).is_err());
    }
}

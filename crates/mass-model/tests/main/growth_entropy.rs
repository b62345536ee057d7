//! The choice of the expert whose tokens' routing is least decided.

use mass_expand::{Choice, ControllerParams, EventKind, StopRule};
use mass_model::ModelError;
use mass_model::growth::{
    GradientNorm, Grower, GrowerConfig, Mixtures, observe, routing_entropies,
};
use mass_model::lm::LanguageModel;
use mass_model::optim::{AdamW, AdamWConfig};
use mass_routing::{Combine, Router, RouterConfig, RoutingPlan, TopK};
use ndarray::array;

use crate::growing::{SEQ, advance, batch, model};

fn grower(choice: Choice) -> Grower {
    let controller = ControllerParams {
        choice,
        averaging_steps: 1.0,
        stop: StopRule::Never,
        ..ControllerParams::paper(2, 3, 6, 400).with_schedule(2, 3)
    };
    Grower::new(GrowerConfig::new(controller)).unwrap()
}

fn top_k(k: usize) -> RouterConfig {
    RouterConfig::TopK {
        k,
        combine: Combine::Renormalised,
    }
}

/// By hand, from the softmax written out.
#[test]
fn the_entropy_of_an_expert_is_the_mean_of_its_tokens_own() {
    // Of odds 1 : 1 : 2, 1 : 4 : 5 and 8 : 1 : 1.
    let odds = array![[1.0_f32, 1.0, 2.0], [1.0, 4.0, 5.0], [8.0, 1.0, 1.0]];
    let entropy = |p: [f64; 3]| -p.iter().map(|p| p * p.ln()).sum::<f64>();
    let (a, b, c) = (
        entropy([0.25, 0.25, 0.5]),
        entropy([0.1, 0.4, 0.5]),
        entropy([0.8, 0.1, 0.1]),
    );
    let mut plan = RoutingPlan::default();
    let mut one = TopK::new(1, Combine::Renormalised).unwrap();
    let logits = odds.mapv(f32::ln);
    one.route(logits.view(), None, &mut plan).unwrap();
    let close = |found: Vec<Option<f64>>, wanted: [Option<f64>; 3]| {
        for (f, w) in found.iter().zip(wanted) {
            assert_eq!(f.is_some(), w.is_some(), "{found:?}");
            let gap = f.unwrap_or(0.0) - w.unwrap_or(0.0);
            assert!(gap.abs() < 1e-6, "{found:?}, {wanted:?}");
        }
    };
    // The third has the first two tokens, the second none.
    close(
        routing_entropies(&plan).unwrap(),
        [Some(c), None, Some((a + b) / 2.0)],
    );
    // Without the last, of whom nothing is left in the distributions: 1 : 1, 1 : 4 and 8 : 1.
    let mask = [true, true, false];
    one.route(logits.view(), Some(&mask), &mut plan).unwrap();
    let two = |p: f64| -p * p.ln() - (1.0 - p) * (1.0 - p).ln();
    close(
        routing_entropies(&plan).unwrap(),
        [
            Some((two(0.5) + two(1.0 / 9.0)) / 2.0),
            Some(two(0.2)),
            None,
        ],
    );
    // Nothing is undecided: zero, and not less.
    let sure = array![[90.0_f32, 0.0, -90.0]];
    one.route(sure.view(), None, &mut plan).unwrap();
    assert_eq!(routing_entropies(&plan).unwrap(), [Some(0.0), None, None]);
    one.route(sure.slice(ndarray::s![..0, ..]), None, &mut plan)
        .unwrap();
    assert_eq!(routing_entropies(&plan).unwrap(), [None; 3]);
}

/// At the first split of each layer, the source is the expert that the plan of that step says it is.
#[test]
fn the_expert_with_the_largest_entropy_is_split() {
    for router in [
        top_k(1),
        top_k(2),
        RouterConfig::TopP {
            p: 0.6,
            combine: Combine::Renormalised,
        },
    ] {
        let mut model = model(router);
        let mut optimizer = AdamW::new(AdamWConfig::default()).unwrap();
        let mut grower = grower(Choice::RoutingEntropy);
        // What the grower is told at each step, the averages being of the last step on which an expert had tokens.
        let mut seen = [[0.0; 3]; 2];
        let mut look = |model: &LanguageModel, at: u64| {
            let (tokens, targets) = batch(at);
            let pass = model.train_pass(&tokens, &targets, SEQ).unwrap();
            for (seen, trace) in seen.iter_mut().zip(&pass.layers) {
                let found = routing_entropies(&trace.plan).unwrap();
                for (seen, found) in seen.iter_mut().zip(found) {
                    *seen = found.unwrap_or(*seen);
                }
            }
            seen.map(|of| {
                (0..3)
                    .rev()
                    .max_by(|&a, &b| of[a].total_cmp(&of[b]))
                    .unwrap()
            })
        };
        for at in 0..2 {
            look(&model, at);
            let events = advance(&mut model, &mut optimizer, &mut grower, at..at + 1, &|s| s);
            assert!(!events.iter().any(|k| matches!(k, EventKind::Split { .. })));
        }
        let expected = look(&model, 2).map(|at| at as u32);
        let events = advance(&mut model, &mut optimizer, &mut grower, 2..3, &|s| s);
        let split = |kind: &EventKind| match kind {
            EventKind::Split { source, .. } => Some(source.0),
            _ => None,
        };
        let sources: Vec<u32> = events.iter().filter_map(split).collect();
        assert_eq!(sources, expected);
        let later = advance(&mut model, &mut optimizer, &mut grower, 3..12, &|s| s);
        assert_eq!(later.iter().filter_map(split).count(), 4);
    }
}

/// Nobody else has it computed, and a router without a softmax has none: the grower is then as it was.
#[test]
fn a_router_without_a_softmax_is_refused_for_this_choice_alone() {
    let mut model = model(RouterConfig::TopAny { experts: 3 });
    let mut optimizer = AdamW::new(AdamWConfig::default()).unwrap();
    let (tokens, targets) = batch(0);
    let mut pass = model.train_pass(&tokens, &targets, SEQ).unwrap();
    let refused = routing_entropies(&pass.layers[0].plan);
    assert!(matches!(refused, Err(ModelError::Config(_))), "{refused:?}");
    let mut grower = grower(Choice::RoutingEntropy);
    let before = serde_json::to_string(&grower).unwrap();
    let step = grower.step(0, &mut model, &mut optimizer, &mut pass, |_, _, _| {
        unreachable!("no losses are needed")
    });
    assert!(matches!(step, Err(ModelError::Config(_))), "{step:?}");
    assert_eq!(serde_json::to_string(&grower).unwrap(), before);

    let seen = observe(
        model.mixture(0),
        &pass.layers[0],
        &pass.token_losses,
        &mut pass.gradients,
        GradientNorm::Fc1,
    )
    .unwrap();
    assert!(seen.iter().all(|expert| expert.routing_entropy.is_none()));
    let mut loaded = self::grower(Choice::MostLoaded);
    advance(&mut model, &mut optimizer, &mut loaded, 0..6, &|s| s);
    assert_eq!(model.mixture(0).experts().len(), 5);
}

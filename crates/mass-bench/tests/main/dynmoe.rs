//! DynMoE's changes to a pool: when, which experts, and what becomes of gate, router and optimiser.

use mass_bench::dynmoe::{DynMoe, DynMoeChange, DynMoeConfig};
use mass_expand::ExpertId;
use mass_model::bert::{BertClassifier, BertConfig, Targets, TextBatch};
use mass_model::growth::Mixtures;
use mass_model::lm::TrainPass;
use mass_model::optim::{AdamW, AdamWConfig};
use mass_model::{ModelError, Param, Parameters, seeded_rng};
use mass_routing::{Combine, RouterConfig};

const DIM: usize = 8;

fn model(router: RouterConfig) -> BertClassifier {
    let config = BertConfig {
        vocab_size: 12,
        hidden_size: DIM,
        num_hidden_layers: 1,
        num_attention_heads: 2,
        intermediate_size: 16,
        max_position_embeddings: 8,
        initializer_range: 0.5,
        ..BertConfig::default()
    };
    let mut rng = seeded_rng(3);
    let mut model = BertClassifier::new(&config, 2, &mut rng).unwrap();
    model.convert(0, 3, router, &mut rng).unwrap();
    model
}

fn pass(model: &BertClassifier) -> TrainPass {
    let ids = vec![1, 4, 5, 6, 2, 1, 7, 8, 2];
    let batch = TextBatch::packed(ids, vec![0; 9], vec![0, 5, 9]);
    model
        .train_pass(&batch, Targets::Classes(&[0, 1]), None)
        .unwrap()
}

/// Gate rows that make every logit positive, or negative, whatever the token: layer norm leaves token sums at zero, so
/// its bias is what they meet.
fn push_gate(model: &mut BertClassifier, expert: usize, active: bool) {
    let id = model.mixture(0).ids()[expert];
    let sign = if active { 1.0 } else { -1.0 };
    let moe = model.mixture_mut(0);
    moe.expert_mut(id).unwrap().gate.values_mut().fill(0.0);
    moe.expert_mut(id).unwrap().logit_offset = sign;
}

fn optimizer(model: &mut BertClassifier) -> AdamW {
    let mut optimizer = AdamW::new(AdamWConfig::default()).unwrap();
    let mut first = pass(model);
    optimizer.step(model, &mut first.gradients, 0.0).unwrap();
    optimizer
}

fn config(experts_max: usize) -> DynMoeConfig {
    DynMoeConfig::language(8, experts_max)
}

#[test]
fn unused_experts_go_at_three_quarters_of_an_epoch() {
    let mut model = model(RouterConfig::TopAny { experts: 3 });
    push_gate(&mut model, 0, true);
    push_gate(&mut model, 1, false);
    push_gate(&mut model, 2, true);
    let template = model.mixture(0).experts()[0].clone();
    let mut optimizer = optimizer(&mut model);
    let mut dynmoe = DynMoe::new(config(4), 1).unwrap();
    let mut found = Vec::new();
    for step in 0..16 {
        let pass = pass(&model);
        let events = dynmoe
            .step(
                step,
                &mut model,
                &mut optimizer,
                &pass,
                std::slice::from_ref(&template),
            )
            .unwrap();
        found.extend(events);
        // A pool whose record is under way survives a round trip through a checkpoint.
        let text = serde_json::to_string(&dynmoe).unwrap();
        assert_eq!(dynmoe, serde_json::from_str(&text).unwrap());
    }
    assert_eq!(found.len(), 1);
    assert_eq!((found[0].step, found[0].layer), (6, 0));
    assert_eq!(
        found[0].kind,
        DynMoeChange::Remove {
            expert: ExpertId(1),
            experts: 2
        }
    );
    assert_eq!(model.mixture(0).ids(), [ExpertId(0), ExpertId(2)]);
    assert!(
        !optimizer
            .state()
            .keys()
            .any(|name| name.contains("experts.1."))
    );
    assert!(
        optimizer
            .state()
            .keys()
            .any(|name| name.contains("experts.2."))
    );
    let text = serde_json::to_value(&found[0]).unwrap();
    assert_eq!(
        (&text["kind"], &text["expert"]),
        (&"remove".into(), &1.into())
    );
}

#[test]
fn tokens_routed_nowhere_get_an_expert_along_their_sum() {
    let mut model = model(RouterConfig::TopAny { experts: 3 });
    for expert in 0..3 {
        push_gate(&mut model, expert, false);
    }
    let mut template = model.mixture(0).experts()[0].clone();
    template.threshold = Some(Param::new(vec![0.7], &[1], false).unwrap());
    let mut optimizer = optimizer(&mut model);
    let mut dynmoe = DynMoe::new(config(4), 1).unwrap();
    let inputs = pass(&model).layers[0].gate_input.as_vec();
    let mut found = Vec::new();
    for step in 0..7 {
        let pass = pass(&model);
        assert_eq!(pass.layers[0].plan.num_assignments(), 0);
        found.extend(
            dynmoe
                .step(
                    step,
                    &mut model,
                    &mut optimizer,
                    &pass,
                    std::slice::from_ref(&template),
                )
                .unwrap(),
        );
    }
    // Two of the three experts without tokens go: one always stays.
    let last = DynMoeChange::Add {
        expert: ExpertId(3),
        tokens: 27,
        experts: 2,
    };
    assert_eq!(found.len(), 3);
    assert_eq!(found[2].kind, last);
    assert_eq!(model.mixture(0).ids(), [ExpertId(0), ExpertId(3)]);
    // The row is the sum of the tokens' representations, of length one; the network is the template's.
    let newcomer = &model.mixture(0).experts()[1];
    let sum: Vec<f32> = (0..DIM)
        .map(|i| inputs.iter().skip(i).step_by(DIM).sum())
        .collect();
    let norm = sum.iter().map(|x| x * x).sum::<f32>().sqrt();
    for (w, s) in newcomer.gate.values().iter().zip(&sum) {
        assert!((w - s / norm).abs() < 1e-5, "{w} for {}", s / norm);
    }
    assert_eq!(
        newcomer.network.fc1.0.values(),
        template.network.fc1.0.values()
    );
    let threshold = newcomer.threshold.as_ref().unwrap();
    assert_eq!(threshold.values(), [0.0]);
    // The pool that is left routes and trains.
    let mut after = pass(&model);
    assert!(after.layers[0].plan.load(1) > 0);
    optimizer
        .step(&mut model, &mut after.gradients, 1e-3)
        .unwrap();
}

#[test]
fn a_full_pool_takes_no_newcomer_and_the_record_starts_anew_each_epoch() {
    let mut model = model(RouterConfig::TopAny { experts: 3 });
    for expert in 0..3 {
        push_gate(&mut model, expert, false);
    }
    let template = model.mixture(0).experts()[0].clone();
    let mut optimizer = optimizer(&mut model);
    let mut dynmoe = DynMoe::new(config(1), 1).unwrap();
    for step in 0..16 {
        let pass = pass(&model);
        dynmoe
            .step(
                step,
                &mut model,
                &mut optimizer,
                &pass,
                std::slice::from_ref(&template),
            )
            .unwrap();
    }
    assert_eq!(model.mixture(0).ids(), [ExpertId(0)]);
}

#[test]
fn the_gate_loss_has_the_gradient_of_its_value() {
    let model = model(RouterConfig::TopAny { experts: 3 });
    let dynmoe = DynMoe::new(config(4), 1).unwrap();
    let mut with = pass(&model);
    let loss = dynmoe.add_loss(&model, &mut with.gradients).unwrap();
    let mut without = pass(&model);
    let h = 1e-2;
    for i in [0, 5] {
        let moved = |by: f32| {
            let mut other = model.clone();
            let id = other.mixture(0).ids()[1];
            other
                .mixture_mut(0)
                .expert_mut(id)
                .unwrap()
                .gate
                .values_mut()[i] += by;
            dynmoe
                .add_loss(&other, &mut pass(&other).gradients)
                .unwrap()
        };
        let numeric = (moved(h) - moved(-h)) / f64::from(2.0 * h);
        let gate = &model.mixture(0).experts()[1].gate;
        let exact = gate.gradient(&mut with.gradients).unwrap()[i]
            - gate.gradient(&mut without.gradients).unwrap()[i];
        assert!(
            (numeric - f64::from(exact)).abs() < 1e-4,
            "{numeric} for {exact}"
        );
    }
    assert!(loss > 0.0);
}

#[test]
fn what_cannot_be_adapted_is_refused() {
    for bad in [
        DynMoeConfig {
            steps_per_epoch: 0,
            ..config(4)
        },
        DynMoeConfig {
            experts_max: 0,
            ..config(4)
        },
        DynMoeConfig {
            record_from: 0.9,
            ..config(4)
        },
        DynMoeConfig {
            adapt_at: f64::NAN,
            ..config(4)
        },
        DynMoeConfig {
            loss_weight: f32::NAN,
            ..config(4)
        },
        DynMoeConfig {
            loss_weight: -0.01,
            ..config(4)
        },
    ] {
        assert!(DynMoe::new(bad, 1).is_err(), "{bad:?}");
    }
    let combine = Combine::Raw;
    let mut model = model(RouterConfig::TopK { k: 1, combine });
    let template = model.mixture(0).experts()[0].clone();
    let mut optimizer = optimizer(&mut model);
    let mut dynmoe = DynMoe::new(config(4), 1).unwrap();
    let pass = pass(&model);
    let values = model.num_values();
    let error = dynmoe
        .step(
            6,
            &mut model,
            &mut optimizer,
            &pass,
            std::slice::from_ref(&template),
        )
        .unwrap_err();
    assert!(error.to_string().contains("top-any"), "{error}");
    assert_eq!(model.num_values(), values);
}

#[test]
fn steps_of_another_model_are_refused() {
    let mut model = model(RouterConfig::TopAny { experts: 3 });
    let template = model.mixture(0).experts()[0].clone();
    let mut optimizer = optimizer(&mut model);
    let pass = pass(&model);
    let mut refused = |layers, model: &mut BertClassifier, part: &str| {
        let mut dynmoe = DynMoe::new(config(4), layers).unwrap();
        let templates = std::slice::from_ref(&template);
        let error = dynmoe.step(6, model, &mut optimizer, &pass, templates);
        let error = error.unwrap_err();
        assert!(matches!(error, ModelError::Shape { .. }), "{error}");
        assert!(error.to_string().contains(part), "{error}");
    };
    refused(0, &mut model, "layers that are recorded");
    // The pass is of a pool of three.
    let last = model.mixture(0).ids()[2];
    model.mixture_mut(0).remove(last).unwrap();
    refused(1, &mut model, "experts of a plan");
}

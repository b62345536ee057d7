//! A pool that grows while it trains, and checkpoints of it.

use dfdx::prelude::*;
use mass_expand::{
    Answer, BisectParams, ControllerParams, Decomposition, EventKind, ExpertId, SplitOperator,
    Trigger,
};
use mass_model::checkpoint::{self, Snapshot};
use mass_model::growth::{
    GradientNorm, Grower, GrowerConfig, LossOn, Mixtures, observe, remove_expert, split_expert,
};
use mass_model::lm::{LanguageModel, Masked, TrainPass};
use mass_model::nn::MoeLayer;
use mass_model::ops::MoeExpert;
use mass_model::optim::{AdamW, AdamWConfig, Gradients};
use mass_model::{ModelError, Param};
use mass_routing::{Combine, RouterConfig};
use serde_json::json;

use crate::growing::{SEQ, advance, all_values, batch, grower, model};
use crate::saved::{damage::manifest, saved};

fn clone_operator(decomposition: Option<Decomposition>, preserve_mass: bool) -> SplitOperator {
    SplitOperator::Clone {
        decomposition,
        preserve_mass,
    }
}

#[test]
fn a_duplication_that_preserves_mass_leaves_the_output_as_it_was() {
    let mut model = model(RouterConfig::TopP {
        p: 1.0,
        combine: Combine::Raw,
    });
    let (tokens, targets) = batch(0);
    let mut pass = model.train_pass(&tokens, &targets, SEQ).unwrap();
    let before = model
        .forward(&tokens, SEQ, None, NoneTape)
        .unwrap()
        .logits
        .as_vec();
    // Twice the same source: the offsets add up.
    for expected in [3, 4] {
        let new = split_expert(
            model.mixture_mut(0),
            ExpertId(1),
            clone_operator(Some(Decomposition::Whole), true),
            &pass.layers[0],
            &mut pass.gradients,
        )
        .unwrap();
        assert_eq!(new.newcomer, ExpertId(expected));
        let after = model
            .forward(&tokens, SEQ, None, NoneTape)
            .unwrap()
            .logits
            .as_vec();
        let largest = before.iter().fold(0.0f32, |m, x| m.max(x.abs()));
        for (a, b) in before.iter().zip(&after) {
            assert!((a - b).abs() <= 1e-6 * largest.max(1.0), "{a} became {b}");
        }
    }
}

#[test]
fn one_decomposed_update_breaks_the_tie_between_twins() {
    for decomposition in [Decomposition::Whole, Decomposition::Rowwise] {
        let mut model = model(RouterConfig::TopP {
            p: 0.9,
            combine: Combine::Renormalised,
        });
        let mut optimizer = AdamW::new(AdamWConfig::default()).unwrap();
        let (tokens, targets) = batch(0);
        let mut pass = model.train_pass(&tokens, &targets, SEQ).unwrap();
        let moe = model.mixture_mut(0);
        let operator = clone_operator(Some(decomposition), false);
        split_expert(
            moe,
            ExpertId(0),
            operator,
            &pass.layers[0],
            &mut pass.gradients,
        )
        .unwrap();
        let rows = |m: &LanguageModel| {
            let experts = m.mixture(0).experts();
            (
                experts[0].gate.values().to_vec(),
                experts[3].gate.values().to_vec(),
            )
        };
        let (a, b) = rows(&model);
        assert_eq!(a, b);
        optimizer
            .step(&mut model, &mut pass.gradients, 1e-2)
            .unwrap();
        let (a, b) = rows(&model);
        assert_ne!(a, b);
        let (mut da, mut db) = (vec![0.0; a.len()], vec![0.0; b.len()]);
        mass_expand::redundancy_gradient(
            &[&a, &b],
            &[(0, 1)],
            mass_expand::Reduction::Mean,
            0.01,
            &mut [&mut da, &mut db],
        )
        .unwrap();
        assert!(da.iter().chain(&db).any(|&x| x != 0.0));
    }
}

#[test]
fn bisecting_divides_the_tokens_of_the_source() {
    let mut model = model(RouterConfig::TopK {
        k: 1,
        combine: Combine::Raw,
    });
    let (tokens, targets) = batch(0);
    let mut pass = model.train_pass(&tokens, &targets, SEQ).unwrap();
    let busiest = (0..3).max_by_key(|&e| pass.layers[0].plan.load(e)).unwrap();
    let before = pass.layers[0].plan.load(busiest);
    let id = model.mixture(0).ids()[busiest];
    split_expert(
        model.mixture_mut(0),
        id,
        SplitOperator::Bisect(BisectParams::default()),
        &pass.layers[0],
        &mut pass.gradients,
    )
    .unwrap();
    let after = model.forward(&tokens, SEQ, None, NoneTape).unwrap();
    let plan = &after.layers[0].plan;
    assert!(
        plan.load(busiest) > 0 && plan.load(3) > 0,
        "{} and {}",
        plan.load(busiest),
        plan.load(3)
    );
    assert!(plan.load(busiest) < before);
}

#[test]
fn what_was_traced_before_the_pool_changed_is_refused() {
    let mut model = model(RouterConfig::TopK {
        k: 1,
        combine: Combine::Raw,
    });
    let (tokens, targets) = batch(0);
    let mut pass = model.train_pass(&tokens, &targets, SEQ).unwrap();
    let (trace, gradients) = (&pass.layers[0], &mut pass.gradients);
    let moe = model.mixture_mut(0);
    let all = GradientNorm::AllParameters;
    observe(moe, trace, &pass.token_losses, gradients, all).unwrap();
    let split = split_expert(
        moe,
        ExpertId(0),
        SplitOperator::Bisect(BisectParams::default()),
        trace,
        gradients,
    )
    .unwrap();
    let shape = |r: Result<(), ModelError>| assert!(matches!(r, Err(ModelError::Shape { .. })));
    shape(observe(moe, trace, &pass.token_losses, gradients, all).map(drop));
    // The newcomer has no tokens in it.
    shape(
        split_expert(
            moe,
            split.newcomer,
            SplitOperator::Bisect(BisectParams::default()),
            trace,
            gradients,
        )
        .map(drop),
    );
    assert_eq!(moe.experts().len(), 4);
    // Nor is there a third layer to mask an expert of.
    let masked = Masked {
        layer: 2,
        expert: ExpertId(0),
    };
    let forward = model.forward(&tokens, SEQ, Some(masked), NoneTape);
    assert!(matches!(forward.map(drop), Err(ModelError::Config(_))));
}

#[test]
fn removing_a_newcomer_undoes_what_its_split_did_to_the_gate() {
    for operator in [
        SplitOperator::Bisect(BisectParams::default()),
        clone_operator(None, true),
        clone_operator(None, false),
    ] {
        let mut model = model(RouterConfig::TopP {
            p: 1.0,
            combine: Combine::Raw,
        });
        let (tokens, targets) = batch(0);
        let mut pass = model.train_pass(&tokens, &targets, SEQ).unwrap();
        let trace = &pass.layers[0];
        let moe = model.mixture_mut(0);
        let before = gates(moe);
        let first = split_expert(moe, ExpertId(1), operator, trace, &mut pass.gradients).unwrap();
        // What a half learns stays, and so does a later split of it.
        moe.expert_mut(ExpertId(1)).unwrap().gate.values_mut()[3] += 0.25;
        let after_one = gates(moe);
        let second = split_expert(moe, ExpertId(1), operator, trace, &mut pass.gradients).unwrap();
        let other = remove_expert(moe, ExpertId(0), Some(&second)).unwrap_err();
        assert!(matches!(other, ModelError::Config(_)), "{other}");
        remove_expert(moe, second.newcomer, Some(&second)).unwrap();
        close(&gates(moe), &after_one);
        remove_expert(moe, first.newcomer, Some(&first)).unwrap();
        let mut learnt = before.clone();
        learnt[13 + 3] += 0.25;
        close(&gates(moe), &learnt);

        // The source may be the one that goes.
        let again = split_expert(moe, ExpertId(1), operator, trace, &mut pass.gradients).unwrap();
        remove_expert(moe, ExpertId(1), Some(&again)).unwrap();
        let left = moe.index_of(again.newcomer).unwrap();
        let newcomer = &moe.experts()[left];
        close(newcomer.gate.values(), &learnt[13..25]);
        assert!((newcomer.logit_offset - learnt[25]).abs() < 1e-5);
    }
}

/// What `split_expert` may be asked.
fn operators() -> [SplitOperator; 2] {
    let bisect = SplitOperator::Bisect(BisectParams::default());
    [bisect, clone_operator(Some(Decomposition::Whole), true)]
}

#[test]
fn a_split_that_is_refused_changes_nothing() {
    let changes: [fn(&mut MoeExpert); 3] = [
        |e| e.network.fc1.0 = Param::new(vec![1.0], &[], true).unwrap(),
        |e| e.gate = Param::zeros(&[13], true).unwrap(),
        |e| e.threshold = Some(Param::zeros(&[1], false).unwrap()),
    ];
    for (change, operator) in changes
        .into_iter()
        .flat_map(|c| operators().map(|o| (c, o)))
    {
        let mut model = model(RouterConfig::TopP {
            p: 1.0,
            combine: Combine::Raw,
        });
        let (tokens, targets) = batch(0);
        let mut pass = model.train_pass(&tokens, &targets, SEQ).unwrap();
        let moe = model.mixture_mut(0);
        change(moe.expert_mut(ExpertId(1)).unwrap());
        refuse_split(moe, operator, &mut pass);
    }
}

/// That of expert 1.
fn refuse_split(moe: &mut MoeLayer, operator: SplitOperator, pass: &mut TrainPass) {
    let state = |moe: &MoeLayer, pass: &mut TrainPass| {
        let expert = &moe.experts()[1];
        let params = [&expert.gate, &expert.network.fc1.0];
        let gradients = params.map(|p| pass.gradients.copy(p).unwrap());
        (gates(moe), gradients, moe.next_id())
    };
    let before = state(moe, pass);
    let trace = &pass.layers[0];
    let refused = split_expert(moe, ExpertId(1), operator, trace, &mut pass.gradients);
    let shape_or_id = |e: &ModelError| match e {
        ModelError::Shape { .. } => true,
        ModelError::Config(why) => why.contains("no id is left") || why.contains("threshold"),
        _ => false,
    };
    assert!(refused.as_ref().is_err_and(shape_or_id), "{refused:?}");
    assert_eq!(state(moe, pass), before);
}

#[test]
fn a_pool_without_an_id_left_is_read_and_split_no_more() {
    let dir = tempfile::tempdir().unwrap();
    let folder = saved(dir.path(), 3);
    manifest(&folder, &|json| {
        json["pools"][0]["next_id"] = json!(u32::MAX);
    });
    let mut model: LanguageModel = checkpoint::load_model(dir.path()).unwrap();
    let (tokens, targets) = crate::saved::batch();
    let mut pass = model.train_pass(&tokens, &targets, 4).unwrap();
    for operator in operators() {
        refuse_split(model.mixture_mut(0), operator, &mut pass);
    }
}

#[test]
fn a_removal_that_is_refused_undoes_no_split() {
    let mut model = model(RouterConfig::TopK {
        k: 2,
        combine: Combine::Raw,
    });
    let (tokens, targets) = batch(0);
    let mut pass = model.train_pass(&tokens, &targets, SEQ).unwrap();
    let (trace, gradients) = (&pass.layers[0], &mut pass.gradients);
    let moe = model.mixture_mut(0);
    let [bisect, _] = operators();
    let shift = split_expert(moe, ExpertId(0), bisect, trace, gradients).unwrap();
    for gone in [1, 2] {
        remove_expert(moe, ExpertId(gone), None).unwrap();
    }
    let before = gates(moe);
    let refused = remove_expert(moe, shift.newcomer, Some(&shift));
    assert!(matches!(refused, Err(ModelError::Routing(_))));
    assert_eq!(gates(moe), before);
}

/// Gate row and logit offset of every expert.
fn gates(layer: &MoeLayer) -> Vec<f32> {
    let experts = layer.experts().iter();
    experts
        .flat_map(|e| [e.gate.values(), &[e.logit_offset]].concat())
        .collect()
}

fn close(found: &[f32], wanted: &[f32]) {
    assert_eq!(found.len(), wanted.len());
    for (a, b) in found.iter().zip(wanted) {
        assert!((a - b).abs() < 1e-5, "{a} for {b}");
    }
}

/// A newcomer that a probe finds worthless is taken back, and the gate is as if it had never been.
#[test]
fn a_failed_newcomer_leaves_the_gate_as_it_was() {
    let mut model = model(RouterConfig::TopP {
        p: 0.6,
        combine: Combine::Renormalised,
    });
    let mut optimizer = AdamW::new(AdamWConfig::default()).unwrap();
    let mut params = ControllerParams::paper(2, 3, 6, 40);
    params.trigger = Trigger::Schedule {
        first: 1,
        every: 9,
        splits: 1,
    };
    params.choice = mass_expand::Choice::MostLoaded;
    params.operator = SplitOperator::Bisect(BisectParams::default());
    params.stop = mass_expand::StopRule::HeldOut {
        margin: 0.0,
        z: 0.0,
        wait: 2,
        patience: 1,
        remove: true,
    };
    (params.phase.live_from, params.phase.live_until) = (0, 30);
    let mut grower = Grower::new(GrowerConfig {
        controller: params,
        gradient_norm: GradientNorm::Fc1,
        redundancy_weight: 0.0,
        redundancy_reduction: mass_expand::Reduction::Mean,
    })
    .unwrap();
    let before = gates(model.mixture(0));
    let mut kinds = Vec::new();
    for step in 0..5 {
        let (tokens, targets) = batch(step);
        let mut pass = model.train_pass(&tokens, &targets, SEQ).unwrap();
        let events = grower
            .step(
                step,
                &mut model,
                &mut optimizer,
                &mut pass,
                |model, on, masked| {
                    assert_eq!(on, LossOn::Probe);
                    let Some(masked) = masked else {
                        return Ok(vec![0.5, 0.6]);
                    };
                    // What is compared with the whole is the layer as it would be without the newcomer.
                    if masked.layer == 0 {
                        close(&gates(model.mixture(0))[..before.len()], &before);
                    }
                    Ok(vec![0.4, 0.5])
                },
            )
            .unwrap();
        kinds.extend(events.into_iter().map(|e| e.kind));
        if step == 1 {
            assert_ne!(gates(model.mixture(0))[..before.len()], before[..]);
            // A grower that was saved in between knows what to undo.
            let text = serde_json::to_string(&grower).unwrap();
            grower = serde_json::from_str(&text).unwrap();
        }
    }
    let of = |f: fn(&EventKind) -> bool| kinds.iter().filter(|k| f(k)).count();
    assert_eq!(of(|k| matches!(k, EventKind::Split { .. })), 2);
    assert_eq!(of(|k| matches!(k, EventKind::Remove { .. })), 2);
    close(&gates(model.mixture(0)), &before);
}

/// A stored grower is one that training has made: its rules are its controller's, and it knows what each split did.
#[test]
fn hostile_growers_are_refused() {
    let (mut model, mut control) = (
        model(RouterConfig::TopP {
            p: 0.6,
            combine: Combine::Renormalised,
        }),
        grower(),
    );
    let mut optimizer = AdamW::new(AdamWConfig::default()).unwrap();
    advance(&mut model, &mut optimizer, &mut control, 0..5, &|step| step);
    let good = serde_json::to_value(&control).unwrap();
    let again: Grower = serde_json::from_value(good.clone()).unwrap();
    assert_eq!(serde_json::to_value(&again).unwrap(), good);
    let splits = good["shifts"].as_array().unwrap();
    assert_eq!(splits.len(), 2);
    for (at, value) in [
        ("/config/redundancy_weight", json!(-1)),
        ("/config/controller/k_max", json!(7)),
        ("/controller/params/k_max", json!(7)),
        ("/shifts", json!([])),
        ("/shifts", json!([splits[0]])),
        ("/shifts", json!([splits[0], splits[1], splits[1]])),
        ("/shifts/1/0", json!(2)),
        ("/shifts/0/1/source", json!(9)),
    ] {
        let mut state = good.clone();
        *state.pointer_mut(at).unwrap() = value;
        assert!(serde_json::from_value::<Grower>(state).is_err(), "{at}");
    }
    for part in ["config", "controller", "shifts"] {
        let mut state = good.clone();
        state.as_object_mut().unwrap().remove(part).unwrap();
        assert!(serde_json::from_value::<Grower>(state).is_err(), "{part}");
    }
}

/// A stopped layer's gradient norms are not computed; a controller that is told them all decides the same.
#[test]
fn norms_that_nobody_asks_for_change_no_event() {
    let mut model = model(RouterConfig::TopP {
        p: 0.6,
        combine: Combine::Renormalised,
    });
    let mut optimizer = AdamW::new(AdamWConfig::default()).unwrap();
    let watch = || mass_expand::Watch::experts(mass_cpd::WindowedZParams::paper(2, 2, 0.4));
    let mut params = ControllerParams::paper(2, 3, 8, 40);
    params.watch = watch();
    params.trigger = Trigger::DetectorOnly;
    params.stop = mass_expand::StopRule::Consecutive { gamma: 1 };
    params.phase = mass_expand::Phase {
        live_from: 0,
        live_until: 20,
        continual: Some(watch()),
    };
    let mut told = params.check().unwrap();
    let config = GrowerConfig {
        controller: params,
        gradient_norm: GradientNorm::AllParameters,
        redundancy_weight: 0.0,
        redundancy_reduction: mass_expand::Reduction::Mean,
    };
    let mut grower = Grower::new(config).unwrap();
    // Masking the newest expert costs nothing: the first check ends expansion, until the continual phase.
    let answer = |request| match request {
        mass_expand::Request::MaskedLoss { layer, expert } => Answer::MaskedLoss {
            layer,
            expert,
            masked: 0.5,
            full: 1.0,
        },
        other => panic!("{other:?}"),
    };
    let (mut all, mut stopped_steps) = (Vec::new(), 0);
    for step in 0..30 {
        let (tokens, targets) = batch(step);
        let mut pass = model.train_pass(&tokens, &targets, SEQ).unwrap();
        stopped_steps += u32::from(told.stopped(0).is_some());
        let seen: Vec<_> = (0..2)
            .map(|l| {
                observe(
                    model.mixture(l),
                    &pass.layers[l],
                    &pass.token_losses,
                    &mut pass.gradients,
                    GradientNorm::AllParameters,
                )
                .unwrap()
            })
            .collect();
        let layers: Vec<_> = seen
            .iter()
            .map(|experts| mass_expand::LayerObservation {
                experts,
                hidden: 10,
                dim: 12,
            })
            .collect();
        let mut requests = told
            .begin_step(&mass_expand::StepObservation {
                step,
                loss: f64::from(pass.loss),
                layers: &layers,
            })
            .unwrap();
        while let Some(request) = requests.pop() {
            requests.extend(told.answer(answer(request)).unwrap());
        }
        told.finish_step().unwrap();
        let events = grower
            .step(
                step,
                &mut model,
                &mut optimizer,
                &mut pass,
                |_, on, masked| {
                    assert_eq!(on, LossOn::Batch);
                    Ok(vec![if masked.is_some() { 0.5 } else { 1.0 }])
                },
            )
            .unwrap();
        assert_eq!(events, told.drain_events(), "step {step}");
        all.extend(events);
        optimizer
            .step(&mut model, &mut pass.gradients, 5e-3)
            .unwrap();
    }
    assert!(stopped_steps > 3, "{stopped_steps}");
    let late = |e: &&mass_expand::Event| e.step >= 20 && matches!(e.kind, EventKind::Flag { .. });
    assert!(all.iter().any(|e| late(&e)), "{all:?}");
    assert_eq!(grower.controller().live_steps(), told.live_steps());
}

#[test]
fn resuming_from_any_step_is_bit_identical_to_never_having_stopped() {
    // Its noise has a state of its own, which a forward pass moves on.
    let router = RouterConfig::Noisy {
        std: 0.3,
        seed: 9,
        inner: Box::new(RouterConfig::TopP {
            p: 0.6,
            combine: Combine::Renormalised,
        }),
    };
    let (mut whole, mut optimizer, mut control) = (
        model(router.clone()),
        AdamW::new(AdamWConfig::default()).unwrap(),
        grower(),
    );
    let events = advance(&mut whole, &mut optimizer, &mut control, 0..20, &|step| {
        step
    });
    let splits = events
        .iter()
        .filter(|e| matches!(e, EventKind::Split { .. }))
        .count();
    assert!(splits >= 4, "{splits} splits");
    assert!(whole.mixture(0).ids().len() > 3);
    let dir = tempfile::tempdir().unwrap();
    // Step 5 is right after the first expansion.
    for stop in [1, 5, 12] {
        let (mut first, mut optimizer, mut control) = (
            model(router.clone()),
            AdamW::new(AdamWConfig::default()).unwrap(),
            grower(),
        );
        advance(&mut first, &mut optimizer, &mut control, 0..stop, &|step| {
            step
        });
        let snapshot = Snapshot {
            step: stop,
            model: &first,
            optimizer: &optimizer,
            ema: None,
            state: &control,
        };
        checkpoint::save(dir.path(), &snapshot).unwrap();
        drop((first, optimizer, control));
        let mut read = checkpoint::load::<LanguageModel, Grower>(dir.path()).unwrap();
        assert_eq!(read.step, stop);
        advance(
            &mut read.model,
            &mut read.optimizer,
            &mut read.state,
            stop..20,
            &|step| step,
        );
        assert_eq!(
            all_values(&read.model),
            all_values(&whole),
            "stopped at {stop}"
        );
    }
    // The last two are kept, and nothing half-written.
    let mut left: Vec<_> = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    left.sort();
    assert_eq!(left, ["latest", "step-0000000005", "step-0000000012"]);
}

#[test]
fn gradients_that_are_not_finite_change_nothing() {
    let mut model = model(RouterConfig::TopK {
        k: 1,
        combine: Combine::Raw,
    });
    let mut optimizer = AdamW::new(AdamWConfig::default()).unwrap();
    let (tokens, targets) = batch(0);
    let mut pass = model.train_pass(&tokens, &targets, SEQ).unwrap();
    model.head.weight.gradient(&mut pass.gradients).unwrap()[3] = f32::NAN;
    let before = all_values(&model);
    let error = optimizer
        .step(&mut model, &mut pass.gradients, 1e-3)
        .unwrap_err();
    assert!(error.to_string().contains("head.weight"), "{error}");
    assert_eq!(all_values(&model), before);
}

/// Rules that ask for losses on a probe.
fn probing(operator: SplitOperator) -> GrowerConfig {
    let mut params = ControllerParams::paper(2, 3, 6, 40);
    params.trigger = Trigger::Schedule {
        first: 1,
        every: 3,
        splits: 1,
    };
    params.choice = mass_expand::Choice::MostLoaded;
    params.operator = operator;
    params.stop = mass_expand::StopRule::HeldOut {
        margin: 0.0,
        z: 0.0,
        wait: 2,
        patience: 3,
        remove: false,
    };
    (params.phase.live_from, params.phase.live_until) = (0, 30);
    GrowerConfig {
        controller: params,
        gradient_norm: GradientNorm::Fc1,
        redundancy_weight: 0.0,
        redundancy_reduction: mass_expand::Reduction::Mean,
    }
}

/// Losses that cannot be had once are asked for again, and nothing is different then.
#[test]
fn a_step_whose_losses_fail_can_be_made_again() {
    let run = |fails: bool| {
        let mut model = model(RouterConfig::TopP {
            p: 0.6,
            combine: Combine::Renormalised,
        });
        let mut optimizer = AdamW::new(AdamWConfig::default()).unwrap();
        let mut grower = Grower::new(probing(clone_operator(None, true))).unwrap();
        let (mut events, mut failed) = (Vec::new(), 0);
        for step in 0..9 {
            let (tokens, targets) = batch(step);
            let mut pass = model.train_pass(&tokens, &targets, SEQ).unwrap();
            if fails {
                let before = grower.clone();
                let lost = |_: &LanguageModel, _, _| Err(ModelError::NonFinite("lost".into()));
                let tried = grower.step(step, &mut model, &mut optimizer, &mut pass, lost);
                match tried {
                    Ok(found) => {
                        events.extend(found);
                        optimizer
                            .step(&mut model, &mut pass.gradients, 1e-2)
                            .unwrap();
                        continue;
                    }
                    Err(error) => assert!(error.to_string().contains("lost"), "{error}"),
                }
                let text = |g: &Grower| serde_json::to_string(g).unwrap();
                assert_eq!(text(&grower), text(&before));
                failed += 1;
            }
            let found = |_: &LanguageModel, _, masked: Option<Masked>| {
                Ok(vec![0.5, if masked.is_some() { 0.7 } else { 0.6 }])
            };
            let step = grower.step(step, &mut model, &mut optimizer, &mut pass, found);
            events.extend(step.unwrap());
            optimizer
                .step(&mut model, &mut pass.gradients, 1e-2)
                .unwrap();
        }
        assert_eq!(failed > 0, fails);
        (events, all_values(&model))
    };
    assert_eq!(run(true), run(false));
}

#[test]
fn rules_that_a_model_cannot_follow_are_refused_before_anything_is_done() {
    let refused = |mut model: LanguageModel, config: GrowerConfig, part: &str| {
        let mut optimizer = AdamW::new(AdamWConfig::default()).unwrap();
        let (tokens, targets) = batch(0);
        let mut pass = model.train_pass(&tokens, &targets, SEQ).unwrap();
        let mut grower = Grower::new(config).unwrap();
        let none = |_: &LanguageModel, _, _| -> Result<Vec<f64>, ModelError> { panic!("asked") };
        let error = grower
            .step(0, &mut model, &mut optimizer, &mut pass, none)
            .unwrap_err();
        assert!(error.to_string().contains(part), "{error}");
        assert_eq!(grower.controller().last_step(), None);
        pass.layers.pop();
        let error = grower
            .step(0, &mut model, &mut optimizer, &mut pass, none)
            .unwrap_err();
        assert!(
            error.to_string().contains("mixture layers traced"),
            "{error}"
        );
    };
    let top_k = || {
        model(RouterConfig::TopK {
            k: 2,
            combine: Combine::Raw,
        })
    };
    let mut pruned = probing(clone_operator(None, true));
    pruned.controller.pruning = Some(mass_expand::Pruning {
        min_experts: 1,
        min_age: 1,
        unused: None,
        redundant: None,
    });
    refused(top_k(), pruned.clone(), "takes 2");
    // Two would do, if none of them were masked.
    let pruning = pruned.controller.pruning.as_mut().unwrap();
    pruning.min_experts = 2;
    refused(top_k(), pruned, "masked to check");
    let mut config = crate::growing::config(RouterConfig::TopP {
        p: 0.6,
        combine: Combine::Renormalised,
    });
    config.block.moe.gate = mass_model::nn::GateConfig::Cosine {
        projection: None,
        temperature: None,
    };
    let cosine = LanguageModel::new(&config, &mut mass_model::seeded_rng(1)).unwrap();
    refused(
        cosine,
        probing(SplitOperator::Bisect(BisectParams::default())),
        "linear gate",
    );
}

//! What growth does to gradients and reads off them: what a split hands on, what the controller is told, and the redundancy
//! loss.

use std::collections::BTreeMap;

use mass_expand::{
    AlignmentThreshold, BisectParams, ControllerParams, Decomposition, Event, EventKind, ExpertId,
    Reduction, SplitOperator, StopReason, StopRule, alignment, divide_gradient,
    redundancy_gradient,
};
use mass_model::growth::{
    GradientNorm, Grower, GrowerConfig, LossOn, Mixtures, observe, pair_figures, split_expert,
};
use mass_model::lm::{LanguageModel, LanguageModelConfig, Masked};
use mass_model::nn::{GateConfig, MoeLayer};
use mass_model::optim::{AdamW, AdamWConfig};
use mass_model::{CpuGradients, ModelError, Parameters, seeded_rng};
use mass_routing::{Combine, RouterConfig};

use crate::growing::{SEQ, batch};

fn top_p() -> RouterConfig {
    RouterConfig::TopP {
        p: 0.9,
        combine: Combine::Renormalised,
    }
}

/// For rules that need no losses.
fn asks_nothing(_: &LanguageModel, _: LossOn, _: Option<Masked>) -> Result<Vec<f64>, ModelError> {
    panic!("no loss is needed")
}

/// An expert's gradients, by the name that each parameter has within it.
fn gradients_of(
    layer: &MoeLayer,
    id: ExpertId,
    gradients: &mut CpuGradients,
) -> BTreeMap<String, Vec<f32>> {
    let prefix = format!("experts.{id}.");
    let mut found = BTreeMap::new();
    layer.visit("", &mut |name, param| {
        if let Some(name) = name.strip_prefix(&prefix) {
            let gradient = param.gradient(gradients).unwrap().clone();
            found.insert(name.to_owned(), gradient);
        }
    });
    found
}

/// Models with plain and with gated experts behind a linear gate, and with learned thresholds behind a cosine gate; and how many
/// parameters each of their experts has.
fn kinds() -> [(LanguageModelConfig, usize); 3] {
    let plain = crate::growing::config(top_p());
    let mut gated = plain.clone();
    gated.block.moe.gated = true;
    let mut any = crate::growing::config(RouterConfig::TopAny { experts: 3 });
    any.block.moe.gate = GateConfig::Cosine {
        projection: None,
        temperature: None,
    };
    [(plain, 5), (gated, 7), (any, 6)]
}

/// A newcomer gets every gradient of its source. The source's fc1 and gate row keep what lies along their weights if there is a
/// decomposition; nothing else changes, and nothing at all if it is bisected.
#[test]
fn a_split_hands_on_every_gradient_and_cuts_two_of_the_sources() {
    let clone = |decomposition, preserve_mass| SplitOperator::Clone {
        decomposition,
        preserve_mass,
    };
    let operators = [
        clone(None, false),
        clone(Some(Decomposition::Whole), false),
        clone(Some(Decomposition::Rowwise), true),
        SplitOperator::Bisect(BisectParams::default()),
    ];
    for (config, parameters) in kinds() {
        for operator in operators {
            let linear = config.block.moe.gate == GateConfig::Linear;
            if matches!(operator, SplitOperator::Bisect(_)) && !linear {
                continue;
            }
            let what = format!("{operator:?}, {:?}", config.block.moe);
            let mut model = LanguageModel::new(&config, &mut seeded_rng(5)).unwrap();
            let (tokens, targets) = batch(0);
            let mut pass = model.train_pass(&tokens, &targets, SEQ).unwrap();
            let trace = &pass.layers[0];
            let busiest = (0..3).max_by_key(|&e| trace.plan.load(e)).unwrap();
            let moe = model.mixture_mut(0);
            let ids = moe.ids().to_vec();
            let mut before = Vec::new();
            for &id in &ids {
                before.push(gradients_of(moe, id, &mut pass.gradients));
            }
            let source = &before[busiest];
            assert_eq!(source.len(), parameters, "{what}");
            for (name, gradient) in source {
                assert!(gradient.iter().any(|g| *g != 0.0), "{name}, {what}");
            }

            // What the source has afterwards.
            let mut kept = source.clone();
            if let SplitOperator::Clone { decomposition, .. } = operator {
                let expert = &moe.experts()[busiest];
                let shape = (
                    expert.network.fc1.0.shape()[0],
                    expert.network.fc1.0.shape()[1],
                );
                for (name, param, shape) in [
                    ("fc1.weight", &expert.network.fc1.0, shape),
                    ("gate", &expert.gate, (1, expert.gate.len())),
                ] {
                    let part = kept.get_mut(name).unwrap();
                    let mut all = vec![0.0; part.len()];
                    divide_gradient(part, &mut all, param.values(), shape, decomposition).unwrap();
                    assert_eq!(all, source[name], "{name}, {what}");
                    assert_eq!(*part != all, decomposition.is_some(), "{name}, {what}");
                }
            }

            let split = split_expert(moe, ids[busiest], operator, trace, &mut pass.gradients);
            let newcomer = split.unwrap().newcomer;
            let found = gradients_of(moe, newcomer, &mut pass.gradients);
            assert_eq!(&found, source, "newcomer, {what}");
            for (e, &id) in ids.iter().enumerate() {
                let wanted = if e == busiest { &kept } else { &before[e] };
                let found = gradients_of(moe, id, &mut pass.gradients);
                assert_eq!(&found, wanted, "expert {id}, {what}");
            }
        }
    }
}

/// A sum of squares for the gradient of each parameter of an expert: any sum of some of them says which.
fn square_of(name: &str) -> u16 {
    match name {
        "fc1.weight" => 1,
        "fc1.bias" => 2,
        "fc2.weight" => 4,
        "fc2.bias" => 8,
        "gate" => 16,
        "up.weight" => 32,
        "up.bias" => 64,
        other => panic!("{other}"),
    }
}

/// Norms are taken of each expert's own gradients, fc1's alone or all of them; shares of the loss are routing weight times token
/// loss, summed over the expert's tokens, of the total.
#[test]
fn what_is_observed_follows_from_gradients_weights_and_losses() {
    let raw = RouterConfig::TopK {
        k: 2,
        combine: Combine::Raw,
    };
    for (router, sums_to_one) in [(top_p(), true), (raw, false)] {
        for gated in [false, true] {
            let mut config = crate::growing::config(router.clone());
            config.block.moe.gated = gated;
            let model = LanguageModel::new(&config, &mut seeded_rng(5)).unwrap();
            let (tokens, targets) = batch(0);
            let mut pass = model.train_pass(&tokens, &targets, SEQ).unwrap();
            for (l, trace) in pass.layers.iter().enumerate() {
                let moe = model.mixture(l);
                moe.visit("", &mut |name, param| {
                    let name = name.strip_prefix("experts.").unwrap();
                    let (id, name) = name.split_once('.').unwrap();
                    let squares = f32::from(square_of(name)) / param.len() as f32;
                    let times = id.parse::<u32>().unwrap() + 1;
                    let value = times as f32 * squares.sqrt();
                    let gradient = vec![value; param.len()];
                    param.set_gradient(&mut pass.gradients, gradient).unwrap();
                });
                // Token by token, where the layer goes expert by expert.
                let (mut shares, mut loads) = ([0.0f64; 3], [0u64; 3]);
                let plan = &trace.plan;
                for (t, &loss) in pass.token_losses.iter().enumerate() {
                    let (from, to) = (plan.token_offsets()[t], plan.token_offsets()[t + 1]);
                    for &a in &plan.token_assignments()[from as usize..to as usize] {
                        let expert = plan.expert_of(a as usize);
                        let weight = f64::from(plan.weights()[a as usize]);
                        shares[expert] += weight * f64::from(loss);
                        loads[expert] += 1;
                    }
                }
                let total = shares.iter().sum::<f64>();
                let all = pass.token_losses.iter().map(|&x| f64::from(x)).sum::<f64>();
                assert_eq!((total - all).abs() < 1e-5 * all, sums_to_one);

                let every: f64 = if gated { 127.0 } else { 31.0 };
                for (norm, squares) in [
                    (GradientNorm::Fc1, 1.0),
                    (GradientNorm::AllParameters, every),
                ] {
                    let losses = &pass.token_losses;
                    let observed = observe(moe, trace, losses, &mut pass.gradients, norm);
                    let observed = observed.unwrap();
                    assert_eq!(observed.len(), 3);
                    let mut sum = 0.0;
                    for (e, found) in observed.iter().enumerate() {
                        let what = format!("expert {e} of layer {l}, {norm:?}, gated {gated}");
                        assert_eq!((found.id.0 as usize, found.load), (e, loads[e]), "{what}");
                        let (size, wanted) = (found.gradient_norm, (e + 1) as f64 * squares.sqrt());
                        assert!((size - wanted).abs() < 1e-5 * wanted, "{what}: {size}");
                        let (share, wanted) = (found.loss_share.unwrap(), shares[e] / total);
                        assert!((share - wanted).abs() < 1e-12, "{what}: {share}");
                        sum += share;
                    }
                    assert!((sum - 1.0).abs() < 1e-12, "{sum}");
                }
                // No share of nothing.
                let none = vec![0.0; pass.token_losses.len()];
                let fc1 = GradientNorm::Fc1;
                let observed = observe(moe, trace, &none, &mut pass.gradients, fc1).unwrap();
                assert!(observed.iter().all(|o| o.loss_share.is_none()));
            }
        }
    }
}

/// A split that is refused has cut nothing down.
#[test]
fn what_cannot_be_divided_keeps_its_gradients() {
    for decomposition in [Decomposition::Whole, Decomposition::Rowwise] {
        for offset in [0.0, f32::INFINITY] {
            let mut model = crate::growing::model(top_p());
            let (tokens, targets) = batch(0);
            let mut pass = model.train_pass(&tokens, &targets, SEQ).unwrap();
            let (trace, gradients) = (&pass.layers[0], &mut pass.gradients);
            let moe = model.mixture_mut(0);
            let expert = moe.expert_mut(ExpertId(0)).unwrap();
            expert.logit_offset = offset;
            if offset == 0.0 {
                expert.gate.gradient(gradients).unwrap()[0] = f32::NAN;
            }
            // As text, in which one NaN is another.
            let before = format!("{:?}", gradients_of(moe, ExpertId(0), gradients));
            let operator = SplitOperator::Clone {
                decomposition: Some(decomposition),
                preserve_mass: true,
            };
            let refused = split_expert(moe, ExpertId(0), operator, trace, gradients);
            let wanted = match offset.is_finite() {
                true => matches!(refused, Err(ModelError::Expand(_))),
                false => matches!(refused, Err(ModelError::NonFinite(_))),
            };
            assert!(wanted, "{refused:?}");
            let after = format!("{:?}", gradients_of(moe, ExpertId(0), gradients));
            assert_eq!(after, before);
        }
    }
}

/// A batch that every token is right about has no shares of its loss: the run goes on, and what was due is not split.
#[test]
fn a_loss_of_zero_splits_nothing() {
    let mut model = crate::growing::model(top_p());
    let mut optimizer = AdamW::new(AdamWConfig::default()).unwrap();
    let params = ControllerParams::ours(2, 3, 6, 40);
    let mut grower = Grower::new(GrowerConfig::new(params.with_schedule(0, 1))).unwrap();
    for (step, splits) in [(0, 0), (1, 2)] {
        let (tokens, targets) = batch(step);
        let mut pass = model.train_pass(&tokens, &targets, SEQ).unwrap();
        if step == 0 {
            pass.loss = 0.0;
            pass.token_losses.fill(0.0);
        }
        let events = grower
            .step(step, &mut model, &mut optimizer, &mut pass, asks_nothing)
            .unwrap();
        let is_split = |e: &&Event| matches!(e.kind, EventKind::Split { .. });
        assert_eq!(events.iter().filter(is_split).count(), splits);
    }
}

/// The alignment test is of each expert's own fc1 gradient with its own fc1 weights, and the split reports that cosine.
#[test]
fn an_expert_is_split_by_the_cosine_of_its_own_first_matrix() {
    let mut model = crate::growing::model(top_p());
    let mut optimizer = AdamW::new(AdamWConfig::default()).unwrap();
    let (tokens, targets) = batch(0);
    let mut pass = model.train_pass(&tokens, &targets, SEQ).unwrap();
    let mut cosines = vec![Vec::new(); 2];
    for (l, found) in cosines.iter_mut().enumerate() {
        let moe = model.mixture(l);
        for (&id, expert) in moe.ids().iter().zip(moe.experts()) {
            let fc1 = &expert.network.fc1.0;
            let gradient = fc1.gradient(&mut pass.gradients).unwrap();
            let cosine = alignment(gradient, fc1.values()).unwrap().cosine;
            found.push((id, cosine.unwrap()));
        }
    }
    // Midway in the widest gap: the same experts are below it on every machine.
    let mut sizes: Vec<f64> = cosines.iter().flatten().map(|(_, c)| c.abs()).collect();
    sizes.sort_by(f64::total_cmp);
    let gap = |pair: &[f64]| pair[1] - pair[0];
    let widest = sizes.windows(2).max_by(|a, b| gap(a).total_cmp(&gap(b)));
    let widest = widest.unwrap();
    assert!(gap(widest) > 1e-4, "{sizes:?}");
    let delta = (widest[0] + widest[1]) / 2.0;

    let mut params = ControllerParams::paper(2, 3, 6, 40).alignment_only();
    params.alignment = AlignmentThreshold::Absolute(delta);
    params.stop = StopRule::Never;
    params.phase.live_until = 30;
    let mut grower = Grower::new(GrowerConfig {
        controller: params,
        gradient_norm: GradientNorm::AllParameters,
        redundancy_weight: 0.0,
        redundancy_reduction: Reduction::Mean,
    })
    .unwrap();
    let events = grower
        .step(0, &mut model, &mut optimizer, &mut pass, asks_nothing)
        .unwrap();

    let same = |what: &str, found: &[(ExpertId, f64)], wanted: &[(ExpertId, f64)]| {
        let ids = |of: &[(ExpertId, f64)]| of.iter().map(|(id, _)| *id).collect::<Vec<_>>();
        assert_eq!(ids(found), ids(wanted), "{what}");
        for ((_, a), (_, b)) in found.iter().zip(wanted) {
            assert!((a - b).abs() < 1e-6, "{what}: {a} for {b}");
        }
    };
    for (l, cosines) in cosines.iter().enumerate() {
        let below = cosines.iter().filter(|(_, c)| c.abs() < delta);
        let eligible: Vec<(ExpertId, f64)> = below.copied().collect();
        let (mut drifted, mut split) = (Vec::new(), Vec::new());
        for event in events.iter().filter(|e| e.layer == Some(l)) {
            match event.kind {
                EventKind::Alignment {
                    expert,
                    cosine,
                    delta: used,
                    drifted: true,
                } => {
                    assert_eq!(used, delta);
                    drifted.push((expert, cosine.unwrap()));
                }
                EventKind::Trigger { candidates, .. } => assert_eq!(candidates, eligible.len()),
                EventKind::Split { source, cosine, .. } => split.push((source, cosine.unwrap())),
                other => panic!("{other:?}"),
            }
        }
        same("eligible", &drifted, &eligible);
        // The lowest of them.
        same("split", &split, &eligible[..eligible.len().min(1)]);
        assert_eq!(model.mixture(l).ids().len(), 3 + split.len());
    }
}

/// Alignment, overlap, share and gate rows of two experts, token by token; and of a clone that has had no step of its own.
#[test]
fn figures_of_a_pair_are_those_of_its_gradients_tokens_and_rows() {
    let combine = Combine::Renormalised;
    let config = crate::growing::config(RouterConfig::TopK { k: 2, combine });
    let (tokens, targets) = batch(0);
    let [source, other] = [ExpertId(2), ExpertId(0)];
    let mut overlaps = Vec::new();
    for seed in 0..12 {
        let model = LanguageModel::new(&config, &mut seeded_rng(seed)).unwrap();
        let mut pass = model.train_pass(&tokens, &targets, SEQ).unwrap();
        for (l, trace) in pass.layers.iter().enumerate() {
            let (moe, plan) = (model.mixture(l), &trace.plan);
            let found = pair_figures(moe, trace, &mut pass.gradients, source, other).unwrap();
            let (mut both, mut either, mut own, mut theirs) = (0, 0, 0, 0);
            for t in 0..plan.num_tokens() {
                let (from, to) = (plan.token_offsets()[t], plan.token_offsets()[t + 1]);
                let chosen = &plan.token_experts()[from as usize..to as usize];
                let has = |id: ExpertId| usize::from(chosen.contains(&id.0));
                let (a, b) = (has(source), has(other));
                (own, theirs) = (own + a, theirs + b);
                (both, either) = (both + a * b, either + (a | b));
            }
            let of = |n: usize, all: usize| Some(n as f64 / all as f64);
            assert_eq!(found.routing_overlap, of(both, either));
            assert_eq!(found.new_share, of(theirs, own + theirs));
            overlaps.extend(found.routing_overlap);
            let mut cosine = |id: ExpertId| {
                let fc1 = &moe.experts()[id.0 as usize].network.fc1.0;
                let gradient = fc1.find_gradient(&mut pass.gradients).unwrap()?;
                alignment(gradient, fc1.values()).unwrap().cosine
            };
            assert_eq!(found.source_cosine, cosine(source));
            assert_eq!(found.new_cosine, cosine(other));
            let row = |id: ExpertId| moe.experts()[id.0 as usize].gate.values();
            let rows = alignment(row(source), row(other)).unwrap().cosine;
            assert_eq!(found.gate_cosine, rows);
        }
    }
    assert!(
        overlaps.iter().any(|o| *o > 0.0 && *o < 1.0),
        "{overlaps:?}"
    );

    let mut model = LanguageModel::new(&config, &mut seeded_rng(0)).unwrap();
    let mut pass = model.train_pass(&tokens, &targets, SEQ).unwrap();
    let (trace, gradients) = (&pass.layers[0], &mut pass.gradients);
    let moe = model.mixture_mut(0);
    let nobody = pair_figures(moe, trace, gradients, source, ExpertId(9));
    assert!(matches!(nobody, Err(ModelError::NoSuchExpert(9))));
    let operator = SplitOperator::Clone {
        decomposition: None,
        preserve_mass: false,
    };
    let newcomer = split_expert(moe, source, operator, trace, gradients)
        .unwrap()
        .newcomer;
    // It has no tokens yet in what was traced.
    let before = pair_figures(moe, trace, gradients, source, newcomer);
    assert!(matches!(before, Err(ModelError::Shape { .. })));
    let mut pass = model.train_pass(&tokens, &targets, SEQ).unwrap();
    let (moe, trace) = (model.mixture(0), &pass.layers[0]);
    let twins = pair_figures(moe, trace, &mut pass.gradients, source, newcomer).unwrap();
    assert!((twins.gate_cosine.unwrap() - 1.0).abs() < 1e-6);
}

/// A pool of which an expert of each layer was split at step 0 and one at step 5, after one more step that splits nothing.
struct Grown {
    model: LanguageModel,
    grower: Grower,
    /// Source and newcomer of each split, as places in the pool, by layer.
    pairs: Vec<Vec<(usize, usize)>>,
    /// The last step's, by the parameter's name.
    gradients: BTreeMap<String, Vec<f32>>,
}

/// No weight is updated, so that gradients alone can differ between runs.
fn grow(weight: f64, reduction: Reduction, k_max: usize, last: u64) -> Grown {
    let mut model = crate::growing::model(top_p());
    let mut optimizer = AdamW::new(AdamWConfig::default()).unwrap();
    let params = ControllerParams::paper(2, 3, k_max, 40);
    let mut params = params.with_schedule(0, 5).most_loaded();
    params.stop = StopRule::Never;
    params.phase.live_until = 30;
    let mut grower = Grower::new(GrowerConfig {
        controller: params,
        gradient_norm: GradientNorm::Fc1,
        redundancy_weight: weight,
        redundancy_reduction: reduction,
    })
    .unwrap();
    let mut pairs = vec![Vec::new(); 2];
    let mut gradients = BTreeMap::new();
    for step in [0, 5, last] {
        let (tokens, targets) = batch(step);
        let mut pass = model.train_pass(&tokens, &targets, SEQ).unwrap();
        let events = grower
            .step(step, &mut model, &mut optimizer, &mut pass, asks_nothing)
            .unwrap();
        gradients.clear();
        model.visit("", &mut |name, param| {
            let gradient = param.gradient(&mut pass.gradients).unwrap().clone();
            gradients.insert(name, gradient);
        });
        for event in events {
            let EventKind::Split { source, new, .. } = event.kind else {
                continue;
            };
            let layer = event.layer.unwrap();
            let moe = model.mixture_mut(layer);
            let place = |id| moe.index_of(id).unwrap();
            pairs[layer].push((place(source), place(new)));
            // Off the source's: at equal rows the loss has no gradient.
            let row = moe.expert_mut(new).unwrap().gate.values_mut();
            for (i, w) in row.iter_mut().enumerate() {
                *w += 0.2 * (i as f32 + 5.0 * new.0 as f32).sin();
            }
        }
    }
    assert!(pairs.iter().all(|p| p.len() == 2), "{pairs:?}");
    Grown {
        model,
        grower,
        pairs,
        gradients,
    }
}

/// The redundancy loss adds its gradient to the gate rows of pairs and to nothing else, and to nothing at all once the layer no
/// longer expands.
#[test]
fn the_redundancy_loss_acts_on_pairs_while_expansion_lasts() {
    let (maximum, end) = (StopReason::Maximum, StopReason::PhaseEnd);
    for (reduction, k_max, last, stopped) in [
        (Reduction::Mean, 6, 6, None),
        (Reduction::Sum, 6, 6, None),
        (Reduction::Mean, 5, 6, Some(maximum)),
        (Reduction::Mean, 6, 30, Some(end)),
    ] {
        let without = grow(0.0, reduction, k_max, last);
        let with = grow(0.01, reduction, k_max, last);
        assert_eq!(with.pairs, without.pairs);
        let mut added: BTreeMap<String, Vec<f32>> = BTreeMap::new();
        for (l, pairs) in with.pairs.iter().enumerate() {
            assert_eq!(with.grower.controller().stopped(l), stopped);
            let moe = with.model.mixture(l);
            let rows: Vec<&[f32]> = moe.experts().iter().map(|e| e.gate.values()).collect();
            let mut wanted: Vec<Vec<f32>> = rows.iter().map(|row| vec![0.0; row.len()]).collect();
            let mut views: Vec<&mut [f32]> = wanted.iter_mut().map(Vec::as_mut_slice).collect();
            redundancy_gradient(&rows, pairs, reduction, 0.01, &mut views).unwrap();
            let paired = |at: usize| pairs.iter().any(|&(a, b)| a == at || b == at);
            for (at, (id, wanted)) in moe.ids().iter().zip(wanted).enumerate() {
                if stopped.is_some() || !paired(at) {
                    continue;
                }
                assert!(wanted.iter().any(|g| g.abs() > 1e-4), "{wanted:?}");
                let layer = with.model.mixture_name(l);
                added.insert(format!("{layer}.experts.{id}.gate"), wanted);
            }
        }
        assert_eq!(added.is_empty(), stopped.is_some());
        assert_eq!(with.gradients.len(), without.gradients.len());
        for (name, before) in &without.gradients {
            let after = &with.gradients[name];
            let Some(added) = added.remove(name) else {
                assert_eq!(after, before, "{name}, {reduction:?}, {stopped:?}");
                continue;
            };
            for ((a, b), wanted) in after.iter().zip(before).zip(&added) {
                let off = (a - b - wanted).abs();
                assert!(off < 1e-6, "{name}, {reduction:?}: {a}, {b} and {wanted}");
            }
        }
        assert!(added.is_empty(), "{added:?}");
    }
}

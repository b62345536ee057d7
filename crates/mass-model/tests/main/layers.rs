//! Layers and operations against dfdx's own, against central differences, and against what they must be equal to.

use dfdx::prelude::*;
use mass_model::nn::{FeedForward, GateConfig, MoeConfig, MoeLayer, SelfAttention};
use mass_model::ops::{self, Attention, MoeExpert, RoutingLoss, Rows, Sequences};
use mass_model::{
    Activation, CpuGradients, DropoutKeys, ModelError, Param, Parameters, seeded_rng,
};
use mass_routing::losses::BalanceCount;
use mass_routing::{Combine, RouterConfig};

fn values(n: usize, seed: f32) -> Vec<f32> {
    (0..n).map(|i| ((i as f32 + seed) * 1.37).sin()).collect()
}

fn rows(n: usize, d: usize, seed: f32) -> Rows<NoneTape> {
    Cpu::default().tensor_from_vec(values(n * d, seed), (n, d))
}

/// `<y, dy>` for a fixed, uneven `dy`.
fn probe(y: Rows<OwnedTape<f32, Cpu>>) -> (f64, CpuGradients) {
    let &(n, d) = y.shape();
    let loss = inner(&y.as_vec());
    let dy = Cpu::default().tensor_from_vec(values(n * d, 0.3), (n, d));
    (loss, (y * dy).sum::<Rank0, _>().backward())
}

fn inner(y: &[f32]) -> f64 {
    let pairs = y.iter().zip(values(y.len(), 0.3));
    pairs.map(|(a, b)| f64::from(*a) * f64::from(b)).sum()
}

fn assert_close(what: &str, got: &[f32], want: &[f32], tolerance: f32) {
    assert_eq!(got.len(), want.len(), "{what}");
    let largest = want.iter().fold(1e-6f32, |m, x| m.max(x.abs()));
    for (i, (a, b)) in got.iter().zip(want).enumerate() {
        assert!(
            (a - b).abs() <= tolerance * largest,
            "{what}[{i}]: {a} against {b}"
        );
    }
}

/// Every parameter's and the input's gradient against central differences, along a fixed direction and along itself. Along itself
/// it is its norm, which has to stand clear of the tolerance: of a gradient of almost nothing, any other would do as well.
fn check_gradients<M: Parameters + Clone>(
    what: &str,
    model: &M,
    x: &Rows<NoneTape>,
    forward: impl Fn(&M, Rows<OwnedTape<f32, Cpu>>) -> Rows<OwnedTape<f32, Cpu>>,
) {
    let run =
        |model: &M, x: &Rows<NoneTape>| inner(&forward(model, x.clone().leaky_traced()).as_vec());
    let (_, mut gradients) = probe(forward(model, x.clone().leaky_traced()));
    let h = 4e-3f32;
    let check = |name: &str, gradient: &[f32], fixed: Vec<f32>, moved: &dyn Fn(&[f32]) -> f64| {
        let size = |v: &[f32]| v.iter().map(|x| x * x).sum::<f32>().sqrt();
        let own = size(gradient);
        assert!(own > 0.02, "{what}, {name}: a gradient of norm {own}");
        for direction in [&fixed[..], gradient] {
            let norm = size(direction);
            let step = |h: f32| -> Vec<f32> { direction.iter().map(|d| h * d / norm).collect() };
            let numeric = (moved(&step(h)) - moved(&step(-h))) / f64::from(2.0 * h);
            let pairs = gradient.iter().zip(direction);
            let analytic: f64 = pairs.map(|(g, d)| f64::from(g * d / norm)).sum();
            let scale = 2e-3 + 1e-2 * analytic.abs();
            assert!(
                (analytic - numeric).abs() < scale,
                "{what}, {name}: {analytic} against {numeric}"
            );
        }
    };
    let mut named = Vec::new();
    model.visit("", &mut |name, p| {
        named.push((name, p.gradient(&mut gradients).unwrap().clone()));
    });
    for (which, gradient) in &named {
        let fixed = values(gradient.len(), 0.7);
        check(which, gradient, fixed, &|step: &[f32]| {
            let mut moved = model.clone();
            moved.visit_mut("", &mut |name, p| {
                if name == *which {
                    let pairs = p.values_mut().iter_mut().zip(step);
                    pairs.for_each(|(x, d)| *x += d);
                }
            });
            run(&moved, x)
        });
    }
    let gradient = gradients.get(x).as_vec();
    let fixed = values(gradient.len(), 0.9);
    check("input", &gradient, fixed, &|step: &[f32]| {
        let data = x.as_vec().iter().zip(step).map(|(x, d)| x + d).collect();
        run(
            model,
            &Cpu::default().tensor_from_vec::<(usize, usize)>(data, *x.shape()),
        )
    });
}

fn all_of(k: usize) -> RouterConfig {
    // Every expert: no selection that a finite step could change.
    RouterConfig::TopK {
        k,
        combine: Combine::Renormalised,
    }
}

#[test]
fn every_kind_of_mixture_layer_agrees_with_central_differences() {
    let x = rows(37, 6, 1.0);
    let base = MoeConfig::new(6, 10, 3, Activation::Silu, all_of(3));
    let cosine = |projection, temperature| GateConfig::Cosine {
        projection,
        temperature,
    };
    let kinds = [
        ("plain", base.clone()),
        (
            "gated",
            MoeConfig {
                gated: true,
                ..base.clone()
            },
        ),
        (
            "gated, shared",
            MoeConfig {
                gated: true,
                shared_hidden: Some(7),
                ..base.clone()
            },
        ),
        (
            "cosine gate",
            MoeConfig {
                gate: cosine(None, None),
                ..base.clone()
            },
        ),
        (
            "projected cosine gate",
            MoeConfig {
                gate: cosine(Some(4), Some(0.5)),
                ..base.clone()
            },
        ),
        (
            "tanh gelu, shared",
            MoeConfig {
                activation: Activation::GeluTanh,
                shared_hidden: Some(5),
                ..base
            },
        ),
    ];
    for (name, config) in kinds {
        let mut layer = MoeLayer::new(&config, &mut seeded_rng(2)).unwrap();
        layer.visit_mut("", &mut |_, p| {
            p.values_mut().iter_mut().for_each(|x| *x *= 1.5)
        });
        check_gradients(name, &layer, &x, |layer, x| layer.try_forward(x).unwrap());
    }
}

#[test]
fn thresholds_of_top_any_get_the_straight_through_gradient() {
    let router = RouterConfig::TopAny { experts: 3 };
    let gate = GateConfig::Cosine {
        projection: None,
        temperature: None,
    };
    let config = MoeConfig {
        gate,
        ..MoeConfig::new(6, 10, 3, Activation::Relu, router)
    };
    let layer = MoeLayer::new(&config, &mut seeded_rng(4)).unwrap();
    let x = rows(40, 6, 1.0);
    let routed = layer
        .forward_routed(x.clone().leaky_traced(), None)
        .unwrap();
    assert!(
        (0..40).any(|t| routed.plan.k(t) == 0),
        "a token that no expert takes"
    );
    let plan = std::sync::Arc::clone(&routed.plan);
    let (_, mut gradients) = probe(routed.output);
    // The gradient of an assignment's weight is what its expert makes of the token, along the probe.
    let (input, dy) = (x.as_vec(), values(40 * 6, 0.3));
    let along = |expert: &mass_model::ops::MoeExpert, t: usize| -> f32 {
        let affine = |w: &Param, b: &Param, x: &[f32]| -> Vec<f32> {
            let rows = w.values().chunks_exact(x.len()).zip(b.values());
            let dot = |row: &[f32]| row.iter().zip(x).map(|(w, x)| w * x).sum::<f32>();
            rows.map(|(row, b)| dot(row) + b).collect()
        };
        let hidden = affine(
            &expert.network.fc1.0,
            &expert.network.fc1.1,
            &input[t * 6..][..6],
        );
        let hidden: Vec<f32> = hidden.iter().map(|h| h.max(0.0)).collect();
        let y = affine(&expert.network.fc2.0, &expert.network.fc2.1, &hidden);
        y.iter().zip(&dy[t * 6..]).map(|(y, d)| y * d).sum()
    };
    let mut d_weights = Vec::new();
    for (e, expert) in layer.experts().iter().enumerate() {
        let tokens = &plan.tokens()[plan.segment(e)];
        d_weights.extend(tokens.iter().map(|&t| along(expert, t as usize)));
    }
    let mut wanted = ndarray::Array1::zeros(3);
    let router = mass_routing::TopAny::new(vec![0.0; 3]).unwrap();
    router
        .backward_thresholds(&plan, &d_weights, &mut wanted.view_mut())
        .unwrap();
    let found: Vec<f32> = layer
        .experts()
        .iter()
        .map(|e| {
            e.threshold
                .as_ref()
                .unwrap()
                .gradient(&mut gradients)
                .unwrap()[0]
        })
        .collect();
    assert!(wanted.iter().all(|w| w.abs() > 1e-3), "{wanted}");
    assert_close("thresholds", &found, wanted.as_slice().unwrap(), 1e-4);
    // In evaluation such tokens take their best expert.
    let plan = layer.forward_routed(x, None).unwrap().plan;
    assert!((0..40).all(|t| plan.k(t) > 0));
}

#[test]
fn routing_losses_reach_the_gate() {
    let x = rows(64, 6, 1.0);
    let noisy = RouterConfig::Noisy {
        std: 0.3,
        seed: 5,
        inner: Box::new(RouterConfig::TopK {
            k: 1,
            combine: Combine::Raw,
        }),
    };
    let config = |router: &RouterConfig, losses| MoeConfig {
        losses,
        ..MoeConfig::new(6, 8, 4, Activation::Relu, router.clone())
    };
    let gate_gradients = |router: &RouterConfig, losses: Vec<RoutingLoss>| {
        let layer = MoeLayer::new(&config(router, losses), &mut seeded_rng(3)).unwrap();
        let (_, mut gradients) = probe(layer.try_forward(x.clone().leaky_traced()).unwrap());
        let rows = layer.experts().iter().map(|e| &e.gate);
        rows.flat_map(|row| row.gradient(&mut gradients).unwrap().clone())
            .collect::<Vec<_>>()
    };
    for (loss, router) in [
        (
            RoutingLoss::Balance {
                weight: 1.0,
                count: BalanceCount::First,
            },
            all_of(1),
        ),
        (RoutingLoss::Entropy { weight: 1.0 }, all_of(1)),
        (RoutingLoss::Importance { weight: 1.0 }, all_of(1)),
        (RoutingLoss::RouterZ { weight: 1.0 }, all_of(1)),
        (RoutingLoss::Load { weight: 1.0 }, noisy.clone()),
    ] {
        let without = gate_gradients(&router, vec![]);
        let with = gate_gradients(&router, vec![loss]);
        assert!(
            with.iter().zip(&without).any(|(a, b)| (a - b).abs() > 1e-6),
            "{loss:?}"
        );
        assert!(with.iter().all(|x| x.is_finite()));
    }
    for (router, loss) in [
        (all_of(1), RoutingLoss::Entropy { weight: f32::NAN }),
        (all_of(1), RoutingLoss::Load { weight: 1.0 }),
        (
            RouterConfig::TopAny { experts: 4 },
            RoutingLoss::Entropy { weight: 1.0 },
        ),
    ] {
        assert!(matches!(
            MoeLayer::new(&config(&router, vec![loss]), &mut seeded_rng(0)),
            Err(ModelError::Config(_))
        ));
    }
}

#[test]
fn gradients_of_losses_behind_noise_agree_with_central_differences() {
    use mass_routing::{Router, losses};
    let (n, d, experts, std) = (40, 6, 4, 0.4);
    let router = RouterConfig::Noisy {
        std,
        seed: 5,
        inner: Box::new(RouterConfig::TopK {
            k: 2,
            combine: Combine::Raw,
        }),
    };
    let make = |losses| MoeConfig {
        losses,
        ..MoeConfig::new(d, 8, experts, Activation::Relu, router.clone())
    };
    let x = rows(n, d, 1.0);
    let gradients = |losses: Vec<RoutingLoss>| {
        let layer = MoeLayer::new(&make(losses), &mut seeded_rng(3)).unwrap();
        let (_, mut g) = probe(layer.try_forward(x.clone().leaky_traced()).unwrap());
        let rows = layer.experts().iter().map(|e| &e.gate);
        rows.flat_map(|row| row.gradient(&mut g).unwrap().clone())
            .collect::<Vec<_>>()
    };
    // The losses themselves, as functions of the gate's rows under the same noise.
    let layer = MoeLayer::new(&make(vec![]), &mut seeded_rng(3)).unwrap();
    let w: Vec<f32> = layer
        .experts()
        .iter()
        .flat_map(|e| e.gate.values().to_vec())
        .collect();
    let input = ndarray::Array2::from_shape_vec((n, d), x.as_vec()).unwrap();
    let logits_of = |w: &[f32]| {
        let rows = ndarray::ArrayView2::from_shape((experts, d), w).unwrap();
        input.dot(&rows.t())
    };
    let zeros = || ndarray::Array2::<f32>::zeros((n, experts));
    let planned = |w: &[f32]| {
        let logits = logits_of(w);
        let mut router = router.build().unwrap();
        let mut plan = mass_routing::RoutingPlan::default();
        router.route(logits.view(), None, &mut plan).unwrap();
        (logits, router, plan)
    };
    let balance = |w: &[f32]| {
        let count = BalanceCount::Selected;
        losses::gshard_balance(&planned(w).2, count, 0.0, &mut zeros().view_mut()).unwrap()
    };
    let entropy =
        |w: &[f32]| losses::routing_entropy(&planned(w).2, 0.0, &mut zeros().view_mut()).unwrap();
    let router_z = |w: &[f32]| {
        let logits = logits_of(w);
        losses::router_z(logits.view(), None, 0.0, &mut zeros().view_mut()).unwrap()
    };
    let load = |w: &[f32]| {
        let (logits, router, _) = planned(w);
        let mass_routing::AnyRouter::Noisy(noisy) = &router else {
            unreachable!("it was configured so");
        };
        let (mut unused, mut also) = (zeros(), zeros());
        losses::load(
            logits.view(),
            noisy.noisy_logits(),
            None,
            2,
            f64::from(std),
            0.0,
            &mut unused.view_mut(),
            &mut also.view_mut(),
        )
        .unwrap()
    };
    let importance = |w: &[f32]| {
        let mut r = logits_of(w).mapv(f32::exp);
        for mut row in r.outer_iter_mut() {
            let sum = row.sum();
            row /= sum;
        }
        losses::importance(r.view(), None, 0.0, &mut zeros().view_mut()).unwrap()
    };
    let weight = 1.0;
    let without = gradients(vec![]);
    for (setting, loss) in [
        (
            RoutingLoss::Load { weight },
            &load as &dyn Fn(&[f32]) -> f64,
        ),
        (RoutingLoss::Importance { weight }, &importance),
        (RoutingLoss::Entropy { weight }, &entropy),
        (RoutingLoss::RouterZ { weight }, &router_z),
        (
            RoutingLoss::Balance {
                weight,
                count: BalanceCount::Selected,
            },
            &balance,
        ),
    ] {
        let with = gradients(vec![setting]);
        for i in 0..w.len() {
            let h = 1e-3;
            let at = |delta: f32| {
                let mut moved = w.clone();
                moved[i] += delta;
                loss(&moved)
            };
            let numeric = (at(h) - at(-h)) / (2.0 * f64::from(h));
            let analytic = f64::from(with[i] - without[i]);
            assert!(
                (numeric - analytic).abs() < 1e-3 * (1.0 + numeric.abs()),
                "{setting:?}, {i}: {numeric} against {analytic}"
            );
        }
    }
}

#[test]
fn experts_copied_from_a_dense_network_compute_what_it_did() {
    for gated in [false, true] {
        let dense =
            FeedForward::new(6, 11, Activation::GeluErf, gated, &mut seeded_rng(1)).unwrap();
        let config = MoeConfig {
            gated,
            ..MoeConfig::new(6, 11, 4, Activation::GeluErf, all_of(2))
        };
        let layer = MoeLayer::from_dense(&dense, &config, &mut seeded_rng(2)).unwrap();
        let x = rows(50, 6, 2.0);
        let (a, b) = (
            dense.try_forward(x.clone()).unwrap(),
            layer.try_forward(x).unwrap(),
        );
        assert_close("y", &b.as_vec(), &a.as_vec(), 1e-5);
        let wrong = MoeConfig {
            hidden: 12,
            ..config
        };
        assert!(matches!(
            MoeLayer::from_dense(&dense, &wrong, &mut seeded_rng(2)),
            Err(ModelError::Config(_))
        ));
    }
}

#[test]
fn a_feed_forward_network_agrees_with_dfdx_and_central_differences() {
    let x = rows(700, 6, 1.0); // more than one block of rows
    let network = FeedForward::new(6, 9, Activation::Relu, false, &mut seeded_rng(1)).unwrap();
    let dev = Cpu::default();
    let tensor = |p: &Param| {
        dev.tensor_from_vec(p.values().to_vec(), (p.shape()[0], p.len() / p.shape()[0]))
    };
    let bias = |p: &Param| dev.tensor_from_vec(p.values().to_vec(), (p.len(),));
    let ((w1, b1), (w2, b2)) = (network.fc1(), network.fc2());
    let h = x.clone().matmul(tensor(w1).permute::<_, Axes2<1, 0>>());
    let h = (h + bias(b1).broadcast_like::<_, Axis<0>>(&(700, 9))).relu();
    let y = h.matmul(tensor(w2).permute::<_, Axes2<1, 0>>());
    let y = y + bias(b2).broadcast_like::<_, Axis<0>>(&(700, 6));
    assert_close(
        "y",
        &network.try_forward(x).unwrap().as_vec(),
        &y.as_vec(),
        1e-5,
    );
    let x = rows(20, 6, 1.0);
    let gelu = FeedForward::new(6, 9, Activation::GeluErf, false, &mut seeded_rng(1)).unwrap();
    check_gradients("feed-forward", &gelu, &x, |f, x| f.try_forward(x).unwrap());
}

#[test]
fn attention_over_packed_sequences_equals_attention_over_padded_ones() {
    let lengths = [3, 5, 1];
    let (longest, dim) = (5, 6);
    let qkv = values(lengths.iter().sum::<usize>() * 3 * dim, 1.0);
    let dev = Cpu::default();
    let how = Attention {
        heads: 2,
        ..Attention::default()
    };
    let packed = Sequences::packed(vec![0, 3, 8, 9]).unwrap();
    let x = dev.tensor_from_vec(qkv.clone(), (9, 3 * dim));
    let want = ops::self_attention(x, &packed, how).unwrap().as_vec();
    let (mut padded, mut keys, mut at) = (Vec::new(), Vec::new(), 0);
    for length in lengths {
        padded.extend_from_slice(&qkv[at * 3 * dim..(at + length) * 3 * dim]);
        padded.extend(vec![9.0; (longest - length) * 3 * dim]);
        keys.extend((0..longest).map(|i| i < length));
        at += length;
    }
    let sequences = Sequences::uniform(3, longest)
        .unwrap()
        .with_keys(keys.clone())
        .unwrap();
    let x = dev.tensor_from_vec(padded, (3 * longest, 3 * dim));
    let y = ops::self_attention(x, &sequences, how).unwrap().as_vec();
    let real = y
        .chunks(dim)
        .zip(&keys)
        .filter(|(_, k)| **k)
        .flat_map(|(row, _)| row);
    assert_close("y", &real.copied().collect::<Vec<_>>(), &want, 1e-5);
}

#[test]
fn attention_with_a_mask_and_dropout_agrees_with_central_differences() {
    let mut layer = SelfAttention::new(6, 2, &mut seeded_rng(1)).unwrap();
    layer.dropout = 0.3;
    let x = rows(9, 6, 1.0);
    let keys = vec![true, true, false, true, true, false, true, true, true];
    for causal in [false, true] {
        layer.causal = causal;
        let sequences = Sequences::packed(vec![0, 3, 9])
            .unwrap()
            .with_keys(keys.clone())
            .unwrap();
        check_gradients("attention", &layer, &x, |layer, x| {
            let mut keys = DropoutKeys::new(1, 1);
            layer.forward(x, &sequences, Some(&mut keys)).unwrap()
        });
    }
}

#[test]
fn dropout_keeps_the_mean_and_its_gradient_has_the_same_mask() {
    let x = Cpu::default().ones_like(&(400, 50));
    let mask = DropoutKeys::new(1, 2).next(0.25).unwrap();
    let y = ops::dropout(x.clone().leaky_traced(), mask).unwrap();
    let kept = y.as_vec();
    let mean = kept.iter().sum::<f32>() / kept.len() as f32;
    assert!((mean - 1.0).abs() < 0.02, "{mean}");
    assert!(
        kept.iter()
            .all(|&v| v == 0.0 || (v - 1.0 / 0.75).abs() < 1e-6)
    );
    let gradient = y.sum::<Rank0, _>().backward().get(&x).as_vec();
    assert_eq!(gradient, kept);
    // Added to a residual, with and without.
    let residual = rows(400, 50, 3.0);
    let sum = ops::add(x.clone(), &residual, mask).unwrap().as_vec();
    let want: Vec<f32> = residual
        .as_vec()
        .iter()
        .zip(&kept)
        .map(|(a, b)| a + b)
        .collect();
    assert_eq!(sum, want);
    let plain = ops::add(x.clone(), &residual, None).unwrap().as_vec();
    assert_eq!(plain, (x + residual).as_vec());
}

#[test]
fn picked_and_scaled_rows_agree_with_dfdx() {
    let x = rows(5, 4, 1.0);
    let factor = Param::new(values(4, 2.0), &[4], false).unwrap();
    let y = ops::scale_rows(x.clone().leaky_traced(), &factor).unwrap();
    let f = Cpu::default().tensor_from_vec(factor.values().to_vec(), (4,));
    let oracle = x.clone().leaky_traced() * f.leaky_trace().broadcast_like::<_, Axis<0>>(&(5, 4));
    assert_close("y", &y.as_vec(), &oracle.as_vec(), 1e-6);
    let ((_, mut g), (_, o)) = (probe(y), probe(oracle));
    assert_close("dx", &g.get(&x).as_vec(), &o.get(&x).as_vec(), 1e-6);
    assert_close(
        "df",
        factor.gradient(&mut g).unwrap(),
        &o.get(&f).as_vec(),
        1e-5,
    );

    let y = ops::pick_rows(x.clone().leaky_traced(), &[4, 0, 4]).unwrap();
    let index = Cpu::default().tensor_from_vec(vec![4usize, 0, 4], (3,));
    let oracle = x.clone().leaky_traced().gather(index);
    assert_eq!(y.as_vec(), oracle.as_vec());
    let dy: Tensor<(usize, usize), f32, Cpu> =
        Cpu::default().tensor_from_vec(values(12, 0.3), (3, 4));
    let o = (oracle * dy).sum::<Rank0, _>().backward();
    assert_close(
        "dx",
        &probe(y).1.get(&x).as_vec(),
        &o.get(&x).as_vec(),
        1e-6,
    );
    assert!(matches!(
        ops::pick_rows(x.clone(), &[5]),
        Err(ModelError::Index { .. })
    ));
    let empty: Rows<NoneTape> = Cpu::default().zeros_like(&(3, 0));
    for refused in [ops::pick_rows(x, &[]), ops::pick_rows(empty, &[0])] {
        assert!(matches!(refused, Err(ModelError::Shape { .. })));
    }
}

#[test]
fn noise_of_a_router_moves_on_while_training_and_is_off_in_evaluation() {
    let inner = Box::new(all_of(1));
    let router = RouterConfig::Noisy {
        std: 3.0,
        seed: 1,
        inner,
    };
    let layer = MoeLayer::new(
        &MoeConfig::new(6, 8, 4, Activation::Relu, router),
        &mut seeded_rng(0),
    )
    .unwrap();
    let x = rows(60, 6, 1.0);
    let tokens = |plan: &mass_routing::RoutingPlan| plan.tokens().to_vec();
    let train = || {
        tokens(
            &layer
                .forward_routed(x.clone().leaky_traced(), None)
                .unwrap()
                .plan,
        )
    };
    let (a, b) = (train(), train());
    assert_ne!(a, b);
    let evaluate = || tokens(&layer.forward_routed(x.clone(), None).unwrap().plan);
    assert_eq!(evaluate(), evaluate());
    // A clone goes on from where the original stands.
    let copy = layer.clone();
    let plan = copy
        .forward_routed(x.clone().leaky_traced(), None)
        .unwrap()
        .plan;
    assert_eq!(tokens(&plan), train());
}

#[test]
fn what_a_layer_cannot_be_is_refused() {
    let config = |e| matches!(e, Err(ModelError::Config(_)));
    for shape in [&[0, 4][..], &[1 << 63, 2], &[usize::MAX], &[1 << 61, 3]] {
        assert!(config(Param::zeros(shape, true).map(drop)), "{shape:?}");
    }
    assert!(config(Sequences::uniform(1 << 63, 2).map(drop)));
    let mut rng = seeded_rng(0);
    assert!(config(
        SelfAttention::new(usize::MAX / 2, 1, &mut rng).map(drop)
    ));
    let mut attention = SelfAttention::new(6, 2, &mut rng).unwrap();
    let x = rows(4, 6, 1.0);
    let sequences = Sequences::uniform(1, 4).unwrap();
    for rate in [f32::NAN, -0.1, 1.0] {
        attention.dropout = rate;
        let y = attention.forward(x.clone(), &sequences, None);
        assert!(config(y.map(drop)), "{rate}");
    }
    // Experts of another kind than the layer's, or a shared one that they are not.
    let gated = MoeConfig {
        gated: true,
        ..MoeConfig::new(6, 8, 2, Activation::Silu, all_of(1))
    };
    let plain = MoeConfig {
        gated: false,
        ..gated.clone()
    };
    let shared = MoeConfig {
        shared_hidden: Some(8),
        ..plain.clone()
    };
    let experts = MoeLayer::new(&plain, &mut rng).unwrap().experts().to_vec();
    for other in [gated, shared] {
        let layer = MoeLayer::from_experts(&other, experts.clone(), &mut rng);
        assert!(config(layer.map(drop)), "{other:?}");
    }
    let changes: [fn(&mut MoeExpert); 2] = [
        |e| e.gate = Param::zeros(&[7], true).unwrap(),
        |e| e.threshold = Some(Param::zeros(&[2], false).unwrap()),
    ];
    for change in changes {
        let mut experts = experts.clone();
        change(&mut experts[1]);
        let layer = MoeLayer::from_experts(&plain, experts, &mut rng);
        assert!(matches!(layer, Err(ModelError::Shape { .. })));
    }
    assert!(MoeLayer::from_experts(&plain, experts, &mut rng).is_ok());
}

/// A scale that is clamped has no gradient.
#[test]
fn the_temperature_of_a_cosine_gate_is_one_that_can_be_learned() {
    let of = |temperature| {
        let gate = GateConfig::Cosine {
            projection: None,
            temperature: Some(temperature),
        };
        let base = MoeConfig::new(6, 8, 2, Activation::Silu, all_of(2));
        MoeLayer::new(&MoeConfig { gate, ..base }, &mut seeded_rng(3))
    };
    for temperature in [0.0, 0.005, 0.009_999, f32::NAN] {
        assert!(matches!(of(temperature), Err(ModelError::Config(_))));
    }
    let layer = of(0.01).unwrap();
    let y = layer.try_forward(rows(30, 6, 1.0).leaky_traced()).unwrap();
    let (_, mut gradients) = probe(y);
    layer.visit("", &mut |name, p| {
        let gradient = p.gradient(&mut gradients).unwrap();
        assert!(name != "gate.log_scale" || gradient[0] != 0.0);
    });
}

#[test]
fn a_rate_of_nearly_one_is_that_rate() {
    let mask = DropoutKeys::new(1, 2).next(0.999).unwrap();
    let ones = Cpu::default().tensor_from_vec(vec![1.0; 100_000], (1000, 100));
    let kept = ops::dropout(ones, mask).unwrap().as_vec();
    let kept: Vec<f32> = kept.into_iter().filter(|&x| x != 0.0).collect();
    // 100 of 100,000, give or take five standard deviations, each scaled by a thousand.
    assert!((50..150).contains(&kept.len()), "{}", kept.len());
    assert!(kept.iter().all(|x| (x - 1000.0).abs() < 0.1));
}

#[test]
fn a_masked_expert_gets_nothing_from_routing_losses() {
    let x = rows(30, 6, 1.0);
    let every = [
        RoutingLoss::Importance { weight: 1.0 },
        RoutingLoss::RouterZ { weight: 1.0 },
        RoutingLoss::Entropy { weight: 1.0 },
    ];
    for loss in every {
        let config = MoeConfig {
            losses: vec![loss],
            ..MoeConfig::new(6, 8, 4, Activation::Relu, all_of(2))
        };
        let layer = MoeLayer::new(&config, &mut seeded_rng(3)).unwrap();
        let mask = [true, true, false, true];
        let routed = layer.forward_routed(x.clone().leaky_traced(), Some(&mask));
        let (_, mut gradients) = probe(routed.unwrap().output);
        for (expert, used) in layer.experts().iter().zip(mask) {
            let row = expert.gate.gradient(&mut gradients).unwrap();
            assert_eq!(row.iter().any(|g| *g != 0.0), used, "{loss:?}");
        }
        // As if there were three experts.
        let mut three = layer.clone();
        three.remove(layer.ids()[2]).unwrap();
        let routed = three.forward_routed(x.clone().leaky_traced(), None);
        let (_, mut without) = probe(routed.unwrap().output);
        for (id, expert) in three.ids().iter().zip(three.experts()) {
            let masked = &layer.experts()[layer.index_of(*id).unwrap()].gate;
            let masked = masked.gradient(&mut gradients).unwrap();
            let row = expert.gate.gradient(&mut without).unwrap();
            assert_close(&format!("{loss:?}"), masked, row, 1e-5);
        }
    }
}

#[test]
fn a_pool_takes_what_fits_and_a_router_forgets_who_leaves() {
    let router = RouterConfig::BiasBalanced {
        k: 1,
        rate: 0.1,
        combine: Combine::Renormalised,
    };
    let config = MoeConfig::new(6, 8, 3, Activation::Relu, router);
    let mut layer = MoeLayer::new(&config, &mut seeded_rng(3)).unwrap();
    let of = |config: &MoeConfig| {
        let layer = MoeLayer::new(config, &mut seeded_rng(4)).unwrap();
        layer.experts()[0].clone()
    };
    let wider = MoeConfig {
        hidden: 9,
        ..config.clone()
    };
    let gated = MoeConfig {
        gated: true,
        ..config.clone()
    };
    for other in [wider, gated] {
        assert!(layer.push(of(&other)).is_err());
        assert_eq!(layer.ids().len(), 3);
    }

    let x = rows(30, 6, 1.0);
    for _ in 0..5 {
        let routed = layer
            .forward_routed(x.clone().leaky_traced(), None)
            .unwrap();
        layer.adapt(&routed.plan).unwrap();
    }
    let bias = |layer: &MoeLayer| match &*layer.router() {
        mass_routing::AnyRouter::BiasBalanced(router) => router.bias().to_vec(),
        other => panic!("{other:?}"),
    };
    let learned = bias(&layer);
    assert!(learned[0] != learned[2], "{learned:?}");
    layer.remove(layer.ids()[0]).unwrap();
    assert_eq!(bias(&layer), &learned[1..]);
    layer.push(of(&config)).unwrap();
    layer.forward_routed(x.leaky_traced(), None).unwrap();
    assert_eq!(bias(&layer), [&learned[1..], &[0.0]].concat());

    let noisy = RouterConfig::Noisy {
        std: 0.1,
        seed: 1,
        inner: Box::new(RouterConfig::TopAny { experts: 3 }),
    };
    let config = MoeConfig {
        router: noisy,
        ..config
    };
    let refused = MoeLayer::new(&config, &mut seeded_rng(3)).unwrap_err();
    assert!(refused.to_string().contains("behind noise"), "{refused}");
}

/// A router is in one thread's hands while it makes a plan, and not while kernels wait for other threads.
#[test]
fn training_passes_of_one_layer_run_side_by_side() {
    use rayon::prelude::*;
    let layer = MoeLayer::new(
        &MoeConfig::new(16, 64, 4, Activation::Relu, all_of(2)),
        &mut seeded_rng(3),
    )
    .unwrap();
    let (send, receive) = std::sync::mpsc::channel();
    // In a thread of its own: passes that wait for each other never end.
    std::thread::spawn(move || {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build();
        let sums: Vec<f64> = pool.unwrap().install(|| {
            let passes = (0..64).into_par_iter().map(|_| {
                let x = rows(200, 16, 1.0);
                probe(layer.try_forward(x.leaky_traced()).unwrap()).0
            });
            passes.collect()
        });
        send.send(sums).unwrap();
    });
    let sums = receive.recv_timeout(std::time::Duration::from_secs(120));
    let sums = sums.expect("passes that do not wait for each other");
    assert!(sums.iter().all(|s| *s == sums[0]));
}

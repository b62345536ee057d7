//! Gradients: fused operations against dfdx's own, and the whole model against central differences.

use dfdx::prelude::*;
use mass_model::lm::{LanguageModel, LanguageModelConfig, Masked};
use mass_model::nn::{BlockConfig, MoeConfig, MoeLayer};
use mass_model::ops::{Attention, Sequences};
use mass_model::{Activation, CpuGradients, DropoutKeys, Param, Parameters, ops, seeded_rng};
use mass_routing::{Combine, RouterConfig};

fn values(n: usize, seed: f32) -> Vec<f32> {
    (0..n).map(|i| ((i as f32 + seed) * 1.37).sin()).collect()
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

/// A scalar whose gradient with respect to `y` is a fixed, uneven tensor.
fn probe(y: ops::Rows<OwnedTape<f32, Cpu>>) -> CpuGradients {
    let &(n, d) = y.shape();
    let dy = Cpu::default().tensor_from_vec(values(n * d, 0.3), (n, d));
    (y * dy).sum::<Rank0, _>().backward()
}

#[test]
fn linear_agrees_with_dfdx() {
    let dev = Cpu::default();
    // Up to three pieces of 512 rows, the last of them short.
    for n in [1, 7, 300, 513, 1100] {
        let (inp, out) = (5, 70);
        let x = dev.tensor_from_vec(values(n * inp, 1.0), (n, inp));
        let w = Param::new(values(out * inp, 2.0), &[out, inp], true).unwrap();
        let b = Param::new(values(out, 3.0), &[out], false).unwrap();
        let y = ops::linear(x.clone().leaky_traced(), &w, Some(&b)).unwrap();
        let y_values = y.as_vec();
        let mut grads = probe(y);

        let wt = dev.tensor_from_vec(w.values().to_vec(), (out, inp));
        let bt = dev.tensor_from_vec(b.values().to_vec(), (out,));
        let product = x
            .clone()
            .leaky_traced()
            .matmul(wt.clone().permute::<_, Axes2<1, 0>>());
        let oracle = product + bt.leaky_trace().broadcast_like::<_, Axis<0>>(&(n, out));
        assert_close("y", &y_values, &oracle.as_vec(), 1e-5);
        let oracle = probe(oracle);
        assert_close(
            "dx",
            &grads.get(&x).as_vec(),
            &oracle.get(&x).as_vec(),
            1e-5,
        );
        assert_close(
            "db",
            b.gradient(&mut grads).unwrap(),
            &oracle.get(&bt).as_vec(),
            1e-5,
        );
        // dW = dyᵀ x, by hand: the permuted weight above is not a leaf.
        let dy = dev.tensor_from_vec(values(n * out, 0.3), (n, out));
        let dw = dy.permute::<_, Axes2<1, 0>>().matmul(x.clone()).as_vec();
        assert_close("dw", w.gradient(&mut grads).unwrap(), &dw, 1e-5);
    }
}

#[test]
fn layer_norm_agrees_with_dfdx() {
    let dev = Cpu::default();
    let (n, d, eps) = (300, 12, 1e-5);
    let x = dev.tensor_from_vec(values(n * d, 1.0), (n, d));
    let gamma = Param::new(values(d, 2.0), &[d], false).unwrap();
    let beta = Param::new(values(d, 3.0), &[d], false).unwrap();
    let y = ops::layer_norm(x.clone().leaky_traced(), &gamma, &beta, eps).unwrap();
    let y_values = y.as_vec();
    let mut grads = probe(y);

    let gt = dev.tensor_from_vec(gamma.values().to_vec(), (d,));
    let bt = dev.tensor_from_vec(beta.values().to_vec(), (d,));
    let normed = x.clone().leaky_traced().normalize::<Axis<1>>(eps);
    let oracle = normed * gt.leaky_trace().broadcast_like::<_, Axis<0>>(&(n, d))
        + bt.leaky_trace().broadcast_like::<_, Axis<0>>(&(n, d));
    assert_close("y", &y_values, &oracle.as_vec(), 1e-5);
    let oracle = probe(oracle);
    assert_close(
        "dx",
        &grads.get(&x).as_vec(),
        &oracle.get(&x).as_vec(),
        2e-5,
    );
    assert_close(
        "dgamma",
        gamma.gradient(&mut grads).unwrap(),
        &oracle.get(&gt).as_vec(),
        2e-5,
    );
    assert_close(
        "dbeta",
        beta.gradient(&mut grads).unwrap(),
        &oracle.get(&bt).as_vec(),
        2e-5,
    );
}

#[test]
fn attention_with_one_head_and_no_mask_agrees_with_dfdx() {
    let dev = Cpu::default();
    let (seq, dim) = (9, 6);
    let x = dev.tensor_from_vec(values(seq * 3 * dim, 1.0), (seq, 3 * dim));
    let how = Attention {
        heads: 1,
        ..Attention::default()
    };
    let sequences = Sequences::uniform(1, seq).unwrap();
    let y = ops::self_attention(x.clone().leaky_traced(), &sequences, how).unwrap();
    let y_values = y.as_vec();
    let grads = probe(y);

    let part = |at: usize| {
        let all = x.as_vec();
        let cut: Vec<f32> = all
            .chunks_exact(3 * dim)
            .flat_map(|r| r[at * dim..][..dim].to_vec())
            .collect();
        dev.tensor_from_vec(cut, (seq, dim))
    };
    let (q, k, v) = (part(0), part(1), part(2));
    let scores = q
        .leaky_trace()
        .matmul(k.leaky_trace().permute::<_, Axes2<1, 0>>())
        * (1.0 / (dim as f32).sqrt());
    let oracle = scores.softmax::<Axis<1>>().matmul(v.leaky_trace());
    assert_close("y", &y_values, &oracle.as_vec(), 1e-5);
    let oracle = probe(oracle);
    let dx = grads.get(&x).as_vec();
    for (at, (name, t)) in [("dq", &q), ("dk", &k), ("dv", &v)].into_iter().enumerate() {
        let got: Vec<f32> = dx
            .chunks_exact(3 * dim)
            .flat_map(|r| r[at * dim..][..dim].to_vec())
            .collect();
        assert_close(name, &got, &oracle.get(t).as_vec(), 2e-5);
    }
}

#[test]
fn a_causal_token_does_not_see_what_follows() {
    let dev = Cpu::default();
    let (batch, seq, heads, dim) = (2, 5, 2, 6);
    let how = Attention {
        heads,
        causal: true,
        dropout: None,
    };
    let sequences = Sequences::uniform(batch, seq).unwrap();
    let base = values(batch * seq * 3 * dim, 1.0);
    let run = |data: Vec<f32>| {
        let qkv = dev.tensor_from_vec(data, (batch * seq, 3 * dim));
        ops::self_attention(qkv, &sequences, how).unwrap().as_vec()
    };
    let before = run(base.clone());
    let mut changed = base;
    for x in &mut changed[3 * 3 * dim..4 * 3 * dim] {
        *x += 1.0; // token 3 of the first sequence
    }
    let after = run(changed);
    for row in 0..batch * seq {
        let same = before[row * dim..][..dim] == after[row * dim..][..dim];
        assert_eq!(same, row < 3 || row >= seq, "row {row}");
    }
}

#[test]
fn cross_entropy_agrees_with_dfdx() {
    let dev = Cpu::default();
    let (n, classes) = (40, 11);
    let x = dev.tensor_from_vec(values(n * classes, 1.0), (n, classes));
    let targets: Vec<u32> = (0..n as u32).map(|i| i * 7 % classes as u32).collect();
    let (loss, _) = ops::cross_entropy(x.clone().leaky_traced(), &targets).unwrap();
    let mut onehot = vec![0.0; n * classes];
    for (i, &t) in targets.iter().enumerate() {
        onehot[i * classes + t as usize] = 1.0;
    }
    let oracle = cross_entropy_with_logits_loss(
        x.clone().leaky_traced(),
        dev.tensor_from_vec(onehot, (n, classes)),
    );
    assert!((loss.array() - oracle.array()).abs() < 1e-5);
    let (got, want) = (
        loss.backward().get(&x).as_vec(),
        oracle.backward().get(&x).as_vec(),
    );
    assert_close("dlogits", &got, &want, 1e-5);
}

type Traced = ops::Rows<OwnedTape<f32, Cpu>>;

/// A transposed view gives what a tensor of the same rows gives, and its gradient lies as the tensor that was transposed.
#[test]
fn operations_take_tensors_that_are_not_contiguous() {
    let dev = Cpu::default();
    let w = Param::new(values(8, 2.0), &[2, 4], true).unwrap();
    let gamma = Param::new(values(4, 3.0), &[4], false).unwrap();
    let beta = Param::new(values(4, 4.0), &[4], false).unwrap();
    let router = RouterConfig::TopK {
        k: 2,
        combine: Combine::Renormalised,
    };
    let config = MoeConfig::new(4, 5, 2, Activation::GeluErf, router);
    let layer = MoeLayer::new(&config, &mut seeded_rng(1)).unwrap();
    let operations: [(&str, &dyn Fn(Traced) -> Traced); 3] = [
        ("linear", &|x: Traced| ops::linear(x, &w, None).unwrap()),
        ("layer norm", &|x: Traced| {
            ops::layer_norm(x, &gamma, &beta, 1e-5).unwrap()
        }),
        ("mixture", &|x: Traced| layer.try_forward(x).unwrap()),
    ];
    let x: ops::Rows<NoneTape> = dev.tensor_from_vec(values(12, 1.0), (4, 3));
    let data = x.as_vec();
    let rows = (0..12).map(|i| data[(i % 4) * 3 + i / 4]).collect();
    let plain: ops::Rows<NoneTape> = dev.tensor_from_vec(rows, (3, 4));
    for (name, operation) in operations {
        let got = operation(x.leaky_trace().permute::<_, Axes2<1, 0>>());
        let want = operation(plain.leaky_trace());
        assert_close(&format!("y, {name}"), &got.as_vec(), &want.as_vec(), 1e-6);
        let (got, want) = (probe(got), probe(want));
        let rows = want.get(&plain).as_vec();
        let want: Vec<f32> = (0..12).map(|i| rows[(i % 3) * 4 + i / 3]).collect();
        assert!(want.iter().any(|g| g.abs() > 1e-3), "{name}: {want:?}");
        assert_close(&format!("dx, {name}"), &got.get(&x).as_vec(), &want, 1e-6);
    }
}

fn tiny(router: RouterConfig, activation: Activation) -> LanguageModel {
    let moe = MoeConfig::new(12, 10, 4, activation, router);
    let block = BlockConfig {
        heads: 3,
        layer_norm_eps: 1e-5,
        moe,
    };
    let config = LanguageModelConfig {
        vocab: 9,
        max_seq: 8,
        layers: 2,
        embedding_std: 0.02,
        block,
    };
    let mut model = LanguageModel::new(&config, &mut seeded_rng(3)).unwrap();
    // Larger weights: the gradient of every parameter stands clear of rounding.
    model.visit_mut("", &mut |name, p| {
        if name == "tokens" || name == "positions" {
            p.values_mut().iter_mut().for_each(|x| *x *= 30.0);
        }
    });
    model
}

/// Central differences of the loss along a random direction in each parameter tensor, in two step sizes so that a change
/// of the routing's selection within the step can be told from a wrong gradient.
#[test]
fn the_whole_model_agrees_with_central_differences() {
    let tokens: Vec<u32> = (0..24).map(|i| i * 5 % 9).collect();
    let targets: Vec<u32> = (0..24).map(|i| (i * i + 1) % 9).collect();
    for (router, activation) in [
        (
            RouterConfig::TopP {
                p: 0.6,
                combine: Combine::Renormalised,
            },
            Activation::GeluErf,
        ),
        (
            RouterConfig::TopP {
                p: 0.6,
                combine: Combine::Raw,
            },
            Activation::GeluTanh,
        ),
        (
            RouterConfig::TopK {
                k: 2,
                combine: Combine::Renormalised,
            },
            Activation::GeluErf,
        ),
    ] {
        let model = tiny(router, activation);
        let mut pass = model.train_pass(&tokens, &targets, 8).unwrap();
        let mut names = Vec::new();
        model.visit("", &mut |name, p| names.push((name, p.len())));
        let loss_at = |which: &str, direction: &[f32], step: f32| -> f64 {
            let mut moved = model.clone();
            moved.visit_mut("", &mut |name, p| {
                if name == which {
                    p.values_mut()
                        .iter_mut()
                        .zip(direction)
                        .for_each(|(x, d)| *x += step * d);
                }
            });
            let (nll, _) = moved.score(&tokens, &targets, 8, None).unwrap();
            nll.iter().map(|&x| f64::from(x)).sum::<f64>() / nll.len() as f64
        };
        let mut gradients = std::collections::HashMap::new();
        model.visit("", &mut |name, p| {
            gradients.insert(name, p.gradient(&mut pass.gradients).unwrap().clone());
        });
        for (name, len) in &names {
            let direction = values(*len, 0.7);
            let norm = direction.iter().map(|x| x * x).sum::<f32>().sqrt();
            let direction: Vec<f32> = direction.iter().map(|x| x / norm).collect();
            let analytic: f64 = gradients[name]
                .iter()
                .zip(&direction)
                .map(|(g, d)| f64::from(*g) * f64::from(*d))
                .sum();
            let numeric = |h: f32| {
                (loss_at(name, &direction, h) - loss_at(name, &direction, -h))
                    / (2.0 * f64::from(h))
            };
            let errors = [1e-2f32, 3e-3].map(|h| (numeric(h) - analytic).abs());
            let best = errors[0].min(errors[1]);
            assert!(
                best < 2e-4 + 1e-2 * analytic.abs(),
                "{name}: gradient {analytic}, off by {errors:?}"
            );
        }
    }
}

#[test]
fn a_masked_expert_takes_no_part() {
    let model = tiny(
        RouterConfig::TopP {
            p: 0.9,
            combine: Combine::Renormalised,
        },
        Activation::Relu,
    );
    let tokens: Vec<u32> = (0..16).map(|i| i % 9).collect();
    let targets = tokens.clone();
    let expert = model.blocks[1].moe.ids()[2];
    let masked = Some(Masked { layer: 1, expert });
    let (_, layers) = model.score(&tokens, &targets, 8, masked).unwrap();
    assert_eq!(layers[1].plan.load(2), 0);
    assert!(layers[0].plan.load(2) > 0);
    let missing = Some(Masked {
        layer: 0,
        expert: mass_expand::ExpertId(99),
    });
    assert!(model.score(&tokens, &targets, 8, missing).is_err());
}

#[test]
fn threads_do_not_change_a_bit_of_linear() {
    let (n, inp, out) = (1700, 9, 130);
    let x = Cpu::default().tensor_from_vec(values(n * inp, 1.0), (n, inp));
    let w = Param::new(values(out * inp, 2.0), &[out, inp], true).unwrap();
    let b = Param::new(values(out, 3.0), &[out], false).unwrap();
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        pool.build().unwrap().install(|| {
            let y = ops::linear(x.leaky_trace(), &w, Some(&b)).unwrap();
            let mut all = y.as_vec();
            let mut grads = probe(y);
            all.extend(grads.get(&x).as_vec());
            all.extend_from_slice(w.gradient(&mut grads).unwrap());
            all.extend_from_slice(b.gradient(&mut grads).unwrap());
            all.into_iter().map(f32::to_bits).collect::<Vec<_>>()
        })
    };
    let one = run(1);
    assert_eq!(one, run(2));
    assert_eq!(one, run(5));
}

/// Few sequences have their heads shared out among threads, many do not.
#[test]
fn threads_do_not_change_a_bit_of_attention() {
    let (dim, heads) = (24, 3);
    for offsets in [
        vec![0, 37],
        vec![0, 5, 6, 40],
        vec![0, 9, 11, 12, 20, 33, 40],
    ] {
        let sequences = Sequences::packed(offsets).unwrap();
        let n = sequences.rows();
        let qkv = Cpu::default().tensor_from_vec(values(n * 3 * dim, 1.0), (n, 3 * dim));
        for (causal, rate) in [(false, 0.0), (true, 0.3)] {
            let how = Attention {
                heads,
                causal,
                dropout: DropoutKeys::new(1, 2).next(rate).unwrap(),
            };
            let run = |threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
                pool.build().unwrap().install(|| {
                    let y = ops::self_attention(qkv.leaky_trace(), &sequences, how).unwrap();
                    let mut all = y.as_vec();
                    all.extend(probe(y).get(&qkv).as_vec());
                    all.into_iter().map(f32::to_bits).collect::<Vec<_>>()
                })
            };
            let one = run(1);
            assert_eq!(one, run(2));
            assert_eq!(one, run(5));
        }
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    let router = RouterConfig::TopP {
        p: 0.7,
        combine: Combine::Renormalised,
    };
    let config = MoeConfig::new(16, 24, 5, Activation::GeluErf, router);
    let layer = MoeLayer::new(&config, &mut seeded_rng(1)).unwrap();
    let x = Cpu::default().tensor_from_vec(values(1000 * 16, 1.0), (1000, 16));
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| {
            let y = layer.try_forward(x.leaky_trace()).unwrap();
            let mut bits: Vec<u32> = y.as_vec().iter().map(|v| v.to_bits()).collect();
            let mut grads = probe(y);
            bits.extend(grads.get(&x).as_vec().iter().map(|v| v.to_bits()));
            layer.visit("", &mut |_, p| {
                bits.extend(p.gradient(&mut grads).unwrap().iter().map(|v| v.to_bits()));
            });
            bits
        })
    };
    let one = run(1);
    assert_eq!(one, run(2));
    assert_eq!(one, run(5));
}

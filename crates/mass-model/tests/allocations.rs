//! Kernels allocate nothing of the size of their data once they have run: scratch memory comes from a pool. Readers of stored
//! state allocate nothing by a number in it alone.
//!
//! A program of its own, and one test at a time: the pool is the process's, and another test's kernels would take the buffers
//! that the run before has left in it.

use std::sync::{Mutex, PoisonError};

use dfdx::prelude::{Backward, Cpu, NoneTape, OwnedTape, SumTo, TensorFromVec, Trace};
use mass_cpd::{
    Bank, BankParams, TrainingMonitor, TrainingMonitorParams, WindowedZ, WindowedZParams,
};
use mass_model::checkpoint::{self, Files, Snapshot};
use mass_model::kernels::attention::{self, AttentionShape};
use mass_model::kernels::gemm::Store;
use mass_model::kernels::moe_ffn::{
    self, ExpertGradients, ExpertWeights, FfnShape, Grouped, Hidden,
};
use mass_model::kernels::{adamw, cross_entropy, dropout, layer_norm, linear};
use mass_model::lm::LanguageModel;
use mass_model::nn::{FeedForward, MoeConfig, MoeLayer};
use mass_model::ops::{self, Attention, Rows, Sequences};
use mass_model::optim::{AdamW, AdamWConfig};
use mass_model::{Activation, DropoutKeys, Param, Parameters, seeded_rng};
use mass_routing::{Combine, RouterConfig};
use serde_json::{Value, json};

static ALONE: Mutex<()> = Mutex::new(());

/// Runs it on one thread, while no other test runs. With more threads, one may do its first work (and get its packing buffers)
/// at any time.
fn alone(run: fn()) {
    let _guard = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(1)
        .build()
        .unwrap();
    pool.install(run);
}

/// Bytes that the third run asks for on this thread.
fn steady(mut run: impl FnMut()) -> u64 {
    run();
    run();
    allocation_counter::measure(run).bytes_total
}

#[test]
fn kernels_allocate_nothing_of_the_size_of_their_data() {
    alone(run_kernels);
}

fn run_kernels() {
    let (n, d, hidden, experts) = (1024, 64, 128, 4);
    let x = vec![0.1f32; n * d];
    let mut reports = Vec::new();

    let (w, b) = (vec![0.1; hidden * d], vec![0.1; hidden]);
    let (mut y, mut dx) = (vec![0.0; n * hidden], vec![0.0; n * d]);
    let (mut dw, mut db) = (vec![0.0; hidden * d], vec![0.0; hidden]);
    reports.push((
        "linear",
        steady(|| {
            linear::forward(&x, &w, Some(&b), &mut y, d, hidden);
            linear::backward_input(&y, &w, (&mut dx, Store::Add), (d, hidden));
            linear::backward_weight(&x, &y, &mut dw, Some(&mut db), (d, hidden), Store::Replace);
        }),
    ));

    let (gamma, mut out, mut stats) = (vec![1.0; d], vec![0.0; n * d], vec![0.0; 2 * n]);
    let (mut dgamma, mut dbeta) = (vec![0.0; d], vec![0.0; d]);
    reports.push((
        "layer norm",
        steady(|| {
            layer_norm::forward(&x, &gamma, &gamma, 1e-5, &mut out, &mut stats);
            let given = (&mut dx[..], Store::Add);
            layer_norm::backward(&x, &gamma, &stats, &x, given, &mut dgamma, &mut dbeta);
        }),
    ));

    let offsets: Vec<usize> = (0..=16).map(|i| i * n / 16).collect();
    let shape = AttentionShape {
        offsets: &offsets,
        keys: None,
        heads: 4,
        dim: d,
        causal: true,
        dropout: DropoutKeys::new(0, 0).next(0.1).unwrap(),
        longest_kept: attention::LONGEST_KEPT,
    };
    let (qkv, mut dqkv) = (vec![0.1; n * 3 * d], vec![0.0; n * 3 * d]);
    let mut probs = vec![0.0; shape.kept()];
    reports.push((
        "attention",
        steady(|| {
            attention::forward(&qkv, &mut probs, &mut out, shape);
            attention::backward(&qkv, &probs, &x, (&mut dqkv, Store::Add), shape);
        }),
    ));

    // Token t is assigned to expert t mod 4: grouped order is by expert, then by token.
    let tokens: Vec<u32> = (0..experts)
        .flat_map(|e| (0..n as u32).filter(move |t| *t as usize % experts == e))
        .collect();
    let mut place = vec![0u32; n];
    tokens
        .iter()
        .enumerate()
        .for_each(|(a, &t)| place[t as usize] = a as u32);
    let expert_offsets: Vec<u32> = (0..=experts).map(|e| (e * n / experts) as u32).collect();
    let token_offsets: Vec<u32> = (0..=n as u32).collect();
    let weights = vec![1.0; n];
    let plan = Grouped {
        expert_offsets: &expert_offsets,
        tokens: &tokens,
        weights: &weights,
        token_offsets: &token_offsets,
        token_assignments: &place,
    };
    let ffn = FfnShape {
        dim: d,
        hidden,
        activation: Activation::Silu,
        gated: true,
    };
    let (w2, b2) = (vec![0.1; d * hidden], vec![0.1; d]);
    let expert = ExpertWeights {
        w1: &w,
        b1: &b,
        w2: &w2,
        b2: &b2,
        up: Some((&w, &b)),
    };
    let pool = vec![expert; experts];
    let mut hidden = Hidden::take(ffn, n);
    let mut grads: Vec<[Vec<f32>; 6]> = (0..experts)
        .map(|_| {
            [
                w.clone(),
                b.clone(),
                w2.clone(),
                b2.clone(),
                w.clone(),
                b.clone(),
            ]
        })
        .collect();
    let mut d_weights = vec![0.0; n];
    let lists = (64 * experts * size_of::<ExpertGradients<'_>>()) as u64;
    reports.push((
        "expert network",
        steady(|| {
            moe_ffn::forward(&x, &pool, plan, ffn, Some(&mut hidden), &mut out);
            let mut gradients: Vec<ExpertGradients<'_>> = grads
                .iter_mut()
                .map(|[w1, b1, w2, b2, w3, b3]| ExpertGradients {
                    w1,
                    b1,
                    w2,
                    b2,
                    up: Some((w3, b3)),
                    store: Store::Replace,
                })
                .collect();
            moe_ffn::backward(
                &x,
                &pool,
                plan,
                ffn,
                &mut hidden,
                &x,
                (&mut dx, Store::Add),
                &mut gradients,
                &mut d_weights,
            );
        }),
    ));

    let targets = vec![3u32; n];
    let (mut logits, mut nll) = (x.clone(), vec![0.0; n]);
    reports.push((
        "cross-entropy",
        steady(|| {
            cross_entropy::forward(&mut logits, &targets, &mut nll, d);
            cross_entropy::backward(&logits, &targets, 1.0, (&mut dx, Store::Add), d);
        }),
    ));
    let mask = DropoutKeys::new(0, 1).next(0.1).unwrap();
    reports.push((
        "dropout",
        steady(|| dropout::masked(mask, &x, &mut dx, Store::Add)),
    ));
    let step = adamw::AdamWStep {
        lr: 1e-3,
        beta1: 0.9,
        beta2: 0.999,
        take1: 0.1,
        take2: 1e-3,
        eps: 1e-8,
        weight_decay: 0.0,
        bias1: 0.1,
        bias2: 1e-3,
        gradient_scale: 1.0,
    };
    let (mut m, mut v) = (vec![0.0; n * d], vec![0.0; n * d]);
    reports.push((
        "AdamW",
        steady(|| adamw::update(&mut dx, &x, &mut m, &mut v, step)),
    ));

    // The matrix product packs its operands into buffers of its own, call by call; everything else is nothing at all. Without
    // the pool the expert network would ask for some 2 MiB more, the others for what they are given.
    for (name, bytes) in reports {
        let packing: u64 = match name {
            "linear" => 128 << 10,
            "attention" => 640 << 10,
            "expert network" => (1600 << 10) + lists,
            _ => 0,
        };
        assert!(bytes <= packing, "{name} allocates {bytes} bytes");
    }
}

#[test]
fn operations_allocate_their_results_and_gradients_and_no_copies_of_data() {
    alone(run_operations);
}

/// Forward and backward passes of operations on 1024 rows of width 64, in units of that many values.
fn run_operations() {
    let (n, d, hidden) = (1024, 64, 128);
    let device = Cpu::default();
    let x: Rows<NoneTape> = device.tensor_from_vec(vec![0.1f32; n * d], (n, d));
    let qkv: Rows<NoneTape> = device.tensor_from_vec(vec![0.1f32; 3 * n * d], (n, 3 * d));
    let matrix = |rows, cols| Param::new(vec![0.1; rows * cols], &[rows, cols], true).unwrap();
    let vector = |len| Param::new(vec![0.1; len], &[len], false).unwrap();
    let (square, bias, ids) = (matrix(d, d), vector(d), vec![3u32; n]);
    let sequences = Sequences::uniform(16, n / 16).unwrap();
    let attention = Attention {
        heads: 4,
        causal: true,
        dropout: None,
    };
    let router = RouterConfig::TopK {
        k: 2,
        combine: Combine::Raw,
    };
    let config = MoeConfig::new(d, hidden, 4, Activation::GeluErf, router);
    let mut rng = mass_model::seeded_rng(0);
    let mixture = MoeLayer::new(&config, &mut rng).unwrap();
    let network = FeedForward::new(d, hidden, Activation::GeluErf, false, &mut rng).unwrap();
    let keys = DropoutKeys::new(0, 1).next(0.1).unwrap();
    // Gradients stay the next run's, as an optimiser gives them back.
    let back = |y: Rows<OwnedTape<f32, Cpu>>, params: &[&Param]| {
        let mut gradients = y.sum().backward();
        for param in params {
            param.clear_gradient(&mut gradients).unwrap();
        }
    };
    let mut of_mixture = Vec::new();
    mixture.visit("", &mut |_, p| of_mixture.push(p));
    let mut of_network = Vec::new();
    network.visit("", &mut |_, p| of_network.push(p));
    let unit = (n * d * size_of::<f32>()) as u64;
    let of = |run: &mut dyn FnMut()| steady(run) as f64 / unit as f64;
    // The first operation of a backward pass that writes a parameter's gradient asks on a copy of the gradients so far, here the
    // result's, whether leaves are named.
    const COPY: f64 = 1.0;
    let found = [
        (
            "linear",
            3.5 + COPY,
            of(&mut || {
                back(
                    ops::linear(x.leaky_trace(), &square, Some(&bias)).unwrap(),
                    &[&square, &bias],
                )
            }),
        ),
        (
            "layer norm",
            3.5 + COPY,
            of(&mut || {
                back(
                    ops::layer_norm(x.leaky_trace(), &bias, &bias, 1e-5).unwrap(),
                    &[&bias],
                )
            }),
        ),
        (
            "attention",
            7.8,
            of(&mut || {
                back(
                    ops::self_attention(qkv.leaky_trace(), &sequences, attention).unwrap(),
                    &[],
                )
            }),
        ),
        (
            "feed-forward",
            10.0 + COPY,
            of(&mut || back(network.try_forward(x.leaky_trace()).unwrap(), &of_network)),
        ),
        (
            "mixture",
            13.0 + COPY,
            of(&mut || back(mixture.try_forward(x.leaky_trace()).unwrap(), &of_mixture)),
        ),
        (
            "embedding",
            2.5 + COPY,
            of(&mut || {
                back(
                    ops::embedding(&[(&square, &ids)], OwnedTape::default()).unwrap(),
                    &[&square],
                )
            }),
        ),
        (
            "dropout",
            3.5,
            of(&mut || back(ops::dropout(x.leaky_trace(), keys).unwrap(), &[])),
        ),
        (
            "residual",
            3.5,
            of(&mut || back(ops::add(x.leaky_trace(), &x, keys).unwrap(), &[])),
        ),
    ];
    // The result, its gradient and the input's are three units, but for attention, whose input is of three, and the embedding,
    // which has none. The matrix product's packing comes on top, as in the kernels above.
    for (name, limit, units) in found {
        assert!(
            units <= limit,
            "{name} allocates {units:.3} times the size of its input"
        );
    }
}

#[test]
fn what_is_read_takes_no_more_memory_than_its_size_allows() {
    alone(read_false_numbers);
}

/// Files of some kilobytes, whose numbers ask for gigabytes.
fn read_false_numbers() {
    const MOST: u64 = 64 << 20;
    let most_in_use = |run: &mut dyn FnMut()| allocation_counter::measure(run).bytes_max;

    let moe = json!({ "dim": 2, "hidden": 2, "experts": 2, "activation": "relu", "router": { "router": "top_k", "k": 1 } });
    let config = json!({ "vocab": 3, "max_seq": 2, "layers": 2, "embedding_std": 0.5,
        "block": { "heads": 1, "layer_norm_eps": 1e-5, "moe": moe } });
    let model = LanguageModel::new(
        &serde_json::from_value(config.clone()).unwrap(),
        &mut seeded_rng(0),
    );
    let optimizer = AdamW::new(AdamWConfig::default()).unwrap();
    let files = checkpoint::encode(&Snapshot::new(0, &model.unwrap(), &optimizer, &())).unwrap();
    for (field, number) in [
        ("/model/block/moe/experts", 140_000),
        ("/model/block/moe/experts", 4000),
        ("/model/layers", 40_000),
        ("/model/layers", 1000),
    ] {
        let mut files = files.clone();
        let mut state: Value = serde_json::from_slice(&files["state.json"]).unwrap();
        *state.pointer_mut(field).unwrap() = json!(number);
        files.insert("state.json".into(), state.to_string().into_bytes());
        seal(&mut files);
        let most = most_in_use(&mut || {
            let _ = checkpoint::decode::<LanguageModel, Value>(&files);
        });
        assert!(most < MOST, "{field} {number} takes {most} bytes");
    }

    let capacity = BankParams {
        capacity: 1,
        ..Default::default()
    };
    let stored = [
        (
            serde_json::to_value(WindowedZParams::paper(5, 10, 0.1).check().unwrap()),
            vec!["/params/window", "/values/capacity", "/scores/capacity"],
        ),
        (
            serde_json::to_value(TrainingMonitorParams::default().check().unwrap()),
            vec!["/params/training"],
        ),
        (
            serde_json::to_value(capacity.check().unwrap()),
            vec!["/params/capacity"],
        ),
    ];
    let readers: [fn(Value) -> bool; 3] = [
        |v| serde_json::from_value::<WindowedZ>(v).is_ok(),
        |v| serde_json::from_value::<TrainingMonitor>(v).is_ok(),
        |v| serde_json::from_value::<Bank>(v).is_ok(),
    ];
    for ((stored, fields), read) in stored.into_iter().zip(readers) {
        let mut stored = stored.unwrap();
        for field in &fields {
            *stored.pointer_mut(field).expect(field) = json!(1 << 24);
        }
        let (mut taken, kept) = (false, stored.clone());
        let most = most_in_use(&mut || taken = read(kept.clone()));
        assert!(
            taken && most < MOST,
            "{fields:?} takes {most} bytes: {taken}"
        );
    }
}

/// Checksums that agree with the files.
fn seal(files: &mut Files) {
    files.remove("checksums");
    let line = |name: &str, bytes: &[u8]| {
        format!("{:08x} {} {name}\n", crc32fast::hash(bytes), bytes.len())
    };
    // In the order in which they are written.
    let names = ["model.safetensors", "optimizer.safetensors", "state.json"];
    let mut text: String = names.iter().map(|name| line(name, &files[*name])).collect();
    text += &line("checksums", text.as_bytes());
    files.insert("checksums".into(), text.into_bytes());
}

//! Every operation on a device against the host, forward and backward. Without a device, which `cargo xtask cuda-emu` emulates,
//! the tests do nothing and say so.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Barrier};
use std::thread;

use dfdx::prelude::{NoneTape, OwnedTape};
use mass_cuda::{Buffer, Device};
use mass_routing::losses::BalanceCount;
use mass_routing::{Combine, RouterConfig};

use super::Cuda;
use crate::error::ModelError;
use crate::kernels::activation::Activation;
use crate::kernels::dropout::DropoutKeys;
use crate::mirror::Mirror;
use crate::nn::{FeedForward, GateConfig, LayerNorm, Linear, MoeConfig, MoeLayer, SelfAttention};
use crate::ops::{Host, Pass, RoutingLoss, Sequences, Taps, Training};
use crate::optim::Gradients;
use crate::param::{Param, Parameters};
use crate::seeded_rng;

/// The device, if one was promised; if it is not there then, the test fails.
fn device() -> Option<Device> {
    let promised = ["EMU_CONTROL", "MASS_CUDA_REAL"];
    if promised.iter().all(|name| std::env::var_os(name).is_none()) {
        let what = "NOT RUN: it needs a device, which `cargo xtask cuda-emu` emulates";
        let _ = writeln!(std::io::stderr(), "a test was {what}");
        return None;
    }
    Some(Device::open(0).unwrap())
}

fn values(n: usize, seed: f32) -> Vec<f32> {
    (0..n).map(|i| ((i as f32 + seed) * 1.37).sin()).collect()
}

fn param(shape: &[usize], seed: f32) -> Param {
    Param::new(values(shape.iter().product(), seed), shape, true).unwrap()
}

fn close(what: &str, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len(), "{what}");
    let largest = want.iter().fold(1.0_f32, |m, x| m.max(x.abs()));
    for (i, (a, b)) in got.iter().zip(want).enumerate() {
        let error = (a - b).abs();
        assert!(error <= 1e-5 * largest, "{what}[{i}]: {a}, on the host {b}");
    }
}

/// What is done with rows.
enum Operation {
    Linear(Linear),
    LayerNorm(LayerNorm),
    FeedForward(FeedForward),
    Moe(Box<MoeLayer>),
    Attention(SelfAttention, Sequences, bool),
    Scale(Param),
    Pick(Vec<usize>),
    Assemble(Param, Param, Taps),
    Tanh,
    Dropout(f32),
    /// To what is made of it by a nonlinearity, both with a gradient.
    Add(f32),
}

impl Operation {
    fn run<P: Pass>(&self, pass: &mut P, x: P::Rows) -> Result<P::Rows, ModelError> {
        let mut keys = DropoutKeys::new(3, 5);
        match self {
            Self::Linear(layer) => layer.run(pass, x),
            Self::LayerNorm(layer) => layer.run(pass, x),
            Self::FeedForward(layer) => layer.run(pass, x),
            Self::Moe(layer) => layer.run(pass, x),
            Self::Attention(layer, sequences, dropped) => {
                let keys = dropped.then_some(&mut keys);
                layer.run(pass, x, sequences, None, keys)
            }
            Self::Scale(factor) => pass.scale_rows(x, factor),
            Self::Pick(picked) => pass.pick_rows(x, picked),
            Self::Assemble(class, positions, taps) => {
                pass.assemble(x, class, positions, taps.clone())
            }
            Self::Tanh => pass.tanh(x),
            Self::Dropout(rate) => pass.dropout(x, keys.next(*rate)?),
            Self::Add(rate) => {
                let other = pass.tanh(x.clone())?;
                pass.add(other, x, keys.next(*rate)?)
            }
        }
    }

    fn params(&self) -> Vec<(String, &Param)> {
        let mut all = Vec::new();
        let f = &mut |name, param| all.push((name, param));
        match self {
            Self::Linear(layer) => layer.visit("", f),
            Self::LayerNorm(layer) => layer.visit("", f),
            Self::FeedForward(layer) => layer.visit("", f),
            Self::Moe(layer) => layer.visit("", f),
            Self::Attention(layer, ..) => layer.visit("", f),
            Self::Scale(factor) => factor.visit("factor", f),
            Self::Assemble(class, positions, _) => {
                class.visit("class", f);
                positions.visit("positions", f);
            }
            Self::Pick(_) | Self::Tanh | Self::Dropout(_) | Self::Add(_) => {}
        }
        all
    }
}

/// A loss, that of each row, and the rows.
type Ran<P> = (<P as Pass>::Loss, Vec<f32>, Vec<f32>);

/// The operation between an embedding, whose gradient is that of the operation's input, and a loss.
fn run<P: Pass>(pass: &mut P, table: &Param, operation: &Operation) -> Result<Ran<P>, ModelError> {
    let ids: Vec<u32> = (0..table.shape()[0] as u32).collect();
    let x = pass.embedding(&[(table, &ids), (table, &ids)])?;
    let y = operation.run(pass, x)?;
    let (n, classes) = pass.shape(&y);
    let targets: Vec<u32> = (0..n).map(|i| ((5 * i + 1) % classes) as u32).collect();
    let output = pass.mirror(&y).to_vec();
    let (loss, losses) = pass.cross_entropy(y, &targets)?;
    Ok((loss, losses, output))
}

fn compare(what: &str, (n, d): (usize, usize), operation: &Operation) {
    let Some(device) = device() else { return };
    let table = param(&[n, d], 0.4);

    let mut pass = Host(OwnedTape::default());
    let (loss, losses, output) = run(&mut pass, &table, operation).unwrap();
    let mut wanted = pass.backward(loss).unwrap().1;

    let mut pass = Cuda::training(&device);
    let (loss, losses_there, there) = run(&mut pass, &table, operation).unwrap();
    close(&format!("{what}: output"), &there, &output);
    close(&format!("{what}: losses"), &losses_there, &losses);
    let got = pass.backward(loss).unwrap().1;
    for (name, param) in [("input".into(), &table)]
        .into_iter()
        .chain(operation.params())
    {
        let wanted = param.find_gradient(&mut wanted).unwrap();
        let got = got.of(param).unwrap();
        match (got, wanted) {
            (Some(got), Some(wanted)) => close(&format!("{what}: {name}"), &got, wanted),
            (got, wanted) => assert!(got.is_none() && wanted.is_none(), "{what}: {name}"),
        }
    }

    // Without a tape.
    let host = run(&mut Host(NoneTape), &table, operation).unwrap().2;
    let there = run(&mut Cuda::evaluating(&device), &table, operation)
        .unwrap()
        .2;
    close(&format!("{what}, evaluated"), &there, &host);
}

#[test]
fn linear_layers_norms_and_networks() {
    let rng = &mut seeded_rng(1);
    for (n, inp, out) in [(1, 1, 2), (7, 5, 3), (37, 33, 65)] {
        for bias in [false, true] {
            let layer = Linear::new(inp, out, bias, rng).unwrap();
            compare("linear", (n, inp), &Operation::Linear(layer));
        }
        let mut norm = LayerNorm::new(inp, 1e-5).unwrap();
        norm.weight = param(&[inp], 0.2);
        compare("layer norm", (n, inp), &Operation::LayerNorm(norm));
    }
    let all = [
        Activation::Relu,
        Activation::GeluErf,
        Activation::GeluTanh,
        Activation::Silu,
    ];
    for activation in all {
        for gated in [false, true] {
            let network = FeedForward::new(6, 11, activation, gated, rng).unwrap();
            let what = format!("network of {activation:?}, gated {gated}");
            compare(&what, (13, 6), &Operation::FeedForward(network));
        }
    }
}

#[test]
fn elementwise_operations_and_rows() {
    compare("tanh", (5, 7), &Operation::Tanh);
    compare("scale", (300, 7), &Operation::Scale(param(&[7], 0.9)));
    for rate in [0.0, 0.3] {
        compare("dropout", (9, 33), &Operation::Dropout(rate));
        compare("add", (9, 33), &Operation::Add(rate));
    }
    // One row twice and one not at all.
    compare("pick", (4, 6), &Operation::Pick(vec![2, 0, 2]));
    let taps = vec![
        vec![(0, 0.75), (3, 0.25)],
        vec![(1, 1.0)],
        vec![(2, -0.5), (1, 1.5)],
    ];
    let (class, positions) = (param(&[5], 0.1), param(&[5, 5], 0.6));
    let assemble = Operation::Assemble(class, positions, taps);
    compare("assemble", (6, 5), &assemble);
}

#[test]
fn attention_within_sequences() {
    let rng = &mut seeded_rng(2);
    for (causal, dropout) in [(true, 0.0), (false, 0.2)] {
        let mut layer = SelfAttention::new(12, 3, rng).unwrap();
        (layer.causal, layer.dropout) = (causal, dropout);
        let sequences = Sequences::packed(vec![0, 1, 6, 17]).unwrap();
        let keys = (0..17).map(|i| i % 5 != 4).collect();
        let masked = sequences.clone().with_keys(keys).unwrap();
        for sequences in [sequences, masked] {
            let what = format!("attention, causal {causal}, dropout {dropout}");
            let operation = Operation::Attention(layer.clone(), sequences, dropout > 0.0);
            compare(&what, (17, 12), &operation);
        }
    }
}

#[test]
fn mixtures_behind_every_router_and_gate() {
    let combine = Combine::Renormalised;
    let routers = [
        RouterConfig::TopP { p: 0.6, combine },
        RouterConfig::TopK {
            k: 1,
            combine: Combine::Raw,
        },
        RouterConfig::TopAny { experts: 0 },
        RouterConfig::BiasBalanced {
            k: 2,
            rate: 0.01,
            combine,
        },
        RouterConfig::ExpertChoice {
            capacity: 1.5,
            combine,
        },
    ];
    let gates = [
        GateConfig::Linear,
        GateConfig::Cosine {
            projection: Some(4),
            temperature: Some(0.5),
        },
        GateConfig::LowRank {
            rank: 3,
            anchors: 2,
            scale: 2.0,
        },
    ];
    let rng = &mut seeded_rng(3);
    for router in routers {
        for gate in gates {
            for gated in [false, true] {
                let mut config = MoeConfig::new(6, 10, 5, Activation::Silu, router.clone());
                (config.gate, config.gated) = (gate, gated);
                config.shared_hidden = gated.then_some(7);
                config.losses = vec![RoutingLoss::RouterZ { weight: 0.1 }];
                if gate == GateConfig::Linear {
                    let weight = 0.1;
                    config.losses.push(RoutingLoss::DiverseAndSimple { weight });
                }
                if matches!(router, RouterConfig::TopP { .. }) {
                    let (weight, count) = (0.2, BalanceCount::Selected);
                    config.losses.push(RoutingLoss::Balance { weight, count });
                }
                let layer = MoeLayer::new(&config, rng).unwrap();
                let what = format!("{router:?}, {gate:?}, gated {gated}");
                compare(&what, (19, 6), &Operation::Moe(Box::new(layer)));
            }
        }
    }
}

#[test]
fn a_relu_keeps_nan_and_large_gradients_have_a_norm() {
    let Some(device) = device() else { return };
    let (table, rng) = (param(&[3, 4], 0.4), &mut seeded_rng(4));
    let mut network = FeedForward::new(4, 5, Activation::Relu, false, rng).unwrap();
    network.visit_mut("", &mut |name, p| {
        if name == "fc1.bias" {
            p.values_mut().fill(f32::NAN);
        }
    });
    let mut pass = Cuda::evaluating(&device);
    let y = run(&mut pass, &table, &Operation::FeedForward(network)).unwrap();
    assert!(y.2.iter().all(|y| y.is_nan()), "{:?}", y.2);

    let mut pass = Cuda::training(&device);
    let loss = run(&mut pass, &table, &Operation::Tanh).unwrap().0;
    let mut gradients = pass.backward(loss).unwrap().1;
    for (value, sum) in [(1e20, 12e40), (f32::INFINITY, f64::INFINITY)] {
        gradients.set(&table, vec![value; 12]).unwrap();
        let found = gradients.sums_of_squares(&[&table]).unwrap()[0].unwrap();
        assert!(found == sum || (found / sum - 1.0).abs() < 1e-6, "{found}");
    }
}

#[test]
fn squared_errors_of_values() {
    let Some(device) = device() else { return };
    let table = param(&[9, 1], 0.4);
    let ids: Vec<u32> = (0..9).collect();
    let targets = values(9, 2.0);
    let mut pass = Host(OwnedTape::default());
    let x = pass.embedding(&[(&table, &ids)]).unwrap();
    let (loss, losses) = pass.mean_squared_error(x, &targets).unwrap();
    let mut wanted = pass.backward(loss).unwrap().1;
    let mut pass = Cuda::training(&device);
    let x = pass.embedding(&[(&table, &ids)]).unwrap();
    let (loss, there) = pass.mean_squared_error(x, &targets).unwrap();
    close("squared errors", &there, &losses);
    let got = pass.backward(loss).unwrap().1.of(&table).unwrap().unwrap();
    close("gradient", &got, table.gradient(&mut wanted).unwrap());
}

#[test]
fn what_the_host_refuses_the_device_refuses_in_the_same_words() {
    let Some(device) = device() else { return };
    let table = param(&[4, 6], 0.4);
    let narrow = Linear::new(5, 2, true, &mut seeded_rng(0)).unwrap();
    for operation in [
        Operation::Linear(narrow),
        Operation::LayerNorm(LayerNorm::new(7, 1e-5).unwrap()),
        Operation::Scale(param(&[5], 0.1)),
        Operation::Pick(vec![4]),
        Operation::Pick(Vec::new()),
    ] {
        let error = |refused: Result<_, ModelError>| match refused {
            Err(error) => error.to_string(),
            Ok(()) => "nothing was refused".into(),
        };
        let host = error(run(&mut Host(NoneTape), &table, &operation).map(|_| ()));
        let there = error(run(&mut Cuda::evaluating(&device), &table, &operation).map(|_| ()));
        assert_eq!(there, host);
        assert_ne!(host, "nothing was refused");
    }
}

#[test]
fn many_threads_that_read_values_copy_them_from_the_device_once() {
    let Some(device) = device() else { return };
    let Some(control) = std::env::var_os("EMU_CONTROL") else {
        return;
    };
    // The number of copies from the device: see mass-cuda's `emu/README.md`.
    let copies = || {
        let mut word = [0; 8];
        let control = File::open(&control).unwrap();
        control.read_exact_at(&mut word, 8 * 8).unwrap();
        u64::from_ne_bytes(word)
    };
    // Large enough that all have asked before the first copy is made.
    let buffer = Buffer::zeros(&device, 1 << 22).unwrap();
    let (values, start, before) = (
        Mirror::of_buffer(Arc::new(buffer)),
        Barrier::new(8),
        copies(),
    );
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                start.wait();
                assert_eq!(values.try_values().unwrap().len(), 1 << 22);
            });
        }
    });
    assert_eq!(copies() - before, 1);
}

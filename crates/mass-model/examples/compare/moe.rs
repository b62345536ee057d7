//! The mixture layer, forward and backward, against PyTorch and against the matrix products it is made of.

use std::error::Error;
use std::hint::black_box;

use dfdx::prelude::*;
use mass_model::nn::{MoeConfig, MoeLayer};
use mass_model::ops::Rows;
use mass_model::{Activation, CpuGradients, Parameters, seeded_rng};
use mass_routing::{Combine, RouterConfig};

use crate::ceiling::Ceilings;
use crate::peer::Peer;
use crate::timing::take_turns;

/// One layer: tokens, width, hidden width, experts, router.
pub(crate) struct Shape {
    pub(crate) tokens: usize,
    pub(crate) dim: usize,
    pub(crate) hidden: usize,
    pub(crate) experts: usize,
    pub(crate) router: RouterConfig,
}

const ROUNDS: usize = 21;

pub(crate) fn shapes() -> [Shape; 3] {
    let top_k = RouterConfig::TopK {
        k: 2,
        combine: Combine::Renormalised,
    };
    let shape = |tokens, dim, hidden, experts, router| Shape {
        tokens,
        dim,
        hidden,
        experts,
        router,
    };
    let top_p = RouterConfig::TopP {
        p: 0.32,
        combine: Combine::Renormalised,
    };
    [
        shape(4096, 256, 512, 16, top_p),
        shape(4096, 384, 1536, 8, top_k.clone()),
        shape(2048, 1024, 4096, 8, top_k),
    ]
}

/// Normal values, made by dfdx's generator.
fn normal(n: usize) -> Vec<f32> {
    Cpu::default().sample_normal_like(&(n, 1)).as_vec()
}

/// Gradients for an upstream gradient that is the same everywhere: what a loss would hand down, without its cost.
fn backward(y: Rows<OwnedTape<f32, Cpu>>, upstream: f32) -> CpuGradients {
    let (y, mut tape) = y.split_tape();
    let loss: Tensor<Rank0, f32, Cpu> = y.device().tensor(0.0);
    let ghost = y.ghost();
    tape.add_backward_op(move |g| {
        g.get_or_alloc_mut(&ghost)?.fill(upstream);
        Ok(())
    });
    loss.put_tape(tape).backward()
}

/// One forward and backward pass on request.
pub(crate) fn step(layer: &MoeLayer, x: &[f32], tokens: usize) -> f64 {
    let dim = layer.config().dim;
    let x = Cpu::default().tensor_from_vec(x.to_vec(), (tokens, dim));
    let routed = layer
        .forward_routed(x.leaky_traced(), None)
        .expect("valid input");
    let active = routed.plan.mean_k();
    let mut gradients = backward(routed.output, 1.0 / (tokens * dim) as f32);
    layer.visit("", &mut |_, p| {
        black_box(p.gradient(&mut gradients).expect("a gradient"));
        p.clear_gradient(&mut gradients).expect("a gradient");
    });
    active
}

pub(crate) fn run(mut peer: Option<Peer>, only: Option<usize>) -> Result<(), Box<dyn Error>> {
    println!(
        "Sparse mixture layer, forward and backward; useful GFLOP/s = 12 x assignments x d x hidden / time.\n"
    );
    println!(
        "| tokens, d x hidden, experts | activation | active | FMA ceiling GFLOP/s | matrix ceiling GFLOP/s | ms | GFLOP/s | of the FMA ceiling | of the matrix ceiling | PyTorch ms | best PyTorch / this crate |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|");
    for (number, shape) in (1..).zip(shapes()) {
        if only.is_some_and(|only| only != number) {
            continue;
        }
        for (name, activation) in [
            ("relu", Activation::Relu),
            ("gelu_erf", Activation::GeluErf),
        ] {
            let Shape {
                tokens,
                dim,
                hidden,
                experts,
                ref router,
            } = shape;
            let config = MoeConfig::new(dim, hidden, experts, activation, router.clone());
            let layer = MoeLayer::new(&config, &mut seeded_rng(0))?;
            let x = normal(tokens * dim);
            let mut active = 0.0;
            if let Some(peer) = &mut peer {
                let folder = std::env::temp_dir().join(format!("compare-{}", std::process::id()));
                std::fs::create_dir_all(&folder)?;
                let gate = layer.experts().iter().flat_map(|e| e.gate.values());
                let bytes = |v: &mut dyn Iterator<Item = &f32>| -> Vec<u8> {
                    v.flat_map(|x| x.to_le_bytes()).collect()
                };
                let (x_path, gate_path) = (folder.join("x"), folder.join("gate"));
                std::fs::write(&x_path, bytes(&mut x.iter()))?;
                std::fs::write(&gate_path, bytes(&mut { gate }))?;
                let (k, p) = match *router {
                    RouterConfig::TopK { k, .. } => (k, 0.0),
                    RouterConfig::TopP { p, .. } => (0, p),
                    _ => unreachable!("only these are measured"),
                };
                let (x_path, gate_path) = (x_path.display(), gate_path.display());
                peer.build(&format!(
                    "moe {x_path} {gate_path} {tokens} {dim} {hidden} {experts} {name} {k} {p}"
                ))?;
                std::fs::remove_dir_all(&folder)?;
            }
            let per_token = match *router {
                RouterConfig::TopK { k, .. } => k,
                _ => 3,
            };
            let rows = tokens * per_token / experts;
            let before = Ceilings::measure(rows, dim, hidden, experts);
            let turns = take_turns(peer.as_mut(), ROUNDS, || active = step(&layer, &x, tokens))?;
            let top = before.max(Ceilings::measure(rows, dim, hidden, experts));
            let flops = 12.0 * tokens as f64 * active * (dim * hidden) as f64;
            let ours = turns.ours();
            let rate = flops / ours.median() / 1e9;
            let theirs = peer
                .as_ref()
                .map_or(String::new(), |p| format!(" (PyTorch {:.2})", p.active));
            println!(
                "| {tokens}, {dim} x {hidden}, {experts} | {name} | {active:.2}{theirs} | {:.0} | {:.0} | {} | {rate:.0} | {:.0} % | {:.0} % | {} | {} |",
                top.multiply_adds,
                top.products,
                ours.show(1e3, 1),
                100.0 * rate / top.multiply_adds,
                100.0 * rate / top.products,
                turns.show_theirs(),
                turns.show_ratio(),
            );
        }
    }
    Ok(())
}

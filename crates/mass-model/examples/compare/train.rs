//! A training step: loss, gradients, AdamW.

use std::error::Error;

use dfdx::prelude::{Cpu, SampleTensor};
use mass_model::lm::{LanguageModel, LanguageModelConfig};
use mass_model::nn::{BlockConfig, MoeConfig};
use mass_model::optim::{AdamW, AdamWConfig};
use mass_model::{Activation, seeded_rng};
use mass_routing::{Combine, RouterConfig};

use crate::peer::Peer;
use crate::timing::take_turns;

const ROUNDS: usize = 21;

/// `n` token ids below `vocab`, evenly drawn.
fn tokens(n: usize, vocab: usize) -> Vec<u32> {
    let uniform = Cpu::default().sample_uniform_like(&(n, 1)).as_vec();
    let id = |u: f32| ((u * vocab as f32) as u32).min(vocab as u32 - 1);
    uniform.into_iter().map(id).collect()
}

/// The one-layer transformer: a step of it on request.
pub(crate) fn transformer() -> Result<(String, impl FnMut()), Box<dyn Error>> {
    let (vocab, dim, heads, seq, batch, experts, hidden, k) = (64, 128, 4, 64, 32, 12, 256, 2);
    let router = RouterConfig::TopK {
        k,
        combine: Combine::Renormalised,
    };
    let config = LanguageModelConfig {
        vocab,
        max_seq: seq,
        layers: 1,
        embedding_std: 1.0,
        block: BlockConfig {
            heads,
            layer_norm_eps: 1e-5,
            moe: MoeConfig::new(dim, hidden, experts, Activation::GeluErf, router),
        },
    };
    let mut model = LanguageModel::new(&config, &mut seeded_rng(0))?;
    let mut optimizer = AdamW::new(AdamWConfig::default())?;
    let (inputs, targets) = (tokens(batch * seq, vocab), tokens(batch * seq, vocab));
    let step = move || {
        let mut pass = model
            .train_pass(&inputs, &targets, seq)
            .expect("valid input");
        optimizer
            .step(&mut model, &mut pass.gradients, 1e-4)
            .expect("finite gradients");
    };
    let task = format!("step {vocab} {dim} {heads} {seq} {batch} {experts} {hidden} {k}");
    Ok((task, step))
}

pub(crate) fn run(
    name: &str,
    peer: Option<Peer>,
    (task, step): (String, impl FnMut()),
) -> Result<(), Box<dyn Error>> {
    let mut peer = peer;
    if let Some(peer) = &mut peer {
        peer.build(&task)?;
    }
    let turns = take_turns(peer.as_mut(), ROUNDS, step)?;
    println!("| training step | ms | PyTorch ms | PyTorch / this crate |\n|---|---|---|---|");
    println!(
        "| {name} | {} | {} | {} |",
        turns.ours().show(1e3, 1),
        turns.theirs().map_or("-".into(), |q| q.show(1e3, 1)),
        turns.ratio().map_or("-".into(), |q| q.show(1.0, 2)),
    );
    Ok(())
}

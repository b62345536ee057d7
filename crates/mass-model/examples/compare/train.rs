//! A training step: loss, gradients, AdamW.

use std::error::Error;

use dfdx::prelude::{Cpu, SampleTensor};
use mass_model::bert::{BertClassifier, BertConfig, Targets, TextBatch};
use mass_model::lm::{LanguageModel, LanguageModelConfig};
use mass_model::nn::{BlockConfig, MoeConfig};
use mass_model::optim::{AdamW, AdamWConfig};
use mass_model::{Activation, DropoutKeys, seeded_rng};
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

/// Vocabulary, width, heads, sequence, batch, experts, hidden width, experts a token.
const TRANSFORMER: [usize; 8] = [64, 128, 4, 64, 32, 12, 256, 2];

/// Model, inputs, targets, length of a sequence.
type Transformer = (LanguageModel, Vec<u32>, Vec<u32>, usize);

/// The one-layer transformer with a batch.
pub(crate) fn transformer_parts() -> Result<Transformer, Box<dyn Error>> {
    let [vocab, dim, heads, seq, batch, experts, hidden, k] = TRANSFORMER;
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
    let model = LanguageModel::new(&config, &mut seeded_rng(0))?;
    let (inputs, targets) = (tokens(batch * seq, vocab), tokens(batch * seq, vocab));
    Ok((model, inputs, targets, seq))
}

/// A step of the one-layer transformer on request.
pub(crate) fn transformer() -> Result<(String, impl FnMut()), Box<dyn Error>> {
    let (mut model, inputs, targets, seq) = transformer_parts()?;
    let mut optimizer = AdamW::new(AdamWConfig::default())?;
    let step = move || {
        let mut pass = model
            .train_pass(&inputs, &targets, seq)
            .expect("valid input");
        optimizer
            .step(&mut model, &mut pass.gradients, 1e-4)
            .expect("finite gradients");
    };
    let sizes = TRANSFORMER.map(|n| n.to_string()).join(" ");
    Ok((format!("step {sizes}"), step))
}

/// A BERT of the size of MiniLM-L6, every parameter trained, dropout 0.1: a step of it on request.
pub(crate) fn bert() -> Result<(String, impl FnMut()), Box<dyn Error>> {
    let (batch, seq) = (32, 64);
    let config = BertConfig {
        hidden_size: 384,
        num_hidden_layers: 6,
        intermediate_size: 1536,
        ..BertConfig::default()
    };
    let mut model = BertClassifier::new(&config, 2, &mut seeded_rng(0))?;
    let mut optimizer = AdamW::new(AdamWConfig::default())?;
    let ids = tokens(batch * seq, config.vocab_size);
    let types = vec![0; ids.len()];
    let text = TextBatch::packed(ids, types, (0..=batch).map(|i| i * seq).collect());
    let classes = tokens(batch, 2);
    let task = format!(
        "bert {} {} {} {} {} {batch} {seq}",
        config.vocab_size,
        config.hidden_size,
        config.num_attention_heads,
        config.num_hidden_layers,
        config.intermediate_size
    );
    let mut made = 0;
    let step = move || {
        let mut keys = DropoutKeys::new(0, made);
        made += 1;
        let mut pass = model
            .train_pass(&text, Targets::Classes(&classes), Some(&mut keys))
            .expect("valid input");
        optimizer
            .step(&mut model, &mut pass.gradients, 1e-4)
            .expect("finite gradients");
    };
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

//! A training step: loss, gradients, AdamW.

use std::error::Error;

use dfdx::prelude::{Cpu, SampleTensor};
use mass_model::bert::{BertClassifier, BertConfig, Targets, TextBatch};
use mass_model::lm::{LanguageModel, LanguageModelConfig};
use mass_model::nn::{BlockConfig, MoeConfig};
use mass_model::optim::{AdamW, AdamWConfig};
use mass_model::vit::{ImageBatch, VitClassifier, VitConfig};
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
fn transformer_parts() -> Result<Transformer, Box<dyn Error>> {
    let [.., experts, hidden, _] = TRANSFORMER;
    transformer_of(experts, hidden)
}

/// The same with another pool.
pub(crate) fn transformer_of(experts: usize, hidden: usize) -> Result<Transformer, Box<dyn Error>> {
    let [vocab, dim, heads, seq, batch, _, _, k] = TRANSFORMER;
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

/// Blocks of the vision transformer, and how many of them are frozen.
const BLOCKS: [usize; 2] = [12, 8];

/// A ViT-S/14 for images of 98 pixels with drawn weights, and features of `batch` images: 50 tokens each.
fn vit_parts(batch: usize) -> Result<(VitClassifier, Vec<f32>), Box<dyn Error>> {
    let config = VitConfig {
        image_size: 98,
        patch_size: 14,
        num_hidden_layers: BLOCKS[0],
        layer_scale: Some(1.0),
        ..VitConfig::deit_small()
    };
    let model = VitClassifier::new(&config, 7, &mut seeded_rng(0))?;
    let pixels: Vec<f32> = Cpu::default()
        .sample_normal_like(&(batch, 3 * 98 * 98))
        .as_vec();
    Ok((model, pixels))
}

/// What the other side needs to build the same: task, width, heads, hidden width, blocks, batch, tokens.
fn vit_task(
    name: &str,
    model: &VitClassifier,
    blocks: usize,
    batch: usize,
) -> Result<String, Box<dyn Error>> {
    let c = model.config();
    let (d, heads, hidden) = (c.hidden_size, c.num_attention_heads, c.intermediate_size);
    let tokens = model.tokens((98, 98))?;
    Ok(format!(
        "{name} {d} {heads} {hidden} {blocks} {batch} {tokens}"
    ))
}

/// A training step of the last four blocks of a ViT-S, norm and head, from features of the frozen ones, on request.
pub(crate) fn vit() -> Result<(String, impl FnMut()), Box<dyn Error>> {
    let batch = 48;
    let (mut model, pixels) = vit_parts(batch)?;
    let rows = model.features(&pixels, (98, 98), BLOCKS[1])?;
    let (classes, per_image) = (tokens(batch, 7), model.tokens((98, 98))?);
    let mut optimizer = AdamW::new(AdamWConfig::default())?;
    let task = vit_task("vit", &model, BLOCKS[0] - BLOCKS[1], batch)?;
    let step = move || {
        let features = ImageBatch::Features {
            rows: &rows,
            tokens: per_image,
            blocks: BLOCKS[1],
        };
        let mut pass = model
            .train_pass(features, &classes, None)
            .expect("valid input");
        let mut trainable = model.trainable(BLOCKS[1]).expect("there are more blocks");
        optimizer
            .step(&mut trainable, &mut pass.gradients, 3e-5)
            .expect("finite gradients");
    };
    Ok((task, step))
}

/// The frozen blocks on 32 images, on request.
pub(crate) fn trunk() -> Result<(String, impl FnMut()), Box<dyn Error>> {
    let batch = 32;
    let (model, pixels) = vit_parts(batch)?;
    let task = vit_task("trunk", &model, BLOCKS[1], batch)?;
    let forward = move || {
        let rows = model.features(&pixels, (98, 98), BLOCKS[1]);
        assert!(rows.expect("valid input").len() == batch * 50 * 384);
    };
    Ok((task, forward))
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
    println!("| training step | ms | PyTorch ms | best PyTorch / this crate |\n|---|---|---|---|");
    println!(
        "| {name} | {} | {} | {} |",
        turns.ours().show(1e3, 1),
        turns.show_theirs(),
        turns.show_ratio(),
    );
    Ok(())
}

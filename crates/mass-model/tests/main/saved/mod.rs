//! A small model that has made a step, and its checkpoint.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test file uses a part of it"
)]

pub mod damage;

use std::path::{Path, PathBuf};

use mass_model::checkpoint::{self, Snapshot};
use mass_model::lm::{LanguageModel, LanguageModelConfig};
use mass_model::optim::{AdamW, AdamWConfig, Ema};
use mass_model::seeded_rng;
use serde_json::json;

pub const SEQ: usize = 4;

pub fn config(experts: usize) -> LanguageModelConfig {
    // Every token reaches every expert: what a copy that shares its source's mass leaves as it was.
    let router = json!({ "router": "top_p", "p": 1.0, "combine": "raw" });
    let moe = json!({
        "dim": 6, "hidden": 5, "experts": experts, "activation": "gelu_erf", "router": router,
    });
    let config = json!({
        "vocab": 7, "max_seq": SEQ, "layers": 2, "embedding_std": 0.5,
        "block": { "heads": 2, "layer_norm_eps": 1e-5, "moe": moe },
    });
    serde_json::from_value(config).unwrap()
}

pub fn batch() -> (Vec<u32>, Vec<u32>) {
    let token = |i: u32| (i * i + 3 * i) % 7;
    ((0..16).map(token).collect(), (1..=16).map(token).collect())
}

/// A model that has made a step, with its optimiser and averages.
pub fn trained(experts: usize) -> (LanguageModel, AdamW, Ema) {
    let mut model = LanguageModel::new(&config(experts), &mut seeded_rng(5)).unwrap();
    let mut optimizer = AdamW::new(AdamWConfig::default().decaying_everything()).unwrap();
    let mut ema = Ema::new(0.9).unwrap();
    ema.update(&model).unwrap();
    let (tokens, targets) = batch();
    let mut pass = model.train_pass(&tokens, &targets, SEQ).unwrap();
    optimizer
        .step(&mut model, &mut pass.gradients, 1e-2)
        .unwrap();
    ema.update(&model).unwrap();
    (model, optimizer, ema)
}

pub fn snapshot<'a>(
    (model, optimizer, ema): &'a (LanguageModel, AdamW, Ema),
) -> Snapshot<'a, LanguageModel, str> {
    Snapshot {
        step: 1,
        model,
        optimizer,
        ema: Some(ema),
        state: "the caller's",
    }
}

pub fn saved(dir: &Path, experts: usize) -> PathBuf {
    checkpoint::save(dir, &snapshot(&trained(experts))).unwrap()
}

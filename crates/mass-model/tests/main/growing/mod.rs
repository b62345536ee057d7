//! A small model whose pool grows while it trains.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test file uses a part of it"
)]

use std::collections::BTreeMap;

use mass_expand::{ControllerParams, EventKind, Trigger};
use mass_model::growth::{GradientNorm, Grower, GrowerConfig, LossOn};
use mass_model::lm::{LanguageModel, LanguageModelConfig};
use mass_model::nn::{BlockConfig, MoeConfig};
use mass_model::optim::AdamW;
use mass_model::{Activation, Parameters, seeded_rng};
use mass_routing::RouterConfig;

pub const SEQ: usize = 8;

pub fn config(router: RouterConfig) -> LanguageModelConfig {
    let moe = MoeConfig::new(12, 10, 3, Activation::GeluErf, router);
    let block = BlockConfig {
        heads: 2,
        layer_norm_eps: 1e-5,
        moe,
    };
    LanguageModelConfig {
        vocab: 11,
        max_seq: SEQ,
        layers: 2,
        embedding_std: 0.02,
        block,
    }
}

pub fn model(router: RouterConfig) -> LanguageModel {
    LanguageModel::new(&config(router), &mut seeded_rng(5)).unwrap()
}

/// The batch of a step: a pure function of it.
pub fn batch(step: u64) -> (Vec<u32>, Vec<u32>) {
    let token = |i: u64| ((i * i + 3 * i * step + step) % 11) as u32;
    let tokens = (0..4 * SEQ as u64).map(token).collect();
    (tokens, (1..=4 * SEQ as u64).map(token).collect())
}

pub fn grower() -> Grower {
    let mut controller = ControllerParams::paper(2, 3, 6, 40);
    controller.trigger = Trigger::Schedule {
        first: 4,
        every: 5,
        splits: 1,
    };
    controller.choice = mass_expand::Choice::MostLoaded;
    controller.phase.live_from = 0;
    controller.phase.live_until = 30;
    Grower::new(GrowerConfig {
        controller,
        gradient_norm: GradientNorm::AllParameters,
        redundancy_weight: 0.01,
        redundancy_reduction: mass_expand::Reduction::Mean,
    })
    .unwrap()
}

/// Makes training steps; `data` says which batch a step sees.
pub fn advance(
    model: &mut LanguageModel,
    optimizer: &mut AdamW,
    grower: &mut Grower,
    steps: std::ops::Range<u64>,
    data: &dyn Fn(u64) -> u64,
) -> Vec<EventKind> {
    let mut events = Vec::new();
    for step in steps {
        let (tokens, targets) = batch(data(step));
        let mut pass = model.train_pass(&tokens, &targets, SEQ).unwrap();
        let made = grower
            .step(step, model, optimizer, &mut pass, |_, on, masked| {
                assert_eq!(on, LossOn::Batch);
                Ok(vec![if masked.is_some() { 1.0 } else { 0.5 }])
            })
            .unwrap();
        events.extend(made.into_iter().map(|e| e.kind));
        optimizer.step(model, &mut pass.gradients, 5e-3).unwrap();
    }
    events
}

pub fn all_values(model: &LanguageModel) -> BTreeMap<String, Vec<u32>> {
    let mut values = BTreeMap::new();
    model.visit("", &mut |name, p| {
        values.insert(name, p.values().iter().map(|x| x.to_bits()).collect());
    });
    values
}

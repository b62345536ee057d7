//! Watches a pool of experts grow while a small language model learns a made-up language.
//!
//!     cargo run --release -p mass-model --example grow
//!     cargo run --release -p mass-model --features cuda --example grow -- --device cuda
//!
//! Two grammars take turns; half way through training the second one appears. The pool starts with three experts and
//! splits the busiest one on a schedule, so that every part can be seen at work; see `ControllerParams` for triggers
//! that decide by themselves.

use mass_expand::{Choice, ControllerParams, EventKind};
use mass_model::growth::{Grower, GrowerConfig, LossOn, Mixtures};
use mass_model::lm::{LanguageModel, LanguageModelConfig};
use mass_model::nn::{BlockConfig, MoeConfig};
use mass_model::optim::{AdamW, AdamWConfig, Decay, Schedule};
use mass_model::{Activation, ModelError, Place, seeded_rng};
use mass_routing::{Combine, RouterConfig};
use rand_chacha::rand_core::RngCore;

const SEQ: usize = 32;
const STEPS: u64 = 600;

fn main() -> Result<(), ModelError> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let place = match &arguments[..] {
        [] => Place::Cpu,
        [flag, name] if flag == "--device" => Place::open(name)?,
        _ => return Err(ModelError::Config("usage: [--device DEVICE]".into())),
    };
    println!("on {place}");
    let router = RouterConfig::TopP {
        p: 0.5,
        combine: Combine::Renormalised,
    };
    let moe = MoeConfig::new(32, 64, 3, Activation::GeluErf, router);
    let block = BlockConfig {
        heads: 4,
        layer_norm_eps: 1e-5,
        moe,
    };
    let config = LanguageModelConfig {
        vocab: 24,
        max_seq: SEQ,
        layers: 1,
        embedding_std: 0.02,
        block,
    };
    let mut model = LanguageModel::new(&config, &mut seeded_rng(0))?;
    let mut optimizer = AdamW::new(AdamWConfig::default())?;
    let schedule = Schedule {
        peak: 5e-3,
        warmup: 20,
        steps: STEPS,
        floor: 0.1,
        decay: Decay::Linear,
    };

    let mut controller = ControllerParams::calibrated(1, 3, 8, STEPS).with_schedule(100, 100);
    controller.choice = Choice::MostLoaded;
    controller.phase.live_until = STEPS;
    let mut grower = Grower::new(GrowerConfig::new(controller))?;

    let (miss, others) = (1.0 / 8.0 / 24.0, 23.0);
    let hit: f64 = 1.0 - others * miss;
    let least = -hit * hit.ln() - others * miss * f64::ln(miss);
    println!("random tokens alone cost {least:.3} nats; no model has a smaller loss");
    let (probe, probe_targets) = batch(u64::MAX, STEPS);
    for step in 0..STEPS {
        if step == STEPS / 2 {
            println!("step {step}: half of the sequences are of the second grammar from here on");
        }
        let (tokens, targets) = batch(step, step);
        let mut pass = model.train_pass_at(&place, &tokens, &targets, SEQ)?;
        let events = grower.step(
            step,
            &mut model,
            &mut optimizer,
            &mut pass,
            |model, on, masked| {
                // The stop rule asks what the newest expert is worth on sequences that are not trained on.
                let (tokens, targets) = match on {
                    LossOn::Batch => (&tokens, &targets),
                    LossOn::Probe => (&probe, &probe_targets),
                };
                let (nll, _) = model.score_at(&place, tokens, targets, SEQ, masked)?;
                let sequences = nll.chunks(SEQ);
                Ok(sequences
                    .map(|s| f64::from(s.iter().sum::<f32>()) / SEQ as f64)
                    .collect())
            },
        )?;
        optimizer.step(&mut model, &mut pass.gradients, schedule.at(step))?;
        for event in &events {
            match event.kind {
                EventKind::Split {
                    source,
                    new,
                    experts,
                    ..
                } => {
                    println!(
                        "step {step:3}: expert {} split, {} is new, {experts} in the pool",
                        source.0, new.0
                    );
                }
                EventKind::Remove {
                    expert, experts, ..
                } => {
                    println!(
                        "step {step:3}: expert {} removed, {experts} in the pool",
                        expert.0
                    );
                }
                EventKind::Stop { reason } => println!("step {step:3}: no more splits: {reason:?}"),
                _ => {}
            }
        }
        if step % 100 == 99 {
            // On sequences of what has been seen so far, none of which is trained on.
            let (tokens, targets) = batch(u64::MAX, step);
            let (nll, layers) = model.score_at(&place, &tokens, &targets, SEQ, None)?;
            let (loss, k) = (
                nll.iter().sum::<f32>() / nll.len() as f32,
                layers[0].plan.mean_k(),
            );
            println!("step {step:3}: held-out loss {loss:.3}, {k:.2} experts a token");
        }
    }
    println!("experts at the end: {:?}", model.mixture(0).ids());
    Ok(())
}

/// Sequences of a step and the tokens that follow: steps of 5 (mod 24), and from half way on also steps of 7, each with a
/// random token now and then.
fn batch(seed: u64, step: u64) -> (Vec<u32>, Vec<u32>) {
    let mut rng = seeded_rng(seed);
    let (mut tokens, mut targets) = (Vec::new(), Vec::new());
    for _ in 0..16 {
        let second = step >= STEPS / 2 && rng.next_u32().is_multiple_of(2);
        let stride = if second { 7 } else { 5 };
        let mut token = rng.next_u32() % 24;
        for _ in 0..SEQ {
            tokens.push(token);
            token = if rng.next_u32().is_multiple_of(8) {
                rng.next_u32() % 24
            } else {
                (token + stride) % 24
            };
            targets.push(token);
        }
    }
    (tokens, targets)
}

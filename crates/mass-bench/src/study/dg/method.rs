//! The methods that are compared, and the model each begins with.

use mass_cpd::AnyDetectorParams;
use mass_expand::{AlignmentThreshold, StopRule};
use mass_model::ModelError;
use mass_model::growth::GrowerConfig;
use mass_model::nn::{GateConfig, MoeConfig};
use mass_model::ops::RoutingLoss;
use mass_model::vit::VitClassifier;
use mass_routing::{Combine, RouterConfig};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::cli::Variant;
use crate::study::mass::MassSetting;
use crate::variants;

/// The blocks that GMoE replaces, of the 12 of DeiT-S, counted from zero as in its released code.
const AUTHORS_BLOCKS: [usize; 2] = [8, 10];
const AUTHORS_DEPTH: usize = 12;

/// How the feed-forward networks of some blocks are replaced.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "method", deny_unknown_fields)]
pub(super) enum Method {
    /// Not at all: empirical risk minimisation.
    Erm,
    /// By GMoE's pools: one expert a token behind a cosine gate with noise, and 0.01 times the mean of importance and load
    /// loss. The load loss compares logits with noisy logits; Tutel, which GMoE uses, compares probabilities with noisy logits.
    Gmoe { experts: usize },
    /// By DynMoE's pools.
    #[serde(rename = "dynmoe")]
    DynMoe { experts: usize, experts_max: usize },
    /// By pools that MASS grows.
    Mass(MassSetting),
}

/// MASS's rules for a run of so many steps in `layers` mixtures, with the paper's settings for vision:
/// `T_warm = max(100, 5 %)`, `w = max(200, 9 %)`, threshold `delta`.
///
/// Warm-up and window of a run of a few hundred steps would outlast it: there they are at most a tenth and a fifth of it.
pub(super) fn growth(
    setting: &MassSetting,
    layers: usize,
    steps: u64,
    delta: f64,
    seed: u64,
) -> GrowerConfig {
    let mut config = setting.rules(layers, steps, seed);
    let controller = &mut config.controller;
    controller.alignment = AlignmentThreshold::Absolute(delta);
    if let StopRule::Patience {
        checks_after_expansions,
        ..
    } = &mut controller.stop
    {
        *checks_after_expansions = 0;
    }
    if let Some(AnyDetectorParams::WindowedZ(z)) = &mut controller.watch.expert {
        let part = |percent: u64, at_least: u64, share: u64| {
            let wanted = (steps * percent / 100).max(at_least);
            wanted.min(steps / share).max(10) as usize
        };
        (z.warmup, z.window) = (part(5, 100, 10), part(9, 200, 5));
    }
    setting.fit(&mut config, steps);
    config
}

impl Method {
    /// Rules of the mixtures of a model with these sizes; `None` for the dense one.
    pub(super) fn mixture(&self, model: &VitClassifier, seed: u64) -> Option<MoeConfig> {
        let c = model.config();
        let moe = |experts, router| {
            let (d, hidden) = (c.hidden_size, c.intermediate_size);
            MoeConfig::new(d, hidden, experts, c.hidden_act, router)
        };
        match *self {
            Self::Erm => None,
            Self::Gmoe { experts } => {
                let top_1 = RouterConfig::TopK {
                    k: 1,
                    combine: Combine::Raw,
                };
                let noisy = RouterConfig::Noisy {
                    std: 1.0 / experts as f32,
                    seed,
                    inner: Box::new(top_1),
                };
                Some(MoeConfig {
                    gate: GateConfig::Cosine {
                        projection: Some(256),
                        temperature: Some(0.5),
                    },
                    losses: vec![
                        RoutingLoss::Importance { weight: 0.005 },
                        RoutingLoss::Load { weight: 0.005 },
                    ],
                    ..moe(experts, noisy)
                })
            }
            Self::DynMoe { experts, .. } => {
                let router = RouterConfig::TopAny { experts };
                Some(MoeConfig {
                    gate: variants::gate(&router),
                    ..moe(experts, router)
                })
            }
            Self::Mass(ref m) => {
                let router = m.router();
                Some(MoeConfig {
                    gate: variants::gate(&router),
                    ..moe(m.experts, router)
                })
            }
        }
    }

    /// Makes the blocks that GMoE chose, at the same part of the depth, mixtures whose experts are copies of their networks.
    pub(super) fn convert(
        &self,
        model: &mut VitClassifier,
        seed: u64,
        rng: &mut ChaCha8Rng,
    ) -> Result<(), ModelError> {
        for block in mixture_blocks(model.config().num_hidden_layers) {
            // Each layer draws noise of its own.
            let seed = seed.wrapping_mul(1000).wrapping_add(block as u64);
            if let Some(config) = self.mixture(model, seed) {
                model.convert_to(block, &config, rng)?;
            }
        }
        Ok(())
    }

    /// The first block that becomes a mixture in a model of `depth` blocks; `None` for the dense model.
    pub(super) fn first_mixture(&self, depth: usize) -> Option<usize> {
        let blocks = mixture_blocks(depth);
        blocks.first().copied().filter(|_| *self != Self::Erm)
    }

    /// Whether it needs images that it is not trained on, to judge newcomers by.
    pub(super) fn needs_probe(&self) -> bool {
        matches!(self, Self::Mass(m) if m.variant == Variant::Ours)
    }
}

/// The blocks that become mixtures in a model of `depth` blocks.
pub(super) fn mixture_blocks(depth: usize) -> Vec<usize> {
    let mut blocks = AUTHORS_BLOCKS.map(|b| b * depth / AUTHORS_DEPTH).to_vec();
    blocks.dedup();
    blocks
}

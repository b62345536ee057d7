//! The methods that are compared, and the model each begins with.

use mass_cpd::{AnyDetectorParams, Reference};
use mass_expand::{AlignmentThreshold, StopRule, Trigger};
use mass_model::ModelError;
use mass_model::growth::GrowerConfig;
use mass_model::nn::{GateConfig, MoeConfig};
use mass_model::ops::RoutingLoss;
use mass_model::vit::VitClassifier;
use mass_routing::{Combine, RouterConfig};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::cli::Variant;
use crate::variants;

/// The blocks that GMoE replaces, of the 12 of DeiT-S, counted from zero as in its released code.
const AUTHORS_BLOCKS: [usize; 2] = [8, 10];
const AUTHORS_DEPTH: usize = 12;

/// How the feed-forward networks of some blocks are replaced.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "method")]
pub(super) enum Method {
    /// Not at all: empirical risk minimisation.
    Erm,
    /// By GMoE's pools: one expert a token behind a cosine gate with noise, and 0.01 times the mean of importance and load
    /// loss: the importance of the probabilities under noise, the load of the logits. Tutel, which GMoE uses, takes
    /// probabilities without noise for both, and compares them with noisy logits.
    Gmoe { experts: usize },
    /// By DynMoE's pools.
    #[serde(rename = "dynmoe")]
    DynMoe { experts: usize, experts_max: usize },
    /// By pools that MASS grows.
    Mass(MassSetting),
}

/// One way to run MASS.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct MassSetting {
    pub(super) variant: Variant,
    pub(super) p: f32,
    /// Part of the run in which splits may happen, in percent; `None` for the variant's own.
    pub(super) live_percent: Option<u64>,
    pub(super) experts: usize,
    pub(super) experts_max: usize,
    /// Thresholds that a run too short to learn anything still passes: a check that splits are wired up.
    pub(super) loose: bool,
}

impl MassSetting {
    pub(super) fn name(&self) -> String {
        match self.live_percent {
            Some(percent) => format!("p {}, live {percent} %", self.p),
            None => format!("p {}, own timing", self.p),
        }
    }

    /// The rules for a run of so many steps in `layers` mixtures, with the paper's settings for vision: `T_warm = max(100, 5 %)`,
    /// `w = max(200, 9 %)`, threshold `delta`.
    ///
    /// Warm-up and window of a run of a few hundred steps would outlast it: there they are at most a tenth and a fifth of it.
    pub(super) fn growth(&self, layers: usize, steps: u64, delta: f64, seed: u64) -> GrowerConfig {
        let mut config =
            variants::growth(self.variant, layers, self.experts, self.experts_max, steps);
        let controller = &mut config.controller;
        controller.seed = seed;
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
        if let Some(percent) = self.live_percent {
            variants::live_for(&mut config, steps, percent);
        }
        let watch = &mut config.controller.watch;
        for detector in [&mut watch.expert, &mut watch.layer, &mut watch.loss] {
            if let Some(AnyDetectorParams::CalibratedCusum(cusum)) = detector {
                cusum.horizon = config.controller.phase.live_until;
                // Estimated on fewer than 64 steps a level is no longer what it says.
                if let Reference::Lagged { window, gap } = &mut cusum.reference {
                    *window = (*window).min((steps / 10) as usize).max(64);
                    *gap = (*gap).min(*window / 8);
                    cusum.warmup = cusum.warmup.min(*window);
                }
            }
        }
        if self.loose {
            self.loosen(&mut config, steps);
        }
        config
    }

    fn loosen(&self, config: &mut GrowerConfig, steps: u64) {
        let controller = &mut config.controller;
        controller.alignment = AlignmentThreshold::Absolute(1.0);
        if let Some(AnyDetectorParams::WindowedZ(z)) = &mut controller.watch.expert {
            (z.alpha, z.warmup, z.window) = (0.5, 10, 10);
        }
        if self.variant == Variant::Ours {
            let every = (steps / 5).max(1);
            controller.trigger = Trigger::Schedule {
                first: every,
                every,
            };
            if let StopRule::HeldOut { wait, .. } = &mut controller.stop {
                *wait = 3;
            }
        }
    }
}

impl Method {
    /// Rules of the mixtures of a model with these sizes; `None` for the dense one.
    fn mixture(&self, model: &VitClassifier, seed: u64) -> Option<MoeConfig> {
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
            Self::DynMoe { experts, .. } => Some(MoeConfig {
                gate: GateConfig::Cosine {
                    projection: None,
                    temperature: None,
                },
                ..moe(experts, RouterConfig::TopAny { experts })
            }),
            Self::Mass(ref m) => {
                let combine = variants::combine(m.variant);
                Some(moe(m.experts, RouterConfig::TopP { p: m.p, combine }))
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

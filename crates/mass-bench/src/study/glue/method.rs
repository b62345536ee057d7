//! The methods that are compared, and the model each begins with.

use std::path::PathBuf;

use mass_cpd::{AnyDetectorParams, Reference};
use mass_expand::{AlignmentThreshold, StopRule, Trigger};
use mass_model::ModelError;
use mass_model::bert::{BertClassifier, BertConfig};
use mass_model::growth::GrowerConfig;
use mass_model::nn::{GateConfig, MoeConfig};
use mass_routing::{Combine, RouterConfig};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::cli::Variant;
use crate::glue::task::Task;
use crate::variants;

/// How the feed-forward network of one layer is replaced.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "method")]
pub(super) enum Method {
    /// Not at all.
    Dense,
    /// By a fixed pool with top-k routing, weights renormalised.
    Static { experts: usize, k: usize },
    /// By DynMoE's pool.
    #[serde(rename = "dynmoe")]
    DynMoe { experts: usize, experts_max: usize },
    /// By a pool that MASS grows.
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

    /// The rules for a run of so many steps.
    ///
    /// A lagged reference of 128 steps would outlast the phase of the smallest tasks, so it is at most a tenth of the run,
    /// but never under 64 steps: estimated on fewer, a level is no longer what it says.
    pub(super) fn growth(&self, steps: u64, seed: u64) -> GrowerConfig {
        let mut config = variants::growth(self.variant, 1, self.experts, self.experts_max, steps);
        config.controller.seed = seed;
        if let Some(percent) = self.live_percent {
            variants::live_for(&mut config, steps, percent);
        }
        let watch = &mut config.controller.watch;
        for detector in [&mut watch.expert, &mut watch.layer, &mut watch.loss] {
            if let Some(AnyDetectorParams::CalibratedCusum(cusum)) = detector {
                cusum.horizon = config.controller.phase.live_until;
                if let Reference::Lagged { window, gap } = &mut cusum.reference {
                    *window = (*window).min((steps / 10) as usize).max(64);
                    *gap = (*gap).min(*window / 8);
                    cusum.warmup = cusum.warmup.min(*window);
                }
            }
        }
        if self.loose {
            config.controller.alignment = AlignmentThreshold::Absolute(1.0);
            if let Some(AnyDetectorParams::WindowedZ(z)) = &mut config.controller.watch.expert {
                (z.alpha, z.warmup, z.window) = (0.5, 10, 10);
            }
            if self.variant == Variant::Ours {
                let (first, every) = (steps / 5, (steps / 5).max(1));
                config.controller.trigger = Trigger::Schedule { first, every };
                if let StopRule::HeldOut { wait, .. } = &mut config.controller.stop {
                    *wait = 3;
                }
            }
        }
        config
    }
}

impl Method {
    /// Experts and router of the layer that is replaced; `None` for the dense model.
    pub(super) fn mixture(&self) -> Option<(usize, RouterConfig)> {
        match self {
            Self::Dense => None,
            &Self::Static { experts, k } => {
                let combine = Combine::Renormalised;
                Some((experts, RouterConfig::TopK { k, combine }))
            }
            &Self::DynMoe { experts, .. } => Some((experts, RouterConfig::TopAny { experts })),
            Self::Mass(m) => {
                let combine = variants::combine(m.variant);
                Some((m.experts, RouterConfig::TopP { p: m.p, combine }))
            }
        }
    }

    /// Whether it needs examples that it is not trained on, to judge newcomers by.
    pub(super) fn needs_probe(&self) -> bool {
        matches!(self, Self::Mass(m) if m.variant == Variant::Ours)
    }
}

/// Where the pretrained weights come from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Pretrained {
    /// None: a small model with drawn weights.
    Drawn(BertConfig),
    /// A directory in Hugging Face layout.
    Directory(PathBuf),
}

impl Pretrained {
    /// The model that a method begins with: a classifier head of `outputs`, and in one layer a mixture whose experts are
    /// copies of its feed-forward network, with gate rows drawn at random.
    pub(super) fn build(
        &self,
        method: &Method,
        outputs: usize,
        authors_layer: usize,
        rng: &mut ChaCha8Rng,
    ) -> Result<BertClassifier, ModelError> {
        let mut model = match self {
            Self::Drawn(config) => BertClassifier::new(config, outputs, rng)?,
            Self::Directory(dir) => BertClassifier::load(dir, outputs, rng)?,
        };
        if let Some((experts, router)) = method.mixture() {
            let bert = model.config();
            let layer = at_depth(authors_layer, bert.num_hidden_layers);
            let mut rules = MoeConfig::new(
                bert.hidden_size,
                bert.intermediate_size,
                experts,
                bert.hidden_act,
                router,
            );
            if matches!(method, Method::DynMoe { .. }) {
                rules.gate = GateConfig::Cosine {
                    projection: None,
                    temperature: None,
                };
            }
            model.convert_to(layer, &rules, rng)?;
        }
        Ok(model)
    }
}

/// The layer of BERT-large that the paper replaces, counted from 0.
pub(super) fn authors_layer(task: Task) -> usize {
    match task {
        Task::Mrpc => 11,
        _ => 10,
    }
}

/// The layer at the same part of another depth than BERT-large's 24.
fn at_depth(authors_layer: usize, depth: usize) -> usize {
    let layer = (authors_layer as f64 / 24.0 * depth as f64).round() as usize;
    layer.min(depth.saturating_sub(1))
}

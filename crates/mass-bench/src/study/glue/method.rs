//! The methods that are compared, and the model each begins with.

use std::path::PathBuf;

use mass_model::ModelError;
use mass_model::bert::{BertClassifier, BertConfig};
use mass_model::growth::GrowerConfig;
use mass_model::nn::MoeConfig;
use mass_routing::{Combine, RouterConfig};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::BenchError;
use crate::cli::Variant;
use crate::glue::task::Task;
use crate::rng::{Purpose, stream};
use crate::study::mass::MassSetting;
use crate::study::{model_settings, unusable_model};
use crate::variants;

/// How the feed-forward network of one layer is replaced.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "method", deny_unknown_fields)]
pub(super) enum Method {
    /// Not at all.
    Dense,
    /// By a fixed pool with top-k routing, weights renormalised, unless another router is chosen.
    Static {
        experts: usize,
        k: usize,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        router: Option<RouterConfig>,
    },
    /// By DynMoE's pool.
    #[serde(rename = "dynmoe")]
    DynMoe { experts: usize, experts_max: usize },
    /// By a pool that MASS grows.
    Mass(MassSetting),
}

/// MASS's rules for a run of so many steps.
pub(super) fn growth(setting: &MassSetting, steps: u64, seed: u64) -> GrowerConfig {
    let mut config = setting.rules(1, steps, seed);
    setting.fit(&mut config, steps);
    config
}

impl Method {
    /// Experts and router of the layer that is replaced; `None` for the dense model.
    pub(super) fn mixture(&self) -> Option<(usize, RouterConfig)> {
        match self {
            Self::Dense => None,
            &Self::Static {
                experts,
                k,
                ref router,
            } => {
                let combine = Combine::Renormalised;
                let router = router.clone().unwrap_or(RouterConfig::TopK { k, combine });
                Some((experts, router.with_experts(experts)))
            }
            &Self::DynMoe { experts, .. } => Some((experts, RouterConfig::TopAny { experts })),
            Self::Mass(m) => Some((m.experts, m.router())),
        }
    }

    /// The same with another router, if its routing is a choice.
    pub(super) fn routed_by(&mut self, chosen: &RouterConfig) {
        match self {
            Self::Static { router, .. } => *router = Some(chosen.clone()),
            Self::Mass(m) => m.router = Some(chosen.clone()),
            Self::Dense | Self::DynMoe { .. } => {}
        }
    }

    /// Refuses a chosen router that no run of these settings can have.
    pub(super) fn check_router(&self) -> Result<(), BenchError> {
        match self {
            Self::Static {
                experts,
                router: Some(router),
                ..
            } => variants::check_router(router, *experts, None),
            Self::Mass(m) => m.check_router(),
            _ => Ok(()),
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
    /// As settings keep it.
    pub(super) fn settings(&self) -> Result<Value, BenchError> {
        match self {
            Self::Drawn(config) => Ok(json!({ "drawn": config })),
            Self::Directory(dir) => model_settings(dir),
        }
    }

    /// Whether the model can be read for a task, so that this is known before anything is replaced.
    pub(super) fn check(&self, task: Task) -> Result<(), BenchError> {
        let (dense, mut rng) = (Method::Dense, stream(0, Purpose::Weights, 0));
        let read = self.build(&dense, task.outputs(), authors_layer(task), &mut rng);
        read.map(drop)
            .map_err(|e| unusable_model(e, "reading the model"))
    }

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
            Self::Directory(dir) => BertClassifier::load_with_new_head(dir, outputs, rng)?,
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
            rules.gate = variants::gate(&rules.router);
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
pub(super) fn at_depth(authors_layer: usize, depth: usize) -> usize {
    let layer = (authors_layer as f64 / 24.0 * depth as f64).round() as usize;
    layer.min(depth.saturating_sub(1))
}

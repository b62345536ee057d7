//! The model of a run: a BERT classifier that remembers how it was made, so that a checkpoint can make it again.

use mass_model::bert::{BertClassifier, BertConfig};
use mass_model::checkpoint::Checkpointed;
use mass_model::growth::Mixtures;
use mass_model::nn::{MoeConfig, MoeLayer};
use mass_model::{ModelError, Param, Parameters, seeded_rng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// Everything that fixes the model but for its values and its pool.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Shape {
    bert: BertConfig,
    outputs: usize,
    /// The layer that is a mixture, and its rules.
    mixture: Option<(usize, MoeConfig)>,
}

/// A classifier, of which one layer may be a mixture.
#[derive(Debug, Clone)]
pub(super) struct Tuned {
    pub(super) bert: BertClassifier,
    shape: Shape,
}

impl Tuned {
    /// A classifier as it was drawn or read.
    pub(super) fn new(bert: BertClassifier) -> Self {
        Self {
            shape: Shape {
                bert: bert.config().clone(),
                outputs: bert.labels(),
                mixture: None,
            },
            bert,
        }
    }

    /// Makes a layer a mixture whose experts are copies of its network, by the rules that `adapt` makes of plain ones.
    pub(super) fn convert(
        &mut self,
        layer: usize,
        experts: usize,
        router: mass_routing::RouterConfig,
        adapt: impl FnOnce(&mut MoeConfig),
        rng: &mut ChaCha8Rng,
    ) -> Result<(), ModelError> {
        self.bert.convert(layer, experts, router, rng)?;
        let moe = self.bert.mixture_mut(0);
        let mut config = moe.config().clone();
        adapt(&mut config);
        if config != *moe.config() {
            *moe = MoeLayer::from_experts(&config, moe.experts().to_vec(), rng)?;
        }
        self.shape.mixture = Some((layer, config));
        Ok(())
    }
}

impl Parameters for Tuned {
    fn visit<'a>(&'a self, prefix: &str, f: &mut dyn FnMut(String, &'a Param)) {
        self.bert.visit(prefix, f);
    }

    fn visit_mut(&mut self, prefix: &str, f: &mut dyn FnMut(String, &mut Param)) {
        self.bert.visit_mut(prefix, f);
    }
}

impl Mixtures for Tuned {
    fn mixtures(&self) -> usize {
        self.bert.mixtures()
    }

    fn mixture(&self, layer: usize) -> &MoeLayer {
        self.bert.mixture(layer)
    }

    fn mixture_mut(&mut self, layer: usize) -> &mut MoeLayer {
        self.bert.mixture_mut(layer)
    }

    fn mixture_name(&self, layer: usize) -> String {
        self.bert.mixture_name(layer)
    }
}

impl Checkpointed for Tuned {
    const KIND: &'static str = "fine-tuned BERT classifier";

    type Config = Shape;

    fn checkpoint_config(&self) -> &Shape {
        &self.shape
    }

    fn from_checkpoint_config(shape: &Shape) -> Result<Self, ModelError> {
        let mut rng = seeded_rng(0);
        let mut model = Self::new(BertClassifier::new(&shape.bert, shape.outputs, &mut rng)?);
        if let Some((layer, config)) = &shape.mixture {
            let (experts, router) = (config.experts, config.router.clone());
            let adapt = |rules: &mut MoeConfig| *rules = config.clone();
            model.convert(*layer, experts, router, adapt, &mut rng)?;
        }
        Ok(model)
    }

    /// The embedding of each token and the two matrices of each layer's network; a pool has at least as many values.
    fn values_at_least(shape: &Shape) -> Option<u64> {
        let of = |sizes: &[usize]| {
            let sizes = sizes.iter().map(|&n| n as u64);
            sizes.fold(1, u64::saturating_mul)
        };
        let c = &shape.bert;
        let networks = of(&[2, c.num_hidden_layers, c.hidden_size, c.intermediate_size]);
        Some(of(&[c.vocab_size, c.hidden_size]).saturating_add(networks))
    }
}

//! What optimiser, growth and checkpoints see of the model.

use super::{BertClassifier, BertConfig, ClassifierConfig};
use crate::checkpoint::Checkpointed;
use crate::encoder::check_mixtures;
use crate::error::ModelError;
use crate::growth::Mixtures;
use crate::nn::MoeLayer;
use crate::param::{Param, Parameters, join};
use crate::pretrained::Blank;

impl Parameters for BertClassifier {
    fn visit<'a>(&'a self, prefix: &str, f: &mut dyn FnMut(String, &'a Param)) {
        f(join(prefix, "embeddings.words"), &self.words);
        f(join(prefix, "embeddings.positions"), &self.positions);
        f(join(prefix, "embeddings.types"), &self.types);
        self.norm.visit(&join(prefix, "embeddings.norm"), f);
        for (l, layer) in self.layers.iter().enumerate() {
            layer.visit(&join(prefix, &format!("layers.{l}")), f);
        }
        self.pooler.visit(&join(prefix, "pooler"), f);
        self.head.visit(&join(prefix, "head"), f);
    }

    fn visit_mut(&mut self, prefix: &str, f: &mut dyn FnMut(String, &mut Param)) {
        f(join(prefix, "embeddings.words"), &mut self.words);
        f(join(prefix, "embeddings.positions"), &mut self.positions);
        f(join(prefix, "embeddings.types"), &mut self.types);
        self.norm.visit_mut(&join(prefix, "embeddings.norm"), f);
        for (l, layer) in self.layers.iter_mut().enumerate() {
            layer.visit_mut(&join(prefix, &format!("layers.{l}")), f);
        }
        self.pooler.visit_mut(&join(prefix, "pooler"), f);
        self.head.visit_mut(&join(prefix, "head"), f);
    }
}

impl BertClassifier {
    fn layers_with_mixture(&self) -> impl Iterator<Item = (usize, &MoeLayer)> {
        let layers = self.layers.iter().enumerate();
        layers.filter_map(|(l, layer)| Some((l, layer.mlp.mixture()?)))
    }
}

/// Mixture layers are counted among themselves, bottom first.
impl Mixtures for BertClassifier {
    fn mixtures(&self) -> usize {
        self.layers_with_mixture().count()
    }

    fn mixture(&self, layer: usize) -> &MoeLayer {
        let found = self.layers_with_mixture().nth(layer);
        found.expect("a mixture layer of the model").1
    }

    fn mixture_mut(&mut self, layer: usize) -> &mut MoeLayer {
        let layers = self.layers.iter_mut();
        let mut mixtures = layers.filter_map(|l| l.mlp.mixture_mut());
        mixtures.nth(layer).expect("a mixture layer of the model")
    }

    fn mixture_name(&self, layer: usize) -> String {
        let found = self.layers_with_mixture().nth(layer);
        let (index, _) = found.expect("a mixture layer of the model");
        format!("layers.{index}.moe")
    }
}

impl Checkpointed for BertClassifier {
    const KIND: &'static str = "BERT classifier";
    type Config = ClassifierConfig<BertConfig>;

    fn checkpoint_config(&self) -> &Self::Config {
        &self.config
    }

    fn from_checkpoint_config(config: &Self::Config) -> Result<Self, ModelError> {
        let mut model = Self::build(&config.encoder, config.outputs, &mut Blank)?;
        for (&layer, mixture) in &config.mixtures {
            model.convert_to(layer, mixture, &mut crate::seeded_rng(0))?;
        }
        Ok(model)
    }

    fn check_config(&self) -> Result<(), ModelError> {
        check_mixtures(self, self.config.mixtures.values())
    }

    fn values_at_least(config: &Self::Config) -> Option<u64> {
        let c = &config.encoder;
        let (d, hidden) = (c.hidden_size, c.intermediate_size);
        let layers = config.layers_at_least(c.num_hidden_layers, d, hidden)?;
        let tables = [c.vocab_size, c.max_position_embeddings, c.type_vocab_size];
        let mut rows = d as u64;
        for table in tables {
            rows = rows.checked_add(table as u64)?;
        }
        layers.checked_add(rows.checked_mul(d as u64)?)
    }
}

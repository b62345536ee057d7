//! What optimiser, growth and checkpoints see of the model.

use super::{BertClassifier, BertConfig, ClassifierConfig};
use crate::checkpoint::Checkpointed;
use crate::error::ModelError;
use crate::mixtures::check_mixtures;
use crate::pretrained::Blank;
use crate::{mixtures, parameters};

parameters!(BertClassifier {
    words as "embeddings.words",
    positions as "embeddings.positions",
    types as "embeddings.types",
    norm as "embeddings.norm",
    layers,
    pooler,
    head,
});
mixtures!(BertClassifier { layers });

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

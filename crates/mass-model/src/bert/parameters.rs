//! What optimiser, growth and checkpoints see of the model.

use super::{BertClassifier, BertConfig};
use crate::encoder::classifier;
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

classifier!(BertClassifier, BertConfig, "BERT classifier", layers "layer");

impl BertClassifier {
    /// Values outside the layers and the head.
    fn outer_values(c: &BertConfig) -> Option<u64> {
        let mut rows = c.hidden_size as u64;
        for table in [c.vocab_size, c.max_position_embeddings, c.type_vocab_size] {
            rows = rows.checked_add(table as u64)?;
        }
        rows.checked_mul(c.hidden_size as u64)
    }
}

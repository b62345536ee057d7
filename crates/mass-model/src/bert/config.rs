use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::ModelError;
use crate::kernels::activation::Activation;
use crate::param::MOST;
use crate::pretrained::{
    Head, PretrainedError, activation, checked, config_file, field_error, read_config,
};

/// Sizes and rates of a BERT encoder: the `config.json` of Hugging Face, with its defaults (`bert-base-uncased`).
///
/// Fields that are not here are passed over; [`read`](Self::read) refuses those that would make another model.
///
/// ```
/// use mass_model::bert::BertConfig;
/// let config: BertConfig = serde_json::from_str(r#"{"num_hidden_layers": 6, "hidden_act": "gelu"}"#)?;
/// assert_eq!((config.num_hidden_layers, config.hidden_size), (6, 768));
/// assert!(serde_json::from_str::<BertConfig>(r#"{"hidden_act": "maxout"}"#).is_err());
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct BertConfig {
    /// Number of token ids.
    pub vocab_size: usize,
    /// Width d of the hidden states.
    pub hidden_size: usize,
    /// Number of layers, at most 2^20.
    pub num_hidden_layers: usize,
    /// Attention heads; divides the width.
    pub num_attention_heads: usize,
    /// Hidden width of the feed-forward networks.
    pub intermediate_size: usize,
    /// Nonlinearity of the feed-forward networks: `gelu` (with the error function), `gelu_new` or `gelu_pytorch_tanh`,
    /// `relu`, `silu`.
    #[serde(with = "activation")]
    pub hidden_act: Activation,
    /// Rate of dropout on embeddings and on each sublayer's output, while training.
    pub hidden_dropout_prob: f32,
    /// Rate of dropout on attention probabilities, while training.
    pub attention_probs_dropout_prob: f32,
    /// Longest sequence.
    pub max_position_embeddings: usize,
    /// Number of segment ids.
    pub type_vocab_size: usize,
    /// Added to the variance in layer norm.
    pub layer_norm_eps: f32,
    /// Standard deviation of drawn matrices.
    pub initializer_range: f32,
    /// The token that fills up padded batches. Its embedding has no gradient, and is zero in a model that is drawn.
    pub pad_token_id: u32,
    /// Rate of dropout before the classifier; that of the hidden states without.
    pub classifier_dropout: Option<f32>,
}

impl Default for BertConfig {
    fn default() -> Self {
        Self {
            vocab_size: 30522,
            hidden_size: 768,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            intermediate_size: 3072,
            hidden_act: Activation::GeluErf,
            hidden_dropout_prob: 0.1,
            attention_probs_dropout_prob: 0.1,
            max_position_embeddings: 512,
            type_vocab_size: 2,
            layer_norm_eps: 1e-12,
            initializer_range: 0.02,
            pad_token_id: 0,
            classifier_dropout: None,
        }
    }
}

impl BertConfig {
    /// The sizes of `bert-large-cased` (Devlin and others, arXiv 1810.04805): 24 layers, width 1024, 16 heads.
    pub fn large_cased() -> Self {
        Self {
            vocab_size: 28996,
            hidden_size: 1024,
            num_hidden_layers: 24,
            num_attention_heads: 16,
            intermediate_size: 4096,
            ..Self::default()
        }
    }

    /// Reads `config.json` of a folder in Hugging Face's layout.
    ///
    /// # Errors
    /// [`ModelError::Io`] if it cannot be read; [`ModelError::Checkpoint`] naming file and field for a value that is missing or of
    /// the wrong kind, for another kind of model (`model_type`, relative positions, a decoder, cross-attention, several labels at
    /// once), and for sizes and rates that no model can have.
    pub fn read(dir: &Path) -> Result<Self, ModelError> {
        let others = read_config::<Others>(dir)?;
        others.check_head(dir, None)?;
        Self::read_encoder(dir, &others)
    }

    /// As [`read`](Self::read), for a head with so many outputs.
    pub(super) fn read_for(dir: &Path, labels: usize, head: Head) -> Result<Self, ModelError> {
        let others = read_config::<Others>(dir)?;
        if head == Head::OfFile {
            others.check_head(dir, Some(labels))?;
        }
        Self::read_encoder(dir, &others)
    }

    fn read_encoder(dir: &Path, others: &Others) -> Result<Self, ModelError> {
        others.check_encoder(dir)?;
        let config: Self = read_config(dir)?;
        checked(dir, config.check())?;
        Ok(config)
    }

    /// Rate of dropout before the classifier.
    pub fn head_dropout(&self) -> f32 {
        self.classifier_dropout.unwrap_or(self.hidden_dropout_prob)
    }

    /// Refuses values that no model can have.
    ///
    /// # Errors
    /// [`ModelError::Config`] naming the field.
    pub fn check(&self) -> Result<(), ModelError> {
        for (field, size) in [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("intermediate_size", self.intermediate_size),
            ("max_position_embeddings", self.max_position_embeddings),
            ("type_vocab_size", self.type_vocab_size),
        ] {
            if size == 0 {
                return Err(ModelError::Config(format!("{field} is zero")));
            }
        }
        if self.num_hidden_layers > MOST {
            return Err(ModelError::Config(format!(
                "num_hidden_layers {} is more than {MOST}",
                self.num_hidden_layers
            )));
        }
        if !self.hidden_size.is_multiple_of(self.num_attention_heads) {
            return Err(ModelError::Config(format!(
                "num_attention_heads {} does not divide hidden_size {}",
                self.num_attention_heads, self.hidden_size
            )));
        }
        if usize::try_from(self.pad_token_id).is_ok_and(|id| id >= self.vocab_size) {
            return Err(ModelError::Config(format!(
                "pad_token_id {} is not below vocab_size {}",
                self.pad_token_id, self.vocab_size
            )));
        }
        for (field, rate) in [
            ("hidden_dropout_prob", self.hidden_dropout_prob),
            (
                "attention_probs_dropout_prob",
                self.attention_probs_dropout_prob,
            ),
            ("classifier_dropout", self.head_dropout()),
        ] {
            if !(0.0..1.0).contains(&rate) {
                return Err(ModelError::Config(format!(
                    "{field} {rate} is not in [0, 1)"
                )));
            }
        }
        for (field, value) in [
            ("layer_norm_eps", self.layer_norm_eps),
            ("initializer_range", self.initializer_range),
        ] {
            if !(value > 0.0 && value.is_finite()) {
                return Err(ModelError::Config(format!(
                    "{field} {value} is not positive"
                )));
            }
        }
        Ok(())
    }
}

/// Fields of `config.json` that make another model than this one.
#[derive(Debug, Deserialize)]
struct Others {
    model_type: Option<String>,
    position_embedding_type: Option<String>,
    is_decoder: Option<bool>,
    add_cross_attention: Option<bool>,
    problem_type: Option<String>,
}

impl Others {
    fn check_encoder(&self, dir: &Path) -> Result<(), PretrainedError> {
        let path = config_file(dir);
        let refuse = |field, why: String| Err(field_error(&path, field, &why));
        let other = |field, value: &str| refuse(field, format!("{value:?} is not supported"));
        match self.model_type.as_deref() {
            None | Some("bert") => {}
            Some(t) => return other("model_type", t),
        }
        match self.position_embedding_type.as_deref() {
            None | Some("absolute") => {}
            Some(t) => return other("position_embedding_type", t),
        }
        for (field, flag) in [
            ("is_decoder", self.is_decoder),
            ("add_cross_attention", self.add_cross_attention),
        ] {
            if flag == Some(true) {
                return refuse(field, "true is not supported".into());
            }
        }
        Ok(())
    }

    /// Whether the head of the file is one for so many labels.
    fn check_head(&self, dir: &Path, labels: Option<usize>) -> Result<(), PretrainedError> {
        let why = match (self.problem_type.as_deref(), labels) {
            (Some("regression"), Some(n)) if n != 1 => {
                format!("regression has one output, not {n}")
            }
            (None | Some("single_label_classification" | "regression"), _) => return Ok(()),
            (Some(t), _) => format!("{t:?} is not supported"),
        };
        Err(field_error(&config_file(dir), "problem_type", &why))
    }
}

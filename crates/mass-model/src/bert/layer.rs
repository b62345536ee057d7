use super::BertConfig;
use crate::encoder::{Course, Mlp};
use crate::error::ModelError;
use crate::nn::{LayerNorm, SelfAttention};
use crate::ops::{Pass, Sequences};
use crate::pretrained::Source;
use crate::{mixtures, parameters};

/// A post-norm layer: `h = norm(x + dropout(attention(x)))`, then `y = norm(h + dropout(mlp(h)))`.
#[derive(Clone, Debug)]
pub(super) struct BertLayer {
    attention: SelfAttention,
    attention_norm: LayerNorm,
    pub(super) mlp: Mlp,
    ffn_norm: LayerNorm,
    dropout: f32,
}

impl BertLayer {
    pub(super) fn new(
        config: &BertConfig,
        name: &str,
        source: &mut dyn Source,
    ) -> Result<Self, ModelError> {
        let (d, eps) = (config.hidden_size, config.layer_norm_eps);
        let hidden = config.intermediate_size;
        let packed = d.checked_mul(3).ok_or_else(|| {
            ModelError::Config(format!("hidden_size {d} is larger than memory can be"))
        })?;
        Ok(Self {
            attention: SelfAttention {
                qkv: source.linear(&format!("{name}.attention.qkv"), d, packed, true)?,
                out: source.linear(&format!("{name}.attention.out"), d, d, true)?,
                heads: config.num_attention_heads,
                causal: false,
                dropout: config.attention_probs_dropout_prob,
            },
            attention_norm: source.norm(&format!("{name}.attention_norm"), d, eps)?,
            mlp: Mlp::dense(source, name, d, hidden, config.hidden_act)?,
            ffn_norm: source.norm(&format!("{name}.ffn_norm"), d, eps)?,
            dropout: config.hidden_dropout_prob,
        })
    }

    /// With `keep`, those rows of the output alone.
    pub(super) fn run<P: Pass>(
        &self,
        pass: &mut P,
        x: P::Rows,
        sequences: &Sequences,
        keep: Option<&[usize]>,
        course: &mut Course<'_>,
    ) -> Result<P::Rows, ModelError> {
        let early = self.mlp.keep_early(keep);
        let keys = course.keys.as_deref_mut();
        let h = self
            .attention
            .run(pass, x.clone(), sequences, early, keys)?;
        let x = pass.pick_some(x, early)?;
        let dropout = course.dropout(self.dropout)?;
        let h = pass.add(h, x, dropout)?;
        let x = self.attention_norm.run(pass, h)?;
        let h = self.mlp.run(pass, x.clone(), course)?;
        let dropout = course.dropout(self.dropout)?;
        let h = pass.add(h, x, dropout)?;
        let h = self.mlp.keep_late(pass, h, keep)?;
        self.ffn_norm.run(pass, h)
    }
}

parameters!(BertLayer { attention, attention_norm, mlp as "", ffn_norm });
mixtures!(BertLayer { mlp as "" });

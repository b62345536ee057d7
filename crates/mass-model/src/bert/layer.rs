use dfdx::prelude::{Cpu, Tape};

use super::BertConfig;
use crate::encoder::{Mlp, with_residual};
use crate::error::ModelError;
use crate::kernels::dropout::DropoutKeys;
use crate::nn::{LayerNorm, SelfAttention};
use crate::ops::{Activations, Sequences};
use crate::pass::{LayerTrace, Masked};
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
    pub(super) fn forward<T: Tape<f32, Cpu>>(
        &self,
        x: Activations<T>,
        sequences: &Sequences,
        keep: Option<&[usize]>,
        masked: Option<Masked>,
        mut keys: Option<&mut DropoutKeys>,
        traces: &mut Vec<LayerTrace>,
    ) -> Result<Activations<T>, ModelError> {
        let early = self.mlp.keep_early(keep);
        let (x, tape) = x.split_tape();
        let h = self.attention.run(
            x.clone().put_tape(tape),
            sequences,
            early,
            keys.as_deref_mut(),
        )?;
        let (h, residual) = with_residual(h, x, early)?;
        let dropout = keys.as_deref_mut().and_then(|k| k.next(self.dropout));
        let h = self.attention_norm.run(h.add(&residual, dropout)?)?;
        let (residual, tape) = h.split_tape();
        let h = residual.clone().put_tape(tape);
        let h = self.mlp.forward(h, masked, traces)?;
        let dropout = keys.and_then(|k| k.next(self.dropout));
        let h = self.mlp.keep_late(h.add(&residual, dropout)?, keep)?;
        self.ffn_norm.run(h)
    }
}

parameters!(BertLayer { attention, attention_norm, mlp as "", ffn_norm });
mixtures!(BertLayer { mlp as "" });

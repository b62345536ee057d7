use super::VitConfig;
use crate::encoder::{Course, Mlp};
use crate::error::ModelError;
use crate::nn::{LayerNorm, SelfAttention};
use crate::ops::{Pass, Sequences};
use crate::param::Param;
use crate::pretrained::{Kind, Source};
use crate::{mixtures, parameters};

/// A pre-norm block: `h = x + scale1 ⊙ attention(norm1(x))`, then `y = h + scale2 ⊙ mlp(norm2(h))`.
#[derive(Clone, Debug)]
pub(super) struct VitBlock {
    norm1: LayerNorm,
    attention: SelfAttention,
    scale1: Option<Param>,
    norm2: LayerNorm,
    pub(super) mlp: Mlp,
    scale2: Option<Param>,
    dropout: f32,
}

impl VitBlock {
    pub(super) fn new(
        config: &VitConfig,
        name: &str,
        source: &mut dyn Source,
    ) -> Result<Self, ModelError> {
        let (d, eps) = (config.hidden_size, config.layer_norm_eps);
        let hidden = config.intermediate_size;
        let scale = |which: &str, source: &mut dyn Source| {
            let start = config.layer_scale.map(Kind::Scale);
            start
                .map(|kind| source.param(&format!("{name}.{which}"), &[d], kind))
                .transpose()
        };
        Ok(Self {
            norm1: source.norm(&format!("{name}.norm1"), d, eps)?,
            attention: SelfAttention {
                qkv: source.linear(&format!("{name}.attention.qkv"), d, 3 * d, config.qkv_bias)?,
                out: source.linear(&format!("{name}.attention.out"), d, d, true)?,
                heads: config.num_attention_heads,
                causal: false,
                dropout: config.attention_probs_dropout_prob,
            },
            scale1: scale("scale1", source)?,
            norm2: source.norm(&format!("{name}.norm2"), d, eps)?,
            mlp: Mlp::dense(source, name, d, hidden, config.hidden_act)?,
            scale2: scale("scale2", source)?,
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
        let h = self.norm1.run(pass, x.clone())?;
        let keys = course.keys.as_deref_mut();
        let h = self.attention.run(pass, h, sequences, early, keys)?;
        let h = scaled(pass, h, self.scale1.as_ref())?;
        let x = pass.pick_some(x, early)?;
        let dropout = course.dropout(self.dropout)?;
        let x = pass.add(h, x, dropout)?;
        let h = self.norm2.run(pass, x.clone())?;
        let h = self.mlp.run(pass, h, course)?;
        let h = scaled(pass, h, self.scale2.as_ref())?;
        let dropout = course.dropout(self.dropout)?;
        let h = pass.add(h, x, dropout)?;
        self.mlp.keep_late(pass, h, keep)
    }
}

fn scaled<P: Pass>(
    pass: &mut P,
    x: P::Rows,
    factor: Option<&Param>,
) -> Result<P::Rows, ModelError> {
    match factor {
        Some(factor) => pass.scale_rows(x, factor),
        None => Ok(x),
    }
}

parameters!(VitBlock { norm1, attention, scale1, norm2, mlp as "", scale2 });
mixtures!(VitBlock { mlp as "" });

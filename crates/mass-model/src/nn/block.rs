use dfdx::prelude::{Cpu, Tape};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::{LayerNorm, MoeConfig, MoeLayer, SelfAttention};
use crate::error::ModelError;
use crate::ops::{Pass, Rows, Sequences, on_tensors};
use crate::param::draw;
use crate::parameters;
use crate::pass::{LayerTrace, Masked};

/// Sizes of a transformer block.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockConfig {
    /// Attention heads; divides the width.
    pub heads: usize,
    /// Added to the variance in layer norm.
    pub layer_norm_eps: f32,
    /// The feed-forward layer; its `dim` is the width of the block.
    pub moe: MoeConfig,
}

/// A pre-norm transformer block: `x += attention(norm1(x)); x += moe(norm2(x))`.
#[derive(Clone, Debug)]
pub struct Block {
    /// Before attention.
    pub norm1: LayerNorm,
    /// Causal self-attention.
    pub attention: SelfAttention,
    /// Before the feed-forward layer.
    pub norm2: LayerNorm,
    /// The feed-forward layer.
    pub moe: MoeLayer,
}

impl Block {
    /// A block with freshly drawn weights.
    ///
    /// # Errors
    /// [`ModelError::Config`] for sizes that no block can have.
    pub fn new(config: &BlockConfig, rng: &mut ChaCha8Rng) -> Result<Self, ModelError> {
        let dim = config.moe.dim;
        draw(rng, |rng| {
            Ok(Self {
                norm1: LayerNorm::new(dim, config.layer_norm_eps)?,
                attention: SelfAttention::new(dim, config.heads, rng)?,
                norm2: LayerNorm::new(dim, config.layer_norm_eps)?,
                moe: MoeLayer::new(&config.moe, rng)?,
            })
        })
    }

    /// The forward pass over sequences; `masked` and `traces` as in [`MoeLayer::forward_traced`].
    ///
    /// # Errors
    /// As its layers.
    pub fn forward<T: Tape<f32, Cpu>>(
        &self,
        x: Rows<T>,
        sequences: &Sequences,
        masked: Option<Masked>,
        traces: &mut Vec<LayerTrace>,
    ) -> Result<Rows<T>, ModelError> {
        on_tensors(x, |pass, x| self.run(pass, x, sequences, masked, traces))
    }

    pub(crate) fn run<P: Pass>(
        &self,
        pass: &mut P,
        x: P::Rows,
        sequences: &Sequences,
        masked: Option<Masked>,
        traces: &mut Vec<LayerTrace>,
    ) -> Result<P::Rows, ModelError> {
        let h = self.norm1.run(pass, x.clone())?;
        let h = self.attention.run(pass, h, sequences, None, None)?;
        let x = pass.add(h, x, None)?;
        let h = self.norm2.run(pass, x.clone())?;
        let h = self.moe.run_traced(pass, h, masked, traces)?;
        pass.add(h, x, None)
    }
}

parameters!(Block {
    norm1,
    attention,
    norm2,
    moe
});

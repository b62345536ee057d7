use dfdx::prelude::{Cpu, Module, PutTape, SplitTape, Tape};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::{LayerNorm, MoeConfig, MoeLayer, Routed, SelfAttention};
use crate::error::ModelError;
use crate::ops::{self, Rows, Sequences};
use crate::param::{Param, Parameters, join};

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
        Ok(Self {
            norm1: LayerNorm::new(dim, config.layer_norm_eps)?,
            attention: SelfAttention::new(dim, config.heads, rng)?,
            norm2: LayerNorm::new(dim, config.layer_norm_eps)?,
            moe: MoeLayer::new(&config.moe, rng)?,
        })
    }

    /// The forward pass over sequences; also returns the input of the gate.
    ///
    /// # Errors
    /// As its layers.
    pub fn forward<T: Tape<f32, Cpu>>(
        &self,
        x: Rows<T>,
        sequences: &Sequences,
        mask: Option<&[bool]>,
    ) -> Result<(Routed<T>, Rows<dfdx::prelude::NoneTape>), ModelError> {
        let (residual, tape) = x.split_tape();
        let h = self.norm1.try_forward(residual.clone().put_tape(tape))?;
        let h = ops::add(self.attention.forward(h, sequences, None)?, &residual, None)?;
        let (residual, tape) = h.split_tape();
        let (gate_input, tape) = self
            .norm2
            .try_forward(residual.clone().put_tape(tape))?
            .split_tape();
        let routed = self
            .moe
            .forward_routed(gate_input.clone().put_tape(tape), mask)?;
        let output = ops::add(routed.output, &residual, None)?;
        Ok((
            Routed {
                output,
                plan: routed.plan,
            },
            gate_input,
        ))
    }
}

impl Parameters for Block {
    fn visit<'a>(&'a self, prefix: &str, f: &mut dyn FnMut(String, &'a Param)) {
        self.norm1.visit(&join(prefix, "norm1"), f);
        self.attention.visit(&join(prefix, "attention"), f);
        self.norm2.visit(&join(prefix, "norm2"), f);
        self.moe.visit(&join(prefix, "moe"), f);
    }

    fn visit_mut(&mut self, prefix: &str, f: &mut dyn FnMut(String, &mut Param)) {
        self.norm1.visit_mut(&join(prefix, "norm1"), f);
        self.attention.visit_mut(&join(prefix, "attention"), f);
        self.norm2.visit_mut(&join(prefix, "norm2"), f);
        self.moe.visit_mut(&join(prefix, "moe"), f);
    }
}

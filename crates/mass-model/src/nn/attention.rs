use dfdx::prelude::{Cpu, Module, Tape};
use rand_chacha::ChaCha8Rng;

use super::Linear;
use crate::error::ModelError;
use crate::kernels::attention::AttentionShape;
use crate::ops::{self, Rows};
use crate::param::{Param, Parameters, join};

/// Multi-head causal self-attention with an output projection.
#[derive(Clone, Debug)]
pub struct SelfAttention {
    /// Queries, keys and values side by side, `[3 d, d]`.
    pub qkv: Linear,
    /// Output projection, `[d, d]`.
    pub out: Linear,
    heads: usize,
    dim: usize,
}

impl SelfAttention {
    /// Over width `dim` with `heads` heads.
    ///
    /// # Errors
    /// [`ModelError::Config`] if `heads` does not divide `dim`.
    pub fn new(dim: usize, heads: usize, rng: &mut ChaCha8Rng) -> Result<Self, ModelError> {
        if heads == 0 || dim == 0 || !dim.is_multiple_of(heads) {
            return Err(ModelError::Config(format!(
                "{heads} attention heads do not divide width {dim}"
            )));
        }
        Ok(Self {
            qkv: Linear::new(dim, 3 * dim, true, rng)?,
            out: Linear::new(dim, dim, true, rng)?,
            heads,
            dim,
        })
    }

    /// Attends within each of the sequences of `seq` rows that `x: [batch * seq, d]` is made of.
    ///
    /// # Errors
    /// [`ModelError::Shape`] if `x` does not have that shape.
    pub fn forward<T: Tape<f32, Cpu>>(
        &self,
        x: Rows<T>,
        batch: usize,
        seq: usize,
    ) -> Result<Rows<T>, ModelError> {
        let qkv = self.qkv.try_forward(x)?;
        let shape = AttentionShape {
            batch,
            seq,
            heads: self.heads,
            dim: self.dim,
            causal: true,
        };
        self.out.try_forward(ops::self_attention(qkv, shape)?)
    }
}

impl Parameters for SelfAttention {
    fn visit<'a>(&'a self, prefix: &str, f: &mut dyn FnMut(String, &'a Param)) {
        self.qkv.visit(&join(prefix, "qkv"), f);
        self.out.visit(&join(prefix, "out"), f);
    }

    fn visit_mut(&mut self, prefix: &str, f: &mut dyn FnMut(String, &mut Param)) {
        self.qkv.visit_mut(&join(prefix, "qkv"), f);
        self.out.visit_mut(&join(prefix, "out"), f);
    }
}

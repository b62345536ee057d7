use dfdx::prelude::{Cpu, Tape};
use rand_chacha::ChaCha8Rng;

use super::Linear;
use crate::error::ModelError;
use crate::kernels::dropout::DropoutKeys;
use crate::ops::{Attention, Pass, Rows, Sequences, on_tensors};
use crate::param::draw;
use crate::parameters;

/// Multi-head self-attention with an output projection.
#[derive(Clone, Debug)]
pub struct SelfAttention {
    /// Queries, keys and values side by side, `[3 d, d]`.
    pub qkv: Linear,
    /// Output projection, `[d, d]`.
    pub out: Linear,
    /// Heads; divides the width.
    pub heads: usize,
    /// Whether a token sees only itself and earlier tokens.
    pub causal: bool,
    /// Rate of dropout on the attention probabilities, while training; in [0, 1).
    pub dropout: f32,
}

impl SelfAttention {
    /// Over width `dim` with `heads` heads, causal and without dropout.
    ///
    /// # Errors
    /// [`ModelError::Config`] if `heads` does not divide `dim`.
    pub fn new(dim: usize, heads: usize, rng: &mut ChaCha8Rng) -> Result<Self, ModelError> {
        let packed = dim.checked_mul(3).ok_or_else(|| {
            ModelError::Config(format!("width {dim} is larger than memory can be"))
        })?;
        if heads == 0 || dim == 0 || !dim.is_multiple_of(heads) {
            return Err(ModelError::Config(format!(
                "{heads} attention heads do not divide width {dim}"
            )));
        }
        draw(rng, |rng| {
            Ok(Self {
                qkv: Linear::new(dim, packed, true, rng)?,
                out: Linear::new(dim, dim, true, rng)?,
                heads,
                causal: true,
                dropout: 0.0,
            })
        })
    }

    /// Attends within each sequence of `x: [rows, d]`; `keys` give the dropout mask, none without.
    ///
    /// # Errors
    /// [`ModelError::Shape`] if `x` does not have that shape, [`ModelError::Config`] for a rate of dropout outside [0, 1).
    pub fn forward<T: Tape<f32, Cpu>>(
        &self,
        x: Rows<T>,
        sequences: &Sequences,
        keys: Option<&mut DropoutKeys>,
    ) -> Result<Rows<T>, ModelError> {
        on_tensors(x, |pass, x| self.run(pass, x, sequences, None, keys))
    }

    /// As [`forward`](Self::forward), of which only rows `keep` come out, if given: the others are not projected.
    pub(crate) fn run<P: Pass>(
        &self,
        pass: &mut P,
        x: P::Rows,
        sequences: &Sequences,
        keep: Option<&[usize]>,
        keys: Option<&mut DropoutKeys>,
    ) -> Result<P::Rows, ModelError> {
        if !(0.0..1.0).contains(&self.dropout) {
            let what = format!("attention dropout {} is not in [0, 1)", self.dropout);
            return Err(ModelError::Config(what));
        }
        let qkv = self.qkv.run(pass, x)?;
        let how = Attention {
            heads: self.heads,
            causal: self.causal,
            dropout: keys.map_or(Ok(None), |k| k.next(self.dropout))?,
        };
        let attended = pass.self_attention(qkv, sequences, how)?;
        let attended = pass.pick_some(attended, keep)?;
        self.out.run(pass, attended)
    }
}

parameters!(SelfAttention { qkv, out });

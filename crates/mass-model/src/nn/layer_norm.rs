use crate::error::ModelError;
use crate::ops::Pass;
use crate::param::Param;
use crate::parameters;

/// Layer normalisation over the last axis, `(x - mean)/√(var + eps) ⊙ weight + bias`.
#[derive(Clone, Debug)]
pub struct LayerNorm {
    /// Scale, `[d]`
    pub weight: Param,
    /// Shift, `[d]`
    pub bias: Param,
    /// Added to the variance.
    pub eps: f32,
}

impl LayerNorm {
    /// Over `dim` values, at scale one and shift zero.
    ///
    /// # Errors
    /// [`ModelError::Config`] if `dim` is zero or `eps` is not positive and finite.
    pub fn new(dim: usize, eps: f32) -> Result<Self, ModelError> {
        if dim == 0 || !eps.is_finite() || eps <= 0.0 {
            return Err(ModelError::Config(format!(
                "layer norm over {dim} values with eps {eps}: it needs at least one value, and an eps that is positive and finite"
            )));
        }
        Ok(Self {
            weight: Param::ones(&[dim], false)?,
            bias: Param::zeros(&[dim], false)?,
            eps,
        })
    }
}

impl LayerNorm {
    pub(crate) fn run<P: Pass>(&self, pass: &mut P, x: P::Rows) -> Result<P::Rows, ModelError> {
        pass.layer_norm(x, &self.weight, &self.bias, self.eps)
    }
}

parameters!(LayerNorm { weight, bias });

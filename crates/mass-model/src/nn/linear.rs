use rand_chacha::ChaCha8Rng;

use crate::error::ModelError;
use crate::param::Param;
use crate::parameters;

/// A fully connected layer, `y = x Wᵀ + b`.
///
/// ```
/// use dfdx::prelude::*;
/// use mass_model::{nn::Linear, seeded_rng};
///
/// let layer = Linear::new(4, 3, true, &mut seeded_rng(0))?;
/// let x = Cpu::default().ones_like(&(2, 4));
/// let y = layer.try_forward(x)?;
/// assert_eq!(*y.shape(), (2, 3));
/// # Ok::<(), mass_model::ModelError>(())
/// ```
#[derive(Clone, Debug)]
pub struct Linear {
    /// `[out, in]`
    pub weight: Param,
    /// `[out]`
    pub bias: Option<Param>,
}

impl Linear {
    /// A layer from `inp` to `out` values, weight and bias drawn from U(-1/√in, 1/√in) (PyTorch's default).
    ///
    /// # Errors
    /// [`ModelError::Config`] if a size is zero.
    pub fn new(
        inp: usize,
        out: usize,
        bias: bool,
        rng: &mut ChaCha8Rng,
    ) -> Result<Self, ModelError> {
        if inp == 0 || out == 0 {
            return Err(ModelError::Config(format!(
                "a linear layer cannot lead from {inp} to {out} values: each must be at least 1"
            )));
        }
        let bound = 1.0 / (inp as f32).sqrt();
        let weight = Param::uniform(&[out, inp], bound, true, rng)?;
        let bias = if bias {
            Some(Param::uniform(&[out], bound, false, rng)?)
        } else {
            None
        };
        Ok(Self { weight, bias })
    }
}

parameters!(Linear { weight, bias });

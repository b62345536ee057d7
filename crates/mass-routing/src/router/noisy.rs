//! Gate noise in front of any router.

use ndarray::{Array2, ArrayView2, ArrayViewMut2};
use ndarray_rand::rand::SeedableRng;
use ndarray_rand::rand_distr::{Distribution, StandardNormal};
use rand_chacha::ChaCha8Rng;
#[cfg(feature = "serde")]
use serde::{Deserialize, Serialize};

use super::{AnyRouter, GateGradient, Loads, Router};
use crate::plan::check;
use crate::{RoutingError, RoutingPlan};

/// Any router, with Gaussian noise added to the logits while training.
///
/// # Formula
/// `logits + std * N(0, 1)`, drawn in row order from a ChaCha stream, so that the same seed gives the same plans; serialising keeps
/// the position in the stream. Masked experts use up noise too: masking one does not change the noise of the others. The
/// gradient is that of the inner router, noise being additive. GMoE and Tutel use `std = 1 / K`.
///
/// The noise is off while the router is set to evaluation ([`Router::set_training`]).
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(Serialize, Deserialize),
    serde(try_from = "Parts", into = "Parts")
)]
pub struct Noisy {
    inner: AnyRouter,
    std: f32,
    seed: u64,
    rng: ChaCha8Rng,
    training: bool,
    buffer: Array2<f32>,
    /// Rows of the batch before and after those that are routed here.
    around: (usize, usize),
}

impl Noisy {
    /// Noise of standard deviation `std >= 0` in front of `inner`.
    ///
    /// # Errors
    /// `std` is negative or not finite.
    pub fn new(inner: AnyRouter, std: f32, seed: u64) -> Result<Self, RoutingError> {
        if !(std >= 0.0 && std.is_finite()) {
            let expected = "finite and not negative";
            return Err(RoutingError::InvalidParameter {
                name: "std",
                expected,
                value: std.into(),
            });
        }
        let (rng, buffer) = (ChaCha8Rng::seed_from_u64(seed), Array2::zeros((0, 0)));
        Ok(Self {
            inner,
            std,
            seed,
            rng,
            training: true,
            buffer,
            around: (0, 0),
        })
    }

    /// The router behind the noise.
    pub fn inner(&self) -> &AnyRouter {
        &self.inner
    }

    /// Standard deviation of the noise.
    pub fn std(&self) -> f32 {
        self.std
    }

    /// The logits of the last `route` with their noise (without it in evaluation), which some losses compare with.
    pub fn noisy_logits(&self) -> ArrayView2<'_, f32> {
        self.buffer.view()
    }

    /// Fills the buffer.
    fn add_noise(&mut self, logits: ArrayView2<'_, f32>) -> Result<(), RoutingError> {
        if self.buffer.dim() != logits.dim() {
            self.buffer = Array2::zeros(logits.dim());
        }
        self.buffer.assign(&logits);
        if self.training && self.std > 0.0 {
            let experts = logits.ncols();
            let draws = |tokens: usize| {
                let draws = tokens.checked_mul(experts);
                let draws = draws.filter(|&draws| u32::try_from(draws).is_ok());
                draws.ok_or(RoutingError::TooLarge { tokens, experts })
            };
            let (before, after) = (draws(self.around.0)?, draws(self.around.1)?);
            // A draw may take more than one number of the stream, so that others' noise is passed over by drawing it.
            let mut draw = || -> f32 { StandardNormal.sample(&mut self.rng) };
            (0..before).for_each(|_| _ = draw());
            for l in &mut self.buffer {
                *l += self.std * draw();
            }
            (0..after).for_each(|_| _ = draw());
        }
        Ok(())
    }
}

impl Router for Noisy {
    /// # Errors
    /// Besides those of the inner router: [`RoutingError::TooLarge`] for rows before or after with 2^32 logits or more. After an error
    /// the noise is drawn again from where it was.
    fn route(
        &mut self,
        logits: ArrayView2<'_, f32>,
        mask: Option<&[bool]>,
        plan: &mut RoutingPlan,
    ) -> Result<(), RoutingError> {
        let start = self.rng.clone();
        let result = check(logits.dim(), mask)
            .and_then(|()| self.add_noise(logits))
            .and_then(|()| self.inner.route(self.buffer.view(), mask, plan));
        if result.is_err() {
            self.rng = start;
            plan.clear();
        }
        result
    }

    fn backward(
        &self,
        plan: &RoutingPlan,
        d_weights: &[f32],
        d_logits: &mut ArrayViewMut2<'_, f32>,
    ) -> Result<(), RoutingError> {
        self.inner.backward(plan, d_weights, d_logits)
    }

    fn check_backward(&self, plan: &RoutingPlan) -> Result<(), RoutingError> {
        self.inner.check_backward(plan)
    }

    fn gate_gradient(&self) -> GateGradient {
        self.inner.gate_gradient()
    }

    fn split_expert(&mut self, source: usize, newcomer: usize) {
        self.inner.split_expert(source, newcomer);
    }

    fn adapt_to(&mut self, loads: &Loads) -> Result<(), RoutingError> {
        self.inner.adapt_to(loads)
    }

    fn set_rows_around(&mut self, before: usize, after: usize) {
        self.around = (before, after);
        self.inner.set_rows_around(before, after);
    }

    fn remove_expert(&mut self, index: usize) {
        self.inner.remove_expert(index);
    }

    fn least_experts(&self) -> usize {
        self.inner.least_experts()
    }

    fn set_training(&mut self, training: bool) {
        self.training = training;
        self.inner.set_training(training);
    }
}

/// The unchecked form that serde reads and writes.
#[cfg(feature = "serde")]
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Parts {
    inner: AnyRouter,
    std: f32,
    seed: u64,
    /// Low and high half of the position in the stream, which is 68 bits long.
    position: [u64; 2],
    training: bool,
}

#[cfg(feature = "serde")]
impl TryFrom<Parts> for Noisy {
    type Error = RoutingError;

    fn try_from(parts: Parts) -> Result<Self, RoutingError> {
        let mut checked = Self::new(parts.inner, parts.std, parts.seed)?;
        let [low, high] = parts.position;
        let position = u128::from(low) | (u128::from(high) << 64);
        if position >> 68 != 0 {
            return Err(RoutingError::InvalidParameter {
                name: "position of the noise",
                expected: "below 2^68",
                value: position as f64,
            });
        }
        checked.rng.set_word_pos(position);
        checked.training = parts.training;
        Ok(checked)
    }
}

#[cfg(feature = "serde")]
impl From<Noisy> for Parts {
    fn from(router: Noisy) -> Self {
        let Noisy {
            inner,
            std,
            seed,
            rng,
            training,
            buffer: _,
            around: _,
        } = router;
        let position = rng.get_word_pos();
        Self {
            inner,
            std,
            seed,
            position: [position as u64, (position >> 64) as u64],
            training,
        }
    }
}

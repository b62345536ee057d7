//! Top-p with p steered to a wanted mean number of experts.

use ndarray::ArrayView2;
#[cfg(feature = "serde")]
use serde::{Deserialize, Serialize};

use super::{GateGradient, Loads, Router, TopP};
use crate::{Combine, NonFinite, RoutingError, RoutingPlan};

/// Top-p whose `p` a PI controller steers so that tokens use a wanted number of experts on average.
///
/// # Formula
/// With the error `e_t = ln(target / mean k_t)` of batch `t` and `x = ln(p / (1 - p))`, in velocity form,
///
/// `x_{t+1} = x_t + K_p (e_t - e_{t-1}) + K_i e_t`,
///
/// then clamped so that p stays in `[1e-3, 1 - 1e-3]`. The velocity form has no integral that could wind up at the limits. The
/// controller moves only in [`Router::adapt`], so evaluation leaves p alone.
///
/// # Source
/// A controlled p is the idea of arXiv 2512.13996; the logit scale, the logarithmic error and the default gains are ours.
///
/// # Examples
/// ```
/// use mass_routing::{Combine, Router, RoutingPlan, TargetK};
/// use ndarray::Array2;
///
/// let logits = Array2::from_shape_fn((64, 8), |(t, e)| ((t * 7 + e * 13) % 11) as f32 * 0.3);
/// let mut router = TargetK::new(3.0, 0.5, Combine::Renormalised)?;
/// let mut plan = RoutingPlan::default();
/// for _ in 0..60 {
///     router.route(logits.view(), None, &mut plan)?;
///     router.adapt(&plan)?;
/// }
/// assert!((plan.mean_k() - 3.0).abs() < 0.2);
/// # Ok::<(), mass_routing::RoutingError>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(Serialize, Deserialize),
    serde(try_from = "Parts", into = "Parts")
)]
pub struct TargetK {
    target: f64,
    proportional: f64,
    integral: f64,
    previous_error: f64,
    x: f64,
    inner: TopP,
}

/// p stays this far from 0 and 1.
const MARGIN: f64 = 1e-3;

/// `x` where p is as near to 1.
fn limit() -> f64 {
    ((1.0 - MARGIN) / MARGIN).ln()
}

impl TargetK {
    /// Aims at `target >= 1` experts per token, starting from `p` in (0, 1), clamped as above, with gains `K_p = 0.2`, `K_i = 0.3`.
    ///
    /// # Errors
    /// `target` is below 1 or not finite; `p` is not in (0, 1).
    pub fn new(target: f64, p: f32, combine: Combine) -> Result<Self, RoutingError> {
        if !(target >= 1.0 && target.is_finite()) {
            let expected = "finite and at least 1";
            return Err(RoutingError::InvalidParameter {
                name: "target",
                expected,
                value: target,
            });
        }
        if !(p > 0.0 && p < 1.0) {
            return Err(RoutingError::InvalidParameter {
                name: "p",
                expected: "in (0, 1)",
                value: p.into(),
            });
        }
        let start = f64::from(p).clamp(MARGIN, 1.0 - MARGIN);
        let x = (start / (1.0 - start)).ln();
        let inner = TopP::new(start as f32, combine)?;
        Ok(Self {
            target,
            proportional: 0.2,
            integral: 0.3,
            previous_error: 0.0,
            x,
            inner,
        })
    }

    /// Sets the gains.
    ///
    /// # Errors
    /// A gain is negative or not finite, or the integral gain is zero (p would never settle on the target).
    pub fn with_gains(mut self, proportional: f64, integral: f64) -> Result<Self, RoutingError> {
        if !(proportional >= 0.0 && proportional.is_finite()) {
            let expected = "finite and not negative";
            return Err(RoutingError::InvalidParameter {
                name: "proportional gain",
                expected,
                value: proportional,
            });
        }
        if !(integral > 0.0 && integral.is_finite()) {
            let expected = "positive and finite";
            return Err(RoutingError::InvalidParameter {
                name: "integral gain",
                expected,
                value: integral,
            });
        }
        self.proportional = proportional;
        self.integral = integral;
        Ok(self)
    }

    /// What to do with a token that has a NaN or infinite logit; an error unless set.
    pub fn with_non_finite(mut self, choice: NonFinite) -> Self {
        self.inner = self.inner.with_non_finite(choice);
        self
    }

    /// Whether the plan keeps the full softmax; see [`TopP::with_probabilities`].
    pub fn with_probabilities(mut self, keep: bool) -> Self {
        self.inner = self.inner.with_probabilities(keep);
        self
    }

    /// The present p.
    pub fn p(&self) -> f32 {
        self.inner.p()
    }

    /// The wanted mean number of experts per token.
    pub fn target(&self) -> f64 {
        self.target
    }
}

impl Router for TargetK {
    fn route(
        &mut self,
        logits: ArrayView2<'_, f32>,
        mask: Option<&[bool]>,
        plan: &mut RoutingPlan,
    ) -> Result<(), RoutingError> {
        self.inner.route(logits, mask, plan)
    }

    fn gate_gradient(&self) -> GateGradient {
        self.inner.gate_gradient()
    }

    /// One step of the controller; without assignments nothing changes.
    ///
    /// # Errors
    /// [`RoutingError::NonFinite`] for a target or gains so large that the step overflows; nothing changes then.
    fn adapt_to(&mut self, loads: &Loads) -> Result<(), RoutingError> {
        let assignments = loads.assignments();
        if loads.tokens == 0 || assignments == 0 {
            return Ok(());
        }
        let error = (self.target * loads.tokens as f64 / assignments as f64).ln();
        let step = self.proportional * (error - self.previous_error) + self.integral * error;
        check_state(error, self.x + step)?;
        let x = (self.x + step).clamp(-limit(), limit());
        self.inner = self.inner.with_p((1.0 / (1.0 + (-x).exp())) as f32)?;
        (self.previous_error, self.x) = (error, x);
        Ok(())
    }
}

fn check_state(previous_error: f64, x: f64) -> Result<(), RoutingError> {
    for (what, value) in [("previous error", previous_error), ("controller state", x)] {
        if !value.is_finite() {
            return Err(RoutingError::NonFinite {
                what,
                index: 0,
                value,
            });
        }
    }
    Ok(())
}

/// The unchecked form that serde reads and writes.
#[cfg(feature = "serde")]
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Parts {
    target: f64,
    proportional: f64,
    integral: f64,
    previous_error: f64,
    x: f64,
    top_p: TopP,
}

#[cfg(feature = "serde")]
impl TryFrom<Parts> for TargetK {
    type Error = RoutingError;

    fn try_from(parts: Parts) -> Result<Self, RoutingError> {
        let Parts {
            target,
            proportional,
            integral,
            previous_error,
            x,
            top_p,
        } = parts;
        check_state(previous_error, x)?;
        let p = 1.0 / (1.0 + (-x).exp());
        // Of f32 both ways, and of limits that were rounded.
        if x.abs() > limit() + 1e-3 || (p - f64::from(top_p.p())).abs() > 1e-6 {
            return Err(RoutingError::InvalidParameter {
                name: "controller state",
                expected: "the logit of p, in [1e-3, 1 - 1e-3]",
                value: x,
            });
        }
        let checked =
            Self::new(target, top_p.p(), top_p.combine())?.with_gains(proportional, integral)?;
        Ok(Self {
            previous_error,
            x,
            inner: top_p,
            ..checked
        })
    }
}

#[cfg(feature = "serde")]
impl From<TargetK> for Parts {
    fn from(router: TargetK) -> Self {
        let TargetK {
            target,
            proportional,
            integral,
            previous_error,
            x,
            inner,
        } = router;
        Self {
            target,
            proportional,
            integral,
            previous_error,
            x,
            top_p: inner,
        }
    }
}

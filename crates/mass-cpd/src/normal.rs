//! The standard normal distribution.

use std::f64::consts::{FRAC_1_SQRT_2, PI};

use libm::erfc;

/// `1 - Phi(x)`, without the cancellation that `1 - cdf` has in the tail.
#[inline]
pub(crate) fn survival(x: f64) -> f64 {
    0.5 * erfc(x * FRAC_1_SQRT_2)
}

/// `Phi(x)`.
pub(crate) fn cdf(x: f64) -> f64 {
    survival(-x)
}

/// The density.
pub(crate) fn density(x: f64) -> f64 {
    (-0.5 * x * x).exp() / (2.0 * PI).sqrt()
}

//! Siegmund's closed form.

use super::{check_chart, check_horizon};
use crate::CpdError;

/// What the boundary is moved out by: the mean overshoot of a Gaussian walk over zero is 0.583, once at each
/// end of the interval.
const OVERSHOOT: f64 = 1.166;

/// `(exp(-2 D b) + 2 D b - 1) / (2 D^2)` for any finite argument.
pub(crate) fn formula(k: f64, h: f64, mu: f64) -> f64 {
    let b = h + OVERSHOOT;
    let x = 2.0 * (mu - k) * b;
    // The quotient tends to b^2; its series avoids the cancellation near D = 0.
    let shape = if x.abs() < 1e-3 {
        0.5 - x / 6.0 + x * x / 24.0
    } else {
        ((-x).exp_m1() + x) / (x * x)
    };
    2.0 * b * b * shape
}

/// Siegmund's approximation of the average run length of a one-sided CUSUM that starts at zero.
///
/// # Formula
/// `(exp(-2 D b) + 2 D b - 1) / (2 D^2)` with `D = mu - k`, `b = h + 1.166`; `b^2` when `D = 0`.
///
/// # Errors
/// [`CpdError::Parameter`] unless `k` is in \[0, 10\], `h` in \[0, 200\] and `mu` in \[-10, 100\].
///
/// # Examples
/// ```
/// let arl = mass_cpd::run_length::siegmund_average(0.5, 4.0, 0.0)?;
/// assert!((arl / 335.37 - 1.0).abs() < 0.02); // the exact value is 335.37
/// # Ok::<(), mass_cpd::CpdError>(())
/// ```
pub fn siegmund_average(k: f64, h: f64, mu: f64) -> Result<f64, CpdError> {
    check_chart(k, h, mu)?;
    Ok(formula(k, h, mu))
}

/// The threshold at which Siegmund's approximation gives a false alarm within `n` steps with probability `alpha`.
///
/// # Formula
/// The `h` with `1 - exp(-n / ARL0(h)) = alpha`, one-sided, `mu = 0`.
///
/// # Errors
/// [`CpdError::Parameter`] for a value out of range, [`CpdError::NotFound`] when it lies above 200.
///
/// # Examples
/// ```
/// let h = mass_cpd::run_length::siegmund_threshold_for_horizon(0.5, 1000, 0.05)?;
/// assert!((h - 8.03).abs() < 0.02);
/// # Ok::<(), mass_cpd::CpdError>(())
/// ```
pub fn siegmund_threshold_for_horizon(k: f64, n: u64, alpha: f64) -> Result<f64, CpdError> {
    check_chart(k, 0.0, 0.0)?;
    check_horizon(n, alpha)?;
    let target = -(n as f64) / (-alpha).ln_1p();
    super::threshold::bisect(|h| Ok(formula(k, h, 0.0) >= target))
}

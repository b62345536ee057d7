//! Thresholds for a wanted false-alarm rate, and charts that watch both directions.

use super::{H_MAX, RunLength, Sides, check_chart, check_horizon};
use crate::{CpdError, error::require};

/// Average run length of a chart with two one-sided CUSUMs, one for rises and one for falls.
///
/// # Formula
/// Kemp's rule `1/L = 1/L_up + 1/L_down`, with `L_up` at `mu` and `L_down` at `-mu`; exact when both have the same
/// `k` and `h`.
///
/// # Errors
/// [`CpdError::Parameter`] unless `k` is in \[0, 10\], `h` in \[0, 200\] and `mu` in \[-10, 10\].
///
/// # Examples
/// ```
/// let arl = mass_cpd::run_length::two_sided_average(0.5, 4.0, 0.0)?;
/// assert!((arl - 168.0).abs() < 0.5); // Lucas & Crosier (1982), Table 1
/// # Ok::<(), mass_cpd::CpdError>(())
/// ```
pub fn two_sided_average(k: f64, h: f64, mu: f64) -> Result<f64, CpdError> {
    require((-10.0..=10.0).contains(&mu), "mu", mu, "in [-10, 10]")?;
    let up = RunLength::new(k, h, mu)?.average();
    let down = RunLength::new(k, h, -mu)?.average();
    Ok((up.recip() + down.recip()).recip())
}

/// The threshold whose `p_N` over a horizon of `n` steps is `alpha`.
///
/// # Formula
/// The `h` with `1 - exp(-n / ARL0(h)) = alpha`, `ARL0` from the integral equation (for [`Sides::Two`], by Kemp's
/// rule). This is the level of a chart that has been running for a while; one that starts at zero first has to
/// climb, and stays a little under `alpha` ([`exact_threshold_for_horizon`] uses that up).
///
/// # Errors
/// [`CpdError::Parameter`] for a value out of range, [`CpdError::NotFound`] when no threshold in \[0, 200\] has that
/// level.
///
/// # Examples
/// ```
/// use mass_cpd::run_length::{Sides, threshold_for_horizon};
///
/// let h = threshold_for_horizon(0.5, 10_000, 0.05, Sides::One)?;
/// assert!((h - 10.33).abs() < 0.005);
/// # Ok::<(), mass_cpd::CpdError>(())
/// ```
pub fn threshold_for_horizon(k: f64, n: u64, alpha: f64, sides: Sides) -> Result<f64, CpdError> {
    check_chart(k, 0.0, 0.0)?;
    check_horizon(n, alpha)?;
    let target = -sides.number() * n as f64 / (-alpha).ln_1p();
    bisect(|h| Ok(RunLength::new(k, h, 0.0)?.average() >= target))
}

/// The threshold that a chart which starts at zero crosses within `n` steps with probability `alpha`, when
/// there is no change.
///
/// From the exact distribution of the run length. For [`Sides::Two`] the two sums are taken as independent, each at
/// `1 - sqrt(1 - alpha)`: they are nearly so, as one is small when the other is large.
///
/// # Errors
/// [`CpdError::Parameter`] for a value out of range, [`CpdError::NotFound`] when no threshold in \[0, 200\] has that
/// level.
///
/// # Examples
/// ```
/// use mass_cpd::run_length::{RunLength, Sides, exact_threshold_for_horizon};
///
/// let h = exact_threshold_for_horizon(0.5, 1000, 0.05, Sides::One)?;
/// assert!((RunLength::new(0.5, h, 0.0)?.false_alarm(1000) - 0.05).abs() < 1e-6);
/// # Ok::<(), mass_cpd::CpdError>(())
/// ```
pub fn exact_threshold_for_horizon(
    k: f64,
    n: u64,
    alpha: f64,
    sides: Sides,
) -> Result<f64, CpdError> {
    check_chart(k, 0.0, 0.0)?;
    check_horizon(n, alpha)?;
    let level = match sides {
        Sides::One => alpha,
        Sides::Two => -(0.5 * (-alpha).ln_1p()).exp_m1(),
    };
    bisect(|h| Ok(RunLength::new(k, h, 0.0)?.false_alarm(n) <= level))
}

/// The threshold with an in-control average run length of `average` steps.
///
/// # Errors
/// [`CpdError::Parameter`] for a value out of range, [`CpdError::NotFound`] when no threshold in \[0, 200\] has that
/// average.
///
/// # Examples
/// ```
/// use mass_cpd::run_length::{Sides, threshold_for_average};
///
/// let h = threshold_for_average(0.5, 930.89, Sides::One)?;
/// assert!((h - 5.0).abs() < 1e-4);
/// # Ok::<(), mass_cpd::CpdError>(())
/// ```
pub fn threshold_for_average(k: f64, average: f64, sides: Sides) -> Result<f64, CpdError> {
    check_chart(k, 0.0, 0.0)?;
    // Longer than any stream.
    require(
        (1.0..=1e13).contains(&average),
        "average",
        average,
        "in [1, 10^13]",
    )?;
    let target = average * sides.number();
    bisect(|h| Ok(RunLength::new(k, h, 0.0)?.average() >= target))
}

/// The least `h` at which `reached` holds, for a condition that holds from some `h` on. Brackets from below, since
/// the work grows with `h`.
pub(super) fn bisect(reached: impl Fn(f64) -> Result<bool, CpdError>) -> Result<f64, CpdError> {
    const WHAT: CpdError = CpdError::NotFound {
        what: "threshold with the wanted false-alarm rate",
    };
    if reached(0.0)? {
        return Ok(0.0);
    }
    let (mut low, mut high) = (0.0, 2.0);
    while !reached(high)? {
        if high >= H_MAX {
            return Err(WHAT);
        }
        low = high;
        high = (high * 1.5).min(H_MAX);
    }
    while high - low > 1e-9 * high {
        let middle = 0.5 * (low + high);
        if reached(middle)? {
            high = middle;
        } else {
            low = middle;
        }
    }
    Ok(high)
}

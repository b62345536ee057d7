//! From a prediction error to a standard normal score.

/// Below this share of the stream's mean square a residual variance is rounding noise, not spread.
pub(crate) const ROUNDING: f64 = 1e-26;

/// Below this share of a sum of squares what a regression leaves of it is rounding noise.
pub(crate) const SPENT: f64 = 1e-13;

/// Natural logarithm of a positive normal number, to the last digit or two.
///
/// Written out, so that a loop over streams can be vectorised; the library's logarithm is a call. The method is
/// fdlibm's: `x = m 2^e` with `m = 1 + f` in `[sqrt(1/2), sqrt(2))`, then with `s = f / (2 + f)` a minimax polynomial
/// for `log(1 + s) - log(1 - s)`.
#[inline(always)]
pub(crate) fn ln(x: f64) -> f64 {
    const SQRT_HALF: u64 = 0x3fe6_a09e_667f_3bcd;
    let bits = x.to_bits().wrapping_sub(SQRT_HALF);
    // The exponent as a float without an integer conversion, which has no vector form before AVX-512: its
    // (biased) value is written into the mantissa of 2^52.
    let biased = (bits >> 52).wrapping_add(2048) & 0xfff;
    let exponent =
        f64::from_bits(0x4330_0000_0000_0000 | biased) - (4_503_599_627_370_496.0 + 2048.0);
    let f = f64::from_bits((bits & 0x000f_ffff_ffff_ffff).wrapping_add(SQRT_HALF)) - 1.0;
    let s = f / (2.0 + f);
    let z = s * s;
    let w = z * z;
    let even = w * (0.3999999999940942 + w * (0.22222198432149784 + w * 0.15313837699209373));
    let odd = z
        * (0.6666666666666735
            + w * (0.2857142874366239 + w * (0.1818357216161805 + w * 0.14798198605116586)));
    let half = 0.5 * f * f;
    let low = s * (half + even + odd) + exponent * 1.9082149292705877e-10;
    exponent * 0.6931471803691238 - ((half - low) - f)
}

/// Beyond this `t^2 / dof` the short form of the score is not exact enough.
pub(crate) const FAR: f64 = 0.5;

/// A prediction error, on its way to a score.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Judged {
    /// `t^2 / dof` of the Student ratio, or zero where there is no spread to measure it in.
    pub(crate) ratio: f64,
    pub(crate) dof: f64,
    /// `2 / (8 dof + 3)`
    pub(crate) shrink: f64,
    /// The error, times `unit`.
    pub(crate) error: f64,
    pub(crate) unit: f64,
    /// Residual sum of squares of the reference, times `unit`.
    pub(crate) rest: f64,
    /// Variance of the error of prediction, in variances of the reference, times `per`.
    pub(crate) leverage: f64,
    pub(crate) per: f64,
}

impl Judged {
    pub(crate) const NONE: Self = Self {
        ratio: 0.0,
        dof: 1.0,
        shrink: 0.0,
        error: 0.0,
        unit: 1.0,
        rest: 0.0,
        leverage: 1.0,
        per: 1.0,
    };

    /// The score, the observation `y` as it is to be learned, and what its spread adds to the reference's sum of squares beyond that.
    ///
    /// A robust filter's cleaner (Martin & Thomson 1982): an observation whose score is over `limit` is learned as the one
    /// whose score is `limit`. So no jump can explain itself through the autoregression or raise the level by itself. The sum of
    /// squares takes in the whole error, but is at most doubled by one observation: heavy tails are part of the spread.
    pub(crate) fn clean(&self, y: f64, limit: f64) -> (f64, f64, f64) {
        let z = self.score();
        if z.abs() <= limit {
            return (z, y, 0.0);
        }
        let t = limit / (1.0 - self.shrink);
        let highest = (t * t / self.dof).exp_m1();
        let excess = self.error / self.unit * (1.0 - (highest / self.ratio).sqrt());
        let extra = self.rest / self.unit * (self.ratio.min(1.0) - highest).max(0.0);
        (z, y - excess, extra)
    }

    /// Whether a prediction from a predecessor so far off means anything, after `n` observations: a coefficient that is good to
    /// `1 / sqrt(n)` says nothing of one that is off by `n` standard deviations.
    pub(crate) fn is_within_reach(&self, n: f64) -> bool {
        self.leverage <= n * n * self.per
    }

    /// The same error, if `more` variances of the reference are added to that of the prediction.
    pub(crate) fn with_more_variance(&self, more: f64) -> Self {
        let leverage = self.leverage + more * self.per;
        Self {
            ratio: self.ratio * self.leverage / leverage,
            leverage,
            ..*self
        }
    }

    /// The same of the observation `y`, by this prediction instead.
    pub(crate) fn predicted_as(&self, y: f64, prediction: f64) -> Self {
        let error = (y - prediction) * self.unit;
        let part = error / self.error;
        Self {
            ratio: self.ratio * (part * part),
            error,
            ..*self
        }
    }

    /// The same, if the prediction goes no further than the observation `y`, the level, and its
    /// predecessor `previous`.
    pub(crate) fn within(&self, y: f64, previous: f64, (level, slope): (f64, f64)) -> Self {
        let prediction = y - self.error / self.unit;
        // Where the line has led the predecessor since.
        let previous = previous + slope;
        let nearest = prediction
            .max(y.min(level).min(previous))
            .min(y.max(level).max(previous));
        if nearest == prediction {
            *self
        } else {
            self.predicted_as(y, nearest)
        }
    }

    /// The standard normal score.
    ///
    /// # Formula
    /// Wallace (1959): `(8 n + 1) / (8 n + 3) * sqrt(n ln(1 + t^2 / n))`, within a fraction `0.7 / n^2` of the exact
    /// score.
    #[inline(always)]
    pub(crate) fn score(&self) -> f64 {
        if self.ratio < FAR {
            self.near()
        } else {
            self.far()
        }
    }

    /// The score where `ratio < FAR`: with `sqrt(ln(1 + u) / u)` by a polynomial, which is exact to 1e-9 and
    /// costs neither a logarithm nor a division.
    #[inline(always)]
    pub(crate) fn near(&self) -> f64 {
        let u = self.ratio;
        let u2 = u * u;
        let low = (C0 + C1 * u) + (C2 + C3 * u) * u2;
        let high = (C4 + C5 * u) + (C6 + C7 * u) * u2;
        let size = (1.0 - self.shrink) * (low + high * (u2 * u2));
        (size * (self.dof * u).sqrt()).copysign(self.error)
    }

    /// The score anywhere.
    #[inline(always)]
    pub(crate) fn far(&self) -> f64 {
        ((1.0 - self.shrink) * (self.dof * ln(1.0 + self.ratio)).sqrt()).copysign(self.error)
    }
}

// Chebyshev interpolant of sqrt(ln(1 + u) / u) on [0, 1/2].
const C0: f64 = 0.9999999991374042;
const C1: f64 = -0.24999977843017812;
const C2: f64 = 0.1354072005847166;
const C3: f64 = -0.09098925754491205;
const C4: f64 = 0.06674334521710534;
const C5: f64 = -0.04787829752467587;
const C6: f64 = 0.027517657883436186;
const C7: f64 = -0.008555604610592127;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use statrs::distribution::{ContinuousCDF, StudentsT};

    use super::{FAR, Judged, ln};
    use crate::normal;

    proptest! {
        #[test]
        fn logarithm_agrees_with_the_library(power in -300.0..300.0f64) {
            let x = 10f64.powf(power);
            prop_assert!((ln(x) - x.ln()).abs() <= 1e-15 * x.ln().abs().max(1.0), "{} {}", ln(x), x.ln());
        }

        #[test]
        fn score_has_the_tail_of_student_s_t(t in 0.01..6.0f64, dof in 5.0..2000.0f64) {
            let tail = StudentsT::new(0.0, 1.0, dof).unwrap().sf(t);
            let judged = |ratio| Judged { ratio, dof, shrink: 2.0 / (8.0 * dof + 3.0), error: t, ..Judged::NONE };
            let z = judged(t * t / dof).score();
            // d ln(1 - Phi(z)) = -(z + ..) dz, and the last term is what the reference itself is good for.
            let bound = 0.7 / (dof * dof) * z * (z + 1.0) * 1.2 + 1e-7;
            prop_assert!((normal::survival(z) / tail - 1.0).abs() <= bound, "{z}");
            let u = FAR * t / 6.0;
            prop_assert!((judged(u).near() / judged(u).far() - 1.0).abs() <= 1e-9);
        }
    }
}

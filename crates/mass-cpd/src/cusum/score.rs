//! From a prediction error to a standard normal score.

/// Below this share of the stream's mean square a residual variance is rounding noise, not spread.
pub(crate) const ROUNDING: f64 = 1e-26;

/// Natural logarithm of a positive normal number, to about 1e-15.
///
/// Written out, so that a loop over streams can be vectorised; the library's logarithm is a call. The
/// number is split into `m 2^e` with `m` in `[sqrt(1/2), sqrt(2))`, and `ln m = 2 atanh((m - 1) / (m + 1))`.
#[inline(always)]
pub(crate) fn ln(x: f64) -> f64 {
    const SQRT_HALF: u64 = 0x3fe6_a09e_667f_3bcd;
    const ONE: u64 = 0x3ff0_0000_0000_0000;
    let bits = x.to_bits().wrapping_sub(SQRT_HALF);
    // The exponent as a float without an integer conversion, which has no vector form before AVX-512: its
    // (biased) value is written into the mantissa of 2^52.
    let biased = (bits >> 52).wrapping_add(2048) & 0xfff;
    let exponent =
        f64::from_bits(0x4330_0000_0000_0000 | biased) - (4_503_599_627_370_496.0 + 2048.0);
    let mantissa = f64::from_bits((bits & 0x000f_ffff_ffff_ffff).wrapping_add(SQRT_HALF));
    debug_assert!(x < f64::MIN_POSITIVE || mantissa.to_bits() >> 52 >= (ONE >> 52) - 1);
    let s = (mantissa - 1.0) / (mantissa + 1.0);
    let q = s * s;
    let series = 1.0 / 21.0;
    let series = series * q + 1.0 / 19.0;
    let series = series * q + 1.0 / 17.0;
    let series = series * q + 1.0 / 15.0;
    let series = series * q + 1.0 / 13.0;
    let series = series * q + 1.0 / 11.0;
    let series = series * q + 1.0 / 9.0;
    let series = series * q + 1.0 / 7.0;
    let series = series * q + 1.0 / 5.0;
    let series = series * q + 1.0 / 3.0;
    exponent * std::f64::consts::LN_2 + (2.0 * s + 2.0 * s * q * series)
}

/// The standard normal score of a Student ratio with `dof` degrees of freedom, given
/// `ratio = t^2 / dof`, and the sign of `error`.
///
/// # Formula
/// Wallace (1959): `(8 n + 1) / (8 n + 3) * sqrt(n ln(1 + t^2 / n))`, within `0.02 / sqrt(n)` of the exact score.
#[inline(always)]
pub(crate) fn normal_score(error: f64, ratio: f64, dof: f64) -> f64 {
    let z = (1.0 - 2.0 / (8.0 * dof + 3.0)) * (dof * ln(1.0 + ratio)).sqrt();
    if error < 0.0 { -z } else { z }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use statrs::distribution::{ContinuousCDF, Normal, StudentsT};

    use super::{ln, normal_score};

    proptest! {
        #[test]
        fn logarithm_agrees_with_the_library(power in -300.0..300.0f64) {
            let x = 10f64.powf(power);
            prop_assert!((ln(x) - x.ln()).abs() <= 1e-15 * x.ln().abs().max(1.0), "{} {}", ln(x), x.ln());
        }

        #[test]
        fn score_has_the_tail_of_student_s_t(t in 0.0..6.0f64, dof in 5.0..2000.0f64) {
            let tail = StudentsT::new(0.0, 1.0, dof).unwrap().sf(t);
            let exact = -Normal::standard().inverse_cdf(tail);
            let got = normal_score(t, t * t / dof, dof);
            prop_assert!((got - exact).abs() <= 0.02 / dof.sqrt() + 1e-6, "{got} {exact}");
            prop_assert_eq!(normal_score(-t, t * t / dof, dof).abs(), got);
        }
    }
}

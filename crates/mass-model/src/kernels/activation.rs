//! Activation functions of the expert feed-forward network, with their derivatives.

use serde::{Deserialize, Serialize};

use super::vector::{erf, exp, tanh};

/// The nonlinearity between the two matrices of a feed-forward network.
///
/// | name | formula |
/// |---|---|
/// | `Relu` | max(0, x) |
/// | `GeluErf` | x/2 (1 + erf(x/√2)) |
/// | `GeluTanh` | x/2 (1 + tanh(√(2/π) (x + 0.044715 x³))) |
/// | `Silu` | x / (1 + e⁻ˣ) |
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// max(0, x)
    Relu,
    /// Gaussian error linear unit with the error function.
    GeluErf,
    /// Its tanh approximation.
    GeluTanh,
    /// Sigmoid linear unit, also called swish.
    Silu,
}

#[cfg(feature = "cuda")]
impl From<Activation> for mass_cuda::kernels::Activation {
    fn from(activation: Activation) -> Self {
        match activation {
            Activation::Relu => Self::Relu,
            Activation::GeluErf => Self::GeluErf,
            Activation::GeluTanh => Self::GeluTanh,
            Activation::Silu => Self::Silu,
        }
    }
}

impl Activation {
    /// Replaces `pre` by its activation.
    #[inline(always)]
    pub(crate) fn apply(self, pre: &mut [f32]) {
        match self {
            Self::Relu => each_value(pre, relu),
            Self::GeluErf => each_value(pre, gelu_erf),
            Self::GeluTanh => each_value(pre, gelu_tanh),
            Self::Silu => each_value(pre, silu),
        }
    }

    /// Replaces `pre` by its activation and writes the derivative at each element to `slope`.
    #[inline(always)]
    pub(crate) fn apply_with_slope(self, pre: &mut [f32], slope: &mut [f32]) {
        match self {
            Self::Relu => each(pre, slope, relu),
            Self::GeluErf => each(pre, slope, gelu_erf),
            Self::GeluTanh => each(pre, slope, gelu_tanh),
            Self::Silu => each(pre, slope, silu),
        }
    }
}

#[inline(always)]
fn each(pre: &mut [f32], slope: &mut [f32], f: impl Fn(f32) -> (f32, f32)) {
    for (x, s) in pre.iter_mut().zip(slope) {
        (*x, *s) = f(*x);
    }
}

#[inline(always)]
fn each_value(pre: &mut [f32], f: impl Fn(f32) -> (f32, f32)) {
    for x in pre {
        *x = f(*x).0;
    }
}

#[inline(always)]
fn relu(x: f32) -> (f32, f32) {
    // So that NaN stays NaN.
    if x <= 0.0 { (0.0, 0.0) } else { (x, 1.0) }
}

/// The largest argument that slopes of GELU are computed with: beyond it the product with what is as good as zero there would not be.
const FAR: f32 = 1e6;

#[inline(always)]
fn gelu_erf(x: f32) -> (f32, f32) {
    const INV_SQRT_2PI: f32 = 0.398_942_3;
    let cdf = 0.5 * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2));
    // Far out, neither the density nor its product with x may become subnormal: each such operation takes a hundred cycles.
    let density = INV_SQRT_2PI * exp((-0.5 * x * x).max(-80.0));
    (x * cdf, cdf + x.clamp(-FAR, FAR) * density)
}

#[inline(always)]
fn gelu_tanh(x: f32) -> (f32, f32) {
    const SQRT_2_OVER_PI: f32 = 0.797_884_6;
    const CUBIC: f32 = 0.044_715;
    let t = tanh(SQRT_2_OVER_PI * (x + CUBIC * x * x * x));
    let near = x.clamp(-FAR, FAR);
    let inner_slope = SQRT_2_OVER_PI * (1.0 + 3.0 * CUBIC * near * near);
    (
        0.5 * x * (1.0 + t),
        0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner_slope,
    )
}

#[inline(always)]
fn silu(x: f32) -> (f32, f32) {
    // Where the sigmoid would become subnormal, it stops.
    let s = 1.0 / (1.0 + exp((-x).min(80.0)));
    (x * s, s * (1.0 + x * (1.0 - s)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_activation_makes_a_number_of_nan() {
        for act in [
            Activation::Relu,
            Activation::GeluErf,
            Activation::GeluTanh,
            Activation::Silu,
        ] {
            let (mut y, mut z, mut slope) = ([f32::NAN; 20], [f32::NAN; 20], [0.0; 20]);
            act.apply(&mut y);
            act.apply_with_slope(&mut z, &mut slope);
            assert!(y.iter().chain(&z).all(|x| x.is_nan()), "{act:?}");
        }
        // Backward, the slope of a ReLU is that of PyTorch's: one at NaN, zero at zero.
        assert_eq!([f32::NAN, 0.0, 1.0].map(|x| relu(x).1), [1.0, 0.0, 1.0]);
    }

    #[test]
    fn slopes_far_out_are_those_of_the_asymptotes() {
        for act in [Activation::Relu, Activation::GeluErf, Activation::GeluTanh] {
            for x in [30.0, 1e6, 1e13, 6e19, 1e34, f32::MAX] {
                let (mut y, mut slope) = ([x, -x], [0.0; 2]);
                act.apply_with_slope(&mut y, &mut slope);
                for (found, wanted) in [
                    (y[0] / x, 1.0),
                    (y[1] / x, 0.0),
                    (slope[0], 1.0),
                    (slope[1], 0.0),
                ] {
                    assert!(
                        (found - wanted).abs() < 1e-6,
                        "{act:?} at {x}: {y:?}, {slope:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn slopes_agree_with_central_differences() {
        for act in [
            Activation::Relu,
            Activation::GeluErf,
            Activation::GeluTanh,
            Activation::Silu,
        ] {
            for i in -60..60 {
                let x = i as f32 * 0.1 + 0.05;
                let value = |x: f32| {
                    let mut y = [x];
                    act.apply_with_slope(&mut y, &mut [0.0]);
                    y[0]
                };
                let (mut y, mut s) = ([x], [0.0]);
                act.apply_with_slope(&mut y, &mut s);
                assert_eq!(y[0], value(x));
                let h = 0.02;
                let numeric = (value(x + h) - value(x - h)) / (2.0 * h);
                assert!(
                    (numeric - s[0]).abs() < 1e-3,
                    "{act:?} at {x}: {numeric} against {}",
                    s[0]
                );
            }
        }
    }
}

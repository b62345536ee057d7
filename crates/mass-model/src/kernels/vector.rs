//! Vector primitives that the compiler can turn into SIMD code: exponential, error function, reductions.

/// Lanes of the running sums in a reduction: wide enough for two AVX-512 registers.
const LANES: usize = 32;

/// The value, or zero where it is subnormal (under about 1.2e-38): on x86-64 a vector instruction that meets one such number takes
/// some hundred times as long. What decays or is a probability comes there by itself, and stays.
#[inline(always)]
pub fn flush(x: f32) -> f32 {
    if x.abs() < f32::MIN_POSITIVE { 0.0 } else { x }
}

/// A probability, or zero where it is under 2^-100: beside the largest of its row it is nothing, and its products with gradients
/// would be subnormal.
#[inline(always)]
pub fn probability(p: f32) -> f32 {
    const LEAST: f32 = 1.0 / (1u128 << 100) as f32;
    if p < LEAST { 0.0 } else { p }
}

/// `e^x` for finite `x`, relative error under 2e-7; results under about 1e-38 are flushed up to that value.
///
/// Cody-Waite range reduction and a degree-6 polynomial, without a branch, so that a loop over it vectorises.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to the nearest integer
    let x = x.clamp(-87.336_54, 88.376_26);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let poly = 1.987_569_1e-4;
    let poly = poly * r + 1.398_199_9e-3;
    let poly = poly * r + 8.333_452e-3;
    let poly = poly * r + 4.166_579_6e-2;
    let poly = poly * r + 1.666_666_5e-1;
    let poly = poly * r + 0.5;
    let poly = poly * r * r + r + 1.0;
    // The low bits of `shifted` hold n; move it into the exponent.
    let exponent = shifted
        .to_bits()
        .wrapping_sub(ROUND.to_bits())
        .wrapping_add(127)
        << 23;
    poly * f32::from_bits(exponent)
}

/// The error function, absolute error under 4e-7: a rational approximation on `|x| <= 4`, one beyond it.
#[inline(always)]
pub fn erf(x: f32) -> f32 {
    let x = x.clamp(-4.0, 4.0);
    let x2 = x * x;
    let p = -2.726_142_4e-10;
    let p = p * x2 + 2.770_681_4e-8;
    let p = p * x2 + -2.101_024e-6;
    let p = p * x2 + -5.692_506_4e-5;
    let p = p * x2 + -7.349_906_6e-4;
    let p = p * x2 + -2.954_6e-3;
    let p = p * x2 + -1.609_603_3e-2;
    let q = -1.456_607_2e-5;
    let q = q * x2 + -2.133_740_6e-4;
    let q = q * x2 + -1.682_827e-3;
    let q = q * x2 + -7.373_329_2e-3;
    let q = q * x2 + -1.426_473_9e-2;
    x * p / q
}

/// The hyperbolic tangent by way of [`exp`], absolute error under 2e-7.
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    1.0 - 2.0 / (1.0 + exp(2.0 * x))
}

/// Inner product; the order of the sum depends on the length alone.
#[inline(always)]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (mut xs, mut ys) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    for (x, y) in (&mut xs).zip(&mut ys) {
        for i in 0..LANES {
            lanes[i] += x[i] * y[i];
        }
    }
    let mut total = fold(lanes);
    for (x, y) in xs.remainder().iter().zip(ys.remainder()) {
        total += x * y;
    }
    total
}

/// Sum of the elements; the order of the sum depends on the length alone.
#[inline(always)]
pub fn sum(a: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let mut xs = a.chunks_exact(LANES);
    for x in &mut xs {
        for i in 0..LANES {
            lanes[i] += x[i];
        }
    }
    let mut total = fold(lanes);
    for x in xs.remainder() {
        total += x;
    }
    total
}

/// `y += scale * x`.
#[inline(always)]
pub fn axpy(scale: f32, x: &[f32], y: &mut [f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += scale * x;
    }
}

/// `y += x`.
#[inline(always)]
pub fn add_assign(y: &mut [f32], x: &[f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += x;
    }
}

/// `y *= x`.
#[inline(always)]
pub fn mul_assign(y: &mut [f32], x: &[f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y *= x;
    }
}

/// Replaces a row of logits by its softmax and returns the maximum and the sum of the exponentials of what is above it.
#[inline(always)]
pub fn softmax_in_place(row: &mut [f32]) -> (f32, f32) {
    let mut max = f32::NEG_INFINITY;
    for &x in row.iter() {
        max = if x > max { x } else { max };
    }
    for x in row.iter_mut() {
        *x = exp(*x - max);
    }
    let total = sum(row);
    let inverse = 1.0 / total;
    for x in row.iter_mut() {
        *x = probability(*x * inverse);
    }
    (max, total)
}

#[inline(always)]
fn fold(lanes: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    let mut lanes = lanes;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_to_the_standard_library() {
        let mut worst = 0.0f64;
        for i in -870_000..=880_000 {
            let x = i as f32 * 1e-4;
            let exact = f64::from(x).exp();
            worst = worst.max(((f64::from(exp(x)) - exact) / exact).abs());
        }
        assert!(worst < 2e-7, "relative error {worst:e}");
        assert!(exp(-1e4) < 1e-37 && exp(-1e4) >= 0.0);
    }

    #[test]
    fn subnormal_numbers_and_no_others_are_flushed() {
        let least = f32::MIN_POSITIVE;
        for x in [1.0, least, -least, f32::MAX, f32::INFINITY] {
            assert_eq!(flush(x), x);
        }
        for x in [least / 2.0, -least / 2.0, f32::from_bits(1), 0.0] {
            assert_eq!(flush(x), 0.0);
        }
        assert!(flush(f32::NAN).is_nan());
        let mut far = [0.0, -60.0, -80.0, -87.3, -1e3];
        softmax_in_place(&mut far);
        assert!(
            (far[1].ln() + 60.0).abs() < 1e-3 && far[2..] == [0.0; 3],
            "{far:?}"
        );
    }

    #[test]
    fn erf_and_tanh_are_close_to_references() {
        // erf by its Taylor series in f64, which converges everywhere on the tested range.
        let erf_exact = |x: f64| {
            let (mut term, mut total, mut n) = (x, x, 0.0);
            while term.abs() > 1e-18 {
                n += 1.0;
                term *= -x * x / n;
                total += term / (2.0 * n + 1.0);
            }
            total * 2.0 / std::f64::consts::PI.sqrt()
        };
        let (mut worst_erf, mut worst_tanh) = (0.0f64, 0.0f64);
        for i in -3500..=3500 {
            let x = i as f32 * 1e-3;
            worst_erf = worst_erf.max((f64::from(erf(x)) - erf_exact(f64::from(x))).abs());
            worst_tanh = worst_tanh.max((f64::from(tanh(x)) - f64::from(x).tanh()).abs());
        }
        assert!(worst_erf < 4e-7, "erf error {worst_erf:e}");
        assert!(worst_tanh < 2e-7, "tanh error {worst_tanh:e}");
        assert!((erf(50.0) - 1.0).abs() < 4e-7 && (tanh(50.0) - 1.0).abs() < 1e-7);
    }

    #[test]
    fn reductions_agree_with_plain_loops() {
        for n in [0, 1, 31, 32, 33, 100, 1000] {
            let a: Vec<f32> = (0..n).map(|i| (i as f32 * 0.37).sin()).collect();
            let b: Vec<f32> = (0..n).map(|i| (i as f32 * 0.11).cos()).collect();
            let exact: f64 = a
                .iter()
                .zip(&b)
                .map(|(x, y)| f64::from(*x) * f64::from(*y))
                .sum();
            assert!((f64::from(dot(&a, &b)) - exact).abs() < 1e-4);
            let exact: f64 = a.iter().map(|x| f64::from(*x)).sum();
            assert!((f64::from(sum(&a)) - exact).abs() < 1e-4);
        }
    }
}

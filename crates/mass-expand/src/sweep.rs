//! Single sweeps over memory, compiled for every instruction set and chosen at run time.
//!
//! Sums are kept in `f64`: the product of two `f32` is exact there and cannot overflow, so a sum is not finite exactly
//! when an input is not. Sixteen independent lanes hide the latency of the additions; the order of summation is fixed by
//! the lanes and not by the instruction set, so every machine gets the same bits.

use pulp::Arch;

const LANES: usize = 16;

/// `(a.a, a.b, b.b)` in one sweep.
pub(crate) fn moments(a: &[f32], b: &[f32]) -> (f64, f64, f64) {
    Arch::new().dispatch(
        #[inline(always)]
        || moments_kernel(a, b),
    )
}

/// `b <- coefficient * a`.
pub(crate) fn write_scaled(a: &[f32], coefficient: f64, b: &mut [f32]) {
    Arch::new().dispatch(
        #[inline(always)]
        || scale_kernel(a, coefficient, b),
    );
}

/// `a . b`.
pub(crate) fn dot(a: &[f32], b: &[f64]) -> f64 {
    Arch::new().dispatch(
        #[inline(always)]
        || {
            let mut sum = [0.0f64; LANES];
            let (a_blocks, a_rest) = a.as_chunks::<LANES>();
            let (b_blocks, b_rest) = b.as_chunks::<LANES>();
            for (x, y) in a_blocks.iter().zip(b_blocks) {
                for lane in 0..LANES {
                    sum[lane] += f64::from(x[lane]) * y[lane];
                }
            }
            for (lane, (&x, &y)) in a_rest.iter().zip(b_rest).enumerate() {
                sum[lane] += f64::from(x) * y;
            }
            fold(sum)
        },
    )
}

/// `b += coefficient * a`.
pub(crate) fn accumulate(a: &[f32], coefficient: f64, b: &mut [f64]) {
    Arch::new().dispatch(
        #[inline(always)]
        || {
            for (target, &x) in b.iter_mut().zip(a) {
                *target += coefficient * f64::from(x);
            }
        },
    );
}

/// Runs a whole-matrix sweep under one dispatch, so that short rows do not pay for one each.
pub(crate) fn dispatch<R>(sweep: impl FnOnce() -> R) -> R {
    Arch::new().dispatch(sweep)
}

#[inline(always)]
pub(crate) fn moments_kernel(a: &[f32], b: &[f32]) -> (f64, f64, f64) {
    let (mut aa, mut ab, mut bb) = ([0.0f64; LANES], [0.0f64; LANES], [0.0f64; LANES]);
    let (a_blocks, a_rest) = a.as_chunks::<LANES>();
    let (b_blocks, b_rest) = b.as_chunks::<LANES>();
    for (x, y) in a_blocks.iter().zip(b_blocks) {
        for lane in 0..LANES {
            let (x, y) = (f64::from(x[lane]), f64::from(y[lane]));
            aa[lane] += x * x;
            ab[lane] += x * y;
            bb[lane] += y * y;
        }
    }
    for (lane, (&x, &y)) in a_rest.iter().zip(b_rest).enumerate() {
        let (x, y) = (f64::from(x), f64::from(y));
        aa[lane] += x * x;
        ab[lane] += x * y;
        bb[lane] += y * y;
    }
    (fold(aa), fold(ab), fold(bb))
}

#[inline(always)]
pub(crate) fn scale_kernel(a: &[f32], coefficient: f64, b: &mut [f32]) {
    for (target, &x) in b.iter_mut().zip(a) {
        *target = (coefficient * f64::from(x)) as f32;
    }
}

#[inline(always)]
fn fold(mut lanes: [f64; LANES]) -> f64 {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}

//! Single sweeps over memory, compiled for every instruction set and chosen at run time.
//!
//! Sums run in `f32` over blocks short enough to lose nothing that matters, on independent lanes that hide the latency of
//! the additions, and across blocks in `f64`. A block whose sums leave the range in which `f32` squares are sound (very
//! large, very small or not finite) is summed again in `f64`, where the product of two `f32` is exact and cannot
//! overflow: a result is not finite exactly when an input is not. The order of summation is fixed by the lanes and not
//! by the instruction set, and nothing is contracted, so every machine gets the same bits.

use pulp::Arch;

const LANES: usize = 32;

/// Elements summed in `f32`: 128 additions a lane.
const BLOCK: usize = 4096;

/// Elements written forwards at a time in a sweep that runs backwards.
const STRIDE: usize = 1024;

/// Sums of squares between these are sound in `f32`: what underflowed in them is below one part in 10^10.
const SOUND: std::ops::Range<f32> = 1e-24..1e38;

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
        || {
            // Forwards: a whole matrix is too large for its end to be worth the turn.
            for (a, b) in a.chunks(STRIDE).zip(b.chunks_mut(STRIDE)) {
                scale_kernel(a, coefficient, b);
            }
        },
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
    let mut total = (0.0, 0.0, 0.0);
    for (a, b) in a.chunks(BLOCK).zip(b.chunks(BLOCK)) {
        let (aa, ab, bb) = block_moments(a, b);
        total = (total.0 + aa, total.1 + ab, total.2 + bb);
    }
    total
}

#[inline(always)]
fn block_moments(a: &[f32], b: &[f32]) -> (f64, f64, f64) {
    let (mut aa, mut ab, mut bb) = ([0.0f32; LANES], [0.0f32; LANES], [0.0f32; LANES]);
    let (a_blocks, a_rest) = a.as_chunks::<LANES>();
    let (b_blocks, b_rest) = b.as_chunks::<LANES>();
    for (x, y) in a_blocks.iter().zip(b_blocks) {
        for lane in 0..LANES {
            aa[lane] += x[lane] * x[lane];
            ab[lane] += x[lane] * y[lane];
            bb[lane] += y[lane] * y[lane];
        }
    }
    for (lane, (&x, &y)) in a_rest.iter().zip(b_rest).enumerate() {
        aa[lane] += x * x;
        ab[lane] += x * y;
        bb[lane] += y * y;
    }
    let (aa, ab, bb) = (fold(aa), fold(ab), fold(bb));
    if SOUND.contains(&aa) && SOUND.contains(&bb) {
        (f64::from(aa), f64::from(ab), f64::from(bb))
    } else {
        exact_moments(a, b)
    }
}

/// `(a.b, b.b)`: two sums instead of three, for the coefficient of a projection. Not finite exactly when an input is not.
#[inline(always)]
pub(crate) fn projection_kernel(a: &[f32], b: &[f32]) -> (f64, f64) {
    let mut total = (0.0, 0.0);
    for (a, b) in a.chunks(BLOCK).zip(b.chunks(BLOCK)) {
        let (ab, bb) = block_projection(a, b);
        total = (total.0 + ab, total.1 + bb);
    }
    total
}

#[inline(always)]
fn block_projection(a: &[f32], b: &[f32]) -> (f64, f64) {
    let (mut ab, mut bb) = ([0.0f32; LANES], [0.0f32; LANES]);
    let (a_blocks, a_rest) = a.as_chunks::<LANES>();
    let (b_blocks, b_rest) = b.as_chunks::<LANES>();
    for (x, y) in a_blocks.iter().zip(b_blocks) {
        for lane in 0..LANES {
            ab[lane] += x[lane] * y[lane];
            bb[lane] += y[lane] * y[lane];
        }
    }
    for (lane, (&x, &y)) in a_rest.iter().zip(b_rest).enumerate() {
        ab[lane] += x * y;
        bb[lane] += y * y;
    }
    sound_projection(ab, bb, a, b)
}

#[inline(always)]
fn sound_projection(ab: [f32; LANES], bb: [f32; LANES], a: &[f32], b: &[f32]) -> (f64, f64) {
    let (ab, bb) = (fold(ab), fold(bb));
    if SOUND.contains(&ab.abs()) && SOUND.contains(&bb) {
        (f64::from(ab), f64::from(bb))
    } else {
        let (_, ab, bb) = exact_moments(a, b);
        (ab, bb)
    }
}

/// Out of line, so that the fast path stays small.
#[cold]
#[inline(never)]
fn exact_moments(a: &[f32], b: &[f32]) -> (f64, f64, f64) {
    let mut sums = (0.0, 0.0, 0.0);
    for (&x, &y) in a.iter().zip(b) {
        let (x, y) = (f64::from(x), f64::from(y));
        sums = (sums.0 + x * x, sums.1 + x * y, sums.2 + y * y);
    }
    sums
}

/// `b <- coefficient * a`, from the end: after a sweep for the sums the end is what the caches still hold.
#[inline(always)]
pub(crate) fn scale_kernel(a: &[f32], coefficient: f64, b: &mut [f32]) {
    let single = coefficient as f32;
    let in_range = (1e-30..1e30).contains(&single.abs());
    for (a, b) in a.chunks(STRIDE).zip(b.chunks_mut(STRIDE)).rev() {
        if in_range {
            for (target, &x) in b.iter_mut().zip(a) {
                *target = single * x;
            }
        } else {
            for (target, &x) in b.iter_mut().zip(a) {
                *target = (coefficient * f64::from(x)) as f32;
            }
        }
    }
}

#[inline(always)]
fn fold<T: Copy + std::ops::AddAssign>(mut lanes: [T; LANES]) -> T {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            let other = lanes[lane + width];
            lanes[lane] += other;
        }
        width /= 2;
    }
    lanes[0]
}

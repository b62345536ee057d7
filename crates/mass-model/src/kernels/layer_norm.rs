//! Layer normalisation over the last axis.

use rayon::prelude::*;

use super::gemm::Store;
use super::scratch::Scratch;
use super::{ROW_BLOCK, vector, vectorised};

/// `y = (x - mean) rstd ⊙ gamma + beta` for each row of `d`; `stats` receives (mean, rstd) of each row.
pub fn forward(x: &[f32], gamma: &[f32], beta: &[f32], eps: f32, y: &mut [f32], stats: &mut [f32]) {
    let d = gamma.len();
    y.par_chunks_mut(ROW_BLOCK * d)
        .zip(x.par_chunks(ROW_BLOCK * d))
        .zip(stats.par_chunks_mut(ROW_BLOCK * 2))
        .for_each(|((y, x), stats)| {
            vectorised(
                #[inline(always)]
                || {
                    for ((y, x), s) in y
                        .chunks_exact_mut(d)
                        .zip(x.chunks_exact(d))
                        .zip(stats.chunks_exact_mut(2))
                    {
                        let mean = vector::sum(x) / d as f32;
                        for (y, x) in y.iter_mut().zip(x) {
                            *y = x - mean;
                        }
                        let variance = vector::dot(y, y) / d as f32 + eps;
                        if !variance.is_finite() {
                            (s[0], s[1]) = large_row(x, eps, y);
                            affine(y, 1.0, gamma, beta);
                            continue;
                        }
                        let rstd = 1.0 / variance.sqrt();
                        affine(y, rstd, gamma, beta);
                        (s[0], s[1]) = (mean, rstd);
                    }
                },
            );
        });
}

/// `y = y rstd ⊙ gamma + beta`
#[inline(always)]
fn affine(y: &mut [f32], rstd: f32, gamma: &[f32], beta: &[f32]) {
    for ((y, g), b) in y.iter_mut().zip(gamma).zip(beta) {
        *y = *y * rstd * g + b;
    }
}

/// The least reciprocal standard deviation of a row whose differences from the mean are sure to be numbers in f32.
const LEAST_RSTD: f32 = 1e-30;

/// `y = (x - mean) rstd` of a row whose sum or squares f32 does not hold, in f64; returns mean and rstd.
#[cold]
fn large_row(x: &[f32], eps: f32, y: &mut [f32]) -> (f32, f32) {
    let mean_of = |sum: f64| sum / x.len() as f64;
    let mean = mean_of(x.iter().map(|&x| f64::from(x)).sum());
    let squares = x.iter().map(|&x| (f64::from(x) - mean).powi(2));
    let rstd = 1.0 / (mean_of(squares.sum()) + f64::from(eps)).sqrt();
    for (y, &x) in y.iter_mut().zip(x) {
        *y = ((f64::from(x) - mean) * rstd) as f32;
    }
    (mean as f32, rstd as f32)
}

/// Adds to `dgamma` and `dbeta` the gradients for an upstream gradient `dy`, and writes `dx` or adds to it.
pub fn backward(
    x: &[f32],
    gamma: &[f32],
    stats: &[f32],
    dy: &[f32],
    (dx, store): (&mut [f32], Store),
    dgamma: &mut [f32],
    dbeta: &mut [f32],
) {
    let d = gamma.len();
    let blocks = x.len().div_ceil(ROW_BLOCK * d);
    // Partial sums of each block, added up in block order: the same bits on any number of threads.
    let mut partial = Scratch::zeros(blocks * 2 * d);
    dx.par_chunks_mut(ROW_BLOCK * d)
        .zip(x.par_chunks(ROW_BLOCK * d))
        .zip(dy.par_chunks(ROW_BLOCK * d))
        .zip(stats.par_chunks(ROW_BLOCK * 2))
        .zip(partial.par_chunks_mut(2 * d))
        .for_each(|((((dx, x), dy), stats), partial)| {
            let sums = partial.split_at_mut(d);
            if stats.chunks_exact(2).any(|s| s[1] < LEAST_RSTD) {
                return large_rows_backward(x, gamma, stats, dy, (dx, store), sums);
            }
            rows_backward(x, gamma, stats, dy, (dx, store), sums);
        });
    for block in partial.chunks_exact(2 * d) {
        vector::add_assign(dgamma, &block[..d]);
        vector::add_assign(dbeta, &block[d..]);
    }
}

/// [`backward`] of some rows.
fn rows_backward(
    x: &[f32],
    gamma: &[f32],
    stats: &[f32],
    dy: &[f32],
    (dx, store): (&mut [f32], Store),
    (pg, pb): (&mut [f32], &mut [f32]),
) {
    let d = gamma.len();
    let mut normed = Scratch::take(d);
    let mut scaled = Scratch::take(d);
    vectorised(
        #[inline(always)]
        || {
            let rows = dx
                .chunks_exact_mut(d)
                .zip(x.chunks_exact(d))
                .zip(dy.chunks_exact(d));
            for (((dx, x), dy), s) in rows.zip(stats.chunks_exact(2)) {
                let (mean, rstd) = (s[0], s[1]);
                if store == Store::Replace {
                    dx.fill(0.0);
                }
                for i in 0..d {
                    normed[i] = (x[i] - mean) * rstd;
                    scaled[i] = dy[i] * gamma[i];
                    pg[i] += dy[i] * normed[i];
                    pb[i] += dy[i];
                }
                let a = vector::sum(&scaled) / d as f32;
                let b = vector::dot(&scaled, &normed) / d as f32;
                for i in 0..d {
                    dx[i] += rstd * (scaled[i] - a - normed[i] * b);
                }
            }
        },
    );
}

/// [`rows_backward`], where differences of some from their mean may be too large for f32: by way of what those are normalised to.
#[cold]
fn large_rows_backward(
    x: &[f32],
    gamma: &[f32],
    stats: &[f32],
    dy: &[f32],
    (dx, store): (&mut [f32], Store),
    (pg, pb): (&mut [f32], &mut [f32]),
) {
    let d = gamma.len();
    let (mut normed, mut d_normed) = (vec![0.0; d], vec![0.0; d]);
    let rows = dx.chunks_exact_mut(d).zip(x.chunks_exact(d));
    for (((dx, x), dy), s) in rows.zip(dy.chunks_exact(d)).zip(stats.chunks_exact(2)) {
        if s[1] < LEAST_RSTD {
            // The variance is so large that eps is nothing beside it.
            let (_, rstd) = large_row(x, 0.0, &mut normed);
            let given = (&mut d_normed[..], Store::Replace);
            rows_backward(&normed, gamma, &[0.0, 1.0], dy, given, (pg, pb));
            if store == Store::Replace {
                dx.fill(0.0);
            }
            vector::axpy(rstd, &d_normed, dx);
        } else {
            rows_backward(x, gamma, s, dy, (dx, store), (pg, pb));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows of which the mean, the squares or the differences from the mean are too large for f32, beside one of which none is.
    #[test]
    fn large_rows_are_normalised_as_small_ones() {
        let row = [1.0, -1.0, 0.25, 0.5];
        let of = |large: [f32; 4]| {
            let (mut y, mut stats, mut dx) = ([0.0; 8], [0.0; 4], [0.0; 8]);
            let (mut dgamma, mut dbeta) = ([0.0; 4], [0.0; 4]);
            let (x, gamma) = ([large, row].concat(), [2.0, 1.0, 0.5, -1.0]);
            forward(&x, &gamma, &[0.25; 4], 1e-12, &mut y, &mut stats);
            let given = (&mut dx[..], Store::Replace);
            let dy = [0.5, -3.0, 1.0, 2.0, 0.1, 0.7, -0.2, 0.4];
            backward(&x, &gamma, &stats, &dy, given, &mut dgamma, &mut dbeta);
            (y, dx, dgamma, dbeta)
        };
        let small = of(row);
        for scale in [1e3, 1e15, 1e19, 1e20, 1e29, 1e31, 3e38] {
            let mut found = of(row.map(|x| x * scale));
            assert_eq!(found.0[4..], small.0[4..]);
            assert_eq!((&found.1[4..], found.3), (&small.1[4..], small.3));
            found.1[..4].iter_mut().for_each(|dx| *dx *= scale);
            let close = |a: &f32, b: &f32| assert!((a - b).abs() < 1e-4, "{scale}: {a}, {b}");
            for (found, small) in [(found.0, small.0), (found.1, small.1)] {
                found.iter().zip(&small).for_each(|(a, b)| close(a, b));
            }
            found.2.iter().zip(&small.2).for_each(|(a, b)| close(a, b));
        }
        assert_eq!(of([3e38; 4]).0[..4], [0.25; 4]);
        for no_number in [f32::NAN, f32::INFINITY] {
            assert!(of([1e20, no_number, 0.0, 1.0]).0[0].is_nan());
        }
    }
}

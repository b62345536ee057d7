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
                        let rstd = 1.0 / (vector::dot(y, y) / d as f32 + eps).sqrt();
                        for ((y, g), b) in y.iter_mut().zip(gamma).zip(beta) {
                            *y = *y * rstd * g + b;
                        }
                        (s[0], s[1]) = (mean, rstd);
                    }
                },
            );
        });
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
            let (pg, pb) = partial.split_at_mut(d);
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
        });
    for block in partial.chunks_exact(2 * d) {
        vector::add_assign(dgamma, &block[..d]);
        vector::add_assign(dbeta, &block[d..]);
    }
}

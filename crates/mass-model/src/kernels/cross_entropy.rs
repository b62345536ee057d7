//! Softmax cross-entropy against class indices.

use rayon::prelude::*;

use super::gemm::Store;
use super::{ROW_BLOCK, vector, vectorised};

/// Replaces each row of `logits` (`classes` wide) by its softmax and writes `-ln p[target]` to `nll`.
pub fn forward(logits: &mut [f32], targets: &[u32], nll: &mut [f32], classes: usize) {
    logits
        .par_chunks_mut(ROW_BLOCK * classes)
        .zip(targets.par_chunks(ROW_BLOCK))
        .zip(nll.par_chunks_mut(ROW_BLOCK))
        .for_each(|((logits, targets), nll)| {
            vectorised(
                #[inline(always)]
                || {
                    for ((row, &target), nll) in
                        logits.chunks_exact_mut(classes).zip(targets).zip(nll)
                    {
                        let picked = row[target as usize];
                        let (max, total) = vector::softmax_in_place(row);
                        *nll = max + total.ln() - picked;
                    }
                },
            );
        });
}

/// `dlogits = scale (softmax - onehot(target))`, or the same added to it.
pub fn backward(
    probs: &[f32],
    targets: &[u32],
    scale: f32,
    (dlogits, store): (&mut [f32], Store),
    classes: usize,
) {
    dlogits
        .par_chunks_mut(ROW_BLOCK * classes)
        .zip(probs.par_chunks(ROW_BLOCK * classes))
        .zip(targets.par_chunks(ROW_BLOCK))
        .for_each(|((dlogits, probs), targets)| {
            vectorised(
                #[inline(always)]
                || {
                    let rows = dlogits
                        .chunks_exact_mut(classes)
                        .zip(probs.chunks_exact(classes));
                    for ((d, p), &target) in rows.zip(targets) {
                        if store == Store::Replace {
                            d.fill(0.0);
                        }
                        vector::axpy(scale, p, d);
                        d[target as usize] -= scale;
                    }
                },
            );
        });
}

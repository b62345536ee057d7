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
                        // A large maximum swallows the logarithm; where it is small, the order is that of the results there are.
                        *nll = match max.abs() < 1024.0 {
                            true => max + total.ln() - picked,
                            false => max - picked + total.ln(),
                        };
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
                        for (d, p) in d.iter_mut().zip(p) {
                            *d = vector::flush(*d + scale * p);
                        }
                        d[target as usize] -= scale;
                    }
                },
            );
        });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_logits_lose_nothing_of_the_loss() {
        let (half, third) = (2.0_f32.ln(), 3.0_f32.ln());
        for (mut logits, target, loss) in [
            (vec![1e8, 1e8], 0, half),
            (vec![-1e8, -1e8, -1e8], 2, third),
            (vec![1e30, 1e30, 0.0], 1, half),
            (vec![1e8, 0.0], 1, 1e8),
        ] {
            let (mut nll, classes) = ([0.0], logits.len());
            forward(&mut logits, &[target], &mut nll, classes);
            assert_eq!(nll, [loss]);
        }
    }

    #[test]
    fn probabilities_far_below_the_largest_leave_no_subnormal_numbers() {
        let classes = 7;
        let mut logits: Vec<f32> = (0..classes * 20).map(|i| -(i as f32) * 0.9).collect();
        let targets = vec![0; 20];
        let (mut nll, mut d) = (vec![0.0; 20], vec![0.0; logits.len()]);
        logits.iter_mut().step_by(classes).for_each(|x| *x = 20.0);
        forward(&mut logits, &targets, &mut nll, classes);
        backward(&logits, &targets, 1e-3, (&mut d, Store::Replace), classes);
        let mut all = logits.iter().chain(&d);
        assert!(!all.any(|x| x.is_subnormal()), "{d:?}");
        assert!(d.iter().any(|&x| x > 0.0 && x < 1e-25));
    }
}

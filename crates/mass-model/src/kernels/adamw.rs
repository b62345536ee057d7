//! One AdamW update over a parameter.

use rayon::prelude::*;

use super::{vector, vectorised};

/// Elements handled by one task.
const BLOCK: usize = 1 << 15;

/// The scalars of one update.
#[derive(Clone, Copy, Debug)]
pub struct AdamWStep {
    /// Learning rate.
    pub lr: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// 1 - beta1, not rounded twice.
    pub take1: f32,
    /// 1 - beta2, not rounded twice.
    pub take2: f32,
    /// Added to the denominator.
    pub eps: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// 1 - beta1^t
    pub bias1: f32,
    /// 1 - beta2^t
    pub bias2: f32,
    /// Factor on the gradient (clipping).
    pub gradient_scale: f32,
}

/// `m = β1 m + (1-β1) g`, `v = β2 v + (1-β2) g²`, `θ = θ (1 - lr λ) - lr (m/bias1) / (√(v/bias2) + ε)`.
pub fn update(theta: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], step: AdamWStep) {
    let AdamWStep {
        lr,
        beta1,
        beta2,
        take1,
        take2,
        eps,
        weight_decay,
        bias1,
        bias2,
        gradient_scale,
    } = step;
    let keep = 1.0 - lr * weight_decay;
    let rate = lr / bias1;
    let root = bias2.sqrt();
    theta
        .par_chunks_mut(BLOCK)
        .zip(g.par_chunks(BLOCK))
        .zip(m.par_chunks_mut(BLOCK))
        .zip(v.par_chunks_mut(BLOCK))
        .for_each(|(((theta, g), m), v)| {
            vectorised(
                #[inline(always)]
                || {
                    for (((theta, g), m), v) in
                        theta.iter_mut().zip(g).zip(m.iter_mut()).zip(v.iter_mut())
                    {
                        let g = g * gradient_scale;
                        // Moments of what has no gradient any more decay: rows of words that a text does not have.
                        *m = vector::flush(beta1 * *m + take1 * g);
                        *v = vector::flush(beta2 * *v + take2 * g * g);
                        *theta = *theta * keep - rate * *m / ((*v).sqrt() / root + eps);
                    }
                },
            );
        });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_that_decay_end_at_zero() {
        let step = AdamWStep {
            lr: 1e-3,
            beta1: 0.9,
            beta2: 0.9,
            take1: 0.1,
            take2: 0.1,
            eps: 1e-8,
            weight_decay: 0.0,
            bias1: 1.0,
            bias2: 1.0,
            gradient_scale: 1.0,
        };
        let (mut theta, mut m, mut v) = (vec![1.0; 40], vec![0.3; 40], vec![0.2; 40]);
        for _ in 0..1200 {
            update(&mut theta, &[0.0; 40], &mut m, &mut v, step);
            assert!(!m.iter().chain(&v).any(|x| x.is_subnormal()));
        }
        assert!(m.iter().chain(&v).all(|&x| x == 0.0));
    }
}

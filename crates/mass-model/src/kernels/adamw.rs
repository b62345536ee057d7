//! One AdamW update over a parameter.

use rayon::prelude::*;

use super::vectorised;

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
                        *m = beta1 * *m + take1 * g;
                        *v = beta2 * *v + take2 * g * g;
                        *theta = *theta * keep - rate * *m / ((*v).sqrt() / root + eps);
                    }
                },
            );
        });
}

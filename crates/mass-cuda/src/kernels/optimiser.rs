//! One AdamW update over any number of parameters.

use super::{given, halves, int, within};
use crate::driver::Arguments;
use crate::{Buffer, CudaError, Device, View, ViewMut};

/// The scalars of one update.
#[derive(Clone, Copy, Debug, PartialEq)]
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

/// A parameter's values, gradient and moments, and its step.
#[derive(Debug)]
pub struct Update<'a> {
    /// θ
    pub theta: ViewMut<'a, f32>,
    /// g
    pub gradient: View<'a, f32>,
    /// m
    pub first: ViewMut<'a, f32>,
    /// v
    pub second: ViewMut<'a, f32>,
    /// The scalars: each parameter has its own step count, decay and rate.
    pub step: AdamWStep,
}

/// `m = β1 m + (1-β1) g`, `v = β2 v + (1-β2) g²`, `θ = θ (1 - lr λ) - lr (m/bias1) / (√(v/bias2) + ε)`, all
/// parameters in one launch.
///
/// # Errors
/// [`CudaError::Length`] if the four views of a parameter differ, [`CudaError::Setting`] for a number of the step that is
/// NaN or infinite or a correction outside of (0, 1], [`CudaError::OutOfMemory`], [`CudaError::Call`], [`CudaError::OtherDevice`]; before the launch nothing is changed.
pub fn adamw(device: &Device, updates: &mut [Update<'_>]) -> Result<(), CudaError> {
    let mut table = Vec::with_capacity(24 * updates.len());
    let (mut blocks, mut count) = (0_usize, 0_usize);
    for u in updates.iter() {
        let (n, s) = (u.theta.len(), u.step);
        given(
            device,
            &[
                ("theta", &u.theta, n),
                ("gradient", &u.gradient, n),
                ("first moment", &u.first, n),
                ("second moment", &u.second, n),
            ],
        )?;
        let longs = [
            u.theta.address(),
            u.gradient.address(),
            u.first.address(),
            u.second.address(),
            n as u64,
        ];
        let floats = [
            s.lr,
            s.beta1,
            s.beta2,
            s.take1,
            s.take2,
            s.eps,
            s.weight_decay,
            s.bias1,
            s.bias2,
            s.gradient_scale,
        ];
        for value in floats {
            within("number of a step", value, f32::MIN..=f32::MAX, "finite")?;
        }
        for value in [s.bias1, s.bias2] {
            within(
                "correction of a bias",
                value,
                f32::MIN_POSITIVE..=1.0,
                "in (0, 1]",
            )?;
        }
        if n == 0 {
            continue;
        }
        table.extend(longs.into_iter().flat_map(halves));
        table.extend(floats.map(f32::to_bits));
        table.extend([int("blocks of an update", blocks)?, 0]);
        blocks += n.div_ceil(1024);
        count += 1;
    }
    if count == 0 {
        return Ok(());
    }
    let table = Buffer::from_slice(device, &table)?;
    let arguments = Arguments::new()
        .view(table.view())
        .int(int("parameters", count)?);
    device.launch(
        "adamw",
        (int("blocks of an update", blocks)?, 1),
        256,
        &arguments,
    )
}

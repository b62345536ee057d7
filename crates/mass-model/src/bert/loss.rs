use dfdx::prelude::{Cpu, Tape};

use super::Targets;
use crate::error::ModelError;
use crate::kernels::gemm::Store;
use crate::ops::{self, Activations, MeanAndRows};

/// Mean over sequences of their loss, and the loss of each.
pub(super) fn loss<T: Tape<f32, Cpu>>(
    logits: Activations<T>,
    targets: Targets<'_>,
) -> Result<MeanAndRows<T>, ModelError> {
    match targets {
        Targets::Classes(classes) => logits.cross_entropy(classes),
        Targets::Values(values) => mean_squared_error(logits, values),
    }
}

fn mean_squared_error<T: Tape<f32, Cpu>>(
    outputs: Activations<T>,
    targets: &[f32],
) -> Result<MeanAndRows<T>, ModelError> {
    let &(n, width) = outputs.shape();
    if width != 1 {
        let what = format!("a value is the target of a model with one output, not {width}");
        return Err(ModelError::Config(what));
    }
    if targets.len() != n {
        return Err(ModelError::shape("targets", &[n], &[targets.len()]));
    }
    if let Some(i) = targets.iter().position(|t| !t.is_finite()) {
        return Err(ModelError::NonFinite(format!("target {i}")));
    }
    let (outputs, tape) = outputs.split_tape();
    let pairs = outputs.iter().zip(targets);
    let residuals: Vec<f32> = pairs.map(|(x, t)| x - t).collect();
    let squares: Vec<f32> = residuals.iter().map(|r| r * r).collect();
    ops::mean(tape, squares, move |g, upstream| {
        outputs.add_gradient(g, |dx, store| {
            for (dx, r) in dx.iter_mut().zip(&residuals) {
                let share = upstream * 2.0 * r / n as f32;
                *dx = if store == Store::Add {
                    *dx + share
                } else {
                    share
                };
            }
        })
    })
}

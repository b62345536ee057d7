use dfdx::prelude::{Cpu, HasShape, PutTape, ReshapeTo, SplitTape, Tape, TensorFromVec};

use super::Targets;
use crate::error::ModelError;
use crate::gradients::leaves_are_named;
use crate::ops::{self, MeanAndRows, Rows, read, take_gradient};

/// Mean over sequences of their loss, and the loss of each.
pub(super) fn loss<T: Tape<f32, Cpu>>(
    logits: Rows<T>,
    targets: Targets<'_>,
) -> Result<MeanAndRows<T>, ModelError> {
    match targets {
        Targets::Classes(classes) => ops::cross_entropy(logits, classes),
        Targets::Values(values) => mean_squared_error(logits, values),
    }
}

fn mean_squared_error<T: Tape<f32, Cpu>>(
    outputs: Rows<T>,
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
    let (outputs, mut tape) = outputs.try_contiguous()?.split_tape();
    let residuals: Vec<f32> = read(&outputs)
        .iter()
        .zip(targets)
        .map(|(x, t)| x - t)
        .collect();
    let squares: Vec<f32> = residuals.iter().map(|r| r * r).collect();
    let mean = squares.iter().map(|&x| f64::from(x)).sum::<f64>() / n as f64;
    let loss = outputs
        .device()
        .try_tensor_from_vec(vec![mean as f32], ())?;
    if T::OWNS_TAPE {
        let (x_ghost, y_ghost) = (outputs.ghost(), loss.ghost());
        tape.add_backward_op(move |g| {
            leaves_are_named(g)?;
            let upstream = take_gradient!(g, y_ghost)[0];
            for (dx, r) in g.get_or_alloc_mut(&x_ghost)?.iter_mut().zip(&residuals) {
                *dx += upstream * 2.0 * r / n as f32;
            }
            Ok(())
        });
    }
    Ok((loss.put_tape(tape), squares))
}

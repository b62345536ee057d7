use dfdx::prelude::{Cpu, HasShape, NoneTape, PutTape, ReshapeTo, SplitTape, Tape, TensorFromVec};

use super::{Rows, read, take_gradient};
use crate::error::ModelError;
use crate::kernels::dropout::{Dropout, add_masked};

/// `residual + dropout(x)`, element by element: the residual connection. Without dropout it is a plain sum.
///
/// # Errors
/// [`ModelError::Shape`] if the shapes differ.
pub fn add<T: Tape<f32, Cpu>>(
    x: Rows<T>,
    residual: &Rows<NoneTape>,
    dropout: Option<Dropout>,
) -> Result<Rows<T>, ModelError> {
    let (&(rows, cols), &(other_rows, other_cols)) = (x.shape(), residual.shape());
    if (rows, cols) != (other_rows, other_cols) {
        return Err(ModelError::shape(
            "residual",
            &[rows, cols],
            &[other_rows, other_cols],
        ));
    }
    let (x, mut tape) = x.try_contiguous()?.split_tape();
    let residual = residual.clone().try_contiguous()?;
    let mut sum = vec![0.0; rows * cols];
    residual.copy_into(&mut sum);
    add_masked(dropout, &read(&x), &mut sum);
    let y = x.device().try_tensor_from_vec(sum, (rows, cols))?;
    if T::OWNS_TAPE {
        let (x_ghost, r_ghost, y_ghost) = (x.ghost(), residual.ghost(), y.ghost());
        tape.add_backward_op(move |g| {
            let dy = take_gradient!(g, y_ghost);
            add_masked(dropout, &dy, g.get_or_alloc_mut(&x_ghost)?);
            super::add_gradient(dy, g.get_or_alloc_mut(&r_ghost)?);
            Ok(())
        });
    }
    Ok(y.put_tape(tape))
}

/// Each element dropped with the probability of the mask, the others divided by the probability of staying.
///
/// # Errors
/// [`ModelError::Tensor`] if memory is exhausted.
pub fn dropout<T: Tape<f32, Cpu>>(
    x: Rows<T>,
    dropout: Option<Dropout>,
) -> Result<Rows<T>, ModelError> {
    if dropout.is_none() {
        return Ok(x);
    }
    let shape = *x.shape();
    let (x, mut tape) = x.try_contiguous()?.split_tape();
    let mut y = vec![0.0; shape.0 * shape.1];
    add_masked(dropout, &read(&x), &mut y);
    let y = x.device().try_tensor_from_vec(y, shape)?;
    if T::OWNS_TAPE {
        let (x_ghost, y_ghost) = (x.ghost(), y.ghost());
        tape.add_backward_op(move |g| {
            let dy = take_gradient!(g, y_ghost);
            add_masked(dropout, &dy, g.get_or_alloc_mut(&x_ghost)?);
            Ok(())
        });
    }
    Ok(y.put_tape(tape))
}

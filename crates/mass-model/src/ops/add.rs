use dfdx::prelude::{Cpu, HasShape, NoneTape, PutTape, ReshapeTo, SplitTape, Tape, TensorFromVec};

use super::{Rows, read, take_gradient};
use crate::error::ModelError;
use crate::kernels::vector;

/// `x + residual`, element by element: the residual connection.
///
/// # Errors
/// [`ModelError::Shape`] if the shapes differ.
pub fn add<T: Tape<f32, Cpu>>(
    x: Rows<T>,
    residual: &Rows<NoneTape>,
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
    x.copy_into(&mut sum);
    vector::add_assign(&mut sum, &read(&residual));
    let y = x.device().try_tensor_from_vec(sum, (rows, cols))?;
    let (x_ghost, r_ghost, y_ghost) = (x.ghost(), residual.ghost(), y.ghost());
    tape.add_backward_op(move |g| {
        let dy = take_gradient!(g, y_ghost);
        vector::add_assign(g.get_or_alloc_mut(&x_ghost)?, &dy);
        vector::add_assign(g.get_or_alloc_mut(&r_ghost)?, &dy);
        Ok(())
    });
    Ok(y.put_tape(tape))
}

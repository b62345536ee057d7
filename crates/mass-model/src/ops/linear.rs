use dfdx::prelude::{Cpu, HasShape, PutTape, ReshapeTo, SplitTape, Tape, TensorFromVec};

use super::{Rows, expect_width, read, take_gradient};
use crate::error::ModelError;
use crate::kernels::linear;
use crate::param::Param;

/// `y = x Wᵀ + b` with `x: [n, in]`, `W: [out, in]`, `b: [out]`.
///
/// # Errors
/// [`ModelError::Shape`] if the shapes do not fit.
pub fn linear<T: Tape<f32, Cpu>>(
    x: Rows<T>,
    weight: &Param,
    bias: Option<&Param>,
) -> Result<Rows<T>, ModelError> {
    let &[out, inp] = weight.shape() else {
        return Err(ModelError::shape("linear weight", &[0, 0], weight.shape()));
    };
    expect_width("input of linear", &x, inp)?;
    if let Some(b) = bias
        && b.len() != out
    {
        return Err(ModelError::shape("linear bias", &[out], b.shape()));
    }
    let (x, mut tape) = x.try_contiguous()?.split_tape();
    let n = x.shape().0;
    let input = read(&x);
    let mut y = vec![0.0; n * out];
    linear::forward(
        &input,
        weight.values(),
        bias.map(Param::values),
        &mut y,
        inp,
        out,
    );
    let y = x.device().try_tensor_from_vec(y, (n, out))?;
    if T::OWNS_TAPE {
        let (x_ghost, y_ghost) = (x.ghost(), y.ghost());
        let (w, w_handle, b_handle) = (weight.shared(), weight.handle(), bias.map(Param::handle));
        tape.add_backward_op(move |g| {
            let dy = take_gradient!(g, y_ghost);
            linear::backward_input(&dy, &w, g.get_or_alloc_mut(&x_ghost)?, inp, out);
            let mut dw = w_handle.take_stored(g)?;
            let mut db = b_handle.as_ref().map(|b| b.take(g)).transpose()?;
            let sizes = (inp, out);
            linear::backward_weight(
                &input,
                &dy,
                &mut dw.values,
                db.as_deref_mut(),
                sizes,
                dw.store,
            );
            w_handle.put(g, dw.values)?;
            if let (Some(handle), Some(db)) = (&b_handle, db) {
                handle.put(g, db)?;
            }
            Ok(())
        });
    }
    Ok(y.put_tape(tape))
}

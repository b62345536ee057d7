use dfdx::prelude::{Cpu, Tape};

use super::{Activations, Pass, Rows, expect_width, on_tensors};
use crate::error::ModelError;
use crate::kernels::linear;
use crate::kernels::scratch::Scratch;
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
    on_tensors(x, |pass, x| pass.linear(x, weight, bias))
}

/// Width of the input and of the output.
pub(super) fn check(
    shape: &(usize, usize),
    weight: &Param,
    bias: Option<&Param>,
) -> Result<(usize, usize), ModelError> {
    let &[out, inp] = weight.shape() else {
        return Err(ModelError::shape("linear weight", &[0, 0], weight.shape()));
    };
    expect_width("input of linear", shape, inp)?;
    match bias {
        Some(b) if b.len() != out => Err(ModelError::shape("linear bias", &[out], b.shape())),
        _ => Ok((inp, out)),
    }
}

/// [`linear`]
pub(super) fn run<T: Tape<f32, Cpu>>(
    tape: &mut T,
    x: Activations,
    weight: &Param,
    bias: Option<&Param>,
) -> Result<Activations, ModelError> {
    let (inp, out) = check(x.shape(), weight, bias)?;
    let n = x.shape().0;
    let mut y = Scratch::take(n * out);
    let values = (
        weight.try_values()?,
        bias.map(Param::try_values).transpose()?,
    );
    linear::forward(&x, values.0, values.1, &mut y, inp, out);
    let (w, w_handle, b_handle) = (weight.shared(), weight.handle(), bias.map(Param::handle));
    Activations::output(tape, y, (n, out), move |g, dy| {
        let sizes = (inp, out);
        x.add_gradient(g, |dx, store| {
            linear::backward_input(dy, &w, (dx, store), sizes);
        })?;
        let mut dw = w_handle.take_stored(g)?;
        let mut db = b_handle.as_ref().map(|b| b.take(g)).transpose()?;
        let (values, store) = (&mut dw.values, dw.store);
        linear::backward_weight(&x, dy, values, db.as_deref_mut(), sizes, store);
        w_handle.put(g, dw.values)?;
        if let (Some(handle), Some(db)) = (&b_handle, db) {
            handle.put(g, db)?;
        }
        Ok(())
    })
}

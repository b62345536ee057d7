use dfdx::prelude::{Cpu, HasShape, PutTape, ReshapeTo, SplitTape, Tape, TensorFromVec};

use super::{Rows, expect_width, read, take_gradient};
use crate::error::ModelError;
use crate::kernels::layer_norm as kernel;
use crate::kernels::scratch::Scratch;
use crate::param::Param;

/// `y = (x - mean) / √(var + eps) ⊙ gamma + beta` over each row of `x: [n, d]`.
///
/// # Errors
/// [`ModelError::Shape`] if the shapes do not fit.
pub fn layer_norm<T: Tape<f32, Cpu>>(
    x: Rows<T>,
    gamma: &Param,
    beta: &Param,
    eps: f32,
) -> Result<Rows<T>, ModelError> {
    let d = gamma.len();
    expect_width("input of layer norm", &x, d)?;
    if beta.len() != d {
        return Err(ModelError::shape("layer norm bias", &[d], beta.shape()));
    }
    let (x, mut tape) = x.try_contiguous()?.split_tape();
    let n = x.shape().0;
    let input = read(&x);
    let mut stats = Scratch::take(2 * n);
    let mut y = vec![0.0; n * d];
    kernel::forward(
        &input,
        gamma.values(),
        beta.values(),
        eps,
        &mut y,
        &mut stats,
    );
    let y = x.device().try_tensor_from_vec(y, (n, d))?;
    if T::OWNS_TAPE {
        let (x_ghost, y_ghost) = (x.ghost(), y.ghost());
        let (scale, gamma, beta) = (gamma.shared(), gamma.handle(), beta.handle());
        tape.add_backward_op(move |g| {
            let dy = take_gradient!(g, y_ghost);
            let (mut dgamma, mut dbeta) = (gamma.take(g)?, beta.take(g)?);
            let dx = g.get_or_alloc_mut(&x_ghost)?;
            kernel::backward(&input, &scale, &stats, &dy, dx, &mut dgamma, &mut dbeta);
            gamma.put(g, dgamma)?;
            beta.put(g, dbeta)
        });
    }
    Ok(y.put_tape(tape))
}

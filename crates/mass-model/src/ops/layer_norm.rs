use dfdx::prelude::{Cpu, Tape};

use super::{Activations, Pass, Rows, expect_width, on_tensors};
use crate::error::ModelError;
use crate::kernels::layer_norm as kernel;
use crate::kernels::scratch::Scratch;
use crate::param::Param;

/// `y = (x - mean) / √(var + eps) ⊙ gamma + beta` over each row of `x: [n, d]`.
///
/// # Errors
/// [`ModelError::Shape`] if the shapes do not fit, [`ModelError::Config`] for an `eps` that is not positive and finite.
pub fn layer_norm<T: Tape<f32, Cpu>>(
    x: Rows<T>,
    gamma: &Param,
    beta: &Param,
    eps: f32,
) -> Result<Rows<T>, ModelError> {
    on_tensors(x, |pass, x| pass.layer_norm(x, gamma, beta, eps))
}

/// Refuses what would divide rows of one value by zero.
pub(crate) fn check_eps(eps: f32) -> Result<(), ModelError> {
    match eps > 0.0 && eps.is_finite() {
        true => Ok(()),
        false => Err(ModelError::Config(format!(
            "layer norm with eps {eps}: it must be positive and finite"
        ))),
    }
}

/// Width of the rows.
pub(super) fn check(
    shape: &(usize, usize),
    gamma: &Param,
    beta: &Param,
    eps: f32,
) -> Result<usize, ModelError> {
    check_eps(eps)?;
    let d = gamma.len();
    expect_width("input of layer norm", shape, d)?;
    match beta.len() == d {
        true => Ok(d),
        false => Err(ModelError::shape("layer norm bias", &[d], beta.shape())),
    }
}

/// [`layer_norm`]
pub(super) fn run<T: Tape<f32, Cpu>>(
    tape: &mut T,
    x: Activations,
    gamma: &Param,
    beta: &Param,
    eps: f32,
) -> Result<Activations, ModelError> {
    check(x.shape(), gamma, beta, eps)?;
    let shape = *x.shape();
    let mut stats = Scratch::take(2 * shape.0);
    let mut y = Scratch::take(x.len());
    let values = (gamma.try_values()?, beta.try_values()?);
    kernel::forward(&x, values.0, values.1, eps, &mut y, &mut stats);
    let (scale, gamma, beta) = (gamma.shared(), gamma.handle(), beta.handle());
    Activations::output(tape, y, shape, move |g, dy| {
        let (mut dgamma, mut dbeta) = (gamma.take(g)?, beta.take(g)?);
        let mut dx = x.take_gradient(g)?;
        let given = (&mut dx.values[..], dx.store);
        kernel::backward(&x, &scale, &stats, dy, given, &mut dgamma, &mut dbeta);
        x.put_gradient(g, dx.values)?;
        gamma.put(g, dgamma)?;
        beta.put(g, dbeta)
    })
}

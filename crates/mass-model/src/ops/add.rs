use dfdx::prelude::{Cpu, NoneTape, Tape};

use super::{Activations, Pass, Rows, on_tensors};
use crate::error::ModelError;
use crate::kernels::dropout::{self as kernel, Dropout};
use crate::kernels::gemm::Store;
use crate::kernels::scratch::{Scratch, take_vec};

/// `residual + dropout(x)`, element by element: the residual connection. Without dropout it is a plain sum.
///
/// # Errors
/// [`ModelError::Shape`] if the shapes differ.
pub fn add<T: Tape<f32, Cpu>>(
    x: Rows<T>,
    residual: &Rows<NoneTape>,
    dropout: Option<Dropout>,
) -> Result<Rows<T>, ModelError> {
    let residual = Activations::of_tensor::<T>(residual.clone())?;
    on_tensors(x, |pass, x| pass.add(x, residual, dropout))
}

/// Each element dropped with the probability of the mask, the others divided by the probability of staying.
///
/// # Errors
/// [`ModelError::Tensor`] if memory is exhausted.
pub fn dropout<T: Tape<f32, Cpu>>(
    x: Rows<T>,
    dropout: Option<Dropout>,
) -> Result<Rows<T>, ModelError> {
    match dropout {
        None => Ok(x),
        Some(_) => on_tensors(x, |pass, x| pass.dropout(x, dropout)),
    }
}

/// Refuses rows of different shapes.
pub(super) fn check(
    &(rows, cols): &(usize, usize),
    &(other_rows, other_cols): &(usize, usize),
) -> Result<(), ModelError> {
    if (rows, cols) != (other_rows, other_cols) {
        return Err(ModelError::shape(
            "residual",
            &[rows, cols],
            &[other_rows, other_cols],
        ));
    }
    Ok(())
}

/// [`add`]
pub(super) fn run_add<T: Tape<f32, Cpu>>(
    tape: &mut T,
    x: Activations,
    residual: Activations,
    dropout: Option<Dropout>,
) -> Result<Activations, ModelError> {
    check(x.shape(), residual.shape())?;
    let shape = *x.shape();
    let mut sum = Scratch::take(x.len());
    kernel::sum(&residual, dropout, &x, &mut sum);
    Activations::output(tape, sum, shape, move |g, dy| {
        x.add_gradient(g, |dx, store| kernel::masked(dropout, dy, dx, store))?;
        residual.give_gradient(g, std::mem::take(dy))
    })
}

/// [`dropout`]
pub(super) fn run_dropout<T: Tape<f32, Cpu>>(
    tape: &mut T,
    x: Activations,
    dropout: Option<Dropout>,
) -> Result<Activations, ModelError> {
    if dropout.is_none() {
        return Ok(x);
    }
    let shape = *x.shape();
    let mut y = Scratch::take(x.len());
    kernel::masked(dropout, &x, &mut y, Store::Replace);
    Activations::output(tape, y, shape, move |g, dy| {
        x.add_gradient(g, |dx, store| kernel::masked(dropout, dy, dx, store))
    })
}

/// The hyperbolic tangent of each element.
pub(super) fn run_tanh<T: Tape<f32, Cpu>>(
    tape: &mut T,
    x: Activations,
) -> Result<Activations, ModelError> {
    let shape = *x.shape();
    let mut y = Scratch::take(x.len());
    y.iter_mut().zip(&*x).for_each(|(y, x)| *y = x.tanh());
    let slope: Vec<f32> = y.iter().map(|y| 1.0 - y * y).collect();
    Activations::output(tape, y, shape, move |g, dy| {
        let mut share = take_vec(dy.len());
        for ((share, dy), slope) in share.iter_mut().zip(&*dy).zip(&slope) {
            *share = dy * slope;
        }
        x.give_gradient(g, share)
    })
}

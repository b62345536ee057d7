use dfdx::prelude::{Cpu, HasShape, PutTape, ReshapeTo, SplitTape, Tape, TensorFromVec};

use super::{Rows, expect_width, read, take_gradient};
use crate::error::ModelError;
use crate::kernels::vector;
use crate::param::Param;

/// Rows `picked` of `x`, in that order: what a head reads of a sequence (its first token, say).
///
/// # Errors
/// [`ModelError::Index`] for a row that is not there, [`ModelError::Shape`] if none is picked.
pub fn pick_rows<T: Tape<f32, Cpu>>(x: Rows<T>, picked: &[usize]) -> Result<Rows<T>, ModelError> {
    let &(n, d) = x.shape();
    if picked.is_empty() {
        return Err(ModelError::shape("picked rows", &[1], &[0]));
    }
    if let Some(position) = picked.iter().position(|&row| row >= n) {
        return Err(ModelError::Index {
            what: "row",
            index: u32::try_from(picked[position]).unwrap_or(u32::MAX),
            position,
            len: n,
        });
    }
    let (x, mut tape) = x.try_contiguous()?.split_tape();
    let input = read(&x);
    let y = picked
        .iter()
        .flat_map(|&row| &input[row * d..][..d])
        .copied()
        .collect();
    let y = x.device().try_tensor_from_vec(y, (picked.len(), d))?;
    if T::OWNS_TAPE {
        let (x_ghost, y_ghost) = (x.ghost(), y.ghost());
        let picked = picked.to_vec();
        tape.add_backward_op(move |g| {
            let dy = take_gradient!(g, y_ghost);
            let dx = g.get_or_alloc_mut(&x_ghost)?;
            for (dy, &row) in dy.chunks_exact(d).zip(&picked) {
                vector::add_assign(&mut dx[row * d..][..d], dy);
            }
            Ok(())
        });
    }
    Ok(y.put_tape(tape))
}

/// `y[i] = x[i] ⊙ factor`: each column scaled by a trained value (layer scale; Touvron and others, arXiv 2103.17239).
///
/// # Errors
/// [`ModelError::Shape`] if there is not one factor a column.
pub fn scale_rows<T: Tape<f32, Cpu>>(x: Rows<T>, factor: &Param) -> Result<Rows<T>, ModelError> {
    let d = factor.len();
    expect_width("input of a layer scale", &x, d)?;
    let (x, mut tape) = x.try_contiguous()?.split_tape();
    let n = x.shape().0;
    let input = read(&x);
    let mut y = vec![0.0; n * d];
    for (y, x) in y.chunks_exact_mut(d).zip(input.chunks_exact(d)) {
        for ((y, x), f) in y.iter_mut().zip(x).zip(factor.values()) {
            *y = x * f;
        }
    }
    let y = x.device().try_tensor_from_vec(y, (n, d))?;
    if T::OWNS_TAPE {
        let (x_ghost, y_ghost) = (x.ghost(), y.ghost());
        let (values, handle) = (factor.shared(), factor.handle());
        tape.add_backward_op(move |g| {
            let dy = take_gradient!(g, y_ghost);
            let mut df = handle.take(g)?;
            let dx = g.get_or_alloc_mut(&x_ghost)?;
            let rows = dy.chunks_exact(d).zip(input.chunks_exact(d));
            for ((dy, x), dx) in rows.zip(dx.chunks_exact_mut(d)) {
                for i in 0..d {
                    df[i] += dy[i] * x[i];
                    dx[i] += dy[i] * values[i];
                }
            }
            handle.put(g, df)
        });
    }
    Ok(y.put_tape(tape))
}

use dfdx::prelude::{Cpu, Tape};
use rayon::prelude::*;

use super::{Activations, Pass, Rows, expect_width, on_tensors};
use crate::error::ModelError;
use crate::kernels::gemm::Store;
use crate::kernels::scratch::Scratch;
use crate::kernels::{ROW_BLOCK, vector, vectorised};
use crate::param::Param;

/// Rows `picked` of `x`, in that order: what a head reads of a sequence (its first token, say).
///
/// # Errors
/// [`ModelError::Index`] for a row that is not there, [`ModelError::Shape`] if none is picked, or rows have no values.
pub fn pick_rows<T: Tape<f32, Cpu>>(x: Rows<T>, picked: &[usize]) -> Result<Rows<T>, ModelError> {
    on_tensors(x, |pass, x| pass.pick_rows(x, picked))
}

/// `y[i] = x[i] ⊙ factor`: each column scaled by a trained value (layer scale; Touvron and others, arXiv 2103.17239).
///
/// # Errors
/// [`ModelError::Shape`] if there is not one factor a column.
pub fn scale_rows<T: Tape<f32, Cpu>>(x: Rows<T>, factor: &Param) -> Result<Rows<T>, ModelError> {
    on_tensors(x, |pass, x| pass.scale_rows(x, factor))
}

/// Refuses rows that are not there, or have no values.
pub(super) fn check_picked(&(n, d): &(usize, usize), picked: &[usize]) -> Result<(), ModelError> {
    if picked.is_empty() || d == 0 {
        let (wanted, found) = ([picked.len().max(1), d.max(1)], [picked.len(), d]);
        return Err(ModelError::shape("picked rows", &wanted, &found));
    }
    match picked.iter().position(|&row| row >= n) {
        Some(position) => Err(ModelError::Index {
            what: "row",
            index: u32::try_from(picked[position]).unwrap_or(u32::MAX),
            position,
            len: n,
        }),
        None => Ok(()),
    }
}

/// [`pick_rows`]
pub(super) fn run_pick<T: Tape<f32, Cpu>>(
    tape: &mut T,
    x: Activations,
    picked: &[usize],
) -> Result<Activations, ModelError> {
    check_picked(x.shape(), picked)?;
    let d = x.shape().1;
    let mut y = Scratch::take(picked.len() * d);
    for (y, &row) in y.chunks_exact_mut(d).zip(picked) {
        y.copy_from_slice(&x[row * d..][..d]);
    }
    let picked = picked.to_vec();
    Activations::output(tape, y, (picked.len(), d), move |g, dy| {
        x.add_gradient(g, |dx, store| {
            if store == Store::Replace {
                dx.fill(0.0);
            }
            for (dy, &row) in dy.chunks_exact(d).zip(&picked) {
                vector::add_assign(&mut dx[row * d..][..d], dy);
            }
        })
    })
}

/// [`scale_rows`]
pub(super) fn run_scale<T: Tape<f32, Cpu>>(
    tape: &mut T,
    x: Activations,
    factor: &Param,
) -> Result<Activations, ModelError> {
    let d = factor.len();
    expect_width("input of a layer scale", x.shape(), d)?;
    let shape = *x.shape();
    let mut y = Scratch::take(x.len());
    factor.try_values()?;
    let values = factor.shared();
    y.par_chunks_mut(ROW_BLOCK * d)
        .zip(x.par_chunks(ROW_BLOCK * d))
        .for_each(|(y, x)| {
            y.copy_from_slice(x);
            for y in y.chunks_exact_mut(d) {
                vector::mul_assign(y, &values);
            }
        });
    let handle = factor.handle();
    Activations::output(tape, y, shape, move |g, dy| {
        let mut df = handle.take(g)?;
        // Partial sums of each block, added up in block order: the same bits on any number of threads.
        let mut partial = Scratch::zeros(x.len().div_ceil(ROW_BLOCK * d) * d);
        partial
            .par_chunks_mut(d)
            .zip(dy.par_chunks_mut(ROW_BLOCK * d))
            .zip(x.par_chunks(ROW_BLOCK * d))
            .for_each(|((sums, dy), x)| {
                vectorised(
                    #[inline(always)]
                    || {
                        for (dy, x) in dy.chunks_exact_mut(d).zip(x.chunks_exact(d)) {
                            for i in 0..d {
                                sums[i] += dy[i] * x[i];
                                dy[i] *= values[i];
                            }
                        }
                    },
                );
            });
        for sums in partial.chunks_exact(d) {
            vector::add_assign(&mut df, sums);
        }
        x.give_gradient(g, std::mem::take(dy))?;
        handle.put(g, df)
    })
}

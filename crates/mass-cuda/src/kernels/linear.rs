//! `y = x Wᵀ + b`, with `w: [out, inp]`.

use super::dots::{ColumnSum, column_sums};
use super::gemm::{Epilogue, Job, Matrix, MatrixMut, run};
use super::{Store, rows_of};
use crate::{CudaError, Device, View, ViewMut};

/// `y[n, out] = x[n, inp] wᵀ + b`.
///
/// # Errors
/// [`CudaError::Length`] if shapes do not fit, [`CudaError::OutOfMemory`], [`CudaError::Call`],
/// [`CudaError::OtherDevice`].
pub fn forward(
    device: &Device,
    x: View<'_, f32>,
    w: View<'_, f32>,
    b: Option<View<'_, f32>>,
    y: ViewMut<'_, f32>,
    (inp, out): (usize, usize),
) -> Result<(), CudaError> {
    let n = whole(x, w, (inp, out))?;
    CudaError::check("y", n * out, y.len())?;
    let mut job = Job::new(
        Matrix::new(x, n, inp)?,
        Matrix::new(w, out, inp)?.t(),
        MatrixMut::new(y, n, out)?,
    );
    job.epilogue = Epilogue {
        bias: b,
        ..Epilogue::default()
    };
    run(device, &[job])
}

/// `dx[n, inp] = dy[n, out] w`, or the same added to it.
///
/// # Errors
/// As [`forward`].
pub fn backward_input(
    device: &Device,
    dy: View<'_, f32>,
    w: View<'_, f32>,
    dx: ViewMut<'_, f32>,
    (inp, out): (usize, usize),
    store: Store,
) -> Result<(), CudaError> {
    let n = whole(dy, w, (out, inp))?;
    CudaError::check("dx", n * inp, dx.len())?;
    let job = Job::new(
        Matrix::new(dy, n, out)?,
        Matrix::new(w, out, inp)?,
        MatrixMut::new(dx, n, inp)?,
    );
    run(device, &[Job { store, ..job }])
}

/// `dw[out, inp] = dyᵀ x`, or the same added to it, and likewise `db[out] = Σ_n dy`.
///
/// # Errors
/// As [`forward`].
pub fn backward_weight(
    device: &Device,
    x: View<'_, f32>,
    dy: View<'_, f32>,
    dw: ViewMut<'_, f32>,
    db: Option<ViewMut<'_, f32>>,
    (inp, out): (usize, usize),
    store: Store,
) -> Result<(), CudaError> {
    let n = rows_of("x", x.len(), inp)?;
    CudaError::check("dy", n * out, dy.len())?;
    CudaError::check("dw", out * inp, dw.len())?;
    let job = Job::new(
        Matrix::new(dy, n, out)?.t(),
        Matrix::new(x, n, inp)?,
        MatrixMut::new(dw, out, inp)?,
    );
    run(device, &[Job { store, ..job }])?;
    match db {
        None => Ok(()),
        Some(db) => column_sums(
            device,
            vec![ColumnSum {
                x: dy,
                times: None,
                y: db,
                store,
            }],
        ),
    }
}

fn whole(
    x: View<'_, f32>,
    w: View<'_, f32>,
    (width, other): (usize, usize),
) -> Result<usize, CudaError> {
    CudaError::check("w", width * other, w.len())?;
    rows_of("rows of a linear layer", x.len(), width)
}

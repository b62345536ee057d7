//! `y = x Wᵀ + b`, with `w: [out, inp]`.

use super::dots::{ColumnSum, column_sums};
use super::gemm::{Epilogue, Job, Matrix, MatrixMut, run};
use super::{Placed, Store, given, product, rows_of};
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
    let n = rows(device, ("x", &x, inp), ("y", &y, out), ("w", &w))?;
    if let Some(b) = &b {
        given(device, &[("b", b, out)])?;
    }
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
    let n = rows(device, ("dy", &dy, out), ("dx", &dx, inp), ("w", &w))?;
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
    let n = rows(device, ("x", &x, inp), ("dy", &dy, out), ("dw", &dw))?;
    if let Some(db) = &db {
        given(device, &[("db", db, out)])?;
    }
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

/// Checks what is given, of which the first says how many rows there are.
fn rows(
    device: &Device,
    (first, x, width): (&'static str, &dyn Placed, usize),
    (second, y, other): (&'static str, &dyn Placed, usize),
    (matrix, w): (&'static str, &dyn Placed),
) -> Result<usize, CudaError> {
    let n = rows_of(first, x.values(), width)?;
    given(
        device,
        &[
            (first, x, x.values()),
            (second, y, product(second, &[n, other])?),
            (matrix, w, product(matrix, &[width, other])?),
        ],
    )?;
    Ok(n)
}

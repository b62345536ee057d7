//! Rows of a matrix, picked and weighted.

use super::{each, given, int, rows_of};
use crate::driver::Arguments;
use crate::{CudaError, Device, View, ViewMut};

/// `y[i] = x[rows[i]]`, times `weights[i]` if there are weights, with rows of `cols` values. Indices must be below
/// the number of rows of `x`, which is not checked: where they come from the host, use
/// [`embedding::forward`](super::embedding::forward).
///
/// # Errors
/// [`CudaError::Length`] if lengths do not fit, [`CudaError::Call`], [`CudaError::OtherDevice`].
pub fn gather(
    device: &Device,
    x: View<'_, f32>,
    rows: View<'_, u32>,
    weights: Option<View<'_, f32>>,
    y: ViewMut<'_, f32>,
    cols: usize,
) -> Result<(), CudaError> {
    rows_of("x", x.len(), cols)?;
    let n = rows_of("y", y.len(), cols)?;
    given(
        device,
        &[("x", &x, x.len()), ("rows", &rows, n), ("y", &y, y.len())],
    )?;
    if let Some(weights) = &weights {
        given(device, &[("weights", weights, n)])?;
    }
    let arguments = Arguments::new()
        .view(x)
        .view(rows)
        .view_or_null(weights)
        .view_mut(&y);
    each(
        device,
        "gather_rows",
        y.len(),
        &arguments.long(y.len()).int(int("width", cols)?),
    )
}

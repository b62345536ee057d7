//! Layer normalisation over the last axis.

use super::{Store, grid_y, int, rows_of, same_device, warps};
use crate::driver::Arguments;
use crate::{Buffer, CudaError, Device, View, ViewMut};

/// `y = (x - mean) rstd ⊙ gamma + beta` for each row of `d`; `stats: [rows, 2]` receives mean and rstd of each row.
///
/// # Errors
/// [`CudaError::Length`] if lengths do not fit, [`CudaError::Call`], [`CudaError::OtherDevice`].
pub fn forward(
    device: &Device,
    x: View<'_, f32>,
    gamma: View<'_, f32>,
    beta: View<'_, f32>,
    eps: f32,
    y: ViewMut<'_, f32>,
    stats: ViewMut<'_, f32>,
) -> Result<(), CudaError> {
    same_device(
        device,
        &[
            ("x", &x),
            ("gamma", &gamma),
            ("beta", &beta),
            ("y", &y),
            ("stats", &stats),
        ],
    )?;
    let d = gamma.len();
    let rows = rows_of("x", x.len(), d)?;
    CudaError::check("beta", d, beta.len())?;
    CudaError::check("y", x.len(), y.len())?;
    CudaError::check("stats", 2 * rows, stats.len())?;
    let arguments = Arguments::new()
        .view(x)
        .view(gamma)
        .view(beta)
        .view_mut(&y)
        .view_mut(&stats);
    let arguments = arguments
        .int(int("rows", rows)?)
        .int(int("width", d)?)
        .float(eps);
    warps(device, "layer_norm_forward", rows, &arguments)
}

/// Adds to `dgamma` and `dbeta` the gradients for an upstream gradient `dy`, and writes `dx` or adds to it.
///
/// # Errors
/// As [`forward`], and [`CudaError::OutOfMemory`].
#[allow(clippy::too_many_arguments)]
pub fn backward(
    device: &Device,
    x: View<'_, f32>,
    gamma: View<'_, f32>,
    stats: View<'_, f32>,
    dy: View<'_, f32>,
    (dx, store): (ViewMut<'_, f32>, Store),
    dgamma: ViewMut<'_, f32>,
    dbeta: ViewMut<'_, f32>,
) -> Result<(), CudaError> {
    same_device(
        device,
        &[("x", &x), ("gamma", &gamma), ("stats", &stats), ("dy", &dy)],
    )?;
    same_device(
        device,
        &[("dx", &dx), ("dgamma", &dgamma), ("dbeta", &dbeta)],
    )?;
    let d = gamma.len();
    let rows = rows_of("x", x.len(), d)?;
    CudaError::check("stats", 2 * rows, stats.len())?;
    for (what, len) in [("dy", dy.len()), ("dx", dx.len())] {
        CudaError::check(what, x.len(), len)?;
    }
    for (what, len) in [("dgamma", dgamma.len()), ("dbeta", dbeta.len())] {
        CudaError::check(what, d, len)?;
    }
    if rows == 0 {
        return Ok(());
    }
    let (n, width) = (int("rows", rows)?, int("width", d)?);
    let arguments = Arguments::new()
        .view(x)
        .view(gamma)
        .view(stats)
        .view(dy)
        .view_mut(&dx);
    let arguments = arguments.int(n).int(width).int(store.add());
    warps(device, "layer_norm_backward", rows, &arguments)?;
    let blocks = rows.div_ceil(256);
    let across = int("width", d.div_ceil(256))?;
    let mut parts = Buffer::<f32>::uninitialised(device, blocks * 2 * d)?;
    let arguments = Arguments::new()
        .view(x)
        .view(stats)
        .view(dy)
        .view_mut(&parts.view_mut())
        .int(n)
        .int(width);
    device.launch(
        "layer_norm_parts",
        (across, grid_y("blocks of rows", blocks)?),
        256,
        &arguments,
    )?;
    let arguments = Arguments::new()
        .view(parts.view())
        .view_mut(&dgamma)
        .view_mut(&dbeta);
    let arguments = arguments.int(int("blocks of rows", blocks)?).int(width);
    device.launch("layer_norm_sums", (across, 1), 256, &arguments)
}

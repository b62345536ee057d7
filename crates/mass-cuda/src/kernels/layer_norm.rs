//! Layer normalisation over the last axis.

use super::{Store, given, grid_y, int, product, rows_of, warps, within};
use crate::driver::Arguments;
use crate::{Buffer, CudaError, Device, View, ViewMut};

/// `y = (x - mean) rstd ⊙ gamma + beta` for each row of `d`; `stats: [rows, 2]` receives mean and rstd of each row.
///
/// # Errors
/// [`CudaError::Length`] if lengths do not fit, [`CudaError::Setting`] for an `eps` that is negative or not finite,
/// [`CudaError::TooLarge`], [`CudaError::Call`], [`CudaError::OtherDevice`].
pub fn forward(
    device: &Device,
    x: View<'_, f32>,
    gamma: View<'_, f32>,
    beta: View<'_, f32>,
    eps: f32,
    y: ViewMut<'_, f32>,
    stats: ViewMut<'_, f32>,
) -> Result<(), CudaError> {
    let d = gamma.len();
    let rows = rows_of("x", x.len(), d)?;
    within("eps", eps, 0.0..=f32::MAX, "finite and not negative")?;
    given(
        device,
        &[
            ("x", &x, x.len()),
            ("gamma", &gamma, d),
            ("beta", &beta, d),
            ("y", &y, x.len()),
            ("stats", &stats, 2 * rows),
        ],
    )?;
    let (n, width) = (int("rows", rows)?, int("width", d)?);
    let arguments = Arguments::new()
        .view(x)
        .view(gamma)
        .view(beta)
        .view_mut(&y)
        .view_mut(&stats);
    let arguments = arguments.int(n).int(width).float(eps);
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
    let d = gamma.len();
    let rows = rows_of("x", x.len(), d)?;
    given(
        device,
        &[
            ("x", &x, x.len()),
            ("gamma", &gamma, d),
            ("stats", &stats, 2 * rows),
            ("dy", &dy, x.len()),
            ("dx", &dx, x.len()),
            ("dgamma", &dgamma, d),
            ("dbeta", &dbeta, d),
        ],
    )?;
    let (n, width) = (int("rows", rows)?, int("width", d)?);
    let blocks = rows.div_ceil(256);
    let (across, down) = (
        int("width", d.div_ceil(256))?,
        grid_y("blocks of rows", blocks)?,
    );
    if rows == 0 {
        return Ok(());
    }
    let mut parts =
        Buffer::<f32>::uninitialised(device, product("partial sums", &[blocks, 2, d])?)?;
    let arguments = Arguments::new()
        .view(x)
        .view(gamma)
        .view(stats)
        .view(dy)
        .view_mut(&dx);
    let arguments = arguments.int(n).int(width).int(store.add());
    warps(device, "layer_norm_backward", rows, &arguments)?;
    let arguments = Arguments::new()
        .view(x)
        .view(stats)
        .view(dy)
        .view_mut(&parts.view_mut())
        .int(n)
        .int(width);
    device.launch("layer_norm_parts", (across, down), 256, &arguments)?;
    let arguments = Arguments::new()
        .view(parts.view())
        .view_mut(&dgamma)
        .view_mut(&dbeta);
    let arguments = arguments.int(down).int(width);
    device.launch("layer_norm_sums", (across, 1), 256, &arguments)
}

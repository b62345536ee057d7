//! Squared error against values.

use super::{Store, each, given};
use crate::driver::Arguments;
use crate::{CudaError, Device, View, ViewMut};

/// `residuals = x - targets` and `squares = residuals²`.
///
/// # Errors
/// [`CudaError::Length`] if there are not as many, [`CudaError::Call`], [`CudaError::OtherDevice`].
pub fn forward(
    device: &Device,
    x: View<'_, f32>,
    targets: View<'_, f32>,
    residuals: ViewMut<'_, f32>,
    squares: ViewMut<'_, f32>,
) -> Result<(), CudaError> {
    let n = x.len();
    given(
        device,
        &[
            ("x", &x, n),
            ("targets", &targets, n),
            ("residuals", &residuals, n),
            ("squares", &squares, n),
        ],
    )?;
    let arguments = Arguments::new()
        .view(x)
        .view(targets)
        .view_mut(&residuals)
        .view_mut(&squares)
        .long(n);
    each(device, "squared_error_forward", n, &arguments)
}

/// `dx = upstream 2 residuals / n`, the gradient of the mean of the squares, or the same added to it.
///
/// # Errors
/// As [`forward`].
pub fn backward(
    device: &Device,
    residuals: View<'_, f32>,
    upstream: f32,
    dx: ViewMut<'_, f32>,
    store: Store,
) -> Result<(), CudaError> {
    let n = residuals.len();
    given(device, &[("residuals", &residuals, n), ("dx", &dx, n)])?;
    let arguments = Arguments::new().view(residuals).view_mut(&dx).long(n);
    let arguments = arguments.float(upstream).float(n as f32).int(store.add());
    each(device, "squared_error_backward", n, &arguments)
}

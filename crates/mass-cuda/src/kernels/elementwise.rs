//! Values one by one.

use super::{Dropout, Store, each, given, int, mask, rows_of, within};
use crate::driver::Arguments;
use crate::{CudaError, Device, View, ViewMut};

/// `y = value`.
///
/// # Errors
/// [`CudaError::Call`], [`CudaError::OtherDevice`].
pub fn fill(device: &Device, value: f32, y: ViewMut<'_, f32>) -> Result<(), CudaError> {
    given(device, &[("y", &y, y.len())])?;
    each(
        device,
        "fill",
        y.len(),
        &Arguments::new().view_mut(&y).long(y.len()).float(value),
    )
}

/// `y = factor y`.
///
/// # Errors
/// [`CudaError::Call`], [`CudaError::OtherDevice`].
pub fn scale(device: &Device, factor: f32, y: ViewMut<'_, f32>) -> Result<(), CudaError> {
    given(device, &[("y", &y, y.len())])?;
    each(
        device,
        "scale",
        y.len(),
        &Arguments::new().view_mut(&y).long(y.len()).float(factor),
    )
}

/// `y += factor x`.
///
/// # Errors
/// [`CudaError::Length`] if there are not as many, [`CudaError::Call`], [`CudaError::OtherDevice`].
pub fn add_scaled(
    device: &Device,
    factor: f32,
    x: View<'_, f32>,
    y: ViewMut<'_, f32>,
) -> Result<(), CudaError> {
    given(device, &[("x", &x, y.len()), ("y", &y, y.len())])?;
    let arguments = Arguments::new()
        .view(x)
        .view_mut(&y)
        .long(y.len())
        .float(factor);
    each(device, "add_scaled", y.len(), &arguments)
}

/// `y += x`.
///
/// # Errors
/// As [`add_scaled`].
pub fn add_into(device: &Device, x: View<'_, f32>, y: ViewMut<'_, f32>) -> Result<(), CudaError> {
    add_scaled(device, 1.0, x, y)
}

/// `y = a + x ⊙ mask`, with all of `x` without a mask.
///
/// # Errors
/// [`CudaError::Length`] if there are not as many, [`CudaError::Setting`] for a rate outside of (0, 1],
/// [`CudaError::Call`], [`CudaError::OtherDevice`].
pub fn sum(
    device: &Device,
    a: View<'_, f32>,
    dropout: Option<Dropout>,
    x: View<'_, f32>,
    y: ViewMut<'_, f32>,
) -> Result<(), CudaError> {
    given(
        device,
        &[("a", &a, y.len()), ("x", &x, y.len()), ("y", &y, y.len())],
    )?;
    let (rate, key) = mask(dropout)?;
    let arguments = Arguments::new()
        .view(a)
        .view(x)
        .view_mut(&y)
        .long(y.len())
        .float(rate)
        .wide(key);
    each(device, "sum_masked", y.len(), &arguments)
}

/// `y = x ⊙ mask`, or the same added to it; all of `x` without a mask.
///
/// # Errors
/// As [`sum`].
pub fn masked(
    device: &Device,
    dropout: Option<Dropout>,
    x: View<'_, f32>,
    y: ViewMut<'_, f32>,
    store: Store,
) -> Result<(), CudaError> {
    given(device, &[("x", &x, y.len()), ("y", &y, y.len())])?;
    let (rate, key) = mask(dropout)?;
    let arguments = Arguments::new()
        .view(x)
        .view_mut(&y)
        .long(y.len())
        .float(rate)
        .wide(key)
        .int(store.add());
    each(device, "masked", y.len(), &arguments)
}

/// `y = tanh x`.
///
/// # Errors
/// [`CudaError::Length`] if there are not as many, [`CudaError::Call`], [`CudaError::OtherDevice`].
pub fn tanh_forward(
    device: &Device,
    x: View<'_, f32>,
    y: ViewMut<'_, f32>,
) -> Result<(), CudaError> {
    given(device, &[("x", &x, y.len()), ("y", &y, y.len())])?;
    each(
        device,
        "tanh_forward",
        y.len(),
        &Arguments::new().view(x).view_mut(&y).long(y.len()),
    )
}

/// `dx = dy (1 - y²)` with `y` from [`tanh_forward`], or the same added to it.
///
/// # Errors
/// As [`tanh_forward`].
pub fn tanh_backward(
    device: &Device,
    y: View<'_, f32>,
    dy: View<'_, f32>,
    dx: ViewMut<'_, f32>,
    store: Store,
) -> Result<(), CudaError> {
    given(
        device,
        &[
            ("y", &y, dx.len()),
            ("dy", &dy, dx.len()),
            ("dx", &dx, dx.len()),
        ],
    )?;
    let arguments = Arguments::new()
        .view(y)
        .view(dy)
        .view_mut(&dx)
        .long(dx.len())
        .int(store.add());
    each(device, "tanh_backward", dx.len(), &arguments)
}

/// `y[i] = x[i] ⊙ factor` for each row i, or the same added to it.
///
/// # Errors
/// [`CudaError::Length`] if `x` has not whole rows or `y` not as many values, [`CudaError::Call`],
/// [`CudaError::OtherDevice`].
pub fn scale_columns(
    device: &Device,
    x: View<'_, f32>,
    factor: View<'_, f32>,
    y: ViewMut<'_, f32>,
    store: Store,
) -> Result<(), CudaError> {
    given(
        device,
        &[
            ("x", &x, x.len()),
            ("factor", &factor, factor.len()),
            ("y", &y, x.len()),
        ],
    )?;
    rows_of("x", x.len(), factor.len())?;
    let cols = int("columns", factor.len())?;
    let arguments = Arguments::new()
        .view(x)
        .view(factor)
        .view_mut(&y)
        .long(y.len())
        .int(cols)
        .int(store.add());
    each(device, "scale_columns", y.len(), &arguments)
}

/// `average = keep average + (1 - keep) x`: an exponential moving average.
///
/// # Errors
/// [`CudaError::Length`] if there are not as many, [`CudaError::Setting`] for a share outside of [0, 1],
/// [`CudaError::Call`], [`CudaError::OtherDevice`].
pub fn moving_average(
    device: &Device,
    keep: f32,
    x: View<'_, f32>,
    average: ViewMut<'_, f32>,
) -> Result<(), CudaError> {
    given(
        device,
        &[
            ("x", &x, average.len()),
            ("average", &average, average.len()),
        ],
    )?;
    within("keep of an average", keep, 0.0..=1.0, "in [0, 1]")?;
    let n = average.len();
    let arguments = Arguments::new()
        .view(x)
        .view_mut(&average)
        .long(n)
        .float(keep)
        .float(1.0 - keep);
    each(device, "moving_average", n, &arguments)
}

/// `mean += (x - mean) share`: how gradients of several micro-batches are averaged.
///
/// # Errors
/// As [`moving_average`].
pub fn running_mean(
    device: &Device,
    share: f32,
    x: View<'_, f32>,
    mean: ViewMut<'_, f32>,
) -> Result<(), CudaError> {
    given(
        device,
        &[("x", &x, mean.len()), ("mean", &mean, mean.len())],
    )?;
    within("share of an average", share, 0.0..=1.0, "in [0, 1]")?;
    let n = mean.len();
    each(
        device,
        "running_mean",
        n,
        &Arguments::new()
            .view(x)
            .view_mut(&mean)
            .long(n)
            .float(share),
    )
}

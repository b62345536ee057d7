//! Softmax cross-entropy against class indices.

use super::{Store, each, given, int, product, warps};
use crate::driver::Arguments;
use crate::{Buffer, CudaError, Device, View, ViewMut};

/// The class of each row, known to be one.
#[derive(Debug)]
pub struct Targets {
    ids: Buffer<u32>,
    classes: usize,
}

impl Targets {
    /// Brings targets to the device.
    ///
    /// # Errors
    /// [`CudaError::Index`] for a target that is no class, [`CudaError::OutOfMemory`], [`CudaError::Call`].
    pub fn new(device: &Device, targets: &[u32], classes: usize) -> Result<Self, CudaError> {
        super::embedding::check("class", targets, classes)?;
        Ok(Self {
            ids: Buffer::from_slice(device, targets)?,
            classes,
        })
    }
}

/// `probs = softmax(logits)` row by row, and `nll = -ln probs[target]`, in nats. A row with a logit that is NaN or +∞, or
/// of which every logit is -∞, gives NaN, as on the CPU; a class with -∞ among others is merely unlikely.
///
/// # Errors
/// [`CudaError::Length`] if there is not one row a target, [`CudaError::Call`], [`CudaError::OtherDevice`].
pub fn forward(
    device: &Device,
    logits: View<'_, f32>,
    targets: &Targets,
    probs: ViewMut<'_, f32>,
    nll: ViewMut<'_, f32>,
) -> Result<(), CudaError> {
    let (ids, classes) = (targets.ids.view(), targets.classes);
    let rows = ids.len();
    let n = product("logits", &[rows, classes])?;
    given(
        device,
        &[
            ("logits", &logits, n),
            ("targets", &ids, rows),
            ("probs", &probs, n),
            ("nll", &nll, rows),
        ],
    )?;
    let arguments = Arguments::new()
        .view(logits)
        .view(ids)
        .view_mut(&probs)
        .view_mut(&nll);
    let arguments = arguments
        .int(int("rows", rows)?)
        .int(int("classes", classes)?);
    warps(device, "cross_entropy_forward", rows, &arguments)
}

/// `dlogits = factor (probs - onehot(target))`, or the same added to it.
///
/// # Errors
/// As [`forward`].
pub fn backward(
    device: &Device,
    probs: View<'_, f32>,
    targets: &Targets,
    factor: f32,
    dlogits: ViewMut<'_, f32>,
    store: Store,
) -> Result<(), CudaError> {
    let (ids, classes) = (targets.ids.view(), targets.classes);
    let n = product("probs", &[ids.len(), classes])?;
    given(
        device,
        &[
            ("probs", &probs, n),
            ("targets", &ids, ids.len()),
            ("dlogits", &dlogits, n),
        ],
    )?;
    let arguments = Arguments::new()
        .view(probs)
        .view(ids)
        .view_mut(&dlogits)
        .long(n);
    let arguments = arguments
        .int(int("classes", classes)?)
        .float(factor)
        .int(store.add());
    each(device, "cross_entropy_backward", n, &arguments)
}

/// `mean = Σ x / n`, summed in double precision in a fixed order; NaN without values.
///
/// # Errors
/// [`CudaError::Length`] if `mean` is not one value, [`CudaError::Call`], [`CudaError::OtherDevice`].
pub fn mean(device: &Device, x: View<'_, f32>, mean: ViewMut<'_, f32>) -> Result<(), CudaError> {
    given(device, &[("x", &x, x.len()), ("mean", &mean, 1)])?;
    device.launch(
        "mean_of",
        (1, 1),
        256,
        &Arguments::new().view(x).long(x.len()).view_mut(&mean),
    )
}

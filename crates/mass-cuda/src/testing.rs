//! Kernels other than the crate's own: how the emulated device is tested with faults. Only with the feature
//! `emulated`.

use crate::driver::Arguments;
use crate::{CudaError, Device, ViewMut};

/// The PTX that [`Device::open`] loads.
pub const EMBEDDED: &str = crate::ptx::PTX;

/// [`Device::open`] with another module than the embedded one.
///
/// # Errors
/// As there.
pub fn open(ordinal: usize, ptx: &str) -> Result<Device, CudaError> {
    Device::open_with(ordinal, ptx)
}

/// Launches a kernel `f(float *y, int n)`.
///
/// # Errors
/// [`CudaError::Call`] if there is no such kernel, or it cannot be launched.
pub fn launch(
    device: &Device,
    kernel: &str,
    blocks: u32,
    threads: u32,
    y: ViewMut<'_, f32>,
    n: u32,
) -> Result<(), CudaError> {
    let arguments = Arguments::new().view_mut(&y).int(n);
    device.launch(kernel, (blocks, 1), threads, &arguments)
}

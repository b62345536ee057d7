//! What the device can do at most, to compare kernels with.

use super::{given, int, rows_of};
use crate::driver::Arguments;
use crate::{CudaError, Device, ViewMut};

/// Fused multiply-adds that [`multiply_adds`] makes for each value of `y` in each loop.
pub const CHAINS: usize = 16;

/// Each thread, one for each value of `y`, makes `loops` times [`CHAINS`] independent fused multiply-adds in
/// registers: `c = factor c + 1`, begun at its number in the block plus the chain's, and writes the sum of the
/// chains.
///
/// # Errors
/// [`CudaError::Length`] if `y` has not whole blocks of 256 values, [`CudaError::Call`], [`CudaError::OtherDevice`].
pub fn multiply_adds(
    device: &Device,
    loops: usize,
    factor: f32,
    y: ViewMut<'_, f32>,
) -> Result<(), CudaError> {
    given(device, &[("y", &y, y.len())])?;
    let blocks = int("blocks", rows_of("y", y.len(), 256)?)?;
    match blocks {
        0 => Ok(()),
        _ => {
            let arguments = Arguments::new()
                .view_mut(&y)
                .int(int("loops", loops)?)
                .float(factor);
            device.launch("multiply_adds", (blocks, 1), 256, &arguments)
        }
    }
}

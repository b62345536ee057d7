//! The kernels, each behind a function that checks all it is given before the first launch. What they compute is what the
//! functions of the same names in mass-model's `kernels` and `ops` compute, in the same order of sums where that
//! makes sense.
//!
//! Every function takes the device first, and refuses views that lie on another one ([`Device::open`] twice gives two:
//! each has a stream of its own). All work goes to the device's one stream: a function returns when its kernels are
//! launched, and what they do wrong shows at a later call.

pub mod attention;
pub mod ceiling;
pub mod cross_entropy;
pub mod dots;
pub mod elementwise;
pub mod embedding;
pub mod gemm;
pub mod layer_norm;
pub mod linear;
pub mod moe_ffn;
pub mod optimiser;
pub mod patches;
pub mod routing;
pub mod rows;
pub mod squared_error;

use crate::driver::Arguments;
use crate::{Buffer, CudaError, Device, Value, View, ViewMut};

/// What becomes of the values that are there before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// They are replaced, whatever they are.
    Replace,
    /// The result is added to them.
    Add,
}

impl Store {
    fn add(self) -> u32 {
        u32::from(self == Self::Add)
    }
}

/// The nonlinearity between the two matrices of a feed-forward network.
///
/// | name | formula |
/// |---|---|
/// | `Relu` | max(0, x) |
/// | `GeluErf` | x/2 (1 + erf(x/√2)) |
/// | `GeluTanh` | x/2 (1 + tanh(√(2/π) (x + 0.044715 x³))) |
/// | `Silu` | x / (1 + e⁻ˣ) |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// max(0, x)
    Relu = 1,
    /// Gaussian error linear unit with the error function.
    GeluErf = 2,
    /// Its tanh approximation.
    GeluTanh = 3,
    /// Sigmoid linear unit, also called swish.
    Silu = 4,
}

/// The mask of one dropout operation: element i is dropped if a hash of `key` and i says so, with probability `rate`;
/// the others are divided by `1 - rate`. The hash is mass-model's, so are the masks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// Probability of being dropped.
    pub rate: f32,
    /// Which mask.
    pub key: u64,
}

/// Rate and key for a kernel; no rate, no mask.
fn mask(dropout: Option<Dropout>) -> Result<(f32, u64), CudaError> {
    match dropout {
        None => Ok((0.0, 0)),
        Some(Dropout { rate, key }) if rate > 0.0 && rate <= 1.0 => Ok((rate, key)),
        Some(Dropout { rate, .. }) => Err(CudaError::Setting {
            what: "rate of dropout",
            got: rate.to_string(),
            wanted: "a number above 0 and at most 1",
        }),
    }
}

/// Refuses a setting that is NaN or outside of a range.
fn within(
    what: &'static str,
    value: f32,
    range: std::ops::RangeInclusive<f32>,
    wanted: &'static str,
) -> Result<(), CudaError> {
    match range.contains(&value) {
        true => Ok(()),
        false => Err(CudaError::Setting {
            what,
            got: value.to_string(),
            wanted,
        }),
    }
}

/// The largest size that kernels count in 32 bits: below 2³¹ by more than any kernel's step, so that a count may be
/// rounded up to whole steps, and a loop end one step past it, within 31 bits.
const LARGEST: usize = (1 << 31) - (1 << 16);

/// A size that kernels count in 32 bits. What they make of several such sizes, they count in 64.
fn int(what: &'static str, size: usize) -> Result<u32, CudaError> {
    match u32::try_from(size) {
        Ok(n) if size <= LARGEST => Ok(n),
        _ => Err(CudaError::TooLarge {
            what,
            got: size,
            most: LARGEST,
        }),
    }
}

/// A product of sizes.
fn product(what: &'static str, sizes: &[usize]) -> Result<usize, CudaError> {
    let product = sizes.iter().try_fold(1_usize, |p, &n| p.checked_mul(n));
    product.ok_or(CudaError::TooLarge {
        what,
        got: usize::MAX,
        most: usize::MAX,
    })
}

/// Rows of a view that has whole rows of `cols` values.
fn rows_of(what: &'static str, len: usize, cols: usize) -> Result<usize, CudaError> {
    match len.checked_div(cols) {
        Some(rows) if rows * cols == len => Ok(rows),
        Some(rows) => Err(CudaError::Length {
            what,
            wanted: (rows + 1) * cols,
            got: len,
        }),
        None if len == 0 => Ok(0),
        None => Err(CudaError::Length {
            what,
            wanted: 0,
            got: len,
        }),
    }
}

/// Anything that lies on a device.
trait Placed {
    fn place(&self) -> &Device;
    fn values(&self) -> usize;
}

macro_rules! placed {
    ($($t:ty)*) => {$(
        impl<T: Value> Placed for $t {
            fn place(&self) -> &Device {
                self.device()
            }
            fn values(&self) -> usize {
                self.len()
            }
        }
    )*};
}
placed!(View<'_, T> ViewMut<'_, T> Buffer<T>);

/// Refuses what lies elsewhere.
fn same_device(device: &Device, all: &[(&'static str, &dyn Placed)]) -> Result<(), CudaError> {
    match all.iter().find(|(_, one)| one.place() != device) {
        None => Ok(()),
        Some((what, _)) => Err(CudaError::OtherDevice { what }),
    }
}

/// Refuses what lies elsewhere or has not as many values as it must have. Every function does this with all that it is
/// given before it launches anything: what is refused has changed nothing.
fn given(device: &Device, all: &[(&'static str, &dyn Placed, usize)]) -> Result<(), CudaError> {
    for &(what, one, _) in all {
        same_device(device, &[(what, one)])?;
    }
    for &(what, one, wanted) in all {
        CudaError::check(what, wanted, one.values())?;
    }
    Ok(())
}

/// Values of an elementwise kernel that a block handles.
const EACH: usize = 1024;

/// Launches a kernel over `n` values.
fn each(device: &Device, kernel: &str, n: usize, arguments: &Arguments) -> Result<(), CudaError> {
    if n == 0 {
        return Ok(());
    }
    let blocks = int("blocks of a launch", n.div_ceil(EACH))?;
    device.launch(kernel, (blocks, 1), 256, arguments)
}

/// Launches a kernel with a warp for each of `n` rows, eight in a block.
fn warps(device: &Device, kernel: &str, n: usize, arguments: &Arguments) -> Result<(), CudaError> {
    if n == 0 {
        return Ok(());
    }
    let blocks = int("blocks of a launch", n.div_ceil(8))?;
    device.launch(kernel, (blocks, 1), 256, arguments)
}

/// The second dimension of a grid.
fn grid_y(what: &'static str, n: usize) -> Result<u32, CudaError> {
    let most = 65_535;
    match u32::try_from(n) {
        Ok(y) if n <= most => Ok(y),
        _ => Err(CudaError::TooLarge { what, got: n, most }),
    }
}

/// The two halves of an address or a long number, for structures.
fn halves(word: u64) -> [u32; 2] {
    [word as u32, (word >> 32) as u32]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_kernels_stay_within_31_bits_rounded_up_to_any_step() {
        assert_eq!(int("n", LARGEST).unwrap() as usize, LARGEST);
        for n in [LARGEST + 1, 1 << 31, (1 << 32) + 1, usize::MAX] {
            let refused = int("n", n).unwrap_err();
            let (what, got, most) = ("n", n, LARGEST);
            assert_eq!(refused, CudaError::TooLarge { what, got, most });
        }
        // The widest step of a loop, and of a launch, is that of the sums of inner products: 256 pieces of 64.
        for step in [8, 32, 128, 256, 1024, 256 * 64] {
            assert!(i32::try_from(LARGEST.next_multiple_of(step) + step).is_ok());
        }
    }

    #[test]
    fn products_of_sizes_do_not_wrap_around() {
        assert_eq!(product("n", &[3, 0, usize::MAX]).unwrap(), 0);
        assert!(product("n", &[1 << 32, 1 << 32]).is_err());
        assert!(product("n", &[usize::MAX, 2, 0]).is_err());
        assert_eq!(rows_of("x", 0, usize::MAX).unwrap(), 0);
        assert!(rows_of("x", 1, usize::MAX).is_err());
        assert!(rows_of("x", 1, 0).is_err());
        assert_eq!(rows_of("x", 0, 0).unwrap(), 0);
    }

    #[test]
    fn rates_and_ranges_have_ends() {
        let of = |rate| mask(Some(Dropout { rate, key: 3 }));
        assert_eq!(mask(None).unwrap(), (0.0, 0));
        assert_eq!(of(1.0).unwrap(), (1.0, 3));
        assert_eq!(of(f32::MIN_POSITIVE).unwrap(), (f32::MIN_POSITIVE, 3));
        for rate in [0.0, -0.0, -1.0, 1.0_f32.next_up(), f32::NAN, f32::INFINITY] {
            assert!(matches!(of(rate), Err(CudaError::Setting { .. })), "{rate}");
        }
        assert!(within("x", f32::NAN, f32::MIN..=f32::MAX, "finite").is_err());
    }
}

#![doc = include_str!("../README.md")]

mod driver;
mod error;
pub mod kernels;
mod ptx;
#[cfg(feature = "emulated")]
pub mod testing;

pub use driver::{Buffer, Device, Memory, Value, View, ViewMut};
pub use error::CudaError;

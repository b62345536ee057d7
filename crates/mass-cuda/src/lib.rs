#![doc = include_str!("../README.md")]

mod buffer;
mod driver;
mod error;
pub mod kernels;
mod ptx;
#[cfg(feature = "emulated")]
pub mod testing;

pub use buffer::{Buffer, Value, View, ViewMut};
pub use driver::{Device, Memory};
pub use error::CudaError;

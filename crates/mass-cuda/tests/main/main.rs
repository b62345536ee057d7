//! Tests that need a device are behind the feature `emulated`: `cargo xtask cuda-emu` runs them. Without that command,
//! and without a GPU that was asked for, they say so and do nothing: `cargo test --all-features` needs neither a driver
//! nor a compiler.

/// Ends a test where there is no device to run it on, and says so.
#[cfg(feature = "emulated")]
macro_rules! on_device {
    () => {
        if !crate::emulator::there() {
            return;
        }
    };
}

mod without_driver;

#[cfg(feature = "emulated")]
mod attention;
#[cfg(feature = "emulated")]
mod buffers;
#[cfg(feature = "emulated")]
mod elementwise;
#[cfg(feature = "emulated")]
mod emulator;
#[cfg(feature = "emulated")]
mod faults;
#[cfg(feature = "emulated")]
mod gemm;
#[cfg(feature = "emulated")]
mod given;
#[cfg(feature = "emulated")]
mod limits;
#[cfg(feature = "emulated")]
mod losses;
#[cfg(feature = "emulated")]
mod moe;
#[cfg(feature = "emulated")]
mod norms;
#[cfg(feature = "emulated")]
mod optimiser;
#[cfg(feature = "emulated")]
mod routing;
#[cfg(feature = "emulated")]
mod tables;

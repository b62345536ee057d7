//! Values on a device, and views of them.
//!
//! # Safety, in general
//! As in `driver.rs`: pointers come from the driver and live as long as the buffer that holds the device, and borrowing keeps those who
//! write apart from all others.
#![allow(unsafe_code)]

use std::marker::PhantomData;

use cudarc::driver::{result, sys};

use crate::driver::Device;
use crate::error::CudaError;

mod sealed {
    /// # Safety
    /// Any bits are a value, and there are no bytes between values.
    pub unsafe trait Plain: Copy + 'static {}
}

/// A type of values that kernels know: `f32`, `f64`, `i32`, `u32`, `u64`.
pub trait Value: sealed::Plain + Default + Send + Sync {}

macro_rules! values {
    ($($t:ty)*) => {$(
        // SAFETY: a number.
        unsafe impl sealed::Plain for $t {}
        impl Value for $t {}
    )*};
}
values!(f32 f64 i32 u32 u64);

/// Values on a device, freed (in the order of the device's work) when dropped.
pub struct Buffer<T: Value> {
    device: Device,
    /// Zero without values.
    pointer: sys::CUdeviceptr,
    len: usize,
    values: PhantomData<T>,
}

impl<T: Value> Buffer<T> {
    /// A buffer whose values are whatever was there.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`], [`CudaError::Call`].
    pub fn uninitialised(device: &Device, len: usize) -> Result<Self, CudaError> {
        let most = isize::MAX as usize;
        let bytes = len
            .checked_mul(size_of::<T>())
            .filter(|&n| n <= most)
            .ok_or(CudaError::TooLarge {
                what: "values of a buffer",
                got: len,
                most: most / size_of::<T>(),
            })?;
        let pointer = match bytes {
            0 => 0,
            bytes => device.0.allocate(bytes)?,
        };
        Ok(Self {
            device: device.clone(),
            pointer,
            len,
            values: PhantomData,
        })
    }

    /// A buffer of zeros.
    ///
    /// # Errors
    /// As [`uninitialised`](Self::uninitialised).
    pub fn zeros(device: &Device, len: usize) -> Result<Self, CudaError> {
        let mut buffer = Self::uninitialised(device, len)?;
        buffer.view_mut().clear()?;
        Ok(buffer)
    }

    /// A copy of values of the host.
    ///
    /// # Errors
    /// As [`uninitialised`](Self::uninitialised).
    pub fn from_slice(device: &Device, values: &[T]) -> Result<Self, CudaError> {
        let mut buffer = Self::uninitialised(device, values.len())?;
        buffer.view_mut().upload(values)?;
        Ok(buffer)
    }

    /// A copy on the same device.
    ///
    /// # Errors
    /// As [`uninitialised`](Self::uninitialised).
    pub fn try_clone(&self) -> Result<Self, CudaError> {
        let mut copy = Self::uninitialised(&self.device, self.len)?;
        copy.view_mut().copy_from(self.view())?;
        Ok(copy)
    }

    /// The values, once all work before is done.
    ///
    /// # Errors
    /// [`CudaError::Call`].
    pub fn to_vec(&self) -> Result<Vec<T>, CudaError> {
        self.view().to_vec()
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no values.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The device it lies on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// All values, to be read.
    pub fn view(&self) -> View<'_, T> {
        View {
            device: &self.device,
            pointer: self.pointer,
            len: self.len,
            values: PhantomData,
        }
    }

    /// All values, to be written.
    pub fn view_mut(&mut self) -> ViewMut<'_, T> {
        ViewMut {
            device: &self.device,
            pointer: self.pointer,
            len: self.len,
            values: PhantomData,
        }
    }
}

impl<T: Value> Drop for Buffer<T> {
    fn drop(&mut self) {
        if self.pointer != 0 {
            // SAFETY: the pointer came from the driver and is given up here. Nothing can be done about an error.
            unsafe {
                let _ = result::ctx::set_current(self.device.0.context);
                let freed = result::free_async(self.pointer, self.device.0.stream);
                if let Err(e) = freed {
                    self.device.0.broken("freeing memory", e);
                }
            }
        }
    }
}

impl<T: Value> std::fmt::Debug for Buffer<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Buffer<{}>({} on {:?})",
            std::any::type_name::<T>(),
            self.len,
            self.device
        )
    }
}

/// Values of a buffer, to be read.
pub struct View<'a, T: Value> {
    device: &'a Device,
    pointer: sys::CUdeviceptr,
    len: usize,
    values: PhantomData<&'a [T]>,
}

impl<T: Value> Clone for View<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T: Value> Copy for View<'_, T> {}

/// Values of a buffer, to be written.
pub struct ViewMut<'a, T: Value> {
    device: &'a Device,
    pointer: sys::CUdeviceptr,
    len: usize,
    values: PhantomData<&'a mut [T]>,
}

/// What views of both kinds have.
macro_rules! views {
    ($($view:ident)*) => {$(
        impl<'a, T: Value> $view<'a, T> {
            /// Number of values.
            pub fn len(&self) -> usize {
                self.len
            }

            /// Whether there are no values.
            pub fn is_empty(&self) -> bool {
                self.len == 0
            }

            /// The device they lie on.
            pub fn device(&self) -> &'a Device {
                self.device
            }

            /// Some of the values.
            ///
            /// # Errors
            /// [`CudaError::Length`] if the range leaves the view.
            pub fn range(self, range: std::ops::Range<usize>) -> Result<Self, CudaError> {
                let (pointer, len) = part::<T>(self.pointer, self.len, &range)?;
                Ok(Self {
                    pointer,
                    len,
                    ..self
                })
            }

            pub(crate) fn address(&self) -> u64 {
                self.pointer
            }
        }

        impl<T: Value> std::fmt::Debug for $view<'_, T> {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, concat!(stringify!($view), "({})"), self.len)
            }
        }
    )*};
}
views!(View ViewMut);

impl<T: Value> View<'_, T> {
    /// The values, once all work before is done.
    ///
    /// # Errors
    /// [`CudaError::Call`].
    pub fn to_vec(self) -> Result<Vec<T>, CudaError> {
        let mut values = vec![T::default(); self.len];
        self.download(&mut values)?;
        Ok(values)
    }

    /// Writes the values to `to`, once all work before is done.
    ///
    /// # Errors
    /// [`CudaError::Length`] if there are not as many, [`CudaError::Call`].
    pub fn download(self, to: &mut [T]) -> Result<(), CudaError> {
        CudaError::check("download", self.len, to.len())?;
        let inner = &self.device.0;
        inner.enter()?;
        if self.len > 0 {
            // SAFETY: as many values of a plain type on both sides; `to` stays borrowed until the copy is done.
            let copied = unsafe {
                result::memcpy_dtoh_async(to, self.pointer, inner.stream)
                    .and_then(|()| result::stream::synchronize(inner.stream))
            };
            copied.map_err(|e| inner.broken("copying from the device", e))?;
        }
        Ok(())
    }
}

impl<'a, T: Value> ViewMut<'a, T> {
    /// The same values, for a shorter time.
    pub fn reborrow(&mut self) -> ViewMut<'_, T> {
        ViewMut {
            device: self.device,
            pointer: self.pointer,
            len: self.len,
            values: PhantomData,
        }
    }

    /// The same values, to be read for as long as this is borrowed.
    pub fn as_view(&self) -> View<'_, T> {
        View {
            device: self.device,
            pointer: self.pointer,
            len: self.len,
            values: PhantomData,
        }
    }

    /// The values before and from `middle` on.
    ///
    /// # Errors
    /// [`CudaError::Length`] if there are fewer.
    pub fn split_at(self, middle: usize) -> Result<(Self, Self), CudaError> {
        let (_, first) = part::<T>(self.pointer, self.len, &(0..middle))?;
        let (pointer, len) = part::<T>(self.pointer, self.len, &(middle..self.len))?;
        let (device, start) = (self.device, self.pointer);
        let view = |pointer, len| Self {
            device,
            pointer,
            len,
            values: PhantomData,
        };
        Ok((view(start, first), view(pointer, len)))
    }

    /// Cuts the view into pieces of these lengths.
    ///
    /// # Errors
    /// [`CudaError::Length`] if they do not make up the view.
    pub fn split(self, lengths: impl IntoIterator<Item = usize>) -> Result<Vec<Self>, CudaError> {
        let mut rest = self;
        let mut pieces = Vec::new();
        for len in lengths {
            let (piece, others) = rest.split_at(len)?;
            pieces.push(piece);
            rest = others;
        }
        CudaError::check("pieces of a view", 0, rest.len)?;
        Ok(pieces)
    }

    /// Makes all values zero.
    ///
    /// # Errors
    /// [`CudaError::Call`].
    pub fn clear(self) -> Result<(), CudaError> {
        let inner = &self.device.0;
        inner.enter()?;
        if self.len > 0 {
            // SAFETY: the view's own bytes; zero bytes are a value of every plain type.
            let cleared = unsafe {
                result::memset_d8_async(self.pointer, 0, self.len * size_of::<T>(), inner.stream)
            };
            cleared.map_err(|e| inner.broken("clearing memory", e))?;
        }
        Ok(())
    }

    /// Copies values of the host here.
    ///
    /// # Errors
    /// [`CudaError::Length`] if there are not as many, [`CudaError::Call`].
    pub fn upload(self, values: &[T]) -> Result<(), CudaError> {
        CudaError::check("upload", self.len, values.len())?;
        let inner = &self.device.0;
        inner.enter()?;
        if self.len > 0 {
            // SAFETY: as many values of a plain type on both sides. The driver has taken pageable memory over when it
            // returns.
            let copied = unsafe { result::memcpy_htod_async(self.pointer, values, inner.stream) };
            copied.map_err(|e| inner.broken("copying to the device", e))?;
        }
        Ok(())
    }

    /// Copies values of the same device here.
    ///
    /// # Errors
    /// [`CudaError::Length`] if there are not as many, [`CudaError::OtherDevice`], [`CudaError::Call`].
    pub fn copy_from(self, from: View<'_, T>) -> Result<(), CudaError> {
        CudaError::check("copy", self.len, from.len)?;
        if self.device != from.device {
            return Err(CudaError::OtherDevice {
                what: "source of a copy",
            });
        }
        let inner = &self.device.0;
        inner.enter()?;
        if self.len > 0 {
            let bytes = self.len * size_of::<T>();
            // SAFETY: as many bytes on both sides, which borrowing keeps apart.
            let copied = unsafe {
                result::memcpy_dtod_async(self.pointer, from.pointer, bytes, inner.stream)
            };
            copied.map_err(|e| inner.broken("copying on the device", e))?;
        }
        Ok(())
    }
}

fn part<T: Value>(
    pointer: sys::CUdeviceptr,
    len: usize,
    range: &std::ops::Range<usize>,
) -> Result<(sys::CUdeviceptr, usize), CudaError> {
    if range.start > range.end || range.end > len {
        return Err(CudaError::Length {
            what: "part of a view",
            wanted: range.end.max(range.start),
            got: len,
        });
    }
    let offset = match pointer {
        0 => 0,
        _ => (range.start * size_of::<T>()) as u64,
    };
    Ok((pointer + offset, range.len()))
}

//! Values that lie on the host, on a device, or on both.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, OnceLock};

use crate::error::ModelError;
#[cfg(feature = "cuda")]
use {
    mass_cuda::{Buffer, Device},
    std::sync::{Mutex, MutexGuard, PoisonError},
};

/// Values of a parameter, or of something like it: on the host, on a device, or on both.
///
/// The side that was written last is the truth, and the other one is made when somebody asks for it. It dereferences to the
/// values on the host.
///
/// # Panics
/// Reading panics if the truth lies on a device that has failed; [`try_values`](Self::try_values) gives the error.
#[derive(Debug)]
pub struct Mirror {
    host: OnceLock<Arc<Vec<f32>>>,
    #[cfg(feature = "cuda")]
    device: Mutex<Option<Arc<Buffer<f32>>>>,
}

impl From<Vec<f32>> for Mirror {
    fn from(values: Vec<f32>) -> Self {
        Self {
            host: Arc::new(values).into(),
            #[cfg(feature = "cuda")]
            device: Mutex::default(),
        }
    }
}

impl Mirror {
    /// Number of values, wherever they lie.
    #[allow(clippy::len_without_is_empty)] // the slice knows
    pub fn len(&self) -> usize {
        #[cfg(feature = "cuda")]
        if self.host.get().is_none() {
            return self.on_device().as_ref().map_or(0, |buffer| buffer.len());
        }
        self.host.get().map_or(0, |values| values.len())
    }

    /// The values on the host, shared: what an operation keeps for its backward pass.
    pub(crate) fn shared(&self) -> &Arc<Vec<f32>> {
        if let Err(error) = self.try_values() {
            panic!("the values cannot be read: {error}");
        }
        self.host.get().expect("values that were read")
    }

    /// The values on the host, copied from a device if they were changed there.
    ///
    /// # Errors
    /// That of the device, if it has failed.
    pub fn try_values(&self) -> Result<&[f32], ModelError> {
        #[cfg(feature = "cuda")]
        if self.host.get().is_none()
            && let Some(buffer) = &*self.on_device()
            // Whoever had the lock before may have copied them.
            && self.host.get().is_none()
        {
            let values = buffer.to_vec()?;
            self.host.get_or_init(|| Arc::new(values));
        }
        Ok(self.host.get().map_or(&[], |values| values.as_slice()))
    }
}

impl Deref for Mirror {
    type Target = Vec<f32>;

    fn deref(&self) -> &Vec<f32> {
        self.shared()
    }
}

/// What is on the host becomes the truth.
impl DerefMut for Mirror {
    fn deref_mut(&mut self) -> &mut Vec<f32> {
        self.shared();
        #[cfg(feature = "cuda")]
        self.on_device().take();
        let host = self.host.get_mut().expect("values were read");
        Arc::make_mut(host)
    }
}

/// The same values, which are copied when one of the two is changed.
impl Clone for Mirror {
    fn clone(&self) -> Self {
        Self {
            host: self.host.clone(),
            #[cfg(feature = "cuda")]
            device: Mutex::new(self.on_device().clone()),
        }
    }
}

impl PartialEq for Mirror {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

#[cfg(feature = "cuda")]
impl Mirror {
    fn on_device(&self) -> MutexGuard<'_, Option<Arc<Buffer<f32>>>> {
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What an operation on a device has made.
    pub(crate) fn of_buffer(buffer: Arc<Buffer<f32>>) -> Self {
        Self {
            host: OnceLock::new(),
            device: Mutex::new(Some(buffer)),
        }
    }

    /// The values on a device, copied there if they are not on it yet.
    pub(crate) fn on(&self, device: &Device) -> Result<Arc<Buffer<f32>>, ModelError> {
        if let Some(there) = &*self.on_device()
            && there.device() == device
        {
            return Ok(Arc::clone(there));
        }
        let buffer = Arc::new(Buffer::from_slice(device, self.try_values()?)?);
        *self.on_device() = Some(Arc::clone(&buffer));
        Ok(buffer)
    }

    /// Copies the values to a device if they are not on it, and gives this mirror a buffer of its own there if it shares one.
    ///
    /// The values stay the same, after an error too.
    pub(crate) fn own_on(&mut self, device: &Device) -> Result<(), ModelError> {
        let shared = self.on(device)?;
        let mut slot = self.on_device();
        // Given up by this mirror, the buffer has one owner unless an operation, or another mirror, still holds it.
        *slot = None;
        let (own, outcome) = match Arc::try_unwrap(shared) {
            Ok(own) => (Arc::new(own), Ok(())),
            Err(held) => match held.try_clone() {
                Ok(copy) => (Arc::new(copy), Ok(())),
                Err(error) => (held, Err(error.into())),
            },
        };
        *slot = Some(own);
        outcome
    }

    /// The buffer that this mirror [owns](Self::own_on), locked to be written; afterwards call
    /// [`device_written`](Self::device_written).
    pub(crate) fn lend(&self) -> Lent<'_> {
        Lent(self.on_device())
    }

    /// What is on the device has been changed and is the truth; what is on the host no longer counts.
    pub(crate) fn device_written(&mut self) {
        self.host.take();
    }
}

/// A mirror's buffer on a device, locked.
#[cfg(feature = "cuda")]
pub(crate) struct Lent<'a>(MutexGuard<'a, Option<Arc<Buffer<f32>>>>);

#[cfg(feature = "cuda")]
impl Lent<'_> {
    /// The buffer.
    ///
    /// # Panics
    /// If the mirror does not [own](Mirror::own_on) one.
    pub(crate) fn buffer(&mut self) -> &mut Buffer<f32> {
        let own = self.0.as_mut().and_then(Arc::get_mut);
        own.expect("a buffer of the mirror's own")
    }
}

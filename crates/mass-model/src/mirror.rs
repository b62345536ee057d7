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

    /// The values on a device, to be changed there: what is on the host no longer counts.
    pub(crate) fn on_mut(&mut self, device: &Device) -> Result<&mut Buffer<f32>, ModelError> {
        let shared = self.on(device)?;
        let slot = self
            .device
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        // Given up by this mirror, the buffer has one owner unless an operation still holds it.
        *slot = None;
        let own = match Arc::try_unwrap(shared) {
            Ok(own) => own,
            Err(held) => match held.try_clone() {
                Ok(copy) => copy,
                Err(error) => {
                    *slot = Some(held);
                    return Err(error.into());
                }
            },
        };
        let own = slot.insert(Arc::new(own));
        self.host.take();
        Ok(Arc::get_mut(own).expect("just made"))
    }
}

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

impl Mirror {
    /// Gives the values up, which are [on the host](Self::try_values).
    pub(crate) fn into_values(self) -> Vec<f32> {
        let values = Arc::clone(self.shared());
        drop(self);
        Arc::unwrap_or_clone(values)
    }

    /// The same values for another owner, who will change them: on a device they are shared until then.
    pub(crate) fn twin(&self) -> Self {
        #[cfg(feature = "cuda")]
        if self.on_device().is_some() {
            return self.clone();
        }
        self.to_vec().into()
    }

    /// Makes room for `self` where `other` lies, so that it can [move towards it](Self::move_towards) there. The values stay the
    /// same.
    pub(crate) fn join(&mut self, other: &Self) -> Result<(), ModelError> {
        #[cfg(feature = "cuda")]
        if let Some(device) = other.placed() {
            return self.own_on(&device);
        }
        let _ = other;
        self.try_values().map(|_| ())
    }

    /// `self = keep self + (1 - keep) other`, where `other` lies; [`join`](Self::join) comes first, and
    /// [`moved`](Self::moved) when all have been moved: if a device fails meanwhile, what is on the host stays the truth.
    pub(crate) fn move_towards(&mut self, other: &Self, keep: f32) -> Result<(), ModelError> {
        #[cfg(feature = "cuda")]
        if let Some(device) = other.placed() {
            let from = other.on(&device)?;
            let to = &mut self.lend();
            let to = to.buffer().view_mut();
            mass_cuda::kernels::elementwise::moving_average(&device, keep, from.view(), to)?;
            return Ok(());
        }
        for (s, x) in self.iter_mut().zip(other.try_values()?) {
            *s = keep * *s + (1.0 - keep) * x;
        }
        Ok(())
    }

    /// See [`move_towards`](Self::move_towards).
    pub(crate) fn moved(&mut self, other: &Self) {
        #[cfg(feature = "cuda")]
        if other.placed().is_some() {
            self.device_written();
        }
        let _ = other;
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

impl PartialEq<Vec<f32>> for Mirror {
    fn eq(&self, other: &Vec<f32>) -> bool {
        **self == *other
    }
}

impl PartialEq<Mirror> for Vec<f32> {
    fn eq(&self, other: &Mirror) -> bool {
        *self == **other
    }
}

impl PartialEq<[f32]> for Mirror {
    fn eq(&self, other: &[f32]) -> bool {
        self.as_slice() == other
    }
}

impl<const N: usize> PartialEq<[f32; N]> for Mirror {
    fn eq(&self, other: &[f32; N]) -> bool {
        self.as_slice() == other
    }
}

#[cfg(feature = "cuda")]
impl Mirror {
    /// The device that the values are on, on the host too or not.
    fn placed(&self) -> Option<Device> {
        self.on_device()
            .as_ref()
            .map(|buffer| buffer.device().clone())
    }

    /// The device that the values are on, if they are nowhere else.
    pub(crate) fn only_on(&self) -> Option<Device> {
        match self.host.get() {
            Some(_) => None,
            None => self.placed(),
        }
    }

    /// Rows of `cols` values, of values that are on a device alone; `None` for others.
    pub(crate) fn gathered(
        &self,
        rows: &[u32],
        cols: usize,
    ) -> Result<Option<Vec<f32>>, ModelError> {
        use mass_cuda::kernels::{Store, embedding};
        let Some(device) = self.only_on() else {
            return Ok(None);
        };
        let table = self.on(&device)?;
        let index = embedding::Index::new(&device, rows, table.len() / cols.max(1))?;
        let mut to = Buffer::uninitialised(&device, rows.len() * cols)?;
        let (from, view) = (table.view(), to.view_mut());
        embedding::forward(&device, from, &index, view, Store::Replace)?;
        Ok(Some(to.to_vec()?))
    }

    /// Gives the buffer up that this mirror [owns](Self::own_on).
    pub(crate) fn into_buffer(self) -> Option<Buffer<f32>> {
        let own = self.device.into_inner();
        let own = own.unwrap_or_else(PoisonError::into_inner);
        Arc::into_inner(own?)
    }

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

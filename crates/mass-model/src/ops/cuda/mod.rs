//! The operations on a CUDA device, with a tape and gradients of its own.
//!
//! Parameters and their gradients, what operations keep for the backward pass, and the rows between them stay on the device.
//! Down come plans, made by the device or, of routers that it does not know, logits by which the host makes them, and the losses of
//! the rows; up go targets.

mod mixture;
mod pass;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use dfdx::prelude::UniqueId;
use mass_cuda::kernels::{Store, elementwise};
use mass_cuda::{Buffer, CudaError, Device, View, ViewMut};

use super::{Training, check_loss};
use crate::error::ModelError;
use crate::param::{Param, ParamHandle};

/// Gradients of parameters, on a device.
#[derive(Debug)]
pub struct CudaGradients {
    device: Device,
    of: HashMap<UniqueId, Buffer<f32>>,
}

impl CudaGradients {
    /// The device they lie on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// A copy of a parameter's gradient on the host, if an operation has written one.
    ///
    /// # Errors
    /// [`ModelError::Cuda`] if the device has failed.
    pub fn of(&self, param: &Param) -> Result<Option<Vec<f32>>, ModelError> {
        let found = self.find(param).map(View::to_vec);
        Ok(found.transpose()?)
    }

    /// A parameter's gradient, if an operation has written one.
    pub(crate) fn find(&self, param: &Param) -> Option<View<'_, f32>> {
        self.of.get(&param.handle().id()).map(Buffer::view)
    }

    /// Takes a parameter's gradient out.
    pub(crate) fn take(&mut self, param: &Param) -> Option<Buffer<f32>> {
        self.of.remove(&param.handle().id())
    }

    /// Makes some values of a parameter's gradient zero, if there is one.
    pub(crate) fn zero(&mut self, param: &Param, which: Range<usize>) -> Result<(), ModelError> {
        if let Some(gradient) = self.of.get_mut(&param.handle().id()) {
            gradient.view_mut().range(which)?.clear()?;
        }
        Ok(())
    }

    /// Lets `write` add to a parameter's gradient, or be the first to write it.
    fn add(
        &mut self,
        param: &ParamHandle,
        write: impl FnOnce(ViewMut<'_, f32>, Store) -> Result<(), CudaError>,
    ) -> Result<(), ModelError> {
        let (mut gradient, store) = self.take_to_add(param)?;
        write(gradient.view_mut(), store)?;
        self.put(param, gradient);
        Ok(())
    }

    /// Adds values of the host to a parameter's gradient.
    pub(crate) fn add_values(
        &mut self,
        param: &ParamHandle,
        share: &[f32],
    ) -> Result<(), ModelError> {
        let share = Buffer::from_slice(&self.device, share)?;
        let device = self.device.clone();
        self.add(param, |gradient, store| {
            elementwise::masked(&device, None, share.view(), gradient, store)
        })
    }

    /// Takes a gradient out to be added to, or written if there is none yet.
    fn take_to_add(&mut self, param: &ParamHandle) -> Result<(Buffer<f32>, Store), ModelError> {
        Ok(match self.of.remove(&param.id()) {
            Some(gradient) => (gradient, Store::Add),
            None => {
                let room = Buffer::uninitialised(&self.device, param.len())?;
                (room, Store::Replace)
            }
        })
    }

    /// Takes a gradient out to be added to: zeros if there is none yet.
    pub(crate) fn take_or_zeros(&mut self, param: &ParamHandle) -> Result<Buffer<f32>, ModelError> {
        let (mut gradient, store) = self.take_to_add(param)?;
        if store == Store::Replace {
            gradient.view_mut().clear()?;
        }
        Ok(gradient)
    }

    pub(crate) fn put(&mut self, param: &ParamHandle, gradient: Buffer<f32>) {
        self.of.insert(param.id(), gradient);
    }

    /// Lets `write` change a parameter's gradient, if there is one.
    pub(crate) fn write(
        &mut self,
        param: &ParamHandle,
        write: impl FnOnce(ViewMut<'_, f32>) -> Result<(), CudaError>,
    ) -> Result<(), ModelError> {
        match self.of.get_mut(&param.id()) {
            Some(gradient) => Ok(write(gradient.view_mut())?),
            None => Ok(()),
        }
    }
}

/// A batch of vectors on a device, one a row.
#[derive(Clone)]
pub(crate) struct CudaRows {
    values: Arc<Buffer<f32>>,
    shape: (usize, usize),
    /// The operation whose output they are, if it is on the tape.
    operation: Option<usize>,
}

impl CudaRows {
    fn view(&self) -> View<'_, f32> {
        self.values.view()
    }
}

/// The backward half of an operation.
type Backward = Box<dyn FnOnce(&mut Sweep) -> Result<(), ModelError>>;

/// A pass on a device.
pub(crate) struct Cuda {
    device: Device,
    tape: Option<Vec<Backward>>,
}

/// A scalar that the backward pass of the tape begins at.
pub(crate) struct CudaLoss(f32);

impl Cuda {
    /// With a tape, for training.
    pub(crate) fn training(device: &Device) -> Self {
        let tape = Some(Vec::new());
        let device = device.clone();
        Self { device, tape }
    }

    /// Without a tape.
    pub(crate) fn evaluating(device: &Device) -> Self {
        let device = device.clone();
        Self { device, tape: None }
    }

    fn room(&self, len: usize) -> Result<Buffer<f32>, ModelError> {
        Ok(Buffer::uninitialised(&self.device, len)?)
    }

    /// The output of an operation. `backward` is put on the tape, if there is one, and is given the output's gradient, unless
    /// nothing has used the output.
    fn output(
        &mut self,
        values: impl Into<Arc<Buffer<f32>>>,
        shape: (usize, usize),
        backward: impl FnOnce(&mut Sweep, Buffer<f32>) -> Result<(), ModelError> + 'static,
    ) -> CudaRows {
        let operation = self.tape.as_mut().map(|tape| {
            let operation = tape.len();
            tape.push(Box::new(move |sweep: &mut Sweep| {
                match sweep.rows[operation].take() {
                    Some(dy) => backward(sweep, dy),
                    None => Ok(()),
                }
            }));
            operation
        });
        CudaRows {
            values: values.into(),
            shape,
            operation,
        }
    }
}

impl Training for Cuda {
    type Gradients = CudaGradients;

    fn backward(self, loss: CudaLoss) -> Result<(f32, CudaGradients), ModelError> {
        let loss = check_loss(loss.0)?;
        let tape = self.tape.unwrap_or_default();
        let mut sweep = Sweep {
            rows: tape.iter().map(|_| None).collect(),
            params: CudaGradients {
                device: self.device,
                of: HashMap::new(),
            },
        };
        for operation in tape.into_iter().rev() {
            operation(&mut sweep)?;
        }
        Ok((loss, sweep.params))
    }
}

/// The gradients of a backward pass under way.
struct Sweep {
    /// Of each operation's output.
    rows: Vec<Option<Buffer<f32>>>,
    params: CudaGradients,
}

impl Sweep {
    fn device(&self) -> Device {
        self.params.device.clone()
    }

    /// Takes the gradient of rows out, to be added to or written; give it back with [`put`](Self::put).
    fn take(&mut self, x: &CudaRows) -> Result<(Buffer<f32>, Store), ModelError> {
        let before = x
            .operation
            .and_then(|operation| self.rows[operation].take());
        Ok(match before {
            Some(gradient) => (gradient, Store::Add),
            None => {
                let room = Buffer::uninitialised(&self.params.device, x.values.len())?;
                (room, Store::Replace)
            }
        })
    }

    /// Puts a gradient back; that of rows that need none is dropped.
    fn put(&mut self, x: &CudaRows, gradient: Buffer<f32>) {
        if let Some(operation) = x.operation {
            self.rows[operation] = Some(gradient);
        }
    }

    /// Lets `write` add to the gradient of rows, or be the first to write it; it is not called where none is needed.
    fn add(
        &mut self,
        x: &CudaRows,
        write: impl FnOnce(ViewMut<'_, f32>, Store) -> Result<(), CudaError>,
    ) -> Result<(), ModelError> {
        if x.operation.is_some() {
            let (mut gradient, store) = self.take(x)?;
            write(gradient.view_mut(), store)?;
            self.put(x, gradient);
        }
        Ok(())
    }

    /// Adds `share` to the gradient of rows: what it is, if there is none yet.
    fn give(&mut self, x: &CudaRows, share: Buffer<f32>) -> Result<(), ModelError> {
        let Some(operation) = x.operation else {
            return Ok(());
        };
        match &mut self.rows[operation] {
            Some(sum) => elementwise::add_into(&self.params.device, share.view(), sum.view_mut())?,
            none => *none = Some(share),
        }
        Ok(())
    }
}

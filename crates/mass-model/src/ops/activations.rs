use std::ops::Deref;
use std::sync::Arc;

use dfdx::prelude::{Cpu, HasShape, NoneTape, PutTape, ReshapeTo, SplitTape, Tape, TensorFromVec};
use dfdx::tensor::CpuError;

use super::{Rows, take_gradient};
use crate::error::ModelError;
use crate::gradients::{CpuGradients, Identity};
use crate::kernels::dropout::masked;
use crate::kernels::gemm::Store;
use crate::kernels::scratch::{Scratch, give_back, take_vec};
use crate::param::Taken;

/// A batch of vectors, one a row, inside a model.
///
/// dfdx lets nobody read a tensor in place, so that every operation on one copies its input. Between our own operations rows
/// travel like this instead: their values are shared, their memory comes from the pool, and their gradient begins with the
/// first operation that writes it, not with zeros.
#[derive(Clone)]
pub(crate) struct Activations<T = NoneTape> {
    values: Arc<Scratch>,
    shape: (usize, usize),
    /// Where their gradient is; none without a tape, and for what needs no gradient.
    gradient: Option<Identity>,
    tape: T,
}

impl<T> Deref for Activations<T> {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &self.values
    }
}

impl Activations {
    /// Rows that need no gradient.
    pub(crate) fn constant(values: Scratch, shape: (usize, usize)) -> Self {
        debug_assert_eq!(values.len(), shape.0 * shape.1);
        Self {
            values: Arc::new(values),
            shape,
            gradient: None,
            tape: NoneTape,
        }
    }

    /// A copy of a tensor's rows, to be added to rows with a tape of type `T`.
    pub(crate) fn from_residual<T: Tape<f32, Cpu>>(x: &Rows<NoneTape>) -> Result<Self, ModelError> {
        let x = x.clone().try_contiguous()?;
        let gradient = T::OWNS_TAPE.then(|| Identity::of(&x));
        let rows = Activations::from_rows(x)?;
        Ok(Self { gradient, ..rows })
    }

    /// The same rows with a tape.
    pub(crate) fn put_tape<T>(self, tape: T) -> Activations<T> {
        Activations {
            values: self.values,
            shape: self.shape,
            gradient: self.gradient,
            tape,
        }
    }

    /// A tensor of the same values.
    pub(crate) fn to_rows(&self) -> Result<Rows<NoneTape>, ModelError> {
        Ok(Cpu::default().try_tensor_from_vec(self.to_vec(), self.shape)?)
    }

    /// Takes these rows' gradient out, to be added to or written; give it back with [`put_gradient`](Self::put_gradient).
    pub(crate) fn take_gradient(&self, g: &mut CpuGradients) -> Result<Taken, CpuError> {
        let before = match &self.gradient {
            Some(place) => place.take(g)?,
            None => None,
        };
        Ok(match before {
            Some(values) => Taken {
                values,
                store: Store::Add,
            },
            None => Taken {
                values: take_vec(self.len()),
                store: Store::Replace,
            },
        })
    }

    /// Puts a gradient back; that of rows that need none is dropped.
    pub(crate) fn put_gradient(
        &self,
        g: &mut CpuGradients,
        gradient: Vec<f32>,
    ) -> Result<(), CpuError> {
        match &self.gradient {
            Some(place) => place.leave(g, gradient),
            None => {
                give_back(gradient);
                Ok(())
            }
        }
    }

    /// Lets `write` add to these rows' gradient, or be the first to write it; it is not called where none is needed.
    pub(crate) fn add_gradient(
        &self,
        g: &mut CpuGradients,
        write: impl FnOnce(&mut [f32], Store),
    ) -> Result<(), CpuError> {
        if self.gradient.is_none() {
            return Ok(());
        }
        let mut taken = self.take_gradient(g)?;
        write(&mut taken.values, taken.store);
        self.put_gradient(g, taken.values)
    }

    /// Adds `share` to these rows' gradient: what it is, if there is none yet.
    pub(crate) fn give_gradient(
        &self,
        g: &mut CpuGradients,
        share: Vec<f32>,
    ) -> Result<(), CpuError> {
        match &self.gradient {
            Some(place) => give(place, g, share),
            None => {
                give_back(share);
                Ok(())
            }
        }
    }
}

/// Adds `share` to the gradient of a place.
fn give(place: &Identity, g: &mut CpuGradients, share: Vec<f32>) -> Result<(), CpuError> {
    match place.take(g)? {
        None => place.leave(g, share),
        Some(mut sum) => {
            masked(None, &share, &mut sum, Store::Add);
            give_back(share);
            place.leave(g, sum)
        }
    }
}

impl<T> Activations<T> {
    /// Number of rows, and their width.
    pub(crate) fn shape(&self) -> &(usize, usize) {
        &self.shape
    }

    /// The rows without the tape, and the tape.
    pub(crate) fn split_tape(self) -> (Activations, T) {
        let rows = Activations {
            values: self.values,
            shape: self.shape,
            gradient: self.gradient,
            tape: NoneTape,
        };
        (rows, self.tape)
    }
}

impl<T: Tape<f32, Cpu>> Activations<T> {
    /// The output of an operation. `backward` is put on the tape, if it is one, and is given the output's gradient, unless nothing
    /// has used the output.
    pub(crate) fn output(
        mut tape: T,
        values: Scratch,
        shape: (usize, usize),
        backward: impl FnOnce(&mut CpuGradients, &mut Vec<f32>) -> Result<(), CpuError> + 'static,
    ) -> Result<Self, ModelError> {
        let rows = Activations::constant(values, shape);
        if !T::OWNS_TAPE {
            return Ok(rows.put_tape(tape));
        }
        let place = Identity::new(rows.len())?;
        let gradient = Some(place.clone());
        tape.add_backward_op(move |g| {
            if let Some(mut dy) = place.take(g)? {
                backward(g, &mut dy)?;
                give_back(dy);
            }
            Ok(())
        });
        Ok(Activations { gradient, ..rows }.put_tape(tape))
    }

    /// A copy of a tensor's rows, whose gradient is the tensor's.
    pub(crate) fn from_rows(x: Rows<T>) -> Result<Self, ModelError> {
        let (x, tape) = x.try_contiguous()?.split_tape();
        let mut values = Scratch::take(x.shape().0 * x.shape().1);
        x.copy_into(&mut values);
        let rows = Activations::constant(values, *x.shape());
        let gradient = T::OWNS_TAPE.then(|| Identity::of(&x));
        Ok(Activations { gradient, ..rows }.put_tape(tape))
    }

    /// The rows as a tensor; they are copied only if somebody else holds them.
    pub(crate) fn into_rows(self) -> Result<Rows<T>, ModelError> {
        let Self {
            values,
            shape,
            gradient,
            mut tape,
        } = self;
        let values = match Arc::try_unwrap(values) {
            Ok(own) => own.into_vec(),
            Err(shared) => shared.to_vec(),
        };
        let x = Cpu::default().try_tensor_from_vec(values, shape)?;
        if let Some(place) = gradient {
            let ghost = x.ghost();
            tape.add_backward_op(move |g| {
                let dx = take_gradient!(g, ghost);
                give(&place, g, dx)
            });
        }
        Ok(x.put_tape(tape))
    }
}

/// An operation on rows as one on tensors.
pub(crate) fn on_tensors<T: Tape<f32, Cpu>>(
    x: Rows<T>,
    operation: impl FnOnce(Activations<T>) -> Result<Activations<T>, ModelError>,
) -> Result<Rows<T>, ModelError> {
    operation(Activations::from_rows(x)?)?.into_rows()
}

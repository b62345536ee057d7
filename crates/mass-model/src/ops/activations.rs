use std::ops::Deref;
use std::sync::Arc;

use dfdx::prelude::{Cpu, HasShape, NoneTape, PutTape, ReshapeTo, SplitTape, Tape, TensorFromVec};
use dfdx::tensor::CpuError;

use super::{Host, Rows, take_gradient};
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
pub(crate) struct Activations {
    values: Arc<Scratch>,
    shape: (usize, usize),
    /// Where their gradient is; none without a tape, and for what needs no gradient.
    gradient: Option<Identity>,
}

impl Deref for Activations {
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
        }
    }

    /// Number of rows, and their width.
    pub(crate) fn shape(&self) -> &(usize, usize) {
        &self.shape
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

impl Activations {
    /// The output of an operation. `backward` is put on the tape, if it is one, and is given the output's gradient, unless nothing
    /// has used the output.
    pub(crate) fn output<T: Tape<f32, Cpu>>(
        tape: &mut T,
        values: Scratch,
        shape: (usize, usize),
        backward: impl FnOnce(&mut CpuGradients, &mut Vec<f32>) -> Result<(), CpuError> + 'static,
    ) -> Result<Self, ModelError> {
        let rows = Self::constant(values, shape);
        if !T::OWNS_TAPE {
            return Ok(rows);
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
        Ok(Self { gradient, ..rows })
    }

    /// A copy of a tensor's rows, whose gradient is the tensor's where there is a tape of type `T`.
    pub(crate) fn of_tensor<T: Tape<f32, Cpu>>(x: Rows<NoneTape>) -> Result<Self, ModelError> {
        let x = x.try_contiguous()?;
        let mut values = Scratch::take(x.shape().0 * x.shape().1);
        x.copy_into(&mut values);
        let gradient = T::OWNS_TAPE.then(|| Identity::of(&x));
        Ok(Self {
            gradient,
            ..Self::constant(values, *x.shape())
        })
    }

    /// The rows as a tensor; they are copied only if somebody else holds them.
    pub(crate) fn into_tensor<T: Tape<f32, Cpu>>(self, mut tape: T) -> Result<Rows<T>, ModelError> {
        let values = match Arc::try_unwrap(self.values) {
            Ok(own) => own.into_vec(),
            Err(shared) => shared.to_vec(),
        };
        let x = Cpu::default().try_tensor_from_vec(values, self.shape)?;
        if let Some(place) = self.gradient {
            let ghost = x.ghost();
            tape.add_backward_op(move |g| {
                let dx = take_gradient!(g, ghost);
                give(&place, g, dx)
            });
        }
        Ok(x.put_tape(tape))
    }
}

/// A tensor's rows, and a pass on its tape.
pub(crate) fn enter<T: Tape<f32, Cpu>>(x: Rows<T>) -> Result<(Activations, Host<T>), ModelError> {
    let (x, tape) = x.try_contiguous()?.split_tape();
    Ok((Activations::of_tensor::<T>(x)?, Host(tape)))
}

/// What a pass makes of rows, as what it makes of tensors.
pub(crate) fn on_tensors<T: Tape<f32, Cpu>>(
    x: Rows<T>,
    run: impl FnOnce(&mut Host<T>, Activations) -> Result<Activations, ModelError>,
) -> Result<Rows<T>, ModelError> {
    let (x, mut pass) = enter(x)?;
    run(&mut pass, x)?.into_tensor(pass.0)
}

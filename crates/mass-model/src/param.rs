//! Parameters with run-time sizes, and the visitor that optimiser, checkpoints and gradient monitors walk them by.

use std::fmt;
use std::sync::Arc;

use dfdx::prelude::{Cpu, Gradients, TensorFromVec};
use dfdx::tensor::{CpuError, Storage};
use ndarray_rand::rand_distr::{Distribution, Normal, Uniform};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use crate::error::ModelError;
use crate::kernels::gemm::Store;
use crate::kernels::scratch::{give_back, take_vec};
use crate::lineage::Lineage;

/// Gradients of one backward pass, as dfdx hands them out.
pub type CpuGradients = Gradients<f32, Cpu>;

type Slot = dyn for<'g> Fn(&'g mut CpuGradients) -> Result<&'g mut <Cpu as Storage<f32>>::Vec, CpuError>
    + Send
    + Sync;

/// Names the lifetime that ties a slot's result to its argument, which a closure alone cannot.
fn link<F>(f: F) -> Arc<Slot>
where
    F: for<'g> Fn(&'g mut CpuGradients) -> Result<&'g mut <Cpu as Storage<f32>>::Vec, CpuError>
        + Send
        + Sync
        + 'static,
{
    Arc::new(f)
}

/// Number of values of a shape.
fn count(shape: &[usize]) -> Result<usize, ModelError> {
    let product = shape
        .iter()
        .try_fold(1usize, |n, &size| n.checked_mul(size));
    let bytes = product.and_then(|n| n.checked_mul(size_of::<f32>()));
    match (product, bytes) {
        (Some(n), Some(bytes)) if n > 0 && isize::try_from(bytes).is_ok() => Ok(n),
        _ => Err(ModelError::Config(format!(
            "a parameter of shape {shape:?}"
        ))),
    }
}

/// A trainable vector or matrix (row-major).
///
/// It owns its values, which kernels read in place, and a place of its own in dfdx's [`Gradients`]. A clone is another
/// parameter: it has the same values and a gradient of its own, which is what duplicating an expert needs.
pub struct Param {
    values: Arc<Vec<f32>>,
    shape: Vec<usize>,
    decays: bool,
    slot: Arc<Slot>,
    lineage: Lineage,
}

impl Param {
    /// A parameter from its values. `decays` says whether weight decay applies (matrices: yes, biases and norms: no).
    ///
    /// # Errors
    /// [`ModelError::Shape`] if the number of values is not the product of the sizes, [`ModelError::Config`] if a size is zero
    /// or their product larger than memory can be.
    pub fn new(values: Vec<f32>, shape: &[usize], decays: bool) -> Result<Self, ModelError> {
        if values.len() != count(shape)? {
            return Err(ModelError::shape("parameter", shape, &[values.len()]));
        }
        // A dfdx tensor made for its identity alone. It is tiny, so that dfdx neither allocates nor clears a gradient of the
        // parameter's size: the first operation that adds to it brings the buffer, and overwrites it. It has another length than
        // the parameter, so that what dfdx allocates is not taken for a gradient.
        let len = if values.len() == 1 { 2 } else { 1 };
        let ghost = Cpu::default()
            .try_tensor_from_vec(vec![0.0; len], (len,))?
            .ghost();
        let slot = link(move |g| g.get_or_alloc_mut(&ghost));
        Ok(Self {
            values: Arc::new(values),
            shape: shape.to_vec(),
            decays,
            slot,
            lineage: Lineage::new(),
        })
    }

    /// All zero.
    ///
    /// # Errors
    /// [`ModelError::Config`] as [`new`](Self::new).
    pub fn zeros(shape: &[usize], decays: bool) -> Result<Self, ModelError> {
        Self::new(vec![0.0; count(shape)?], shape, decays)
    }

    /// All one.
    ///
    /// # Errors
    /// [`ModelError::Config`] as [`new`](Self::new).
    pub fn ones(shape: &[usize], decays: bool) -> Result<Self, ModelError> {
        Self::new(vec![1.0; count(shape)?], shape, decays)
    }

    /// Drawn from U(-bound, bound).
    ///
    /// # Errors
    /// [`ModelError::Config`] as [`new`](Self::new), and for a bound that is negative or not finite.
    pub fn uniform(
        shape: &[usize],
        bound: f32,
        decays: bool,
        rng: &mut ChaCha8Rng,
    ) -> Result<Self, ModelError> {
        let d =
            Uniform::new_inclusive(-bound, bound).map_err(|e| ModelError::Config(e.to_string()))?;
        Self::new(
            (0..count(shape)?).map(|_| d.sample(rng)).collect(),
            shape,
            decays,
        )
    }

    /// Drawn from N(0, std²).
    ///
    /// # Errors
    /// [`ModelError::Config`] as [`new`](Self::new), and for a standard deviation that is not finite.
    pub fn normal(
        shape: &[usize],
        std: f32,
        decays: bool,
        rng: &mut ChaCha8Rng,
    ) -> Result<Self, ModelError> {
        let d = Normal::new(0.0, std).map_err(|e| ModelError::Config(e.to_string()))?;
        Self::new(
            (0..count(shape)?).map(|_| d.sample(rng)).collect(),
            shape,
            decays,
        )
    }

    /// The values, row-major.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// The values, shared: what an operation keeps for its backward pass.
    pub(crate) fn shared(&self) -> Arc<Vec<f32>> {
        Arc::clone(&self.values)
    }

    /// The values, to be changed in place.
    pub fn values_mut(&mut self) -> &mut [f32] {
        Arc::make_mut(&mut self.values).as_mut_slice()
    }

    /// Gives it other values at once, by no step of an optimiser: a split that parts two gate rows, or the undoing of one.
    ///
    /// Averages of weights ([`Ema`](crate::optim::Ema)) are moved by the same difference at once, where what is learnt reaches them
    /// little by little.
    ///
    /// # Errors
    /// [`ModelError::Shape`] for another number of values.
    pub fn move_to(&mut self, values: &[f32]) -> Result<(), ModelError> {
        if values.len() != self.len() {
            let (expected, found) = ([self.len()], [values.len()]);
            return Err(ModelError::shape("values to move to", &expected, &found));
        }
        let pairs = values.iter().zip(self.values());
        let by: Vec<f32> = pairs.map(|(new, old)| new - old).collect();
        self.values_mut().copy_from_slice(values);
        self.lineage.moved(by);
        Ok(())
    }

    /// A parameter of the same values that is split off this one, in the same model: unlike a clone it begins with the average of
    /// weights ([`Ema`](crate::optim::Ema)) that this one has.
    pub fn offspring(&self) -> Self {
        Self {
            lineage: self.lineage.of_a_newcomer(),
            ..self.clone()
        }
    }

    pub(crate) fn lineage(&self) -> &Lineage {
        &self.lineage
    }

    /// The sizes: one for a vector, two for a matrix.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        self.values.len()
    }

    /// Whether there are no values.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// Whether weight decay applies.
    pub fn decays(&self) -> bool {
        self.decays
    }

    /// This parameter's gradient, allocated (zero) if no operation has added to it.
    ///
    /// # Errors
    /// [`ModelError::Tensor`] if memory is exhausted.
    pub fn gradient<'g>(
        &self,
        gradients: &'g mut CpuGradients,
    ) -> Result<&'g mut Vec<f32>, ModelError> {
        let slot = &mut **(self.slot)(gradients)?;
        if slot.len() != self.len() {
            *slot = zeros(self.len());
        }
        Ok(slot)
    }

    /// This parameter's gradient, if an operation has added to it: `None` for one that took no part, such as those of an expert
    /// that no token was routed to.
    ///
    /// # Errors
    /// [`ModelError::Tensor`] if memory is exhausted.
    pub fn find_gradient<'g>(
        &self,
        gradients: &'g mut CpuGradients,
    ) -> Result<Option<&'g mut Vec<f32>>, ModelError> {
        let slot = &mut **(self.slot)(gradients)?;
        Ok((slot.len() == self.len()).then_some(slot))
    }

    /// Gives this parameter a gradient, in place of any that it has.
    ///
    /// # Errors
    /// [`ModelError::Shape`] if there is not one value for each of the parameter's.
    pub fn set_gradient(
        &self,
        gradients: &mut CpuGradients,
        gradient: Vec<f32>,
    ) -> Result<(), ModelError> {
        if gradient.len() != self.len() {
            let (expected, actual) = ([self.len()], [gradient.len()]);
            return Err(ModelError::shape("gradient", &expected, &actual));
        }
        **(self.slot)(gradients)? = gradient;
        Ok(())
    }

    /// Frees this parameter's gradient; its memory serves the next backward pass.
    ///
    /// # Errors
    /// [`ModelError::Tensor`] if memory is exhausted.
    pub fn clear_gradient(&self, gradients: &mut CpuGradients) -> Result<(), ModelError> {
        let slot = &mut **(self.slot)(gradients)?;
        give_back(std::mem::take(slot));
        Ok(())
    }

    pub(crate) fn handle(&self) -> ParamHandle {
        ParamHandle {
            slot: Arc::clone(&self.slot),
            len: self.len(),
        }
    }
}

impl Clone for Param {
    fn clone(&self) -> Self {
        let copy = Self::new(self.values.to_vec(), &self.shape, self.decays)
            .expect("the shape was checked when self was made");
        Self {
            lineage: self.lineage.of_a_copy(),
            ..copy
        }
    }
}

impl fmt::Debug for Param {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Param")
            .field("shape", &self.shape)
            .field("decays", &self.decays)
            .finish_non_exhaustive()
    }
}

/// A parameter's place among the gradients, for use inside a backward operation.
#[derive(Clone)]
pub(crate) struct ParamHandle {
    slot: Arc<Slot>,
    len: usize,
}

/// A parameter's gradient, taken out to be added to.
pub(crate) struct Taken {
    /// As many values as the parameter has.
    pub(crate) values: Vec<f32>,
    /// What an operation's own share does to them: replace them when nothing has been added yet (their contents are
    /// unspecified then), else add.
    pub(crate) store: Store,
}

fn zeros(len: usize) -> Vec<f32> {
    let mut values = take_vec(len);
    values.par_chunks_mut(1 << 16).for_each(|v| v.fill(0.0));
    values
}

impl ParamHandle {
    /// Takes the gradient out (zeros if there is none yet); give it back with [`put`](Self::put).
    pub(crate) fn take(&self, gradients: &mut CpuGradients) -> Result<Vec<f32>, CpuError> {
        let values = std::mem::take(&mut **(self.slot)(gradients)?);
        Ok(if values.len() == self.len {
            values
        } else {
            zeros(self.len)
        })
    }

    /// Takes the gradient out without clearing it if it is new; give it back with [`put`](Self::put).
    pub(crate) fn take_stored(&self, gradients: &mut CpuGradients) -> Result<Taken, CpuError> {
        let values = std::mem::take(&mut **(self.slot)(gradients)?);
        Ok(if values.len() == self.len {
            Taken {
                values,
                store: Store::Add,
            }
        } else {
            Taken {
                values: take_vec(self.len),
                store: Store::Replace,
            }
        })
    }

    /// Puts a gradient back.
    pub(crate) fn put(
        &self,
        gradients: &mut CpuGradients,
        gradient: Vec<f32>,
    ) -> Result<(), CpuError> {
        **(self.slot)(gradients)? = gradient;
        Ok(())
    }
}

/// Anything with named parameters.
///
/// Names are stable: an expert keeps its own while others come and go, so optimiser state and checkpoints are keyed by
/// them.
pub trait Parameters {
    /// Calls `f` with every parameter and its name, always in the same order.
    fn visit<'a>(&'a self, prefix: &str, f: &mut dyn FnMut(String, &'a Param));

    /// Calls `f` with every parameter, to be changed, and its name, in the order of [`visit`](Self::visit).
    fn visit_mut(&mut self, prefix: &str, f: &mut dyn FnMut(String, &mut Param));

    /// Number of trainable values.
    fn num_values(&self) -> usize {
        let mut n = 0;
        self.visit("", &mut |_, p| n += p.len());
        n
    }
}

/// Joins a prefix and a name by a dot.
pub(crate) fn join(prefix: &str, name: &str) -> String {
    if prefix.is_empty() {
        name.to_owned()
    } else {
        format!("{prefix}.{name}")
    }
}

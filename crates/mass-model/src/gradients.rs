//! Where a parameter's gradient is among dfdx's, and how it stays there.
//!
//! dfdx's `alloc_grads` names the tensors of one module as leaves, and `backward` then drops the gradient of everything else.
//! A parameter of ours is no tensor of that module. So the first operation that writes its gradient asks whether leaves are
//! named, and if they are, names the parameter among them. dfdx has no method that says whether leaves are named, and the one
//! that names them drops all others at once, which in the middle of a backward pass are still needed: hence the detours.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::{Arc, OnceLock};

use dfdx::optim::UnusedTensors;
use dfdx::prelude::{
    Backward, Cpu, Gradients, HasShape, Merge, OwnedTape, PutTape, Shape, SplitTape, Tensor,
    TensorFromVec, Trace, UniqueId,
};
use dfdx::tensor::{CpuError, Storage};

/// Gradients of one backward pass, as dfdx hands them out.
pub type CpuGradients = Gradients<f32, Cpu>;

type Slot = dyn for<'g> Fn(&'g mut CpuGradients) -> Result<&'g mut <Cpu as Storage<f32>>::Vec, CpuError>
    + Send
    + Sync;

/// Names the lifetime that ties a slot's result to its argument, which a closure alone cannot.
fn link<F>(f: F) -> Box<Slot>
where
    F: for<'g> Fn(&'g mut CpuGradients) -> Result<&'g mut <Cpu as Storage<f32>>::Vec, CpuError>
        + Send
        + Sync
        + 'static,
{
    Box::new(f)
}

/// The identity under which dfdx keeps a gradient.
///
/// Its buffer has one of three lengths: that of the gradient, none once the gradient was taken, and another before any
/// operation wrote one.
#[derive(Clone)]
pub(crate) struct Identity(Arc<Place>);

struct Place {
    slot: Box<Slot>,
    id: UniqueId,
    len: usize,
}

impl Identity {
    /// For a gradient of `len` values, at least one.
    pub(crate) fn new(len: usize) -> Result<Self, CpuError> {
        // A dfdx tensor made for its identity alone. It is as short as can be told from the gradient, so that dfdx neither
        // allocates nor clears a buffer of the gradient's size: the first operation that writes it brings the buffer.
        let mark = if len == 1 { 2 } else { 1 };
        let tensor = Cpu::default().try_tensor_from_vec(vec![0.0_f32; mark], (mark,))?;
        let mut ids = UnusedTensors::default();
        ids.add(&tensor);
        let ghost = tensor.ghost();
        Ok(Self(Arc::new(Place {
            slot: link(move |g| g.get_or_alloc_mut(&ghost)),
            id: ids.ids[0],
            len,
        })))
    }

    /// The identity of a tensor: its buffer always has the length of the gradient.
    pub(crate) fn of<S: Shape>(tensor: &Tensor<S, f32, Cpu>) -> Self {
        let mut ids = UnusedTensors::default();
        ids.add(tensor);
        let ghost = tensor.ghost();
        Self(Arc::new(Place {
            slot: link(move |g| g.get_or_alloc_mut(&ghost)),
            id: ids.ids[0],
            len: tensor.shape().num_elements(),
        }))
    }

    /// The key under which dfdx keeps it.
    pub(crate) fn id(&self) -> UniqueId {
        self.0.id
    }

    /// Number of values of the gradient.
    pub(crate) fn len(&self) -> usize {
        self.0.len
    }

    /// The buffer, whatever its length.
    fn buffer<'g>(&self, g: &'g mut CpuGradients) -> Result<&'g mut Vec<f32>, CpuError> {
        Ok(&mut **(self.0.slot)(g)?)
    }

    /// The gradient, if an operation has written one.
    pub(crate) fn find<'g>(
        &self,
        g: &'g mut CpuGradients,
    ) -> Result<Option<&'g mut Vec<f32>>, CpuError> {
        let buffer = self.buffer(g)?;
        Ok((buffer.len() == self.0.len).then_some(buffer))
    }

    /// Takes the gradient out, if there is one.
    pub(crate) fn take(&self, g: &mut CpuGradients) -> Result<Option<Vec<f32>>, CpuError> {
        Ok(self.find(g)?.map(std::mem::take))
    }

    /// Writes the gradient, which `backward` may drop at its end.
    pub(crate) fn leave(&self, g: &mut CpuGradients, gradient: Vec<f32>) -> Result<(), CpuError> {
        *self.buffer(g)? = gradient;
        Ok(())
    }

    /// Writes the gradient, which `backward` keeps from now on.
    pub(crate) fn put(&self, g: &mut CpuGradients, gradient: Vec<f32>) -> Result<(), CpuError> {
        let buffer = self.buffer(g)?;
        let first = buffer.len() != self.0.len && !buffer.is_empty();
        *buffer = gradient;
        if first && leaves_are_named(g)? {
            name_leaf(g, self.0.id)?;
        }
        Ok(())
    }
}

/// Whether `backward` drops gradients of tensors that were not named.
///
/// It is found out by trying on a copy, and remembered among the gradients. Ask before there are many.
pub(crate) fn leaves_are_named(g: &mut CpuGradients) -> Result<bool, CpuError> {
    const UNNAMED: f32 = 1.0;
    const NAMED: f32 = 2.0;
    static ANSWER: OnceLock<Result<Identity, CpuError>> = OnceLock::new();
    let answer = ANSWER.get_or_init(|| Identity::new(2)).as_ref();
    let answer = answer.map_err(|e| *e)?;
    let known = answer.buffer(g)?;
    if known[0] == 0.0 {
        known[0] = UNNAMED;
        let mut copy = g.clone();
        copy.drop_non_leafs();
        if answer.buffer(&mut copy)?[0] != UNNAMED {
            answer.buffer(g)?[0] = NAMED;
            name_leaf(g, answer.0.id)?;
        }
    }
    Ok(answer.buffer(g)?[0] == NAMED)
}

/// Names one more leaf, and drops nothing.
fn name_leaf(g: &mut CpuGradients, id: UniqueId) -> Result<(), CpuError> {
    let mut named = CpuGradients::leaky();
    named.retain_leafs(&[id]);
    let one: Tensor<(), f32, Cpu> = Cpu::default().try_tensor_from_vec(vec![0.0], ())?;
    let tape = |gradients: CpuGradients| -> OwnedTape<f32, Cpu> {
        one.clone().trace(gradients).split_tape().1
    };
    let all = std::mem::replace(g, CpuGradients::leaky());
    let mut both = tape(all).merge(tape(named));
    // Only inside a backward pass can gradients be taken from a tape without a loss.
    let out = Rc::new(RefCell::new(None));
    let inside = Rc::clone(&out);
    dfdx::prelude::Tape::add_backward_op(&mut both, move |g: &mut CpuGradients| {
        inside.replace(Some(std::mem::replace(g, CpuGradients::leaky())));
        Ok(())
    });
    one.put_tape(both).try_backward()?;
    if let Some(gradients) = out.take() {
        *g = gradients;
    }
    Ok(())
}

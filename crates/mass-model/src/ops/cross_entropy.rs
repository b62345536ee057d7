use dfdx::prelude::{Cpu, PutTape, Rank0, Tape, Tensor, TensorFromVec};
use dfdx::tensor::CpuError;

use super::{Activations, Rows, take_gradient};
use crate::error::ModelError;
use crate::gradients::{CpuGradients, leaves_are_named};
use crate::kernels::cross_entropy as kernel;
use crate::kernels::scratch::Scratch;

fn check(&(n, classes): &(usize, usize), targets: &[u32]) -> Result<(usize, usize), ModelError> {
    if n == 0 || targets.len() != n {
        return Err(ModelError::shape("targets", &[n.max(1)], &[targets.len()]));
    }
    if let Some(position) = targets.iter().position(|&t| t as usize >= classes) {
        return Err(ModelError::Index {
            what: "class",
            index: targets[position],
            position,
            len: classes,
        });
    }
    Ok((n, classes))
}

/// A scalar on the tape, with the value of each row it is the mean of.
pub type MeanAndRows<T> = (Tensor<Rank0, f32, Cpu, T>, Vec<f32>);

/// Mean over rows of `-ln softmax(logits)[target]`, in nats, and the value of each row.
///
/// # Errors
/// [`ModelError::Shape`] if there is not one target a row, [`ModelError::Index`] for a target that is no class.
pub fn cross_entropy<T: Tape<f32, Cpu>>(
    logits: Rows<T>,
    targets: &[u32],
) -> Result<MeanAndRows<T>, ModelError> {
    Activations::from_rows(logits)?.cross_entropy(targets)
}

/// `-ln softmax(logits)[target]` of each row, in nats.
///
/// # Errors
/// As [`cross_entropy`].
pub fn token_losses<T: Tape<f32, Cpu>>(
    logits: Rows<T>,
    targets: &[u32],
) -> Result<Vec<f32>, ModelError> {
    Activations::from_rows(logits)?.token_losses(targets)
}

/// The mean of losses as a scalar on a tape, on which `backward` is put with the gradient of that mean.
pub(crate) fn mean<T: Tape<f32, Cpu>>(
    mut tape: T,
    losses: Vec<f32>,
    backward: impl FnOnce(&mut CpuGradients, f32) -> Result<(), CpuError> + 'static,
) -> Result<MeanAndRows<T>, ModelError> {
    let mean = losses.iter().map(|&x| f64::from(x)).sum::<f64>() / losses.len() as f64;
    let loss: Tensor<Rank0, f32, Cpu> =
        Cpu::default().try_tensor_from_vec(vec![mean as f32], ())?;
    if T::OWNS_TAPE {
        let ghost = loss.ghost();
        tape.add_backward_op(move |g| {
            // There is no gradient yet but the loss's: the answer costs nothing now.
            leaves_are_named(g)?;
            let upstream = take_gradient!(g, ghost)[0];
            backward(g, upstream)
        });
    }
    Ok((loss.put_tape(tape), losses))
}

impl<T: Tape<f32, Cpu>> Activations<T> {
    /// [`cross_entropy`]
    pub(crate) fn cross_entropy(self, targets: &[u32]) -> Result<MeanAndRows<T>, ModelError> {
        let (n, classes) = check(self.shape(), targets)?;
        let (logits, tape) = self.split_tape();
        let mut probs = Scratch::copy_of(&logits);
        let mut nll = vec![0.0; n];
        kernel::forward(&mut probs, targets, &mut nll, classes);
        let targets = targets.to_vec();
        mean(tape, nll, move |g, upstream| {
            logits.add_gradient(g, |dlogits, store| {
                let scale = upstream / n as f32;
                kernel::backward(&probs, &targets, scale, (dlogits, store), classes);
            })
        })
    }

    /// [`token_losses`]
    pub(crate) fn token_losses(self, targets: &[u32]) -> Result<Vec<f32>, ModelError> {
        let (n, classes) = check(self.shape(), targets)?;
        let mut probs = Scratch::copy_of(&self);
        let mut nll = vec![0.0; n];
        kernel::forward(&mut probs, targets, &mut nll, classes);
        Ok(nll)
    }
}

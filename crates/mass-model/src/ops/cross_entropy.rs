use dfdx::prelude::{Cpu, PutTape, Rank0, SplitTape, Tape, Tensor, TensorFromVec};
use dfdx::tensor::CpuError;

use super::{Activations, Pass, Rows, enter, take_gradient};
use crate::error::ModelError;
use crate::gradients::{CpuGradients, leaves_are_named};
use crate::kernels::cross_entropy as kernel;
use crate::kernels::gemm::Store;
use crate::kernels::scratch::Scratch;
use crate::pass::numbers;

pub(super) fn check(
    &(n, classes): &(usize, usize),
    targets: &[u32],
) -> Result<(usize, usize), ModelError> {
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

/// What a loss is called that is no number.
pub(crate) const ROW: &str = "the loss of row";

/// A scalar without its tape.
pub(crate) type Scalar = Tensor<Rank0, f32, Cpu>;

/// A scalar on the tape, with the value of each row it is the mean of.
pub type MeanAndRows<T> = (Tensor<Rank0, f32, Cpu, T>, Vec<f32>);

/// Mean over rows of `-ln softmax(logits)[target]`, in nats, and the value of each row.
///
/// # Errors
/// [`ModelError::Shape`] if there is not one target a row, [`ModelError::Index`] for a target that is no class,
/// [`ModelError::NonFinite`] for a row whose loss is NaN or infinite.
pub fn cross_entropy<T: Tape<f32, Cpu>>(
    logits: Rows<T>,
    targets: &[u32],
) -> Result<MeanAndRows<T>, ModelError> {
    let (logits, mut pass) = enter(logits)?;
    let (mean, rows) = pass.cross_entropy(logits, targets)?;
    Ok((mean.put_tape(pass.0), numbers(ROW, rows)?))
}

/// `-ln softmax(logits)[target]` of each row, in nats.
///
/// # Errors
/// As [`cross_entropy`].
pub fn token_losses<T: Tape<f32, Cpu>>(
    logits: Rows<T>,
    targets: &[u32],
) -> Result<Vec<f32>, ModelError> {
    let (logits, mut pass) = enter(logits.split_tape().0)?;
    numbers(ROW, pass.cross_entropy(logits, targets)?.1)
}

/// The mean, summed in double precision.
pub(super) fn mean_of(losses: &[f32]) -> f32 {
    let sum: f64 = losses.iter().map(|&x| f64::from(x)).sum();
    (sum / losses.len() as f64) as f32
}

/// The mean of losses. `backward` is put on the tape, if it is one, with the gradient of that mean.
fn mean<T: Tape<f32, Cpu>>(
    tape: &mut T,
    losses: Vec<f32>,
    backward: impl FnOnce(&mut CpuGradients, f32) -> Result<(), CpuError> + 'static,
) -> Result<(Scalar, Vec<f32>), ModelError> {
    let loss: Scalar = Cpu::default().try_tensor_from_vec(vec![mean_of(&losses)], ())?;
    if T::OWNS_TAPE {
        let ghost = loss.ghost();
        tape.add_backward_op(move |g| {
            // There is no gradient yet but the loss's: the answer costs nothing now.
            leaves_are_named(g)?;
            let upstream = take_gradient!(g, ghost)[0];
            backward(g, upstream)
        });
    }
    Ok((loss, losses))
}

/// [`cross_entropy`]
pub(super) fn run<T: Tape<f32, Cpu>>(
    tape: &mut T,
    logits: Activations,
    targets: &[u32],
) -> Result<(Scalar, Vec<f32>), ModelError> {
    let (n, classes) = check(logits.shape(), targets)?;
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

pub(super) fn check_values(
    &(n, width): &(usize, usize),
    targets: &[f32],
) -> Result<usize, ModelError> {
    if width != 1 {
        let what = format!("a value is the target of a model with one output, not {width}");
        return Err(ModelError::Config(what));
    }
    if targets.len() != n {
        return Err(ModelError::shape("targets", &[n], &[targets.len()]));
    }
    match targets.iter().position(|t| !t.is_finite()) {
        Some(i) => Err(ModelError::NonFinite(format!("target {i}"))),
        None => Ok(n),
    }
}

/// Mean over rows of `(output - target)²` with `outputs: [n, 1]`, and the value of each row.
///
/// # Errors
/// [`ModelError::Config`] for several outputs, [`ModelError::Shape`] if there is not one target a row,
/// [`ModelError::NonFinite`] for a target that is no number.
pub(super) fn run_squared_error<T: Tape<f32, Cpu>>(
    tape: &mut T,
    outputs: Activations,
    targets: &[f32],
) -> Result<(Scalar, Vec<f32>), ModelError> {
    let n = check_values(outputs.shape(), targets)?;
    let pairs = outputs.iter().zip(targets);
    let residuals: Vec<f32> = pairs.map(|(x, t)| x - t).collect();
    let squares: Vec<f32> = residuals.iter().map(|r| r * r).collect();
    mean(tape, squares, move |g, upstream| {
        outputs.add_gradient(g, |dx, store| {
            for (dx, r) in dx.iter_mut().zip(&residuals) {
                let share = upstream * 2.0 * r / n as f32;
                *dx = match store {
                    Store::Add => *dx + share,
                    Store::Replace => share,
                };
            }
        })
    })
}

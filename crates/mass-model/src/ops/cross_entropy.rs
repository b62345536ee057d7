use dfdx::prelude::{
    Cpu, HasShape, PutTape, Rank0, ReshapeTo, SplitTape, Tape, Tensor, TensorFromVec,
};

use super::{Rows, read, take_gradient};
use crate::error::ModelError;
use crate::gradients::leaves_are_named;
use crate::kernels::cross_entropy as kernel;

fn check<T: Tape<f32, Cpu>>(
    logits: &Rows<T>,
    targets: &[u32],
) -> Result<(usize, usize), ModelError> {
    let &(n, classes) = logits.shape();
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
    let (n, classes) = check(&logits, targets)?;
    let (logits, mut tape) = logits.try_contiguous()?.split_tape();
    let mut probs = read(&logits);
    let mut nll = vec![0.0; n];
    kernel::forward(&mut probs, targets, &mut nll, classes);
    let mean = nll.iter().map(|&x| f64::from(x)).sum::<f64>() / n as f64;
    let loss: Tensor<Rank0, f32, Cpu> =
        logits.device().try_tensor_from_vec(vec![mean as f32], ())?;
    if T::OWNS_TAPE {
        let (x_ghost, y_ghost) = (logits.ghost(), loss.ghost());
        let targets = targets.to_vec();
        tape.add_backward_op(move |g| {
            // There is no gradient yet but the loss's: the answer costs nothing now.
            leaves_are_named(g)?;
            let upstream = take_gradient!(g, y_ghost)[0];
            let dlogits = g.get_or_alloc_mut(&x_ghost)?;
            kernel::backward(&probs, &targets, upstream / n as f32, dlogits, classes);
            Ok(())
        });
    }
    Ok((loss.put_tape(tape), nll))
}

/// `-ln softmax(logits)[target]` of each row, in nats.
///
/// # Errors
/// As [`cross_entropy`].
pub fn token_losses<T: Tape<f32, Cpu>>(
    logits: Rows<T>,
    targets: &[u32],
) -> Result<Vec<f32>, ModelError> {
    let (n, classes) = check(&logits, targets)?;
    let logits = logits.try_contiguous()?;
    let mut probs = read(&logits);
    let mut nll = vec![0.0; n];
    kernel::forward(&mut probs, targets, &mut nll, classes);
    Ok(nll)
}

use dfdx::prelude::{Cpu, HasShape, PutTape, ReshapeTo, SplitTape, Tape, TensorFromVec};

use super::{Rows, read, take_gradient};
use crate::error::ModelError;
use crate::kernels::attention::{self, AttentionShape};
use crate::kernels::scratch::Scratch;

/// Multi-head self-attention: `softmax(Q Kᵀ / √(dim/heads)) V`, head by head.
///
/// `qkv: [batch * seq, 3 * dim]` holds queries, keys and values side by side; the output is `[batch * seq, dim]`.
///
/// # Errors
/// [`ModelError::Shape`] if `qkv` has another shape, [`ModelError::Config`] if the heads do not divide the width.
pub fn self_attention<T: Tape<f32, Cpu>>(
    qkv: Rows<T>,
    shape: AttentionShape,
) -> Result<Rows<T>, ModelError> {
    let AttentionShape {
        batch,
        seq,
        heads,
        dim,
        ..
    } = shape;
    if heads == 0 || !dim.is_multiple_of(heads) {
        return Err(ModelError::Config(format!(
            "{heads} attention heads do not divide width {dim}"
        )));
    }
    let n = batch * seq;
    if n == 0 || *qkv.shape() != (n, 3 * dim) {
        let &(rows, cols) = qkv.shape();
        return Err(ModelError::shape(
            "packed queries, keys and values",
            &[n, 3 * dim],
            &[rows, cols],
        ));
    }
    let (qkv, mut tape) = qkv.try_contiguous()?.split_tape();
    let input = read(&qkv);
    let mut probs = Scratch::take(shape.probabilities());
    let mut y = vec![0.0; n * dim];
    attention::forward(&input, &mut probs, &mut y, shape);
    let y = qkv.device().try_tensor_from_vec(y, (n, dim))?;
    if T::OWNS_TAPE {
        let (x_ghost, y_ghost) = (qkv.ghost(), y.ghost());
        tape.add_backward_op(move |g| {
            let dy = take_gradient!(g, y_ghost);
            attention::backward(&input, &probs, &dy, g.get_or_alloc_mut(&x_ghost)?, shape);
            Ok(())
        });
    }
    Ok(y.put_tape(tape))
}

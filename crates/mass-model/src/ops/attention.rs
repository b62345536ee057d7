use dfdx::prelude::{Cpu, HasShape, PutTape, ReshapeTo, SplitTape, Tape, TensorFromVec};

use super::{Rows, Sequences, read, take_gradient};
use crate::error::ModelError;
use crate::kernels::attention::{self, AttentionShape};
use crate::kernels::dropout::Dropout;
use crate::kernels::scratch::Scratch;

/// How [`self_attention`] attends.
#[derive(Clone, Copy, Debug, Default)]
pub struct Attention {
    /// Number of heads; divides the width.
    pub heads: usize,
    /// Whether a token sees only itself and earlier tokens.
    pub causal: bool,
    /// Applied to the attention probabilities.
    pub dropout: Option<Dropout>,
}

/// Multi-head self-attention: `dropout(softmax(Q Kᵀ / √(d/heads))) V`, sequence by sequence and head by head.
///
/// `qkv: [rows, 3 d]` holds queries, keys and values side by side; the output is `[rows, d]`.
///
/// # Errors
/// [`ModelError::Shape`] if `qkv` has another number of rows than the sequences or its width is no multiple of three,
/// [`ModelError::Config`] if the heads do not divide the width.
pub fn self_attention<T: Tape<f32, Cpu>>(
    qkv: Rows<T>,
    sequences: &Sequences,
    how: Attention,
) -> Result<Rows<T>, ModelError> {
    let &(n, cols) = qkv.shape();
    let (rows, dim) = (sequences.rows(), cols / 3);
    if n != rows || cols == 0 || !cols.is_multiple_of(3) {
        let what = "packed queries, keys and values";
        return Err(ModelError::shape(what, &[rows, 3 * dim.max(1)], &[n, cols]));
    }
    if how.heads == 0 || !dim.is_multiple_of(how.heads) {
        return Err(ModelError::Config(format!(
            "{} attention heads do not divide width {dim}",
            how.heads
        )));
    }
    let sequences = sequences.clone();
    fn shape<'a>(sequences: &'a Sequences, how: Attention, dim: usize) -> AttentionShape<'a> {
        AttentionShape {
            offsets: sequences.offsets(),
            keys: sequences.keys(),
            heads: how.heads,
            dim,
            causal: how.causal,
            dropout: how.dropout,
        }
    }
    let (qkv, mut tape) = qkv.try_contiguous()?.split_tape();
    let input = read(&qkv);
    let mut probs = Scratch::take(shape(&sequences, how, dim).probabilities());
    let mut y = vec![0.0; n * dim];
    attention::forward(&input, &mut probs, &mut y, shape(&sequences, how, dim));
    let y = qkv.device().try_tensor_from_vec(y, (n, dim))?;
    if T::OWNS_TAPE {
        let (x_ghost, y_ghost) = (qkv.ghost(), y.ghost());
        tape.add_backward_op(move |g| {
            let dy = take_gradient!(g, y_ghost);
            let dqkv = g.get_or_alloc_mut(&x_ghost)?;
            attention::backward(&input, &probs, &dy, dqkv, shape(&sequences, how, dim));
            Ok(())
        });
    }
    Ok(y.put_tape(tape))
}

use dfdx::prelude::{Cpu, Tape};

use super::{Activations, Pass, Rows, Sequences, on_tensors};
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
    on_tensors(qkv, |pass, qkv| pass.self_attention(qkv, sequences, how))
}

/// Rows, and the width that comes out.
pub(super) fn check(
    &(n, cols): &(usize, usize),
    sequences: &Sequences,
    how: Attention,
) -> Result<(usize, usize), ModelError> {
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
    Ok((n, dim))
}

/// [`self_attention`]
pub(super) fn run<T: Tape<f32, Cpu>>(
    tape: &mut T,
    qkv: Activations,
    sequences: &Sequences,
    how: Attention,
) -> Result<Activations, ModelError> {
    let (n, dim) = check(qkv.shape(), sequences, how)?;
    // Without a tape nothing is kept.
    let longest_kept = if T::OWNS_TAPE {
        attention::LONGEST_KEPT
    } else {
        0
    };
    fn shape(
        sequences: &Sequences,
        (how, dim, longest_kept): (Attention, usize, usize),
    ) -> AttentionShape<'_> {
        AttentionShape {
            offsets: sequences.offsets(),
            keys: sequences.keys(),
            heads: how.heads,
            dim,
            causal: how.causal,
            dropout: how.dropout,
            longest_kept,
        }
    }
    let how = (how, dim, longest_kept);
    let sequences = sequences.clone();
    let mut kept = Scratch::take(shape(&sequences, how).kept());
    let mut y = Scratch::take(n * dim);
    attention::forward(&qkv, &mut kept, &mut y, shape(&sequences, how));
    Activations::output(tape, y, (n, dim), move |g, dy| {
        qkv.add_gradient(g, |dqkv, store| {
            let shape = shape(&sequences, how);
            attention::backward(&qkv, &kept, dy, (dqkv, store), shape);
        })
    })
}

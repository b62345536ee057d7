//! Multi-head self-attention over packed queries, keys and values.

use super::dropout::Dropout;
use super::gemm::{Mat, MatMut, Store, gemm};
use super::scratch::Scratch;
use super::{vector, vectorised};

/// Which rows attend to which, and how.
#[derive(Clone, Copy, Debug)]
pub struct AttentionShape<'a> {
    /// Sequence i is rows `offsets[i]..offsets[i + 1]`.
    pub offsets: &'a [usize],
    /// Whether each row may be attended to; all may without a mask.
    pub keys: Option<&'a [bool]>,
    /// Heads; divides `dim`.
    pub heads: usize,
    /// Model width.
    pub dim: usize,
    /// Whether a token sees only itself and earlier tokens.
    pub causal: bool,
    /// Applied to the attention probabilities.
    pub dropout: Option<Dropout>,
}

impl AttentionShape<'_> {
    /// Elements of the attention probabilities: `heads Σ_i length_i²`.
    pub fn probabilities(&self) -> usize {
        self.lengths().map(|n| self.heads * n * n).sum()
    }

    fn lengths(&self) -> impl Iterator<Item = usize> + '_ {
        self.offsets.windows(2).map(|w| w[1] - w[0])
    }
}

/// A run of sequences, with the probabilities before them.
#[derive(Clone, Copy)]
struct Span<'a> {
    offsets: &'a [usize],
    first_probability: usize,
}

impl<'a> Span<'a> {
    fn rows(&self) -> usize {
        self.offsets[self.offsets.len() - 1] - self.offsets[0]
    }

    /// Both halves and the number of probabilities in the first; `None` for a single sequence.
    fn halves(self, heads: usize) -> Option<(Self, Self, usize)> {
        let sequences = self.offsets.len() - 1;
        if sequences < 2 {
            return None;
        }
        let middle = sequences / 2;
        let (a, b) = (&self.offsets[..=middle], &self.offsets[middle..]);
        let probabilities: usize = a
            .windows(2)
            .map(|w| heads * (w[1] - w[0]) * (w[1] - w[0]))
            .sum();
        let first = self.first_probability;
        let left = Self {
            offsets: a,
            first_probability: first,
        };
        let right = Self {
            offsets: b,
            first_probability: first + probabilities,
        };
        Some((left, right, probabilities))
    }
}

/// `y = dropout(softmax(Q Kᵀ / √(dim/heads))) V` for each sequence and head.
///
/// `qkv` is `[rows, 3*dim]` (queries, keys, values side by side), `y` is `[rows, dim]`, and `probs` receives, sequence by
/// sequence, `[heads, length, length]` before dropout. A row that can see no key gives zeros.
pub fn forward(qkv: &[f32], probs: &mut [f32], y: &mut [f32], shape: AttentionShape<'_>) {
    if shape.offsets.len() < 2 {
        return;
    }
    let all = Span {
        offsets: shape.offsets,
        first_probability: 0,
    };
    forward_span(all, qkv, probs, y, shape);
}

// Halving keeps the work of a thread together and needs no list of tasks.
fn forward_span(
    span: Span<'_>,
    qkv: &[f32],
    probs: &mut [f32],
    y: &mut [f32],
    shape: AttentionShape<'_>,
) {
    if let Some((a, b, cut)) = span.halves(shape.heads) {
        let rows = a.rows();
        let (qkv_a, qkv_b) = qkv.split_at(rows * 3 * shape.dim);
        let (p_a, p_b) = probs.split_at_mut(cut);
        let (y_a, y_b) = y.split_at_mut(rows * shape.dim);
        rayon::join(
            || forward_span(a, qkv_a, p_a, y_a, shape),
            || forward_span(b, qkv_b, p_b, y_b, shape),
        );
        return;
    }
    let seq = span.rows();
    if seq == 0 {
        return;
    }
    let (head, packed) = (shape.dim / shape.heads, 3 * shape.dim);
    let scale = 1.0 / (head as f32).sqrt();
    let keys = shape.keys.map(|k| &k[span.offsets[0]..][..seq]);
    let mut dropped = shape.dropout.map(|_| Scratch::take(seq * seq));
    for (h, p) in probs.chunks_exact_mut(seq * seq).enumerate() {
        let q = Mat::strided(&qkv[h * head..], seq, head, packed);
        let k = Mat::strided(&qkv[shape.dim + h * head..], seq, head, packed);
        let v = Mat::strided(&qkv[2 * shape.dim + h * head..], seq, head, packed);
        gemm(MatMut::new(p, seq, seq), q, k.t(), scale, Store::Replace);
        vectorised(
            #[inline(always)]
            || softmax_rows(p, seq, keys, shape.causal),
        );
        let p: &[f32] = match (&mut dropped, shape.dropout) {
            (Some(dropped), Some(dropout)) => {
                dropped.copy_from_slice(p);
                let first = span.first_probability + h * seq * seq;
                vectorised(
                    #[inline(always)]
                    || dropout.scale(dropped, first),
                );
                dropped
            }
            _ => p,
        };
        gemm(
            MatMut::strided(&mut y[h * head..], seq, head, shape.dim),
            Mat::new(p, seq, seq),
            v,
            1.0,
            Store::Replace,
        );
    }
}

#[inline(always)]
fn softmax_rows(p: &mut [f32], seq: usize, keys: Option<&[bool]>, causal: bool) {
    for (i, row) in p.chunks_exact_mut(seq).enumerate() {
        let (seen, hidden) = row.split_at_mut(if causal { i + 1 } else { seq });
        hidden.fill(0.0);
        match keys {
            None => {
                vector::softmax_in_place(seen);
            }
            Some(keys) if keys[..seen.len()].contains(&true) => {
                for (x, &key) in seen.iter_mut().zip(keys) {
                    *x = if key { *x } else { f32::MIN };
                }
                vector::softmax_in_place(seen);
                // exp flushes to a tiny positive number: make it zero.
                for (x, &key) in seen.iter_mut().zip(keys) {
                    *x = if key { *x } else { 0.0 };
                }
            }
            Some(_) => seen.fill(0.0),
        }
    }
}

/// Writes to `dqkv`, or adds to it, the gradient for an upstream gradient `dy`, given what [`forward`] wrote to `probs`.
pub fn backward(
    qkv: &[f32],
    probs: &[f32],
    dy: &[f32],
    (dqkv, store): (&mut [f32], Store),
    shape: AttentionShape<'_>,
) {
    if shape.offsets.len() < 2 {
        return;
    }
    let all = Span {
        offsets: shape.offsets,
        first_probability: 0,
    };
    backward_span(all, qkv, probs, dy, (dqkv, store), shape);
}

fn backward_span(
    span: Span<'_>,
    qkv: &[f32],
    probs: &[f32],
    dy: &[f32],
    (dqkv, store): (&mut [f32], Store),
    shape: AttentionShape<'_>,
) {
    let AttentionShape { heads, dim, .. } = shape;
    if let Some((a, b, cut)) = span.halves(heads) {
        let rows = a.rows();
        let (qkv_a, qkv_b) = qkv.split_at(rows * 3 * dim);
        let (p_a, p_b) = probs.split_at(cut);
        let (dy_a, dy_b) = dy.split_at(rows * dim);
        let (dqkv_a, dqkv_b) = dqkv.split_at_mut(rows * 3 * dim);
        rayon::join(
            || backward_span(a, qkv_a, p_a, dy_a, (dqkv_a, store), shape),
            || backward_span(b, qkv_b, p_b, dy_b, (dqkv_b, store), shape),
        );
        return;
    }
    let seq = span.rows();
    if seq == 0 {
        return;
    }
    let (head, packed) = (dim / heads, 3 * dim);
    let scale = 1.0 / (head as f32).sqrt();
    let mut ds = Scratch::take(seq * seq);
    let mut dropped = shape.dropout.map(|_| Scratch::take(seq * seq));
    for (h, p) in probs.chunks_exact(seq * seq).enumerate() {
        let q = Mat::strided(&qkv[h * head..], seq, head, packed);
        let k = Mat::strided(&qkv[dim + h * head..], seq, head, packed);
        let v = Mat::strided(&qkv[2 * dim + h * head..], seq, head, packed);
        let dy = Mat::strided(&dy[h * head..], seq, head, dim);
        let first = span.first_probability + h * seq * seq;
        let used: &[f32] = match (&mut dropped, shape.dropout) {
            (Some(dropped), Some(dropout)) => {
                dropped.copy_from_slice(p);
                vectorised(
                    #[inline(always)]
                    || dropout.scale(dropped, first),
                );
                dropped
            }
            _ => p,
        };
        let grad = |dqkv: &mut [f32], at: usize, a: Mat<'_>, b: Mat<'_>, scale: f32| {
            gemm(
                MatMut::strided(&mut dqkv[at + h * head..], seq, head, packed),
                a,
                b,
                scale,
                store,
            );
        };
        grad(dqkv, 2 * dim, Mat::new(used, seq, seq).t(), dy, 1.0);
        gemm(
            MatMut::new(&mut ds, seq, seq),
            dy,
            v.t(),
            1.0,
            Store::Replace,
        );
        vectorised(
            #[inline(always)]
            || {
                if let Some(dropout) = shape.dropout {
                    dropout.scale(&mut ds, first);
                }
                for (ds, p) in ds.chunks_exact_mut(seq).zip(p.chunks_exact(seq)) {
                    let inner = vector::dot(ds, p);
                    for (ds, p) in ds.iter_mut().zip(p) {
                        *ds = p * (*ds - inner);
                    }
                }
            },
        );
        let ds = Mat::new(&ds, seq, seq);
        grad(dqkv, 0, ds, k, scale);
        grad(dqkv, dim, ds.t(), q, scale);
    }
}

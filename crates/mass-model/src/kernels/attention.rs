//! Multi-head self-attention over packed queries, keys and values.

use super::dropout::Dropout;
use rayon::prelude::*;

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

    /// Whether there are sequences enough to keep every thread busy, so that heads need not be shared out.
    fn one_by_one(&self) -> bool {
        self.offsets.len() > rayon::current_num_threads()
    }

    fn scale(&self) -> f32 {
        1.0 / ((self.dim / self.heads) as f32).sqrt()
    }

    /// Queries, keys and values of a head, `[seq, dim / heads]` each.
    fn parts<'b>(&self, qkv: &'b [f32], seq: usize, h: usize) -> [Mat<'b>; 3] {
        let head = self.dim / self.heads;
        let at =
            |part: usize| Mat::strided(&qkv[part * self.dim + h * head..], seq, head, 3 * self.dim);
        [at(0), at(1), at(2)]
    }

    /// The probabilities that dropout leaves, if there is any.
    fn dropped(&self, p: &[f32], first: usize) -> Option<Scratch> {
        let dropout = self.dropout?;
        let mut dropped = Scratch::copy_of(p);
        vectorised(
            #[inline(always)]
            || dropout.scale(&mut dropped, first),
        );
        Some(dropped)
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
    let (head, dim) = (shape.dim / shape.heads, shape.dim);
    let probs = probs.chunks_exact_mut(seq * seq).enumerate();
    if shape.one_by_one() {
        for (h, p) in probs {
            let y = MatMut::strided(&mut y[h * head..], seq, head, dim);
            forward_head(span, h, qkv, p, y, shape);
        }
        return;
    }
    let mut parts = Scratch::take(seq * dim);
    let with_parts: Vec<_> = probs.zip(parts.chunks_exact_mut(seq * head)).collect();
    with_parts.into_par_iter().for_each(|((h, p), part)| {
        forward_head(span, h, qkv, p, MatMut::new(part, seq, head), shape);
    });
    for (h, part) in parts.chunks_exact(seq * head).enumerate() {
        for (y, part) in y.chunks_exact_mut(dim).zip(part.chunks_exact(head)) {
            y[h * head..][..head].copy_from_slice(part);
        }
    }
}

/// Probabilities `p` and output `y` of one head of a sequence.
fn forward_head(
    span: Span<'_>,
    h: usize,
    qkv: &[f32],
    p: &mut [f32],
    y: MatMut<'_>,
    shape: AttentionShape<'_>,
) {
    let seq = span.rows();
    let [q, k, v] = shape.parts(qkv, seq, h);
    let keys = shape.keys.map(|k| &k[span.offsets[0]..][..seq]);
    gemm(
        MatMut::new(p, seq, seq),
        q,
        k.t(),
        shape.scale(),
        Store::Replace,
    );
    vectorised(
        #[inline(always)]
        || softmax_rows(p, seq, keys, shape.causal),
    );
    let dropped = shape.dropped(p, span.first_probability + h * seq * seq);
    let p = Mat::new(dropped.as_deref().unwrap_or(p), seq, seq);
    gemm(y, p, v, 1.0, Store::Replace);
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
    let head = dim / heads;
    let probs = probs.chunks_exact(seq * seq).enumerate();
    if shape.one_by_one() {
        for (h, p) in probs {
            let starts = [0, dim, 2 * dim].map(|part| part + h * head);
            let to = (&mut *dqkv, starts, 3 * dim);
            backward_head(span, h, qkv, p, dy, (to, store), shape);
        }
        return;
    }
    let mut parts = Scratch::take(seq * 3 * dim);
    let with_parts: Vec<_> = probs.zip(parts.chunks_exact_mut(seq * 3 * head)).collect();
    with_parts.into_par_iter().for_each(|((h, p), part)| {
        let to = (part, [0, head, 2 * head], 3 * head);
        backward_head(span, h, qkv, p, dy, (to, Store::Replace), shape);
    });
    for (h, part) in parts.chunks_exact(seq * 3 * head).enumerate() {
        for (d, part) in dqkv
            .chunks_exact_mut(3 * dim)
            .zip(part.chunks_exact(3 * head))
        {
            for (d, part) in d.chunks_exact_mut(dim).zip(part.chunks_exact(head)) {
                let d = &mut d[h * head..][..head];
                match store {
                    Store::Replace => d.copy_from_slice(part),
                    Store::Add => vector::add_assign(d, part),
                }
            }
        }
    }
}

/// The gradients of queries, keys and values of one head of a sequence: each begins at its start, with rows a stride apart.
fn backward_head(
    span: Span<'_>,
    h: usize,
    qkv: &[f32],
    p: &[f32],
    dy: &[f32],
    ((to, [to_q, to_k, to_v], stride), store): ((&mut [f32], [usize; 3], usize), Store),
    shape: AttentionShape<'_>,
) {
    let seq = span.rows();
    let (head, first) = (
        shape.dim / shape.heads,
        span.first_probability + h * seq * seq,
    );
    let [q, k, v] = shape.parts(qkv, seq, h);
    let dy = Mat::strided(&dy[h * head..], seq, head, shape.dim);
    let mut give = |start: usize, a: Mat<'_>, b: Mat<'_>, scale: f32| {
        let to = MatMut::strided(&mut to[start..], seq, head, stride);
        gemm(to, a, b, scale, store);
    };
    let dropped = shape.dropped(p, first);
    let used = Mat::new(dropped.as_deref().unwrap_or(p), seq, seq);
    give(to_v, used.t(), dy, 1.0);
    let mut ds = dropped.unwrap_or_else(|| Scratch::take(seq * seq));
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
    give(to_q, ds, k, shape.scale());
    give(to_k, ds.t(), q, shape.scale());
}

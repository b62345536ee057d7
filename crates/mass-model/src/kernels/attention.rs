//! Multi-head self-attention over packed queries, keys and values.

use rayon::prelude::*;

use super::gemm::{Mat, MatMut, Store, gemm};
use super::scratch::Scratch;
use super::{vector, vectorised};

/// Sizes of a self-attention call: `batch` sequences of `seq` tokens, `heads` heads over width `dim`.
#[derive(Clone, Copy, Debug)]
pub struct AttentionShape {
    /// Sequences.
    pub batch: usize,
    /// Tokens of each sequence.
    pub seq: usize,
    /// Heads; divides `dim`.
    pub heads: usize,
    /// Model width.
    pub dim: usize,
    /// Whether a token sees only itself and earlier tokens.
    pub causal: bool,
}

impl AttentionShape {
    /// Elements of the attention probabilities.
    pub fn probabilities(&self) -> usize {
        self.batch * self.heads * self.seq * self.seq
    }

    fn seen(&self, row: usize) -> usize {
        if self.causal { row + 1 } else { self.seq }
    }
}

/// `y = softmax(Q Kᵀ / √(dim/heads)) V` for each sequence and head.
///
/// `qkv` is `[batch*seq, 3*dim]` (queries, keys, values side by side), `probs` receives
/// `[batch, heads, seq, seq]`, `y` is `[batch*seq, dim]`.
pub fn forward(qkv: &[f32], probs: &mut [f32], y: &mut [f32], shape: AttentionShape) {
    let AttentionShape {
        seq, heads, dim, ..
    } = shape;
    let (head, packed) = (dim / heads, 3 * dim);
    let scale = 1.0 / (head as f32).sqrt();
    y.par_chunks_mut(seq * dim)
        .zip(qkv.par_chunks(seq * packed))
        .zip(probs.par_chunks_mut(heads * seq * seq))
        .for_each(|((y, qkv), probs)| {
            for (h, p) in probs.chunks_exact_mut(seq * seq).enumerate() {
                let q = Mat::strided(&qkv[h * head..], seq, head, packed);
                let k = Mat::strided(&qkv[dim + h * head..], seq, head, packed);
                let v = Mat::strided(&qkv[2 * dim + h * head..], seq, head, packed);
                gemm(MatMut::new(p, seq, seq), q, k.t(), scale, Store::Replace);
                vectorised(
                    #[inline(always)]
                    || {
                        for (i, row) in p.chunks_exact_mut(seq).enumerate() {
                            let (seen, hidden) = row.split_at_mut(shape.seen(i));
                            vector::softmax_in_place(seen);
                            hidden.fill(0.0);
                        }
                    },
                );
                gemm(
                    MatMut::strided(&mut y[h * head..], seq, head, dim),
                    Mat::new(p, seq, seq),
                    v,
                    1.0,
                    Store::Replace,
                );
            }
        });
}

/// Adds to `dqkv` the gradient for an upstream gradient `dy`, given what [`forward`] wrote to `probs`.
pub fn backward(qkv: &[f32], probs: &[f32], dy: &[f32], dqkv: &mut [f32], shape: AttentionShape) {
    let AttentionShape {
        seq, heads, dim, ..
    } = shape;
    let (head, packed) = (dim / heads, 3 * dim);
    let scale = 1.0 / (head as f32).sqrt();
    dqkv.par_chunks_mut(seq * packed)
        .zip(qkv.par_chunks(seq * packed))
        .zip(dy.par_chunks(seq * dim))
        .zip(probs.par_chunks(heads * seq * seq))
        .for_each(|(((dqkv, qkv), dy), probs)| {
            let mut ds = Scratch::take(seq * seq);
            for (h, p) in probs.chunks_exact(seq * seq).enumerate() {
                let q = Mat::strided(&qkv[h * head..], seq, head, packed);
                let k = Mat::strided(&qkv[dim + h * head..], seq, head, packed);
                let v = Mat::strided(&qkv[2 * dim + h * head..], seq, head, packed);
                let dy = Mat::strided(&dy[h * head..], seq, head, dim);
                let p_view = Mat::new(p, seq, seq);
                let grad = |dqkv: &mut [f32], at: usize, a: Mat<'_>, b: Mat<'_>, scale: f32| {
                    gemm(
                        MatMut::strided(&mut dqkv[at + h * head..], seq, head, packed),
                        a,
                        b,
                        scale,
                        Store::Add,
                    );
                };
                grad(dqkv, 2 * dim, p_view.t(), dy, 1.0);
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
        });
}

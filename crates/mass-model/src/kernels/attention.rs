//! Multi-head self-attention over packed queries, keys and values.

use super::dropout::Dropout;
use std::ops::Range;

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
    /// Length up to which a sequence's probabilities are kept for the backward pass, which makes those of longer ones anew
    /// from two numbers a row: see [`LONGEST_KEPT`].
    pub longest_kept: usize,
}

/// Up to this length probabilities take no more memory than a layer's other activations, roughly.
pub const LONGEST_KEPT: usize = 256;

/// Queries of a long sequence that are handled at a time.
const QUERIES: usize = 128;

impl AttentionShape<'_> {
    /// Number of values that [`forward`] keeps for [`backward`].
    pub fn kept(&self) -> usize {
        self.kept_of(self.offsets)
    }

    fn kept_of(&self, offsets: &[usize]) -> usize {
        let lengths = offsets.windows(2).map(|w| w[1] - w[0]);
        lengths.map(|n| self.heads * self.kept_of_head(n)).sum()
    }

    /// Values kept of a head of a sequence: its probabilities, or the maximum and the inverse sum of each row.
    fn kept_of_head(&self, seq: usize) -> usize {
        match self.keeps(seq) {
            true => seq * seq,
            false => 2 * seq,
        }
    }

    fn keeps(&self, seq: usize) -> bool {
        seq <= self.longest_kept
    }

    /// Whether there are sequences enough to keep every thread busy, so that heads need not be shared out.
    fn one_by_one(&self) -> bool {
        self.offsets.len() > rayon::current_num_threads()
    }

    fn scale(&self) -> f32 {
        1.0 / ((self.dim / self.heads) as f32).sqrt()
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

    /// Both halves; `None` for a single sequence.
    fn halves(self, heads: usize) -> Option<(Self, Self)> {
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
        Some((left, right))
    }
}

/// `y = dropout(softmax(Q Kᵀ / √(dim/heads))) V` for each sequence and head.
///
/// `qkv` is `[rows, 3*dim]` (queries, keys, values side by side), `y` is `[rows, dim]`, and `kept`, which is as long as the
/// shape says, receives what [`backward`] needs: sequence by sequence and head by head, the probabilities `[length, length]`
/// before dropout, or `[length, 2]` of a long one. A row that can see no key gives zeros.
pub fn forward(qkv: &[f32], kept: &mut [f32], y: &mut [f32], shape: AttentionShape<'_>) {
    if shape.offsets.len() < 2 {
        return;
    }
    let all = Span {
        offsets: shape.offsets,
        first_probability: 0,
    };
    forward_span(all, qkv, kept, y, shape);
}

// Halving keeps the work of a thread together and needs no list of tasks.
fn forward_span(
    span: Span<'_>,
    qkv: &[f32],
    kept: &mut [f32],
    y: &mut [f32],
    shape: AttentionShape<'_>,
) {
    if let Some((a, b)) = span.halves(shape.heads) {
        let rows = a.rows();
        let (qkv_a, qkv_b) = qkv.split_at(rows * 3 * shape.dim);
        let (kept_a, kept_b) = kept.split_at_mut(shape.kept_of(a.offsets));
        let (y_a, y_b) = y.split_at_mut(rows * shape.dim);
        rayon::join(
            || forward_span(a, qkv_a, kept_a, y_a, shape),
            || forward_span(b, qkv_b, kept_b, y_b, shape),
        );
        return;
    }
    let seq = span.rows();
    if seq == 0 {
        return;
    }
    let (head, dim) = (shape.dim / shape.heads, shape.dim);
    let heads = kept.chunks_exact_mut(shape.kept_of_head(seq)).enumerate();
    if shape.one_by_one() {
        for (h, kept) in heads {
            forward_head(span, h, qkv, kept, (&mut y[h * head..], dim), shape);
        }
        return;
    }
    let mut parts = Scratch::take(seq * dim);
    let with_parts: Vec<_> = heads.zip(parts.chunks_exact_mut(seq * head)).collect();
    with_parts.into_par_iter().for_each(|((h, kept), part)| {
        forward_head(span, h, qkv, kept, (part, head), shape);
    });
    for (h, part) in parts.chunks_exact(seq * head).enumerate() {
        for (y, part) in y.chunks_exact_mut(dim).zip(part.chunks_exact(head)) {
            y[h * head..][..head].copy_from_slice(part);
        }
    }
}

/// What is kept of one head of a sequence, and its output `y` with the distance of rows.
fn forward_head(
    span: Span<'_>,
    h: usize,
    qkv: &[f32],
    kept: &mut [f32],
    (y, stride): (&mut [f32], usize),
    shape: AttentionShape<'_>,
) {
    let seq = span.rows();
    let head = Head::new(span, h, qkv, shape);
    let attend = |p: &[f32], rows: Range<usize>, y: &mut [f32]| {
        let dropped = head.dropped(p, &rows);
        let p = Mat::new(dropped.as_deref().unwrap_or(p), rows.len(), seq);
        let y = &mut y[rows.start * stride..];
        let y = MatMut::strided(y, rows.len(), shape.dim / shape.heads, stride);
        gemm(y, p, head.values(), 1.0, Store::Replace);
    };
    if shape.keeps(seq) {
        head.scores(0..seq, kept);
        vectorised(
            #[inline(always)]
            || head.softmax(0..seq, kept, |_, _, _| {}),
        );
        attend(kept, 0..seq, y);
        return;
    }
    for rows in head.blocks() {
        let mut p = Scratch::take(rows.len() * seq);
        head.scores(rows.clone(), &mut p);
        vectorised(
            #[inline(always)]
            || {
                head.softmax(rows.clone(), &mut p, |i, max, total| {
                    (kept[2 * i], kept[2 * i + 1]) = (max, 1.0 / total);
                });
            },
        );
        attend(&p, rows, y);
    }
}

/// One head of a sequence.
struct Head<'a> {
    span: Span<'a>,
    h: usize,
    qkv: &'a [f32],
    keys: Option<&'a [bool]>,
    shape: AttentionShape<'a>,
}

impl<'a> Head<'a> {
    fn new(span: Span<'a>, h: usize, qkv: &'a [f32], shape: AttentionShape<'a>) -> Self {
        let keys = shape.keys.map(|k| &k[span.offsets[0]..][..span.rows()]);
        Self {
            span,
            h,
            qkv,
            keys,
            shape,
        }
    }

    /// Rows of the queries, keys or values, `[rows, dim / heads]`.
    fn part(&self, part: usize, rows: Range<usize>) -> Mat<'a> {
        let AttentionShape { dim, heads, .. } = self.shape;
        let head = dim / heads;
        let start = rows.start * 3 * dim + part * dim + self.h * head;
        Mat::strided(&self.qkv[start..], rows.len(), head, 3 * dim)
    }

    fn queries(&self, rows: Range<usize>) -> Mat<'a> {
        self.part(0, rows)
    }

    fn keys(&self) -> Mat<'a> {
        self.part(1, 0..self.span.rows())
    }

    fn values(&self) -> Mat<'a> {
        self.part(2, 0..self.span.rows())
    }

    /// The queries that are handled at a time.
    fn blocks(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let (seq, step) = match (self.span.rows(), self.shape.keeps(self.span.rows())) {
            (seq, true) => (seq, seq),
            (seq, false) => (seq, QUERIES),
        };
        (0..seq)
            .step_by(step)
            .map(move |first| first..seq.min(first + step))
    }

    /// The scores of some queries for all keys.
    fn scores(&self, rows: Range<usize>, scores: &mut [f32]) {
        let seq = self.span.rows();
        let scores = MatMut::new(scores, rows.len(), seq);
        let scale = self.shape.scale();
        gemm(
            scores,
            self.queries(rows),
            self.keys().t(),
            scale,
            Store::Replace,
        );
    }

    /// The scores of row `i` that count, the others set to what they stay; none if no key may be attended to.
    #[inline(always)]
    fn seen<'p>(&self, i: usize, row: &'p mut [f32]) -> Option<&'p mut [f32]> {
        let seen = if self.shape.causal { i + 1 } else { row.len() };
        let (seen, hidden) = row.split_at_mut(seen);
        hidden.fill(0.0);
        match self.keys {
            Some(keys) if !keys[..seen.len()].contains(&true) => {
                seen.fill(0.0);
                None
            }
            Some(keys) => {
                for (x, &key) in seen.iter_mut().zip(keys) {
                    *x = if key { *x } else { f32::MIN };
                }
                Some(seen)
            }
            None => Some(seen),
        }
    }

    /// Keys that may not be attended to get exactly zero.
    #[inline(always)]
    fn hide(&self, seen: &mut [f32]) {
        // exp flushes to a tiny positive number.
        for (x, &key) in seen.iter_mut().zip(self.keys.unwrap_or_default()) {
            *x = if key { *x } else { 0.0 };
        }
    }

    /// Replaces scores by probabilities and tells `note` the maximum and the sum of each row.
    #[inline(always)]
    fn softmax(&self, rows: Range<usize>, p: &mut [f32], mut note: impl FnMut(usize, f32, f32)) {
        for (i, row) in rows.zip(p.chunks_exact_mut(self.span.rows())) {
            let (mut max, mut total) = (0.0, 1.0);
            if let Some(seen) = self.seen(i, row) {
                (max, total) = vector::softmax_in_place(seen);
                self.hide(seen);
            }
            note(i, max, total);
        }
    }

    /// The same from what was noted, to the bit.
    #[inline(always)]
    fn softmax_again(&self, rows: Range<usize>, p: &mut [f32], kept: &[f32]) {
        for (i, row) in rows.zip(p.chunks_exact_mut(self.span.rows())) {
            if let Some(seen) = self.seen(i, row) {
                let (max, inverse) = (kept[2 * i], kept[2 * i + 1]);
                for x in seen.iter_mut() {
                    *x = vector::exp(*x - max);
                }
                for x in seen.iter_mut() {
                    *x = vector::probability(*x * inverse);
                }
                self.hide(seen);
            }
        }
    }

    /// Position of the first probability of a row, by which dropout goes.
    fn position(&self, row: usize) -> usize {
        let seq = self.span.rows();
        self.span.first_probability + self.h * seq * seq + row * seq
    }

    /// The probabilities that dropout leaves, if there is any.
    fn dropped(&self, p: &[f32], rows: &Range<usize>) -> Option<Scratch> {
        let dropout = self.shape.dropout?;
        let mut dropped = Scratch::copy_of(p);
        let first = self.position(rows.start);
        vectorised(
            #[inline(always)]
            || dropout.scale(&mut dropped, first),
        );
        Some(dropped)
    }
}

/// Writes to `dqkv`, or adds to it, the gradient for an upstream gradient `dy`, given what [`forward`] kept.
pub fn backward(
    qkv: &[f32],
    kept: &[f32],
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
    backward_span(all, qkv, kept, dy, (dqkv, store), shape);
}

fn backward_span(
    span: Span<'_>,
    qkv: &[f32],
    kept: &[f32],
    dy: &[f32],
    (dqkv, store): (&mut [f32], Store),
    shape: AttentionShape<'_>,
) {
    let AttentionShape { heads, dim, .. } = shape;
    if let Some((a, b)) = span.halves(heads) {
        let rows = a.rows();
        let (qkv_a, qkv_b) = qkv.split_at(rows * 3 * dim);
        let (kept_a, kept_b) = kept.split_at(shape.kept_of(a.offsets));
        let (dy_a, dy_b) = dy.split_at(rows * dim);
        let (dqkv_a, dqkv_b) = dqkv.split_at_mut(rows * 3 * dim);
        rayon::join(
            || backward_span(a, qkv_a, kept_a, dy_a, (dqkv_a, store), shape),
            || backward_span(b, qkv_b, kept_b, dy_b, (dqkv_b, store), shape),
        );
        return;
    }
    let seq = span.rows();
    if seq == 0 {
        return;
    }
    let head = dim / heads;
    let each = kept.chunks_exact(shape.kept_of_head(seq)).enumerate();
    if shape.one_by_one() {
        for (h, kept) in each {
            let starts = [0, dim, 2 * dim].map(|part| part + h * head);
            let to = (&mut *dqkv, starts, 3 * dim);
            backward_head(&Head::new(span, h, qkv, shape), kept, dy, (to, store));
        }
        return;
    }
    let mut parts = Scratch::take(seq * 3 * dim);
    let with_parts: Vec<_> = each.zip(parts.chunks_exact_mut(seq * 3 * head)).collect();
    with_parts.into_par_iter().for_each(|((h, kept), part)| {
        let to = (part, [0, head, 2 * head], 3 * head);
        let head = Head::new(span, h, qkv, shape);
        backward_head(&head, kept, dy, (to, Store::Replace));
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
    head: &Head<'_>,
    kept: &[f32],
    dy: &[f32],
    ((to, [to_q, to_k, to_v], stride), store): ((&mut [f32], [usize; 3], usize), Store),
) {
    let AttentionShape {
        dim,
        heads,
        dropout,
        ..
    } = head.shape;
    let (seq, width, scale) = (head.span.rows(), dim / heads, head.shape.scale());
    for rows in head.blocks() {
        let count = rows.len();
        let mut again = None;
        let p = if head.shape.keeps(seq) {
            kept
        } else {
            let p = again.insert(Scratch::take(count * seq));
            head.scores(rows.clone(), p);
            vectorised(
                #[inline(always)]
                || head.softmax_again(rows.clone(), p, kept),
            );
            p
        };
        let dy = &dy[rows.start * dim + head.h * width..];
        let dy = Mat::strided(dy, count, width, dim);
        let mut give = |start: usize, a: Mat<'_>, b: Mat<'_>, scale: f32, store: Store| {
            let to = MatMut::strided(&mut to[start..], a.shape().0, width, stride);
            gemm(to, a, b, scale, store);
        };
        // Each block adds to the keys' and values' gradients.
        let sum = if rows.start == 0 { store } else { Store::Add };
        let dropped = head.dropped(p, &rows);
        let used = Mat::new(dropped.as_deref().unwrap_or(p), count, seq);
        give(to_v, used.t(), dy, 1.0, sum);
        let mut ds = dropped.unwrap_or_else(|| Scratch::take(count * seq));
        let into = MatMut::new(&mut ds, count, seq);
        gemm(into, dy, head.values().t(), 1.0, Store::Replace);
        let first = head.position(rows.start);
        vectorised(
            #[inline(always)]
            || {
                if let Some(dropout) = dropout {
                    dropout.scale(&mut ds, first);
                }
                for (ds, p) in ds.chunks_exact_mut(seq).zip(p.chunks_exact(seq)) {
                    let inner = vector::dot(ds, p);
                    for (ds, p) in ds.iter_mut().zip(p) {
                        *ds = vector::flush(p * (*ds - inner));
                    }
                }
            },
        );
        let ds = Mat::new(&ds, count, seq);
        let q_start = to_q + rows.start * stride;
        give(q_start, ds, head.keys(), scale, store);
        give(to_k, ds.t(), head.queries(rows), scale, sum);
    }
}

#[cfg(test)]
mod tests {
    use super::super::dropout::DropoutKeys;
    use super::*;

    fn values(n: usize, seed: f32) -> Vec<f32> {
        (0..n).map(|i| ((i as f32 + seed) * 1.37).sin()).collect()
    }

    /// Output, and gradients added to what is there.
    fn pass(shape: AttentionShape<'_>) -> (Vec<f32>, Vec<f32>) {
        let (n, dim) = (shape.offsets[shape.offsets.len() - 1], shape.dim);
        let qkv = values(n * 3 * dim, 0.2);
        let (mut kept, mut y) = (vec![f32::NAN; shape.kept()], vec![f32::NAN; n * dim]);
        forward(&qkv, &mut kept, &mut y, shape);
        let mut dqkv = vec![0.25; n * 3 * dim];
        let to = (&mut dqkv[..], Store::Add);
        backward(&qkv, &kept, &values(n * dim, 0.7), to, shape);
        let mut again = vec![f32::NAN; n * 3 * dim];
        let to = (&mut again[..], Store::Replace);
        backward(&qkv, &kept, &values(n * dim, 0.7), to, shape);
        for (added, alone) in dqkv.iter().zip(&again) {
            assert!((added - 0.25 - alone).abs() < 1e-5);
        }
        (y, again)
    }

    #[test]
    fn probabilities_made_anew_are_those_that_would_have_been_kept() {
        let offsets = [0, 1, 130, 430, 433];
        let mut mask: Vec<bool> = (0..433).map(|i| i % 5 != 2).collect();
        mask[430..].fill(false);
        for keys in [None, Some(&mask[..])] {
            for (causal, rate) in [(false, 0.0), (true, 0.0), (false, 0.2), (true, 0.2)] {
                let shape = |longest_kept| AttentionShape {
                    offsets: &offsets,
                    keys,
                    heads: 3,
                    dim: 15,
                    causal,
                    dropout: DropoutKeys::new(1, 2).next(rate).unwrap(),
                    longest_kept,
                };
                let (y, gradient) = pass(shape(usize::MAX));
                let (y_again, gradient_again) = pass(shape(2));
                assert_eq!(y, y_again);
                for (a, b) in gradient.iter().zip(&gradient_again) {
                    assert!((a - b).abs() < 2e-6, "{a} {b}");
                }
            }
        }
    }

    #[test]
    fn sharp_attention_keeps_no_probabilities_that_are_nothing() {
        let offsets = [0, 64];
        let shape = AttentionShape {
            offsets: &offsets,
            keys: None,
            heads: 2,
            dim: 16,
            causal: true,
            dropout: None,
            longest_kept: LONGEST_KEPT,
        };
        for sharpness in [3.0, 10.0, 100.0] {
            let qkv: Vec<f32> = values(64 * 48, 0.2).iter().map(|x| x * sharpness).collect();
            let (mut kept, mut y) = (vec![f32::NAN; shape.kept()], vec![f32::NAN; 64 * 16]);
            forward(&qkv, &mut kept, &mut y, shape);
            let tiny = kept.iter().filter(|&&p| p > 0.0 && p < 1e-31).count();
            assert_eq!(tiny, 0, "sharpness {sharpness}");
        }
    }

    #[test]
    fn what_is_kept_of_a_long_sequence_grows_with_its_length() {
        let shape = |offsets| AttentionShape {
            offsets,
            keys: None,
            heads: 2,
            dim: 4,
            causal: true,
            dropout: None,
            longest_kept: LONGEST_KEPT,
        };
        assert_eq!(shape(&[0, 256]).kept(), 2 * 256 * 256);
        assert_eq!(shape(&[0, 257]).kept(), 2 * 2 * 257);
        assert_eq!(shape(&[0, 3, 1003]).kept(), 2 * (9 + 2 * 1000));
    }
}

//! The grouped expert feed-forward network.
//!
//! Assignments (token, expert, weight) arrive sorted by expert. For the assignments a of a token t, with experts e(a)
//! and routing weights w(a):
//!
//! `y[t] = Σ_a w(a) (W2[e] act(W1[e] x[t] + b1[e]) + b2[e])`
//!
//! Each expert's segment is computed in blocks of rows small enough to stay in the second-level cache; outputs are kept
//! per assignment and then summed token by token in a fixed order, so there are no atomics and the bits do not depend
//! on the number of threads. The gradient of a routing weight needs no stored expert output:
//! `∂L/∂w(a) = <dy W2, h(a)> + <dy, b2>`.

use rayon::prelude::*;

use super::activation::Activation;
use super::gemm::{Mat, MatMut, Store, gemm};
use super::linear::sum_rows;
use super::scratch::Scratch;
use super::{ROW_BLOCK, vector, vectorised};

/// The weights of one expert: `w1[hidden, dim]`, `b1[hidden]`, `w2[dim, hidden]`, `b2[dim]`.
#[derive(Clone, Copy, Debug)]
pub struct ExpertWeights<'a> {
    /// First matrix (fc1).
    pub w1: &'a [f32],
    /// First bias.
    pub b1: &'a [f32],
    /// Second matrix (fc2).
    pub w2: &'a [f32],
    /// Second bias.
    pub b2: &'a [f32],
}

/// Where an expert's gradients are added; same layout as [`ExpertWeights`].
#[derive(Debug)]
pub struct ExpertGradients<'a> {
    /// First matrix.
    pub w1: &'a mut [f32],
    /// First bias.
    pub b1: &'a mut [f32],
    /// Second matrix.
    pub w2: &'a mut [f32],
    /// Second bias.
    pub b2: &'a mut [f32],
}

/// Who computes what: assignments grouped by expert, and each token's assignments.
#[derive(Clone, Copy, Debug)]
pub struct Grouped<'a> {
    /// Segment of expert e: `expert_offsets[e]..expert_offsets[e + 1]`.
    pub expert_offsets: &'a [u32],
    /// Token of each assignment.
    pub tokens: &'a [u32],
    /// Routing weight of each assignment.
    pub weights: &'a [f32],
    /// Assignments of token t: `token_assignments[token_offsets[t]..token_offsets[t + 1]]`.
    pub token_offsets: &'a [u32],
    /// Positions in the grouped order.
    pub token_assignments: &'a [u32],
}

impl Grouped<'_> {
    fn segment(&self, expert: usize) -> std::ops::Range<usize> {
        self.expert_offsets[expert] as usize..self.expert_offsets[expert + 1] as usize
    }

    fn assignments_of(&self, token: usize) -> &[u32] {
        &self.token_assignments
            [self.token_offsets[token] as usize..self.token_offsets[token + 1] as usize]
    }
}

/// Width of tokens and of the hidden layer, and the nonlinearity.
#[derive(Clone, Copy, Debug)]
pub struct FfnShape {
    /// Token width.
    pub dim: usize,
    /// Hidden width.
    pub hidden: usize,
    /// Nonlinearity.
    pub activation: Activation,
}

/// Cuts the front of `n` elements off a slice.
fn cut<'a>(rest: &mut &'a mut [f32], n: usize) -> &'a mut [f32] {
    let (front, back) = std::mem::take(rest).split_at_mut(n);
    *rest = back;
    front
}

fn gather(x: &[f32], tokens: &[u32], dim: usize, out: &mut [f32]) {
    for (row, &t) in out.chunks_exact_mut(dim).zip(tokens) {
        row.copy_from_slice(&x[t as usize * dim..][..dim]);
    }
}

/// Writes `y` (`[tokens, dim]`). `h` receives the hidden activations and `slope`, if given, the derivatives of the
/// nonlinearity, both `[assignments, hidden]`: what [`backward`] needs.
pub fn forward(
    x: &[f32],
    experts: &[ExpertWeights<'_>],
    plan: Grouped<'_>,
    shape: FfnShape,
    h: &mut [f32],
    slope: Option<&mut [f32]>,
    y: &mut [f32],
) {
    struct Task<'a> {
        expert: ExpertWeights<'a>,
        tokens: &'a [u32],
        h: &'a mut [f32],
        slope: Option<&'a mut [f32]>,
        out: &'a mut [f32],
    }
    let FfnShape {
        dim,
        hidden,
        activation,
    } = shape;
    let mut outputs = Scratch::take(plan.tokens.len() * dim);
    let (mut h_rest, mut slope_rest, mut out_rest): (&mut [f32], _, &mut [f32]) =
        (h, slope, &mut outputs);
    let mut tasks = Vec::with_capacity(experts.len() + plan.tokens.len() / ROW_BLOCK);
    for (e, &expert) in experts.iter().enumerate() {
        for tokens in plan.tokens[plan.segment(e)].chunks(ROW_BLOCK) {
            tasks.push(Task {
                expert,
                tokens,
                h: cut(&mut h_rest, tokens.len() * hidden),
                slope: slope_rest.as_mut().map(|s| cut(s, tokens.len() * hidden)),
                out: cut(&mut out_rest, tokens.len() * dim),
            });
        }
    }
    tasks.into_par_iter().for_each(
        |Task {
             expert,
             tokens,
             h,
             slope,
             out,
         }| {
            let rows = tokens.len();
            let mut xs = Scratch::take(rows * dim);
            gather(x, tokens, dim, &mut xs);
            for row in h.chunks_exact_mut(hidden) {
                row.copy_from_slice(expert.b1);
            }
            let w1 = Mat::new(expert.w1, hidden, dim).t();
            gemm(
                MatMut::new(h, rows, hidden),
                Mat::new(&xs, rows, dim),
                w1,
                1.0,
                Store::Add,
            );
            vectorised(
                #[inline(always)]
                || match slope {
                    Some(slope) => activation.apply_with_slope(h, slope),
                    None => activation.apply(h),
                },
            );
            for row in out.chunks_exact_mut(dim) {
                row.copy_from_slice(expert.b2);
            }
            let w2 = Mat::new(expert.w2, dim, hidden).t();
            gemm(
                MatMut::new(out, rows, dim),
                Mat::new(h, rows, hidden),
                w2,
                1.0,
                Store::Add,
            );
        },
    );
    y.par_chunks_mut(ROW_BLOCK * dim)
        .enumerate()
        .for_each(|(block, y)| {
            vectorised(
                #[inline(always)]
                || {
                    for (i, row) in y.chunks_exact_mut(dim).enumerate() {
                        row.fill(0.0);
                        for &a in plan.assignments_of(block * ROW_BLOCK + i) {
                            vector::axpy(
                                plan.weights[a as usize],
                                &outputs[a as usize * dim..][..dim],
                                row,
                            );
                        }
                    }
                },
            );
        });
}

/// Adds to `dx` and `gradients`, and writes `d_weights` (per assignment), for an upstream gradient `dy`.
///
/// `h` and `slope` are what [`forward`] wrote.
#[allow(clippy::too_many_arguments)]
pub fn backward(
    x: &[f32],
    experts: &[ExpertWeights<'_>],
    plan: Grouped<'_>,
    shape: FfnShape,
    (h, slope): (&[f32], &[f32]),
    dy: &[f32],
    dx: &mut [f32],
    gradients: &mut [ExpertGradients<'_>],
    d_weights: &mut [f32],
) {
    struct Task<'a, 'b> {
        index: usize,
        weights: ExpertWeights<'a>,
        gradients: &'a mut ExpertGradients<'b>,
        d_weights: &'a mut [f32],
        dx: &'a mut [f32],
    }
    let FfnShape { dim, hidden, .. } = shape;
    let mut inputs = Scratch::take(plan.tokens.len() * dim);
    let (mut dw_rest, mut dx_rest): (&mut [f32], &mut [f32]) = (d_weights, &mut inputs);
    let mut tasks: Vec<Task<'_, '_>> = experts
        .iter()
        .zip(gradients)
        .enumerate()
        .map(|(index, (&weights, gradients))| {
            let rows = plan.segment(index).len();
            let (d_weights, dx) = (cut(&mut dw_rest, rows), cut(&mut dx_rest, rows * dim));
            Task {
                index,
                weights,
                gradients,
                d_weights,
                dx,
            }
        })
        .collect();
    // Largest first: a big segment started last would keep the other threads waiting.
    tasks.sort_by_key(|t| std::cmp::Reverse(t.d_weights.len()));
    tasks.into_par_iter().with_max_len(1).for_each(|task| {
        let Task {
            index,
            weights,
            gradients,
            d_weights,
            dx,
        } = task;
        let segment = plan.segment(index);
        let blocks = plan.tokens[segment.clone()].chunks(ROW_BLOCK);
        let mut done = segment.start;
        for ((tokens, d_weights), dx) in blocks
            .zip(d_weights.chunks_mut(ROW_BLOCK))
            .zip(dx.chunks_mut(ROW_BLOCK * dim))
        {
            let rows = tokens.len();
            let routing = &plan.weights[done..done + rows];
            let h = &h[done * hidden..][..rows * hidden];
            let slope = &slope[done * hidden..][..rows * hidden];
            done += rows;
            let mut xs = Scratch::take(rows * dim);
            let mut dys = Scratch::take(rows * dim);
            let mut dh = Scratch::take(rows * hidden);
            gather(x, tokens, dim, &mut xs);
            gather(dy, tokens, dim, &mut dys);
            let w2 = Mat::new(weights.w2, dim, hidden);
            gemm(
                MatMut::new(&mut dh, rows, hidden),
                Mat::new(&dys, rows, dim),
                w2,
                1.0,
                Store::Replace,
            );
            vectorised(
                #[inline(always)]
                || {
                    for r in 0..rows {
                        let (dh, dy) =
                            (&mut dh[r * hidden..][..hidden], &mut dys[r * dim..][..dim]);
                        let (h, slope) =
                            (&h[r * hidden..][..hidden], &slope[r * hidden..][..hidden]);
                        d_weights[r] = vector::dot(dh, h) + vector::dot(dy, weights.b2);
                        let w = routing[r];
                        for (dh, s) in dh.iter_mut().zip(slope) {
                            *dh *= w * s;
                        }
                        for dy in dy {
                            *dy *= w;
                        }
                    }
                },
            );
            let (dys, dh) = (Mat::new(&dys, rows, dim), Mat::new(&dh, rows, hidden));
            gemm(
                MatMut::new(gradients.w2, dim, hidden),
                dys.t(),
                Mat::new(h, rows, hidden),
                1.0,
                Store::Add,
            );
            gemm(
                MatMut::new(gradients.w1, hidden, dim),
                dh.t(),
                Mat::new(&xs, rows, dim),
                1.0,
                Store::Add,
            );
            gemm(
                MatMut::new(dx, rows, dim),
                dh,
                Mat::new(weights.w1, hidden, dim),
                1.0,
                Store::Replace,
            );
            sum_rows(dys.as_slice(), gradients.b2);
            sum_rows(dh.as_slice(), gradients.b1);
        }
    });
    dx.par_chunks_mut(ROW_BLOCK * dim)
        .enumerate()
        .for_each(|(block, dx)| {
            vectorised(
                #[inline(always)]
                || {
                    for (i, row) in dx.chunks_exact_mut(dim).enumerate() {
                        for &a in plan.assignments_of(block * ROW_BLOCK + i) {
                            vector::add_assign(row, &inputs[a as usize * dim..][..dim]);
                        }
                    }
                },
            );
        });
}

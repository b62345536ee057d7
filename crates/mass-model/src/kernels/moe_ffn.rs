//! The grouped expert feed-forward network.
//!
//! Assignments (token, expert, weight) arrive sorted by expert. For the assignments a of a token t, with experts e(a)
//! and routing weights w(a):
//!
//! `y[t] = Σ_a w(a) (W2[e] h(a) + b2[e])`, `h(a) = act(W1[e] x[t] + b1[e])`
//!
//! and for gated experts (SwiGLU with SiLU; Shazeer, arXiv 2002.05202) `h(a) = act(W1 x + b1) ⊙ (W3 x + b3)`.
//!
//! Each expert's segment is computed in blocks of rows. What surrounds a product is applied to its result panel by panel, while
//! that is in cache: bias, activation and slope; in the backward pass routing weight, slope and the gradient of the routing
//! weight. Rows whose length would make them fall on few sets of the cache are kept a cache line further apart.
//!
//! Outputs are kept per assignment and then summed token by token in a fixed order, so there are no atomics. The gradient of
//! a routing weight needs no stored expert output: `∂L/∂w(a) = <dy W2, h(a)> + <dy, b2>`. The work is cut by the plan, never
//! by the number of threads, so the bits do not depend on it.

use rayon::prelude::*;

use super::activation::Activation;
use super::gemm::{Mat, MatMut, Store};
use super::product::{Extras, each_part, prefetch, product, row_stride};
use super::scratch::Scratch;
use super::{ROW_BLOCK, task_rows, vector, vectorised};

/// Tasks that one of the weight gradients of all experts is cut into, roughly: each packs its inputs anew.
const GRADIENT_TASKS: usize = 8;

/// Fewest rows of a weight gradient that make a task.
const GRADIENT_ROWS: usize = 64;

/// The weights of one expert: `w1[hidden, dim]`, `b1[hidden]`, `w2[dim, hidden]`, `b2[dim]`, and for a gated expert
/// `w3[hidden, dim]`, `b3[hidden]`.
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
    /// Matrix and bias of the factor on the activation, for gated experts.
    pub up: Option<(&'a [f32], &'a [f32])>,
}

/// Where an expert's gradients go; same layout as [`ExpertWeights`].
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
    /// Matrix and bias of the factor on the activation, for gated experts.
    pub up: Option<(&'a mut [f32], &'a mut [f32])>,
    /// Whether they are added to, or replaced whatever they hold.
    pub store: Store,
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
    /// Whether experts have a factor on the activation.
    pub gated: bool,
}

impl FfnShape {
    /// Values from the hidden activations of one assignment to those of the next.
    fn kept(&self) -> usize {
        row_stride(self.hidden)
    }

    /// Slopes kept of each assignment. The slope of a ReLU shows in its value.
    fn slopes(&self) -> usize {
        match (self.gated, self.activation) {
            (true, _) => 2 * self.kept(),
            (false, Activation::Relu) => 0,
            (false, _) => self.kept(),
        }
    }
}

/// What [`forward`] keeps for [`backward`], in memory from the pool.
#[derive(Debug)]
pub struct Hidden {
    /// Hidden activations, `shape.kept()` of each assignment.
    h: Scratch,
    /// Derivatives by the values before the nonlinearity, then, for gated experts, by the factor on the activation;
    /// `shape.slopes()` of each assignment.
    slope: Scratch,
}

impl Hidden {
    /// Room for this many assignments.
    pub fn take(shape: FfnShape, assignments: usize) -> Self {
        Self {
            h: Scratch::take(assignments * shape.kept()),
            slope: Scratch::take(assignments * shape.slopes()),
        }
    }
}

/// Cuts the front of `n` elements off a slice.
fn cut<'a>(rest: &mut &'a mut [f32], n: usize) -> &'a mut [f32] {
    let (front, back) = std::mem::take(rest).split_at_mut(n);
    *rest = back;
    front
}

fn cut_some<'a>(rest: &mut Option<&'a mut [f32]>, n: usize) -> Option<&'a mut [f32]> {
    rest.as_mut().map(|rest| cut(rest, n))
}

/// Nearly equal blocks of every segment: expert, and positions in the grouped order.
fn blocks(plan: Grouped<'_>, experts: usize) -> Vec<(usize, std::ops::Range<usize>)> {
    let mut blocks = Vec::with_capacity(2 * experts);
    for e in 0..experts {
        let segment = plan.segment(e);
        let rows = task_rows(segment.len());
        for first in segment.clone().step_by(rows) {
            blocks.push((e, first..segment.end.min(first + rows)));
        }
    }
    blocks
}

fn gather(x: &[f32], tokens: &[u32], dim: usize, out: &mut [f32]) {
    for (row, &t) in out.chunks_exact_mut(row_stride(dim)).zip(tokens) {
        row[..dim].copy_from_slice(&x[t as usize * dim..][..dim]);
    }
}

/// Writes `y` (`[tokens, dim]`), and what [`backward`] needs to `kept`.
pub fn forward(
    x: &[f32],
    experts: &[ExpertWeights<'_>],
    plan: Grouped<'_>,
    shape: FfnShape,
    kept: Option<&mut Hidden>,
    y: &mut [f32],
) {
    struct Task<'a> {
        expert: ExpertWeights<'a>,
        tokens: &'a [u32],
        h: Option<&'a mut [f32]>,
        by_pre: Option<&'a mut [f32]>,
        by_factor: Option<&'a mut [f32]>,
        out: &'a mut [f32],
    }
    let FfnShape { dim, hidden, .. } = shape;
    let (apart, kept_apart) = (row_stride(dim), shape.kept());
    let assigned = plan.tokens.len();
    let mut outputs = Scratch::take(assigned * apart);
    let mut out_rest: &mut [f32] = &mut outputs;
    let (mut h_rest, mut pre_rest, mut factor_rest) = match kept {
        None => (None, None, None),
        Some(Hidden { h, slope }) => {
            let pre = slope.len().min(assigned * kept_apart);
            let (pre, factor) = slope.split_at_mut(pre);
            let pre = (!pre.is_empty()).then_some(pre);
            let factor = (!factor.is_empty()).then_some(factor);
            (Some(&mut h[..]), pre, factor)
        }
    };
    let mut tasks = Vec::new();
    for (e, block) in blocks(plan, experts.len()) {
        let rows = block.len();
        let size = rows * kept_apart;
        tasks.push(Task {
            expert: experts[e],
            tokens: &plan.tokens[block],
            h: cut_some(&mut h_rest, size),
            by_pre: cut_some(&mut pre_rest, size),
            by_factor: cut_some(&mut factor_rest, size),
            out: cut(&mut out_rest, rows * apart),
        });
    }
    tasks.into_par_iter().with_max_len(1).for_each(|task| {
        let Task {
            expert,
            tokens,
            h,
            mut by_pre,
            mut by_factor,
            out,
        } = task;
        let rows = tokens.len();
        let mut xs = Scratch::take(rows * apart);
        gather(x, tokens, dim, &mut xs);
        let xs = Mat::strided(&xs, rows, dim, apart);
        let mut unkept = h.is_none().then(|| Scratch::take(rows * kept_apart));
        let h = match (h, &mut unkept) {
            (Some(h), _) => h,
            (None, Some(h)) => h,
            (None, None) => unreachable!("one of them was made"),
        };
        let biased = |b| Extras {
            bias: Some(b),
            ..Extras::default()
        };
        let first = MatMut::strided(h, rows, hidden, kept_apart);
        let w1 = Mat::new(expert.w1, hidden, dim).t();
        product(first, xs, w1, biased(expert.b1), |mut done| {
            let at = done.part.cols.start;
            vectorised(
                #[inline(always)]
                || {
                    for (r, row) in done.rows() {
                        match &mut by_pre {
                            None => shape.activation.apply(row),
                            Some(slope) => {
                                let slope = &mut slope[r * kept_apart + at..][..row.len()];
                                shape.activation.apply_with_slope(row, slope);
                            }
                        }
                    }
                },
            );
        });
        if let Some((w3, b3)) = expert.up {
            let w3 = Mat::new(w3, hidden, dim).t();
            each_part(
                xs,
                w3,
                |_| {},
                |mut done| {
                    let cols = done.part.cols.clone();
                    vectorised(
                        #[inline(always)]
                        || {
                            for (r, factor) in done.rows() {
                                vector::add_assign(factor, &b3[cols.clone()]);
                                let at = r * kept_apart + cols.start;
                                let h = &mut h[at..][..factor.len()];
                                if let (Some(by_pre), Some(by_factor)) =
                                    (&mut by_pre, &mut by_factor)
                                {
                                    by_factor[at..][..h.len()].copy_from_slice(h);
                                    vector::mul_assign(&mut by_pre[at..][..h.len()], factor);
                                }
                                vector::mul_assign(h, factor);
                            }
                        },
                    );
                },
            );
        }
        let h = Mat::strided(h, rows, hidden, kept_apart);
        let w2 = Mat::new(expert.w2, dim, hidden).t();
        let out = MatMut::strided(out, rows, dim, apart);
        product(out, h, w2, biased(expert.b2), |_| {});
    });
    y.par_chunks_mut(ROW_BLOCK * dim)
        .enumerate()
        .for_each(|(block, y)| {
            vectorised(
                #[inline(always)]
                || {
                    for (i, row) in y.chunks_exact_mut(dim).enumerate() {
                        row.fill(0.0);
                        for &a in plan.assignments_of(block * ROW_BLOCK + i) {
                            let a = a as usize;
                            vector::axpy(plan.weights[a], &outputs[a * apart..][..dim], row);
                        }
                    }
                },
            );
        });
}

/// Adds to or replaces `dx` and `gradients`, and writes `d_weights` (per assignment), for an upstream gradient `dy`.
///
/// `kept` is what [`forward`] wrote; its slopes are used up.
#[allow(clippy::too_many_arguments)]
pub fn backward(
    x: &[f32],
    experts: &[ExpertWeights<'_>],
    plan: Grouped<'_>,
    shape: FfnShape,
    kept: &mut Hidden,
    dy: &[f32],
    (dx, store): (&mut [f32], Store),
    gradients: &mut [ExpertGradients<'_>],
    d_weights: &mut [f32],
) {
    let (dim, assigned) = (shape.dim, plan.tokens.len());
    let apart = row_stride(dim);
    // Per assignment: gathered inputs, weighted upstream gradients, gradients of the inputs.
    let (mut xs, mut dys, mut dxs) = (
        Scratch::take(assigned * apart),
        Scratch::take(assigned * apart),
        Scratch::take(assigned * apart),
    );
    let mut unkept = Scratch::take(if shape.slopes() == 0 {
        assigned * shape.kept()
    } else {
        0
    });
    let d = if shape.slopes() == 0 {
        &mut *unkept
    } else {
        &mut *kept.slope
    };
    let h = &*kept.h;
    let per_assignment = PerAssignment {
        d,
        xs: &mut xs,
        dys: &mut dys,
        dxs: &mut dxs,
        d_weights,
    };
    backward_rows(x, experts, plan, shape, h, dy, per_assignment);
    backward_weights(plan, shape, (h, d), (&xs, &dys), gradients);
    dx.par_chunks_mut(ROW_BLOCK * dim)
        .enumerate()
        .for_each(|(block, dx)| {
            vectorised(
                #[inline(always)]
                || {
                    for (i, row) in dx.chunks_exact_mut(dim).enumerate() {
                        if store == Store::Replace {
                            row.fill(0.0);
                        }
                        for &a in plan.assignments_of(block * ROW_BLOCK + i) {
                            vector::add_assign(row, &dxs[a as usize * apart..][..dim]);
                        }
                    }
                },
            );
        });
}

struct PerAssignment<'a> {
    /// Slopes, or without any, room for as many: receives the gradients of the hidden values before the nonlinearity, then of the
    /// factors.
    d: &'a mut [f32],
    xs: &'a mut [f32],
    dys: &'a mut [f32],
    dxs: &'a mut [f32],
    d_weights: &'a mut [f32],
}

/// First half: everything that belongs to an assignment.
fn backward_rows(
    x: &[f32],
    experts: &[ExpertWeights<'_>],
    plan: Grouped<'_>,
    shape: FfnShape,
    h: &[f32],
    dy: &[f32],
    out: PerAssignment<'_>,
) {
    struct Task<'a> {
        expert: ExpertWeights<'a>,
        tokens: &'a [u32],
        routing: &'a [f32],
        h: &'a [f32],
        by_pre: &'a mut [f32],
        by_factor: Option<&'a mut [f32]>,
        xs: &'a mut [f32],
        dys: &'a mut [f32],
        dxs: &'a mut [f32],
        d_weights: &'a mut [f32],
    }
    let FfnShape { dim, hidden, .. } = shape;
    let (apart, kept_apart) = (row_stride(dim), shape.kept());
    let PerAssignment {
        d,
        mut xs,
        mut dys,
        mut dxs,
        mut d_weights,
    } = out;
    let (mut pre_rest, factor) = d.split_at_mut(plan.tokens.len() * kept_apart);
    let mut factor_rest = shape.gated.then_some(factor);
    let mut tasks = Vec::new();
    for (e, block) in blocks(plan, experts.len()) {
        let rows = block.len();
        tasks.push(Task {
            expert: experts[e],
            tokens: &plan.tokens[block.clone()],
            routing: &plan.weights[block.clone()],
            h: &h[block.start * kept_apart..block.end * kept_apart],
            by_pre: cut(&mut pre_rest, rows * kept_apart),
            by_factor: cut_some(&mut factor_rest, rows * kept_apart),
            xs: cut(&mut xs, rows * apart),
            dys: cut(&mut dys, rows * apart),
            dxs: cut(&mut dxs, rows * apart),
            d_weights: cut(&mut d_weights, rows),
        });
    }
    let slope_is_kept = shape.slopes() > 0;
    tasks.into_par_iter().with_max_len(1).for_each(|task| {
        let Task {
            expert,
            tokens,
            routing,
            h,
            by_pre,
            mut by_factor,
            xs,
            dys,
            dxs,
            d_weights,
        } = task;
        let rows = tokens.len();
        gather(x, tokens, dim, xs);
        gather(dy, tokens, dim, dys);
        vectorised(
            #[inline(always)]
            || {
                for (d, dy) in d_weights.iter_mut().zip(dys.chunks_exact(apart)) {
                    *d = vector::dot(&dy[..dim], expert.b2);
                }
            },
        );
        let span = |r: usize, cols: &std::ops::Range<usize>| {
            r * kept_apart + cols.start..r * kept_apart + cols.end
        };
        // Shared between the two closures, which are never run at the same time.
        let slopes = std::cell::RefCell::new(by_pre);
        each_part(
            Mat::strided(dys, rows, dim, apart),
            Mat::new(expert.w2, dim, hidden),
            |next| {
                for r in next.rows.clone() {
                    prefetch(&h[span(r, &next.cols)]);
                    if slope_is_kept {
                        prefetch(&slopes.borrow()[span(r, &next.cols)]);
                    }
                }
            },
            |mut done| {
                let cols = done.part.cols.clone();
                let mut by_pre = slopes.borrow_mut();
                vectorised(
                    #[inline(always)]
                    || {
                        for (r, dh) in done.rows() {
                            let (h, w) = (&h[span(r, &cols)], routing[r]);
                            let by_pre = &mut by_pre[span(r, &cols)];
                            d_weights[r] += vector::dot(dh, h);
                            if slope_is_kept {
                                for (d, dh) in by_pre.iter_mut().zip(&*dh) {
                                    *d *= dh * w;
                                }
                            } else {
                                for ((d, dh), h) in by_pre.iter_mut().zip(&*dh).zip(h) {
                                    *d = if *h <= 0.0 { 0.0 } else { dh * w };
                                }
                            }
                            if let Some(by_factor) = &mut by_factor {
                                for (d, dh) in by_factor[span(r, &cols)].iter_mut().zip(&*dh) {
                                    *d *= dh * w;
                                }
                            }
                        }
                    },
                );
            },
        );
        let by_pre = slopes.into_inner();
        vectorised(
            #[inline(always)]
            || {
                for (dy, &w) in dys.chunks_exact_mut(apart).zip(routing) {
                    for dy in &mut dy[..dim] {
                        *dy *= w;
                    }
                }
            },
        );
        let mut store = Store::Replace;
        let mut add = |d: &[f32], w: &[f32]| {
            let extras = Extras {
                store,
                ..Extras::default()
            };
            let (d, w) = (
                Mat::strided(d, rows, hidden, kept_apart),
                Mat::new(w, hidden, dim),
            );
            product(MatMut::strided(dxs, rows, dim, apart), d, w, extras, |_| {});
            store = Store::Add;
        };
        add(by_pre, expert.w1);
        if let (Some(by_factor), Some((w3, _))) = (by_factor, expert.up) {
            add(by_factor, w3);
        }
    });
}

/// Second half: the gradients of the weights, cut by rows of the matrices so that a crowded expert keeps no thread waiting.
fn backward_weights(
    plan: Grouped<'_>,
    shape: FfnShape,
    (h, d): (&[f32], &[f32]),
    (xs, dys): (&[f32], &[f32]),
    gradients: &mut [ExpertGradients<'_>],
) {
    /// Rows `first..` of one of an expert's matrices: the sums of `left[.., first..]` times `right`.
    struct Task<'a> {
        expert: usize,
        left: (&'a [f32], usize),
        right: (&'a [f32], usize),
        first: usize,
        cols: usize,
        matrix: &'a mut [f32],
        bias: &'a mut [f32],
        store: Store,
    }
    let FfnShape { dim, hidden, .. } = shape;
    let (apart, kept_apart) = (row_stride(dim), shape.kept());
    let assigned = plan.tokens.len();
    let (by_pre, by_factor) = d.split_at(assigned * kept_apart);
    let mut tasks = Vec::with_capacity(2 * gradients.len() + 2 * GRADIENT_TASKS);
    for (expert, g) in gradients.iter_mut().enumerate() {
        let store = g.store;
        let load = plan.segment(expert).len();
        if load == 0 && store == Store::Add {
            continue;
        }
        let chunks = (load * GRADIENT_TASKS).div_ceil(assigned.max(1)).max(1);
        let (inputs, hidden_values) = ((xs, apart), (h, kept_apart));
        let first = ((by_pre, kept_apart), inputs, dim, &mut *g.w1, &mut *g.b1);
        let second = ((dys, apart), hidden_values, hidden, &mut *g.w2, &mut *g.b2);
        let up = g.up.as_mut();
        let up = up.map(|(w3, b3)| ((by_factor, kept_apart), inputs, dim, &mut **w3, &mut **b3));
        for (left, right, cols, matrix, bias) in [first, second].into_iter().chain(up) {
            let rows = bias
                .len()
                .div_ceil(chunks)
                .max(GRADIENT_ROWS)
                .next_multiple_of(16);
            let cuts = matrix.chunks_mut(rows * cols).zip(bias.chunks_mut(rows));
            for (i, (matrix, bias)) in cuts.enumerate() {
                tasks.push(Task {
                    expert,
                    left,
                    right,
                    first: i * rows,
                    cols,
                    matrix,
                    bias,
                    store,
                });
            }
        }
    }
    // Largest first: a big task started last would keep the other threads waiting.
    tasks.sort_by_key(|t| std::cmp::Reverse(plan.segment(t.expert).len() * t.matrix.len()));
    tasks.into_par_iter().with_max_len(1).for_each(|task| {
        let Task {
            left: (left, left_apart),
            right: (right, right_apart),
            first,
            cols,
            matrix,
            bias,
            store,
            ..
        } = task;
        let segment = plan.segment(task.expert);
        if store == Store::Replace {
            bias.fill(0.0);
        }
        let (rows, out) = (segment.len(), bias.len());
        let left = left
            .get(segment.start * left_apart + first..)
            .unwrap_or_default();
        let right = right.get(segment.start * right_apart..).unwrap_or_default();
        let extras = Extras {
            store,
            sums: Some(bias),
            ..Extras::default()
        };
        product(
            MatMut::new(matrix, out, cols),
            Mat::strided(left, rows, out, left_apart).t(),
            Mat::strided(right, rows, cols, right_apart),
            extras,
            |_| {},
        );
    });
}

//! The grouped expert feed-forward network.
//!
//! Assignments (token, expert, weight) arrive sorted by expert. For the assignments a of a token t, with experts e(a)
//! and routing weights w(a):
//!
//! `y[t] = Σ_a w(a) (W2[e] h(a) + b2[e])`, `h(a) = act(W1[e] x[t] + b1[e])`
//!
//! and for gated experts (SwiGLU with SiLU; Shazeer, arXiv 2002.05202) `h(a) = act(W1 x + b1) ⊙ (W3 x + b3)`.
//!
//! Each expert's segment is computed in blocks of rows. Within a block, hidden values are stored **feature by feature**
//! (`[hidden, rows]`): the products with `W1` and `W2` then read the weights as they lie, where row-major activations would
//! make the matrix product pack a transposed copy of them. At widths that are a multiple of 1024 that packing falls on one
//! set of the first-level cache and costs a third of the speed.
//!
//! Outputs are kept per assignment and then summed token by token in a fixed order, so there are no atomics. The gradient of
//! a routing weight needs no stored expert output: `∂L/∂w(a) = <dy W2, h(a)> + <dy, b2>`. The work is cut by the plan, never
//! by the number of threads, so the bits do not depend on it.

use rayon::prelude::*;

use super::activation::Activation;
use super::gemm::{Mat, MatMut, Store, gemm};
use super::scratch::Scratch;
use super::transpose::transpose;
use super::{ROW_BLOCK, vector, vectorised};

/// Most rows of a block: enough to repay the packing of the weights, few enough that a block's tiles stay in cache.
const BLOCK_ROWS: usize = 384;

/// Rows of the matrix product's register tile on AVX-512; a remainder of them costs nearly as much as a whole tile.
const TILE_ROWS: usize = 64;

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
    /// Values of `slope` that [`forward`] writes for each assignment.
    pub fn slopes(&self) -> usize {
        self.hidden * (1 + usize::from(self.gated))
    }
}

/// Rows of each block of a segment but the last, which is shorter.
fn block_rows(segment: usize) -> usize {
    let blocks = segment.div_ceil(BLOCK_ROWS).max(1);
    segment.div_ceil(blocks).next_multiple_of(TILE_ROWS)
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

/// Writes `y` (`[tokens, dim]`). `h` receives the hidden activations and `slope`, if given, the derivatives by the values
/// before the nonlinearity (and by the factor, for gated experts): what [`backward`] needs. Their sizes are
/// `assignments * hidden` and `assignments * shape.slopes()`.
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
    let FfnShape { dim, hidden, .. } = shape;
    let mut outputs = Scratch::take(plan.tokens.len() * dim);
    let (mut h_rest, mut slope_rest, mut out_rest): (&mut [f32], _, &mut [f32]) =
        (h, slope, &mut outputs);
    let mut tasks = Vec::with_capacity(experts.len() + plan.tokens.len() / BLOCK_ROWS);
    for (e, &expert) in experts.iter().enumerate() {
        let segment = plan.segment(e);
        let rows = block_rows(segment.len());
        for tokens in plan.tokens[segment].chunks(rows.max(1)) {
            tasks.push(Task {
                expert,
                tokens,
                h: cut(&mut h_rest, tokens.len() * hidden),
                slope: slope_rest
                    .as_mut()
                    .map(|s| cut(s, tokens.len() * shape.slopes())),
                out: cut(&mut out_rest, tokens.len() * dim),
            });
        }
    }
    tasks.into_par_iter().with_max_len(1).for_each(|task| {
        let Task {
            expert,
            tokens,
            h,
            slope,
            out,
        } = task;
        let rows = tokens.len();
        let mut xs = Scratch::take(rows * dim);
        gather(x, tokens, dim, &mut xs);
        let features = |w: &[f32], out: &mut [f32]| {
            let xt = Mat::new(&xs, rows, dim).t();
            let w = Mat::new(w, hidden, dim);
            gemm(MatMut::new(out, hidden, rows), w, xt, 1.0, Store::Replace);
        };
        features(expert.w1, h);
        let mut factor = expert.up.map(|(w3, b3)| {
            let mut factor = Scratch::take(rows * hidden);
            features(w3, &mut factor);
            (factor, b3)
        });
        let mut unused = slope
            .is_none()
            .then(|| Scratch::take(shape.slopes() * rows));
        let slope = match (slope, &mut unused) {
            (Some(slope), _) => slope,
            (None, Some(unused)) => unused,
            (None, None) => unreachable!("one of them was made"),
        };
        vectorised(
            #[inline(always)]
            || {
                for (j, h) in h.chunks_exact_mut(rows).enumerate() {
                    for x in h.iter_mut() {
                        *x += expert.b1[j];
                    }
                    let by_pre = &mut slope[j * rows..][..rows];
                    shape.activation.apply_with_slope(h, by_pre);
                    if let Some((factor, b3)) = &mut factor {
                        let (by_pre, by_factor) = slope.split_at_mut(hidden * rows);
                        let by_pre = &mut by_pre[j * rows..][..rows];
                        let by_factor = &mut by_factor[j * rows..][..rows];
                        let factor = &factor[j * rows..][..rows];
                        by_factor.copy_from_slice(h);
                        for r in 0..rows {
                            let u = factor[r] + b3[j];
                            by_pre[r] *= u;
                            h[r] *= u;
                        }
                    }
                }
            },
        );
        let mut features = Scratch::take(dim * rows);
        let (w2, hidden_values) = (Mat::new(expert.w2, dim, hidden), Mat::new(h, hidden, rows));
        let out_features = MatMut::new(&mut features, dim, rows);
        gemm(out_features, w2, hidden_values, 1.0, Store::Replace);
        vectorised(
            #[inline(always)]
            || {
                for (row, b) in features.chunks_exact_mut(rows).zip(expert.b2) {
                    for x in row {
                        *x += b;
                    }
                }
                transpose(&features, dim, rows, out);
            },
        );
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

/// Adds to `dx`, adds to or replaces `gradients`, and writes `d_weights` (per assignment), for an upstream gradient `dy`.
///
/// `h` and `slope` are what [`forward`] wrote; `slope` is used up.
#[allow(clippy::too_many_arguments)]
pub fn backward(
    x: &[f32],
    experts: &[ExpertWeights<'_>],
    plan: Grouped<'_>,
    shape: FfnShape,
    (h, slope): (&[f32], &mut [f32]),
    dy: &[f32],
    dx: &mut [f32],
    gradients: &mut [ExpertGradients<'_>],
    d_weights: &mut [f32],
) {
    let (dim, assigned) = (shape.dim, plan.tokens.len());
    // Per assignment: gathered inputs, weighted upstream gradients, gradients of the inputs.
    let (mut xs, mut dys, mut dxs) = (
        Scratch::take(assigned * dim),
        Scratch::take(assigned * dim),
        Scratch::take(assigned * dim),
    );
    let per_assignment = PerAssignment {
        xs: &mut xs,
        dys: &mut dys,
        dxs: &mut dxs,
        d_weights,
    };
    backward_rows(x, experts, plan, shape, (h, slope), dy, per_assignment);
    backward_weights(plan, shape, (h, slope), (&xs, &dys), gradients);
    dx.par_chunks_mut(ROW_BLOCK * dim)
        .enumerate()
        .for_each(|(block, dx)| {
            vectorised(
                #[inline(always)]
                || {
                    for (i, row) in dx.chunks_exact_mut(dim).enumerate() {
                        for &a in plan.assignments_of(block * ROW_BLOCK + i) {
                            vector::add_assign(row, &dxs[a as usize * dim..][..dim]);
                        }
                    }
                },
            );
        });
}

struct PerAssignment<'a> {
    xs: &'a mut [f32],
    dys: &'a mut [f32],
    dxs: &'a mut [f32],
    d_weights: &'a mut [f32],
}

/// First half: everything that belongs to an assignment. Replaces `slope` by the gradients of the hidden values before the
/// nonlinearity.
fn backward_rows(
    x: &[f32],
    experts: &[ExpertWeights<'_>],
    plan: Grouped<'_>,
    shape: FfnShape,
    (h, slope): (&[f32], &mut [f32]),
    dy: &[f32],
    out: PerAssignment<'_>,
) {
    struct Task<'a> {
        expert: ExpertWeights<'a>,
        tokens: &'a [u32],
        routing: &'a [f32],
        h: &'a [f32],
        slope: &'a mut [f32],
        xs: &'a mut [f32],
        dys: &'a mut [f32],
        dxs: &'a mut [f32],
        d_weights: &'a mut [f32],
    }
    let FfnShape { dim, hidden, .. } = shape;
    let PerAssignment {
        mut xs,
        mut dys,
        mut dxs,
        mut d_weights,
    } = out;
    let mut slope_rest = slope;
    let mut tasks = Vec::with_capacity(experts.len() + plan.tokens.len() / BLOCK_ROWS);
    for (e, &expert) in experts.iter().enumerate() {
        let segment = plan.segment(e);
        let mut done = segment.start;
        let rows = block_rows(segment.len());
        for tokens in plan.tokens[segment].chunks(rows.max(1)) {
            let rows = tokens.len();
            tasks.push(Task {
                expert,
                tokens,
                routing: &plan.weights[done..][..rows],
                h: &h[done * hidden..][..rows * hidden],
                slope: cut(&mut slope_rest, rows * shape.slopes()),
                xs: cut(&mut xs, rows * dim),
                dys: cut(&mut dys, rows * dim),
                dxs: cut(&mut dxs, rows * dim),
                d_weights: cut(&mut d_weights, rows),
            });
            done += rows;
        }
    }
    tasks.into_par_iter().with_max_len(1).for_each(|task| {
        let Task {
            expert,
            tokens,
            routing,
            h,
            slope,
            xs,
            dys,
            dxs,
            d_weights,
        } = task;
        let rows = tokens.len();
        gather(x, tokens, dim, xs);
        gather(dy, tokens, dim, dys);
        let mut dh = Scratch::take(rows * hidden);
        gemm(
            MatMut::new(&mut dh, hidden, rows),
            Mat::new(expert.w2, dim, hidden).t(),
            Mat::new(dys, rows, dim).t(),
            1.0,
            Store::Replace,
        );
        let (by_pre, by_factor) = slope.split_at_mut(rows * hidden);
        vectorised(
            #[inline(always)]
            || {
                for ((d, dy), &w) in d_weights
                    .iter_mut()
                    .zip(dys.chunks_exact_mut(dim))
                    .zip(routing)
                {
                    *d = vector::dot(dy, expert.b2);
                    for dy in dy {
                        *dy *= w;
                    }
                }
                for (j, (dh, h)) in dh.chunks_exact(rows).zip(h.chunks_exact(rows)).enumerate() {
                    let by_pre = &mut by_pre[j * rows..][..rows];
                    for r in 0..rows {
                        d_weights[r] += dh[r] * h[r];
                        by_pre[r] *= dh[r] * routing[r];
                    }
                    if shape.gated {
                        let by_factor = &mut by_factor[j * rows..][..rows];
                        for r in 0..rows {
                            by_factor[r] *= dh[r] * routing[r];
                        }
                    }
                }
            },
        );
        let mut store = Store::Replace;
        let mut add = |d: &[f32], w: &[f32]| {
            let (d, w) = (Mat::new(d, hidden, rows).t(), Mat::new(w, hidden, dim));
            gemm(MatMut::new(dxs, rows, dim), d, w, 1.0, store);
            store = Store::Add;
        };
        add(by_pre, expert.w1);
        if let Some((w3, _)) = expert.up {
            add(by_factor, w3);
        }
    });
}

/// Second half: the gradients of the weights, cut by rows of the matrices so that a crowded expert keeps no thread waiting.
fn backward_weights(
    plan: Grouped<'_>,
    shape: FfnShape,
    (h, d_pre): (&[f32], &[f32]),
    (xs, dys): (&[f32], &[f32]),
    gradients: &mut [ExpertGradients<'_>],
) {
    /// Rows `first..` of one of an expert's matrices.
    struct Task<'a> {
        expert: usize,
        /// `None` for the second matrix, else which of the two first ones.
        part: Option<usize>,
        first: usize,
        matrix: &'a mut [f32],
        bias: &'a mut [f32],
        store: Store,
    }
    let FfnShape { dim, hidden, .. } = shape;
    let assigned = plan.tokens.len().max(1);
    let mut tasks = Vec::with_capacity(2 * gradients.len() + 2 * GRADIENT_TASKS);
    for (expert, g) in gradients.iter_mut().enumerate() {
        let store = g.store;
        let load = plan.segment(expert).len();
        if load == 0 && store == Store::Add {
            continue;
        }
        let chunks = (load * GRADIENT_TASKS).div_ceil(assigned).max(1);
        let mut pieces = Vec::new();
        pieces.push((Some(0), &mut *g.w1, &mut *g.b1, dim));
        if let Some((w3, b3)) = &mut g.up {
            pieces.push((Some(1), &mut **w3, &mut **b3, dim));
        }
        pieces.push((None, &mut *g.w2, &mut *g.b2, hidden));
        for (part, matrix, bias, cols) in pieces {
            let rows = bias.len().div_ceil(chunks).max(GRADIENT_ROWS);
            let cuts = matrix.chunks_mut(rows * cols).zip(bias.chunks_mut(rows));
            for (i, (matrix, bias)) in cuts.enumerate() {
                tasks.push(Task {
                    expert,
                    part,
                    first: i * rows,
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
            expert,
            part,
            first,
            matrix,
            bias,
            mut store,
        } = task;
        if store == Store::Replace {
            bias.fill(0.0);
        }
        let segment = plan.segment(expert);
        if segment.is_empty() && store == Store::Replace {
            matrix.fill(0.0);
        }
        let block = block_rows(segment.len()).max(1);
        let out = bias.len();
        for start in segment.clone().step_by(block) {
            let rows = block.min(segment.end - start);
            match part {
                Some(part) => {
                    let d = &d_pre[start * shape.slopes() + part * rows * hidden..];
                    let d = &d[first * rows..][..out * rows];
                    gemm(
                        MatMut::new(matrix, out, dim),
                        Mat::new(d, out, rows),
                        Mat::new(&xs[start * dim..], rows, dim),
                        1.0,
                        store,
                    );
                    vectorised(
                        #[inline(always)]
                        || {
                            for (b, d) in bias.iter_mut().zip(d.chunks_exact(rows)) {
                                *b += vector::sum(d);
                            }
                        },
                    );
                }
                None => {
                    let dy = &dys[start * dim + first..(start + rows) * dim];
                    gemm(
                        MatMut::new(matrix, out, hidden),
                        Mat::strided(dy, rows, out, dim).t(),
                        Mat::new(&h[start * hidden..], hidden, rows).t(),
                        1.0,
                        store,
                    );
                    for dy in dy.chunks(dim) {
                        vector::add_assign(bias, &dy[..out]);
                    }
                }
            }
            store = Store::Add;
        }
    });
}

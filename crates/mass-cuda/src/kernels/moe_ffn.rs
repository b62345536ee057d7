//! The grouped expert feed-forward network.
//!
//! Assignments (token, expert, weight) arrive sorted by expert. For the assignments a of a token t, with experts e(a)
//! and routing weights w(a):
//!
//! `y[t] = Σ_a w(a) (W2[e] h(a) + b2[e])`, `h(a) = act(W1[e] x[t] + b1[e])`
//!
//! and for gated experts `h(a) = act(W1 x + b1) ⊙ (W3 x + b3)`. All experts' products of a kind are one launch. The
//! gradient of a routing weight needs no stored output: `∂L/∂w(a) = <dy W2, h(a)> + <dy, b2>`.

use super::dots::{ColumnSum, column_sums};
use super::gemm::{Job, Matrix, MatrixMut, Then, run};
use super::{Activation, Placed, Store, each, given, int, product, rows, rows_of, warps};
use crate::driver::Arguments;
use crate::{Buffer, CudaError, Device, View, ViewMut};

/// The weights of one expert: `w1[hidden, dim]`, `b1[hidden]`, `w2[dim, hidden]`, `b2[dim]`, and for a gated expert
/// `w3[hidden, dim]`, `b3[hidden]`.
#[derive(Clone, Copy, Debug)]
pub struct ExpertWeights<'a> {
    /// First matrix (fc1).
    pub w1: View<'a, f32>,
    /// First bias.
    pub b1: View<'a, f32>,
    /// Second matrix (fc2).
    pub w2: View<'a, f32>,
    /// Second bias.
    pub b2: View<'a, f32>,
    /// Matrix and bias of the factor on the activation, for gated experts.
    pub up: Option<(View<'a, f32>, View<'a, f32>)>,
}

/// Where an expert's gradients go; same layout as [`ExpertWeights`].
#[derive(Debug)]
pub struct ExpertGradients<'a> {
    /// First matrix.
    pub w1: ViewMut<'a, f32>,
    /// First bias.
    pub b1: ViewMut<'a, f32>,
    /// Second matrix.
    pub w2: ViewMut<'a, f32>,
    /// Second bias.
    pub b2: ViewMut<'a, f32>,
    /// Matrix and bias of the factor on the activation, for gated experts.
    pub up: Option<(ViewMut<'a, f32>, ViewMut<'a, f32>)>,
    /// Whether they are added to, or replaced whatever they hold.
    pub store: Store,
}

/// Who computes what: assignments grouped by expert, and each token's assignments. The indices must be those of a
/// plan.
#[derive(Clone, Copy, Debug)]
pub struct Grouped<'a> {
    /// Segment of expert e: `expert_offsets[e]..expert_offsets[e + 1]`.
    pub expert_offsets: &'a [u32],
    /// The same on the device; it may be longer.
    pub expert_offsets_on_device: View<'a, u32>,
    /// Token of each assignment.
    pub tokens: View<'a, u32>,
    /// Routing weight of each assignment.
    pub weights: View<'a, f32>,
    /// Assignments of token t: `token_assignments[token_offsets[t]..token_offsets[t + 1]]`.
    pub token_offsets: View<'a, u32>,
    /// Positions in the grouped order.
    pub token_assignments: View<'a, u32>,
}

/// Width of tokens and of the hidden layer, and the nonlinearity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
    /// Whether slopes are kept. The slope of a ReLU shows in its value.
    fn keeps_slopes(&self) -> bool {
        self.gated || self.activation != Activation::Relu
    }
}

/// What [`forward`] keeps for [`backward`]: hidden activations of each assignment, and slopes where they do not show
/// in those.
#[derive(Debug)]
pub struct Hidden {
    h: Buffer<f32>,
    by_pre: Option<Buffer<f32>>,
    by_factor: Option<Buffer<f32>>,
}

impl Hidden {
    /// Room for this many assignments.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`], [`CudaError::Call`].
    pub fn new(device: &Device, shape: FfnShape, assignments: usize) -> Result<Self, CudaError> {
        let n = product("hidden activations", &[assignments, shape.hidden])?;
        let room = |wanted: bool| wanted.then(|| Buffer::uninitialised(device, n)).transpose();
        Ok(Self {
            h: Buffer::uninitialised(device, n)?,
            by_pre: room(shape.keeps_slopes())?,
            by_factor: room(shape.gated)?,
        })
    }

    fn check(&self, device: &Device, shape: FfnShape, assignments: usize) -> Result<(), CudaError> {
        let n = product("hidden activations", &[assignments, shape.hidden])?;
        given(device, &[("hidden activations", &self.h, n)])?;
        for (what, wanted, slopes) in [
            ("slopes", shape.keeps_slopes(), &self.by_pre),
            ("factors", shape.gated, &self.by_factor),
        ] {
            match slopes {
                Some(slopes) if wanted => given(device, &[(what, slopes, n)])?,
                Some(slopes) => CudaError::check(what, 0, slopes.len())?,
                None => CudaError::check(what, if wanted { n } else { 0 }, 0)?,
            }
        }
        Ok(())
    }
}

/// Refuses a factor on the activation where none belongs, and the lack of one.
fn factor_there(what: &'static str, there: bool, gated: bool) -> Result<(), CudaError> {
    match there == gated {
        true => Ok(()),
        false => Err(CudaError::Setting {
            what,
            got: there.to_string(),
            wanted: "there where the shape is gated, and only there",
        }),
    }
}

/// A layer's plan and shape, checked.
struct Layer<'a> {
    device: &'a Device,
    experts: &'a [ExpertWeights<'a>],
    plan: Grouped<'a>,
    shape: FfnShape,
    tokens: usize,
    assigned: usize,
    loads: Vec<usize>,
}

impl<'a> Layer<'a> {
    fn new(
        device: &'a Device,
        x: &dyn Placed,
        experts: &'a [ExpertWeights<'a>],
        plan: Grouped<'a>,
        shape: FfnShape,
    ) -> Result<Self, CudaError> {
        let FfnShape {
            dim, hidden, gated, ..
        } = shape;
        let Grouped { expert_offsets, .. } = plan;
        let matrix = product("matrix of an expert", &[dim, hidden])?;
        let tokens = rows_of("x", x.values(), dim)?;
        let ends = experts.len() + 1;
        CudaError::check("offsets of experts", ends, expert_offsets.len())?;
        let on_device = plan.expert_offsets_on_device;
        if on_device.len() < ends {
            return Err(CudaError::Length {
                what: "offsets of experts on the device",
                wanted: ends,
                got: on_device.len(),
            });
        }
        let falls = expert_offsets.windows(2).position(|w| w[0] > w[1]);
        let wrong = match falls {
            Some(e) => Some(format!("falling at expert {e}")),
            None if expert_offsets[0] != 0 => Some(format!("{} at first", expert_offsets[0])),
            None => None,
        };
        if let Some(got) = wrong {
            return Err(CudaError::Setting {
                what: "offsets of experts",
                got,
                wanted: "0 at first, and rising",
            });
        }
        let assigned = expert_offsets[experts.len()] as usize;
        given(
            device,
            &[
                ("x", x, x.values()),
                ("plan's tokens", &plan.tokens, assigned),
                ("plan's weights", &plan.weights, assigned),
                ("plan's offsets of tokens", &plan.token_offsets, tokens + 1),
                (
                    "plan's assignments of tokens",
                    &plan.token_assignments,
                    assigned,
                ),
                (
                    "offsets of experts on the device",
                    &on_device,
                    on_device.len(),
                ),
            ],
        )?;
        for e in experts {
            factor_there("an expert's factor", e.up.is_some(), gated)?;
            given(
                device,
                &[
                    ("w1", &e.w1, matrix),
                    ("b1", &e.b1, hidden),
                    ("w2", &e.w2, matrix),
                    ("b2", &e.b2, dim),
                ],
            )?;
            if let Some((w, b)) = &e.up {
                given(device, &[("w3", w, matrix), ("b3", b, hidden)])?;
            }
        }
        for (what, size) in [
            ("tokens", tokens),
            ("assignments", assigned),
            ("experts", experts.len()),
            ("width", dim),
            ("hidden width", hidden),
        ] {
            int(what, size)?;
        }
        let loads = expert_offsets
            .windows(2)
            .map(|w| (w[1] - w[0]) as usize)
            .collect();
        Ok(Self {
            device,
            experts,
            plan,
            shape,
            tokens,
            assigned,
            loads,
        })
    }

    /// A row of so many values for each assignment.
    fn room(&self, width: usize) -> Result<Buffer<f32>, CudaError> {
        let n = product("rows of assignments", &[self.assigned, width])?;
        Buffer::uninitialised(self.device, n)
    }

    fn segments<'v>(
        &self,
        view: ViewMut<'v, f32>,
        width: usize,
    ) -> Result<Vec<ViewMut<'v, f32>>, CudaError> {
        view.split(self.loads.iter().map(|load| load * width))
    }

    /// The same where there is something; `None` for every expert otherwise.
    fn segments_if<'v>(
        &self,
        view: Option<ViewMut<'v, f32>>,
        width: usize,
    ) -> Result<Vec<Option<ViewMut<'v, f32>>>, CudaError> {
        match view {
            Some(view) => Ok(self.segments(view, width)?.into_iter().map(Some).collect()),
            None => Ok(self.experts.iter().map(|_| None).collect()),
        }
    }

    fn segment<'v>(
        &self,
        view: View<'v, f32>,
        expert: usize,
        width: usize,
    ) -> Result<View<'v, f32>, CudaError> {
        let first = self.plan.expert_offsets[expert] as usize;
        view.range(first * width..(first + self.loads[expert]) * width)
    }

    /// The tokens of an expert.
    fn picked(&self, expert: usize) -> Result<View<'a, u32>, CudaError> {
        let first = self.plan.expert_offsets[expert] as usize;
        self.plan.tokens.range(first..first + self.loads[expert])
    }

    /// `y[t] (+)= Σ_a w(a) outputs[a]`, weights 1 without.
    fn combine(
        &self,
        outputs: View<'_, f32>,
        weights: Option<View<'_, f32>>,
        y: &ViewMut<'_, f32>,
        store: Store,
    ) -> Result<(), CudaError> {
        let arguments = Arguments::new()
            .view(outputs)
            .view_or_null(weights)
            .view(self.plan.token_offsets);
        let arguments = arguments
            .view(self.plan.token_assignments)
            .view_mut(y)
            .long(y.len());
        let arguments = arguments
            .int(int("width", self.shape.dim)?)
            .int(store.add());
        each(self.device, "combine", y.len(), &arguments)
    }
}

/// Writes `y: [tokens, dim]`, and what [`backward`] needs to `kept`.
///
/// # Errors
/// [`CudaError::Length`] or [`CudaError::Setting`] if lengths do not fit shape and plan, [`CudaError::OutOfMemory`],
/// [`CudaError::Call`], [`CudaError::OtherDevice`].
pub fn forward(
    device: &Device,
    x: View<'_, f32>,
    experts: &[ExpertWeights<'_>],
    plan: Grouped<'_>,
    shape: FfnShape,
    kept: Option<&mut Hidden>,
    y: ViewMut<'_, f32>,
) -> Result<(), CudaError> {
    let layer = Layer::new(device, &x, experts, plan, shape)?;
    given(device, &[("y", &y, x.len())])?;
    let FfnShape {
        dim,
        hidden,
        activation,
        ..
    } = shape;
    let mut unkept = None;
    let (h, mut by_pre, mut by_factor) = match kept {
        Some(kept) => {
            kept.check(device, shape, layer.assigned)?;
            (&mut kept.h, kept.by_pre.as_mut(), kept.by_factor.as_mut())
        }
        None => (unkept.insert(layer.room(hidden)?), None, None),
    };
    let input = Matrix::new(x, layer.tokens, dim)?;
    let mut jobs = Vec::with_capacity(experts.len());
    let all = layer
        .segments(h.view_mut(), hidden)?
        .into_iter()
        .zip(layer.segments_if(by_pre.as_mut().map(|b| b.view_mut()), hidden)?);
    for (e, (c, slopes)) in all.enumerate() {
        let w1 = Matrix::new(experts[e].w1, hidden, dim)?.t();
        let mut job = Job::new(input, w1, MatrixMut::new(c, layer.loads[e], hidden)?);
        job.rows = Some(layer.picked(e)?);
        job.epilogue.bias = Some(experts[e].b1);
        job.epilogue.then = Then::Activate(activation, slopes);
        jobs.push(job);
    }
    run(device, &jobs)?;
    if shape.gated {
        let mut jobs = Vec::with_capacity(experts.len());
        let slopes = layer.segments_if(by_pre.as_mut().map(|b| b.view_mut()), hidden)?;
        let factors = layer.segments_if(by_factor.as_mut().map(|b| b.view_mut()), hidden)?;
        let all = layer
            .segments(h.view_mut(), hidden)?
            .into_iter()
            .zip(slopes.into_iter().zip(factors));
        for (e, (c, both)) in all.enumerate() {
            let Some((w3, b3)) = experts[e].up else {
                continue;
            };
            let w3 = Matrix::new(w3, hidden, dim)?.t();
            let mut job = Job::new(input, w3, MatrixMut::new(c, layer.loads[e], hidden)?);
            job.rows = Some(layer.picked(e)?);
            job.epilogue.bias = Some(b3);
            job.epilogue.then = Then::Gate(both.0.zip(both.1));
            jobs.push(job);
        }
        run(device, &jobs)?;
    }
    let mut outputs = layer.room(dim)?;
    let mut jobs = Vec::with_capacity(experts.len());
    for (e, c) in layer
        .segments(outputs.view_mut(), dim)?
        .into_iter()
        .enumerate()
    {
        let a = Matrix::new(layer.segment(h.view(), e, hidden)?, layer.loads[e], hidden)?;
        let w2 = Matrix::new(experts[e].w2, dim, hidden)?.t();
        let mut job = Job::new(a, w2, MatrixMut::new(c, layer.loads[e], dim)?);
        job.epilogue.bias = Some(experts[e].b2);
        jobs.push(job);
    }
    run(device, &jobs)?;
    layer.combine(outputs.view(), Some(plan.weights), &y, Store::Replace)
}

/// Adds to or replaces `dx` and `gradients`, and writes `d_weights` (per assignment), for an upstream gradient `dy`.
///
/// `kept` is what [`forward`] wrote; its slopes are used up. The gradients of an expert without tokens stay as they
/// are where they are added to, and become zero where they are replaced; `None` for such an expert leaves it out.
///
/// # Errors
/// As [`forward`].
#[allow(clippy::too_many_arguments)]
pub fn backward(
    device: &Device,
    x: View<'_, f32>,
    experts: &[ExpertWeights<'_>],
    plan: Grouped<'_>,
    shape: FfnShape,
    kept: &mut Hidden,
    dy: View<'_, f32>,
    (dx, store): (ViewMut<'_, f32>, Store),
    gradients: &mut [Option<ExpertGradients<'_>>],
    d_weights: ViewMut<'_, f32>,
) -> Result<(), CudaError> {
    let layer = Layer::new(device, &x, experts, plan, shape)?;
    let FfnShape { dim, hidden, .. } = shape;
    let assigned = layer.assigned;
    kept.check(device, shape, assigned)?;
    given(
        device,
        &[
            ("dy", &dy, x.len()),
            ("dx", &dx, x.len()),
            ("d_weights", &d_weights, assigned),
        ],
    )?;
    CudaError::check("gradients of experts", experts.len(), gradients.len())?;
    let matrix = product("matrix of an expert", &[dim, hidden])?;
    for g in gradients.iter().flatten() {
        factor_there(
            "gradients of an expert's factor",
            g.up.is_some(),
            shape.gated,
        )?;
        given(
            device,
            &[
                ("gradient of w1", &g.w1, matrix),
                ("gradient of b1", &g.b1, hidden),
                ("gradient of w2", &g.w2, matrix),
                ("gradient of b2", &g.b2, dim),
            ],
        )?;
        if let Some((w, b)) = &g.up {
            given(
                device,
                &[("gradient of w3", w, matrix), ("gradient of b3", b, hidden)],
            )?;
        }
    }

    // dh = dy[token] W2 for each assignment.
    let mut dh = layer.room(hidden)?;
    let upstream = Matrix::new(dy, layer.tokens, dim)?;
    let mut jobs = Vec::with_capacity(experts.len());
    for (e, c) in layer
        .segments(dh.view_mut(), hidden)?
        .into_iter()
        .enumerate()
    {
        let w2 = Matrix::new(experts[e].w2, dim, hidden)?;
        let mut job = Job::new(upstream, w2, MatrixMut::new(c, layer.loads[e], hidden)?);
        job.rows = Some(layer.picked(e)?);
        jobs.push(job);
    }
    run(device, &jobs)?;
    drop(jobs);

    // The gradients of routing weights and of the values before the nonlinearity.
    let mut unkept = None;
    let relu = kept.by_pre.is_none();
    let by_pre = match kept.by_pre.as_mut() {
        Some(slopes) => slopes,
        None => unkept.insert(layer.room(hidden)?),
    };
    let biases: Vec<u64> = experts.iter().map(|e| e.b2.address()).collect();
    let biases = Buffer::from_slice(device, &biases)?;
    let by_factor = kept.by_factor.as_mut().map(Buffer::view_mut);
    let arguments = Arguments::new()
        .view(dh.view())
        .view(kept.h.view())
        .view(dy)
        .view(biases.view());
    let arguments = arguments
        .view(plan.expert_offsets_on_device)
        .view(plan.tokens)
        .view(plan.weights);
    let arguments = arguments
        .view_mut(&by_pre.view_mut())
        .view_mut_or_null(by_factor.as_ref())
        .view_mut(&d_weights);
    let arguments = arguments
        .int(int("assignments", assigned)?)
        .int(int("experts", experts.len())?);
    let arguments = arguments
        .int(int("hidden width", hidden)?)
        .int(int("width", dim)?)
        .int(relu.into());
    warps(device, "gate_gradient", assigned, &arguments)?;
    drop(dh);

    // dx, by way of each assignment's.
    let by_pre = by_pre.view();
    let by_factor = kept.by_factor.as_ref().map(Buffer::view);
    let mut dxs = layer.room(dim)?;
    let firsts = experts.iter().map(|e| (by_pre, e.w1)).collect::<Vec<_>>();
    let seconds = experts
        .iter()
        .filter_map(|e| Some((by_factor?, e.up?.0)))
        .collect::<Vec<_>>();
    for (sources, store) in [(firsts, Store::Replace), (seconds, Store::Add)] {
        let mut jobs = Vec::with_capacity(experts.len());
        let pieces = layer.segments(dxs.view_mut(), dim)?;
        for ((e, c), (d, w)) in pieces.into_iter().enumerate().zip(sources) {
            let a = Matrix::new(layer.segment(d, e, hidden)?, layer.loads[e], hidden)?;
            let job = Job::new(
                a,
                Matrix::new(w, hidden, dim)?,
                MatrixMut::new(c, layer.loads[e], dim)?,
            );
            jobs.push(Job { store, ..job });
        }
        run(device, &jobs)?;
    }
    layer.combine(dxs.view(), None, &dx, store)?;

    // Inputs and weighted upstream gradients of each assignment, for the gradients of the weights.
    let mut xs = dxs;
    rows::gather(device, x, plan.tokens, None, xs.view_mut(), dim)?;
    let mut dys = layer.room(dim)?;
    rows::gather(
        device,
        dy,
        plan.tokens,
        Some(plan.weights),
        dys.view_mut(),
        dim,
    )?;
    let (mut jobs, mut sums) = (Vec::new(), Vec::new());
    for (e, gradients) in gradients.iter_mut().enumerate() {
        let Some(g) = gradients else { continue };
        let (load, store) = (layer.loads[e], g.store);
        let parts = [
            (
                by_pre,
                hidden,
                xs.view(),
                dim,
                Some((g.w1.reborrow(), g.b1.reborrow())),
            ),
            (
                dys.view(),
                dim,
                kept.h.view(),
                hidden,
                Some((g.w2.reborrow(), g.b2.reborrow())),
            ),
            (
                by_factor.unwrap_or(by_pre),
                hidden,
                xs.view(),
                dim,
                g.up.as_mut().map(|(w, b)| (w.reborrow(), b.reborrow())),
            ),
        ];
        for (left, l, right, r, to) in parts {
            let Some((w, b)) = to else { continue };
            if load == 0 && store == Store::Add {
                continue;
            }
            let left = layer.segment(left, e, l)?;
            let a = Matrix::new(left, load, l)?.t();
            let b_matrix = Matrix::new(layer.segment(right, e, r)?, load, r)?;
            let job = Job::new(a, b_matrix, MatrixMut::new(w, l, r)?);
            jobs.push(Job { store, ..job });
            sums.push(ColumnSum {
                x: left,
                times: None,
                y: b,
                store,
            });
        }
    }
    run(device, &jobs)?;
    column_sums(device, sums)
}

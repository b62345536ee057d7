use std::sync::Arc;

use dfdx::tensor::CpuError;
use mass_routing::{
    AnyRouter, CosineForward, CosineGate, LowRankForward, LowRankGate, RoutingPlan,
};
use ndarray::{Array2, ArrayView1, ArrayView2, ArrayViewMut1, ArrayViewMut2, ShapeError};

use super::MoeExpert;
use super::routing_loss::LossGradients;
use crate::error::ModelError;
use crate::gradients::CpuGradients;
use crate::kernels::gemm::Store;
use crate::kernels::linear;
use crate::kernels::scratch::Scratch;
use crate::kernels::vector::add_assign;
use crate::param::{Param, ParamHandle};

/// What a mixture layer's logits are made of, beside the gate row of each expert.
#[allow(clippy::large_enum_variant)] // a layer has one
#[derive(Clone, Debug, Default)]
pub enum Gate {
    /// `logit_e = <x, w_e>`.
    #[default]
    Linear,
    /// `logit_e = exp(min(ln 100, log_scale)) cos(h, w_e)`, see `mass_routing::CosineGate`.
    Cosine {
        /// Matrix `[r, d]` and bias `[r]` of `h = P x + b`; `h = x` without.
        projection: Option<(Param, Param)>,
        /// Logarithm of the scale, `[1]`; scale one without.
        log_scale: Option<Param>,
    },
    /// Bounded scores in a space of low rank, with several anchors an expert: see `mass_routing::LowRankGate`. The
    /// gate row of an expert is its anchors, one after another.
    LowRank {
        /// The query projection, `[r, d]`.
        query: Param,
        /// Anchors of an expert.
        anchors: usize,
        /// The largest absolute score.
        scale: f32,
    },
}

/// The logits of a batch and what their backward pass needs.
pub(super) struct Gated {
    pub(super) logits: Scratch,
    pub(super) rows: Vec<f32>,
    kind: Kind,
    handles: Vec<ParamHandle>,
    thresholds: Vec<ParamHandle>,
}

enum Kind {
    Linear,
    Cosine {
        forward: Box<CosineForward>,
        projection: Option<[(Arc<Vec<f32>>, ParamHandle); 2]>,
        log_scale: Option<(f32, ParamHandle)>,
    },
    LowRank {
        forward: Box<LowRankForward>,
        query: (Arc<Vec<f32>>, ParamHandle),
        anchors: usize,
        scale: f32,
    },
}

pub(super) fn internal(error: ShapeError) -> ModelError {
    ModelError::Config(format!("gate: {error}"))
}

/// The gate as mass-routing knows it; `rows` holds one expert after another.
fn cosine_gate<'a>(
    rows: &'a [f32],
    experts: usize,
    projection: Option<(&'a [f32], &'a [f32])>,
    log_scale: Option<f32>,
    dim: usize,
) -> Result<CosineGate<'a>, ModelError> {
    let width = rows.len() / experts;
    let columns = ArrayView2::from_shape((experts, width), rows).map_err(internal)?;
    let mut gate = CosineGate::new(columns.reversed_axes())?;
    if let Some((weight, bias)) = projection {
        let weight = ArrayView2::from_shape((width, dim), weight).map_err(internal)?;
        gate = gate.with_projection(weight, ArrayView1::from(bias))?;
    }
    Ok(match log_scale {
        Some(scale) => gate.with_log_scale(scale)?,
        None => gate,
    })
}

/// The low-rank gate as mass-routing knows it; `rows` holds the anchors of one expert after another's.
fn low_rank_gate<'a>(
    rows: &'a [f32],
    experts: usize,
    query: &'a [f32],
    anchors: usize,
    scale: f32,
    dim: usize,
) -> Result<LowRankGate<'a>, ModelError> {
    let rank = query.len() / dim;
    let query = ArrayView2::from_shape((rank, dim), query).map_err(internal)?;
    let all = ArrayView2::from_shape((experts * anchors, rank), rows).map_err(internal)?;
    Ok(LowRankGate::new(query, all, anchors)?.with_scale(scale)?)
}

/// Copies logits, each expert's offset added.
fn add_offsets(sums: ArrayView2<'_, f32>, offsets: &[f32], logits: &mut [f32]) {
    let rows = logits.chunks_exact_mut(offsets.len());
    for (to, from) in rows.zip(sums.outer_iter()) {
        for ((to, from), offset) in to.iter_mut().zip(from).zip(offsets) {
            *to = from + offset;
        }
    }
}

impl Gate {
    /// Parameters that all experts share, with their names.
    pub(crate) fn params(&self) -> Vec<(&'static str, &Param)> {
        match self {
            Self::Linear => Vec::new(),
            Self::Cosine {
                projection,
                log_scale,
            } => {
                let projection = projection.iter().flat_map(|(weight, bias)| {
                    [
                        ("gate.projection.weight", weight),
                        ("gate.projection.bias", bias),
                    ]
                });
                let scale = log_scale.iter().map(|scale| ("gate.log_scale", scale));
                projection.chain(scale).collect()
            }
            Self::LowRank { query, .. } => vec![("gate.query", query)],
        }
    }

    /// [`params`](Self::params), to be changed.
    pub(crate) fn params_mut(&mut self) -> Vec<(&'static str, &mut Param)> {
        match self {
            Self::Linear => Vec::new(),
            Self::Cosine {
                projection,
                log_scale,
            } => {
                let projection = projection.iter_mut().flat_map(|(weight, bias)| {
                    [
                        ("gate.projection.weight", weight),
                        ("gate.projection.bias", bias),
                    ]
                });
                let scale = log_scale.iter_mut().map(|scale| ("gate.log_scale", scale));
                projection.chain(scale).collect()
            }
            Self::LowRank { query, .. } => vec![("gate.query", query)],
        }
    }

    /// Width of an expert's gate row for tokens of width `dim`; refuses a gate of other shapes than these have.
    pub(super) fn width(&self, dim: usize) -> Result<usize, ModelError> {
        let fits = |what: &str, wanted: &[usize], param: &Param| match param.shape() == wanted {
            true => Ok(()),
            false => Err(ModelError::shape(what, wanted, param.shape())),
        };
        match self {
            Self::Linear => Ok(dim),
            Self::Cosine {
                projection,
                log_scale,
            } => {
                if let Some(scale) = log_scale {
                    fits("log scale of a gate", &[1], scale)?;
                }
                let Some((weight, bias)) = projection else {
                    return Ok(dim);
                };
                let width = weight.shape().first().copied().unwrap_or(1);
                fits("projection of a gate", &[width, dim], weight)?;
                fits("bias of a gate's projection", &[width], bias)?;
                Ok(width)
            }
            Self::LowRank { query, anchors, .. } => {
                let rank = query.shape().first().copied().unwrap_or(1);
                fits("query projection of a gate", &[rank, dim], query)?;
                rank.checked_mul(*anchors).ok_or_else(|| {
                    let what = format!("a gate of rank {rank} with {anchors} anchors an expert is larger than memory can be");
                    ModelError::Config(what)
                })
            }
        }
    }

    /// The logits of `x: [n, dim]`, each expert's offset added.
    pub(super) fn logits(
        &self,
        x: &[f32],
        experts: &[MoeExpert],
        (n, dim): (usize, usize),
    ) -> Result<Gated, ModelError> {
        let mut rows = Vec::with_capacity(experts.len() * dim);
        for expert in experts {
            rows.extend_from_slice(expert.gate.try_values()?);
        }
        let offsets: Vec<f32> = experts.iter().map(|e| e.logit_offset).collect();
        let mut logits = Scratch::take(n * experts.len());
        let kind = match self {
            Self::Linear => {
                linear::forward(x, &rows, Some(&offsets), &mut logits, dim, experts.len());
                Kind::Linear
            }
            Self::Cosine {
                projection,
                log_scale,
            } => {
                let arrays = match projection {
                    Some((w, b)) => Some((w.try_values()?, b.try_values()?)),
                    None => None,
                };
                let held = projection
                    .as_ref()
                    .map(|(w, b)| [(w.shared(), w.handle()), (b.shared(), b.handle())]);
                let scale = match log_scale {
                    Some(s) => Some((s.try_values()?[0], s.handle())),
                    None => None,
                };
                let gate = cosine_gate(
                    &rows,
                    experts.len(),
                    arrays,
                    scale.as_ref().map(|s| s.0),
                    dim,
                )?;
                let x = ArrayView2::from_shape((n, dim), x).map_err(internal)?;
                let forward = gate.forward(x)?;
                add_offsets(forward.logits(), &offsets, &mut logits);
                Kind::Cosine {
                    forward: Box::new(forward),
                    projection: held,
                    log_scale: scale,
                }
            }
            Self::LowRank {
                query,
                anchors,
                scale,
            } => {
                let (anchors, scale) = (*anchors, *scale);
                let values = query.try_values()?;
                let gate = low_rank_gate(&rows, experts.len(), values, anchors, scale, dim)?;
                let x = ArrayView2::from_shape((n, dim), x).map_err(internal)?;
                let forward = gate.forward(x)?;
                add_offsets(forward.logits(), &offsets, &mut logits);
                Kind::LowRank {
                    forward: Box::new(forward),
                    query: (query.shared(), query.handle()),
                    anchors,
                    scale,
                }
            }
        };
        Ok(Gated::new(logits, rows, kind, experts))
    }
}

/// Hands the experts' learned thresholds to a router that has some.
pub(crate) fn set_thresholds(
    router: &mut AnyRouter,
    experts: &[MoeExpert],
) -> Result<(), ModelError> {
    let AnyRouter::TopAny(router) = router else {
        return Ok(());
    };
    let mut thresholds = Vec::with_capacity(experts.len());
    for expert in experts {
        let what = "top-any routing needs a threshold in every expert";
        let threshold = expert.threshold.as_ref();
        let threshold = threshold.ok_or_else(|| ModelError::Config(what.into()))?;
        thresholds.push(threshold.try_values()?[0]);
    }
    Ok(router.set_thresholds(&thresholds)?)
}

impl Gated {
    fn new(logits: Scratch, rows: Vec<f32>, kind: Kind, experts: &[MoeExpert]) -> Self {
        let thresholds = experts.iter().filter_map(|e| e.threshold.as_ref());
        Self {
            logits,
            rows,
            kind,
            handles: experts.iter().map(|e| e.gate.handle()).collect(),
            thresholds: thresholds.map(Param::handle).collect(),
        }
    }

    /// A linear gate's, whose logits were computed elsewhere. The rows may be missing where no loss reads them.
    #[cfg(feature = "cuda")]
    pub(super) fn linear(logits: Scratch, rows: Vec<f32>, experts: &[MoeExpert]) -> Self {
        Self::new(logits, rows, Kind::Linear, experts)
    }

    pub(super) fn is_low_rank(&self) -> bool {
        matches!(self.kind, Kind::LowRank { .. })
    }

    /// Where the gradients of the experts' rows are.
    #[cfg(feature = "cuda")]
    pub(super) fn handles(&self) -> &[ParamHandle] {
        &self.handles
    }

    /// Takes the gradient of the assignments' weights to the logits; `add` is given the thresholds' share of it.
    pub(super) fn backward_to_logits(
        &self,
        router: &AnyRouter,
        plan: &RoutingPlan,
        losses: &LossGradients,
        d_weights: &[f32],
        add: &mut AddGradient<'_>,
    ) -> Result<Scratch, ModelError> {
        use mass_routing::Router;
        let experts = self.handles.len();
        let n = self.logits.len() / experts;
        let mut d_logits = Scratch::zeros(n * experts);
        let mut view = ArrayViewMut2::from_shape((n, experts), &mut d_logits).map_err(internal)?;
        router.backward(plan, d_weights, &mut view)?;
        losses
            .logits
            .iter()
            .for_each(|d| add_assign(&mut d_logits, d));
        if let AnyRouter::TopAny(router) = router {
            let mut d = vec![0.0; experts];
            router.backward_thresholds(plan, d_weights, &mut ArrayViewMut1::from(&mut d[..]))?;
            for (handle, d) in self.thresholds.iter().zip(d) {
                add(handle, &[d])?;
            }
        }
        Ok(d_logits)
    }

    /// Takes the gradient of the assignments' weights to the gate's parameters, whose shares `add` is given, and adds it to `dx`.
    pub(super) fn backward(
        &self,
        router: &AnyRouter,
        plan: &RoutingPlan,
        losses: &LossGradients,
        (x, d_weights): (&[f32], &[f32]),
        dx: &mut [f32],
        add: &mut AddGradient<'_>,
    ) -> Result<(), ModelError> {
        let experts = self.handles.len();
        let n = self.logits.len() / experts;
        let dim = x.len() / n;
        let d_logits = self.backward_to_logits(router, plan, losses, d_weights, add)?;
        let mut d_rows = Scratch::zeros(self.rows.len());
        match &self.kind {
            Kind::Linear => {
                linear::backward_input(&d_logits, &self.rows, (dx, Store::Add), (dim, experts));
                let sizes = (dim, experts);
                linear::backward_weight(x, &d_logits, &mut d_rows, None, sizes, Store::Add);
            }
            Kind::Cosine {
                forward,
                projection,
                log_scale,
            } => {
                let arrays = projection
                    .as_ref()
                    .map(|[(w, _), (b, _)]| (w.as_slice(), b.as_slice()));
                let scale = log_scale.as_ref().map(|s| s.0);
                let gate = cosine_gate(&self.rows, experts, arrays, scale, dim)?;
                let x = ArrayView2::from_shape((n, dim), x).map_err(internal)?;
                let d = ArrayView2::from_shape((n, experts), &d_logits).map_err(internal)?;
                let gradients = gate.backward(x, forward, d)?;
                add_assign(dx, &flat(gradients.x));
                d_rows.copy_from_slice(&flat(gradients.experts.reversed_axes()));
                if let (Some([(_, w), (_, b)]), Some((dw, db))) = (projection, gradients.projection)
                {
                    add(w, &flat(dw))?;
                    add(b, &db.to_vec())?;
                }
                if let (Some((_, handle)), Some(d)) = (log_scale, gradients.log_scale) {
                    add(handle, &[d])?;
                }
            }
            Kind::LowRank {
                forward,
                query: (query, handle),
                anchors,
                scale,
            } => {
                let gate = low_rank_gate(&self.rows, experts, query, *anchors, *scale, dim)?;
                let x = ArrayView2::from_shape((n, dim), x).map_err(internal)?;
                let d = ArrayView2::from_shape((n, experts), &d_logits).map_err(internal)?;
                let gradients = gate.backward(x, forward, d)?;
                add_assign(dx, &flat(gradients.x));
                d_rows.copy_from_slice(&flat(gradients.anchors));
                add(handle, &flat(gradients.query))?;
            }
        }
        losses.rows.iter().for_each(|d| add_assign(&mut d_rows, d));
        let width = self.rows.len() / experts;
        for (handle, d) in self.handles.iter().zip(d_rows.chunks_exact(width)) {
            add(handle, d)?;
        }
        Ok(())
    }
}

fn flat(a: Array2<f32>) -> Vec<f32> {
    a.as_standard_layout().iter().copied().collect()
}

/// What adds a share to a parameter's gradient.
pub(super) type AddGradient<'a> = dyn FnMut(&ParamHandle, &[f32]) -> Result<(), ModelError> + 'a;

/// Adds a share to a parameter's gradient.
pub(super) fn add(
    handle: &ParamHandle,
    share: &[f32],
    g: &mut CpuGradients,
) -> Result<(), CpuError> {
    let mut gradient = handle.take(g)?;
    add_assign(&mut gradient, share);
    handle.put(g, gradient)
}

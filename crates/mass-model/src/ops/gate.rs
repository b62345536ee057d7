use std::sync::Arc;

use dfdx::tensor::CpuError;
use mass_routing::losses::{
    BalanceCount, gshard_balance, importance, load, router_z, routing_entropy, softmax_backward,
};
use mass_routing::{AnyRouter, CosineForward, CosineGate, Noisy, RoutingError, RoutingPlan};
use ndarray::{Array2, ArrayView1, ArrayView2, ArrayViewMut1, ArrayViewMut2, ShapeError};
use serde::{Deserialize, Serialize};

use super::MoeExpert;
use crate::error::ModelError;
use crate::kernels::gemm::Store;
use crate::kernels::linear;
use crate::kernels::scratch::Scratch;
use crate::kernels::vector::{add_assign, softmax_in_place};
use crate::param::{CpuGradients, Param, ParamHandle};

/// What a mixture layer's logits are made of, beside the gate row of each expert.
#[derive(Clone, Debug, Default)]
pub enum Gate {
    /// `logit_e = <x, w_e>`.
    #[default]
    Linear,
    /// `logit_e = exp(min(ln 100, log_scale)) cos(h, w_e)`, see [`CosineGate`].
    Cosine {
        /// Matrix `[r, d]` and bias `[r]` of `h = P x + b`; `h = x` without.
        projection: Option<(Param, Param)>,
        /// Logarithm of the scale, `[1]`; scale one without.
        log_scale: Option<Param>,
    },
}

/// A loss on the routing of a batch, added to the model's own with a weight. It changes gradients only: the loss that a
/// training pass reports does not hold it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "loss", rename_all = "snake_case", deny_unknown_fields)]
pub enum RoutingLoss {
    /// [`gshard_balance`].
    Balance {
        /// Factor.
        weight: f32,
        /// Which tokens count.
        count: BalanceCount,
    },
    /// [`routing_entropy`].
    Entropy {
        /// Factor.
        weight: f32,
    },
    /// [`importance`] of the softmax of the logits, without a router's noise.
    Importance {
        /// Factor.
        weight: f32,
    },
    /// [`load`] of the logits under fresh noise; behind [`Noisy`](mass_routing::Noisy) top-k routing alone, whose noise and k it
    /// takes.
    Load {
        /// Factor.
        weight: f32,
    },
    /// [`router_z`].
    RouterZ {
        /// Factor.
        weight: f32,
    },
}

/// The logits of a batch and what their backward pass needs.
pub(super) struct Gated {
    pub(super) logits: Scratch,
    rows: Vec<f32>,
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
}

fn internal(error: ShapeError) -> ModelError {
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

impl Gate {
    /// Width of an expert's gate row for tokens of width `dim`.
    pub(super) fn width(&self, dim: usize) -> usize {
        match self {
            Self::Cosine {
                projection: Some((weight, _)),
                ..
            } => weight.shape()[0],
            _ => dim,
        }
    }

    /// The logits of `x: [n, dim]`, each expert's offset added.
    pub(super) fn logits(
        &self,
        x: &[f32],
        experts: &[MoeExpert],
        (n, dim): (usize, usize),
    ) -> Result<Gated, ModelError> {
        let rows: Vec<f32> = experts
            .iter()
            .flat_map(|e| e.gate.values())
            .copied()
            .collect();
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
                let held = projection
                    .as_ref()
                    .map(|(w, b)| [(w.shared(), w.handle()), (b.shared(), b.handle())]);
                let scale = log_scale.as_ref().map(|s| (s.values()[0], s.handle()));
                let arrays = projection.as_ref().map(|(w, b)| (w.values(), b.values()));
                let gate = cosine_gate(
                    &rows,
                    experts.len(),
                    arrays,
                    scale.as_ref().map(|s| s.0),
                    dim,
                )?;
                let x = ArrayView2::from_shape((n, dim), x).map_err(internal)?;
                let forward = gate.forward(x)?;
                let sums = forward.logits();
                for (to, from) in logits
                    .chunks_exact_mut(experts.len())
                    .zip(sums.outer_iter())
                {
                    for ((to, from), offset) in to.iter_mut().zip(from).zip(&offsets) {
                        *to = from + offset;
                    }
                }
                Kind::Cosine {
                    forward: Box::new(forward),
                    projection: held,
                    log_scale: scale,
                }
            }
        };
        Ok(Gated {
            logits,
            rows,
            kind,
            handles: experts.iter().map(|e| e.gate.handle()).collect(),
            thresholds: experts
                .iter()
                .filter_map(|e| e.threshold.as_ref())
                .map(Param::handle)
                .collect(),
        })
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
    let thresholds: Option<Vec<f32>> = experts
        .iter()
        .map(|e| e.threshold.as_ref().map(|t| t.values()[0]))
        .collect();
    let what = "top-any routing needs a threshold in every expert";
    let thresholds = thresholds.ok_or_else(|| ModelError::Config(what.into()))?;
    Ok(router.set_thresholds(&thresholds)?)
}

impl Gated {
    /// Takes the gradient of the assignments' weights to the gate's parameters and adds it to `dx`.
    pub(super) fn backward(
        &self,
        router: &AnyRouter,
        plan: &RoutingPlan,
        losses: &[RoutingLoss],
        (x, d_weights): (&[f32], &[f32]),
        dx: &mut [f32],
        g: &mut CpuGradients,
    ) -> Result<(), ModelError> {
        use mass_routing::Router;
        let experts = self.handles.len();
        let n = self.logits.len() / experts;
        let dim = x.len() / n;
        let mut d_logits = Scratch::zeros(n * experts);
        let mut view = ArrayViewMut2::from_shape((n, experts), &mut d_logits).map_err(internal)?;
        router.backward(plan, d_weights, &mut view)?;
        let logits = ArrayView2::from_shape((n, experts), &self.logits).map_err(internal)?;
        for loss in losses {
            loss.add_gradient(router, plan, logits, &mut view)?;
        }
        if let AnyRouter::TopAny(router) = router {
            let mut d = vec![0.0; experts];
            router.backward_thresholds(plan, d_weights, &mut ArrayViewMut1::from(&mut d[..]))?;
            for (handle, d) in self.thresholds.iter().zip(d) {
                add(handle, &[d], g)?;
            }
        }
        let mut d_rows = Scratch::zeros(self.rows.len());
        match &self.kind {
            Kind::Linear => {
                linear::backward_input(&d_logits, &self.rows, dx, dim, experts);
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
                    add(w, &flat(dw), g)?;
                    add(b, &db.to_vec(), g)?;
                }
                if let (Some((_, handle)), Some(d)) = (log_scale, gradients.log_scale) {
                    add(handle, &[d], g)?;
                }
            }
        }
        let width = self.rows.len() / experts;
        for (handle, d) in self.handles.iter().zip(d_rows.chunks_exact(width)) {
            add(handle, d, g)?;
        }
        Ok(())
    }
}

fn flat(a: Array2<f32>) -> Vec<f32> {
    a.as_standard_layout().iter().copied().collect()
}

fn add(handle: &ParamHandle, share: &[f32], g: &mut CpuGradients) -> Result<(), CpuError> {
    let mut gradient = handle.take(g)?;
    add_assign(&mut gradient, share);
    handle.put(g, gradient)
}

impl RoutingLoss {
    /// The factor on the loss.
    pub fn weight(&self) -> f32 {
        match *self {
            Self::Balance { weight, .. }
            | Self::Entropy { weight }
            | Self::Importance { weight }
            | Self::Load { weight }
            | Self::RouterZ { weight } => weight,
        }
    }

    /// What the loss needs and the router does not have.
    pub(crate) fn lacks(&self, router: &AnyRouter) -> Option<&'static str> {
        match self {
            Self::Load { .. } => {
                let needed = "needs noisy top-k routing";
                noisy_top_k(router).is_none().then_some(needed)
            }
            Self::Balance { .. } | Self::Entropy { .. } => {
                let needed = "needs routing by a softmax";
                matches!(router, AnyRouter::TopAny(_)).then_some(needed)
            }
            Self::Importance { .. } | Self::RouterZ { .. } => None,
        }
    }

    fn add_gradient(
        self,
        router: &AnyRouter,
        plan: &RoutingPlan,
        logits: ArrayView2<'_, f32>,
        d_logits: &mut ArrayViewMut2<'_, f32>,
    ) -> Result<(), RoutingError> {
        let in_use = Some(plan.in_use());
        match self {
            Self::Balance { weight, count } => gshard_balance(plan, count, weight, d_logits)?,
            Self::Entropy { weight } => routing_entropy(plan, weight, d_logits)?,
            Self::RouterZ { weight } => router_z(logits, in_use, weight, d_logits)?,
            Self::Importance { weight } => {
                let mut r = logits.to_owned();
                for mut row in r.outer_iter_mut() {
                    let masked = |(_, used): &(&mut f32, &bool)| !**used;
                    let hide = |row: &mut ArrayViewMut1<'_, f32>, value| {
                        let experts = row.iter_mut().zip(plan.in_use());
                        experts.filter(masked).for_each(|(r, _)| *r = value);
                    };
                    hide(&mut row, f32::NEG_INFINITY);
                    if let Some(row) = row.as_slice_mut() {
                        softmax_in_place(row);
                    }
                    // The exponential of a kernel ends above zero.
                    hide(&mut row, 0.0);
                }
                let mut d_r = Array2::zeros(r.dim());
                let loss = importance(r.view(), in_use, weight, &mut d_r.view_mut())?;
                softmax_backward(r.view(), d_r.view(), d_logits)?;
                loss
            }
            Self::Load { weight } => {
                // Layers are not made otherwise.
                let Some((noisy, k)) = noisy_top_k(router) else {
                    return Ok(());
                };
                let (noised, std) = (noisy.noisy_logits(), f64::from(noisy.std()));
                let mut d_noisy = Array2::zeros(noised.dim());
                let mut into = d_noisy.view_mut();
                let loss = load(logits, noised, in_use, k, std, weight, d_logits, &mut into)?;
                // The noise is added, so that both have the same gradient.
                *d_logits += &d_noisy;
                loss
            }
        };
        Ok(())
    }
}

/// A router that takes the k best of logits with noise on them.
fn noisy_top_k(router: &AnyRouter) -> Option<(&Noisy, usize)> {
    let AnyRouter::Noisy(noisy) = router else {
        return None;
    };
    match noisy.inner() {
        AnyRouter::TopK(top_k) if noisy.std() > 0.0 => Some((noisy, top_k.k())),
        _ => None,
    }
}

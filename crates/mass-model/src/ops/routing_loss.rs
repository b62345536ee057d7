//! Losses on the routing of a mixture layer.

use mass_routing::losses::{
    BalanceCount, dirichlet_prior, diverse_and_simple, gshard_balance_among, importance_among,
    load_among, router_z, routing_entropy, softmax_backward,
};
use mass_routing::{AnyRouter, Noisy, RoutingPlan};
use ndarray::{Array2, ArrayView2, ArrayViewMut1, ArrayViewMut2};
use serde::{Deserialize, Serialize};

use super::gate::{Gated, internal};
use crate::error::ModelError;
use crate::kernels::scratch::Scratch;
use crate::kernels::vector::softmax_in_place;
use crate::parallel::Ranks;

/// A loss on the routing of a batch, added to the model's own with a weight. It changes gradients only: the loss that a
/// training pass reports does not hold it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "loss", rename_all = "snake_case", deny_unknown_fields)]
pub enum RoutingLoss {
    /// `mass_routing::losses::gshard_balance`.
    Balance {
        /// Factor.
        weight: f32,
        /// Which tokens count.
        count: BalanceCount,
    },
    /// `mass_routing::losses::routing_entropy`.
    Entropy {
        /// Factor.
        weight: f32,
    },
    /// `mass_routing::losses::importance` of the softmax of the logits, without a router's noise.
    Importance {
        /// Factor.
        weight: f32,
    },
    /// `mass_routing::losses::load` of the logits under fresh noise; behind `mass_routing::Noisy` top-k routing
    /// alone, whose noise and k it takes.
    Load {
        /// Factor.
        weight: f32,
    },
    /// `mass_routing::losses::router_z`.
    RouterZ {
        /// Factor.
        weight: f32,
    },
    /// `mass_routing::losses::diverse_and_simple` of the gate rows: DynMoE's loss. Not with a low-rank gate, whose
    /// experts have several.
    DiverseAndSimple {
        /// Factor.
        weight: f32,
    },
    /// `mass_routing::losses::dirichlet_prior` with the same alpha for every expert, so that it speaks of newcomers too.
    Dirichlet {
        /// Factor.
        weight: f32,
        /// Of every expert, positive: below 1 it wants decided tokens, above 1 undecided ones.
        alpha: f64,
    },
}

/// Gradients of the losses on a batch's routing. They depend on nothing that comes after the gate, so they are computed with it: a
/// loss that cannot be is the forward pass's error, and not the backward pass's.
#[derive(Default)]
pub(super) struct LossGradients {
    /// By the logits, `[tokens, experts]` each.
    pub(super) logits: Vec<Scratch>,
    /// By the gate rows, one expert after another.
    pub(super) rows: Vec<Vec<f32>>,
}

impl LossGradients {
    pub(super) fn of(
        losses: &[RoutingLoss],
        router: &AnyRouter,
        plan: &RoutingPlan,
        (gated, ranks): (&Gated, &Ranks),
    ) -> Result<Self, ModelError> {
        let mut gradients = Self::default();
        for loss in losses {
            loss.gradient(router, plan, (gated, ranks), &mut gradients)?;
        }
        Ok(gradients)
    }
}

impl RoutingLoss {
    /// The factor on the loss.
    pub fn weight(&self) -> f32 {
        match *self {
            Self::Balance { weight, .. }
            | Self::Entropy { weight }
            | Self::Importance { weight }
            | Self::Load { weight }
            | Self::RouterZ { weight }
            | Self::DiverseAndSimple { weight }
            | Self::Dirichlet { weight, .. } => weight,
        }
    }

    /// Whether it is one of the gate's rows, and not of the logits alone.
    #[cfg(feature = "cuda")]
    pub(super) fn reads_rows(&self) -> bool {
        matches!(self, Self::DiverseAndSimple { .. })
    }

    /// What is wrong with its settings.
    pub(crate) fn problem(&self) -> Option<&'static str> {
        match self {
            loss if !loss.weight().is_finite() => Some("its weight must be finite"),
            Self::Dirichlet { alpha, .. } if !(*alpha > 0.0 && alpha.is_finite()) => {
                Some("its alpha must be positive and finite")
            }
            _ => None,
        }
    }

    /// What the loss needs and the router, or the gate, which may be of low rank, does not have.
    pub(crate) fn lacks(&self, router: &AnyRouter, low_rank: bool) -> Option<&'static str> {
        match self {
            Self::Load { .. } => {
                let needed = "needs noisy top-k routing";
                noisy_top_k(router).is_none().then_some(needed)
            }
            Self::Balance { .. } | Self::Entropy { .. } | Self::Dirichlet { .. } => {
                let needed = "needs routing by a softmax";
                matches!(router, AnyRouter::TopAny(_)).then_some(needed)
            }
            Self::DiverseAndSimple { .. } => {
                let needed = "needs a gate of one row an expert";
                low_rank.then_some(needed)
            }
            Self::Importance { .. } | Self::RouterZ { .. } => None,
        }
    }

    /// Computes the gradient.
    fn gradient(
        self,
        router: &AnyRouter,
        plan: &RoutingPlan,
        (gated, ranks): (&Gated, &Ranks),
        gradients: &mut LossGradients,
    ) -> Result<(), ModelError> {
        let lacks = || self.lacks(router, gated.is_low_rank());
        if let Some(problem) = self.problem().or_else(lacks) {
            return Err(ModelError::Config(format!(
                "routing loss {self:?}: {problem}"
            )));
        }
        // What is not linear in the batch is computed from sums over all of it, wherever its rows are.
        let sum = |values: &mut [f64]| -> Result<(), ModelError> { Ok(ranks.sum(values)?) };
        let size = (plan.num_tokens(), plan.num_experts());
        let in_use = Some(plan.in_use());
        let logits = ArrayView2::from_shape(size, &gated.logits).map_err(internal)?;
        if let Self::DiverseAndSimple { weight } = self {
            let width = gated.rows.len() / size.1;
            let rows = ArrayView2::from_shape((size.1, width), &gated.rows).map_err(internal)?;
            let mut d = vec![0.0; gated.rows.len()];
            let d_rows = ArrayViewMut2::from_shape((size.1, width), &mut d).map_err(internal)?;
            let d_experts = &mut d_rows.reversed_axes();
            diverse_and_simple(rows.reversed_axes(), in_use, weight, d_experts)?;
            gradients.rows.push(d);
            return Ok(());
        }
        let mut d = Scratch::zeros(size.0 * size.1);
        let d_logits = &mut ArrayViewMut2::from_shape(size, &mut d).map_err(internal)?;
        let mut through_noise = None;
        match self {
            Self::Balance { weight, count } => {
                gshard_balance_among(plan, count, weight, d_logits, sum)?
            }
            Self::Entropy { weight } => routing_entropy(plan, weight, d_logits)?,
            Self::RouterZ { weight } => router_z(logits, in_use, weight, d_logits)?,
            Self::Dirichlet { weight, alpha } => {
                dirichlet_prior(plan, &vec![alpha; size.1], weight, d_logits)?
            }
            Self::Importance { weight } => {
                let r = softmax(logits, plan.in_use());
                let mut d_r = Array2::zeros(size);
                let loss = importance_among(r.view(), in_use, weight, &mut d_r.view_mut(), sum)?;
                softmax_backward(r.view(), d_r.view(), d_logits)?;
                loss
            }
            Self::Load { weight } => {
                let (noisy, k) = noisy_top_k(router).expect("it was not found lacking");
                let (noised, std) = (noisy.noisy_logits(), f64::from(noisy.std()));
                let mut other = Scratch::zeros(size.0 * size.1);
                let into = &mut ArrayViewMut2::from_shape(size, &mut other).map_err(internal)?;
                let (scores, d_scores) = ((logits, noised), (d_logits, into));
                let loss = load_among(scores, in_use, (k, std), weight, d_scores, sum)?;
                // The noise is added, so that both have the same gradient.
                through_noise = Some(other);
                loss
            }
            Self::DiverseAndSimple { .. } => 0.0,
        };
        gradients.logits.push(d);
        gradients.logits.extend(through_noise);
        Ok(())
    }
}

/// The softmax over the experts in use; zero at the others.
fn softmax(logits: ArrayView2<'_, f32>, in_use: &[bool]) -> Array2<f32> {
    let mut r = logits.to_owned();
    for mut row in r.outer_iter_mut() {
        let masked = |(_, used): &(&mut f32, &bool)| !**used;
        let hide = |row: &mut ArrayViewMut1<'_, f32>, value| {
            let experts = row.iter_mut().zip(in_use);
            experts.filter(masked).for_each(|(r, _)| *r = value);
        };
        hide(&mut row, f32::NEG_INFINITY);
        if let Some(row) = row.as_slice_mut() {
            softmax_in_place(row);
        }
        // Whatever was under their logits.
        hide(&mut row, 0.0);
    }
    r
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

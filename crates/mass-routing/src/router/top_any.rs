//! DynMoE's top-any routing.

use ndarray::{ArrayView2, ArrayViewMut1, ArrayViewMut2};
#[cfg(feature = "serde")]
use serde::{Deserialize, Serialize};

use super::Router;
use crate::error::same;
use crate::plan::{Batch, RowKernel, WeightRule, Work};
use crate::select::Picks;
use crate::simd::Machine;
use crate::softmax::Row;
use crate::{NonFinite, RoutingError, RoutingPlan};

/// DynMoE top-any: every expert decides by itself whether it takes a token.
///
/// # Formula
/// The logits are cosines `c_e = cos(x, w_e)` (see [`CosineGate`](crate::CosineGate)), the score is `s_e = sigmoid(c_e)`, and expert `e` is
/// active iff `s_e > sigmoid(G_e)` with a learned threshold `G_e`, decided in f32. The weights are `1 / k`, `k` the number of
/// active experts.
///
/// In training a token may get no expert. In evaluation ([`Router::set_training`]) such a token takes its expert of largest logit,
/// ties to the lower index, with weight 1.
///
/// Gradients are straight-through: `d/dc_e = g_e s_e (1 - s_e) / k` and `d/dG_e = -sum_t g_e sigmoid'(G_e) / k`
/// ([`backward_thresholds`](Self::backward_thresholds)), where active; `k` is not differentiated, and neither is the choice by
/// largest logit.
///
/// # Source
/// Guo et al., "Dynamic Mixture of Experts", arXiv 2405.14297, without its temperature.
///
/// # Examples
/// ```
/// use mass_routing::{Router, RoutingPlan, TopAny};
/// use ndarray::array;
///
/// let cosines = array![[0.9_f32, 0.2, -0.5], [-0.1, -0.2, -0.3]];
/// let mut router = TopAny::new(vec![0.0; 3])?;
/// let mut plan = RoutingPlan::default();
/// router.route(cosines.view(), None, &mut plan)?;
/// assert_eq!((plan.k(0), plan.k(1)), (2, 0));
/// router.set_training(false);
/// router.route(cosines.view(), None, &mut plan)?;
/// assert_eq!((plan.k(0), plan.k(1)), (2, 1));
/// # Ok::<(), mass_routing::RoutingError>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(Serialize, Deserialize),
    serde(try_from = "Parts", into = "Parts")
)]
pub struct TopAny {
    thresholds: Vec<f32>,
    training: bool,
    non_finite: NonFinite,
}

impl TopAny {
    /// Routes with the thresholds `G`, one per expert (zero at the start of training); in training mode.
    ///
    /// # Errors
    /// A threshold is NaN or infinite.
    pub fn new(thresholds: Vec<f32>) -> Result<Self, RoutingError> {
        let mut router = Self {
            thresholds: Vec::new(),
            training: true,
            non_finite: NonFinite::Error,
        };
        router.set_thresholds(&thresholds)?;
        Ok(router)
    }

    /// What to do with a token that has a NaN or infinite logit; an error unless set.
    pub fn with_non_finite(mut self, choice: NonFinite) -> Self {
        self.non_finite = choice;
        self
    }

    /// The thresholds `G`.
    pub fn thresholds(&self) -> &[f32] {
        &self.thresholds
    }

    /// What scores must pass: the sigmoid of each threshold.
    pub fn bounds(&self) -> Vec<f32> {
        self.thresholds.iter().map(|&g| sigmoid(g)).collect()
    }

    /// Whether it is in training: a token may go nowhere.
    pub fn training(&self) -> bool {
        self.training
    }

    /// Replaces the thresholds, after an optimiser step or when the pool has grown.
    ///
    /// # Errors
    /// A threshold is NaN or infinite; the old ones stay.
    pub fn set_thresholds(&mut self, thresholds: &[f32]) -> Result<(), RoutingError> {
        if let Some(index) = thresholds.iter().position(|g| !g.is_finite()) {
            return Err(RoutingError::NonFinite {
                what: "threshold",
                index,
                value: thresholds[index].into(),
            });
        }
        self.thresholds.clear();
        self.thresholds.extend_from_slice(thresholds);
        Ok(())
    }

    /// Adds the gradient of the thresholds to `d_thresholds` (`K`), given that of the weights (per assignment, grouped order), of
    /// which a NaN passes on.
    ///
    /// # Errors
    /// A length that does not fit the plan or the thresholds; [`RoutingError::Undefined`] for a plan of other routing.
    pub fn backward_thresholds(
        &self,
        plan: &RoutingPlan,
        d_weights: &[f32],
        d_thresholds: &mut ArrayViewMut1<'_, f32>,
    ) -> Result<(), RoutingError> {
        same(
            "d_weights per assignment",
            plan.num_assignments(),
            d_weights.len(),
        )?;
        same(
            "experts of the plan",
            self.thresholds.len(),
            plan.num_experts(),
        )?;
        same(
            "d_thresholds per expert",
            self.thresholds.len(),
            d_thresholds.len(),
        )?;
        if plan.num_assignments() > 0 && !plan.is_top_any() {
            return Err(RoutingError::Undefined(
                "the gradient of thresholds needs a plan of top-any routing",
            ));
        }
        for e in 0..plan.num_experts() {
            let g = sigmoid(self.thresholds[e]);
            // The kept score is zero for a token that took its largest score below the threshold: no gradient.
            let active = |a: &usize| plan.active_score(plan.tokens()[*a] as usize, e) > 0.0;
            let sum: f32 = plan
                .segment(e)
                .filter(active)
                .map(|a| d_weights[a] * plan.weights()[a])
                .sum();
            d_thresholds[e] -= sum * g * (1.0 - g);
        }
        Ok(())
    }
}

/// `1 / (1 + e^-x)`, without overflow.
pub(crate) fn sigmoid(x: f32) -> f32 {
    if x >= 0.0 {
        1.0 / (1.0 + (-x).exp())
    } else {
        let e = x.exp();
        e / (1.0 + e)
    }
}

impl Router for TopAny {
    /// # Errors
    /// Besides those of every router: a number of experts other than that of the thresholds.
    fn route(
        &mut self,
        logits: ArrayView2<'_, f32>,
        mask: Option<&[bool]>,
        plan: &mut RoutingPlan,
    ) -> Result<(), RoutingError> {
        if logits.ncols() != self.thresholds.len() {
            plan.clear();
            let (expected, found) = (self.thresholds.len(), logits.ncols());
            return Err(RoutingError::ShapeMismatch {
                what: "experts per threshold",
                expected,
                found,
            });
        }
        let bounds = self.bounds();
        let rule = WeightRule::TopAny;
        let batch = Batch {
            logits,
            mask,
            non_finite: self.non_finite,
            keep_scores: true,
            rule,
        };
        batch.route(
            &Active {
                bounds: &bounds,
                training: self.training,
            },
            plan,
        )
    }

    fn split_expert(&mut self, source: usize, newcomer: usize) {
        let threshold = self.thresholds.get(source).copied().unwrap_or(0.0);
        self.thresholds.resize(newcomer, 0.0);
        self.thresholds.push(threshold);
    }

    fn remove_expert(&mut self, index: usize) {
        if index < self.thresholds.len() {
            self.thresholds.remove(index);
        }
    }

    fn set_training(&mut self, training: bool) {
        self.training = training;
    }

    fn backward(
        &self,
        plan: &RoutingPlan,
        d_weights: &[f32],
        d_logits: &mut ArrayViewMut2<'_, f32>,
    ) -> Result<(), RoutingError> {
        plan.backward(d_weights, d_logits)
    }
}

struct Active<'a> {
    bounds: &'a [f32],
    training: bool,
}

impl RowKernel for Active<'_> {
    #[inline(always)]
    fn route<M: Machine>(&self, _: M, row: &mut Row, _: &mut Work, picks: &mut Picks) {
        let from = picks.len();
        let logits = row.logits.get().as_flattened();
        let scores = row.probabilities.get_mut().as_flattened_mut();
        for (e, &bound) in self.bounds.iter().enumerate() {
            let score = sigmoid(logits[e]);
            // Masked: logit minus infinity, score zero, and no bound is below zero.
            scores[e] = if score > bound { score } else { 0.0 };
            if score > bound {
                picks.push(e as u32, 1.0);
            }
        }
        if picks.len() == from && !self.training {
            let best =
                self.bounds
                    .iter()
                    .zip(logits)
                    .enumerate()
                    .fold(None, |best, (e, (_, &l))| match best {
                        Some((_, top)) if top >= l => best,
                        _ => Some((e, l)),
                    });
            if let Some((e, _)) = best {
                picks.push(e as u32, 1.0);
            }
        }
        let k = (picks.len() - from) as f32;
        picks.weights_from(from).fill(1.0 / k);
    }
}

/// The unchecked form that serde reads and writes.
#[cfg(feature = "serde")]
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Parts {
    thresholds: Vec<f32>,
    training: bool,
    #[serde(default)]
    non_finite: NonFinite,
}

#[cfg(feature = "serde")]
impl TryFrom<Parts> for TopAny {
    type Error = RoutingError;

    fn try_from(parts: Parts) -> Result<Self, RoutingError> {
        let mut router = Self::new(parts.thresholds)?.with_non_finite(parts.non_finite);
        router.set_training(parts.training);
        Ok(router)
    }
}

#[cfg(feature = "serde")]
impl From<TopAny> for Parts {
    fn from(router: TopAny) -> Self {
        let TopAny {
            thresholds,
            training,
            non_finite,
        } = router;
        Self {
            thresholds,
            training,
            non_finite,
        }
    }
}

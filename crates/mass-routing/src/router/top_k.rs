//! Top-k routing.

use ndarray::ArrayView2;
#[cfg(feature = "serde")]
use serde::{Deserialize, Serialize};

#[cfg(feature = "serde")]
use super::top_p::yes;
use super::{GateGradient, Router};
use crate::plan::{Batch, Keys, Select, SoftmaxThen, Work};
use crate::select::{Count, Threshold, threshold};
use crate::simd::Machine;
use crate::softmax::Row;
use crate::{Combine, NonFinite, RoutingError, RoutingPlan};

/// Top-k: the same number of experts for every token.
///
/// # Formula
/// `r = softmax(logits)` over all experts in use; the `k` experts of largest logit, ties to the lower index; weights `r_e` (raw) or
/// `r_e / sum_{selected} r` (renormalised, which equals a softmax over the selected logits).
///
/// # Source
/// Shazeer et al., "Outrageously Large Neural Networks", arXiv 1701.06538.
///
/// # Examples
/// ```
/// use mass_routing::{Combine, Router, RoutingPlan, TopK};
/// use ndarray::array;
///
/// let logits = array![[2.0_f32, 0.0, 1.9], [0.0, 5.0, 0.0]];
/// let mut plan = RoutingPlan::default();
/// TopK::new(2, Combine::Renormalised)?.route(logits.view(), None, &mut plan)?;
/// assert_eq!(plan.token_experts(), [0, 2, 0, 1]);
/// # Ok::<(), mass_routing::RoutingError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(Serialize, Deserialize),
    serde(try_from = "TopKParts", into = "TopKParts")
)]
pub struct TopK {
    k: usize,
    combine: Combine,
    non_finite: NonFinite,
    keep_probabilities: bool,
}

impl TopK {
    /// Routes every token to `k >= 1` experts.
    ///
    /// # Errors
    /// `k` is zero.
    pub fn new(k: usize, combine: Combine) -> Result<Self, RoutingError> {
        if k == 0 {
            return Err(RoutingError::InvalidParameter {
                name: "k",
                expected: "at least 1",
                value: 0.0,
            });
        }
        Ok(Self {
            k,
            combine,
            non_finite: NonFinite::Error,
            keep_probabilities: true,
        })
    }

    /// What to do with a token that has a NaN or infinite logit; an error unless set.
    pub fn with_non_finite(mut self, choice: NonFinite) -> Self {
        self.non_finite = choice;
        self
    }

    /// Whether the plan keeps the full `N x K` softmax (default: yes). Off saves memory traffic at inference; the gradient of raw
    /// weights and the losses on probabilities need it.
    pub fn with_probabilities(mut self, keep: bool) -> Self {
        self.keep_probabilities = keep;
        self
    }

    /// Experts per token.
    pub fn k(&self) -> usize {
        self.k
    }

    /// How probabilities become weights.
    pub fn combine(&self) -> Combine {
        self.combine
    }
}

impl Router for TopK {
    /// # Errors
    /// Besides those of every router: [`RoutingError::TooFewExperts`] if fewer than `k` experts are in use.
    fn route(
        &mut self,
        logits: ArrayView2<'_, f32>,
        mask: Option<&[bool]>,
        plan: &mut RoutingPlan,
    ) -> Result<(), RoutingError> {
        enough_experts(self.k, logits.ncols(), mask, plan)?;
        let batch = Batch {
            logits,
            mask,
            non_finite: self.non_finite,
            keep_scores: self.keep_probabilities,
            rule: self.combine.rule(),
        };
        batch.route(
            &SoftmaxThen {
                combine: self.combine,
                select: Largest(self.k),
            },
            plan,
        )
    }

    fn gate_gradient(&self) -> GateGradient {
        GateGradient::of(self.combine, Some(self.k))
    }

    fn least_experts(&self) -> usize {
        self.k
    }
}

/// Refuses to choose more experts than there are; leaves other faults of the mask to the general checks.
pub(super) fn enough_experts(
    k: usize,
    experts: usize,
    mask: Option<&[bool]>,
    plan: &mut RoutingPlan,
) -> Result<(), RoutingError> {
    let fits = mask.is_none_or(|m| m.len() == experts);
    let available = mask.map_or(experts, |m| m.iter().filter(|&&m| m).count());
    if fits && available > 0 && k > available {
        plan.clear();
        return Err(RoutingError::TooFewExperts { k, available });
    }
    Ok(())
}

struct Largest(usize);

impl Select for Largest {
    #[inline(always)]
    fn threshold<M: Machine>(
        &self,
        machine: M,
        row: &Row,
        _: f32,
        work: &mut Work,
    ) -> (Keys, Threshold) {
        // Logits, not probabilities: these may have underflowed to a tie at zero.
        let floor = f32::NEG_INFINITY;
        let found = threshold::<Count, M>(
            machine,
            row.logits.get(),
            row.max,
            floor,
            self.0 as f64,
            &mut work.candidates,
        );
        (Keys::Logits, found)
    }
}

/// The unchecked form that serde reads and writes.
#[cfg(feature = "serde")]
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct TopKParts {
    k: usize,
    #[serde(default)]
    combine: Combine,
    #[serde(default)]
    non_finite: NonFinite,
    #[serde(default = "yes")]
    keep_probabilities: bool,
}

#[cfg(feature = "serde")]
impl TryFrom<TopKParts> for TopK {
    type Error = RoutingError;

    fn try_from(parts: TopKParts) -> Result<Self, RoutingError> {
        Ok(Self::new(parts.k, parts.combine)?
            .with_non_finite(parts.non_finite)
            .with_probabilities(parts.keep_probabilities))
    }
}

#[cfg(feature = "serde")]
impl From<TopK> for TopKParts {
    fn from(router: TopK) -> Self {
        let TopK {
            k,
            combine,
            non_finite,
            keep_probabilities,
        } = router;
        Self {
            k,
            combine,
            non_finite,
            keep_probabilities,
        }
    }
}

//! Top-p routing.

use ndarray::ArrayView2;
#[cfg(feature = "serde")]
use serde::{Deserialize, Serialize};

use super::{GateGradient, Router};
use crate::plan::{Batch, Keys, Select, SoftmaxThen, Work};
use crate::select::{Mass, Threshold, threshold};
use crate::simd::Machine;
use crate::softmax::Row;
use crate::{Combine, NonFinite, RoutingError, RoutingPlan};

/// Top-p: as many experts as it takes to hold a share `p` of the routing probability.
///
/// # Formula
/// `r = softmax(logits)` in f32, sorted descending, ties to the lower index, cumulated `C_j`:
///
/// `k* = #{ j : C_j - r_(j) < p }`,
///
/// the smallest set of mass at least `p`, never empty. The sum runs in f64 over the f32 probabilities. An expert whose probability
/// underflows to zero adds no mass and is not selected; with `p = 1` all others are.
///
/// # Source
/// Huang et al., "Harder Tasks Need More Experts", arXiv 2403.07652; Park & Park, arXiv 2512.19765.
///
/// # Examples
/// ```
/// use mass_routing::{Combine, Router, RoutingPlan, TopP};
/// use ndarray::array;
///
/// let logits = array![[2.0_f32, 0.0, 1.9], [0.0, 5.0, 0.0]];
/// let mut plan = RoutingPlan::default();
/// TopP::new(0.6, Combine::Renormalised)?.route(logits.view(), None, &mut plan)?;
/// // Token 0 is torn between experts 0 and 2; token 1 is sure of expert 1.
/// assert_eq!(plan.expert_offsets(), [0, 1, 2, 3]);
/// assert_eq!(plan.tokens(), [0, 1, 0]);
/// assert_eq!((plan.k(0), plan.k(1)), (2, 1));
/// # Ok::<(), mass_routing::RoutingError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(Serialize, Deserialize),
    serde(try_from = "TopPParts", into = "TopPParts")
)]
pub struct TopP {
    p: f32,
    combine: Combine,
    non_finite: NonFinite,
    keep_probabilities: bool,
}

impl TopP {
    /// Routes by mass `p` in (0, 1].
    ///
    /// # Errors
    /// `p` is not in (0, 1].
    pub fn new(p: f32, combine: Combine) -> Result<Self, RoutingError> {
        check_p(p)?;
        Ok(Self {
            p,
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

    /// The same router with another `p`.
    ///
    /// # Errors
    /// `p` is not in (0, 1].
    pub fn with_p(mut self, p: f32) -> Result<Self, RoutingError> {
        check_p(p)?;
        self.p = p;
        Ok(self)
    }

    /// The mass every token's experts must reach.
    pub fn p(&self) -> f32 {
        self.p
    }

    /// How probabilities become weights.
    pub fn combine(&self) -> Combine {
        self.combine
    }
}

fn check_p(p: f32) -> Result<(), RoutingError> {
    if p > 0.0 && p <= 1.0 {
        Ok(())
    } else {
        Err(RoutingError::InvalidParameter {
            name: "p",
            expected: "in (0, 1]",
            value: p.into(),
        })
    }
}

impl Router for TopP {
    fn route(
        &mut self,
        logits: ArrayView2<'_, f32>,
        mask: Option<&[bool]>,
        plan: &mut RoutingPlan,
    ) -> Result<(), RoutingError> {
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
                select: ToMass(self.p),
            },
            plan,
        )
    }

    fn gate_gradient(&self) -> GateGradient {
        GateGradient::of(self.combine, None)
    }
}

struct ToMass(f32);

impl Select for ToMass {
    #[inline(always)]
    fn threshold<M: Machine>(
        &self,
        machine: M,
        row: &Row,
        top: f32,
        work: &mut Work,
    ) -> (Keys, Threshold) {
        let found = if self.0 >= 1.0 {
            // Rounding of the probabilities must not decide whether the last expert is needed.
            Threshold::POSITIVE
        } else {
            threshold::<Mass, M>(
                machine,
                row.probabilities.get(),
                top,
                0.0,
                self.0.into(),
                &mut work.candidates,
            )
        };
        (Keys::Probabilities, found)
    }

    fn mass(&self) -> Option<f32> {
        (self.0 < 1.0).then_some(self.0)
    }
}

/// The unchecked form that serde reads and writes.
#[cfg(feature = "serde")]
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct TopPParts {
    p: f32,
    #[serde(default)]
    combine: Combine,
    #[serde(default)]
    non_finite: NonFinite,
    #[serde(default = "yes")]
    keep_probabilities: bool,
}

#[cfg(feature = "serde")]
pub(super) fn yes() -> bool {
    true
}

#[cfg(feature = "serde")]
impl TryFrom<TopPParts> for TopP {
    type Error = RoutingError;

    fn try_from(parts: TopPParts) -> Result<Self, RoutingError> {
        Ok(Self::new(parts.p, parts.combine)?
            .with_non_finite(parts.non_finite)
            .with_probabilities(parts.keep_probabilities))
    }
}

#[cfg(feature = "serde")]
impl From<TopP> for TopPParts {
    fn from(router: TopP) -> Self {
        let TopP {
            p,
            combine,
            non_finite,
            keep_probabilities,
        } = router;
        Self {
            p,
            combine,
            non_finite,
            keep_probabilities,
        }
    }
}

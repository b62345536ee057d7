//! Expert choice: experts choose tokens.

use ndarray::ArrayView2;
#[cfg(feature = "serde")]
use serde::{Deserialize, Serialize};

use super::{GateGradient, Router};
use crate::plan::{Batch, Keys, Select, SoftmaxThen, Work};
use crate::select::Threshold;
use crate::simd::Machine;
use crate::softmax::Row;
use crate::threads;
use crate::{Combine, NonFinite, RoutingError, RoutingPlan};

/// Expert choice: every expert takes the tokens that want it most, the same number for each.
///
/// # Formula
/// `r = softmax(logits)` per token over the experts in use; every one of the `K` experts in use takes the `C` tokens of largest `r_e`,
/// ties to the lower token, `C = min(N, ceil(N c / K))` with the capacity factor `c`, the mean number of experts per token, taken as
/// the decimal number that it is written as: 100 tokens, 10 experts and 1.1 make 11. Weights are
/// `r_e`, or `r_e / sum_{selected} r`. A token may get no expert at all.
///
/// Load is balanced by construction, but a token's routing depends on the other tokens of its batch: later tokens on earlier ones
/// and the reverse, which a causal language model must not do at generation.
///
/// # Source
/// Zhou et al., "Mixture-of-Experts with Expert Choice Routing", arXiv 2202.09368.
///
/// # Examples
/// ```
/// use mass_routing::{Combine, ExpertChoice, Router, RoutingPlan};
/// use ndarray::array;
///
/// let logits = array![[2.0_f32, 0.0], [1.0, 0.0], [0.5, 0.0], [0.0, 0.0]];
/// let mut plan = RoutingPlan::default();
/// ExpertChoice::new(1.0, Combine::Raw)?.route(logits.view(), None, &mut plan)?;
/// assert_eq!(plan.tokens(), [0, 1, 2, 3]); // expert 0 takes tokens 0 and 1, expert 1 the others
/// # Ok::<(), mass_routing::RoutingError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(Serialize, Deserialize),
    serde(try_from = "Parts", into = "Parts")
)]
pub struct ExpertChoice {
    capacity: f64,
    combine: Combine,
    non_finite: NonFinite,
}

impl ExpertChoice {
    /// Experts take `capacity > 0` tokens per token and expert in use, on average.
    ///
    /// # Errors
    /// `capacity` is not positive and finite.
    pub fn new(capacity: f64, combine: Combine) -> Result<Self, RoutingError> {
        if !(capacity > 0.0 && capacity.is_finite()) {
            let expected = "positive and finite";
            return Err(RoutingError::InvalidParameter {
                name: "capacity",
                expected,
                value: capacity,
            });
        }
        Ok(Self {
            capacity,
            combine,
            non_finite: NonFinite::Error,
        })
    }

    /// What to do with a token that has a NaN or infinite logit; an error unless set.
    pub fn with_non_finite(mut self, choice: NonFinite) -> Self {
        self.non_finite = choice;
        self
    }

    /// The capacity factor: mean number of experts per token.
    pub fn capacity(&self) -> f64 {
        self.capacity
    }

    /// `C = ceil(N c / K)` for `K` experts in use, with `c` the decimal number that was written down.
    ///
    /// A float is that number only nearly: in floating point 100 x 1.1 / 10 is a little over 11, and not 12 tokens for it. A
    /// quotient within the rounding of its three numbers and two operations of a whole number is that number.
    fn tokens_each(&self, tokens: usize, experts: usize) -> usize {
        // A setting that was kept in f32 is the decimal that f32 prints.
        let short = self.capacity as f32;
        let factor = if f64::from(short) == self.capacity {
            short.to_string().parse().unwrap_or(self.capacity)
        } else {
            self.capacity
        };
        let wanted = tokens as f64 * factor / experts as f64;
        let whole = wanted.round();
        let exact = (wanted - whole).abs() <= 4.0 * f64::EPSILON * whole;
        if exact {
            whole as usize
        } else {
            wanted.ceil() as usize
        }
    }
}

impl Router for ExpertChoice {
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
            keep_scores: true,
            rule: self.combine.rule(),
        };
        batch.choose(
            &SoftmaxThen {
                combine: self.combine,
                select: Nobody,
            },
            plan,
            |plan, chosen| {
                let (n, k) = logits.dim();
                let available = mask.map_or(k, |m| m.iter().filter(|&&m| m).count());
                let capacity = self.tokens_each(n, available).min(n - plan.skipped());
                let r = plan.probabilities();
                threads::for_each_mut(chosen, |e, tokens| {
                    tokens.clear();
                    if mask.is_some_and(|m| !m[e]) {
                        return;
                    }
                    let column = r.column(e);
                    // A skipped token is a row of zeros; so may be a column entry that underflowed, which is still a choice.
                    let routed = |t: &u32| {
                        plan.skipped() == 0 || r.row(*t as usize).iter().any(|&r| r > 0.0)
                    };
                    tokens.extend((0..n as u32).filter(routed));
                    let order = |a: &u32, b: &u32| {
                        column[*b as usize]
                            .total_cmp(&column[*a as usize])
                            .then(a.cmp(b))
                    };
                    if capacity < tokens.len() && capacity > 0 {
                        tokens.select_nth_unstable_by(capacity - 1, order);
                    }
                    tokens.truncate(capacity);
                    tokens.sort_unstable();
                });
                self.combine
            },
        )
    }

    fn gate_gradient(&self) -> GateGradient {
        GateGradient::of(self.combine, None)
    }
}

/// Selects nothing: the rows only fill the probabilities.
struct Nobody;

impl Select for Nobody {
    #[inline(always)]
    fn threshold<M: Machine>(&self, _: M, _: &Row, _: f32, _: &mut Work) -> (Keys, Threshold) {
        (
            Keys::Probabilities,
            Threshold {
                value: f32::INFINITY,
                ties: usize::MAX,
            },
        )
    }
}

/// The unchecked form that serde reads and writes.
#[cfg(feature = "serde")]
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Parts {
    capacity: f64,
    #[serde(default)]
    combine: Combine,
    #[serde(default)]
    non_finite: NonFinite,
}

#[cfg(feature = "serde")]
impl TryFrom<Parts> for ExpertChoice {
    type Error = RoutingError;

    fn try_from(parts: Parts) -> Result<Self, RoutingError> {
        Ok(Self::new(parts.capacity, parts.combine)?.with_non_finite(parts.non_finite))
    }
}

#[cfg(feature = "serde")]
impl From<ExpertChoice> for Parts {
    fn from(router: ExpertChoice) -> Self {
        let ExpertChoice {
            capacity,
            combine,
            non_finite,
        } = router;
        Self {
            capacity,
            combine,
            non_finite,
        }
    }
}

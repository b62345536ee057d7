//! Loss-free load balancing by a bias on the selection.

use ndarray::ArrayView2;
use pulp::Simd;
#[cfg(feature = "serde")]
use serde::{Deserialize, Serialize};

#[cfg(feature = "serde")]
use super::top_p::yes;
use super::{GateGradient, Loads, Router};
use crate::error::same;
use crate::plan::{Batch, Keys, Select, SoftmaxThen, Work, check};
use crate::select::{Count, Threshold, threshold};
use crate::simd::{Machine, fold2, vectors, vectors_mut};
use crate::softmax::Row;
use crate::{Combine, NonFinite, RoutingError, RoutingPlan};

/// Top-k by biased probability, with a bias that evens out the load without an auxiliary loss.
///
/// # Formula
/// Select the `k` experts of largest `r_e + b_e`, ties to the lower index; weigh by `r_e` alone. After each training batch
/// ([`Router::adapt`]), with the load counted over the batch and its mean over the experts in use,
///
/// `b_e += u sign(mean load - load_e)`, `u = 1e-3` in the paper.
///
/// The bias enters the selection only, so it has no gradient. It starts at zero and grows with the pool: tell it when an expert is
/// split, so that the newcomer has its source's bias ([`Router::split_expert`]); a batch with more experts than before otherwise
/// gives the new ones a bias of zero. When the pool shrinks, tell it which expert left ([`Router::remove_expert`]).
///
/// # Source
/// Wang et al., "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts", arXiv 2408.15664.
///
/// # Examples
/// ```
/// use mass_routing::{BiasBalanced, Combine, Router, RoutingPlan};
/// use ndarray::array;
///
/// let logits = array![[0.1_f32, 0.0], [0.1, 0.0]]; // everyone prefers expert 0, slightly
/// let mut router = BiasBalanced::new(1, 0.05, Combine::Renormalised)?;
/// let mut plan = RoutingPlan::default();
/// router.route(logits.view(), None, &mut plan)?;
/// assert_eq!(plan.load(0), 2);
/// router.adapt(&plan)?;
/// router.route(logits.view(), None, &mut plan)?;
/// assert_eq!(plan.load(0), 0);
/// # Ok::<(), mass_routing::RoutingError>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(Serialize, Deserialize),
    serde(try_from = "Parts", into = "Parts")
)]
pub struct BiasBalanced {
    k: usize,
    rate: f32,
    combine: Combine,
    non_finite: NonFinite,
    keep_probabilities: bool,
    bias: Vec<f32>,
}

impl BiasBalanced {
    /// Routes every token to `k >= 1` experts; the bias moves by `rate > 0` per batch.
    ///
    /// # Errors
    /// `k` is zero, or `rate` is not positive and finite.
    pub fn new(k: usize, rate: f32, combine: Combine) -> Result<Self, RoutingError> {
        if k == 0 {
            return Err(RoutingError::InvalidParameter {
                name: "k",
                expected: "at least 1",
                value: 0.0,
            });
        }
        if !(rate > 0.0 && rate.is_finite()) {
            let expected = "positive and finite";
            return Err(RoutingError::InvalidParameter {
                name: "rate",
                expected,
                value: rate.into(),
            });
        }
        let (non_finite, keep_probabilities) = (NonFinite::Error, true);
        Ok(Self {
            k,
            rate,
            combine,
            non_finite,
            keep_probabilities,
            bias: Vec::new(),
        })
    }

    /// What to do with a token that has a NaN or infinite logit; an error unless set.
    pub fn with_non_finite(mut self, choice: NonFinite) -> Self {
        self.non_finite = choice;
        self
    }

    /// Whether the plan keeps the full softmax; see [`TopP::with_probabilities`](crate::TopP::with_probabilities).
    pub fn with_probabilities(mut self, keep: bool) -> Self {
        self.keep_probabilities = keep;
        self
    }

    /// The bias of each expert; shorter than the pool until the first batch.
    pub fn bias(&self) -> &[f32] {
        &self.bias
    }
}

impl Router for BiasBalanced {
    /// # Errors
    /// Besides those of every router: [`RoutingError::TooFewExperts`] if fewer than `k` experts are in use.
    fn route(
        &mut self,
        logits: ArrayView2<'_, f32>,
        mask: Option<&[bool]>,
        plan: &mut RoutingPlan,
    ) -> Result<(), RoutingError> {
        super::top_k::enough_experts(self.k, logits.ncols(), mask, plan)?;
        check(logits.dim(), mask).inspect_err(|_| plan.clear())?;
        let known = self.bias.len();
        self.bias.resize(known.max(logits.ncols()), 0.0);
        let batch = Batch {
            logits,
            mask,
            non_finite: self.non_finite,
            keep_scores: self.keep_probabilities,
            rule: self.combine.rule(),
        };
        let result = batch.route(
            &SoftmaxThen {
                combine: self.combine,
                select: Biased {
                    k: self.k,
                    bias: &self.bias,
                },
            },
            plan,
        );
        if result.is_err() {
            self.bias.truncate(known);
        }
        result
    }

    fn gate_gradient(&self) -> GateGradient {
        GateGradient::of(self.combine, Some(self.k))
    }

    fn split_expert(&mut self, source: usize, newcomer: usize) {
        let bias = self.bias.get(source).copied().unwrap_or(0.0);
        self.bias.resize(newcomer, 0.0);
        self.bias.push(bias);
    }

    fn remove_expert(&mut self, index: usize) {
        if index < self.bias.len() {
            self.bias.remove(index);
        }
    }

    fn least_experts(&self) -> usize {
        self.k
    }

    /// Moves the bias of every expert in use against its load.
    ///
    /// # Errors
    /// There are more experts than were ever routed, or loads do not say of each whether it was in use.
    fn adapt_to(&mut self, loads: &Loads) -> Result<(), RoutingError> {
        let experts = loads.of_experts.len();
        if experts > self.bias.len() {
            return Err(RoutingError::ShapeMismatch {
                what: "experts that this router has routed, beside those of the plan to adapt to",
                expected: experts,
                found: self.bias.len(),
            });
        }
        same("mask per expert", experts, loads.in_use.len())?;
        let available = loads.in_use.iter().filter(|&&u| u).count().max(1);
        let mean = loads.assignments() as f64 / available as f64;
        for (e, &load) in loads.of_experts.iter().enumerate() {
            let gap = mean - load as f64;
            if loads.in_use[e] && gap != 0.0 {
                let moved = self.bias[e] + self.rate * gap.signum() as f32;
                self.bias[e] = moved.clamp(f32::MIN, f32::MAX);
            }
        }
        Ok(())
    }
}

struct Biased<'a> {
    k: usize,
    bias: &'a [f32],
}

impl Select for Biased<'_> {
    #[inline(always)]
    fn threshold<M: Machine>(
        &self,
        machine: M,
        row: &Row,
        _: f32,
        work: &mut Work,
    ) -> (Keys, Threshold) {
        let s = machine.simd();
        work.keys.resize(row.logits.get().len());
        let keys = work.keys.get_mut();
        // Padding beyond the bias keeps whatever it holds: its key is set to minus infinity below.
        keys.as_flattened_mut()
            .iter_mut()
            .zip(self.bias)
            .for_each(|(key, bias)| *key = *bias);
        let lowest = s.splat_f32s(f32::NEG_INFINITY);
        let (logits, r) = (
            vectors::<M>(row.logits.get()),
            vectors::<M>(row.probabilities.get()),
        );
        for ((key, l), r) in vectors_mut::<M>(keys).iter_mut().zip(logits).zip(r) {
            *key = s.select_f32s(s.equal_f32s(*l, lowest), lowest, s.add_f32s(*key, *r));
        }
        let keys = work.keys.get();
        let [a, b] = fold2(vectors::<M>(keys), lowest, |top, key| s.max_f32s(top, key));
        let top = s.reduce_max_f32s(s.max_f32s(a, b));
        let floor = f32::NEG_INFINITY;
        (
            Keys::Work,
            threshold::<Count, M>(
                machine,
                keys,
                top,
                floor,
                self.k as f64,
                &mut work.candidates,
            ),
        )
    }
}

/// The unchecked form that serde reads and writes.
#[cfg(feature = "serde")]
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Parts {
    k: usize,
    rate: f32,
    #[serde(default)]
    combine: Combine,
    #[serde(default)]
    non_finite: NonFinite,
    #[serde(default = "yes")]
    keep_probabilities: bool,
    #[serde(default)]
    bias: Vec<f32>,
}

#[cfg(feature = "serde")]
impl TryFrom<Parts> for BiasBalanced {
    type Error = RoutingError;

    fn try_from(parts: Parts) -> Result<Self, RoutingError> {
        if let Some(index) = parts.bias.iter().position(|b| !b.is_finite()) {
            return Err(RoutingError::NonFinite {
                what: "bias",
                index,
                value: parts.bias[index].into(),
            });
        }
        let router = Self::new(parts.k, parts.rate, parts.combine)?
            .with_non_finite(parts.non_finite)
            .with_probabilities(parts.keep_probabilities);
        Ok(Self {
            bias: parts.bias,
            ..router
        })
    }
}

#[cfg(feature = "serde")]
impl From<BiasBalanced> for Parts {
    fn from(router: BiasBalanced) -> Self {
        let BiasBalanced {
            k,
            rate,
            combine,
            non_finite,
            keep_probabilities,
            bias,
        } = router;
        Self {
            k,
            rate,
            combine,
            non_finite,
            keep_probabilities,
            bias,
        }
    }
}

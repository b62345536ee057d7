//! The routing plan: who computes what, with which weight.

mod assignments;
mod backward;
mod build;
mod group;
mod marks;
mod parts;

use ndarray::ArrayView2;
#[cfg(feature = "serde")]
use serde::{Deserialize, Serialize};

pub use parts::PlanParts;

pub(crate) use build::{Batch, Keys, RowKernel, Select, SoftmaxThen, Work, check};

use crate::RoutingError;

/// How the probabilities of a token's selected experts become its routing weights.
///
/// The choice decides the weights, and what the gate learns from: see [`RoutingPlan::backward`]. Renormalised weights depend on the
/// logits of the selected experts alone, and the weight of a token with **one** expert is 1 whatever its logits: no gradient
/// reaches the gate from such a token. A gate of renormalised top-1 routing stays where it began; choose straight-through or raw
/// weights there, two experts a token, or a loss on the routing. [`Router::gate_gradient`](crate::Router::gate_gradient) says
/// which routers are meant, and [`RoutingPlan::tokens_teaching_gate`] how many tokens of a batch do teach the gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(
    feature = "serde",
    derive(Serialize, Deserialize),
    serde(rename_all = "snake_case")
)]
pub enum Combine {
    /// `w_e = r_e`: the softmax probability itself. The weights of a token sum to the mass it selected. Gradients reach the logits of
    /// every expert in use.
    Raw,
    /// `w_e = r_e / sum_{selected} r`: the weights of every token sum to one, up to rounding in f32 (at most half an epsilon for each
    /// selected expert and one more). Where the probabilities of all selected experts underflow to zero, as may be with
    /// [`BiasBalanced`](crate::BiasBalanced) and [`ExpertChoice`](crate::ExpertChoice), the weights are zero. Gradients reach the
    /// logits of the selected experts, if there are two or more.
    #[default]
    Renormalised,
    /// Weights as [`Renormalised`](Self::Renormalised) has them, gradients as [`Raw`](Self::Raw) has them: the straight-through
    /// estimator ([Bengio et al. 2013](https://arxiv.org/abs/1308.3432)). The output of a token with one expert is not scaled down,
    /// and the gate learns from it all the same; the gradient of the logits is then not that of the weights.
    StraightThrough,
}

impl Combine {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Raw, Self::Renormalised, Self::StraightThrough];
}

/// How the weights of a plan depend on the logits: all that a backward pass has to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum WeightRule {
    /// `w = r`, the softmax over all experts in use.
    #[default]
    Softmax,
    /// `w = r / sum of the selected r`.
    Renormalised,
    /// The same weights; the gradient is that of `w = r`.
    StraightThrough,
    /// `w = 1 / k`; the gradient takes the derivative of the sigmoid score where active (the plan's scores are zero elsewhere).
    TopAny,
    /// Given from outside; nothing is known.
    Given,
}

/// Tokens grouped by expert, ready for a grouped matrix product, with the inverse index per token.
///
/// With `N` tokens, `K` experts and `A` assignments (one per token and selected expert):
///
/// | array | length | holds |
/// |---|---|---|
/// | [`expert_offsets`](Self::expert_offsets) | `K + 1` | expert `e` owns the assignments `offsets[e]..offsets[e + 1]` |
/// | [`tokens`](Self::tokens) | `A` | the token of each assignment; ascending within an expert |
/// | [`weights`](Self::weights) | `A` | the routing weight of each assignment |
/// | [`token_offsets`](Self::token_offsets) | `N + 1` | token `t` owns the entries `offsets[t]..offsets[t + 1]` of the next two |
/// | [`token_assignments`](Self::token_assignments) | `A` | positions in the grouped order; ascending within a token |
/// | [`token_experts`](Self::token_experts) | `A` | the expert of each; ascending within a token |
///
/// A plan is filled by [`Router::route`](crate::Router::route), or made by a router of one's own with
/// [`from_assignments`](Self::from_assignments). Its buffers are reused: once they have grown to the size of a batch,
/// routing another of that size allocates nothing in this crate. [`Default`] is a valid plan of zero tokens and zero experts.
/// `clone` copies the plan and not its working memory.
#[derive(Debug)]
pub struct RoutingPlan {
    num_tokens: usize,
    num_experts: usize,
    expert_offsets: Vec<u32>,
    tokens: Vec<u32>,
    weights: Vec<f32>,
    token_offsets: Vec<u32>,
    token_assignments: Vec<u32>,
    token_experts: Vec<u32>,
    scores: Vec<f32>,
    in_use: Vec<bool>,
    skipped: usize,
    rule: WeightRule,
    scratch: build::Scratch,
}

impl Default for RoutingPlan {
    fn default() -> Self {
        Self {
            num_tokens: 0,
            num_experts: 0,
            expert_offsets: vec![0],
            tokens: Vec::new(),
            weights: Vec::new(),
            token_offsets: vec![0],
            token_assignments: Vec::new(),
            token_experts: Vec::new(),
            scores: Vec::new(),
            in_use: Vec::new(),
            skipped: 0,
            rule: WeightRule::default(),
            scratch: build::Scratch::default(),
        }
    }
}

impl Clone for RoutingPlan {
    fn clone(&self) -> Self {
        Self {
            num_tokens: self.num_tokens,
            num_experts: self.num_experts,
            expert_offsets: self.expert_offsets.clone(),
            tokens: self.tokens.clone(),
            weights: self.weights.clone(),
            token_offsets: self.token_offsets.clone(),
            token_assignments: self.token_assignments.clone(),
            token_experts: self.token_experts.clone(),
            scores: self.scores.clone(),
            in_use: self.in_use.clone(),
            skipped: self.skipped,
            rule: self.rule,
            scratch: build::Scratch::default(),
        }
    }
}

impl RoutingPlan {
    /// Number of tokens `N`.
    pub fn num_tokens(&self) -> usize {
        self.num_tokens
    }

    /// Number of experts `K`, masked ones included.
    pub fn num_experts(&self) -> usize {
        self.num_experts
    }

    /// Number of assignments `A`: the sum of all tokens' numbers of experts.
    pub fn num_assignments(&self) -> usize {
        self.tokens.len()
    }

    /// `K + 1` offsets: expert `e` owns the assignments `offsets[e]..offsets[e + 1]`.
    pub fn expert_offsets(&self) -> &[u32] {
        &self.expert_offsets
    }

    /// The token of each assignment, grouped by expert, ascending within an expert.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// The routing weight of each assignment, grouped by expert.
    pub fn weights(&self) -> &[f32] {
        &self.weights
    }

    /// `N + 1` offsets of each token's entries in [`token_assignments`](Self::token_assignments).
    pub fn token_offsets(&self) -> &[u32] {
        &self.token_offsets
    }

    /// For each token, the positions of its assignments in the grouped order; experts ascend within a token.
    pub fn token_assignments(&self) -> &[u32] {
        &self.token_assignments
    }

    /// For each token, its experts, ascending; aligned with [`token_assignments`](Self::token_assignments).
    pub fn token_experts(&self) -> &[u32] {
        &self.token_experts
    }

    /// The range of expert `e`'s assignments in the grouped arrays.
    ///
    /// # Panics
    /// If `e >= K`.
    pub fn segment(&self, e: usize) -> std::ops::Range<usize> {
        self.expert_offsets[e] as usize..self.expert_offsets[e + 1] as usize
    }

    /// The expert of an assignment, by binary search.
    ///
    /// # Panics
    /// If `assignment >= A`.
    pub fn expert_of(&self, assignment: usize) -> usize {
        assert!(
            assignment < self.num_assignments(),
            "assignment {assignment} of {}",
            self.num_assignments()
        );
        self.expert_offsets
            .partition_point(|&o| o as usize <= assignment)
            - 1
    }

    /// The expert of every assignment, in the grouped order.
    pub fn experts(&self) -> impl Iterator<Item = u32> + '_ {
        (0..self.num_experts).flat_map(|e| std::iter::repeat_n(e as u32, self.load(e)))
    }

    /// Number of experts of a token.
    ///
    /// # Panics
    /// If `token >= N`.
    pub fn k(&self, token: usize) -> usize {
        (self.token_offsets[token + 1] - self.token_offsets[token]) as usize
    }

    /// Mean number of experts per token; 0 for a plan without tokens.
    pub fn mean_k(&self) -> f64 {
        if self.num_tokens == 0 {
            0.0
        } else {
            self.num_assignments() as f64 / self.num_tokens as f64
        }
    }

    /// Number of tokens of expert `e`.
    ///
    /// # Panics
    /// If `e >= K`.
    pub fn load(&self, e: usize) -> usize {
        self.segment(e).len()
    }

    /// Tokens that were routed nowhere because of a non-finite logit (see [`NonFinite::Skip`](crate::NonFinite::Skip)).
    pub fn skipped(&self) -> usize {
        self.skipped
    }

    /// Which experts were in use (not masked); `K` entries.
    pub fn in_use(&self) -> &[bool] {
        &self.in_use
    }

    /// The full softmax, `N x K`, zero at masked experts; `0 x K` if the router has none or was told not to keep it.
    pub fn probabilities(&self) -> ArrayView2<'_, f32> {
        let kept = if self.has_probabilities() {
            &self.scores[..]
        } else {
            &[]
        };
        let rows = kept.len().checked_div(self.num_experts).unwrap_or(0);
        match ArrayView2::from_shape((rows, self.num_experts), kept) {
            Ok(view) => view,
            Err(_) => unreachable!("probabilities are whole rows"),
        }
    }

    /// Whether [`probabilities`](Self::probabilities) holds a row per token.
    pub fn has_probabilities(&self) -> bool {
        self.rule != WeightRule::TopAny && self.scores.len() == self.num_tokens * self.num_experts
    }

    /// Number of tokens from which a gradient can reach the gate: with raw or straight-through weights those with an expert, with
    /// renormalised weights those with at least two, with top-any those with an expert whose score passes its threshold. 0 if it
    /// is not known how the weights depend on the logits.
    ///
    /// A batch where this is 0 teaches the gate nothing (losses on the routing aside), see [`Combine`].
    pub fn tokens_teaching_gate(&self) -> usize {
        // The probability of a single expert in use is 1 and stays 1.
        let several = self.in_use.iter().filter(|&&used| used).count() > 1;
        (0..self.num_tokens)
            .filter(|&t| match self.rule {
                WeightRule::Softmax | WeightRule::StraightThrough => several && self.k(t) > 0,
                WeightRule::Renormalised => self.k(t) > 1,
                WeightRule::TopAny => {
                    let own = self.token_offsets[t] as usize..self.token_offsets[t + 1] as usize;
                    let experts = &self.token_experts[own];
                    experts
                        .iter()
                        .any(|&e| self.active_score(t, e as usize) > 0.0)
                }
                WeightRule::Given => false,
            })
            .count()
    }

    /// Each expert's share of the batch's loss, which says where one more expert is worth most:
    ///
    /// ```text
    /// share[e] = Σ_(t of e) w[t, e] loss[t] / Σ_e' Σ_(t of e') w[t, e'] loss[t]
    /// ```
    ///
    /// `token_losses` has one for each of the `N` tokens; the result has `K` entries, all of them `None` if the sum below the line
    /// is not positive.
    ///
    /// # Errors
    /// Another number of losses than of tokens, or one that is NaN or infinite.
    ///
    /// # Examples
    /// ```
    /// use mass_routing::RoutingPlan;
    /// // Token 0 goes to expert 0, token 1 to both.
    /// let plan = RoutingPlan::from_assignments(2, 2, [(0, 0, 1.0), (1, 0, 0.5), (1, 1, 0.5)])?;
    /// assert_eq!(plan.loss_shares(&[1.0, 2.0])?, [Some(2.0 / 3.0), Some(1.0 / 3.0)]);
    /// # Ok::<(), mass_routing::RoutingError>(())
    /// ```
    pub fn loss_shares(&self, token_losses: &[f32]) -> Result<Vec<Option<f64>>, RoutingError> {
        let losses = self.loss_sums(token_losses)?;
        let total: f64 = losses.iter().sum();
        let share = |loss| (total > 0.0).then(|| loss / total);
        Ok(losses.into_iter().map(share).collect())
    }

    /// The loss of each expert: routing weight times token loss, summed over its tokens. [`loss_shares`](Self::loss_shares) are
    /// these over their total; processes that have routed parts of a batch add them up first.
    ///
    /// # Errors
    /// As there.
    pub fn loss_sums(&self, token_losses: &[f32]) -> Result<Vec<f64>, RoutingError> {
        if token_losses.len() != self.num_tokens {
            return Err(RoutingError::ShapeMismatch {
                what: "token losses",
                expected: self.num_tokens,
                found: token_losses.len(),
            });
        }
        if let Some(index) = token_losses.iter().position(|loss| !loss.is_finite()) {
            return Err(RoutingError::NonFinite {
                what: "token losses",
                index,
                value: token_losses[index].into(),
            });
        }
        let loss = |(&t, &w): (&u32, &f32)| f64::from(w) * f64::from(token_losses[t as usize]);
        let of = |e| {
            let segment = self.segment(e);
            let weights = &self.weights[segment.clone()];
            self.tokens[segment].iter().zip(weights).map(loss).sum()
        };
        Ok((0..self.num_experts).map(of).collect())
    }

    /// Empties the plan but keeps its buffers.
    pub fn clear(&mut self) {
        self.reset(0, 0);
        self.expert_offsets[0] = 0;
        self.tokens.clear();
        self.weights.clear();
        self.token_assignments.clear();
        self.token_experts.clear();
        self.scores.clear();
    }

    /// Sizes what depends on `N` and `K` alone; the rest keeps its length, because every entry will be written.
    fn reset(&mut self, num_tokens: usize, num_experts: usize) {
        self.num_tokens = num_tokens;
        self.num_experts = num_experts;
        self.expert_offsets.resize(num_experts + 1, 0);
        self.token_offsets.resize(num_tokens + 1, 0);
        self.in_use.clear();
        self.skipped = 0;
        self.rule = WeightRule::default();
    }

    /// Checks every promise made above; `Err` says which is broken. Runs by itself in debug builds.
    ///
    /// # Errors
    /// The first invariant that does not hold, in words.
    pub fn validate(&self) -> Result<(), String> {
        let (n, k, a) = (self.num_tokens, self.num_experts, self.num_assignments());
        let fail = |what: &str| Err(what.to_owned());
        if self.expert_offsets.len() != k + 1 || self.token_offsets.len() != n + 1 {
            return fail("offsets have the wrong length");
        }
        if self.weights.len() != a
            || self.token_assignments.len() != a
            || self.token_experts.len() != a
        {
            return fail("arrays over assignments differ in length");
        }
        if self.in_use.len() != k || (!self.scores.is_empty() && self.scores.len() != n * k) {
            return fail("scores are not N x K, or the mask is not K");
        }
        for offsets in [&self.expert_offsets, &self.token_offsets] {
            if offsets[0] != 0
                || *offsets.last().unwrap_or(&0) as usize != a
                || offsets.windows(2).any(|w| w[0] > w[1])
            {
                return fail("offsets do not ascend from 0 to the number of assignments");
            }
        }
        for e in 0..k {
            let segment = &self.tokens[self.segment(e)];
            if segment.windows(2).any(|w| w[0] >= w[1])
                || segment.last().is_some_and(|&t| t as usize >= n)
            {
                return fail("tokens of an expert do not ascend, repeat or are out of range");
            }
        }
        for t in 0..n {
            let own = self.token_offsets[t] as usize..self.token_offsets[t + 1] as usize;
            let mut previous = None;
            for (&i, &e) in self.token_assignments[own.clone()]
                .iter()
                .zip(&self.token_experts[own])
            {
                if previous >= Some(e) || e as usize >= k {
                    return fail("experts of a token do not ascend, repeat or are out of range");
                }
                previous = Some(e);
                if !self.segment(e as usize).contains(&(i as usize))
                    || self.tokens[i as usize] as usize != t
                {
                    return fail("the inverse index does not point back at its token");
                }
            }
        }
        if self.weights.iter().any(|w| !w.is_finite()) {
            return fail("a weight is not finite");
        }
        Ok(())
    }

    /// Whether its weights are those of top-any routing.
    pub(crate) fn is_top_any(&self) -> bool {
        self.rule == WeightRule::TopAny
    }

    /// The score of an active expert under [`WeightRule::TopAny`]; zero if it is not active.
    pub(crate) fn active_score(&self, token: usize, e: usize) -> f32 {
        if self.is_top_any() {
            self.scores[token * self.num_experts + e]
        } else {
            0.0
        }
    }

    /// The kept scores of one token.
    pub(crate) fn score_row(&self, token: usize) -> Option<&[f32]> {
        let k = self.num_experts;
        self.scores.get(token * k..(token + 1) * k)
    }
}

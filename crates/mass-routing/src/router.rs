//! The interface of every router, and one type that can be any of them.

mod any;
mod bias_balanced;
mod expert_choice;
mod noisy;
mod target_k;
mod text;
mod top_any;
mod top_k;
mod top_p;

use ndarray::{ArrayView2, ArrayViewMut2};

pub use any::{AnyRouter, RouterConfig};
pub use bias_balanced::BiasBalanced;
pub use expert_choice::ExpertChoice;
pub use noisy::Noisy;
pub use target_k::TargetK;
pub use top_any::TopAny;
pub use top_k::TopK;
pub use top_p::TopP;

use crate::{Combine, RoutingError, RoutingPlan};

/// Whether gradients of a router's weights reach the logits, and so the gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum GateGradient {
    /// From every token with an expert (and several in use to choose from).
    Always,
    /// From tokens with two experts or more. A batch says how many those are:
    /// [`RoutingPlan::tokens_teaching_gate`].
    FromSeveralExperts,
    /// From none: one expert a token with renormalised weights, each of them 1 whatever the logits. The gate learns from losses on
    /// the routing alone; straight-through or raw weights or a second expert mend it.
    Never,
}

impl GateGradient {
    /// Of a router that takes `k` experts for every token, or a number that differs.
    pub(crate) fn of(combine: Combine, k: Option<usize>) -> Self {
        match (combine, k) {
            (Combine::Raw | Combine::StraightThrough, _) => Self::Always,
            (Combine::Renormalised, Some(1)) => Self::Never,
            (Combine::Renormalised, _) => Self::FromSeveralExperts,
        }
    }
}

/// How many tokens went where: all that a router that balances itself learns from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loads {
    /// Tokens that were routed, those left out for a logit that is no number not among them.
    pub tokens: u64,
    /// Tokens of each expert.
    pub of_experts: Vec<u64>,
    /// Which experts could be chosen.
    pub in_use: Vec<bool>,
}

impl Loads {
    /// Those of a plan.
    #[must_use]
    pub fn of(plan: &RoutingPlan) -> Self {
        Self {
            tokens: (plan.num_tokens() - plan.skipped()) as u64,
            of_experts: (0..plan.num_experts())
                .map(|e| plan.load(e) as u64)
                .collect(),
            in_use: plan.in_use().to_vec(),
        }
    }

    /// Tokens by expert, each as often as it has experts; [`u64::MAX`] if there are more.
    #[must_use]
    pub fn assignments(&self) -> u64 {
        let add = |sum: u64, &tokens| sum.saturating_add(tokens);
        self.of_experts.iter().fold(0, add)
    }
}

/// Turns the logits of tokens for experts into a [`RoutingPlan`], and gradients of its weights back into gradients of the logits.
///
/// `route` takes `&mut self` because some routers adapt as they go (a balancing bias, a controlled p). `backward` takes `&self` and
/// the plan it belongs to, so it can run later, from a tape that holds a clone of the plan.
///
/// # Masks
/// `mask[e] = true` means that expert `e` is in use. A masked expert gets probability zero, is never selected, and its logits are
/// ignored, whatever they hold.
pub trait Router: Send {
    /// Routes `N x K` logits. `N = 0` is a valid, empty plan.
    ///
    /// # Errors
    /// No experts, a mask of the wrong length or with no expert in use, a NaN or infinite logit (unless the router skips such
    /// tokens), or what the router's own documentation adds. After an error the plan is empty.
    fn route(
        &mut self,
        logits: ArrayView2<'_, f32>,
        mask: Option<&[bool]>,
        plan: &mut RoutingPlan,
    ) -> Result<(), RoutingError>;

    /// [`route`](Self::route) on a plain slice of logits, row by row, `experts` to a row.
    ///
    /// # Errors
    /// As [`route`](Self::route), and a number of logits that `experts` does not divide.
    fn route_slice(
        &mut self,
        logits: &[f32],
        experts: usize,
        mask: Option<&[bool]>,
        plan: &mut RoutingPlan,
    ) -> Result<(), RoutingError> {
        let refused = match logits.len().checked_div(experts) {
            None => RoutingError::NoExperts,
            // A view would take a slice that is longer than it.
            Some(tokens) => match ArrayView2::from_shape((tokens, experts), logits) {
                Ok(view) if view.len() == logits.len() => return self.route(view, mask, plan),
                _ => RoutingError::ShapeMismatch {
                    what: "logits (whole rows of one for each expert)",
                    expected: tokens * experts,
                    found: logits.len(),
                },
            },
        };
        plan.clear();
        Err(refused)
    }

    /// Adds the gradient of the logits to `d_logits` (`N x K`), given that of the weights (per assignment, grouped order), of
    /// which a NaN passes on.
    ///
    /// # Errors
    /// As [`RoutingPlan::backward`], which is what it does unless a router says otherwise.
    fn backward(
        &self,
        plan: &RoutingPlan,
        d_weights: &[f32],
        d_logits: &mut ArrayViewMut2<'_, f32>,
    ) -> Result<(), RoutingError> {
        plan.backward(d_weights, d_logits)
    }

    /// [`backward`](Self::backward) into a plain slice, row by row.
    ///
    /// # Errors
    /// As there.
    fn backward_slice(
        &self,
        plan: &RoutingPlan,
        d_weights: &[f32],
        d_logits: &mut [f32],
    ) -> Result<(), RoutingError> {
        self.backward(plan, d_weights, &mut plan.rows_of(d_logits)?)
    }

    /// Whether [`backward`](Self::backward) will be able to run for a plan that it has just made: ask before the work is done that
    /// the gradient is for.
    ///
    /// # Errors
    /// As [`RoutingPlan::check_backward`], which is what it does; a router with a `backward` of its own has a check of its own.
    fn check_backward(&self, plan: &RoutingPlan) -> Result<(), RoutingError> {
        plan.check_backward()
    }

    /// Whether gradients of the weights reach the logits, so far as its settings tell.
    fn gate_gradient(&self) -> GateGradient {
        GateGradient::Always
    }

    /// Learns from a training batch it has just routed (a balancing bias, a controlled p); most routers have nothing to learn.
    /// Call it once per training step, never in evaluation.
    ///
    /// # Errors
    /// The plan does not fit the router's state.
    fn adapt(&mut self, plan: &RoutingPlan) -> Result<(), RoutingError> {
        self.adapt_to(&Loads::of(plan))
    }

    /// [`adapt`](Self::adapt) to loads alone, which several processes may have added up: all that it looks at.
    ///
    /// # Errors
    /// The loads do not fit the router's state.
    fn adapt_to(&mut self, loads: &Loads) -> Result<(), RoutingError> {
        let _ = loads;
        Ok(())
    }

    /// Says that the next logits are rows of a larger batch, with so many before them and after them: noise is drawn as it would be
    /// for all of them, wherever the others are routed.
    fn set_rows_around(&mut self, before: usize, after: usize) {
        let _ = (before, after);
    }

    /// Gives an expert that joins the pool at position `newcomer`, the last, what was learned of the one it was split from: its
    /// balancing bias, its threshold. Call it whenever the columns of the logits grow so; a newcomer it is not told of starts
    /// afresh. What it holds for positions from `newcomer` on is forgotten: they are of experts that left.
    ///
    /// # Panics
    /// If there is no room for so many experts.
    fn split_expert(&mut self, source: usize, newcomer: usize) {
        let _ = (source, newcomer);
    }

    /// Forgets what it has learned of an expert that leaves the pool: those after it move up by one. Call it whenever the columns
    /// of the logits do so.
    fn remove_expert(&mut self, index: usize) {
        let _ = index;
    }

    /// Fewest experts in use with which it can route.
    fn least_experts(&self) -> usize {
        1
    }

    /// Switches between training (the default) and evaluation, for routers whose rule differs: gate noise, top-any.
    fn set_training(&mut self, training: bool) {
        let _ = training;
    }
}

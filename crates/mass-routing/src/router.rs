//! The interface of every router, and one type that can be any of them.

mod any;
mod bias_balanced;
mod expert_choice;
mod noisy;
mod target_k;
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

use crate::{RoutingError, RoutingPlan};

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

    /// Adds the gradient of the logits to `d_logits` (`N x K`), given that of the weights (per assignment, grouped order).
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

    /// Learns from a training batch it has just routed (a balancing bias, a controlled p); most routers have nothing to learn.
    /// Call it once per training step, never in evaluation.
    ///
    /// # Errors
    /// The plan does not fit the router's state.
    fn adapt(&mut self, plan: &RoutingPlan) -> Result<(), RoutingError> {
        let _ = plan;
        Ok(())
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

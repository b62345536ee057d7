//! Plans that were made elsewhere.

use super::assignments::check_scores;
use super::build::possible;
use super::{RoutingPlan, WeightRule};
use crate::error::same;
use crate::{AnyRouter, RoutingError};

/// Assignments grouped by expert that were made elsewhere, such as on a GPU: see [`RoutingPlan::from_parts`].
#[derive(Debug, Clone, Default)]
pub struct PlanParts {
    /// `K + 1`: expert `e` owns the assignments `offsets[e]..offsets[e + 1]`.
    pub expert_offsets: Vec<u32>,
    /// The token of each assignment, ascending within an expert.
    pub tokens: Vec<u32>,
    /// The weight of each assignment.
    pub weights: Vec<f32>,
    /// `N x K`: the softmax, zero at masked experts; for top-any the score of an active expert, otherwise zero.
    pub scores: Vec<f32>,
    /// Which experts may be used; `None` for all.
    pub in_use: Option<Vec<bool>>,
}

impl RoutingPlan {
    /// The plan that `router`, a [`TopP`](crate::TopP), [`TopK`](crate::TopK) or [`TopAny`](crate::TopAny), would have made, of
    /// assignments that were made by its rules elsewhere. [`skipped`](Self::skipped) is zero: parts do not tell.
    ///
    /// # Errors
    /// [`RoutingError::Undefined`] for another router; [`RoutingError::NoExperts`], [`RoutingError::TooLarge`],
    /// [`RoutingError::ShapeMismatch`] or [`RoutingError::InvalidAssignment`] for parts that are no plan;
    /// [`RoutingError::NonFinite`] for such a weight or score; [`RoutingError::InvalidParameter`] for a score outside [0, 1]; and as
    /// [`with_mask`](Self::with_mask) for a mask.
    ///
    /// # Examples
    /// ```
    /// use mass_routing::{AnyRouter, Combine, PlanParts, Router, RoutingPlan, TopK};
    ///
    /// let mut router = AnyRouter::TopK(TopK::new(1, Combine::Renormalised)?);
    /// let mut plan = RoutingPlan::default();
    /// router.route_slice(&[2.0, 1.0, 0.0, 3.0], 2, None, &mut plan)?;
    /// let parts = PlanParts {
    ///     expert_offsets: plan.expert_offsets().to_vec(),
    ///     tokens: plan.tokens().to_vec(),
    ///     weights: plan.weights().to_vec(),
    ///     scores: plan.probabilities().iter().copied().collect(),
    ///     in_use: None,
    /// };
    /// let again = RoutingPlan::from_parts(2, parts, &router)?;
    /// assert_eq!(again.token_experts(), plan.token_experts());
    /// # Ok::<(), mass_routing::RoutingError>(())
    /// ```
    pub fn from_parts(
        num_tokens: usize,
        parts: PlanParts,
        router: &AnyRouter,
    ) -> Result<Self, RoutingError> {
        let rule = match router {
            AnyRouter::TopP(router) => router.combine().rule(),
            AnyRouter::TopK(router) => router.combine().rule(),
            AnyRouter::TopAny(_) => WeightRule::TopAny,
            _ => {
                let what = "only plans of top-p, top-k and top-any routing can be made elsewhere";
                return Err(RoutingError::Undefined(what));
            }
        };
        let PlanParts {
            expert_offsets,
            tokens,
            weights,
            scores,
            in_use,
        } = parts;
        let assigned = tokens.len();
        let k = expert_offsets.len().saturating_sub(1);
        let possible = possible(num_tokens, k)?;
        let ascends = expert_offsets[0] == 0 && expert_offsets.windows(2).all(|w| w[0] <= w[1]);
        let last = if ascends {
            expert_offsets[k] as usize
        } else {
            usize::MAX
        };
        same("assignments of all experts", assigned, last)?;
        same("weights per assignment", assigned, weights.len())?;
        same("scores (tokens x experts)", possible, scores.len())?;
        check_scores("score", &scores)?;
        if let Some(index) = weights.iter().position(|w| !w.is_finite()) {
            return Err(RoutingError::NonFinite {
                what: "weight",
                index,
                value: weights[index].into(),
            });
        }
        let mut token_offsets = vec![0_u32; num_tokens + 1];
        for e in 0..k {
            let (first, end) = (expert_offsets[e] as usize, expert_offsets[e + 1] as usize);
            let mut before = None;
            for (i, &token) in tokens[first..end].iter().enumerate() {
                if token as usize >= num_tokens || before >= Some(token) {
                    return Err(RoutingError::InvalidAssignment {
                        index: first + i,
                        token: token as usize,
                        expert: e,
                        what: "tokens of an expert do not ascend, or are not there",
                    });
                }
                before = Some(token);
                token_offsets[token as usize + 1] += 1;
            }
        }
        for t in 0..num_tokens {
            token_offsets[t + 1] += token_offsets[t];
        }
        // Expert by expert, so that those of a token ascend.
        let mut next = token_offsets.clone();
        let (mut token_assignments, mut token_experts) = (vec![0; assigned], vec![0; assigned]);
        for e in 0..k {
            for index in expert_offsets[e]..expert_offsets[e + 1] {
                let at = &mut next[tokens[index as usize] as usize];
                token_assignments[*at as usize] = index;
                token_experts[*at as usize] = e as u32;
                *at += 1;
            }
        }
        let plan = Self {
            num_tokens,
            num_experts: k,
            expert_offsets,
            tokens,
            weights,
            token_offsets,
            token_assignments,
            token_experts,
            scores,
            in_use: vec![true; k],
            rule,
            ..Self::default()
        };
        match in_use {
            Some(mask) => plan.with_mask(&mask),
            None => Ok(plan),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Combine, Router, TopAny, TopK, TopP};

    fn parts(plan: &RoutingPlan) -> PlanParts {
        PlanParts {
            expert_offsets: plan.expert_offsets.clone(),
            tokens: plan.tokens.clone(),
            weights: plan.weights.clone(),
            scores: plan.scores.clone(),
            in_use: Some(plan.in_use.clone()),
        }
    }

    #[test]
    fn a_plan_made_of_its_parts_is_the_plan() {
        let logits: Vec<f32> = (0..7 * 4)
            .map(|i| (i * 37 % 11) as f32 * 0.3 - 1.0)
            .collect();
        let mut routers = vec![AnyRouter::TopAny(TopAny::new(vec![0.2; 4]).unwrap())];
        for combine in Combine::ALL {
            routers.push(AnyRouter::TopP(TopP::new(0.6, combine).unwrap()));
            routers.push(AnyRouter::TopK(TopK::new(2, combine).unwrap()));
        }
        for router in &mut routers {
            for mask in [None, Some(&[true, false, true, true][..])] {
                let mut plan = RoutingPlan::default();
                router.route_slice(&logits, 4, mask, &mut plan).unwrap();
                let again = RoutingPlan::from_parts(7, parts(&plan), router).unwrap();
                again.validate().unwrap();
                assert_eq!(again.token_offsets, plan.token_offsets);
                assert_eq!(again.token_assignments, plan.token_assignments);
                assert_eq!(again.token_experts, plan.token_experts);
                assert_eq!((again.rule, &again.in_use), (plan.rule, &plan.in_use));
                let d: Vec<f32> = (0..plan.num_assignments())
                    .map(|i| i as f32 - 2.0)
                    .collect();
                let [mut a, mut b] = [vec![0.0; 28], vec![0.0; 28]];
                plan.backward_slice(&d, &mut a).unwrap();
                again.backward_slice(&d, &mut b).unwrap();
                assert_eq!(a, b);
            }
        }
        let empty = PlanParts {
            expert_offsets: vec![0; 3],
            ..PlanParts::default()
        };
        RoutingPlan::from_parts(0, empty, &routers[0])
            .unwrap()
            .validate()
            .unwrap();
    }

    #[test]
    fn parts_that_are_no_plan_are_refused() {
        let mut router = AnyRouter::TopK(TopK::new(1, Combine::Raw).unwrap());
        let mut plan = RoutingPlan::default();
        router
            .route_slice(&[1.0, 0.0, 0.0, 1.0, 2.0, 0.0], 2, None, &mut plan)
            .unwrap();
        let good = parts(&plan);
        let refused = |change: &dyn Fn(&mut PlanParts)| {
            let mut bad = good.clone();
            change(&mut bad);
            assert!(RoutingPlan::from_parts(3, bad, &router).is_err());
        };
        refused(&|p| p.expert_offsets.clear());
        refused(&|p| p.expert_offsets[1] = 9);
        refused(&|p| p.expert_offsets[0] = 1);
        refused(&|p| p.expert_offsets[2] = 2);
        refused(&|p| p.tokens[0] = 3);
        refused(&|p| p.tokens.swap(0, 1));
        refused(&|p| p.tokens.truncate(2));
        refused(&|p| p.weights.push(1.0));
        refused(&|p| p.weights[0] = f32::NAN);
        refused(&|p| p.scores.truncate(5));
        refused(&|p| p.in_use = Some(vec![true]));
        let other: crate::RouterConfig = "expert_choice:capacity=1.1,combine=raw".parse().unwrap();
        let other = other.build().unwrap();
        assert!(RoutingPlan::from_parts(3, good.clone(), &other).is_err());
        assert!(RoutingPlan::from_parts(3, good.clone(), &router).is_ok());
    }
}

//! Plans made by hand, for routers of one's own.

use ndarray::ArrayView1;

use super::build::{check_mask, possible};
use super::{Combine, RoutingPlan, WeightRule};
use crate::RoutingError;
use crate::error::same;
use crate::gate::finite;

/// How far a weight may lie from what the probabilities make of it: rounding of another framework's softmax, no more.
const WEIGHT_TOLERANCE: f32 = 1e-4;

impl RoutingPlan {
    /// The plan of these assignments, `(token, expert, weight)` each, in any order.
    ///
    /// All experts are in use ([`with_mask`](Self::with_mask) says otherwise), and how the weights depend on the logits is not known:
    /// [`with_probabilities`](Self::with_probabilities) says it, or the router that made the plan has a
    /// [`backward`](crate::Router::backward) of its own.
    ///
    /// # Errors
    /// [`RoutingError::NoExperts`] or [`RoutingError::TooLarge`] for sizes that no batch has; [`RoutingError::InvalidAssignment`] for
    /// a token or expert that is not there or a pair that is there twice; [`RoutingError::NonFinite`] for such a weight.
    ///
    /// # Examples
    /// A router that is not of this crate: hash routing, where a token's expert is a function of its id.
    /// ```
    /// use mass_routing::ndarray::ArrayView2;
    /// use mass_routing::{Router, RoutingError, RoutingPlan};
    ///
    /// struct Hashed;
    ///
    /// impl Router for Hashed {
    ///     fn route(
    ///         &mut self,
    ///         logits: ArrayView2<'_, f32>,
    ///         _: Option<&[bool]>,
    ///         plan: &mut RoutingPlan,
    ///     ) -> Result<(), RoutingError> {
    ///         let (tokens, experts) = logits.dim();
    ///         let chosen = (0..tokens).map(|t| (t, t * 7 % experts, 1.0));
    ///         *plan = RoutingPlan::from_assignments(tokens, experts, chosen)?;
    ///         Ok(())
    ///     }
    /// }
    ///
    /// let mut plan = RoutingPlan::default();
    /// Hashed.route_slice(&[0.0; 3 * 2], 2, None, &mut plan)?;
    /// assert_eq!(plan.tokens(), [0, 2, 1]); // expert 0 has tokens 0 and 2, expert 1 has token 1
    /// # Ok::<(), RoutingError>(())
    /// ```
    pub fn from_assignments(
        tokens: usize,
        experts: usize,
        assignments: impl IntoIterator<Item = (usize, usize, f32)>,
    ) -> Result<Self, RoutingError> {
        possible(tokens, experts)?;
        let mut given = Vec::new();
        for (index, (token, expert, weight)) in assignments.into_iter().enumerate() {
            let wrong = if token >= tokens {
                Some("there are fewer tokens")
            } else if expert >= experts {
                Some("there are fewer experts")
            } else {
                None
            };
            if let Some(what) = wrong {
                return Err(RoutingError::InvalidAssignment {
                    index,
                    token,
                    expert,
                    what,
                });
            }
            if !weight.is_finite() {
                return Err(RoutingError::NonFinite {
                    what: "weight",
                    index,
                    value: weight.into(),
                });
            }
            given.push((expert as u32, token as u32, weight, index));
        }
        given.sort_unstable_by_key(|&(expert, token, _, index)| (expert, token, index));
        if let Some(twice) = given
            .windows(2)
            .find(|w| (w[0].0, w[0].1) == (w[1].0, w[1].1))
        {
            let (expert, token, _, index) = twice[1];
            return Err(RoutingError::InvalidAssignment {
                index,
                token: token as usize,
                expert: expert as usize,
                what: "it was given before",
            });
        }
        let mut plan = Self::default();
        plan.reset(tokens, experts);
        plan.rule = WeightRule::Given;
        plan.in_use.resize(experts, true);
        for &(expert, token, weight, _) in &given {
            plan.expert_offsets[expert as usize + 1] += 1;
            plan.token_offsets[token as usize + 1] += 1;
            plan.tokens.push(token);
            plan.weights.push(weight);
        }
        for offsets in [&mut plan.expert_offsets, &mut plan.token_offsets] {
            for i in 1..offsets.len() {
                offsets[i] += offsets[i - 1];
            }
        }
        // Experts ascend, so each token's entries are written in the order of its experts.
        plan.token_assignments.resize(given.len(), 0);
        plan.token_experts.resize(given.len(), 0);
        let mut cursors = plan.token_offsets[..tokens].to_vec();
        for (a, &(expert, token, ..)) in given.iter().enumerate() {
            let cursor = &mut cursors[token as usize];
            plan.token_assignments[*cursor as usize] = a as u32;
            plan.token_experts[*cursor as usize] = expert;
            *cursor += 1;
        }
        Ok(plan)
    }

    /// The same plan with some experts out of use (`mask[e] = false`).
    ///
    /// # Errors
    /// A mask of the wrong length or with no expert in use; [`RoutingError::InvalidAssignment`] if a masked expert has a token.
    pub fn with_mask(mut self, mask: &[bool]) -> Result<Self, RoutingError> {
        check_mask(mask, self.num_experts)?;
        let busy = (0..mask.len()).find(|&e| !mask[e] && self.load(e) > 0);
        if let Some(expert) = busy {
            let index = self.segment(expert).start;
            return Err(RoutingError::InvalidAssignment {
                index,
                token: self.tokens[index] as usize,
                expert,
                what: "the expert is masked",
            });
        }
        self.in_use.copy_from_slice(mask);
        Ok(self)
    }

    /// The same plan, whose weights are made of a softmax (`N x K`, row by row) as `combine` says: what
    /// [`backward`](Self::backward) and the losses on probabilities need.
    ///
    /// # Errors
    /// A wrong length; [`RoutingError::NonFinite`], or [`RoutingError::InvalidParameter`] for a probability outside [0, 1];
    /// [`RoutingError::InvalidAssignment`] (with its position in the grouped order) for a weight that is not made so.
    ///
    /// # Examples
    /// ```
    /// use mass_routing::{Combine, RoutingPlan};
    ///
    /// let softmax = [0.5, 0.3, 0.2];
    /// let plan = RoutingPlan::from_assignments(1, 3, [(0, 0, 0.625), (0, 1, 0.375)])?
    ///     .with_probabilities(&softmax, Combine::Renormalised)?;
    /// let mut d_logits = [0.0; 3];
    /// plan.backward_slice(&[1.0, 0.0], &mut d_logits)?;
    /// assert_eq!(d_logits, [0.234375, -0.234375, 0.0]); // w0 w1 (g0 - g1)
    /// # Ok::<(), mass_routing::RoutingError>(())
    /// ```
    pub fn with_probabilities(
        mut self,
        probabilities: &[f32],
        combine: Combine,
    ) -> Result<Self, RoutingError> {
        let k = self.num_experts;
        let wanted = self.num_tokens * k;
        same(
            "probabilities (tokens x experts)",
            wanted,
            probabilities.len(),
        )?;
        check_scores("probability", probabilities)?;
        let mut made = Vec::new();
        for token in 0..self.num_tokens {
            let own = self.token_offsets[token] as usize..self.token_offsets[token + 1] as usize;
            let experts = &self.token_experts[own.clone()];
            made.clear();
            made.extend(
                experts
                    .iter()
                    .map(|&e| probabilities[token * k + e as usize]),
            );
            combine.apply(&mut made);
            for ((&a, &expert), made) in self.token_assignments[own].iter().zip(experts).zip(&made)
            {
                if (self.weights[a as usize] - made).abs() > WEIGHT_TOLERANCE {
                    return Err(RoutingError::InvalidAssignment {
                        index: a as usize,
                        token,
                        expert: expert as usize,
                        what: "its weight is not what the probabilities make it",
                    });
                }
            }
        }
        self.scores.clear();
        self.scores.extend_from_slice(probabilities);
        self.rule = combine.rule();
        Ok(self)
    }
}

/// Refuses what is no probability, nor a sigmoid.
pub(super) fn check_scores(name: &'static str, scores: &[f32]) -> Result<(), RoutingError> {
    let good = |r: &f32| (0.0..=1.0 + WEIGHT_TOLERANCE).contains(r);
    // Without a way out of the loop it runs in vectors: plans from a GPU pass here in every step.
    if scores.iter().fold(true, |all, r| all & good(r)) {
        return Ok(());
    }
    finite(name, &ArrayView1::from(scores))?;
    let value = scores
        .iter()
        .find(|r| !good(r))
        .copied()
        .unwrap_or(f32::NAN);
    Err(RoutingError::InvalidParameter {
        name,
        expected: "in [0, 1]",
        value: value.into(),
    })
}

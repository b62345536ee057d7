//! From gradients of the routing weights to gradients of the logits.

use ndarray::ArrayViewMut2;

use super::{RoutingPlan, WeightRule};
use crate::RoutingError;
use crate::error::same;

impl RoutingPlan {
    /// The vector-Jacobian product of the weights: adds `sum_a d_weights[a] dw_a/dlogits` to `d_logits`.
    ///
    /// The selection itself is a step function and is not differentiated. For token `t` with `g_e` the gradient of its weight for
    /// expert `e` (zero for experts it did not select) and `r` its softmax row,
    ///
    /// - raw weights: `dlogit_e += r_e (g_e - sum_j r_j g_j)`, non-zero for every expert in use;
    /// - renormalised weights `w`: `dlogit_e += w_e (g_e - sum_{j selected} w_j g_j)`, zero for experts not selected;
    /// - top-any: `dlogit_e += g_e s_e (1 - s_e) / k` with the sigmoid score `s`, the straight-through rule of
    ///   [`TopAny`](crate::TopAny).
    ///
    /// `d_weights` has one entry per assignment in the grouped order, `d_logits` is `N x K`.
    ///
    /// # Errors
    /// A shape that does not fit the plan, or raw weights in a plan made without probabilities.
    pub fn backward(
        &self,
        d_weights: &[f32],
        d_logits: &mut ArrayViewMut2<'_, f32>,
    ) -> Result<(), RoutingError> {
        same(
            "d_weights per assignment",
            self.num_assignments(),
            d_weights.len(),
        )?;
        same(
            "rows of d_logits (tokens)",
            self.num_tokens,
            d_logits.nrows(),
        )?;
        same(
            "columns of d_logits (experts)",
            self.num_experts,
            d_logits.ncols(),
        )?;
        if self.rule == WeightRule::Softmax
            && self.num_assignments() > 0
            && !self.has_probabilities()
        {
            return Err(RoutingError::ProbabilitiesNotKept);
        }
        for (t, mut row) in d_logits.outer_iter_mut().enumerate() {
            let own = self.token_offsets[t] as usize..self.token_offsets[t + 1] as usize;
            let (assignments, experts) = (
                &self.token_assignments[own.clone()],
                &self.token_experts[own],
            );
            let dot: f32 = assignments
                .iter()
                .map(|&a| self.weights[a as usize] * d_weights[a as usize])
                .sum();
            match self.rule {
                WeightRule::Softmax => {
                    if let Some(r) = self.score_row(t) {
                        row.iter_mut().zip(r).for_each(|(d, r)| *d -= r * dot);
                    }
                    for (&a, &e) in assignments.iter().zip(experts) {
                        row[e as usize] += self.weights[a as usize] * d_weights[a as usize];
                    }
                }
                WeightRule::StraightThrough => {
                    let Some(s) = self.score_row(t) else { continue };
                    for (&a, &e) in assignments.iter().zip(experts) {
                        let s = s[e as usize];
                        row[e as usize] +=
                            self.weights[a as usize] * d_weights[a as usize] * s * (1.0 - s);
                    }
                }
                WeightRule::Renormalised => {
                    for (&a, &e) in assignments.iter().zip(experts) {
                        row[e as usize] += self.weights[a as usize] * (d_weights[a as usize] - dot);
                    }
                }
            }
        }
        Ok(())
    }
}

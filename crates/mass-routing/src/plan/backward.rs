//! From gradients of the routing weights to gradients of the logits.

use ndarray::{ArrayViewMut2, Axis};

use super::{RoutingPlan, WeightRule};
use crate::error::same;
use crate::simd::{Machine, Task, dispatch};
use crate::{RoutingError, threads};

/// Logits of a piece of the batch that one thread takes.
const PIECE: usize = 1 << 14;

impl RoutingPlan {
    /// Whether [`backward`](Self::backward) can run at all, so that this is known when the plan is made.
    ///
    /// # Errors
    /// [`RoutingError::ProbabilitiesNotKept`] for raw or straight-through weights in a plan made without probabilities;
    /// [`RoutingError::GradientUnknown`] for a plan made from assignments alone.
    pub fn check_backward(&self) -> Result<(), RoutingError> {
        match self.rule {
            _ if self.num_assignments() == 0 => Ok(()),
            WeightRule::Softmax | WeightRule::StraightThrough if !self.has_probabilities() => {
                Err(RoutingError::ProbabilitiesNotKept)
            }
            WeightRule::Given => Err(RoutingError::GradientUnknown),
            _ => Ok(()),
        }
    }

    /// The vector-Jacobian product of the weights: adds `sum_a d_weights[a] dw_a/dlogits` to `d_logits`.
    ///
    /// The selection itself is a step function and is not differentiated. For token `t` with `g_e` the gradient of its weight for
    /// expert `e` (zero for experts it did not select) and `r` its softmax row,
    ///
    /// - raw weights: `dlogit_e += r_e (g_e - sum_j r_j g_j)`, non-zero for every expert in use;
    /// - renormalised weights `w`: `dlogit_e += w_e (g_e - sum_{j selected} w_j g_j)`, zero for experts not selected, and zero
    ///   altogether for a token with one expert;
    /// - straight-through weights: as raw weights;
    /// - top-any: `dlogit_e += g_e s_e (1 - s_e) / k` with the sigmoid score `s`, the straight-through rule of
    ///   [`TopAny`](crate::TopAny).
    ///
    /// `d_weights` has one entry per assignment in the grouped order, `d_logits` is `N x K`. Large batches are shared among threads,
    /// row by row, so that their number does not change a bit.
    ///
    /// A NaN or infinity in `d_weights` is no error: it passes on to its token's row of `d_logits`, and to no other. Who must
    /// stop there checks the loss before, or the gradients after.
    ///
    /// # Errors
    /// A shape that does not fit the plan, or as [`check_backward`](Self::check_backward).
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
        self.check_backward()?;
        self.backward_from(0, d_weights, d_logits.view_mut());
        Ok(())
    }

    /// [`backward`](Self::backward) into a plain slice, row by row.
    ///
    /// # Errors
    /// As there.
    pub fn backward_slice(
        &self,
        d_weights: &[f32],
        d_logits: &mut [f32],
    ) -> Result<(), RoutingError> {
        self.backward(d_weights, &mut self.rows_of(d_logits)?)
    }

    /// A slice as `N x K`.
    pub(crate) fn rows_of<'a>(
        &self,
        d_logits: &'a mut [f32],
    ) -> Result<ArrayViewMut2<'a, f32>, RoutingError> {
        let (n, k, found) = (self.num_tokens, self.num_experts, d_logits.len());
        let wrong = |_| RoutingError::ShapeMismatch {
            what: "d_logits (tokens x experts)",
            expected: n * k,
            found,
        };
        // A view would take a slice that is longer than it.
        same("d_logits (tokens x experts)", n * k, found)?;
        ArrayViewMut2::from_shape((n, k), d_logits).map_err(wrong)
    }

    /// The rows of tokens from `first` on.
    fn backward_from(&self, first: usize, d_weights: &[f32], rows: ArrayViewMut2<'_, f32>) {
        let n = rows.nrows();
        if n > 1 && n * self.num_experts > PIECE {
            let (upper, lower) = rows.split_at(Axis(0), n / 2);
            threads::join(
                || self.backward_from(first, d_weights, upper),
                || self.backward_from(first + n / 2, d_weights, lower),
            );
            return;
        }
        dispatch(Rows {
            plan: self,
            first,
            d_weights,
            rows,
        });
    }
}

/// A piece of the batch. Nothing is reduced across lanes and nothing fused, so that wider vectors change no bit.
struct Rows<'a> {
    plan: &'a RoutingPlan,
    first: usize,
    d_weights: &'a [f32],
    rows: ArrayViewMut2<'a, f32>,
}

impl Task for Rows<'_> {
    #[inline(always)]
    fn run<M: Machine>(self, _: M) {
        let Self {
            plan,
            first,
            d_weights,
            rows,
        } = self;
        for (t, mut row) in (first..).zip(rows.into_outer_iter_mut()) {
            let own = plan.token_offsets[t] as usize..plan.token_offsets[t + 1] as usize;
            let (assignments, experts) = (
                &plan.token_assignments[own.clone()],
                &plan.token_experts[own],
            );
            match plan.rule {
                WeightRule::Softmax | WeightRule::StraightThrough => {
                    let Some(r) = plan.score_row(t) else { continue };
                    let of = |(&a, &e): (&u32, &u32)| r[e as usize] * d_weights[a as usize];
                    let dot: f32 = assignments.iter().zip(experts).map(of).sum();
                    match row.as_slice_mut() {
                        Some(row) => row.iter_mut().zip(r).for_each(|(d, r)| *d -= r * dot),
                        None => row.iter_mut().zip(r).for_each(|(d, r)| *d -= r * dot),
                    }
                    for own in assignments.iter().zip(experts) {
                        row[*own.1 as usize] += of(own);
                    }
                }
                WeightRule::TopAny => {
                    let Some(s) = plan.score_row(t) else { continue };
                    for (&a, &e) in assignments.iter().zip(experts) {
                        let s = s[e as usize];
                        row[e as usize] +=
                            plan.weights[a as usize] * d_weights[a as usize] * s * (1.0 - s);
                    }
                }
                WeightRule::Renormalised => {
                    let of = |&a: &u32| plan.weights[a as usize] * d_weights[a as usize];
                    let dot: f32 = assignments.iter().map(of).sum();
                    for (&a, &e) in assignments.iter().zip(experts) {
                        row[e as usize] += plan.weights[a as usize] * (d_weights[a as usize] - dot);
                    }
                }
                // Refused before, but for plans without assignments.
                WeightRule::Given => {}
            }
        }
    }
}

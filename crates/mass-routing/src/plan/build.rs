//! Filling a plan: rows to selections, then a counting sort by expert.

use ndarray::ArrayView2;

use super::{Combine, RoutingPlan, WeightRule};
use crate::softmax::softmax_row;
use crate::{NonFinite, RoutingError};

/// The experts one token selected, in ascending order.
#[derive(Debug, Default)]
pub(crate) struct Selection {
    pub(crate) experts: Vec<u32>,
}

/// Chooses the experts of one token.
pub(crate) trait RowSelector: Sync {
    /// Appends the experts of a token to `out.experts`, ascending. Masked experts have `probabilities = 0` and `logits = -inf`.
    fn select(&self, logits: &[f32], probabilities: &[f32], out: &mut Selection);
}

/// Working memory of [`RoutingPlan`]; no part of its value.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    selection: Selection,
    logits: Vec<f32>,
    row: Vec<f32>,
    weights: Vec<f32>,
    cursor: Vec<u32>,
}

/// How to turn rows of logits into a plan whose weights are softmax probabilities.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SoftmaxRows {
    pub(crate) combine: Combine,
    pub(crate) non_finite: NonFinite,
    pub(crate) keep_probabilities: bool,
}

impl SoftmaxRows {
    pub(crate) fn route(
        self,
        logits: ArrayView2<'_, f32>,
        mask: Option<&[bool]>,
        selector: &impl RowSelector,
        plan: &mut RoutingPlan,
    ) -> Result<(), RoutingError> {
        let result = self.fill(logits, mask, selector, plan);
        if result.is_err() {
            plan.clear();
        }
        #[cfg(debug_assertions)]
        if let Err(broken) = plan.validate() {
            unreachable!("broken plan: {broken}");
        }
        result
    }

    fn fill(
        self,
        logits: ArrayView2<'_, f32>,
        mask: Option<&[bool]>,
        selector: &impl RowSelector,
        plan: &mut RoutingPlan,
    ) -> Result<(), RoutingError> {
        let (n, k) = logits.dim();
        check_shape(n, k, mask)?;
        plan.reset(n, k);
        plan.rule = match self.combine {
            Combine::Raw => WeightRule::Softmax,
            Combine::Renormalised => WeightRule::Renormalised,
        };
        let mut scratch = std::mem::take(&mut plan.scratch);
        if self.keep_probabilities {
            plan.probabilities.resize(n * k, 0.0);
        }
        scratch.row.resize(k, 0.0);
        scratch.logits.resize(k, 0.0);
        scratch.weights.clear();
        scratch.selection.experts.clear();
        for (t, row) in logits.outer_iter().enumerate() {
            for (e, (to, &l)) in scratch.logits.iter_mut().zip(row).enumerate() {
                *to = if mask.is_none_or(|m| m[e]) {
                    l
                } else {
                    f32::NEG_INFINITY
                };
            }
            let bad = (0..k).find(|&e| mask.is_none_or(|m| m[e]) && !row[e].is_finite());
            let probabilities = match plan.probabilities.get_mut(t * k..(t + 1) * k) {
                Some(kept) => kept,
                None => &mut scratch.row[..],
            };
            if let Some(expert) = bad {
                if self.non_finite == NonFinite::Error {
                    plan.scratch = scratch;
                    return Err(RoutingError::NonFiniteLogit {
                        token: t,
                        expert,
                        value: row[expert],
                    });
                }
                probabilities.fill(0.0);
                plan.skipped += 1;
            } else {
                softmax_row(&scratch.logits, probabilities);
                let from = scratch.selection.experts.len();
                selector.select(&scratch.logits, probabilities, &mut scratch.selection);
                let chosen = &scratch.selection.experts[from..];
                let scale = match self.combine {
                    Combine::Raw => 1.0,
                    Combine::Renormalised => {
                        1.0 / chosen
                            .iter()
                            .map(|&e| probabilities[e as usize])
                            .sum::<f32>()
                    }
                };
                scratch
                    .weights
                    .extend(chosen.iter().map(|&e| probabilities[e as usize] * scale));
            }
            plan.token_offsets[t + 1] = scratch.selection.experts.len() as u32;
        }
        group(plan, &mut scratch);
        plan.scratch = scratch;
        Ok(())
    }
}

/// The counting sort: token-ordered selections to the grouped arrays and the inverse index.
fn group(plan: &mut RoutingPlan, scratch: &mut Scratch) {
    let chosen = &scratch.selection.experts;
    for &e in chosen {
        plan.expert_offsets[e as usize + 1] += 1;
    }
    for e in 0..plan.num_experts {
        plan.expert_offsets[e + 1] += plan.expert_offsets[e];
    }
    scratch.cursor.clear();
    scratch.cursor.extend_from_slice(&plan.expert_offsets);
    plan.tokens.resize(chosen.len(), 0);
    plan.weights.resize(chosen.len(), 0.0);
    plan.token_assignments.resize(chosen.len(), 0);
    plan.token_experts.extend_from_slice(chosen);
    for t in 0..plan.num_tokens {
        for i in plan.token_offsets[t] as usize..plan.token_offsets[t + 1] as usize {
            let cursor = &mut scratch.cursor[chosen[i] as usize];
            plan.tokens[*cursor as usize] = t as u32;
            plan.weights[*cursor as usize] = scratch.weights[i];
            plan.token_assignments[i] = *cursor;
            *cursor += 1;
        }
    }
}

fn check_shape(n: usize, k: usize, mask: Option<&[bool]>) -> Result<(), RoutingError> {
    if k == 0 {
        return Err(RoutingError::NoExperts);
    }
    if n.checked_mul(k).is_none_or(|a| u32::try_from(a).is_err()) {
        return Err(RoutingError::TooLarge {
            tokens: n,
            experts: k,
        });
    }
    if let Some(mask) = mask {
        if mask.len() != k {
            return Err(RoutingError::ShapeMismatch {
                what: "mask per expert",
                expected: k,
                found: mask.len(),
            });
        }
        if !mask.contains(&true) {
            return Err(RoutingError::AllExpertsMasked { experts: k });
        }
    }
    Ok(())
}

//! Auxiliary losses, each with its exact gradient.
//!
//! Every function returns the loss, unweighted, in f64, and **adds** `weight` times its gradient to the array it is given, so that
//! several losses and the gradient of the routing weights gather in one array. A batch without tokens has loss zero. A `weight` that
//! is NaN or infinite is an error of all of them, [`RoutingError::InvalidParameter`]. After an error no gradient was added.
//!
//! | function | gradient with respect to |
//! |---|---|
//! | [`gshard_balance`], [`routing_entropy`], [`dirichlet_prior`] | the logits behind a plan |
//! | [`router_z`] | the logits |
//! | [`importance`], [`load`] | scores; chain with [`softmax_backward`] |
//! | [`diverse_and_simple`], [`redundancy`] | the gate's weights |

mod balance;
mod gate_weights;
mod shape;

pub use balance::{
    BalanceCount, gshard_balance, gshard_balance_among, importance, importance_among, load,
    load_among,
};
pub use gate_weights::{Reduction, diverse_and_simple, redundancy};
pub use shape::{dirichlet_prior, router_z, routing_entropy, softmax_backward};

use ndarray::{ArrayView1, ArrayView2, ArrayViewMut1, ArrayViewMut2};

use crate::gate::same;
use crate::{RoutingError, RoutingPlan};

/// The probabilities of a plan, and that a gradient fits them.
fn probabilities<'a>(
    plan: &'a RoutingPlan,
    d_logits: &ArrayViewMut2<'_, f32>,
) -> Result<ArrayView2<'a, f32>, RoutingError> {
    same(
        "rows of d_logits (tokens)",
        plan.num_tokens(),
        d_logits.nrows(),
    )?;
    same(
        "columns of d_logits (experts)",
        plan.num_experts(),
        d_logits.ncols(),
    )?;
    if plan.has_probabilities() {
        Ok(plan.probabilities())
    } else {
        Err(RoutingError::ProbabilitiesNotKept)
    }
}

/// Adds `weight` times the softmax's vector-Jacobian product of one row: `r_e (g_e - sum_j r_j g_j)`.
fn add_softmax_row(
    r: ArrayView1<'_, f32>,
    g: impl Iterator<Item = f64> + Clone,
    weight: f64,
    mut d: ArrayViewMut1<'_, f32>,
) {
    let r = r.iter().map(|&r| f64::from(r));
    let mean: f64 = r.clone().zip(g.clone()).map(|(r, g)| r * g).sum();
    for ((d, r), g) in d.iter_mut().zip(r).zip(g) {
        *d += (weight * r * (g - mean)) as f32;
    }
}

/// The experts that a mask leaves in use.
fn in_use(mask: Option<&[bool]>, k: usize) -> Result<Vec<usize>, RoutingError> {
    if let Some(mask) = mask {
        same("mask per expert", k, mask.len())?;
    }
    let used: Vec<usize> = (0..k).filter(|&e| mask.is_none_or(|m| m[e])).collect();
    match (k, used.is_empty()) {
        (0, _) => Err(RoutingError::NoExperts),
        (experts, true) => Err(RoutingError::AllExpertsMasked { experts }),
        _ => Ok(used),
    }
}

fn finite_weight(weight: f32) -> Result<f64, RoutingError> {
    if weight.is_finite() {
        Ok(weight.into())
    } else {
        Err(RoutingError::InvalidParameter {
            name: "loss weight",
            expected: "finite",
            value: weight.into(),
        })
    }
}

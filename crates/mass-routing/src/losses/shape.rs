//! Losses on the shape of the routing distribution.

use ndarray::{Array2, ArrayView2, ArrayViewMut2};
use statrs::function::beta::{beta_reg, ln_beta};

use super::{add_softmax_row, finite_weight, in_use, probabilities};
use crate::gate::{finite, finite_logits, same};
use crate::usage::x_log_x;
use crate::{RoutingError, RoutingPlan};

/// Up to here the distribution function is within 1e-9.
const MOST_ALPHA: f64 = 1e5;

/// Adds the gradient of logits to `d_logits`, given the softmax (`N x K`) and the gradient of it.
///
/// # Errors
/// Shapes that differ.
pub fn softmax_backward(
    probabilities: ArrayView2<'_, f32>,
    d_probabilities: ArrayView2<'_, f32>,
    d_logits: &mut ArrayViewMut2<'_, f32>,
) -> Result<(), RoutingError> {
    let (n, k) = probabilities.dim();
    for (what, (rows, columns)) in [
        (
            "d_probabilities (tokens, then experts)",
            d_probabilities.dim(),
        ),
        ("d_logits (tokens, then experts)", d_logits.dim()),
    ] {
        same(what, n, rows)?;
        same(what, k, columns)?;
    }
    for ((r, g), d) in probabilities
        .outer_iter()
        .zip(d_probabilities.outer_iter())
        .zip(d_logits.outer_iter_mut())
    {
        add_softmax_row(r, g.iter().map(|&g| g.into()), 1.0, d);
    }
    Ok(())
}

/// Router z-loss: the mean over tokens of `(ln sum_e exp(logit_e))^2` over the experts in use.
///
/// Keeps logits small. Its gradient is `2 / N` times the log-sum-exp times the softmax.
///
/// # Source
/// Zoph et al., "ST-MoE", arXiv 2202.08906.
///
/// # Errors
/// Shapes that differ, a NaN or infinite logit in use, no expert in use, or a gradient that f32 does not hold.
pub fn router_z(
    logits: ArrayView2<'_, f32>,
    mask: Option<&[bool]>,
    weight: f32,
    d_logits: &mut ArrayViewMut2<'_, f32>,
) -> Result<f64, RoutingError> {
    let weight = finite_weight(weight)?;
    let (n, k) = logits.dim();
    same("rows of d_logits (tokens)", n, d_logits.nrows())?;
    same("columns of d_logits (experts)", k, d_logits.ncols())?;
    let used = in_use(mask, k)?;
    // All rows before the first adds its gradient.
    finite_logits(logits, mask)?;
    let mut loss = 0.0;
    let mut gradient = Array2::<f32>::zeros((n, k));
    for (row, mut d) in logits.outer_iter().zip(gradient.outer_iter_mut()) {
        let max = used
            .iter()
            .map(|&e| f64::from(row[e]))
            .fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = used.iter().map(|&e| (f64::from(row[e]) - max).exp()).sum();
        let z = max + sum.ln();
        loss += z * z / n as f64;
        for &e in &used {
            let r = (f64::from(row[e]) - max).exp() / sum;
            d[e] = (weight * 2.0 * z * r / n as f64) as f32;
        }
    }
    finite("gradient of the router z-loss", &gradient)?;
    *d_logits += &gradient;
    Ok(loss)
}

/// Entropy loss: the mean over tokens of `-sum_e r_e ln r_e`, in nats.
///
/// Minimising it makes routing decisive, which keeps Top-p from spreading over many experts.
///
/// # Source
/// Huang et al., arXiv 2403.07652: Top-p with p = 0.4, raw weights, `1e-2` times the balance loss and `1e-4` times this.
///
/// # Errors
/// A shape that does not fit the plan, or a plan without probabilities.
pub fn routing_entropy(
    plan: &RoutingPlan,
    weight: f32,
    d_logits: &mut ArrayViewMut2<'_, f32>,
) -> Result<f64, RoutingError> {
    let weight = finite_weight(weight)?;
    let r = probabilities(plan, d_logits)?;
    let n = r.nrows() as f64;
    let mut loss = 0.0;
    for (row, mut d) in r.outer_iter().zip(d_logits.outer_iter_mut()) {
        let entropy = -row.iter().map(|&r| x_log_x(r.into())).sum::<f64>();
        loss += entropy / n;
        for (d, &r) in d.iter_mut().zip(row) {
            let r = f64::from(r);
            *d -= (weight * (x_log_x(r) + r * entropy) / n) as f32;
        }
    }
    Ok(loss)
}

/// Dirichlet-prior shaping: the distance between the batch's routing probabilities and a Dirichlet prior, expert by expert.
///
/// # Formula
/// With the `n` probabilities of expert `e` over the batch sorted ascending and `F_e` the distribution function of
/// `Beta(alpha_e, A - alpha_e)`, `A = sum alpha` over the experts in use (the marginal of `Dirichlet(alpha)`),
///
/// `loss = mean_e mean_i (i / n - F_e(r_(i),e))^2`, `i = 1..n`.
///
/// The mean over experts is this crate's choice; the order of the sorted values is not differentiated (it changes only where two are
/// equal). Where a probability is exactly 0 or 1 the density may be infinite; its gradient is taken as zero there.
///
/// # Source
/// arXiv 2510.01185.
///
/// # Errors
/// A shape that does not fit the plan, a plan without probabilities, an `alpha` not positive and finite for an expert in use, alphas
/// of a sum beyond 1e5 (a prior as narrow as that cannot be computed well), or fewer than two experts in use.
pub fn dirichlet_prior(
    plan: &RoutingPlan,
    alpha: &[f64],
    weight: f32,
    d_logits: &mut ArrayViewMut2<'_, f32>,
) -> Result<f64, RoutingError> {
    let weight = finite_weight(weight)?;
    let r = probabilities(plan, d_logits)?;
    same("alpha per expert", plan.num_experts(), alpha.len())?;
    let used: Vec<usize> = (0..alpha.len()).filter(|&e| plan.in_use()[e]).collect();
    if let Some(&e) = used
        .iter()
        .find(|&&e| !(alpha[e] > 0.0 && alpha[e].is_finite()))
    {
        return Err(RoutingError::InvalidParameter {
            name: "alpha",
            expected: "positive and finite",
            value: alpha[e],
        });
    }
    if used.len() < 2 {
        return Err(RoutingError::Undefined(
            "a Dirichlet prior needs two experts in use",
        ));
    }
    let n = r.nrows();
    if n == 0 {
        return Ok(0.0);
    }
    let mut d_r = Array2::<f32>::zeros(r.dim());
    let mut loss = 0.0;
    let share = 1.0 / (n as f64 * used.len() as f64);
    for &e in &used {
        // Not the total less its own, which would round to zero beside a large one.
        let others = used.iter().filter(|&&o| o != e).map(|&o| alpha[o]);
        let (a, b) = (alpha[e], others.sum::<f64>());
        if a + b > MOST_ALPHA {
            return Err(RoutingError::InvalidParameter {
                name: "alpha",
                expected: "of a sum of at most 1e5",
                value: a + b,
            });
        }
        let column = r.column(e);
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by(|&s, &t| column[s].total_cmp(&column[t]));
        for (i, t) in order.into_iter().enumerate() {
            let p = f64::from(column[t]).min(1.0);
            let gap = (i + 1) as f64 / n as f64 - beta_reg(a, b, p);
            loss += gap * gap * share;
            if p > 0.0 && p < 1.0 {
                let density = ((a - 1.0) * p.ln() + (b - 1.0) * (-p).ln_1p() - ln_beta(a, b)).exp();
                d_r[(t, e)] = (-2.0 * weight * gap * density * share) as f32;
            }
        }
    }
    finite("gradient of the Dirichlet prior", &d_r)?;
    softmax_backward(r, d_r.view(), d_logits)?;
    Ok(loss)
}

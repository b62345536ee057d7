//! Losses that even out the load of experts.

use std::f64::consts::{PI, SQRT_2};

use ndarray::{Array1, Array2, ArrayView2, ArrayViewMut2};
#[cfg(feature = "serde")]
use serde::{Deserialize, Serialize};
use statrs::function::erf::erfc;

use super::{add_softmax_row, finite_weight, in_use, probabilities};
use crate::gate::{finite, same};
use crate::{RoutingError, RoutingPlan};

/// Which tokens count as an expert's in [`gshard_balance`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(
    feature = "serde",
    derive(Serialize, Deserialize),
    serde(rename_all = "snake_case")
)]
pub enum BalanceCount {
    /// Those whose most probable expert it is (GShard, GMoE).
    #[default]
    First,
    /// Those that selected it (Switch; Huang et al. with Top-p).
    Selected,
}

/// GShard's balance loss, `K / N^2 sum_e c_e sum_t r_{t,e}`.
///
/// `K` counts the experts in use and `c_e` the tokens of expert `e` (see [`BalanceCount`]), which is not differentiated. One when tokens
/// and probabilities are spread evenly over single experts.
///
/// # Source
/// Lepikhin et al., arXiv 2006.16668; the form is that of Tutel, which GMoE uses.
///
/// # Errors
/// A shape that does not fit the plan, or a plan without probabilities.
pub fn gshard_balance(
    plan: &RoutingPlan,
    count: BalanceCount,
    weight: f32,
    d_logits: &mut ArrayViewMut2<'_, f32>,
) -> Result<f64, RoutingError> {
    gshard_balance_among(plan, count, weight, d_logits, |_| Ok(()))
}

/// [`gshard_balance`] of a batch of which this process has routed a part.
///
/// `sum` adds what all processes have to what it is given; with that the gradient is that of the whole loss by the logits of this
/// part, times the number of all tokens over that of this part's: the mean of the parts' gradients, weighted by their tokens, is the
/// gradient of the whole. The value is this part's summand of the loss.
///
/// # Errors
/// As there, and those of `sum`.
pub fn gshard_balance_among<E: From<RoutingError>>(
    plan: &RoutingPlan,
    count: BalanceCount,
    weight: f32,
    d_logits: &mut ArrayViewMut2<'_, f32>,
    sum: impl FnOnce(&mut [f64]) -> Result<(), E>,
) -> Result<f64, E> {
    let weight = finite_weight(weight)?;
    let r = probabilities(plan, d_logits)?;
    let (n, k) = r.dim();
    let mut counts = vec![0.0_f64; k + 1];
    counts[k] = n as f64;
    match count {
        BalanceCount::First => {
            for row in r.outer_iter() {
                let first = row.iter().enumerate().fold((0, 0.0_f32), |best, (e, &r)| {
                    if r > best.1 { (e, r) } else { best }
                });
                // A skipped token has a row of zeros and no first expert.
                if first.1 > 0.0 {
                    counts[first.0] += 1.0;
                }
            }
        }
        BalanceCount::Selected => counts
            .iter_mut()
            .take(k)
            .enumerate()
            .for_each(|(e, c)| *c = plan.load(e) as f64),
    }
    sum(&mut counts)?;
    if n == 0 {
        return Ok(0.0);
    }
    let all = counts.pop().unwrap_or_default();
    let used = plan.in_use().iter().filter(|&&u| u).count();
    let scale = used as f64 / (all * all);
    let weight = weight * (all / n as f64);
    let g: Vec<f64> = counts.iter().map(|c| c * scale).collect();
    let mut loss = 0.0;
    for (row, d) in r.outer_iter().zip(d_logits.outer_iter_mut()) {
        let parts = row.iter().zip(&g).map(|(&r, g)| f64::from(r) * g);
        loss += parts.sum::<f64>();
        add_softmax_row(row, g.iter().copied(), weight, d);
    }
    Ok(loss)
}

/// Squared coefficient of variation `var / (mean^2 + 1e-10)` (variance with `K - 1`) and its gradient per entry.
fn variation(values: &[f64]) -> (f64, Vec<f64>) {
    let k = values.len() as f64;
    if values.len() < 2 {
        return (0.0, vec![0.0; values.len()]);
    }
    let mean = values.iter().sum::<f64>() / k;
    let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (k - 1.0);
    let below = mean * mean + 1e-10;
    let gradient = values
        .iter()
        .map(|v| 2.0 * (v - mean) / (k - 1.0) / below - variance * 2.0 * mean / k / (below * below))
        .collect();
    (variance / below, gradient)
}

/// Importance loss: the squared coefficient of variation over experts of `sum_t score_{t,e}`.
///
/// `var / (mean^2 + 1e-10)` with the unbiased variance over the experts in use; a single expert has loss zero. `scores` are `N x K`,
/// usually the softmax without noise; their gradient is added to `d_scores`.
///
/// # Source
/// Shazeer et al., arXiv 1701.06538, as in Tutel and GMoE (which halve the sum of this and [`load`] and weigh it by 0.01).
///
/// # Errors
/// A shape that does not fit, a score that is NaN or infinite, or no expert in use.
pub fn importance(
    scores: ArrayView2<'_, f32>,
    mask: Option<&[bool]>,
    weight: f32,
    d_scores: &mut ArrayViewMut2<'_, f32>,
) -> Result<f64, RoutingError> {
    importance_among(scores, mask, weight, d_scores, |_| Ok(()))
}

/// [`importance`] of a batch of which this process has a part: see [`gshard_balance_among`]. The value is that of the whole.
///
/// # Errors
/// As there, and those of `sum`.
pub fn importance_among<E: From<RoutingError>>(
    scores: ArrayView2<'_, f32>,
    mask: Option<&[bool]>,
    weight: f32,
    d_scores: &mut ArrayViewMut2<'_, f32>,
    sum: impl FnOnce(&mut [f64]) -> Result<(), E>,
) -> Result<f64, E> {
    let weight = finite_weight(weight)?;
    let (n, k) = scores.dim();
    same("rows of d_scores (tokens)", n, d_scores.nrows())?;
    same("columns of d_scores (experts)", k, d_scores.ncols())?;
    let used = in_use(mask, k)?;
    finite("scores", &scores)?;
    let mut sums: Vec<f64> = used
        .iter()
        .map(|&e| scores.column(e).iter().map(|&s| f64::from(s)).sum())
        .collect();
    let weight = weight * of_all(n, &mut sums, sum)?;
    if n == 0 {
        return Ok(0.0);
    }
    let (loss, gradient) = variation(&sums);
    for (&e, g) in used.iter().zip(gradient) {
        d_scores
            .column_mut(e)
            .iter_mut()
            .for_each(|d| *d += (weight * g) as f32);
    }
    Ok(loss)
}

/// Load loss: the squared coefficient of variation over experts of the expected number of tokens under fresh noise.
///
/// # Formula
/// `load_e = sum_t Phi((score_{t,e} - threshold_t) / std)` with `threshold_t` the `k`-th largest of the token's noisy scores, then
/// `var / (mean^2 + 1e-10)` over the experts in use. `scores` and `noisy_scores` are `N x K` (pass the same twice without noise);
/// both receive a gradient, the second through the threshold. Tutel and GMoE use `std = gate_noise / K`.
///
/// # Source
/// Shazeer et al., arXiv 1701.06538, as in Tutel and GMoE.
///
/// # Errors
/// A shape that does not fit, a score that is NaN or infinite, `k` of zero or above the experts in use, `std` not positive and
/// finite, or one so small that f32 does not hold the gradient.
#[expect(
    clippy::too_many_arguments,
    reason = "two inputs with a gradient each, and four settings"
)]
pub fn load(
    scores: ArrayView2<'_, f32>,
    noisy_scores: ArrayView2<'_, f32>,
    mask: Option<&[bool]>,
    k: usize,
    std: f64,
    weight: f32,
    d_scores: &mut ArrayViewMut2<'_, f32>,
    d_noisy_scores: &mut ArrayViewMut2<'_, f32>,
) -> Result<f64, RoutingError> {
    let whole = |_: &mut [f64]| Ok(());
    load_among(
        (scores, noisy_scores),
        mask,
        (k, std),
        weight,
        (d_scores, d_noisy_scores),
        whole,
    )
}

/// [`load`] of a batch of which this process has a part: see [`gshard_balance_among`]. The value is that of the whole. Scores and
/// noisy scores come together, and so do their gradients.
///
/// # Errors
/// As there, and those of `sum`.
pub fn load_among<E: From<RoutingError>>(
    (scores, noisy_scores): (ArrayView2<'_, f32>, ArrayView2<'_, f32>),
    mask: Option<&[bool]>,
    (k, std): (usize, f64),
    weight: f32,
    (d_scores, d_noisy_scores): (&mut ArrayViewMut2<'_, f32>, &mut ArrayViewMut2<'_, f32>),
    sum: impl FnOnce(&mut [f64]) -> Result<(), E>,
) -> Result<f64, E> {
    let weight = finite_weight(weight)?;
    let (n, experts) = scores.dim();
    for (what, (rows, columns)) in [
        ("noisy scores (tokens, then experts)", noisy_scores.dim()),
        ("d_scores (tokens, then experts)", d_scores.dim()),
        (
            "d_noisy_scores (tokens, then experts)",
            d_noisy_scores.dim(),
        ),
    ] {
        same(what, n, rows)?;
        same(what, experts, columns)?;
    }
    let used = in_use(mask, experts)?;
    if k == 0 {
        return Err(RoutingError::InvalidParameter {
            name: "k",
            expected: "at least 1",
            value: 0.0,
        }
        .into());
    }
    if k > used.len() {
        let available = used.len();
        return Err(RoutingError::TooFewExperts { k, available }.into());
    }
    if !(std > 0.0 && std.is_finite()) {
        return Err(RoutingError::InvalidParameter {
            name: "std",
            expected: "positive and finite",
            value: std,
        }
        .into());
    }
    finite("scores", &scores)?;
    finite("noisy scores", &noisy_scores)?;
    let mut order = used.clone();
    let mut threshold = Vec::with_capacity(n);
    let mut loads = vec![0.0_f64; used.len()];
    for (row, noisy) in scores.outer_iter().zip(noisy_scores.outer_iter()) {
        order.sort_unstable_by(|&a, &b| noisy[b].total_cmp(&noisy[a]).then(a.cmp(&b)));
        let at = order[k - 1];
        for (sum, &e) in loads.iter_mut().zip(&used) {
            *sum += normal_cdf(f64::from(row[e] - noisy[at]) / std);
        }
        threshold.push(at);
    }
    let weight = weight * of_all(n, &mut loads, sum)?;
    if n == 0 {
        return Ok(0.0);
    }
    let (loss, gradient) = variation(&loads);
    let (mut own, mut through) = (Array2::zeros((n, experts)), Array1::<f32>::zeros(n));
    for (t, &at) in threshold.iter().enumerate() {
        let mut sum = 0.0;
        for (&e, g) in used.iter().zip(&gradient) {
            let z = f64::from(scores[(t, e)] - noisy_scores[(t, at)]) / std;
            let density = (-0.5 * z * z).exp() / (std * (2.0 * PI).sqrt());
            own[(t, e)] = (weight * g * density) as f32;
            sum += g * density;
        }
        through[t] = (weight * sum) as f32;
    }
    finite("gradient of the scores", &own)?;
    finite("gradient of the noisy scores", &through)?;
    *d_scores += &own;
    for (t, (&at, through)) in threshold.iter().zip(through).enumerate() {
        d_noisy_scores[(t, at)] -= through;
    }
    Ok(loss)
}

/// Makes sums over this part's `n` tokens sums over all; returns all tokens over these.
fn of_all<E>(
    n: usize,
    sums: &mut Vec<f64>,
    sum: impl FnOnce(&mut [f64]) -> Result<(), E>,
) -> Result<f64, E> {
    sums.push(n as f64);
    sum(sums)?;
    let all = sums.pop().unwrap_or_default();
    Ok(all / n.max(1) as f64)
}

fn normal_cdf(z: f64) -> f64 {
    0.5 * erfc(-z / SQRT_2)
}

//! Losses on the weights of the gate.

use ndarray::{ArrayView1, ArrayView2, ArrayViewMut2};
#[cfg(feature = "serde")]
use serde::{Deserialize, Serialize};

use super::{finite_weight, in_use};
use crate::RoutingError;
use crate::gate::{SMALLEST_NORM, finite, same};

/// DynMoE's loss on expert embeddings: `||U^T U - I||_F + mean_e |w_e|`, `U` the columns `w_e` of `experts` divided by their norms.
///
/// Diverse: embeddings orthogonal; simple: embeddings short. Both terms run over the experts in use. `experts` is `d x K`.
///
/// # Source
/// Guo et al., arXiv 2405.14297 (weight 0.01 there).
///
/// # Errors
/// A shape that does not fit, an entry that is NaN or infinite, or no expert in use.
pub fn diverse_and_simple(
    experts: ArrayView2<'_, f32>,
    mask: Option<&[bool]>,
    weight: f32,
    d_experts: &mut ArrayViewMut2<'_, f32>,
) -> Result<f64, RoutingError> {
    let weight = finite_weight(weight)?;
    let (d, k) = experts.dim();
    same("rows of d_experts", d, d_experts.nrows())?;
    same("columns of d_experts (experts)", k, d_experts.ncols())?;
    let used = in_use(mask, k)?;
    finite("expert embeddings", &experts)?;
    let columns: Vec<(Vec<f64>, f64)> = used.iter().map(|&e| unit(experts.column(e))).collect();
    let count = used.len();
    let mut gap = vec![0.0_f64; count * count];
    for i in 0..count {
        for j in 0..count {
            gap[i * count + j] = dot(&columns[i].0, &columns[j].0) - if i == j { 1.0 } else { 0.0 };
        }
    }
    let diverse = gap.iter().map(|g| g * g).sum::<f64>().sqrt();
    let simple = columns.iter().map(|(_, norm)| norm).sum::<f64>() / count as f64;
    for (i, &e) in used.iter().enumerate() {
        let (u, norm) = &columns[i];
        let mut d_u = vec![0.0_f64; d];
        // At exactly orthogonal columns the norm has no derivative; zero is a subgradient, and torch's choice.
        if diverse > 0.0 {
            for (j, (v, _)) in columns.iter().enumerate() {
                let factor = 2.0 * gap[i * count + j] / diverse;
                d_u.iter_mut().zip(v).for_each(|(d, v)| *d += factor * v);
            }
        }
        let along = if *norm > SMALLEST_NORM {
            dot(&d_u, u)
        } else {
            0.0
        };
        for ((to, du), u) in d_experts.column_mut(e).iter_mut().zip(&d_u).zip(u) {
            *to +=
                (weight * ((du - along * u) / norm.max(SMALLEST_NORM) + u / count as f64)) as f32;
        }
    }
    Ok(diverse + simple)
}

/// Whether a loss over pairs is averaged or summed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(
    feature = "serde",
    derive(Serialize, Deserialize),
    serde(rename_all = "snake_case")
)]
pub enum Reduction {
    /// The mean over pairs.
    #[default]
    Mean,
    /// The sum over pairs.
    Sum,
}

/// Redundancy of chosen pairs of gate rows: mean or sum of `cos(w_i, w_j)^2`.
///
/// For a gate in one matrix, weighted and accumulated like the other losses here. (`mass_expand::redundancy_loss` is the same for rows
/// that lie in separate allocations, beside the rest of what a split takes.)
///
/// `gate` is `K x d`. Pushes an expert and its duplicate apart. The gradient is exactly zero while two rows are equal, so something
/// else has to part them first. No pairs: loss zero. A row of zeros has cosine zero with everything.
///
/// # Source
/// Park & Park, arXiv 2512.19765: mean over duplicated pairs, weight 0.01.
///
/// # Errors
/// A shape that does not fit, a pair out of range or of an expert with itself, or an entry that is NaN or infinite.
pub fn redundancy(
    gate: ArrayView2<'_, f32>,
    pairs: &[(usize, usize)],
    reduction: Reduction,
    weight: f32,
    d_gate: &mut ArrayViewMut2<'_, f32>,
) -> Result<f64, RoutingError> {
    let weight = finite_weight(weight)?;
    let (k, d) = gate.dim();
    same("rows of d_gate (experts)", k, d_gate.nrows())?;
    same("columns of d_gate", d, d_gate.ncols())?;
    finite("gate rows", &gate)?;
    if let Some(&(i, j)) = pairs.iter().find(|&&(i, j)| i >= k || j >= k || i == j) {
        let expected = "two different experts of the gate";
        let value = if i >= k { i } else { j } as f64;
        return Err(RoutingError::InvalidParameter {
            name: "pair",
            expected,
            value,
        });
    }
    let scale = match reduction {
        Reduction::Mean => 1.0 / pairs.len().max(1) as f64,
        Reduction::Sum => 1.0,
    };
    let mut loss = 0.0;
    for &(i, j) in pairs {
        let ((u, un), (v, vn)) = (unit(gate.row(i)), unit(gate.row(j)));
        let cosine = dot(&u, &v);
        loss += scale * cosine * cosine;
        let factor = weight * scale * 2.0 * cosine;
        for (row, own, norm, other) in [(i, &u, un, &v), (j, &v, vn, &u)] {
            // At the bounded norm the division is by a constant.
            let along = if norm > SMALLEST_NORM { cosine } else { 0.0 };
            for ((to, own), other) in d_gate.row_mut(row).iter_mut().zip(own).zip(other) {
                *to += (factor * (other - along * own) / norm.max(SMALLEST_NORM)) as f32;
            }
        }
    }
    Ok(loss)
}

/// A vector divided by its norm, and the norm.
fn unit(v: ArrayView1<'_, f32>) -> (Vec<f64>, f64) {
    let norm = v.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    (
        v.iter()
            .map(|&x| f64::from(x) / norm.max(SMALLEST_NORM))
            .collect(),
        norm,
    )
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

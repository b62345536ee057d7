//! From token representations to logits: the gates that are more than one matrix product.
//!
//! A plain gate is `logits = x W^T`, which every framework has. These two normalise or bound the scores, and come with their
//! gradients.

mod cosine;
mod low_rank;

pub use cosine::{CosineForward, CosineGate, CosineGradients};
pub use low_rank::{LowRankForward, LowRankGate, LowRankGradients};

use ndarray::{Array2, ArrayBase, ArrayView1, ArrayView2, ArrayViewMut1, Axis, Data, Dimension};

use crate::RoutingError;
pub(crate) use crate::error::same;

/// Norms below this are taken as this, as `torch.nn.functional.normalize` does.
pub(crate) const SMALLEST_NORM: f64 = 1e-12;

pub(crate) fn finite<S: Data<Elem = f32>, D: Dimension>(
    what: &'static str,
    values: &ArrayBase<S, D>,
) -> Result<(), RoutingError> {
    match values.iter().enumerate().find(|(_, v)| !v.is_finite()) {
        Some((index, &v)) => Err(RoutingError::NonFinite {
            what,
            index,
            value: v.into(),
        }),
        None => Ok(()),
    }
}

/// Refuses a NaN or an infinity among the logits of the experts in use.
pub(crate) fn finite_logits(
    logits: ArrayView2<'_, f32>,
    mask: Option<&[bool]>,
) -> Result<(), RoutingError> {
    let bad = |&((_, e), l): &((usize, usize), &f32)| !l.is_finite() && mask.is_none_or(|m| m[e]);
    match logits.indexed_iter().find(bad) {
        Some(((token, expert), &value)) => Err(RoutingError::NonFiniteLogit {
            token,
            expert,
            value,
        }),
        None => Ok(()),
    }
}

/// A row's norm, where its squares overflow or vanish in f32 too.
fn norm(row: ArrayView1<'_, f32>) -> f64 {
    let norm = row.dot(&row).sqrt();
    if norm.is_finite() && norm > 1e-15 {
        norm.into()
    } else {
        let squares = row.iter().map(|&v| f64::from(v).powi(2));
        squares.sum::<f64>().sqrt()
    }
}

/// A row divided by a norm, which f32 may not hold.
fn divide(mut row: ArrayViewMut1<'_, f32>, norm: f64) {
    if norm <= f64::from(f32::MAX) {
        row /= norm as f32;
    } else {
        row.mapv_inplace(|v| (f64::from(v) / norm) as f32);
    }
}

/// Rows divided by their norms, and the norms (bounded from below).
fn unit_rows(a: ArrayView2<'_, f32>) -> (Array2<f32>, Vec<f64>) {
    let bounded = |row| norm(row).max(SMALLEST_NORM);
    let norms: Vec<f64> = a.outer_iter().map(bounded).collect();
    let mut unit = a.to_owned();
    for (row, &n) in unit.outer_iter_mut().zip(&norms) {
        divide(row, n);
    }
    (unit, norms)
}

/// Gradient of rows, given that of the rows divided by their norms.
fn unit_rows_backward(unit: &Array2<f32>, norms: &[f64], mut d_unit: Array2<f32>) -> Array2<f32> {
    for ((mut d, u), &n) in d_unit.outer_iter_mut().zip(unit.outer_iter()).zip(norms) {
        // At the bounded norm the division is by a constant.
        if n > SMALLEST_NORM {
            let along = d.dot(&u);
            d.scaled_add(-along, &u);
        }
        divide(d, n);
    }
    d_unit
}

fn column_sums(a: &Array2<f32>) -> ndarray::Array1<f32> {
    a.sum_axis(Axis(0))
}

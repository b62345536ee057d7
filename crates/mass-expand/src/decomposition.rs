//! The gradient of a duplicated expert, divided into the part along its weights and the rest.
//!
//! # Formula
//! Whole matrix: `aligned = (<G, W> / <W, W>) W`. Row by row: `aligned_i = (g_i . w_i) / (w_i . w_i + 1e-12) w_i`.
//! The rejected part is `G - aligned`.
//!
//! # Which variant does what
//! In the step of a duplication the newcomer gets the source's full gradient and the source keeps the aligned part.
//! `paper` projects the first matrix as a whole; `reference` projects the first matrix and the gate row, each row by
//! row, and leaves the second matrix and the biases alone (for a gate row, one row is the whole matrix, up to the
//! 1e-12). `calibrated` and `ours` need none of it: they `bisect`, whose halves differ from the start.

use serde::{Deserialize, Serialize};

use crate::{ExpandError, sweep};

/// How a gradient is projected onto its weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decomposition {
    /// One coefficient for the whole matrix (`paper`).
    Whole,
    /// One coefficient for each row, with 1e-12 added to the denominator (`reference`).
    Rowwise,
}

/// The reference adds this to `w_i . w_i`, so that a zero row gives zero and not NaN.
const ROW_EPSILON: f64 = 1e-12;

/// Replaces a gradient by its component along the weights.
///
/// `shape` is `(rows, columns)`, both slices row-major. Where the weights (or a row of them) are zero the aligned part
/// is zero. Row by row takes one pass over memory; the whole matrix needs its coefficient first, so it takes one pass to
/// read and one to write.
///
/// # Errors
/// [`ExpandError::Empty`], [`ExpandError::Shape`], and [`ExpandError::NonFinite`] if gradient or weight holds a NaN or
/// an infinity, or the part along the weights a value beyond f32. In the last case `Whole` leaves the gradient as it was
/// and `Rowwise` has projected the rows before the bad one.
///
/// # Examples
/// ```
/// use mass_expand::{Decomposition, project_onto_weights};
/// let mut gradient = [1.0, 1.0, 1.0, 1.0];
/// project_onto_weights(&mut gradient, &[2.0, 0.0, 0.0, 0.0], (2, 2), Decomposition::Rowwise)?;
/// assert_eq!(gradient, [1.0, 0.0, 0.0, 0.0]);
/// # Ok::<(), mass_expand::ExpandError>(())
/// ```
pub fn project_onto_weights(
    gradient: &mut [f32],
    weight: &[f32],
    shape: (usize, usize),
    decomposition: Decomposition,
) -> Result<(), ExpandError> {
    check_shape("gradient", gradient.len(), shape)?;
    check_shape("weight", weight.len(), shape)?;
    match decomposition {
        Decomposition::Whole => {
            let coefficient = whole_coefficient(gradient, weight)?;
            sweep::write_scaled(weight, coefficient, gradient);
            Ok(())
        }
        Decomposition::Rowwise => sweep::dispatch(
            #[inline(always)]
            || {
                for (g, w) in gradient
                    .chunks_exact_mut(shape.1)
                    .zip(weight.chunks_exact(shape.1))
                {
                    let coefficient = row_coefficient(sweep::projection_kernel(g, w), w)?;
                    sweep::scale_kernel(w, coefficient, g);
                }
                Ok(())
            },
        ),
    }
}

/// Divides the gradient between a source and its newcomer: the newcomer gets all of it, the source keeps the part along
/// its weights (all of it too, if `decomposition` is `None`: plain cloning).
///
/// One pass over memory row by row; see [`project_onto_weights`] for the whole matrix.
///
/// # Errors
/// As [`project_onto_weights`].
pub fn divide_gradient(
    source_gradient: &mut [f32],
    newcomer_gradient: &mut [f32],
    weight: &[f32],
    shape: (usize, usize),
    decomposition: Option<Decomposition>,
) -> Result<(), ExpandError> {
    check_shape("source gradient", source_gradient.len(), shape)?;
    check_shape("newcomer gradient", newcomer_gradient.len(), shape)?;
    check_shape("weight", weight.len(), shape)?;
    match decomposition {
        None => newcomer_gradient.copy_from_slice(source_gradient),
        Some(Decomposition::Whole) => {
            let coefficient = whole_coefficient(source_gradient, weight)?;
            newcomer_gradient.copy_from_slice(source_gradient);
            sweep::write_scaled(weight, coefficient, source_gradient);
        }
        Some(Decomposition::Rowwise) => sweep::dispatch(
            #[inline(always)]
            || {
                let rows = source_gradient
                    .chunks_exact_mut(shape.1)
                    .zip(newcomer_gradient.chunks_exact_mut(shape.1))
                    .zip(weight.chunks_exact(shape.1));
                for ((g, n), w) in rows {
                    let coefficient = row_coefficient(sweep::projection_kernel(g, w), w)?;
                    n.copy_from_slice(g);
                    sweep::scale_kernel(w, coefficient, g);
                }
                Ok::<(), ExpandError>(())
            },
        )?,
    }
    Ok(())
}

/// Writes both parts of a gradient beside it: `aligned` along the weights, `rejected = gradient - aligned`.
///
/// # Errors
/// As [`project_onto_weights`].
///
/// # Examples
/// ```
/// use mass_expand::{Decomposition, decompose};
/// let (mut aligned, mut rejected) = ([0.0; 2], [0.0; 2]);
/// decompose(&[3.0, 4.0], &[1.0, 0.0], (1, 2), Decomposition::Whole, &mut aligned, &mut rejected)?;
/// assert_eq!((aligned, rejected), ([3.0, 0.0], [0.0, 4.0]));
/// # Ok::<(), mass_expand::ExpandError>(())
/// ```
pub fn decompose(
    gradient: &[f32],
    weight: &[f32],
    shape: (usize, usize),
    decomposition: Decomposition,
    aligned: &mut [f32],
    rejected: &mut [f32],
) -> Result<(), ExpandError> {
    check_shape("gradient", gradient.len(), shape)?;
    check_shape("rejected part", rejected.len(), shape)?;
    check_shape("aligned part", aligned.len(), shape)?;
    aligned.copy_from_slice(gradient);
    project_onto_weights(aligned, weight, shape, decomposition)?;
    for ((r, &g), &a) in rejected.iter_mut().zip(gradient).zip(aligned.iter()) {
        *r = g - a;
    }
    Ok(())
}

fn whole_coefficient(gradient: &[f32], weight: &[f32]) -> Result<f64, ExpandError> {
    let (gw, ww) = sweep::dispatch(
        #[inline(always)]
        || sweep::projection_kernel(gradient, weight),
    );
    check_finite(gw, ww)?;
    held(if ww > 0.0 { gw / ww } else { 0.0 }, ww, weight)
}

#[inline(always)]
fn row_coefficient((gw, ww): (f64, f64), weight: &[f32]) -> Result<f64, ExpandError> {
    check_finite(gw, ww)?;
    held(gw / (ww + ROW_EPSILON), ww, weight)
}

/// A coefficient of weights, if f32 holds what it makes of each.
#[inline(always)]
fn held(coefficient: f64, ww: f64, weight: &[f32]) -> Result<f64, ExpandError> {
    const MOST: f64 = f32::MAX as f64;
    // Where their norm would fit, each does.
    let fits = coefficient * coefficient * ww <= MOST * MOST
        || weight
            .iter()
            .all(|&w| (coefficient * f64::from(w)).abs() <= MOST);
    match fits {
        true => Ok(coefficient),
        false => Err(ExpandError::NonFinite {
            what: "projection in f32",
        }),
    }
}

#[inline(always)]
fn check_finite(gw: f64, ww: f64) -> Result<(), ExpandError> {
    if !ww.is_finite() {
        return Err(ExpandError::NonFinite { what: "weight" });
    }
    // Finite weights leave only the gradient: NaN and infinity survive every product, with zero too.
    if !gw.is_finite() {
        return Err(ExpandError::NonFinite { what: "gradient" });
    }
    Ok(())
}

fn check_shape(what: &'static str, got: usize, shape: (usize, usize)) -> Result<(), ExpandError> {
    if shape.0 == 0 || shape.1 == 0 {
        return Err(ExpandError::Empty { what });
    }
    let expected = shape.0.saturating_mul(shape.1);
    if got == expected {
        Ok(())
    } else {
        Err(ExpandError::Shape {
            what,
            got,
            expected,
        })
    }
}

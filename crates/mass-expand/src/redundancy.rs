//! The redundancy loss, which pushes the gate rows of duplicated experts apart.
//!
//! # Formula
//! `L_red = sum over pairs (i, j) of c_ij^2`, `c_ij = cos(w_i, w_j)` of gate rows, or its mean over the pairs, and
//! `d c_ij^2 / d w_i = 2 c_ij (w_j / (|w_i| |w_j|) - c_ij w_i / |w_i|^2)`.
//!
//! At exactly equal rows the gradient is zero: the loss has its maximum there. The first decomposed update must
//! therefore make the rows differ before this loss can act.
//!
//! `mass_routing::losses::redundancy` is the same for a gate in one matrix.
//!
//! # Which variant does what
//! `paper` takes the mean, `reference` the sum, both with weight 0.01 and only while the layer may still expand. The
//! sum grows with the number of pairs, the mean does not; `calibrated` and `ours` take the mean.

use serde::{Deserialize, Serialize};

use crate::alignment::check_products;
use crate::{ExpandError, sweep};

/// How the pairs' terms are joined.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reduction {
    /// Mean over the pairs (`paper`, `calibrated`, `ours`).
    Mean,
    /// Sum over the pairs (`reference`).
    Sum,
}

/// The redundancy loss of the gate rows named by `pairs`.
///
/// `rows` holds one slice of the model dimension per expert; the rows may live in separate allocations. No pairs give a
/// loss of zero. A pair with a zero row has no cosine and adds nothing.
///
/// # Errors
/// [`ExpandError::Pair`] if a pair does not name two different rows, [`ExpandError::Shape`] if its rows differ in
/// length, [`ExpandError::Empty`] if they have none, [`ExpandError::NonFinite`].
///
/// # Examples
/// ```
/// use mass_expand::{Reduction, redundancy_loss};
/// let rows: [&[f32]; 3] = [&[1.0, 0.0], &[2.0, 0.0], &[0.0, 1.0]];
/// assert_eq!(redundancy_loss(&rows, &[(0, 1), (0, 2)], Reduction::Sum)?, 1.0);
/// assert_eq!(redundancy_loss(&rows, &[(0, 1), (0, 2)], Reduction::Mean)?, 0.5);
/// # Ok::<(), mass_expand::ExpandError>(())
/// ```
pub fn redundancy_loss(
    rows: &[&[f32]],
    pairs: &[(usize, usize)],
    reduction: Reduction,
) -> Result<f64, ExpandError> {
    let mut sum = 0.0;
    for &(i, j) in pairs {
        if let Some(pair) = Pair::of(rows, i, j)? {
            sum += pair.cosine * pair.cosine;
        }
    }
    Ok(sum * scale(pairs, reduction))
}

/// Adds `weight` times the gradient of the redundancy loss to the rows' gradients and returns the loss (not multiplied
/// by `weight`).
///
/// # Errors
/// As [`redundancy_loss`], and [`ExpandError::Shape`] if the gradients do not match the rows, and
/// [`ExpandError::Parameter`] if `weight` is not finite. On an error no gradient has been touched.
///
/// # Examples
/// ```
/// use mass_expand::{Reduction, redundancy_gradient};
/// let rows: [&[f32]; 2] = [&[1.0, 0.0], &[1.0, 1.0]];
/// let (mut first, mut second) = ([0.0; 2], [0.0; 2]);
/// let loss = redundancy_gradient(
///     &rows, &[(0, 1)], Reduction::Mean, 0.01, &mut [&mut first, &mut second],
/// )?;
/// assert!((loss - 0.5).abs() < 1e-12);
/// assert!(first[1] > 0.0 && second[1] < 0.0); // stepping against the gradient opens the angle
/// # Ok::<(), mass_expand::ExpandError>(())
/// ```
pub fn redundancy_gradient(
    rows: &[&[f32]],
    pairs: &[(usize, usize)],
    reduction: Reduction,
    weight: f64,
    gradients: &mut [&mut [f32]],
) -> Result<f64, ExpandError> {
    check_weight(weight)?;
    if gradients.len() != rows.len() {
        return Err(ExpandError::Shape {
            what: "list of gradients",
            got: gradients.len(),
            expected: rows.len(),
        });
    }
    for (gradient, row) in gradients.iter().zip(rows) {
        if gradient.len() != row.len() {
            return Err(ExpandError::Shape {
                what: "gradient of a gate row",
                got: gradient.len(),
                expected: row.len(),
            });
        }
    }
    let loss = redundancy_loss(rows, pairs, reduction)?;
    let scale = weight * scale(pairs, reduction);
    for &(i, j) in pairs {
        if let Some(pair) = Pair::of(rows, i, j)? {
            let (cross, own) = pair.factors(scale);
            add(gradients[i], cross, rows[j], own.0, rows[i]);
            add(gradients[j], cross, rows[i], own.1, rows[j]);
        }
    }
    Ok(loss)
}

/// A part of the gradient that [`redundancy_gradient`] adds: `factor` times a row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RedundancyShare {
    /// The row whose gradient it is added to.
    pub gradient: usize,
    /// The row that is added.
    pub row: usize,
    /// What it is multiplied with.
    pub factor: f64,
}

/// What [`redundancy_gradient`] would return and add, of rows that lie elsewhere, such as on a GPU: of each pair `(i, j)` there
/// are the inner products `<w_i, w_i>`, `<w_i, w_j>` and `<w_j, w_j>`.
///
/// # Errors
/// [`ExpandError::Shape`] if there are not as many products as pairs, [`ExpandError::Pair`] if a pair names one row twice,
/// [`ExpandError::NonFinite`], and [`ExpandError::Parameter`] if `weight` is not finite or a square is negative.
///
/// # Examples
/// ```
/// use mass_expand::{Reduction, redundancy_shares};
/// // Rows (1, 0) and (1, 1).
/// let (loss, shares) = redundancy_shares(&[[1.0, 1.0, 2.0]], &[(0, 1)], Reduction::Mean, 1.0)?;
/// assert!((loss - 0.5).abs() < 1e-12 && shares.len() == 4);
/// # Ok::<(), mass_expand::ExpandError>(())
/// ```
pub fn redundancy_shares(
    products: &[[f64; 3]],
    pairs: &[(usize, usize)],
    reduction: Reduction,
    weight: f64,
) -> Result<(f64, Vec<RedundancyShare>), ExpandError> {
    check_weight(weight)?;
    if products.len() != pairs.len() {
        return Err(ExpandError::Shape {
            what: "list of products",
            got: products.len(),
            expected: pairs.len(),
        });
    }
    let (mut sum, mut shares) = (0.0, Vec::with_capacity(4 * pairs.len()));
    let scale = scale(pairs, reduction);
    for (&(i, j), &of) in pairs.iter().zip(products) {
        if i == j {
            let (first, second, rows) = (i, j, pairs.len());
            return Err(ExpandError::Pair {
                first,
                second,
                rows,
            });
        }
        if let Some(pair) = Pair::of_products(of)? {
            sum += pair.cosine * pair.cosine;
            let (cross, own) = pair.factors(weight * scale);
            for (gradient, row, factor) in
                [(i, j, cross), (i, i, -own.0), (j, i, cross), (j, j, -own.1)]
            {
                shares.push(RedundancyShare {
                    gradient,
                    row,
                    factor,
                });
            }
        }
    }
    Ok((sum * scale, shares))
}

fn check_weight(weight: f64) -> Result<(), ExpandError> {
    match weight.is_finite() {
        true => Ok(()),
        false => Err(ExpandError::Parameter {
            name: "weight",
            value: weight,
            expected: "a finite number",
        }),
    }
}

struct Pair {
    cosine: f64,
    norms: (f64, f64),
}

impl Pair {
    /// What the gradient of `scale c²` has of the other row, and takes off of each own row.
    fn factors(&self, scale: f64) -> (f64, (f64, f64)) {
        let (first, second) = self.norms;
        let cross = 2.0 * scale * self.cosine / first / second;
        let own = 2.0 * scale * self.cosine * self.cosine;
        (cross, (own / first / first, own / second / second))
    }

    fn of(rows: &[&[f32]], i: usize, j: usize) -> Result<Option<Self>, ExpandError> {
        let (a, b) = match (rows.get(i), rows.get(j)) {
            (Some(a), Some(b)) if i != j => (*a, *b),
            _ => {
                return Err(ExpandError::Pair {
                    first: i,
                    second: j,
                    rows: rows.len(),
                });
            }
        };
        if a.is_empty() {
            return Err(ExpandError::Empty { what: "gate row" });
        }
        if a.len() != b.len() {
            return Err(ExpandError::Shape {
                what: "gate row",
                got: b.len(),
                expected: a.len(),
            });
        }
        let (aa, ab, bb) = sweep::moments(a, b);
        Self::of_products([aa, ab, bb])
    }

    /// Of `<a, a>`, `<a, b>` and `<b, b>`.
    fn of_products([aa, ab, bb]: [f64; 3]) -> Result<Option<Self>, ExpandError> {
        check_products([("gate row", aa), ("gate row", bb)], ab)?;
        if aa == 0.0 || bb == 0.0 {
            return Ok(None);
        }
        let norms = (aa.sqrt(), bb.sqrt());
        Ok(Some(Self {
            cosine: (ab / norms.0 / norms.1).clamp(-1.0, 1.0),
            norms,
        }))
    }
}

fn scale(pairs: &[(usize, usize)], reduction: Reduction) -> f64 {
    match reduction {
        Reduction::Mean => 1.0 / pairs.len().max(1) as f64,
        Reduction::Sum => 1.0,
    }
}

/// `gradient += cross * other - own * row`, joined in `f64` so that equal rows cancel exactly enough.
fn add(gradient: &mut [f32], cross: f64, other: &[f32], own: f64, row: &[f32]) {
    sweep::dispatch(
        #[inline(always)]
        || {
            for ((g, &o), &r) in gradient.iter_mut().zip(other).zip(row) {
                *g += (cross * f64::from(o) - own * f64::from(r)) as f32;
            }
        },
    );
}

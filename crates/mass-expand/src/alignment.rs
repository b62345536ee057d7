//! The semantic alignment test: does an expert's gradient still point along its weights?
//!
//! # Formula
//! `c = <G, W> / (|G|_F |W|_F)` over the whole first matrix of the expert, `h x d`. The expert has drifted if
//! `|c| < delta`.
//!
//! # Which variant does what
//! `paper` and `reference` use `delta = 0.001` whatever the shape. For two random directions in `n = h d` dimensions
//! `c` is close to normal with standard deviation `1 / sqrt(n)`, so the fixed threshold lets almost every random
//! direction pass in a large matrix and almost none in a small one. [`AlignmentThreshold::Scaled`], `delta = c0 / sqrt(h d)`, lets
//! the same fraction pass at every size; no variant uses it: `calibrated` and `ours` have no such test.

use serde::{Deserialize, Serialize};

use crate::{ExpandError, sweep};

/// Inner product, norms and cosine of a gradient with its weights.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Alignment {
    /// `<G, W>`.
    pub dot: f64,
    /// Frobenius norm of the gradient.
    pub gradient_norm: f64,
    /// Frobenius norm of the weights.
    pub weight_norm: f64,
    /// `<G, W> / (|G| |W|)`, within `[-1, 1]`; absent if either norm is zero, because a zero vector has no direction.
    pub cosine: Option<f64>,
}

impl Alignment {
    /// From the inner products `<G, G>`, `<G, W>` and `<W, W>` of a gradient and weights that lie elsewhere, such as on a
    /// GPU.
    ///
    /// # Errors
    /// [`ExpandError::NonFinite`] if one is not finite, [`ExpandError::Parameter`] if a square is negative, or the
    /// inner product is larger than that of two vectors with these norms can be.
    ///
    /// # Examples
    /// ```
    /// let of = mass_expand::Alignment::of_products(25.0, 24.0, 25.0)?;
    /// assert_eq!(of, mass_expand::alignment(&[3.0, 4.0], &[4.0, 3.0])?);
    /// # Ok::<(), mass_expand::ExpandError>(())
    /// ```
    pub fn of_products(gg: f64, gw: f64, ww: f64) -> Result<Self, ExpandError> {
        check_products([("gradient", gg), ("weight", ww)], gw)?;
        let (gradient_norm, weight_norm) = (gg.sqrt(), ww.sqrt());
        // Sums of f32 on a device are rounded, and more so the more there are of them.
        if gw.abs() > 1.01 * gradient_norm * weight_norm {
            return Err(ExpandError::Parameter {
                name: "inner product",
                value: gw,
                expected: "at most the product of the norms",
            });
        }
        let cosine =
            (gg > 0.0 && ww > 0.0).then(|| (gw / gradient_norm / weight_norm).clamp(-1.0, 1.0));
        Ok(Self {
            dot: gw,
            gradient_norm,
            weight_norm,
            cosine,
        })
    }
}

/// Checks two vectors' squares and their inner product.
pub(crate) fn check_products(
    squares: [(&'static str, f64); 2],
    product: f64,
) -> Result<(), ExpandError> {
    for (what, square) in squares {
        if !square.is_finite() {
            return Err(ExpandError::NonFinite { what });
        }
        if square < 0.0 {
            return Err(ExpandError::Parameter {
                name: "square of a norm",
                value: square,
                expected: "at least 0",
            });
        }
    }
    if !product.is_finite() {
        return Err(ExpandError::NonFinite {
            what: "inner product",
        });
    }
    Ok(())
}

/// Computes the [`Alignment`] of a gradient with the weights it belongs to, in one pass over both.
///
/// # Errors
/// [`ExpandError::Empty`] for no elements, [`ExpandError::Shape`] for different lengths, [`ExpandError::NonFinite`] if
/// either holds a NaN or an infinity. A zero gradient or a zero weight matrix is no error: the cosine is absent.
///
/// # Examples
/// ```
/// let a = mass_expand::alignment(&[3.0, 4.0], &[4.0, 3.0])?;
/// assert_eq!(a.dot, 24.0);
/// assert_eq!(a.cosine, Some(24.0 / 25.0));
/// assert_eq!(mass_expand::alignment(&[0.0, 0.0], &[4.0, 3.0])?.cosine, None);
/// # Ok::<(), mass_expand::ExpandError>(())
/// ```
pub fn alignment(gradient: &[f32], weight: &[f32]) -> Result<Alignment, ExpandError> {
    if gradient.is_empty() {
        return Err(ExpandError::Empty { what: "gradient" });
    }
    if weight.len() != gradient.len() {
        return Err(ExpandError::Shape {
            what: "weight",
            got: weight.len(),
            expected: gradient.len(),
        });
    }
    let (gg, gw, ww) = sweep::moments(gradient, weight);
    Alignment::of_products(gg, gw, ww)
}

/// The `delta` below which `|c|` counts as drift.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum AlignmentThreshold {
    /// The same `delta` for every shape (`paper`, `reference`: 0.001).
    Absolute(f64),
    /// `delta = c0 / sqrt(hidden * dim)`: the same fraction of random directions at every shape (no named variant).
    Scaled {
        /// `delta` in units of the standard deviation of a random direction's cosine.
        c0: f64,
    },
}

impl AlignmentThreshold {
    /// The threshold for a matrix of `hidden` rows and `dim` columns.
    ///
    /// # Errors
    /// [`ExpandError::Parameter`] if the setting is not a positive finite number, [`ExpandError::Empty`] if the matrix
    /// has no elements.
    ///
    /// # Examples
    /// ```
    /// use mass_expand::AlignmentThreshold;
    /// assert_eq!(AlignmentThreshold::Absolute(0.001).delta(1024, 4096)?, 0.001);
    /// assert_eq!(AlignmentThreshold::Scaled { c0: 2.0 }.delta(64, 256)?, 2.0 / 128.0);
    /// # Ok::<(), mass_expand::ExpandError>(())
    /// ```
    pub fn delta(&self, hidden: usize, dim: usize) -> Result<f64, ExpandError> {
        self.validate()?;
        if hidden == 0 || dim == 0 {
            return Err(ExpandError::Empty {
                what: "weight matrix",
            });
        }
        Ok(match *self {
            Self::Absolute(delta) => delta,
            Self::Scaled { c0 } => c0 / (hidden as f64 * dim as f64).sqrt(),
        })
    }

    pub(crate) fn validate(&self) -> Result<(), ExpandError> {
        let (name, value) = match *self {
            Self::Absolute(delta) => ("delta", delta),
            Self::Scaled { c0 } => ("c0", c0),
        };
        if value.is_finite() && value > 0.0 {
            Ok(())
        } else {
            Err(ExpandError::Parameter {
                name,
                value,
                expected: "a positive finite number",
            })
        }
    }
}

//! Segmentation of a recorded series, with a p-value for each change point. Needs the feature `offline`.
//!
//! Two methods, on one-dimensional ndarray views:
//!
//! * [`PeltParams`]: the segmentation of least penalised cost, found exactly.
//! * [`BinarySegmentationParams`]: one split after another, as long as a maximum-CUSUM test over windows of many
//!   lengths rejects; its family-wise level is stated.
//!
//! # The p-value of a change point
//! With its two neighbouring segments together of `m` points, `S` their cumulative sums and `omega^2` the long-run
//! variance of the residuals of the whole segmentation,
//!
//! ```text
//! T = max_j |S_j - (j / m) S_m| / (omega sqrt(m))      p = 2 sum_j (-1)^(j-1) exp(-2 j^2 T^2)
//! ```
//!
//! the probability that a Brownian bridge goes as far. The change point was chosen by looking at the same data, so
//! for [`PeltParams`] this ranks the change points rather than tests them.
//!
//! # Sources
//! Killick, Fearnhead & Eckley, JASA 107 (2012) for PELT; Kovacs, Li, Buhlmann & Munk, Biometrika 110 (2023)
//! for the windows; Andrews & Monahan, Econometrica 60 (1992) for the long-run variance.

mod binary;
mod pelt;
mod test;

use ndarray::ArrayView1;
use serde::{Deserialize, Serialize};

pub use binary::{BinarySegmentation, BinarySegmentationParams};
pub use pelt::{Cost, Pelt, PeltParams, Penalty};

use crate::CpdError;

/// A change point of a recorded series.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ChangePoint {
    /// 0-based index of the first point after the change.
    pub index: usize,
    /// How surely there is one; see the [module's documentation](self).
    pub p_value: f64,
}

/// A series cut into segments.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Segmentation {
    /// The change points, in order.
    pub change_points: Vec<ChangePoint>,
    /// Number of points of the series.
    pub len: usize,
}

impl Segmentation {
    /// Indices of the change points.
    #[must_use]
    pub fn indices(&self) -> Vec<usize> {
        self.change_points.iter().map(|c| c.index).collect()
    }

    /// The segments, as ranges of indices.
    ///
    /// # Examples
    /// ```
    /// use mass_cpd::offline::{ChangePoint, Segmentation};
    ///
    /// let cut = Segmentation {
    ///     change_points: vec![ChangePoint { index: 4, p_value: 0.01 }],
    ///     len: 10,
    /// };
    /// assert_eq!(cut.segments(), [0..4, 4..10]);
    /// ```
    #[must_use]
    pub fn segments(&self) -> Vec<std::ops::Range<usize>> {
        let mut edges = vec![0];
        edges.extend(self.indices());
        edges.push(self.len);
        edges.windows(2).map(|e| e[0]..e[1]).collect()
    }

    /// From indices, with the p-value of each.
    fn new(y: &[f64], indices: Vec<usize>) -> Self {
        let omega = test::long_run_deviation(y, &indices);
        let edges: Vec<usize> = std::iter::once(0)
            .chain(indices.iter().copied())
            .chain([y.len()])
            .collect();
        let change_points = edges
            .windows(3)
            .map(|e| ChangePoint {
                index: e[1],
                p_value: test::bridge_p_value(test::max_cusum(&y[e[0]..e[2]]).0 / omega),
            })
            .collect();
        Self {
            change_points,
            len: y.len(),
        }
    }
}

/// Largest value whose squares can be summed over any series.
const LARGEST: f64 = 1e100;

/// The series as a slice around zero, or why it cannot be used.
fn centred(series: ArrayView1<'_, f64>, needed: usize) -> Result<Vec<f64>, CpdError> {
    if series.len() < needed {
        return Err(CpdError::TooShort {
            got: series.len(),
            needed,
        });
    }
    let mut largest = 0.0f64;
    for (i, &value) in series.iter().enumerate() {
        crate::error::require_finite(value, i as u64)?;
        if value.abs() > LARGEST {
            return Err(CpdError::TooLarge {
                count: i as u64 + 1,
                value,
                limit: LARGEST,
            });
        }
        largest = largest.max(value.abs());
    }
    let anchor = series[0];
    let mean = anchor + series.iter().map(|x| x - anchor).sum::<f64>() / series.len() as f64;
    let y: Vec<f64> = series.iter().map(|x| x - mean).collect();
    // What is left of a constant series is rounding noise.
    if y.iter().all(|v| v.abs() <= 1e-14 * largest) {
        return Ok(vec![0.0; y.len()]);
    }
    Ok(y)
}

/// `sum (y - mean)^2` of every stretch, by prefix sums.
struct Prefix {
    sum: Vec<f64>,
    square: Vec<f64>,
}

impl Prefix {
    fn new(y: &[f64]) -> Self {
        let (mut sum, mut square) = (vec![0.0], vec![0.0]);
        let (mut a, mut b) = (0.0, 0.0);
        for v in y {
            a += v;
            b += v * v;
            sum.push(a);
            square.push(b);
        }
        Self { sum, square }
    }
}

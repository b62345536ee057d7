//! Segmentation of a recorded series, with a p-value for each change point. Needs the feature `offline`.
//!
//! On one-dimensional ndarray views:
//!
//! * [`PeltParams`]: the segmentation of least penalised cost, found exactly. The default for a series of which nothing is
//!   known; its penalty comes from the noise.
//! * [`BinarySegmentationParams`]: one split after another, as long as a maximum-CUSUM test over windows of many
//!   lengths rejects; its family-wise level is stated.
//! * [`SegmentNeighbourhoodParams`]: the best segmentation with a given number of change points, found exactly.
//! * [`PenaltyPathParams`]: the best segmentations for all penalties of an interval.
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
//! this ranks the change points rather than tests them, but for [`BinarySegmentationParams`], which corrects for it.
//!
//! # Sources
//! Killick, Fearnhead & Eckley, JASA 107 (2012) for PELT; Auger & Lawrence, Bulletin of Mathematical Biology 51 (1989)
//! for the segment neighbourhood; Haynes, Eckley & Fearnhead, JCGS 26 (2017) for the path of penalties; Zhang & Siegmund,
//! Biometrics 63 (2007) for `3 log n`; Lazarus, Lewis, Stock & Watson, JBES 36 (2018) for the cosines; Kovacs, Li,
//! Buhlmann & Munk, Biometrika 110 (2023) for the windows; Andrews & Monahan, Econometrica 60 (1992) for the
//! long-run variance of the p-values.

mod binary;
mod cost;
mod double;
mod ladder;
mod neighbourhood;
mod noise;
mod path;
mod pelt;
mod series;
mod test;

use serde::{Deserialize, Serialize};

pub use binary::{BinarySegmentation, BinarySegmentationParams};
pub use cost::Cost;
pub use neighbourhood::{SegmentNeighbourhood, SegmentNeighbourhoodParams};
pub use path::{PenaltyPath, PenaltyPathParams, PenaltyRange};
pub use pelt::{Pelt, PeltParams, Penalty};

use series::{Series, edges};

/// A change point of a recorded series.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ChangePoint {
    /// 0-based index of the first point after the change.
    pub index: usize,
    /// How surely there is one; see the [module's documentation](self).
    pub p_value: f64,
}

/// What the values of a segment are like.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct SegmentSummary {
    /// Their mean.
    pub mean: f64,
    /// Their standard deviation, `sqrt(sum (y - mean)^2 / (m - 1))` for `m` points and zero for one.
    pub deviation: f64,
}

/// A series cut into segments.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Segmentation {
    /// The change points, in order.
    pub change_points: Vec<ChangePoint>,
    /// Number of points of the series.
    pub len: usize,
    /// Mean and spread of each segment: one more than change points.
    pub summaries: Vec<SegmentSummary>,
    /// What each change point cost, where the method has a penalty.
    pub penalty: Option<f64>,
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
    /// use mass_cpd::offline::PeltParams;
    /// use ndarray::array;
    ///
    /// let series = array![0.0, 0.2, 0.1, 0.0, 0.1, 5.1, 5.0, 5.2, 5.0, 5.2];
    /// let cut = PeltParams::default().check()?.segment(series.view())?;
    /// assert_eq!(cut.segments(), [0..5, 5..10]);
    /// assert!((cut.summaries[1].mean - 5.1).abs() < 1e-12);
    /// # Ok::<(), mass_cpd::CpdError>(())
    /// ```
    #[must_use]
    pub fn segments(&self) -> Vec<std::ops::Range<usize>> {
        edges(&self.indices(), self.len)
            .windows(2)
            .map(|e| e[0]..e[1])
            .collect()
    }

    /// From indices, with the p-value of each.
    fn new(series: &Series, indices: &[usize], penalty: Option<f64>) -> Self {
        let y = &series.y;
        let omega = test::long_run_deviation(y, indices);
        let change_points = edges(indices, y.len())
            .windows(3)
            .map(|e| ChangePoint {
                index: e[1],
                p_value: test::bridge_p_value(test::max_cusum(&y[e[0]..e[2]]).0 / omega),
            })
            .collect();
        Self::with(series, change_points, penalty)
    }

    /// From change points, with the summaries.
    fn with(series: &Series, change_points: Vec<ChangePoint>, penalty: Option<f64>) -> Self {
        let mut cut = Self {
            change_points,
            len: series.len(),
            summaries: Vec::new(),
            penalty,
        };
        cut.summaries = cut
            .segments()
            .into_iter()
            .map(|range| {
                let (mean, square) = series::mean_and_square(&series.y[range.clone()]);
                SegmentSummary {
                    mean: series.median() + mean,
                    deviation: (square / (range.len() as f64 - 1.0).max(1.0)).sqrt(),
                }
            })
            .collect();
        cut
    }
}

//! The best segmentation with a given number of change points.

use ndarray::ArrayView1;
use serde::{Deserialize, Serialize};

use super::{
    Segmentation,
    cost::{Cost, Costs},
    pelt::require_segment,
    series::Series,
};
use crate::{CpdError, error::require};

/// Unchecked parameters of [`SegmentNeighbourhood`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SegmentNeighbourhoodParams {
    /// What a segment costs.
    pub cost: Cost,
    /// Number of change points.
    pub changes: usize,
    /// Least number of points of a segment, at least 1, and 2 where the spread is fitted.
    pub min_segment: usize,
}

impl Default for SegmentNeighbourhoodParams {
    fn default() -> Self {
        Self {
            cost: Cost::Level,
            changes: 1,
            min_segment: 5,
        }
    }
}

impl SegmentNeighbourhoodParams {
    /// Makes the method.
    ///
    /// # Errors
    /// [`CpdError::Parameter`] when `min_segment` is too small for the cost, or when so many segments cannot be counted.
    pub fn check(&self) -> Result<SegmentNeighbourhood, CpdError> {
        require_segment(self.min_segment, self.cost)?;
        let points = self
            .changes
            .checked_add(1)
            .and_then(|segments| segments.checked_mul(self.min_segment));
        require(
            points.is_some(),
            "changes",
            self.changes as f64,
            "small enough for its segments' points to be counted",
        )?;
        Ok(SegmentNeighbourhood { params: *self })
    }
}

/// The segmentation of least cost among those with a given number of change points, found exactly.
///
/// # Formula
/// With `F_k(t)` the least cost of the first `t` points with `k` change points,
///
/// ```text
/// F_k(t) = min_s F_(k-1)(s) + cost(s, t)
/// ```
///
/// over starts `s <= t - min_segment`. A start is given up at `t` once `F_(k-1)(s) + cost(s, t) >= F_(k-1)(t)`. Without pruning
/// that is `changes * n^2 / 2` costs; it takes memory for `changes * n` indices.
///
/// # Examples
/// ```
/// use mass_cpd::offline::SegmentNeighbourhoodParams;
/// use ndarray::Array1;
///
/// let series: Array1<f64> = (0..90)
///     .map(|t| [0.0, 3.0, 1.0][t / 30] + f64::from(t as u32 * 37 % 11) / 11.0)
///     .collect();
/// let two = SegmentNeighbourhoodParams { changes: 2, ..Default::default() }.check()?;
/// assert_eq!(two.segment(series.view())?.indices(), [30, 60]);
/// // All numbers up to two at the price of the last.
/// let each = two.segment_each(series.view())?;
/// assert_eq!(each[1].indices(), [30]);
/// # Ok::<(), mass_cpd::CpdError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SegmentNeighbourhood {
    params: SegmentNeighbourhoodParams,
}

impl SegmentNeighbourhood {
    /// The parameters it was made with.
    #[must_use]
    pub fn params(&self) -> &SegmentNeighbourhoodParams {
        &self.params
    }

    /// Cuts a series at as many change points as were asked for.
    ///
    /// # Errors
    /// [`CpdError::TooShort`] when it has fewer than `(changes + 1) * min_segment` points; [`CpdError::NonFinite`] or
    /// [`CpdError::TooLarge`] for a value that cannot be used. Leave missing values out before.
    pub fn segment(&self, series: ArrayView1<'_, f64>) -> Result<Segmentation, CpdError> {
        let series = self.series(series)?;
        let all = self.all(&series);
        // There is room for every number up to the one asked for.
        let last = all.last().map_or(&[][..], Vec::as_slice);
        Ok(Segmentation::new(&series, last, None))
    }

    /// The best segmentation for each number of change points, from none to the one asked for.
    ///
    /// # Errors
    /// As [`SegmentNeighbourhood::segment`].
    pub fn segment_each(&self, series: ArrayView1<'_, f64>) -> Result<Vec<Segmentation>, CpdError> {
        let series = self.series(series)?;
        let cut = |indices: &Vec<usize>| Segmentation::new(&series, indices, None);
        Ok(self.all(&series).iter().map(cut).collect())
    }

    fn series(&self, series: ArrayView1<'_, f64>) -> Result<Series, CpdError> {
        let needed = (self.params.changes + 1) * self.params.min_segment;
        Series::new(series, needed)
    }

    fn all(&self, series: &Series) -> Vec<Vec<usize>> {
        let least = self.params.min_segment;
        Costs::new(series, self.params.cost, least).best_of_each_number(self.params.changes, least)
    }
}

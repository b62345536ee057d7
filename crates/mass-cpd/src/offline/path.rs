//! The segmentations for all penalties of an interval.

use ndarray::ArrayView1;
use serde::{Deserialize, Serialize};

use super::{
    Segmentation,
    cost::{Cost, Costs, Total},
    pelt::{require_resolved, require_segment},
    series::Series,
};
use crate::{CpdError, error::require};

/// Unchecked parameters of [`PenaltyPath`].
///
/// The penalties are in the units of the cost, so there is no default for them.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PenaltyPathParams {
    /// What a segment costs.
    #[serde(default)]
    pub cost: Cost,
    /// The least penalty, over 0.
    pub least: f64,
    /// The largest penalty, at least the least.
    pub most: f64,
    /// Least number of points of a segment, at least 1, and 2 where the spread is fitted.
    #[serde(default = "five")]
    pub min_segment: usize,
}

fn five() -> usize {
    5
}

impl PenaltyPathParams {
    /// Changes of level with penalties from `least` to `most`, at least five points a segment.
    #[must_use]
    pub fn between(least: f64, most: f64) -> Self {
        Self {
            cost: Cost::default(),
            least,
            most,
            min_segment: five(),
        }
    }

    /// Makes the method.
    ///
    /// # Errors
    /// [`CpdError::Parameter`] for the first parameter that is out of the range its field states.
    pub fn check(&self) -> Result<PenaltyPath, CpdError> {
        require(
            self.least > 0.0 && self.least.is_finite(),
            "least",
            self.least,
            "finite and over 0",
        )?;
        require(
            self.most >= self.least && self.most.is_finite(),
            "most",
            self.most,
            "finite and at least `least`",
        )?;
        require_segment(self.min_segment, self.cost)?;
        Ok(PenaltyPath { params: *self })
    }
}

/// The penalties for which a segmentation is the best.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PenaltyRange {
    /// The least such penalty.
    pub from: f64,
    /// The largest such penalty.
    pub to: f64,
    /// Cost of the segments, penalties left out.
    pub cost: f64,
    /// The segmentation; its `penalty` is `from`.
    pub segmentation: Segmentation,
}

/// The segmentations of least penalised cost for all penalties of an interval (CROPS).
///
/// # Method
/// Between penalties that gave `a` and `b` change points with costs `Q_a` and `Q_b`, another segmentation can be best
/// only if it is at the penalty where these two tie, `(Q_b - Q_a) / (a - b)`. PELT is run there, and so on in
/// both halves until nothing new is found. That takes up to two runs for each segmentation found.
///
/// A number of change points that is best for no penalty is not found; [`SegmentNeighbourhood`](super::SegmentNeighbourhood)
/// has those too.
///
/// # Examples
/// ```
/// use mass_cpd::offline::PenaltyPathParams;
/// use ndarray::Array1;
///
/// let series: Array1<f64> = (0..90)
///     .map(|t| [0.0, 3.0, 1.0][t / 30] + f64::from(t as u32 * 37 % 11) / 11.0)
///     .collect();
/// let path = PenaltyPathParams::between(2.0, 1000.0).check()?.segment(series.view())?;
/// // From the least penalty to the largest: fewer and fewer change points.
/// let numbers: Vec<usize> =
///     path.iter().map(|p| p.segmentation.change_points.len()).collect();
/// assert_eq!(numbers, [2, 1, 0]);
/// // Two change points are best over a wide range of penalties.
/// assert!(path[0].to > 10.0 * path[0].from);
/// # Ok::<(), mass_cpd::CpdError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PenaltyPath {
    params: PenaltyPathParams,
}

impl PenaltyPath {
    /// The parameters it was made with.
    #[must_use]
    pub fn params(&self) -> &PenaltyPathParams {
        &self.params
    }

    /// Cuts a series in every way that is best for some penalty, most change points first.
    ///
    /// # Errors
    /// As [`Pelt::segment`](super::Pelt::segment) with the least penalty.
    pub fn segment(&self, series: ArrayView1<'_, f64>) -> Result<Vec<PenaltyRange>, CpdError> {
        let PenaltyPathParams {
            cost,
            least,
            most,
            min_segment,
        } = self.params;
        let series = Series::new(series, min_segment)?;
        let costs = Costs::new(&series, cost, min_segment);
        require_resolved(&costs, least)?;
        let run = |penalty: f64| {
            let indices = costs.best(penalty, min_segment);
            (costs.total(&indices), indices)
        };
        let mut found = vec![run(least)];
        // Intervals still to be looked into, the leftmost last.
        let mut right = vec![run(most)];
        while let (Some(a), Some(b)) = (found.last(), right.last()) {
            let fewer = b.1.len();
            if a.1.len() <= fewer {
                // Rounding can make the one at the larger penalty no smaller: they are the same.
                right.pop();
                continue;
            }
            let middle = (a.1.len() > fewer + 1).then(|| run(tie(a, b)));
            match middle {
                Some(c) if c.1.len() > fewer && c.1.len() < a.1.len() => right.push(c),
                _ => found.extend(right.pop()),
            }
        }
        let mut from = least;
        let mut path = Vec::with_capacity(found.len());
        for (i, (total, indices)) in found.iter().enumerate() {
            let to = found
                .get(i + 1)
                .map_or(most, |next| tie(&found[i], next).clamp(from, most));
            path.push(PenaltyRange {
                from,
                to,
                cost: total.value(),
                segmentation: Segmentation::new(&series, indices, Some(from)),
            });
            from = to;
        }
        Ok(path)
    }
}

/// The penalty at which both cost the same.
fn tie(a: &(Total, Vec<usize>), b: &(Total, Vec<usize>)) -> f64 {
    b.0.minus(a.0) / (a.1.len() - b.1.len()) as f64
}

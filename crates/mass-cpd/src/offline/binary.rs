//! Binary segmentation by the maximum CUSUM over windows of many lengths.

use ndarray::ArrayView1;
use serde::{Deserialize, Serialize};

use super::{
    ChangePoint, Cost, Segmentation,
    cost::Costs,
    noise,
    series::{Series, edges, mean_and_square},
    test::{bridge_p_value, long_run_deviation, max_cusum},
};
use crate::{CpdError, error::require};

/// Unchecked parameters of [`BinarySegmentation`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BinarySegmentationParams {
    /// Probability of finding any change point in a series without one, in (0, 0.5].
    pub alpha: f64,
    /// Least number of points of a segment, at least 2.
    pub min_segment: usize,
}

impl Default for BinarySegmentationParams {
    fn default() -> Self {
        Self {
            alpha: 0.05,
            min_segment: 5,
        }
    }
}

impl BinarySegmentationParams {
    /// Makes the method.
    ///
    /// # Errors
    /// [`CpdError::Parameter`] when `alpha` is not in (0, 0.5] or `min_segment` is under 2.
    pub fn check(&self) -> Result<BinarySegmentation, CpdError> {
        require(
            self.alpha > 0.0 && self.alpha <= 0.5,
            "alpha",
            self.alpha,
            "in (0, 0.5]",
        )?;
        require(
            self.min_segment >= 2,
            "min_segment",
            self.min_segment as f64,
            "at least 2",
        )?;
        Ok(BinarySegmentation { params: *self })
    }
}

/// Binary segmentation with a stated level.
///
/// # Method
/// The series is covered by seeded windows: of its whole length, then of lengths smaller by a factor `sqrt(2)` each,
/// overlapping by half. A window whose CUSUM `T` (see the [module's documentation](super)) has a p-value that times the
/// number of windows is at most `alpha` holds a change. The narrowest such window is cut at its largest CUSUM, then
/// the narrowest of those that the cut does not run through, and so on: a narrow window holds one change, and a wide one
/// over a staircase has its largest CUSUM anywhere. In the end each cut is moved to the largest CUSUM between
/// its neighbours. The p-values reported are the windows', adjusted. The long-run variance is that of the
/// residuals of the default [`PeltParams`](super::PeltParams) segmentation, and for a window that varies more than they do
/// around its own two means by as much larger: a few heavy-tailed values in a narrow window are no change.
///
/// # Examples
/// ```
/// use mass_cpd::offline::BinarySegmentationParams;
/// use ndarray::Array1;
///
/// let series: Array1<f64> = (0..300)
///     .map(|t| if (100..200).contains(&t) { 1.0 } else { 0.0 } + f64::from(t * 37 % 11) / 11.0)
///     .collect();
/// let found = BinarySegmentationParams::default().check()?.segment(series.view())?;
/// assert_eq!(found.indices(), [100, 200]);
/// # Ok::<(), mass_cpd::CpdError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BinarySegmentation {
    params: BinarySegmentationParams,
}

impl BinarySegmentation {
    /// The parameters it was made with.
    #[must_use]
    pub fn params(&self) -> &BinarySegmentationParams {
        &self.params
    }

    /// Cuts a series.
    ///
    /// # Errors
    /// [`CpdError::TooShort`] when it has fewer than two segments' points; [`CpdError::NonFinite`] or
    /// [`CpdError::TooLarge`] for a value that cannot be used. Leave missing values out before.
    pub fn segment(&self, series: ArrayView1<'_, f64>) -> Result<Segmentation, CpdError> {
        let least = self.params.min_segment;
        let shortest = least.saturating_mul(2);
        let series = Series::new(series, shortest)?;
        let y = &series.y;
        if series.is_constant() {
            return Ok(Segmentation::with(&series, Vec::new(), None));
        }
        let costs = Costs::new(&series, Cost::Level, least);
        let (_, rough) = noise::consistent(&costs, noise::LIMIT, least);
        let (variance, _) = series.moments();
        // Without any noise everything is a change, but for the rounding of sums.
        let omega = long_run_deviation(y, &rough).max(1e-10 * variance.sqrt());
        let windows = seeded_windows(y.len(), shortest);
        let number = windows.len() as f64;
        let usual = split_deviation(y, &rough);
        let mut holding: Vec<Holding> = Vec::new();
        for (start, end) in windows {
            let (cusum, at) = max_cusum(&y[start..end]);
            let wilder = split_deviation(&y[start..end], &[at]) / usual.max(f64::MIN_POSITIVE);
            let omega = omega * wilder.max(1.0);
            let p_value = (bridge_p_value(cusum / omega) * number).min(1.0);
            if p_value <= self.params.alpha {
                holding.push(Holding {
                    start,
                    end,
                    at: start + at,
                    cusum,
                    p_value,
                });
            }
        }
        // The narrowest first, of these the strongest.
        holding.sort_by(|a, b| {
            (a.end - a.start)
                .cmp(&(b.end - b.start))
                .then(b.cusum.total_cmp(&a.cusum))
                .then(a.start.cmp(&b.start))
        });
        let mut cuts: Vec<ChangePoint> = Vec::new();
        for window in holding {
            let inside = |c: &ChangePoint| window.start < c.index && c.index < window.end;
            let near = |edge: usize| edge.abs_diff(window.at) < least;
            let crowded = near(0) || near(y.len()) || cuts.iter().any(|c| near(c.index));
            if !cuts.iter().any(inside) && !crowded {
                cuts.push(ChangePoint {
                    index: window.at,
                    p_value: window.p_value,
                });
            }
        }
        cuts.sort_by_key(|c| c.index);
        for i in 0..cuts.len() {
            let left = if i == 0 { 0 } else { cuts[i - 1].index };
            let right = cuts.get(i + 1).map_or(y.len(), |c| c.index);
            let at = left + max_cusum(&y[left..right]).1;
            if at - left >= least && right - at >= least {
                cuts[i].index = at;
            }
        }
        Ok(Segmentation::with(&series, cuts, None))
    }
}

/// Standard deviation of what a segmentation leaves over.
fn split_deviation(y: &[f64], indices: &[usize]) -> f64 {
    let edges = edges(indices, y.len());
    let square: f64 = edges
        .windows(2)
        .map(|e| mean_and_square(&y[e[0]..e[1]]).1)
        .sum();
    let freedom = y.len() as f64 - (edges.len() - 1) as f64;
    (square / freedom.max(1.0)).sqrt()
}

/// A window that holds a change.
struct Holding {
    start: usize,
    end: usize,
    at: usize,
    cusum: f64,
    p_value: f64,
}

/// Windows of lengths `n 2^(-i/2)`, each shifted by about half its length, down to `least` points.
fn seeded_windows(n: usize, least: usize) -> Vec<(usize, usize)> {
    let mut windows = Vec::new();
    let mut length = n as f64;
    while length as usize >= least {
        let size = length as usize;
        let number = ((2.0 * n as f64 / length).ceil() as usize)
            .saturating_sub(1)
            .max(1);
        for i in 0..number {
            let last = n - size;
            let start = if number == 1 {
                0
            } else {
                i * last / (number - 1)
            };
            windows.push((start, start + size));
        }
        length /= std::f64::consts::SQRT_2;
    }
    windows
}

//! Optimal partitioning with pruning.

use ndarray::ArrayView1;
use serde::{Deserialize, Serialize};

use super::{Prefix, Segmentation, centred};
use crate::{CpdError, error::require};

/// What a segment costs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cost {
    /// `sum (y - mean)^2`: changes of level.
    #[default]
    Level,
    /// `m log(sum (y - mean)^2 / m)`: changes of level or spread (twice the negative Gaussian log-likelihood).
    LevelAndSpread,
}

/// What each change point costs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Penalty {
    /// `2 log n`, with [`Cost::Level`] times the series' variance and `(1 + phi) / (1 - phi)`, where `phi` is the
    /// series' first autocorrelation, within `[0, limit]`.
    ///
    /// Variance and autocorrelation are those of the whole series, changes included: a change has to stand out from
    /// everything else that the series does. The limit, in [0, 0.99], is there because a change of level is itself
    /// autocorrelation.
    Autocorrelated {
        /// The most autocorrelation that is allowed for.
        limit: f64,
    },
    /// This much, at least 0, in the units of the cost.
    Value(f64),
}

/// Unchecked parameters of [`Pelt`].
///
/// The default is meant for series of which nothing is known: changes of level, at least five points a segment, and
/// autocorrelation of up to 0.6 allowed for.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PeltParams {
    /// What a segment costs.
    pub cost: Cost,
    /// What a change point costs.
    pub penalty: Penalty,
    /// Least number of points of a segment, at least 1, and 2 where the spread is fitted.
    pub min_segment: usize,
}

impl Default for PeltParams {
    fn default() -> Self {
        Self {
            cost: Cost::Level,
            penalty: Penalty::Autocorrelated { limit: 0.6 },
            min_segment: 5,
        }
    }
}

impl PeltParams {
    /// Makes the method.
    ///
    /// # Errors
    /// [`CpdError::Parameter`] for the first parameter that is out of the range its field states.
    pub fn check(&self) -> Result<Pelt, CpdError> {
        match self.penalty {
            Penalty::Autocorrelated { limit } => {
                require(
                    (0.0..=0.99).contains(&limit),
                    "penalty.limit",
                    limit,
                    "in [0, 0.99]",
                )?;
            }
            Penalty::Value(value) => {
                require(
                    value >= 0.0 && value.is_finite(),
                    "penalty.value",
                    value,
                    "finite and at least 0",
                )?;
            }
        }
        let least = match self.cost {
            Cost::Level => 1,
            Cost::LevelAndSpread => 2,
        };
        require(
            self.min_segment >= least,
            "min_segment",
            self.min_segment as f64,
            "at least 1, and 2 where the spread is fitted",
        )?;
        Ok(Pelt { params: *self })
    }
}

/// The segmentation of least penalised cost, found exactly by pruned dynamic programming.
///
/// # Formula
/// Minimises `sum over segments of cost + penalty * (number of change points)` over all segmentations whose
/// segments have at least `min_segment` points. A start `s` is given up at `t` once
/// `F(s) + cost(s, t) >= F(t)`: whatever ends at or after `t + min_segment` is then no worse cut at `t`.
///
/// # Examples
/// ```
/// use mass_cpd::offline::PeltParams;
/// use ndarray::Array1;
///
/// let series: Array1<f64> =
///     (0..200).map(|t| if t < 120 { 0.0 } else { 3.0 } + f64::from(t * 37 % 11) / 11.0).collect();
/// let found = PeltParams::default().check()?.segment(series.view())?;
/// assert_eq!(found.indices(), [120]);
/// assert!(found.change_points[0].p_value < 1e-6);
/// # Ok::<(), mass_cpd::CpdError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pelt {
    params: PeltParams,
}

impl Pelt {
    /// The parameters it was made with.
    #[must_use]
    pub fn params(&self) -> &PeltParams {
        &self.params
    }

    /// Cuts a series.
    ///
    /// # Errors
    /// [`CpdError::TooShort`] when it has fewer than `min_segment` points, or none; [`CpdError::NonFinite`] or
    /// [`CpdError::TooLarge`] for a value that cannot be used. Leave missing values out before.
    pub fn segment(&self, series: ArrayView1<'_, f64>) -> Result<Segmentation, CpdError> {
        let y = centred(series, self.params.min_segment)?;
        let n = y.len() as f64;
        let square: f64 = y.iter().map(|v| v * v).sum();
        if square == 0.0 {
            return Ok(Segmentation {
                change_points: Vec::new(),
                len: y.len(),
            });
        }
        let penalty = match (self.params.penalty, self.params.cost) {
            (Penalty::Value(value), _) => value,
            (Penalty::Autocorrelated { limit }, cost) => {
                let product: f64 = y.windows(2).map(|v| v[0] * v[1]).sum();
                let phi = (product / square).clamp(0.0, limit);
                let scale = match cost {
                    Cost::Level => square / n,
                    Cost::LevelAndSpread => 1.0,
                };
                2.0 * n.ln() * scale * (1.0 + phi) / (1.0 - phi)
            }
        };
        let prefix = Prefix::new(&y);
        let indices = match self.params.cost {
            Cost::Level => search(&prefix, penalty, self.params.min_segment, |_, ss| ss),
            Cost::LevelAndSpread => {
                // A stretch of equal values would have infinite likelihood.
                let floor = (1e-8 * square / n).max(f64::MIN_POSITIVE);
                search(&prefix, penalty, self.params.min_segment, |m, ss| {
                    m * (ss / m).max(floor).ln()
                })
            }
        };
        Ok(Segmentation::new(&y, indices))
    }
}

/// A start that may still be best, beside what its cost needs.
#[derive(Clone, Copy)]
struct Start {
    at: usize,
    /// Least cost of all before it, penalties included.
    best: f64,
    sum: f64,
    square: f64,
    /// The end from which on it is given up.
    until: usize,
}

/// `cost` takes the number of points of a segment and its sum of squares around its mean.
fn search(
    prefix: &Prefix,
    penalty: f64,
    min_segment: usize,
    cost: impl Fn(f64, f64) -> f64,
) -> Vec<usize> {
    let n = prefix.sum.len() - 1;
    let mut best = vec![f64::INFINITY; n + 1];
    let mut from = vec![0; n + 1];
    best[0] = -penalty;
    let mut starts: Vec<Start> = Vec::new();
    let mut values: Vec<f64> = Vec::new();
    for end in min_segment..=n {
        let new = end - min_segment;
        // No segmentation ends at 1..min_segment.
        if best[new].is_finite() {
            starts.push(Start {
                at: new,
                best: best[new],
                sum: prefix.sum[new],
                square: prefix.square[new],
                until: usize::MAX,
            });
        }
        let (sum, square) = (prefix.sum[end], prefix.square[end]);
        values.clear();
        values.extend(starts.iter().map(|s| {
            let m = (end - s.at) as f64;
            let a = sum - s.sum;
            s.best + cost(m, (square - s.square - a * a / m).max(0.0))
        }));
        let (mut least, mut which) = (f64::INFINITY, 0);
        for (i, &v) in values.iter().enumerate() {
            if v < least {
                (least, which) = (v, i);
            }
        }
        best[end] = least + penalty;
        from[end] = starts[which].at;
        let limit = best[end];
        let mut kept = 0;
        for i in 0..starts.len() {
            let mut start = starts[i];
            if values[i] >= limit {
                start.until = start.until.min(end + min_segment);
            }
            // The next end is `end + 1`.
            if start.until > end + 1 {
                starts[kept] = start;
                kept += 1;
            }
        }
        starts.truncate(kept);
    }
    let mut indices = Vec::new();
    let mut end = n;
    while from[end] > 0 {
        end = from[end];
        indices.push(end);
    }
    indices.reverse();
    indices
}

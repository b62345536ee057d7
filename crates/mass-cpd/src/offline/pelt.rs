//! Optimal partitioning with pruning.

use ndarray::ArrayView1;
use serde::{Deserialize, Serialize};

use super::{
    Segmentation,
    cost::{Cost, Costs},
    noise,
    series::Series,
};
use crate::{CpdError, error::require};

/// What each change point costs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Penalty {
    /// `2.75 log n` times the long-run variance of the noise, in which changes do not count
    /// (with [`Cost::LevelAndSpread`] `3.75 log n` times its ratio to the variance).
    ///
    /// # Method
    /// Penalties are tried from the one that the median difference of neighbours asks for, in steps of a tenth or more,
    /// to the one that the series' whole variance asks for. One is *consistent* if the residuals of its
    /// segmentation ask for no more, where they ask for the largest of
    ///
    /// * their variance;
    /// * the mean square of the lowest `0.4 m^(2/3)` cosines of each segment of `m` points, an estimate of the long-run
    ///   variance that taking off the mean does not bias, raised as Student's distribution is wider than the normal;
    /// * the mean square of the first cosines alone: a slope or a random walk cut into steps still drifts in each.
    ///
    /// Of the consistent segmentations, and that of the last penalty, the one with the least
    /// `n log(residual variance) + 3 log n` a change point is the result. With [`Cost::LevelAndSpread`] residuals are in
    /// units of their segment's standard deviation, and their squares have to pass for noise as well.
    ///
    /// The last penalty is the variance of the whole series times `2.75 log n (1 + phi) / (1 - phi)`, with `phi` its first
    /// autocorrelation within `[0, limit]`, or times `2 n / 3` where that is less. Changes do enter there: it decides
    /// about series that no segmentation turns into noise, such as random walks. In them a change is what
    /// stands out from everything else, at least what explains twice as much as it leaves over.
    Autocorrelated {
        /// The most autocorrelation that is allowed for in the last penalty, in [0, 0.99].
        limit: f64,
    },
    /// This much, at least 0, in the units of the cost.
    Value(f64),
}

/// Unchecked parameters of [`Pelt`].
///
/// The default is meant for series of which nothing is known: changes of level, at least five points a segment, and
/// the penalty from the noise.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
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
            penalty: Penalty::Autocorrelated {
                limit: noise::LIMIT,
            },
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
        require_segment(self.min_segment, self.cost)?;
        Ok(Pelt { params: *self })
    }
}

/// Refuses a least segment that the cost cannot be fitted to.
pub(super) fn require_segment(min_segment: usize, cost: Cost) -> Result<(), CpdError> {
    require(
        min_segment >= cost.least(),
        "min_segment",
        min_segment as f64,
        "at least 1, and 2 where the spread is fitted",
    )
}

/// Refuses a penalty that the series' sums of squares drown.
pub(super) fn require_resolved(costs: &Costs<'_>, penalty: f64) -> Result<(), CpdError> {
    let resolution = costs.series.resolution();
    if costs.cost == Cost::Level && penalty > 0.0 && penalty < resolution {
        return Err(CpdError::LostInRounding {
            penalty,
            resolution,
        });
    }
    Ok(())
}

/// The segmentation of least penalised cost, found exactly by pruned dynamic programming.
///
/// # Formula
/// Minimises `sum over segments of cost + penalty * (number of change points)` over all segmentations whose
/// segments have at least `min_segment` points. A start `s` is given up at `t` once
/// `F(s) + cost(s, t) >= F(t)`: whatever ends at or after `t + min_segment` is then no worse cut at `t`.
///
/// Sums of squares are kept in pairs of `f64` where one would lose the penalty in its rounding.
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
/// assert!((found.summaries[1].mean - 3.45).abs() < 0.1);
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
    /// [`CpdError::TooLarge`] for a value that cannot be used; [`CpdError::LostInRounding`] where the squares of its
    /// values are some `10^28` times a penalty given as a value. Leave missing values out before.
    pub fn segment(&self, series: ArrayView1<'_, f64>) -> Result<Segmentation, CpdError> {
        let least = self.params.min_segment;
        let series = Series::new(series, least)?;
        let costs = Costs::new(&series, self.params.cost, least);
        let (penalty, indices) = match self.params.penalty {
            Penalty::Value(penalty) => {
                require_resolved(&costs, penalty)?;
                (penalty, costs.best(penalty, least))
            }
            Penalty::Autocorrelated { limit } => noise::consistent(&costs, limit, least),
        };
        Ok(Segmentation::new(&series, &indices, Some(penalty)))
    }
}

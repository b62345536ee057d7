//! Parameters of the calibrated CUSUM.

use serde::{Deserialize, Serialize};

use super::{calibration::Calibration, lagged::Shape};
use crate::{CalibratedCusum, CpdError, error::require};

/// What is monitored: the observation or its logarithm.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Transform {
    /// The observation as it is.
    #[default]
    Identity,
    /// Its natural logarithm: for positive quantities whose spread grows with their level, such as norms.
    Log,
}

/// What an observation is compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reference {
    /// Everything before it (Hawkins 1987): each prediction uses all earlier observations, and the warm-up only
    /// says from when on the evidence is summed.
    SelfStarting,
    /// The `window` observations that end `gap` before it: forgets an early transient and follows what moves
    /// slowly.
    Lagged {
        /// Length of the reference window, at least 8.
        window: usize,
        /// Observations between the window's end and the one judged: a change of fewer steps cannot enter its own
        /// reference.
        gap: usize,
    },
}

impl Reference {
    /// A window of 128 that ends 16 steps back.
    pub const LAGGED: Self = Self::Lagged {
        window: 128,
        gap: 16,
    };
}

/// Whether a slow drift of the level is part of the stream's normal behaviour.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Drift {
    /// A drift is a change, to be found.
    #[default]
    Keep,
    /// A straight line fitted to the reference is extended to the present and taken off.
    Remove,
}

/// Which changes of level raise an alarm.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// Rises.
    Up,
    /// Falls.
    Down,
    /// Either; the level is shared by the two sides.
    #[default]
    Both,
}

/// What a detector does with itself once it has raised an alarm.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AfterAlarm {
    /// Learns the stream anew from the next observation on, warm-up included: one change, one alarm.
    #[default]
    Relearn,
    /// Sets the sum of evidence back to zero and keeps the reference: a change that persists alarms again.
    Restart,
    /// Goes on unchanged: the alarm stays up for as long as the evidence does.
    Hold,
}

/// Unchecked parameters of [`CalibratedCusum`].
///
/// The default watches an autocorrelated stream for rises and falls of its level with a false-alarm probability
/// of 0.05 in 1000 steps.
///
/// # Examples
/// ```
/// use mass_cpd::{CalibratedCusumParams, Direction, Transform};
///
/// let detector = CalibratedCusumParams {
///     alpha: 0.01,
///     transform: Transform::Log,
///     direction: Direction::Up,
///     ..Default::default()
/// }
/// .check()?;
/// assert!(detector.threshold() > 5.0);
/// # Ok::<(), mass_cpd::CpdError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct CalibratedCusumParams {
    /// Steps over which the false-alarm probability is meant, at least 1.
    pub horizon: u64,
    /// Probability of a false alarm within the horizon, in (0, 0.5].
    pub alpha: f64,
    /// Allowance of the CUSUM in standard deviations, in [0.05, 3]: half the smallest shift worth finding.
    pub k: f64,
    /// Scores beyond this are counted as this much, over `k` and at most 100; `None` counts them in full. In a stream with outliers it takes
    /// several, not one, to make an alarm. The calibration knows of it: under the model a limit of 4 makes little difference for `k`
    /// up to 1. Where `n` scores at the limit just reach the threshold, `alpha` may lie in a jump of `p_N`: it is then not used up.
    pub score_limit: Option<f64>,
    /// What is monitored.
    pub transform: Transform,
    /// What it is compared with.
    pub reference: Reference,
    /// Whether a first-order autoregression is fitted to the reference and taken off.
    pub prewhiten: bool,
    /// Whether slow drift is taken off.
    pub drift: Drift,
    /// Which changes count.
    pub direction: Direction,
    /// Observations before the evidence is first summed, at least 8. A lagged reference waits for a full
    /// window and its gap as well.
    pub warmup: usize,
    /// What happens after an alarm.
    pub after_alarm: AfterAlarm,
}

impl Default for CalibratedCusumParams {
    fn default() -> Self {
        Self {
            horizon: 1000,
            alpha: 0.05,
            k: 0.5,
            score_limit: Some(4.0),
            transform: Transform::Identity,
            reference: Reference::SelfStarting,
            prewhiten: true,
            drift: Drift::Keep,
            direction: Direction::Both,
            warmup: 50,
            after_alarm: AfterAlarm::Relearn,
        }
    }
}

impl CalibratedCusumParams {
    /// A setting for the training loss and the gradient norms of a neural network, one of `streams` that are
    /// watched together with a probability of 0.05 of any false alarm in 1000 steps.
    ///
    /// Such streams are positive and skewed (logarithm), start with a transient (200 steps of warm-up, lagged
    /// reference), drift all through training (drift taken off) and wander by a standard deviation or so
    /// without a change of the data (allowance `k = 2`): only a sudden rise of several standard deviations, as
    /// a change of the data distribution makes in the loss, is a change.
    ///
    /// At a level per stream between about 0.023 and 0.052 the threshold is just over what one score at the limit reaches, and the probability of
    /// a false alarm 0.023.
    ///
    /// # Examples
    /// ```
    /// use mass_cpd::CalibratedCusumParams;
    ///
    /// // Eight experts, the layer as a whole, and the loss.
    /// let params = CalibratedCusumParams::training(10);
    /// assert_eq!(params.alpha, 0.005);
    /// let detector = params.check()?;
    /// # Ok::<(), mass_cpd::CpdError>(())
    /// ```
    #[must_use]
    pub fn training(streams: usize) -> Self {
        Self {
            alpha: 0.05 / streams.max(1) as f64,
            k: 2.0,
            transform: Transform::Log,
            reference: Reference::LAGGED,
            drift: Drift::Remove,
            direction: Direction::Up,
            warmup: 200,
            ..Self::default()
        }
    }

    /// Makes the detector.
    ///
    /// # Errors
    /// [`CpdError::Parameter`] for the first parameter that is out of the range its field states; [`CpdError::NotFound`] if over
    /// so long a horizon no threshold keeps what the error of the reference adds up to.
    pub fn check(&self) -> Result<CalibratedCusum, CpdError> {
        self.validate()?;
        Ok(CalibratedCusum::new(*self))
    }

    /// Sizes of the lagged reference, empty for the self-starting one.
    pub(crate) fn shape(&self) -> Shape {
        let (window, gap) = match self.reference {
            Reference::SelfStarting => (0, 0),
            Reference::Lagged { window, gap } => (window, gap),
        };
        let shape = Shape::new(window, gap, self.prewhiten, self.drift == Drift::Remove);
        match self.transform {
            Transform::Identity => shape,
            Transform::Log => shape.of_logarithms(),
        }
    }

    pub(crate) fn validate(&self) -> Result<(), CpdError> {
        require(
            (1..=1_000_000_000_000).contains(&self.horizon),
            "horizon",
            self.horizon as f64,
            "in 1..=10^12",
        )?;
        require(
            self.alpha > 0.0 && self.alpha <= 0.5,
            "alpha",
            self.alpha,
            "in (0, 0.5]",
        )?;
        require((0.05..=3.0).contains(&self.k), "k", self.k, "in [0.05, 3]")?;
        if let Some(limit) = self.score_limit {
            require(
                limit > self.k && limit <= 100.0,
                "score_limit",
                limit,
                "over k and at most 100",
            )?;
        }
        require(
            (8..=1 << 24).contains(&self.warmup),
            "warmup",
            self.warmup as f64,
            "in 8..=2^24",
        )?;
        if let Reference::Lagged { window, gap } = self.reference {
            require(
                (8..=1 << 20).contains(&window),
                "reference.window",
                window as f64,
                "in 8..=2^20",
            )?;
            require(gap <= 1 << 20, "reference.gap", gap as f64, "at most 2^20")?;
            // Beyond, the error of the line is several times what is judged by it.
            require(
                self.drift == Drift::Keep
                    || line_leverage(window, gap, window as f64 - 1.0) <= 16.0,
                "reference.gap",
                gap as f64,
                "shorter, for a line through the window to reach over it",
            )?;
        }
        if !Calibration::of(self).settles() {
            return Err(CpdError::NotFound {
                what: "threshold for this horizon, allowance and reference",
            });
        }
        Ok(())
    }
}

/// Leverage of the observation judged in a regression on time over `n` targets of the window.
fn line_leverage(window: usize, gap: usize, n: f64) -> f64 {
    let reach = 0.5 * (window as f64 + 1.0) + gap as f64;
    12.0 * reach * reach / (n * (n * n - 1.0))
}

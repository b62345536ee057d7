//! Parameters of the calibrated CUSUM.

use serde::{Deserialize, Serialize};

use super::{
    autoregression::{MOST_ORDER, Model},
    calibration::Calibration,
    lagged::Shape,
};
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
#[serde(rename_all = "snake_case", deny_unknown_fields)]
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

/// The autoregression that is fitted to the reference and taken off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Prewhiten {
    /// None: for streams known to be without autocorrelation.
    None,
    /// One of this order, in 1..=8. An order higher than needed costs little: it keeps the level, and some power.
    Order(usize),
    /// Of the order that Akaike's criterion chooses anew at every step, up to `most`, in 1..=8.
    Chosen {
        /// Highest order.
        most: usize,
    },
}

impl Default for Prewhiten {
    fn default() -> Self {
        Self::Order(1)
    }
}

/// How the error of a prediction becomes a score.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scores {
    /// By Student's distribution: for noise that is roughly normal.
    #[default]
    Normal,
    /// By its rank among all before it: free of the distribution of the noise. Exactly so without prewhitening; with it as far as
    /// the coefficients are known. Needs the self-starting reference.
    Ranks,
}

/// What is watched for a change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Watch {
    /// The level.
    #[default]
    Level,
    /// The spread of the noise around its prediction: up is more of it. A jump of the level is errors too, and rises the same until it is
    /// learned.
    Spread,
}

/// When an alarm is raised.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AlarmAt {
    /// At a false-alarm probability of `alpha` within the horizon.
    #[default]
    Alpha,
    /// At the threshold with this average run length without a change, in 10..=10^12; `alpha` is not used.
    AverageRunLength(f64),
    /// At this value of the statistic, over 0 and at most 10^6; `alpha` is not used.
    Threshold(f64),
}

/// Which changes raise an alarm.
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
#[serde(default, deny_unknown_fields)]
pub struct CalibratedCusumParams {
    /// Steps over which the false-alarm probability is meant, at least 1.
    pub horizon: u64,
    /// Probability of a false alarm within the horizon, in (0, 0.5].
    pub alpha: f64,
    /// Whether that says when an alarm is raised.
    pub alarm_at: AlarmAt,
    /// Allowance of the CUSUM in standard deviations, in [0.05, 3]: half the smallest shift worth finding.
    pub k: f64,
    /// Scores beyond this are counted as this much, at least `k + 0.05` and at most 100; `None` counts them in full.
    /// In a stream with outliers it takes
    /// several, not one, to make an alarm. The calibration knows of it: under the model a limit of 4 makes little difference for `k`
    /// up to 1. Where `n` scores at the limit just reach the threshold, `alpha` may lie in a jump of `p_N`: it is then not used up.
    /// A score over 8, which noise of the model does not reach, counts for at least a third of the threshold: the plainest change is
    /// seen within three observations.
    /// A self-starting reference learns what is over the limit as if it were at it, once the warm-up is over.
    pub score_limit: Option<f64>,
    /// What is monitored.
    pub transform: Transform,
    /// Whether its level or its spread.
    pub watch: Watch,
    /// What it is compared with.
    pub reference: Reference,
    /// Which autoregression is taken off. A lagged reference takes none or one of the first order.
    pub prewhiten: Prewhiten,
    /// How errors become scores.
    pub scores: Scores,
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
            alarm_at: AlarmAt::Alpha,
            k: 0.5,
            score_limit: Some(4.0),
            transform: Transform::Identity,
            watch: Watch::Level,
            reference: Reference::SelfStarting,
            prewhiten: Prewhiten::default(),
            scores: Scores::Normal,
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
    /// a change of the data distribution makes in the loss, is a change. Losses keep the level on real texts, pooled gradient norms
    /// do not (`docs/results/continual.md` of the repository).
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
    /// [`CpdError::Parameter`] for the first parameter that is out of the range its field states; [`CpdError::Unsupported`] for a
    /// lagged reference with ranks or with an autoregression beyond the first order; [`CpdError::NotFound`] if over so long a
    /// horizon no threshold keeps what the error of the reference adds up to.
    pub fn check(&self) -> Result<CalibratedCusum, CpdError> {
        self.validate()?;
        Ok(CalibratedCusum::new(*self))
    }

    /// The same with its level shared by `streams` detectors: by the union bound, or by the sum of rates of alarms, they have
    /// together the level that one had. A given threshold stays, and an average run length stops at 10^12.
    ///
    /// # Examples
    /// ```
    /// use mass_cpd::{AlarmAt, CalibratedCusumParams};
    ///
    /// assert_eq!(CalibratedCusumParams::default().among(10.0).alpha, 0.005);
    /// let params = CalibratedCusumParams { alarm_at: AlarmAt::AverageRunLength(1e4), ..Default::default() };
    /// assert_eq!(params.among(10.0).alarm_at, AlarmAt::AverageRunLength(1e5));
    /// ```
    #[must_use]
    pub fn among(self, streams: f64) -> Self {
        Self {
            alpha: self.alpha / streams,
            alarm_at: match self.alarm_at {
                AlarmAt::AverageRunLength(average) => {
                    AlarmAt::AverageRunLength((average * streams).min(LONGEST_AVERAGE))
                }
                other => other,
            },
            ..self
        }
    }

    /// The statistic from which on an alarm is raised.
    /// The limit on scores, and that on scores beyond anything that noise of the model reaches: three of those make an alarm,
    /// however high the threshold, unless that was given as a number.
    pub(crate) fn limits(&self, threshold: f64) -> (f64, f64) {
        let limit = self.score_limit.unwrap_or(f64::INFINITY);
        match self.alarm_at {
            AlarmAt::Threshold(_) => (limit, limit),
            // A little over a third: three of them are not to fall short by a rounding.
            _ => (limit, limit.max(0.3334 * threshold + self.k)),
        }
    }

    /// Of each side; one that is not watched stays at zero.
    pub(crate) fn allowances(&self) -> [f64; 2] {
        [Direction::Down, Direction::Up].map(|other| {
            if self.direction == other {
                f64::INFINITY
            } else {
                self.k
            }
        })
    }

    pub(crate) fn threshold(&self, calibration: &Calibration) -> f64 {
        match self.alarm_at {
            AlarmAt::Alpha => calibration.threshold(self.alpha),
            // Runs without a change are geometric: as many steps as their average pass without an alarm once in e.
            AlarmAt::AverageRunLength(average) => Calibration::of(&Self {
                horizon: average.round() as u64,
                ..*self
            })
            .threshold(-(-1.0f64).exp_m1()),
            AlarmAt::Threshold(h) => h,
        }
    }

    /// The regression, where it takes more than the first order or ranks of its errors.
    pub(crate) fn general(&self) -> Option<Model> {
        let (order, choose) = match self.prewhiten {
            Prewhiten::None => (0, false),
            Prewhiten::Order(order) => (order, false),
            Prewhiten::Chosen { most } => (most, true),
        };
        (choose || order > 1 || self.scores == Scores::Ranks).then_some(Model {
            order,
            choose,
            drift: self.drift == Drift::Remove,
        })
    }

    /// Sizes of the lagged reference, empty for the self-starting one.
    pub(crate) fn shape(&self) -> Shape {
        let (window, gap) = match self.reference {
            Reference::SelfStarting => (0, 0),
            Reference::Lagged { window, gap } => (window, gap),
        };
        let prewhiten = self.prewhiten != Prewhiten::None;
        let shape = Shape::new(window, gap, prewhiten, self.drift == Drift::Remove);
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
                limit >= self.k + LEAST_STEP && limit <= 100.0,
                "score_limit",
                limit,
                "at least 0.05 over k, and at most 100",
            )?;
        }
        require(
            (8..=1 << 24).contains(&self.warmup),
            "warmup",
            self.warmup as f64,
            "in 8..=2^24",
        )?;
        if let Prewhiten::Order(order) | Prewhiten::Chosen { most: order } = self.prewhiten {
            require(
                (1..=MOST_ORDER).contains(&order),
                "prewhiten",
                order as f64,
                "an order in 1..=8, or none",
            )?;
        }
        match self.alarm_at {
            AlarmAt::Alpha => {}
            AlarmAt::AverageRunLength(average) => require(
                (10.0..=LONGEST_AVERAGE).contains(&average),
                "alarm_at.average_run_length",
                average,
                "in [10, 10^12]",
            )?,
            AlarmAt::Threshold(h) => require(
                h > 0.0 && h <= 1e6,
                "alarm_at.threshold",
                h,
                "over 0 and at most 10^6",
            )?,
        }
        if matches!(self.reference, Reference::Lagged { .. }) && self.general().is_some() {
            return Err(CpdError::Unsupported {
                what: "a lagged reference with ranks, or with an autoregression beyond the first order",
            });
        }
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
        let of_average = match self.alarm_at {
            AlarmAt::AverageRunLength(average) => average.round() as u64,
            _ => self.horizon,
        };
        let horizon = self.horizon.max(of_average);
        if !Calibration::of(&Self { horizon, ..*self }).settles() {
            return Err(CpdError::NotFound {
                what: "threshold for this horizon, allowance and reference",
            });
        }
        Ok(())
    }
}

/// Longest average run length that may be asked for.
const LONGEST_AVERAGE: f64 = 1e12;
/// The least that a score at the limit adds to the sum: a rise to the threshold is then no endless one.
const LEAST_STEP: f64 = 0.05;

/// Leverage of the observation judged in a regression on time over `n` targets of the window.
fn line_leverage(window: usize, gap: usize, n: f64) -> f64 {
    let reach = 0.5 * (window as f64 + 1.0) + gap as f64;
    12.0 * reach * reach / (n * (n * n - 1.0))
}

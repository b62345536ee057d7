//! CUSUM whose alarms have a known false-alarm probability over a horizon.
//!
//! # Formula
//! An observation `x_t` (or `log x_t`) is predicted from a reference by the regression
//!
//! ```text
//! y_t = a + phi y_{t-1} + b t + error     phi only with `prewhiten`, b only with `Drift::Remove`
//! ```
//!
//! and its error, over the standard error of prediction, turned into a standard normal score `z_t`. Page's
//! recursion sums the scores beyond an allowance `k`, upward and downward,
//!
//! ```text
//! S_t = max(0, S_{t-1} + z_t - k)
//! ```
//!
//! and an alarm is raised when `p_N(S_t) <= alpha`, with `p_N(s)` the probability that a stream without a change
//! reaches `s` anywhere within the horizon of `N` steps: for the self-starting reference
//! `p_N(s) = 1 - exp(-N / ARL0(s))`, with twice the exponent for [`Direction::Both`]. For the lagged reference it
//! also averages over the error of the reference, which all scores of a stretch share.
//!
//! # What is reported
//! [`Step::statistic`] is the larger of the two sums, [`Step::p_value`] the marginal p-value of `z_t`,
//! [`Step::p_horizon`] is `p_N(S_t)`, and [`Step::onset`] the first step since the sum was last zero.
//!
//! # Sources
//! Page, Biometrika 41 (1954); Hawkins, Statistician 36 (1987) for self-starting charts; Brown, Durbin & Evans,
//! JRSS B 37 (1975) for recursive residuals; Wallace, Ann. Math. Statist. 30 (1959) for the normal score;
//! Kendall, Biometrika 41 (1954) for the bias of an estimated autocorrelation.

mod calibration;
mod lagged;
mod params;
mod pchip;
pub(crate) mod score;
pub(crate) mod self_starting;

use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub(crate) use calibration::Calibration;
use lagged::Lagged;
pub use params::{AfterAlarm, CalibratedCusumParams, Direction, Drift, Reference, Transform};
use self_starting::SelfStarting;

use crate::{CpdError, Detector, Step, error::require_finite, normal};

/// The largest magnitude that is squared and summed.
pub(crate) const LARGEST: f64 = 1e100;

/// CUSUM with a false-alarm probability over a horizon; see the [module's documentation](self).
///
/// # Examples
/// ```
/// use mass_cpd::{CalibratedCusumParams, Detector};
///
/// let mut detector = CalibratedCusumParams::default().check()?;
/// let mut noise = 0.5f64;
/// let mut alarm = None;
/// for t in 1..=600u64 {
///     noise = (noise * 3.99) * (1.0 - noise); // a chaotic map stands in for noise
///     let x = noise + if t > 400 { 1.0 } else { 0.0 };
///     let step = detector.update(x)?;
///     if step.alarm && alarm.is_none() {
///         alarm = Some((step.count, step.onset));
///     }
/// }
/// let (count, onset) = alarm.expect("the shift is found");
/// assert!((401..430).contains(&count));
/// assert!(onset.is_some_and(|o| (395..=405).contains(&o)));
/// # Ok::<(), mass_cpd::CpdError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Stored", into = "Stored")]
pub struct CalibratedCusum {
    params: CalibratedCusumParams,
    reference: State,
    up: Sum,
    down: Sum,
    count: u64,
    last_score: Option<f64>,
    limit: f64,
    threshold: f64,
    calibration: Arc<Calibration>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum State {
    SelfStarting(SelfStarting),
    Lagged(Lagged),
}

impl State {
    fn new(reference: Reference) -> Self {
        match reference {
            Reference::SelfStarting => Self::SelfStarting(SelfStarting::default()),
            Reference::Lagged { window, gap } => Self::Lagged(Lagged::new(window, gap)),
        }
    }

    fn clear(&mut self) {
        match self {
            Self::SelfStarting(s) => *s = SelfStarting::default(),
            Self::Lagged(l) => l.clear(),
        }
    }
}

/// One side of the chart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Sum {
    s: f64,
    onset: u64,
}

impl Sum {
    #[inline]
    fn add(&mut self, excess: f64, count: u64) {
        if self.s == 0.0 {
            self.onset = count;
        }
        self.s = (self.s + excess).max(0.0);
    }
}

impl CalibratedCusum {
    /// `params` must have been validated.
    fn new(params: CalibratedCusumParams) -> Self {
        let calibration = Calibration::of(&params);
        Self {
            params,
            reference: State::new(params.reference),
            up: Sum::default(),
            down: Sum::default(),
            count: 0,
            last_score: None,
            limit: params.score_limit.unwrap_or(f64::INFINITY),
            threshold: calibration.threshold(params.alpha),
            calibration,
        }
    }

    /// The parameters it was made with.
    #[must_use]
    pub fn params(&self) -> &CalibratedCusumParams {
        &self.params
    }

    /// The statistic from which on an alarm is raised.
    #[must_use]
    pub fn threshold(&self) -> f64 {
        self.threshold
    }

    /// The probability that a stream without a change reaches the statistic `s` within the horizon.
    ///
    /// # Examples
    /// ```
    /// let detector = mass_cpd::CalibratedCusumParams::default().check()?;
    /// assert!((detector.p_horizon(detector.threshold()) - 0.05).abs() < 1e-9);
    /// # Ok::<(), mass_cpd::CpdError>(())
    /// ```
    #[must_use]
    pub fn p_horizon(&self, s: f64) -> f64 {
        self.calibration.p(s)
    }

    /// `z_t` of the last observation before any limit, `None` before the end of the warm-up.
    #[must_use]
    pub fn last_score(&self) -> Option<f64> {
        self.last_score
    }

    /// What is monitored of `x`, or why it cannot be.
    #[inline]
    fn transform(&self, x: f64) -> Result<f64, CpdError> {
        transform(x, self.params.transform, self.count)
    }

    /// The score of `y`, if the reference is ready for one, which learns `y`.
    #[inline]
    fn score(&mut self, y: f64) -> Option<f64> {
        let (prewhiten, drift) = (self.params.prewhiten, self.params.drift == Drift::Remove);
        let warmup = self.params.warmup;
        match &mut self.reference {
            State::SelfStarting(s) => {
                let ready = s.seen >= warmup as f64;
                let z = match (prewhiten, drift) {
                    (false, false) => s.update::<false, false>(y),
                    (false, true) => s.update::<false, true>(y),
                    (true, false) => s.update::<true, false>(y),
                    (true, true) => s.update::<true, true>(y),
                };
                ready.then_some(z)
            }
            State::Lagged(l) => {
                let ready = l.seen() >= warmup as u64;
                l.update(y, prewhiten, drift).filter(|_| ready)
            }
        }
    }

    /// Forgets what was learned, but not how many observations there were.
    fn relearn(&mut self) {
        self.reference.clear();
        self.up = Sum::default();
        self.down = Sum::default();
    }
}

/// What is monitored of the observation after the first `count`.
#[inline]
pub(crate) fn transform(x: f64, transform: Transform, count: u64) -> Result<f64, CpdError> {
    require_finite(x, count)?;
    match transform {
        Transform::Identity if x.abs() <= LARGEST => Ok(x),
        Transform::Identity => Err(CpdError::TooLarge {
            count: count + 1,
            value: x,
        }),
        Transform::Log if x >= f64::MIN_POSITIVE => Ok(score::ln(x)),
        Transform::Log if x > 0.0 => Ok(x.ln()),
        Transform::Log => Err(CpdError::NonPositive {
            count: count + 1,
            value: x,
        }),
    }
}

impl Detector for CalibratedCusum {
    fn update(&mut self, x: f64) -> Result<Step, CpdError> {
        let y = self.transform(x)?;
        self.count += 1;
        let mut step = Step::silent(self.count);
        self.last_score = self.score(y);
        let Some(z) = self.last_score else {
            return Ok(step);
        };
        let k = self.params.k;
        let bounded = z.clamp(-self.limit, self.limit);
        let direction = self.params.direction;
        if direction != Direction::Down {
            self.up.add(bounded - k, self.count);
        }
        if direction != Direction::Up {
            self.down.add(-bounded - k, self.count);
        }
        // The side that is not watched stays at zero.
        let side = if self.up.s >= self.down.s {
            self.up
        } else {
            self.down
        };
        step.statistic = Some(side.s);
        step.p_value = Some(match direction {
            Direction::Up => normal::survival(z),
            Direction::Down => normal::survival(-z),
            Direction::Both => 2.0 * normal::survival(z.abs()),
        });
        step.p_horizon = Some(self.calibration.p(side.s));
        step.onset = (side.s > 0.0).then_some(side.onset);
        step.alarm = side.s >= self.threshold;
        if step.alarm {
            match self.params.after_alarm {
                AfterAlarm::Hold => {}
                AfterAlarm::Restart => {
                    self.up = Sum::default();
                    self.down = Sum::default();
                }
                AfterAlarm::Relearn => self.relearn(),
            }
        }
        Ok(step)
    }

    fn reset(&mut self) {
        self.relearn();
        self.count = 0;
        self.last_score = None;
    }

    fn count(&self) -> u64 {
        self.count
    }
}

/// What is stored of a detector; the rest follows from the parameters.
#[derive(Serialize, Deserialize)]
#[serde(rename = "CalibratedCusum")]
struct Stored {
    params: CalibratedCusumParams,
    reference: State,
    up: Sum,
    down: Sum,
    count: u64,
    last_score: Option<f64>,
}

impl From<CalibratedCusum> for Stored {
    fn from(d: CalibratedCusum) -> Self {
        Self {
            params: d.params,
            reference: d.reference,
            up: d.up,
            down: d.down,
            count: d.count,
            last_score: d.last_score,
        }
    }
}

impl TryFrom<Stored> for CalibratedCusum {
    type Error = CpdError;

    fn try_from(mut stored: Stored) -> Result<Self, CpdError> {
        let params = stored.params;
        params.validate()?;
        let state = |reason| CpdError::State { reason };
        match (&mut stored.reference, params.reference) {
            (State::SelfStarting(s), Reference::SelfStarting) => {
                if !s.is_valid() || s.seen > stored.count as f64 {
                    return Err(state("the moments are impossible"));
                }
            }
            (State::Lagged(l), Reference::Lagged { window, gap }) => {
                if !l.revive(window, gap) || l.seen() > stored.count {
                    return Err(state("the reference window does not fit the parameters"));
                }
            }
            _ => {
                return Err(state(
                    "the reference is not of the kind that the parameters name",
                ));
            }
        }
        for side in [stored.up, stored.down] {
            if !(side.s.is_finite() && side.s >= 0.0 && side.onset <= stored.count) {
                return Err(state("a sum of scores is impossible"));
            }
        }
        if stored.last_score.is_some_and(|z| !z.is_finite()) {
            return Err(state("the last score is not finite"));
        }
        Ok(Self {
            reference: stored.reference,
            up: stored.up,
            down: stored.down,
            count: stored.count,
            last_score: stored.last_score,
            ..Self::new(params)
        })
    }
}

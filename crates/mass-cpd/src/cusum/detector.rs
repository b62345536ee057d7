//! The detector.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{
    AfterAlarm, CalibratedCusumParams, Calibration, Direction, Drift, Reference,
    lagged::{Lagged, Shape},
    self_starting::SelfStarting,
    stored::Stored,
    transform::{bounded, transform},
};
use crate::{CpdError, Detector, Step, normal};

/// CUSUM with a false-alarm probability over a horizon; see the [module's documentation](super).
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
    pub(super) params: CalibratedCusumParams,
    pub(super) reference: State,
    pub(super) up: Sum,
    pub(super) down: Sum,
    pub(super) count: u64,
    pub(super) last_score: Option<f64>,
    pub(super) shape: Shape,
    pub(super) limit: f64,
    pub(super) threshold: f64,
    pub(super) calibration: Arc<Calibration>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum State {
    SelfStarting(SelfStarting),
    Lagged { rolling: Lagged, values: Vec<f64> },
}

impl State {
    fn new(reference: Reference) -> Self {
        match reference {
            Reference::SelfStarting => Self::SelfStarting(SelfStarting::default()),
            Reference::Lagged { window, gap } => Self::Lagged {
                rolling: Lagged::default(),
                values: vec![0.0; window + gap],
            },
        }
    }

    fn clear(&mut self) {
        match self {
            Self::SelfStarting(s) => *s = SelfStarting::default(),
            Self::Lagged { rolling, values } => {
                *rolling = Lagged::default();
                values.fill(0.0);
            }
        }
    }
}

/// One side of the chart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Sum {
    pub(super) s: f64,
    pub(super) onset: u64,
}

impl Sum {
    /// Without a branch: whether the sum is zero is as good as a coin toss, and a wrong guess costs more than
    /// all the arithmetic.
    #[inline(always)]
    fn add(&mut self, excess: f64, count: u64) {
        self.onset = if self.s == 0.0 { count } else { self.onset };
        let s = self.s + excess;
        self.s = if s > 0.0 { s } else { 0.0 };
    }
}

impl CalibratedCusum {
    /// `params` must have been validated.
    pub(super) fn new(params: CalibratedCusumParams) -> Self {
        let calibration = Calibration::of(&params);
        Self {
            params,
            reference: State::new(params.reference),
            up: Sum::default(),
            down: Sum::default(),
            count: 0,
            last_score: None,
            shape: params.shape(),
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

    /// The score of `y`, if the reference is ready for one, which learns `y`.
    #[inline]
    fn score(&mut self, y: f64) -> Option<f64> {
        let (prewhiten, drift) = (self.params.prewhiten, self.params.drift == Drift::Remove);
        let warmup = self.params.warmup;
        match &mut self.reference {
            State::SelfStarting(s) => {
                let ready = s.seen >= warmup as f64;
                let judged = match (prewhiten, drift) {
                    (false, false) => s.update::<false, false>(y),
                    (false, true) => s.update::<false, true>(y),
                    (true, false) => s.update::<true, false>(y),
                    (true, true) => s.update::<true, true>(y),
                };
                ready.then(|| judged.score())
            }
            State::Lagged { rolling, values } => {
                let ready = rolling.seen() >= warmup as u64;
                rolling.update(values, y, &self.shape).filter(|_| ready)
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

impl Detector for CalibratedCusum {
    // Inlined, so that the caller need not have the whole step copied to memory.
    #[inline]
    fn update(&mut self, x: f64) -> Result<Step, CpdError> {
        let y = transform(x, self.params.transform, self.count)?;
        self.count += 1;
        let mut step = Step::silent(self.count);
        self.last_score = self.score(y);
        let Some(z) = self.last_score else {
            return Ok(step);
        };
        let k = self.params.k;
        let bounded = bounded(z, self.limit);
        let direction = self.params.direction;
        if direction != Direction::Down {
            self.up.add(bounded - k, self.count);
        }
        if direction != Direction::Up {
            self.down.add(-bounded - k, self.count);
        }
        // A side that is not watched stays at zero.
        let rising = self.up.s >= self.down.s;
        let s = if rising { self.up.s } else { self.down.s };
        let onset = if rising {
            self.up.onset
        } else {
            self.down.onset
        };
        step.statistic = Some(s);
        step.p_value = Some(match direction {
            Direction::Up => normal::quick_survival(z),
            Direction::Down => normal::quick_survival(-z),
            Direction::Both => 2.0 * normal::quick_survival(z.abs()),
        });
        step.p_horizon = Some(self.calibration.p(s));
        step.onset = (s > 0.0).then_some(onset);
        step.alarm = s >= self.threshold;
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

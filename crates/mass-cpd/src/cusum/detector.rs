//! The detector.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{
    AfterAlarm, CalibratedCusumParams, Calibration, Drift, General, Prewhiten, Reference, Watch,
    lagged::{Lagged, Shape},
    self_starting::SelfStarting,
    stored::Stored,
    sum::{Sides, of_size, report},
    transform::{seldom_bounded, transform},
};
use crate::{CpdError, Detector, Step};

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
    pub(super) sides: Sides,
    /// Allowance of each side.
    pub(super) k: [f64; 2],
    pub(super) count: u64,
    pub(super) last_score: Option<f64>,
    pub(super) shape: Shape,
    /// Of a score, and of a certain one.
    pub(super) limits: (f64, f64),
    pub(super) threshold: f64,
    pub(super) calibration: Arc<Calibration>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum State {
    SelfStarting(SelfStarting),
    General(General),
    Lagged {
        rolling: Lagged,
        values: Vec<f64>,
        /// Whether the observation before is missing.
        gap: bool,
    },
}

impl State {
    fn new(params: &CalibratedCusumParams) -> Self {
        match params.reference {
            Reference::SelfStarting => match General::new(params) {
                Some(general) => Self::General(general),
                None => Self::SelfStarting(SelfStarting::default()),
            },
            Reference::Lagged { window, gap } => Self::Lagged {
                rolling: Lagged::default(),
                values: vec![0.0; window + gap],
                gap: false,
            },
        }
    }

    fn clear(&mut self) {
        match self {
            Self::SelfStarting(s) => *s = SelfStarting::default(),
            Self::General(general) => general.clear(),
            Self::Lagged {
                rolling,
                values,
                gap,
            } => {
                *rolling = Lagged::default();
                values.fill(0.0);
                *gap = false;
            }
        }
    }
}

/// The self-starting reference as the parameters shape it.
macro_rules! shaped {
    ($params:expr, $state:ident . $method:ident ($($argument:expr),*)) => {
        match (
            $params.prewhiten != Prewhiten::None,
            $params.drift == Drift::Remove,
        ) {
            (false, false) => $state.$method::<false, false>($($argument),*),
            (false, true) => $state.$method::<false, true>($($argument),*),
            (true, false) => $state.$method::<true, false>($($argument),*),
            (true, true) => $state.$method::<true, true>($($argument),*),
        }
    };
}

impl CalibratedCusum {
    /// `params` must have been validated.
    pub(super) fn new(params: CalibratedCusumParams) -> Self {
        let calibration = Calibration::of(&params);
        let threshold = params.threshold(&calibration);
        Self {
            params,
            reference: State::new(&params),
            sides: Sides::default(),
            k: params.allowances(),
            count: 0,
            last_score: None,
            shape: params.shape(),
            limits: params.limits(threshold),
            threshold,
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

    /// The probability that a stream without a change reaches the statistic `s` within the horizon: 1 for what is below zero, where
    /// it begins, NaN for NaN.
    ///
    /// # Examples
    /// ```
    /// let detector = mass_cpd::CalibratedCusumParams::default().check()?;
    /// assert!((detector.p_horizon(detector.threshold()) - 0.05).abs() < 1e-9);
    /// # Ok::<(), mass_cpd::CpdError>(())
    /// ```
    #[must_use]
    pub fn p_horizon(&self, s: f64) -> f64 {
        if s < 0.0 { 1.0 } else { self.calibration.p(s) }
    }

    /// `z_t` of the last observation before any limit, `None` before the end of the warm-up, and where the last observation is missing.
    /// Where the spread is watched it is the score of that.
    #[must_use]
    pub fn last_score(&self) -> Option<f64> {
        self.last_score
    }

    /// The score of `y`, if the reference is ready for one, which learns `y`.
    #[inline]
    fn score(&mut self, y: f64) -> Option<f64> {
        let warmup = self.params.warmup;
        match &mut self.reference {
            State::SelfStarting(s) => {
                let warmup = warmup as i64 as f64;
                let ready = s.seen >= warmup;
                let z = shaped!(self.params, s.update(y, self.limits.0, warmup));
                ready.then_some(z)
            }
            State::General(general) => {
                let ready = general.seen() >= warmup as u64;
                let limit = if ready { self.limits.0 } else { f64::INFINITY };
                let z = general.update(y, limit, &self.params.general()?);
                ready.then_some(z)
            }
            State::Lagged {
                rolling,
                values,
                gap,
            } => {
                let ready = rolling.seen() >= warmup as u64 && !(*gap && self.shape.prewhiten);
                *gap = false;
                rolling.update(values, y, &self.shape).filter(|_| ready)
            }
        }
    }

    /// Level and slope of the reference.
    #[inline]
    fn line(&self) -> (f64, f64) {
        match &self.reference {
            State::SelfStarting(s) => {
                if self.params.drift == Drift::Remove {
                    s.line::<true>()
                } else {
                    s.line::<false>()
                }
            }
            State::General(general) => self
                .params
                .general()
                .map_or((0.0, 0.0), |model| general.line(&model)),
            State::Lagged {
                rolling, values, ..
            } => rolling.line(values, &self.shape),
        }
    }

    /// Forgets what was learned, but not how many observations there were.
    fn relearn(&mut self) {
        self.reference.clear();
        self.sides = Sides::default();
    }
}

impl Detector for CalibratedCusum {
    // Inlined, so that the caller need not have the whole step copied to memory.
    #[inline]
    fn update(&mut self, x: f64) -> Result<Step, CpdError> {
        let y = transform(x, self.params.transform, self.count)?;
        self.count += 1;
        let mut step = Step::silent(self.count);
        let line = self.line();
        self.last_score = self.score(y);
        let Some(mut z) = self.last_score else {
            return Ok(step);
        };
        if self.params.watch == Watch::Spread {
            z = of_size(z);
            self.last_score = Some(z);
        }
        let bounded = seldom_bounded(z, self.limits);
        // By way of a signed number, which has an instruction of its own.
        let count = self.count as i64 as f64;
        self.sides.add(bounded, self.k, y, count, line);
        report(&self.params, &mut step, &self.sides, z);
        let s = step.statistic.unwrap_or(0.0);
        step.p_horizon = Some(self.calibration.p(s));
        step.alarm = s >= self.threshold;
        if step.alarm {
            match self.params.after_alarm {
                AfterAlarm::Hold => {}
                AfterAlarm::Restart => {
                    self.sides = Sides::default();
                }
                AfterAlarm::Relearn => self.relearn(),
            }
        }
        Ok(step)
    }

    fn skip(&mut self) -> Step {
        self.count += 1;
        self.last_score = None;
        match &mut self.reference {
            State::SelfStarting(s) => shaped!(self.params, s.skip()),
            State::General(general) => {
                if let Some(model) = self.params.general() {
                    general.skip(&model);
                }
            }
            State::Lagged { gap, .. } => *gap = true,
        }
        Step::silent(self.count)
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

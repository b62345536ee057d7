//! The one interface of every online detector.

use serde::{Deserialize, Serialize};

use crate::{
    CalibratedCusum, CalibratedCusumParams, CpdError, TrainingMonitor, TrainingMonitorParams,
    WindowedZ, WindowedZParams,
};

/// Which way a change goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Shift {
    /// A rise: of the level, or of the spread where that is watched.
    Up,
    /// A fall.
    Down,
}

/// What one observation did to a detector.
///
/// A field is `None` while the detector cannot know it (during the warm-up), or when the method has no such
/// quantity.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Step {
    /// Steps since the start or the last [`Detector::reset`], this one included: observations accepted, and gaps.
    pub count: u64,
    /// The detector's test statistic; its meaning is given by the detector.
    pub statistic: Option<f64>,
    /// Marginal p-value: how often a stream without a change gives, at one single step, evidence as strong.
    pub p_value: Option<f64>,
    /// Probability that a stream without a change reaches this statistic anywhere within the horizon.
    pub p_horizon: Option<f64>,
    /// The 1-based [`count`](Self::count) at which the change, if there is one, is thought to begin.
    pub onset: Option<u64>,
    /// Which way the change goes, if there is one.
    pub direction: Option<Shift>,
    /// Size of the change, if there is one, in the units of what is monitored (of the logarithm, where that is): the mean since the
    /// onset less the level before it.
    pub size: Option<f64>,
    /// The same in standard deviations, as the detector counts them: its mean score since the onset.
    pub size_in_deviations: Option<f64>,
    /// Whether the detector says that a change has happened.
    pub alarm: bool,
}

impl Step {
    /// A step of which nothing is known yet but its count.
    #[must_use]
    pub const fn silent(count: u64) -> Self {
        Self {
            count,
            statistic: None,
            p_value: None,
            p_horizon: None,
            onset: None,
            direction: None,
            size: None,
            size_in_deviations: None,
            alarm: false,
        }
    }
}

/// An online change-point detector: numbers in, one at a time, evidence out.
///
/// # Examples
/// ```
/// use mass_cpd::{Detector, WindowedZParams};
///
/// fn alarms(detector: &mut impl Detector, series: &[f64]) -> Result<Vec<u64>, mass_cpd::CpdError> {
///     let mut found = Vec::new();
///     for &x in series {
///         let step = detector.update(x)?;
///         if step.alarm {
///             found.push(step.count);
///         }
///     }
///     Ok(found)
/// }
///
/// let mut detector = WindowedZParams::paper(10, 20, 1e-3).check()?;
/// assert!(alarms(&mut detector, &[1.0; 100])?.is_empty());
/// # Ok::<(), mass_cpd::CpdError>(())
/// ```
pub trait Detector {
    /// Takes one observation.
    ///
    /// # Errors
    /// [`CpdError::NonFinite`] for NaN or an infinity, [`CpdError::NonPositive`] where a logarithm is taken,
    /// [`CpdError::TooLarge`] where squares are summed; the state is then left unchanged.
    fn update(&mut self, x: f64) -> Result<Step, CpdError>;

    /// Takes note that an observation is missing: time passes, and nothing is learned.
    ///
    /// Evidence stays as it is. An autoregression predicts the next observation over the gap (with a lagged reference it is not judged),
    /// and does not learn it, as its predecessor is not known. A warm-up counts observations only. With an autoregression of order `p`
    /// and no lagged reference, a gap among the first 8 observations (`8 + 2 p` where the order is chosen or above one) makes what was
    /// learned before it forgotten.
    ///
    /// # Examples
    /// ```
    /// use mass_cpd::{CalibratedCusumParams, Detector};
    ///
    /// let mut detector = CalibratedCusumParams::default().check()?;
    /// for x in [Some(1.0), None, Some(1.2)] {
    ///     let step = match x {
    ///         Some(x) => detector.update(x)?,
    ///         None => detector.skip(),
    ///     };
    ///     assert!(!step.alarm);
    /// }
    /// assert_eq!(detector.count(), 3);
    /// # Ok::<(), mass_cpd::CpdError>(())
    /// ```
    fn skip(&mut self) -> Step;

    /// Forgets every observation, as if newly made.
    fn reset(&mut self);

    /// Steps since the start or the last reset: observations accepted, and gaps.
    fn count(&self) -> u64;

    /// Takes a recorded series, and gives the steps at which there was an alarm.
    ///
    /// # Errors
    /// As [`update`](Self::update), with the position of the observation refused; those before it have been taken.
    ///
    /// # Examples
    /// ```
    /// use mass_cpd::{CalibratedCusumParams, Detector, Shift};
    ///
    /// let series: Vec<f64> = (0..200).map(|t| if t < 120 { 5.0 } else { 3.0 }).collect();
    /// let alarms = CalibratedCusumParams::default().check()?.detect(&series)?;
    /// assert_eq!(alarms.len(), 1);
    /// assert_eq!((alarms[0].count, alarms[0].onset), (123, Some(121)));
    /// assert_eq!((alarms[0].direction, alarms[0].size), (Some(Shift::Down), Some(-2.0)));
    /// # Ok::<(), mass_cpd::CpdError>(())
    /// ```
    fn detect(&mut self, series: &[f64]) -> Result<Vec<Step>, CpdError> {
        let mut alarms = Vec::new();
        for &x in series {
            let step = self.update(x)?;
            if step.alarm {
                alarms.push(step);
            }
        }
        Ok(alarms)
    }
}

/// Unchecked parameters of any detector.
///
/// # Examples
/// ```
/// use mass_cpd::{AnyDetectorParams, Detector, WindowedZParams};
///
/// let params = AnyDetectorParams::WindowedZ(WindowedZParams::paper(30, 60, 0.01));
/// let mut detector = params.check()?;
/// assert_eq!(detector.update(1.0)?.count, 1);
/// # Ok::<(), mass_cpd::CpdError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum AnyDetectorParams {
    /// Sum of windowed z-scores.
    WindowedZ(WindowedZParams),
    /// CUSUM with a false-alarm probability over a horizon.
    CalibratedCusum(CalibratedCusumParams),
    /// Monitoring against a training sample.
    TrainingMonitor(TrainingMonitorParams),
}

impl AnyDetectorParams {
    /// Makes the detector.
    ///
    /// # Errors
    /// [`CpdError::Parameter`] for the first parameter that is out of range; [`CpdError::Unsupported`] for parameters that are not
    /// allowed together; [`CpdError::NotFound`] where no threshold keeps the level that is asked for.
    pub fn check(&self) -> Result<AnyDetector, CpdError> {
        Ok(match self {
            Self::WindowedZ(p) => AnyDetector::WindowedZ(p.check()?),
            Self::CalibratedCusum(p) => AnyDetector::CalibratedCusum(p.check()?),
            Self::TrainingMonitor(p) => AnyDetector::TrainingMonitor(p.check()?),
        })
    }
}

impl From<WindowedZParams> for AnyDetectorParams {
    fn from(params: WindowedZParams) -> Self {
        Self::WindowedZ(params)
    }
}

impl From<CalibratedCusumParams> for AnyDetectorParams {
    fn from(params: CalibratedCusumParams) -> Self {
        Self::CalibratedCusum(params)
    }
}

impl From<TrainingMonitorParams> for AnyDetectorParams {
    fn from(params: TrainingMonitorParams) -> Self {
        Self::TrainingMonitor(params)
    }
}

impl From<CalibratedCusum> for AnyDetector {
    fn from(detector: CalibratedCusum) -> Self {
        Self::CalibratedCusum(detector)
    }
}

impl From<WindowedZ> for AnyDetector {
    fn from(detector: WindowedZ) -> Self {
        Self::WindowedZ(detector)
    }
}

impl From<TrainingMonitor> for AnyDetector {
    fn from(detector: TrainingMonitor) -> Self {
        Self::TrainingMonitor(detector)
    }
}

/// Any detector of this crate, so that a state can hold one without being generic over it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum AnyDetector {
    /// Sum of windowed z-scores.
    WindowedZ(WindowedZ),
    /// CUSUM with a false-alarm probability over a horizon.
    CalibratedCusum(CalibratedCusum),
    /// Monitoring against a training sample.
    TrainingMonitor(TrainingMonitor),
}

impl AnyDetector {
    /// Starts the observation count again from zero and keeps what was learned, where the method has such
    /// a thing ([`WindowedZ::reset_count`]); elsewhere the same as [`Detector::reset`].
    pub fn reset_count(&mut self) {
        match self {
            Self::WindowedZ(d) => d.reset_count(),
            other => other.reset(),
        }
    }
}

impl Detector for AnyDetector {
    fn update(&mut self, x: f64) -> Result<Step, CpdError> {
        match self {
            Self::WindowedZ(d) => d.update(x),
            Self::CalibratedCusum(d) => d.update(x),
            Self::TrainingMonitor(d) => d.update(x),
        }
    }

    fn skip(&mut self) -> Step {
        match self {
            Self::WindowedZ(d) => d.skip(),
            Self::CalibratedCusum(d) => d.skip(),
            Self::TrainingMonitor(d) => d.skip(),
        }
    }

    fn reset(&mut self) {
        match self {
            Self::WindowedZ(d) => d.reset(),
            Self::CalibratedCusum(d) => d.reset(),
            Self::TrainingMonitor(d) => d.reset(),
        }
    }

    fn count(&self) -> u64 {
        match self {
            Self::WindowedZ(d) => d.count(),
            Self::CalibratedCusum(d) => d.count(),
            Self::TrainingMonitor(d) => d.count(),
        }
    }
}

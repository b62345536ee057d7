//! What is watched, and how the false-alarm level is shared among the detectors.

use mass_cpd::{AnyDetector, AnyDetectorParams, Reference};
use serde::{Deserialize, Serialize};

use super::params::ControllerParams;
use crate::ExpandError;

/// Whether `alpha` is every detector's own level or that of all of them together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// Every detector has the full `alpha` (`paper`, `reference`).
    PerStream,
    /// `alpha` is divided: equally among the kinds that are watched, and within a kind equally among its streams, with
    /// `k_max` experts counted in every layer (`calibrated`). By the union bound the chance that any of them raises a false
    /// alarm within the horizon is then at most the largest `alpha` given.
    Shared,
}

/// The streams that detectors watch. An alarm of a layer's or of the loss's detector makes every expert concerned a
/// candidate.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Watch {
    /// Gradient norm of each expert.
    pub expert: Option<AnyDetectorParams>,
    /// Gradient norm of all of a layer's experts together, the root of the sum of their squares; not observed while zero.
    pub layer: Option<AnyDetectorParams>,
    /// Training loss.
    pub loss: Option<AnyDetectorParams>,
    /// How the level is meant.
    pub level: Level,
}

impl Watch {
    /// Watches the experts' gradient norms alone, each at the full level.
    #[must_use]
    pub fn experts(detector: impl Into<AnyDetectorParams>) -> Self {
        Self {
            expert: Some(detector.into()),
            layer: None,
            loss: None,
            level: Level::PerStream,
        }
    }

    /// Shortens lagged references and warm-ups of calibrated CUSUMs to a tenth of a run of `steps`, where they are longer than
    /// that, but not to fewer than 64 steps: estimated on fewer, a level is no longer what it says.
    ///
    /// # Examples
    /// ```
    /// use mass_expand::ControllerParams;
    /// let watch = ControllerParams::calibrated_watch(0.05, 480);
    /// // A window of 128, a gap of 16 and a warm-up of 200 become 80, 10 and 80.
    /// let shortened = watch.clone().shortened(800);
    /// assert_eq!(watch.loss.map(|d| d.observations_needed()), Some(201));
    /// assert_eq!(shortened.loss.map(|d| d.observations_needed()), Some(91));
    /// ```
    #[must_use]
    pub fn shortened(mut self, steps: u64) -> Self {
        let tenth = usize::try_from(steps / 10).unwrap_or(usize::MAX).max(64);
        for detector in [&mut self.expert, &mut self.layer, &mut self.loss] {
            if let Some(AnyDetectorParams::CalibratedCusum(cusum)) = detector {
                if let Reference::Lagged { window, gap } = &mut cusum.reference
                    && *window > tenth
                {
                    *window = tenth;
                    *gap = (*gap).min(tenth / 8);
                }
                cusum.warmup = cusum.warmup.min(tenth);
            }
        }
        self
    }

    fn detectors(&self) -> impl Iterator<Item = &AnyDetectorParams> {
        [&self.expert, &self.layer, &self.loss]
            .into_iter()
            .flatten()
    }

    pub(super) fn kinds(&self) -> usize {
        self.detectors().count()
    }

    /// Observations until the first detector can raise an alarm; `None` without detectors.
    pub(super) fn observations_needed(&self) -> Option<u64> {
        self.detectors().map(|d| d.observations_needed()).min()
    }

    pub(super) fn make_expert(
        &self,
        params: &ControllerParams,
    ) -> Result<Option<AnyDetector>, ExpandError> {
        let streams = params.experts.len() as f64 * params.k_max as f64;
        self.make(&self.expert, streams)
    }

    pub(super) fn make_layer(
        &self,
        params: &ControllerParams,
    ) -> Result<Option<AnyDetector>, ExpandError> {
        self.make(&self.layer, params.experts.len() as f64)
    }

    pub(super) fn make_loss(
        &self,
        _params: &ControllerParams,
    ) -> Result<Option<AnyDetector>, ExpandError> {
        self.make(&self.loss, 1.0)
    }

    fn make(
        &self,
        detector: &Option<AnyDetectorParams>,
        streams: f64,
    ) -> Result<Option<AnyDetector>, ExpandError> {
        let Some(mut detector) = detector.clone() else {
            return Ok(None);
        };
        if self.level == Level::Shared {
            let share = streams * self.kinds() as f64;
            match &mut detector {
                AnyDetectorParams::WindowedZ(p) => p.alpha /= share,
                AnyDetectorParams::CalibratedCusum(p) => *p = p.among(share),
                AnyDetectorParams::TrainingMonitor(p) => p.alpha /= share,
                _ => {
                    return Err(ExpandError::Parameter {
                        name: "watch.level",
                        value: share,
                        expected: "per_stream for a detector without a level",
                    });
                }
            }
        }
        Ok(Some(detector.check()?))
    }
}

//! What is watched, and how the false-alarm level is shared among the detectors.

use mass_cpd::{AnyDetector, AnyDetectorParams};
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
    /// `k_max` experts counted in every layer (`ours`). By the union bound the chance that any of them raises a false
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

    pub(super) fn kinds(&self) -> usize {
        [&self.expert, &self.layer, &self.loss]
            .into_iter()
            .filter(|kind| kind.is_some())
            .count()
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

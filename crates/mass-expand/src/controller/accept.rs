//! Whether an observation can be accepted; nothing has changed if it cannot.

use mass_cpd::{CpdError, Detector};

use super::observation::{ExpertObservation, LayerObservation, StepObservation};
use super::params::Choice;
use super::state::{Average, LayerState};
use super::{Controller, validate};
use crate::ExpandError;

impl Controller {
    pub(super) fn check_observation(
        &self,
        observation: &StepObservation<'_>,
    ) -> Result<(), ExpandError> {
        if let Some(last) = self.last_step
            && observation.step <= last
        {
            return Err(ExpandError::StepOrder {
                got: observation.step,
                last,
            });
        }
        check_finite("loss", observation.loss)?;
        check_monitored("loss", observation.loss)?;
        if self.takes_logarithm_of_loss() && observation.loss < 0.0 {
            let count = self.loss_detector.as_ref().map_or(0, Detector::count) + 1;
            return Err(CpdError::NonPositive {
                count,
                value: observation.loss,
            }
            .into());
        }
        if observation.layers.len() != self.layers.len() {
            return Err(ExpandError::Shape {
                what: "list of layers",
                got: observation.layers.len(),
                expected: self.layers.len(),
            });
        }
        let (choice, loss) = (self.params.choice, observation.loss);
        for (index, (observed, state)) in observation.layers.iter().zip(&self.layers).enumerate() {
            if observed.experts.len() != state.ids.len() {
                return Err(ExpandError::Experts {
                    layer: index,
                    reason: "their number differs",
                });
            }
            let without_shares = may_lack_shares(observed, state, loss);
            for (expert, &id) in observed.experts.iter().zip(&state.ids) {
                if expert.id != id {
                    return Err(ExpandError::Experts {
                        layer: index,
                        reason: "another expert was expected at this place",
                    });
                }
                check_figures(expert).map_err(|problem| ExpandError::Observation {
                    layer: index,
                    expert: id,
                    problem: Box::new(problem),
                })?;
                let entropy = expert.routing_entropy.is_some() || expert.load == 0;
                match (choice, expert.loss_share, entropy) {
                    (Choice::LossShare, None, _) if !without_shares => Err(ExpandError::Missing {
                        what: "loss_share",
                        layer: index,
                    }),
                    (Choice::RoutingEntropy, _, false) => Err(ExpandError::Missing {
                        what: "routing_entropy",
                        layer: index,
                    }),
                    _ => Ok(()),
                }?;
            }
            check_monitored("gradient norm of a layer", pooled(observed))?;
            if observed.hidden == 0 || observed.dim == 0 {
                return Err(ExpandError::Empty {
                    what: "weight matrix",
                });
            }
            if self.tests_alignment() {
                self.params.alignment.delta(observed.hidden, observed.dim)?;
            }
        }
        Ok(())
    }

    /// Whether a detector of the loss, now or in the continual phase, works on its logarithm.
    pub(super) fn takes_logarithm_of_loss(&self) -> bool {
        let continual = self.params.phase.continual.as_ref();
        let watches = [Some(&self.params.watch), continual].into_iter().flatten();
        let mut detectors = watches.filter_map(|watch| watch.loss.as_ref());
        detectors.any(validate::logarithmic)
    }
}

/// Whether nobody in a layer has a share of the loss, and that is no oversight: there is none to share, or shares came before.
fn may_lack_shares(observed: &LayerObservation<'_>, state: &LayerState, loss: f64) -> bool {
    observed.without_shares()
        && (loss <= 0.0
            || observed.experts.iter().all(|e| e.load == 0)
            || state.expansions > 0
            || state
                .experts
                .iter()
                .any(|e| e.loss_share != Average::default()))
}

fn check_figures(expert: &ExpertObservation) -> Result<(), ExpandError> {
    check_not_negative("gradient_norm", expert.gradient_norm)?;
    if let Some(cosine) = expert.cosine {
        check_cosine(cosine)?;
    }
    check_share(expert.loss_share.unwrap_or(0.0))?;
    check_not_negative("routing_entropy", expert.routing_entropy.unwrap_or(0.0))
}

pub(super) fn check_finite(what: &'static str, value: f64) -> Result<(), ExpandError> {
    if value.is_finite() {
        Ok(())
    } else {
        Err(ExpandError::NonFinite { what })
    }
}

/// Detectors take values of up to 1e40.
fn check_monitored(name: &'static str, value: f64) -> Result<(), ExpandError> {
    if value.abs() <= 1e40 {
        Ok(())
    } else {
        Err(ExpandError::Parameter {
            name,
            value,
            expected: "at most 1e40 in size",
        })
    }
}

/// Gradient norm of all experts of a layer together.
pub(super) fn pooled(observed: &LayerObservation<'_>) -> f64 {
    let squares = observed.experts.iter().map(|e| e.gradient_norm.powi(2));
    squares.sum::<f64>().sqrt()
}

pub(super) fn check_not_negative(name: &'static str, value: f64) -> Result<(), ExpandError> {
    check_finite(name, value)?;
    if value >= 0.0 {
        Ok(())
    } else {
        Err(ExpandError::Parameter {
            name,
            value,
            expected: "at least 0",
        })
    }
}

fn check_share(value: f64) -> Result<(), ExpandError> {
    check_not_negative("loss_share", value)?;
    // Two sums of many tokens in f32 may differ by roundings.
    if value <= 1.0 + 1e-3 {
        Ok(())
    } else {
        Err(ExpandError::Parameter {
            name: "loss_share",
            value,
            expected: "within [0, 1]",
        })
    }
}

pub(super) fn check_cosine(value: f64) -> Result<(), ExpandError> {
    check_finite("cosine", value)?;
    // A cosine computed in f32 may pass 1 by a rounding.
    if value.abs() <= 1.0 + 1e-5 {
        Ok(())
    } else {
        Err(ExpandError::Parameter {
            name: "cosine",
            value,
            expected: "within [-1, 1]",
        })
    }
}

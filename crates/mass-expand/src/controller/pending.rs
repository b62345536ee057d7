//! What is open between the observation of a step and its decisions.

use mass_cpd::Step;
use serde::{Deserialize, Serialize};

use super::Controller;
use super::event::Watched;
use super::observation::Request;
use super::params::StopRule;
use crate::{ExpandError, ExpertId};

/// One step that has been observed and not yet decided.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Pending {
    pub(super) step: u64,
    pub(super) layers: Vec<LayerPending>,
    /// Requests without an answer.
    pub(super) open: Vec<Request>,
}

/// An alarm that a detector raised in the step.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Alarm {
    pub(super) watched: Watched,
    /// The expert, if it watches one.
    pub(super) expert: Option<ExpertId>,
    pub(super) p_value: Option<f64>,
    pub(super) p_horizon: Option<f64>,
}

impl Alarm {
    pub(super) fn of(watched: Watched, expert: Option<ExpertId>, outcome: &Step) -> Option<Self> {
        outcome.alarm.then_some(Self {
            watched,
            expert,
            p_value: outcome.p_value,
            p_horizon: outcome.p_horizon,
        })
    }

    /// The one with the smaller p-value, this one if neither is smaller.
    pub(super) fn stronger(self, other: Self) -> Self {
        let p = |alarm: &Self| alarm.p_value.or(alarm.p_horizon).unwrap_or(f64::INFINITY);
        if p(&other) < p(&self) { other } else { self }
    }
}

/// An expert that the detectors (or the schedule) name, with what is known of it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Candidate {
    pub(super) id: ExpertId,
    /// Of its own detector, whether or not that raised an alarm.
    pub(super) p_value: Option<f64>,
    pub(super) p_horizon: Option<f64>,
    /// Its own detector's alarm.
    pub(super) alarm: Option<Alarm>,
    pub(super) cosine: Option<f64>,
    /// Whether the cosine is still to come.
    pub(super) awaits_cosine: bool,
}

/// The answer to a masked or probe loss.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Worth {
    pub(super) expert: ExpertId,
    pub(super) difference: f64,
    pub(super) standard_error: Option<f64>,
}

/// The open part of one layer.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LayerPending {
    pub(super) candidates: Vec<Candidate>,
    /// Threshold of the alignment test, if it is part of the trigger.
    pub(super) delta: Option<f64>,
    /// The alarm of the layer's detector or the loss's.
    pub(super) alarm: Option<Alarm>,
    /// Whether the shares of the loss are missing by which the choice is made.
    pub(super) without_shares: bool,
    /// The expert chosen to be split.
    pub(super) source: Option<Candidate>,
    /// The alarm that set the split off.
    pub(super) cause: Option<Alarm>,
    /// Experts that satisfied the trigger.
    pub(super) triggered: usize,
    /// The expert that the stop rule has masked.
    pub(super) check: Option<ExpertId>,
    pub(super) check_answer: Option<Worth>,
    /// The expert that pruning has masked.
    pub(super) probe: Option<ExpertId>,
    pub(super) probe_answer: Option<Worth>,
}

impl LayerPending {
    /// The alarm behind a split of `source`: its own, else the strongest of those that made it a candidate, or others.
    pub(super) fn cause_of(&self, source: &Candidate) -> Option<Alarm> {
        let others = self.candidates.iter().filter_map(|c| c.alarm);
        let strongest = || self.alarm.into_iter().chain(others).reduce(Alarm::stronger);
        source.alarm.or_else(strongest)
    }
}

impl Pending {
    /// Takes a request off the list, if it is open.
    pub(super) fn close(&mut self, request: Request) -> Result<(), ExpandError> {
        let (Request::Alignment { layer, expert }
        | Request::MaskedLoss { layer, expert }
        | Request::ProbeLoss { layer, expert }) = request;
        match self.open.iter().position(|open| *open == request) {
            Some(at) => {
                self.open.remove(at);
                Ok(())
            }
            None => Err(ExpandError::UnknownRequest { layer, expert }),
        }
    }

    /// What in a stored step contradicts the controller it belongs to.
    pub(super) fn contradiction(&self, controller: &Controller) -> Option<&'static str> {
        if self.layers.len() != controller.layers.len() {
            return Some("the step under way has another number of layers");
        }
        if controller.last_step != Some(self.step) {
            return Some("the step under way is not the last one observed");
        }
        for (pending, state) in self.layers.iter().zip(&controller.layers) {
            let mut named = pending
                .candidates
                .iter()
                .chain(&pending.source)
                .map(|candidate| candidate.id)
                .chain(pending.check)
                .chain(pending.probe);
            if !named.all(|id| state.position(id).is_some()) {
                return Some("the step under way names an expert that is not active");
            }
            let worth = |answer: &Option<Worth>, asked: Option<ExpertId>, on_probe: bool| {
                answer.is_none_or(|w| {
                    let error = w.standard_error;
                    Some(w.expert) == asked
                        && w.difference.is_finite()
                        && error.is_some() == on_probe
                        && error.is_none_or(|e| e.is_finite() && e >= 0.0)
                })
            };
            let held_out = matches!(controller.params.stop, StopRule::HeldOut { .. });
            if !worth(&pending.check_answer, pending.check, held_out)
                || !worth(&pending.probe_answer, pending.probe, true)
            {
                return Some("an answer of the step under way was not asked for or is none");
            }
        }
        let known = |request: &Request| {
            let (Request::Alignment { layer, expert }
            | Request::MaskedLoss { layer, expert }
            | Request::ProbeLoss { layer, expert }) = *request;
            controller
                .layers
                .get(layer)
                .is_some_and(|state| state.position(expert).is_some())
        };
        if !self.open.iter().all(known) {
            return Some("a request of the step under way names an expert that is not active");
        }
        None
    }
}

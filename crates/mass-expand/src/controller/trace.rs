//! What detectors saw around each split, for the record.

use std::collections::VecDeque;

use mass_cpd::Step;
use serde::{Deserialize, Serialize};

use super::Controller;
use super::event::{Event, EventKind, Watched};
use super::pending::Alarm;
use crate::ExpertId;

/// What a detector watches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Stream {
    pub(super) layer: Option<usize>,
    pub(super) watched: Watched,
    pub(super) expert: Option<ExpertId>,
}

/// Observations that may yet belong to a split, and the streams of splits that have happened.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Trace {
    /// Of all streams, of the latest [`ControllerParams::trace`](super::ControllerParams::trace) steps; those in the record
    /// already are not among them.
    recent: VecDeque<Event>,
    /// Streams that go straight into the record, and to which step.
    open: Vec<(Stream, u64)>,
}

impl Trace {
    pub(super) fn is_empty(&self) -> bool {
        self.recent.is_empty() && self.open.is_empty()
    }

    /// Drops what is over at `step`.
    pub(super) fn forget(&mut self, step: u64, trace: u64) {
        let over = |old: &Event| step.saturating_sub(old.step) > trace;
        while self.recent.front().is_some_and(over) {
            self.recent.pop_front();
        }
        self.open.retain(|(_, until)| step <= *until);
    }

    /// What in a stored trace contradicts the controller it belongs to.
    pub(super) fn contradiction(&self, controller: &Controller) -> Option<&'static str> {
        let trace = controller.params.trace;
        let layers = controller.layers.len();
        let last = controller.last_step;
        let sound = |event: &Event| {
            matches!(event.kind, EventKind::Observation { .. })
                && event.layer.is_none_or(|layer| layer < layers)
                && last.is_some_and(|last| event.step <= last && last - event.step <= trace)
        };
        let until =
            |&(_, until): &(Stream, u64)| last.is_some_and(|l| until <= l.saturating_add(trace));
        (!self.recent.iter().all(sound) || !self.open.iter().all(until))
            .then_some("its observations are not of the steps around a split")
    }
}

impl Controller {
    /// Keeps what a detector saw, or puts it into the record if its stream has split lately.
    pub(super) fn observed(&mut self, step: u64, stream: Stream, value: f64, outcome: &Step) {
        let trace = self.params.trace;
        if trace == 0 {
            return;
        }
        let kind = EventKind::Observation {
            watched: stream.watched,
            expert: stream.expert,
            value,
            statistic: outcome.statistic,
            p_value: outcome.p_value,
        };
        let layer = stream.layer;
        let event = Event { step, layer, kind };
        if self.trace.open.iter().any(|(open, _)| *open == stream) {
            self.events.push(event);
        } else {
            self.trace.recent.push_back(event);
        }
    }

    /// Puts into the record what was seen of the stream behind a split: that of its alarm; without one the source's own, if it has
    /// a detector, else the layer's, else the loss's.
    pub(super) fn trace_split(
        &mut self,
        step: u64,
        layer: usize,
        source: ExpertId,
        cause: Option<Alarm>,
    ) {
        let trace = self.params.trace;
        if trace == 0 {
            return;
        }
        let watch = self.watch();
        let (watched, expert) = match cause {
            Some(alarm) => (alarm.watched, alarm.expert),
            None if watch.expert.is_some() => (Watched::Expert, Some(source)),
            None if watch.layer.is_some() => (Watched::Layer, None),
            None if watch.loss.is_some() => (Watched::Loss, None),
            None => return,
        };
        let layer = (watched != Watched::Loss).then_some(layer);
        let stream = Stream {
            layer,
            watched,
            expert,
        };
        let of_stream = |event: &Event| match event.kind {
            EventKind::Observation {
                watched: w,
                expert: e,
                ..
            } => (event.layer, w, e) == (layer, watched, expert),
            _ => false,
        };
        self.events
            .extend(self.trace.recent.iter().filter(|e| of_stream(e)));
        self.trace.recent.retain(|event| !of_stream(event));
        self.trace.open.retain(|(open, _)| *open != stream);
        self.trace.open.push((stream, step.saturating_add(trace)));
    }
}

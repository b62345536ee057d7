//! The first half of a step: the observation is checked, detectors advance, candidates are named.

use mass_cpd::{Detector, Step};

use super::Controller;
use super::accept::{check_cosine, check_finite, check_not_negative, pooled};
use super::choice::choose;
use super::event::{EventKind, HoldReason, Watched};
use super::observation::{Answer, LayerObservation, Request, StepObservation, StopReason};
use super::params::{Choice, StopRule, Trigger, Unused};
use super::pending::{Alarm, Candidate, LayerPending, Pending, Worth};
use super::trace::Stream;
use crate::ExpandError;

impl Controller {
    /// Takes the figures of one step and says what else is needed to decide.
    ///
    /// # Errors
    /// [`ExpandError::Protocol`] if the step before was not finished, [`ExpandError::StepOrder`],
    /// [`ExpandError::Shape`] for a wrong number of layers, [`ExpandError::Experts`] if a layer's experts are not
    /// exactly its active ones in order, [`ExpandError::Observation`] for a figure of an expert that is NaN, infinite or out
    /// of range, [`ExpandError::NonFinite`] and [`ExpandError::Parameter`] for such a loss or a pooled
    /// norm beyond 1e40, [`ExpandError::Missing`] if the choice needs a figure that is absent,
    /// [`ExpandError::Empty`] for a matrix without elements, [`ExpandError::Detector`]. After an error the controller is
    /// as it was.
    pub fn begin_step(
        &mut self,
        observation: &StepObservation<'_>,
    ) -> Result<Vec<Request>, ExpandError> {
        if self.pending.is_some() {
            return Err(ExpandError::Protocol {
                called: "begin_step",
                expected: "finish_step of the step before has to come first",
            });
        }
        self.check_observation(observation)?;
        let step = observation.step;
        let ended_now = self.enter_phase(step)?;
        let in_phase = !self.ended && step >= self.params.phase.live_from;
        let (plateau_live, plateau) = self.find_plateau(step, observation.loss, in_phase);
        let scheduled = plateau || self.schedule_due(step);
        self.last_step = Some(step);
        self.trace.forget(step, self.params.trace);
        let mut pending = Pending {
            step,
            layers: vec![LayerPending::default(); self.layers.len()],
            open: Vec::new(),
        };
        if ended_now {
            self.record(
                step,
                None,
                EventKind::Stop {
                    reason: StopReason::PhaseEnd,
                },
            );
        }

        let detects = matches!(
            self.trigger(),
            Trigger::DetectorOnly | Trigger::DetectorAndAlignment
        );
        let any_open = self.layers.iter().any(|layer| layer.stopped.is_none());
        let mut live = any_open
            && match self.trigger() {
                Trigger::Plateau { .. } => plateau_live,
                _ => in_phase && !detects,
            };
        let mut loss_alarm = None;
        // A loss of exactly zero, all margins beyond the precision of its numbers, has no logarithm and is no rise.
        let without_logarithm = observation.loss == 0.0 && self.takes_logarithm_of_loss();
        if !self.ended
            && any_open
            && !without_logarithm
            && let Some(detector) = &mut self.loss_detector
        {
            let outcome = detector.update(observation.loss)?;
            live |= self.signs.judged(&outcome, in_phase);
            self.record_outcome(step, None, Watched::Loss, None, observation.loss, &outcome);
            loss_alarm = Alarm::of(Watched::Loss, None, &outcome);
        }

        let keep = self.params.kept_share();
        let mut outcomes: Vec<Option<Step>> = Vec::new();
        for (index, observed) in observation.layers.iter().enumerate() {
            let open = !self.ended && self.layers[index].stopped.is_none();
            outcomes.clear();
            outcomes.resize(observed.experts.len(), None);
            let mut layer_alarm = loss_alarm;
            if open {
                let alarm =
                    self.feed_layer(step, index, observed, &mut outcomes, in_phase, &mut live)?;
                layer_alarm = layer_alarm.into_iter().chain(alarm).reduce(Alarm::stronger);
            }
            for (state, expert) in self.layers[index].experts.iter_mut().zip(observed.experts) {
                state.average(expert, keep);
            }
            if open && in_phase {
                self.name_candidates(
                    index,
                    observed,
                    &outcomes,
                    layer_alarm,
                    scheduled,
                    &mut pending,
                )?;
            }
        }
        self.live_steps += u64::from(live);
        if live {
            self.signs.first_live.get_or_insert(step);
        }
        self.count_unused(observation);
        self.pending = Some(pending);

        for layer in 0..self.layers.len() {
            self.ask_held_out(layer);
            self.ask_redundant(layer);
            self.advance(layer);
        }
        Ok(self.open_requests().to_vec())
    }

    /// Takes the answer to one request and returns the requests that follow from it.
    ///
    /// # Errors
    /// [`ExpandError::Protocol`] outside a step, [`ExpandError::UnknownRequest`] if nothing of the kind is open,
    /// [`ExpandError::NonFinite`] and [`ExpandError::Parameter`] for figures out of range; the request is then still
    /// open.
    pub fn answer(&mut self, answer: Answer) -> Result<Vec<Request>, ExpandError> {
        let Some(pending) = &mut self.pending else {
            return Err(ExpandError::Protocol {
                called: "answer",
                expected: "begin_step has to come first",
            });
        };
        match answer {
            Answer::Alignment {
                layer,
                expert,
                cosine,
            } => {
                if let Some(cosine) = cosine {
                    check_cosine(cosine)?;
                }
                pending.close(Request::Alignment { layer, expert })?;
                for candidate in &mut pending.layers[layer].candidates {
                    if candidate.id == expert {
                        candidate.cosine = cosine;
                        candidate.awaits_cosine = false;
                    }
                }
                let before = pending.open.len();
                self.advance(layer);
                Ok(self.open_requests()[before..].to_vec())
            }
            Answer::MaskedLoss {
                layer,
                expert,
                masked,
                full,
            } => {
                let difference = masked - full;
                check_finite("masked loss", difference)?;
                pending.close(Request::MaskedLoss { layer, expert })?;
                pending.layers[layer].check_answer = Some(Worth {
                    expert,
                    difference,
                    standard_error: None,
                });
                Ok(Vec::new())
            }
            Answer::ProbeLoss {
                layer,
                expert,
                difference,
                standard_error,
            } => {
                check_finite("probe loss", difference)?;
                check_not_negative("standard_error", standard_error)?;
                pending.close(Request::ProbeLoss { layer, expert })?;
                let worth = Some(Worth {
                    expert,
                    difference,
                    standard_error: Some(standard_error),
                });
                let open = &mut pending.layers[layer];
                // The newest expert may be asked about twice: on the batch to check it, on the probe to prune. A check on the
                // probe is of another expert than what is probed in its turn.
                if open.probe == Some(expert) {
                    open.probe_answer = worth;
                } else {
                    open.check_answer = worth;
                }
                Ok(Vec::new())
            }
        }
    }

    /// Feeds the layer's detectors; returns the alarm of the layer's own, if it raised one.
    fn feed_layer(
        &mut self,
        step: u64,
        index: usize,
        observed: &LayerObservation<'_>,
        outcomes: &mut [Option<Step>],
        in_phase: bool,
        live: &mut bool,
    ) -> Result<Option<Alarm>, ExpandError> {
        let skip = self.params.unused == Unused::Skip;
        let pooled = pooled(observed);
        for (at, expert) in observed.experts.iter().enumerate() {
            if let Some(detector) = &mut self.layers[index].experts[at].detector {
                if skip && (expert.load == 0 || expert.gradient_norm == 0.0) {
                    // A gap: the next norm has no predecessor.
                    detector.skip();
                    continue;
                }
                let outcome = detector.update(expert.gradient_norm)?;
                *live |= self.signs.judged(&outcome, in_phase);
                let (norm, id) = (expert.gradient_norm, Some(expert.id));
                self.record_outcome(step, Some(index), Watched::Expert, id, norm, &outcome);
                outcomes[at] = Some(outcome);
            }
        }
        if pooled > 0.0
            && let Some(detector) = &mut self.layers[index].detector
        {
            let outcome = detector.update(pooled)?;
            *live |= self.signs.judged(&outcome, in_phase);
            self.record_outcome(step, Some(index), Watched::Layer, None, pooled, &outcome);
            return Ok(Alarm::of(Watched::Layer, None, &outcome));
        }
        Ok(None)
    }

    /// Puts an alarm into the record, and keeps the observation for that of a split.
    fn record_outcome(
        &mut self,
        step: u64,
        layer: Option<usize>,
        watched: Watched,
        expert: Option<crate::ExpertId>,
        value: f64,
        outcome: &Step,
    ) {
        let stream = Stream {
            layer,
            watched,
            expert,
        };
        self.observed(step, stream, value, outcome);
        if !outcome.alarm {
            return;
        }
        let kind = EventKind::Flag {
            watched,
            expert,
            value,
            statistic: outcome.statistic,
            p_value: outcome.p_value,
            p_horizon: outcome.p_horizon,
            onset_age: outcome
                .onset
                .map(|onset| outcome.count.saturating_sub(onset)),
        };
        self.record(step, layer, kind);
    }

    /// The experts that the detectors, the schedule or the plateau name, and the cosines that are missing.
    fn name_candidates(
        &self,
        index: usize,
        observed: &LayerObservation<'_>,
        outcomes: &[Option<Step>],
        layer_alarm: Option<Alarm>,
        scheduled: bool,
        pending: &mut Pending,
    ) -> Result<(), ExpandError> {
        let all = match self.trigger() {
            Trigger::Schedule { .. }
            | Trigger::ScheduleThenDetector { .. }
            | Trigger::Plateau { .. } => scheduled,
            Trigger::AlignmentOnly => true,
            Trigger::DetectorOnly | Trigger::DetectorAndAlignment => layer_alarm.is_some(),
        };
        let by_detector = matches!(
            self.trigger(),
            Trigger::DetectorOnly | Trigger::DetectorAndAlignment
        );
        let open = &mut pending.layers[index];
        open.without_shares = self.params.choice == Choice::LossShare && observed.without_shares();
        open.alarm = layer_alarm.filter(|_| by_detector);
        if self.tests_alignment() {
            open.delta = Some(self.params.alignment.delta(observed.hidden, observed.dim)?);
        }
        for (expert, outcome) in observed.experts.iter().zip(outcomes) {
            if !(all || by_detector && outcome.is_some_and(|o| o.alarm)) {
                continue;
            }
            let awaits_cosine =
                open.delta.is_some() && expert.cosine.is_none() && expert.gradient_norm > 0.0;
            if awaits_cosine {
                pending.open.push(Request::Alignment {
                    layer: index,
                    expert: expert.id,
                });
            }
            open.candidates.push(Candidate {
                id: expert.id,
                p_value: outcome.and_then(|o| o.p_value),
                p_horizon: outcome.and_then(|o| o.p_horizon),
                alarm: outcome
                    .filter(|_| by_detector)
                    .and_then(|o| Alarm::of(Watched::Expert, Some(expert.id), &o)),
                cosine: expert.cosine,
                awaits_cosine,
            });
        }
        Ok(())
    }

    /// Once a layer's cosines are all there: tests them, chooses, and asks for what the stop rule needs.
    fn advance(&mut self, layer: usize) {
        let Some(mut pending) = self.pending.take() else {
            return;
        };
        let step = pending.step;
        let open = &mut pending.layers[layer];
        if open.source.is_some()
            || open.triggered > 0
            || open.candidates.iter().any(|c| c.awaits_cosine)
        {
            self.pending = Some(pending);
            return;
        }
        if let Some(delta) = open.delta {
            let every = self.trigger() != Trigger::AlignmentOnly;
            for candidate in &open.candidates {
                let drifted = candidate.cosine.is_some_and(|c| c.abs() < delta);
                if every || drifted {
                    self.record(
                        step,
                        Some(layer),
                        EventKind::Alignment {
                            expert: candidate.id,
                            cosine: candidate.cosine,
                            delta,
                            drifted,
                        },
                    );
                }
            }
            open.candidates
                .retain(|candidate| candidate.cosine.is_some_and(|c| c.abs() < delta));
        }
        open.triggered = open.candidates.len();
        if open.triggered > 0 {
            let signs = &mut self.layers[layer].signs;
            signs.first_trigger.get_or_insert(step);
            match self.hold_reason(layer, open) {
                Some(reason) => {
                    let candidates = open.triggered;
                    open.candidates.clear();
                    self.record(step, Some(layer), EventKind::Hold { reason, candidates });
                }
                None => {
                    self.choose_source(step, layer, open);
                    if let Some(newest) = self.same_batch_check(layer) {
                        open.check = Some(newest);
                        pending.open.push(Request::MaskedLoss {
                            layer,
                            expert: newest,
                        });
                    }
                }
            }
        }
        self.pending = Some(pending);
    }

    pub(super) fn choose_source(&mut self, step: u64, layer: usize, open: &mut LayerPending) {
        open.source = choose(
            self.params.choice,
            &self.layers[layer],
            &open.candidates,
            &mut self.generator,
        );
        open.cause = open.source.and_then(|source| open.cause_of(&source));
        if let Some(source) = open.source {
            let cause = open.cause;
            self.record(
                step,
                Some(layer),
                EventKind::Trigger {
                    source: source.id,
                    candidates: open.candidates.len(),
                    watched: cause.map(|alarm| alarm.watched),
                    flagged: cause.and_then(|alarm| alarm.expert),
                    p_value: cause.and_then(|alarm| alarm.p_value),
                    p_horizon: cause.and_then(|alarm| alarm.p_horizon),
                    cosine: source.cosine,
                },
            );
        }
    }

    fn hold_reason(&self, layer: usize, open: &LayerPending) -> Option<HoldReason> {
        let state = &self.layers[layer];
        let held_out = matches!(self.params.stop, StopRule::HeldOut { .. });
        if held_out && open.check.is_none() && state.newest.is_some_and(|n| !n.checked) {
            return Some(HoldReason::AwaitingCheck);
        }
        if state.ids.len() >= self.params.k_max {
            return Some(HoldReason::Full);
        }
        open.without_shares.then_some(HoldReason::NoLossShare)
    }

    /// The expert to mask on the same batch before the split, for the rules that do so.
    fn same_batch_check(&self, layer: usize) -> Option<crate::ExpertId> {
        let state = &self.layers[layer];
        let due = match self.params.stop {
            StopRule::Consecutive { .. } => state.expansions > 0,
            StopRule::Patience {
                checks_after_expansions,
                ..
            } => state.expansions > checks_after_expansions,
            StopRule::Never | StopRule::HeldOut { .. } => false,
        };
        state.newest.filter(|_| due).map(|newest| newest.id)
    }

    fn ask_held_out(&mut self, layer: usize) {
        let expert = self.awaiting_check(layer);
        let born = self.layers[layer].newest.map(|newest| newest.born);
        let (Some(expert), Some(born), Some(pending)) = (expert, born, &mut self.pending) else {
            return;
        };
        if pending.step >= self.params.check_due(born) {
            pending.layers[layer].check = Some(expert);
            pending.open.push(Request::ProbeLoss { layer, expert });
        }
    }

    pub(super) fn tests_alignment(&self) -> bool {
        matches!(
            self.trigger(),
            Trigger::DetectorAndAlignment | Trigger::AlignmentOnly
        )
    }

    /// Moves on to the continual phase or to the end; true on the step on which expansion ends.
    fn enter_phase(&mut self, step: u64) -> Result<bool, ExpandError> {
        if self.continual || self.ended || step < self.params.phase.live_until {
            return Ok(false);
        }
        match self.params.phase.continual.clone() {
            Some(watch) => {
                self.begin_continual(&watch)?;
                self.record(step, None, EventKind::ContinualPhase);
                Ok(false)
            }
            None => {
                self.ended = true;
                self.ended_at = Some(step);
                Ok(true)
            }
        }
    }

    /// Whether a step of the schedule lies after the last step and not after this one.
    fn schedule_due(&self, step: u64) -> bool {
        let Some(timetable) = self.params.timetable() else {
            return false;
        };
        let passed = |step| timetable.passed(step);
        matches!(self.trigger(), Trigger::Schedule { .. })
            && passed(step) > self.last_step.map_or(0, passed)
    }
}

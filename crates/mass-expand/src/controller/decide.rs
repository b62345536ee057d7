//! The second half of a step: checks are judged, experts split and removed, expansion ended.

use super::Controller;
use super::diagnosis::Diagnosis;
use super::event::{EventKind, HoldReason, RemovalReason};
use super::observation::{Action, StopReason};
use super::params::{AfterSplit, StopRule};
use super::pending::{Alarm, Candidate, LayerPending, Worth};
use super::state::{ExpertState, Newest, reset};
use crate::{ExpandError, ExpertId};

impl Controller {
    /// Decides the step. The loop carries out the actions in order and then runs the optimizer.
    ///
    /// # Errors
    /// [`ExpandError::Protocol`] outside a step or while a request is open; nothing is lost by answering it then.
    pub fn finish_step(&mut self) -> Result<Vec<Action>, ExpandError> {
        match &self.pending {
            None => {
                return Err(ExpandError::Protocol {
                    called: "finish_step",
                    expected: "begin_step has to come first",
                });
            }
            Some(pending) if !pending.open.is_empty() => {
                return Err(ExpandError::Protocol {
                    called: "finish_step",
                    expected: "every request has to be answered first",
                });
            }
            Some(_) => {}
        }
        let Some(pending) = self.pending.take() else {
            return Ok(Vec::new());
        };
        let step = pending.step;
        let mut actions = Vec::new();
        if self.ended_at(step) {
            actions.push(Action::Stop {
                layer: None,
                reason: StopReason::PhaseEnd,
            });
        }
        for (layer, mut open) in pending.layers.into_iter().enumerate() {
            if let Some(worth) = open.check_answer {
                self.judge(step, layer, worth, &mut actions);
            }
            let split = self.split_chosen(step, layer, &mut open, &mut actions);
            self.prune(step, layer, &open, split, &mut actions);
            self.stop_if_full(step, layer, &mut actions);
        }
        Ok(actions)
    }

    /// Judges the newest expert by the stop rule in force.
    fn judge(&mut self, step: u64, layer: usize, worth: Worth, actions: &mut Vec<Action>) {
        let error = worth.standard_error.unwrap_or(0.0);
        let state = &mut self.layers[layer];
        let (failed, limit, remove) = match self.params.stop {
            StopRule::Never => return,
            StopRule::Consecutive { gamma } => (worth.difference <= 0.0, gamma, false),
            // One failure more than the patience stops expansion.
            StopRule::Patience { patience, .. } => {
                (worth.difference <= 0.0, patience.saturating_add(1), true)
            }
            StopRule::HeldOut {
                margin,
                z,
                patience,
                remove,
                ..
            } => {
                if let Some(newest) = &mut state.newest {
                    newest.checked = true;
                }
                (worth.difference - z * error <= margin, patience, remove)
            }
        };
        let in_a_row = !matches!(self.params.stop, StopRule::Patience { .. });
        if failed {
            state.failures = state.failures.saturating_add(1);
        } else if in_a_row {
            state.failures = 0;
        }
        state.signs.checks = state.signs.checks.saturating_add(1);
        let failures = state.failures;
        let patience_left = match self.params.stop {
            StopRule::Patience { patience, .. } => patience.saturating_sub(failures),
            _ => limit.saturating_sub(failures),
        };
        self.record(
            step,
            Some(layer),
            EventKind::Check {
                expert: worth.expert,
                masked_minus_full: worth.difference,
                standard_error: worth.standard_error,
                failed,
                patience_left: Some(patience_left),
            },
        );
        if failed && remove {
            self.remove(step, layer, worth.expert, RemovalReason::NoBenefit, actions);
        }
        // After the phase there is nothing left to stop.
        if failed && failures >= limit && !self.ended {
            self.stop(step, layer, StopReason::NoBenefit, actions);
        }
    }

    /// Splits the chosen expert, if it is still there; returns it.
    fn split_chosen(
        &mut self,
        step: u64,
        layer: usize,
        open: &mut LayerPending,
        actions: &mut Vec<Action>,
    ) -> Option<ExpertId> {
        let chosen = open.source?;
        if self.layers[layer].stopped.is_some() {
            return None;
        }
        if self.layers[layer].position(chosen.id).is_none() {
            // The check has just removed it: the next candidate takes its place.
            open.candidates
                .retain(|candidate| candidate.id != chosen.id);
            self.choose_source(step, layer, open);
        }
        let Some(source) = open.source else {
            let kind = EventKind::Hold {
                reason: HoldReason::SourceRemoved,
                candidates: open.triggered,
            };
            self.record(step, Some(layer), kind);
            return None;
        };
        self.split(step, layer, (source, open.cause), actions)
    }

    fn split(
        &mut self,
        step: u64,
        layer: usize,
        (source, cause): (Candidate, Option<Alarm>),
        actions: &mut Vec<Action>,
    ) -> Option<ExpertId> {
        let after = self.params.after_split;
        let state = &mut self.layers[layer];
        let at = state.position(source.id)?;
        // Names are never used again, so the pool is also full when they run out.
        let next_id = state.next_id.checked_add(1)?;
        if state.ids.len() >= self.params.k_max {
            return None;
        }
        let newcomer = ExpertId(state.next_id);
        state.next_id = next_id;
        let mut detector = state.experts[at].detector.clone();
        reset(&mut detector);
        let source_state = &mut state.experts[at];
        source_state.forget_averages();
        match after {
            AfterSplit::Keep => {}
            AfterSplit::ResetSourceCount => {
                if let Some(detector) = &mut source_state.detector {
                    detector.reset_count();
                }
            }
            AfterSplit::Rewarm => {
                reset(&mut source_state.detector);
                reset(&mut state.detector);
                reset(&mut self.loss_detector);
            }
        }
        state.ids.push(newcomer);
        state.experts.push(ExpertState::new(detector, Some(step)));
        state.pairs.push((source.id, newcomer));
        state.newest = Some(Newest {
            id: newcomer,
            born: step,
            checked: false,
        });
        state.expansions += 1;
        let experts = state.ids.len();
        self.trace_split(step, layer, source.id, cause);
        self.record(
            step,
            Some(layer),
            EventKind::Split {
                source: source.id,
                new: newcomer,
                operator: self.params.operator,
                watched: cause.map(|alarm| alarm.watched),
                flagged: cause.and_then(|alarm| alarm.expert),
                p_value: cause.and_then(|alarm| alarm.p_value),
                p_horizon: cause.and_then(|alarm| alarm.p_horizon),
                cosine: source.cosine,
                experts,
            },
        );
        actions.push(Action::Split {
            layer,
            source: source.id,
            newcomer,
            operator: self.params.operator,
            moments: self.params.moments,
        });
        Some(source.id)
    }

    /// Takes an expert out, unless it is the layer's last.
    pub(super) fn remove(
        &mut self,
        step: u64,
        layer: usize,
        expert: ExpertId,
        reason: RemovalReason,
        actions: &mut Vec<Action>,
    ) {
        let rewarm = self.params.after_split == AfterSplit::Rewarm;
        let collapsed: Vec<Diagnosis> = self
            .collapsed_pairs(layer)
            .filter(|pair| {
                matches!(pair, Diagnosis::PairCollapsed { source, newcomer, .. }
                    if *source == expert || *newcomer == expert)
            })
            .collect();
        let state = &mut self.layers[layer];
        if state.ids.len() <= 1 || state.position(expert).is_none() {
            return;
        }
        let heirs = state.heirs(expert, reason != RemovalReason::Unused);
        state.signs.collapsed.extend(collapsed);
        state.remove(expert);
        for heir in heirs {
            if let Some(at) = state.position(heir) {
                state.experts[at].forget_averages();
                if rewarm {
                    reset(&mut state.experts[at].detector);
                }
            }
        }
        if rewarm {
            reset(&mut state.detector);
            reset(&mut self.loss_detector);
        }
        let experts = state.ids.len();
        self.record(
            step,
            Some(layer),
            EventKind::Remove {
                expert,
                reason,
                experts,
            },
        );
        actions.push(Action::Remove {
            layer,
            expert,
            reason,
        });
    }

    fn stop(&mut self, step: u64, layer: usize, reason: StopReason, actions: &mut Vec<Action>) {
        self.layers[layer].stopped = Some(reason);
        self.record(step, Some(layer), EventKind::Stop { reason });
        actions.push(Action::Stop {
            layer: Some(layer),
            reason,
        });
    }

    /// A full pool ends expansion, unless pruning may make room or the newest expert has yet to be checked.
    fn stop_if_full(&mut self, step: u64, layer: usize, actions: &mut Vec<Action>) {
        let state = &self.layers[layer];
        let awaits_check = matches!(self.params.stop, StopRule::HeldOut { .. })
            && state.newest.is_some_and(|newest| !newest.checked);
        if !self.ended
            && state.stopped.is_none()
            && state.ids.len() >= self.params.k_max
            && self.params.pruning.is_none()
            && !awaits_check
        {
            self.stop(step, layer, StopReason::Maximum, actions);
        }
    }
}

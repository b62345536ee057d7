//! Taking experts out that stay unused or redundant.

use super::Controller;
use super::event::{EventKind, RemovalReason};
use super::observation::{Action, Request, StepObservation};
use super::pending::LayerPending;
use crate::ExpertId;

impl Controller {
    /// Counts, for every expert, the steps in a row with almost no tokens. A step on which the whole layer got none
    /// counts for nobody.
    pub(super) fn count_unused(&mut self, observation: &StepObservation<'_>) {
        let Some(rule) = self.params.pruning.and_then(|p| p.unused) else {
            return;
        };
        for (state, observed) in self.layers.iter_mut().zip(observation.layers) {
            let total: u64 = observed
                .experts
                .iter()
                .map(|e| e.load)
                .fold(0, u64::saturating_add);
            if total == 0 {
                continue;
            }
            let averaged: f64 = state.experts.iter().map(|e| e.load.value).sum();
            let bar = rule.share * averaged / state.experts.len() as f64;
            for expert in &mut state.experts {
                if expert.load.value < bar {
                    expert.unused_for = expert.unused_for.saturating_add(1);
                } else {
                    expert.unused_for = 0;
                }
            }
        }
    }

    /// Asks for the worth of one expert, if it is time.
    pub(super) fn ask_redundant(&mut self, layer: usize) {
        let Some((pruning, rule)) = self
            .params
            .pruning
            .and_then(|pruning| Some((pruning, pruning.redundant?)))
        else {
            return;
        };
        let Some(pending) = &mut self.pending else {
            return;
        };
        let state = &mut self.layers[layer];
        let since = *state.probed_at.get_or_insert(pending.step);
        if pending.step.saturating_sub(since) < rule.every || state.ids.len() <= pruning.min_experts
        {
            return;
        }
        let step = pending.step;
        let check = pending.layers[layer].check;
        let old_enough = |at: &usize| {
            step.saturating_sub(state.experts[*at].born.unwrap_or(0)) >= pruning.min_age
                && check != Some(state.ids[*at])
        };
        // In turn: the first after the one probed last, else from the beginning.
        let after = state
            .probed
            .map_or(0, |last| state.ids.partition_point(|&id| id <= last));
        let next = (after..state.ids.len()).chain(0..after).find(old_enough);
        if let Some(at) = next {
            let expert = state.ids[at];
            state.probed = Some(expert);
            state.probed_at = Some(step);
            pending.layers[layer].probe = Some(expert);
            pending.open.push(Request::ProbeLoss { layer, expert });
        }
    }

    /// Removes what the rules condemn, except the source of this step's split and the newborn.
    pub(super) fn prune(
        &mut self,
        step: u64,
        layer: usize,
        open: &LayerPending,
        split: Option<ExpertId>,
        actions: &mut Vec<Action>,
    ) {
        let Some(pruning) = self.params.pruning else {
            return;
        };
        if let (Some(worth), Some(rule)) = (open.probe_answer, pruning.redundant) {
            let error = worth.standard_error.unwrap_or(0.0);
            let failed = worth.difference + rule.z * error < rule.margin;
            self.record(
                step,
                Some(layer),
                EventKind::Check {
                    expert: worth.expert,
                    masked_minus_full: worth.difference,
                    standard_error: worth.standard_error,
                    failed,
                    patience_left: None,
                },
            );
            if failed && split != Some(worth.expert) && self.room(layer, pruning.min_experts) {
                self.remove(step, layer, worth.expert, RemovalReason::Redundant, actions);
            }
        }
        if let Some(rule) = pruning.unused {
            let state = &self.layers[layer];
            let condemned: Vec<ExpertId> = state
                .ids
                .iter()
                .zip(&state.experts)
                .filter(|(id, expert)| {
                    expert.unused_for >= rule.steps
                        && split != Some(**id)
                        && step.saturating_sub(expert.born.unwrap_or(0)) >= pruning.min_age
                })
                .map(|(&id, _)| id)
                .collect();
            for expert in condemned {
                if self.room(layer, pruning.min_experts) {
                    self.remove(step, layer, expert, RemovalReason::Unused, actions);
                }
            }
        }
    }

    fn room(&self, layer: usize, min_experts: usize) -> bool {
        self.layers[layer].ids.len() > min_experts
    }
}

//! The trigger that waits for the training loss to stop falling.

use serde::{Deserialize, Serialize};

use super::Controller;
use super::params::Trigger;
use super::state::Average;

/// What [`Trigger::Plateau`] remembers; a controller with another trigger has none.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Plateau {
    average: Average,
    /// The average at the last improvement; `None` until the next step, whose own it then is.
    best: Option<f64>,
    /// Step of that improvement.
    best_at: u64,
    /// Step since which there has been something to improve on: the first, that of the last trigger or of the continual phase.
    since: u64,
}

impl Plateau {
    fn observe(&mut self, step: u64, loss: f64, keep: f64, threshold: f64) {
        self.average.update(loss, keep);
        let now = self.average.value;
        match self.best {
            Some(best) if now < best - threshold => (self.best, self.best_at) = (Some(now), step),
            Some(_) => {}
            None => self.restart(step),
        }
    }

    /// From here on it is the present average that has to be improved on.
    fn restart(&mut self, step: u64) {
        self.best = Some(self.average.value);
        (self.best_at, self.since) = (step, step);
    }

    /// The next step begins anew; the average goes on.
    pub(super) fn forget_best(&mut self) {
        self.best = None;
    }

    pub(super) fn contradiction(&self, last_step: Option<u64>) -> Option<&'static str> {
        if !self.average.sound() || self.best.is_some_and(|best| !best.is_finite()) {
            return Some("the average of the loss is not finite");
        }
        let ordered = self.since <= self.best_at && last_step.is_some_and(|s| self.best_at <= s);
        (!ordered).then_some("the loss improved after the last step or before it was watched")
    }
}

impl Controller {
    /// Takes the loss of a step; whether a plateau could have been found on it, and whether one was.
    pub(super) fn find_plateau(&mut self, step: u64, loss: f64, in_phase: bool) -> (bool, bool) {
        let Trigger::Plateau {
            patience,
            threshold,
        } = self.params.trigger
        else {
            return (false, false);
        };
        let keep = self.params.kept_share();
        let plateau = self.plateau.get_or_insert_default();
        plateau.observe(step, loss, keep, threshold);
        let live = in_phase && step.saturating_sub(plateau.since) >= patience;
        let found = in_phase && step.saturating_sub(plateau.best_at) >= patience;
        if found {
            plateau.restart(step);
        }
        (live, found)
    }
}

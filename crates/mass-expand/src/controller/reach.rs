//! What a setting can come to at all, from its parameters alone.

use serde::{Deserialize, Serialize};

use super::Controller;
use super::params::{AfterSplit, ControllerParams, StopRule, Trigger};
use super::watch::Watch;
use crate::ExpandError;

/// The steps between which splits and checks can happen, if each comes as soon as it may.
///
/// # Formula
/// With detectors that need `n` observations (`mass_cpd::AnyDetectorParams::observations_needed`; the least of the kinds
/// watched) and a stop rule that waits `w`:
///
/// ```text
/// ready       = n - 1                               (alignment alone: live_from; a schedule: its first step from there on;
///                                                    a plateau: its patience after step 0 or the continual phase's first)
/// end         = min(live_until, steps)
/// first_split = max(ready, live_from)               if that is before end; else the same of the continual phase
/// first_check = min(first_split + w, steps - 1)     held-out check
/// ```
///
/// The checks on the training batch come with a later trigger, which another split must have room for. It is assumed that the
/// run begins with step 0, has one observation a step, and that every stream is observed in each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reach {
    /// First step at which the trigger can be satisfied, whether or not a split may happen then; `None` if that would be after
    /// more steps than can be counted.
    pub ready: Option<u64>,
    /// First step at which no split may happen any more: the end of the phase (of the continual one, if there is one) or of the
    /// run.
    pub end: u64,
    /// First step at which an expert can be split; `None` if there is none.
    pub first_split: Option<u64>,
    /// Last such step.
    pub last_split: Option<u64>,
    /// First step at which the stop rule can judge an expert; `None` if it never can, or never does.
    pub first_check: Option<u64>,
}

impl ControllerParams {
    /// Which splits and checks these parameters leave possible.
    ///
    /// # Examples
    /// ```
    /// use mass_expand::{ControllerParams, StopRule};
    ///
    /// // The windows of 9 % and the end at 10 % of 2000 steps leave 21 steps.
    /// let reach = ControllerParams::paper(1, 8, 16, 2000).reach();
    /// assert_eq!((reach.first_split, reach.last_split), (Some(179), Some(199)));
    /// // Of 500 steps none: the window of 60 is not full when the phase ends after 50.
    /// let reach = ControllerParams::paper(1, 8, 16, 500).reach();
    /// assert_eq!((reach.ready, reach.end, reach.first_split), (Some(59), 50, None));
    /// ```
    #[must_use]
    pub fn reach(&self) -> Reach {
        let run_ends = self.steps.unwrap_or(u64::MAX);
        let phase = &self.phase;
        let mut reach = self.reach_within(
            self.trigger_in(false),
            (0, phase.live_from),
            phase.live_until.min(run_ends),
            &self.watch,
        );
        if let Some(continual) = &phase.continual
            && phase.live_until < run_ends
        {
            let begins = phase.live_until;
            let trigger = self.trigger_in(true);
            let later = self.reach_within(trigger, (begins, begins), run_ends, continual);
            reach = Reach {
                end: run_ends,
                last_split: later.last_split.or(reach.last_split),
                ..if reach.first_split.is_some() {
                    reach
                } else {
                    later
                }
            };
        }
        reach.first_check = reach.first_split.and_then(|at| self.first_check(at, reach));
        reach
    }

    /// Makes the controller, and refuses a setting in which no split, or no check that the stop rule asks for, can ever be
    /// reached.
    ///
    /// [`check`](Self::check) takes such settings, and [`Controller::diagnoses`] names them.
    ///
    /// # Errors
    /// As [`check`](Self::check), and [`ExpandError::Unreachable`].
    ///
    /// # Examples
    /// ```
    /// use mass_expand::{ControllerParams, Diagnosis, ExpandError};
    /// let short = ControllerParams::paper(1, 8, 16, 500).check_reachable();
    /// let (ready, end, room) = (Some(59), 50, 8);
    /// let why = Diagnosis::NoSplitReachable { ready, end, room };
    /// assert_eq!(short.unwrap_err(), ExpandError::Unreachable(why));
    /// ```
    pub fn check_reachable(&self) -> Result<Controller, ExpandError> {
        let controller = self.check()?;
        match self.unreachable() {
            Some(diagnosis) => Err(ExpandError::Unreachable(diagnosis)),
            None => Ok(controller),
        }
    }

    /// Of detectors, or a plateau's patience, that begin at `begins`, while splits may happen from `live_from` and before `end`.
    fn reach_within(
        &self,
        trigger: Trigger,
        (begins, live_from): (u64, u64),
        end: u64,
        watch: &Watch,
    ) -> Reach {
        let ready = match trigger {
            Trigger::Schedule { .. } | Trigger::ScheduleThenDetector { .. } => {
                self.timetable().and_then(|t| t.due_from(live_from))
            }
            Trigger::Plateau { patience, .. } => begins.checked_add(patience),
            Trigger::AlignmentOnly => Some(live_from),
            Trigger::DetectorOnly | Trigger::DetectorAndAlignment => watch
                .observations_needed()
                .and_then(|n| begins.checked_add(n.saturating_sub(1))),
        };
        let first_split = ready
            .map(|ready| ready.max(live_from))
            .filter(|&at| at < end && self.room() > 0);
        let last_split = first_split.and_then(|_| match (trigger, self.timetable()) {
            (Trigger::Schedule { .. }, Some(timetable)) => timetable.due_until(end - 1),
            _ => Some(end - 1),
        });
        Reach {
            ready,
            end,
            first_split,
            last_split,
            first_check: None,
        }
    }

    fn first_check(&self, first_split: u64, reach: Reach) -> Option<u64> {
        // After one split, and further triggers of which each but the last splits once more.
        let by_triggers = |after: u64| {
            let splits = after.checked_add(1)?;
            if self.room() <= splits {
                return None;
            }
            let at = self.later_split(first_split, splits)?;
            (at < reach.end).then_some(at)
        };
        match self.stop {
            StopRule::Never => None,
            StopRule::Consecutive { .. } => by_triggers(0),
            StopRule::Patience {
                checks_after_expansions,
                ..
            } => by_triggers(checks_after_expansions),
            StopRule::HeldOut { .. } => {
                let due = self.check_due(first_split);
                let last = self.steps.map_or(u64::MAX, |steps| steps.saturating_sub(1));
                (due > first_split && due <= last).then_some(due)
            }
        }
    }

    /// The step at which the held-out rule checks an expert born at `born`: after its wait, or on the run's last step.
    pub(super) fn check_due(&self, born: u64) -> u64 {
        let StopRule::HeldOut { wait, .. } = self.stop else {
            return u64::MAX;
        };
        let last = self.steps.map_or(u64::MAX, |steps| steps.saturating_sub(1));
        born.saturating_add(wait)
            .min(last)
            .max(born.saturating_add(1))
    }

    /// Splits that the layer with most room has room for, if nothing is taken out.
    pub(super) fn room(&self) -> u64 {
        if self.pruning.is_some() {
            return u64::MAX;
        }
        let least = self.experts.iter().copied().min().unwrap_or(self.k_max);
        self.k_max.saturating_sub(least) as u64
    }

    /// The earliest step of the split that is `more` after one at `at`.
    fn later_split(&self, at: u64, more: u64) -> Option<u64> {
        let continual = at >= self.phase.live_until;
        let watch = match &self.phase.continual {
            Some(watch) if continual => watch,
            _ => &self.watch,
        };
        let gap = match self.trigger_in(continual) {
            Trigger::Schedule { .. } | Trigger::ScheduleThenDetector { .. } => {
                return self.timetable()?.after(at, more);
            }
            Trigger::Plateau { patience, .. } => patience,
            Trigger::AlignmentOnly => 1,
            Trigger::DetectorOnly | Trigger::DetectorAndAlignment => {
                // Whoever is not started afresh may raise the next alarm at once.
                let others =
                    watch.expert.is_some() && self.experts.iter().any(|&experts| experts > 1);
                if self.after_split != AfterSplit::Rewarm || others {
                    1
                } else {
                    watch.observations_needed().unwrap_or(u64::MAX)
                }
            }
        };
        at.checked_add(gap.checked_mul(more)?)
    }
}

impl Controller {
    /// Which splits and checks its parameters leave possible; see [`ControllerParams::reach`].
    #[must_use]
    pub fn reach(&self) -> Reach {
        self.params.reach()
    }
}

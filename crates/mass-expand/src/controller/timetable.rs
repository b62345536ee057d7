//! The steps of a schedule.

use super::params::{ControllerParams, Trigger};

/// [`Trigger::Schedule`], its steps numbered from 0: number `i` is `first + (i / splits) every + i % splits`.
#[derive(Clone, Copy)]
pub(super) struct Timetable {
    first: u64,
    every: u64,
    splits: u64,
}

impl ControllerParams {
    /// What [`Trigger::ScheduleThenDetector`] is in the first phase or in the continual one; any other trigger is itself in both.
    pub(super) fn trigger_in(&self, continual: bool) -> Trigger {
        match self.trigger {
            Trigger::ScheduleThenDetector { .. } if continual => Trigger::DetectorOnly,
            Trigger::ScheduleThenDetector { first, every } => Trigger::Schedule {
                first,
                every,
                splits: 1,
            },
            trigger => trigger,
        }
    }

    /// The schedule, if that is the trigger. What [`check`](Self::check) refuses is read as the nearest that it takes.
    pub(super) fn timetable(&self) -> Option<Timetable> {
        let Trigger::Schedule {
            first,
            every,
            splits,
        } = self.trigger_in(false)
        else {
            return None;
        };
        let every = every.max(1);
        Some(Timetable {
            first,
            every,
            splits: splits.clamp(1, every),
        })
    }
}

impl Timetable {
    /// Steps of the schedule up to and with `step`.
    pub(super) fn passed(self, step: u64) -> u64 {
        step.checked_sub(self.first).map_or(0, |since| {
            let row = (since % self.every).saturating_add(1).min(self.splits);
            (since / self.every * self.splits).saturating_add(row)
        })
    }

    /// Step of that number.
    fn step(self, number: u64) -> Option<u64> {
        let rows = (number / self.splits).checked_mul(self.every)?;
        self.first
            .checked_add(rows)?
            .checked_add(number % self.splits)
    }

    /// The first of its steps that is not before `from`.
    pub(super) fn due_from(self, from: u64) -> Option<u64> {
        self.step(from.checked_sub(1).map_or(0, |before| self.passed(before)))
    }

    /// The last of its steps that is not after `until`.
    pub(super) fn due_until(self, until: u64) -> Option<u64> {
        self.step(self.passed(until).checked_sub(1)?)
    }

    /// The step that is `more` of its steps after `at`, one of them.
    pub(super) fn after(self, at: u64, more: u64) -> Option<u64> {
        self.step(self.passed(at).checked_sub(1)?.checked_add(more)?)
    }
}

//! The record of every decision, with the figures it was made on.

use serde::{Deserialize, Serialize};

use super::observation::StopReason;
use super::params::SplitOperator;
use crate::ExpertId;

/// One line of the record. Serialises flat: `{"step":40,"layer":0,"kind":"split","source":2,...}`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Step at which it happened.
    pub step: u64,
    /// The layer; `None` if it concerns all of them.
    pub layer: Option<usize>,
    /// What happened.
    #[serde(flatten)]
    pub kind: EventKind,
}

/// What was watched when a detector raised an alarm.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Watched {
    /// The gradient norm of one expert.
    Expert,
    /// The gradient norm of all of a layer's experts together.
    Layer,
    /// The training loss.
    Loss,
}

/// Why a wanted split was not carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum HoldReason {
    /// The pool has `k_max` experts, and pruning may yet make room.
    Full,
    /// The newest expert has not been checked yet.
    AwaitingCheck,
    /// Nobody has a share of the loss, by which the choice is made: the loss of the layer's tokens is zero.
    NoLossShare,
    /// The only candidates were removed by the check of this step.
    SourceRemoved,
}

/// Why an expert was taken out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum RemovalReason {
    /// The newest expert failed the stop rule's check.
    NoBenefit,
    /// It stayed almost without tokens.
    Unused,
    /// Masking it was shown to cost less than the margin.
    Redundant,
}

/// The kinds of event, each with its statistics.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
#[non_exhaustive]
pub enum EventKind {
    /// A detector raised an alarm.
    Flag {
        /// What it watches.
        watched: Watched,
        /// The expert, if it watches one.
        expert: Option<ExpertId>,
        /// The observation that raised it.
        value: f64,
        /// The detector's statistic.
        statistic: Option<f64>,
        /// Marginal p-value of this step.
        p_value: Option<f64>,
        /// Probability of a false alarm within the detector's horizon at this statistic.
        p_horizon: Option<f64>,
        /// How many observations ago the change is thought to have begun.
        onset_age: Option<u64>,
    },
    /// What a detector saw within [`ControllerParams::trace`](super::ControllerParams::trace) steps of a split, of the stream behind
    /// it: that of its alarm; without one the source's own, the layer's or the loss's, whichever is watched first. Those before
    /// the split come into the record with it, each with its own step, and one that belongs to several splits comes once. Where
    /// expansion ends, detectors see nothing more.
    Observation {
        /// What it watches.
        watched: Watched,
        /// The expert, if it watches one.
        expert: Option<ExpertId>,
        /// The observation.
        value: f64,
        /// The detector's statistic; `None` while it has none.
        statistic: Option<f64>,
        /// Marginal p-value of this step.
        p_value: Option<f64>,
    },
    /// An alignment test.
    Alignment {
        /// The expert tested.
        expert: ExpertId,
        /// Its cosine; `None` if gradient or weights are zero, and then the test is not passed.
        cosine: Option<f64>,
        /// The threshold.
        delta: f64,
        /// Whether `|cosine| < delta`.
        drifted: bool,
    },
    /// The trigger is satisfied and an expert chosen.
    Trigger {
        /// The expert to split.
        source: ExpertId,
        /// Experts that satisfied the trigger.
        candidates: usize,
        /// The stream whose alarm set it off: the source's own, if it raised one; else, of the layer, of the loss and of the
        /// other candidates, that with the smallest p-value. `None` if no detector had a part in it.
        watched: Option<Watched>,
        /// The expert whose stream that is, if it is one's.
        flagged: Option<ExpertId>,
        /// Marginal p-value of that alarm.
        p_value: Option<f64>,
        /// Its p-value over the horizon.
        p_horizon: Option<f64>,
        /// The source's cosine, if it was tested.
        cosine: Option<f64>,
    },
    /// The trigger is satisfied, but nothing may be split now.
    Hold {
        /// Why.
        reason: HoldReason,
        /// Experts that satisfied the trigger.
        candidates: usize,
    },
    /// An expert was masked to see what it is worth.
    Check {
        /// The expert masked.
        expert: ExpertId,
        /// Loss with it masked less loss with it.
        masked_minus_full: f64,
        /// Standard error of that, if it was measured on a probe set.
        standard_error: Option<f64>,
        /// Whether it is of no benefit.
        failed: bool,
        /// Failed checks that may still follow before expansion stops; `None` for a check that counts towards none.
        patience_left: Option<u32>,
    },
    /// An expert was split.
    Split {
        /// The expert that was split.
        source: ExpertId,
        /// The new expert.
        new: ExpertId,
        /// How.
        operator: SplitOperator,
        /// The stream whose alarm set it off, as in [`EventKind::Trigger`].
        watched: Option<Watched>,
        /// The expert whose stream that is, if it is one's.
        flagged: Option<ExpertId>,
        /// Marginal p-value of that alarm.
        p_value: Option<f64>,
        /// Its p-value over the horizon.
        p_horizon: Option<f64>,
        /// The source's cosine, if it was tested.
        cosine: Option<f64>,
        /// Active experts of the layer afterwards.
        experts: usize,
    },
    /// An expert was taken out.
    Remove {
        /// The expert.
        expert: ExpertId,
        /// Why.
        reason: RemovalReason,
        /// Active experts of the layer afterwards.
        experts: usize,
    },
    /// Expansion ended.
    Stop {
        /// Why.
        reason: StopReason,
    },
    /// The continual phase began: new detectors, with their own false-alarm budget.
    ContinualPhase,
}

//! The parts a controller is composed of, each selectable by name.

use serde::{Deserialize, Serialize};

use super::Controller;
use super::watch::Watch;
use crate::{AlignmentThreshold, BisectParams, Decomposition, ExpandError};

/// When an expert may be split.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum Trigger {
    /// A detector's alarm and a passed alignment test (`paper`, `reference`).
    DetectorAndAlignment,
    /// A detector's alarm alone (`calibrated`; ablation).
    DetectorOnly,
    /// A passed alignment test alone (ablation).
    AlignmentOnly,
    /// A fixed schedule (baseline): at `first` and every `every` steps after it, and on the `splits - 1` steps that follow each,
    /// every expert is a candidate. What of it falls between two observed steps counts once, on the later.
    ///
    /// Each of a row's splits is chosen by the averages up to its own step. Both halves of the split before have had theirs
    /// forgotten, so that what counts of them is that step alone: of a balanced split half the tokens each, and
    /// [`Choice::MostLoaded`] then goes on to another expert, as [`Choice::LossShare`] does. [`Choice::TriggeredLowestIndex`]
    /// takes the same expert every time. A held-out check ([`StopRule::HeldOut`]) leaves a layer the first of a row's splits:
    /// until the newcomer is judged, it does not split again.
    Schedule {
        /// First step.
        first: u64,
        /// Steps from one first split to the next, at least 1.
        every: u64,
        /// Experts of a layer that are split each time, on as many steps in a row: at least 1, which is what a setting without
        /// it has, and at most `every`.
        #[serde(default = "one", skip_serializing_if = "is_one")]
        splits: u64,
    },
    /// A schedule of single splits in the first phase, and alarms in the continual one, which has to be there: grow while
    /// everything is new, then when the data change. Leave room for the second below [`ControllerParams::k_max`] by a
    /// [`Phase::live_until`] that ends the first early.
    ///
    /// # Examples
    /// ```
    /// use mass_expand::{ControllerParams, Trigger};
    /// let mut params = ControllerParams::ours(1, 5, 20, 10_000).continual(0.05, 9000);
    /// params.trigger = Trigger::ScheduleThenDetector { first: 50, every: 10 };
    /// params.phase.live_until = 50 + 7 * 10; // splits at 50, 60, .. 110: 12 experts
    /// let reach = params.reach();
    /// assert_eq!((reach.first_split, reach.end), (Some(50), 10_000));
    /// # params.check()?;
    /// # Ok::<(), mass_expand::ExpandError>(())
    /// ```
    ScheduleThenDetector {
        /// First step.
        first: u64,
        /// Steps from one split to the next, at least 1.
        every: u64,
    },
    /// The training loss has stopped falling (baseline; as `ReduceLROnPlateau` lowers a learning rate, with the threshold in
    /// nats): every expert is then a candidate.
    ///
    /// # Formula
    /// With `m[t]` the exponential average of the loss over `averaging_steps`, fed on every step of the run, and a best `b` that
    /// begins as the first average:
    ///
    /// ```text
    /// m[t] < b - threshold    an improvement: b = m[t], made at step i = t
    /// t - i >= patience       a plateau, if t is in the phase: b = m[t] and i = t, in every layer, split or not
    /// ```
    ///
    /// Falls smaller than the threshold add up until together they are an improvement. A plateau found before `live_from`
    /// waits for it, unless the loss improves once more. The continual phase begins with a new best.
    Plateau {
        /// Steps without an improvement, at least 1.
        patience: u64,
        /// Fall of the average, in nats, that is an improvement if exceeded; finite and at least 0.
        threshold: f64,
    },
}

const fn one() -> u64 {
    1
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde passes a reference"
)]
const fn is_one(splits: &u64) -> bool {
    *splits == 1
}

/// Which expert is split once the trigger is satisfied. Ties go to the lowest index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Choice {
    /// Among the triggered, the lowest index (`reference`; `paper` does not say).
    TriggeredLowestIndex,
    /// Among the triggered, the smallest marginal p-value of its own detector.
    TriggeredSmallestP,
    /// Of all, the largest share of the loss (`calibrated`, `ours`); needs `loss_share`. On a step without shares, as of a loss of
    /// zero, the layer does not split.
    LossShare,
    /// Of all, the most tokens.
    MostLoaded,
    /// Of all, the fewest tokens.
    LeastUsed,
    /// Of all, the largest routing entropy; needs `routing_entropy` of every expert with tokens. One that has had none since its
    /// average began counts as zero.
    RoutingEntropy,
    /// Of all, any, from the controller's seed.
    Random,
}

/// How an expert is split.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum SplitOperator {
    /// The newcomer copies the source; see [`divide_gradient`](crate::divide_gradient) and
    /// [`preserve_mass`](crate::preserve_mass()).
    Clone {
        /// How the source's gradient is cut down to its aligned part; `None` for plain cloning.
        decomposition: Option<Decomposition>,
        /// Whether both logits get an offset of `-ln 2`.
        preserve_mass: bool,
    },
    /// The newcomer copies the source's weights and the gate divides its tokens; see [`bisect`](crate::bisect()). With
    /// fewer than two distinct tokens that fails, and the loop should clone with `preserve_mass` instead.
    Bisect(BisectParams),
}

/// What a newcomer's optimizer moments start from. Its step count starts from zero (`Zero`) or the source's (`Inherit`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Moments {
    /// Zero.
    Zero,
    /// The source's.
    Inherit,
}

/// What becomes of the detectors after a split or a removal. The newcomer's own detector always starts afresh.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AfterSplit {
    /// Nothing (`paper`, which does not say).
    Keep,
    /// The source's count starts again and its windows stay (`reference`).
    ResetSourceCount,
    /// The source's detector, the layer's and the loss's all start afresh (`calibrated`): the split itself moves what they
    /// watch, and would otherwise raise the next alarm. After a removal those of the layer, of the loss and of the experts
    /// that inherit the tokens do: the other half of the latest split that the removed expert took part in, if it is still
    /// there. Without one, and where an unused expert goes, whose gate is not given back, they are all to whom its tokens
    /// could add more than a twentieth.
    Rewarm,
}

/// What a detector sees of an expert that got no tokens, or whose gradient is exactly zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unused {
    /// A norm of zero (`paper`, `reference`). Not with a detector of logarithms.
    ObserveZero,
    /// A gap: it learns nothing, and the next norm is not predicted from the last (`mass_cpd::Detector::skip`; `calibrated`).
    Skip,
}

/// When expansion ends for lack of benefit. `k_max` always ends it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum StopRule {
    /// Never.
    Never,
    /// `paper`: whenever the trigger fires after a first expansion, the newest expert is masked on the same batch; a
    /// loss that is no higher is a failed check; `gamma` failed checks in a row stop expansion. Nothing is removed.
    Consecutive {
        /// Failed checks in a row that stop expansion, at least 1.
        gamma: u32,
    },
    /// `reference`: the same check, once more than `checks_after_expansions` expansions have happened. On failure the
    /// newest expert is removed; with patience left that costs one patience and the split is still carried out,
    /// with none left expansion stops.
    Patience {
        /// Failures forgiven.
        patience: u32,
        /// Expansions without a check (1 for language, 0 for vision).
        checks_after_expansions: u64,
    },
    /// `calibrated`: `wait` steps after each split the newest expert is masked on a held-out probe set. It has failed unless
    /// `difference - z * standard_error > margin`. Until it has been checked the layer does not split again. A check that
    /// falls due after the phase is made all the same, and at the latest on the run's last step
    /// ([`ControllerParams::steps`]).
    HeldOut {
        /// Loss, in nats, that an expert has to be worth; at least 0.
        margin: f64,
        /// Standard errors by which the worth has to exceed the margin; at least 0.
        z: f64,
        /// Steps a newcomer is given before it is checked, at least 1.
        wait: u64,
        /// Failed checks in a row that stop expansion, at least 1.
        patience: u32,
        /// Whether an expert that failed is removed.
        remove: bool,
    },
}

/// When a split may happen, in steps. Detectors are fed from the first step on, so that they can be warm at
/// `live_from`, until `live_until`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Phase {
    /// First step at which a split may happen.
    pub live_from: u64,
    /// First step at which none may happen any more; `u64::MAX` for no end.
    pub live_until: u64,
    /// What comes after it: `None` for standard training, or detectors with their own false-alarm budget, which start
    /// afresh at `live_until` and then stay live. A layer that the stop rule had stopped is opened again.
    pub continual: Option<Watch>,
}

/// Taking experts out of the pool. It goes on after expansion has ended.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pruning {
    /// Never fewer than this many experts in a layer, at least 1.
    pub min_experts: usize,
    /// An expert younger than this many steps is left alone, at least 1. Those that the run began with are as old as the run.
    pub min_age: u64,
    /// Remove experts that stay almost without tokens.
    pub unused: Option<PruneUnused>,
    /// Remove experts that are shown to be worth nothing.
    pub redundant: Option<PruneRedundant>,
}

/// Removes an expert whose averaged load stays under `share` of the layer's mean load for `steps` steps in a row.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PruneUnused {
    /// Fraction of the mean load, in (0, 1).
    pub share: f64,
    /// Steps in a row, at least 1.
    pub steps: u64,
}

/// Every `every` steps one expert of each layer, in turn, is masked on the probe set; it is removed if
/// `difference + z * standard_error < margin`, that is, if masking it is shown to cost less than the margin.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PruneRedundant {
    /// Steps between probes, at least 1.
    pub every: u64,
    /// Loss in nats, at least 0.
    pub margin: f64,
    /// Standard errors, at least 0.
    pub z: f64,
}

/// Unchecked parameters of a [`Controller`]; [`check`](Self::check) makes the controller.
///
/// Begin with [`paper`](Self::paper), [`reference`](Self::reference), [`calibrated`](Self::calibrated) or [`ours`](Self::ours)
/// and change what should differ: every field is public, every rule can be had with every other.
///
/// # Examples
/// ```
/// use mass_expand::{Choice, ControllerParams, Trigger};
/// let mut params = ControllerParams::paper(1, 4, 8, 2000);
/// params.trigger = Trigger::Schedule { first: 100, every: 50, splits: 1 };
/// params.choice = Choice::MostLoaded;
/// let controller = params.check()?;
/// assert_eq!(controller.active(0).len(), 4);
/// # Ok::<(), mass_expand::ExpandError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ControllerParams {
    /// Active experts of each layer at the start, named `0, 1, ...`; one entry per layer. In all of them together at most
    /// 2^20.
    pub experts: Vec<usize>,
    /// Most experts a layer may have.
    pub k_max: usize,
    /// Steps of the whole run, numbered from 0; `None` if that is not known. No split depends on it: a held-out check is
    /// made on the last of them if it would fall due later, and [`reach`](Self::reach) ends with it.
    #[serde(default)]
    pub steps: Option<u64>,
    /// When.
    pub phase: Phase,
    /// What is watched, and by which detectors.
    pub watch: Watch,
    /// What a detector sees of an expert without tokens.
    pub unused: Unused,
    /// What satisfies the trigger.
    pub trigger: Trigger,
    /// The threshold of the alignment test.
    pub alignment: AlignmentThreshold,
    /// Which expert is split.
    pub choice: Choice,
    /// Steps over which load, loss share and entropy are averaged for the choice, and the loss for [`Trigger::Plateau`]
    /// (exponentially), at least 1.
    pub averaging_steps: f64,
    /// How it is split.
    pub operator: SplitOperator,
    /// What a newcomer's moments start from.
    pub moments: Moments,
    /// What becomes of the detectors.
    pub after_split: AfterSplit,
    /// When to stop.
    pub stop: StopRule,
    /// What is taken out again.
    pub pruning: Option<Pruning>,
    /// Seed of [`Choice::Random`].
    pub seed: u64,
    /// Steps before and after a split of which the record has every observation of the stream behind it
    /// ([`EventKind::Observation`](super::EventKind::Observation)), at most 1000; 0 for none. Of every stream as many are kept. No split
    /// depends on it.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub trace: u64,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde passes a reference"
)]
const fn is_zero(trace: &u64) -> bool {
    *trace == 0
}

impl ControllerParams {
    /// What an exponential average over [`averaging_steps`](Self::averaging_steps) keeps of itself in a step.
    pub(super) fn kept_share(&self) -> f64 {
        1.0 - 1.0 / self.averaging_steps
    }

    /// Checks every parameter and makes the controller.
    ///
    /// # Errors
    /// [`ExpandError::Parameter`] for the first one out of range, [`ExpandError::Detector`] if a detector refuses its
    /// own, [`ExpandError::Empty`] without layers.
    pub fn check(&self) -> Result<Controller, ExpandError> {
        Controller::new(self.clone())
    }
}

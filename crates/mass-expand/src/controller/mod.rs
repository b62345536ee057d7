//! The controller: told each step's figures, it says which expert to split, which to drop and when to stop.
//!
//! ```text
//! every step, after the backward pass and before the optimizer:
//!     requests = begin_step(observation)
//!     for each request: answer(...)          may return further requests
//!     actions = finish_step()                split, remove, stop; then run the optimizer
//!     drain_events()                         to the log
//! ```
//!
//! # Which variant does what
//!
//! | rule | `paper` | `reference` | `calibrated` | why it differs |
//! |---|---|---|---|---|
//! | watched | each expert's norm | each expert's norm (first matrix) | loss, layer's pooled norm, each expert's norm | at a change of distribution the loss moves by far more than one expert's norm |
//! | detector | windowed z, `p <= alpha` | windowed z, `p < alpha` | calibrated CUSUM | the windowed scores are not independent, so their alpha is no false-alarm rate |
//! | level | per expert and step | per expert and step | shared by all streams over the phase | it is then the chance that a run without a change splits anything |
//! | alignment test | `abs(c) < 0.001` | `abs(c) < 0.001` | none | the cosines looked like those of random directions, so the test thins at random |
//! | choice | lowest index (the paper does not say) | lowest index | largest share of the loss | it foretells the gain of a split better than the gradient norm |
//! | split | clone, whole-matrix decomposition | clone, row by row | bisect | twins with equal logits share their mass and may both lose their tokens |
//! | detectors after a split | kept | source's count starts again | source, newcomer, layer and loss start afresh | the split moves what they watch |
//! | detectors after a removal | kept | kept | who inherits the tokens, layer and loss start afresh | the removal moves what they watch |
//! | expert without tokens | norm 0 | norm 0 | not observed | a zero is no norm of a gradient |
//! | stop | gamma failed same-batch checks in a row | same-batch checks with patience, failed newcomer removed | held-out probe with margin and standard error, also after the phase | the same-batch check did not fire even with newcomers nearly dead |
//!
//! `ours` watches nothing: [`ControllerParams::ours`] has what it does, and when to take it. The other three are for data that may
//! change, and for the paper's claims.
//!
//! # What can go wrong without an error
//!
//! A phase may end before a detector has learnt enough to say anything, or before a newcomer is judged:
//! [`ControllerParams::reach`] says at which steps splits and checks can come, and [`ControllerParams::check_reachable`] refuses
//! settings in which none can. What a run itself shows (nothing triggered; triggered as soon as it could be; a pair of which
//! one gets everything; a `p` that selects everybody; a gate without gradient) [`Controller::diagnoses`] names, with figures.
//!
//! # Why not a bank of detectors
//!
//! `mass_cpd::Bank` updates thousands of streams in one piece, all of them at every step and by one rule. The controller's
//! streams are few and not in step: an expert without tokens is not observed, single ones start afresh after a split or a
//! removal, `paper` and `reference` watch by another rule, and the level is divided among `k_max` experts from the start so that
//! it does not move when one is born. There is also little to win. A bank takes 39 ns a stream and update where a detector of
//! its own takes 50 (lagged reference; `docs/statistics.md` of the repository), and the whole of `calibrated` 0.13 µs a step and
//! expert (this crate's README): at 32 experts 4 µs, which a bank would bring to 3.8, of training steps that take milliseconds
//! at the least. A bank is for watching more streams than one model has experts.
//!
//! The reasons in the table name findings of a small pilot (one layer, synthetic data), not of this crate's tests.
//!
//! Two readings are this crate's own. A zero gradient or weight matrix has no cosine and does not pass the alignment
//! test in any variant. When the reference's check removes the very expert that was to be split, the next candidate is
//! split, or none: a removed expert is never a source.

mod accept;
mod choice;
mod decide;
mod diagnosis;
mod event;
mod observation;
mod observe;
mod params;
mod pending;
mod plateau;
mod prune;
mod reach;
mod state;
mod timetable;
mod trace;
mod validate;
mod variants;
mod watch;

use mass_cpd::AnyDetector;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

pub use diagnosis::{Diagnosis, RoutingObservation};
pub use event::{Event, EventKind, HoldReason, RemovalReason, Watched};
pub use observation::{
    Action, Answer, ExpertObservation, LayerObservation, Request, StepObservation, StopReason,
};
pub use params::{
    AfterSplit, Choice, ControllerParams, Moments, Phase, PruneRedundant, PruneUnused, Pruning,
    SplitOperator, StopRule, Trigger, Unused,
};
pub use reach::Reach;
pub use watch::{Level, Watch};

use crate::ExpertId;
use pending::Pending;
use state::LayerState;

/// Decides when and how the expert pools of a model grow; made by [`ControllerParams::check`].
///
/// It holds no tensors. Saved with serde at any point, also between [`begin_step`](Self::begin_step) and
/// [`finish_step`](Self::finish_step), and restored, it goes on with the same decisions to the last bit.
///
/// # Examples
/// ```
/// use mass_expand::*;
///
/// let mut params = ControllerParams::paper(1, 2, 3, 1000);
/// params.trigger = Trigger::Schedule { first: 1, every: 1, splits: 1 };
/// params.stop = StopRule::Never;
/// let mut controller = params.check()?;
/// for step in 0..2 {
///     let experts: Vec<ExpertObservation> = controller
///         .active(0)
///         .iter()
///         .map(|&id| ExpertObservation {
///             id,
///             gradient_norm: 1.0,
///             cosine: Some(0.0),
///             load: 10,
///             loss_share: None,
///             routing_entropy: None,
///         })
///         .collect();
///     let layers = [LayerObservation { experts: &experts, hidden: 8, dim: 4 }];
///     let mut requests = controller.begin_step(&StepObservation { step, loss: 1.0, layers: &layers })?;
///     assert!(requests.is_empty()); // this set-up needs nothing more
///     for action in controller.finish_step()? {
///         println!("{action:?}"); // Split { layer: 0, source: 0, newcomer: 2, .. } and Stop { .. Maximum }
///     }
/// }
/// assert_eq!(controller.active(0), [ExpertId(0), ExpertId(1), ExpertId(2)]);
/// assert_eq!(controller.pairs(0), [(ExpertId(0), ExpertId(2))]);
/// # Ok::<(), ExpandError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "state::Stored")]
pub struct Controller {
    params: ControllerParams,
    layers: Vec<LayerState>,
    loss_detector: Option<AnyDetector>,
    #[serde(skip_serializing_if = "Option::is_none")]
    plateau: Option<plateau::Plateau>,
    generator: ChaCha8Rng,
    last_step: Option<u64>,
    live_steps: u64,
    continual: bool,
    /// The phase is over and nothing follows it.
    ended: bool,
    /// The step on which that was found.
    ended_at: Option<u64>,
    pending: Option<Pending>,
    signs: diagnosis::Signs,
    #[serde(skip_serializing_if = "trace::Trace::is_empty")]
    trace: trace::Trace,
    events: Vec<Event>,
}

impl Controller {
    /// The parameters it was made with.
    #[must_use]
    pub fn params(&self) -> &ControllerParams {
        &self.params
    }

    /// Number of layers.
    #[must_use]
    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    /// The layer's active experts, in the order in which observations list them: by birth. Empty for a layer that does
    /// not exist.
    #[must_use]
    pub fn active(&self, layer: usize) -> &[ExpertId] {
        self.layers.get(layer).map_or(&[], |l| &l.ids)
    }

    /// The pairs (source, newcomer) of which both are active: what the redundancy loss is taken over.
    #[must_use]
    pub fn pairs(&self, layer: usize) -> &[(ExpertId, ExpertId)] {
        self.layers.get(layer).map_or(&[], |l| &l.pairs)
    }

    /// [`pairs`](Self::pairs) as positions in [`active`](Self::active), the form that
    /// [`redundancy_loss`](crate::redundancy_loss()) takes.
    #[must_use]
    pub fn pair_positions(&self, layer: usize) -> Vec<(usize, usize)> {
        let Some(state) = self.layers.get(layer) else {
            return Vec::new();
        };
        state
            .pairs
            .iter()
            .filter_map(|&(a, b)| Some((state.position(a)?, state.position(b)?)))
            .collect()
    }

    /// Splits carried out in a layer so far.
    #[must_use]
    pub fn expansions(&self, layer: usize) -> u64 {
        self.layers.get(layer).map_or(0, |l| l.expansions)
    }

    /// Why the layer no longer expands; `None` while it may.
    #[must_use]
    pub fn stopped(&self, layer: usize) -> Option<StopReason> {
        if self.ended {
            return Some(StopReason::PhaseEnd);
        }
        self.layers.get(layer).and_then(|l| l.stopped)
    }

    /// The layer's newest expert, while the held-out rule has still to judge it. That goes on after expansion has ended: a
    /// loop that stops calling the controller leaves such an expert unjudged.
    #[must_use]
    pub fn awaiting_check(&self, layer: usize) -> Option<ExpertId> {
        let newest = self.layers.get(layer)?.newest?;
        let judges = matches!(self.params.stop, StopRule::HeldOut { .. });
        (judges && !newest.checked).then_some(newest.id)
    }

    /// Steps so far on which detection could have led to a split: inside the phase, in a layer that may expand, with a
    /// detector past its warm-up and its window full. For a plateau of the loss, with its patience past since the start or the
    /// last plateau; for the other triggers without detectors, the steps inside the phase.
    #[must_use]
    pub fn live_steps(&self) -> u64 {
        self.live_steps
    }

    /// The last step observed.
    #[must_use]
    pub fn last_step(&self) -> Option<u64> {
        self.last_step
    }

    /// Requests of the step under way that have no answer yet.
    #[must_use]
    pub fn open_requests(&self) -> &[Request] {
        self.pending.as_ref().map_or(&[], |p| &p.open)
    }

    /// Takes the events recorded since the last call.
    pub fn drain_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    /// Whether the expansion phase ended on this step.
    fn ended_at(&self, step: u64) -> bool {
        self.ended_at == Some(step)
    }

    fn record(&mut self, step: u64, layer: Option<usize>, kind: EventKind) {
        self.events.push(Event { step, layer, kind });
    }
}

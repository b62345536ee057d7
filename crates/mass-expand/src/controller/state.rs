//! What a controller remembers, and how that is saved and checked when it comes back.

use std::mem::discriminant;

use mass_cpd::{AlarmAt, AnyDetector, Detector};
use serde::{Deserialize, Serialize};

use super::diagnosis::{LayerSigns, Signs};
use super::observation::{ExpertObservation, StopReason};
use super::params::{ControllerParams, Trigger};
use super::pending::Pending;
use super::plateau::Plateau;
use super::trace::Trace;
use super::{Controller, validate};
use crate::{ExpandError, ExpertId};

/// Exponential average whose weights are normalised, so that its first values are not drawn towards zero.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Average {
    pub(super) value: f64,
    weight: f64,
}

impl Average {
    pub(super) fn update(&mut self, x: f64, keep: f64) {
        self.weight = keep * self.weight + 1.0;
        self.value += (x - self.value) / self.weight;
    }

    /// Whether updates can have made it: of none, or of some, of which the last weighs 1.
    pub(super) fn sound(&self) -> bool {
        let some = self.value.is_finite() && self.weight.is_finite() && self.weight >= 1.0;
        some || *self == Self::default()
    }
}

/// One expert.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ExpertState {
    pub(super) detector: Option<AnyDetector>,
    /// Step of birth; `None` for the experts of the start.
    pub(super) born: Option<u64>,
    pub(super) load: Average,
    pub(super) loss_share: Average,
    pub(super) entropy: Average,
    /// Steps in a row with almost no tokens.
    pub(super) unused_for: u64,
    /// Steps that the averages are of.
    pub(super) averaged_steps: u64,
}

impl ExpertState {
    pub(super) fn new(detector: Option<AnyDetector>, born: Option<u64>) -> Self {
        Self {
            detector,
            born,
            load: Average::default(),
            loss_share: Average::default(),
            entropy: Average::default(),
            unused_for: 0,
            averaged_steps: 0,
        }
    }

    pub(super) fn average(&mut self, observed: &ExpertObservation, keep: f64) {
        self.averaged_steps = self.averaged_steps.saturating_add(1);
        self.load.update(observed.load as f64, keep);
        if let Some(share) = observed.loss_share {
            self.loss_share.update(share, keep);
        }
        if let Some(entropy) = observed.routing_entropy {
            self.entropy.update(entropy, keep);
        }
    }

    /// After a split both halves are other experts than the source was, and so is who inherits the tokens of one removed.
    pub(super) fn forget_averages(&mut self) {
        self.averaged_steps = 0;
        self.load = Average::default();
        self.loss_share = Average::default();
        self.entropy = Average::default();
        self.unused_for = 0;
    }
}

/// The newest expert of a layer that is still there.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Newest {
    pub(super) id: ExpertId,
    pub(super) born: u64,
    /// Whether the held-out rule has judged it.
    pub(super) checked: bool,
}

/// One layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LayerState {
    /// Active experts, in the order of their birth.
    pub(super) ids: Vec<ExpertId>,
    /// Their states, in the same order.
    pub(super) experts: Vec<ExpertState>,
    pub(super) detector: Option<AnyDetector>,
    pub(super) next_id: u32,
    pub(super) pairs: Vec<(ExpertId, ExpertId)>,
    pub(super) newest: Option<Newest>,
    pub(super) expansions: u64,
    /// Failed checks: in a row, or of the patience used up.
    pub(super) failures: u32,
    pub(super) stopped: Option<StopReason>,
    /// The expert that the last probe for redundancy went to.
    pub(super) probed: Option<ExpertId>,
    /// Step of that probe.
    pub(super) probed_at: Option<u64>,
    /// What diagnoses need.
    pub(super) signs: LayerSigns,
}

impl LayerState {
    pub(super) fn position(&self, id: ExpertId) -> Option<usize> {
        self.ids.binary_search(&id).ok()
    }

    /// Who gets the tokens of an expert that is removed: the other half of the latest split that it took part in and whose gate
    /// it so gets back, if that is still there. Where there is none, or the gate is not given back, everyone whose own tokens
    /// these are more than a twentieth of, on average: less does not show in a gradient norm.
    pub(super) fn heirs(&self, id: ExpertId, gate_is_given_back: bool) -> Vec<ExpertId> {
        let half = self
            .pairs
            .iter()
            .rev()
            .find_map(|&(a, b)| (a == id).then_some(b).or_else(|| (b == id).then_some(a)));
        if let Some(half) = half
            && gate_is_given_back
        {
            return vec![half];
        }
        let load = self
            .position(id)
            .map_or(0.0, |at| self.experts[at].load.value);
        let gains = |expert: &ExpertState| load > 0.05 * expert.load.value;
        let others = self.ids.iter().zip(&self.experts);
        others
            .filter(|&(&other, expert)| other != id && (Some(other) == half || gains(expert)))
            .map(|(&other, _)| other)
            .collect()
    }

    pub(super) fn remove(&mut self, id: ExpertId) {
        if let Some(at) = self.position(id) {
            self.ids.remove(at);
            self.experts.remove(at);
            self.pairs.retain(|&(a, b)| a != id && b != id);
            if self.newest.is_some_and(|newest| newest.id == id) {
                self.newest = None;
            }
        }
    }
}

impl Controller {
    pub(super) fn new(params: ControllerParams) -> Result<Self, ExpandError> {
        validate::validate(&params)?;
        let watch = &params.watch;
        let mut layers = Vec::with_capacity(params.experts.len());
        let expert_detector = watch.make_expert(&params)?;
        let layer_detector = watch.make_layer(&params)?;
        for &experts in &params.experts {
            let full = experts >= params.k_max && params.pruning.is_none();
            layers.push(LayerState {
                ids: (0..experts as u32).map(ExpertId).collect(),
                experts: vec![ExpertState::new(expert_detector.clone(), None); experts],
                detector: layer_detector.clone(),
                next_id: experts as u32,
                pairs: Vec::new(),
                newest: None,
                expansions: 0,
                failures: 0,
                stopped: full.then_some(StopReason::Maximum),
                probed: None,
                probed_at: None,
                signs: LayerSigns::default(),
            });
        }
        let loss_detector = watch.make_loss(&params)?;
        let generator = rand_chacha::rand_core::SeedableRng::seed_from_u64(params.seed);
        Ok(Self {
            params,
            layers,
            loss_detector,
            plateau: None,
            generator,
            last_step: None,
            live_steps: 0,
            continual: false,
            ended: false,
            ended_at: None,
            pending: None,
            signs: Signs::default(),
            trace: Trace::default(),
            events: Vec::new(),
        })
    }

    /// New detectors for the continual phase; layers that the stop rule had stopped are opened again.
    pub(super) fn begin_continual(&mut self, watch: &super::Watch) -> Result<(), ExpandError> {
        let expert = watch.make_expert(&self.params)?;
        let layer_detector = watch.make_layer(&self.params)?;
        self.loss_detector = watch.make_loss(&self.params)?;
        if let Some(plateau) = &mut self.plateau {
            plateau.forget_best();
        }
        for layer in &mut self.layers {
            for state in &mut layer.experts {
                state.detector = expert.clone();
            }
            layer.detector = layer_detector.clone();
            layer.failures = 0;
            if layer.ids.len() < self.params.k_max {
                layer.stopped = None;
            }
        }
        self.continual = true;
        Ok(())
    }

    /// The trigger in force.
    pub(super) fn trigger(&self) -> Trigger {
        self.params.trigger_in(self.continual)
    }

    /// The detectors in force.
    pub(super) fn watch(&self) -> &super::Watch {
        match &self.params.phase.continual {
            Some(continual) if self.continual => continual,
            _ => &self.params.watch,
        }
    }
}

/// A controller as it is stored, before it has been checked.
#[derive(Deserialize)]
#[serde(rename = "Controller", deny_unknown_fields)]
pub(super) struct Stored {
    params: ControllerParams,
    layers: Vec<LayerState>,
    loss_detector: Option<AnyDetector>,
    plateau: Option<Plateau>,
    generator: rand_chacha::ChaCha8Rng,
    last_step: Option<u64>,
    live_steps: u64,
    continual: bool,
    ended: bool,
    ended_at: Option<u64>,
    pending: Option<Pending>,
    signs: Signs,
    #[serde(default)]
    trace: Trace,
    events: Vec<super::Event>,
}

impl TryFrom<Stored> for Controller {
    type Error = ExpandError;

    fn try_from(stored: Stored) -> Result<Self, ExpandError> {
        validate::validate(&stored.params)?;
        let controller = Self {
            params: stored.params,
            layers: stored.layers,
            loss_detector: stored.loss_detector,
            plateau: stored.plateau,
            generator: stored.generator,
            last_step: stored.last_step,
            live_steps: stored.live_steps,
            continual: stored.continual,
            ended: stored.ended,
            ended_at: stored.ended_at,
            pending: stored.pending,
            signs: stored.signs,
            trace: stored.trace,
            events: stored.events,
        };
        let (params, watch) = (&controller.params, controller.watch());
        let made = [
            watch.make_expert(params)?,
            watch.make_layer(params)?,
            watch.make_loss(params)?,
        ];
        match controller.contradiction(&made) {
            None => Ok(controller),
            Some(reason) => Err(ExpandError::State { reason }),
        }
    }
}

impl Controller {
    /// What in a stored controller contradicts itself, if anything does. `made` are new detectors of an expert, a layer and the
    /// loss.
    fn contradiction(
        &self,
        [expert, of_layer, loss]: &[Option<AnyDetector>; 3],
    ) -> Option<&'static str> {
        if self.layers.len() != self.params.experts.len() {
            return Some("the number of layers differs from the parameters");
        }
        // More than can be counted one by one. Their numbers may be larger: whoever observes gives them.
        if self.live_steps > 1 << 53 {
            return Some("it has seen more steps than there can be");
        }
        if self.continual && self.params.phase.continual.is_none() {
            return Some("a continual phase is under way that the parameters do not have");
        }
        if !same(&self.loss_detector, loss) {
            return Some("the loss detector differs from the parameters");
        }
        let awaits = matches!(self.params.trigger, Trigger::Plateau { .. });
        if self.plateau.is_some() != (awaits && self.last_step.is_some()) {
            return Some("it waits for a plateau that is not its trigger, or for none that is");
        }
        if let Some(plateau) = &self.plateau
            && let Some(reason) = plateau.contradiction(self.last_step)
        {
            return Some(reason);
        }
        for (layer, &experts) in self.layers.iter().zip(&self.params.experts) {
            if layer.ids.is_empty()
                || layer.ids.len() > self.params.k_max
                || layer.experts.len() != layer.ids.len()
            {
                return Some("a layer has too few or too many experts");
            }
            let named = (experts as u64).saturating_add(layer.expansions);
            if named != layer.next_id.into() {
                return Some("a layer's expansions are not those that named its experts");
            }
            if !layer.ids.is_sorted_by(|a, b| a < b)
                || layer.ids.last().is_none_or(|last| last.0 >= layer.next_id)
            {
                return Some("the names of a layer's experts are not in order");
            }
            let active = |id: ExpertId| layer.position(id).is_some();
            if layer
                .pairs
                .iter()
                .any(|&(a, b)| !active(a) || !active(b) || a == b)
                || layer.newest.is_some_and(|newest| !active(newest.id))
            {
                return Some("a layer names an expert that is not active");
            }
            if !same(&layer.detector, of_layer)
                || !layer.experts.iter().all(|e| same(&e.detector, expert))
            {
                return Some("a layer's detectors differ from the parameters");
            }
            let averages = layer
                .experts
                .iter()
                .flat_map(|e| [&e.load, &e.loss_share, &e.entropy])
                .chain([&layer.signs.selected, &layer.signs.constant]);
            if !averages.into_iter().all(|a| a.sound() && a.value >= 0.0) {
                return Some("an average is none of figures that there can be");
            }
            let births = layer.experts.iter().map(|e| e.born);
            if births
                .chain([layer.newest.map(|newest| newest.born), layer.probed_at])
                .any(|step| step > self.last_step)
            {
                return Some("an expert was born or probed after the last step");
            }
        }
        if let Some(reason) = self.trace.contradiction(self) {
            return Some(reason);
        }
        match &self.pending {
            Some(pending) => pending.contradiction(self),
            None => None,
        }
    }
}

/// Whether a stored detector has the parameters of one made anew.
fn same(stored: &Option<AnyDetector>, made: &Option<AnyDetector>) -> bool {
    use AnyDetector as D;
    // Levels are quotients, which a text may have kept but for the last digit.
    let settle = |stored: &mut f64, made: f64| {
        if (*stored / made - 1.0).abs() < 1e-12 {
            *stored = made;
        }
    };
    match (stored, made) {
        (None, None) => true,
        (Some(D::WindowedZ(stored)), Some(D::WindowedZ(made))) => {
            let (mut stored, made) = (*stored.params(), made.params());
            settle(&mut stored.alpha, made.alpha);
            stored == *made
        }
        (Some(D::CalibratedCusum(stored)), Some(D::CalibratedCusum(made))) => {
            let (mut stored, made) = (*stored.params(), made.params());
            settle(&mut stored.alpha, made.alpha);
            if let (AlarmAt::AverageRunLength(stored), AlarmAt::AverageRunLength(made)) =
                (&mut stored.alarm_at, made.alarm_at)
            {
                settle(stored, made);
            }
            stored == *made
        }
        (Some(D::TrainingMonitor(stored)), Some(D::TrainingMonitor(made))) => {
            let (mut stored, made) = (*stored.params(), made.params());
            settle(&mut stored.alpha, made.alpha);
            stored == *made
        }
        // Kinds that this crate does not know by name: the detector has checked itself.
        (Some(stored), Some(made)) => discriminant(stored) == discriminant(made),
        (None, Some(_)) | (Some(_), None) => false,
    }
}

/// Puts a detector back to its beginning, if there is one.
pub(super) fn reset(detector: &mut Option<AnyDetector>) {
    if let Some(detector) = detector {
        detector.reset();
    }
}

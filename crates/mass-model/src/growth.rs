//! Growing a pool of experts while it trains: what the decisions of `mass_expand` do to weights, gradients and optimiser.
//!
//! ```
//! use mass_expand::ControllerParams;
//! use mass_model::growth::{Grower, GrowerConfig, Mixtures};
//! use mass_model::lm::{LanguageModel, LanguageModelConfig};
//! use mass_model::nn::{BlockConfig, MoeConfig};
//! use mass_model::optim::{AdamW, AdamWConfig};
//! use mass_model::{Activation, seeded_rng};
//! use mass_routing::{Combine, RouterConfig};
//!
//! // Straight-through weights: with renormalised ones a token of one expert teaches the gate nothing.
//! let router = RouterConfig::TopP { p: 0.5, combine: Combine::StraightThrough };
//! let moe = MoeConfig::new(8, 16, 2, Activation::GeluErf, router);
//! let block = BlockConfig { heads: 2, layer_norm_eps: 1e-5, moe };
//! let config = LanguageModelConfig { vocab: 16, max_seq: 8, layers: 1, embedding_std: 0.02, block };
//! let mut model = LanguageModel::new(&config, &mut seeded_rng(0))?;
//! let mut optimizer = AdamW::new(AdamWConfig::default())?;
//! // One layer, from 2 experts to 4, in a run of 40 steps.
//! let mut grower = Grower::new(GrowerConfig::new(ControllerParams::ours(1, 2, 4, 40)))?;
//!
//! let tokens: Vec<u32> = (0..64).map(|t| t % 16).collect();
//! let targets: Vec<u32> = tokens.iter().map(|t| (t + 1) % 16).collect();
//! for step in 0..40 {
//!     let mut pass = model.train_pass(&tokens, &targets, 8)?; // loss and gradients
//!     model.adapt(&pass.layers)?; // routers that balance themselves learn
//!     // Observe, decide, split or remove. The losses are for rules that ask for them; `ours` does not.
//!     grower.step(step, &mut model, &mut optimizer, &mut pass, |model, _, masked| {
//!         let (losses, _) = model.score(&tokens, &targets, 8, masked)?;
//!         Ok(losses.into_iter().map(f64::from).collect())
//!     })?;
//!     optimizer.step(&mut model, &mut pass.gradients, 1e-3)?;
//! }
//! assert_eq!(model.mixture(0).ids().len(), 4);
//! # Ok::<(), mass_model::ModelError>(())
//! ```
//!
//! A [`Grower`] is `Serialize` and `Deserialize`, and read back it decides what it would have decided. A checkpoint keeps it
//! as the caller's state: `Snapshot::new(step, &model, &optimizer, &grower)`, and `checkpoint::load::<Model, Grower>(dir)?.state`.

mod observe;
mod pairs;
mod shift;
mod split;

use mass_expand::{
    Action, Answer, Choice, Controller, ControllerParams, Event, ExpandError, ExpertId,
    ExpertObservation, LayerObservation, Reduction, RemovalReason, Request, SplitOperator,
    StepObservation, StopRule,
};
use mass_routing::Router;
use serde::{Deserialize, Serialize};

use crate::error::ModelError;
pub use crate::mixtures::Mixtures;
use crate::nn::GateConfig;
use crate::optim::{AdamW, Gradients};
use crate::parallel::{self, Ranks};
use crate::param::join;
use crate::pass::{Masked, TrainPass};
use observe::observe_among;
pub use observe::{observe, routing_entropies};
use pairs::cosine_among;
pub use pairs::{PairFigures, pair_figures, pair_figures_among};
pub use shift::GateShift;
use split::split_expert_among;
pub use split::{remove_expert, split_expert};

/// Tokens of each expert of each layer.
type Loads = Vec<Vec<f64>>;

const BISECT_NEEDS: &str = "bisecting an expert's tokens needs a linear gate";

/// Which of an expert's gradients its norm is taken of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GradientNorm {
    /// Every matrix and bias of its network and its gate row, but not a threshold of its own (the paper: all its parameters).
    AllParameters,
    /// The first matrix alone (the authors' code).
    Fc1,
}

/// Examples whose losses a [`Grower`] asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LossOn {
    /// Those of the step: the losses of its rows or sequences, without dropout. Their mean is used.
    Batch,
    /// A probe that is not trained on: a loss for each example or sequence, always in the same order, without dropout. The
    /// spread of their differences is used too.
    Probe,
}

/// Rules of a [`Grower`] beside those of its controller.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GrowerConfig {
    /// Rules of the controller.
    pub controller: ControllerParams,
    /// What is monitored.
    pub gradient_norm: GradientNorm,
    /// Weight of the redundancy loss on duplicated pairs while expansion lasts, at least 0.
    pub redundancy_weight: f64,
    /// Whether the redundancy loss is a mean or a sum over pairs.
    pub redundancy_reduction: Reduction,
}

impl GrowerConfig {
    /// What the paper monitors and adds, around a controller: the norm of all parameters, and the mean redundancy loss at
    /// weight 0.01.
    pub fn new(controller: ControllerParams) -> Self {
        Self {
            controller,
            gradient_norm: GradientNorm::AllParameters,
            redundancy_weight: 0.01,
            redundancy_reduction: Reduction::Mean,
        }
    }

    /// Checks what is not the controller's.
    fn check(&self) -> Result<(), ModelError> {
        let weight = self.redundancy_weight;
        if weight.is_finite() && weight >= 0.0 {
            return Ok(());
        }
        let what = format!("redundancy_weight is {weight}, not a number of at least 0");
        Err(ModelError::Config(what))
    }
}

/// Watches a model's experts, and splits and removes them as its controller decides.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(try_from = "Stored")]
pub struct Grower {
    config: GrowerConfig,
    controller: Controller,
    /// What splits did to gates, by layer, the latest last; of pairs of which both are there.
    shifts: Vec<(usize, GateShift)>,
}

/// A grower as it is stored, before it has been checked.
#[derive(Deserialize)]
#[serde(rename = "Grower", deny_unknown_fields)]
struct Stored {
    config: GrowerConfig,
    controller: Controller,
    shifts: Vec<(usize, GateShift)>,
}

impl TryFrom<Stored> for Grower {
    type Error = ModelError;

    fn try_from(stored: Stored) -> Result<Self, ModelError> {
        let Stored {
            config,
            controller,
            shifts,
        } = stored;
        config.check()?;
        let state = |reason| Err(ExpandError::State { reason }.into());
        if config.controller != *controller.params() {
            return state("the controller's parameters are not those of the configuration");
        }
        let layers = 0..controller.layers();
        let pairs = |l| {
            let of_layer = shifts.iter().filter(move |(layer, _)| *layer == l);
            of_layer.map(|(_, shift)| (shift.source, shift.newcomer))
        };
        let theirs = |l| controller.pairs(l).iter().copied();
        if !(shifts
            .iter()
            .all(|(l, shift)| layers.contains(l) && shift.is_finite())
            && layers.clone().all(|l| pairs(l).eq(theirs(l))))
        {
            return state("what splits did to gates is not of the pairs that are there");
        }
        Ok(Self {
            config,
            controller,
            shifts,
        })
    }
}

impl Grower {
    /// A grower for a model whose layers hold the experts that the configuration names.
    ///
    /// Rules whose windows or warm-ups are longer than the run, so that nothing can ever be split, are taken:
    /// [`ControllerParams::check_reachable`](mass_expand::ControllerParams::check_reachable) refuses them.
    ///
    /// # Errors
    /// [`ModelError::Expand`] for parameters that no controller can have, [`ModelError::Config`] for a weight of the redundancy
    /// loss that is negative or not finite.
    pub fn new(config: GrowerConfig) -> Result<Self, ModelError> {
        config.check()?;
        let controller = config.controller.check()?;
        Ok(Self {
            config,
            controller,
            shifts: Vec::new(),
        })
    }

    /// The controller: live steps, active experts, whether a layer has stopped, and the known ways to fail that it sees.
    pub fn controller(&self) -> &Controller {
        &self.controller
    }

    /// Looks at one step's gradients before they are applied, and carries out what the controller decides.
    ///
    /// `losses(model, on, masked)` gives the losses, nats, on the step's batch or on a probe, with an expert masked or with all of
    /// them. While one is masked that came about by a split, the other half has the gate that it would have without it: what is
    /// compared with the whole is what removal would leave.
    ///
    /// # Errors
    /// [`ModelError::Config`] for rules that the model cannot follow: a bisection without a linear gate, a pool that may shrink
    /// below what its router takes, a choice by routing entropy where the router has no softmax. As the controller's, those of `losses`, and [`ModelError::Shape`] if there is no loss, or the
    /// pass is of a model with another number of mixture layers. After these the grower is as it was, and the step may be made
    /// again. Those of the layers when a split cannot be carried out, or of a device without memory for the redundancy loss that
    /// follows: what the controller has decided is then done in part, and model and grower have to be read back from a
    /// checkpoint.
    pub fn step<M: Mixtures, G: Gradients>(
        &mut self,
        step: u64,
        model: &mut M,
        optimizer: &mut AdamW,
        pass: &mut TrainPass<G>,
        losses: impl FnMut(&M, LossOn, Option<Masked>) -> Result<Vec<f64>, ModelError>,
    ) -> Result<Vec<Event>, ModelError> {
        self.step_among(&Ranks::default(), step, model, optimizer, pass, losses)
    }

    /// [`step`](Self::step) of one of several ranks, which have a share of the batch each and decide the same.
    ///
    /// The pass is one whose loss and gradients are those of the whole batch ([`reduce`](crate::parallel::reduce)); `losses` gives
    /// the same on every rank, those of the whole batch.
    ///
    /// # Errors
    /// As there, and [`ModelError::Parallel`].
    pub fn step_among<M: Mixtures, G: Gradients>(
        &mut self,
        ranks: &Ranks,
        step: u64,
        model: &mut M,
        optimizer: &mut AdamW,
        pass: &mut TrainPass<G>,
        losses: impl FnMut(&M, LossOn, Option<Masked>) -> Result<Vec<f64>, ModelError>,
    ) -> Result<Vec<Event>, ModelError> {
        self.check_rules(model, pass)?;
        // Before the controller moves: a device that holds what is looked at may have failed.
        for l in 0..model.mixtures() {
            pass.gradients.reach(model.mixture(l))?;
        }
        // Only while losses may be asked for can anything but the observation itself be refused.
        let judges = |l: usize| self.controller.awaiting_check(l).is_some();
        let asks = (0..model.mixtures()).any(|l| self.watches(l, step) || judges(l))
            || self.controller.params().pruning.is_some();
        let before = asks.then(|| self.controller.clone());
        let (actions, loads) = match self.decide((ranks, step), model, pass, losses) {
            Ok(decided) => decided,
            Err(error) => {
                if let Some(before) = before {
                    self.controller = before;
                }
                return Err(error);
            }
        };
        self.carry_out((ranks, loads), actions, model, optimizer, pass)?;
        for l in 0..model.mixtures() {
            if self.config.redundancy_weight > 0.0 && self.controller.stopped(l).is_none() {
                let pairs = self.controller.pair_positions(l);
                let experts = model.mixture(l).experts();
                let rows: Vec<_> = experts.iter().map(|e| &e.gate).collect();
                let (reduction, weight) = (
                    self.config.redundancy_reduction,
                    self.config.redundancy_weight,
                );
                if !pairs.is_empty() {
                    let gradients = &mut pass.gradients;
                    gradients.add_redundancy(&rows, &pairs, reduction, weight)?;
                }
            }
        }
        Ok(self.controller.drain_events())
    }

    /// Whether a model can follow the rules at all.
    fn check_rules<M: Mixtures, G>(
        &self,
        model: &M,
        pass: &TrainPass<G>,
    ) -> Result<(), ModelError> {
        let (layers, traced) = (model.mixtures(), pass.layers.len());
        if layers != traced {
            return Err(ModelError::shape(
                "mixture layers traced",
                &[layers],
                &[traced],
            ));
        }
        let params = self.controller.params();
        for l in 0..layers {
            let moe = model.mixture(l);
            if matches!(params.operator, SplitOperator::Bisect(_))
                && moe.config().gate != GateConfig::Linear
            {
                return Err(ModelError::Config(BISECT_NEEDS.into()));
            }
            // A check is made with one expert masked, and may remove it.
            let checked = usize::from(params.stop != StopRule::Never);
            let least = moe.router().least_experts();
            if let Some(pruning) = params.pruning.filter(|p| p.min_experts < least + checked) {
                return Err(ModelError::Config(format!(
                    "pruning leaves {} experts, but the router of mixture layer {l} takes {least}{}",
                    pruning.min_experts,
                    if checked > 0 {
                        ", and one is masked to check it"
                    } else {
                        ""
                    }
                )));
            }
        }
        Ok(())
    }

    /// Tells the controller what the step's gradients are, and gets what it asks for and what it decides.
    fn decide<M: Mixtures, G: Gradients>(
        &mut self,
        (ranks, step): (&Ranks, u64),
        model: &mut M,
        pass: &mut TrainPass<G>,
        mut losses: impl FnMut(&M, LossOn, Option<Masked>) -> Result<Vec<f64>, ModelError>,
    ) -> Result<(Vec<Action>, Loads), ModelError> {
        let entropy = self.controller.params().choice == Choice::RoutingEntropy;
        let norm = |l| self.watches(l, step).then_some(self.config.gradient_norm);
        let (observed, routing) = observe_among(ranks, model, pass, norm, entropy)?;
        let loads = |experts: &Vec<ExpertObservation>| {
            let of_experts = experts.iter().map(|e| e.load as f64);
            of_experts.collect::<Vec<f64>>()
        };
        let loads: Loads = observed.iter().map(loads).collect();
        let layers: Vec<LayerObservation<'_>> = observed
            .iter()
            .enumerate()
            .map(|(l, experts)| {
                let config = model.mixture(l).config();
                LayerObservation {
                    experts,
                    hidden: config.hidden,
                    dim: config.dim,
                }
            })
            .collect();
        let observation = StepObservation {
            step,
            loss: f64::from(pass.loss),
            layers: &layers,
        };
        let mut requests = self.controller.begin_step(&observation)?;
        for (l, routing) in routing.iter().enumerate() {
            self.controller.observe_routing(l, routing)?;
        }
        while let Some(request) = requests.pop() {
            let answer = match request {
                Request::Alignment { layer, expert } => {
                    let (moe, trace) = (model.mixture(layer), &pass.layers[layer]);
                    let place = moe.index_of(expert)?;
                    let gradients = &mut pass.gradients;
                    let cosine = cosine_among(ranks, moe, trace, gradients, place)?;
                    Answer::Alignment {
                        layer,
                        expert,
                        cosine,
                    }
                }
                Request::MaskedLoss { layer, expert } => {
                    let on = LossOn::Batch;
                    let without = self.without(model, layer, expert, |m, e| losses(m, on, Some(e)));
                    Answer::MaskedLoss {
                        layer,
                        expert,
                        masked: mean(&without?)?,
                        full: mean(&losses(model, on, None)?)?,
                    }
                }
                Request::ProbeLoss { layer, expert } => {
                    let on = LossOn::Probe;
                    let without = self.without(model, layer, expert, |m, e| losses(m, on, Some(e)));
                    Answer::probe(layer, expert, &without?, &losses(model, on, None)?)?
                }
            };
            requests.extend(self.controller.answer(answer)?);
        }
        Ok((self.controller.finish_step()?, loads))
    }

    fn carry_out<M: Mixtures, G: Gradients>(
        &mut self,
        (ranks, mut loads): (&Ranks, Loads),
        actions: Vec<Action>,
        model: &mut M,
        optimizer: &mut AdamW,
        pass: &mut TrainPass<G>,
    ) -> Result<(), ModelError> {
        for action in actions {
            match action {
                Action::Split {
                    layer,
                    source,
                    newcomer,
                    operator,
                    moments,
                } => {
                    let name = model.mixture_name(layer);
                    let trace = &pass.layers[layer];
                    let moe = model.mixture_mut(layer);
                    let gradients = &mut pass.gradients;
                    let shift = split_expert_among(ranks, moe, source, operator, trace, gradients)?;
                    if shift.newcomer != newcomer {
                        return Err(ModelError::Config(format!(
                            "the controller names its newcomer {}, the layer {}",
                            newcomer.0, shift.newcomer.0
                        )));
                    }
                    self.shifts.push((layer, shift));
                    let prefix = |id: ExpertId| join(&name, &format!("experts.{}", id.0));
                    optimizer.adopt(&prefix(source), &prefix(newcomer), moments);
                    let moe = model.mixture_mut(layer);
                    if !moe.owners().is_empty() {
                        let loads = &mut loads[layer];
                        let place = moe.index_of(source)?;
                        loads[place] /= 2.0;
                        let to = parallel::least_loaded(ranks, moe.owners(), loads);
                        loads.push(loads[place]);
                        let gradients = &mut pass.gradients;
                        let what = (&*name, newcomer, to);
                        parallel::move_newcomer(ranks, moe, what, gradients, optimizer)?;
                    }
                }
                Action::Remove {
                    layer,
                    expert,
                    reason,
                } => {
                    let name = model.mixture_name(layer);
                    loads[layer].remove(model.mixture(layer).index_of(expert)?);
                    // The tokens of an unused expert went to others long ago.
                    let latest = self.latest_split(layer, expert);
                    let latest = latest.filter(|_| reason != RemovalReason::Unused);
                    remove_expert(model.mixture_mut(layer), expert, latest)?;
                    let of = |(l, s): &(usize, GateShift)| *l == layer && s.other(expert).is_some();
                    self.shifts.retain(|s| !of(s));
                    optimizer.forget(&join(&name, &format!("experts.{}", expert.0)));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The last split that an expert took part in, if its other half is still there.
    fn latest_split(&self, layer: usize, expert: ExpertId) -> Option<&GateShift> {
        let of = |(l, s): &&(usize, GateShift)| *l == layer && s.other(expert).is_some();
        self.shifts.iter().rfind(of).map(|(_, shift)| shift)
    }

    /// What `losses` says of the model with an expert masked and, if a split's other half is there, its gate as before the split.
    fn without<M: Mixtures, T>(
        &self,
        model: &mut M,
        layer: usize,
        expert: ExpertId,
        losses: impl FnOnce(&M, Masked) -> Result<T, ModelError>,
    ) -> Result<T, ModelError> {
        let masked = Masked { layer, expert };
        let split = self.latest_split(layer, expert);
        let Some((half, shift)) = split.and_then(|s| Some((s.other(expert)?, s))) else {
            return losses(model, masked);
        };
        let moe = model.mixture_mut(layer);
        let gate = moe.expert_mut(half)?;
        let (row, offset) = (gate.gate.try_values()?.to_vec(), gate.logit_offset);
        // For a look only: no move that averages of weights would have to follow.
        let (single, single_offset) = shift.without(half, gate)?;
        gate.gate
            .values_mut()
            .copy_from_slice(single.as_deref().unwrap_or(&row));
        gate.logit_offset = single_offset;
        let found = losses(model, masked);
        let after = model.mixture_mut(layer).expert_mut(half)?;
        after.gate.values_mut().copy_from_slice(&row);
        after.logit_offset = offset;
        found
    }

    /// Whether anything will be made of a layer's gradient norms: no detector of a stopped layer is fed. The step on which
    /// the continual phase begins opens stopped layers again.
    fn watches(&self, layer: usize, step: u64) -> bool {
        let phase = &self.controller.params().phase;
        let reopens = phase.continual.is_some()
            && step >= phase.live_until
            && self
                .controller
                .last_step()
                .is_none_or(|last| last < phase.live_until);
        reopens || self.controller.stopped(layer).is_none()
    }
}

fn mean(losses: &[f64]) -> Result<f64, ModelError> {
    match losses.len() {
        0 => Err(ModelError::shape("losses", &[1], &[0])),
        n => Ok(losses.iter().sum::<f64>() / n as f64),
    }
}

use std::collections::BTreeSet;
use std::mem::{Discriminant, discriminant};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dfdx::prelude::{Cpu, HasShape, ReshapeTo, Shape, Tape, Tensor};
use mass_expand::ExpertId;
use mass_routing::{AnyRouter, Loads, Router, RouterConfig, RoutingError, RoutingPlan};
use ndarray::ArrayView2;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::FeedForward;
use super::in_dfdx::rows;
use crate::error::ModelError;
use crate::kernels::activation::Activation;
use crate::ops::{self, Gate, MoeExpert, Pass, Routing, RoutingLoss, Rows, enter, on_tensors};
use crate::parallel::Ranks;
use crate::param::{MOST, Param, Parameters, draw, join};
use crate::pass::{GateInput, LayerTrace, Masked};

/// Sizes and rules of a mixture-of-experts layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MoeConfig {
    /// Token width d.
    pub dim: usize,
    /// Hidden width h of each expert.
    pub hidden: usize,
    /// Experts at the start, K; at most 2^20.
    pub experts: usize,
    /// Nonlinearity of the experts.
    pub activation: Activation,
    /// How tokens choose experts.
    pub router: RouterConfig,
    /// Whether experts have a factor on the activation (SwiGLU with SiLU).
    #[serde(default)]
    pub gated: bool,
    /// What the logits are made of.
    #[serde(default)]
    pub gate: GateConfig,
    /// Losses on the routing; they change gradients only.
    #[serde(default)]
    pub losses: Vec<RoutingLoss>,
    /// Hidden width of an expert that every token uses beside those it is routed to (DeepSeekMoE, arXiv 2401.06066); none
    /// without.
    #[serde(default)]
    pub shared_hidden: Option<usize>,
}

/// How a mixture layer scores tokens for experts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "gate", rename_all = "snake_case", from = "WrittenGate")]
pub enum GateConfig {
    /// `logit_e = <x, w_e>`.
    #[default]
    Linear,
    /// `logit_e = cos(P x + b, w_e) / temperature`. `None` for both gives DynMoE's gate; GMoE's has projection 256 and
    /// temperature 0.5.
    Cosine {
        /// Width of the projection; `None`: no projection.
        projection: Option<usize>,
        /// Temperature at the start, which is then learned; `None`: fixed at 1. At least 0.01: the scale stops at 100, and one
        /// beyond it would never be learned.
        temperature: Option<f32>,
    },
    /// Bounded scores in a space of low rank: see `mass_routing::LowRankGate`.
    LowRank {
        /// Rank r of the query projection, at least 1.
        rank: usize,
        /// Anchors of each expert, at least 1.
        anchors: usize,
        /// The largest absolute score, positive.
        scale: f32,
    },
}

impl GateConfig {
    pub(crate) fn is_low_rank(&self) -> bool {
        matches!(self, Self::LowRank { .. })
    }
}

fn scale_one() -> f32 {
    1.0
}

/// A gate as it is read: of a variant without fields serde would pass over those that do not belong to it.
#[derive(Deserialize)]
#[serde(tag = "gate", rename_all = "snake_case", deny_unknown_fields)]
enum WrittenGate {
    Linear {},
    Cosine {
        projection: Option<usize>,
        temperature: Option<f32>,
    },
    LowRank {
        rank: usize,
        anchors: usize,
        #[serde(default = "scale_one")]
        scale: f32,
    },
}

impl From<WrittenGate> for GateConfig {
    fn from(written: WrittenGate) -> Self {
        match written {
            WrittenGate::Linear {} => Self::Linear,
            WrittenGate::Cosine {
                projection,
                temperature,
            } => Self::Cosine {
                projection,
                temperature,
            },
            WrittenGate::LowRank {
                rank,
                anchors,
                scale,
            } => Self::LowRank {
                rank,
                anchors,
                scale,
            },
        }
    }
}

impl MoeConfig {
    /// Plain experts behind a linear gate, and none that is shared.
    pub fn new(
        dim: usize,
        hidden: usize,
        experts: usize,
        activation: Activation,
        router: RouterConfig,
    ) -> Self {
        Self {
            dim,
            hidden,
            experts,
            activation,
            router,
            gated: false,
            gate: GateConfig::Linear,
            losses: Vec::new(),
            shared_hidden: None,
        }
    }
}

/// That of the largest scale which `mass_routing::CosineGate` has.
const LEAST_TEMPERATURE: f32 = 0.01;

impl MoeConfig {
    /// Refuses a number of experts that no layer has.
    fn check_experts(&self) -> Result<(), ModelError> {
        match self.experts {
            1..=MOST => Ok(()),
            n => Err(ModelError::Config(format!(
                "a mixture layer of {n} experts; it must be at least 1 and at most {MOST}"
            ))),
        }
    }

    /// Refuses an expert that is not made as the layer's, but for its factor and threshold.
    fn check_expert(&self, what: &str, expert: &MoeExpert) -> Result<(), ModelError> {
        expert.check_offset(what)?;
        expert.network.check(what, Some((self.hidden, self.dim)))?;
        expert.check_gate(what, self.row_sizes().0)
    }

    /// Refuses a gate that cannot be made, before anything is drawn.
    fn check_gate(&self) -> Result<(), ModelError> {
        let positive = |x: f32| x.is_finite() && x > 0.0;
        match self.gate {
            GateConfig::Cosine {
                projection,
                temperature,
            } if projection == Some(0)
                || temperature.is_some_and(|t| !t.is_finite() || t < LEAST_TEMPERATURE) =>
            {
                Err(ModelError::Config(format!(
                    "a cosine gate with projection {projection:?} and temperature {temperature:?}; where given, the first must be \
                     positive, and the second finite and at least {LEAST_TEMPERATURE}"
                )))
            }
            GateConfig::LowRank {
                rank,
                anchors,
                scale,
            } if rank == 0 || anchors == 0 || !positive(scale) => Err(ModelError::Config(format!(
                "a low-rank gate with rank {rank}, {anchors} anchors an expert and scale {scale}; they must be positive and finite"
            ))),
            _ => Ok(()),
        }
    }

    /// Width of a gate row, and of what its values are multiplied with.
    fn row_sizes(&self) -> (usize, usize) {
        match self.gate {
            GateConfig::Cosine {
                projection: Some(width),
                ..
            } => (width, width),
            GateConfig::LowRank { rank, anchors, .. } => (rank.saturating_mul(anchors), rank),
            _ => (self.dim, self.dim),
        }
    }

    /// A gate row as PyTorch's `Linear` draws it.
    fn gate_row(&self, rng: &mut ChaCha8Rng) -> Result<Param, ModelError> {
        self.check_gate()?;
        let (width, inputs) = self.row_sizes();
        Param::uniform(&[width], 1.0 / (inputs as f32).sqrt(), true, rng)
    }

    fn new_gate(&self, rng: &mut ChaCha8Rng) -> Result<Gate, ModelError> {
        self.check_gate()?;
        let bound = 1.0 / (self.dim as f32).sqrt();
        let (projection, temperature) = match self.gate {
            GateConfig::Linear => return Ok(Gate::Linear),
            GateConfig::LowRank {
                rank,
                anchors,
                scale,
            } => {
                return Ok(Gate::LowRank {
                    query: Param::uniform(&[rank, self.dim], bound, true, rng)?,
                    anchors,
                    scale,
                });
            }
            GateConfig::Cosine {
                projection,
                temperature,
            } => (projection, temperature),
        };
        Ok(Gate::Cosine {
            projection: projection
                .map(|width| {
                    Ok::<_, ModelError>((
                        Param::uniform(&[width, self.dim], bound, true, rng)?,
                        Param::uniform(&[width], bound, false, rng)?,
                    ))
                })
                .transpose()?,
            log_scale: temperature
                .map(|t| Param::new(vec![-t.ln()], &[1], false))
                .transpose()?,
        })
    }
}

/// The output of a mixture layer with the plan that made it.
#[derive(Debug)]
pub struct Routed<T: Tape<f32, Cpu>> {
    /// `[tokens, d]`
    pub output: Rows<T>,
    /// Who computed what.
    pub plan: Arc<RoutingPlan>,
}

/// A sparse mixture-of-experts feed-forward layer whose pool can grow and shrink while it trains.
///
/// `y[t] = Σ_{e chosen for t} w[t, e] (fc2_e act(fc1_e x[t] + b1_e) + b2_e)`, with `w` from the router applied to
/// `z = x W_gᵀ` (plus a fixed offset for experts that were bisected, or split with their mass preserved).
///
/// Experts carry an `ExpertId` that is never reused, and every expert owns its gate row, so that parameters, optimiser
/// moments and checkpoints keep their names while the pool changes.
///
/// # Errors
/// Every forward pass refuses an input of 0 rows ([`ModelError::Shape`]), which the routers of mass-routing take: pass over a
/// batch without tokens. What else it refuses, a NaN among others, is in [`ops::moe_ffn`]. Inside a model of dfdx,
/// `Module::forward` panics on all of these: call `Module::try_forward`, and after an error [`last_error`](crate::last_error).
///
/// # Examples
/// ```
/// use dfdx::prelude::*;
/// use mass_model::{Activation, nn::{MoeConfig, MoeLayer}, seeded_rng};
/// use mass_routing::{Combine, RouterConfig};
///
/// let router = RouterConfig::TopP { p: 0.5, combine: Combine::Renormalised };
/// let config = MoeConfig::new(8, 16, 4, Activation::GeluErf, router);
/// let layer = MoeLayer::new(&config, &mut seeded_rng(0))?;
/// let x = Cpu::default().ones_like(&(2, 8));
/// assert_eq!(*layer.try_forward(x)?.shape(), (2, 8));
/// let none: Tensor<(usize, usize), f32, Cpu> = Cpu::default().zeros_like(&(0, 8));
/// assert!(layer.try_forward(none).is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct MoeLayer {
    experts: Vec<MoeExpert>,
    gate: Gate,
    shared: Option<FeedForward>,
    ids: Vec<ExpertId>,
    next_id: u32,
    // Behind a lock because a forward pass, which borrows the layer, moves the state of some routers (their noise).
    router: Mutex<AnyRouter>,
    config: MoeConfig,
    /// Who trains with it, each on a share of a batch.
    ranks: Ranks,
    /// The place in its group of the rank that holds each expert's network; empty where every rank has all.
    owners: Vec<usize>,
    /// Whether this rank has all experts for a while.
    together: bool,
}

impl Clone for MoeLayer {
    fn clone(&self) -> Self {
        Self {
            experts: self.experts.clone(),
            gate: self.gate.clone(),
            shared: self.shared.clone(),
            ids: self.ids.clone(),
            next_id: self.next_id,
            router: Mutex::new(self.router().clone()),
            config: self.config.clone(),
            ranks: self.ranks.clone(),
            owners: self.owners.clone(),
            together: self.together,
        }
    }
}

impl MoeLayer {
    /// A layer with weights drawn as PyTorch's `Linear` draws them: U(-1/√in, 1/√in).
    ///
    /// # Errors
    /// [`ModelError::Config`] if a size is zero, there are more than 2^20 experts, or top-any routing is of another number of experts,
    /// and for a gate or a routing loss that the layer cannot have; [`ModelError::Routing`] if the router's parameters are not valid,
    /// or it takes more experts than there are. The generator is as it was then.
    pub fn new(config: &MoeConfig, rng: &mut ChaCha8Rng) -> Result<Self, ModelError> {
        let &MoeConfig {
            dim,
            hidden,
            experts,
            ..
        } = config;
        config.check_experts()?;
        if dim == 0 || hidden == 0 {
            let sizes = format!(
                "a mixture layer of width {dim}, hidden width {hidden}; each must be at least 1"
            );
            return Err(ModelError::Config(sizes));
        }
        draw(rng, |rng| {
            let experts = (0..experts)
                .map(|_| {
                    let gate = config.gate_row(rng)?;
                    let network =
                        FeedForward::new(dim, hidden, config.activation, config.gated, rng)?;
                    Ok(MoeExpert {
                        gate,
                        logit_offset: 0.0,
                        threshold: None,
                        network: network.0,
                    })
                })
                .collect::<Result<Vec<_>, ModelError>>()?;
            let mut layer = Self::assemble(config, experts, rng)?;
            if let Some(width) = config.shared_hidden {
                let shared = FeedForward::new(dim, width, config.activation, config.gated, rng)?;
                layer.shared = Some(shared);
            }
            Ok(layer)
        })
    }

    /// A layer whose experts are copies of a dense feed-forward network, with gate rows drawn from U(-1/√d, 1/√d).
    ///
    /// With weights that sum to one the layer's output is at first that of the network. `config` says how many experts and
    /// which router; its sizes must be the network's.
    ///
    /// # Errors
    /// [`ModelError::Config`] if the network has other sizes, another activation or another gating than the configuration;
    /// otherwise as [`new`](Self::new).
    pub fn from_dense(
        network: &FeedForward,
        config: &MoeConfig,
        rng: &mut ChaCha8Rng,
    ) -> Result<Self, ModelError> {
        config.check_experts()?;
        let (hidden, dim) = network.sizes()?;
        let found = (dim, hidden, network.activation(), network.gated());
        let wanted = (config.dim, config.hidden, config.activation, config.gated);
        if found != wanted {
            return Err(ModelError::Config(format!(
                "a network of (width, hidden width, activation, gated) {found:?} cannot become experts of {wanted:?}"
            )));
        }
        if config.shared_hidden.is_some() {
            let what = "a dense network has no shared expert to convert";
            return Err(ModelError::Config(what.into()));
        }
        draw(rng, |rng| {
            let experts = (0..config.experts)
                .map(|_| {
                    Ok(MoeExpert {
                        gate: config.gate_row(rng)?,
                        logit_offset: 0.0,
                        threshold: None,
                        network: network.0.clone(),
                    })
                })
                .collect::<Result<Vec<_>, ModelError>>()?;
            Self::from_experts(config, experts, rng)
        })
    }

    /// A layer from experts made elsewhere; the gate's projection, if it has one, is drawn from U(-1/√d, 1/√d). With top-any
    /// routing, experts without a threshold get one of zero.
    ///
    /// # Errors
    /// [`ModelError::Config`] if their number is not the configuration's, one is gated and another or the configuration is not,
    /// or the configuration has a shared expert, which is none of these; [`ModelError::Shape`] if one has other sizes, or its gate
    /// row or threshold, [`ModelError::NonFinite`] for a logit offset that is NaN or infinite; otherwise as [`new`](Self::new).
    pub fn from_experts(
        config: &MoeConfig,
        experts: Vec<MoeExpert>,
        rng: &mut ChaCha8Rng,
    ) -> Result<Self, ModelError> {
        if config.shared_hidden.is_some() {
            let what = "a layer made from experts has no shared expert";
            return Err(ModelError::Config(what.into()));
        }
        draw(rng, |rng| Self::assemble(config, experts, rng))
    }

    fn assemble(
        config: &MoeConfig,
        mut experts: Vec<MoeExpert>,
        rng: &mut ChaCha8Rng,
    ) -> Result<Self, ModelError> {
        config.check_experts()?;
        if experts.len() != config.experts {
            return Err(ModelError::Config(format!(
                "{} experts given, {} configured",
                experts.len(),
                config.experts
            )));
        }
        for loss in &config.losses {
            if let Some(problem) = loss.problem() {
                return Err(ModelError::Config(format!(
                    "routing loss {loss:?}; {problem}"
                )));
            }
        }
        let router = config.router.build()?;
        enough_experts(&router, experts.len())?;
        for loss in &config.losses {
            if let Some(needed) = loss.lacks(&router, config.gate.is_low_rank()) {
                return Err(ModelError::Config(format!(
                    "routing loss {loss:?} {needed}, not {:?} behind {:?}",
                    config.router, config.gate
                )));
            }
        }
        if let AnyRouter::Noisy(noisy) = &router
            && matches!(noisy.inner(), AnyRouter::TopAny(_))
        {
            let what = "top-any routing behind noise: its thresholds are the experts' and cannot reach it there";
            return Err(ModelError::Config(what.into()));
        }
        let any = match config.router {
            RouterConfig::TopAny { experts: n } if n != 0 && n != experts.len() => {
                return Err(ModelError::Config(format!(
                    "top-any routing of {n} experts in a layer of {}",
                    experts.len()
                )));
            }
            RouterConfig::TopAny { .. } => true,
            _ => false,
        };
        for (e, expert) in experts.iter_mut().enumerate() {
            config.check_expert(&format!("expert {e}"), expert)?;
            let gated = expert.network.up.is_some();
            if gated != config.gated {
                let what = format!("expert {e}: gated is {gated}, configured {}", config.gated);
                return Err(ModelError::Config(what));
            }
            if any && expert.threshold.is_none() {
                expert.threshold = Some(Param::zeros(&[1], false)?);
            }
        }
        let count = experts.len() as u32;
        Ok(Self {
            experts,
            gate: config.new_gate(rng)?,
            shared: None,
            ids: (0..count).map(ExpertId).collect(),
            next_id: count,
            router: Mutex::new(router),
            config: config.clone(),
            ranks: Ranks::default(),
            owners: Vec::new(),
            together: false,
        })
    }

    /// The experts' ids, in the order of the gate's logits.
    pub fn ids(&self) -> &[ExpertId] {
        &self.ids
    }

    /// The experts, in the order of the gate's logits.
    pub fn experts(&self) -> &[MoeExpert] {
        &self.experts
    }

    /// The configuration; `experts` is the number at the start.
    pub fn config(&self) -> &MoeConfig {
        &self.config
    }

    /// The shared expert, if there is one.
    pub fn shared(&self) -> Option<&FeedForward> {
        self.shared.as_ref()
    }

    /// The router, locked while it is looked at.
    pub fn router(&self) -> MutexGuard<'_, AnyRouter> {
        self.router.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The router, to be changed.
    pub fn router_mut(&mut self) -> &mut AnyRouter {
        self.router
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets a router that balances itself learn from a plan: a balancing bias moves, a controlled p is steered. Call it once
    /// for each training step, while the pool is the one that the plan is of;
    /// [`Mixtures::adapt`](crate::growth::Mixtures::adapt) does it for every layer of a model.
    ///
    /// # Errors
    /// [`ModelError::Routing`] if the plan is of another number of experts.
    pub fn adapt(&mut self, plan: &RoutingPlan) -> Result<(), ModelError> {
        self.adapt_among(&Ranks::default(), plan)
    }

    /// [`adapt`](Self::adapt), where the plan is of this rank's share of a batch.
    ///
    /// # Errors
    /// As there, and [`ModelError::Parallel`].
    pub(crate) fn adapt_among(
        &mut self,
        ranks: &Ranks,
        plan: &RoutingPlan,
    ) -> Result<(), ModelError> {
        let (expected, found) = (self.experts.len(), plan.num_experts());
        if expected != found {
            return Err(ModelError::Routing(RoutingError::ShapeMismatch {
                what: "experts of the plan to adapt to",
                expected,
                found,
            }));
        }
        if ranks.is_alone() || !learns(&self.router()) {
            return Ok(self.router_mut().adapt(plan)?);
        }
        let mut loads = Loads::of(plan);
        let counts = std::iter::once(loads.tokens).chain(loads.of_experts);
        let mut counts: Vec<f64> = counts.map(|n| n as f64).collect();
        ranks.sum(&mut counts)?;
        let mut counts = counts.into_iter().map(|n| n as u64);
        loads.tokens = counts.next().unwrap_or_default();
        loads.of_experts = counts.collect();
        Ok(self.router_mut().adapt_to(&loads)?)
    }

    /// Says which ranks train it, each on a share of a batch: routing losses and noise are those of the whole batch then.
    pub(crate) fn set_ranks(&mut self, ranks: Ranks) {
        self.ranks = ranks;
    }

    pub(crate) fn ranks(&self) -> &Ranks {
        &self.ranks
    }

    /// Where each expert's network is, by the place of a rank in its group; empty where every rank has all.
    pub fn owners(&self) -> &[usize] {
        &self.owners
    }

    /// Says whether this rank has all experts for a while, whoever owns them.
    pub(crate) fn set_together(&mut self, together: bool) {
        self.together = together;
    }

    /// The owners, and all that there is of the experts.
    pub(crate) fn experts_and_owners(&mut self) -> (&mut [MoeExpert], &mut Vec<usize>) {
        (&mut self.experts, &mut self.owners)
    }

    /// Tells the router of the rows that other ranks have, if it would compute something else without.
    fn place_rows(&self, rows: usize) -> Result<(), ModelError> {
        if self.ranks.is_alone() || !matches!(&*self.router(), AnyRouter::Noisy(_)) {
            return Ok(());
        }
        let counts = self.ranks.gather_f64(&[rows as f64])?;
        let sum = |of: &[f64]| of.iter().sum::<f64>() as usize;
        let rank = self.ranks.rank();
        let (before, after) = (sum(&counts[..rank]), sum(&counts[rank + 1..]));
        self.router().set_rows_around(before, after);
        Ok(())
    }

    /// The id that the next newcomer will get.
    pub fn next_id(&self) -> ExpertId {
        ExpertId(self.next_id)
    }

    /// Where an expert stands in the order of the gate's logits.
    ///
    /// # Errors
    /// [`ModelError::NoSuchExpert`] if it is not in the pool.
    pub fn index_of(&self, id: ExpertId) -> Result<usize, ModelError> {
        self.ids
            .iter()
            .position(|&i| i == id)
            .ok_or(ModelError::NoSuchExpert(id.0))
    }

    /// An expert, to be changed.
    ///
    /// # Errors
    /// [`ModelError::NoSuchExpert`] if it is not in the pool.
    pub fn expert_mut(&mut self, id: ExpertId) -> Result<&mut MoeExpert, ModelError> {
        let index = self.index_of(id)?;
        Ok(&mut self.experts[index])
    }

    /// Refuses an expert that [`push`](Self::push) would; the id after that of the newcomer.
    pub(crate) fn check_newcomer(&self, expert: &MoeExpert) -> Result<u32, ModelError> {
        let first = &self.experts[0];
        self.config.check_expert("a newcomer", expert)?;
        if expert.network.up.is_some() != first.network.up.is_some()
            || expert.threshold.is_some() != first.threshold.is_some()
        {
            let what = "a newcomer is gated, or has a threshold, unlike the other experts";
            return Err(ModelError::Config(what.into()));
        }
        let no_id = || ModelError::Config(format!("no id is left after {}", self.next_id));
        self.next_id.checked_add(1).ok_or_else(no_id)
    }

    /// Adds an expert at the end of the pool and returns its id.
    ///
    /// # Errors
    /// [`ModelError::Shape`] or [`ModelError::Config`] if it is not made as the others are, [`ModelError::Config`] if the
    /// layer has no id left, [`ModelError::NonFinite`] for a logit offset that is NaN or infinite; the pool is as it was then.
    pub fn push(&mut self, expert: MoeExpert) -> Result<ExpertId, ModelError> {
        let id = self.next_id();
        self.next_id = self.check_newcomer(&expert)?;
        self.experts.push(expert);
        self.ids.push(id);
        if !self.owners.is_empty() {
            // Until somebody gives it away: every rank has made the same.
            self.owners.push(self.ranks.place());
        }
        Ok(id)
    }

    /// Adds an expert that was split off one of the pool ([`MoeExpert::offspring`]): as [`push`](Self::push), and what the router
    /// has learned of the source, such as its balancing bias, is the newcomer's too.
    ///
    /// # Errors
    /// As [`push`](Self::push), and [`ModelError::NoSuchExpert`] if the source is not in the pool.
    pub fn push_split(
        &mut self,
        newcomer: MoeExpert,
        source: ExpertId,
    ) -> Result<ExpertId, ModelError> {
        let index = self.index_of(source)?;
        let id = self.push(newcomer)?;
        let last = self.experts.len() - 1;
        if let Some(&owner) = self.owners.get(index) {
            self.owners[last] = owner;
        }
        self.router_mut().split_expert(index, last);
        Ok(id)
    }

    /// Refuses what [`remove`](Self::remove) would; the place of the expert.
    pub(crate) fn check_removal(&self, id: ExpertId) -> Result<usize, ModelError> {
        let index = self.index_of(id)?;
        if self.experts.len() == 1 {
            return Err(ModelError::Config(
                "the last expert of a layer cannot be removed".into(),
            ));
        }
        enough_experts(&self.router(), self.experts.len() - 1)?;
        Ok(index)
    }

    /// Takes an expert out of the pool.
    ///
    /// # Errors
    /// [`ModelError::NoSuchExpert`] if it is not there, [`ModelError::Config`] if it is the last one,
    /// [`ModelError::Routing`] if the router takes more experts than would be left; the pool is as it was then.
    pub fn remove(&mut self, id: ExpertId) -> Result<MoeExpert, ModelError> {
        let index = self.check_removal(id)?;
        self.ids.remove(index);
        if !self.owners.is_empty() {
            self.owners.remove(index);
        }
        self.router_mut().remove_expert(index);
        Ok(self.experts.remove(index))
    }

    /// Refuses a router of another kind than the layer's, or one that takes more experts than there are or has learned of more.
    pub(crate) fn check_router(
        &self,
        router: &AnyRouter,
        experts: usize,
    ) -> Result<(), ModelError> {
        let (ours, theirs) = (kinds(&self.config.router.build()?), kinds(router));
        if ours != theirs {
            let what = format!(
                "the state of a router of another kind than {:?}",
                self.config.router
            );
            return Err(ModelError::Config(what));
        }
        match biases(router) {
            known if known > experts => Err(ModelError::Config(format!(
                "a router with biases of {known} experts, of which there are {experts}"
            ))),
            _ => enough_experts(router, experts),
        }
    }

    /// Gives the layer a pool of another size, as read from a checkpoint; the values are read afterwards.
    pub(crate) fn restore_pool(
        &mut self,
        ids: Vec<ExpertId>,
        next_id: u32,
        offsets: &[f32],
        router: AnyRouter,
    ) -> Result<(), ModelError> {
        let distinct: BTreeSet<_> = ids.iter().collect();
        let last = ids.iter().map(|id| id.0).max();
        if distinct.len() != ids.len()
            || ids.len() != offsets.len()
            || last.is_none_or(|last| last >= next_id)
        {
            let what = format!(
                "expert ids {ids:?} with {} logit offsets and next id {next_id}",
                offsets.len()
            );
            return Err(ModelError::Config(what));
        }
        if let Some(bad) = offsets.iter().find(|o| !o.is_finite()) {
            return Err(ModelError::NonFinite(format!("logit offset {bad}")));
        }
        let template = self.experts[0].clone();
        self.experts = offsets
            .iter()
            .map(|&o| MoeExpert {
                logit_offset: o,
                ..template.clone()
            })
            .collect();
        self.owners = Vec::new();
        (self.ids, self.next_id, self.router) = (ids, next_id, Mutex::new(router));
        Ok(())
    }

    /// The forward pass with the routing plan; experts whose `mask` is false take no part.
    ///
    /// With a tape the router is in training, and the state of one that has any moves on; without a tape it is in evaluation.
    ///
    /// # Errors
    /// As [`ops::moe_ffn`].
    pub fn forward_routed<T: Tape<f32, Cpu>>(
        &self,
        x: Rows<T>,
        mask: Option<&[bool]>,
    ) -> Result<Routed<T>, ModelError> {
        let (x, mut pass) = enter(x)?;
        let (output, plan) = self.route(&mut pass, x, mask)?;
        let output = output.into_tensor(pass.0)?;
        Ok(Routed { output, plan })
    }

    /// The forward pass over the last axis of a tensor, as part of a model: `traces` are those of the mixture layers below, which
    /// this layer's own is appended to. If `masked` is an expert of this layer, it takes no part.
    ///
    /// # Errors
    /// As [`forward_routed`](Self::forward_routed); [`ModelError::NoSuchExpert`] for a masked expert that is not there.
    pub fn forward_traced<S: Shape, T: Tape<f32, Cpu>>(
        &self,
        x: Tensor<S, f32, Cpu, T>,
        masked: Option<Masked>,
        traces: &mut Vec<LayerTrace>,
    ) -> Result<Tensor<S, f32, Cpu, T>, ModelError> {
        let shape = *x.shape();
        let y = on_tensors(rows(x)?, |pass, x| self.run_traced(pass, x, masked, traces))?;
        Ok(y.try_reshape_like(&shape)?)
    }

    /// [`forward_traced`](Self::forward_traced)
    pub(crate) fn run_traced<P: Pass>(
        &self,
        pass: &mut P,
        x: P::Rows,
        masked: Option<Masked>,
        traces: &mut Vec<LayerTrace>,
    ) -> Result<P::Rows, ModelError> {
        let mask = match masked {
            Some(m) if m.layer == traces.len() => {
                self.index_of(m.expert)?;
                let used = self.ids.iter().map(|&id| id != m.expert);
                Some(used.collect::<Vec<_>>())
            }
            _ => None,
        };
        let (y, plan) = self.route(pass, x.clone(), mask.as_deref())?;
        let gate_input = GateInput::new(pass.mirror(&x), pass.shape(&x));
        traces.push(LayerTrace { plan, gate_input });
        Ok(y)
    }

    pub(crate) fn run<P: Pass>(&self, pass: &mut P, x: P::Rows) -> Result<P::Rows, ModelError> {
        Ok(self.route(pass, x, None)?.0)
    }

    /// [`forward_routed`](Self::forward_routed)
    fn route<P: Pass>(
        &self,
        pass: &mut P,
        x: P::Rows,
        mask: Option<&[bool]>,
    ) -> Result<(P::Rows, Arc<RoutingPlan>), ModelError> {
        let route =
            |router: &mut AnyRouter, logits: ArrayView2<'_, f32>, plan: &mut RoutingPlan| {
                ops::set_thresholds(router, &self.experts)?;
                router.route(logits, mask, plan)?;
                Ok(router.clone())
            };
        let trains = pass.trains();
        if trains {
            self.place_rows(pass.shape(&x).0)?;
        }
        let plan_of = |logits: ArrayView2<'_, f32>, plan: &mut RoutingPlan| {
            if trains {
                // Locked for the plan alone: kernels wait for other threads, which may be routing through this layer.
                return route(&mut self.router(), logits, plan);
            }
            let mut router = self.router().clone();
            router.set_training(false);
            route(&mut router, logits, plan)
        };
        let ahead = || {
            if trains {
                let mut own = self.router();
                ops::set_thresholds(&mut own, &self.experts)?;
                return Ok(own.clone());
            }
            let mut router = self.router().clone();
            router.set_training(false);
            ops::set_thresholds(&mut router, &self.experts)?;
            Ok(router)
        };
        let routing = Routing {
            mask,
            ahead,
            route: plan_of,
            ranks: &self.ranks,
            owners: if self.together { &[] } else { &self.owners },
        };
        let gate = (&self.gate, &self.config.losses[..]);
        let activation = self.config.activation;
        let (y, plan) = pass.moe_ffn(x.clone(), &self.experts, gate, activation, routing)?;
        let Some(shared) = &self.shared else {
            return Ok((y, plan));
        };
        let both = shared.run(pass, x)?;
        Ok((pass.add(both, y, None)?, plan))
    }
}

/// Refuses a pool that a router cannot route to.
fn enough_experts(router: &AnyRouter, available: usize) -> Result<(), ModelError> {
    match router.least_experts() {
        k if k > available => Err(RoutingError::TooFewExperts { k, available }.into()),
        _ => Ok(()),
    }
}

/// What kind a router is, and the one inside it.
fn kinds(router: &AnyRouter) -> Vec<Discriminant<AnyRouter>> {
    let inner = match router {
        AnyRouter::Noisy(noisy) => kinds(noisy.inner()),
        _ => Vec::new(),
    };
    std::iter::once(discriminant(router)).chain(inner).collect()
}

/// Of how many experts a router has learned a bias.
fn biases(router: &AnyRouter) -> usize {
    match router {
        AnyRouter::BiasBalanced(router) => router.bias().len(),
        AnyRouter::Noisy(noisy) => biases(noisy.inner()),
        _ => 0,
    }
}

/// Whether a router learns from loads.
fn learns(router: &AnyRouter) -> bool {
    match router {
        AnyRouter::BiasBalanced(_) | AnyRouter::TargetK(_) => true,
        AnyRouter::Noisy(noisy) => learns(noisy.inner()),
        _ => false,
    }
}

impl Parameters for MoeLayer {
    fn visit<'a>(&'a self, prefix: &str, f: &mut dyn FnMut(String, &'a Param)) {
        for (expert, id) in self.experts.iter().zip(&self.ids) {
            let prefix = join(prefix, &format!("experts.{}", id.0));
            f(join(&prefix, "gate"), &expert.gate);
            if let Some(threshold) = &expert.threshold {
                f(join(&prefix, "threshold"), threshold);
            }
            expert.network.visit(&prefix, f);
        }
        for (name, param) in self.gate.params() {
            f(join(prefix, name), param);
        }
        if let Some(shared) = &self.shared {
            shared.visit(&join(prefix, "shared"), f);
        }
    }

    fn visit_mut(&mut self, prefix: &str, f: &mut dyn FnMut(String, &mut Param)) {
        for (expert, id) in self.experts.iter_mut().zip(&self.ids) {
            let prefix = join(prefix, &format!("experts.{}", id.0));
            f(join(&prefix, "gate"), &mut expert.gate);
            if let Some(threshold) = &mut expert.threshold {
                f(join(&prefix, "threshold"), threshold);
            }
            expert.network.visit_mut(&prefix, f);
        }
        for (name, param) in self.gate.params_mut() {
            f(join(prefix, name), param);
        }
        if let Some(shared) = &mut self.shared {
            shared.visit_mut(&join(prefix, "shared"), f);
        }
    }
}

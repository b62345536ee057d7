//! DynMoE's changes to a pool of experts while it trains (Guo et al., arXiv 2405.14297).
//!
//! Each epoch the routing of every step from one half of it to three quarters is recorded. Then experts that got no token are
//! removed, and if tokens were routed nowhere one expert is added, whose gate row is the normalised sum of their
//! representations and whose network is the one that every expert started from. Beside it the loss on gate rows
//! `0.01 (‖UᵀU - I‖_F + mean_e ‖w_e‖)`, `U` the rows divided by their norms.
//!
//! The layer itself needs a cosine gate without projection and temperature, and [`TopAny`](mass_routing::TopAny) routing, whose
//! thresholds are learned.

use mass_expand::ExpertId;
use mass_model::growth::Mixtures;
use mass_model::nn::MoeLayer;
use mass_model::ops::MoeExpert;
use mass_model::optim::{AdamW, Gradients};
use mass_model::parallel::Ranks;
use mass_model::{LayerTrace, ModelError, TrainPass};
use mass_routing::losses::diverse_and_simple;
use mass_routing::{AnyRouter, UsageStats};
use ndarray::Array2;
use serde::{Deserialize, Serialize};

/// When a pool is recorded and changed, and within which bounds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DynMoeConfig {
    /// Steps of an epoch.
    pub steps_per_epoch: u64,
    /// Part of an epoch from which routing is recorded.
    pub record_from: f64,
    /// Part of an epoch at which the pool is changed.
    pub adapt_at: f64,
    /// Most experts.
    pub experts_max: usize,
    /// Weight of the loss on gate rows.
    pub loss_weight: f32,
}

impl DynMoeConfig {
    /// The paper's settings for language: records from half an epoch, adapts at three quarters, loss weight 0.01.
    #[must_use]
    pub fn language(steps_per_epoch: u64, experts_max: usize) -> Self {
        Self {
            steps_per_epoch,
            record_from: 0.5,
            adapt_at: 0.75,
            experts_max,
            loss_weight: 0.01,
        }
    }

    /// The paper's settings for vision: as for language, but the pool is recorded and changed at every step.
    #[must_use]
    pub fn vision(experts_max: usize) -> Self {
        Self {
            record_from: 0.0,
            adapt_at: 0.0,
            ..Self::language(1, experts_max)
        }
    }

    /// The first recorded step of an epoch and the step after which the pool is changed, counted within the epoch.
    fn window(&self) -> (u64, u64) {
        let at = |part: f64| (self.steps_per_epoch as f64 * part) as u64;
        let last = self.steps_per_epoch.saturating_sub(1);
        let adapt = at(self.adapt_at).min(last);
        (at(self.record_from).min(adapt), adapt)
    }
}

/// A change of the pool. Serialises flat: `{"step":58,"layer":0,"kind":"remove","expert":3,"experts":7}`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DynMoeEvent {
    /// Training step after which it happened.
    pub step: u64,
    /// Mixture layer.
    pub layer: usize,
    /// What happened.
    #[serde(flatten)]
    pub kind: DynMoeChange,
}

/// The kinds of change.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum DynMoeChange {
    /// An expert without tokens was taken out.
    Remove {
        /// Which one.
        expert: ExpertId,
        /// Experts afterwards.
        experts: usize,
    },
    /// An expert was added for tokens that nobody took.
    Add {
        /// The new one.
        expert: ExpertId,
        /// Tokens routed nowhere while routing was recorded.
        tokens: u64,
        /// Experts afterwards.
        experts: usize,
    },
}

/// The record of one layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Record {
    usage: UsageStats,
    /// Sum of the representations of tokens routed nowhere.
    nowhere: Vec<f64>,
}

/// Records routing and changes pools; what of it a checkpoint needs is serialisable.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DynMoe {
    config: DynMoeConfig,
    records: Vec<Option<Record>>,
}

impl DynMoe {
    /// Nothing recorded yet, for a model of `layers` mixture layers.
    ///
    /// # Errors
    /// [`ModelError::Config`] for settings that leave no step to record, and a weight that is negative or not finite.
    pub fn new(config: DynMoeConfig, layers: usize) -> Result<Self, ModelError> {
        let parts = [config.record_from, config.adapt_at];
        if config.steps_per_epoch == 0
            || config.experts_max == 0
            || parts.iter().any(|p| !(0.0..=1.0).contains(p))
            || config.record_from > config.adapt_at
            || !config.loss_weight.is_finite()
            || config.loss_weight < 0.0
        {
            return Err(ModelError::Config(format!("DynMoE: {config:?}")));
        }
        Ok(Self {
            config,
            records: vec![None; layers],
        })
    }

    /// Adds the gradient of the loss on gate rows, and returns that loss, weighted. Call it before the optimiser's step.
    ///
    /// # Errors
    /// [`ModelError::Routing`] for gate rows that are not finite.
    pub fn add_loss<M: Mixtures, G: Gradients>(
        &self,
        model: &M,
        gradients: &mut G,
    ) -> Result<f64, ModelError> {
        let mut total = 0.0;
        for layer in 0..model.mixtures() {
            total += gate_loss(model.mixture(layer), self.config.loss_weight, gradients)?;
        }
        Ok(total * f64::from(self.config.loss_weight))
    }

    /// Looks at a step's routing and, where the epoch has come to that, changes the pools. Call it after the optimiser's step.
    ///
    /// `templates` are the networks that the experts of each layer started from.
    ///
    /// # Errors
    /// [`ModelError::Shape`] for another number of layers than there are, or a plan of another pool; [`ModelError::Routing`] if the
    /// pool has changed since routing was first recorded; and those of the layer.
    pub fn step<M: Mixtures, G>(
        &mut self,
        step: u64,
        model: &mut M,
        optimizer: &mut AdamW,
        pass: &TrainPass<G>,
        templates: &[MoeExpert],
    ) -> Result<Vec<DynMoeEvent>, ModelError> {
        self.step_among((&Ranks::default(), step), model, optimizer, pass, templates)
    }

    /// [`step`](Self::step) of one of several ranks, which have a share of the batch each and record what all of them route.
    ///
    /// # Errors
    /// As there, and [`ModelError::Parallel`].
    pub fn step_among<M: Mixtures, G>(
        &mut self,
        (ranks, step): (&Ranks, u64),
        model: &mut M,
        optimizer: &mut AdamW,
        pass: &TrainPass<G>,
        templates: &[MoeExpert],
    ) -> Result<Vec<DynMoeEvent>, ModelError> {
        let (record_from, adapt_at) = self.config.window();
        let within = step % self.config.steps_per_epoch;
        let mut events = Vec::new();
        let same = |what: &str, expected: usize, actual: usize| match expected == actual {
            true => Ok(()),
            false => Err(ModelError::Shape {
                what: what.into(),
                expected: vec![expected],
                actual: vec![actual],
            }),
        };
        let layers = pass.layers.len();
        same(
            "networks that experts started from",
            layers,
            templates.len(),
        )?;
        same("mixtures of the model", layers, model.mixtures())?;
        same("layers that are recorded", layers, self.records.len())?;
        for (layer, trace) in pass.layers.iter().enumerate() {
            let pool = model.mixture(layer).ids().len();
            same("experts of a plan", pool, trace.plan.num_experts())?;
        }
        if !(record_from..=adapt_at).contains(&within) {
            return Ok(events);
        }
        for (layer, trace) in pass.layers.iter().enumerate() {
            self.record(ranks, layer, trace)?;
            if within == adapt_at
                && let Some(record) = self.records[layer].take()
            {
                let changes = self.adapt(layer, model, optimizer, &record, &templates[layer])?;
                events.extend(
                    changes
                        .into_iter()
                        .map(|kind| DynMoeEvent { step, layer, kind }),
                );
            }
        }
        Ok(events)
    }

    fn record(
        &mut self,
        ranks: &Ranks,
        layer: usize,
        trace: &LayerTrace,
    ) -> Result<(), ModelError> {
        let plan = &trace.plan;
        let record = self.records[layer].get_or_insert_with(|| Record {
            usage: UsageStats::new(plan.num_experts()),
            nowhere: Vec::new(),
        });
        let mut nowhere = Vec::new();
        let nobody = (0..plan.num_tokens() as u32).filter(|&t| plan.k(t as usize) == 0);
        let nobody: Vec<u32> = nobody.collect();
        if !nobody.is_empty() {
            let input = trace.gate_input.rows(&nobody)?;
            let dim = trace.gate_input.shape().1;
            // Onto what was seen before where there is one process: a sum over steps of sums would round otherwise.
            let sums = match ranks.is_alone() {
                true => &mut record.nowhere,
                false => &mut nowhere,
            };
            sums.resize(dim, 0.0);
            for row in input.chunks_exact(dim) {
                for (sum, x) in sums.iter_mut().zip(row) {
                    *sum += f64::from(*x);
                }
            }
        }
        if ranks.is_alone() {
            return Ok(record.usage.record(plan)?);
        }
        let mut usage = UsageStats::new(plan.num_experts());
        usage.record(plan)?;
        for own in ranks.gather_json(&Record { usage, nowhere })? {
            record.usage.merge(&own.usage)?;
            record
                .nowhere
                .resize(record.nowhere.len().max(own.nowhere.len()), 0.0);
            let sums = record.nowhere.iter_mut();
            sums.zip(&own.nowhere).for_each(|(sum, x)| *sum += x);
        }
        Ok(())
    }

    fn adapt<M: Mixtures>(
        &self,
        layer: usize,
        model: &mut M,
        optimizer: &mut AdamW,
        record: &Record,
        template: &MoeExpert,
    ) -> Result<Vec<DynMoeChange>, ModelError> {
        let name = model.mixture_name(layer);
        let moe = model.mixture_mut(layer);
        if !matches!(&*moe.router(), AnyRouter::TopAny(_)) {
            let what = format!("DynMoE needs a top-any router, not {:?}", moe.router());
            return Err(ModelError::Config(what));
        }
        let mut changes = Vec::new();
        let unused: Vec<usize> = record.usage.dead_experts().collect();
        let ids = moe.ids().to_vec();
        for &index in unused.iter().rev() {
            // Tokens that nobody took leave a pool without any load: one expert stays.
            if moe.ids().len() == 1 {
                break;
            }
            let expert = ids[index];
            moe.remove(expert)?;
            optimizer.forget(&format!("{name}.experts.{}", expert.0));
            let experts = moe.ids().len();
            changes.push(DynMoeChange::Remove { expert, experts });
        }
        let tokens = record.usage.k_counts().first().copied().unwrap_or(0);
        let norm = record.nowhere.iter().map(|x| x * x).sum::<f64>().sqrt();
        if tokens > 0 && norm > 0.0 && moe.ids().len() < self.config.experts_max {
            let mut newcomer = template.clone();
            if newcomer.gate.len() != record.nowhere.len() {
                return Err(ModelError::Shape {
                    what: "gate row of the template expert".into(),
                    expected: vec![record.nowhere.len()],
                    actual: vec![newcomer.gate.len()],
                });
            }
            let row = newcomer.gate.values_mut().iter_mut();
            for (w, sum) in row.zip(&record.nowhere) {
                *w = (sum / norm) as f32;
            }
            if let Some(threshold) = &mut newcomer.threshold {
                threshold.values_mut().fill(0.0);
            }
            let expert = moe.push(newcomer)?;
            let experts = moe.ids().len();
            changes.push(DynMoeChange::Add {
                expert,
                tokens,
                experts,
            });
        }
        Ok(changes)
    }
}

/// Adds the weighted gradient of the loss on a layer's gate rows; returns the loss, unweighted.
fn gate_loss(
    layer: &MoeLayer,
    weight: f32,
    gradients: &mut impl Gradients,
) -> Result<f64, ModelError> {
    let experts = layer.experts();
    let dim = layer.config().dim;
    let values = experts.iter().map(|e| e.gate.try_values());
    let values = values.collect::<Result<Vec<_>, _>>()?;
    let rows = Array2::from_shape_fn((dim, experts.len()), |(i, e)| values[e][i]);
    let mut d_rows = Array2::zeros(rows.dim());
    let loss = diverse_and_simple(rows.view(), None, weight, &mut d_rows.view_mut())?;
    for (expert, d_row) in experts.iter().zip(d_rows.columns()) {
        gradients.add(&expert.gate, &d_row.to_vec())?;
    }
    Ok(loss)
}

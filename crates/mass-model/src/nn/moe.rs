use std::collections::BTreeSet;
use std::sync::Arc;

use dfdx::prelude::{Cpu, Module, Tape};
use mass_expand::ExpertId;
use mass_routing::{AnyRouter, RouterConfig, RoutingPlan};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::error::ModelError;
use crate::kernels::activation::Activation;
use crate::ops::{self, MoeExpert, Rows};
use crate::param::{Param, Parameters, join};

/// Sizes and rules of a mixture-of-experts layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MoeConfig {
    /// Token width d.
    pub dim: usize,
    /// Hidden width h of each expert.
    pub hidden: usize,
    /// Experts at the start, K.
    pub experts: usize,
    /// Nonlinearity of the experts.
    pub activation: Activation,
    /// How tokens choose experts.
    pub router: RouterConfig,
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
/// `z = x W_gᵀ` (plus a fixed offset for experts that were split with their mass preserved).
///
/// Experts carry an [`ExpertId`] that is never reused, and every expert owns its gate row, so that parameters, optimiser
/// moments and checkpoints keep their names while the pool changes.
///
/// ```
/// use dfdx::prelude::*;
/// use mass_model::{Activation, nn::{MoeConfig, MoeLayer}, seeded_rng};
/// use mass_routing::{Combine, RouterConfig};
///
/// let router = RouterConfig::TopP { p: 0.5, combine: Combine::Renormalised };
/// let config = MoeConfig { dim: 8, hidden: 16, experts: 4, activation: Activation::GeluErf, router };
/// let layer = MoeLayer::new(&config, &mut seeded_rng(0))?;
/// let x = Cpu::default().ones_like(&(2, 8));
/// assert_eq!(*layer.try_forward(x)?.shape(), (2, 8));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct MoeLayer {
    experts: Vec<MoeExpert>,
    ids: Vec<ExpertId>,
    next_id: u32,
    router: AnyRouter,
    config: MoeConfig,
}

impl MoeLayer {
    /// A layer with weights drawn as PyTorch's `Linear` draws them: U(-1/√in, 1/√in).
    ///
    /// # Errors
    /// [`ModelError::Config`] if a size is zero, [`ModelError::Routing`] if the router's parameters are not valid.
    pub fn new(config: &MoeConfig, rng: &mut ChaCha8Rng) -> Result<Self, ModelError> {
        let &MoeConfig {
            dim,
            hidden,
            experts,
            ..
        } = config;
        if dim == 0 || hidden == 0 || experts == 0 {
            let sizes =
                format!("a mixture layer of {experts} experts, width {dim}, hidden width {hidden}");
            return Err(ModelError::Config(sizes));
        }
        let (outer, inner) = (1.0 / (dim as f32).sqrt(), 1.0 / (hidden as f32).sqrt());
        let experts = (0..experts)
            .map(|_| {
                Ok(MoeExpert {
                    gate: Param::uniform(&[dim], outer, true, rng)?,
                    logit_offset: 0.0,
                    fc1: (
                        Param::uniform(&[hidden, dim], outer, true, rng)?,
                        Param::uniform(&[hidden], outer, false, rng)?,
                    ),
                    fc2: (
                        Param::uniform(&[dim, hidden], inner, true, rng)?,
                        Param::uniform(&[dim], inner, false, rng)?,
                    ),
                })
            })
            .collect::<Result<Vec<_>, ModelError>>()?;
        Self::from_experts(config, experts)
    }

    /// A layer from experts made elsewhere (loaded, converted from a dense network).
    ///
    /// # Errors
    /// [`ModelError::Config`] if their number is not the configuration's; shapes are checked in the first forward pass.
    pub fn from_experts(config: &MoeConfig, experts: Vec<MoeExpert>) -> Result<Self, ModelError> {
        if experts.is_empty() || experts.len() != config.experts {
            return Err(ModelError::Config(format!(
                "{} experts given, {} configured",
                experts.len(),
                config.experts
            )));
        }
        let count = experts.len() as u32;
        Ok(Self {
            experts,
            ids: (0..count).map(ExpertId).collect(),
            next_id: count,
            router: config.router.build()?,
            config: config.clone(),
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

    /// The router.
    pub fn router(&self) -> &AnyRouter {
        &self.router
    }

    /// The router, to be changed.
    pub fn router_mut(&mut self) -> &mut AnyRouter {
        &mut self.router
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

    /// Adds an expert at the end of the pool and returns its id.
    pub fn push(&mut self, expert: MoeExpert) -> ExpertId {
        let id = self.next_id();
        self.experts.push(expert);
        self.ids.push(id);
        self.next_id += 1;
        id
    }

    /// Takes an expert out of the pool.
    ///
    /// # Errors
    /// [`ModelError::NoSuchExpert`] if it is not there, [`ModelError::Config`] if it is the last one.
    pub fn remove(&mut self, id: ExpertId) -> Result<MoeExpert, ModelError> {
        let index = self.index_of(id)?;
        if self.experts.len() == 1 {
            return Err(ModelError::Config(
                "the last expert of a layer cannot be removed".into(),
            ));
        }
        self.ids.remove(index);
        Ok(self.experts.remove(index))
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
        (self.ids, self.next_id, self.router) = (ids, next_id, router);
        Ok(())
    }

    /// The forward pass with the routing plan; experts whose `mask` is false take no part.
    ///
    /// # Errors
    /// As [`ops::moe_ffn`].
    pub fn forward_routed<T: Tape<f32, Cpu>>(
        &self,
        x: Rows<T>,
        mask: Option<&[bool]>,
    ) -> Result<Routed<T>, ModelError> {
        let (output, plan) =
            ops::moe_ffn(x, &self.experts, mask, &self.router, self.config.activation)?;
        Ok(Routed { output, plan })
    }
}

impl Parameters for MoeLayer {
    fn visit<'a>(&'a self, prefix: &str, f: &mut dyn FnMut(String, &'a Param)) {
        for (expert, id) in self.experts.iter().zip(&self.ids) {
            let prefix = join(prefix, &format!("experts.{}", id.0));
            f(join(&prefix, "gate"), &expert.gate);
            f(join(&prefix, "fc1.weight"), &expert.fc1.0);
            f(join(&prefix, "fc1.bias"), &expert.fc1.1);
            f(join(&prefix, "fc2.weight"), &expert.fc2.0);
            f(join(&prefix, "fc2.bias"), &expert.fc2.1);
        }
    }

    fn visit_mut(&mut self, prefix: &str, f: &mut dyn FnMut(String, &mut Param)) {
        for (expert, id) in self.experts.iter_mut().zip(&self.ids) {
            let prefix = join(prefix, &format!("experts.{}", id.0));
            f(join(&prefix, "gate"), &mut expert.gate);
            f(join(&prefix, "fc1.weight"), &mut expert.fc1.0);
            f(join(&prefix, "fc1.bias"), &mut expert.fc1.1);
            f(join(&prefix, "fc2.weight"), &mut expert.fc2.0);
            f(join(&prefix, "fc2.bias"), &mut expert.fc2.1);
        }
    }
}

impl<T: Tape<f32, Cpu>> Module<Rows<T>> for MoeLayer {
    type Output = Rows<T>;
    type Error = ModelError;

    fn try_forward(&self, x: Rows<T>) -> Result<Rows<T>, ModelError> {
        Ok(self.forward_routed(x, None)?.output)
    }
}

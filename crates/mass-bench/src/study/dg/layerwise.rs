//! DynMoE in several layers, each with the network that its own experts started from.

use mass_model::growth::Mixtures;
use mass_model::lm::TrainPass;
use mass_model::nn::MoeLayer;
use mass_model::ops::MoeExpert;
use mass_model::optim::AdamW;
use mass_model::vit::VitClassifier;
use mass_model::{CpuGradients, ModelError, Param, Parameters};
use serde::{Deserialize, Serialize};

use crate::dynmoe::{DynMoe, DynMoeConfig, DynMoeEvent};

/// One set of rules and records a layer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct LayerwiseDynMoe(Vec<DynMoe>);

/// A model seen as if one of its mixture layers were the only one.
struct OneLayer<'m> {
    model: &'m mut VitClassifier,
    layer: usize,
}

impl LayerwiseDynMoe {
    /// The paper's rules for vision: pools are recorded and changed at every step.
    pub(super) fn new(layers: usize, experts_max: usize) -> Result<Self, ModelError> {
        let rules = DynMoeConfig {
            record_from: 0.0,
            adapt_at: 0.0,
            ..DynMoeConfig::language(1, experts_max)
        };
        let layers = (0..layers).map(|_| DynMoe::new(rules, 1));
        Ok(Self(layers.collect::<Result<_, _>>()?))
    }

    /// Adds the gradient of the loss on every layer's gate rows; see [`DynMoe::add_loss`].
    pub(super) fn add_loss(
        &self,
        model: &VitClassifier,
        gradients: &mut CpuGradients,
    ) -> Result<(), ModelError> {
        // The rules are the same for every layer, and this loss looks at all of a model's.
        match self.0.first() {
            Some(first) => first.add_loss(model, gradients).map(|_| ()),
            None => Ok(()),
        }
    }

    /// Changes the pools; see [`DynMoe::step`]. `templates` has the network of each layer.
    pub(super) fn step(
        &mut self,
        step: u64,
        model: &mut VitClassifier,
        optimizer: &mut AdamW,
        pass: TrainPass,
        templates: &[MoeExpert],
    ) -> Result<Vec<DynMoeEvent>, ModelError> {
        let mut events = Vec::new();
        let mut one = TrainPass {
            layers: Vec::new(),
            ..pass
        };
        for (layer, trace) in pass.layers.into_iter().enumerate() {
            one.layers = vec![trace];
            let mut view = OneLayer { model, layer };
            let rules = &mut self.0[layer];
            let changes = rules.step(step, &mut view, optimizer, &one, &templates[layer])?;
            events.extend(changes.into_iter().map(|e| DynMoeEvent { layer, ..e }));
        }
        Ok(events)
    }
}

impl Parameters for OneLayer<'_> {
    fn visit<'a>(&'a self, prefix: &str, f: &mut dyn FnMut(String, &'a Param)) {
        self.model.visit(prefix, f);
    }

    fn visit_mut(&mut self, prefix: &str, f: &mut dyn FnMut(String, &mut Param)) {
        self.model.visit_mut(prefix, f);
    }
}

impl Mixtures for OneLayer<'_> {
    fn mixtures(&self) -> usize {
        1
    }

    fn mixture(&self, _: usize) -> &MoeLayer {
        self.model.mixture(self.layer)
    }

    fn mixture_mut(&mut self, _: usize) -> &mut MoeLayer {
        self.model.mixture_mut(self.layer)
    }

    fn mixture_name(&self, _: usize) -> String {
        self.model.mixture_name(self.layer)
    }
}

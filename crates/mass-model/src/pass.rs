//! What a forward or training pass hands around.

use std::sync::Arc;

use dfdx::prelude::{AsArray, Backward, Cpu, OwnedTape, Tensor};
use mass_expand::ExpertId;
use mass_routing::RoutingPlan;

use crate::error::ModelError;
use crate::gradients::CpuGradients;
use crate::mirror::Mirror;
use crate::ops::{Training, check_loss};
use crate::parallel::Meanwhile;

/// What a mixture layer did in a forward pass.
#[derive(Clone, Debug)]
pub struct LayerTrace {
    /// Who computed what.
    pub plan: Arc<RoutingPlan>,
    /// Input of the gate, `[tokens, d]`.
    pub gate_input: GateInput,
}

/// What a gate read, `[tokens, d]`, on the host or on a device.
#[derive(Clone, Debug)]
pub struct GateInput {
    values: Mirror,
    shape: (usize, usize),
}

impl GateInput {
    pub(crate) fn new(values: Mirror, shape: (usize, usize)) -> Self {
        Self { values, shape }
    }

    /// Number of tokens, and their width.
    pub fn shape(&self) -> &(usize, usize) {
        &self.shape
    }

    /// The values, row-major.
    pub fn values(&self) -> &Mirror {
        &self.values
    }

    /// Copies of some tokens' rows on the host, one after another. From a device only these come down.
    ///
    /// # Errors
    /// [`ModelError::Shape`] for a token that is not there; that of a device that has failed.
    pub fn rows(&self, tokens: &[u32]) -> Result<Vec<f32>, ModelError> {
        let (n, dim) = self.shape;
        if let Some(&token) = tokens.iter().find(|&&t| t as usize >= n) {
            return Err(ModelError::shape("tokens", &[n], &[token as usize + 1]));
        }
        #[cfg(feature = "cuda")]
        if let Some(rows) = self.values.gathered(tokens, dim)? {
            return Ok(rows);
        }
        let values = self.values.try_values()?;
        let row = |&t: &u32| &values[t as usize * dim..(t as usize + 1) * dim];
        Ok(tokens.iter().flat_map(row).copied().collect())
    }

    /// A copy of the values on the host, row-major.
    ///
    /// # Panics
    /// If they lie on a device that has failed.
    pub fn as_vec(&self) -> Vec<f32> {
        self.values.to_vec()
    }
}

/// An expert that takes no part in a forward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Masked {
    /// Which mixture layer, counted from the bottom.
    pub layer: usize,
    /// Which expert.
    pub expert: ExpertId,
}

/// Refuses logits, or losses, that say nothing.
pub(crate) fn numbers(what: &str, values: Vec<f32>) -> Result<Vec<f32>, ModelError> {
    match values.iter().position(|x| !x.is_finite()) {
        Some(i) => Err(ModelError::NonFinite(format!("{what} {i}"))),
        None => Ok(values),
    }
}

/// A training pass: loss, gradients and what each mixture layer did.
pub struct TrainPass<G = CpuGradients> {
    /// Mean loss, nats.
    pub loss: f32,
    /// The loss of each token, nats; where a loss belongs to a whole sequence or image, each of its tokens has it.
    pub token_losses: Vec<f32>,
    /// Gradients of the loss.
    pub gradients: G,
    /// One a mixture layer, bottom first.
    pub layers: Vec<LayerTrace>,
    /// Gradients that have left for a sum over ranks.
    pub(crate) meanwhile: Option<Meanwhile>,
}

impl TrainPass {
    /// Runs the backward pass of a loss. `token_losses` are the losses of the rows that the mixture layers routed, and `layers`
    /// what [`MoeLayer::forward_traced`](crate::nn::MoeLayer::forward_traced) noted, bottom first.
    ///
    /// # Errors
    /// [`ModelError::NonFinite`] if the loss is not a number, [`ModelError::Tensor`] if an operation fails.
    pub fn new(
        loss: Tensor<(), f32, Cpu, OwnedTape<f32, Cpu>>,
        token_losses: Vec<f32>,
        layers: Vec<LayerTrace>,
    ) -> Result<Self, ModelError> {
        let value = check_loss(loss.array())?;
        Ok(Self {
            loss: value,
            token_losses,
            gradients: loss.try_backward()?,
            layers,
            meanwhile: None,
        })
    }
}

impl<G> TrainPass<G> {
    /// As [`new`](TrainPass::new), wherever the loss was computed.
    pub(crate) fn of<P: Training<Gradients = G>>(
        pass: P,
        loss: P::Loss,
        token_losses: Vec<f32>,
        layers: Vec<LayerTrace>,
    ) -> Result<Self, ModelError> {
        let (loss, gradients) = pass.backward(loss)?;
        Ok(Self {
            loss,
            token_losses,
            gradients,
            layers,
            meanwhile: None,
        })
    }
}

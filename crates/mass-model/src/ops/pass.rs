//! The operations that layers are made of.

use std::sync::Arc;

use dfdx::prelude::{AsArray, Backward, Cpu, OwnedTape, PutTape, Tape};
use dfdx::tensor::CpuError;
use mass_routing::{AnyRouter, RoutingPlan};
use ndarray::ArrayView2;

use super::{
    Activations, Attention, Gate, MoeExpert, Network, RoutingLoss, Scalar, Sequences, Taps, add,
    assemble, attention, cross_entropy, embedding, feed_forward, layer_norm, linear, moe, rows,
};
use crate::error::{ModelError, last_error};
use crate::gradients::CpuGradients;
use crate::kernels::activation::Activation;
use crate::kernels::dropout::Dropout;
use crate::kernels::scratch::Scratch;
use crate::mirror::Mirror;
use crate::parallel::Ranks;
use crate::param::Param;

/// Where a layer computes, and whether a backward pass can follow. A layer is written once, over this.
///
/// The operations are those of [`ops`](super) of the same names, which say what they compute and what they refuse.
pub(crate) trait Pass {
    /// A batch of vectors, one a row. A clone is the same rows.
    type Rows: Clone;
    /// A scalar that the backward pass may begin at.
    type Loss;

    /// Whether what is done is kept for a backward pass.
    fn trains(&self) -> bool;

    /// Has something done when a backward pass on the host has come back to here.
    fn on_return(
        &mut self,
        todo: impl FnOnce(&mut CpuGradients) -> Result<(), CpuError> + 'static,
    ) {
        drop(todo);
    }

    /// Rows that need no gradient.
    fn constant(&self, values: Scratch, shape: (usize, usize)) -> Result<Self::Rows, ModelError>;

    /// Number of rows, and their width.
    fn shape(&self, x: &Self::Rows) -> (usize, usize);

    /// The values of rows, row-major, wherever they lie.
    fn mirror(&self, x: &Self::Rows) -> Mirror;

    /// The sum of one row of each table.
    fn embedding(&mut self, tables: &[(&Param, &[u32])]) -> Result<Self::Rows, ModelError>;

    /// `x Wᵀ + b`
    fn linear(
        &mut self,
        x: Self::Rows,
        weight: &Param,
        bias: Option<&Param>,
    ) -> Result<Self::Rows, ModelError>;

    /// Layer norm with scale `gamma` and shift `beta`.
    fn layer_norm(
        &mut self,
        x: Self::Rows,
        gamma: &Param,
        beta: &Param,
        eps: f32,
    ) -> Result<Self::Rows, ModelError>;

    /// `residual + dropout(x)`
    fn add(
        &mut self,
        x: Self::Rows,
        residual: Self::Rows,
        dropout: Option<Dropout>,
    ) -> Result<Self::Rows, ModelError>;

    /// `dropout(x)`
    fn dropout(
        &mut self,
        x: Self::Rows,
        dropout: Option<Dropout>,
    ) -> Result<Self::Rows, ModelError>;

    /// The hyperbolic tangent of each element.
    fn tanh(&mut self, x: Self::Rows) -> Result<Self::Rows, ModelError>;

    /// Multi-head self-attention within each sequence.
    fn self_attention(
        &mut self,
        qkv: Self::Rows,
        sequences: &Sequences,
        how: Attention,
    ) -> Result<Self::Rows, ModelError>;

    /// A dense feed-forward network.
    fn feed_forward(
        &mut self,
        x: Self::Rows,
        network: &Network,
        activation: Activation,
    ) -> Result<Self::Rows, ModelError>;

    /// The mixture layer.
    fn moe_ffn(
        &mut self,
        x: Self::Rows,
        experts: &[MoeExpert],
        gate: (&Gate, &[RoutingLoss]),
        activation: Activation,
        routing: Routing<'_, impl Ahead, impl Route>,
    ) -> Result<(Self::Rows, Arc<RoutingPlan>), ModelError>;

    /// Some of the rows, in any order.
    fn pick_rows(&mut self, x: Self::Rows, picked: &[usize]) -> Result<Self::Rows, ModelError>;

    /// All rows, or those that are picked.
    fn pick_some(
        &mut self,
        x: Self::Rows,
        picked: Option<&[usize]>,
    ) -> Result<Self::Rows, ModelError> {
        match picked {
            Some(picked) => self.pick_rows(x, picked),
            None => Ok(x),
        }
    }

    /// Each row times `factor`, element by element.
    fn scale_rows(&mut self, x: Self::Rows, factor: &Param) -> Result<Self::Rows, ModelError>;

    /// The tokens of images: see [`assemble`](assemble::run).
    fn assemble(
        &mut self,
        patches: Self::Rows,
        class: &Param,
        positions: &Param,
        taps: Taps,
    ) -> Result<Self::Rows, ModelError>;

    /// Mean cross-entropy of the rows, nats, and that of each.
    fn cross_entropy(
        &mut self,
        logits: Self::Rows,
        targets: &[u32],
    ) -> Result<(Self::Loss, Vec<f32>), ModelError>;

    /// Mean squared error of rows of one value, and that of each.
    fn mean_squared_error(
        &mut self,
        outputs: Self::Rows,
        targets: &[f32],
    ) -> Result<(Self::Loss, Vec<f32>), ModelError>;
}

/// How a mixture layer routes.
#[cfg_attr(
    not(feature = "cuda"),
    allow(dead_code, reason = "the host needs `route` alone")
)]
pub(crate) struct Routing<'a, A, R> {
    /// Which experts may be used.
    pub(crate) mask: Option<&'a [bool]>,
    /// Says how the router is before it routes, to a device that may know its rules.
    pub(crate) ahead: A,
    /// Makes a plan of the logits, and returns the router as it was then: only meanwhile need it be in hand.
    pub(crate) route: R,
    /// Who has the other rows of the batch.
    pub(crate) ranks: &'a Ranks,
    /// Where the experts are, by the place of a rank in its group; empty where every rank has all.
    pub(crate) owners: &'a [usize],
}

/// See [`Routing::ahead`].
pub(crate) trait Ahead: FnOnce() -> Result<AnyRouter, ModelError> {}
impl<F: FnOnce() -> Result<AnyRouter, ModelError>> Ahead for F {}

/// See [`Routing::route`].
pub(crate) trait Route:
    FnOnce(ArrayView2<'_, f32>, &mut RoutingPlan) -> Result<AnyRouter, ModelError>
{
}
impl<F> Route for F where
    F: FnOnce(ArrayView2<'_, f32>, &mut RoutingPlan) -> Result<AnyRouter, ModelError>
{
}

/// A pass that a backward pass can follow.
pub(crate) trait Training: Pass {
    /// Gradients of parameters, where the pass has computed.
    type Gradients;

    /// The value of a loss of this pass, and its gradients.
    fn backward(self, loss: Self::Loss) -> Result<(f32, Self::Gradients), ModelError>;
}

impl Training for Host<OwnedTape<f32, Cpu>> {
    type Gradients = CpuGradients;

    fn backward(self, loss: Scalar) -> Result<(f32, CpuGradients), ModelError> {
        let value = check_loss(loss.array())?;
        let gradients = loss.put_tape(self.0).try_backward();
        // What an operation has refused says more than what dfdx could be told of it.
        let gradients = gradients.map_err(|e| last_error().unwrap_or(ModelError::Tensor(e)));
        Ok((value, gradients?))
    }
}

/// Refuses a loss that nothing can be learnt from.
pub(crate) fn check_loss(loss: f32) -> Result<f32, ModelError> {
    match loss.is_finite() {
        true => Ok(loss),
        false => Err(ModelError::NonFinite("the training loss".into())),
    }
}

/// On the host, with dfdx's tape, or without one.
pub(crate) struct Host<T>(pub(crate) T);

impl<T: Tape<f32, Cpu>> Pass for Host<T> {
    type Rows = Activations;
    type Loss = Scalar;

    fn trains(&self) -> bool {
        T::OWNS_TAPE
    }

    fn on_return(
        &mut self,
        todo: impl FnOnce(&mut CpuGradients) -> Result<(), CpuError> + 'static,
    ) {
        self.0.add_backward_op(todo);
    }

    fn constant(&self, values: Scratch, shape: (usize, usize)) -> Result<Activations, ModelError> {
        Ok(Activations::constant(values, shape))
    }

    fn shape(&self, x: &Activations) -> (usize, usize) {
        *x.shape()
    }

    fn mirror(&self, x: &Activations) -> Mirror {
        x.to_vec().into()
    }

    fn embedding(&mut self, tables: &[(&Param, &[u32])]) -> Result<Activations, ModelError> {
        embedding::run(&mut self.0, tables)
    }

    fn linear(
        &mut self,
        x: Activations,
        weight: &Param,
        bias: Option<&Param>,
    ) -> Result<Activations, ModelError> {
        linear::run(&mut self.0, x, weight, bias)
    }

    fn layer_norm(
        &mut self,
        x: Activations,
        gamma: &Param,
        beta: &Param,
        eps: f32,
    ) -> Result<Activations, ModelError> {
        layer_norm::run(&mut self.0, x, gamma, beta, eps)
    }

    fn add(
        &mut self,
        x: Activations,
        residual: Activations,
        dropout: Option<Dropout>,
    ) -> Result<Activations, ModelError> {
        add::run_add(&mut self.0, x, residual, dropout)
    }

    fn dropout(
        &mut self,
        x: Activations,
        dropout: Option<Dropout>,
    ) -> Result<Activations, ModelError> {
        add::run_dropout(&mut self.0, x, dropout)
    }

    fn tanh(&mut self, x: Activations) -> Result<Activations, ModelError> {
        add::run_tanh(&mut self.0, x)
    }

    fn self_attention(
        &mut self,
        qkv: Activations,
        sequences: &Sequences,
        how: Attention,
    ) -> Result<Activations, ModelError> {
        attention::run(&mut self.0, qkv, sequences, how)
    }

    fn feed_forward(
        &mut self,
        x: Activations,
        network: &Network,
        activation: Activation,
    ) -> Result<Activations, ModelError> {
        feed_forward::run(&mut self.0, x, network, activation)
    }

    fn moe_ffn(
        &mut self,
        x: Activations,
        experts: &[MoeExpert],
        gate: (&Gate, &[RoutingLoss]),
        activation: Activation,
        routing: Routing<'_, impl Ahead, impl Route>,
    ) -> Result<(Activations, Arc<RoutingPlan>), ModelError> {
        let how = (routing.route, routing.ranks, routing.owners);
        moe::run(&mut self.0, x, experts, gate, activation, how)
    }

    fn pick_rows(&mut self, x: Activations, picked: &[usize]) -> Result<Activations, ModelError> {
        rows::run_pick(&mut self.0, x, picked)
    }

    fn scale_rows(&mut self, x: Activations, factor: &Param) -> Result<Activations, ModelError> {
        rows::run_scale(&mut self.0, x, factor)
    }

    fn assemble(
        &mut self,
        patches: Activations,
        class: &Param,
        positions: &Param,
        taps: Taps,
    ) -> Result<Activations, ModelError> {
        assemble::run(&mut self.0, patches, class, positions, taps)
    }

    fn cross_entropy(
        &mut self,
        logits: Activations,
        targets: &[u32],
    ) -> Result<(Scalar, Vec<f32>), ModelError> {
        cross_entropy::run(&mut self.0, logits, targets)
    }

    fn mean_squared_error(
        &mut self,
        outputs: Activations,
        targets: &[f32],
    ) -> Result<(Scalar, Vec<f32>), ModelError> {
        cross_entropy::run_squared_error(&mut self.0, outputs, targets)
    }
}

use rand_chacha::ChaCha8Rng;

use super::Linear;
use crate::error::ModelError;
use crate::kernels::activation::Activation;
use crate::ops::{Network, Pass};
use crate::param::{Param, Parameters, draw};

/// A dense feed-forward network, `y = fc2 act(fc1 x + b1) + b2`, or gated, `y = fc2 (act(fc1 x + b1) ⊙ (up x + b3)) + b2`.
///
/// ```
/// use dfdx::prelude::*;
/// use mass_model::{Activation, nn::FeedForward, seeded_rng};
///
/// let swiglu = FeedForward::new(8, 16, Activation::Silu, true, &mut seeded_rng(0))?;
/// let y = swiglu.try_forward(Cpu::default().ones_like(&(3, 8)))?;
/// assert_eq!(*y.shape(), (3, 8));
/// # Ok::<(), mass_model::ModelError>(())
/// ```
#[derive(Clone, Debug)]
pub struct FeedForward(pub(super) Network, Activation);

impl FeedForward {
    /// A network with weights drawn as PyTorch's `Linear` draws them: U(-1/√in, 1/√in).
    ///
    /// # Errors
    /// [`ModelError::Config`] if a size is zero.
    pub fn new(
        dim: usize,
        hidden: usize,
        activation: Activation,
        gated: bool,
        rng: &mut ChaCha8Rng,
    ) -> Result<Self, ModelError> {
        draw(rng, |rng| {
            let fc1 = Linear::new(dim, hidden, true, rng)?;
            let fc2 = Linear::new(hidden, dim, true, rng)?;
            let mut network = Self::from_linear(fc1, fc2, activation)?;
            if gated {
                network.add_factor(rng)?;
            }
            Ok(network)
        })
    }

    /// A network from its two layers, missing biases being zero.
    ///
    /// # Errors
    /// [`ModelError::Shape`] if they do not fit each other, or a weight is no matrix.
    pub fn from_linear(
        fc1: Linear,
        fc2: Linear,
        activation: Activation,
    ) -> Result<Self, ModelError> {
        let with_bias = |layer: Linear| -> Result<(Param, Param), ModelError> {
            let &[out, _] = layer.weight.shape() else {
                let what = "matrix of a feed-forward network";
                return Err(ModelError::shape(what, &[0, 0], layer.weight.shape()));
            };
            let bias = layer.bias.map_or_else(|| Param::zeros(&[out], false), Ok)?;
            Ok((layer.weight, bias))
        };
        let network = Network {
            fc1: with_bias(fc1)?,
            fc2: with_bias(fc2)?,
            up: None,
        };
        network.check("feed-forward network", None)?;
        Ok(Self(network, activation))
    }

    fn add_factor(&mut self, rng: &mut ChaCha8Rng) -> Result<(), ModelError> {
        let (hidden, dim) = self.sizes()?;
        let bound = 1.0 / (dim as f32).sqrt();
        let weight = Param::uniform(&[hidden, dim], bound, true, rng)?;
        self.0.up = Some((weight, Param::uniform(&[hidden], bound, false, rng)?));
        Ok(())
    }

    pub(super) fn sizes(&self) -> Result<(usize, usize), ModelError> {
        self.0.check("feed-forward network", None)
    }

    /// The nonlinearity.
    pub fn activation(&self) -> Activation {
        self.1
    }

    /// Whether it has a factor on the activation.
    pub fn gated(&self) -> bool {
        self.0.up.is_some()
    }

    /// First matrix and bias, `[hidden, d]` and `[hidden]`.
    pub fn fc1(&self) -> (&Param, &Param) {
        (&self.0.fc1.0, &self.0.fc1.1)
    }

    /// Second matrix and bias, `[d, hidden]` and `[d]`.
    pub fn fc2(&self) -> (&Param, &Param) {
        (&self.0.fc2.0, &self.0.fc2.1)
    }
}

impl Parameters for FeedForward {
    fn visit<'a>(&'a self, prefix: &str, f: &mut dyn FnMut(String, &'a Param)) {
        self.0.visit(prefix, f);
    }

    fn visit_mut(&mut self, prefix: &str, f: &mut dyn FnMut(String, &mut Param)) {
        self.0.visit_mut(prefix, f);
    }
}

impl FeedForward {
    pub(crate) fn run<P: Pass>(&self, pass: &mut P, x: P::Rows) -> Result<P::Rows, ModelError> {
        pass.feed_forward(x, &self.0, self.1)
    }
}

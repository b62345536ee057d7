use dfdx::prelude::{Cpu, Tape};

use super::{Activations, Pass, Rows, expect_width, on_tensors};
use crate::error::ModelError;
use crate::kernels::activation::Activation;
use crate::kernels::moe_ffn::{self as kernel, FfnShape, Grouped, Hidden};
use crate::kernels::scratch::Scratch;
use crate::ops::Network;
use crate::ops::moe::Held;

/// Every row assigned to the one network, with weight one.
pub(super) struct Everyone {
    expert_offsets: [u32; 2],
    rows: Vec<u32>,
    weights: Vec<f32>,
}

impl Everyone {
    pub(super) fn new(n: usize) -> Result<Self, ModelError> {
        let Ok(last) = u32::try_from(n) else {
            return Err(ModelError::Config(format!("{n} rows are too many")));
        };
        Ok(Self {
            expert_offsets: [0, last],
            rows: (0..=last).collect(),
            weights: vec![1.0; n],
        })
    }

    pub(super) fn grouped(&self) -> Grouped<'_> {
        let n = self.weights.len();
        Grouped {
            expert_offsets: &self.expert_offsets,
            tokens: &self.rows[..n],
            weights: &self.weights,
            token_offsets: &self.rows,
            token_assignments: &self.rows[..n],
        }
    }
}

/// A dense feed-forward network, `y = fc2 act(fc1 x + b1) + b2`, or with a factor, `y = fc2 (act(fc1 x + b1) ⊙ (up x + b3)) + b2`.
///
/// It is the mixture layer with one expert that everyone is sent to.
///
/// # Errors
/// [`ModelError::Shape`] if the shapes do not fit.
pub fn feed_forward<T: Tape<f32, Cpu>>(
    x: Rows<T>,
    network: &Network,
    activation: Activation,
) -> Result<Rows<T>, ModelError> {
    on_tensors(x, |pass, x| pass.feed_forward(x, network, activation))
}

/// [`feed_forward`]
pub(super) fn run<T: Tape<f32, Cpu>>(
    tape: &mut T,
    x: Activations,
    network: &Network,
    activation: Activation,
) -> Result<Activations, ModelError> {
    let (hidden, dim) = network.check("feed-forward network", None)?;
    expect_width("input of a feed-forward network", x.shape(), dim)?;
    let n = x.shape().0;
    let shape = FfnShape {
        dim,
        hidden,
        activation,
        gated: network.up.is_some(),
    };
    let plan = Everyone::new(n)?;
    let mut hidden = T::OWNS_TAPE.then(|| Hidden::take(shape, n));
    let mut y = Scratch::take(n * dim);
    let (weights, kept) = ([network.weights()?], hidden.as_mut());
    kernel::forward(&x, &weights, plan.grouped(), shape, kept, &mut y);
    let held = Held::of(network);
    Activations::output(tape, y, (n, dim), move |g, dy| {
        let Some(mut hidden) = hidden else {
            return Ok(());
        };
        let mut dx = x.take_gradient(g)?;
        let mut taken = held.take(g)?;
        kernel::backward(
            &x,
            &[held.weights()],
            plan.grouped(),
            shape,
            &mut hidden,
            dy,
            (&mut dx.values, dx.store),
            &mut [taken.gradients()],
            &mut Scratch::take(n),
        );
        held.put(g, taken)?;
        x.put_gradient(g, dx.values)
    })
}

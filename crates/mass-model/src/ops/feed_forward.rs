use std::sync::Arc;

use dfdx::prelude::{Cpu, HasShape, PutTape, ReshapeTo, SplitTape, Tape, TensorFromVec};

use super::{Rows, expect_width, read, take_gradient};
use crate::error::ModelError;
use crate::kernels::activation::Activation;
use crate::kernels::moe_ffn::{self as kernel, FfnShape, Grouped, Hidden};
use crate::kernels::scratch::Scratch;
use crate::ops::Network;
use crate::ops::moe::Held;

/// Every row assigned to the one network, with weight one.
struct Everyone {
    expert_offsets: [u32; 2],
    rows: Vec<u32>,
    weights: Vec<f32>,
}

impl Everyone {
    fn new(n: usize) -> Self {
        let last = u32::try_from(n).unwrap_or(u32::MAX);
        Self {
            expert_offsets: [0, last],
            rows: (0..=last).collect(),
            weights: vec![1.0; n],
        }
    }

    fn grouped(&self) -> Grouped<'_> {
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
    let (hidden, dim) = network.check("feed-forward network", None)?;
    expect_width("input of a feed-forward network", &x, dim)?;
    let (x, mut tape) = x.try_contiguous()?.split_tape();
    let n = x.shape().0;
    if u32::try_from(n).is_err() {
        return Err(ModelError::Config(format!("{n} rows are too many")));
    }
    let input = read(&x);
    let shape = FfnShape {
        dim,
        hidden,
        activation,
        gated: network.up.is_some(),
    };
    let plan = Arc::new(Everyone::new(n));
    let mut hidden = T::OWNS_TAPE.then(|| Hidden::take(shape, n));
    let mut y = vec![0.0; n * dim];
    let weights = [network.weights()];
    kernel::forward(
        &input,
        &weights,
        plan.grouped(),
        shape,
        hidden.as_mut(),
        &mut y,
    );
    let y = x.device().try_tensor_from_vec(y, (n, dim))?;
    if let Some(mut hidden) = hidden {
        let (x_ghost, y_ghost) = (x.ghost(), y.ghost());
        let held = Held::of(network);
        tape.add_backward_op(move |g| {
            let dy = take_gradient!(g, y_ghost);
            let mut dx = take_gradient!(g, x_ghost);
            let mut taken = held.take(g)?;
            kernel::backward(
                &input,
                &[held.weights()],
                plan.grouped(),
                shape,
                &mut hidden,
                &dy,
                &mut dx,
                &mut [taken.gradients()],
                &mut Scratch::take(n),
            );
            held.put(g, taken)?;
            **g.get_or_alloc_mut(&x_ghost)? = dx;
            Ok(())
        });
    }
    Ok(y.put_tape(tape))
}

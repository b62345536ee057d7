//! A mixture that grows in a training loop of burn.
//!
//!     cargo run --features burn --example burn
//!
//! The plan says who computes what; burn's operations give the weights their gradient.

use burn::optim::{AdamWConfig, AdamWState, Optimizer};
use burn::tensor::activation::{relu, softmax};
use burn::tensor::{Device, Gradients, IndexingUpdateOp, Int, Tensor, TensorData};
use interop::{DIM, Growth, HIDDEN, STEPS, TOKENS, batch, uniform};
use mass_routing::{Combine, Router, RoutingPlan, TopP};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// A matrix with its moments.
struct Learnt(Tensor<2>, Option<AdamWState<2>>);

impl Learnt {
    fn new(values: Vec<f32>, shape: [usize; 2], device: &Device) -> Self {
        Self(Tensor::from_data(TensorData::new(values, shape), device).require_grad(), None)
    }

    /// For a newcomer: a clone would share its gradient with the original, detached it is a leaf.
    fn copy(&self) -> Self {
        Self(self.0.clone().detach().require_grad(), self.1.clone())
    }

    /// An expert without tokens has no gradient, and stays as it is.
    fn step(&mut self, gradients: &Gradients) {
        if let Some(gradient) = self.0.grad(gradients) {
            let (adam, value) = (AdamWConfig::new().build(), self.0.clone().inner());
            let (value, moments) = adam.step(0.01, value, gradient, self.1.take());
            *self = Self(value.autodiff().require_grad(), moments);
        }
    }
}

/// Gate row, up, down.
type Expert = [Learnt; 3];

/// `y[t] = sum over the experts e of t of w[t, e] down[e] relu(up[e] x[t])`, and the plan.
fn forward(pool: &[Expert], x: Tensor<2>, router: &mut TopP) -> Result<(Tensor<1>, RoutingPlan)> {
    let (device, experts) = (x.device(), pool.len());
    let gates = Tensor::cat(pool.iter().map(|[gate, ..]| gate.0.clone()).collect(), 0);
    let logits = x.clone().matmul(gates.transpose());
    let mut plan = RoutingPlan::default();
    router.route_slice(&logits.to_data().try_to_vec()?, experts, None, &mut plan)?;

    // The plan's weights, with the gradient of the probabilities.
    let ints = |ints: Vec<i64>| Tensor::<1, Int>::from_ints(&ints[..], &device);
    let at = |(e, &t): (u32, &u32)| i64::from(t) * experts as i64 + i64::from(e);
    let at = ints(plan.experts().zip(plan.tokens()).map(at).collect());
    let chosen: Tensor<1> = softmax(logits, 1).flatten(0, 1).select(0, at);
    let weights = chosen.clone() - chosen.detach() + Tensor::from_floats(plan.weights(), &device);

    let mut y = Tensor::zeros([x.dims()[0], 1], &device);
    for (e, [_, up, down]) in pool.iter().enumerate().filter(|(e, _)| plan.load(*e) > 0) {
        let tokens = ints(plan.tokens()[plan.segment(e)].iter().map(|&t| t.into()).collect());
        let weights = weights.clone().slice(plan.segment(e)).unsqueeze_dim(1);
        let hidden = relu(x.clone().select(0, tokens.clone()).matmul(up.0.clone()));
        let out = hidden.matmul(down.0.clone()) * weights;
        y = y.select_assign(0, tokens, out, IndexingUpdateOp::Add);
    }
    Ok((y.squeeze_dim(1), plan))
}

fn main() -> Result<()> {
    let device = Device::flex().autodiff();
    let mut router = TopP::new(0.6, Combine::StraightThrough)?;
    let mut growth = Growth::new()?;
    let mut uniform = uniform(0);
    let mut numbers = |n| uniform.by_ref().take(n).collect();
    let mut random = |r, c| Learnt::new(numbers(r * c), [r, c], &device);
    let mut expert = || [random(1, DIM), random(DIM, HIDDEN), random(HIDDEN, 1)];
    let mut pool: Vec<Expert> = vec![expert(), expert()];
    for step in 0..STEPS {
        let (x, target) = batch(step);
        let tokens = TensorData::new(x.clone(), [TOKENS, DIM]);
        let (y, plan) = forward(&pool, Tensor::from_data(tokens, &device), &mut router)?;
        let losses = (y - Tensor::from_floats(&target[..], &device)).square();
        let gradients = losses.clone().mean().backward();
        let losses = losses.into_data().try_to_vec::<f32>()?;
        let (mut gates, mut norms) = (Vec::new(), Vec::new());
        for [gate, up, down] in &pool {
            gates.push(gate.0.to_data().try_to_vec::<f32>()?);
            let square = |g: Tensor<2>| g.square().sum().into_scalar::<f64>();
            let squares = [up, down].map(|layer| layer.0.grad(&gradients).map_or(0.0, square));
            norms.push((squares[0] + squares[1]).sqrt());
        }
        for split in growth.step(&plan, &x, &losses, &gates, &norms)? {
            let mut newcomer = pool[split.source].each_ref().map(Learnt::copy);
            newcomer[0].0 = Learnt::new(split.newcomer_gate, [1, DIM], &device).0;
            pool[split.source][0].0 = Learnt::new(split.source_gate, [1, DIM], &device).0;
            pool.push(newcomer);
        }
        pool.iter_mut().flatten().for_each(|learnt| learnt.step(&gradients));
    }
    growth.finish();
    Ok(())
}

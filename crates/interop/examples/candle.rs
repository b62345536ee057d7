//! A mixture that grows in a training loop of candle.
//!
//!     cargo run --features candle --example candle
//!
//! Routing is an operation of candle's, with mass-routing's gradient on the way back.

use std::sync::{Arc, Mutex};

use candle_core::{CpuStorage, CustomOp1, Device, Error, Layout, Result, Shape, Tensor, Var};
use candle_nn::{AdamW, Optimizer};
use interop::{DIM, Growth, HIDDEN, STEPS, TOKENS, batch, uniform};
use mass_routing::{Combine, Router, RoutingPlan, TopP};

/// Logits (tokens x experts) to routing weights (one for each token of each expert).
#[derive(Clone)]
struct Route(Arc<Mutex<(TopP, RoutingPlan)>>);

impl CustomOp1 for Route {
    fn name(&self) -> &'static str {
        "route"
    }

    fn cpu_fwd(&self, logits: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (router, plan) = &mut *self.0.lock().unwrap();
        let experts = layout.shape().dims2()?.1;
        let (from, to) = layout.contiguous_offsets().expect("contiguous logits");
        let routed = router.route_slice(&logits.as_slice()?[from..to], experts, None, plan);
        routed.map_err(Error::wrap)?;
        Ok((CpuStorage::F32(plan.weights().to_vec()), plan.num_assignments().into()))
    }

    fn bwd(&self, logits: &Tensor, _: &Tensor, d_weights: &Tensor) -> Result<Option<Tensor>> {
        let (router, plan) = &*self.0.lock().unwrap();
        let (d_weights, mut d_logits) = (d_weights.to_vec1()?, vec![0.0; logits.elem_count()]);
        router.backward_slice(plan, &d_weights, &mut d_logits).map_err(Error::wrap)?;
        Tensor::from_vec(d_logits, logits.shape(), logits.device()).map(Some)
    }
}

/// Gate row, up, down.
type Expert = ([Var; 3], AdamW);

fn expert([gate, up, down]: [Tensor; 3]) -> Result<Expert> {
    let vars = [Var::from_tensor(&gate)?, Var::from_tensor(&up)?, Var::from_tensor(&down)?];
    Ok((vars.clone(), AdamW::new_lr(vars.to_vec(), 0.01)?))
}

/// `y[t] = sum over the experts e of t of w[t, e] down[e] relu(up[e] x[t])`, and the plan.
fn forward(pool: &[Expert], x: &Tensor, route: &Route) -> Result<(Tensor, RoutingPlan)> {
    let gates: Vec<&Tensor> = pool.iter().map(|([gate, ..], _)| gate.as_tensor()).collect();
    let weights = x.matmul(&Tensor::cat(&gates, 0)?.t()?)?.apply_op1(route.clone())?;
    let plan = route.0.lock().unwrap().1.clone();
    let mut y = x.narrow(1, 0, 1)?.zeros_like()?;
    for (e, ([_, up, down], _)) in pool.iter().enumerate().filter(|(e, _)| plan.load(*e) > 0) {
        let tokens = Tensor::new(&plan.tokens()[plan.segment(e)], x.device())?;
        let weights = weights.narrow(0, plan.segment(e).start, plan.load(e))?.unsqueeze(1)?;
        let out = x.index_select(&tokens, 0)?.matmul(up)?.relu()?.matmul(down)?;
        y = y.index_add(&tokens, &(out * weights)?, 0)?;
    }
    Ok((y.squeeze(1)?, plan))
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let matrix = |v: Vec<f32>, rows: usize| Tensor::new(v, &Device::Cpu)?.reshape((rows, ()));
    let mut uniform = uniform(0);
    let mut random = |rows, columns| matrix(uniform.by_ref().take(rows * columns).collect(), rows);
    let router = TopP::new(0.6, Combine::StraightThrough)?;
    let route = Route(Arc::new(Mutex::new((router, RoutingPlan::default()))));
    let mut growth = Growth::new()?;
    let mut pool = Vec::new();
    for _ in 0..2 {
        pool.push(expert([random(1, DIM)?, random(DIM, HIDDEN)?, random(HIDDEN, 1)?])?);
    }
    for step in 0..STEPS {
        let (x, target) = batch(step);
        let (y, plan) = forward(&pool, &matrix(x.clone(), TOKENS)?, &route)?;
        let losses = (y - Tensor::new(target, &Device::Cpu)?)?.sqr()?;
        let gradients = losses.mean(0)?.backward()?;

        let (mut gates, mut norms) = (Vec::new(), Vec::new());
        for ([gate, up, down], _) in &pool {
            gates.push(gate.squeeze(0)?.to_vec1()?);
            // An expert without tokens has no gradient.
            let found = [up, down].into_iter().filter_map(|layer| gradients.get(layer));
            let squares = found.map(|g| g.sqr()?.sum_all()?.to_scalar::<f32>());
            norms.push(f64::from(squares.sum::<Result<f32>>()?).sqrt());
        }
        for split in growth.step(&plan, &x, &losses.to_vec1()?, &gates, &norms)? {
            let [gate, up, down] = &pool[split.source].0;
            gate.set(&matrix(split.source_gate, 1)?)?;
            // Detached: `Var::from_tensor` of a variable is that variable. Moments start from zero.
            let [up, down] = [up, down].map(Var::as_detached_tensor);
            pool.push(expert([matrix(split.newcomer_gate, 1)?, up, down])?);
        }
        pool.iter_mut().try_for_each(|(_, adam)| adam.step(&gradients))?;
    }
    growth.finish();
    Ok(())
}

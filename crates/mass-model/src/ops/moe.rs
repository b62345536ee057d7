use std::sync::Arc;

use dfdx::prelude::{Cpu, HasShape, PutTape, ReshapeTo, SplitTape, Tape, TensorFromVec};
use dfdx::tensor::CpuError;
use mass_routing::{AnyRouter, Router, RoutingPlan};
use ndarray::{ArrayView2, ArrayViewMut2};

use super::{Rows, expect_width, read, take_gradient};
use crate::error::ModelError;
use crate::kernels::activation::Activation;
use crate::kernels::linear;
use crate::kernels::moe_ffn::{self as kernel, ExpertGradients, ExpertWeights, FfnShape, Grouped};
use crate::kernels::scratch::Scratch;
use crate::param::{Param, ParamHandle};

/// The parameters of one expert: gate row `[d]`, `fc1: [h, d]`, `[h]`, `fc2: [d, h]`, `[d]`, and a fixed offset on its
/// logit.
#[derive(Clone, Debug)]
pub struct MoeExpert {
    /// Row of the gate matrix.
    pub gate: Param,
    /// Added to the expert's logit; not trained. Zero but for experts that were split with their mass preserved.
    pub logit_offset: f32,
    /// First matrix and bias.
    pub fc1: (Param, Param),
    /// Second matrix and bias.
    pub fc2: (Param, Param),
}

/// What the backward pass keeps of an expert.
struct Held {
    weights: [Arc<Vec<f32>>; 4],
    handles: [ParamHandle; 4],
    gate: ParamHandle,
}

impl MoeExpert {
    fn params(&self) -> [&Param; 4] {
        [&self.fc1.0, &self.fc1.1, &self.fc2.0, &self.fc2.1]
    }

    fn weights(&self) -> ExpertWeights<'_> {
        let [w1, b1, w2, b2] = self.params().map(Param::values);
        ExpertWeights { w1, b1, w2, b2 }
    }
}

fn grouped(plan: &RoutingPlan) -> Grouped<'_> {
    Grouped {
        expert_offsets: plan.expert_offsets(),
        tokens: plan.tokens(),
        weights: plan.weights(),
        token_offsets: plan.token_offsets(),
        token_assignments: plan.token_assignments(),
    }
}

/// The sparse mixture-of-experts feed-forward layer.
///
/// Logits `z = x W_gᵀ + offset`; `router` turns them into assignments with weights w;
/// `y[t] = Σ_e w[t, e] (fc2_e act(fc1_e x[t] + b1_e) + b2_e)`. Gradients reach the experts, the gate rows and `x`, the
/// latter both through the experts and through the gate. `mask`, if given, says which experts are in use.
///
/// Returns the output and the plan that made it.
///
/// # Errors
/// [`ModelError::Shape`] if an expert does not fit the input's width, [`ModelError::Routing`] if the router refuses the
/// logits (a NaN among them, or no expert in use).
pub fn moe_ffn<T: Tape<f32, Cpu>>(
    x: Rows<T>,
    experts: &[MoeExpert],
    mask: Option<&[bool]>,
    router: &AnyRouter,
    activation: Activation,
) -> Result<(Rows<T>, Arc<RoutingPlan>), ModelError> {
    let Some(first) = experts.first() else {
        return Err(ModelError::Config(
            "a mixture layer needs at least one expert".into(),
        ));
    };
    let &[hidden, dim] = first.fc1.0.shape() else {
        return Err(ModelError::shape(
            "expert fc1",
            &[0, 0],
            first.fc1.0.shape(),
        ));
    };
    let wanted: [&[usize]; 4] = [&[hidden, dim], &[hidden], &[dim, hidden], &[dim]];
    for (e, expert) in experts.iter().enumerate() {
        for (param, wanted) in expert.params().into_iter().zip(wanted) {
            if param.shape() != wanted {
                return Err(ModelError::shape(
                    format!("expert {e}"),
                    wanted,
                    param.shape(),
                ));
            }
        }
        if expert.gate.shape() != [dim] {
            return Err(ModelError::shape(
                format!("gate row of expert {e}"),
                &[dim],
                expert.gate.shape(),
            ));
        }
    }
    expect_width("input of a mixture layer", &x, dim)?;

    let (x, mut tape) = x.try_contiguous()?.split_tape();
    let n = x.shape().0;
    let input = read(&x);
    let gate: Vec<f32> = experts
        .iter()
        .flat_map(|e| e.gate.values())
        .copied()
        .collect();
    let offsets: Vec<f32> = experts.iter().map(|e| e.logit_offset).collect();
    let mut logits = Scratch::take(n * experts.len());
    linear::forward(
        &input,
        &gate,
        Some(&offsets),
        &mut logits,
        dim,
        experts.len(),
    );
    let mut plan = RoutingPlan::default();
    let mut router = router.clone();
    let view =
        ArrayView2::from_shape((n, experts.len()), &logits).expect("the buffer has this size");
    router.route(view, mask, &mut plan)?;
    let plan = Arc::new(plan);

    let shape = FfnShape {
        dim,
        hidden,
        activation,
    };
    let weights: Vec<ExpertWeights<'_>> = experts.iter().map(MoeExpert::weights).collect();
    let mut h = Scratch::take(plan.num_assignments() * hidden);
    let mut slope = T::OWNS_TAPE.then(|| Scratch::take(plan.num_assignments() * hidden));
    let mut y = vec![0.0; n * dim];
    kernel::forward(
        &input,
        &weights,
        grouped(&plan),
        shape,
        &mut h,
        slope.as_deref_mut(),
        &mut y,
    );
    let y = x.device().try_tensor_from_vec(y, (n, dim))?;

    if let Some(slope) = slope {
        let (x_ghost, y_ghost) = (x.ghost(), y.ghost());
        let held: Vec<Held> = experts
            .iter()
            .map(|e| Held {
                weights: e.params().map(Param::shared),
                handles: e.params().map(Param::handle),
                gate: e.gate.handle(),
            })
            .collect();
        let plan = Arc::clone(&plan);
        tape.add_backward_op(move |g| {
            let dy = take_gradient!(g, y_ghost);
            let mut dx = take_gradient!(g, x_ghost);
            let mut taken = Vec::with_capacity(held.len());
            for expert in &held {
                let [a, b, c, d] = &expert.handles;
                taken.push([a.take(g)?, b.take(g)?, c.take(g)?, d.take(g)?]);
            }
            let weights: Vec<ExpertWeights<'_>> = held
                .iter()
                .map(|e| {
                    let [w1, b1, w2, b2] = &e.weights;
                    ExpertWeights { w1, b1, w2, b2 }
                })
                .collect();
            let mut gradients: Vec<ExpertGradients<'_>> = taken
                .iter_mut()
                .map(|[w1, b1, w2, b2]| ExpertGradients { w1, b1, w2, b2 })
                .collect();
            let mut d_weights = Scratch::take(plan.num_assignments());
            let saved = (&*h, &*slope);
            let groups = grouped(&plan);
            kernel::backward(
                &input,
                &weights,
                groups,
                shape,
                saved,
                &dy,
                &mut dx,
                &mut gradients,
                &mut d_weights,
            );

            let experts = held.len();
            let mut d_logits = Scratch::zeros(n * experts);
            let mut view = ArrayViewMut2::from_shape((n, experts), &mut d_logits)
                .expect("the buffer has this size");
            router
                .backward(&plan, &d_weights, &mut view)
                // dfdx lets a backward operation fail only with its own errors.
                .map_err(|_| CpuError::WrongNumElements)?;
            linear::backward_input(&d_logits, &gate, &mut dx, dim, experts);
            let mut d_gate = Scratch::zeros(experts * dim);
            linear::backward_weight(&input, &d_logits, &mut d_gate, None, dim, experts);

            for ((expert, taken), d_row) in held.iter().zip(taken).zip(d_gate.chunks_exact(dim)) {
                for (handle, gradient) in expert.handles.iter().zip(taken) {
                    handle.put(g, gradient)?;
                }
                let mut row = expert.gate.take(g)?;
                crate::kernels::vector::add_assign(&mut row, d_row);
                expert.gate.put(g, row)?;
            }
            **g.get_or_alloc_mut(&x_ghost)? = dx;
            Ok(())
        });
    }
    Ok((y.put_tape(tape), plan))
}

use std::sync::Arc;

use dfdx::prelude::{Cpu, Tape};
use dfdx::tensor::CpuError;
use mass_routing::{AnyRouter, Router, RoutingPlan};
use ndarray::ArrayView2;

use super::gate::{Gated, add, set_thresholds};
use super::routing_loss::LossGradients;
use super::{Activations, Gate, Network, Route, RoutingLoss, Rows, apart, enter, expect_width};
use crate::error::{ModelError, into_dfdx};
use crate::gradients::CpuGradients;
use crate::kernels::activation::Activation;
use crate::kernels::gemm::Store;
use crate::kernels::moe_ffn::{
    self as kernel, ExpertGradients, ExpertWeights, FfnShape, Grouped, Hidden,
};
use crate::kernels::scratch::Scratch;
use crate::parallel::Ranks;
use crate::param::{Param, ParamHandle};

/// The parameters of one expert: a gate row and a network, and a fixed offset on its logit.
#[derive(Clone, Debug)]
pub struct MoeExpert {
    /// Row of the gate matrix: `[d]`, or as wide as the gate's projection.
    pub gate: Param,
    /// Added to the expert's logit; not trained. Zero but for experts that were bisected, or split with their mass preserved.
    pub logit_offset: f32,
    /// Learned threshold `[1]` of `mass_routing::TopAny` routing; other routers have none.
    pub threshold: Option<Param>,
    /// What it computes.
    pub network: Network,
}

impl MoeExpert {
    /// The same expert, to be split off this one: see [`Param::offspring`].
    pub fn offspring(&self) -> Self {
        Self {
            gate: self.gate.offspring(),
            logit_offset: self.logit_offset,
            threshold: self.threshold.as_ref().map(Param::offspring),
            network: self.network.offspring(),
        }
    }

    pub(crate) fn check_offset(&self, what: &str) -> Result<(), ModelError> {
        match self.logit_offset {
            o if o.is_finite() => Ok(()),
            o => Err(ModelError::NonFinite(format!(
                "the logit offset {o} of {what}"
            ))),
        }
    }

    /// Refuses a gate row of another width, and a threshold that is not one value.
    pub(crate) fn check_gate(&self, what: &str, width: usize) -> Result<(), ModelError> {
        let rows = [
            ("gate row", Some(&self.gate), width),
            ("threshold", self.threshold.as_ref(), 1),
        ];
        for (part, param, wanted) in rows {
            if let Some(param) = param.filter(|p| p.shape() != [wanted]) {
                let part = format!("{part} of {what}");
                return Err(ModelError::shape(part, &[wanted], param.shape()));
            }
        }
        Ok(())
    }
}

/// What the backward pass keeps of an expert.
pub(crate) struct Held {
    values: Vec<Arc<Vec<f32>>>,
    handles: Vec<ParamHandle>,
}

/// Gradients of an expert's matrices and biases, taken out to be added to.
pub(crate) struct TakenExpert {
    values: Vec<Vec<f32>>,
    store: Store,
}

impl Held {
    pub(crate) fn of(network: &Network) -> Self {
        Self {
            values: network.params().map(Param::shared).collect(),
            handles: network.params().map(Param::handle).collect(),
        }
    }

    pub(crate) fn weights(&self) -> ExpertWeights<'_> {
        let [w1, b1, w2, b2, up @ ..] = &self.values[..] else {
            unreachable!("an expert has two matrices and two biases");
        };
        ExpertWeights {
            w1,
            b1,
            w2,
            b2,
            up: match up {
                [w, b] => Some((w, b)),
                _ => None,
            },
        }
    }

    pub(crate) fn take(&self, g: &mut CpuGradients) -> Result<TakenExpert, CpuError> {
        let taken = self
            .handles
            .iter()
            .map(|handle| handle.take_stored(g))
            .collect::<Result<Vec<_>, _>>()?;
        // One rule for all of them: if any holds a gradient already, the others begin at zero.
        let store = if taken.iter().all(|t| t.store == Store::Replace) {
            Store::Replace
        } else {
            Store::Add
        };
        let values = taken.into_iter().map(|mut t| {
            if t.store != store {
                t.values.fill(0.0);
            }
            t.values
        });
        Ok(TakenExpert {
            values: values.collect(),
            store,
        })
    }

    /// The gradients of an expert without tokens: empty, so that nothing is computed for it.
    fn nothing(&self) -> TakenExpert {
        TakenExpert {
            values: vec![Vec::new(); self.handles.len()],
            store: Store::Add,
        }
    }

    pub(crate) fn put(&self, g: &mut CpuGradients, taken: TakenExpert) -> Result<(), CpuError> {
        for (handle, gradient) in self.handles.iter().zip(taken.values) {
            handle.put(g, gradient)?;
        }
        Ok(())
    }
}

impl TakenExpert {
    pub(crate) fn gradients(&mut self) -> ExpertGradients<'_> {
        let [w1, b1, w2, b2, up @ ..] = &mut self.values[..] else {
            unreachable!("an expert has two matrices and two biases");
        };
        ExpertGradients {
            w1,
            b1,
            w2,
            b2,
            up: match up {
                [w, b] => Some((w, b)),
                _ => None,
            },
            store: self.store,
        }
    }
}

pub(super) fn grouped(plan: &RoutingPlan) -> Grouped<'_> {
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
/// Logits `z = gate(x) + offset`, for a linear gate `x W_gᵀ + offset`; `router` turns them into assignments with weights w;
/// `y[t] = Σ_e w[t, e] (fc2_e act(fc1_e x[t] + b1_e) + b2_e)`. Gradients reach the experts, the gate rows and `x`, the
/// latter both through the experts and through the gate, where the gradients of the routing `losses` join. `mask`, if
/// given, says which experts are in use. The matrices and biases of an expert that no token is routed to get no gradient, not one
/// of zero ([`Param::find_gradient`]); its gate row gets one.
///
/// Returns the output and the plan that made it.
///
/// # Errors
/// [`ModelError::Shape`] if there is no row (a router of mass-routing takes a batch of no tokens, the kernels do not) or an expert
/// or the gate does not fit the input's width, [`ModelError::Config`] if there is no expert, some are gated and others not, one
/// lacks the threshold that top-any routing needs, or (with a tape) for a routing loss that the router or the gate has no room for,
/// [`ModelError::Routing`] if the router refuses the logits (a NaN among them, or no expert in use), or with a tape cannot run
/// backward, or a routing loss is undefined.
pub fn moe_ffn<T: Tape<f32, Cpu>>(
    x: Rows<T>,
    experts: &[MoeExpert],
    (gate, losses): (&Gate, &[RoutingLoss]),
    mask: Option<&[bool]>,
    router: &mut AnyRouter,
    activation: Activation,
) -> Result<(Rows<T>, Arc<RoutingPlan>), ModelError> {
    let route = |logits: ArrayView2<'_, f32>, plan: &mut RoutingPlan| {
        set_thresholds(router, experts)?;
        router.route(logits, mask, plan)?;
        Ok(router.clone())
    };
    let (x, mut pass) = enter(x)?;
    let how = (route, &Ranks::default(), &[][..]);
    let (y, plan) = run(&mut pass.0, x, experts, (gate, losses), activation, how)?;
    Ok((y.into_tensor(pass.0)?, plan))
}

/// The sizes of a layer, if they fit each other and the input.
pub(super) fn check(
    input: &(usize, usize),
    experts: &[MoeExpert],
    gate: &Gate,
    activation: Activation,
) -> Result<FfnShape, ModelError> {
    let Some(first) = experts.first() else {
        return Err(ModelError::Config(
            "a mixture layer needs at least one expert".into(),
        ));
    };
    let (hidden, dim) = first.network.check("expert 0", None)?;
    let factor = first.network.up.is_some();
    let width = gate.width(dim)?;
    for (e, expert) in experts.iter().enumerate() {
        let name = format!("expert {e}");
        expert.network.check(&name, Some((hidden, dim)))?;
        if expert.network.up.is_some() != factor {
            let what = format!("{name} is gated or not, unlike expert 0");
            return Err(ModelError::Config(what));
        }
        expert.check_gate(&name, width)?;
    }
    expect_width("input of a mixture layer", input, dim)?;
    Ok(FfnShape {
        dim,
        hidden,
        activation,
        gated: factor,
    })
}

/// Takes out the gradients of experts that have tokens. One without takes no part: what others have added to its gradients stays,
/// and if nobody has, it has none.
pub(super) fn take_all(
    held: &[Held],
    has_tokens: impl Fn(usize) -> bool,
    g: &mut CpuGradients,
) -> Result<Vec<TakenExpert>, CpuError> {
    let experts = held.iter().enumerate();
    experts
        .map(|(e, expert)| match has_tokens(e) {
            false => Ok(expert.nothing()),
            true => expert.take(g),
        })
        .collect()
}

/// Puts back what [`take_all`] took.
pub(super) fn put_all(
    held: &[Held],
    has_tokens: impl Fn(usize) -> bool,
    taken: Vec<TakenExpert>,
    g: &mut CpuGradients,
) -> Result<(), CpuError> {
    for (e, (expert, taken)) in held.iter().zip(taken).enumerate() {
        if has_tokens(e) {
            expert.put(g, taken)?;
        }
    }
    Ok(())
}

/// The gradients of a gate from those of the routing weights; what reaches the input is added to `dx`, which is then its gradient.
pub(super) fn route_back(
    (gated, losses, router): (&Gated, &LossGradients, &AnyRouter),
    plan: &RoutingPlan,
    (x, d_weights): (&Activations, &[f32]),
    mut dx: Vec<f32>,
    g: &mut CpuGradients,
) -> Result<(), CpuError> {
    gated
        .backward(
            router,
            plan,
            losses,
            (x, d_weights),
            &mut dx,
            &mut |handle, share| Ok(add(handle, share, g)?),
        )
        .map_err(into_dfdx)?;
    x.put_gradient(g, dx)
}

/// [`moe_ffn`] with a router that is in hand only while `route` makes a plan; it returns the router as it was then.
pub(super) fn run<T: Tape<f32, Cpu>>(
    tape: &mut T,
    x: Activations,
    experts: &[MoeExpert],
    (gate, losses): (&Gate, &[RoutingLoss]),
    activation: Activation,
    (route, ranks, owners): (impl Route, &Ranks, &[usize]),
) -> Result<(Activations, Arc<RoutingPlan>), ModelError> {
    let shape = check(x.shape(), experts, gate, activation)?;
    let (n, dim) = *x.shape();
    let gated = gate.logits(&x, experts, (n, dim))?;
    let mut plan = RoutingPlan::default();
    let view = ArrayView2::from_shape((n, experts.len()), &gated.logits)
        .expect("the buffer has this size");
    let router = route(view, &mut plan)?;
    // What the backward pass cannot do is said now, in the router's or the loss's own words.
    let losses = if T::OWNS_TAPE {
        router.check_backward(&plan)?;
        LossGradients::of(losses, &router, &plan, (&gated, ranks))?
    } else {
        LossGradients::default()
    };
    let plan = Arc::new(plan);
    if !owners.is_empty() {
        let (gate, held) = ((gated, losses, router), (ranks, owners));
        let y = apart::run(tape, x, experts, gate, Arc::clone(&plan), shape, held)?;
        return Ok((y, plan));
    }

    let weights = experts.iter().map(|e| e.network.weights());
    let weights = weights.collect::<Result<Vec<ExpertWeights<'_>>, _>>()?;
    let mut hidden = T::OWNS_TAPE.then(|| Hidden::take(shape, plan.num_assignments()));
    let mut y = Scratch::take(n * dim);
    kernel::forward(&x, &weights, grouped(&plan), shape, hidden.as_mut(), &mut y);

    let held: Vec<Held> = experts.iter().map(|e| Held::of(&e.network)).collect();
    let kept = Arc::clone(&plan);
    let y = Activations::output(tape, y, (n, dim), move |g, dy| {
        let (Some(mut hidden), plan) = (hidden, kept) else {
            return Ok(());
        };
        let mut taken = take_all(&held, |e| plan.load(e) > 0, g)?;
        let weights: Vec<ExpertWeights<'_>> = held.iter().map(Held::weights).collect();
        let mut gradients: Vec<_> = taken.iter_mut().map(TakenExpert::gradients).collect();
        let mut d_weights = Scratch::take(plan.num_assignments());
        let mut dx = x.take_gradient(g)?;
        kernel::backward(
            &x,
            &weights,
            grouped(&plan),
            shape,
            &mut hidden,
            dy,
            (&mut dx.values, dx.store),
            &mut gradients,
            &mut d_weights,
        );

        put_all(&held, |e| plan.load(e) > 0, taken, g)?;
        let gate = (&gated, &losses, &router);
        route_back(gate, &plan, (&x, &d_weights), dx.values, g)
    })?;
    Ok((y, plan))
}

//! Feed-forward networks: a dense one, and a mixture of them.

use std::sync::Arc;

use mass_cuda::kernels::moe_ffn::{
    self as kernel, ExpertGradients, ExpertWeights, FfnShape, Grouped, Hidden,
};
use mass_cuda::kernels::{Store, linear, routing};
use mass_cuda::{Buffer, CudaError, Device};
use mass_routing::{AnyRouter, Combine, PlanParts, Router, RoutingPlan, TopAny, TopK, TopP};
use ndarray::ArrayView2;

use super::{Cuda, CudaGradients, CudaRows, Sweep};
use crate::error::ModelError;
use crate::kernels::activation::Activation;
use crate::kernels::moe_ffn as host;
use crate::kernels::scratch::Scratch;
use crate::ops::feed_forward::Everyone;
use crate::ops::gate::Gated;
use crate::ops::routing_loss::LossGradients;
use crate::ops::{
    Ahead, Gate, MoeExpert, Network, Pass, Route, Routing, RoutingLoss, expect_width, moe,
};
use crate::param::{Param, ParamHandle};

/// A network's matrices and biases on the device, and where their gradients are.
struct Held {
    values: Vec<Arc<Buffer<f32>>>,
    handles: Vec<ParamHandle>,
}

impl Held {
    fn of(network: &Network, device: &Device) -> Result<Self, ModelError> {
        let values = network.params().map(|p| p.mirror().on(device));
        Ok(Self {
            values: values.collect::<Result<_, _>>()?,
            handles: network.params().map(|p| p.handle()).collect(),
        })
    }

    fn weights(&self) -> ExpertWeights<'_> {
        let view = |i: usize| self.values[i].view();
        ExpertWeights {
            w1: view(0),
            b1: view(1),
            w2: view(2),
            b2: view(3),
            up: (self.values.len() > 4).then(|| (view(4), view(5))),
        }
    }

    /// Takes the gradients out. One rule for all of them: if any is there already, the others begin at zero.
    fn take(&self, gradients: &mut CudaGradients) -> Result<Taken, ModelError> {
        let taken = self.handles.iter().map(|h| gradients.take_to_add(h));
        let mut taken = taken.collect::<Result<Vec<_>, _>>()?;
        let store = match taken.iter().all(|(_, store)| *store == Store::Replace) {
            true => Store::Replace,
            false => Store::Add,
        };
        for (values, own) in &mut taken {
            if *own != store {
                values.view_mut().clear()?;
            }
        }
        let values = taken.into_iter().map(|(values, _)| values).collect();
        Ok(Taken { values, store })
    }

    fn put(&self, gradients: &mut CudaGradients, taken: Taken) {
        for (handle, values) in self.handles.iter().zip(taken.values) {
            gradients.put(handle, values);
        }
    }
}

/// Gradients of a network, taken out to be written or added to.
struct Taken {
    values: Vec<Buffer<f32>>,
    store: Store,
}

impl Taken {
    fn gradients(&mut self) -> Option<ExpertGradients<'_>> {
        let mut views = self.values.iter_mut().map(Buffer::view_mut);
        Some(ExpertGradients {
            w1: views.next()?,
            b1: views.next()?,
            w2: views.next()?,
            b2: views.next()?,
            up: views.next().zip(views.next()),
            store: self.store,
        })
    }
}

/// Who computes what, on the device.
struct Assigned {
    expert_offsets: Vec<u32>,
    offsets: Buffer<u32>,
    tokens: Buffer<u32>,
    weights: Buffer<f32>,
    token_offsets: Buffer<u32>,
    token_assignments: Buffer<u32>,
}

impl Assigned {
    fn new(device: &Device, plan: host::Grouped<'_>) -> Result<Self, CudaError> {
        Ok(Self {
            expert_offsets: plan.expert_offsets.to_vec(),
            offsets: Buffer::from_slice(device, plan.expert_offsets)?,
            tokens: Buffer::from_slice(device, plan.tokens)?,
            weights: Buffer::from_slice(device, plan.weights)?,
            token_offsets: Buffer::from_slice(device, plan.token_offsets)?,
            token_assignments: Buffer::from_slice(device, plan.token_assignments)?,
        })
    }

    fn grouped(&self) -> Grouped<'_> {
        Grouped {
            expert_offsets: &self.expert_offsets,
            expert_offsets_on_device: self.offsets.view(),
            tokens: self.tokens.view(),
            weights: self.weights.view(),
            token_offsets: self.token_offsets.view(),
            token_assignments: self.token_assignments.view(),
        }
    }
}

/// Assignments that the host made, or the device itself.
enum Assignments {
    Given(Assigned),
    Routed(Arc<routing::Plan>),
}

impl Assignments {
    fn grouped(&self) -> Grouped<'_> {
        match self {
            Self::Given(plan) => plan.grouped(),
            Self::Routed(plan) => plan.grouped(),
        }
    }
}

/// Networks, what is assigned to them, and what the backward pass needs.
struct Experts {
    held: Vec<Held>,
    plan: Assignments,
    shape: FfnShape,
    hidden: Option<Hidden>,
}

impl Experts {
    /// Computes the output.
    fn forward<'n>(
        pass: &Cuda,
        x: &CudaRows,
        networks: impl Iterator<Item = &'n Network>,
        plan: Assignments,
        shape: host::FfnShape,
    ) -> Result<(Buffer<f32>, Self), ModelError> {
        let device = &pass.device;
        let held: Vec<Held> = networks
            .map(|network| Held::of(network, device))
            .collect::<Result<_, _>>()?;
        let shape = FfnShape {
            dim: shape.dim,
            hidden: shape.hidden,
            activation: shape.activation.into(),
            gated: shape.gated,
        };
        let assignments = plan.grouped().tokens.len();
        let hidden = pass
            .tape
            .as_ref()
            .map(|_| Hidden::new(device, shape, assignments));
        let mut hidden = hidden.transpose()?;
        let mut y = pass.room(x.values.len())?;
        let weights: Vec<_> = held.iter().map(Held::weights).collect();
        kernel::forward(
            device,
            x.view(),
            &weights,
            plan.grouped(),
            shape,
            hidden.as_mut(),
            y.view_mut(),
        )?;
        let experts = Self {
            held,
            plan,
            shape,
            hidden,
        };
        Ok((y, experts))
    }

    /// Writes or adds the gradients of the input and of the networks; returns those of the weights of the assignments. A network
    /// without rows takes no part: what others have added to its gradients stays, and if nobody has, it has none.
    fn backward(
        mut self,
        sweep: &mut Sweep,
        x: &CudaRows,
        dy: &Buffer<f32>,
        dx: (&mut Buffer<f32>, Store),
    ) -> Result<Buffer<f32>, ModelError> {
        let device = sweep.device();
        let plan = self.plan.grouped();
        let mut d_weights = Buffer::uninitialised(&device, plan.tokens.len())?;
        let Some(hidden) = &mut self.hidden else {
            return Ok(d_weights);
        };
        let used = |e: usize| plan.expert_offsets[e] < plan.expert_offsets[e + 1];
        let mut taken = Vec::with_capacity(self.held.len());
        for (e, expert) in self.held.iter().enumerate() {
            let own = used(e).then(|| expert.take(&mut sweep.params));
            taken.push(own.transpose()?);
        }
        let weights: Vec<_> = self.held.iter().map(Held::weights).collect();
        let mut gradients: Vec<_> = taken
            .iter_mut()
            .map(|taken| taken.as_mut().and_then(Taken::gradients))
            .collect();
        kernel::backward(
            &device,
            x.view(),
            &weights,
            plan,
            self.shape,
            hidden,
            dy.view(),
            (dx.0.view_mut(), dx.1),
            &mut gradients,
            d_weights.view_mut(),
        )?;
        for (expert, taken) in self.held.iter().zip(taken) {
            if let Some(taken) = taken {
                expert.put(&mut sweep.params, taken);
            }
        }
        Ok(d_weights)
    }
}

impl Cuda {
    /// The mixture with one expert that everyone is sent to.
    pub(super) fn dense(
        &mut self,
        x: CudaRows,
        network: &Network,
        activation: Activation,
    ) -> Result<CudaRows, ModelError> {
        let (hidden, dim) = network.check("feed-forward network", None)?;
        expect_width("input of a feed-forward network", &x.shape, dim)?;
        let everyone = Everyone::new(x.shape.0)?;
        let shape = host::FfnShape {
            dim,
            hidden,
            activation,
            gated: network.up.is_some(),
        };
        let networks = std::iter::once(network);
        let plan = Assignments::Given(Assigned::new(&self.device, everyone.grouped())?);
        let (y, experts) = Experts::forward(self, &x, networks, plan, shape)?;
        Ok(self.output(y, x.shape, move |sweep, dy| {
            let (mut dx, store) = sweep.take(&x)?;
            experts.backward(sweep, &x, &dy, (&mut dx, store))?;
            sweep.put(&x, dx);
            Ok(())
        }))
    }

    /// The mixture layer. Behind a linear gate, and without losses on the routing, the device routes by top-p, top-k and top-any
    /// itself. Else the host does: the logits come down, the plan goes up. Gates other than linear ones are computed on the host,
    /// of rows that come down too.
    pub(super) fn mixture(
        &mut self,
        x: CudaRows,
        experts: &[MoeExpert],
        (gate, losses): (&Gate, &[RoutingLoss]),
        activation: Activation,
        routing: Routing<'_, impl Ahead, impl Route>,
    ) -> Result<(CudaRows, Arc<RoutingPlan>), ModelError> {
        let shape = moe::check(&x.shape, experts, gate, activation)?;
        let linear = match gate {
            Gate::Linear => Some(self.linear_gate(&x, experts)?),
            _ => None,
        };
        if let (Some((logits, _)), []) = (&linear, losses) {
            let router = (routing.ahead)()?;
            if let Some(routed) = self.route(logits, x.shape.0, routing.mask, &router)? {
                if self.trains() {
                    router.check_backward(&routed.host)?;
                }
                let rows = linear.map(|(_, rows)| rows);
                return self.routed(x, experts, shape, rows, routed);
            }
        }
        let (gated, rows) = match linear {
            Some((logits, rows)) => {
                let mut on_host = Scratch::take(logits.len());
                logits.view().download(&mut on_host)?;
                let read = losses.iter().any(RoutingLoss::reads_rows);
                let rows_on_host = if read { rows.to_vec()? } else { Vec::new() };
                (Gated::linear(on_host, rows_on_host, experts), Some(rows))
            }
            None => (gate.logits(&x.values.to_vec()?, experts, x.shape)?, None),
        };
        let mut plan = RoutingPlan::default();
        let view = ArrayView2::from_shape((x.shape.0, experts.len()), &gated.logits)
            .map_err(crate::ops::gate::internal)?;
        let router = (routing.route)(view, &mut plan)?;
        let losses = match &self.tape {
            Some(_) => {
                router.check_backward(&plan)?;
                LossGradients::of(losses, &router, &plan, (&gated, routing.ranks))?
            }
            None => LossGradients::default(),
        };
        let plan = Arc::new(plan);
        let networks = experts.iter().map(|e| &e.network);
        let given = Assignments::Given(Assigned::new(&self.device, moe::grouped(&plan))?);
        let (y, experts) = Experts::forward(self, &x, networks, given, shape)?;
        let kept = Arc::clone(&plan);
        let y = self.output(y, x.shape, move |sweep, dy| {
            let (mut dx, store) = sweep.take(&x)?;
            let d_weights = experts.backward(sweep, &x, &dy, (&mut dx, store))?;
            let d_weights = d_weights.to_vec()?;
            let params = &mut sweep.params;
            match rows {
                Some(rows) => {
                    let add = &mut |h: &ParamHandle, share: &[f32]| params.add_values(h, share);
                    let d = gated.backward_to_logits(&router, &kept, &losses, &d_weights, add)?;
                    let d = Buffer::from_slice(&params.device, &d)?;
                    let of_losses = &losses.rows;
                    linear_backward(params, gated.handles(), of_losses, &x, &rows, &d, &mut dx)?;
                }
                None => {
                    let mut d = Scratch::zeros(x.values.len());
                    let given = (&x.values.to_vec()?[..], &d_weights[..]);
                    let add = &mut |h: &ParamHandle, share: &[f32]| params.add_values(h, share);
                    gated.backward(&router, &kept, &losses, given, &mut d, add)?;
                    let d = Buffer::from_slice(&params.device, &d)?;
                    let device = params.device.clone();
                    super::elementwise::add_into(&device, d.view(), dx.view_mut())?;
                }
            }
            sweep.put(&x, dx);
            Ok(())
        });
        Ok((y, plan))
    }

    /// The logits of a linear gate, and its rows, `[experts, d]`.
    fn linear_gate(
        &self,
        x: &CudaRows,
        experts: &[MoeExpert],
    ) -> Result<(Buffer<f32>, Buffer<f32>), ModelError> {
        let (n, dim) = x.shape;
        let mut rows = self.room(experts.len() * dim)?;
        for (e, expert) in experts.iter().enumerate() {
            let row = expert.gate.mirror().on(&self.device)?;
            let to = rows.view_mut().range(e * dim..(e + 1) * dim)?;
            to.copy_from(row.view())?;
        }
        let offsets: Vec<f32> = experts.iter().map(|e| e.logit_offset).collect();
        let offsets = Buffer::from_slice(&self.device, &offsets)?;
        let mut logits = self.room(n * experts.len())?;
        let (bias, sizes) = (Some(offsets.view()), (dim, experts.len()));
        linear::forward(
            &self.device,
            x.view(),
            rows.view(),
            bias,
            logits.view_mut(),
            sizes,
        )?;
        Ok((logits, rows))
    }

    /// Routes on the device, if it knows the router's rules. What cannot be routed is left to the host, whose error says more.
    fn route(
        &self,
        logits: &Buffer<f32>,
        tokens: usize,
        mask: Option<&[bool]>,
        router: &AnyRouter,
    ) -> Result<Option<Routed>, ModelError> {
        let device = &self.device;
        let renormalise = |combine| combine != Combine::Raw;
        // Settings beyond these are the host's affair.
        let (rules, bounds, combine) = match router {
            AnyRouter::TopP(r) if *r == TopP::new(r.p(), r.combine())? => {
                let (p, renormalise) = (r.p(), renormalise(r.combine()));
                (Rules::TopP { p, renormalise }, None, r.combine())
            }
            AnyRouter::TopK(r) if *r == TopK::new(r.k(), r.combine())? => {
                let (k, renormalise) = (r.k(), renormalise(r.combine()));
                (Rules::TopK { k, renormalise }, None, r.combine())
            }
            AnyRouter::TopAny(r) => {
                let mut plain = TopAny::new(r.thresholds().to_vec())?;
                plain.set_training(r.training());
                if *r != plain {
                    return Ok(None);
                }
                let bounds = Buffer::from_slice(device, &r.bounds())?;
                let training = r.training();
                (Rules::TopAny { training }, Some(bounds), Combine::Raw)
            }
            _ => return Ok(None),
        };
        let experts = logits.len() / tokens.max(1);
        let in_use = mask.map(|mask| {
            let words: Vec<u32> = mask.iter().map(|&used| u32::from(used)).collect();
            Buffer::from_slice(device, &words)
        });
        let in_use = in_use.transpose()?;
        let on_device = match (rules, &bounds) {
            (Rules::TopP { p, renormalise }, _) => routing::Router::TopP { p, renormalise },
            (Rules::TopK { k, renormalise }, _) => routing::Router::TopK { k, renormalise },
            (Rules::TopAny { training }, Some(bounds)) => {
                let bounds = bounds.view();
                routing::Router::TopAny { bounds, training }
            }
            (Rules::TopAny { .. }, None) => return Ok(None),
        };
        let in_use = in_use.as_ref().map(Buffer::view);
        let mut plan = match routing::route(device, logits.view(), experts, in_use, on_device) {
            Ok(plan) => plan,
            Err(
                CudaError::NonFiniteLogit { .. }
                | CudaError::AllExpertsMasked { .. }
                | CudaError::TooFewExperts { .. }
                | CudaError::Setting { .. }
                | CudaError::Length { .. }
                | CudaError::TooLarge { .. },
            ) => return Ok(None),
            Err(other) => return Err(other.into()),
        };
        if combine == Combine::StraightThrough {
            plan = plan.straight_through()?;
        }
        let parts = PlanParts {
            expert_offsets: plan.expert_offsets.clone(),
            tokens: plan.tokens.to_vec()?,
            weights: plan.weights.to_vec()?,
            scores: plan.scores.to_vec()?,
            in_use: mask.map(<[bool]>::to_vec),
        };
        Ok(Some(Routed {
            host: Arc::new(RoutingPlan::from_parts(tokens, parts, router)?),
            device: Arc::new(plan),
            bounds,
        }))
    }

    /// The mixture layer by a plan that the device has made.
    fn routed(
        &mut self,
        x: CudaRows,
        experts: &[MoeExpert],
        shape: host::FfnShape,
        rows: Option<Buffer<f32>>,
        routed: Routed,
    ) -> Result<(CudaRows, Arc<RoutingPlan>), ModelError> {
        let gates: Vec<ParamHandle> = experts.iter().map(|e| e.gate.handle()).collect();
        let thresholds = experts.iter().filter_map(|e| e.threshold.as_ref());
        let thresholds: Vec<ParamHandle> = thresholds.map(Param::handle).collect();
        let networks = experts.iter().map(|e| &e.network);
        let plan = Assignments::Routed(Arc::clone(&routed.device));
        let (y, experts) = Experts::forward(self, &x, networks, plan, shape)?;
        let (plan, bounds) = (routed.device, routed.bounds);
        let y = self.output(y, x.shape, move |sweep, dy| {
            let (mut dx, store) = sweep.take(&x)?;
            let d_weights = experts.backward(sweep, &x, &dy, (&mut dx, store))?;
            let params = &mut sweep.params;
            let device = params.device.clone();
            let mut d = Buffer::zeros(&device, plan.scores.len())?;
            routing::backward(&device, &plan, d_weights.view(), d.view_mut())?;
            if let Some(bounds) = &bounds {
                let mut shares = Buffer::zeros(&device, bounds.len())?;
                let (from, to) = (d_weights.view(), shares.view_mut());
                routing::backward_thresholds(&device, &plan, from, bounds.view(), to)?;
                for (e, handle) in thresholds.iter().enumerate() {
                    let own = shares.view().range(e..e + 1)?;
                    params.add(handle, |gradient, store| {
                        super::elementwise::masked(&device, None, own, gradient, store)
                    })?;
                }
            }
            if let Some(rows) = &rows {
                linear_backward(params, &gates, &[], &x, rows, &d, &mut dx)?;
            }
            sweep.put(&x, dx);
            Ok(())
        });
        Ok((y, routed.host))
    }
}

/// A router whose rules the device knows.
enum Rules {
    TopP { p: f32, renormalise: bool },
    TopK { k: usize, renormalise: bool },
    TopAny { training: bool },
}

/// A plan that the device has made, and the same on the host.
struct Routed {
    device: Arc<routing::Plan>,
    host: Arc<RoutingPlan>,
    /// What scores of top-any must pass.
    bounds: Option<Buffer<f32>>,
}

/// Takes the gradient by the logits to the rows of a linear gate, where those of losses on the rows join it, and adds it to `dx`.
fn linear_backward(
    params: &mut CudaGradients,
    handles: &[ParamHandle],
    of_losses: &[Vec<f32>],
    x: &CudaRows,
    rows: &Buffer<f32>,
    d_logits: &Buffer<f32>,
    dx: &mut Buffer<f32>,
) -> Result<(), ModelError> {
    let device = params.device.clone();
    let (_, dim) = x.shape;
    let sizes = (dim, rows.len() / dim);
    let (d, store) = (d_logits.view(), Store::Add);
    linear::backward_input(&device, d, rows.view(), dx.view_mut(), sizes, store)?;
    let mut d_rows = Buffer::uninitialised(&device, rows.len())?;
    let (to, store) = (d_rows.view_mut(), Store::Replace);
    linear::backward_weight(&device, x.view(), d, to, None, sizes, store)?;
    for share in of_losses {
        let share = Buffer::from_slice(&device, share)?;
        super::elementwise::add_into(&device, share.view(), d_rows.view_mut())?;
    }
    for (e, handle) in handles.iter().enumerate() {
        let own = d_rows.view().range(e * dim..(e + 1) * dim)?;
        params.add(handle, |gradient, store| {
            super::elementwise::masked(&device, None, own, gradient, store)
        })?;
    }
    Ok(())
}

//! Feed-forward networks: a dense one, and a mixture of them.

use std::sync::Arc;

use mass_cuda::kernels::moe_ffn::{
    self as kernel, ExpertGradients, ExpertWeights, FfnShape, Grouped, Hidden,
};
use mass_cuda::kernels::{Store, linear};
use mass_cuda::{Buffer, CudaError, Device};
use mass_routing::{AnyRouter, Router, RoutingPlan};
use ndarray::ArrayView2;

use super::{Cuda, CudaGradients, CudaRows, Sweep};
use crate::error::ModelError;
use crate::kernels::activation::Activation;
use crate::kernels::moe_ffn as host;
use crate::kernels::scratch::Scratch;
use crate::ops::feed_forward::Everyone;
use crate::ops::gate::Gated;
use crate::ops::routing_loss::LossGradients;
use crate::ops::{Gate, MoeExpert, Network, RoutingLoss, expect_width, moe};
use crate::param::ParamHandle;

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

/// Networks, what is assigned to them, and what the backward pass needs.
struct Experts {
    held: Vec<Held>,
    plan: Assigned,
    shape: FfnShape,
    hidden: Option<Hidden>,
}

impl Experts {
    /// Computes the output.
    fn forward<'n>(
        pass: &Cuda,
        x: &CudaRows,
        networks: impl Iterator<Item = &'n Network>,
        plan: host::Grouped<'_>,
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
        let assignments = plan.tokens.len();
        let plan = Assigned::new(device, plan)?;
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
        let mut d_weights = Buffer::uninitialised(&device, self.plan.tokens.len())?;
        let Some(hidden) = &mut self.hidden else {
            return Ok(d_weights);
        };
        let used = |e: usize| self.plan.expert_offsets[e] < self.plan.expert_offsets[e + 1];
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
            self.plan.grouped(),
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
        let (y, experts) = Experts::forward(self, &x, networks, everyone.grouped(), shape)?;
        Ok(self.output(y, x.shape, move |sweep, dy| {
            let (mut dx, store) = sweep.take(&x)?;
            experts.backward(sweep, &x, &dy, (&mut dx, store))?;
            sweep.put(&x, dx);
            Ok(())
        }))
    }

    /// The mixture layer. The host routes: the logits come down, the plan goes up. Gates other than linear ones are computed on
    /// the host, of rows that come down too.
    pub(super) fn mixture(
        &mut self,
        x: CudaRows,
        experts: &[MoeExpert],
        (gate, losses): (&Gate, &[RoutingLoss]),
        activation: Activation,
        route: impl FnOnce(ArrayView2<'_, f32>, &mut RoutingPlan) -> Result<AnyRouter, ModelError>,
    ) -> Result<(CudaRows, Arc<RoutingPlan>), ModelError> {
        let shape = moe::check(&x.shape, experts, gate, activation)?;
        let (gated, rows) = match gate {
            Gate::Linear => {
                let (gated, rows) = self.linear_gate(&x, experts, losses)?;
                (gated, Some(rows))
            }
            _ => (gate.logits(&x.values.to_vec()?, experts, x.shape)?, None),
        };
        let mut plan = RoutingPlan::default();
        let view = ArrayView2::from_shape((x.shape.0, experts.len()), &gated.logits)
            .map_err(crate::ops::gate::internal)?;
        let router = route(view, &mut plan)?;
        let losses = match &self.tape {
            Some(_) => {
                router.check_backward(&plan)?;
                LossGradients::of(losses, &router, &plan, &gated)?
            }
            None => LossGradients::default(),
        };
        let plan = Arc::new(plan);
        let networks = experts.iter().map(|e| &e.network);
        let (y, experts) = Experts::forward(self, &x, networks, moe::grouped(&plan), shape)?;
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
                    linear_backward(params, (&gated, &losses), &x, &rows, &d, &mut dx)?;
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
        losses: &[RoutingLoss],
    ) -> Result<(Gated, Buffer<f32>), ModelError> {
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
        let mut on_host = Scratch::take(logits.len());
        logits.view().download(&mut on_host)?;
        let read = losses.iter().any(RoutingLoss::reads_rows);
        let rows_on_host = if read { rows.to_vec()? } else { Vec::new() };
        Ok((Gated::linear(on_host, rows_on_host, experts), rows))
    }
}

/// Takes the gradient by the logits, which lies on the host, to the rows of a linear gate, and adds it to `dx`.
fn linear_backward(
    params: &mut CudaGradients,
    (gated, losses): (&Gated, &LossGradients),
    x: &CudaRows,
    rows: &Buffer<f32>,
    d_logits: &[f32],
    dx: &mut Buffer<f32>,
) -> Result<(), ModelError> {
    let device = params.device.clone();
    let d = Buffer::from_slice(&device, d_logits)?;
    let (_, dim) = x.shape;
    let sizes = (dim, rows.len() / dim);
    let store = Store::Add;
    linear::backward_input(&device, d.view(), rows.view(), dx.view_mut(), sizes, store)?;
    let mut d_rows = Buffer::uninitialised(&device, rows.len())?;
    let (to, store) = (d_rows.view_mut(), Store::Replace);
    linear::backward_weight(&device, x.view(), d.view(), to, None, sizes, store)?;
    for share in &losses.rows {
        let share = Buffer::from_slice(&device, share)?;
        super::elementwise::add_into(&device, share.view(), d_rows.view_mut())?;
    }
    for (e, handle) in gated.handles().iter().enumerate() {
        let own = d_rows.view().range(e * dim..(e + 1) * dim)?;
        params.add(handle, |gradient, store| {
            super::elementwise::masked(&device, None, own, gradient, store)
        })?;
    }
    Ok(())
}

//! Every function looks at all that it is given before it launches anything: each buffer in turn lies on another
//! device, or lacks a value.

use std::cell::Cell;

use mass_cuda::kernels::attention::{self, AttentionShape, Sequences};
use mass_cuda::kernels::cross_entropy::{self, Targets};
use mass_cuda::kernels::dots::{ColumnSum, column_sums, dots, sums_of_squares};
use mass_cuda::kernels::embedding::{self, Index};
use mass_cuda::kernels::gemm::{self, Epilogue, Job, Matrix, MatrixMut, Then};
use mass_cuda::kernels::moe_ffn::{
    self, ExpertGradients, ExpertWeights, FfnShape, Grouped, Hidden,
};
use mass_cuda::kernels::optimiser::{AdamWStep, Update, adamw};
use mass_cuda::kernels::patches::{self, Interpolation};
use mass_cuda::kernels::routing::{self, Plan, Router};
use mass_cuda::kernels::{
    Activation, Store, ceiling, elementwise, layer_norm, linear, rows, squared_error,
};
use mass_cuda::{Buffer, CudaError, Device};

use super::emulator::{Word, device, get};

/// What is wrong with one of the buffers.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    /// It lies on the same device, opened another time.
    Elsewhere,
    /// It lacks its last value.
    Short,
}

/// Hands out what a function is given, one of it with a fault.
struct Given<'a> {
    own: &'a Device,
    other: &'a Device,
    fault: Fault,
    at: usize,
    handed_out: Cell<usize>,
    launches: Cell<u64>,
}

type Outcome = Result<(), CudaError>;

impl Given<'_> {
    fn faulty(&self) -> bool {
        self.handed_out.set(self.handed_out.get() + 1);
        self.handed_out.get() == self.at + 1
    }

    fn buffer<T: mass_cuda::Value>(&self, values: &[T]) -> Buffer<T> {
        let (device, n) = match (self.faulty(), self.fault) {
            (true, Fault::Elsewhere) => (self.other, values.len()),
            (true, Fault::Short) => (self.own, values.len() - 1),
            (false, _) => (self.own, values.len()),
        };
        Buffer::from_slice(device, &values[..n]).unwrap()
    }

    fn zeros(&self, n: usize) -> Buffer<f32> {
        self.buffer(&vec![0.0; n])
    }

    /// The device of something that is made there and cannot be short.
    fn device(&self) -> &Device {
        match self.fault == Fault::Elsewhere && self.faulty() {
            true => self.other,
            false => self.own,
        }
    }

    /// From here on there must be no launch.
    fn ready(&self) {
        self.launches.set(get(Word::Launches));
    }
}

/// A call with each of its buffers elsewhere in turn.
fn refuses_elsewhere(what: &str, call: impl Fn(&Device, &Given<'_>) -> Outcome) {
    let (own, other) = (device(), Device::open(0).unwrap());
    refuses_fault(what, (&own, &other), Fault::Elsewhere, &call);
}

/// The same, and with each of them short in turn.
fn refuses(what: &str, call: impl Fn(&Device, &Given<'_>) -> Outcome) {
    let (own, other) = (device(), Device::open(0).unwrap());
    refuses_fault(what, (&own, &other), Fault::Elsewhere, &call);
    refuses_fault(what, (&own, &other), Fault::Short, &call);
}

fn refuses_fault(
    what: &str,
    (own, other): (&Device, &Device),
    fault: Fault,
    call: &impl Fn(&Device, &Given<'_>) -> Outcome,
) {
    for at in 0.. {
        let given = Given {
            own,
            other,
            fault,
            at,
            handed_out: Cell::new(0),
            launches: Cell::new(get(Word::Launches)),
        };
        let outcome = call(own, &given);
        if given.handed_out.get() <= at {
            assert!(at > 0 && outcome.is_ok(), "{what}: {outcome:?}");
            return;
        }
        let launched = get(Word::Launches) - given.launches.get();
        match (fault, outcome) {
            (Fault::Elsewhere, Err(CudaError::OtherDevice { what: name })) => {
                assert_ne!(name, "an argument of a kernel", "{what}: buffer {at}")
            }
            (Fault::Short, Err(CudaError::Length { .. })) => {}
            (_, other) => panic!("{what}: buffer {at} {fault:?}: {other:?}"),
        }
        assert_eq!(
            launched, 0,
            "{what}: launched before buffer {at} was seen, {fault:?}"
        );
    }
}

#[test]
fn emulated_values_one_by_one() {
    on_device!();
    refuses_elsewhere("fill", |d, g| {
        elementwise::fill(d, 1.0, g.zeros(3).view_mut())
    });
    refuses_elsewhere("scale", |d, g| {
        elementwise::scale(d, 1.0, g.zeros(3).view_mut())
    });
    refuses("add_scaled", |d, g| {
        elementwise::add_scaled(d, 1.0, g.zeros(3).view(), g.zeros(3).view_mut())
    });
    refuses("add_into", |d, g| {
        elementwise::add_into(d, g.zeros(3).view(), g.zeros(3).view_mut())
    });
    refuses("sum", |d, g| {
        let (a, x, mut y) = (g.zeros(3), g.zeros(3), g.zeros(3));
        elementwise::sum(d, a.view(), None, x.view(), y.view_mut())
    });
    refuses("masked", |d, g| {
        let (x, mut y) = (g.zeros(3), g.zeros(3));
        elementwise::masked(d, None, x.view(), y.view_mut(), Store::Add)
    });
    refuses("tanh_forward", |d, g| {
        elementwise::tanh_forward(d, g.zeros(3).view(), g.zeros(3).view_mut())
    });
    refuses("tanh_backward", |d, g| {
        let (y, dy, mut dx) = (g.zeros(3), g.zeros(3), g.zeros(3));
        elementwise::tanh_backward(d, y.view(), dy.view(), dx.view_mut(), Store::Add)
    });
    refuses("scale_columns", |d, g| {
        let (x, factor, mut y) = (g.zeros(10), g.zeros(5), g.zeros(10));
        elementwise::scale_columns(d, x.view(), factor.view(), y.view_mut(), Store::Add)
    });
    refuses("moving_average", |d, g| {
        elementwise::moving_average(d, 0.5, g.zeros(3).view(), g.zeros(3).view_mut())
    });
    refuses("running_mean", |d, g| {
        elementwise::running_mean(d, 0.5, g.zeros(3).view(), g.zeros(3).view_mut())
    });
    refuses("multiply_adds", |d, g| {
        ceiling::multiply_adds(d, 1, 0.5, g.zeros(256).view_mut())
    });
}

#[test]
fn emulated_rows_and_losses() {
    on_device!();
    refuses("layer_norm::forward", |d, g| {
        let (x, gamma, beta) = (g.zeros(15), g.zeros(5), g.zeros(5));
        let (mut y, mut stats) = (g.zeros(15), g.zeros(6));
        let (y, stats) = (y.view_mut(), stats.view_mut());
        layer_norm::forward(d, x.view(), gamma.view(), beta.view(), 1e-5, y, stats)
    });
    refuses("layer_norm::backward", |d, g| {
        let (x, gamma, stats, dy) = (g.zeros(15), g.zeros(5), g.zeros(6), g.zeros(15));
        let (mut dx, mut dgamma, mut dbeta) = (g.zeros(15), g.zeros(5), g.zeros(5));
        layer_norm::backward(
            d,
            x.view(),
            gamma.view(),
            stats.view(),
            dy.view(),
            (dx.view_mut(), Store::Add),
            dgamma.view_mut(),
            dbeta.view_mut(),
        )
    });
    refuses("embedding::forward", |d, g| {
        let table = g.zeros(8);
        let index = Index::new(g.device(), &[0, 3, 3], 4)?;
        let mut y = g.zeros(6);
        embedding::forward(d, table.view(), &index, y.view_mut(), Store::Add)
    });
    refuses("embedding::backward", |d, g| {
        let dy = g.zeros(6);
        let index = Index::new(g.device(), &[0, 3, 3], 4)?;
        let mut dtable = g.zeros(8);
        embedding::backward(d, dy.view(), &index, dtable.view_mut())
    });
    refuses("gather", |d, g| {
        let (x, picked, weights) = (g.zeros(6), g.buffer(&[1, 0, 1, 1]), g.zeros(4));
        let (weights, mut y) = (Some(weights.view()), g.zeros(12));
        rows::gather(d, x.view(), picked.view(), weights, y.view_mut(), 3)
    });
    refuses("patches::forward", |d, g| {
        let (embedded, class, positions) = (g.zeros(12), g.zeros(3), g.zeros(9));
        let taps = [vec![(0, 1.0)], vec![(1, 0.5), (0, 0.5)]];
        let grid = Interpolation::new(g.device(), &taps, 2)?;
        let (p, mut y) = (positions.view(), g.zeros(18));
        patches::forward(d, embedded.view(), class.view(), p, &grid, y.view_mut())
    });
    refuses("patches::backward", |d, g| {
        let dy = g.zeros(18);
        let taps = [vec![(0, 1.0)], vec![(1, 0.5), (0, 0.5)]];
        let grid = Interpolation::new(g.device(), &taps, 2)?;
        let (mut de, mut dc, mut dp) = (g.zeros(12), g.zeros(3), g.zeros(9));
        let to = (de.view_mut(), Store::Replace);
        patches::backward(d, dy.view(), &grid, to, dc.view_mut(), dp.view_mut())
    });
    refuses("squared_error::forward", |d, g| {
        let (x, t, mut r, mut s) = (g.zeros(3), g.zeros(3), g.zeros(3), g.zeros(3));
        squared_error::forward(d, x.view(), t.view(), r.view_mut(), s.view_mut())
    });
    refuses("squared_error::backward", |d, g| {
        let (r, mut dx) = (g.zeros(3), g.zeros(3));
        squared_error::backward(d, r.view(), 1.0, dx.view_mut(), Store::Add)
    });
    refuses("cross_entropy::forward", |d, g| {
        let logits = g.zeros(6);
        let targets = Targets::new(g.device(), &[0, 2], 3)?;
        let (mut probs, mut nll) = (g.zeros(6), g.zeros(2));
        let nll = nll.view_mut();
        cross_entropy::forward(d, logits.view(), &targets, probs.view_mut(), nll)
    });
    refuses("cross_entropy::backward", |d, g| {
        let probs = g.zeros(6);
        let targets = Targets::new(g.device(), &[0, 2], 3)?;
        let mut dlogits = g.zeros(6);
        let dlogits = dlogits.view_mut();
        cross_entropy::backward(d, probs.view(), &targets, 1.0, dlogits, Store::Add)
    });
    refuses_elsewhere("mean", |d, g| {
        cross_entropy::mean(d, g.zeros(6).view(), g.zeros(1).view_mut())
    });
}

#[test]
fn emulated_products_and_sums() {
    on_device!();
    refuses("dots", |d, g| {
        let (a, b, e, f) = (g.zeros(5), g.zeros(5), g.zeros(2), g.zeros(2));
        dots(d, &[(a.view(), b.view()), (e.view(), f.view())]).map(|_| ())
    });
    refuses_elsewhere("sums_of_squares", |d, g| {
        sums_of_squares(d, &[g.zeros(5).view(), g.zeros(2).view()]).map(|_| ())
    });
    refuses("column_sums", |d, g| {
        let (x, times, mut y) = (g.zeros(15), g.zeros(15), g.zeros(5));
        let (other, others) = (g.zeros(9), g.zeros(9));
        let job = |x, times, y| ColumnSum {
            x,
            times: Some(times),
            y,
            store: Store::Add,
        };
        let mut z = g.zeros(3);
        let jobs = vec![
            job(x.view(), times.view(), y.view_mut()),
            job(other.view(), others.view(), z.view_mut()),
        ];
        column_sums(d, jobs)
    });
    refuses("gemm, activated", |d, g| {
        let (a, b, picked) = (g.zeros(6), g.zeros(12), g.buffer(&[1_u32, 0, 1, 1, 0]));
        let (bias, weight) = (g.zeros(4), g.zeros(5));
        let (mut c, mut slopes) = (g.zeros(20), g.zeros(20));
        let (a, b) = (Matrix::new(a.view(), 2, 3)?, Matrix::new(b.view(), 3, 4)?);
        let mut job = Job::new(a, b, MatrixMut::new(c.view_mut(), 5, 4)?);
        job.rows = Some(picked.view());
        job.epilogue = Epilogue {
            bias: Some(bias.view()),
            row_weight: Some(weight.view()),
            then: Then::Activate(Activation::Silu, Some(slopes.view_mut())),
        };
        gemm::run(d, &[job])
    });
    refuses("gemm, gated, second of two", |d, g| {
        let there = Buffer::<f32>::zeros(d, 1)?;
        let mut to = Buffer::<f32>::zeros(d, 1)?;
        let one = Matrix::new(there.view(), 1, 1)?;
        let first = Job::new(one, one, MatrixMut::new(to.view_mut(), 1, 1)?);
        let (a, b) = (g.zeros(6), g.zeros(12));
        let (mut c, mut slopes, mut factors) = (g.zeros(8), g.zeros(8), g.zeros(8));
        let (a, b) = (Matrix::new(a.view(), 2, 3)?, Matrix::new(b.view(), 3, 4)?);
        let mut job = Job::new(a, b, MatrixMut::new(c.view_mut(), 2, 4)?);
        job.epilogue.then = Then::Gate(Some((slopes.view_mut(), factors.view_mut())));
        gemm::run(d, &[first, job])
    });
    refuses("linear::forward", |d, g| {
        let (x, w, b, mut y) = (g.zeros(6), g.zeros(12), g.zeros(4), g.zeros(8));
        linear::forward(d, x.view(), w.view(), Some(b.view()), y.view_mut(), (3, 4))
    });
    refuses("linear::backward_input", |d, g| {
        let (dy, w, mut dx) = (g.zeros(8), g.zeros(12), g.zeros(6));
        linear::backward_input(d, dy.view(), w.view(), dx.view_mut(), (3, 4), Store::Add)
    });
    refuses("linear::backward_weight", |d, g| {
        let (x, dy, mut dw, mut db) = (g.zeros(6), g.zeros(8), g.zeros(12), g.zeros(4));
        let (dw, db) = (dw.view_mut(), Some(db.view_mut()));
        linear::backward_weight(d, x.view(), dy.view(), dw, db, (3, 4), Store::Add)
    });
    let step = AdamWStep {
        lr: 0.1,
        beta1: 0.9,
        beta2: 0.99,
        take1: 0.1,
        take2: 0.01,
        eps: 1e-8,
        weight_decay: 0.0,
        bias1: 0.1,
        bias2: 0.01,
        gradient_scale: 1.0,
    };
    refuses("adamw", |d, g| {
        let mut all = [2, 3].map(|n| (g.zeros(n), g.zeros(n), g.zeros(n), g.zeros(n)));
        let mut updates: Vec<_> = all
            .iter_mut()
            .map(|(theta, gradient, m, v)| Update {
                theta: theta.view_mut(),
                gradient: gradient.view(),
                first: m.view_mut(),
                second: v.view_mut(),
                step,
            })
            .collect();
        adamw(d, &mut updates)
    });
}

#[test]
fn emulated_attention() {
    on_device!();
    let keys = [true, false, true];
    let shape = AttentionShape {
        heads: 2,
        dim: 4,
        causal: true,
        dropout: None,
    };
    refuses("attention::forward", |d, g| {
        let qkv = g.zeros(36);
        let sequences = Sequences::new(g.device(), &[0, 3], Some(&keys))?;
        let (mut y, mut kept) = (g.zeros(12), g.zeros(12));
        let (y, kept) = (y.view_mut(), kept.view_mut());
        attention::forward(d, qkv.view(), &sequences, shape, y, kept)
    });
    refuses("attention::backward", |d, g| {
        let qkv = g.zeros(36);
        let sequences = Sequences::new(g.device(), &[0, 3], Some(&keys))?;
        let (y, kept, dy, mut dqkv) = (g.zeros(12), g.zeros(12), g.zeros(12), g.zeros(36));
        attention::backward(
            d,
            qkv.view(),
            &sequences,
            shape,
            y.view(),
            kept.view(),
            dy.view(),
            (dqkv.view_mut(), Store::Replace),
        )
    });
}

#[test]
fn emulated_routing() {
    on_device!();
    refuses("route, top-p", |d, g| {
        let (logits, in_use) = (g.zeros(6), g.buffer(&[1_u32, 0, 1]));
        let router = Router::TopP {
            p: 0.5,
            renormalise: true,
        };
        routing::route(d, logits.view(), 3, Some(in_use.view()), router).map(|_| ())
    });
    refuses("route, top-any", |d, g| {
        let (logits, bounds) = (g.zeros(6), g.zeros(3));
        let router = Router::TopAny {
            bounds: bounds.view(),
            training: false,
        };
        routing::route(d, logits.view(), 3, None, router).map(|_| ())
    });
    // Whatever has become of the arrays of a plan, which are open to everybody.
    let plan = |d: &Device, g: &Given<'_>| -> Result<Plan, CudaError> {
        let logits = Buffer::from_slice(d, &[1.0, 2.0, -1.0, 0.5, -2.0, 3.0])?;
        let bounds = Buffer::from_slice(d, &[0.1; 3])?;
        let router = Router::TopAny {
            bounds: bounds.view(),
            training: false,
        };
        let mut plan = routing::route(d, logits.view(), 3, None, router)?;
        let again = |b: &Buffer<u32>| b.to_vec().map(|v| g.buffer(&v));
        plan.expert_offsets_on_device = g.buffer(&plan.expert_offsets);
        plan.tokens = again(&plan.tokens)?;
        plan.token_offsets = again(&plan.token_offsets)?;
        plan.token_assignments = again(&plan.token_assignments)?;
        plan.token_experts = again(&plan.token_experts)?;
        plan.weights = g.buffer(&plan.weights.to_vec()?);
        plan.scores = g.buffer(&plan.scores.to_vec()?);
        Ok(plan)
    };
    refuses("routing::backward", |d, g| {
        let plan = plan(d, g)?;
        let weights = plan.token_assignments.len().max(plan.tokens.len());
        let (dw, mut dlogits) = (g.zeros(weights), g.zeros(6));
        g.ready();
        routing::backward(d, &plan, dw.view(), dlogits.view_mut())
    });
    refuses("routing::backward_thresholds", |d, g| {
        let plan = plan(d, g)?;
        let weights = plan.token_assignments.len().max(plan.tokens.len());
        let (dw, bounds, mut dt) = (g.zeros(weights), g.zeros(3), g.zeros(3));
        g.ready();
        routing::backward_thresholds(d, &plan, dw.view(), bounds.view(), dt.view_mut())
    });
}

/// A mixture of two experts, three tokens and four assignments, for a call of `moe_ffn`.
fn mixture(
    g: &Given<'_>,
    gated: bool,
    call: impl Fn(&[ExpertWeights<'_>], Grouped<'_>, FfnShape, &mut Hidden) -> Outcome,
) -> Outcome {
    let shape = FfnShape {
        dim: 2,
        hidden: 3,
        activation: Activation::Silu,
        gated,
    };
    let mut kept = Hidden::new(g.device(), shape, 4)?;
    let offsets = g.buffer(&[0_u32, 2, 4]);
    let (tokens, weights) = (g.buffer(&[0_u32, 1, 0, 2]), g.zeros(4));
    let (token_offsets, token_assignments) =
        (g.buffer(&[0_u32, 2, 3, 4]), g.buffer(&[0_u32, 2, 1, 3]));
    let plan = Grouped {
        expert_offsets: &[0, 2, 4],
        expert_offsets_on_device: offsets.view(),
        tokens: tokens.view(),
        weights: weights.view(),
        token_offsets: token_offsets.view(),
        token_assignments: token_assignments.view(),
    };
    let experts = [(); 2].map(|()| {
        let up = gated.then(|| (g.zeros(6), g.zeros(3)));
        (g.zeros(6), g.zeros(3), g.zeros(6), g.zeros(2), up)
    });
    let experts: Vec<_> = experts
        .iter()
        .map(|(w1, b1, w2, b2, up)| ExpertWeights {
            w1: w1.view(),
            b1: b1.view(),
            w2: w2.view(),
            b2: b2.view(),
            up: up.as_ref().map(|(w, b)| (w.view(), b.view())),
        })
        .collect();
    call(&experts, plan, shape, &mut kept)
}

#[test]
fn emulated_mixtures() {
    on_device!();
    for gated in [false, true] {
        refuses("moe_ffn::forward", |d, g| {
            mixture(g, gated, |experts, plan, shape, kept| {
                let (x, mut y) = (g.zeros(6), g.zeros(6));
                moe_ffn::forward(d, x.view(), experts, plan, shape, Some(kept), y.view_mut())
            })
        });
        refuses("moe_ffn::backward", |d, g| {
            mixture(g, gated, |experts, plan, shape, kept| {
                let (x, dy, mut dx, mut dw) = (g.zeros(6), g.zeros(6), g.zeros(6), g.zeros(4));
                let mut to = [(); 2].map(|()| {
                    let up = gated.then(|| (g.zeros(6), g.zeros(3)));
                    (g.zeros(6), g.zeros(3), g.zeros(6), g.zeros(2), up)
                });
                let mut gradients: Vec<_> = to
                    .iter_mut()
                    .map(|(w1, b1, w2, b2, up)| {
                        Some(ExpertGradients {
                            w1: w1.view_mut(),
                            b1: b1.view_mut(),
                            w2: w2.view_mut(),
                            b2: b2.view_mut(),
                            up: up.as_mut().map(|(w, b)| (w.view_mut(), b.view_mut())),
                            store: Store::Add,
                        })
                    })
                    .collect();
                moe_ffn::backward(
                    d,
                    x.view(),
                    experts,
                    plan,
                    shape,
                    kept,
                    dy.view(),
                    (dx.view_mut(), Store::Replace),
                    &mut gradients,
                    dw.view_mut(),
                )
            })
        });
    }
}

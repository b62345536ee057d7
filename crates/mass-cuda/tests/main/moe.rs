use mass_cuda::kernels::moe_ffn::{
    ExpertGradients, ExpertWeights, FfnShape, Grouped, Hidden, backward, forward,
};
use mass_cuda::kernels::{Activation, Store};
use mass_cuda::{Buffer, CudaError, Device};

use super::emulator::{Word, close, device, every_schedule, get, set, values, wide};

/// A plan on the host.
struct Plan {
    expert_offsets: Vec<u32>,
    tokens: Vec<u32>,
    weights: Vec<f32>,
    token_offsets: Vec<u32>,
    token_assignments: Vec<u32>,
}

impl Plan {
    /// Token t goes to expert e where `chosen` says so.
    fn new(n: usize, experts: usize, chosen: impl Fn(usize, usize) -> bool) -> Self {
        let (mut expert_offsets, mut tokens, mut of_token) =
            (vec![0], Vec::new(), vec![Vec::new(); n]);
        for e in 0..experts {
            for t in (0..n).filter(|&t| chosen(t, e)) {
                of_token[t].push(tokens.len() as u32);
                tokens.push(t as u32);
            }
            expert_offsets.push(tokens.len() as u32);
        }
        let mut token_offsets = vec![0];
        of_token.iter().for_each(|list| {
            token_offsets.push(token_offsets[token_offsets.len() - 1] + list.len() as u32)
        });
        let weights = values(tokens.len(), 77)
            .iter()
            .map(|w| 0.6 + 0.4 * w)
            .collect();
        Self {
            expert_offsets,
            tokens,
            weights,
            token_offsets,
            token_assignments: of_token.concat(),
        }
    }
}

/// An expert's six arrays; the last two only of a gated one.
fn expert(e: u32, shape: FfnShape) -> [Vec<f32>; 6] {
    let FfnShape { dim, hidden, .. } = shape;
    let scale = |v: Vec<f32>| v.into_iter().map(|x| 0.5 * x).collect();
    [
        hidden * dim,
        hidden,
        dim * hidden,
        dim,
        hidden * dim,
        hidden,
    ]
    .map(|n| scale(values(n, 100 + 10 * e + n as u32 % 7)))
}

fn activation(which: Activation, x: f64) -> (f64, f64) {
    let value = |x: f64| match which {
        Activation::Relu => x.max(0.0),
        Activation::GeluTanh => {
            0.5 * x
                * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x * x * x)).tanh())
        }
        _ => x / (1.0 + (-x).exp()),
    };
    let h = 1e-6;
    (value(x), (value(x + h) - value(x - h)) / (2.0 * h))
}

/// y, dx, d_weights, then the six gradients of each expert, by the definition.
fn reference(
    x: &[f64],
    dy: &[f64],
    experts: &[[Vec<f32>; 6]],
    plan: &Plan,
    shape: FfnShape,
) -> Vec<Vec<f64>> {
    let FfnShape {
        dim,
        hidden,
        activation: act,
        gated,
    } = shape;
    let (mut y, mut dx, mut dw) = (
        vec![0.0; x.len()],
        vec![0.0; x.len()],
        vec![0.0; plan.tokens.len()],
    );
    let mut gradients = Vec::new();
    for (e, expert) in experts.iter().enumerate() {
        let [w1, b1, w2, b2, w3, b3] = [0, 1, 2, 3, 4, 5].map(|i| wide(&expert[i]));
        let mut g = [0, 1, 2, 3, 4, 5].map(|i| vec![0.0; expert[i].len()]);
        let segment = plan.expert_offsets[e] as usize..plan.expert_offsets[e + 1] as usize;
        for (a, dw) in dw
            .iter_mut()
            .enumerate()
            .take(segment.end)
            .skip(segment.start)
        {
            let (t, w) = (plan.tokens[a] as usize, f64::from(plan.weights[a]));
            let (x, up) = (&x[t * dim..][..dim], &dy[t * dim..][..dim]);
            let line = |m: &[f64], b: &[f64], i: usize| {
                b[i] + (0..dim).map(|c| m[i * dim + c] * x[c]).sum::<f64>()
            };
            for i in 0..hidden {
                let (value, slope) = activation(act, line(&w1, &b1, i));
                let factor = if gated { line(&w3, &b3, i) } else { 1.0 };
                let h = value * factor;
                let dh: f64 = (0..dim).map(|c| up[c] * w2[c * hidden + i]).sum();
                *dw += dh * h;
                let (by_pre, by_factor) = (w * dh * slope * factor, w * dh * value);
                for c in 0..dim {
                    y[t * dim + c] += w * h * w2[c * hidden + i];
                    g[2][c * hidden + i] += w * up[c] * h;
                    g[0][i * dim + c] += by_pre * x[c];
                    dx[t * dim + c] += by_pre * w1[i * dim + c];
                    if gated {
                        g[4][i * dim + c] += by_factor * x[c];
                        dx[t * dim + c] += by_factor * w3[i * dim + c];
                    }
                }
                g[1][i] += by_pre;
                g[5][i] += if gated { by_factor } else { 0.0 };
            }
            for c in 0..dim {
                y[t * dim + c] += w * b2[c];
                g[3][c] += w * up[c];
                *dw += up[c] * b2[c];
            }
        }
        gradients.extend(g);
    }
    [vec![y, dx, dw], gradients].concat()
}

struct OnDevice {
    x: Buffer<f32>,
    dy: Buffer<f32>,
    experts: Vec<[Buffer<f32>; 6]>,
    offsets: Buffer<u32>,
    tokens: Buffer<u32>,
    weights: Buffer<f32>,
    token_offsets: Buffer<u32>,
    token_assignments: Buffer<u32>,
}

impl OnDevice {
    fn new(
        device: &Device,
        x: &[f32],
        dy: &[f32],
        experts: &[[Vec<f32>; 6]],
        plan: &Plan,
    ) -> Result<Self, CudaError> {
        let mut on_device = Vec::new();
        for e in experts {
            let b = |i: usize| Buffer::from_slice(device, &e[i]);
            on_device.push([b(0)?, b(1)?, b(2)?, b(3)?, b(4)?, b(5)?]);
        }
        Ok(Self {
            x: Buffer::from_slice(device, x)?,
            dy: Buffer::from_slice(device, dy)?,
            experts: on_device,
            offsets: Buffer::from_slice(device, &plan.expert_offsets)?,
            tokens: Buffer::from_slice(device, &plan.tokens)?,
            weights: Buffer::from_slice(device, &plan.weights)?,
            token_offsets: Buffer::from_slice(device, &plan.token_offsets)?,
            token_assignments: Buffer::from_slice(device, &plan.token_assignments)?,
        })
    }

    fn weights(&self, gated: bool) -> Vec<ExpertWeights<'_>> {
        self.experts
            .iter()
            .map(|[w1, b1, w2, b2, w3, b3]| ExpertWeights {
                w1: w1.view(),
                b1: b1.view(),
                w2: w2.view(),
                b2: b2.view(),
                up: gated.then(|| (w3.view(), b3.view())),
            })
            .collect()
    }

    fn plan<'a>(&'a self, plan: &'a Plan) -> Grouped<'a> {
        Grouped {
            expert_offsets: &plan.expert_offsets,
            expert_offsets_on_device: self.offsets.view(),
            tokens: self.tokens.view(),
            weights: self.weights.view(),
            token_offsets: self.token_offsets.view(),
            token_assignments: self.token_assignments.view(),
        }
    }
}

/// One pass there and back; results in the order of [`reference`].
fn pass(
    device: &Device,
    there: &OnDevice,
    plan: &Plan,
    shape: FfnShape,
    store: Store,
    before: f32,
) -> Result<Vec<Vec<f32>>, CudaError> {
    let (n, assigned) = (there.x.len(), plan.tokens.len());
    let experts = there.weights(shape.gated);
    let grouped = there.plan(plan);
    let mut kept = Hidden::new(device, shape, assigned)?;
    let mut y = Buffer::<f32>::uninitialised(device, n)?;
    forward(
        device,
        there.x.view(),
        &experts,
        grouped,
        shape,
        None,
        y.view_mut(),
    )?;
    let unkept = y.to_vec()?;
    forward(
        device,
        there.x.view(),
        &experts,
        grouped,
        shape,
        Some(&mut kept),
        y.view_mut(),
    )?;
    assert_eq!(unkept, y.to_vec()?);
    let start = |n: usize| match store {
        Store::Replace => Buffer::uninitialised(device, n),
        Store::Add => Buffer::from_slice(device, &vec![before; n]),
    };
    let mut dx = start(n)?;
    let mut dw = Buffer::<f32>::uninitialised(device, assigned)?;
    let mut to = Vec::new();
    for e in &there.experts {
        let b = |i: usize| start(e[i].len());
        to.push([b(0)?, b(1)?, b(2)?, b(3)?, b(4)?, b(5)?]);
    }
    let mut gradients: Vec<_> = to
        .iter_mut()
        .map(|[w1, b1, w2, b2, w3, b3]| {
            Some(ExpertGradients {
                w1: w1.view_mut(),
                b1: b1.view_mut(),
                w2: w2.view_mut(),
                b2: b2.view_mut(),
                up: shape.gated.then(|| (w3.view_mut(), b3.view_mut())),
                store,
            })
        })
        .collect();
    let given = (dx.view_mut(), store);
    backward(
        device,
        there.x.view(),
        &experts,
        grouped,
        shape,
        &mut kept,
        there.dy.view(),
        given,
        &mut gradients,
        dw.view_mut(),
    )?;
    drop(gradients);
    let mut all = vec![y.to_vec()?, dx.to_vec()?, dw.to_vec()?];
    for e in &to {
        for (i, b) in e.iter().enumerate() {
            all.push(if i < 4 || shape.gated {
                b.to_vec()?
            } else {
                vec![if store == Store::Add { before } else { 0.0 }; b.len()]
            });
        }
    }
    Ok(all)
}

#[test]
fn mixtures_forward_and_backward() {
    on_device!();
    for (n, dim, hidden, experts) in [
        (0, 4, 4, 2),
        (1, 1, 1, 1),
        (2, 3, 5, 2),
        (150, 37, 45, 5),
        (70, 32, 64, 3),
    ] {
        // Expert 1 has no token, expert 0 all of them, and token 3 goes nowhere; of two tokens, both do.
        let chosen = |t: usize, e: usize| {
            n != 2 && t != 3 && (e == 0 || (e != 1 && (t * 7 + e * 5).is_multiple_of(3)))
        };
        let plan = Plan::new(n, experts, chosen);
        let (x, dy) = (values(n * dim, 1), values(n * dim, 2));
        for (act, gated) in [
            (Activation::Relu, false),
            (Activation::GeluTanh, false),
            (Activation::Silu, true),
            (Activation::Relu, true),
        ] {
            let shape = FfnShape {
                dim,
                hidden,
                activation: act,
                gated,
            };
            let all: Vec<_> = (0..experts).map(|e| expert(e as u32, shape)).collect();
            let wanted = reference(&wide(&x), &wide(&dy), &all, &plan, shape);
            for (store, before) in [(Store::Replace, 0.0), (Store::Add, 0.5)] {
                let results = every_schedule(|device| {
                    let there = OnDevice::new(device, &x, &dy, &all, &plan).unwrap();
                    pass(device, &there, &plan, shape, store, before).unwrap()
                });
                for (i, (got, wanted)) in results.iter().zip(&wanted).enumerate() {
                    let added = if i == 0 || i == 2 {
                        0.0
                    } else {
                        f64::from(before)
                    };
                    let wanted: Vec<f64> = wanted.iter().map(|v| v + added).collect();
                    close(
                        &format!("{act:?} gated {gated} result {i}"),
                        got,
                        &wanted,
                        5e-5,
                    );
                }
            }
        }
    }
}

#[test]
fn emulated_failures_anywhere_are_error_values_and_leave_no_memory() {
    on_device!();
    let shape = FfnShape {
        dim: 8,
        hidden: 12,
        activation: Activation::Silu,
        gated: true,
    };
    let plan = Plan::new(20, 3, |t, e| (t + e).is_multiple_of(2));
    let (x, dy) = (values(160, 1), values(160, 2));
    let all: Vec<_> = (0..3).map(|e| expert(e, shape)).collect();
    for word in [Word::FailAllocation, Word::FailLaunch] {
        let mut failures = 0;
        for nth in 1.. {
            let device = device();
            let there = OnDevice::new(&device, &x, &dy, &all, &plan).unwrap();
            let live = get(Word::LiveBytes);
            set(word, nth);
            let result = pass(&device, &there, &plan, shape, Store::Replace, 0.0);
            let left = get(word);
            set(word, 0);
            assert_eq!(get(Word::LiveBytes), live, "{nth}");
            if left > 0 {
                assert!(result.is_ok());
                break;
            }
            match result.unwrap_err() {
                CudaError::OutOfMemory { .. } => assert_eq!(there.x.to_vec().unwrap(), x),
                CudaError::Call { code: 701, .. } => assert!(there.x.to_vec().is_err()),
                other => panic!("{other}"),
            }
            failures += 1;
        }
        assert!(failures > 10, "{failures}");
    }
}

#[test]
fn shapes_that_do_not_fit_are_refused() {
    on_device!();
    let device = device();
    let shape = FfnShape {
        dim: 4,
        hidden: 6,
        activation: Activation::Relu,
        gated: false,
    };
    let plan = Plan::new(5, 2, |t, e| t % 2 == e);
    let (x, all) = (values(20, 1), [expert(0, shape), expert(1, shape)]);
    let there = OnDevice::new(&device, &x, &x, &all, &plan).unwrap();
    let mut y = Buffer::<f32>::zeros(&device, 20).unwrap();
    let mut run = |experts: &[ExpertWeights<'_>], grouped, shape| {
        forward(
            &device,
            there.x.view(),
            experts,
            grouped,
            shape,
            None,
            y.view_mut(),
        )
    };
    let experts = there.weights(false);
    run(&experts, there.plan(&plan), shape).unwrap();
    for bad in [
        FfnShape { dim: 3, ..shape },
        FfnShape { hidden: 5, ..shape },
        FfnShape {
            gated: true,
            ..shape
        },
    ] {
        assert!(run(&experts, there.plan(&plan), bad).is_err(), "{bad:?}");
    }
    assert!(run(&experts[..1], there.plan(&plan), shape).is_err());
    let short = Grouped {
        weights: there.weights.view().range(0..4).unwrap(),
        ..there.plan(&plan)
    };
    assert!(matches!(
        run(&experts, short, shape),
        Err(CudaError::Length { .. })
    ));
    let falling = Plan {
        expert_offsets: vec![0, 6, 5],
        ..Plan::new(5, 2, |t, e| t % 2 == e)
    };
    assert!(matches!(
        run(&experts, there.plan(&falling), shape),
        Err(CudaError::Setting { .. })
    ));
}

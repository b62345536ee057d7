//! Speeds of the kernels beside what the card can do: `cargo run --release -p mass-cuda --example speed [RUNS]
//! [small]`.
//!
//! With `small`, sizes that an emulated device can do. Medians of so many runs, 20 unless said, after two that do not
//! count.

use std::time::Instant;

use mass_cuda::kernels::attention::{self, AttentionShape, Sequences};
use mass_cuda::kernels::gemm::{self, Job, Matrix, MatrixMut, Tile};
use mass_cuda::kernels::moe_ffn::{
    self, ExpertGradients, ExpertWeights, FfnShape, Grouped, Hidden,
};
use mass_cuda::kernels::{Activation, Store, ceiling, elementwise};
use mass_cuda::{Buffer, CudaError, Device};

/// Median time of a run, in seconds.
fn median(
    device: &Device,
    runs: usize,
    mut run: impl FnMut() -> Result<(), CudaError>,
) -> Result<f64, CudaError> {
    let mut times = Vec::with_capacity(runs);
    for i in 0..runs + 2 {
        device.synchronise()?;
        let start = Instant::now();
        run()?;
        device.synchronise()?;
        if i >= 2 {
            times.push(start.elapsed().as_secs_f64());
        }
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

fn values(device: &Device, n: usize) -> Result<Buffer<f32>, CudaError> {
    let some: Vec<f32> = (0..n)
        .map(|i| (i * 7919 % 1021) as f32 / 511.0 - 1.0)
        .collect();
    Buffer::from_slice(device, &some)
}

fn main() -> Result<(), CudaError> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let small = arguments.iter().any(|a| a == "small");
    let runs = arguments
        .iter()
        .find_map(|a| a.parse().ok())
        .unwrap_or(20)
        .max(1);
    let device = Device::open(0)?;
    let (major, minor) = device.compute_capability();
    println!(
        "{}, compute capability {major}.{minor}, {} multiprocessors; medians of {runs}",
        device.name(),
        device.multiprocessors()
    );

    let (blocks, loops) = if small {
        (16, 100)
    } else {
        (device.multiprocessors() * 16, 20_000)
    };
    let mut y = Buffer::uninitialised(&device, blocks * 256)?;
    let time = median(&device, runs, || {
        ceiling::multiply_adds(&device, loops, 0.999, y.view_mut())
    })?;
    let most = 2.0 * (blocks * 256 * loops * ceiling::CHAINS) as f64 / time;
    println!(
        "multiply-adds in registers        {:10.2} GFLOP/s",
        most / 1e9
    );

    let n = if small { 1 << 16 } else { 1 << 28 };
    let (x, mut y) = (values(&device, n)?, values(&device, n)?);
    let time = median(&device, runs, || {
        elementwise::add_into(&device, x.view(), y.view_mut())
    })?;
    println!(
        "y += x, {n} values       {:10.2} GB/s",
        12.0 * n as f64 / time / 1e9
    );
    drop((x, y));

    let share = |name: &str, work: f64, time: f64| {
        let rate = work / time;
        println!(
            "{name:<42} {:9.3} ms {:10.2} GFLOP/s {:5.1} %",
            time * 1e3,
            rate / 1e9,
            100.0 * rate / most
        );
    };

    let n = if small { 256 } else { 4096 };
    let (a, b) = (values(&device, n * n)?, values(&device, n * n)?);
    let mut c = Buffer::uninitialised(&device, n * n)?;
    let (left, right) = (Matrix::new(a.view(), n, n)?, Matrix::new(b.view(), n, n)?);
    for (name, left, right) in [
        ("a b", left, right),
        ("a bT", left, right.t()),
        ("aT b", left.t(), right),
        ("aT bT", left.t(), right.t()),
    ] {
        for tile in [Tile::Large, Tile::Middle] {
            let time = median(&device, runs, || {
                let c = MatrixMut::new(c.view_mut(), n, n)?;
                gemm::run_with(&device, &[Job::new(left, right, c)], Some(tile))
            })?;
            share(
                &format!("{name}, {n} x {n} x {n}, {tile:?} tiles"),
                2.0 * (n as f64).powi(3),
                time,
            );
        }
    }
    drop((a, b, c));

    mixture(&device, runs, small, &share)?;

    let (sequences, length, heads, dim) = if small {
        (2, 64, 2, 128)
    } else {
        (32, 512, 16, 1024)
    };
    let rows = sequences * length;
    let offsets: Vec<usize> = (0..=sequences).map(|i| i * length).collect();
    let which = Sequences::new(&device, &offsets, None)?;
    let shape = AttentionShape {
        heads,
        dim,
        causal: false,
        dropout: None,
    };
    let (qkv, dy) = (
        values(&device, rows * 3 * dim)?,
        values(&device, rows * dim)?,
    );
    let mut y = Buffer::uninitialised(&device, rows * dim)?;
    let mut kept = Buffer::uninitialised(&device, rows * heads * 2)?;
    let mut d = Buffer::uninitialised(&device, rows * 3 * dim)?;
    let work = 4.0 * (rows * length * dim) as f64;
    let time = median(&device, runs, || {
        attention::forward(
            &device,
            qkv.view(),
            &which,
            shape,
            y.view_mut(),
            kept.view_mut(),
        )
    })?;
    share(
        &format!(
            "attention {sequences} x {length}, {heads} heads of {}",
            dim / heads
        ),
        work,
        time,
    );
    let time = median(&device, runs, || {
        let to = (d.view_mut(), Store::Replace);
        attention::backward(
            &device,
            qkv.view(),
            &which,
            shape,
            y.view(),
            kept.view(),
            dy.view(),
            to,
        )
    })?;
    share("  its gradient", 2.5 * work, time);
    Ok(())
}

/// The mixture layer, top 2, tokens spread evenly.
fn mixture(
    device: &Device,
    runs: usize,
    small: bool,
    share: &impl Fn(&str, f64, f64),
) -> Result<(), CudaError> {
    let (tokens, dim, hidden, experts) = if small {
        (64, 32, 64, 4)
    } else {
        (16_384, 1024, 4096, 16)
    };
    let shape = FfnShape {
        dim,
        hidden,
        activation: Activation::GeluTanh,
        gated: false,
    };
    let assigned = 2 * tokens;
    let per_expert = assigned / experts;
    let offsets: Vec<u32> = (0..=experts).map(|e| (e * per_expert) as u32).collect();
    // Token t goes to experts t mod K and (t + 1) mod K.
    let (mut chosen, mut of_token) = (Vec::new(), vec![Vec::new(); tokens]);
    for e in 0..experts {
        for t in (0..tokens).filter(|t| t % experts == e || (t + 1) % experts == e) {
            of_token[t].push(chosen.len() as u32);
            chosen.push(t as u32);
        }
    }
    let token_offsets: Vec<u32> = (0..=tokens).map(|t| 2 * t as u32).collect();
    let chosen = Buffer::from_slice(device, &chosen)?;
    let weights = Buffer::from_slice(device, &vec![0.5_f32; assigned])?;
    let token_offsets = Buffer::from_slice(device, &token_offsets)?;
    let of_token = Buffer::from_slice(device, &of_token.concat())?;
    let on_device = Buffer::from_slice(device, &offsets)?;
    let plan = Grouped {
        expert_offsets: &offsets,
        expert_offsets_on_device: on_device.view(),
        tokens: chosen.view(),
        weights: weights.view(),
        token_offsets: token_offsets.view(),
        token_assignments: of_token.view(),
    };
    let lengths = [hidden * dim, hidden, dim * hidden, dim];
    let (mut own, mut to) = (Vec::new(), Vec::new());
    for _ in 0..experts {
        own.push([
            values(device, lengths[0])?,
            values(device, lengths[1])?,
            values(device, lengths[2])?,
            values(device, lengths[3])?,
        ]);
        let empty = |i: usize| Buffer::<f32>::uninitialised(device, lengths[i]);
        to.push([empty(0)?, empty(1)?, empty(2)?, empty(3)?]);
    }
    let experts_weights: Vec<_> = own
        .iter()
        .map(|[w1, b1, w2, b2]| ExpertWeights {
            w1: w1.view(),
            b1: b1.view(),
            w2: w2.view(),
            b2: b2.view(),
            up: None,
        })
        .collect();
    let (x, dy) = (values(device, tokens * dim)?, values(device, tokens * dim)?);
    let mut kept = Hidden::new(device, shape, assigned)?;
    let mut y = Buffer::uninitialised(device, tokens * dim)?;
    let mut dx = Buffer::uninitialised(device, tokens * dim)?;
    let mut d_weights = Buffer::uninitialised(device, assigned)?;
    let work = 4.0 * (assigned * dim * hidden) as f64;
    let name = format!("mixture {tokens} tokens, {dim} x {hidden} x {experts}, top 2");
    let time = median(device, runs, || {
        moe_ffn::forward(
            device,
            x.view(),
            &experts_weights,
            plan,
            shape,
            Some(&mut kept),
            y.view_mut(),
        )
    })?;
    share(&name, work, time);
    let time = median(device, runs, || {
        moe_ffn::forward(
            device,
            x.view(),
            &experts_weights,
            plan,
            shape,
            Some(&mut kept),
            y.view_mut(),
        )?;
        let mut gradients: Vec<_> = to
            .iter_mut()
            .map(|[w1, b1, w2, b2]| {
                let up = None;
                Some(ExpertGradients {
                    w1: w1.view_mut(),
                    b1: b1.view_mut(),
                    w2: w2.view_mut(),
                    b2: b2.view_mut(),
                    up,
                    store: Store::Replace,
                })
            })
            .collect();
        let given = (dx.view_mut(), Store::Replace);
        moe_ffn::backward(
            device,
            x.view(),
            &experts_weights,
            plan,
            shape,
            &mut kept,
            dy.view(),
            given,
            &mut gradients,
            d_weights.view_mut(),
        )
    })?;
    share("  with its gradients", 3.0 * work, time);
    Ok(())
}

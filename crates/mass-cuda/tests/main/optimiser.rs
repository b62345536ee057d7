use mass_cuda::kernels::optimiser::{AdamWStep, Update, adamw};
use mass_cuda::{Buffer, CudaError};

use super::emulator::{device, every_schedule, values};

fn step(t: i32, lr: f32, decay: f32) -> AdamWStep {
    let (b1, b2) = (0.9_f64, 0.999_f64);
    AdamWStep {
        lr,
        beta1: b1 as f32,
        beta2: b2 as f32,
        take1: (1.0 - b1) as f32,
        take2: (1.0 - b2) as f32,
        eps: 1e-8,
        weight_decay: decay,
        bias1: (1.0 - b1.powi(t)) as f32,
        bias2: (1.0 - b2.powi(t)) as f32,
        gradient_scale: 0.5,
    }
}

/// mass-model's update, written anew.
fn host(theta: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], s: AdamWStep) {
    let (keep, rate, root) = (1.0 - s.lr * s.weight_decay, s.lr / s.bias1, s.bias2.sqrt());
    for i in 0..theta.len() {
        let g = g[i] * s.gradient_scale;
        m[i] = s.beta1 * m[i] + s.take1 * g;
        v[i] = s.beta2 * v[i] + s.take2 * g * g;
        theta[i] = theta[i] * keep - rate * m[i] / (v[i].sqrt() / root + s.eps);
    }
}

#[test]
fn many_parameters_in_one_launch_get_the_hosts_bits() {
    on_device!();
    let lengths = [3_usize, 0, 1024, 1, 5000];
    let parameters: Vec<[Vec<f32>; 4]> = lengths
        .iter()
        .map(|&n| [values(n, 1), values(n, 2), vec![0.0; n], vec![0.0; n]])
        .collect();
    let results = every_schedule(|device| {
        let mut buffers: Vec<[Buffer<f32>; 4]> = parameters
            .iter()
            .map(|p| [0, 1, 2, 3].map(|i| Buffer::from_slice(device, &p[i]).unwrap()))
            .collect();
        for t in 1..4 {
            let mut updates: Vec<_> = buffers
                .iter_mut()
                .enumerate()
                .map(|(i, [theta, g, m, v])| Update {
                    theta: theta.view_mut(),
                    gradient: g.view(),
                    first: m.view_mut(),
                    second: v.view_mut(),
                    step: step(t, 1e-2 * (i + 1) as f32, 0.01 * i as f32),
                })
                .collect();
            adamw(device, &mut updates).unwrap();
        }
        buffers
            .iter()
            .flat_map(|[theta, _, m, v]| [theta, m, v].map(|b| b.to_vec().unwrap()))
            .collect()
    });
    for (i, p) in parameters.into_iter().enumerate() {
        let [mut theta, g, mut m, mut v] = p;
        for t in 1..4 {
            host(
                &mut theta,
                &g,
                &mut m,
                &mut v,
                step(t, 1e-2 * (i + 1) as f32, 0.01 * i as f32),
            );
        }
        assert_eq!(results[3 * i..][..3], [theta, m, v], "parameter {i}");
    }
}

#[test]
fn lengths_are_checked() {
    on_device!();
    let device = device();
    let buffer = |n| Buffer::<f32>::zeros(&device, n).unwrap();
    let (mut theta, g, mut m, mut v) = (buffer(4), buffer(4), buffer(3), buffer(4));
    let update = Update {
        theta: theta.view_mut(),
        gradient: g.view(),
        first: m.view_mut(),
        second: v.view_mut(),
        step: step(1, 0.1, 0.0),
    };
    let wrong = CudaError::Length {
        what: "first moment",
        wanted: 4,
        got: 3,
    };
    assert_eq!(adamw(&device, &mut [update]), Err(wrong));
    adamw(&device, &mut []).unwrap();
}

use mass_cuda::kernels::dots::{ColumnSum, column_sums, dots, sums_of_squares};
use mass_cuda::kernels::{Store, layer_norm};
use mass_cuda::{Buffer, CudaError};

use super::emulator::{close, device, every_schedule, values, wide};

const EPS: f32 = 1e-5;

#[test]
fn layer_norm_forward_and_backward() {
    on_device!();
    for (rows, d) in [(0, 4), (1, 1), (9, 31), (300, 64), (257, 300)] {
        let (x, gamma, beta, dy) = (
            values(rows * d, 1),
            values(d, 2),
            values(d, 3),
            values(rows * d, 4),
        );
        let results = every_schedule(|device| {
            let buffer = |v: &[f32]| Buffer::from_slice(device, v).unwrap();
            let (x, g, b, dy) = (buffer(&x), buffer(&gamma), buffer(&beta), buffer(&dy));
            let empty = |n| Buffer::<f32>::uninitialised(device, n).unwrap();
            let (mut y, mut stats, mut dx, mut added) = (
                empty(rows * d),
                empty(2 * rows),
                empty(rows * d),
                buffer(&vec![1.0; rows * d]),
            );
            layer_norm::forward(
                device,
                x.view(),
                g.view(),
                b.view(),
                EPS,
                y.view_mut(),
                stats.view_mut(),
            )
            .unwrap();
            let (mut dg, mut db) = (buffer(&vec![0.5; d]), buffer(&vec![0.25; d]));
            let to = (dx.view_mut(), Store::Replace);
            layer_norm::backward(
                device,
                x.view(),
                g.view(),
                stats.view(),
                dy.view(),
                to,
                dg.view_mut(),
                db.view_mut(),
            )
            .unwrap();
            let to = (added.view_mut(), Store::Add);
            let (mut again, mut and) = (buffer(&vec![0.5; d]), buffer(&vec![0.25; d]));
            layer_norm::backward(
                device,
                x.view(),
                g.view(),
                stats.view(),
                dy.view(),
                to,
                again.view_mut(),
                and.view_mut(),
            )
            .unwrap();
            [y, dx, added, dg, db].map(|b| b.to_vec().unwrap()).to_vec()
        });
        let (mut y, mut dx) = (Vec::new(), Vec::new());
        let (mut dg, mut db) = (vec![0.5; d], vec![0.25; d]);
        for (x, dy) in wide(&x).chunks(d).zip(wide(&dy).chunks(d)) {
            let n = d as f64;
            let mean = x.iter().sum::<f64>() / n;
            let var = x.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / n;
            let rstd = 1.0 / (var + f64::from(EPS)).sqrt();
            let normed: Vec<f64> = x.iter().map(|x| (x - mean) * rstd).collect();
            let scaled: Vec<f64> = dy
                .iter()
                .zip(&gamma)
                .map(|(d, g)| d * f64::from(*g))
                .collect();
            let a = scaled.iter().sum::<f64>() / n;
            let b = scaled.iter().zip(&normed).map(|(s, n)| s * n).sum::<f64>() / n;
            for i in 0..d {
                y.push(normed[i] * f64::from(gamma[i]) + f64::from(beta[i]));
                dx.push(rstd * (scaled[i] - a - normed[i] * b));
                dg[i] += dy[i] * normed[i];
                db[i] += dy[i];
            }
        }
        close("y", &results[0], &y, 2e-5);
        if d > 1 {
            close("dx", &results[1], &dx, 2e-5);
        }
        assert!(
            results[2]
                .iter()
                .zip(&results[1])
                .all(|(a, b)| (a - 1.0 - b).abs() < 1e-5 * b.abs().max(1.0))
        );
        close("dgamma", &results[3], &dg, 2e-5);
        close("dbeta", &results[4], &db, 2e-5);
    }
}

/// mass-model's `vector::dot` and `sum_of_squares`, written anew: the device gives the same bits.
fn host_dot(a: &[f32], b: &[f32]) -> f64 {
    let block = |a: &[f32], b: &[f32]| -> f32 {
        let mut lanes = [0.0_f32; 32];
        let whole = a.len() / 32 * 32;
        for i in 0..whole {
            lanes[i % 32] += a[i] * b[i];
        }
        let mut half = 16;
        while half > 0 {
            for i in 0..half {
                lanes[i] += lanes[i + half];
            }
            half /= 2;
        }
        (whole..a.len()).fold(lanes[0], |t, i| t + a[i] * b[i])
    };
    let piece = |a: &[f32], b: &[f32]| -> f64 {
        a.chunks(4096)
            .zip(b.chunks(4096))
            .map(|(a, b)| f64::from(block(a, b)))
            .sum()
    };
    a.chunks(1 << 18)
        .zip(b.chunks(1 << 18))
        .map(|(a, b)| piece(a, b))
        .sum()
}

#[test]
fn inner_products_of_segments_have_the_hosts_bits() {
    on_device!();
    let lengths = [0, 1, 33, 4096, 4097, 100_003, (1 << 18) + 5];
    let all: Vec<(Vec<f32>, Vec<f32>)> = lengths
        .iter()
        .map(|&n| (values(n, 1), values(n, 2)))
        .collect();
    every_schedule(|device| {
        let buffers: Vec<_> = all
            .iter()
            .map(|(a, b)| {
                (
                    Buffer::from_slice(device, a).unwrap(),
                    Buffer::from_slice(device, b).unwrap(),
                )
            })
            .collect();
        let pairs: Vec<_> = buffers.iter().map(|(a, b)| (a.view(), b.view())).collect();
        let got = dots(device, &pairs).unwrap();
        let squares =
            sums_of_squares(device, &pairs.iter().map(|p| p.0).collect::<Vec<_>>()).unwrap();
        for (i, (a, b)) in all.iter().enumerate() {
            // Equal numbers have equal bits, but for the two zeros: an empty sum of Rust's is the negative one.
            assert_eq!(
                (got[i], squares[i]),
                (host_dot(a, b), host_dot(a, a)),
                "{}",
                a.len()
            );
        }
        vec![got.iter().map(|&x| x as f32).collect()]
    });
    let device = device();
    assert_eq!(dots(&device, &[]).unwrap(), []);
    let (a, b) = (
        Buffer::<f32>::zeros(&device, 3).unwrap(),
        Buffer::<f32>::zeros(&device, 4).unwrap(),
    );
    assert!(matches!(
        dots(&device, &[(a.view(), b.view())]),
        Err(CudaError::Length { .. })
    ));
}

#[test]
fn columns_are_summed_by_jobs() {
    on_device!();
    let shapes = [(0, 5), (1, 1), (256, 3), (700, 300), (257, 257)];
    let xs: Vec<Vec<f32>> = shapes.iter().map(|&(r, c)| values(r * c, 5)).collect();
    let results = every_schedule(|device| {
        let buffers: Vec<_> = xs
            .iter()
            .map(|x| Buffer::from_slice(device, x).unwrap())
            .collect();
        let mut sums: Vec<_> = shapes
            .iter()
            .map(|s| Buffer::from_slice(device, &vec![2.0; s.1]).unwrap())
            .collect();
        let mut squares: Vec<_> = shapes
            .iter()
            .map(|s| Buffer::<f32>::uninitialised(device, s.1).unwrap())
            .collect();
        let job = |(x, y): (&'_ Buffer<f32>, &'_ mut Buffer<f32>), times, store| -> () {
            let times = if times { Some(x.view()) } else { None };
            column_sums(
                device,
                vec![ColumnSum {
                    x: x.view(),
                    times,
                    y: y.view_mut(),
                    store,
                }],
            )
            .unwrap();
        };
        let jobs = buffers.iter().zip(&mut sums).map(|(x, y)| ColumnSum {
            x: x.view(),
            times: None,
            y: y.view_mut(),
            store: Store::Add,
        });
        column_sums(device, jobs.collect()).unwrap();
        buffers
            .iter()
            .zip(&mut squares)
            .for_each(|pair| job(pair, true, Store::Replace));
        sums.iter()
            .chain(&squares)
            .map(|b| b.to_vec().unwrap())
            .collect()
    });
    for (i, &(_, cols)) in shapes.iter().enumerate() {
        let column = |j: usize, f: &dyn Fn(f64) -> f64| -> f64 {
            wide(&xs[i])
                .iter()
                .skip(j)
                .step_by(cols)
                .map(|&x| f(x))
                .sum()
        };
        close(
            "sums",
            &results[i],
            &(0..cols)
                .map(|j| 2.0 + column(j, &|x| x))
                .collect::<Vec<_>>(),
            1e-5,
        );
        close(
            "squares",
            &results[shapes.len() + i],
            &(0..cols).map(|j| column(j, &|x| x * x)).collect::<Vec<_>>(),
            1e-5,
        );
    }
}

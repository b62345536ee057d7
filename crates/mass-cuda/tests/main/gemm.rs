use mass_cuda::kernels::gemm::{Job, Matrix, MatrixMut, Then, Tile, run, run_with};
use mass_cuda::kernels::{Activation, Store, linear};
use mass_cuda::{Buffer, CudaError, Device, ViewMut};

use super::emulator::{close, device, every_schedule, values, wide};

/// `a b` in double precision.
fn reference(
    a: impl Fn(usize, usize) -> f32,
    b: impl Fn(usize, usize) -> f32,
    (m, n, k): (usize, usize, usize),
) -> Vec<f64> {
    let cell = |i: usize| {
        (0..k)
            .map(|l| f64::from(a(i / n, l)) * f64::from(b(l, i % n)))
            .sum()
    };
    (0..m * n).map(cell).collect()
}

const SIZES: [(usize, usize, usize); 11] = [
    (1, 1, 1),
    (5, 7, 3),
    (32, 32, 32),
    (33, 31, 1),
    (64, 128, 16),
    (129, 130, 37),
    (127, 65, 40),
    (200, 3, 129),
    (2, 257, 8),
    (17, 19, 0),
    (0, 5, 4),
];

#[test]
fn every_transposition_tile_and_store_gives_the_product_and_the_same_bits() {
    on_device!();
    for (m, n, k) in SIZES {
        for layout in 0..4 {
            let (a_t, b_t) = (layout & 1 == 1, layout & 2 == 2);
            let (a, b, before) = (values(m * k, 1), values(k * n, 2), values(m * n, 3));
            let at = |i: usize, l: usize| if a_t { a[l * m + i] } else { a[i * k + l] };
            let bt = |l: usize, j: usize| if b_t { b[j * k + l] } else { b[l * n + j] };
            let product = reference(at, bt, (m, n, k));
            let results = every_schedule(|device| {
                let (da, db) = (
                    Buffer::from_slice(device, &a).unwrap(),
                    Buffer::from_slice(device, &b).unwrap(),
                );
                let matrix = |buffer, rows, cols, t: bool| {
                    let buffer: &Buffer<f32> = buffer;
                    if t {
                        Matrix::new(buffer.view(), cols, rows).unwrap().t()
                    } else {
                        Matrix::new(buffer.view(), rows, cols).unwrap()
                    }
                };
                let mut all = Vec::new();
                for tile in Tile::ALL {
                    let mut replaced = Buffer::<f32>::uninitialised(device, m * n).unwrap();
                    let mut added = Buffer::from_slice(device, &before).unwrap();
                    let job = |c, store| Job {
                        alpha: if store == Store::Add { -0.5 } else { 1.0 },
                        store,
                        ..Job::new(matrix(&da, m, k, a_t), matrix(&db, k, n, b_t), c)
                    };
                    let c = MatrixMut::new(replaced.view_mut(), m, n).unwrap();
                    run_with(device, &[job(c, Store::Replace)], Some(tile)).unwrap();
                    let c = MatrixMut::new(added.view_mut(), m, n).unwrap();
                    run_with(device, &[job(c, Store::Add)], Some(tile)).unwrap();
                    all.extend([replaced.to_vec().unwrap(), added.to_vec().unwrap()]);
                }
                all
            });
            let sum: Vec<f64> = product
                .iter()
                .zip(&before)
                .map(|(p, b)| f64::from(*b) - 0.5 * p)
                .collect();
            for pair in results.chunks(2) {
                close("product", &pair[0], &product, 1e-5);
                close("sum", &pair[1], &sum, 1e-5);
                assert_eq!(pair[0], results[0], "another tile gives other bits");
                assert_eq!(pair[1], results[1]);
            }
        }
    }
}

#[test]
fn ragged_jobs_with_strides_and_picked_rows_are_one_launch() {
    on_device!();
    // Segments as experts have: empty, one row, a prime, beyond a tile.
    let (k, n, loads) = (45, 70, [13_usize, 0, 1, 140, 31]);
    let total: usize = loads.iter().sum();
    let x = values(50 * k, 4);
    let rows: Vec<u32> = (0..total).map(|i| ((i * 29 + 3) % 50) as u32).collect();
    let weights: Vec<Vec<f32>> = (0..loads.len())
        .map(|e| values(n * k, 10 + e as u32))
        .collect();
    let (bias, row_weight) = (values(n, 20), values(total, 21));
    for tile in [
        None,
        Some(Tile::Small),
        Some(Tile::Middle),
        Some(Tile::Large),
    ] {
        let results = every_schedule(|device| {
            let dx = Buffer::from_slice(device, &x).unwrap();
            let rows = Buffer::from_slice(device, &rows).unwrap();
            let weights: Vec<_> = weights
                .iter()
                .map(|w| Buffer::from_slice(device, w).unwrap())
                .collect();
            let (bias, row_weight) = (
                Buffer::from_slice(device, &bias).unwrap(),
                Buffer::from_slice(device, &row_weight).unwrap(),
            );
            // Rows of c are three values further apart than they are long; what lies between must stay.
            let mut y = Buffer::from_slice(device, &vec![7.0; total * (n + 3)]).unwrap();
            let mut jobs = Vec::new();
            let mut first = 0;
            for (e, c) in y
                .view_mut()
                .split(loads.map(|l| l * (n + 3)))
                .unwrap()
                .into_iter()
                .enumerate()
            {
                let c = MatrixMut::strided(c, (loads[e], n), n + 3).unwrap();
                let b = Matrix::new(weights[e].view(), n, k).unwrap().t();
                let mut job = Job::new(Matrix::new(dx.view(), 50, k).unwrap(), b, c);
                job.rows = Some(rows.view().range(first..first + loads[e]).unwrap());
                job.epilogue.bias = Some(bias.view());
                job.epilogue.row_weight =
                    Some(row_weight.view().range(first..first + loads[e]).unwrap());
                jobs.push(job);
                first += loads[e];
            }
            run_with(device, &jobs, tile).unwrap();
            drop(jobs);
            vec![y.to_vec().unwrap()]
        });
        let mut row = 0;
        for (e, load) in loads.into_iter().enumerate() {
            for _ in 0..load {
                let (got, x) = (
                    &results[0][row * (n + 3)..][..n + 3],
                    &x[rows[row] as usize * k..][..k],
                );
                for j in 0..n {
                    let sum: f64 = (0..k)
                        .map(|l| f64::from(x[l]) * f64::from(weights[e][j * k + l]))
                        .sum();
                    let wanted = (sum + f64::from(bias[j])) * f64::from(row_weight[row]);
                    assert!(
                        (f64::from(got[j]) - wanted).abs() < 1e-5,
                        "expert {e} row {row} column {j}"
                    );
                }
                assert_eq!(got[n..], [7.0; 3]);
                row += 1;
            }
        }
    }
}

/// Value and derivative.
fn activation(which: Activation, x: f64) -> (f64, f64) {
    let value = |x: f64| match which {
        Activation::Relu => x.max(0.0),
        Activation::GeluErf => 0.5 * x * (1.0 + erf(x / 2.0_f64.sqrt())),
        Activation::GeluTanh => {
            0.5 * x
                * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x * x * x)).tanh())
        }
        Activation::Silu => x / (1.0 + (-x).exp()),
    };
    let h = 1e-5;
    (value(x), (value(x + h) - value(x - h)) / (2.0 * h))
}

fn erf(x: f64) -> f64 {
    let (mut term, mut total, mut n) = (x, x, 0.0);
    while term.abs() > 1e-17 {
        n += 1.0;
        term *= -x * x / n;
        total += term / (2.0 * n + 1.0);
    }
    total * 2.0 / std::f64::consts::PI.sqrt()
}

/// `c = then(a b + bias)`.
fn biased<'a>(
    device: &Device,
    (a, b, bias): (&'a Buffer<f32>, &'a Buffer<f32>, &'a Buffer<f32>),
    (m, n, k): (usize, usize, usize),
    c: ViewMut<'a, f32>,
    then: Then<'a>,
) {
    let c = MatrixMut::new(c, m, n).unwrap();
    let mut job = Job::new(
        Matrix::new(a.view(), m, k).unwrap(),
        Matrix::new(b.view(), k, n).unwrap(),
        c,
    );
    job.epilogue.bias = Some(bias.view());
    job.epilogue.then = then;
    run(device, &[job]).unwrap();
}

#[test]
fn activations_gates_and_their_slopes() {
    on_device!();
    let (m, n, k) = (37, 67, 21);
    let (a, b, up, bias) = (
        values(m * k, 1),
        values(k * n, 2),
        values(k * n, 3),
        values(n, 4),
    );
    let sum = |w: &[f32], i: usize, j: usize| -> f64 {
        let dot: f64 = (0..k)
            .map(|l| f64::from(a[i * k + l]) * f64::from(w[l * n + j]))
            .sum();
        dot + f64::from(bias[j])
    };
    for which in [
        Activation::Relu,
        Activation::GeluErf,
        Activation::GeluTanh,
        Activation::Silu,
    ] {
        let results = every_schedule(|device| {
            let buffer = |v: &[f32]| Buffer::from_slice(device, v).unwrap();
            let (a, b, up, bias) = (buffer(&a), buffer(&b), buffer(&up), buffer(&bias));
            let empty = || Buffer::<f32>::uninitialised(device, m * n).unwrap();
            let (mut c, mut plain, mut slopes, mut factors) = (empty(), empty(), empty(), empty());
            let (by_b, by_up) = ((&a, &b, &bias), (&a, &up, &bias));
            biased(
                device,
                by_b,
                (m, n, k),
                plain.view_mut(),
                Then::Activate(which, None),
            );
            biased(
                device,
                by_b,
                (m, n, k),
                c.view_mut(),
                Then::Activate(which, Some(slopes.view_mut())),
            );
            let (first, first_slopes) = (c.to_vec().unwrap(), slopes.to_vec().unwrap());
            biased(
                device,
                by_up,
                (m, n, k),
                c.view_mut(),
                Then::Gate(Some((slopes.view_mut(), factors.view_mut()))),
            );
            biased(device, by_up, (m, n, k), plain.view_mut(), Then::Gate(None));
            assert_eq!(plain.to_vec().unwrap(), c.to_vec().unwrap());
            vec![
                first,
                first_slopes,
                c.to_vec().unwrap(),
                slopes.to_vec().unwrap(),
                factors.to_vec().unwrap(),
            ]
        });
        for i in 0..m * n {
            let (value, slope) = activation(which, sum(&b, i / n, i % n));
            let factor = sum(&up, i / n, i % n);
            let wanted = [value, slope, value * factor, slope * factor, value];
            for (result, wanted) in results.iter().zip(wanted) {
                // The kink of a ReLU has no slope.
                if which == Activation::Relu && sum(&b, i / n, i % n).abs() < 1e-4 {
                    continue;
                }
                assert!(
                    (f64::from(result[i]) - wanted).abs() < 1e-5 * wanted.abs().max(1.0),
                    "{which:?} {i}: {} {wanted}",
                    result[i]
                );
            }
        }
    }
}

#[test]
fn linear_layers_forward_and_backward() {
    on_device!();
    for (n, inp, out) in [(1, 3, 5), (300, 33, 17), (64, 64, 64)] {
        let (x, w, b, dy) = (
            values(n * inp, 1),
            values(out * inp, 2),
            values(out, 3),
            values(n * out, 4),
        );
        let results = every_schedule(|device| {
            let buffer = |v: &[f32]| Buffer::from_slice(device, v).unwrap();
            let (x, w, b, dy) = (buffer(&x), buffer(&w), buffer(&b), buffer(&dy));
            let mut y = Buffer::<f32>::uninitialised(device, n * out).unwrap();
            linear::forward(
                device,
                x.view(),
                w.view(),
                Some(b.view()),
                y.view_mut(),
                (inp, out),
            )
            .unwrap();
            let mut dx = buffer(&vec![1.0; n * inp]);
            linear::backward_input(
                device,
                dy.view(),
                w.view(),
                dx.view_mut(),
                (inp, out),
                Store::Add,
            )
            .unwrap();
            let (mut dw, mut db) = (
                Buffer::<f32>::uninitialised(device, out * inp).unwrap(),
                Buffer::<f32>::uninitialised(device, out).unwrap(),
            );
            let to_bias = Some(db.view_mut());
            linear::backward_weight(
                device,
                x.view(),
                dy.view(),
                dw.view_mut(),
                to_bias,
                (inp, out),
                Store::Replace,
            )
            .unwrap();
            vec![
                y.to_vec().unwrap(),
                dx.to_vec().unwrap(),
                dw.to_vec().unwrap(),
                db.to_vec().unwrap(),
            ]
        });
        let mut y = reference(|i, l| x[i * inp + l], |l, j| w[j * inp + l], (n, out, inp));
        y.iter_mut()
            .enumerate()
            .for_each(|(i, y)| *y += f64::from(b[i % out]));
        close("y", &results[0], &y, 1e-5);
        let mut dx = reference(|i, l| dy[i * out + l], |l, j| w[l * inp + j], (n, inp, out));
        dx.iter_mut().for_each(|v| *v += 1.0);
        close("dx", &results[1], &dx, 1e-5);
        let dw = reference(|i, l| dy[l * out + i], |l, j| x[l * inp + j], (out, inp, n));
        close("dw", &results[2], &dw, 2e-5);
        let db: Vec<f64> = (0..out)
            .map(|j| wide(&dy).iter().skip(j).step_by(out).sum())
            .collect();
        close("db", &results[3], &db, 1e-5);
    }
}

#[test]
fn what_does_not_fit_is_refused_before_the_launch() {
    on_device!();
    let device = device();
    let buffer = Buffer::from_slice(&device, &values(12, 1)).unwrap();
    let mut other = Buffer::<f32>::zeros(&device, 12).unwrap();
    assert!(matches!(
        Matrix::new(buffer.view(), 4, 4),
        Err(CudaError::Length {
            wanted: 16,
            got: 12,
            ..
        })
    ));
    assert!(Matrix::strided(buffer.view(), (usize::MAX, 2), usize::MAX, 1).is_err());
    assert!(MatrixMut::strided(other.view_mut(), (2, 4), 3).is_err());
    let a = Matrix::new(buffer.view(), 3, 4).unwrap();
    for (b, shape) in [(a, (3, 4)), (a.t(), (3, 4)), (a.t(), (2, 3))] {
        let c = MatrixMut::new(other.view_mut(), shape.0, shape.1).unwrap();
        assert!(matches!(
            run(&device, &[Job::new(a, b, c)]),
            Err(CudaError::Length { .. })
        ));
    }
    let c = MatrixMut::new(other.view_mut(), 3, 3).unwrap();
    let mut job = Job::new(a, a.t(), c);
    job.store = Store::Add;
    job.epilogue.then = Then::Gate(None);
    assert!(matches!(
        run(&device, &[job]),
        Err(CudaError::Setting { .. })
    ));
    run(&device, &[]).unwrap();
}

#[test]
fn views_that_begin_anywhere_give_the_bits_of_those_that_begin_at_the_buffers_start() {
    on_device!();
    // Four values are read at a time only where they begin at a multiple of sixteen bytes.
    let (m, n, k) = (40, 36, 24);
    let (a, b) = (values(m * k, 1), values(k * n, 2));
    let results = every_schedule(|device| {
        let mut all = Vec::new();
        for (skip_a, skip_b, skip_c) in [(0, 0, 0), (1, 0, 0), (0, 2, 0), (0, 0, 3), (3, 1, 2)] {
            let shifted = |v: &[f32], skip: usize| {
                Buffer::from_slice(device, &[&vec![9.0; skip][..], v].concat()).unwrap()
            };
            let (da, db) = (shifted(&a, skip_a), shifted(&b, skip_b));
            for tile in Tile::ALL {
                for (a_t, b_t) in [(false, false), (true, true)] {
                    let mut c = Buffer::<f32>::uninitialised(device, skip_c + m * n).unwrap();
                    let from = |buffer: &'_ Buffer<f32>, skip, len| -> Vec<f32> {
                        buffer
                            .view()
                            .range(skip..skip + len)
                            .unwrap()
                            .to_vec()
                            .unwrap()
                    };
                    let left = da.view().range(skip_a..skip_a + m * k).unwrap();
                    let right = db.view().range(skip_b..skip_b + k * n).unwrap();
                    let left = if a_t {
                        Matrix::new(left, k, m).unwrap().t()
                    } else {
                        Matrix::new(left, m, k).unwrap()
                    };
                    let right = if b_t {
                        Matrix::new(right, n, k).unwrap().t()
                    } else {
                        Matrix::new(right, k, n).unwrap()
                    };
                    let to =
                        MatrixMut::new(c.view_mut().range(skip_c..skip_c + m * n).unwrap(), m, n)
                            .unwrap();
                    run_with(device, &[Job::new(left, right, to)], Some(tile)).unwrap();
                    all.push(from(&c, skip_c, m * n));
                }
            }
        }
        all
    });
    for pair in results.chunks(2) {
        assert_eq!(pair, &results[..2]);
    }
    close(
        "product",
        &results[0],
        &reference(|i, l| a[i * k + l], |l, j| b[l * n + j], (m, n, k)),
        1e-5,
    );
}

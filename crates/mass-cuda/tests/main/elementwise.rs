use mass_cuda::kernels::{Dropout, Store, elementwise as e};
use mass_cuda::{Buffer, CudaError};

use super::emulator::{close, device, every_schedule, values, wide};

const LENGTHS: [usize; 6] = [0, 1, 255, 1024, 1025, 4099];

/// mass-model's mask, written anew.
fn factor(rate: f32, key: u64, i: u32) -> f32 {
    let mut h = i ^ key as u32;
    h = (h ^ (h >> 16)).wrapping_mul(0x7feb_352d) ^ (key >> 32) as u32;
    h = (h ^ (h >> 15)).wrapping_mul(0x846c_a68b);
    h ^= h >> 16;
    if ((h >> 8) as f32 / 16_777_216.0) < rate {
        0.0
    } else {
        1.0 / (1.0 - rate)
    }
}

#[test]
fn values_one_by_one() {
    on_device!();
    for n in LENGTHS {
        let (a, x) = (values(n, 1), values(n, 2));
        let results = every_schedule(|device| {
            let (da, dx) = (
                Buffer::from_slice(device, &a).unwrap(),
                Buffer::from_slice(device, &x).unwrap(),
            );
            let run = |f: &dyn Fn(mass_cuda::ViewMut<'_, f32>) -> Result<(), CudaError>,
                       from: Option<&Buffer<f32>>| {
                let mut y = from
                    .map_or_else(|| Buffer::uninitialised(device, n), Buffer::try_clone)
                    .unwrap();
                f(y.view_mut()).unwrap();
                y.to_vec().unwrap()
            };
            let add = Store::Add;
            vec![
                run(&|y| e::fill(device, 2.5, y), None),
                run(&|y| e::scale(device, -3.0, y), Some(&da)),
                run(&|y| e::add_scaled(device, 0.5, dx.view(), y), Some(&da)),
                run(&|y| e::add_into(device, dx.view(), y), Some(&da)),
                run(&|y| e::tanh_forward(device, dx.view(), y), None),
                run(
                    &|y| e::tanh_backward(device, da.view(), dx.view(), y, Store::Replace),
                    None,
                ),
                run(
                    &|y| e::tanh_backward(device, da.view(), dx.view(), y, add),
                    Some(&da),
                ),
                run(&|y| e::moving_average(device, 0.9, dx.view(), y), Some(&da)),
                run(&|y| e::running_mean(device, 0.25, dx.view(), y), Some(&da)),
            ]
        });
        let both = |f: &dyn Fn(f32, f32) -> f32| -> Vec<f32> {
            a.iter().zip(&x).map(|(&a, &x)| f(a, x)).collect()
        };
        assert_eq!(results[0], vec![2.5; n]);
        assert_eq!(results[1], both(&|a, _| a * -3.0));
        assert_eq!(results[2], both(&|a, x| a + 0.5 * x));
        assert_eq!(results[3], both(&|a, x| a + x));
        close(
            "tanh",
            &results[4],
            &wide(&x).iter().map(|x| x.tanh()).collect::<Vec<_>>(),
            1e-6,
        );
        assert_eq!(results[5], both(&|a, x| x * (1.0 - a * a)));
        assert_eq!(results[6], both(&|a, x| a + x * (1.0 - a * a)));
        let keep = 0.9_f32;
        assert_eq!(results[7], both(&|a, x| keep * a + (1.0 - keep) * x));
        assert_eq!(results[8], both(&|a, x| a + (x - a) * 0.25));
    }
}

#[test]
fn masks_are_those_of_the_host() {
    on_device!();
    for n in LENGTHS {
        let (a, x) = (values(n, 1), values(n, 2));
        for (rate, key) in [(0.1, 0x1234_5678_9abc_def0), (0.5, 7), (1.0, 3)] {
            let dropout = Some(Dropout { rate, key });
            let results = every_schedule(|device| {
                let (da, dx) = (
                    Buffer::from_slice(device, &a).unwrap(),
                    Buffer::from_slice(device, &x).unwrap(),
                );
                let empty = || Buffer::<f32>::uninitialised(device, n).unwrap();
                let (mut sum, mut plain, mut replaced, mut added) =
                    (empty(), empty(), empty(), da.try_clone().unwrap());
                e::sum(device, da.view(), dropout, dx.view(), sum.view_mut()).unwrap();
                e::sum(device, da.view(), None, dx.view(), plain.view_mut()).unwrap();
                e::masked(
                    device,
                    dropout,
                    dx.view(),
                    replaced.view_mut(),
                    Store::Replace,
                )
                .unwrap();
                e::masked(device, dropout, dx.view(), added.view_mut(), Store::Add).unwrap();
                [sum, plain, replaced, added]
                    .map(|b| b.to_vec().unwrap())
                    .to_vec()
            });
            let masked: Vec<f32> = (0..n).map(|i| x[i] * factor(rate, key, i as u32)).collect();
            let sum: Vec<f32> = a.iter().zip(&masked).map(|(a, m)| a + m).collect();
            if rate < 1.0 {
                assert_eq!(results[0], sum);
                assert_eq!(results[2], masked);
            } else {
                assert!(results[2].iter().all(|v| *v == 0.0));
            }
            assert_eq!(
                results[1],
                a.iter().zip(&x).map(|(a, x)| a + x).collect::<Vec<_>>()
            );
            assert_eq!(results[0], results[3]);
        }
    }
}

#[test]
fn columns_are_scaled() {
    on_device!();
    for (rows, cols) in [(0, 3), (1, 1), (7, 13), (100, 33)] {
        let (x, f, before) = (
            values(rows * cols, 1),
            values(cols, 2),
            values(rows * cols, 3),
        );
        let results = every_schedule(|device| {
            let buffer = |v: &[f32]| Buffer::from_slice(device, v).unwrap();
            let (x, f, mut y, mut z) = (
                buffer(&x),
                buffer(&f),
                buffer(&before),
                Buffer::uninitialised(device, rows * cols).unwrap(),
            );
            e::scale_columns(device, x.view(), f.view(), y.view_mut(), Store::Add).unwrap();
            e::scale_columns(device, x.view(), f.view(), z.view_mut(), Store::Replace).unwrap();
            vec![y.to_vec().unwrap(), z.to_vec().unwrap()]
        });
        for i in 0..rows * cols {
            assert_eq!(results[0][i], before[i] + x[i] * f[i % cols]);
            assert_eq!(results[1][i], x[i] * f[i % cols]);
        }
    }
}

#[test]
fn lengths_and_rates_are_checked() {
    on_device!();
    let device = device();
    let (x, mut y) = (
        Buffer::<f32>::zeros(&device, 4).unwrap(),
        Buffer::<f32>::zeros(&device, 5).unwrap(),
    );
    let wrong = CudaError::Length {
        what: "x",
        wanted: 5,
        got: 4,
    };
    assert_eq!(
        e::add_into(&device, x.view(), y.view_mut()),
        Err(wrong.clone())
    );
    assert_eq!(e::tanh_forward(&device, x.view(), y.view_mut()), Err(wrong));
    let other = Buffer::<f32>::zeros(&device, 5).unwrap();
    for rate in [0.0, -0.1, f32::NAN] {
        let dropout = Some(Dropout { rate, key: 1 });
        let refused = e::masked(&device, dropout, other.view(), y.view_mut(), Store::Replace);
        assert!(matches!(refused, Err(CudaError::Setting { .. })), "{rate}");
    }
    let second = mass_cuda::Device::open(0).unwrap();
    assert_eq!(
        e::fill(&second, 1.0, y.view_mut()),
        Err(CudaError::OtherDevice { what: "y" })
    );
}

#[test]
fn chains_of_multiply_adds_are_made() {
    on_device!();
    use mass_cuda::kernels::ceiling::{CHAINS, multiply_adds};
    let results = every_schedule(|device| {
        let mut y = Buffer::uninitialised(device, 512).unwrap();
        multiply_adds(device, 3, 0.5, y.view_mut()).unwrap();
        vec![y.to_vec().unwrap()]
    });
    for (i, y) in results[0].iter().enumerate() {
        let chain = |c: usize| (((i % 256 + c) as f32 * 0.5 + 1.0) * 0.5 + 1.0) * 0.5 + 1.0;
        assert_eq!(*y, (0..CHAINS).map(chain).sum::<f32>());
    }
    let device = device();
    let mut y = Buffer::<f32>::zeros(&device, 255).unwrap();
    assert!(matches!(
        multiply_adds(&device, 1, 0.5, y.view_mut()),
        Err(CudaError::Length { .. })
    ));
}

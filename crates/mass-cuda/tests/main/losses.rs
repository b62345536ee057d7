use mass_cuda::kernels::{Store, cross_entropy, squared_error};
use mass_cuda::{Buffer, CudaError};

use super::emulator::{close, device, every_schedule, values, wide};

#[test]
fn cross_entropy_and_its_gradient() {
    on_device!();
    for (rows, classes) in [(1, 1), (3, 2), (17, 50), (9, 257)] {
        let logits: Vec<f32> = values(rows * classes, 1).iter().map(|x| 20.0 * x).collect();
        let targets: Vec<u32> = (0..rows).map(|i| ((i * 7 + 1) % classes) as u32).collect();
        let results = every_schedule(|device| {
            let l = Buffer::from_slice(device, &logits).unwrap();
            let t = cross_entropy::Targets::new(device, &targets, classes).unwrap();
            let empty = |n| Buffer::<f32>::uninitialised(device, n).unwrap();
            let (mut probs, mut nll, mut d, mut mean) = (
                empty(rows * classes),
                empty(rows),
                empty(rows * classes),
                empty(1),
            );
            cross_entropy::forward(device, l.view(), &t, probs.view_mut(), nll.view_mut()).unwrap();
            cross_entropy::mean(device, nll.view(), mean.view_mut()).unwrap();
            cross_entropy::backward(device, probs.view(), &t, 0.5, d.view_mut(), Store::Replace)
                .unwrap();
            let mut added = Buffer::from_slice(device, &vec![1.0; rows * classes]).unwrap();
            cross_entropy::backward(device, probs.view(), &t, 0.5, added.view_mut(), Store::Add)
                .unwrap();
            [probs, nll, d, added, mean]
                .map(|b| b.to_vec().unwrap())
                .to_vec()
        });
        let (mut probs, mut nll, mut d) = (Vec::new(), Vec::new(), Vec::new());
        for (row, &t) in wide(&logits).chunks(classes).zip(&targets) {
            let max = row.iter().copied().fold(f64::MIN, f64::max);
            let total: f64 = row.iter().map(|x| (x - max).exp()).sum();
            nll.push(max + total.ln() - row[t as usize]);
            for (i, x) in row.iter().enumerate() {
                let p = (x - max).exp() / total;
                probs.push(p);
                d.push(0.5 * (p - f64::from(u8::from(i == t as usize))));
            }
        }
        close("probs", &results[0], &probs, 1e-6);
        close("nll", &results[1], &nll, 2e-6);
        close("gradient", &results[2], &d, 1e-6);
        close(
            "added",
            &results[3],
            &d.iter().map(|d| d + 1.0).collect::<Vec<_>>(),
            1e-6,
        );
        close(
            "mean",
            &results[4],
            &[nll.iter().sum::<f64>() / rows as f64],
            2e-6,
        );
    }
    let device = device();
    let wrong = cross_entropy::Targets::new(&device, &[0, 3, 9], 5).unwrap_err();
    assert_eq!(
        wrong,
        CudaError::Index {
            what: "class",
            index: 9,
            position: 2,
            len: 5
        }
    );
    let t = cross_entropy::Targets::new(&device, &[0, 3], 5).unwrap();
    let (l, mut p, mut n) = (
        Buffer::<f32>::zeros(&device, 9).unwrap(),
        Buffer::<f32>::zeros(&device, 10).unwrap(),
        Buffer::<f32>::zeros(&device, 2).unwrap(),
    );
    let refused = cross_entropy::forward(&device, l.view(), &t, p.view_mut(), n.view_mut());
    assert_eq!(
        refused,
        Err(CudaError::Length {
            what: "logits",
            wanted: 10,
            got: 9
        })
    );
}

#[test]
fn means_of_many_values() {
    on_device!();
    let x = values(300_001, 9);
    let results = every_schedule(|device| {
        let (x, mut mean) = (
            Buffer::from_slice(device, &x).unwrap(),
            Buffer::<f32>::uninitialised(device, 1).unwrap(),
        );
        cross_entropy::mean(device, x.view(), mean.view_mut()).unwrap();
        vec![mean.to_vec().unwrap()]
    });
    close(
        "mean",
        &results[0],
        &[wide(&x).iter().sum::<f64>() / x.len() as f64],
        1e-7,
    );
}

#[test]
fn squared_error_and_its_gradient() {
    on_device!();
    for n in [0, 1, 1500] {
        let (x, t) = (values(n, 1), values(n, 2));
        let results = every_schedule(|device| {
            let (x, t) = (
                Buffer::from_slice(device, &x).unwrap(),
                Buffer::from_slice(device, &t).unwrap(),
            );
            let empty = || Buffer::<f32>::uninitialised(device, n).unwrap();
            let (mut r, mut s, mut d) = (empty(), empty(), empty());
            squared_error::forward(device, x.view(), t.view(), r.view_mut(), s.view_mut()).unwrap();
            squared_error::backward(device, r.view(), 3.0, d.view_mut(), Store::Replace).unwrap();
            squared_error::backward(device, r.view(), 3.0, d.view_mut(), Store::Add).unwrap();
            vec![s.to_vec().unwrap(), d.to_vec().unwrap()]
        });
        let r: Vec<f32> = x.iter().zip(&t).map(|(x, t)| x - t).collect();
        assert_eq!(results[0], r.iter().map(|r| r * r).collect::<Vec<_>>());
        let share = |r: &f32| 3.0 * 2.0 * r / n as f32;
        assert_eq!(
            results[1],
            r.iter().map(|r| share(r) + share(r)).collect::<Vec<_>>()
        );
    }
}

/// As on the CPU, whose largest logit begins at minus infinity.
#[test]
fn rows_without_a_distribution_are_nan_and_others_are_not() {
    on_device!();
    let device = device();
    for classes in [1, 2, 31, 32, 33, 70] {
        // All masked by value, one that is not a number, one infinite, all but one masked, the lowest numbers, usual.
        let mut logits = vec![vec![0.5_f32; classes]; 6];
        logits[0].fill(f32::NEG_INFINITY);
        logits[1][classes - 1] = f32::NAN;
        logits[2][classes / 2] = f32::INFINITY;
        logits[3].fill(f32::NEG_INFINITY);
        logits[3][classes / 2] = -3.0;
        logits[4].fill(f32::MIN);
        let flat = logits.concat();
        let x = Buffer::from_slice(&device, &flat).unwrap();
        let at = vec![(classes / 2) as u32; 6];
        let targets = cross_entropy::Targets::new(&device, &at, classes).unwrap();
        let mut probs = Buffer::<f32>::zeros(&device, flat.len()).unwrap();
        let mut nll = Buffer::<f32>::zeros(&device, 6).unwrap();
        let sums = nll.view_mut();
        cross_entropy::forward(&device, x.view(), &targets, probs.view_mut(), sums).unwrap();
        let (probs, nll) = (probs.to_vec().unwrap(), nll.to_vec().unwrap());
        for (row, p) in probs.chunks(classes).enumerate() {
            let wrong = row < 3;
            assert_eq!(nll[row].is_nan(), wrong, "{classes} classes, row {row}");
            assert!(
                p.iter().all(|p| p.is_nan() == wrong),
                "{classes} classes, row {row}: {p:?}"
            );
            let sum: f32 = p.iter().sum();
            assert!(
                wrong || (sum - 1.0).abs() < 1e-5,
                "{classes} classes, row {row}: {sum}"
            );
        }
        assert_eq!((probs[3 * classes + classes / 2], nll[3]), (1.0, 0.0));
    }
}

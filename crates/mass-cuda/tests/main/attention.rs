use mass_cuda::kernels::attention::{self, AttentionShape, Sequences, backward, forward};
use mass_cuda::kernels::{Dropout, Store};
use mass_cuda::{Buffer, CudaError};

use super::emulator::{close, device, every_schedule, values, wide};

fn factor(dropout: Option<Dropout>, i: u32) -> f64 {
    let Some(Dropout { rate, key }) = dropout else {
        return 1.0;
    };
    let mut h = i ^ key as u32;
    h = (h ^ (h >> 16)).wrapping_mul(0x7feb_352d) ^ (key >> 32) as u32;
    h = (h ^ (h >> 15)).wrapping_mul(0x846c_a68b);
    h ^= h >> 16;
    if ((h >> 8) as f32 / 16_777_216.0) < rate {
        0.0
    } else {
        1.0 / f64::from(1.0 - rate)
    }
}

/// Output and gradient by the definition, positions of dropout as mass-model counts them.
fn reference(
    qkv: &[f64],
    dy: &[f64],
    offsets: &[usize],
    keys: Option<&[bool]>,
    shape: AttentionShape,
) -> (Vec<f64>, Vec<f64>) {
    let AttentionShape {
        heads,
        dim,
        causal,
        dropout,
    } = shape;
    let (width, rows) = (dim / heads, offsets[offsets.len() - 1]);
    let scale = 1.0 / (width as f64).sqrt();
    let (mut y, mut d) = (vec![0.0; rows * dim], vec![0.0; rows * 3 * dim]);
    let mut position = 0_u32;
    for w in offsets.windows(2) {
        let (start, n) = (w[0], w[1] - w[0]);
        for h in 0..heads {
            let at = |row: usize, part: usize, c: usize| {
                (start + row) * 3 * dim + part * dim + h * width + c
            };
            for i in 0..n {
                let sees = |j: usize| (!causal || j <= i) && keys.is_none_or(|k| k[start + j]);
                let score = |j: usize| {
                    scale
                        * (0..width)
                            .map(|c| qkv[at(i, 0, c)] * qkv[at(j, 1, c)])
                            .sum::<f64>()
                };
                let scores: Vec<f64> = (0..n)
                    .map(|j| if sees(j) { score(j) } else { f64::NEG_INFINITY })
                    .collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                if max == f64::NEG_INFINITY {
                    continue;
                }
                let total: f64 = scores.iter().map(|s| (s - max).exp()).sum();
                let p: Vec<f64> = scores.iter().map(|s| (s - max).exp() / total).collect();
                let first = position.wrapping_add((h * n * n + i * n) as u32);
                let f: Vec<f64> = (0..n)
                    .map(|j| factor(dropout, first.wrapping_add(j as u32)))
                    .collect();
                let out = (start + i) * dim + h * width;
                let mut dp = vec![0.0; n];
                for j in 0..n {
                    for c in 0..width {
                        y[out + c] += p[j] * f[j] * qkv[at(j, 2, c)];
                        d[at(j, 2, c)] += p[j] * f[j] * dy[out + c];
                        dp[j] += f[j] * dy[out + c] * qkv[at(j, 2, c)];
                    }
                }
                let inner: f64 = dp.iter().zip(&p).map(|(d, p)| d * p).sum();
                for j in 0..n {
                    let ds = scale * p[j] * (dp[j] - inner);
                    for c in 0..width {
                        d[at(i, 0, c)] += ds * qkv[at(j, 1, c)];
                        d[at(j, 1, c)] += ds * qkv[at(i, 0, c)];
                    }
                }
            }
        }
        position = position.wrapping_add((heads * n * n) as u32);
    }
    (y, d)
}

fn check(offsets: &[usize], keys: Option<&[bool]>, shape: AttentionShape) {
    let AttentionShape { heads, dim, .. } = shape;
    let rows = offsets[offsets.len() - 1];
    let qkv: Vec<f32> = values(rows * 3 * dim, 1).iter().map(|x| 2.0 * x).collect();
    let dy = values(rows * dim, 2);
    let results = every_schedule(|device| {
        let (x, dy) = (
            Buffer::from_slice(device, &qkv).unwrap(),
            Buffer::from_slice(device, &dy).unwrap(),
        );
        let sequences = Sequences::new(device, offsets, keys).unwrap();
        let empty = |n| Buffer::<f32>::uninitialised(device, n).unwrap();
        let (mut y, mut kept, mut d) = (
            empty(rows * dim),
            empty(rows * heads * 2),
            empty(rows * 3 * dim),
        );
        forward(
            device,
            x.view(),
            &sequences,
            shape,
            y.view_mut(),
            kept.view_mut(),
        )
        .unwrap();
        let mut added = Buffer::from_slice(device, &vec![0.5; rows * 3 * dim]).unwrap();
        for (to, store) in [(&mut d, Store::Replace), (&mut added, Store::Add)] {
            backward(
                device,
                x.view(),
                &sequences,
                shape,
                y.view(),
                kept.view(),
                dy.view(),
                (to.view_mut(), store),
            )
            .unwrap();
        }
        [y, d, added].map(|b| b.to_vec().unwrap()).to_vec()
    });
    let (y, d) = reference(&wide(&qkv), &wide(&dy), offsets, keys, shape);
    close("y", &results[0], &y, 1e-5);
    close("gradient", &results[1], &d, 3e-5);
    assert!(
        results[2]
            .iter()
            .zip(&results[1])
            .all(|(a, d)| (a - 0.5 - d).abs() < 1e-5 * d.abs().max(1.0))
    );
}

#[test]
fn ragged_sequences_masks_and_dropout() {
    on_device!();
    let offsets = [0, 1, 1, 38, 138, 141];
    let mut keys: Vec<bool> = (0..141).map(|i| i % 5 != 2).collect();
    keys[138..].fill(false);
    for mask in [None, Some(&keys[..])] {
        for (causal, dropout) in [
            (false, None),
            (true, None),
            (
                true,
                Some(Dropout {
                    rate: 0.2,
                    key: 0xdead_beef_0bad_cafe,
                }),
            ),
        ] {
            check(
                &offsets,
                mask,
                AttentionShape {
                    heads: 3,
                    dim: 15,
                    causal,
                    dropout,
                },
            );
        }
    }
}

#[test]
fn every_width_of_head() {
    on_device!();
    for width in [1, 16, 17, 32, 40, 64, 65, 128, 129, 192, 250, 256] {
        for causal in [false, true] {
            check(
                &[0, 70, 71],
                None,
                AttentionShape {
                    heads: 2,
                    dim: 2 * width,
                    causal,
                    dropout: None,
                },
            );
        }
    }
}

#[test]
fn what_makes_no_sense_is_refused() {
    on_device!();
    let device = device();
    for offsets in [&[][..], &[1, 2], &[0, 3, 2]] {
        assert!(matches!(
            Sequences::new(&device, offsets, None),
            Err(CudaError::Setting { .. })
        ));
    }
    assert!(matches!(
        Sequences::new(&device, &[0, 3], Some(&[true; 2])),
        Err(CudaError::Length { .. })
    ));
    let sequences = Sequences::new(&device, &[0, 3], None).unwrap();
    let (x, mut y, mut kept) = (
        Buffer::<f32>::zeros(&device, 36).unwrap(),
        Buffer::<f32>::zeros(&device, 12).unwrap(),
        Buffer::<f32>::zeros(&device, 12).unwrap(),
    );
    let shape = |heads, dim| AttentionShape {
        heads,
        dim,
        causal: false,
        dropout: None,
    };
    let mut run = |shape| {
        forward(
            &device,
            x.view(),
            &sequences,
            shape,
            y.view_mut(),
            kept.view_mut(),
        )
    };
    assert!(matches!(run(shape(3, 4)), Err(CudaError::Setting { .. })));
    assert!(matches!(run(shape(0, 4)), Err(CudaError::Setting { .. })));
    assert!(matches!(
        run(shape(1, 257)),
        Err(CudaError::TooLarge {
            got: 257,
            most: 256,
            ..
        })
    ));
    assert!(matches!(run(shape(2, 6)), Err(CudaError::Length { .. })));
    run(shape(2, 4)).unwrap();
}

/// As on the CPU: what a diverged model computes must not look like a result.
#[test]
fn a_value_that_is_not_a_number_is_not_one_that_is_not_seen() {
    on_device!();
    let (n, dim) = (5, 8);
    let shape = AttentionShape {
        heads: 1,
        dim,
        causal: true,
        dropout: None,
    };
    // In the query of row 1, and in the key of row 3, which rows 3 and 4 see.
    for (at, wrong) in [(3 * dim + 2, [1].as_slice()), (9 * dim + dim + 2, &[3, 4])] {
        let mut qkv = values(n * 3 * dim, 1);
        qkv[at] = f32::NAN;
        every_schedule(|device| {
            let x = Buffer::from_slice(device, &qkv).unwrap();
            let sequences = Sequences::new(device, &[0, n], None).unwrap();
            let empty = |n| Buffer::<f32>::uninitialised(device, n).unwrap();
            let (mut y, mut kept) = (empty(n * dim), empty(n * 2));
            let (to, sums) = (y.view_mut(), kept.view_mut());
            forward(device, x.view(), &sequences, shape, to, sums).unwrap();
            let y = y.to_vec().unwrap();
            for (row, y) in y.chunks(dim).enumerate() {
                assert_eq!(y[0].is_nan(), wrong.contains(&row), "row {row}: {y:?}");
            }
            vec![vec![0.0]]
        });
    }
}

/// Scores of minus infinity: a row that sees nothing else has no distribution, whatever comes in other tiles; among others
/// they count for nothing. A row that sees no key gives zeros.
#[test]
fn rows_of_which_every_score_is_minus_infinity_are_nan() {
    on_device!();
    let dim = 8;
    for (n, first_seen) in [(3, 2), (150, 100), (200, 3)] {
        let shape = AttentionShape {
            heads: 1,
            dim,
            causal: true,
            dropout: None,
        };
        // Queries of ones; keys whose product with them overflows before `first_seen`, except for row 1, which may not be
        // attended to, nor may row 0.
        let mut qkv = values(n * 3 * dim, 3);
        for (row, values) in qkv.chunks_mut(3 * dim).enumerate() {
            values[..dim].fill(1.0);
            if row < first_seen {
                values[dim..2 * dim].fill(-1e38);
            }
        }
        for masked in [false, true] {
            let keys: Vec<bool> = (0..n)
                .map(|row| !masked || row >= first_seen.min(2))
                .collect();
            let results = every_schedule(|device| {
                let x = Buffer::from_slice(device, &qkv).unwrap();
                let sequences = Sequences::new(device, &[0, n], masked.then_some(&keys)).unwrap();
                let empty = |n| Buffer::<f32>::uninitialised(device, n).unwrap();
                let (mut y, mut kept, mut d) = (empty(n * dim), empty(2 * n), empty(3 * n * dim));
                let (to, sums) = (y.view_mut(), kept.view_mut());
                attention::forward(device, x.view(), &sequences, shape, to, sums).unwrap();
                attention::backward(
                    device,
                    x.view(),
                    &sequences,
                    shape,
                    y.view(),
                    kept.view(),
                    y.view(),
                    (d.view_mut(), Store::Replace),
                )
                .unwrap();
                let (y, d) = (y.to_vec().unwrap(), d.to_vec().unwrap());
                // Marked, because no NaN may come out of a run.
                let mark = |v: &[f32]| {
                    v.iter()
                        .map(|v| if v.is_nan() { 9e9 } else { *v })
                        .collect()
                };
                vec![mark(&y), mark(&d)]
            });
            for (row, y) in results[0].chunks(dim).enumerate() {
                let blind = !keys[..=row].contains(&true);
                let nothing = row < first_seen && !blind;
                let queries = &results[1][3 * row * dim..][..dim];
                assert!(
                    y.iter().all(|v| (*v == 9e9) == nothing),
                    "{n} {masked} {row}: {y:?}"
                );
                assert!(
                    queries.iter().all(|v| (*v == 9e9) == nothing),
                    "{n} {masked} {row}"
                );
                assert!(!blind || y == [0.0; 8], "{n} {masked} {row}: {y:?}");
            }
        }
    }
}

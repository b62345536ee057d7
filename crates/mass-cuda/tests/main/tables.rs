use mass_cuda::kernels::embedding::{self, Index};
use mass_cuda::kernels::patches::{self, Interpolation};
use mass_cuda::kernels::{Store, rows};
use mass_cuda::{Buffer, CudaError};

use super::emulator::{close, device, every_schedule, values, wide};

#[test]
fn embeddings_forward_and_backward() {
    on_device!();
    for (entries, d, n) in [(1, 1, 1), (7, 33, 300), (50, 300, 129), (3, 8, 0)] {
        let (table, other) = (values(entries * d, 1), values(entries * d, 2));
        let dy = values(n * d, 3);
        let ids: Vec<u32> = (0..n).map(|i| ((i * i + 3 * i) % entries) as u32).collect();
        let results = every_schedule(|device| {
            let buffer = |v: &[f32]| Buffer::from_slice(device, v).unwrap();
            let (t, o, dy) = (buffer(&table), buffer(&other), buffer(&dy));
            let index = Index::new(device, &ids, entries).unwrap();
            assert_eq!((index.len(), index.ids().len()), (n, n));
            let mut y = Buffer::<f32>::uninitialised(device, n * d).unwrap();
            embedding::forward(device, t.view(), &index, y.view_mut(), Store::Replace).unwrap();
            embedding::forward(device, o.view(), &index, y.view_mut(), Store::Add).unwrap();
            let mut dt = buffer(&vec![1.0; entries * d]);
            embedding::backward(device, dy.view(), &index, dt.view_mut()).unwrap();
            vec![y.to_vec().unwrap(), dt.to_vec().unwrap()]
        });
        let mut dt = vec![1.0; entries * d];
        for i in 0..n * d {
            let at = ids[i / d] as usize * d + i % d;
            assert_eq!(results[0][i], table[at] + other[at]);
            dt[at] += f64::from(dy[i]);
        }
        close("gradient of the table", &results[1], &dt, 1e-5);
    }
    let device = device();
    let wrong = Index::new(&device, &[0, 4], 4).unwrap_err();
    assert_eq!(
        wrong,
        CudaError::Index {
            what: "row of a table",
            index: 4,
            position: 1,
            len: 4
        }
    );
    let index = Index::new(&device, &[0, 3], 4).unwrap();
    let (t, mut y) = (
        Buffer::<f32>::zeros(&device, 8).unwrap(),
        Buffer::<f32>::zeros(&device, 5).unwrap(),
    );
    assert!(matches!(
        embedding::forward(&device, t.view(), &index, y.view_mut(), Store::Replace),
        Err(CudaError::Length { .. })
    ));
    let t = Buffer::<f32>::zeros(&device, 9).unwrap();
    assert!(matches!(
        embedding::forward(&device, t.view(), &index, y.view_mut(), Store::Replace),
        Err(CudaError::Length { .. })
    ));
}

#[test]
fn rows_are_gathered_with_weights() {
    on_device!();
    let (n, cols) = (37, 19);
    let (x, w) = (values(10 * cols, 1), values(n, 2));
    let picked: Vec<u32> = (0..n).map(|i| (i * 7 % 10) as u32).collect();
    let results = every_schedule(|device| {
        let (x, w) = (
            Buffer::from_slice(device, &x).unwrap(),
            Buffer::from_slice(device, &w).unwrap(),
        );
        let picked = Buffer::from_slice(device, &picked).unwrap();
        let empty = || Buffer::<f32>::uninitialised(device, n * cols).unwrap();
        let (mut y, mut z) = (empty(), empty());
        rows::gather(device, x.view(), picked.view(), None, y.view_mut(), cols).unwrap();
        rows::gather(
            device,
            x.view(),
            picked.view(),
            Some(w.view()),
            z.view_mut(),
            cols,
        )
        .unwrap();
        vec![y.to_vec().unwrap(), z.to_vec().unwrap()]
    });
    for i in 0..n * cols {
        let v = x[picked[i / cols] as usize * cols + i % cols];
        assert_eq!((results[0][i], results[1][i]), (v, v * w[i / cols]));
    }
}

#[test]
fn tokens_of_images_forward_and_backward() {
    on_device!();
    for (images, patches, places, d) in [(3, 6, 4, 17), (2, 4, 4, 64), (0, 2, 2, 3)] {
        let taps: Vec<Vec<(usize, f32)>> = (0..patches)
            .map(|i| {
                (0..1 + i % 3)
                    .map(|t| ((i * 2 + t) % places, 0.3 * (t + 1) as f32 - 0.2))
                    .collect()
            })
            .collect();
        let (embedded, class, positions) = (
            values(images * patches * d, 1),
            values(d, 2),
            values((1 + places) * d, 3),
        );
        let tokens = images * (1 + patches) * d;
        let dy = values(tokens, 4);
        let results = every_schedule(|device| {
            let buffer = |v: &[f32]| Buffer::from_slice(device, v).unwrap();
            let grid = Interpolation::new(device, &taps, places).unwrap();
            let (e, c, p, dy) = (
                buffer(&embedded),
                buffer(&class),
                buffer(&positions),
                buffer(&dy),
            );
            let mut y = Buffer::<f32>::uninitialised(device, tokens).unwrap();
            patches::forward(device, e.view(), c.view(), p.view(), &grid, y.view_mut()).unwrap();
            let (mut dc, mut dp) = (buffer(&vec![1.0; d]), buffer(&vec![2.0; (1 + places) * d]));
            let mut de = Buffer::<f32>::uninitialised(device, images * patches * d).unwrap();
            patches::backward(
                device,
                dy.view(),
                &grid,
                (de.view_mut(), Store::Replace),
                dc.view_mut(),
                dp.view_mut(),
            )
            .unwrap();
            vec![
                y.to_vec().unwrap(),
                de.to_vec().unwrap(),
                dc.to_vec().unwrap(),
                dp.to_vec().unwrap(),
            ]
        });
        let (mut y, mut de) = (vec![0.0; tokens], vec![0.0; images * patches * d]);
        let (mut dc, mut dp) = (vec![1.0; d], vec![2.0; (1 + places) * d]);
        let (class, positions, embedded, dy) =
            (wide(&class), wide(&positions), wide(&embedded), wide(&dy));
        for image in 0..images {
            for row in 0..=patches {
                for col in 0..d {
                    let at = (image * (1 + patches) + row) * d + col;
                    if row == 0 {
                        y[at] = class[col] + positions[col];
                        dc[col] += dy[at];
                        dp[col] += dy[at];
                        continue;
                    }
                    let patch = (image * patches + row - 1) * d + col;
                    y[at] = embedded[patch];
                    de[patch] = dy[at];
                    for &(place, w) in &taps[row - 1] {
                        y[at] += f64::from(w) * positions[(1 + place) * d + col];
                        dp[(1 + place) * d + col] += f64::from(w) * dy[at];
                    }
                }
            }
        }
        close("tokens", &results[0], &y, 1e-6);
        close("patches", &results[1], &de, 1e-6);
        close("class", &results[2], &dc, 1e-5);
        close("positions", &results[3], &dp, 1e-5);
    }
    let wrong = Interpolation::new(&device(), &[vec![(2, 1.0)]], 2).unwrap_err();
    assert_eq!(
        wrong,
        CudaError::Index {
            what: "place of a patch",
            index: 2,
            position: 0,
            len: 2
        }
    );
    for weight in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        assert!(matches!(
            Interpolation::new(&device(), &[vec![(0, 1.0), (1, weight)]], 2),
            Err(CudaError::Setting { .. })
        ));
    }
}

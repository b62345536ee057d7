//! Against sums in double precision; the same bits however the product is cut.

use super::*;

fn values(n: usize, seed: u64) -> Vec<f32> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = |_| {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        (x >> 40) as f32 / 8_388_608.0 - 1.0
    };
    (0..n).map(next).collect()
}

/// A matrix in a slice of exactly its size, as it lies or stored transposed, rows `pad` further apart than they must be.
struct Stored {
    data: Vec<f32>,
    size: (usize, usize),
    stride: usize,
    transposed: bool,
}

impl Stored {
    fn new((rows, cols): (usize, usize), transposed: bool, pad: usize, seed: u64) -> Self {
        let (outer, inner) = if transposed {
            (cols, rows)
        } else {
            (rows, cols)
        };
        let len = outer.saturating_sub(1) * (inner + pad) + inner;
        Self {
            data: values(len, seed),
            size: (rows, cols),
            stride: inner + pad,
            transposed,
        }
    }

    fn view(&self) -> Mat<'_> {
        let (rows, cols) = self.size;
        match self.transposed {
            true => Mat::strided(&self.data, cols, rows, self.stride).t(),
            false => Mat::strided(&self.data, rows, cols, self.stride),
        }
    }

    fn at(&self, i: usize, j: usize) -> f64 {
        let at = match self.transposed {
            true => j * self.stride + i,
            false => i * self.stride + j,
        };
        f64::from(self.data[at])
    }
}

/// Every way there is on this processor.
fn levels() -> Vec<Option<Level>> {
    let mut levels = vec![None];
    #[cfg(target_arch = "x86_64")]
    {
        levels.extend(avx512::Avx512::detect().map(|isa| Some(Level::Avx512(isa))));
        levels.extend(avx2::Avx2::detect().map(|isa| Some(Level::Avx2(isa))));
    }
    levels
}

/// The result, with the row sums of a transposed `a`.
fn compute(
    level: Option<Level>,
    (a, b): (Mat<'_>, Mat<'_>),
    (scale, bias, store): (f32, Option<&[f32]>, Store),
    before: f32,
) -> (Vec<f32>, Vec<f32>) {
    let (m, n) = (a.shape().0, b.shape().1);
    let mut sums = vec![0.25; m];
    let mut c = vec![before; m * n];
    let extras = Extras {
        scale,
        store,
        bias,
        sums: a.layout().2.then_some(&mut sums[..]),
    };
    run_on(
        level,
        Destination::Matrix(MatMut::new(&mut c, m, n)),
        (a, b),
        extras,
        |_| {},
        |_| {},
    );
    (c, sums)
}

/// Rows, columns and steps: primes, whole tiles and one more, beyond a chain and a block.
const SIZES: [(usize, usize, usize); 15] = [
    (1, 1, 1),
    (1, 33, 7),
    (2, 5, 600),
    (13, 31, 17),
    (14, 32, 16),
    (6, 64, 40),
    (5, 47, 31),
    (7, 129, 9),
    (15, 97, 64),
    (29, 16, 129),
    (6, 15, 515),
    (37, 130, 512),
    (97, 8, 1031),
    (5, 300, 2053),
    (4099, 3, 5),
];

/// Those that do not take hours where they are run.
fn sizes() -> &'static [(usize, usize, usize)] {
    &SIZES[..if cfg!(miri) { 8 } else { SIZES.len() }]
}

#[test]
fn every_layout_agrees_with_sums_in_double_precision() {
    for &(m, n, k) in sizes() {
        for case in 0..16 {
            let [ta, tb, add, biased] = [1, 2, 4, 8].map(|bit| case & bit != 0);
            let pad = case % 3;
            let a = Stored::new((m, k), ta, pad, 1);
            let b = Stored::new((k, n), tb, pad, 2);
            let bias = values(n, 3);
            let bias = biased.then_some(&bias[..]);
            let store = if add { Store::Add } else { Store::Replace };
            let scale = if case % 5 == 0 { 1.0 } else { -0.5 };
            for level in levels() {
                let (c, sums) = compute(level, (a.view(), b.view()), (scale, bias, store), 0.75);
                for i in (0..m).step_by(1 + m / 40) {
                    for j in (0..n).step_by(1 + n / 40) {
                        let product: f64 = (0..k).map(|p| a.at(i, p) * b.at(p, j)).sum();
                        let want = f64::from(scale) * product
                            + bias.map_or(0.0, |b| f64::from(b[j]))
                            + if add { 0.75 } else { 0.0 };
                        let got = f64::from(c[i * n + j]);
                        assert!(
                            (got - want).abs() < 1e-4,
                            "{m} {n} {k} {case} ({i}, {j}): {got} {want}"
                        );
                    }
                    if a.view().layout().2 {
                        let want: f64 = 0.25 + (0..k).map(|p| a.at(i, p)).sum::<f64>();
                        assert!(
                            (f64::from(sums[i]) - want).abs() < 1e-4,
                            "sum {i} of {m} {k}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn sizes_of_zero_are_empty_sums_and_empty_products() {
    for (m, n, k) in [(0, 5, 3), (4, 0, 3), (4, 5, 0), (0, 0, 0)] {
        for (store, before) in [(Store::Replace, 0.0), (Store::Add, 0.75)] {
            let a = Stored::new((m, k), false, 0, 1);
            let b = Stored::new((k, n), true, 0, 2);
            let bias = values(n, 3);
            let mut c = vec![0.75; m * n];
            let extras = Extras {
                store,
                bias: Some(&bias),
                ..Extras::default()
            };
            let to = MatMut::new(&mut c, m, n);
            product(to, a.view(), b.view(), extras, |_| {});
            for (i, c) in c.iter().enumerate() {
                assert_eq!(*c, before + bias[i % n], "{m} {n} {k}");
            }
        }
    }
}

#[test]
fn both_instruction_sets_and_every_cut_give_the_same_bits() {
    let sets: Vec<Level> = levels().into_iter().flatten().collect();
    let (m, n, k) = if cfg!(miri) {
        (19, 65, 40)
    } else {
        (133, 217, 1500)
    };
    let bits = |c: &[f32]| c.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    for (ta, tb) in [(false, false), (false, true), (true, false), (true, true)] {
        let a = Stored::new((m, k), ta, 0, 1);
        let b = Stored::new((k, n), tb, 0, 2);
        let bias = values(n, 3);
        let how = (0.3, Some(&bias[..]), Store::Add);
        let mut first: Option<(Vec<u32>, Vec<u32>)> = None;
        for &level in &sets {
            let (c, sums) = compute(Some(level), (a.view(), b.view()), how, 0.5);
            let got = (bits(&c), bits(&sums));
            assert!(
                *first.get_or_insert(got.clone()) == got,
                "instruction sets differ"
            );
            // One row and one column at a time, through views of the same matrices.
            for (i, j) in [(0, 0), (5, 31), (m / 2, 32), (m - 1, n - 1)] {
                let row = match ta {
                    true => Mat::strided(&a.data[i..], k, 1, m).t(),
                    false => Mat::new(&a.data[i * k..][..k], 1, k),
                };
                let column = match tb {
                    true => Mat::new(&b.data[j * k..][..k], 1, k).t(),
                    false => Mat::strided(&b.data[j..], k, 1, n),
                };
                let how = (0.3, Some(&bias[j..=j]), Store::Add);
                let (one, _) = compute(Some(level), (row, column), how, 0.5);
                assert_eq!(
                    one[0].to_bits(),
                    c[i * n + j].to_bits(),
                    "{ta} {tb} ({i}, {j})"
                );
            }
        }
    }
}

#[test]
fn parts_that_are_not_kept_are_the_product_and_cover_it_once() {
    for &(m, n, k) in sizes() {
        let (a, b) = (
            Stored::new((m, k), false, 1, 1),
            Stored::new((k, n), true, 0, 2),
        );
        for level in levels() {
            let mut seen = vec![None; m * n];
            let mut announced = Vec::new();
            run_on(
                level,
                Destination::Panels,
                (a.view(), b.view()),
                Extras::default(),
                |part| announced.push((part.rows.clone(), part.cols.clone())),
                |mut done| {
                    let cols = done.part.cols.clone();
                    for (i, row) in done.rows() {
                        for (j, x) in cols.clone().zip(row) {
                            assert!(seen[i * n + j].replace(*x).is_none(), "({i}, {j}) twice");
                        }
                    }
                },
            );
            assert!(!announced.is_empty());
            let worst = (0..m * n).step_by(1 + m * n / 500).map(|at| {
                let want: f64 = (0..k).map(|p| a.at(at / n, p) * b.at(p, at % n)).sum();
                (f64::from(seen[at].expect("every element is seen")) - want).abs()
            });
            assert!(worst.fold(0.0, f64::max) < 1e-4, "{m} {n} {k}");
        }
    }
}

#[test]
fn a_product_may_be_made_while_another_tells_of_its_parts() {
    let (a, b) = (
        Stored::new((20, 30), false, 0, 1),
        Stored::new((30, 40), false, 0, 2),
    );
    let (alone, _) = compute(
        *LEVEL,
        (a.view(), b.view()),
        (1.0, None, Store::Replace),
        0.0,
    );
    let mut outer = vec![0.0; 20 * 40];
    product(
        MatMut::new(&mut outer, 20, 40),
        a.view(),
        b.view(),
        Extras::default(),
        |_| {
            let (inner, _) = compute(
                *LEVEL,
                (a.view(), b.view()),
                (1.0, None, Store::Replace),
                0.0,
            );
            assert_eq!(inner, alone);
        },
    );
    assert_eq!(outer, alone);
}

#[test]
fn rows_are_kept_off_each_other_s_sets() {
    assert_eq!([32, 255, 384].map(row_stride), [32, 255, 384]);
    assert_eq!(
        [256, 512, 1024, 1536].map(row_stride),
        [272, 528, 1040, 1552]
    );
}

#[test]
#[should_panic(expected = "a tile leaves its slices")]
fn a_tile_that_leaves_its_slices_is_refused() {
    let data = [0.0; 64];
    let tile = Tile {
        k: 2,
        rows: 3,
        cols: 1,
        a: &data[..5],
        lda: usize::MAX / 2,
        packed: false,
        b: &data,
        ldc: 1,
        scale: 1.0,
        bias: None,
        add: false,
    };
    tile.check(&[0.0; 3], 14, 32);
}

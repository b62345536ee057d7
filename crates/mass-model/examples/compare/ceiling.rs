//! What the processor can do at most, to hold a layer's throughput against.

use std::hint::black_box;
use std::time::Instant;

use mass_model::kernels::gemm::{Mat, MatMut, Store, gemm};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use crate::timing::Quartiles;

const RUNS: usize = 9;

/// Both ceilings in GFLOP/s, on all threads.
#[derive(Clone, Copy)]
pub(crate) struct Ceilings {
    /// Fused multiply-adds on registers: nothing can be faster.
    pub(crate) multiply_adds: f64,
    /// Plain products of one expert's size.
    pub(crate) products: f64,
}

impl Ceilings {
    pub(crate) fn measure(rows: usize, dim: usize, hidden: usize, experts: usize) -> Self {
        Self {
            multiply_adds: multiply_adds(),
            products: products(rows, dim, hidden, experts),
        }
    }

    /// The higher of two measurements, each for itself.
    pub(crate) fn max(self, other: Self) -> Self {
        Self {
            multiply_adds: self.multiply_adds.max(other.multiply_adds),
            products: self.products.max(other.products),
        }
    }
}

/// The best of the three layouts, each the median of its runs.
fn products(rows: usize, dim: usize, hidden: usize, experts: usize) -> f64 {
    let (a, b, c) = (
        vec![0.5f32; rows * dim],
        vec![0.5f32; hidden * dim],
        vec![0.5f32; rows * hidden],
    );
    let flops = (2 * rows * dim * hidden * experts) as f64;
    type Product<'a> = &'a (dyn Fn(&mut [f32]) + Sync);
    let rate = |len: usize, product: Product<'_>| {
        let mut out = vec![vec![0.0f32; len]; experts];
        let times = (0..RUNS).map(|_| {
            let start = Instant::now();
            out.par_iter_mut()
                .with_max_len(1)
                .for_each(|out| product(out));
            start.elapsed().as_secs_f64()
        });
        flops / Quartiles::of(times.collect()).median() / 1e9
    };
    let (x, w, y) = (
        Mat::new(&a, rows, dim),
        Mat::new(&b, hidden, dim),
        Mat::new(&c, rows, hidden),
    );
    let products: [(usize, Product<'_>); 3] = [
        (rows * hidden, &|out| {
            let out = MatMut::new(out, rows, hidden);
            gemm(out, x, w.t(), 1.0, Store::Replace);
        }),
        (rows * dim, &|out| {
            let out = MatMut::new(out, rows, dim);
            gemm(out, y, w, 1.0, Store::Replace);
        }),
        (hidden * dim, &|out| {
            let out = MatMut::new(out, hidden, dim);
            gemm(out, y.t(), x, 1.0, Store::Replace);
        }),
    ];
    products
        .into_iter()
        .map(|(len, product)| rate(len, product))
        .fold(0.0, f64::max)
}

/// The median of the runs.
fn multiply_adds() -> f64 {
    let times = (0..RUNS).map(|_| {
        let start = Instant::now();
        // Each thread makes the same number, and the slowest counts.
        let made = rayon::broadcast(|_| Arch::new().dispatch(Chains { steps: 1 << 20 }));
        let flops = 2.0 * made.iter().sum::<f64>();
        start.elapsed().as_secs_f64() / flops
    });
    1e-9 / Quartiles::of(times.collect()).median()
}

/// Chains of multiply-adds on the widest vectors that the kernels use; gives how many numbers were multiplied and added.
struct Chains {
    steps: usize,
}

impl WithSimd for Chains {
    type Output = f64;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f64 {
        // Two units with a latency of four or five cycles are busy from ten chains on. AVX2 has 16 registers: twelve for chains leave
        // room for both operands. Where vectors are longer or shorter there are 32 registers, or no fused instruction.
        if S::F32_LANES == 8 {
            chains::<S, 12>(simd, self.steps)
        } else {
            chains::<S, 16>(simd, self.steps)
        }
    }
}

#[inline(always)]
fn chains<S: Simd, const N: usize>(simd: S, steps: usize) -> f64 {
    // Values tend to 2, far from what is slow to compute with.
    let factor = simd.splat_f32s(black_box(0.5));
    let term = simd.splat_f32s(black_box(1.0));
    let mut sums = [term; N];
    for _ in 0..steps {
        for sum in &mut sums {
            *sum = simd.mul_add_e_f32s(*sum, factor, term);
        }
    }
    black_box(sums.map(|sum| simd.reduce_sum_f32s(sum)));
    (steps * N * S::F32_LANES) as f64
}

/// The vector instructions that the kernels use here.
pub(crate) fn instructions() -> &'static str {
    struct Lanes;

    impl WithSimd for Lanes {
        type Output = usize;

        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) -> usize {
            S::F32_LANES
        }
    }

    match Arch::new().dispatch(Lanes) {
        16 => "AVX-512",
        8 => "AVX2 with FMA",
        4 => "vectors of 128 bits",
        _ => "no vectors chosen at run time",
    }
}

//! Cost of an update of other crates' detectors, on the numbers of mass-cpd's own bench.

use std::hint::black_box;

use changepoint::{BocpdLike, BocpdTruncated};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use ndarray_rand::{
    rand::{Rng, SeedableRng},
    rand_distr::StandardNormal,
};
use nexus_stats::detection::CusumF64;
use rand_chacha::ChaCha8Rng;
use rv::prelude::NormalGamma;

/// Positive, so that the log transform can be timed on the same numbers.
fn noise(n: usize) -> Vec<f64> {
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    (0..n)
        .map(|_| (0.2 * rng.sample::<f64, _>(StandardNormal)).exp())
        .collect()
}

/// Rust peers on the same numbers. None of them gives a p-value; the CUSUM is told the mean and the scale.
fn peers(c: &mut Criterion) {
    let xs = noise(4096);
    let mut group = c.benchmark_group("peers");
    group.throughput(Throughput::Elements(xs.len() as u64));
    let mut cusum = CusumF64::builder(1.02)
        .slack(0.1)
        .threshold(1.6)
        .build()
        .expect("valid");
    group.bench_function("nexus-stats CusumF64", |b| {
        b.iter(|| {
            for &x in &xs {
                if black_box(cusum.update(black_box(x)).expect("finite")).is_some() {
                    cusum.reset();
                }
            }
        });
    });
    group.sample_size(10);
    group.bench_function("changepoint BocpdTruncated", |b| {
        b.iter(|| {
            let prior = NormalGamma::new_unchecked(1.0, 1.0, 1.0, 1.0);
            let mut bocpd = BocpdTruncated::new(250.0, prior);
            for x in &xs {
                black_box(bocpd.step(black_box(x)).len());
            }
        });
    });
    group.finish();
}

criterion_group!(benches, peers);
criterion_main!(benches);

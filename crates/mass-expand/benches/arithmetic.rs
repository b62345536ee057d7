//! Alignment, decomposition and the split of a gradient at 1024 x 4096, each beside a plain sweep over memory that moves
//! the same number of bytes: the share of the memory's bandwidth is the ratio of the two rates.
//!
//! The sweeps are the best of what safe Rust on one thread does: a sum over as many slices as the operation reads, and
//! `copy_from_slice`, for as many as it writes.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use mass_expand::{
    Decomposition, Reduction, alignment, divide_gradient, project_onto_weights, redundancy_gradient,
};

const SHAPE: (usize, usize) = (1024, 4096);
const ELEMENTS: usize = SHAPE.0 * SHAPE.1;
const MATRIX: u64 = (ELEMENTS * size_of::<f32>()) as u64;

fn matrix(seed: u32) -> Vec<f32> {
    let mut state = seed;
    (0..ELEMENTS)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

/// Reads both slices and does next to nothing: integer additions on independent lanes.
fn read_both(a: &[f32], b: &[f32]) -> u32 {
    pulp::Arch::new().dispatch(
        #[inline(always)]
        || {
            let mut sum = [0u32; 64];
            for (x, y) in a.as_chunks::<64>().0.iter().zip(b.as_chunks::<64>().0) {
                for lane in 0..64 {
                    sum[lane] = sum[lane]
                        .wrapping_add(x[lane].to_bits())
                        .wrapping_add(y[lane].to_bits());
                }
            }
            sum.iter().fold(0u32, |s, &x| s.wrapping_add(x))
        },
    )
}

/// Reads both and writes the second: the traffic of a row-wise projection.
fn read_both_write_one(a: &[f32], b: &mut [f32]) {
    pulp::Arch::new().dispatch(
        #[inline(always)]
        || {
            for (y, &x) in b.iter_mut().zip(a) {
                *y = f32::from_bits(y.to_bits() ^ x.to_bits());
            }
        },
    );
}

fn bandwidth(c: &mut Criterion) {
    let (gradient, weight) = (matrix(1), matrix(2));
    let mut group = c.benchmark_group("read 2");
    group.throughput(Throughput::Bytes(2 * MATRIX));
    group.bench_function("memory", |b| {
        b.iter(|| read_both(black_box(&gradient), black_box(&weight)));
    });
    group.bench_function("alignment", |b| {
        b.iter(|| alignment(black_box(&gradient), black_box(&weight)).unwrap());
    });
    group.finish();

    let mut group = c.benchmark_group("read 2, write 1");
    group.throughput(Throughput::Bytes(3 * MATRIX));
    let mut target = gradient.clone();
    group.bench_function("memory", |b| {
        b.iter(|| read_both_write_one(black_box(&weight), black_box(&mut target)));
    });
    // The projection is idempotent: run again on its own result it does the same work.
    let mut target = gradient.clone();
    group.bench_function("project rowwise", |b| {
        b.iter(|| {
            project_onto_weights(
                black_box(&mut target),
                black_box(&weight),
                SHAPE,
                Decomposition::Rowwise,
            )
            .unwrap();
        });
    });
    group.finish();

    let mut group = c.benchmark_group("read 2, then read 1, write 1");
    group.throughput(Throughput::Bytes(4 * MATRIX));
    let mut target = gradient.clone();
    group.bench_function("memory", |b| {
        b.iter(|| {
            let sum = read_both(black_box(&weight), black_box(&target));
            black_box(&mut target).copy_from_slice(black_box(&weight));
            sum
        });
    });
    let mut target = gradient.clone();
    group.bench_function("project whole", |b| {
        b.iter(|| {
            project_onto_weights(
                black_box(&mut target),
                black_box(&weight),
                SHAPE,
                Decomposition::Whole,
            )
            .unwrap();
        });
    });
    group.finish();

    let mut group = c.benchmark_group("read 2, write 2");
    group.throughput(Throughput::Bytes(4 * MATRIX));
    let (mut source, mut newcomer) = (gradient.clone(), vec![0.0; ELEMENTS]);
    group.bench_function("memory", |b| {
        b.iter(|| {
            let (source, newcomer) = (black_box(&mut source), black_box(&mut newcomer));
            for ((s, n), w) in source
                .chunks_exact_mut(SHAPE.1)
                .zip(newcomer.chunks_exact_mut(SHAPE.1))
                .zip(black_box(&weight).chunks_exact(SHAPE.1))
            {
                n.copy_from_slice(s);
                read_both_write_one(w, s);
            }
        });
    });
    let mut source = gradient.clone();
    group.bench_function("divide gradient rowwise", |b| {
        b.iter(|| {
            divide_gradient(
                black_box(&mut source),
                black_box(&mut newcomer),
                black_box(&weight),
                SHAPE,
                Some(Decomposition::Rowwise),
            )
            .unwrap();
        });
    });
    group.finish();
}

fn redundancy(c: &mut Criterion) {
    let (experts, dim) = (16, 768);
    let gate = matrix(3);
    let rows: Vec<&[f32]> = gate.chunks(dim).take(experts).collect();
    let pairs: Vec<(usize, usize)> = (0..8).map(|i| (i, i + 8)).collect();
    let mut gradient = vec![0.0f32; experts * dim];
    c.bench_function("redundancy gradient, 8 pairs of 768", |b| {
        b.iter(|| {
            let mut slices: Vec<&mut [f32]> = gradient.chunks_mut(dim).collect();
            redundancy_gradient(&rows, &pairs, Reduction::Mean, 0.01, &mut slices).unwrap()
        });
    });
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(30)
        .warm_up_time(std::time::Duration::from_millis(500))
        .measurement_time(std::time::Duration::from_secs(2));
    targets = bandwidth, redundancy
}
criterion_main!(benches);

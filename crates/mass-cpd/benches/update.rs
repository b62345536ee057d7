//! Cost of an update: one stream, and a bank. Peers in Rust are in a package of their own, `rivals`.
//!
//! ```text
//! cargo bench -p mass-cpd --bench update
//! ```

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use mass_cpd::{
    AfterAlarm, BankParams, CalibratedCusumParams, Detector, Drift, Reference,
    TrainingMonitorParams, Transform, WindowedZParams,
};
use ndarray_rand::{
    rand::{Rng, SeedableRng},
    rand_distr::StandardNormal,
};
use rand_chacha::ChaCha8Rng;

/// Positive, so that the log transform can be timed on the same numbers.
fn noise(n: usize) -> Vec<f64> {
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    (0..n)
        .map(|_| (0.2 * rng.sample::<f64, _>(StandardNormal)).exp())
        .collect()
}

fn single(c: &mut Criterion) {
    let xs = noise(4096);
    let default = CalibratedCusumParams {
        after_alarm: AfterAlarm::Restart,
        ..Default::default()
    };
    let lagged = CalibratedCusumParams {
        reference: Reference::LAGGED,
        ..default
    };
    let settings = [
        ("calibrated", default),
        (
            "calibrated, log",
            CalibratedCusumParams {
                transform: Transform::Log,
                ..default
            },
        ),
        (
            "calibrated, drift removed",
            CalibratedCusumParams {
                drift: Drift::Remove,
                ..default
            },
        ),
        ("calibrated, lagged", lagged),
        (
            "calibrated, training preset",
            CalibratedCusumParams {
                after_alarm: AfterAlarm::Restart,
                ..CalibratedCusumParams::training(10)
            },
        ),
    ];
    let mut group = c.benchmark_group("update");
    group.throughput(Throughput::Elements(xs.len() as u64));
    for (name, params) in settings {
        let mut detector = params.check().expect("valid");
        group.bench_function(name, |b| {
            b.iter(|| {
                for &x in &xs {
                    let step = detector.update(black_box(x)).expect("finite");
                    black_box((
                        step.statistic,
                        step.p_value,
                        step.p_horizon,
                        step.onset,
                        step.alarm,
                    ));
                }
            });
        });
    }
    let mut monitor = TrainingMonitorParams::default().check().expect("valid");
    group.bench_function("training sample", |b| {
        b.iter(|| {
            for &x in &xs {
                black_box(monitor.update(black_box(x)).expect("finite"));
            }
        });
    });
    let mut windowed = WindowedZParams::paper(30, 60, 0.01).check().expect("valid");
    group.bench_function("windowed z, w = 60", |b| {
        b.iter(|| {
            for &x in &xs {
                black_box(windowed.update(black_box(x)).expect("finite"));
            }
        });
    });
    group.finish();
}

fn bank(c: &mut Criterion) {
    const STREAMS: usize = 4096;
    let xs = noise(STREAMS * 16);
    let default = CalibratedCusumParams::default();
    let settings = [
        ("calibrated", default),
        (
            "calibrated, log",
            CalibratedCusumParams {
                transform: Transform::Log,
                ..default
            },
        ),
        (
            "calibrated, lagged",
            CalibratedCusumParams {
                reference: Reference::LAGGED,
                ..default
            },
        ),
    ];
    let mut group = c.benchmark_group("bank of 4096, per stream");
    group.throughput(Throughput::Elements(STREAMS as u64));
    for (name, detector) in settings {
        let mut bank = BankParams {
            detector,
            capacity: STREAMS,
        }
        .check()
        .expect("valid");
        for _ in 0..STREAMS {
            bank.add();
        }
        for _ in 0..20 {
            for row in xs.chunks_exact(STREAMS) {
                bank.update(row).expect("finite");
            }
        }
        let mut rows = xs.chunks_exact(STREAMS).cycle();
        group.bench_function(name, |b| {
            b.iter(|| {
                let row = rows.next().expect("cycles");
                black_box(bank.update(black_box(row)).expect("finite").len())
            });
        });
    }
    group.finish();
}

criterion_group!(benches, single, bank);
criterion_main!(benches);

//! PELT on 10^4 and 10^5 points with a change of level every 500.
//!
//! ```text
//! cargo bench -p mass-cpd --features offline --bench offline
//! ```

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use mass_cpd::offline::{PeltParams, Penalty};
use ndarray::Array1;

/// The same series as `benches/peers.py` makes.
fn series(n: u64) -> Array1<f64> {
    let mut state: u64 = 42;
    let mut uniform = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 11) as f64 / (1u64 << 53) as f64
    };
    (0..n)
        .map(|t| {
            let noise: f64 = (0..12).map(|_| uniform()).sum::<f64>() - 6.0;
            noise + 3.0 * ((t / 500) % 2) as f64
        })
        .collect()
}

fn pelt(c: &mut Criterion) {
    let mut group = c.benchmark_group("pelt");
    group.sample_size(10);
    for n in [10_000, 100_000] {
        let y = series(n);
        // The noise has variance one.
        let given = PeltParams {
            penalty: Penalty::Value(2.0 * (n as f64).ln()),
            min_segment: 2,
            ..Default::default()
        };
        group.throughput(Throughput::Elements(n));
        for (name, params) in [("", given), (", default", PeltParams::default())] {
            let pelt = params.check().expect("valid");
            group.bench_function(format!("{n} points{name}"), |b| {
                b.iter(|| pelt.segment(y.view()).expect("a series"));
            });
        }
    }
    group.finish();
}

criterion_group!(benches, pelt);
criterion_main!(benches);

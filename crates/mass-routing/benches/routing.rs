//! Routing and its backward pass: `cargo bench -p mass-routing`. The comparison with PyTorch is the example `compare`.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use mass_routing::{Combine, Router, RoutingPlan, TopK, TopP};
use ndarray::Array2;
use ndarray_rand::RandomExt;
use ndarray_rand::rand::SeedableRng;
use ndarray_rand::rand_distr::StandardNormal;

fn logits(n: usize, k: usize) -> Array2<f32> {
    Array2::random_using(
        (n, k),
        StandardNormal,
        &mut rand_chacha::ChaCha8Rng::seed_from_u64(0),
    )
}

fn routing(c: &mut Criterion) {
    let mut group = c.benchmark_group("route");
    group.sample_size(10);
    for (n, k) in [(4096, 16), (16384, 64), (65536, 256), (1024, 4096)] {
        let logits = logits(n, k);
        let mut plan = RoutingPlan::default();
        group.throughput(Throughput::Elements((n * k) as u64));
        let routers: [(&str, Box<dyn Router>); 3] = [
            (
                "top_p",
                Box::new(TopP::new(0.5, Combine::Renormalised).expect("valid p")),
            ),
            (
                "top_p_plan_only",
                Box::new(
                    TopP::new(0.5, Combine::Renormalised)
                        .expect("valid p")
                        .with_probabilities(false),
                ),
            ),
            (
                "top_k_2",
                Box::new(TopK::new(2, Combine::Renormalised).expect("valid k")),
            ),
        ];
        for (name, mut router) in routers {
            group.bench_function(BenchmarkId::new(name, format!("{n}x{k}")), |b| {
                b.iter(|| {
                    router
                        .route(logits.view(), None, &mut plan)
                        .expect("finite logits")
                });
            });
        }
    }
    group.finish();

    let mut group = c.benchmark_group("backward");
    group.sample_size(10);
    for (n, k) in [(4096, 16), (16384, 64)] {
        let logits = logits(n, k);
        for (name, combine) in [
            ("raw", Combine::Raw),
            ("renormalised", Combine::Renormalised),
        ] {
            let mut plan = RoutingPlan::default();
            TopP::new(0.5, combine)
                .and_then(|mut r| r.route(logits.view(), None, &mut plan))
                .expect("finite logits");
            let d_weights = vec![1.0; plan.num_assignments()];
            let mut d_logits = Array2::zeros((n, k));
            group.bench_function(BenchmarkId::new(name, format!("{n}x{k}")), |b| {
                b.iter(|| {
                    plan.backward(&d_weights, &mut d_logits.view_mut())
                        .expect("shapes fit")
                });
            });
        }
    }
    group.finish();
}

criterion_group!(benches, routing);
criterion_main!(benches);

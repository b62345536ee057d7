//! The mixture layer, forward and backward, beside the matrix products it is made of.
//!
//!     cargo bench -p mass-model --bench moe_ffn
//!
//! `ceiling` runs dense products of one expert's size on the same threads; the ratio of the two throughputs is the share of
//! the machine that the layer uses. Elements are floating-point operations: 12 x assignments x d x hidden for the layer.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dfdx::prelude::*;
use mass_model::kernels::gemm::{Mat, MatMut, Store, gemm};
use mass_model::nn::{MoeConfig, MoeLayer};
use mass_model::{Activation, seeded_rng};
use mass_routing::{Combine, RouterConfig};
use rayon::prelude::*;

fn bench(c: &mut Criterion) {
    for (tokens, dim, hidden, experts, k) in [
        (4096, 256, 512, 16, 3),
        (2048, 384, 1536, 8, 2),
        (1024, 1024, 4096, 8, 2),
    ] {
        let mut group =
            c.benchmark_group(format!("{tokens}x{dim}x{hidden}, {experts} experts, k {k}"));
        group.sample_size(10);
        let rows = tokens * k / experts;
        group.throughput(Throughput::Elements(
            (experts * 2 * rows * dim * hidden) as u64,
        ));
        let a = vec![0.5f32; rows * dim];
        let b = vec![0.5f32; hidden * dim];
        let mut out = vec![vec![0.0f32; rows * hidden]; experts];
        group.bench_function("ceiling", |bench| {
            bench.iter(|| {
                out.par_iter_mut().for_each(|out| {
                    let (a, b) = (Mat::new(&a, rows, dim), Mat::new(&b, hidden, dim).t());
                    gemm(MatMut::new(out, rows, hidden), a, b, 1.0, Store::Replace);
                });
            });
        });
        group.throughput(Throughput::Elements(
            (12 * tokens * k * dim * hidden) as u64,
        ));
        for activation in [Activation::Relu, Activation::GeluErf] {
            let router = RouterConfig::TopK {
                k,
                combine: Combine::Renormalised,
            };
            let config = MoeConfig::new(dim, hidden, experts, activation, router);
            let layer = MoeLayer::new(&config, &mut seeded_rng(0)).expect("valid sizes");
            let dev = Cpu::default();
            let x = dev.sample_normal_like(&(tokens, dim));
            group.bench_function(format!("forward and backward, {activation:?}"), |bench| {
                bench.iter(|| {
                    let y = layer.forward(x.leaky_trace());
                    y.mean().backward()
                });
            });
        }
        group.finish();
    }
}

criterion_group!(benches, bench);
criterion_main!(benches);

//! The controller's own cost per step: time over the number of experts is the cost per step and expert.

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use mass_expand::{
    Controller, ControllerParams, ExpertObservation, LayerObservation, PruneUnused, Pruning,
    StepObservation,
};

const LAYERS: usize = 4;

/// Feeds one step of autocorrelated noise.
fn step(
    controller: &mut Controller,
    step: u64,
    noise: &mut u64,
    experts: &mut Vec<Vec<ExpertObservation>>,
) {
    experts.resize(LAYERS, Vec::new());
    for (layer, experts) in experts.iter_mut().enumerate() {
        experts.clear();
        experts.extend(controller.active(layer).iter().map(|&id| {
            *noise = noise
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let u = (*noise >> 40) as f64 / (1u64 << 24) as f64;
            ExpertObservation {
                id,
                gradient_norm: 1.0 + 0.1 * u,
                cosine: Some(0.5),
                load: 100,
                loss_share: Some(u),
                routing_entropy: None,
            }
        }));
    }
    let layers: Vec<LayerObservation<'_>> = experts
        .iter()
        .map(|experts| LayerObservation {
            experts,
            hidden: 512,
            dim: 256,
        })
        .collect();
    let loss = 2.0 + 0.01 * (*noise >> 40) as f64 / (1u64 << 24) as f64;
    controller
        .begin_step(&StepObservation {
            step,
            loss,
            layers: &layers,
        })
        .unwrap();
    controller.finish_step().unwrap();
    controller.drain_events();
}

/// The pool is full and pruning, which removes nothing here, keeps it from being stopped: every detector runs at every
/// step and nothing is split.
fn kept_open(mut params: ControllerParams) -> ControllerParams {
    params.phase.live_until = u64::MAX;
    params.pruning = Some(Pruning {
        min_experts: 1,
        min_age: 1,
        unused: Some(PruneUnused {
            share: 1e-9,
            steps: u64::MAX,
        }),
        redundant: None,
    });
    params
}

fn cost(c: &mut Criterion) {
    // The windows of `paper` and `reference` are 9 % of the run: 180 and 900 values.
    for (experts, steps) in [(8usize, 2000), (64, 2000), (8, 10_000)] {
        let mut group = c.benchmark_group(format!(
            "{LAYERS} layers of {experts} experts, run of {steps} steps"
        ));
        group.throughput(Throughput::Elements((LAYERS * experts) as u64));
        for (name, params) in [
            (
                "paper",
                ControllerParams::paper(LAYERS, experts, experts, steps),
            ),
            (
                "reference",
                ControllerParams::reference(LAYERS, experts, experts, steps),
            ),
            (
                "calibrated",
                ControllerParams::calibrated(LAYERS, experts, experts, steps),
            ),
        ] {
            let mut controller = kept_open(params).check().unwrap();
            let (mut now, mut noise, mut buffer) = (0, 1, Vec::new());
            for _ in 0..2000 {
                step(&mut controller, now, &mut noise, &mut buffer);
                now += 1;
            }
            assert!(controller.stopped(0).is_none() && controller.live_steps() > 500);
            group.bench_function(name, |b| {
                b.iter(|| {
                    step(&mut controller, now, &mut noise, &mut buffer);
                    now += 1;
                });
            });
        }
        group.finish();
    }
}

fn saving(c: &mut Criterion) {
    let mut controller = kept_open(ControllerParams::calibrated(LAYERS, 16, 16, 10_000))
        .check()
        .unwrap();
    let (mut noise, mut buffer) = (1, Vec::new());
    for now in 0..500 {
        step(&mut controller, now, &mut noise, &mut buffer);
    }
    c.bench_function("save and restore, 4 layers of 16 experts", |b| {
        b.iter_batched(
            || (),
            |()| {
                let text = serde_json::to_string(&controller).unwrap();
                serde_json::from_str::<Controller>(&text).unwrap()
            },
            BatchSize::SmallInput,
        );
    });
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(std::time::Duration::from_millis(300))
        .measurement_time(std::time::Duration::from_secs(2));
    targets = cost, saving
}
criterion_main!(benches);

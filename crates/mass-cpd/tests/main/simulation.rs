//! Claims about probabilities, checked by simulation with fixed seeds.

use mass_cpd::{
    AnyDetector, AnyDetectorParams, CalibratedCusumParams, Detector, Direction, Drift, Prewhiten,
    Reference, Scores, TrainingMonitorParams, Watch,
    run_length::{RunLength, Sides, exact_threshold_for_horizon, two_sided_average},
};
use ndarray_rand::{
    rand::{Rng, SeedableRng},
    rand_distr::StandardNormal,
};
use rand_chacha::ChaCha8Rng;

fn normal(rng: &mut ChaCha8Rng) -> f64 {
    rng.sample(StandardNormal)
}

/// Mean and its standard error.
fn summary(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let var = values.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / (n - 1.0);
    (mean, (var / n).sqrt())
}

#[test]
fn average_run_lengths_agree_with_simulation_off_the_published_tables() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    for (k, h, mu) in [
        (0.7, 2.5, 0.0),
        (0.3, 6.0, 0.1),
        (0.5, 4.0, -0.2),
        (1.0, 2.0, 0.5),
        (0.1, 9.0, 0.0),
    ] {
        let mut run = |two: bool| -> Vec<f64> {
            (0..4000)
                .map(|_| {
                    let (mut up, mut down, mut n) = (0.0f64, 0.0f64, 0.0);
                    while up <= h && down <= h {
                        let z = normal(&mut rng) + mu;
                        up = (up + z - k).max(0.0);
                        down = if two { (down - z - k).max(0.0) } else { 0.0 };
                        n += 1.0;
                    }
                    n
                })
                .collect()
        };
        let (mean, se) = summary(&run(false));
        let exact = RunLength::new(k, h, mu).unwrap().average();
        assert!(
            (mean - exact).abs() < 4.0 * se,
            "{k} {h} {mu}: {exact}, simulated {mean} +- {se}"
        );
        let (mean, se) = summary(&run(true));
        let exact = two_sided_average(k, h, mu).unwrap();
        assert!(
            (mean - exact).abs() < 4.0 * se,
            "{k} {h} {mu}: {exact}, simulated {mean} +- {se}"
        );
    }
}

#[test]
fn the_distribution_of_the_run_length_agrees_with_simulation() {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let (k, h, runs) = (0.4, 5.0, 20_000);
    let exact = RunLength::new(k, h, 0.0).unwrap();
    let lengths: Vec<u64> = (0..runs)
        .map(|_| {
            let (mut s, mut n) = (0.0f64, 0);
            while s <= h && n < 400 {
                s = (s + normal(&mut rng) - k).max(0.0);
                n += 1;
            }
            if s > h { n } else { u64::MAX }
        })
        .collect();
    for n in [5, 20, 60, 150, 400] {
        let p = exact.false_alarm(n);
        let share = lengths.iter().filter(|&&l| l <= n).count() as f64 / f64::from(runs);
        let se = (p * (1.0 - p) / f64::from(runs)).sqrt();
        assert!(
            (share - p).abs() < 4.0 * se + 1e-4,
            "{n}: {p}, simulated {share}"
        );
    }
}

#[test]
fn two_sided_thresholds_hold_their_level() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let (n, alpha, runs) = (200, 0.1, 10_000);
    let h = exact_threshold_for_horizon(0.5, n, alpha, Sides::Two).unwrap();
    let alarms = (0..runs)
        .filter(|_| {
            let (mut up, mut down) = (0.0f64, 0.0f64);
            (0..n).any(|_| {
                let z = normal(&mut rng);
                up = (up + z - 0.5).max(0.0);
                down = (down - z - 0.5).max(0.0);
                up > h || down > h
            })
        })
        .count();
    let share = alarms as f64 / f64::from(runs);
    assert!(
        (share - alpha).abs() < 4.0 * (alpha * (1.0 - alpha) / f64::from(runs)).sqrt(),
        "{share}"
    );
}

/// Share of 2000 stationary AR(1) streams that alarm within 1000 steps after `m` observations.
fn false_alarms(params: impl Into<AnyDetectorParams>, m: usize, phi: f64) -> f64 {
    let fresh: AnyDetector = params.into().check().unwrap();
    let streams = 2000;
    let alarmed = (0..streams)
        .filter(|&seed| {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let mut x = normal(&mut rng);
            let mut detector = fresh.clone();
            (0..m + 1000).any(|_| {
                let step = detector.update(x).unwrap();
                x = phi * x + (1.0 - phi * phi).sqrt() * normal(&mut rng);
                step.alarm
            })
        })
        .count();
    alarmed as f64 / streams as f64
}

#[test]
fn the_calibrated_cusum_keeps_its_false_alarm_probability() {
    for direction in [Direction::Both, Direction::Up] {
        for m in [50, 200, 1000] {
            for phi in [0.0, 0.3, 0.6] {
                let params = CalibratedCusumParams {
                    warmup: m,
                    direction,
                    ..Default::default()
                };
                let share = false_alarms(params, m, phi);
                let bound = if m >= 200 { 0.075 } else { 0.10 };
                assert!(share <= bound, "{direction:?}, m {m}, phi {phi}: {share}");
                // A level that is not used up is power thrown away.
                assert!(share >= 0.03, "{direction:?}, m {m}, phi {phi}: {share}");
            }
        }
    }
}

#[test]
fn the_lagged_reference_keeps_its_false_alarm_probability() {
    for phi in [0.0, 0.3, 0.6] {
        let params = CalibratedCusumParams {
            reference: Reference::LAGGED,
            warmup: 200,
            ..Default::default()
        };
        let share = false_alarms(params, 200, phi);
        assert!((0.005..=0.075).contains(&share), "phi {phi}: {share}");
    }
}

#[test]
fn a_training_sample_with_long_run_variance_keeps_its_false_alarm_probability() {
    for phi in [0.0, 0.3, 0.6] {
        let params = TrainingMonitorParams {
            training: 200,
            horizon: Some(1000),
            ..Default::default()
        };
        let share = false_alarms(params, 200, phi);
        assert!((0.02..=0.075).contains(&share), "phi {phi}: {share}");
    }
}

/// Share of streams that alarm within 1000 steps after `m` observations: an autoregression of this noise, which is multiplied
/// from then on.
fn alarms(
    params: CalibratedCusumParams,
    phi: &[f64],
    noise: impl Fn(&mut ChaCha8Rng) -> f64,
    factor: f64,
) -> f64 {
    let fresh = params.check().unwrap();
    let streams = 1500;
    let m = params.warmup;
    let alarmed = (0..streams)
        .filter(|&seed| {
            let mut rng = ChaCha8Rng::seed_from_u64(1000 + seed);
            let mut detector = fresh.clone();
            let mut last = [0.0; 3];
            (0..m + 1100).any(|t| {
                let mut x: f64 = noise(&mut rng) * if t < 100 + m { 1.0 } else { factor };
                x += phi.iter().zip(last).map(|(p, l)| p * l).sum::<f64>();
                last = [x, last[0], last[1]];
                t >= 100 && detector.update(x).unwrap().alarm
            })
        })
        .count();
    alarmed as f64 / streams as f64
}

// Bounds are 0.05 and three standard errors of 0.0056, rounded up.

#[test]
fn a_chosen_order_keeps_the_level_on_autoregressions_of_any_order() {
    for phi in [
        &[0.5, 0.3][..],
        &[1.2, -0.5],
        &[0.4, -0.2, 0.3],
        &[0.6],
        &[0.9],
        &[],
    ] {
        for drift in [Drift::Keep, Drift::Remove] {
            let params = CalibratedCusumParams {
                prewhiten: Prewhiten::Chosen { most: 4 },
                drift,
                ..Default::default()
            };
            let share = alarms(params, phi, normal, 1.0);
            assert!(
                (0.02..=0.068).contains(&share),
                "{phi:?}, {drift:?}: {share}"
            );
        }
    }
}

#[test]
fn the_default_keeps_the_level_on_strong_autocorrelation_and_a_short_warmup() {
    for phi in [0.6, 0.8, 0.9] {
        let share = alarms(CalibratedCusumParams::default(), &[phi], normal, 1.0);
        assert!((0.03..=0.068).contains(&share), "{phi}: {share}");
    }
}

#[test]
fn ranks_keep_the_level_whatever_the_noise() {
    type Noise = fn(&mut ChaCha8Rng) -> f64;
    let noises: [(&str, Noise); 4] = [
        ("lognormal, sd 1", |rng| normal(rng).exp()),
        ("cubes", |rng| normal(rng).powi(3)),
        ("exponential", |rng| -rng.random::<f64>().max(1e-300).ln()),
        ("a rounded normal", |rng| normal(rng).round()),
    ];
    for (name, noise) in noises {
        let params = CalibratedCusumParams {
            prewhiten: Prewhiten::None,
            scores: Scores::Ranks,
            ..Default::default()
        };
        let share = alarms(params, &[], noise, 1.0);
        // Values that tie share the middle of their ranks, whose scores vary less: a cautious chart.
        let least = if name.contains("rounded") {
            0.003
        } else {
            0.02
        };
        assert!((least..=0.068).contains(&share), "{name}: {share}");
    }
    for phi in [&[0.6][..], &[]] {
        let params = CalibratedCusumParams {
            prewhiten: Prewhiten::Chosen { most: 4 },
            scores: Scores::Ranks,
            ..Default::default()
        };
        let share = alarms(params, phi, |rng| (0.7 * normal(rng)).exp(), 1.0);
        assert!(
            (0.02..=0.068).contains(&share),
            "lognormal, sd .7, {phi:?}: {share}"
        );
    }
}

#[test]
fn spread_is_watched_at_its_level_and_its_changes_are_found() {
    for phi in [&[][..], &[0.6]] {
        let params = CalibratedCusumParams {
            watch: Watch::Spread,
            warmup: 200,
            ..Default::default()
        };
        let share = alarms(params, phi, normal, 1.0);
        assert!((0.02..=0.068).contains(&share), "{phi:?}: {share}");
        for factor in [2.0, 4.0, 0.3] {
            let share = alarms(params, phi, normal, factor);
            assert!(share > 0.9, "{phi:?}, {factor}: {share}");
        }
    }
}

//! Plain changes are found within a line or two, and what is no change is not.

use mass_cpd::{
    AfterAlarm, AnyDetector, AnyDetectorParams, BankParams, CalibratedCusumParams, Detector, Drift,
    Prewhiten, Reference, Scores, Shift, Step, TrainingMonitorParams,
};
use ndarray_rand::{
    rand::{Rng, SeedableRng},
    rand_distr::StandardNormal,
};
use rand_chacha::ChaCha8Rng;

/// The self-starting settings with normal scores, at different warm-ups.
fn settings(warmup: usize) -> Vec<CalibratedCusumParams> {
    let mut all = Vec::new();
    for prewhiten in [
        Prewhiten::None,
        Prewhiten::Order(1),
        Prewhiten::Order(3),
        Prewhiten::Chosen { most: 4 },
    ] {
        for drift in [Drift::Keep, Drift::Remove] {
            all.push(CalibratedCusumParams {
                prewhiten,
                drift,
                warmup,
                ..Default::default()
            });
        }
    }
    all
}

fn first_alarm(params: impl Into<AnyDetectorParams>, series: &[f64]) -> Option<Step> {
    let mut detector: AnyDetector = params.into().check().expect("valid");
    let alarms = detector.detect(series).expect("finite");
    alarms.first().copied()
}

/// `n` values of noise of this spread, then as many a step higher.
fn with_step(level: f64, spread: f64, step: f64, n: usize, seed: u64) -> Vec<f64> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..2 * n)
        .map(|t| {
            let noise: f64 = rng.sample(StandardNormal);
            level + spread * noise + if t < n { 0.0 } else { step }
        })
        .collect()
}

#[test]
fn a_step_of_a_constant_stream_is_found_in_three_lines() {
    for warmup in [8, 50, 150] {
        for params in settings(warmup) {
            for (level, step) in [
                (5.0, 1.0),
                (5.0, -1.0),
                (0.0, 1.0),
                (0.0, 1e-30),
                (-3.0, 3.0),
                (1e9, 1.0),
                (1e-12, 1e12),
                (0.1, 0.2),
            ] {
                let series = with_step(level, 0.0, step, 200, 0);
                let alarm = first_alarm(params, &series);
                let alarm = alarm.unwrap_or_else(|| panic!("{params:?}: {level} {step}"));
                assert_eq!(
                    (alarm.count, alarm.onset),
                    (203, Some(201)),
                    "{params:?}: {level} {step}"
                );
                let way = if step > 0.0 { Shift::Up } else { Shift::Down };
                assert_eq!(alarm.direction, Some(way));
                let size = alarm.size.expect("a level");
                assert!(
                    (size / step - 1.0).abs() < 1e-3,
                    "{params:?}: {level} {step}: {size}"
                );
            }
        }
    }
}

#[test]
fn a_large_step_is_found_in_three_lines_whatever_its_size() {
    for warmup in [50, 200] {
        for params in settings(warmup) {
            for size in [10.0, 30.0, 50.0, 100.0, 1e3, 1e6, 1e9, 1e12] {
                for sign in [1.0, -1.0] {
                    for seed in 0..4 {
                        let series = with_step(3.0, 1.0, sign * size, 200, seed);
                        let alarm = first_alarm(params, &series[150 - warmup.min(150)..]);
                        let alarm = alarm.unwrap_or_else(|| panic!("{params:?}: {size}"));
                        let at = alarm.count as usize + 150 - warmup.min(150);
                        assert!((201..=204).contains(&at), "{params:?}, {size}: {at}");
                        let found = alarm.size.expect("a level");
                        assert!(
                            (found / (sign * size) - 1.0).abs() < 0.35,
                            "{params:?}, {size}: {found}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn a_step_is_found_after_nearly_constant_and_quantised_values() {
    for params in settings(50) {
        for spread in [1e-9, 1e-6, 1e-3] {
            let series = with_step(5.0, spread, 1.0, 200, 1);
            let alarm = first_alarm(params, &series).expect("a step");
            assert!(
                (201..=203).contains(&alarm.count),
                "{params:?}, {spread}: {alarm:?}"
            );
        }
        // Thermometer readings to a tenth, nearly all alike.
        let quantised: Vec<f64> = with_step(20.0, 0.03, 1.0, 200, 2)
            .iter()
            .map(|x| (x * 10.0).round() / 10.0)
            .collect();
        let alarm = first_alarm(params, &quantised).expect("a step");
        assert!((201..=203).contains(&alarm.count), "{params:?}: {alarm:?}");
    }
}

/// An autocorrelated stream jumps by far more than its spread.
#[test]
fn a_jump_of_an_autocorrelated_stream_does_not_explain_itself() {
    for phi in [0.3, 0.6, 0.8] {
        for params in settings(50) {
            if params.prewhiten == Prewhiten::None {
                continue;
            }
            for size in [100.0, 1e4, 1e8] {
                let mut rng = ChaCha8Rng::seed_from_u64(5);
                let mut x = 0.0f64;
                let series: Vec<f64> = (0..600)
                    .map(|t| {
                        let noise: f64 = rng.sample(StandardNormal);
                        x = phi * x + noise;
                        x + if t < 400 { 0.0 } else { size }
                    })
                    .collect();
                let alarm = first_alarm(params, &series).expect("a jump");
                assert!(
                    (401..=410).contains(&alarm.count),
                    "{phi}, {size}, {params:?}: {alarm:?}"
                );
            }
        }
    }
}

#[test]
fn rounding_noise_is_no_change() {
    for params in settings(20) {
        for level in [0.1, 1.0 / 3.0, 1e9 / 7.0, -1e-9 / 3.0] {
            // A last digit that flips from some step on.
            let series: Vec<f64> = (0..400)
                .map(|t: u32| {
                    if t > 200 && !t.is_multiple_of(3) {
                        f64::next_up(level)
                    } else {
                        level
                    }
                })
                .collect();
            assert_eq!(first_alarm(params, &series), None, "{params:?}: {level}");
            // A straight line, as rounded as it is.
            if params.drift == Drift::Remove {
                let line: Vec<f64> = (0..2000)
                    .map(|t| level * f64::from(t) + 7.0 * level)
                    .collect();
                assert_eq!(
                    first_alarm(params, &line),
                    None,
                    "{params:?}: line of {level}"
                );
            }
        }
    }
}

/// One wild value is no change of level; nor is one that an autoregression carries on.
#[test]
fn an_isolated_outlier_raises_no_alarm() {
    for params in settings(50) {
        for phi in [0.0, 0.5] {
            if phi > 0.0 && params.prewhiten == Prewhiten::None {
                continue;
            }
            for size in [6.0, 20.0, 100.0, 1e6, 1e12] {
                for seed in 0..6 {
                    let mut rng = ChaCha8Rng::seed_from_u64(seed);
                    let mut x = 0.0f64;
                    let series: Vec<f64> = (0..300)
                        .map(|t| {
                            let noise: f64 = rng.sample(StandardNormal);
                            x = phi * x + noise;
                            x + if t == 200 { size } else { 0.0 }
                        })
                        .collect();
                    let alarm = first_alarm(params, &series[..260]);
                    assert_eq!(
                        alarm,
                        first_alarm(params, &with(&series, size)),
                        "{params:?}, {phi}, {size}"
                    );
                }
            }
        }
    }

    /// The same without the outlier.
    fn with(series: &[f64], size: f64) -> Vec<f64> {
        let mut clean = series[..260].to_vec();
        clean[200] -= size;
        assert!(clean[200].abs() < 1e-3 * size + 10.0);
        clean
    }
}

#[test]
fn an_outlier_of_the_process_and_its_echo_raise_no_alarm() {
    for prewhiten in [
        Prewhiten::Order(1),
        Prewhiten::Order(2),
        Prewhiten::Chosen { most: 3 },
    ] {
        for size in [8.0, 15.0, 30.0] {
            let mut alarms = 0;
            for seed in 0..20 {
                let mut rng = ChaCha8Rng::seed_from_u64(seed);
                let mut x = 0.0f64;
                let series: Vec<f64> = (0..260)
                    .map(|t| {
                        let noise: f64 = rng.sample(StandardNormal);
                        x = 0.6 * x + noise + if t == 220 { size } else { 0.0 };
                        x
                    })
                    .collect();
                let params = CalibratedCusumParams {
                    prewhiten,
                    ..Default::default()
                };
                alarms += u32::from(first_alarm(params, &series).is_some_and(|a| a.count > 220));
            }
            assert!(alarms <= 1, "{prewhiten:?}, {size}: {alarms} of 20");
        }
    }
}

#[test]
fn relearning_finds_the_next_step_of_a_constant_stream_too() {
    for params in settings(50) {
        let mut series = Vec::new();
        for level in [5.0, 6.0, 2.0, 1e6] {
            series.extend([level; 100]);
        }
        let mut detector = params.check().expect("valid");
        let counts: Vec<u64> = detector
            .detect(&series)
            .expect("finite")
            .iter()
            .map(|a| a.count)
            .collect();
        assert_eq!(counts, [103, 203, 303], "{params:?}");
    }
    let hold = CalibratedCusumParams {
        after_alarm: AfterAlarm::Hold,
        ..Default::default()
    };
    let series = with_step(5.0, 0.0, 1.0, 200, 0);
    let up = hold
        .check()
        .expect("valid")
        .detect(&series)
        .expect("finite");
    assert!(up.len() > 100, "the alarm stays up: {}", up.len());
}

#[test]
fn ranks_find_a_step_of_a_constant_stream() {
    for prewhiten in [
        Prewhiten::None,
        Prewhiten::Order(1),
        Prewhiten::Chosen { most: 3 },
    ] {
        let params = CalibratedCusumParams {
            scores: Scores::Ranks,
            prewhiten,
            ..Default::default()
        };
        for (level, step) in [(5.0, 1.0), (5.0, -1.0), (0.0, 1e6)] {
            let series = with_step(level, 0.0, step, 200, 0);
            let alarm = first_alarm(params, &series).expect("a step");
            assert!(alarm.count <= 206, "{prewhiten:?}: {alarm:?}");
        }
    }
}

#[test]
fn a_training_sample_of_equal_values_finds_a_step() {
    for (level, step) in [(5.0, 1.0), (5.0, -1.0), (0.0, 1.0), (1e9, 1.0)] {
        let series = with_step(level, 0.0, step, 250, 0);
        let alarm = first_alarm(TrainingMonitorParams::default(), &series).expect("a step");
        assert_eq!((alarm.count, alarm.onset), (251, Some(251)));
        assert_eq!(alarm.size, Some(step));
    }
    let flips: Vec<f64> = (0..2000)
        .map(|t: u32| {
            if t.is_multiple_of(3) {
                f64::next_up(0.1)
            } else {
                0.1
            }
        })
        .collect();
    assert_eq!(first_alarm(TrainingMonitorParams::default(), &flips), None);
}

#[test]
fn a_bank_finds_a_step_of_a_constant_stream_among_others() {
    for reference in [Reference::SelfStarting] {
        let detector = CalibratedCusumParams {
            reference,
            ..Default::default()
        };
        let mut bank = BankParams {
            detector,
            capacity: 3,
        }
        .check()
        .expect("valid");
        for _ in 0..3 {
            bank.add();
        }
        let mut rng = ChaCha8Rng::seed_from_u64(9);
        let mut found = Vec::new();
        for t in 0..400 {
            let step = if t < 200 { 5.0 } else { 6.0 };
            let row = [5.0, step, rng.sample::<f64, _>(StandardNormal)];
            found.extend(
                bank.update(&row)
                    .expect("finite")
                    .iter()
                    .map(|&place| (t + 1, place)),
            );
        }
        assert_eq!(found, [(203, 1)]);
    }
}

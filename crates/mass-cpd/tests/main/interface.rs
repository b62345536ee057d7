//! What a step says, how a level is stated, gaps, and misspelt configurations.

use mass_cpd::{
    AlarmAt, AnyDetector, AnyDetectorParams, Bank, BankParams, CalibratedCusumParams, CpdError,
    Detector, Direction, Drift, Prewhiten, Reference, Scores, Shift, Step, TrainingMonitorParams,
    Transform, WindowedZParams,
    run_length::{Sides, threshold_for_average},
};
use ndarray_rand::{
    rand::{Rng, SeedableRng},
    rand_distr::StandardNormal,
};
use rand_chacha::ChaCha8Rng;

fn noise(n: usize, seed: u64) -> Vec<f64> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..n).map(|_| rng.sample(StandardNormal)).collect()
}

#[test]
fn direction_and_size_of_a_step_are_told() {
    let lagged = CalibratedCusumParams {
        reference: Reference::LAGGED,
        ..Default::default()
    };
    let kinds: Vec<AnyDetectorParams> = vec![
        CalibratedCusumParams::default().into(),
        CalibratedCusumParams {
            drift: Drift::Remove,
            ..Default::default()
        }
        .into(),
        CalibratedCusumParams {
            prewhiten: Prewhiten::Chosen { most: 3 },
            scores: Scores::Ranks,
            ..Default::default()
        }
        .into(),
        lagged.into(),
        CalibratedCusumParams {
            drift: Drift::Remove,
            ..lagged
        }
        .into(),
        TrainingMonitorParams::default().into(),
    ];
    for params in kinds {
        for step in [2.0, -3.0, 8.0] {
            let (mut sum, mut found) = (0.0, 0.0);
            for seed in 0..20 {
                let series: Vec<f64> = noise(500, seed)
                    .iter()
                    .enumerate()
                    .map(|(t, x)| 10.0 + 2.0 * x + if t >= 400 { 2.0 * step } else { 0.0 })
                    .collect();
                let alarms = params.check().unwrap().detect(&series).unwrap();
                // A false alarm just before has the detector learn while the step comes.
                let Some(alarm) = alarms.iter().find(|a| a.count > 400) else {
                    continue;
                };
                let way = if step > 0.0 { Shift::Up } else { Shift::Down };
                assert_eq!(alarm.direction, Some(way), "{params:?}");
                let deviations = alarm.size_in_deviations.expect("known");
                assert!(deviations * step > 0.0, "{params:?}: {deviations}");
                sum += alarm.size.expect("known") / (2.0 * step);
                found += 1.0;
            }
            assert!(found >= 18.0, "{params:?}, {step}: {found} of 20");
            assert!(
                (sum / found - 1.0).abs() < 0.15,
                "{params:?}, {step}: {}",
                sum / found
            );
        }
    }
}

#[test]
fn the_size_of_a_change_of_a_logarithm_is_its_logarithm() {
    let series: Vec<f64> = noise(400, 3)
        .iter()
        .enumerate()
        .map(|(t, x)| (0.1 * x).exp() * if t >= 300 { 3.0 } else { 1.0 })
        .collect();
    let params = CalibratedCusumParams {
        transform: Transform::Log,
        ..Default::default()
    };
    let alarms = params.check().unwrap().detect(&series).unwrap();
    let size = alarms[0].size.unwrap();
    assert!((size.exp() / 3.0 - 1.0).abs() < 0.1, "{size}");
}

#[test]
fn the_level_may_be_an_average_run_length_or_a_threshold() {
    let with = |alarm_at, direction| CalibratedCusumParams {
        alarm_at,
        direction,
        ..Default::default()
    };
    for (direction, sides) in [(Direction::Up, Sides::One), (Direction::Both, Sides::Two)] {
        for average in [50.0, 370.0, 1e4, 1e7] {
            for k in [0.25, 0.5, 1.0] {
                // The solver knows of no limit on scores.
                let params = CalibratedCusumParams {
                    k,
                    score_limit: None,
                    ..with(AlarmAt::AverageRunLength(average), direction)
                };
                let got = params.check().unwrap().threshold();
                let want = threshold_for_average(k, average, sides).unwrap();
                assert!((got - want).abs() < 0.02, "{k} {average}: {got} for {want}");
            }
        }
    }
    let detector = with(AlarmAt::Threshold(5.0), Direction::Both)
        .check()
        .unwrap();
    assert_eq!(detector.threshold(), 5.0);
    // In a family averages are longer, thresholds as they were.
    for (alarm_at, longer) in [
        (AlarmAt::AverageRunLength(370.0), true),
        (AlarmAt::Threshold(5.0), false),
    ] {
        let mut bank = BankParams {
            detector: with(alarm_at, Direction::Both),
            capacity: 2,
        }
        .check()
        .unwrap();
        bank.add();
        let one = bank.threshold();
        bank.add();
        assert_eq!(bank.threshold() > one, longer);
    }
}

#[test]
fn an_average_run_length_is_kept() {
    let params = CalibratedCusumParams {
        alarm_at: AlarmAt::AverageRunLength(100.0),
        ..Default::default()
    };
    let fresh = params.check().unwrap();
    let runs = 2000;
    let total: u64 = (0..runs)
        .map(|seed| {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let mut detector = fresh.clone();
            loop {
                let step = detector.update(rng.sample(StandardNormal)).unwrap();
                if step.alarm {
                    return step.count - params.warmup as u64;
                }
            }
        })
        .sum();
    let average = total as f64 / runs as f64;
    assert!((93.0..107.0).contains(&average), "{average}");
}

fn kinds() -> Vec<AnyDetectorParams> {
    let cusum = CalibratedCusumParams {
        warmup: 10,
        ..Default::default()
    };
    vec![
        WindowedZParams::paper(5, 10, 0.05).into(),
        TrainingMonitorParams {
            training: 20,
            ..Default::default()
        }
        .into(),
        cusum.into(),
        CalibratedCusumParams {
            drift: Drift::Remove,
            ..cusum
        }
        .into(),
        CalibratedCusumParams {
            prewhiten: Prewhiten::None,
            drift: Drift::Remove,
            ..cusum
        }
        .into(),
        CalibratedCusumParams {
            prewhiten: Prewhiten::Order(2),
            ..cusum
        }
        .into(),
        CalibratedCusumParams {
            prewhiten: Prewhiten::Chosen { most: 3 },
            scores: Scores::Ranks,
            drift: Drift::Remove,
            ..cusum
        }
        .into(),
        CalibratedCusumParams {
            reference: Reference::Lagged { window: 16, gap: 3 },
            ..cusum
        }
        .into(),
    ]
}

#[test]
fn a_gap_passes_time_and_is_no_evidence() {
    for params in kinds() {
        let mut detector: AnyDetector = params.check().unwrap();
        for (t, x) in noise(300, 1).into_iter().enumerate() {
            if t % 7 == 3 || (100..120).contains(&t) {
                let step = detector.skip();
                assert_eq!(step, Step::silent(t as u64 + 1));
            } else {
                let step = detector.update(x).unwrap();
                assert_eq!(step.count, t as u64 + 1);
                assert!(step.onset.is_none_or(|o| o <= step.count));
            }
        }
        assert_eq!(detector.count(), 300);
        // A state with gaps in it is read back as it was.
        detector.skip();
        let json = serde_json::to_string(&detector).unwrap();
        let mut again: AnyDetector = serde_json::from_str(&json).unwrap();
        assert_eq!(again, detector);
        for x in noise(50, 2) {
            assert_eq!(again.update(x).unwrap(), detector.update(x).unwrap());
        }
        detector.reset();
        assert_eq!(detector.count(), 0);
        assert_eq!(
            serde_json::to_string(&detector).unwrap(),
            serde_json::to_string(&params.check().unwrap()).unwrap()
        );
    }
}

/// Without an autoregression a gap is nothing at all: the scores are those of the stream without it.
#[test]
fn a_gap_changes_no_score_where_there_is_no_autoregression() {
    let params = CalibratedCusumParams {
        prewhiten: Prewhiten::None,
        ..Default::default()
    };
    let (mut with, mut without) = (params.check().unwrap(), params.check().unwrap());
    for (t, x) in noise(300, 4).into_iter().enumerate() {
        if t % 5 == 2 {
            with.skip();
        }
        let (a, b) = (with.update(x).unwrap(), without.update(x).unwrap());
        assert_eq!(a.statistic, b.statistic);
    }
}

/// With drift removed time goes on during a gap: what comes after lies on the same line.
#[test]
fn a_line_goes_on_during_a_gap() {
    for prewhiten in [Prewhiten::None, Prewhiten::Order(1), Prewhiten::Order(2)] {
        let params = CalibratedCusumParams {
            prewhiten,
            drift: Drift::Remove,
            ..Default::default()
        };
        let mut detector = params.check().unwrap();
        for (t, x) in noise(400, 5).into_iter().enumerate() {
            if (200..260).contains(&t) {
                detector.skip();
            } else {
                let step = detector.update(0.2 * t as f64 + x).unwrap();
                assert!(!step.alarm, "{prewhiten:?}: {step:?}");
            }
        }
    }
}

/// A third of an autocorrelated stream is missing: the level still holds.
#[test]
fn gaps_in_an_autocorrelated_stream_raise_no_false_alarms() {
    for phi in [0.6, 0.9] {
        for prewhiten in [Prewhiten::Order(1), Prewhiten::Order(2)] {
            let params = CalibratedCusumParams {
                prewhiten,
                warmup: 100,
                ..Default::default()
            };
            let fresh = params.check().unwrap();
            let streams = 400;
            let alarmed = (0..streams)
                .filter(|&seed| {
                    let mut rng = ChaCha8Rng::seed_from_u64(seed);
                    let mut x = rng.sample::<f64, _>(StandardNormal);
                    let mut detector = fresh.clone();
                    (0..1500).any(|_| {
                        let shock: f64 = rng.sample(StandardNormal);
                        x = phi * x + (1.0f64 - phi * phi).sqrt() * shock;
                        if rng.random::<f64>() < 0.3 {
                            detector.skip().alarm
                        } else {
                            detector.update(x).unwrap().alarm
                        }
                    })
                })
                .count();
            // 0.05 and three standard errors.
            assert!(
                alarmed <= 33,
                "{phi}, {prewhiten:?}: {alarmed} of {streams}"
            );
        }
    }
}

#[test]
fn a_recorded_series_gives_its_alarms_or_the_place_of_a_bad_value() {
    let mut series = noise(300, 8);
    for x in &mut series[200..] {
        *x += 5.0;
    }
    let alarms = CalibratedCusumParams::default()
        .check()
        .unwrap()
        .detect(&series)
        .unwrap();
    assert_eq!(alarms.len(), 1);
    assert!((201..=204).contains(&alarms[0].count) && alarms[0].p_horizon.unwrap() <= 0.05);
    series[123] = f64::NAN;
    let refused = CalibratedCusumParams::default()
        .check()
        .unwrap()
        .detect(&series);
    assert!(matches!(
        refused,
        Err(CpdError::NonFinite { count: 124, .. })
    ));
}

#[test]
fn a_lagged_reference_refuses_what_it_cannot_do() {
    for params in [
        CalibratedCusumParams {
            prewhiten: Prewhiten::Order(2),
            ..CalibratedCusumParams::training(1)
        },
        CalibratedCusumParams {
            scores: Scores::Ranks,
            ..CalibratedCusumParams::training(1)
        },
    ] {
        let refused = params.check();
        assert!(
            matches!(refused, Err(CpdError::Unsupported { .. })),
            "{refused:?}"
        );
    }
}

/// A field that is not known is refused, in every configuration and every stored state, however deep.
#[test]
fn no_misspelt_field_is_passed_over() {
    use serde_json::{Value, json};

    /// The value with a foreign field in each of its objects in turn. An enum's variant is an object of one field, which says
    /// nothing more: there the foreign field is one more variant, which is refused as well.
    fn spoiled(value: &Value, out: &mut Vec<Value>) {
        match value {
            Value::Object(map) => {
                let mut more = map.clone();
                more.insert("alhpa".to_owned(), json!(0.05));
                out.push(Value::Object(more));
                for (key, inner) in map {
                    let mut variants = Vec::new();
                    spoiled(inner, &mut variants);
                    for variant in variants {
                        let mut changed = map.clone();
                        changed.insert(key.clone(), variant);
                        out.push(Value::Object(changed));
                    }
                }
            }
            Value::Array(items) => {
                for (i, inner) in items.iter().enumerate() {
                    let mut variants = Vec::new();
                    spoiled(inner, &mut variants);
                    for variant in variants {
                        let mut changed = items.clone();
                        changed[i] = variant;
                        out.push(Value::Array(changed));
                    }
                }
            }
            _ => {}
        }
    }

    let refuse = |value: Value, read: &dyn Fn(Value) -> bool| {
        assert!(read(value.clone()), "{value} itself");
        let mut variants = Vec::new();
        spoiled(&value, &mut variants);
        assert!(!variants.is_empty());
        for variant in variants {
            assert!(!read(variant.clone()), "{variant}");
        }
    };
    for params in kinds() {
        refuse(serde_json::to_value(&params).unwrap(), &|v| {
            serde_json::from_value::<AnyDetectorParams>(v).is_ok()
        });
        let mut detector = params.check().unwrap();
        let series = noise(100, 6);
        let step = series
            .iter()
            .map(|&x| detector.update(x).unwrap())
            .last()
            .unwrap();
        refuse(serde_json::to_value(&detector).unwrap(), &|v| {
            serde_json::from_value::<AnyDetector>(v).is_ok()
        });
        refuse(serde_json::to_value(step).unwrap(), &|v| {
            serde_json::from_value::<Step>(v).is_ok()
        });
        if let AnyDetectorParams::CalibratedCusum(detector) = params {
            let params = BankParams {
                detector,
                capacity: 2,
            };
            refuse(serde_json::to_value(params).unwrap(), &|v| {
                serde_json::from_value::<BankParams>(v).is_ok()
            });
            let mut bank = params.check().unwrap();
            bank.add();
            bank.update(&[1.0]).unwrap();
            refuse(serde_json::to_value(bank).unwrap(), &|v| {
                serde_json::from_value::<Bank>(v).is_ok()
            });
        }
    }
}

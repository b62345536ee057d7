//! Properties that every detector has, and what each kind of bad input does.

use mass_cpd::{
    AfterAlarm, AlarmAt, AnyDetector, AnyDetectorParams, CalibratedCusumParams, CpdError, Detector,
    Direction, Drift, Prewhiten, Reference, Scores, Spread, Step, TrainingMonitorParams, Transform,
    Watch, WindowedZParams,
};
use proptest::prelude::*;

const SMALL_LAG: Reference = Reference::Lagged { window: 24, gap: 4 };

/// One of each kind of detector, small enough that a short series exercises all of it.
fn every_kind() -> Vec<AnyDetectorParams> {
    let cusum = CalibratedCusumParams {
        warmup: 10,
        ..Default::default()
    };
    let monitor = TrainingMonitorParams {
        training: 20,
        ..Default::default()
    };
    let mut kinds: Vec<AnyDetectorParams> = vec![
        WindowedZParams::paper(5, 10, 0.05).into(),
        WindowedZParams::reference(5, 10, 0.05).into(),
        monitor.into(),
        TrainingMonitorParams {
            spread: Spread::Independent,
            horizon: Some(500),
            ..monitor
        }
        .into(),
        TrainingMonitorParams {
            direction: Direction::Down,
            ..monitor
        }
        .into(),
    ];
    for reference in [
        Reference::SelfStarting,
        SMALL_LAG,
        Reference::Lagged { window: 24, gap: 0 },
    ] {
        for prewhiten in [Prewhiten::None, Prewhiten::Order(1)] {
            for drift in [Drift::Keep, Drift::Remove] {
                let params = CalibratedCusumParams {
                    reference,
                    prewhiten,
                    drift,
                    ..cusum
                };
                kinds.push(params.into());
            }
        }
    }
    for (prewhiten, scores, drift, watch) in [
        (
            Prewhiten::Order(2),
            Scores::Normal,
            Drift::Keep,
            Watch::Level,
        ),
        (
            Prewhiten::Chosen { most: 3 },
            Scores::Normal,
            Drift::Remove,
            Watch::Spread,
        ),
        (Prewhiten::None, Scores::Ranks, Drift::Keep, Watch::Level),
        (
            Prewhiten::Order(1),
            Scores::Ranks,
            Drift::Remove,
            Watch::Spread,
        ),
        (
            Prewhiten::Order(1),
            Scores::Normal,
            Drift::Keep,
            Watch::Spread,
        ),
    ] {
        let params = CalibratedCusumParams {
            prewhiten,
            scores,
            drift,
            watch,
            ..cusum
        };
        kinds.push(params.into());
    }
    for after_alarm in [AfterAlarm::Hold, AfterAlarm::Restart] {
        for direction in [Direction::Up, Direction::Down] {
            let params = CalibratedCusumParams {
                after_alarm,
                direction,
                ..cusum
            };
            kinds.push(params.into());
        }
    }
    kinds
}

fn made(params: &AnyDetectorParams) -> AnyDetector {
    params.check().expect("valid parameters")
}

fn run(detector: &mut AnyDetector, series: &[f64]) -> Vec<Step> {
    series
        .iter()
        .map(|&x| detector.update(x).expect("finite"))
        .collect()
}

fn as_json(detector: &AnyDetector) -> String {
    serde_json::to_string(detector).expect("serialises")
}

/// The score of `y` at `place`, by the documented formulas: least squares of a line through `window`, at places 0, 1, ..; the ratio `t`
/// of the prediction's error to its standard error; and Wallace's normal score of `t` with two degrees of freedom less than targets.
fn score_by_least_squares(window: &[f64], place: f64, y: f64) -> f64 {
    let n = window.len() as f64;
    let points = || window.iter().enumerate().map(|(j, &v)| (j as f64, v));
    let sx: f64 = points().map(|(x, _)| x).sum();
    let sxx: f64 = points().map(|(x, _)| x * x).sum();
    let sv: f64 = points().map(|(_, v)| v).sum();
    let sxv: f64 = points().map(|(x, v)| x * v).sum();
    let det = n * sxx - sx * sx;
    let (a, b) = ((sxx * sv - sx * sxv) / det, (n * sxv - sx * sv) / det);
    let rest: f64 = points().map(|(x, v)| (v - a - b * x).powi(2)).sum();
    // (1, place) times the inverse of the normal equations' matrix times (1, place).
    let leverage = (sxx - 2.0 * place * sx + n * place * place) / det;
    let dof = n - 2.0;
    let t = (y - a - b * place) / (rest / dof * (1.0 + leverage)).sqrt();
    let size = (dof * (t * t / dof).ln_1p()).sqrt();
    ((8.0 * dof + 1.0) / (8.0 * dof + 3.0) * size).copysign(t)
}

fn noise() -> impl Strategy<Value = Vec<f64>> {
    prop::collection::vec(-3.0..3.0f64, 60..160)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn stored_and_read_back_it_goes_on_bit_for_bit(series in noise(), cut in 0.0..1.0f64) {
        let cut = (cut * series.len() as f64) as usize;
        for params in every_kind() {
            let mut whole = made(&params);
            let all = run(&mut whole, &series);
            let mut first = made(&params);
            let mut steps = run(&mut first, &series[..cut]);
            let mut second: AnyDetector = serde_json::from_str(&as_json(&first)).expect("reads back");
            prop_assert_eq!(&second, &first);
            steps.extend(run(&mut second, &series[cut..]));
            prop_assert_eq!(&steps, &all, "{:?}", params);
            prop_assert_eq!(as_json(&second), as_json(&whole));
        }
    }

    #[test]
    fn a_refused_observation_changes_nothing(series in noise(), at in 0usize..60) {
        for params in every_kind() {
            let mut detector = made(&params);
            run(&mut detector, &series[..at]);
            let before = detector.clone();
            for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                let error = detector.update(bad).expect_err("not finite");
                let is_right =
                    matches!(error, CpdError::NonFinite { count, .. } if count == at as u64 + 1);
                prop_assert!(is_right, "{error}");
            }
            prop_assert_eq!(&detector, &before);
        }
    }

    #[test]
    fn reset_is_a_fresh_start(series in noise()) {
        for params in every_kind() {
            let mut used = made(&params);
            run(&mut used, &series);
            used.reset();
            prop_assert_eq!(used.count(), 0);
            prop_assert_eq!(run(&mut used, &series), run(&mut made(&params), &series));
        }
    }

    #[test]
    fn a_change_of_units_changes_no_statistic(
        series in noise(), scale in 0.01..100.0f64, shift in -50.0..50.0f64,
    ) {
        for params in every_kind() {
            let moved: Vec<f64> = series.iter().map(|x| scale * x + shift).collect();
            let (a, b) = (run(&mut made(&params), &series), run(&mut made(&params), &moved));
            for (a, b) in a.iter().zip(&b) {
                let (Some(s), Some(t)) = (a.statistic, b.statistic) else {
                    prop_assert_eq!(a.statistic, b.statistic);
                    continue;
                };
                // An alarm within rounding of the threshold may fall on either side, and all after it differs.
                if a.alarm != b.alarm {
                    break;
                }
                prop_assert!((s - t).abs() <= 1e-6 * (1.0 + s.abs()), "{:?}: {s} {t}", params);
            }
        }
    }

    /// With drift taken off, a straight line added to a series changes none of its scores: regression on time takes it up in full.
    #[test]
    fn a_straight_line_added_changes_no_score_once_drift_is_removed(series in noise()) {
        for reference in [Reference::SelfStarting, SMALL_LAG] {
            for prewhiten in [Prewhiten::None, Prewhiten::Order(1)] {
                let params = CalibratedCusumParams {
                    reference,
                    prewhiten,
                    drift: Drift::Remove,
                    after_alarm: AfterAlarm::Hold,
                    warmup: 10,
                    ..Default::default()
                };
                let (mut level, mut tilted) = (params.check().expect("valid"), params.check().expect("valid"));
                for (t, &x) in series.iter().enumerate() {
                    level.update(x).expect("finite");
                    tilted.update(x + 3.0 + 0.2 * t as f64).expect("finite");
                    let (Some(a), Some(b)) = (level.last_score(), tilted.last_score()) else {
                        prop_assert_eq!(level.last_score(), tilted.last_score());
                        prop_assert!(t < 28, "no score at {t}");
                        continue;
                    };
                    prop_assert!((a - b).abs() <= 1e-6 * (1.0 + a.abs()), "{params:?} at {t}: {a} {b}");
                }
            }
        }
    }

    /// Without prewhitening and with drift taken off, a score is that of a line fitted by least squares to the reference: the window
    /// that ends `gap` steps back, or everything so far.
    #[test]
    fn a_score_is_that_of_a_line_by_least_squares(series in noise(), slope in -0.3..0.3f64) {
        let series: Vec<f64> = series.iter().enumerate().map(|(t, x)| x + slope * t as f64).collect();
        for reference in [SMALL_LAG, Reference::Lagged { window: 24, gap: 0 }, Reference::SelfStarting] {
            let params = CalibratedCusumParams {
                reference,
                prewhiten: Prewhiten::None,
                drift: Drift::Remove,
                after_alarm: AfterAlarm::Hold,
                warmup: 10,
                ..Default::default()
            };
            let mut detector = params.check().expect("valid");
            for (t, &y) in series.iter().enumerate() {
                detector.update(y).expect("finite");
                let (first, window, gap) = match reference {
                    Reference::SelfStarting => (10, t, 0),
                    Reference::Lagged { window, gap } => (window + gap, window, gap),
                };
                prop_assert_eq!(detector.last_score().is_some(), t >= first, "{:?} at {}", reference, t);
                if let Some(got) = detector.last_score() {
                    let learned = &series[t - gap - window..t - gap];
                    let want = score_by_least_squares(learned, (window + gap) as f64, y);
                    prop_assert!((got - want).abs() <= 1e-7 * (1.0 + want.abs()), "{reference:?} at {t}: {got} for {want}");
                }
            }
        }
    }

    #[test]
    fn a_constant_stream_never_alarms(level in -1e6..1e6f64) {
        for params in every_kind() {
            let steps = run(&mut made(&params), &[level; 200]);
            for step in steps {
                prop_assert!(!step.alarm);
                for p in [step.p_value, step.p_horizon].into_iter().flatten() {
                    prop_assert!((0.0..=1.0).contains(&p));
                }
                prop_assert!(step.statistic.is_none_or(|s| s.abs() < 1e-6), "{:?} {:?}", params, step);
            }
        }
    }

    #[test]
    fn probabilities_are_probabilities_and_the_onset_is_past(
        series in prop::collection::vec(-1e3..1e3f64, 100..200),
    ) {
        for params in every_kind() {
            for step in run(&mut made(&params), &series) {
                for p in [step.p_value, step.p_horizon].into_iter().flatten() {
                    prop_assert!((0.0..=1.0).contains(&p), "{p}");
                }
                prop_assert!(step.onset.is_none_or(|o| o >= 1 && o <= step.count));
                prop_assert!(!step.alarm || step.statistic.is_some());
            }
        }
    }

    #[test]
    fn p_over_the_horizon_falls_with_the_statistic(
        k in 0.05..3.0f64, horizon in 1u64..1_000_000, s in 0.0..40.0f64, more in 1e-3..5.0f64,
    ) {
        let free = CalibratedCusumParams { k, horizon, score_limit: None, ..Default::default() };
        // A lagged reference is costly to calibrate: one setting, kept between cases.
        let lagged = CalibratedCusumParams { reference: SMALL_LAG, ..Default::default() };
        for params in [free, lagged] {
            let d = params.check().expect("valid");
            prop_assert!(d.p_horizon(s + more) <= d.p_horizon(s));
            let h = d.threshold();
            prop_assert!(d.p_horizon(h) <= params.alpha);
            prop_assert!(d.p_horizon(h * (1.0 - 1e-6)) > params.alpha || d.p_horizon(0.0) <= params.alpha);
        }
    }

    #[test]
    fn an_alarm_is_a_p_value_at_or_under_alpha(series in noise(), jump in 0.0..20.0f64) {
        let series: Vec<f64> =
            series.iter().enumerate().map(|(t, x)| x + if t > 40 { jump } else { 0.0 }).collect();
        for reference in [Reference::SelfStarting, SMALL_LAG] {
            let params = CalibratedCusumParams { reference, warmup: 10, ..Default::default() };
            for step in run(&mut made(&params.into()), &series) {
                prop_assert_eq!(step.alarm, step.p_horizon.is_some_and(|p| p <= params.alpha));
            }
        }
    }

    #[test]
    fn down_is_up_of_the_mirror_image(series in noise()) {
        let up = CalibratedCusumParams { direction: Direction::Up, warmup: 10, ..Default::default() };
        let down = CalibratedCusumParams { direction: Direction::Down, ..up };
        let mirror: Vec<f64> = series.iter().map(|x| -x).collect();
        let (a, b) = (run(&mut made(&up.into()), &series), run(&mut made(&down.into()), &mirror));
        for (a, b) in a.iter().zip(&b) {
            prop_assert_eq!(a.statistic, b.statistic);
            prop_assert_eq!(a.alarm, b.alarm);
        }
    }
}

#[test]
fn a_lagged_reference_follows_a_jump_of_scale_exactly() {
    // Rolling sums that once held huge values must not leave their rounding errors behind.
    let params = CalibratedCusumParams {
        reference: SMALL_LAG,
        after_alarm: AfterAlarm::Hold,
        warmup: 10,
        ..Default::default()
    };
    let wave = |t: u64| ((t * 7919) % 101) as f64 / 101.0;
    let (mut long, mut fresh) = (params.check().unwrap(), params.check().unwrap());
    for t in 0..500 {
        long.update(1e12 * wave(t)).unwrap();
    }
    for t in 500..600 {
        long.update(wave(t)).unwrap();
        fresh.update(wave(t)).unwrap();
        if let (Some(a), Some(b)) = (long.last_score(), fresh.last_score()) {
            assert!((a - b).abs() < 1e-6, "{t}: {a} {b}");
        }
    }
}

#[test]
fn a_straight_line_is_no_change_once_drift_is_removed() {
    for reference in [Reference::SelfStarting, SMALL_LAG] {
        let params = CalibratedCusumParams {
            reference,
            drift: Drift::Remove,
            warmup: 10,
            ..Default::default()
        };
        let mut detector = params.check().unwrap();
        for t in 0..300 {
            let wave = f64::from((t * 7919) % 101) / 101.0;
            assert!(
                !detector.update(0.05 * f64::from(t) + wave).unwrap().alarm,
                "{t}"
            );
        }
    }
}

/// At a level of exactly the p-value the paper's rule flags, and that of the authors' code does not.
#[test]
fn the_windowed_z_flags_at_its_level_as_its_rule_says() {
    let series: Vec<f64> = (0..40).map(|t| f64::from(t * 37 % 11)).collect();
    for (params, flags) in [
        (WindowedZParams::paper(5, 10, 0.5), true),
        (WindowedZParams::reference(5, 10, 0.5), false),
    ] {
        let last = |alpha: f64| {
            let params = WindowedZParams { alpha, ..params };
            run(&mut made(&params.into()), &series)[39]
        };
        let p = last(0.5).p_value.expect("the window is full");
        assert!((0.01..0.99).contains(&p), "{p}");
        assert_eq!(last(p).p_value, Some(p));
        assert_eq!(last(p).alarm, flags, "{params:?}");
        assert!(last(p.next_up()).alarm, "{params:?}");
        assert!(!last(p.next_down()).alarm, "{params:?}");
    }
}

#[test]
fn the_threshold_is_that_of_the_run_length_solver() {
    use mass_cpd::run_length::{Sides, threshold_for_horizon};
    for (k, horizon, alpha) in [(0.5, 1000, 0.05), (0.25, 5000, 0.01), (1.0, 100_000, 0.001)] {
        for (direction, sides) in [(Direction::Up, Sides::One), (Direction::Both, Sides::Two)] {
            let params = CalibratedCusumParams {
                k,
                horizon,
                alpha,
                direction,
                score_limit: None,
                ..Default::default()
            };
            let got = params.check().unwrap().threshold();
            let want = threshold_for_horizon(k, horizon, alpha, sides).unwrap();
            assert!(
                (got - want).abs() < 2e-3,
                "{k} {horizon} {alpha}: {got} {want}"
            );
        }
    }
}

#[test]
fn each_kind_of_bad_observation_has_its_error() {
    let log = CalibratedCusumParams {
        transform: Transform::Log,
        ..Default::default()
    };
    let mut detector = log.check().unwrap();
    for x in [0.0, -1.0] {
        assert_eq!(
            detector.update(x),
            Err(CpdError::NonPositive { count: 1, value: x })
        );
    }
    assert!(detector.update(f64::MIN_POSITIVE / 4.0).is_ok());
    assert!(detector.update(f64::MAX).is_ok());
    let mut detector = CalibratedCusumParams::default().check().unwrap();
    let error = detector.update(1e300).unwrap_err();
    assert_eq!(
        error,
        CpdError::TooLarge {
            count: 1,
            value: 1e300,
            limit: 1e40,
        }
    );
    assert!(error.to_string().contains("1e40"));
    assert_eq!(detector.count(), 0);
    // The windowed z takes any finite number.
    let mut detector = WindowedZParams::paper(1, 2, 0.05).check().unwrap();
    for x in [f64::MAX, f64::MIN, f64::MAX, 0.0, 5e-324] {
        let step = detector.update(x).unwrap();
        assert!(step.p_value.is_none_or(|p| (0.0..=1.0).contains(&p)));
    }
}

#[test]
fn each_parameter_out_of_range_is_named() {
    let name = |params: AnyDetectorParams| match params.check() {
        Err(CpdError::Parameter { name, .. }) => name,
        other => panic!("{params:?}: {other:?}"),
    };
    let d = CalibratedCusumParams::default();
    let lagged = |window, gap| Reference::Lagged { window, gap };
    for (params, want) in [
        (CalibratedCusumParams { horizon: 0, ..d }, "horizon"),
        (CalibratedCusumParams { alpha: 0.0, ..d }, "alpha"),
        (
            CalibratedCusumParams {
                alpha: f64::NAN,
                ..d
            },
            "alpha",
        ),
        (CalibratedCusumParams { alpha: 1.0, ..d }, "alpha"),
        (CalibratedCusumParams { k: 0.0, ..d }, "k"),
        (
            CalibratedCusumParams {
                k: f64::INFINITY,
                ..d
            },
            "k",
        ),
        (
            CalibratedCusumParams {
                score_limit: Some(0.4),
                ..d
            },
            "score_limit",
        ),
        (
            CalibratedCusumParams {
                score_limit: Some(f64::NAN),
                ..d
            },
            "score_limit",
        ),
        // Calibration of a rise that never ends would not either.
        (
            CalibratedCusumParams {
                score_limit: Some(2f64.next_up()),
                ..CalibratedCusumParams::training(1)
            },
            "score_limit",
        ),
        (CalibratedCusumParams { warmup: 7, ..d }, "warmup"),
        (
            CalibratedCusumParams {
                prewhiten: Prewhiten::Order(0),
                ..d
            },
            "prewhiten",
        ),
        (
            CalibratedCusumParams {
                prewhiten: Prewhiten::Chosen { most: 9 },
                ..d
            },
            "prewhiten",
        ),
        (
            CalibratedCusumParams {
                alarm_at: AlarmAt::AverageRunLength(f64::NAN),
                ..d
            },
            "alarm_at.average_run_length",
        ),
        (
            CalibratedCusumParams {
                alarm_at: AlarmAt::Threshold(0.0),
                ..d
            },
            "alarm_at.threshold",
        ),
        (
            CalibratedCusumParams {
                reference: lagged(7, 0),
                ..d
            },
            "reference.window",
        ),
        (
            CalibratedCusumParams {
                reference: lagged(8, usize::MAX),
                ..d
            },
            "reference.gap",
        ),
    ] {
        assert_eq!(name(params.into()), want);
    }
    let w = WindowedZParams::paper(1, 2, 0.5);
    assert_eq!(name(WindowedZParams { warmup: 0, ..w }.into()), "warmup");
    assert_eq!(name(WindowedZParams { window: 1, ..w }.into()), "window");
    assert_eq!(
        name(
            WindowedZParams {
                alpha: f64::NAN,
                ..w
            }
            .into()
        ),
        "alpha"
    );
    let t = TrainingMonitorParams::default();
    assert_eq!(
        name(TrainingMonitorParams { training: 19, ..t }.into()),
        "training"
    );
    assert_eq!(
        name(TrainingMonitorParams { alpha: 0.6, ..t }.into()),
        "alpha"
    );
    assert_eq!(
        name(
            TrainingMonitorParams {
                horizon: Some(0),
                ..t
            }
            .into()
        ),
        "horizon"
    );
}

#[test]
fn unchecked_parameters_need_observations_that_can_be_counted() {
    let monitor = TrainingMonitorParams {
        training: usize::MAX,
        ..Default::default()
    };
    let cusum = CalibratedCusumParams {
        warmup: usize::MAX,
        ..Default::default()
    };
    for params in [AnyDetectorParams::from(monitor), cusum.into()] {
        assert_eq!(params.observations_needed(), u64::MAX);
        assert!(params.check().is_err());
    }
}

#[test]
fn the_probability_of_a_statistic_is_one_below_zero() {
    let detector = CalibratedCusumParams::default().check().unwrap();
    assert_eq!(detector.p_horizon(-5.0), 1.0);
    assert!((0.9..=1.0).contains(&detector.p_horizon(0.0)));
    assert!(detector.p_horizon(f64::NAN).is_nan());
}

#[test]
fn a_stored_sample_that_no_observation_gave_is_refused() {
    let mut detector = TrainingMonitorParams::default().check().unwrap();
    detector.update(1.0).unwrap();
    let stored = serde_json::to_string(&detector).unwrap();
    assert!(serde_json::from_str::<mass_cpd::TrainingMonitor>(&stored).is_ok());
    let hostile = stored.replace("[1.0]", "[1e308]");
    assert_ne!(hostile, stored);
    assert!(serde_json::from_str::<mass_cpd::TrainingMonitor>(&hostile).is_err());
}

/// Every field of a stored detector set to nonsense in turn: a typed refusal, or a detector that still works.
#[test]
fn hostile_json_makes_no_broken_detector() {
    fn mangle(value: &serde_json::Value, out: &mut Vec<serde_json::Value>) {
        use serde_json::{Value, json};
        let nonsense = [
            json!(-1),
            json!(1e300),
            json!(-1e300),
            json!(9_007_199_254_740_991_u64),
            json!([]),
            json!(0),
        ];
        match value {
            Value::Object(map) => {
                for (key, inner) in map {
                    let mut variants = nonsense.to_vec();
                    mangle(inner, &mut variants);
                    for variant in variants {
                        let mut changed = map.clone();
                        changed.insert(key.clone(), variant);
                        out.push(Value::Object(changed));
                    }
                }
            }
            Value::Array(items) if !items.is_empty() => {
                out.push(Value::Array(items[1..].to_vec()));
                let mut changed = items.clone();
                changed[0] = json!(-7);
                out.push(Value::Array(changed));
            }
            _ => {}
        }
    }
    let mut refused = 0;
    for params in every_kind() {
        // A huge window would be a valid wish for much memory.
        let mut detector = made(&params);
        for t in 0..70u32 {
            detector.update(f64::from(t * 37 % 11)).unwrap();
        }
        let stored = serde_json::to_value(&detector).unwrap();
        let mut variants = Vec::new();
        mangle(&stored, &mut variants);
        for variant in variants {
            match serde_json::from_value::<AnyDetector>(variant) {
                Err(_) => refused += 1,
                Ok(mut detector) => {
                    for t in 0..200u32 {
                        let step = detector.update(1.0 + f64::from(t * 37 % 13)).unwrap();
                        assert!(step.p_horizon.is_none_or(|p| (0.0..=1.0).contains(&p)));
                    }
                }
            }
        }
    }
    assert!(refused > 100, "{refused}");
}

#[test]
fn high_thresholds_are_reached_in_time_and_rare_signals_are_counted() {
    use mass_cpd::run_length::{
        RunLength, Sides, exact_threshold_for_horizon, siegmund_average, threshold_for_horizon,
    };
    // The run length is nearly geometric, so that about 1/e of the runs outlast their average.
    for (k, h) in [(0.1, 24.0), (0.1, 40.0), (0.25, 30.0), (0.5, 20.0)] {
        let run = RunLength::new(k, h, 0.0).expect("valid");
        let outlast = run.survival(run.average() as u64);
        assert!((0.36..0.40).contains(&outlast), "k {k}, h {h}: {outlast}");
    }
    let h = exact_threshold_for_horizon(0.1, 100_000, 0.05, Sides::One).expect("there is one");
    assert!((51.0..52.5).contains(&h), "{h}");
    // Probabilities far below the rounding of one: then they are horizon over average run length.
    let mut before = 1.0;
    for (k, h) in [
        (1.0, 16.0),
        (1.0, 18.0),
        (1.0, 20.0),
        (1.0, 34.0),
        (1.0, 77.0),
    ] {
        let run = RunLength::new(k, h, 0.0).expect("valid");
        let (found, wanted) = (run.false_alarm(1_000_000_000), 1e9 / run.average());
        assert!(
            (found / wanted - 1.0).abs() < 1e-4,
            "h {h}: {found:e} for {wanted:e}"
        );
        assert!(found < before, "h {h}: {found:e}");
        before = found;
    }
    let h =
        exact_threshold_for_horizon(1.0, 1_000_000_000, 1e-6, Sides::One).expect("there is one");
    let found = RunLength::new(1.0, h, 0.0)
        .expect("valid")
        .false_alarm(1_000_000_000);
    assert!(
        (found / 1e-6 - 1.0).abs() < 0.01 && (16.0..17.0).contains(&h),
        "{h}: {found:e}"
    );
    // Averages past what a difference from one can hold, against Siegmund's form, good to a few percent.
    for (k, h) in [(0.5, 34.0), (0.5, 60.0), (1.0, 40.0), (0.25, 150.0)] {
        let exact = RunLength::new(k, h, 0.0).expect("valid").average();
        let ratio = exact / siegmund_average(k, h, 0.0).expect("valid");
        assert!((0.9..1.1).contains(&ratio), "k {k}, h {h}: {ratio}");
    }
    let h = threshold_for_horizon(0.5, 10_000_000_000_000, 0.01, Sides::One).expect("there is one");
    assert!((32.0..33.5).contains(&h), "{h}");
    // Beyond all numbers.
    let run = RunLength::new(10.0, 200.0, 0.0).expect("valid");
    assert_eq!(run.average(), f64::INFINITY);
    assert_eq!(run.average_from(1.0).expect("a state"), f64::INFINITY);
    assert_eq!(run.survival(1000), 1.0);
}

#[test]
fn a_lagged_reference_has_a_threshold_over_a_long_horizon_or_none() {
    let of = |horizon, k| CalibratedCusumParams {
        reference: Reference::LAGGED,
        k,
        horizon,
        ..CalibratedCusumParams::default()
    };
    let threshold = |horizon| {
        let detector = of(horizon, 0.25).check().expect("a threshold");
        detector.threshold()
    };
    let (short, long) = (threshold(10_000), threshold(100_000));
    assert!(short < long && long < 60.0, "{short}, {long}");
    // A reference from so far back is off by more than so small an allowance forgives for thousands of steps, and over so long a
    // horizon some will be.
    let off = CalibratedCusumParams {
        reference: Reference::Lagged {
            window: 128,
            gap: 10_000,
        },
        ..of(1_000_000_000_000, 0.05)
    };
    assert!(matches!(off.check(), Err(CpdError::NotFound { .. })));
    // A line through eight points says nothing of what is ten thousand steps away.
    let far = CalibratedCusumParams {
        reference: Reference::Lagged {
            window: 8,
            gap: 10_000,
        },
        drift: Drift::Remove,
        ..CalibratedCusumParams::default()
    };
    assert!(matches!(
        far.check(),
        Err(CpdError::Parameter {
            name: "reference.gap",
            ..
        })
    ));
}

#[test]
fn counts_that_no_stream_can_have_are_refused() {
    for params in every_kind() {
        let mut detector = made(&params);
        run(&mut detector, &[1.0, 2.0, 1.5]);
        let json = as_json(&detector).replacen("\"count\":3", "\"count\":18446744073709551615", 1);
        assert!(json.contains("18446744073709551615"), "{json}");
        assert!(
            serde_json::from_str::<AnyDetector>(&json).is_err(),
            "{json}"
        );
    }
}

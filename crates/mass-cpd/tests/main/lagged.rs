//! The lagged reference: what it promises, and changes that are too plain to be missed.

use mass_cpd::{
    AfterAlarm, BankParams, CalibratedCusumParams, Detector, Direction, Drift, Prewhiten, Reference,
};
use ndarray_rand::{
    rand::{Rng, SeedableRng},
    rand_distr::StandardNormal,
};
use rand_chacha::ChaCha8Rng;

fn lagged(window: usize, gap: usize) -> CalibratedCusumParams {
    CalibratedCusumParams {
        reference: Reference::Lagged { window, gap },
        warmup: 8,
        ..Default::default()
    }
}

/// Settings of all sorts that use a lagged reference.
fn settings() -> Vec<CalibratedCusumParams> {
    let mut all = vec![
        CalibratedCusumParams::training(1),
        CalibratedCusumParams::training(10),
        CalibratedCusumParams {
            direction: Direction::Both,
            ..CalibratedCusumParams::training(1)
        },
    ];
    for (window, gap) in [(128, 16), (64, 0), (64, 1), (24, 4)] {
        for prewhiten in [Prewhiten::Order(1), Prewhiten::None] {
            for drift in [Drift::Keep, Drift::Remove] {
                all.push(CalibratedCusumParams {
                    prewhiten,
                    drift,
                    ..lagged(window, gap)
                });
            }
        }
    }
    all
}

/// The 1-based observations at which it alarms.
fn alarms(params: &CalibratedCusumParams, series: &[f64]) -> Vec<usize> {
    let mut detector = params.check().expect("valid");
    let seen = series
        .iter()
        .map(|&x| detector.update(x).expect("finite").alarm);
    seen.enumerate()
        .filter(|(_, alarm)| *alarm)
        .map(|(t, _)| t + 1)
        .collect()
}

/// Scores at their limit that it takes to reach the threshold; three certain ones always do.
fn fewest(params: &CalibratedCusumParams) -> usize {
    let detector = params.check().expect("valid");
    let limit = params.score_limit.expect("a limit");
    ((detector.threshold() / (limit - params.k)).ceil() as usize).min(3)
}

#[test]
fn a_step_out_of_a_constant_alarms_as_soon_as_the_limit_on_a_score_allows() {
    for params in settings() {
        for (before, after) in [
            (5.0, 6.0),
            (5.0, 5.0001),
            (1e9, 1e9 + 1.0),
            (0.3, 1e12),
            (1e-300, 2e-300),
        ] {
            for (before, after) in [(before, after), (after, before)] {
                if before > after && params.direction == Direction::Up {
                    continue;
                }
                let series: Vec<f64> = (0..400)
                    .map(|t| if t < 200 { before } else { after })
                    .collect();
                let found = alarms(&params, &series);
                let first = found.first().copied().unwrap_or(usize::MAX);
                assert_eq!(
                    first,
                    200 + fewest(&params),
                    "{params:?}: {before} to {after}: {found:?}"
                );
            }
        }
    }
}

#[test]
fn with_the_presets_that_is_after_two_or_three_observations() {
    let both = CalibratedCusumParams {
        reference: Reference::LAGGED,
        ..Default::default()
    };
    assert_eq!(fewest(&both), 3);
    for streams in [1, 10, 100] {
        assert_eq!(fewest(&CalibratedCusumParams::training(streams)), 2);
    }
}

#[test]
fn a_bank_sees_it_as_a_single_detector_does() {
    for params in settings() {
        let mut bank = BankParams {
            detector: params,
            capacity: 3,
        }
        .check()
        .expect("valid");
        let ids = [bank.add(), bank.add(), bank.add()];
        let of_each = CalibratedCusumParams {
            alpha: params.alpha / 3.0,
            ..params
        };
        let mut found = Vec::new();
        for t in 1..=220 {
            let x = if t <= 200 { 5.0 } else { 6.0 };
            let alarmed = bank.update(&[5.0, x, 5.0]).expect("finite").to_vec();
            found.extend(alarmed.into_iter().map(|place| (t, bank.ids()[place])));
        }
        let first = found.first().copied();
        assert_eq!(
            first,
            Some((200 + fewest(&of_each), ids[1])),
            "{params:?}: {found:?}"
        );
        assert!(
            found.iter().all(|(_, id)| *id == ids[1]),
            "{params:?}: {found:?}"
        );
    }
}

#[test]
fn the_size_of_a_step_does_not_hide_it() {
    for params in settings() {
        for power in 2..=12 {
            for sign in [1.0, -1.0] {
                if sign < 0.0 && params.direction == Direction::Up {
                    continue;
                }
                let mut rng = ChaCha8Rng::seed_from_u64(power as u64);
                let step = sign * 10f64.powi(power);
                let level = 1e3 * 10f64.powi(power);
                let series: Vec<f64> = (0..400)
                    .map(|t| {
                        level
                            + rng.sample::<f64, _>(StandardNormal)
                            + if t < 200 { 0.0 } else { step }
                    })
                    .collect();
                let found = alarms(&params, &series);
                let first = found
                    .iter()
                    .find(|&&t| t > 200)
                    .copied()
                    .unwrap_or(usize::MAX);
                let most = 200 + fewest(&params) + 1;
                assert!(first <= most, "{params:?}, step {step:e}: {found:?}");
            }
        }
    }
}

#[test]
fn rounding_and_what_repeats_exactly_are_no_change() {
    let rounded = |t: usize| 1.0 + f64::EPSILON * ((t * 7919) % 3) as f64;
    let tenth = |t: usize| [0.3, 0.1 + 0.2, 0.1 * 3.0][(t * 7919) % 101 % 3];
    let late = |t: usize| if t < 200 { 1.0 } else { 1.0 + f64::EPSILON };
    let alternating = |t: usize| 5.0 + (t % 2) as f64;
    let ramp = |t: usize| 3.0 + 0.1 * t as f64;
    // One different value in forty, out of a constant.
    let rare = |t: usize| {
        if t > 200 && t.is_multiple_of(40) {
            6.0
        } else {
            5.0
        }
    };
    for params in settings() {
        let streams: [(&str, &dyn Fn(usize) -> f64); 6] = [
            ("rounded", &rounded),
            ("tenths", &tenth),
            ("last digit", &late),
            ("alternating", &alternating),
            ("ramp", &ramp),
            ("rare", &rare),
        ];
        for (name, stream) in streams {
            // A ramp is a change where drift is kept, and its logarithm is no ramp.
            if name == "ramp" && (params.drift == Drift::Keep || params.k > 1.0) {
                continue;
            }
            let series: Vec<f64> = (0..600).map(stream).collect();
            let found = alarms(&params, &series);
            assert!(found.is_empty(), "{params:?}, {name}: {found:?}");
        }
    }
}

/// Share of streams that reach the threshold within the horizon, as the detector's own scores have it.
fn share(params: &CalibratedCusumParams, phi: f64, streams: u64) -> f64 {
    let fresh = CalibratedCusumParams {
        after_alarm: AfterAlarm::Hold,
        ..*params
    }
    .check()
    .expect("valid");
    let Reference::Lagged { window, gap } = params.reference else {
        panic!("a lagged reference")
    };
    let first = (window + gap).max(params.warmup) as u64;
    let alarmed = (0..streams)
        .filter(|&seed| {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let mut x = rng.sample::<f64, _>(StandardNormal) / (1.0 - phi * phi).sqrt();
            let mut detector = fresh.clone();
            (0..first + params.horizon).any(|_| {
                let seen = match params.transform {
                    mass_cpd::Transform::Log => (0.2 * x).exp(),
                    mass_cpd::Transform::Identity => x,
                };
                let alarm = detector.update(seen).expect("finite").alarm;
                x = phi * x + rng.sample::<f64, _>(StandardNormal);
                alarm
            })
        })
        .count();
    alarmed as f64 / streams as f64
}

#[test]
fn it_alarms_as_often_as_it_says() {
    let preset = CalibratedCusumParams::training(1);
    let free = CalibratedCusumParams {
        score_limit: None,
        ..preset
    };
    let usual = CalibratedCusumParams {
        reference: Reference::LAGGED,
        ..Default::default()
    };
    let both = CalibratedCusumParams {
        direction: Direction::Both,
        ..preset
    };
    // A level in the jump of p at two scores at the limit cannot be used up: 0.026 +- 0.001 is as near as it gets.
    for (params, low, high) in [
        (preset, 0.018, 0.035),
        (free, 0.035, 0.065),
        (both, 0.035, 0.065),
        (
            CalibratedCusumParams {
                alpha: 0.2,
                ..preset
            },
            0.14,
            0.24,
        ),
        (CalibratedCusumParams { k: 1.0, ..preset }, 0.03, 0.065),
        (
            CalibratedCusumParams {
                k: 1.0,
                score_limit: Some(2.5),
                ..usual
            },
            0.025,
            0.06,
        ),
        (
            CalibratedCusumParams {
                horizon: 300,
                ..usual
            },
            0.02,
            0.065,
        ),
        (
            CalibratedCusumParams {
                reference: Reference::Lagged { window: 64, gap: 0 },
                ..usual
            },
            0.03,
            0.06,
        ),
        (
            CalibratedCusumParams {
                prewhiten: Prewhiten::None,
                ..usual
            },
            0.035,
            0.06,
        ),
    ] {
        let share = share(
            &params,
            if params.prewhiten != Prewhiten::None {
                0.3
            } else {
                0.0
            },
            3000,
        );
        assert!((low..=high).contains(&share), "{params:?}: {share}");
    }
}

/// Independent scores, which is what a self-starting reference has, with limits from low to none.
#[test]
fn a_limit_on_the_scores_is_calibrated() {
    for (k, limit, alpha, direction) in [
        (0.5, 1.0, 0.05, Direction::Up),
        (0.5, 2.0, 0.05, Direction::Both),
        (1.0, 2.0, 0.05, Direction::Up),
        (1.0, 1.2, 0.1, Direction::Both),
        (2.0, 3.0, 0.05, Direction::Up),
        (2.0, 4.0, 0.2, Direction::Both),
        (0.25, 1.5, 0.05, Direction::Up),
    ] {
        let params = CalibratedCusumParams {
            k,
            score_limit: Some(limit),
            alpha,
            direction,
            ..Default::default()
        };
        let detector = params.check().expect("valid");
        let (h, streams) = (detector.threshold(), 10_000);
        // What p says a threshold just over, or just under this one has, where it jumps.
        let (most, least) = (detector.p_horizon(h * (1.0 - 1e-9)), detector.p_horizon(h));
        let alarmed = (0..streams)
            .filter(|&seed| {
                let mut rng = ChaCha8Rng::seed_from_u64(seed);
                let (mut up, mut down) = (0.0f64, 0.0f64);
                (0..1000).any(|_| {
                    let z = rng.sample::<f64, _>(StandardNormal).clamp(-limit, limit);
                    up = (up + z - k).max(0.0);
                    down = if direction == Direction::Both {
                        (down - z - k).max(0.0)
                    } else {
                        0.0
                    };
                    up >= h || down >= h
                })
            })
            .count();
        let share = alarmed as f64 / streams as f64;
        let error = (alpha / streams as f64).sqrt();
        assert!(least <= alpha && most >= alpha * 0.999);
        assert!(
            (share - least).abs() < 4.0 * error + 0.02 * least,
            "k {k}, limit {limit}: p {least}, simulated {share} +- {error}"
        );
    }
}

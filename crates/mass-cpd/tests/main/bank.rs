//! A bank gives what single detectors give.

use mass_cpd::{
    AfterAlarm, Bank, BankParams, CalibratedCusum, CalibratedCusumParams, CpdError, Detector,
    Direction, Drift, Prewhiten, Reference, Scores, Transform, Watch,
};
use proptest::prelude::*;

fn settings() -> Vec<CalibratedCusumParams> {
    let base = CalibratedCusumParams {
        warmup: 10,
        ..Default::default()
    };
    let lagged = Reference::Lagged { window: 16, gap: 3 };
    vec![
        base,
        CalibratedCusumParams {
            transform: Transform::Log,
            drift: Drift::Remove,
            ..base
        },
        CalibratedCusumParams {
            prewhiten: Prewhiten::None,
            direction: Direction::Up,
            ..base
        },
        CalibratedCusumParams {
            after_alarm: AfterAlarm::Restart,
            direction: Direction::Down,
            ..base
        },
        CalibratedCusumParams {
            after_alarm: AfterAlarm::Hold,
            score_limit: None,
            ..base
        },
        CalibratedCusumParams {
            reference: lagged,
            drift: Drift::Remove,
            ..base
        },
        CalibratedCusumParams {
            watch: Watch::Spread,
            ..base
        },
        CalibratedCusumParams {
            prewhiten: Prewhiten::Chosen { most: 3 },
            scores: Scores::Ranks,
            ..base
        },
        CalibratedCusumParams {
            prewhiten: Prewhiten::Order(2),
            drift: Drift::Remove,
            ..base
        },
    ]
}

/// Single detectors at the level that each stream of a family of `live` has.
fn singles(params: CalibratedCusumParams, live: usize) -> Vec<CalibratedCusum> {
    let one = CalibratedCusumParams {
        alpha: params.alpha / live as f64,
        ..params
    };
    (0..live).map(|_| one.check().expect("valid")).collect()
}

fn bank(params: CalibratedCusumParams, live: usize) -> Bank {
    let mut bank = BankParams {
        detector: params,
        capacity: 2,
    }
    .check()
    .expect("valid");
    for _ in 0..live {
        bank.add();
    }
    bank
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn every_stream_is_a_detector_of_its_own(
        live in 1usize..20,
        rows in prop::collection::vec(prop::collection::vec(0.5..2.0f64, 20), 50..120),
        jump in 0.0..30.0f64,
    ) {
        for params in settings() {
            let mut bank = bank(params, live);
            let mut detectors = singles(params, live);
            for (t, row) in rows.iter().enumerate() {
                let mut row = row[..live].to_vec();
                if t > 40 {
                    row[live - 1] += jump;
                }
                let alarms = bank.update(&row).expect("positive").to_vec();
                let mut expected = Vec::new();
                for (place, (detector, &x)) in detectors.iter_mut().zip(&row).enumerate() {
                    let step = detector.update(x).expect("positive");
                    let got = bank.step(place).expect("live");
                    if step.alarm {
                        expected.push(place);
                    } else {
                        prop_assert_eq!(got, step, "{:?}", params);
                    }
                }
                prop_assert_eq!(alarms, expected);
            }
            let read: Bank =
                serde_json::from_str(&serde_json::to_string(&bank).expect("serialises")).expect("reads back");
            prop_assert_eq!(read.update_all(&rows, live), bank.update_all(&rows, live));
        }
    }

    #[test]
    fn a_gap_in_a_stream_is_a_gap_of_its_detector(
        rows in prop::collection::vec(prop::collection::vec(0.5..2.0f64, 11), 50..120),
        jump in 0.0..30.0f64,
        every in 2usize..9,
    ) {
        for params in settings() {
            let mut bank = bank(params, 11);
            let mut detectors = singles(params, 11);
            for (t, row) in rows.iter().enumerate() {
                let shift = if t > 40 { jump } else { 0.0 };
                let row: Vec<Option<f64>> = row
                    .iter()
                    .enumerate()
                    .map(|(i, x)| ((t * 7 + i * 3) % (every * 5) > 2).then_some(x + shift))
                    .collect();
                let alarms = bank.update_some(&row).expect("positive").to_vec();
                for (place, (detector, x)) in detectors.iter_mut().zip(&row).enumerate() {
                    let step = match x {
                        Some(x) => detector.update(*x).expect("positive"),
                        None => detector.skip(),
                    };
                    prop_assert_eq!(alarms.contains(&place), step.alarm);
                    if !step.alarm {
                        prop_assert_eq!(bank.step(place).expect("live"), step, "{:?}", params);
                    }
                }
            }
        }
    }

    #[test]
    fn streams_come_and_go_without_touching_the_others(
        plan in prop::collection::vec((0u8..10, 0usize..100), 60..150),
    ) {
        for params in settings() {
            let mut bank = bank(params, 0);
            let mut single: Vec<(mass_cpd::StreamId, CalibratedCusum)> = Vec::new();
            for (t, &(action, which)) in plan.iter().enumerate() {
                if action == 0 && !single.is_empty() {
                    let (id, _) = single.remove(which % single.len());
                    bank.remove(id).expect("live");
                    let gone = bank.remove(id);
                    prop_assert_eq!(gone, Err(CpdError::UnknownStream { id: id.get() }));
                } else if action == 1 || single.is_empty() {
                    // Holds through alarms, so that the changing level does not matter here.
                    let hold = CalibratedCusumParams { after_alarm: AfterAlarm::Hold, ..params };
                    single.push((bank.add(), hold.check().expect("valid")));
                }
                let x = |id: mass_cpd::StreamId| 1.0 + ((id.get() as usize * 31 + t * 17) % 23) as f64;
                let row: Vec<f64> = bank.ids().iter().map(|&id| x(id)).collect();
                let alarmed: Vec<_> =
                    bank.update(&row).expect("positive").to_vec().iter().map(|&p| bank.ids()[p]).collect();
                for (id, detector) in &mut single {
                    let step = detector.update(x(*id)).expect("positive");
                    let place = bank.place(*id).expect("live");
                    let got = bank.step(place).expect("live");
                    prop_assert_eq!(got.count, step.count);
                    if alarmed.is_empty() {
                        prop_assert_eq!(got.statistic, step.statistic);
                    }
                }
                if !alarmed.is_empty() && params.after_alarm != AfterAlarm::Hold {
                    break;
                }
            }
        }
    }
}

trait UpdateAll {
    fn update_all(self, rows: &[Vec<f64>], live: usize) -> Vec<Vec<usize>>;
}

impl UpdateAll for Bank {
    fn update_all(mut self, rows: &[Vec<f64>], live: usize) -> Vec<Vec<usize>> {
        rows.iter()
            .map(|r| self.update(&r[..live]).expect("positive").to_vec())
            .collect()
    }
}

#[test]
fn the_level_is_shared_by_the_live_streams() {
    let params = CalibratedCusumParams::default();
    let mut bank = bank(params, 10);
    assert_eq!(bank.threshold(), singles(params, 10)[0].threshold());
    let ids = bank.ids().to_vec();
    for id in &ids[1..] {
        bank.remove(*id).unwrap();
    }
    assert_eq!(bank.threshold(), singles(params, 1)[0].threshold());
    assert_eq!(bank.ids(), &ids[..1]);
}

/// Nor is it learned later, in the place of a stream that has gone.
#[test]
fn what_was_refused_is_in_no_state() {
    let mut bank = bank(CalibratedCusumParams::default(), 2);
    let second = bank.ids()[1];
    assert!(bank.update(&[1.0, f64::NAN]).is_err());
    bank.remove(second).unwrap();
    bank.update(&[1.0]).unwrap();
    let stored = serde_json::to_string(&bank).unwrap();
    assert_eq!(serde_json::from_str::<Bank>(&stored).unwrap(), bank);
}

#[test]
fn a_window_that_has_seen_more_than_its_stream_is_refused() {
    let params = CalibratedCusumParams {
        reference: Reference::Lagged { window: 8, gap: 0 },
        prewhiten: Prewhiten::None,
        ..Default::default()
    };
    let mut bank = bank(params, 1);
    bank.update(&[1.0]).unwrap();
    let mut stored = serde_json::to_value(&bank).unwrap();
    assert!(serde_json::from_value::<Bank>(stored.clone()).is_ok());
    let seen = stored["rolling"][0]["seen"].as_u64().unwrap();
    stored["rolling"][0]["seen"] = (seen + 8).into();
    let refused = serde_json::from_value::<Bank>(stored).unwrap_err();
    assert!(
        refused.to_string().contains("reference window"),
        "{refused}"
    );
}

#[test]
fn a_bad_batch_changes_nothing() {
    let params = CalibratedCusumParams {
        transform: Transform::Log,
        ..Default::default()
    };
    let mut bank = bank(params, 9);
    bank.update(&[1.0; 9]).unwrap();
    let before = bank.clone();
    let with = |value: f64| {
        let mut row = [2.0; 9];
        row[8] = value;
        row
    };
    assert_eq!(
        bank.update(&[1.0; 8]),
        Err(CpdError::BatchLength {
            got: 8,
            expected: 9
        })
    );
    assert!(matches!(
        bank.update(&with(f64::NAN)),
        Err(CpdError::NonFinite { count: 2, .. })
    ));
    assert!(matches!(
        bank.update(&with(0.0)),
        Err(CpdError::NonPositive { count: 2, .. })
    ));
    assert_eq!(bank, before);
    for place in 0..9 {
        assert_eq!(bank.step(place), before.step(place));
    }
    assert!(bank.update(&with(1e-310)).is_ok());
    assert!(bank.step(9).is_none());
    assert!(
        BankParams {
            detector: params,
            capacity: usize::MAX
        }
        .check()
        .is_err()
    );
}

#[test]
fn hostile_json_makes_no_broken_bank() {
    let stored = serde_json::to_value(bank(CalibratedCusumParams::default(), 3)).unwrap();
    for (key, nonsense) in [
        ("ids", serde_json::json!([0, 0, 1])),
        ("ids", serde_json::json!([0, 1, 2, 3, 4, 5, 6, 7, 8])),
        ("next_id", serde_json::json!(1)),
        ("blocks", serde_json::json!([])),
        ("windows", serde_json::json!([1.0])),
        ("alarms", serde_json::json!([3])),
    ] {
        let mut changed = stored.clone();
        changed[key] = nonsense;
        assert!(serde_json::from_value::<Bank>(changed).is_err(), "{key}");
    }
}

#[test]
fn an_alarm_stays_with_its_stream_when_another_is_removed() {
    let params = CalibratedCusumParams {
        warmup: 10,
        after_alarm: AfterAlarm::Hold,
        ..Default::default()
    };
    let noise = |t: usize, i: usize| {
        let mixed = (3 * t + i + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        ((mixed ^ (mixed >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9) >> 40) as f64
            / f64::from(1 << 24)
    };
    for removed in [0, 2] {
        let mut bank = bank(params, 3);
        let ids = bank.ids().to_vec();
        let alarmed = |bank: &mut Bank| {
            (0..200).any(|t| {
                let jump = if t >= 100 { 1.0 } else { 0.0 };
                let xs = [noise(t, 0), noise(t, 1), noise(t, 2) + jump];
                bank.update(&xs).expect("finite").contains(&2)
            })
        };
        assert!(alarmed(&mut bank));
        bank.remove(ids[removed]).expect("there");
        // What is left of the alarm is the stream's that raised it.
        for (place, id) in bank.ids().to_vec().into_iter().enumerate() {
            let step = bank.step(place).expect("there");
            assert_eq!(step.alarm, id == ids[2], "{removed}: {id:?}");
        }
        let json = serde_json::to_string(&bank).expect("serialises");
        let again: Bank = serde_json::from_str(&json).expect("valid");
        assert_eq!(serde_json::to_string(&again).expect("serialises"), json);
    }
}

#[test]
fn room_that_no_machine_has_is_refused() {
    let vast = BankParams {
        detector: CalibratedCusumParams {
            reference: Reference::Lagged {
                window: 128,
                gap: 1 << 20,
            },
            ..Default::default()
        },
        capacity: 1 << 24,
    };
    assert!(matches!(
        vast.check(),
        Err(CpdError::Parameter {
            name: "capacity",
            ..
        })
    ));
}

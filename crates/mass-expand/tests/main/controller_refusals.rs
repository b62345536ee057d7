//! What the controller refuses: parameters, observations, answers, stored states.

use crate::drive::{Figures, begin_with, every_step, observation, step_with_worth};
use mass_cpd::{CalibratedCusumParams, Reference, Transform, WindowedZParams};
use mass_expand::*;

#[test]
fn calls_out_of_turn_and_strange_answers_are_refused() {
    let mut controller = ControllerParams {
        stop: StopRule::Consecutive { gamma: 1 },
        ..every_step(2, 4)
    }
    .check()
    .unwrap();
    assert!(matches!(
        controller.finish_step(),
        Err(ExpandError::Protocol {
            called: "finish_step",
            ..
        })
    ));
    let answer = |expert, masked| Answer::MaskedLoss {
        layer: 0,
        expert: ExpertId(expert),
        masked,
        full: 0.0,
    };
    assert!(matches!(
        controller.answer(answer(0, 1.0)),
        Err(ExpandError::Protocol {
            called: "answer",
            ..
        })
    ));
    step_with_worth(&mut controller, 5, 1.0);
    assert!(matches!(
        Figures::new(0).begin(&mut controller, 5),
        Err(ExpandError::StepOrder { got: 5, last: 5 })
    ));
    Figures::new(0).begin(&mut controller, 6).unwrap();
    assert!(matches!(
        Figures::new(0).begin(&mut controller, 7),
        Err(ExpandError::Protocol { .. })
    ));
    assert!(matches!(
        controller.finish_step(),
        Err(ExpandError::Protocol { .. })
    ));
    assert!(matches!(
        controller.answer(answer(0, 1.0)),
        Err(ExpandError::UnknownRequest { .. })
    ));
    assert!(matches!(
        controller.answer(answer(2, f64::NAN)),
        Err(ExpandError::NonFinite { .. })
    ));
    assert_eq!(controller.open_requests().len(), 1);
    let elsewhere = Answer::MaskedLoss {
        layer: 99,
        expert: ExpertId(2),
        masked: 1.0,
        full: 0.0,
    };
    assert!(matches!(
        controller.answer(elsewhere),
        Err(ExpandError::UnknownRequest { layer: 99, .. })
    ));
    controller.answer(answer(2, 1.0)).unwrap();
    controller.finish_step().unwrap();

    let mut experts = observation(controller.active(0));
    experts.swap(0, 1);
    assert!(matches!(
        begin_with(&mut controller, 7, 1.0, &[experts]),
        Err(ExpandError::Experts { .. })
    ));
    let mut experts = observation(controller.active(0));
    experts[0].cosine = Some(1.5);
    assert!(matches!(
        begin_with(&mut controller, 7, 1.0, &[experts]),
        Err(ExpandError::Observation { layer: 0, .. })
    ));
    // Which expert's gradient has exploded is in the message.
    let mut experts = observation(controller.active(0));
    experts[1].gradient_norm = f64::NAN;
    let exploded = begin_with(&mut controller, 7, 1.0, &[experts]).unwrap_err();
    let which = controller.active(0)[1];
    let said = exploded.to_string();
    assert!(
        said.starts_with(&format!("layer 0, expert {which}: gradient_norm")),
        "{said}"
    );
    let mut controller = ControllerParams::calibrated(1, 2, 4, 100).check().unwrap();
    let mut experts = observation(controller.active(0));
    experts[1].loss_share = None;
    assert!(matches!(
        begin_with(&mut controller, 0, 1.0, &[experts]),
        Err(ExpandError::Missing {
            what: "loss_share",
            layer: 0
        })
    ));
    for (share, taken) in [
        (1.5, false),
        (1.01, false),
        (-0.1, false),
        (1.0 + 1e-6, true),
    ] {
        let mut experts = observation(controller.active(0));
        experts[1].loss_share = Some(share);
        let answer = begin_with(&mut controller.clone(), 0, 1.0, &[experts]);
        assert_eq!(answer.is_ok(), taken, "{share}: {answer:?}");
    }
    // Of no use to a rule without an alignment test, and still no matrix.
    for (hidden, dim) in [(0, 0), (0, 4), (8, 0)] {
        let experts = observation(controller.active(0));
        let layers = [LayerObservation::new(&experts, hidden, dim)];
        assert_eq!(
            controller.begin_step(&StepObservation::new(0, 1.0, &layers)),
            Err(ExpandError::Empty {
                what: "weight matrix"
            })
        );
    }
    assert!(Answer::probe(0, ExpertId(0), &[1.0], &[1.0]).is_err());
    assert!(Answer::probe(0, ExpertId(0), &[1.0, 2.0], &[1.0]).is_err());
    assert!(Answer::probe(0, ExpertId(0), &[1.0, f64::NAN], &[1.0, 1.0]).is_err());
}

/// A state that can be saved can be read back, whatever numbers its steps have.
#[test]
fn any_step_that_is_taken_can_be_stored() {
    let mut controller = every_step(2, 4).check().unwrap();
    for step in [1 << 60, u64::MAX] {
        step_with_worth(&mut controller, step, 1.0);
        let text = serde_json::to_string(&controller).unwrap();
        assert_eq!(
            serde_json::from_str::<Controller>(&text).unwrap(),
            controller
        );
    }
}

#[test]
fn parameters_out_of_range_are_refused() {
    let good = || ControllerParams::paper(1, 2, 4, 1000);
    let log = CalibratedCusumParams {
        transform: Transform::Log,
        ..CalibratedCusumParams::default()
    };
    let broken: Vec<(&str, ControllerParams)> = vec![
        (
            "no layers",
            ControllerParams {
                experts: vec![],
                ..good()
            },
        ),
        (
            "no experts",
            ControllerParams {
                experts: vec![0],
                ..good()
            },
        ),
        (
            "more than k_max",
            ControllerParams {
                experts: vec![5],
                ..good()
            },
        ),
        (
            "memory of detectors",
            ControllerParams {
                experts: vec![1 << 20],
                k_max: 1 << 20,
                watch: Watch::experts(CalibratedCusumParams {
                    reference: Reference::Lagged {
                        window: 1 << 20,
                        gap: 16,
                    },
                    ..CalibratedCusumParams::default()
                }),
                ..good()
            },
        ),
        (
            "averaging",
            ControllerParams {
                averaging_steps: 0.5,
                ..good()
            },
        ),
        (
            "averaging",
            ControllerParams {
                averaging_steps: f64::NAN,
                ..good()
            },
        ),
        (
            "delta",
            ControllerParams {
                alignment: AlignmentThreshold::Absolute(0.0),
                ..good()
            },
        ),
        (
            "c0",
            ControllerParams {
                alignment: AlignmentThreshold::Scaled { c0: f64::INFINITY },
                ..good()
            },
        ),
        ("every", good().with_schedule(0, 0)),
        (
            "gamma",
            ControllerParams {
                stop: StopRule::Consecutive { gamma: 0 },
                ..good()
            },
        ),
        (
            "margin",
            ControllerParams {
                stop: StopRule::HeldOut {
                    margin: -1.0,
                    z: 0.0,
                    wait: 1,
                    patience: 1,
                    remove: true,
                },
                ..good()
            },
        ),
        (
            "wait",
            ControllerParams {
                stop: StopRule::HeldOut {
                    margin: 0.0,
                    z: 0.0,
                    wait: 0,
                    patience: 1,
                    remove: true,
                },
                ..good()
            },
        ),
        (
            "phase",
            ControllerParams {
                phase: Phase {
                    live_from: 5,
                    live_until: 5,
                    continual: None,
                },
                ..good()
            },
        ),
        (
            "alpha",
            ControllerParams {
                watch: Watch::experts(WindowedZParams::paper(5, 10, 0.0)),
                ..good()
            },
        ),
        (
            "nothing watched",
            ControllerParams {
                watch: Watch {
                    expert: None,
                    layer: None,
                    loss: None,
                    level: Level::PerStream,
                },
                ..good()
            },
        ),
        (
            "log of zero",
            ControllerParams {
                watch: Watch::experts(log),
                ..good()
            },
        ),
        (
            "share",
            ControllerParams {
                pruning: Some(Pruning {
                    min_experts: 1,
                    min_age: 1,
                    unused: Some(PruneUnused {
                        share: 1.0,
                        steps: 1,
                    }),
                    redundant: None,
                }),
                ..good()
            },
        ),
        (
            "strength",
            ControllerParams {
                operator: SplitOperator::Bisect(BisectParams {
                    strength: -1.0,
                    ..BisectParams::default()
                }),
                ..good()
            },
        ),
        (
            "max_iterations",
            ControllerParams {
                operator: SplitOperator::Bisect(BisectParams {
                    max_iterations: 0,
                    ..BisectParams::default()
                }),
                ..good()
            },
        ),
        (
            "min_experts",
            ControllerParams {
                pruning: Some(Pruning {
                    min_experts: 0,
                    min_age: 1,
                    unused: None,
                    redundant: None,
                }),
                ..good()
            },
        ),
    ];
    for (what, params) in broken {
        assert!(params.check().is_err(), "{what}");
    }
    // Before room is made for them.
    for params in [
        ControllerParams::paper(usize::MAX, 2, 4, 100),
        ControllerParams::ours(1, 4_000_000_000, 4_000_000_000, 100),
        ControllerParams::calibrated(1 << 10, (1 << 10) + 1, 1 << 11, 100),
    ] {
        assert!(matches!(
            params.check(),
            Err(ExpandError::Parameter {
                name: "experts",
                ..
            })
        ));
    }
    good().check().unwrap();
    ControllerParams::reference(2, 6, 8, 5000).check().unwrap();
    ControllerParams::calibrated(2, 6, 8, 5000).check().unwrap();
    ControllerParams::calibrated(2, 6, 8, 5000)
        .continual(0.01, 1000)
        .check()
        .unwrap();
    good()
        .alignment_only()
        .random_expert(3)
        .plain_cloning()
        .check()
        .unwrap();
    good().most_loaded().check().unwrap();
}

#[test]
fn hostile_states_are_refused() {
    let mut controller = every_step(2, 4).check().unwrap();
    step_with_worth(&mut controller, 0, 1.0);
    let good = serde_json::to_value(&controller).unwrap();
    assert!(serde_json::from_value::<Controller>(good.clone()).is_ok());
    type Damage = fn(&mut serde_json::Value);
    let damages: [(&str, Damage); 16] = [
        ("k_max", |v| v["params"]["k_max"] = 2.into()),
        ("order", |v| {
            v["layers"][0]["ids"] = serde_json::json!([1, 0, 2])
        }),
        ("twice", |v| {
            v["layers"][0]["ids"] = serde_json::json!([0, 0, 2])
        }),
        ("next name", |v| v["layers"][0]["next_id"] = 1.into()),
        ("too few states", |v| {
            v["layers"][0]["ids"] = serde_json::json!([0, 1])
        }),
        ("no such pair", |v| {
            v["layers"][0]["pairs"] = serde_json::json!([[0, 9]])
        }),
        ("no such newest", |v| {
            v["layers"][0]["newest"]["id"] = 9.into()
        }),
        ("no detector", |v| {
            v["layers"][0]["experts"][0]["detector"] = serde_json::Value::Null
        }),
        ("layers", |v| v["layers"] = serde_json::json!([])),
        ("expansions", |v| {
            v["layers"][0]["expansions"] = u64::MAX.into()
        }),
        ("another expansion", |v| {
            v["layers"][0]["expansions"] = 2.into()
        }),
        ("weight", |v| {
            v["layers"][0]["experts"][0]["load"] =
                serde_json::json!({ "value": 1.0, "weight": -1.0 })
        }),
        ("negative load", |v| {
            v["layers"][0]["experts"][0]["load"] =
                serde_json::json!({ "value": -1.0, "weight": 1.0 })
        }),
        ("not born yet", |v| {
            v["layers"][0]["experts"][2]["born"] = 1.into()
        }),
        ("newest not born yet", |v| {
            v["layers"][0]["newest"]["born"] = 1.into()
        }),
        ("not probed yet", |v| v["layers"][0]["probed_at"] = 1.into()),
    ];
    for (what, damage) in damages {
        let mut state = good.clone();
        damage(&mut state);
        assert!(
            serde_json::from_value::<Controller>(state).is_err(),
            "{what}"
        );
    }
    Figures::new(1).begin(&mut controller, 1).unwrap();
    let mut state = serde_json::to_value(&controller).unwrap();
    state["pending"]["layers"][0]["source"]["id"] = 77.into();
    assert!(serde_json::from_value::<Controller>(state).is_err());
}

/// Detectors are those of the parameters: one of logarithms would fail at a zero, in the middle of a step.
#[test]
fn stored_detectors_are_those_of_the_parameters() {
    let cusum = |transform| CalibratedCusumParams {
        transform,
        alarm_at: mass_cpd::AlarmAt::AverageRunLength(1000.0),
        ..CalibratedCusumParams::default()
    };
    let (log, identity) = (cusum(Transform::Log), cusum(Transform::Identity));
    let windows = |alpha| WindowedZParams::paper(5, 5, alpha);
    let monitor = |horizon| mass_cpd::TrainingMonitorParams {
        horizon,
        ..Default::default()
    };
    let kinds: [[mass_cpd::AnyDetectorParams; 2]; 4] = [
        [identity.into(), log.into()],
        [windows(0.01).into(), windows(0.02).into()],
        [monitor(None).into(), monitor(Some(5000)).into()],
        [identity.into(), windows(0.01).into()],
    ];
    for kind in kinds {
        let [own, other] = kind.map(|detector| {
            let watch = Watch {
                expert: Some(detector.clone()),
                layer: Some(detector.clone()),
                loss: Some(detector),
                level: Level::Shared,
            };
            // A third of an alpha is no number that a text need keep.
            let mut params = every_step(3, 7);
            (params.watch, params.unused) = (watch, Unused::Skip);
            let mut controller = params.check().unwrap();
            step_with_worth(&mut controller, 0, 1.0);
            serde_json::to_value(&controller).unwrap()
        });
        assert!(serde_json::from_value::<Controller>(own.clone()).is_ok());
        for at in [
            "/loss_detector",
            "/layers/0/detector",
            "/layers/0/experts/0/detector",
        ] {
            let mut state = own.clone();
            *state.pointer_mut(at).unwrap() = other.pointer(at).unwrap().clone();
            let read = serde_json::from_value::<Controller>(state);
            assert!(read.is_err(), "{at} of {other}");
        }
    }
}

/// An answer that was not checked when it was given is checked when it is read.
#[test]
fn a_stored_answer_is_one_that_could_have_been_given() {
    let params = ControllerParams {
        stop: StopRule::HeldOut {
            margin: 0.0,
            z: 1.0,
            wait: 1,
            patience: 1,
            remove: true,
        },
        ..every_step(2, 4)
    };
    let mut controller = params.check().unwrap();
    step_with_worth(&mut controller, 0, 1.0);
    let asked = Figures::new(1).begin(&mut controller, 1).unwrap();
    controller
        .answer(Figures::new(1).answer(1, asked[0]))
        .unwrap();
    let state = serde_json::to_value(&controller).unwrap();
    let at = "/pending/layers/0/check_answer/standard_error";
    for (error, taken) in [
        (0.01.into(), true),
        ((-0.01).into(), false),
        (().into(), false),
    ] {
        let mut state = state.clone();
        *state.pointer_mut(at).unwrap() = error;
        assert_eq!(serde_json::from_value::<Controller>(state).is_ok(), taken);
    }
}

#[test]
fn figures_beyond_the_detectors_change_nothing() {
    let mut controller = ControllerParams::calibrated(1, 2, 4, 1000).check().unwrap();
    Figures::new(0).begin(&mut controller, 0).unwrap();
    controller.finish_step().unwrap();
    let before = serde_json::to_string(&controller).unwrap();
    for (loss, norm) in [(1.0, 1e200), (1.0, 9e39), (1e41, 1.0)] {
        let mut experts = observation(controller.active(0));
        experts.iter_mut().for_each(|e| e.gradient_norm = norm);
        let refused = begin_with(&mut controller, 1, loss, &[experts]);
        assert!(
            matches!(refused, Err(ExpandError::Parameter { .. })),
            "{loss}, {norm}"
        );
        assert_eq!(serde_json::to_string(&controller).unwrap(), before);
    }
    Figures::new(0).begin(&mut controller, 1).unwrap();
    // A detector of logarithms, of whichever kind, cannot be fed zeros.
    let mut params = ControllerParams::calibrated(1, 2, 4, 1000);
    params.unused = Unused::ObserveZero;
    params.watch.expert = Some(mass_cpd::AnyDetectorParams::TrainingMonitor(
        mass_cpd::TrainingMonitorParams {
            transform: Transform::Log,
            ..Default::default()
        },
    ));
    assert!(matches!(
        params.check(),
        Err(ExpandError::Parameter { name: "unused", .. })
    ));
}

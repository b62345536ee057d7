//! The controller's detectors: how the level is shared among them, when they start afresh, and what they cause.

use crate::drive::{Figures, begin_with, observation};
use mass_cpd::{
    AnyDetectorParams, CalibratedCusumParams, Direction, Reference, TrainingMonitorParams,
    WindowedZParams,
};
use mass_expand::*;
use serde_json::Value;

/// A figure of a stored detector of any kind; `None` where there is no detector.
fn figure<'a>(detector: &'a Value, pointer: &str) -> Option<&'a Value> {
    detector.as_object()?.values().next()?.pointer(pointer)
}

fn count(detector: &Value) -> u64 {
    figure(detector, "/count").map_or(0, |count| count.as_u64().unwrap())
}

fn level(detector: &Value) -> f64 {
    figure(detector, "/params/alpha").map_or(0.0, |alpha| alpha.as_f64().unwrap())
}

/// The stored detectors of each layer's experts, of the layers, and of the loss.
fn detectors(controller: &Controller) -> (Vec<Vec<Value>>, Vec<Value>, Value) {
    let state = serde_json::to_value(controller).unwrap();
    let layers = state["layers"].as_array().unwrap();
    let experts = |layer: &Value| -> Vec<Value> {
        let experts = layer["experts"].as_array().unwrap();
        experts.iter().map(|e| e["detector"].clone()).collect()
    };
    (
        layers.iter().map(experts).collect(),
        layers.iter().map(|l| l["detector"].clone()).collect(),
        state["loss_detector"].clone(),
    )
}

fn counts_of(detectors: &[Value]) -> Vec<u64> {
    detectors.iter().map(count).collect()
}

/// How many observations the detectors have taken since they began.
fn counts(controller: &Controller) -> (Vec<Vec<u64>>, Vec<u64>, u64) {
    let (experts, layers, loss) = detectors(controller);
    let experts = experts.iter().map(|e| counts_of(e)).collect();
    (experts, counts_of(&layers), count(&loss))
}

/// Every detector of a kind has the level given for an expert, a layer, the loss; zero stands for no detector.
fn assert_levels(controller: &Controller, [expert, layer, loss]: [f64; 3]) {
    let (experts, layers, loss_detector) = detectors(controller);
    let of_experts = experts.iter().flatten().map(|d| (level(d), expert));
    let of_layers = layers.iter().map(|d| (level(d), layer));
    let of_loss = [(level(&loss_detector), loss)];
    for (found, expected) in of_experts.chain(of_layers).chain(of_loss) {
        assert!(
            (found - expected).abs() <= 1e-12 * expected,
            "{found} instead of {expected}"
        );
    }
}

/// A step in which the loss and every norm are one and every check comes out as `worth`; `change` alters the figures.
fn step(
    controller: &mut Controller,
    at: u64,
    worth: f64,
    change: impl FnOnce(&mut [Vec<ExpertObservation>]),
) -> Vec<Action> {
    let mut layers: Vec<Vec<ExpertObservation>> = (0..controller.layers())
        .map(|layer| observation(controller.active(layer)))
        .collect();
    change(&mut layers);
    begin_with(controller, at, 1.0, &layers).unwrap();
    let figures = Figures {
        worth: Some(worth),
        ..Figures::new(0)
    };
    figures.finish(controller, at)
}

/// A shared level is divided by the kinds watched, the layers, and for an expert by the most that a layer may have.
#[test]
fn a_shared_level_is_divided_among_all_streams_that_there_may_be() {
    let calibrated = ControllerParams::calibrated(2, 3, 6, 1000);
    let shares = [0.05 / 36.0, 0.05 / 6.0, 0.05 / 3.0];
    assert_levels(&calibrated.check().unwrap(), shares);

    let others: [AnyDetectorParams; 2] = [
        WindowedZParams::paper(10, 20, 0.05).into(),
        TrainingMonitorParams {
            alpha: 0.05,
            ..TrainingMonitorParams::default()
        }
        .into(),
    ];
    for detector in others {
        let watch = Watch {
            expert: Some(detector.clone()),
            layer: Some(detector.clone()),
            loss: Some(detector),
            level: Level::Shared,
        };
        let params = ControllerParams {
            watch,
            ..calibrated.clone()
        };
        assert_levels(&params.check().unwrap(), shares);
    }

    let mut two_kinds = calibrated.clone();
    two_kinds.watch.expert = None;
    assert_levels(&two_kinds.check().unwrap(), [0.0, 0.05 / 4.0, 0.05 / 2.0]);
    let mut per_stream = calibrated;
    per_stream.watch.level = Level::PerStream;
    assert_levels(&per_stream.check().unwrap(), [0.05; 3]);
}

/// A split starts source, newcomer, layer and loss afresh as its rule says, and a removal sibling, layer and loss; nobody else.
#[test]
fn splits_and_removals_start_afresh_only_what_the_rule_names() {
    // Counts after the split of the source, and of layer and loss; and of both after the removal.
    let rules: [(AfterSplit, u64, u64, u64, u64); 3] = [
        (AfterSplit::Keep, 21, 21, 71, 71),
        (AfterSplit::ResetSourceCount, 0, 21, 50, 71),
        (AfterSplit::Rewarm, 0, 0, 0, 0),
    ];
    for (after_split, source, split, back, removed) in rules {
        let params = ControllerParams {
            choice: Choice::TriggeredLowestIndex,
            after_split,
            ..ControllerParams::calibrated(2, 3, 6, 1000).alignment_only()
        };
        let mut controller = params.check().unwrap();
        for at in 0..=70 {
            // One expert of one layer drifts, once. Its newcomer fails the check, 50 steps later.
            let actions = step(&mut controller, at, -1.0, |layers| {
                for expert in layers.iter_mut().flatten() {
                    expert.cosine = Some(0.5);
                }
                if at == 20 {
                    layers[0][1].cosine = Some(0.0);
                }
            });
            let (experts, layers, loss) = counts(&controller);
            match at {
                20 => {
                    assert!(matches!(
                        actions[..],
                        [Action::Split {
                            layer: 0,
                            source: ExpertId(1),
                            newcomer: ExpertId(3),
                            ..
                        }]
                    ));
                    assert_eq!(experts[0], [21, source, 21, 0], "{after_split:?}");
                    assert_eq!(experts[1], [21; 3], "{after_split:?}");
                    assert_eq!((layers, loss), (vec![split, 21], split), "{after_split:?}");
                }
                70 => {
                    assert!(matches!(
                        actions[..],
                        [Action::Remove {
                            layer: 0,
                            expert: ExpertId(3),
                            ..
                        }]
                    ));
                    // The sibling has the newcomer's tokens back.
                    assert_eq!(experts[0], [71, back, 71], "{after_split:?}");
                    assert_eq!(experts[1], [71; 3], "{after_split:?}");
                    assert_eq!(
                        (layers, loss),
                        (vec![removed, 71], removed),
                        "{after_split:?}"
                    );
                }
                _ => assert!(actions.is_empty(), "step {at}"),
            }
        }
    }
}

/// The continual phase brings calibrated detectors at its own level, which begin at its first step, and forgets failures.
#[test]
fn the_continual_phase_has_its_own_detectors_and_forgets_failed_checks() {
    let mut params = ControllerParams::paper(2, 3, 16, 1000).with_schedule(0, 40);
    params.phase.continual = Some(ControllerParams::calibrated_watch(0.01, 1000));
    params.unused = Unused::Skip;
    let mut controller = params.check().unwrap();
    let failures = |controller: &Controller| {
        let state = serde_json::to_value(controller).unwrap();
        [0usize, 1].map(|layer| state["layers"][layer]["failures"].as_u64().unwrap())
    };
    for at in 0..100 {
        step(&mut controller, at, -1.0, |_| {});
    }
    // Splits at 0, 40 and 80, the last two after a failed check.
    assert_eq!(failures(&controller), [2; 2]);
    assert_levels(&controller, [0.01, 0.0, 0.0]);
    assert_eq!(counts(&controller).0[1], [100, 100, 100, 99, 59, 19]);

    assert!(step(&mut controller, 100, -1.0, |_| {}).is_empty());
    assert_eq!(failures(&controller), [0; 2]);
    let shares = [0.01 / 96.0, 0.01 / 6.0, 0.01 / 3.0];
    assert_levels(&controller, shares);
    assert_eq!(counts(&controller), (vec![vec![1; 6]; 2], vec![1; 2], 1));
    let (experts, layers, loss) = detectors(&controller);
    for detector in experts.iter().flatten().chain(&layers).chain([&loss]) {
        assert!(detector.get("calibrated_cusum").is_some(), "{detector}");
        assert_eq!(
            figure(detector, "/params/horizon"),
            Some(&Value::from(1000))
        );
    }

    // The check of the next split fails too, the third time in all and the first of this phase.
    for at in 101..=120 {
        step(&mut controller, at, -1.0, |_| {});
    }
    assert_eq!(failures(&controller), [1; 2]);
    for layer in 0..2 {
        assert_eq!(controller.active(layer).len(), 7);
        assert_eq!(controller.stopped(layer), None);
    }
    assert_levels(&controller, shares);
}

/// After its schedule `ours` splits when the loss rises, in both layers. That the tokens, and with them the norms, go to one expert
/// is no reason, and neither is a rise of a layer's pooled norm.
#[test]
fn alarms_that_go_on_are_of_the_loss() {
    let mut params = ControllerParams::ours(2, 3, 16, 2000).continual(0.01, 1000);
    params.trigger = Trigger::ScheduleThenDetector { first: 2, every: 1 };
    params.phase.live_until = 4;
    let mut controller = params.check().unwrap();
    let figures = Figures::new(3);
    let mut split_at = Vec::new();
    for at in 0..1000 {
        let mut layers = figures.layers(&controller, at);
        for experts in &mut layers {
            let squares = experts.iter().map(|e| e.gradient_norm.powi(2));
            let pooled = squares.sum::<f64>().sqrt();
            for (e, expert) in experts.iter_mut().enumerate() {
                if at >= 400 {
                    expert.gradient_norm = pooled * if e == 0 { 1.0 } else { 0.05 };
                }
            }
        }
        let rises = |from| if at < from { 1.0 } else { 1.5 };
        for expert in &mut layers[1] {
            expert.gradient_norm *= rises(900);
        }
        let loss = figures.loss(at) * rises(500);
        begin_with(&mut controller, at, loss, &layers).unwrap();
        for action in figures.finish(&mut controller, at) {
            if let Action::Split { layer, .. } = action {
                split_at.push((at, layer));
            }
        }
    }
    assert_eq!(split_at[..4], [(2, 0), (2, 1), (3, 0), (3, 1)]);
    let [(at, 0), (same, 1)] = split_at[4..] else {
        panic!("{split_at:?}");
    };
    assert!(at == same && (500..504).contains(&at), "{split_at:?}");
}

/// An alarm of a layer's pooled norm makes all experts of that layer candidates, and splits in no other.
#[test]
fn an_alarm_of_one_layer_splits_in_that_layer_alone() {
    let detector = CalibratedCusumParams {
        horizon: 1000,
        alpha: 0.01,
        k: 1.0,
        reference: Reference::Lagged {
            window: 40,
            gap: 10,
        },
        prewhiten: mass_cpd::Prewhiten::None,
        direction: Direction::Up,
        warmup: 30,
        ..CalibratedCusumParams::default()
    };
    let params = ControllerParams {
        watch: Watch {
            expert: None,
            layer: Some(detector.into()),
            loss: None,
            level: Level::Shared,
        },
        ..ControllerParams::calibrated(2, 3, 6, 1000)
    };
    let mut controller = params.check().unwrap();
    let figures = Figures::new(3);
    let mut splits = Vec::new();
    let mut pooled = Vec::new();
    for at in 0..120 {
        let mut layers = figures.layers(&controller, at);
        if at >= 100 {
            for expert in &mut layers[1] {
                expert.gradient_norm *= 3.0;
            }
        }
        let squares = layers[1].iter().map(|e| e.gradient_norm.powi(2));
        pooled.push(squares.sum::<f64>().sqrt());
        begin_with(&mut controller, at, figures.loss(at), &layers).unwrap();
        for action in figures.finish(&mut controller, at) {
            if let Action::Split { layer, .. } = action {
                splits.push((at, layer));
            }
        }
    }
    let [(at, 1)] = splits[..] else {
        panic!("{splits:?}");
    };
    assert!((100..110).contains(&at), "{at}");

    let events = controller.drain_events();
    let flags: Vec<Event> = events
        .iter()
        .filter(|e| matches!(e.kind, EventKind::Flag { .. }))
        .copied()
        .collect();
    let [flag] = flags[..] else {
        panic!("{flags:?}");
    };
    assert_eq!((flag.step, flag.layer), (at, Some(1)));
    let EventKind::Flag {
        watched: Watched::Layer,
        expert: None,
        value,
        ..
    } = flag.kind
    else {
        panic!("{flag:?}");
    };
    assert!((value - pooled[at as usize]).abs() < 1e-9, "{value}");
    let trigger = events.iter().find_map(|e| match e.kind {
        EventKind::Trigger { candidates, .. } => Some((e.layer, candidates)),
        _ => None,
    });
    assert_eq!(trigger, Some((Some(1), 3)));
}

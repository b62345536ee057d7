//! The alarm behind a split is reported with it, whichever stream raised it; and who inherits tokens starts afresh.

use crate::drive::{Figures, begin_with, every_step, observation, step_with_worth};
use mass_cpd::{
    AnyDetectorParams, CalibratedCusumParams, Detector, Direction, Prewhiten, Reference,
    WindowedZParams,
};
use mass_expand::*;
use serde_json::Value;

fn detector() -> CalibratedCusumParams {
    CalibratedCusumParams {
        horizon: 1000,
        alpha: 0.01,
        k: 1.0,
        reference: Reference::Lagged {
            window: 40,
            gap: 10,
        },
        prewhiten: Prewhiten::None,
        direction: Direction::Up,
        warmup: 30,
        ..CalibratedCusumParams::default()
    }
}

/// Runs until the first split and returns its event, the trigger's, and the flags of that step.
fn first_split(
    params: &ControllerParams,
    jump: impl Fn(&mut [ExpertObservation], &mut f64),
) -> (EventKind, EventKind, Vec<EventKind>) {
    let mut controller = params.check().unwrap();
    let figures = Figures::new(3);
    for step in 0..120 {
        let mut layers = figures.layers(&controller, step);
        let mut loss = figures.loss(step);
        for expert in &mut layers[0] {
            // Whoever raises the alarm, the first has the largest share of the loss.
            expert.loss_share = Some(if expert.id.0 == 0 { 0.9 } else { 0.01 });
        }
        if step >= 100 {
            jump(&mut layers[0], &mut loss);
        }
        begin_with(&mut controller, step, loss, &layers).unwrap();
        figures.finish(&mut controller, step);
        let events = controller.drain_events();
        let of = |f: fn(&EventKind) -> bool| events.iter().map(|e| e.kind).find(f);
        if let Some(split) = of(|k| matches!(k, EventKind::Split { .. })) {
            let trigger = of(|k| matches!(k, EventKind::Trigger { .. })).unwrap();
            let flags = events.iter().map(|e| e.kind);
            let flags = flags.filter(|k| matches!(k, EventKind::Flag { .. }));
            return (split, trigger, flags.collect());
        }
    }
    panic!("nothing was split");
}

/// Source, stream, its expert, and p-values of a split, which are the trigger's too.
type Cause = (u32, Option<Watched>, Option<u32>, Option<f64>, Option<f64>);

fn cause(split: EventKind, trigger: EventKind) -> Cause {
    let EventKind::Split {
        source,
        watched,
        flagged,
        p_value,
        p_horizon,
        ..
    } = split
    else {
        panic!("{split:?}");
    };
    let of_split = (source.0, watched, flagged.map(|e| e.0), p_value, p_horizon);
    let EventKind::Trigger {
        source,
        watched,
        flagged,
        p_value,
        p_horizon,
        ..
    } = trigger
    else {
        panic!("{trigger:?}");
    };
    let of_trigger = (source.0, watched, flagged.map(|e| e.0), p_value, p_horizon);
    assert_eq!(of_split, of_trigger);
    of_split
}

fn p_of(flags: &[EventKind], stream: Watched, of: Option<u32>) -> (Option<f64>, Option<f64>) {
    let found = flags.iter().find_map(|flag| match *flag {
        EventKind::Flag {
            watched,
            expert,
            p_value,
            p_horizon,
            ..
        } if watched == stream && expert.map(|e| e.0) == of => Some((p_value, p_horizon)),
        _ => None,
    });
    found.unwrap_or_else(|| panic!("{stream:?} {of:?} in {flags:?}"))
}

#[test]
fn a_split_names_the_stream_that_raised_the_alarm_and_its_p_value() {
    let watch = |expert: bool, layer: bool, loss: bool| {
        let of = |wanted: bool| wanted.then(|| detector().into());
        Watch {
            expert: of(expert),
            layer: of(layer),
            loss: of(loss),
            level: Level::Shared,
        }
    };
    let calibrated = |watch| ControllerParams {
        watch,
        choice: Choice::LossShare,
        ..ControllerParams::calibrated(1, 3, 6, 1000)
    };
    type Jump = fn(&mut [ExpertObservation], &mut f64);
    let cases: [(Watch, Jump, Watched, Option<u32>); 4] = [
        // Another expert than the one that is split.
        (
            watch(true, false, false),
            |e, _| e[2].gradient_norm *= 4.0,
            Watched::Expert,
            Some(2),
        ),
        (
            watch(true, false, false),
            |e, _| e[0].gradient_norm *= 4.0,
            Watched::Expert,
            Some(0),
        ),
        (
            watch(false, true, false),
            |e, _| e.iter_mut().for_each(|e| e.gradient_norm *= 4.0),
            Watched::Layer,
            None,
        ),
        (
            watch(false, false, true),
            |_, loss| *loss *= 1.5,
            Watched::Loss,
            None,
        ),
    ];
    for (watch, jump, watched, flagged) in cases {
        let (split, trigger, flags) = first_split(&calibrated(watch), jump);
        let (source, stream, expert, p_value, p_horizon) = cause(split, trigger);
        assert_eq!((source, stream, expert), (0, Some(watched), flagged));
        assert_eq!((p_value, p_horizon), p_of(&flags, watched, flagged));
        assert!(p_value.is_some_and(|p| p < 0.01), "{p_value:?}");
    }
    // All at once: the source's own comes first, and where it has none, that with the smallest p-value.
    // Without a limit on scores one step is enough for every stream.
    let unlimited = CalibratedCusumParams {
        score_limit: None,
        ..detector()
    };
    let at_once = calibrated(Watch {
        expert: Some(unlimited.into()),
        layer: Some(unlimited.into()),
        loss: Some(unlimited.into()),
        level: Level::PerStream,
    });
    let all = |e: &mut [ExpertObservation], loss: &mut f64, from: usize| {
        e[from..].iter_mut().for_each(|e| e.gradient_norm *= 20.0);
        *loss *= 3.0;
    };
    let (split, trigger, flags) = first_split(&at_once, |e, loss| all(e, loss, 0));
    assert!(flags.len() > 2, "{flags:?}");
    let (_, stream, expert, p_value, _) = cause(split, trigger);
    assert_eq!((stream, expert), (Some(Watched::Expert), Some(0)));
    assert_eq!(p_value, p_of(&flags, Watched::Expert, Some(0)).0);
    let (split, trigger, flags) = first_split(&at_once, |e, loss| all(e, loss, 1));
    let smallest = flags.iter().filter_map(|flag| match flag {
        EventKind::Flag { p_value, .. } => *p_value,
        _ => None,
    });
    assert_eq!(cause(split, trigger).3, smallest.reduce(f64::min));
}

#[test]
fn an_alarm_that_the_alignment_test_turns_down_is_not_named() {
    let mut params = ControllerParams {
        watch: Watch::experts(WindowedZParams::paper(10, 20, 0.01)),
        ..ControllerParams::paper(1, 3, 6, 1500)
    };
    params.phase.live_until = 120;
    let (split, trigger, flags) = first_split(&params, |experts, _| {
        for expert in experts.iter_mut() {
            expert.gradient_norm *= 1.5 + f64::from(expert.id.0);
            expert.cosine = Some(if expert.id.0 == 1 { 0.0 } else { 0.5 });
        }
    });
    assert!(!flags.is_empty());
    let (source, stream, expert, p_value, _) = cause(split, trigger);
    assert_eq!(
        (source, stream, expert),
        (1, Some(Watched::Expert), Some(1))
    );
    assert_eq!(p_value, p_of(&flags, Watched::Expert, Some(1)).0);
}

#[test]
fn no_alarm_is_named_where_none_had_a_part() {
    for trigger in [
        Trigger::Schedule {
            first: 60,
            every: 10,
            splits: 1,
        },
        Trigger::AlignmentOnly,
    ] {
        // The detectors are warm and would have p-values to give.
        let mut params = ControllerParams {
            trigger,
            watch: Watch::experts(WindowedZParams::paper(10, 20, 0.5)),
            alignment: AlignmentThreshold::Absolute(1.0),
            ..ControllerParams::paper(1, 3, 6, 1500)
        };
        (params.phase.live_from, params.phase.live_until) = (50, 120);
        let (split, trigger, _) = first_split(&params, |_, _| {});
        let (_, watched, flagged, p_value, p_horizon) = cause(split, trigger);
        assert_eq!(
            (watched, flagged, p_value, p_horizon),
            (None, None, None, None)
        );
    }
}

/// Observations that each expert's detector has taken since it began.
fn counts(controller: &Controller) -> Vec<(u32, u64)> {
    let state = serde_json::to_value(controller).unwrap();
    let experts = state["layers"][0]["experts"].as_array().unwrap();
    let count = |expert: &Value| {
        let detector = expert["detector"].as_object().unwrap();
        detector.values().next().unwrap()["count"].as_u64().unwrap()
    };
    let ids = controller.active(0).iter().map(|id| id.0);
    ids.zip(experts.iter().map(count)).collect()
}

fn averaged(controller: &Controller, id: u32) -> u64 {
    let state = serde_json::to_value(controller).unwrap();
    let at = controller.active(0).iter().position(|e| e.0 == id).unwrap();
    state["layers"][0]["experts"][at]["averaged_steps"]
        .as_u64()
        .unwrap()
}

fn watched(mut params: ControllerParams, after_split: AfterSplit) -> ControllerParams {
    params.watch = Watch::experts(WindowedZParams::paper(1000, 1000, 1e-9));
    params.unused = Unused::Skip;
    params.after_split = after_split;
    params
}

/// What an expert's detector knows after steps without tokens is what one knows that was told of the gaps.
#[test]
fn an_expert_without_tokens_leaves_a_gap() {
    let mut params = every_step(2, 8).with_schedule(1000, 1000);
    params.watch = Watch::experts(detector());
    params.unused = Unused::Skip;
    let mut controller = params.check().unwrap();
    let mut alone = AnyDetectorParams::from(detector()).check().unwrap();
    for step in 0..90 {
        let mut experts = observation(controller.active(0));
        let norm = 1.0 + (step * 37 % 11) as f64 / 11.0;
        experts[0].gradient_norm = norm;
        if step % 3 == 1 {
            experts[0].load = 0;
            alone.skip();
        } else {
            alone.update(norm).unwrap();
        }
        begin_with(&mut controller, step, 1.0, &[experts]).unwrap();
        Figures::new(0).finish(&mut controller, step);
    }
    let state = serde_json::to_value(&controller).unwrap();
    let known = |detector: &Value| detector["calibrated_cusum"]["reference"].clone();
    let alone = known(&serde_json::to_value(&alone).unwrap());
    assert!(alone.is_object());
    assert_eq!(known(&state["layers"][0]["experts"][0]["detector"]), alone);
}

/// A failed check takes the newcomer out, and whoever it was split from gets its tokens back: that one starts afresh.
#[test]
fn the_sibling_of_a_removed_newcomer_starts_afresh() {
    for after_split in [AfterSplit::Rewarm, AfterSplit::Keep] {
        for source in 0..3u32 {
            let stop = StopRule::HeldOut {
                margin: 0.0,
                z: 0.0,
                wait: 10,
                patience: 9,
                remove: true,
            };
            let params = ControllerParams {
                stop,
                choice: Choice::MostLoaded,
                ..every_step(3, 8).with_schedule(20, 100_000)
            };
            let mut controller = watched(params, after_split).check().unwrap();
            for step in 0..=30 {
                let mut experts = observation(controller.active(0));
                for expert in &mut experts {
                    expert.load = if expert.id.0 == source { 90 } else { 10 };
                }
                begin_with(&mut controller, step, 1.0, &[experts]).unwrap();
                let figures = Figures {
                    worth: Some(-1.0),
                    ..Figures::new(0)
                };
                figures.finish(&mut controller, step);
            }
            assert_eq!(controller.active(0).len(), 3);
            let afresh = after_split == AfterSplit::Rewarm;
            for (id, count) in counts(&controller) {
                let expected = if id == source && afresh { 0 } else { 31 };
                assert_eq!(count, expected, "{after_split:?}: {id} of {source}");
                // What it was like with half its tokens is forgotten in any case.
                let steps = if id == source { 0 } else { 31 };
                assert_eq!(averaged(&controller, id), steps);
            }
        }
    }
}

/// Pruning: the half that is left inherits, or, where there is none, everyone to whom the tokens add much.
#[test]
fn whoever_inherits_from_a_pruned_expert_starts_afresh() {
    let redundant = |every| Pruning {
        min_experts: 1,
        min_age: 1,
        unused: None,
        redundant: Some(PruneRedundant {
            every,
            margin: 0.0,
            z: 0.0,
        }),
    };
    // No pair: of the loads given, the first expert's is divided among the others.
    for (loads, afresh) in [
        ([10, 10, 10], vec![1, 2]),
        ([10, 1000, 100], vec![2]),
        ([10, 1000, 1000], vec![]),
        ([0, 10, 10], vec![]),
    ] {
        let params = ControllerParams {
            pruning: Some(redundant(10)),
            ..every_step(3, 3).with_schedule(100_000, 1)
        };
        let mut controller = watched(params, AfterSplit::Rewarm).check().unwrap();
        for step in 0..=10 {
            let mut experts = observation(controller.active(0));
            for (expert, load) in experts.iter_mut().zip(loads) {
                expert.load = load;
            }
            begin_with(&mut controller, step, 1.0, &[experts]).unwrap();
            let figures = Figures {
                worth: Some(-1.0),
                ..Figures::new(0)
            };
            figures.finish(&mut controller, step);
        }
        assert_eq!(controller.active(0).len(), 2, "{loads:?}");
        for (id, count) in counts(&controller) {
            let expected = if afresh.contains(&id) { 0 } else { 11 };
            assert_eq!(count, expected, "{loads:?}: {id}");
        }
    }
    // A pair: its other half, whichever of the two goes.
    let params = ControllerParams {
        pruning: Some(redundant(20)),
        choice: Choice::TriggeredLowestIndex,
        ..every_step(3, 4).with_schedule(5, 100_000)
    };
    let mut controller = watched(params, AfterSplit::Rewarm).check().unwrap();
    for step in 0..=20 {
        step_with_worth(&mut controller, step, -1.0);
    }
    assert_eq!(counts(&controller), [(1, 21), (2, 21), (3, 0)]);
}

#[test]
fn whoever_inherits_from_an_unused_expert_starts_afresh() {
    // Under a half of the mean for ten steps is unused here; two tokens of a hundred add little.
    for (load, afresh) in [(30, true), (2, false)] {
        let params = ControllerParams {
            pruning: Some(Pruning {
                min_experts: 1,
                min_age: 1,
                unused: Some(PruneUnused {
                    share: 0.5,
                    steps: 10,
                }),
                redundant: None,
            }),
            ..every_step(3, 3).with_schedule(100_000, 1)
        };
        let mut controller = watched(params, AfterSplit::Rewarm).check().unwrap();
        for step in 0..10 {
            let mut experts = observation(controller.active(0));
            for expert in &mut experts {
                expert.load = if expert.id.0 == 1 { load } else { 100 };
            }
            begin_with(&mut controller, step, 1.0, &[experts]).unwrap();
            controller.finish_step().unwrap();
        }
        let expected = if afresh { 0 } else { 10 };
        assert_eq!(counts(&controller), [(0, expected), (2, expected)]);
    }
}

/// The case of the study: an expert is taken out, its sibling's norm rises with the tokens it gets back, and that is no change.
#[test]
fn tokens_that_come_back_raise_no_alarm() {
    let params = |after_split| {
        let mut params = ControllerParams {
            after_split,
            stop: StopRule::HeldOut {
                margin: 0.0,
                z: 0.0,
                wait: 60,
                patience: 9,
                remove: true,
            },
            ..ControllerParams::calibrated(1, 3, 6, 2000)
        };
        params.watch = Watch::experts(detector());
        params.choice = Choice::LossShare;
        params
    };
    let run = |after_split| {
        let mut controller = params(after_split).check().unwrap();
        let figures = Figures {
            worth: Some(-1.0),
            ..Figures::new(6)
        };
        let mut removed = None;
        let mut later = Vec::new();
        for step in 0..300 {
            let mut layers = figures.layers(&controller, step);
            let split = controller.active(0).len() > 3;
            for expert in &mut layers[0] {
                // A norm goes with the tokens: half of them, once split.
                let noise = 1.0 + 0.2 * figures.uniform(step, 0, expert.id.0, 1);
                let first = expert.id.0 == 0;
                let jump = first && (100..).contains(&step) && removed.is_none() && !split;
                let half = split && (first || expert.id.0 == 3);
                let factor = if half { 0.5 } else { 1.0 } * if jump { 2.0 } else { 1.0 };
                (expert.gradient_norm, expert.load) = (factor * noise, 100);
                expert.loss_share = Some(if first { 0.9 } else { 0.01 });
            }
            begin_with(&mut controller, step, figures.loss(step), &layers).unwrap();
            for action in figures.finish(&mut controller, step) {
                if matches!(action, Action::Remove { .. }) {
                    removed = Some(step);
                }
            }
            for event in controller.drain_events() {
                if matches!(event.kind, EventKind::Flag { .. }) && removed.is_some_and(|r| step > r)
                {
                    later.push(event);
                }
            }
        }
        assert!(removed.is_some(), "nothing was removed");
        later
    };
    assert_eq!(run(AfterSplit::Rewarm), []);
    assert!(
        !run(AfterSplit::Keep).is_empty(),
        "the rise is there to be seen"
    );
}

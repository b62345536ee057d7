//! What detectors saw around a split is in the record, once each, and changes no decision.

use std::collections::BTreeSet;

use crate::drive::Figures;
use mass_cpd::{AnyDetectorParams, WindowedZParams};
use mass_expand::*;

const TRACE: u64 = 7;
const STEPS: u64 = 120;

/// Detectors that raise alarms at random, so that splits are close enough for their traces to overlap.
fn nervous(trace: u64, loss_too: bool) -> ControllerParams {
    let detector = AnyDetectorParams::from(WindowedZParams::paper(
        10,
        10,
        if loss_too { 0.3 } else { 0.12 },
    ));
    ControllerParams {
        watch: Watch {
            expert: (!loss_too).then(|| detector.clone()),
            layer: None,
            loss: loss_too.then_some(detector),
            level: Level::PerStream,
        },
        alignment: AlignmentThreshold::Absolute(1.0),
        stop: StopRule::Never,
        phase: Phase {
            live_from: 0,
            live_until: STEPS,
            continual: None,
        },
        trace,
        ..ControllerParams::paper(2, 3, 300, STEPS)
    }
}

/// Actions and events, with the controller saved and restored every `every` steps.
fn run(params: &ControllerParams, every: u64) -> (Vec<Action>, Vec<Event>) {
    let figures = Figures::new(5);
    let mut controller = params.check().unwrap();
    let (mut actions, mut events) = (Vec::new(), Vec::new());
    for step in 0..STEPS {
        figures.begin(&mut controller, step).unwrap();
        if step % every == 0 {
            let stored = serde_json::to_value(&controller).unwrap();
            // So much is kept and no more.
            let streams = 1 + controller.active(0).len() + controller.active(1).len();
            let kept = stored["trace"]["recent"].as_array().map_or(0, Vec::len);
            assert!(kept <= (TRACE as usize + 1) * streams, "{kept}");
            controller = serde_json::from_value(stored).unwrap();
        }
        actions.extend(figures.finish(&mut controller, step));
        events.extend(controller.drain_events());
    }
    (actions, events)
}

fn is_observation(event: &Event) -> bool {
    matches!(event.kind, EventKind::Observation { .. })
}

#[test]
fn the_record_has_what_was_seen_around_each_split_once() {
    for of_loss in [false, true] {
        let (actions, events) = run(&nervous(TRACE, of_loss), 1000);
        // The streams and steps that belong to a split.
        let mut expected = BTreeSet::new();
        let mut splits = 0;
        for event in &events {
            if let EventKind::Split { flagged, .. } = event.kind {
                splits += 1;
                let layer = event.layer.filter(|_| !of_loss);
                let steps = event.step.saturating_sub(TRACE)..=(event.step + TRACE).min(STEPS - 1);
                expected.extend(steps.map(|step| (layer, flagged, step)));
            }
        }
        assert!(splits > 4, "{splits}");
        let born = |id: ExpertId| {
            let split = |e: &&Event| matches!(e.kind, EventKind::Split { new, .. } if new == id);
            events.iter().find(split).map(|e| e.step)
        };
        // An expert is seen from the step after its birth.
        expected.retain(|(_, expert, step)| {
            expert.is_none_or(|id| born(id).is_none_or(|b| *step > b) || of_loss)
        });
        let mut with_statistic = 0;
        let mut found = BTreeSet::new();
        for event in events.iter().filter(|e| is_observation(e)) {
            let EventKind::Observation {
                watched,
                expert,
                value,
                statistic,
                ..
            } = event.kind
            else {
                continue;
            };
            let new = found.insert((event.layer, expert, event.step));
            assert!(new, "twice: {event:?}");
            let seen = match expert {
                Some(id) => {
                    Figures::new(5)
                        .expert(event.step, event.layer.unwrap(), id)
                        .gradient_norm
                }
                None => Figures::new(5).loss(event.step),
            };
            assert_eq!(value, seen);
            assert_eq!(watched == Watched::Loss, of_loss);
            with_statistic += usize::from(statistic.is_some());
        }
        assert_eq!(found, expected);
        assert!(2 * with_statistic > found.len(), "{with_statistic}");

        // Nothing else is another, and a controller that was saved goes on alike.
        let (without, mut others) = run(&nervous(0, of_loss), 1000);
        assert!(!others.iter().any(is_observation));
        assert_eq!(actions, without);
        let mut kept = events.clone();
        kept.retain(|e| !is_observation(e));
        std::mem::swap(&mut others, &mut kept);
        assert_eq!(others, kept);
        assert_eq!(run(&nervous(TRACE, of_loss), 1), (actions, events));
    }
}

#[test]
fn no_trace_is_not_written_and_one_without_bound_is_refused() {
    let params = serde_json::to_value(nervous(0, false)).unwrap();
    assert!(params.get("trace").is_none());
    assert_eq!(
        serde_json::from_value::<ControllerParams>(params)
            .unwrap()
            .trace,
        0
    );
    let controller = serde_json::to_value(nervous(0, false).check().unwrap()).unwrap();
    assert!(controller.get("trace").is_none());
    let refused = nervous(1001, false).check().unwrap_err().to_string();
    assert!(refused.contains("trace"), "{refused}");
}

#[test]
fn a_stored_trace_that_is_none_is_refused() {
    let figures = Figures::new(5);
    let mut controller = nervous(TRACE, false).check().unwrap();
    for step in 0..20 {
        figures.step(&mut controller, step);
    }
    let stored = serde_json::to_value(&controller).unwrap();
    let kept = stored["trace"]["recent"].as_array().unwrap();
    assert!(kept.len() > 20, "{kept:?}");
    let restored = |change: fn(&mut serde_json::Value)| {
        let mut stored = stored.clone();
        change(&mut stored["trace"]);
        serde_json::from_value::<Controller>(stored)
    };
    assert_eq!(restored(|_| ()).unwrap(), controller);
    for change in [
        |trace: &mut serde_json::Value| trace["recent"][0]["step"] = 2.into(),
        |trace: &mut serde_json::Value| trace["recent"][0]["step"] = 99.into(),
        |trace: &mut serde_json::Value| trace["recent"][0]["layer"] = 2.into(),
        |trace: &mut serde_json::Value| trace["recent"][0]["kind"] = "continual_phase".into(),
    ] {
        assert!(restored(change).is_err());
    }
}

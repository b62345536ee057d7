//! The trigger that waits for the training loss to stop falling.

use crate::drive::{begin_with, every_step, observation};
use mass_expand::*;
use serde_json::Value;

fn step(controller: &mut Controller, at: u64, loss: f64) -> Vec<Action> {
    let layers: Vec<_> = (0..controller.layers())
        .map(|layer| observation(controller.active(layer)))
        .collect();
    begin_with(controller, at, loss, &layers).unwrap();
    controller.finish_step().unwrap()
}

/// Steps of a run on which a layer is split.
fn splits(controller: &mut Controller, steps: u64, loss: impl Fn(u64) -> f64) -> Vec<u64> {
    let split = |a: &Action| matches!(a, Action::Split { .. });
    (0..steps)
        .filter(|&at| step(controller, at, loss(at)).iter().any(split))
        .collect()
}

fn plateau(patience: u64, threshold: f64) -> ControllerParams {
    every_step(2, 30).on_plateau(patience, threshold)
}

#[test]
fn a_loss_that_falls_and_flattens_splits_every_patience_steps_from_there_on() {
    let mut controller = plateau(10, 0.05).check().unwrap();
    // Falls of 0.1 a step up to step 20.
    let falls_to_20 = |at: u64| 5.0 - 0.1 * at.min(20) as f64;
    assert_eq!(splits(&mut controller, 55, falls_to_20), [30, 40, 50]);
    assert_eq!(controller.diagnoses(), []);
    let events = controller.drain_events();
    let all = events.iter().filter_map(|e| match e.kind {
        EventKind::Trigger {
            candidates,
            watched,
            ..
        } => Some((candidates, watched)),
        _ => None,
    });
    let all: Vec<_> = all.collect();
    assert_eq!(all, [(2, None), (3, None), (4, None)]);
}

#[test]
fn the_threshold_has_to_be_exceeded_by_what_has_gathered_since_the_best() {
    let run = |threshold, loss: fn(u64) -> f64| {
        splits(&mut plateau(4, threshold).check().unwrap(), 21, loss)
    };
    // A quarter a step: three steps are more than a half.
    let slow = |at| 9.0 - 0.25 * at as f64;
    assert!(run(0.5, slow).is_empty());
    assert!(run(0.75, slow).is_empty());
    // Four steps fall by one, which is not more than one: at each fourth the count begins again.
    assert_eq!(run(1.0, slow), [4, 8, 12, 16, 20]);
    // A step that does not improve does not improve by more than zero either; the least fall does.
    assert_eq!(run(0.0, |_| 1.0), [4, 8, 12, 16, 20]);
    assert!(run(0.0, |at| 1.0 - 1e-9 * at as f64).is_empty());
    // A rise is no improvement, and the fall back to the best is none.
    assert_eq!(
        run(0.0, |at| if at == 2 { 3.0 } else { 1.0 }).first(),
        Some(&4)
    );
    // The one that follows the trigger is measured against the average then, not against the lowest of all.
    let up = |at: u64| if at < 3 { 1.0 } else { 9.0 - 0.1 * at as f64 };
    assert_eq!(run(0.0, up), [4]);
}

#[test]
fn it_is_the_average_that_has_to_improve() {
    // Every other loss is low; the average over four steps, computed here anew, says when.
    let (patience, threshold, keep) = (6, 0.02, 0.75f64);
    let loss =
        |at: u64| 2.0 - 0.01 * at.min(30) as f64 + if at.is_multiple_of(2) { 0.3 } else { 0.0 };
    let average = |at: u64| {
        let weights = (0..=at).map(|i| keep.powi((at - i) as i32));
        let sum: f64 = weights.clone().zip(0..=at).map(|(w, i)| w * loss(i)).sum();
        sum / weights.sum::<f64>()
    };
    let (mut best, mut improved, mut expected) = (average(0), 0, Vec::new());
    for at in 1..80 {
        if average(at) < best - threshold {
            (best, improved) = (average(at), at);
        } else if at - improved >= patience {
            expected.push(at);
            (best, improved) = (average(at), at);
        }
    }
    let params = ControllerParams {
        averaging_steps: 4.0,
        ..plateau(patience, threshold)
    };
    assert!(expected.len() > 3 && expected[0] > patience, "{expected:?}");
    assert_eq!(splits(&mut params.check().unwrap(), 80, loss), expected);
}

#[test]
fn it_keeps_to_the_phase() {
    // Flat from the start: found before the phase, it waits for it; the last step of the phase is 24.
    let mut params = plateau(5, 0.0);
    (params.phase.live_from, params.phase.live_until) = (12, 25);
    let mut controller = params.check().unwrap();
    assert_eq!(splits(&mut controller, 40, |_| 1.0), [12, 17, 22]);
    assert_eq!(controller.live_steps(), 3);
    assert_eq!(
        controller.diagnoses(),
        [Diagnosis::TriggeredAtOnce { layer: 0, step: 12 }]
    );
    // Unless the loss improves once more, also on the step on which the phase begins.
    for last_fall in [11, 12] {
        let fall = |at| if at < last_fall { 2.0 } else { 1.0 };
        let found = splits(&mut params.check().unwrap(), 40, fall);
        assert_eq!(found, [last_fall + 5, last_fall + 10]);
    }
    // The continual phase begins anew.
    let mut params = plateau(10, 0.0).continual(0.01, 1000);
    params.phase.live_until = 15;
    let mut controller = params.check().unwrap();
    assert_eq!(splits(&mut controller, 46, |_| 1.0), [10, 25, 35, 45]);
    let reach = params.reach();
    assert_eq!(
        (reach.first_split, reach.last_split),
        (Some(10), Some(9999))
    );
}

#[test]
fn a_run_whose_loss_falls_to_its_end_was_never_triggered() {
    let mut params = plateau(10, 0.0);
    params.phase.live_until = 50;
    let mut controller = params.check().unwrap();
    assert!(splits(&mut controller, 60, |at| 10.0 - 0.1 * at as f64).is_empty());
    let never = Diagnosis::NeverTriggered {
        live_steps: 40,
        alarms: 0,
        smallest_p: None,
    };
    assert_eq!(controller.diagnoses(), [never]);
}

/// One count for all layers, also for one in which nothing can be split.
#[test]
fn the_count_begins_again_where_nothing_was_split() {
    let mut params = plateau(5, 0.0);
    params.experts = vec![2, 30];
    let mut controller = params.check().unwrap();
    assert_eq!(splits(&mut controller, 16, |_| 1.0), [5, 10, 15]);
    assert_eq!((controller.expansions(0), controller.expansions(1)), (3, 0));
    // A newcomer that awaits its check holds the layer: the next chance comes after the patience, not at once.
    params.experts = vec![2];
    params.stop = StopRule::HeldOut {
        margin: 0.0,
        z: 0.0,
        wait: 6,
        patience: 2,
        remove: true,
    };
    let mut controller = params.check().unwrap();
    let mut found = Vec::new();
    for at in 0..21 {
        let actions = crate::drive::step_with_worth(&mut controller, at, 1.0);
        if actions.iter().any(|a| matches!(a, Action::Split { .. })) {
            found.push(at);
        }
    }
    assert!(found.windows(2).all(|w| w[1] - w[0] > 5), "{found:?}");
}

#[test]
fn patience_is_of_steps_also_where_not_all_are_observed() {
    let mut controller = plateau(10, 0.0).check().unwrap();
    let mut found = Vec::new();
    for at in (0..50).step_by(4) {
        if !step(&mut controller, at, 1.0).is_empty() {
            found.push(at);
        }
    }
    assert_eq!(found, [12, 24, 36, 48]);
}

#[test]
fn a_loss_that_is_no_number_is_refused_and_changes_nothing() {
    let mut controller = plateau(3, 0.0).check().unwrap();
    splits(&mut controller, 2, |_| 1.0);
    let before = controller.clone();
    for loss in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1e41] {
        let experts = observation(controller.active(0));
        assert!(begin_with(&mut controller, 2, loss, &[experts]).is_err());
        assert_eq!(controller, before);
    }
    // Its size is no matter.
    for (at, loss) in (2..).zip([-1e40, 1e40, 0.0, 1e-300]) {
        step(&mut controller, at, loss);
    }
    let text = serde_json::to_string(&controller).unwrap();
    assert_eq!(
        serde_json::from_str::<Controller>(&text).unwrap(),
        controller
    );
}

#[test]
fn parameters_out_of_range_are_refused_by_name() {
    let refused = |patience, threshold| match plateau(patience, threshold).check() {
        Err(ExpandError::Parameter { name, .. }) => name,
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(0, 0.1), "patience");
    for threshold in [-1e-9, f64::NAN, f64::INFINITY] {
        assert_eq!(refused(1, threshold), "threshold");
    }
    // More patience than there are steps is a setting, though one without a split.
    let never = plateau(u64::MAX, 0.0);
    assert!(never.check().is_ok());
    assert!(never.check_reachable().is_err());
}

#[test]
fn it_is_written_by_name_and_its_state_comes_back_checked() {
    let params = plateau(20, 0.25);
    let written = serde_json::to_value(params.trigger).unwrap();
    let expected = serde_json::json!({ "plateau": { "patience": 20, "threshold": 0.25 } });
    assert_eq!(written, expected);

    let saved = |params: &ControllerParams| {
        let mut controller = params.check().unwrap();
        splits(&mut controller, 7, |at| 2.0 - 0.1 * at as f64);
        serde_json::to_value(&controller).unwrap()
    };
    // Nothing is kept for other triggers, and a state without it is one of them or of a run that has not begun.
    let scheduled = saved(&every_step(2, 30).with_schedule(3, 3));
    assert!(scheduled.get("plateau").is_none());
    assert!(serde_json::from_value::<Controller>(scheduled.clone()).is_ok());
    let with = |from: &Value, change: &dyn Fn(&mut Value)| {
        let mut state = from.clone();
        change(&mut state);
        serde_json::from_value::<Controller>(state)
    };
    let good = saved(&params);
    assert!(with(&good, &|_| ()).is_ok());
    assert!(with(&good, &|s| s["plateau"]["best_at"] = 7.into()).is_err());
    assert!(with(&good, &|s| s["plateau"]["since"] = 7.into()).is_err());
    assert!(with(&good, &|s| s["plateau"] = Value::Null).is_err());
    let foreign = good["plateau"].clone();
    assert!(with(&scheduled, &|s| s["plateau"] = foreign.clone()).is_err());
}

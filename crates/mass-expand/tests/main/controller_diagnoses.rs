//! Known ways to fail: each is named, with its numbers, where it is seen, and not where it is not.

use crate::drive::{Figures, begin_with, every_step, observation, step_with_worth};
use mass_cpd::WindowedZParams;
use mass_expand::*;

/// Runs with norms that `norm` gives by step and expert.
fn run(controller: &mut Controller, steps: u64, norm: impl Fn(u64, u32) -> f64) {
    for step in 0..steps {
        let mut experts = observation(controller.active(0));
        for expert in &mut experts {
            expert.gradient_norm = norm(step, expert.id.0);
        }
        begin_with(controller, step, 1.0, &[experts]).unwrap();
        controller.finish_step().unwrap();
    }
}

/// One windowed detector an expert, which needs 20 observations, at a level of a hundredth; live for 100 steps.
fn windowed() -> ControllerParams {
    let mut params = ControllerParams {
        watch: Watch::experts(WindowedZParams::paper(10, 20, 0.01)),
        stop: StopRule::Never,
        ..ControllerParams::paper(1, 2, 6, 1000).detector_only()
    };
    params.phase.live_until = 100;
    params
}

fn noise(step: u64, expert: u32) -> f64 {
    1.0 + 0.1 * Figures::new(4).uniform(step, 0, expert, 1)
}

#[test]
fn a_split_out_of_reach_is_named_and_refused_with_its_numbers() {
    let full = ControllerParams::calibrated(1, 8, 8, 2000);
    for (params, ready, end, room, text) in [
        (
            ControllerParams::paper(1, 8, 16, 500),
            Some(59),
            50,
            8,
            "before step 59",
        ),
        (
            ControllerParams::calibrated(2, 6, 8, 200),
            Some(72),
            60,
            2,
            "before step 72",
        ),
        (
            ControllerParams::calibrated(1, 6, 8, 2000).with_schedule(600, 5),
            Some(600),
            600,
            2,
            "before step 600",
        ),
        (full, Some(200), 600, 0, "every pool is full"),
    ] {
        let wanted = Diagnosis::NoSplitReachable { ready, end, room };
        let controller = params.check().unwrap();
        assert_eq!(controller.diagnoses(), [wanted]);
        assert_eq!(
            params.check_reachable(),
            Err(ExpandError::Unreachable(wanted))
        );
        let said = ExpandError::Unreachable(wanted).to_string();
        assert!(
            said.contains(text) && said.contains(&format!("step {end}")),
            "{said}"
        );
    }
    for params in [
        ControllerParams::paper(1, 8, 16, 2000),
        ControllerParams::reference(1, 8, 16, 2000),
        ControllerParams::calibrated(2, 6, 8, 2000),
        ControllerParams::calibrated(2, 6, 8, 300),
    ] {
        assert_eq!(params.check_reachable().unwrap().diagnoses(), []);
    }
}

#[test]
fn a_check_out_of_reach_is_named_and_refused_with_its_numbers() {
    let held_out = StopRule::HeldOut {
        margin: 0.0,
        z: 0.0,
        wait: 5,
        patience: 1,
        remove: true,
    };
    let mut last_step = ControllerParams::calibrated(1, 6, 8, 100).with_schedule(99, 1);
    (last_step.phase.live_until, last_step.stop) = (100, held_out);
    let mut late = ControllerParams::paper(1, 6, 8, 1000).with_schedule(98, 5);
    late.stop = StopRule::Consecutive { gamma: 1 };
    for (params, first_split, end, room) in [
        (last_step, 99, 100, 2),
        (late, 98, 100, 2),
        // A check comes with a further trigger, and the first split fills the pool.
        (ControllerParams::paper(1, 7, 8, 2000), 179, 200, 1),
        (ControllerParams::reference(1, 6, 8, 2000), 179, 200, 2),
    ] {
        let wanted = Diagnosis::NoCheckReachable {
            first_split,
            end,
            room,
        };
        assert_eq!(params.check().unwrap().diagnoses(), [wanted]);
        assert_eq!(
            params.check_reachable(),
            Err(ExpandError::Unreachable(wanted))
        );
        let never = ControllerParams {
            stop: StopRule::Never,
            ..params
        };
        assert_eq!(never.check_reachable().unwrap().diagnoses(), []);
    }
    for params in [
        ControllerParams::paper(1, 6, 8, 2000),
        ControllerParams::reference(1, 5, 8, 2000),
    ] {
        assert_eq!(params.check_reachable().unwrap().diagnoses(), []);
    }
}

#[test]
fn a_run_that_never_triggers_is_named_once_its_phase_is_over() {
    let mut controller = windowed().check().unwrap();
    run(&mut controller, 99, |step, _| 2.0 - 0.01 * step as f64);
    assert_eq!(controller.diagnoses(), [], "the phase is not over");
    run_from(&mut controller, 99..120, |step, _| 2.0 - 0.01 * step as f64);
    let found = controller.diagnoses();
    let [
        Diagnosis::NeverTriggered {
            live_steps: 81,
            alarms: 0,
            smallest_p: Some(p),
        },
    ] = found[..]
    else {
        panic!("{found:?}");
    };
    assert!(p > 0.01 && p <= 1.0, "{p}");
    let said = found[0].to_string();
    assert!(
        said.contains("81 live steps (0 alarms, smallest p"),
        "{said}"
    );

    // An alarm that no aligned expert follows is none.
    let mut params = windowed();
    params.trigger = Trigger::DetectorAndAlignment;
    let mut controller = params.check().unwrap();
    for step in 0..101 {
        let mut experts = observation(controller.active(0));
        for expert in &mut experts {
            expert.gradient_norm =
                noise(step, expert.id.0) + if step < 60 { 0.0 } else { step as f64 };
            expert.cosine = Some(0.5);
        }
        begin_with(&mut controller, step, 1.0, &[experts]).unwrap();
        controller.finish_step().unwrap();
    }
    let found = controller.diagnoses();
    assert!(
        matches!(found[..], [Diagnosis::NeverTriggered { alarms, smallest_p: Some(p), .. }]
            if alarms > 0 && p <= 0.01),
        "{found:?}"
    );

    // One that triggers is not named, nor is a pool that follows a schedule.
    let mut controller = windowed().check().unwrap();
    run(&mut controller, 120, |step, expert| {
        noise(step, expert) + if step < 60 { 0.0 } else { step as f64 }
    });
    assert!(controller.expansions(0) > 0);
    assert_eq!(controller.diagnoses(), []);
}

fn run_from(
    controller: &mut Controller,
    steps: std::ops::Range<u64>,
    norm: impl Fn(u64, u32) -> f64,
) {
    for step in steps {
        let mut experts = observation(controller.active(0));
        for expert in &mut experts {
            expert.gradient_norm = norm(step, expert.id.0);
        }
        begin_with(controller, step, 1.0, &[experts]).unwrap();
        controller.finish_step().unwrap();
    }
}

#[test]
fn a_trigger_on_the_first_live_step_is_named() {
    for (jump, live_from) in [(0, 0), (0, 45), (60, 0)] {
        let mut params = windowed();
        params.phase.live_from = live_from;
        let mut controller = params.check().unwrap();
        // Norms that drift upward from the first step on, as those of real runs do, or from a later one.
        run(&mut controller, 90, |step, expert| {
            noise(step, expert) + 0.1 * step.saturating_sub(jump) as f64
        });
        assert!(controller.expansions(0) > 0);
        let step = live_from.max(19);
        let at_once = Diagnosis::TriggeredAtOnce { layer: 0, step };
        let found = controller.diagnoses();
        if jump == 0 {
            assert_eq!(found, [at_once]);
            assert!(found[0].to_string().contains(&format!("step {step}")));
        } else {
            assert_eq!(found, []);
        }
    }
    // A schedule is meant to.
    let mut controller = ControllerParams {
        stop: StopRule::Never,
        ..every_step(2, 4)
    }
    .check()
    .unwrap();
    step_with_worth(&mut controller, 0, 1.0);
    assert_eq!(controller.expansions(0), 1);
    assert_eq!(controller.diagnoses(), []);
}

/// After a split at step 5, the tokens of source and newcomer as given.
fn pair(source: u64, newcomer: u64, steps: u64, stop: StopRule) -> Controller {
    let mut params = ControllerParams {
        stop,
        averaging_steps: 50.0,
        ..every_step(2, 8).with_schedule(5, 100_000)
    };
    params.choice = Choice::TriggeredLowestIndex;
    let mut controller = params.check().unwrap();
    for step in 0..steps {
        let mut experts = observation(controller.active(0));
        for expert in &mut experts {
            expert.load = match expert.id.0 {
                0 if step > 5 => source,
                2 => newcomer,
                _ => 100,
            };
        }
        begin_with(&mut controller, step, 1.0, &[experts]).unwrap();
        let figures = Figures {
            worth: Some(-1.0),
            ..Figures::new(0)
        };
        figures.finish(&mut controller, step);
    }
    controller
}

#[test]
fn a_pair_of_which_one_gets_everything_is_named() {
    for (source, newcomer, to) in [(100, 0, 0), (0, 100, 2), (2000, 10, 0)] {
        let controller = pair(source, newcomer, 60, StopRule::Never);
        let found = controller.diagnoses();
        let [
            Diagnosis::PairCollapsed {
                layer: 0,
                source: ExpertId(0),
                newcomer: ExpertId(2),
                to: ExpertId(got),
                share,
                step: 59,
            },
        ] = found[..]
        else {
            panic!("{found:?}");
        };
        assert_eq!(got, to);
        let expected = source.max(newcomer) as f64 / (source + newcomer) as f64;
        assert!((share - expected).abs() < 1e-9, "{share}");
        assert!(found[0].to_string().contains(&format!("expert {to} got")));
    }
    for (source, newcomer, steps) in [(50, 50, 60), (95, 5, 60), (100, 0, 10), (0, 0, 60)] {
        assert_eq!(
            pair(source, newcomer, steps, StopRule::Never).diagnoses(),
            []
        );
    }
}

#[test]
fn a_pair_is_still_named_once_its_newcomer_has_been_removed() {
    let stop = StopRule::HeldOut {
        margin: 0.0,
        z: 0.0,
        wait: 30,
        patience: 5,
        remove: true,
    };
    let collapsed = pair(100, 0, 60, stop);
    assert_eq!(collapsed.active(0).len(), 2);
    let found = collapsed.diagnoses();
    assert!(
        matches!(
            found[..],
            [Diagnosis::PairCollapsed {
                newcomer: ExpertId(2),
                step: 35,
                ..
            }]
        ),
        "{found:?}"
    );
    assert_eq!(pair(60, 40, 60, stop).diagnoses(), []);
    // What was seen is saved.
    let text = serde_json::to_string(&collapsed).unwrap();
    let restored: Controller = serde_json::from_str(&text).unwrap();
    assert_eq!(restored.diagnoses(), found);
}

#[test]
fn tokens_that_select_every_expert_are_named_and_so_is_a_gate_without_gradient() {
    let routed = |assignments, constant| {
        let mut controller = ControllerParams::calibrated(2, 4, 8, 2000).check().unwrap();
        let routing = RoutingObservation {
            tokens: 100,
            assignments,
            constant,
        };
        for _ in 0..20 {
            controller.observe_routing(1, &routing).unwrap();
        }
        controller.diagnoses()
    };
    for (assignments, constant) in [(379, 0), (140, 0), (110, 89), (100, 0)] {
        assert_eq!(
            routed(assignments, constant),
            [],
            "{assignments}, {constant}"
        );
    }
    for assignments in [380, 400] {
        let found = routed(assignments, 0);
        let [
            Diagnosis::SelectsEverybody {
                layer: 1,
                active_per_token,
                experts: 4,
            },
        ] = found[..]
        else {
            panic!("{found:?}");
        };
        assert!((active_per_token - assignments as f64 / 100.0).abs() < 1e-9);
    }
    for (assignments, constant) in [(100, 100), (110, 90)] {
        let found = routed(assignments, constant);
        let [
            Diagnosis::GateWithoutGradient {
                layer: 1,
                share,
                active_per_token,
            },
        ] = found[..]
        else {
            panic!("{found:?}");
        };
        assert!((share - constant as f64 / 100.0).abs() < 1e-9);
        assert!((active_per_token - assignments as f64 / 100.0).abs() < 1e-9);
    }
    // Of one expert a token has no choice, and of a few steps nothing is said.
    let mut one = ControllerParams::calibrated(1, 1, 8, 2000).check().unwrap();
    let routing = RoutingObservation {
        tokens: 9,
        assignments: 9,
        constant: 9,
    };
    for _ in 0..20 {
        one.observe_routing(0, &routing).unwrap();
    }
    assert_eq!(one.diagnoses(), []);
    let mut few = ControllerParams::calibrated(1, 4, 8, 2000).check().unwrap();
    few.observe_routing(0, &routing).unwrap();
    assert_eq!(few.diagnoses(), []);
}

#[test]
fn routing_that_cannot_be_is_refused_and_changes_nothing() {
    let mut controller = ControllerParams::calibrated(1, 4, 8, 2000).check().unwrap();
    let before = controller.clone();
    let routing = |tokens, assignments, constant| RoutingObservation {
        tokens,
        assignments,
        constant,
    };
    for (layer, wrong, named) in [
        (1, routing(10, 10, 0), "list of layers"),
        (0, routing(10, 41, 0), "assignments"),
        (0, routing(10, 10, 11), "constant"),
        (0, routing(0, 1, 0), "assignments"),
    ] {
        let refused = controller.observe_routing(layer, &wrong).unwrap_err();
        assert!(refused.to_string().contains(named), "{refused}");
        assert_eq!(controller, before);
    }
    controller.observe_routing(0, &routing(0, 0, 0)).unwrap();
    assert_eq!(controller, before, "no token, no word");
}

/// A report keeps them as they are.
#[test]
fn diagnoses_are_read_back_as_they_were_written() {
    let mut all = pair(100, 0, 60, StopRule::Never).diagnoses();
    all.extend(
        ControllerParams::paper(1, 8, 16, 500)
            .check()
            .unwrap()
            .diagnoses(),
    );
    let text = serde_json::to_string(&all).unwrap();
    assert!(text.contains(r#""diagnosis":"pair_collapsed""#), "{text}");
    assert_eq!(serde_json::from_str::<Vec<Diagnosis>>(&text).unwrap(), all);
}

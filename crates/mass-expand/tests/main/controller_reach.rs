//! What a setting can reach, and checks that fall due after the phase or the run.

use crate::drive::{Figures, begin_with, every_step, observation, step_with_worth};
use mass_cpd::WindowedZParams;
use mass_expand::*;

fn held_out(wait: u64, remove: bool) -> StopRule {
    StopRule::HeldOut {
        margin: 0.0,
        z: 0.0,
        wait,
        patience: 2,
        remove,
    }
}

/// One split at `first`, a phase that ends at `live_until`, a run of `steps`.
fn one_split(first: u64, live_until: u64, stop: StopRule, steps: Option<u64>) -> ControllerParams {
    let mut params = ControllerParams {
        stop,
        steps,
        ..every_step(2, 8).with_schedule(first, 100_000)
    };
    params.phase.live_until = live_until;
    params
}

type Judged = Vec<(u64, bool)>;
type Removed = Vec<(u64, u32)>;

/// The checks of a run, with the step of each and whether it failed, and who was removed.
fn checks(controller: &mut Controller, steps: u64, worth: f64) -> (Judged, Removed) {
    let mut removed = Vec::new();
    for step in 0..steps {
        for action in step_with_worth(controller, step, worth) {
            if let Action::Remove { expert, .. } = action {
                removed.push((step, expert.0));
            }
        }
    }
    let events = controller.drain_events();
    let judged = events.iter().filter_map(|e| match e.kind {
        EventKind::Check { failed, .. } => Some((e.step, failed)),
        _ => None,
    });
    (judged.collect(), removed)
}

#[test]
fn a_newcomer_whose_wait_ends_after_the_phase_is_judged_all_the_same() {
    // The last four are of the studies: dg, and GLUE's RTE and MRPC.
    for (first, live_until, wait) in [
        (0, 1, 1),
        (9, 10, 1),
        (9, 10, 30),
        (5, 10, 5),
        (5, 10, 6),
        (72, 120, 50),
        (119, 120, 50),
        (84, 88, 50),
        (129, 130, 50),
    ] {
        let due = first + wait;
        for (worth, remove) in [(-1.0, true), (0.0, true), (1.0, true), (-1.0, false)] {
            let rule = held_out(wait, remove);
            let params = one_split(first, live_until, rule, None);
            let mut controller = params.check().unwrap();
            let (judged, removed) = checks(&mut controller, due + 20, worth);
            let failed = worth <= 0.0;
            assert_eq!(judged, [(due, failed)], "{first}, {live_until}, {wait}");
            let gone = failed && remove;
            assert_eq!(removed, if gone { vec![(due, 2)] } else { vec![] });
            assert_eq!(controller.active(0).len(), if gone { 2 } else { 3 });
            assert_eq!(controller.stopped(0), Some(StopReason::PhaseEnd));
            assert_eq!(controller.awaiting_check(0), None);
            assert_eq!(controller.diagnoses(), []);
        }
    }
}

#[test]
fn a_failure_after_the_phase_stops_nothing_a_second_time() {
    let mut params = one_split(5, 10, held_out(20, true), None);
    if let StopRule::HeldOut { patience, .. } = &mut params.stop {
        *patience = 1;
    }
    let mut controller = params.check().unwrap();
    let mut stops = Vec::new();
    for step in 0..40 {
        for action in step_with_worth(&mut controller, step, -1.0) {
            if let Action::Stop { reason, .. } = action {
                stops.push((step, reason));
            }
        }
    }
    assert_eq!(stops, [(10, StopReason::PhaseEnd)]);
    assert_eq!(controller.active(0).len(), 2);
}

#[test]
fn a_newcomer_of_the_first_phase_is_judged_in_the_continual_one() {
    let params = one_split(5, 10, held_out(20, true), None).continual(0.01, 1000);
    let mut controller = params.check().unwrap();
    let (judged, removed) = checks(&mut controller, 40, -1.0);
    assert_eq!((judged, removed), (vec![(25, true)], vec![(25, 2)]));
}

#[test]
fn a_check_comes_on_the_last_step_of_the_run_at_the_latest() {
    for (first, wait, steps, due) in [
        (25, 50, 30, 29),
        (25, 4, 30, 29),
        (25, 3, 30, 28),
        (28, 50, 30, 29),
    ] {
        let params = one_split(first, 30, held_out(wait, true), Some(steps));
        let mut controller = params.check().unwrap();
        let (judged, _) = checks(&mut controller, steps, -1.0);
        assert_eq!(judged, [(due, true)], "{first}, {wait}");
        assert_eq!(controller.diagnoses(), []);
        assert_eq!(controller.reach().first_check, Some(due));
    }
    // Nothing can be known of an expert born on the last step, nor where the run ends without saying so.
    for (first, steps) in [(29, Some(30)), (25, None)] {
        let params = one_split(first, 30, held_out(50, true), steps);
        let mut controller = params.check().unwrap();
        assert_eq!(checks(&mut controller, 30, -1.0).0, []);
        assert_eq!(controller.awaiting_check(0), Some(ExpertId(2)));
        let found = controller.diagnoses();
        let (born, last_step) = (first, 29);
        let due = if steps.is_some() { 30 } else { 75 };
        assert!(found.contains(&Diagnosis::NotJudged {
            layer: 0,
            expert: ExpertId(2),
            born,
            due,
            last_step
        }));
        let unreachable = |d: &Diagnosis| matches!(d, Diagnosis::NoCheckReachable { first_split, .. } if *first_split == first);
        assert_eq!(found.iter().any(unreachable), steps.is_some(), "{found:?}");
    }
}

#[test]
fn our_waits_fit_the_run() {
    for (steps, wait, needed) in [
        (1, 1, 73),
        (148, 14, 73),
        (200, 20, 73),
        (300, 30, 73),
        (780, 50, 88),
        (2000, 50, 201),
        (100_000, 50, 201),
    ] {
        let params = ControllerParams::calibrated(2, 6, 8, steps);
        let StopRule::HeldOut { wait: found, .. } = params.stop else {
            panic!("{:?}", params.stop);
        };
        assert_eq!(found, wait, "{steps}");
        for detector in [
            &params.watch.expert,
            &params.watch.layer,
            &params.watch.loss,
        ] {
            let detector = detector.as_ref().unwrap();
            assert_eq!(detector.observations_needed(), needed, "{steps}");
        }
        let reach = params.reach();
        let possible = steps >= 244;
        assert_eq!(reach.first_split.is_some(), possible, "{steps}: {reach:?}");
        assert_eq!(params.check_reachable().is_ok(), possible);
        if possible {
            assert_eq!(reach.first_split, Some(needed - 1));
            assert_eq!(reach.first_check, Some(needed - 1 + wait));
            // Also who is born last has its whole wait.
            assert!(reach.last_split.unwrap() + wait < steps);
        }
    }
}

/// Live steps, first split and first check of a run in which everything triggers as soon as it can, against what was foretold.
#[test]
fn what_is_foretold_happens() {
    let patience = |checks_after_expansions| StopRule::Patience {
        patience: 100,
        checks_after_expansions,
    };
    let consecutive = StopRule::Consecutive { gamma: 100 };
    let aligned = |room: usize, stop| ControllerParams {
        stop,
        trigger: Trigger::AlignmentOnly,
        ..every_step(2, 2 + room)
    };
    let mut late = aligned(20, consecutive);
    (late.phase.live_from, late.phase.live_until) = (7, 12);
    let mut full_but_pruned = aligned(0, StopRule::Never);
    full_but_pruned.pruning = Some(Pruning {
        min_experts: 1,
        min_age: 1,
        unused: None,
        redundant: None,
    });
    let schedule = |first, every, stop| ControllerParams {
        stop,
        ..every_step(2, 30).with_schedule(first, every)
    };
    let row = |first, every, stop| ControllerParams {
        trigger: Trigger::Schedule {
            first,
            every,
            splits: 3,
        },
        ..schedule(first, every, stop)
    };
    let mut missed = schedule(2, 10, held_out(3, true));
    (missed.phase.live_from, missed.phase.live_until) = (3, 40);
    let mut too_late = schedule(50, 10, consecutive);
    too_late.phase.live_until = 50;
    let plateau = |patience, stop| ControllerParams {
        stop,
        ..every_step(2, 30).on_plateau(patience, 0.0)
    };
    let mut late_plateau = plateau(5, consecutive);
    (late_plateau.phase.live_from, late_plateau.phase.live_until) = (7, 18);
    let mut too_patient = plateau(20, consecutive);
    too_patient.phase.live_until = 20;
    let settings = [
        plateau(1, consecutive),
        plateau(9, patience(2)),
        plateau(9, held_out(9, true)),
        late_plateau,
        too_patient,
        aligned(20, consecutive),
        aligned(20, patience(0)),
        aligned(20, patience(3)),
        aligned(1, consecutive),
        aligned(2, consecutive),
        aligned(2, patience(1)),
        aligned(3, patience(1)),
        aligned(20, held_out(9, true)),
        aligned(20, StopRule::Never),
        aligned(0, consecutive),
        late,
        row(4, 6, consecutive),
        row(4, 6, patience(1)),
        row(4, 6, patience(2)),
        row(4, 6, held_out(9, true)),
        schedule(4, 6, consecutive),
        schedule(4, 6, patience(1)),
        schedule(4, 6, held_out(9, true)),
        missed,
        too_late,
    ];
    for params in settings {
        let reach = params.reach();
        let mut controller = params.check().unwrap();
        for step in 0..60 {
            step_with_worth_and_drift(&mut controller, step);
        }
        let events = controller.drain_events();
        let first = |of: fn(&EventKind) -> bool| events.iter().find(|e| of(&e.kind));
        let split = first(|k| matches!(k, EventKind::Split { .. })).map(|e| e.step);
        let check = first(|k| matches!(k, EventKind::Check { .. })).map(|e| e.step);
        assert_eq!(split, reach.first_split, "{params:?}");
        assert_eq!(check, reach.first_check, "{params:?}");
        let reachable = split.is_some() && (check.is_some() || params.stop == StopRule::Never);
        assert_eq!(params.check_reachable().is_ok(), reachable, "{params:?}");
        assert_eq!(params.unreachable().is_none(), reachable, "{params:?}");
    }
}

/// Every cosine passes the alignment test, every check succeeds.
fn step_with_worth_and_drift(controller: &mut Controller, step: u64) {
    let experts = observation(controller.active(0));
    begin_with(controller, step, 1.0, &[experts]).unwrap();
    let figures = Figures {
        worth: Some(1.0),
        ..Figures::new(0)
    };
    figures.finish(controller, step);
}

#[test]
fn live_steps_are_those_foretold() {
    let mut late = ControllerParams::paper(1, 2, 4, 2000);
    late.phase.live_from = 190;
    for params in [
        ControllerParams::paper(1, 2, 4, 2000),
        ControllerParams::reference(1, 2, 4, 1000),
        ControllerParams::calibrated(1, 2, 4, 700),
        ControllerParams::calibrated(1, 2, 4, 300),
        ControllerParams::calibrated(1, 2, 4, 200),
        ControllerParams::paper(1, 2, 4, 500),
        late,
    ] {
        let reach = params.reach();
        let foretold = match (reach.first_split, reach.last_split) {
            (Some(first), Some(last)) => last - first + 1,
            _ => 0,
        };
        // Nothing changes, and nothing is triggered, so that nothing starts afresh.
        let mut controller = ControllerParams {
            trigger: Trigger::DetectorOnly,
            ..params.clone()
        }
        .check()
        .unwrap();
        for step in 0..220 {
            let mut experts = observation(controller.active(0));
            for expert in &mut experts {
                expert.gradient_norm = 2.0 - 0.001 * step as f64;
            }
            begin_with(&mut controller, step, 1.0, &[experts]).unwrap();
            controller.finish_step().unwrap();
        }
        assert_eq!(controller.live_steps(), foretold, "{params:?}");
    }
}

#[test]
fn a_continual_phase_can_reach_what_the_first_cannot() {
    let mut params = ControllerParams::paper(1, 2, 8, 500);
    assert_eq!(params.reach().first_split, None);
    let windowed = Watch::experts(WindowedZParams::paper(10, 20, 0.01));
    params.phase.continual = Some(windowed.clone());
    let reach = params.reach();
    assert_eq!(
        (reach.first_split, reach.last_split, reach.end),
        (Some(69), Some(499), 500)
    );
    assert!(params.check_reachable().is_ok());
    // Both can: the first counts, and the last step is the run's.
    let mut params = ControllerParams::paper(1, 2, 8, 2000);
    params.phase.continual = Some(windowed);
    let reach = params.reach();
    assert_eq!(
        (reach.first_split, reach.last_split),
        (Some(179), Some(1999))
    );
    // A run that ends with its first phase has no other.
    params.steps = Some(200);
    assert_eq!(params.reach().last_split, Some(199));
}

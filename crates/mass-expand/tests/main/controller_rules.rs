//! Each rule of the controller, and what it refuses.

use crate::drive::{Figures, begin_with, every_step, observation, step_with_worth};
use mass_cpd::{CalibratedCusumParams, Direction, Reference, WindowedZParams};
use mass_expand::*;

fn sources(actions: &[Action]) -> Vec<u32> {
    actions
        .iter()
        .filter_map(|a| match a {
            Action::Split { source, .. } => Some(source.0),
            _ => None,
        })
        .collect()
}

#[test]
fn every_choice_finds_its_expert() {
    let figures = [
        (5, 0.3, 0.9, 3.0),
        (9, 0.2, 0.1, 1.0),
        (1, 0.5, 0.4, 2.0),
        (9, 0.1, 0.2, 1.0),
    ];
    for (choice, expected) in [
        (Choice::TriggeredLowestIndex, 0),
        (Choice::TriggeredSmallestP, 0),
        (Choice::LossShare, 2),
        (Choice::MostLoaded, 1),
        (Choice::LeastUsed, 2),
        (Choice::RoutingEntropy, 0),
    ] {
        let mut controller = ControllerParams {
            choice,
            ..every_step(4, 8)
        }
        .check()
        .unwrap();
        let mut experts = observation(controller.active(0));
        for (expert, (load, share, entropy, norm)) in experts.iter_mut().zip(figures) {
            expert.load = load;
            expert.loss_share = Some(share);
            expert.routing_entropy = Some(entropy);
            expert.gradient_norm = norm;
        }
        begin_with(&mut controller, 0, 1.0, &[experts]).unwrap();
        assert_eq!(
            sources(&controller.finish_step().unwrap()),
            [expected],
            "{choice:?}"
        );
    }
}

#[test]
fn the_smallest_p_wins_among_the_triggered() {
    let params = ControllerParams {
        watch: Watch::experts(WindowedZParams::paper(5, 10, 0.4)),
        choice: Choice::TriggeredSmallestP,
        // By then all have risen for a while.
        phase: Phase {
            live_from: 30,
            live_until: 1000,
            continual: None,
        },
        ..ControllerParams::paper(1, 3, 8, 10_000).detector_only()
    };
    let mut controller = params.check().unwrap();
    for step in 0..40 {
        let mut experts = observation(controller.active(0));
        // All rise, the second most steadily for its noise.
        for (at, expert) in experts.iter_mut().enumerate() {
            let noise = Figures::new(7).uniform(step, 0, at as u32, 1);
            let slope = if step >= 20 {
                [0.05, 1.0, 0.1][at] * (step - 20) as f64
            } else {
                0.0
            };
            expert.gradient_norm = 1.0 + noise + slope;
        }
        begin_with(&mut controller, step, 1.0, &[experts]).unwrap();
        let actions = controller.finish_step().unwrap();
        let events = controller.drain_events();
        let flags: Vec<(u32, f64)> = events
            .iter()
            .filter_map(|e| match e.kind {
                EventKind::Flag {
                    expert: Some(expert),
                    p_value: Some(p),
                    ..
                } => Some((expert.0, p)),
                _ => None,
            })
            .collect();
        if let [split] = sources(&actions)[..] {
            let smallest = flags.iter().fold(f64::INFINITY, |m, f| m.min(f.1));
            assert!(flags.contains(&(split, smallest)), "{flags:?}");
            assert!(flags.len() > 1, "the trigger was meant to have a choice");
            return;
        }
    }
    panic!("nothing was ever triggered");
}

#[test]
fn consecutive_failures_stop_and_a_success_starts_the_count_again() {
    let mut controller = ControllerParams {
        stop: StopRule::Consecutive { gamma: 3 },
        ..every_step(1, 100)
    }
    .check()
    .unwrap();
    // The first split comes without a check; a loss that is no higher (exactly equal) is a failure.
    let worths = [9.0, -1.0, 0.0, 1.0, -1.0, -1.0, -1.0];
    for (step, worth) in worths.into_iter().enumerate() {
        let actions = step_with_worth(&mut controller, step as u64, worth);
        let last = step == worths.len() - 1;
        assert_eq!(sources(&actions).len(), usize::from(!last), "step {step}");
        assert_eq!(controller.stopped(0).is_some(), last);
    }
    assert_eq!(controller.stopped(0), Some(StopReason::NoBenefit));
    assert_eq!(controller.active(0).len(), 7);
    assert!(step_with_worth(&mut controller, 7, 1.0).is_empty());
}

#[test]
fn patience_removes_the_newest_and_splits_all_the_same() {
    let mut controller = ControllerParams {
        stop: StopRule::Patience {
            patience: 1,
            checks_after_expansions: 1,
        },
        ..every_step(2, 100)
    }
    .check()
    .unwrap();
    let mut run = |step, worth| step_with_worth(&mut controller, step, worth);
    assert_eq!(run(0, -1.0).len(), 1); // no check yet
    assert_eq!(run(1, -1.0).len(), 1); // one expansion only
    let actions = run(2, -1.0);
    assert!(matches!(
        actions[0],
        Action::Remove {
            expert: ExpertId(3),
            ..
        }
    ));
    assert!(matches!(
        actions[1],
        Action::Split {
            source: ExpertId(0),
            newcomer: ExpertId(4),
            ..
        }
    ));
    let actions = run(3, -1.0);
    assert!(matches!(
        actions[0],
        Action::Remove {
            expert: ExpertId(4),
            ..
        }
    ));
    assert!(matches!(
        actions[1],
        Action::Stop {
            layer: Some(0),
            reason: StopReason::NoBenefit
        }
    ));
    assert_eq!(actions.len(), 2);
    assert_eq!(
        controller.active(0),
        [ExpertId(0), ExpertId(1), ExpertId(2)]
    );
    assert_eq!(controller.pairs(0), [(ExpertId(0), ExpertId(2))]);
}

#[test]
fn a_source_that_the_check_removes_is_not_split() {
    // Only the newest is ever triggered: its cosine alone passes.
    let mut controller = ControllerParams {
        trigger: Trigger::AlignmentOnly,
        stop: StopRule::Patience {
            patience: 5,
            checks_after_expansions: 0,
        },
        ..every_step(1, 100)
    }
    .check()
    .unwrap();
    let mut step = |step: u64, worth: f64| {
        let mut experts = observation(controller.active(0));
        let last = experts.len() - 1;
        for expert in &mut experts[..last] {
            expert.cosine = Some(0.5);
        }
        for request in begin_with(&mut controller, step, 1.0, &[experts]).unwrap() {
            controller
                .answer(
                    Figures {
                        worth: Some(worth),
                        ..Figures::new(0)
                    }
                    .answer(step, request),
                )
                .unwrap();
        }
        (controller.finish_step().unwrap(), controller.drain_events())
    };
    assert_eq!(step(0, 1.0).0.len(), 1);
    let (actions, events) = step(1, -1.0);
    assert!(matches!(
        actions[..],
        [Action::Remove {
            expert: ExpertId(1),
            ..
        }]
    ));
    assert!(events.iter().any(|e| matches!(
        e.kind,
        EventKind::Hold {
            reason: HoldReason::SourceRemoved,
            ..
        }
    )));
}

#[test]
fn the_held_out_check_waits_judges_with_its_margin_and_stops() {
    let stop = StopRule::HeldOut {
        margin: 0.1,
        z: 2.0,
        wait: 3,
        patience: 2,
        remove: true,
    };
    let mut controller = ControllerParams {
        stop,
        ..every_step(1, 100)
    }
    .check()
    .unwrap();
    // The standard error is 0.01, so a worth of 0.12 is not shown to exceed 0.1.
    let mut splits = Vec::new();
    for (step, worth) in (0..10).zip([9.0, 9.0, 9.0, 0.13, 0.0, 0.0, 0.12, 9.0, 9.0, 0.1]) {
        let actions = step_with_worth(&mut controller, step, worth);
        if !sources(&actions).is_empty() {
            splits.push(step);
        }
        let removed = actions.iter().any(|a| matches!(a, Action::Remove { .. }));
        assert_eq!(removed, step == 6 || step == 9);
    }
    // Split at 0, kept at 3 and split again, removed at 6 and split again, removed at 9 and stopped.
    assert_eq!(splits, [0, 3, 6]);
    assert_eq!(controller.stopped(0), Some(StopReason::NoBenefit));
    assert_eq!(controller.active(0), [ExpertId(0), ExpertId(1)]);
    let holds = controller
        .drain_events()
        .iter()
        .filter(|e| {
            matches!(
                e.kind,
                EventKind::Hold {
                    reason: HoldReason::AwaitingCheck,
                    ..
                }
            )
        })
        .count();
    assert_eq!(holds, 6);
}

#[test]
fn the_last_newcomer_is_checked_before_a_full_pool_stops() {
    let stop = StopRule::HeldOut {
        margin: 0.0,
        z: 0.0,
        wait: 2,
        patience: 5,
        remove: true,
    };
    for (worth, experts) in [(1.0, 2), (-1.0, 1)] {
        let mut controller = ControllerParams {
            stop,
            ..every_step(1, 2)
        }
        .check()
        .unwrap();
        step_with_worth(&mut controller, 0, worth);
        assert_eq!(controller.stopped(0), None);
        step_with_worth(&mut controller, 1, worth);
        let figures = Figures {
            worth: Some(worth),
            ..Figures::new(1)
        };
        figures.begin(&mut controller, 2).unwrap();
        let actions = figures.finish(&mut controller, 2);
        if experts == 2 {
            assert!(matches!(
                actions[..],
                [Action::Stop {
                    reason: StopReason::Maximum,
                    ..
                }]
            ));
        } else {
            assert!(
                matches!(actions[..], [Action::Remove { .. }]),
                "{actions:?}"
            );
            assert_eq!(controller.stopped(0), None);
        }
        assert_eq!(controller.active(0).len(), experts);
    }
}

#[test]
fn a_jump_of_the_loss_splits_and_its_event_says_why() {
    let watch = Watch {
        expert: None,
        layer: None,
        loss: Some(
            CalibratedCusumParams {
                reference: Reference::Lagged {
                    window: 40,
                    gap: 10,
                },
                direction: Direction::Up,
                horizon: 1000,
                alpha: 0.01,
                warmup: 30,
                ..CalibratedCusumParams::default()
            }
            .into(),
        ),
        level: Level::Shared,
    };
    let params = ControllerParams {
        watch,
        ..ControllerParams::calibrated(2, 3, 6, 1000)
    };
    let mut controller = params.check().unwrap();
    let figures = Figures {
        shift: Some((100, 1.5)),
        worth: Some(1.0),
        ..Figures::new(3)
    };
    let mut first = None;
    for step in 0..120 {
        let actions = figures.step(&mut controller, step);
        if first.is_none() && !sources(&actions).is_empty() {
            first = Some(step);
            assert_eq!(sources(&actions).len(), 2, "one in each layer");
        }
    }
    assert!(
        first.is_some_and(|step| (100..110).contains(&step)),
        "{first:?}"
    );
    let events = controller.drain_events();
    let flag = events.iter().find_map(|e| match e.kind {
        EventKind::Flag {
            watched: Watched::Loss,
            p_horizon,
            ..
        } => Some((e.layer, p_horizon)),
        _ => None,
    });
    assert!(
        matches!(flag, Some((None, Some(p))) if p <= 0.01),
        "{flag:?}"
    );
    assert!(controller.live_steps() > 0 && controller.live_steps() < 120 - 29);
}

#[test]
fn live_steps_count_the_steps_on_which_detection_could_fire() {
    let params = ControllerParams {
        watch: Watch::experts(WindowedZParams::reference(5, 20, 1e-9)),
        phase: Phase {
            live_from: 0,
            live_until: 50,
            continual: None,
        },
        ..ControllerParams::reference(1, 2, 4, 1000)
    };
    let mut controller = params.check().unwrap();
    let figures = Figures::new(2);
    let mut stops = 0;
    for step in 0..80 {
        stops += figures.step(&mut controller, step).len();
    }
    // Steps 19 to 49: the window is full from the twentieth observation on.
    assert_eq!(controller.live_steps(), 31);
    assert_eq!(stops, 1);
    assert_eq!(controller.stopped(0), Some(StopReason::PhaseEnd));
}

#[test]
fn the_papers_timing_leaves_detection_live_for_one_hundredth() {
    let mut controller = ControllerParams::reference(1, 2, 4, 2000).check().unwrap();
    for step in 0..300 {
        drop(Figures::new(5).step(&mut controller, step));
    }
    assert_eq!(controller.live_steps(), 21);
}

#[test]
fn continual_mode_starts_afresh_with_its_own_budget_and_opens_what_was_stopped() {
    let params = ControllerParams {
        stop: StopRule::Consecutive { gamma: 1 },
        phase: Phase {
            live_from: 0,
            live_until: 10,
            continual: None,
        },
        ..every_step(1, 10)
    }
    .continual(0.01, 1000);
    let mut controller = params.check().unwrap();
    step_with_worth(&mut controller, 0, 1.0);
    step_with_worth(&mut controller, 1, -1.0);
    assert_eq!(controller.stopped(0), Some(StopReason::NoBenefit));
    for step in 2..10 {
        assert!(step_with_worth(&mut controller, step, 1.0).is_empty());
    }
    assert_eq!(sources(&step_with_worth(&mut controller, 10, 1.0)).len(), 1);
    assert!(
        controller
            .drain_events()
            .iter()
            .any(|e| e.kind == EventKind::ContinualPhase)
    );
    for step in 11..40 {
        step_with_worth(&mut controller, step, 1.0);
    }
    assert_eq!(controller.active(0).len(), 10);
    assert_eq!(controller.stopped(0), Some(StopReason::Maximum));
}

/// A schedule that ends with the first phase: afterwards the continual phase's alarms split, and nothing else does.
#[test]
fn after_its_schedule_a_pool_waits_for_an_alarm() {
    let windowed = Watch::experts(WindowedZParams::paper(10, 10, 0.001));
    let mut params = ControllerParams {
        trigger: Trigger::ScheduleThenDetector { first: 2, every: 3 },
        phase: Phase {
            live_from: 0,
            live_until: 8,
            continual: Some(windowed),
        },
        ..every_step(2, 10)
    };
    let mut split_at = Vec::new();
    let mut controller = params.check().unwrap();
    assert_eq!(controller.reach().first_split, Some(2));
    for step in 0..60 {
        let mut experts = observation(controller.active(0));
        // Norms that jitter, and rise for good at step 40.
        for expert in &mut experts {
            expert.gradient_norm = 1.0 + 0.01 * (step % 3) as f64 + f64::from(u8::from(step >= 40));
        }
        begin_with(&mut controller, step, 1.0, &[experts]).unwrap();
        let actions = controller.finish_step().unwrap();
        split_at.extend(sources(&actions).iter().map(|_| step));
    }
    assert_eq!(split_at[..2], [2, 5]);
    assert!(
        split_at.len() > 2 && split_at[2..].iter().all(|at| *at >= 40),
        "{split_at:?}"
    );
    params.phase.continual = None;
    assert!(matches!(params.check(), Err(ExpandError::Empty { .. })));
    params.trigger = Trigger::ScheduleThenDetector { first: 2, every: 0 };
    assert!(params.check().is_err());
}

#[test]
fn experts_without_tokens_are_pruned_but_not_the_young_and_not_the_last() {
    let pruning = Pruning {
        min_experts: 2,
        min_age: 5,
        unused: Some(PruneUnused {
            share: 0.1,
            steps: 10,
        }),
        redundant: None,
    };
    let params = ControllerParams {
        pruning: Some(pruning),
        trigger: Trigger::Schedule {
            first: 100,
            every: 1000,
            splits: 1,
        },
        ..every_step(4, 4)
    };
    let mut controller = params.check().unwrap();
    assert_eq!(controller.stopped(0), None, "pruning may make room");
    let mut removed = Vec::new();
    for step in 0..30 {
        let mut experts = observation(controller.active(0));
        for expert in &mut experts {
            if expert.id.0 >= 1 {
                expert.load = 0;
                expert.gradient_norm = 0.0;
                expert.cosine = None;
            }
        }
        begin_with(&mut controller, step, 1.0, &[experts]).unwrap();
        for action in controller.finish_step().unwrap() {
            if let Action::Remove { expert, .. } = action {
                removed.push((step, expert.0));
            }
        }
    }
    assert_eq!(removed, [(9, 1), (9, 2)]);
    assert_eq!(controller.active(0), [ExpertId(0), ExpertId(3)]);
    // A step on which nobody got a token counts for nobody.
    let mut experts = observation(controller.active(0));
    experts.iter_mut().for_each(|e| e.load = 0);
    begin_with(&mut controller, 30, 1.0, &[experts]).unwrap();
    assert!(controller.finish_step().unwrap().is_empty());
}

#[test]
fn redundant_experts_are_probed_in_turn_and_removed_if_worthless() {
    let pruning = Pruning {
        min_experts: 2,
        min_age: 1,
        unused: None,
        redundant: Some(PruneRedundant {
            every: 3,
            margin: 0.0,
            z: 2.0,
        }),
    };
    let params = ControllerParams {
        pruning: Some(pruning),
        trigger: Trigger::Schedule {
            first: 1000,
            every: 1000,
            splits: 1,
        },
        ..every_step(4, 4)
    };
    let mut controller = params.check().unwrap();
    let mut probed = Vec::new();
    for step in 0..20 {
        let experts = observation(controller.active(0));
        for request in begin_with(&mut controller, step, 1.0, &[experts]).unwrap() {
            let Request::ProbeLoss { expert, .. } = request else {
                panic!("{request:?}")
            };
            probed.push((step, expert.0));
            // The second is worthless; the third seems so, but not by two standard errors.
            let difference = [0.1, -0.1, -0.01, 0.1][expert.0 as usize];
            controller
                .answer(Answer::ProbeLoss {
                    layer: 0,
                    expert,
                    difference,
                    standard_error: 0.01,
                })
                .unwrap();
        }
        controller.finish_step().unwrap();
    }
    assert_eq!(probed, [(3, 0), (6, 1), (9, 2), (12, 3), (15, 0), (18, 2)]);
    assert_eq!(
        controller.active(0),
        [ExpertId(0), ExpertId(2), ExpertId(3)]
    );
}

#[test]
fn founders_are_as_old_as_the_run_when_it_is_asked_who_is_redundant() {
    let pruning = Pruning {
        min_experts: 1,
        min_age: 10,
        unused: None,
        redundant: Some(PruneRedundant {
            every: 2,
            margin: 0.0,
            z: 0.0,
        }),
    };
    let params = ControllerParams {
        pruning: Some(pruning),
        trigger: Trigger::Schedule {
            first: 6,
            every: 1000,
            splits: 1,
        },
        ..every_step(2, 3)
    };
    let mut controller = params.check().unwrap();
    let mut probed = Vec::new();
    for step in 0..22 {
        let experts = observation(controller.active(0));
        for request in begin_with(&mut controller, step, 1.0, &[experts]).unwrap() {
            let Request::ProbeLoss { expert, .. } = request else {
                continue;
            };
            probed.push((step, expert.0));
            let answer = Answer::ProbeLoss {
                layer: 0,
                expert,
                difference: 1.0,
                standard_error: 0.1,
            };
            controller.answer(answer).unwrap();
        }
        controller.finish_step().unwrap();
    }
    assert_eq!(controller.active(0).len(), 3);
    // Nobody before the tenth step; the newcomer of step 6 not before the sixteenth.
    assert_eq!(
        probed,
        [(10, 0), (12, 1), (14, 0), (16, 1), (18, 2), (20, 0)]
    );
}

#[test]
fn an_expert_without_tokens_is_not_observed_or_observed_as_zero() {
    for unused in [Unused::Skip, Unused::ObserveZero] {
        let params = ControllerParams {
            unused,
            watch: Watch::experts(WindowedZParams::paper(2, 5, 1e-6)),
            ..ControllerParams::paper(1, 2, 4, 10_000)
        };
        let mut controller = params.check().unwrap();
        for step in 0..200 {
            let mut experts = observation(controller.active(0));
            for expert in &mut experts {
                expert.load = 0;
                expert.gradient_norm = 0.0;
                expert.cosine = None;
            }
            begin_with(&mut controller, step, 1.0, &[experts]).unwrap();
            assert!(controller.finish_step().unwrap().is_empty());
        }
        let expected = if unused == Unused::Skip { 0 } else { 196 };
        assert_eq!(controller.live_steps(), expected);
    }
}

#[test]
fn a_zero_gradient_does_not_pass_the_alignment_test_and_is_not_asked_about() {
    let params = ControllerParams {
        trigger: Trigger::AlignmentOnly,
        ..every_step(2, 4)
    };
    let mut controller = params.check().unwrap();
    let mut experts = observation(controller.active(0));
    experts[0].gradient_norm = 0.0;
    experts[0].cosine = None;
    experts[1].cosine = None;
    let requests = begin_with(&mut controller, 0, 1.0, &[experts]).unwrap();
    assert_eq!(
        requests,
        [Request::Alignment {
            layer: 0,
            expert: ExpertId(1)
        }]
    );
    controller
        .answer(Answer::Alignment {
            layer: 0,
            expert: ExpertId(1),
            cosine: None,
        })
        .unwrap();
    assert!(
        controller.finish_step().unwrap().is_empty(),
        "zero weights have no direction either"
    );
}

/// All margins beyond f32's precision: the cross-entropy of a small batch is exactly zero. That ends no run.
#[test]
fn a_loss_of_zero_has_no_logarithm_and_is_no_rise() {
    let mut controller = ControllerParams::calibrated(1, 3, 6, 10_000)
        .check()
        .unwrap();
    for (step, loss) in [1.0, 0.0, 0.5, 0.0].into_iter().enumerate() {
        let experts = observation(controller.active(0));
        begin_with(&mut controller, step as u64, loss, &[experts]).unwrap();
        assert!(controller.finish_step().unwrap().is_empty());
    }
    assert!(controller.drain_events().is_empty());
    let experts = observation(controller.active(0));
    assert!(begin_with(&mut controller, 4, -0.1, &[experts]).is_err());
}

/// The newest expert may be checked on the batch and probed for redundancy in one step: each answer belongs to its question.
#[test]
fn a_probe_of_the_newest_expert_is_not_taken_for_its_check() {
    let params = || ControllerParams {
        trigger: Trigger::Schedule {
            first: 0,
            every: 3,
            splits: 1,
        },
        stop: StopRule::Consecutive { gamma: 1 },
        pruning: Some(Pruning {
            min_experts: 1,
            min_age: 1,
            unused: None,
            redundant: Some(PruneRedundant {
                every: 1,
                margin: 0.0,
                z: 0.0,
            }),
        }),
        ..every_step(2, 30)
    };
    // One step, every question answered so that nothing fails but, with `verdict`, what it says of the newest: its loss on the
    // batch without it, and how much worse the probe is. Returns who was checked and who probed.
    let step = |controller: &mut Controller, at: u64, verdict: Option<(f64, f64, bool)>| {
        let experts = observation(controller.active(0));
        let mut open = begin_with(controller, at, 1.0, &[experts]).unwrap();
        let (mut checked, mut probed) = (None, None);
        let (masked, difference, probe_first) = verdict.unwrap_or((2.0, 1.0, false));
        while !open.is_empty() {
            let is_probe = |r: &Request| matches!(r, Request::ProbeLoss { .. });
            // Alignments may raise the other question: they come first.
            open.sort_by_key(|r| match r {
                Request::Alignment { .. } => 0,
                other => 1 + i32::from(is_probe(other) != probe_first),
            });
            let answer = match open.remove(0) {
                Request::Alignment { layer, expert } => Answer::Alignment {
                    layer,
                    expert,
                    cosine: Some(0.0),
                },
                Request::MaskedLoss { layer, expert } => {
                    checked = Some(expert);
                    Answer::MaskedLoss {
                        layer,
                        expert,
                        masked,
                        full: 1.0,
                    }
                }
                Request::ProbeLoss { layer, expert } => {
                    probed = Some(expert);
                    Answer::ProbeLoss {
                        layer,
                        expert,
                        difference,
                        standard_error: 0.0,
                    }
                }
            };
            open.extend(controller.answer(answer).unwrap());
        }
        (checked, probed)
    };
    let mut controller = params().check().unwrap();
    let both = (0..40).find(|&at| {
        let (checked, probed) = step(&mut controller, at, None);
        controller.finish_step().unwrap();
        checked.is_some() && checked == probed
    });
    let both = both.expect("a step on which the newest expert is asked about twice");
    // Worth its place on the batch and worthless on the probe: removed, and expansion goes on. The other way round: kept, and
    // expansion stops.
    for (masked, difference, stops, goes) in [(1.5, -0.1, false, true), (0.5, 0.1, true, false)] {
        for probe_first in [false, true] {
            let mut controller = params().check().unwrap();
            for at in 0..both {
                step(&mut controller, at, None);
                controller.finish_step().unwrap();
            }
            let (newest, _) = step(
                &mut controller,
                both,
                Some((masked, difference, probe_first)),
            );
            let actions = controller.finish_step().unwrap();
            let removed =
                |a: &Action| matches!(a, Action::Remove { expert, .. } if Some(*expert) == newest);
            assert_eq!(
                controller.stopped(0).is_some(),
                stops,
                "{masked}, {probe_first}"
            );
            assert_eq!(actions.iter().any(removed), goes, "{masked}, {probe_first}");
        }
    }
}

//! Which expert is split, when a schedule says so, and which one leaves.

use crate::drive::{begin_with, every_step, observation};
use mass_expand::*;

/// A step of one layer in which each expert has this load, and a share of the loss and an entropy in proportion.
fn step(controller: &mut Controller, at: u64, load: impl Fn(ExpertId) -> u64) -> Vec<Action> {
    let mut experts = observation(controller.active(0));
    for expert in &mut experts {
        expert.load = load(expert.id);
        expert.loss_share = Some(expert.load as f64 / 1024.0);
        expert.routing_entropy = Some(expert.load as f64);
    }
    begin_with(controller, at, 1.0, &[experts]).unwrap();
    controller.finish_step().unwrap()
}

/// The expert that is split.
fn source(actions: &[Action]) -> Option<u32> {
    actions.iter().find_map(|action| match action {
        Action::Split { source, .. } => Some(source.0),
        _ => None,
    })
}

/// Averages choose the source, not the last figures, and both halves of a split begin theirs anew.
#[test]
fn averages_choose_the_source_and_a_split_forgets_them() {
    for choice in [
        Choice::MostLoaded,
        Choice::LossShare,
        Choice::RoutingEntropy,
    ] {
        for (last, expected) in [([0, 1, 0], 1), ([0, 1, 7], 2)] {
            let params = ControllerParams {
                averaging_steps: 4.0,
                choice,
                ..every_step(2, 8).with_schedule(1, 1)
            };
            let mut controller = params.check().unwrap();
            let mut split = |at: u64, figures: &[u64]| {
                source(&step(&mut controller, at, |id| figures[id.0 as usize]))
            };
            assert_eq!(split(0, &[30, 9]), None);
            // Each older figure weighs 3/4 of the next: (3/4 30 + 0) / (3/4 + 1) = 12.9 against 9.
            assert_eq!(split(1, &[0, 9]), Some(0), "{choice:?}");
            // The second has 5.5. The source, had it kept its average, would have 7.3; a newcomer's one figure counts in full.
            assert_eq!(split(2, &last), Some(expected), "{choice:?}");
        }
    }
}

/// An expert without tokens has no entropy, and its average stays; one with tokens has to have one.
#[test]
fn only_an_expert_with_tokens_needs_an_entropy() {
    let params = ControllerParams {
        averaging_steps: 4.0,
        choice: Choice::RoutingEntropy,
        ..every_step(2, 8).with_schedule(2, 9)
    };
    let mut controller = params.check().unwrap();
    let mut seen = |at: u64, figures: [(u64, Option<f64>); 2]| {
        let mut experts = observation(controller.active(0));
        for (expert, (load, entropy)) in experts.iter_mut().zip(figures) {
            (expert.load, expert.routing_entropy) = (load, entropy);
        }
        begin_with(&mut controller, at, 1.0, &[experts])?;
        controller.finish_step().map(|actions| source(&actions))
    };
    let refused = seen(0, [(10, Some(0.5)), (1, None)]);
    let (what, layer) = ("routing_entropy", 0);
    assert_eq!(refused, Err(ExpandError::Missing { what, layer }));
    assert_eq!(seen(0, [(10, Some(0.5)), (9, Some(0.6))]), Ok(None));
    assert_eq!(seen(1, [(10, Some(0.5)), (0, None)]), Ok(None));
    assert_eq!(seen(2, [(10, Some(0.5)), (0, None)]), Ok(Some(1)));
}

/// A loss of zero has no shares, and the run goes on without a split; a loop that never gives shares is told so.
#[test]
fn a_step_without_shares_of_the_loss_splits_nothing() {
    let params = ControllerParams {
        choice: Choice::LossShare,
        ..every_step(2, 8)
    };
    let mut controller = params.check().unwrap();
    let mut seen = |at: u64, loss: f64, shares: [Option<f64>; 2]| {
        let mut experts = observation(controller.active(0));
        for (expert, share) in experts.iter_mut().zip(shares) {
            expert.loss_share = share;
        }
        begin_with(&mut controller, at, loss, &[experts])?;
        let actions = controller.finish_step()?;
        Ok((source(&actions), controller.drain_events()))
    };
    let (what, layer) = ("loss_share", 0);
    let missing = ExpandError::Missing { what, layer };
    assert_eq!(seen(0, 1.0, [None; 2]), Err(missing.clone()));
    assert_eq!(seen(0, 0.0, [Some(0.5), None]), Err(missing));
    let held = |at| {
        let (reason, candidates) = (HoldReason::NoLossShare, 2 + at as usize / 2);
        let kind = EventKind::Hold { reason, candidates };
        let (step, layer) = (at, Some(0));
        Ok((None, vec![Event { step, layer, kind }]))
    };
    assert_eq!(seen(0, 0.0, [None; 2]), held(0));
    assert_eq!(seen(1, 1.0, [Some(0.2), Some(0.8)]).unwrap().0, Some(1));
    // Not only of a loss of zero, once there were shares: part of it may be of no token of the layer.
    let mut experts = observation(controller.active(0));
    experts.iter_mut().for_each(|e| e.loss_share = None);
    begin_with(&mut controller, 2, 1.0, &[experts]).unwrap();
    let actions = controller.finish_step().unwrap();
    assert_eq!(Ok((source(&actions), controller.drain_events())), held(2));
}

/// Removals in 40 steps, with one split at step 5 if `splits`.
fn removals(
    experts: usize,
    splits: bool,
    min_age: u64,
    load: impl Fn(u64, ExpertId) -> u64,
) -> Vec<(u64, u32)> {
    let unused = PruneUnused {
        share: 0.1,
        steps: 2,
    };
    let first = if splits { 5 } else { 1000 };
    let params = ControllerParams {
        pruning: Some(Pruning {
            min_experts: 1,
            min_age,
            unused: Some(unused),
            redundant: None,
        }),
        ..every_step(experts, 8).with_schedule(first, 1000)
    };
    let mut controller = params.check().unwrap();
    let mut removed = Vec::new();
    for at in 0..40 {
        let actions = step(&mut controller, at, |id| load(at, id));
        assert_eq!(source(&actions).is_some(), splits && at == 5);
        for action in actions {
            if let Action::Remove { expert, reason, .. } = action {
                assert_eq!(reason, RemovalReason::Unused);
                removed.push((at, expert.0));
            }
        }
    }
    removed
}

/// Unused is who stays under the share of the mean load, neither of the sum nor of the mean itself.
#[test]
fn an_expert_is_unused_under_a_share_of_the_mean_load() {
    let with = |loads: &[u64]| removals(loads.len(), false, 1, |_, id| loads[id.0 as usize]);
    assert!(with(&[10, 4, 4, 4]).is_empty());
    assert!(with(&[10, 1, 1, 1]).is_empty());
    // A tenth of the mean is 5.3, then 5.15.
    assert!(with(&[100, 6]).is_empty());
    assert_eq!(with(&[100, 3]), [(1, 1)]);
}

/// Steps without tokens count only in a row.
#[test]
fn a_step_with_tokens_starts_the_count_of_unused_steps_again() {
    let every_other = |at: u64, id: ExpertId| if id.0 == 1 { 10 * (at % 2) } else { 10 };
    assert!(removals(2, false, 1, every_other).is_empty());
}

/// An expert that has never had a token leaves once it has the least age: not a step before, not a step after.
#[test]
fn an_unused_newcomer_leaves_at_the_least_age() {
    let newcomer_idle = |_: u64, id: ExpertId| if id.0 == 2 { 0 } else { 10 };
    assert_eq!(removals(2, true, 20, newcomer_idle), [(25, 2)]);
    assert_eq!(removals(2, true, 1, newcomer_idle), [(7, 2)]);
}

/// A choice at random is even over the experts, the same for the same seed, and drawn anew for each split.
#[test]
fn a_random_choice_is_even_and_repeats_with_its_seed() {
    let draws = |seed: u64| {
        let mut controller = every_step(4, 8).random_expert(seed).check().unwrap();
        [0, 1].map(|at| source(&step(&mut controller, at, |_| 10)).unwrap())
    };
    let mut chosen = [0; 4];
    let mut falls = 0;
    for seed in 0..400 {
        let [first, second] = draws(seed);
        assert_eq!(draws(seed), [first, second], "seed {seed}");
        chosen[first as usize] += 1;
        falls += usize::from(second < first);
    }
    assert!(
        chosen.iter().all(|times| (60..=140).contains(times)),
        "{chosen:?}"
    );
    // The same draw, scaled to five experts in place of four, would never name an earlier one.
    assert!(falls > 60, "{falls}");
}

/// A schedule splits at its steps, or at the first step observed after each.
#[test]
fn a_schedule_splits_at_its_steps_or_as_soon_after_as_it_is_asked() {
    for (stride, expected) in [(1, [100, 150, 200]), (7, [105, 154, 203])] {
        let mut controller = every_step(2, 8).with_schedule(100, 50).check().unwrap();
        let mut splits = Vec::new();
        for at in (0..230).step_by(stride) {
            if source(&step(&mut controller, at, |_| 10)).is_some() {
                splits.push(at);
            }
        }
        assert_eq!(splits, expected, "every {stride} steps");
    }
}

/// The sources of a schedule's splits, with their steps.
fn sources(
    params: &ControllerParams,
    steps: impl Iterator<Item = u64>,
    load: impl Fn(ExpertId) -> u64,
) -> Vec<(u64, u32)> {
    let mut controller = params.check().unwrap();
    steps
        .filter_map(|at| Some((at, source(&step(&mut controller, at, &load))?)))
        .collect()
}

/// A schedule of `splits` in a row, of the experts with the most tokens.
fn rows(first: u64, every: u64, splits: u64) -> ControllerParams {
    ControllerParams {
        averaging_steps: 20.0,
        trigger: Trigger::Schedule {
            first,
            every,
            splits,
        },
        ..every_step(4, 40).most_loaded()
    }
}

#[test]
fn a_schedule_of_three_splits_three_steps_in_a_row() {
    // Newcomers and the sources that they came of share what the sources had, as after a balanced split.
    let loads = |id: ExpertId| [40, 30, 20, 10].get(id.0 as usize).copied().unwrap_or(5);
    let found = sources(&rows(10, 20, 3), 0..55, loads);
    let steps: Vec<u64> = found.iter().map(|&(at, _)| at).collect();
    assert_eq!(steps, [10, 11, 12, 30, 31, 32, 50, 51, 52]);
    // As many as there is time for: every step.
    let found = sources(&rows(5, 3, 3), 0..12, loads);
    assert_eq!(found.len(), 7);
    // What falls between two observed steps counts once.
    let found = sources(&rows(10, 20, 3), (0..60).step_by(4), loads);
    let steps: Vec<u64> = found.iter().map(|&(at, _)| at).collect();
    assert_eq!(steps, [12, 32, 52]);
    // A phase that begins within a row has the rest of it.
    let mut late = rows(10, 20, 3);
    (late.phase.live_from, late.phase.live_until) = (11, 31);
    let found = sources(&late, 0..60, loads);
    let steps: Vec<u64> = found.iter().map(|&(at, _)| at).collect();
    assert_eq!(steps, [11, 12, 30]);
}

#[test]
fn a_row_of_splits_takes_another_expert_each_time() {
    let mut controller = rows(10, 20, 3).check().unwrap();
    let mut halves = std::collections::BTreeSet::new();
    let mut found = Vec::new();
    for at in 0..13 {
        let load = |id: ExpertId| {
            let whole = [40, 39, 38, 10].get(id.0 as usize).copied().unwrap_or(40);
            if halves.contains(&id.0) {
                whole / 2
            } else {
                whole
            }
        };
        for action in step(&mut controller, at, load) {
            if let Action::Split {
                source, newcomer, ..
            } = action
            {
                halves.extend([source.0, newcomer.0]);
                found.push(source.0);
            }
        }
    }
    assert_eq!(found, [0, 1, 2]);
}

#[test]
fn a_check_leaves_a_layer_the_first_of_a_row() {
    let params = ControllerParams {
        stop: StopRule::HeldOut {
            margin: 0.0,
            z: 0.0,
            wait: 5,
            patience: 1,
            remove: true,
        },
        ..rows(10, 20, 3)
    };
    let mut controller = params.check().unwrap();
    let split = |a: &Action| matches!(a, Action::Split { .. });
    let steps: Vec<u64> = (0..40)
        .filter(|&at| {
            let actions = crate::drive::step_with_worth(&mut controller, at, 1.0);
            actions.iter().any(split)
        })
        .collect();
    assert_eq!(steps, [10, 30]);
}

#[test]
fn a_schedule_of_one_is_written_as_before_and_others_are_checked() {
    let one = rows(60, 20, 1).trigger;
    let text = serde_json::to_string(&one).unwrap();
    assert_eq!(text, r#"{"schedule":{"first":60,"every":20}}"#);
    assert_eq!(serde_json::from_str::<Trigger>(&text).unwrap(), one);
    let three = rows(60, 20, 3).trigger;
    let text = serde_json::to_string(&three).unwrap();
    assert_eq!(text, r#"{"schedule":{"first":60,"every":20,"splits":3}}"#);
    assert_eq!(serde_json::from_str::<Trigger>(&text).unwrap(), three);
    for (every, splits) in [(20, 0), (20, 21), (1, 2), (20, u64::MAX)] {
        let refused = rows(60, every, splits).check();
        assert!(
            matches!(refused, Err(ExpandError::Parameter { name: "splits", .. })),
            "{every}, {splits}"
        );
        // What is refused has no reach, but asking for it does no harm.
        let _ = rows(60, every, splits).reach();
    }
    // The largest numbers there are.
    let (end, last) = (u64::MAX, u64::MAX - 1);
    for (first, every, splits) in [(0, 1, 1), (end, 1, 1), (0, end, end), (7, end, 2)] {
        let params = rows(first, every, splits);
        let _ = params.reach();
        let mut controller = params.check().unwrap();
        for at in [0, 6, last, end] {
            step(&mut controller, at, |_| 10);
        }
    }
}

/// First and last split, and how many there are, by going through the steps.
#[test]
fn the_reach_of_a_schedule_is_that_of_its_steps() {
    for (first, every, splits) in [(4, 6, 3), (0, 3, 3), (5, 7, 1), (9, 10, 2)] {
        for (live_from, live_until) in [(0, 30), (6, 25), (7, 26), (12, 13), (5, 6)] {
            let mut params = rows(first, every, splits);
            (params.phase.live_from, params.phase.live_until) = (live_from, live_until);
            let found = sources(&params, 0..40, |_| 10);
            let reach = params.reach();
            let expected = (found.first().map(|s| s.0), found.last().map(|s| s.0));
            assert_eq!(
                (reach.first_split, reach.last_split),
                expected,
                "{params:?}"
            );
        }
    }
}

//! What holds for the controller whatever rules it is made of.

use crate::drive::{Figures, Pools};
use mass_cpd::{CalibratedCusumParams, Direction, Transform, WindowedZParams};
use mass_expand::*;
use proptest::prelude::*;

fn triggers() -> impl Strategy<Value = Trigger> {
    prop_oneof![
        Just(Trigger::DetectorAndAlignment),
        Just(Trigger::DetectorOnly),
        Just(Trigger::AlignmentOnly),
        (0u64..20, 1u64..10, 0u64..10).prop_map(|(first, every, splits)| Trigger::Schedule {
            first,
            every,
            splits: splits % every + 1
        }),
        (1u64..15, 0.0f64..0.1).prop_map(|(patience, threshold)| Trigger::Plateau {
            patience,
            threshold
        }),
    ]
}

fn choices() -> impl Strategy<Value = Choice> {
    prop_oneof![
        Just(Choice::TriggeredLowestIndex),
        Just(Choice::TriggeredSmallestP),
        Just(Choice::LossShare),
        Just(Choice::MostLoaded),
        Just(Choice::LeastUsed),
        Just(Choice::RoutingEntropy),
        Just(Choice::Random),
    ]
}

fn stops() -> impl Strategy<Value = StopRule> {
    prop_oneof![
        Just(StopRule::Never),
        (1u32..4).prop_map(|gamma| StopRule::Consecutive { gamma }),
        (0u32..4, 0u64..2).prop_map(|(patience, checks_after_expansions)| StopRule::Patience {
            patience,
            checks_after_expansions
        }),
        (1u64..10, 1u32..4, any::<bool>()).prop_map(|(wait, patience, remove)| StopRule::HeldOut {
            margin: 0.0,
            z: 1.0,
            wait,
            patience,
            remove
        }),
    ]
}

fn prunings() -> impl Strategy<Value = Option<Pruning>> {
    prop::option::of(
        (1usize..3, 1u64..20, any::<bool>(), any::<bool>()).prop_map(
            |(min_experts, min_age, unused, redundant)| Pruning {
                min_experts,
                min_age,
                unused: unused.then_some(PruneUnused {
                    share: 0.8,
                    steps: 5,
                }),
                redundant: redundant.then_some(PruneRedundant {
                    every: 4,
                    margin: 0.1,
                    z: 1.0,
                }),
            },
        ),
    )
}

fn watches() -> impl Strategy<Value = Watch> {
    let cusum = CalibratedCusumParams {
        alpha: 0.5,
        horizon: 20,
        warmup: 10,
        direction: Direction::Up,
        ..CalibratedCusumParams::default()
    };
    prop_oneof![
        Just(Watch::experts(WindowedZParams::reference(5, 10, 0.2))),
        Just(Watch {
            expert: Some(WindowedZParams::paper(5, 8, 0.3).into()),
            layer: Some(cusum.into()),
            loss: Some(cusum.into()),
            level: Level::PerStream,
        }),
        Just(Watch {
            expert: Some(
                CalibratedCusumParams {
                    transform: Transform::Log,
                    ..cusum
                }
                .into()
            ),
            layer: None,
            loss: Some(cusum.into()),
            level: Level::Shared,
        }),
    ]
}

fn params() -> impl Strategy<Value = ControllerParams> {
    let rules = (triggers(), choices(), stops(), prunings(), watches());
    let rest = (
        prop::collection::vec(1usize..4, 1..3),
        4usize..8,
        0u64..30,
        prop_oneof![
            Just(AfterSplit::Keep),
            Just(AfterSplit::ResetSourceCount),
            Just(AfterSplit::Rewarm)
        ],
        any::<bool>(),
        any::<u64>(),
    );
    (rules, rest).prop_map(
        |(
            (trigger, choice, stop, pruning, watch),
            (experts, k_max, live_from, after_split, continual, seed),
        )| {
            ControllerParams {
                experts,
                k_max,
                phase: Phase {
                    live_from,
                    live_until: 90,
                    continual: continual.then(|| watch.clone()),
                },
                watch,
                unused: Unused::Skip,
                trigger,
                choice,
                stop,
                pruning,
                after_split,
                alignment: AlignmentThreshold::Absolute(0.005),
                averaging_steps: 10.0,
                seed,
                ..ControllerParams::paper(1, 1, 2, 100)
            }
        },
    )
}

/// The whole state, to the last bit.
fn text(controller: &Controller) -> String {
    serde_json::to_string(controller).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    #[test]
    fn the_pool_stays_within_its_bounds(params in params(), seed in any::<u64>(), lazy in any::<bool>()) {
        let mut controller = params.check().unwrap();
        let figures = Figures { shift: Some((50, 3.0)), lazy, ..Figures::new(seed) };
        let mut pools = Pools::of(&controller);
        for step in 0..150 {
            let actions = figures.step(&mut controller, step);
            if step == 90 && params.phase.continual.is_some() {
                pools.stopped.fill(false);
            }
            pools.carry_out(&actions, params.k_max);
            for layer in 0..controller.layers() {
                let active: Vec<ExpertId> = pools.active[layer].iter().copied().collect();
                prop_assert_eq!(controller.active(layer), &active[..]);
                prop_assert!(controller.active(layer).len() <= params.k_max);
                for pair in controller.pairs(layer) {
                    prop_assert!(active.contains(&pair.0) && active.contains(&pair.1));
                }
            }
            let splits = actions.iter().filter(|a| matches!(a, Action::Split { .. })).count();
            prop_assert!(splits == 0 || step >= params.phase.live_from);
            prop_assert!(splits == 0 || step < 90 || params.phase.continual.is_some());
        }
        prop_assert!(controller.live_steps() <= 150 - params.phase.live_from);
    }

    #[test]
    fn it_replays_from_any_state(params in params(), seed in any::<u64>(), at in 0u64..119, lazy in any::<bool>()) {
        let figures = Figures { shift: Some((50, 3.0)), lazy, ..Figures::new(seed) };
        let restore = |controller: &Controller| -> Controller {
            serde_json::from_str(&serde_json::to_string(controller).unwrap()).unwrap()
        };
        let mut original = params.check().unwrap();
        for step in 0..at {
            figures.step(&mut original, step);
        }
        let mut between = restore(&original);
        prop_assert_eq!(text(&between), text(&original));
        figures.begin(&mut original, at).unwrap();
        let mut within = restore(&original);
        prop_assert_eq!(text(&within), text(&original));
        let actions = figures.finish(&mut original, at);
        prop_assert_eq!(figures.finish(&mut within, at), actions.clone());
        prop_assert_eq!(figures.step(&mut between, at), actions);
        for step in at + 1..120 {
            let actions = figures.step(&mut original, step);
            prop_assert_eq!(figures.step(&mut between, step), actions.clone());
            prop_assert_eq!(figures.step(&mut within, step), actions);
        }
        prop_assert_eq!(text(&between), text(&original));
        prop_assert_eq!(text(&within), text(&original));
    }

    #[test]
    fn asking_for_cosines_late_changes_nothing(params in params(), seed in any::<u64>()) {
        let eager = Figures { shift: Some((50, 3.0)), ..Figures::new(seed) };
        let lazy = Figures { lazy: true, ..eager };
        // A choice at random draws when a layer is ready, and with late cosines layers are ready in another order.
        prop_assume!(params.choice != Choice::Random || params.experts.len() == 1);
        let (mut a, mut b) = (params.check().unwrap(), params.check().unwrap());
        for step in 0..120 {
            prop_assert_eq!(eager.step(&mut a, step), lazy.step(&mut b, step));
        }
    }

    #[test]
    fn a_refused_observation_changes_nothing(params in params(), seed in any::<u64>(), at in 0u64..60) {
        let figures = Figures::new(seed);
        let mut controller = params.check().unwrap();
        for step in 0..at {
            figures.step(&mut controller, step);
        }
        let before = text(&controller);
        let good = figures.layers(&controller, at);
        for bad in [f64::NAN, f64::INFINITY, -1.0] {
            let mut experts = good.clone();
            experts.last_mut().unwrap().last_mut().unwrap().gradient_norm = bad;
            prop_assert!(crate::drive::begin_with(&mut controller, at, 2.0, &experts).is_err());
            prop_assert_eq!(text(&controller), before.clone());
        }
        prop_assert!(crate::drive::begin_with(&mut controller, at, f64::NAN, &good).is_err());
        prop_assert!(crate::drive::begin_with(&mut controller, at, 2.0, &good[1..]).is_err());
        prop_assert_eq!(text(&controller), before.clone());
    }

    #[test]
    fn events_are_flat_lines_that_read_back(params in params(), seed in any::<u64>()) {
        let figures = Figures { shift: Some((50, 3.0)), ..Figures::new(seed) };
        let mut controller = params.check().unwrap();
        for step in 0..120 {
            let actions = figures.step(&mut controller, step);
            let events = controller.drain_events();
            let count = |kind: &str| events.iter().filter(|e| {
                serde_json::to_value(e).unwrap()["kind"] == kind
            }).count();
            let of = |wanted: fn(&Action) -> bool| actions.iter().filter(|a| wanted(a)).count();
            prop_assert_eq!(count("split"), of(|a| matches!(a, Action::Split { .. })));
            prop_assert_eq!(count("remove"), of(|a| matches!(a, Action::Remove { .. })));
            prop_assert_eq!(count("stop"), of(|a| matches!(a, Action::Stop { .. })));
            for event in events {
                let line = serde_json::to_string(&event).unwrap();
                prop_assert_eq!(serde_json::from_str::<Event>(&line).unwrap(), event);
            }
        }
    }
}

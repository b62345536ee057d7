//! The settings of the named variants, written out once more.

use mass_cpd::{
    AfterAlarm, CalibratedCusumParams, Direction, Drift, Reference, Transform, WindowedZParams,
    WindowedZRule,
};
use mass_expand::*;

/// Every expert's norm, and nothing else, at a level of its own.
fn windowed_z(warmup: usize, window: usize, rule: WindowedZRule) -> Watch {
    let detector = WindowedZParams {
        warmup,
        window,
        alpha: 0.01,
        rule,
    };
    Watch {
        expert: Some(detector.into()),
        layer: None,
        loss: None,
        level: Level::PerStream,
    }
}

/// `paper(2, 6, 16, 2000)`: 5 % and 9 % of the steps are 100 and 180.
fn paper() -> ControllerParams {
    ControllerParams {
        experts: vec![6, 6],
        k_max: 16,
        steps: Some(2000),
        phase: Phase {
            live_from: 0,
            live_until: 200,
            continual: None,
        },
        watch: windowed_z(100, 180, WindowedZRule::Paper),
        unused: Unused::ObserveZero,
        trigger: Trigger::DetectorAndAlignment,
        alignment: AlignmentThreshold::Absolute(0.001),
        choice: Choice::TriggeredLowestIndex,
        averaging_steps: 50.0,
        operator: SplitOperator::Clone {
            decomposition: Some(Decomposition::Whole),
            preserve_mass: false,
        },
        moments: Moments::Zero,
        after_split: AfterSplit::Keep,
        stop: StopRule::Consecutive { gamma: 3 },
        pruning: None,
        seed: 0,
        trace: 0,
    }
}

/// `paper` is what the paper writes: windowed z at 0.01, delta 0.001, whole matrices, gamma 3, a tenth of the steps.
#[test]
fn the_papers_settings_are_those_of_the_paper() {
    assert_eq!(ControllerParams::paper(2, 6, 16, 2000), paper());
}

/// `reference` differs from `paper` where the released code does, and nowhere else.
#[test]
fn the_references_settings_are_those_of_the_released_code() {
    let reference = ControllerParams {
        watch: windowed_z(100, 180, WindowedZRule::Reference),
        operator: SplitOperator::Clone {
            decomposition: Some(Decomposition::Rowwise),
            preserve_mass: false,
        },
        after_split: AfterSplit::ResetSourceCount,
        stop: StopRule::Patience {
            patience: 3,
            checks_after_expansions: 1,
        },
        ..paper()
    };
    assert_eq!(ControllerParams::reference(2, 6, 16, 2000), reference);
}

/// `calibrated` watches all three kinds of stream for sudden rises, bisects, checks on held-out data and re-warms.
#[test]
fn our_settings_are_the_documented_ones() {
    let detector = CalibratedCusumParams {
        horizon: 600,
        alpha: 0.05,
        alarm_at: mass_cpd::AlarmAt::Alpha,
        k: 2.0,
        score_limit: Some(4.0),
        scores: mass_cpd::Scores::Normal,
        watch: mass_cpd::Watch::Level,
        transform: Transform::Log,
        reference: Reference::Lagged {
            window: 128,
            gap: 16,
        },
        prewhiten: mass_cpd::Prewhiten::Order(1),
        drift: Drift::Remove,
        direction: Direction::Up,
        warmup: 200,
        after_alarm: AfterAlarm::Relearn,
    };
    let calibrated = ControllerParams {
        phase: Phase {
            live_from: 0,
            live_until: 600,
            continual: None,
        },
        watch: Watch {
            expert: Some(detector.into()),
            layer: Some(detector.into()),
            loss: Some(detector.into()),
            level: Level::Shared,
        },
        unused: Unused::Skip,
        trigger: Trigger::DetectorOnly,
        choice: Choice::LossShare,
        operator: SplitOperator::Bisect(BisectParams::default()),
        after_split: AfterSplit::Rewarm,
        stop: StopRule::HeldOut {
            margin: 0.0,
            z: 1.0,
            wait: 50,
            patience: 2,
            remove: true,
        },
        ..paper()
    };
    assert_eq!(ControllerParams::calibrated(2, 6, 16, 2000), calibrated);
}

/// Warm-up and window are 5 % and 9 % of the steps but at least 30 and 60; the phase has at least one step.
#[test]
fn shares_of_the_steps_have_their_least_values() {
    for (steps, live_until, warmup, window) in [
        (5, 1, 30, 60),
        (600, 60, 30, 60),
        (700, 70, 35, 63),
        (10_000, 1000, 500, 900),
    ] {
        let paper = ControllerParams::paper(1, 8, 16, steps);
        let reference = ControllerParams::reference(1, 8, 16, steps);
        for (params, rule) in [
            (paper, WindowedZRule::Paper),
            (reference, WindowedZRule::Reference),
        ] {
            assert_eq!(params.experts, [8]);
            assert_eq!(params.phase.live_until, live_until, "{steps} steps");
            assert_eq!(
                params.watch,
                windowed_z(warmup, window, rule),
                "{steps} steps"
            );
        }
    }
}

/// `ours` grows to its maximum in the first tenth of a run, however long that is, unless the tenth has not a step for each newcomer.
#[test]
fn ours_grows_early_and_to_its_maximum() {
    for (steps, experts, k_max) in [
        (2000, 5, 20),
        (2000, 5, 120),
        (100_000, 4, 16),
        (300, 6, 16),
        (20, 3, 8),
        (2, 2, 4),
    ] {
        let params = ControllerParams::ours(2, experts, k_max, steps);
        let room = (k_max - experts) as u64;
        let Trigger::Schedule {
            first,
            every,
            splits: 1,
        } = params.trigger
        else {
            panic!("{:?}", params.trigger);
        };
        let last = first + (room - 1) * every;
        assert!(last < params.phase.live_until, "{steps}");
        if steps / 10 >= room + steps / 200 {
            assert!(params.phase.live_until <= steps / 10, "{steps}");
        }
        params.check().unwrap();
    }
    let params = ControllerParams::ours(1, 5, 20, 2000);
    assert_eq!(params.moments, Moments::Inherit);
    assert_eq!(params.stop, StopRule::Never);
    assert_eq!(params.choice, Choice::LossShare);
    let SplitOperator::Bisect(bisect) = params.operator else {
        panic!("{:?}", params.operator);
    };
    assert_eq!(bisect.strength, 0.75);
}

#[test]
fn shortening_leaves_alone_what_is_not_longer_than_a_tenth() {
    let lagged = |window, gap| CalibratedCusumParams {
        reference: Reference::Lagged { window, gap },
        warmup: 100,
        ..CalibratedCusumParams::default()
    };
    for (steps, window, gap) in [(1_000_000, 128, 64), (1280, 128, 64), (1000, 100, 12)] {
        let found = Watch::experts(lagged(128, 64)).shortened(steps);
        assert_eq!(found, Watch::experts(lagged(window, gap)), "{steps}");
    }
}

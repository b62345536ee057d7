//! What a run says of itself: routing that cannot learn or does not choose, and newcomers judged after the phase.

use mass_expand::{ControllerParams, Diagnosis, EventKind, StopRule};
use mass_model::growth::{GradientNorm, Grower, GrowerConfig, LossOn, Mixtures};
use mass_model::optim::{AdamW, AdamWConfig};
use mass_routing::{Combine, RouterConfig};

use crate::growing::{SEQ, batch, model};

/// A split at `first`, no other, and a phase of ten steps in a run of 30.
fn grower(first: u64, stop: StopRule) -> Grower {
    let mut controller = ControllerParams::paper(2, 3, 6, 30).with_schedule(first, 1000);
    controller.choice = mass_expand::Choice::MostLoaded;
    controller.phase.live_until = 10;
    controller.stop = stop;
    Grower::new(GrowerConfig {
        controller,
        gradient_norm: GradientNorm::AllParameters,
        redundancy_weight: 0.0,
        redundancy_reduction: mass_expand::Reduction::Mean,
    })
    .unwrap()
}

/// Trains for some steps and returns what happened, with the number of experts at the end.
fn train(
    router: RouterConfig,
    grower: &mut Grower,
    steps: u64,
    worth: f64,
) -> (Vec<(u64, EventKind)>, usize) {
    let mut model = model(router);
    let mut optimizer = AdamW::new(AdamWConfig::default()).unwrap();
    let mut all = Vec::new();
    for step in 0..steps {
        let (tokens, targets) = batch(step);
        let mut pass = model.train_pass(&tokens, &targets, SEQ).unwrap();
        let losses = |_: &_, on, masked: Option<_>| {
            assert_eq!(on, LossOn::Probe);
            let loss = if masked.is_some() { 1.0 + worth } else { 1.0 };
            Ok(vec![loss, loss + 0.5])
        };
        let events = grower
            .step(step, &mut model, &mut optimizer, &mut pass, losses)
            .unwrap();
        all.extend(events.into_iter().map(|e| (e.step, e.kind)));
        let gradients = &mut pass.gradients;
        optimizer.step(&mut model, gradients, 5e-3).unwrap();
    }
    (all, model.mixture(0).ids().len())
}

#[test]
fn a_gate_that_learns_nothing_and_a_p_that_chooses_nothing_are_named() {
    let top_k = |k, combine| RouterConfig::TopK { k, combine };
    let top_p = |p, combine| RouterConfig::TopP { p, combine };
    let [raw, renormalised, through] = Combine::ALL;
    let cases = [
        (top_k(1, renormalised), true, false),
        (top_k(1, raw), false, false),
        (top_k(1, through), false, false),
        (top_p(0.01, through), false, false),
        (top_k(2, renormalised), false, false),
        (top_p(0.01, renormalised), true, false),
        (top_p(0.01, raw), false, false),
        (top_p(1.0, raw), false, true),
        (top_p(1.0, renormalised), false, true),
        (top_k(3, renormalised), false, true),
    ];
    for (router, gradientless, everybody) in cases {
        let mut grower = grower(9, StopRule::Never);
        // A split would leave more experts than k: nothing is said of these.
        train(router.clone(), &mut grower, 9, 1.0);
        assert_eq!(
            grower.controller().diagnoses(),
            [],
            "nine steps are too few"
        );
        let mut grower = grower_without_split();
        train(router.clone(), &mut grower, 12, 1.0);
        let found = grower.controller().diagnoses();
        let of = |f: fn(&Diagnosis) -> bool| found.iter().filter(|d| f(d)).count();
        let gates = of(|d| matches!(d, Diagnosis::GateWithoutGradient { share: 1.0, .. }));
        let pools = of(|d| matches!(d, Diagnosis::SelectsEverybody { experts: 3, .. }));
        // Of two layers each.
        assert_eq!(
            gates,
            2 * usize::from(gradientless),
            "{router:?}: {found:?}"
        );
        assert_eq!(pools, 2 * usize::from(everybody), "{router:?}: {found:?}");
    }
}

fn grower_without_split() -> Grower {
    grower(1000, StopRule::Never)
}

#[test]
fn a_newcomer_is_judged_after_the_phase_and_at_the_latest_on_the_last_step() {
    let router = || RouterConfig::TopP {
        p: 0.6,
        combine: Combine::Renormalised,
    };
    for (wait, due) in [(4, 12), (15, 23), (50, 29)] {
        for worth in [-0.5, 0.5] {
            let stop = StopRule::HeldOut {
                margin: 0.0,
                z: 0.0,
                wait,
                patience: 1,
                remove: true,
            };
            let mut grower = grower(8, stop);
            let (events, experts) = train(router(), &mut grower, 30, worth);
            let checks: Vec<u64> = events
                .iter()
                .filter(|(_, kind)| matches!(kind, EventKind::Check { .. }))
                .map(|(step, _)| *step)
                .collect();
            assert_eq!(checks, [due, due], "{wait}");
            assert_eq!(experts, if worth > 0.0 { 4 } else { 3 });
            let unjudged = |d: &Diagnosis| matches!(d, Diagnosis::NotJudged { .. });
            assert!(!grower.controller().diagnoses().iter().any(unjudged));
        }
    }
}

/// A check after the phase whose losses cannot be had leaves the grower as it was, to be asked again.
#[test]
fn a_check_after_the_phase_that_fails_to_run_can_be_made_again() {
    let stop = StopRule::HeldOut {
        margin: 0.0,
        z: 0.0,
        wait: 5,
        patience: 1,
        remove: true,
    };
    let mut model = model(RouterConfig::TopK {
        k: 1,
        combine: Combine::Raw,
    });
    let mut optimizer = AdamW::new(AdamWConfig::default()).unwrap();
    let mut grower = grower(8, stop);
    for step in 0..14 {
        let (tokens, targets) = batch(step);
        let mut pass = model.train_pass(&tokens, &targets, SEQ).unwrap();
        if step == 13 {
            let before = serde_json::to_string(&grower).unwrap();
            // A single loss has no spread.
            grower
                .step(step, &mut model, &mut optimizer, &mut pass, |_, _, _| {
                    Ok(vec![1.0])
                })
                .unwrap_err();
            assert_eq!(serde_json::to_string(&grower).unwrap(), before);
        }
        let losses = |_: &_, _, masked: Option<_>| {
            let loss = if masked.is_some() { 0.5 } else { 1.0 };
            Ok(vec![loss, loss + 0.5])
        };
        grower
            .step(step, &mut model, &mut optimizer, &mut pass, losses)
            .unwrap();
    }
    assert_eq!(model.mixture(0).ids().len(), 3);
}

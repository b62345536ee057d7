//! The reference variant's decisions against values from outside, read from `$MASS_GOLDEN_DIR`.
//!
//! The file numbers experts by slot: the first free place after the active ones. This crate never uses a name again, so
//! the test translates. It also counts the expert masked at the stop among the pairs, as the reference does.

use mass_cpd::WindowedZParams;
use mass_expand::{
    Action, AlignmentThreshold, Answer, Controller, ControllerParams, Event, EventKind, ExpertId,
    ExpertObservation, LayerObservation, Request, StepObservation, StopReason, StopRule, Watch,
};
use serde::Deserialize;

#[derive(Deserialize)]
struct File {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    experts_init: usize,
    experts_max: usize,
    warmup: usize,
    window: usize,
    alpha: f64,
    delta: f64,
    patience: u32,
    checks_after_expansions: u64,
    norms: Vec<Vec<f64>>,
    cosines: Vec<Vec<f64>>,
    masked_minus_full: Vec<f64>,
    events: Vec<Expected>,
    experts_final: usize,
    pairs: Vec<(usize, usize)>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Expected {
    step: u64,
    source: usize,
    p_value: f64,
    cosine: f64,
    #[serde(default)]
    new: Option<usize>,
    #[serde(default)]
    removed: Option<usize>,
    #[serde(default)]
    masked_minus_full: Option<f64>,
    #[serde(default)]
    patience_left: Option<u32>,
    #[serde(default)]
    experts: Option<usize>,
    #[serde(default)]
    stopped: Option<String>,
}

fn controller(case: &Case) -> Controller {
    let steps = case.norms.len() as u64;
    let mut params =
        ControllerParams::reference(1, case.experts_init, case.experts_max, 10 * steps);
    params.watch = Watch::experts(WindowedZParams::reference(
        case.warmup,
        case.window,
        case.alpha,
    ));
    params.alignment = AlignmentThreshold::Absolute(case.delta);
    params.stop = StopRule::Patience {
        patience: case.patience,
        checks_after_expansions: case.checks_after_expansions,
    };
    params.check().unwrap()
}

/// What happened on one step, in the file's terms; `slots` maps places to experts as they were before it.
fn summarise(
    events: &[Event],
    slots: &mut Vec<ExpertId>,
    pairs: &mut Vec<(usize, usize)>,
) -> Option<Expected> {
    let mut found: Option<Expected> = None;
    let stop = events.iter().any(|e| {
        matches!(
            e.kind,
            EventKind::Stop {
                reason: StopReason::NoBenefit
            }
        )
    });
    let slot = |slots: &[ExpertId], id: ExpertId| slots.iter().position(|&s| s == id).unwrap();
    for event in events {
        match event.kind {
            EventKind::Trigger {
                source,
                p_value,
                cosine,
                ..
            } => {
                found = Some(Expected {
                    step: event.step,
                    source: slot(slots, source),
                    p_value: p_value.unwrap(),
                    cosine: cosine.unwrap(),
                    ..Expected::default()
                });
            }
            EventKind::Check {
                masked_minus_full,
                patience_left,
                ..
            } => {
                let found = found.as_mut().unwrap();
                found.masked_minus_full = Some(masked_minus_full);
                found.patience_left = patience_left;
            }
            EventKind::Remove { expert, .. } if !stop => {
                let at = slot(slots, expert);
                found.as_mut().unwrap().removed = Some(at);
                slots.remove(at);
                pairs.retain(|&(a, b)| a != at && b != at);
            }
            EventKind::Split {
                source,
                new,
                experts,
                ..
            } => {
                let found = found.as_mut().unwrap();
                found.new = Some(slots.len());
                found.experts = Some(experts);
                pairs.push((slot(slots, source), slots.len()));
                slots.push(new);
            }
            EventKind::Stop { reason } => {
                let found = found.as_mut().unwrap();
                found.stopped = Some(
                    match reason {
                        StopReason::Maximum => "maximum",
                        StopReason::NoBenefit => "no benefit",
                        _ => "phase end",
                    }
                    .to_string(),
                );
            }
            _ => {}
        }
    }
    found
}

#[test]
fn golden_controller_reference() {
    let dir = std::env::var("MASS_GOLDEN_DIR").expect("MASS_GOLDEN_DIR names the golden values");
    let path = std::path::Path::new(&dir).join("controller_reference.json");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let file: File = serde_json::from_str(&text).unwrap();
    assert!(!file.cases.is_empty());
    for (number, case) in file.cases.iter().enumerate() {
        let mut controller = controller(case);
        let mut slots = controller.active(0).to_vec();
        let mut pairs = Vec::new();
        let mut patience = case.patience;
        let mut found = Vec::new();
        for (step, (norms, cosines)) in case.norms.iter().zip(&case.cosines).enumerate() {
            let experts: Vec<ExpertObservation> = controller
                .active(0)
                .iter()
                .zip(norms.iter().zip(cosines))
                .map(|(&id, (&gradient_norm, &cosine))| ExpertObservation {
                    id,
                    gradient_norm,
                    cosine: Some(cosine),
                    load: 1,
                    loss_share: None,
                    routing_entropy: None,
                })
                .collect();
            let layers = [LayerObservation {
                experts: &experts,
                hidden: 1,
                dim: 1,
            }];
            let observation = StepObservation {
                step: step as u64,
                loss: 1.0,
                layers: &layers,
            };
            for request in controller.begin_step(&observation).unwrap() {
                let Request::MaskedLoss { layer, expert } = request else {
                    panic!("{request:?}");
                };
                assert_eq!(Some(&expert), controller.active(0).last());
                let masked = case.masked_minus_full[step];
                controller
                    .answer(Answer::MaskedLoss {
                        layer,
                        expert,
                        masked,
                        full: 0.0,
                    })
                    .unwrap();
            }
            let actions = controller.finish_step().unwrap();
            let splits = actions
                .iter()
                .filter(|a| matches!(a, Action::Split { .. }))
                .count();
            assert!(splits <= 1);
            found.extend(summarise(
                &controller.drain_events(),
                &mut slots,
                &mut pairs,
            ));
        }

        assert_eq!(found.len(), case.events.len(), "case {number}: {found:#?}");
        for (got, want) in found.iter().zip(&case.events) {
            let context = format!("case {number}, step {}", want.step);
            assert_eq!(got.step, want.step, "{context}");
            assert_eq!(got.source, want.source, "{context}");
            assert_eq!(got.new, want.new, "{context}");
            assert_eq!(got.removed, want.removed, "{context}");
            assert_eq!(got.stopped, want.stopped, "{context}");
            assert_eq!(got.experts, want.experts, "{context}");
            assert_eq!(got.masked_minus_full, want.masked_minus_full, "{context}");
            assert!((got.cosine - want.cosine).abs() < 1e-12, "{context}");
            assert!(
                (got.p_value - want.p_value).abs() < 1e-5,
                "{context}: p {} instead of {}",
                got.p_value,
                want.p_value
            );
            patience = got.patience_left.unwrap_or(patience);
            if let Some(left) = want.patience_left {
                assert_eq!(patience, left, "{context}");
            }
        }
        assert_eq!(
            controller.active(0).len(),
            case.experts_final,
            "case {number}"
        );
        assert_eq!(pairs, case.pairs, "case {number}");
        for pair in controller.pairs(0) {
            assert!(controller.active(0).contains(&pair.0));
            assert!(controller.active(0).contains(&pair.1));
        }
    }
}

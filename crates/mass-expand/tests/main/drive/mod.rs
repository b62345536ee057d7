//! A training loop made of pseudo-random figures, which the controller's tests drive.
#![allow(dead_code, missing_docs)]

use std::collections::BTreeSet;

use mass_expand::{
    Action, Answer, Controller, ControllerParams, ExpandError, ExpertId, ExpertObservation,
    LayerObservation, Request, StepObservation, StopRule,
};

/// Figures that depend on seed, step, layer and expert alone, so that a replay sees the same ones.
#[derive(Clone, Copy)]
pub(crate) struct Figures {
    pub(crate) seed: u64,
    /// Norms are multiplied by this from this step on.
    pub(crate) shift: Option<(u64, f64)>,
    /// Masked less full loss of every check, or noise.
    pub(crate) worth: Option<f64>,
    /// Whether cosines are given at once or only when asked for.
    pub(crate) lazy: bool,
}

impl Figures {
    pub(crate) fn new(seed: u64) -> Self {
        Self {
            seed,
            shift: None,
            worth: None,
            lazy: false,
        }
    }

    pub(crate) fn uniform(&self, step: u64, layer: usize, expert: u32, salt: u64) -> f64 {
        let mut x = self
            .seed
            .wrapping_add(step.wrapping_mul(0x9E37_79B9_7F4A_7C15))
            .wrapping_add((layer as u64).wrapping_mul(0xD1B5_4A32_D192_ED03))
            .wrapping_add(u64::from(expert).wrapping_mul(0x8CB9_2BA7_2F3D_8DD7))
            .wrapping_add(salt.wrapping_mul(0xAAAA_AAAA_AAAA_AAAB));
        for _ in 0..3 {
            x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        }
        (x >> 11) as f64 / (1u64 << 53) as f64
    }

    pub(crate) fn cosine(&self, step: u64, layer: usize, expert: u32) -> f64 {
        0.02 * (self.uniform(step, layer, expert, 2) - 0.5)
    }

    pub(crate) fn expert(&self, step: u64, layer: usize, id: ExpertId) -> ExpertObservation {
        let factor = self
            .shift
            .map_or(1.0, |(from, by)| if step >= from { by } else { 1.0 });
        ExpertObservation {
            id,
            gradient_norm: factor * (1.0 + self.uniform(step, layer, id.0, 1)),
            cosine: (!self.lazy).then(|| self.cosine(step, layer, id.0)),
            load: (100.0 * self.uniform(step, layer, id.0, 3)) as u64,
            loss_share: Some(self.uniform(step, layer, id.0, 4)),
            routing_entropy: Some(self.uniform(step, layer, id.0, 5)),
        }
    }

    pub(crate) fn answer(&self, step: u64, request: Request) -> Answer {
        match request {
            Request::Alignment { layer, expert } => Answer::Alignment {
                layer,
                expert,
                cosine: Some(self.cosine(step, layer, expert.0)),
            },
            Request::MaskedLoss { layer, expert } => Answer::MaskedLoss {
                layer,
                expert,
                masked: self
                    .worth
                    .unwrap_or_else(|| self.uniform(step, layer, expert.0, 6) - 0.5),
                full: 0.0,
            },
            Request::ProbeLoss { layer, expert } => Answer::ProbeLoss {
                layer,
                expert,
                difference: self
                    .worth
                    .unwrap_or_else(|| self.uniform(step, layer, expert.0, 8) - 0.5),
                standard_error: 0.01,
            },
        }
    }

    pub(crate) fn loss(&self, step: u64) -> f64 {
        let factor = self
            .shift
            .map_or(1.0, |(from, by)| if step >= from { by } else { 1.0 });
        factor * (2.0 + 0.1 * self.uniform(step, 999, 0, 7))
    }

    /// The step's figures of every layer.
    pub(crate) fn layers(&self, controller: &Controller, step: u64) -> Vec<Vec<ExpertObservation>> {
        (0..controller.layers())
            .map(|layer| {
                controller
                    .active(layer)
                    .iter()
                    .map(|&id| self.expert(step, layer, id))
                    .collect()
            })
            .collect()
    }

    /// Opens a step and leaves its requests unanswered.
    pub(crate) fn begin(
        &self,
        controller: &mut Controller,
        step: u64,
    ) -> Result<Vec<Request>, ExpandError> {
        let experts = self.layers(controller, step);
        begin_with(controller, step, self.loss(step), &experts)
    }

    /// A whole step.
    pub(crate) fn step(&self, controller: &mut Controller, step: u64) -> Vec<Action> {
        self.begin(controller, step).unwrap();
        self.finish(controller, step)
    }

    pub(crate) fn finish(&self, controller: &mut Controller, step: u64) -> Vec<Action> {
        while let Some(&request) = controller.open_requests().first() {
            controller.answer(self.answer(step, request)).unwrap();
        }
        controller.finish_step().unwrap()
    }
}

pub(crate) fn begin_with(
    controller: &mut Controller,
    step: u64,
    loss: f64,
    experts: &[Vec<ExpertObservation>],
) -> Result<Vec<Request>, ExpandError> {
    let layers: Vec<LayerObservation<'_>> = experts
        .iter()
        .map(|experts| LayerObservation {
            experts,
            hidden: 8,
            dim: 8,
        })
        .collect();
    controller.begin_step(&StepObservation {
        step,
        loss,
        layers: &layers,
    })
}

/// The pools as a training loop would keep them, which refuses impossible actions.
pub(crate) struct Pools {
    pub(crate) active: Vec<BTreeSet<ExpertId>>,
    pub(crate) named: Vec<BTreeSet<ExpertId>>,
    pub(crate) stopped: Vec<bool>,
}

impl Pools {
    pub(crate) fn of(controller: &Controller) -> Self {
        let active: Vec<BTreeSet<ExpertId>> = (0..controller.layers())
            .map(|layer| controller.active(layer).iter().copied().collect())
            .collect();
        Self {
            named: active.clone(),
            stopped: vec![false; active.len()],
            active,
        }
    }

    pub(crate) fn carry_out(&mut self, actions: &[Action], k_max: usize) {
        let mut splits = vec![0; self.active.len()];
        for action in actions {
            match *action {
                Action::Split {
                    layer,
                    source,
                    newcomer,
                    ..
                } => {
                    splits[layer] += 1;
                    assert_eq!(splits[layer], 1, "two splits of one layer in one step");
                    assert!(!self.stopped[layer], "a split after the stop");
                    assert!(
                        self.active[layer].contains(&source),
                        "a removed expert is split"
                    );
                    assert!(self.named[layer].insert(newcomer), "a name is used again");
                    self.active[layer].insert(newcomer);
                    assert!(self.active[layer].len() <= k_max, "more than k_max experts");
                }
                Action::Remove { layer, expert, .. } => {
                    assert!(
                        self.active[layer].remove(&expert),
                        "a removed expert is removed"
                    );
                    assert!(!self.active[layer].is_empty(), "the last expert is removed");
                }
                Action::Stop {
                    layer: Some(layer), ..
                } => self.stopped[layer] = true,
                Action::Stop { layer: None, .. } => self.stopped.fill(true),
                _ => panic!("an action that this test does not know"),
            }
        }
    }
}

/// A split is wanted at every step, of the expert that `choice` names.
pub(crate) fn every_step(experts: usize, k_max: usize) -> ControllerParams {
    ControllerParams {
        stop: StopRule::Never,
        averaging_steps: 1.0,
        ..ControllerParams::paper(1, experts, k_max, 10_000).with_schedule(0, 1)
    }
}

pub(crate) fn observation(ids: &[ExpertId]) -> Vec<ExpertObservation> {
    ids.iter()
        .map(|&id| ExpertObservation {
            id,
            gradient_norm: 1.0,
            cosine: Some(0.0),
            load: 10,
            loss_share: Some(0.1),
            routing_entropy: Some(0.1),
        })
        .collect()
}

/// One step in which every request gets `worth`.
pub(crate) fn step_with_worth(controller: &mut Controller, step: u64, worth: f64) -> Vec<Action> {
    Figures {
        worth: Some(worth),
        ..Figures::new(1)
    }
    .step(controller, step)
}

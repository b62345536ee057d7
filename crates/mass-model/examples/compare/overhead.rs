//! What watching the experts costs: detectors, alignment and events against the step they are part of.

use std::error::Error;
use std::time::Instant;

use mass_expand::{AlignmentThreshold, ControllerParams, Reduction, Trigger};
use mass_model::growth::{GradientNorm, Grower, GrowerConfig};
use mass_model::optim::{AdamW, AdamWConfig};

use crate::timing::Quartiles;
use crate::train;

const STEPS: u64 = 400;

/// The one-layer transformer again, with a controller that watches every expert in every step and never splits.
pub(crate) fn run() -> Result<(), Box<dyn Error>> {
    println!("| variant | step ms | watching ms | share of the step |\n|---|---|---|---|");
    let (mut model, inputs, targets, seq) = train::transformer_parts()?;
    let experts = model.blocks[0].moe.ids().len();
    for (name, controller, norm) in [
        (
            "paper",
            ControllerParams::paper(1, experts, experts + 1, STEPS),
            GradientNorm::AllParameters,
        ),
        (
            "reference",
            ControllerParams::reference(1, experts, experts + 1, STEPS),
            GradientNorm::Fc1,
        ),
        (
            "calibrated",
            ControllerParams::calibrated(1, experts, experts + 1, STEPS),
            GradientNorm::AllParameters,
        ),
    ] {
        let mut controller = controller;
        // Watch in every step; alarms are answered by an alignment test that nothing passes, so that no expert is split.
        controller.phase.live_until = STEPS;
        controller.trigger = Trigger::DetectorAndAlignment;
        controller.alignment = AlignmentThreshold::Absolute(f64::MIN_POSITIVE);
        let mut grower = Grower::new(GrowerConfig {
            controller,
            gradient_norm: norm,
            redundancy_weight: 0.01,
            redundancy_reduction: Reduction::Mean,
        })?;
        let mut optimizer = AdamW::new(AdamWConfig::default())?;
        let (mut steps, mut watching) = (Vec::new(), Vec::new());
        for step in 0..STEPS {
            let start = Instant::now();
            let mut pass = model.train_pass(&inputs, &targets, seq)?;
            let before = Instant::now();
            // An expert is always worth something, so that expansion goes on.
            let losses = |_: &_, _, masked: Option<_>| {
                let worse = if masked.is_some() { 1.0 } else { 0.0 };
                Ok(vec![worse, worse + 0.1])
            };
            grower.step(step, &mut model, &mut optimizer, &mut pass, losses)?;
            watching.push(before.elapsed().as_secs_f64());
            optimizer.step(&mut model, &mut pass.gradients, 1e-4)?;
            steps.push(start.elapsed().as_secs_f64());
        }
        let (steps, watching) = (Quartiles::of(steps), Quartiles::of(watching));
        println!(
            "| {name} | {} | {} | {:.2} % |",
            steps.show(1e3, 2),
            watching.show(1e3, 3),
            100.0 * watching.median() / steps.median()
        );
    }
    Ok(())
}

//! What growth costs a training step: watching the experts, checking one, splitting one.

use std::error::Error;
use std::time::Instant;

use mass_expand::{
    AlignmentThreshold, BisectParams, ControllerParams, ExpertId, Reduction, SplitOperator,
    StopRule, Trigger,
};
use mass_model::growth::{GradientNorm, Grower, GrowerConfig, Mixtures};
use mass_model::lm::LanguageModel;
use mass_model::optim::{AdamW, AdamWConfig};
use mass_model::{Masked, ModelError};

use crate::timing::Quartiles;
use crate::train;

/// Steps of a row, and how many splits.
const STEPS: u64 = 200;
const SPLITS: usize = 16;

/// Experts and their hidden width: more of them, and wider ones.
const POOLS: [(usize, usize); 5] = [(12, 256), (48, 256), (192, 256), (12, 1024), (48, 1024)];

/// The one-layer transformer with a controller that watches every expert in every step and splits none; then a check and splits
/// apart.
pub(crate) fn run() -> Result<(), Box<dyn Error>> {
    println!(
        "| experts x hidden | variant | step ms | watching ms | with / without | check ms | split ms |\n\
         |---|---|---|---|---|---|---|"
    );
    for (experts, hidden) in POOLS {
        let check = check(experts, hidden)?;
        let split = split(experts, hidden)?;
        type Rules = fn(usize, usize, usize, u64) -> ControllerParams;
        let variants: [(&str, Rules, GradientNorm); 3] = [
            (
                "paper",
                ControllerParams::paper,
                GradientNorm::AllParameters,
            ),
            ("reference", ControllerParams::reference, GradientNorm::Fc1),
            (
                "calibrated",
                ControllerParams::calibrated,
                GradientNorm::AllParameters,
            ),
        ];
        for (name, rules, norm) in variants {
            let mut controller = rules(1, experts, experts + 1, STEPS);
            // Watch in every step; alarms are answered by an alignment test that nothing passes, so that no expert is split.
            controller.phase.live_until = STEPS;
            controller.trigger = Trigger::DetectorAndAlignment;
            controller.alignment = AlignmentThreshold::Absolute(f64::MIN_POSITIVE);
            let (steps, watching, ratios) = watch(experts, hidden, controller, norm)?;
            println!(
                "| {experts} x {hidden} | {name} | {} | {} | {} | {} | {} |",
                steps.show(1e3, 1),
                watching.show(1e3, 2),
                ratios.show(1.0, 3),
                check.show(1e3, 1),
                split.show(1e3, 2)
            );
        }
    }
    Ok(())
}

/// Times of whole steps and of watching in them, seconds, and the ratio of a step to the same step less its watching.
fn watch(
    experts: usize,
    hidden: usize,
    controller: ControllerParams,
    gradient_norm: GradientNorm,
) -> Result<(Quartiles, Quartiles, Quartiles), Box<dyn Error>> {
    let (mut model, inputs, targets, seq) = train::transformer_of(experts, hidden)?;
    let mut grower = Grower::new(GrowerConfig {
        gradient_norm,
        ..GrowerConfig::new(controller)
    })?;
    let mut optimizer = AdamW::new(AdamWConfig::default())?;
    let (mut steps, mut watching, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
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
        let watched = before.elapsed().as_secs_f64();
        optimizer.step(&mut model, &mut pass.gradients, 1e-4)?;
        let whole = start.elapsed().as_secs_f64();
        steps.push(whole);
        watching.push(watched);
        ratios.push(whole / (whole - watched));
    }
    Ok((
        Quartiles::of(steps),
        Quartiles::of(watching),
        Quartiles::of(ratios),
    ))
}

/// Seconds of a check on the batch: its loss with an expert masked, and without.
fn check(experts: usize, hidden: usize) -> Result<Quartiles, Box<dyn Error>> {
    let (model, inputs, targets, seq) = train::transformer_of(experts, hidden)?;
    let expert = ExpertId(0);
    let mut times = Vec::new();
    for _ in 0..SPLITS {
        let start = Instant::now();
        for masked in [Some(Masked { layer: 0, expert }), None] {
            model.score(&inputs, &targets, seq, masked)?;
        }
        times.push(start.elapsed().as_secs_f64());
    }
    Ok(Quartiles::of(times))
}

/// Seconds of a split: a bisection, with the optimiser's moments, of one expert in each step.
fn split(experts: usize, hidden: usize) -> Result<Quartiles, Box<dyn Error>> {
    let (mut model, inputs, targets, seq) = train::transformer_of(experts, hidden)?;
    let mut controller = ControllerParams::ours(1, experts, experts + SPLITS, STEPS);
    controller = controller.with_schedule(0, 1);
    controller.operator = SplitOperator::Bisect(BisectParams::default());
    controller.stop = StopRule::Never;
    let mut config = GrowerConfig::new(controller);
    (config.redundancy_weight, config.redundancy_reduction) = (0.0, Reduction::Mean);
    let (mut grower, mut optimizer) = (Grower::new(config)?, AdamW::new(AdamWConfig::default())?);
    let mut times = Vec::new();
    for step in 0..SPLITS as u64 {
        let mut pass = model.train_pass(&inputs, &targets, seq)?;
        let before = Instant::now();
        let none = |_: &LanguageModel, _, _| Err(ModelError::Config("no loss is needed".into()));
        grower.step(step, &mut model, &mut optimizer, &mut pass, none)?;
        times.push(before.elapsed().as_secs_f64());
        optimizer.step(&mut model, &mut pass.gradients, 1e-4)?;
    }
    let grown = model.mixture(0).ids().len();
    if grown != experts + SPLITS {
        return Err(format!("{grown} experts, of {experts} and {SPLITS} splits").into());
    }
    Ok(Quartiles::of(times))
}

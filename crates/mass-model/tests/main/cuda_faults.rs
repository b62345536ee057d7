//! What is left after a device has failed, or had no memory. Without an emulated device, the tests do nothing and say so.

use std::collections::BTreeMap;

use mass_model::lm::LanguageModel;
use mass_model::mass_cuda::{CudaError, Device};
use mass_model::optim::{AdamW, AdamWConfig, Group, ParameterState, Select};
use mass_model::{ModelError, TrainPass};

use crate::cuda::{SEQ, Word, batch, control, device, model, optimizer, params, set};

type Bits = Vec<Vec<u32>>;

fn bits(model: &LanguageModel) -> Bits {
    let of = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect();
    let all = params(model).into_iter();
    all.map(|(_, p)| of(p.try_values().unwrap())).collect()
}

fn pass(
    device: &Device,
    model: &LanguageModel,
    step: usize,
) -> TrainPass<mass_model::ops::CudaGradients> {
    let (tokens, targets) = batch(step);
    model.train_pass_on(device, &tokens, &targets, SEQ).unwrap()
}

type State = BTreeMap<String, ParameterState>;

/// A model after some undisturbed steps, and the optimiser's state.
fn undisturbed(device: &Device, steps: usize) -> (Bits, State) {
    let (mut model, mut optimizer) = (model(), optimizer());
    for step in 0..steps {
        let mut pass = pass(device, &model, step);
        let gradients = &mut pass.gradients;
        optimizer.step(&mut model, gradients, 1e-2).unwrap();
    }
    (bits(&model), optimizer.state().clone())
}

#[test]
fn a_step_that_finds_no_memory_changes_nothing() {
    let Some(device) = device() else { return };
    let Some(control) = control() else { return };
    let (wanted, state) = undisturbed(&device, 2);
    let (mut model, mut optimizer) = (model(), optimizer());
    for step in 0..2 {
        let mut pass = pass(&device, &model, step);
        let before = (bits(&model), optimizer.state().clone());
        let mut refused = 0;
        loop {
            set(&control, Word::FailAllocation, refused + 1);
            let outcome = optimizer.step(&mut model, &mut pass.gradients, 1e-2);
            set(&control, Word::FailAllocation, 0);
            match outcome {
                Ok(_) => break,
                Err(ModelError::Cuda(CudaError::OutOfMemory { .. })) => refused += 1,
                Err(other) => panic!("{other}"),
            }
            assert!(bits(&model) == before.0, "allocation {refused}");
            assert!(optimizer.state() == &before.1, "allocation {refused}");
        }
        // The sums of squares, and the table of the update; moments, on the first step.
        assert!(refused > if step == 0 { 100 } else { 1 }, "{refused}");
    }
    assert!(bits(&model) == wanted);
    assert!(optimizer.state() == &state);
}

#[test]
fn a_step_whose_launch_fails_leaves_the_values_of_the_host() {
    let Some(good) = device() else { return };
    let Some(control) = control() else { return };
    let (wanted, state) = undisturbed(&good, 1);
    let mut failures = Vec::new();
    loop {
        let (mut model, mut optimizer) = (model(), optimizer());
        let before = bits(&model);
        let bad = Device::open(0).unwrap();
        let mut first = pass(&bad, &model, 0);
        set(&control, Word::FailLaunch, 1 + failures.len() as u64);
        let outcome = optimizer.step(&mut model, &mut first.gradients, 1e-2);
        set(&control, Word::FailLaunch, 0);
        let Err(error) = outcome else { break };
        assert!(bits(&model) == before, "{error}");
        assert!(optimizer.state().is_empty(), "{error}");
        failures.push(error.to_string());
        drop(first);
        // And training goes on from there, on another device.
        let mut first = pass(&good, &model, 0);
        let gradients = &mut first.gradients;
        optimizer.step(&mut model, gradients, 1e-2).unwrap();
        assert!(bits(&model) == wanted);
        assert!(optimizer.state() == &state);
    }
    let last = failures.last().unwrap();
    assert!(last.contains("launching adamw"), "{failures:?}");
}

#[test]
fn settings_that_f32_cannot_hold_are_refused_before_anything_changes() {
    let Some(device) = device() else { return };
    let mut model = model();
    let group = Group {
        name: "head".into(),
        select: Select::Prefix("head".into()),
        weight_decay: None,
        lr_scale: Some(1e300),
    };
    let mut optimizer = AdamW::new(AdamWConfig {
        groups: vec![group],
        ..AdamWConfig::default()
    })
    .unwrap();
    let before = bits(&model);
    let mut pass = pass(&device, &model, 0);
    for _ in 0..2 {
        let refused = optimizer.step(&mut model, &mut pass.gradients, 1e-2);
        let error = refused.unwrap_err();
        assert!(matches!(error, ModelError::Config(_)), "{error}");
        assert!(
            error.to_string().contains("learning rate of head"),
            "{error}"
        );
        assert!(bits(&model) == before);
        assert!(optimizer.state().is_empty());
    }
}

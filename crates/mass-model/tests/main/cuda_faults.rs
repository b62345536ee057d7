//! What is left after a device has failed, or had no memory. Without an emulated device, the tests do nothing and say so.

use std::collections::BTreeMap;
use std::fs::File;

use mass_expand::{BisectParams, ControllerParams, ExpertId, SplitOperator};
use mass_model::bert::{BertClassifier, BertConfig, Targets, TextBatch};
use mass_model::checkpoint::save_safetensors;
use mass_model::checkpoint::{LoadOptions, Snapshot, load_into, load_safetensors, save};
use mass_model::growth::{Grower, GrowerConfig, Mixtures, pair_figures, split_expert};
use mass_model::lm::LanguageModel;
use mass_model::mass_cuda::{CudaError, Device};
use mass_model::optim::{AdamW, AdamWConfig, Ema, Group, ParameterState, Select};
use mass_model::vit::{ImageBatch, VitClassifier, VitConfig};
use mass_model::{DropoutKeys, ModelError, TrainPass, seeded_rng};
use mass_routing::RouterConfig;

use crate::cuda::{
    SEQ, Word, batch, control, device, get, model, model_with, optimizer, params, set, top_p,
};

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

/// A model after a step on a device that has failed since, and a pass that it made on the host before all that.
fn broken(control: &File) -> (LanguageModel, TrainPass) {
    let (mut model, mut optimizer) = (model(), optimizer());
    let (tokens, targets) = batch(0);
    let here = model.train_pass(&tokens, &targets, SEQ).unwrap();
    let bad = Device::open(0).unwrap();
    let mut there = pass(&bad, &model, 0);
    let gradients = &mut there.gradients;
    optimizer.step(&mut model, gradients, 1e-2).unwrap();
    set(control, Word::FailLaunch, 1);
    cuda(model.score_on(&bad, &tokens, &targets, SEQ, None));
    set(control, Word::FailLaunch, 0);
    (model, here)
}

/// The error must be the device's.
#[track_caller]
fn cuda<T>(outcome: Result<T, ModelError>) {
    match outcome {
        Err(ModelError::Cuda(_)) => {}
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("it did not fail"),
    }
}

#[test]
fn a_model_whose_device_has_failed_is_read_from_a_file() {
    let Some(device) = device() else { return };
    let Some(control) = control() else { return };
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.safetensors");
    let (good, optimizer) = (model(), optimizer());
    save_safetensors(&file, &good).unwrap();
    let snapshot = Snapshot::new(0, &good, &optimizer, &());
    save(&folder.path().join("run"), &snapshot).unwrap();

    let (mut model, _) = broken(&control);
    load_safetensors(&file, &mut model).unwrap();
    assert!(bits(&model) == bits(&good));
    let (mut model, _) = broken(&control);
    load_into(
        &folder.path().join("run"),
        &mut model,
        LoadOptions::default(),
    )
    .unwrap();
    assert!(bits(&model) == bits(&good));

    // And where the device is well, what will be overwritten does not come down.
    let mut first = pass(&device, &model, 0);
    let gradients = &mut first.gradients;
    let mut trained = crate::cuda::optimizer();
    trained.step(&mut model, gradients, 1e-2).unwrap();
    let before = get(&control, Word::Downs);
    load_safetensors(&file, &mut model).unwrap();
    assert_eq!(get(&control, Word::Downs), before);
    assert!(bits(&model) == bits(&good));
}

#[test]
fn what_a_failed_device_has_changed_is_an_error_on_the_host() {
    let Some(_) = device() else { return };
    let Some(control) = control() else { return };
    let (mut model, mut here) = broken(&control);
    let (tokens, targets) = batch(0);
    cuda(model.train_pass(&tokens, &targets, SEQ).map(|_| ()));
    cuda(model.score(&tokens, &targets, SEQ, None));

    let mut ema = Ema::new(0.5).unwrap();
    cuda(ema.update(&model));
    ema.update(&crate::cuda::model()).unwrap();
    let averages = ema.clone();
    cuda(ema.update(&model));
    cuda(ema.swap(&mut model));
    cuda(ema.evaluate(&mut model, |_| ()));
    assert!(ema == averages);

    let mut optimizer = optimizer();
    cuda(optimizer.step(&mut model, &mut here.gradients, 1e-2));
    assert!(optimizer.state().is_empty());

    let row = vec![0.0; model.tokens.len()];
    cuda(model.tokens.move_to(&row));
    for operator in [
        SplitOperator::Bisect(BisectParams::default()),
        ControllerParams::paper(1, 1, 2, 10).operator,
    ] {
        let (layer, trace) = (model.mixture_mut(0), &here.layers[0]);
        let split = split_expert(layer, ExpertId(0), operator, trace, &mut here.gradients);
        cuda(split);
        assert_eq!(layer.ids().len(), 4);
    }
    let (layer, trace) = (model.mixture(0), &here.layers[0]);
    let (a, b) = (ExpertId(0), ExpertId(1));
    cuda(pair_figures(layer, trace, &mut here.gradients, a, b));
    let config = GrowerConfig::new(ControllerParams::paper(1, 1, 2, 10));
    let mut grower = Grower::new(config).unwrap();
    let before = grower.controller().clone();
    let grown = grower.step(0, &mut model, &mut optimizer, &mut here, |_, _, _| {
        Ok(vec![1.0])
    });
    cuda(grown);
    assert!(grower.controller() == &before);
    // The gradients are those of before: with values that can be read, the step is made.
    let (mut model, mut same) = broken(&control);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.safetensors");
    save_safetensors(&file, &crate::cuda::model()).unwrap();
    cuda(optimizer.step(&mut model, &mut same.gradients, 1e-2));
    load_safetensors(&file, &mut model).unwrap();
    optimizer
        .step(&mut model, &mut same.gradients, 1e-2)
        .unwrap();
}

fn bert() -> (BertClassifier, TextBatch) {
    let config = BertConfig {
        vocab_size: 12,
        hidden_size: 8,
        num_hidden_layers: 2,
        num_attention_heads: 2,
        intermediate_size: 16,
        max_position_embeddings: 8,
        initializer_range: 0.3,
        ..BertConfig::default()
    };
    let mut rng = seeded_rng(4);
    let mut model = BertClassifier::new(&config, 3, &mut rng).unwrap();
    model.convert(0, 4, noisy(), &mut rng).unwrap();
    let ids = vec![1, 5, 0, 2, 1, 7, 2, 1, 11];
    let batch = TextBatch::packed(ids, vec![0; 9], vec![0, 4, 7, 9]);
    (model, batch)
}

#[test]
fn classifiers_whose_device_has_failed_give_its_error_on_the_host() {
    let Some(_) = device() else { return };
    let Some(control) = control() else { return };
    let bad = || Device::open(0).unwrap();

    let (mut model, batch) = bert();
    let (device, targets) = (bad(), Targets::Classes(&[2, 0, 1]));
    let mut pass = model.train_pass_on(&device, &batch, targets, None).unwrap();
    let gradients = &mut pass.gradients;
    optimizer().step(&mut model, gradients, 1e-2).unwrap();
    set(&control, Word::FailLaunch, 1);
    cuda(model.losses_on(&device, &batch, targets, None));
    set(&control, Word::FailLaunch, 0);
    cuda(model.train_pass(&batch, targets, None).map(|_| ()));
    cuda(model.losses(&batch, targets, None));
    cuda(model.logits(&batch, None));
    cuda(model.hidden_states(&batch));
    cuda(model.pooled(&batch));

    let config = VitConfig {
        hidden_size: 8,
        num_hidden_layers: 2,
        num_attention_heads: 2,
        intermediate_size: 16,
        image_size: 8,
        patch_size: 4,
        layer_scale: Some(0.7),
        ..VitConfig::default()
    };
    let mut rng = seeded_rng(5);
    let mut model = VitClassifier::new(&config, 5, &mut rng).unwrap();
    model.convert(1, 4, top_p(), &mut rng).unwrap();
    let pixels: Vec<f32> = (0..2 * 3 * 8 * 8).map(|i| (i as f32).sin()).collect();
    let (pixels, size) = (&pixels[..], (8, 8));
    let batch = ImageBatch::Pixels { pixels, size };
    let device = bad();
    let mut pass = model.train_pass_on(&device, batch, &[3, 1], None).unwrap();
    let gradients = &mut pass.gradients;
    optimizer().step(&mut model, gradients, 1e-2).unwrap();
    set(&control, Word::FailLaunch, 1);
    cuda(model.losses_on(&device, batch, &[3, 1], None));
    set(&control, Word::FailLaunch, 0);
    cuda(model.train_pass(batch, &[3, 1], None).map(|_| ()));
    cuda(model.losses(batch, &[3, 1], None));
    cuda(model.logits(batch, None));
    cuda(model.hidden_states(batch));
    cuda(model.encoded(batch));
    cuda(model.features(pixels, size, 1));
}

fn noisy() -> RouterConfig {
    RouterConfig::Noisy {
        std: 1.0,
        seed: 3,
        inner: Box::new(top_p()),
    }
}

/// What moves on with every pass.
fn moving(model: &impl Mixtures, keys: &DropoutKeys) -> String {
    let routers = (0..model.mixtures()).map(|l| model.mixture(l).router().clone());
    format!("{keys:?} {:?}", routers.collect::<Vec<_>>())
}

#[test]
fn a_pass_that_fails_leaves_noise_and_masks_where_they_were() {
    let Some(device) = device() else { return };
    let Some(control) = control() else { return };
    let model = || model_with(noisy());
    let (tokens, targets) = batch(0);
    let wanted = pass(&device, &model(), 0).loss;
    let (retried, keys) = (model(), DropoutKeys::new(1, 2));
    let before = moving(&retried, &keys);
    let mut failures = 0;
    let loss = loop {
        set(&control, Word::FailAllocation, 1 + 10 * failures);
        let outcome = retried.train_pass_on(&device, &tokens, &targets, SEQ);
        set(&control, Word::FailAllocation, 0);
        match outcome {
            Ok(pass) => break pass.loss,
            Err(ModelError::Cuda(_)) => failures += 1,
            Err(other) => panic!("{other}"),
        }
        assert_eq!(moving(&retried, &keys), before, "{failures}");
    };
    assert!(failures > 10, "{failures}");
    assert_eq!(loss.to_bits(), wanted.to_bits());
    assert_ne!(moving(&retried, &keys), before);

    let ((model, batch), mut keys) = (bert(), DropoutKeys::new(1, 2));
    let (before, targets) = (moving(&model, &keys), Targets::Classes(&[2, 0, 1]));
    for n in [10, 60, 120] {
        set(&control, Word::FailAllocation, n);
        cuda(
            model
                .train_pass_on(&device, &batch, targets, Some(&mut keys))
                .map(|_| ()),
        );
        assert_eq!(moving(&model, &keys), before);
    }
    // On the host too: there is no class 7.
    let wrong = Targets::Classes(&[2, 0, 7]);
    let refused = model.train_pass(&batch, wrong, Some(&mut keys));
    assert!(matches!(refused, Err(ModelError::Index { .. })));
    assert_eq!(moving(&model, &keys), before);
}

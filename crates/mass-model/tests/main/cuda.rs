//! Models that train on a device, against the same ones on the host. Without a device, which `cargo xtask cuda-emu`
//! emulates, the tests do nothing and say so.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;

use mass_expand::ExpertId;
use mass_model::bert::{BertClassifier, BertConfig, Targets, TextBatch};
use mass_model::checkpoint::{load_safetensors, save_safetensors};
use mass_model::growth::Mixtures;
use mass_model::lm::{LanguageModel, LanguageModelConfig};
use mass_model::mass_cuda::Device;
use mass_model::nn::{BlockConfig, MoeConfig};
use mass_model::ops::CudaGradients;
use mass_model::optim::{AdamW, AdamWConfig, Gradients};
use mass_model::vit::{ImageBatch, VitClassifier, VitConfig};
use mass_model::{Activation, DropoutKeys, Masked, Param, Parameters, TrainPass, seeded_rng};
use mass_routing::{Combine, RouterConfig};

/// The device, if one was promised; if it is not there then, the test fails.
pub(crate) fn device() -> Option<Device> {
    let promised = ["EMU_CONTROL", "MASS_CUDA_REAL"];
    if promised.iter().all(|name| std::env::var_os(name).is_none()) {
        let what = "NOT RUN: it needs a device, which `cargo xtask cuda-emu` emulates";
        let _ = writeln!(std::io::stderr(), "a test was {what}");
        return None;
    }
    Some(Device::open(0).unwrap())
}

/// What the emulated driver has counted: see mass-cuda's `emu/README.md`.
#[derive(Clone, Copy)]
pub(crate) enum Word {
    Allocations = 1,
    Freed = 2,
    LargestUp = 7,
    Downs = 8,
    LargestDown = 10,
    FailAllocation = 16,
    FailLaunch = 17,
}

pub(crate) fn control() -> Option<File> {
    let path = std::env::var_os("EMU_CONTROL")?;
    File::options().read(true).write(true).open(path).ok()
}

pub(crate) fn get(control: &File, word: Word) -> u64 {
    let mut bytes = [0; 8];
    control.read_exact_at(&mut bytes, 8 * word as u64).unwrap();
    u64::from_ne_bytes(bytes)
}

pub(crate) fn set(control: &File, word: Word, value: u64) {
    let bytes = value.to_ne_bytes();
    control.write_all_at(&bytes, 8 * word as u64).unwrap();
}

pub(crate) const SEQ: usize = 8;
const VOCAB: usize = 50;

pub(crate) fn model() -> LanguageModel {
    model_with(top_p())
}

pub(crate) fn model_with(router: RouterConfig) -> LanguageModel {
    let config = LanguageModelConfig {
        vocab: VOCAB,
        max_seq: SEQ,
        layers: 2,
        embedding_std: 0.5,
        block: BlockConfig {
            heads: 4,
            layer_norm_eps: 1e-5,
            moe: MoeConfig::new(32, 64, 4, Activation::GeluErf, router),
        },
    };
    LanguageModel::new(&config, &mut seeded_rng(7)).unwrap()
}

/// Tokens and what follows each.
pub(crate) fn batch(step: usize) -> (Vec<u32>, Vec<u32>) {
    let token = |i: usize| ((i * i + 3 * i + step) % VOCAB) as u32;
    let n = 3 * SEQ;
    ((0..n).map(token).collect(), (1..=n).map(token).collect())
}

fn close(what: &str, got: &[f32], want: &[f32], tolerance: f32) {
    assert_eq!(got.len(), want.len(), "{what}");
    let largest = want.iter().fold(1.0_f32, |m, x| m.max(x.abs()));
    for (i, (a, b)) in got.iter().zip(want).enumerate() {
        let error = (a - b).abs();
        assert!(
            error <= tolerance * largest,
            "{what}[{i}]: {a}, on the host {b}"
        );
    }
}

pub(crate) fn params<M: Parameters>(model: &M) -> Vec<(String, &Param)> {
    let mut all = Vec::new();
    model.visit("", &mut |name, param| all.push((name, param)));
    all
}

/// Losses, plans and gradients of two passes, one on the device and one on the host.
fn same_pass<M: Parameters>(
    model: &M,
    there: &TrainPass<CudaGradients>,
    mut host: TrainPass,
    tolerance: f32,
) {
    assert!((there.loss - host.loss).abs() < tolerance);
    close("losses", &there.token_losses, &host.token_losses, tolerance);
    assert_eq!(there.layers.len(), host.layers.len());
    for (a, b) in there.layers.iter().zip(&host.layers) {
        assert_eq!(a.plan.tokens(), b.plan.tokens());
        let (a, b) = (a.gate_input.values(), b.gate_input.values());
        close("gate input", a, b, tolerance);
    }
    for (name, param) in params(model) {
        let got = there.gradients.of(param).unwrap();
        let wanted = param.find_gradient(&mut host.gradients).unwrap();
        match (got, wanted) {
            (Some(got), Some(wanted)) => close(&name, &got, wanted, tolerance),
            (got, wanted) => assert!(got.is_none() && wanted.is_none(), "{name}"),
        }
    }
}

pub(crate) fn top_p() -> RouterConfig {
    RouterConfig::TopP {
        p: 0.6,
        combine: Combine::Renormalised,
    }
}

#[test]
fn the_device_routes_as_the_host_does() {
    let Some(device) = device() else { return };
    let mut routers = Vec::new();
    for combine in Combine::ALL {
        for p in [0.3, 0.75, 1.0] {
            routers.push(RouterConfig::TopP { p, combine });
        }
        for k in [1, 3, 4] {
            routers.push(RouterConfig::TopK { k, combine });
        }
    }
    let any: RouterConfig = "top_any".parse().unwrap();
    routers.push(any);
    for router in routers {
        let what = format!("{router:?}");
        let mut model = model_with(router);
        for layer in &mut [0, 1] {
            // Thresholds that some scores do not pass, and offsets of experts that were split.
            for (e, id) in model.mixture(*layer).ids().to_vec().into_iter().enumerate() {
                let expert = model.mixture_mut(*layer).expert_mut(id).unwrap();
                expert.logit_offset = -0.1 * e as f32;
                if let Some(threshold) = &mut expert.threshold {
                    threshold.values_mut()[0] = 0.3 * e as f32 - 0.2;
                }
            }
        }
        let (tokens, targets) = batch(5);
        let mut host = model.train_pass(&tokens, &targets, SEQ).unwrap();
        let mut there = model
            .train_pass_on(&device, &tokens, &targets, SEQ)
            .unwrap();
        let mut traces = vec![(there.layers.clone(), host.layers.clone())];
        let masked = Some(Masked {
            layer: 1,
            expert: model.mixture(1).ids()[2],
        });
        if !what.contains("k: 4") {
            let [a, b] = [Some(&device), None].map(|device| match device {
                Some(device) => model.score_on(device, &tokens, &targets, SEQ, masked),
                None => model.score(&tokens, &targets, SEQ, masked),
            });
            traces.push((a.unwrap().1, b.unwrap().1));
        }
        for (a, b) in traces.iter().flat_map(|(a, b)| a.iter().zip(b)) {
            let (a, b) = (&a.plan, &b.plan);
            assert_eq!(a.expert_offsets(), b.expert_offsets(), "{what}");
            assert_eq!(a.tokens(), b.tokens(), "{what}");
            assert_eq!(a.token_offsets(), b.token_offsets(), "{what}");
            assert_eq!(a.token_assignments(), b.token_assignments(), "{what}");
            assert_eq!(a.token_experts(), b.token_experts(), "{what}");
            assert_eq!(a.in_use(), b.in_use(), "{what}");
            assert_eq!(a.tokens_teaching_gate(), b.tokens_teaching_gate(), "{what}");
            close(&what, a.weights(), b.weights(), 1e-5);
            let [a, b] =
                [a, b].map(|plan| plan.probabilities().iter().copied().collect::<Vec<_>>());
            close(&what, &a, &b, 1e-5);
        }
        for (name, param) in params(&model) {
            let got = there.gradients.copy(param).unwrap();
            let wanted = host.gradients.copy(param).unwrap();
            match (got, wanted) {
                (Some(got), Some(wanted)) => close(&format!("{what}, {name}"), &got, &wanted, 1e-4),
                (got, wanted) => assert!(got.is_none() && wanted.is_none(), "{what}, {name}"),
            }
        }
    }
}

#[test]
fn what_the_device_cannot_route_has_the_host_s_error() {
    let Some(device) = device() else { return };
    let mut model = model();
    model
        .mixture_mut(1)
        .expert_mut(ExpertId(2))
        .unwrap()
        .gate
        .values_mut()[3] = f32::NAN;
    let (tokens, targets) = batch(0);
    let host = model
        .train_pass(&tokens, &targets, SEQ)
        .map(|_| ())
        .unwrap_err();
    let there = model.train_pass_on(&device, &tokens, &targets, SEQ);
    assert_eq!(there.map(|_| ()).unwrap_err().to_string(), host.to_string());
}

#[test]
fn bert_s_passes_are_the_host_s() {
    let Some(device) = device() else { return };
    let config = BertConfig {
        vocab_size: 12,
        hidden_size: 8,
        num_hidden_layers: 3,
        num_attention_heads: 2,
        intermediate_size: 16,
        max_position_embeddings: 8,
        initializer_range: 0.3,
        ..BertConfig::default()
    };
    for (labels, targets) in [
        (3, Targets::Classes(&[2, 0, 1])),
        (1, Targets::Values(&[0.5, -1.0, 2.0])),
    ] {
        let mut rng = seeded_rng(4);
        let mut model = BertClassifier::new(&config, labels, &mut rng).unwrap();
        // In the middle, and where only first tokens are wanted.
        for layer in [1, 2] {
            model.convert(layer, 4, top_p(), &mut rng).unwrap();
        }
        let ids = vec![1, 5, 0, 2, 1, 7, 2, 1, 11];
        let batch = TextBatch::packed(ids, vec![0; 9], vec![0, 4, 7, 9]);
        let keys = || DropoutKeys::new(1, 2);
        let host = model.train_pass(&batch, targets, Some(&mut keys()));
        let there = model.train_pass_on(&device, &batch, targets, Some(&mut keys()));
        same_pass(&model, &there.unwrap(), host.unwrap(), 1e-4);
        let host = model.losses(&batch, targets, None).unwrap();
        let there = model.losses_on(&device, &batch, targets, None).unwrap();
        close("losses", &there, &host, 1e-4);
    }
}

#[test]
fn a_vision_transformer_s_passes_are_the_host_s() {
    let Some(device) = device() else { return };
    let config = VitConfig {
        hidden_size: 8,
        num_hidden_layers: 3,
        num_attention_heads: 2,
        intermediate_size: 16,
        image_size: 8,
        patch_size: 4,
        layer_scale: Some(0.7),
        hidden_dropout_prob: 0.1,
        initializer_range: 0.3,
        ..VitConfig::default()
    };
    let mut rng = seeded_rng(5);
    let mut model = VitClassifier::new(&config, 5, &mut rng).unwrap();
    model.convert(2, 4, top_p(), &mut rng).unwrap();
    // Another size than the model's: positions are interpolated.
    let pixels: Vec<f32> = (0..2 * 3 * 8 * 12)
        .map(|i| (i as f32 * 0.1).sin())
        .collect();
    let rows = model.features(&pixels, (8, 12), 2).unwrap();
    let pictures = ImageBatch::Pixels {
        pixels: &pixels,
        size: (8, 12),
    };
    let features = ImageBatch::Features {
        rows: &rows,
        tokens: 7,
        blocks: 2,
    };
    for batch in [pictures, features] {
        let keys = || DropoutKeys::new(1, 2);
        let host = model.train_pass(batch, &[3, 1], Some(&mut keys()));
        let there = model.train_pass_on(&device, batch, &[3, 1], Some(&mut keys()));
        same_pass(&model, &there.unwrap(), host.unwrap(), 1e-4);
        let host = model.losses(batch, &[3, 1], None).unwrap();
        let there = model.losses_on(&device, batch, &[3, 1], None).unwrap();
        close("losses", &there, &host, 1e-4);
    }
}

#[test]
fn a_training_pass_is_the_host_s() {
    let Some(device) = device() else { return };
    let model = model();
    let (tokens, targets) = batch(0);
    let host = model.train_pass(&tokens, &targets, SEQ).unwrap();
    let there = model
        .train_pass_on(&device, &tokens, &targets, SEQ)
        .unwrap();
    same_pass(&model, &there, host, 1e-4);
    let scored = model.score(&tokens, &targets, SEQ, None).unwrap().0;
    let there = model
        .score_on(&device, &tokens, &targets, SEQ, None)
        .unwrap()
        .0;
    close("scores", &there, &scored, 1e-4);
}

/// The bias of keys has no gradient but rounding errors, because a softmax does not see it. With so large an eps, AdamW does not make
/// whole steps of them.
pub(crate) fn optimizer() -> AdamW {
    AdamW::new(AdamWConfig {
        clip_norm: Some(1.0),
        eps: 1e-3,
        ..AdamWConfig::default()
    })
    .unwrap()
}

/// Some steps on the device; the losses.
fn train(device: &Device, steps: usize) -> (LanguageModel, AdamW, Vec<f32>) {
    let mut model = model();
    let mut optimizer = optimizer();
    let mut losses = Vec::new();
    for step in 0..steps {
        let (tokens, targets) = batch(step);
        let mut pass = model.train_pass_on(device, &tokens, &targets, SEQ).unwrap();
        losses.push(pass.loss);
        optimizer
            .step(&mut model, &mut pass.gradients, 1e-2)
            .unwrap();
    }
    (model, optimizer, losses)
}

#[test]
fn steps_are_the_host_s_and_have_the_same_bits_twice() {
    let Some(device) = device() else { return };
    let steps = 3;
    let (mut host, mut optimizer) = (model(), optimizer());
    for step in 0..steps {
        let (tokens, targets) = batch(step);
        let mut pass = host.train_pass(&tokens, &targets, SEQ).unwrap();
        optimizer
            .step(&mut host, &mut pass.gradients, 1e-2)
            .unwrap();
    }
    let (there, moments, losses) = train(&device, steps);
    for ((name, a), (_, b)) in params(&there).into_iter().zip(params(&host)) {
        close(&name, a.values(), b.values(), 1e-4);
        if let Some(state) = optimizer.state().get(&name) {
            let got = &moments.state()[&name];
            assert_eq!(got.step, state.step, "{name}");
            close(&name, &got.m, &state.m, 1e-4);
            close(&name, &got.v, &state.v, 1e-4);
        }
    }
    // A file of what the device has changed.
    let (tokens, targets) = batch(9);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.safetensors");
    save_safetensors(&file, &there).unwrap();
    let mut read = model();
    load_safetensors(&file, &mut read).unwrap();
    let here = read.score(&tokens, &targets, SEQ, None).unwrap().0;
    let scores = there
        .score_on(&device, &tokens, &targets, SEQ, None)
        .unwrap()
        .0;
    close("scores of what was saved", &here, &scores, 1e-4);

    // What is changed on the host is what the device computes with next.
    let mut there = there;
    there.head.weight.values_mut().fill(0.0);
    let scores = there
        .score_on(&device, &tokens, &targets, SEQ, None)
        .unwrap()
        .0;
    close("scores", &scores, &[(VOCAB as f32).ln(); 3 * SEQ], 1e-5);

    let (again, _, same) = train(&device, steps);
    assert_eq!(same, losses);
    let bits = |model: &LanguageModel| -> Vec<Vec<u32>> {
        let all = params(model).into_iter();
        all.map(|(_, p)| p.values().iter().map(|x| x.to_bits()).collect())
            .collect()
    };
    let (third, _, _) = train(&device, steps);
    assert!(bits(&again) == bits(&third));
}

#[test]
fn nothing_of_a_parameter_s_size_moves_after_the_first_step_and_nothing_is_left_behind() {
    let Some(device) = device() else { return };
    let Some(control) = control() else { return };
    let mut model = model();
    let mut optimizer = AdamW::new(AdamWConfig::default()).unwrap();
    let before = get(&control, Word::Allocations) - get(&control, Word::Freed);
    let mut living = Vec::new();
    for step in 0..20 {
        let (tokens, targets) = batch(step);
        let mut pass = model
            .train_pass_on(&device, &tokens, &targets, SEQ)
            .unwrap();
        optimizer
            .step(&mut model, &mut pass.gradients, 1e-3)
            .unwrap();
        drop(pass);
        living.push(get(&control, Word::Allocations) - get(&control, Word::Freed));
        if step == 4 {
            // Every expert has been met by then.
            for word in [Word::LargestUp, Word::LargestDown] {
                set(&control, word, 0);
            }
        }
    }
    let matrix = 4 * 32 * 64;
    let (up, down) = (
        get(&control, Word::LargestUp),
        get(&control, Word::LargestDown),
    );
    assert!(up > 0 && up < matrix, "{up} bytes went up at once");
    assert!(
        down > 0 && down < matrix / 2,
        "{down} bytes came down at once"
    );
    // Values and moments, and nothing else.
    let kept = 3 * params(&model).len() as u64;
    assert_eq!(living[19] - before, kept, "{living:?}");
    drop((model, optimizer));
    let after = get(&control, Word::Allocations) - get(&control, Word::Freed);
    assert_eq!(after, before);
}

//! Classifiers in checkpoints: a resumed run is the uninterrupted one, to the bit.

use mass_model::bert::{BertClassifier, BertConfig, Targets, TextBatch};
use mass_model::checkpoint::{self, Checkpointed, Snapshot};
use mass_model::nn::{GateConfig, MoeConfig};
use mass_model::optim::{AdamW, AdamWConfig};
use mass_model::vit::{ImageBatch, VitClassifier, VitConfig};
use mass_model::{CpuGradients, DropoutKeys, ModelError, Param, Parameters, seeded_rng};
use mass_routing::{Combine, RouterConfig};

const TOP_P: RouterConfig = RouterConfig::TopP {
    p: 0.5,
    combine: Combine::Renormalised,
};

fn bert() -> BertClassifier {
    let config = BertConfig {
        vocab_size: 23,
        hidden_size: 8,
        num_hidden_layers: 3,
        num_attention_heads: 2,
        intermediate_size: 12,
        max_position_embeddings: 9,
        ..BertConfig::default()
    };
    let mut rng = seeded_rng(1);
    let mut model = BertClassifier::new(&config, 3, &mut rng).unwrap();
    model.convert(1, 3, TOP_P, &mut rng).unwrap();
    let cosine = MoeConfig {
        gate: GateConfig::Cosine {
            projection: Some(5),
            temperature: Some(0.5),
        },
        ..MoeConfig::new(8, 12, 2, config.hidden_act, TOP_P)
    };
    model.convert_to(2, &cosine, &mut rng).unwrap();
    let wrong = MoeConfig {
        hidden: 13,
        ..cosine
    };
    assert!(model.convert_to(0, &wrong, &mut rng).is_err());
    model
}

fn bert_pass(model: &BertClassifier, step: u64) -> CpuGradients {
    let ids = (0..9).map(|i| 1 + (i * 5 + step as u32) % 22).collect();
    let batch = TextBatch::packed(ids, vec![0; 9], vec![0, 4, 9]);
    let keys = &mut DropoutKeys::new(7, step);
    let pass = model.train_pass(&batch, Targets::Classes(&[2, 0]), Some(keys));
    pass.unwrap().gradients
}

fn vit() -> VitClassifier {
    let config = VitConfig {
        hidden_size: 8,
        num_hidden_layers: 2,
        num_attention_heads: 2,
        intermediate_size: 12,
        hidden_dropout_prob: 0.1,
        image_size: 6,
        patch_size: 2,
        layer_scale: Some(0.5),
        ..VitConfig::default()
    };
    let mut rng = seeded_rng(1);
    let mut model = VitClassifier::new(&config, 3, &mut rng).unwrap();
    model.convert(1, 3, TOP_P, &mut rng).unwrap();
    model
}

fn vit_pass(model: &VitClassifier, step: u64) -> CpuGradients {
    let pixels: Vec<f32> = (0..2 * 3 * 4 * 6)
        .map(|i| (i as f32 * 0.3 + step as f32).sin())
        .collect();
    let batch = ImageBatch::Pixels {
        pixels: &pixels,
        size: (4, 6),
    };
    let keys = &mut DropoutKeys::new(7, step);
    model
        .train_pass(batch, &[2, 0], Some(keys))
        .unwrap()
        .gradients
}

fn bits(model: &impl Parameters) -> Vec<(String, Vec<u32>)> {
    let mut all = Vec::new();
    model.visit("", &mut |name, p| {
        all.push((name, p.values().iter().map(|x| x.to_bits()).collect()));
    });
    all
}

/// Two steps, a newcomer in the first mixture, a step; then a checkpoint, and two steps more with it and without.
fn resumes<M: Checkpointed>(mut model: M, pass: impl Fn(&M, u64) -> CpuGradients)
where
    M::Config: PartialEq + std::fmt::Debug,
{
    let mut optimizer = AdamW::new(AdamWConfig::default()).unwrap();
    let advance = |model: &mut M, optimizer: &mut AdamW, steps: std::ops::Range<u64>| {
        for step in steps {
            let mut gradients = pass(model, step);
            optimizer.step(model, &mut gradients, 1e-2).unwrap();
        }
    };
    advance(&mut model, &mut optimizer, 0..2);
    let newcomer = model.mixture(0).experts()[1].clone();
    model.mixture_mut(0).push(newcomer).unwrap();
    advance(&mut model, &mut optimizer, 2..3);

    let dir = tempfile::tempdir().unwrap();
    let snapshot = Snapshot {
        step: 3,
        model: &model,
        optimizer: &optimizer,
        ema: None,
        state: &(),
    };
    checkpoint::save(dir.path(), &snapshot).unwrap();
    let mut resumed = checkpoint::load::<M, ()>(dir.path()).unwrap();
    assert_eq!(resumed.model.checkpoint_config(), model.checkpoint_config());
    assert_eq!(bits(&resumed.model), bits(&model));
    let alone: M = checkpoint::load_model(dir.path()).unwrap();
    assert_eq!(bits(&alone), bits(&model));

    advance(&mut model, &mut optimizer, 3..5);
    assert_ne!(bits(&alone), bits(&model));
    advance(&mut resumed.model, &mut resumed.optimizer, 3..5);
    assert_eq!(bits(&resumed.model), bits(&model));

    let config = model.checkpoint_config();
    let least = M::values_at_least(config).unwrap();
    let values = M::from_checkpoint_config(config).unwrap().num_values() as u64;
    assert!(least <= values && 2 * least > values, "{least} of {values}");
}

#[test]
fn a_resumed_bert_is_the_uninterrupted_one() {
    resumes(bert(), bert_pass);
}

#[test]
fn a_resumed_vision_transformer_is_the_uninterrupted_one() {
    resumes(vit(), vit_pass);
}

#[test]
fn a_checkpoint_of_another_model_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (model, optimizer) = (vit(), AdamW::new(AdamWConfig::default()).unwrap());
    let snapshot = Snapshot {
        step: 0,
        model: &model,
        optimizer: &optimizer,
        ema: None,
        state: &(),
    };
    checkpoint::save(dir.path(), &snapshot).unwrap();
    let e = checkpoint::load_model::<BertClassifier>(dir.path()).unwrap_err();
    assert!(matches!(e, ModelError::Checkpoint { .. }), "{e}");
}

#[test]
fn a_classifier_that_a_checkpoint_would_not_give_back_is_not_saved() {
    fn refused<M: Checkpointed>(mut model: M, victim: &str) {
        let optimizer = AdamW::new(AdamWConfig::default()).unwrap();
        let encode = |model: &M| checkpoint::encode(&Snapshot::new(0, model, &optimizer, &()));
        encode(&model).unwrap();
        model.visit_mut("", &mut |name, p| {
            if name == victim {
                *p = Param::zeros(&[1], false).unwrap();
            }
        });
        let error = encode(&model).map(drop).unwrap_err().to_string();
        let what = format!("{victim} is a parameter of shape [1] that does not decay");
        assert!(error.contains(&what), "{error}");
    }
    refused(bert(), "embeddings.words");
    refused(vit(), "embeddings.positions");
}

#[test]
fn sizes_that_no_memory_holds_have_no_number_of_values() {
    let mut config = bert().checkpoint_config().clone();
    config.encoder.hidden_size = usize::MAX;
    assert_eq!(BertClassifier::values_at_least(&config), None);
    let mut config = bert().checkpoint_config().clone();
    config.encoder.num_hidden_layers = 1 << 40;
    assert!(BertClassifier::values_at_least(&config).unwrap() > 1 << 48);
    let mut config = vit().checkpoint_config().clone();
    config.encoder.image_size = usize::MAX;
    assert_eq!(VitClassifier::values_at_least(&config), None);
    config.encoder.patch_size = 0;
    assert_eq!(VitClassifier::values_at_least(&config), None);
    // A mixture in a layer that is not there.
    let mut config = bert().checkpoint_config().clone();
    let mixture = config.mixtures[&1].clone();
    config.mixtures.insert(3, mixture);
    assert!(BertClassifier::from_checkpoint_config(&config).is_err());
}

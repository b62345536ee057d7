//! Checkpoints: what comes back, and pools of different sizes.

use std::collections::BTreeMap;
use std::path::Path;

use dfdx::prelude::NoneTape;
use mass_expand::ExpertId;
use mass_model::checkpoint::{
    self, Checkpoint, CheckpointError, Checkpointed, ExpertCounts, LoadOptions, PoolMismatch,
    Snapshot,
};
use mass_model::growth::Mixtures;
use mass_model::lm::LanguageModel;
use mass_model::optim::{AdamW, AdamWConfig, Ema};
use mass_model::{ModelError, Parameters, seeded_rng};
use mass_routing::{Router, RoutingPlan};
use serde_json::json;

use crate::saved::{SEQ, batch, config, saved, snapshot, trained};

fn values(model: &impl Parameters) -> BTreeMap<String, Vec<u32>> {
    let mut values = BTreeMap::new();
    model.visit("", &mut |name, p| {
        values.insert(name, p.values().iter().map(|x| x.to_bits()).collect());
    });
    values
}

fn logits(model: &LanguageModel) -> Vec<f32> {
    let (tokens, _) = batch();
    let forward = model.forward(&tokens, SEQ, None, NoneTape).unwrap();
    forward.logits.as_vec()
}

type Read = Checkpoint<LanguageModel, String>;

#[test]
fn what_is_saved_comes_back_to_the_bit() {
    let mut parts = trained(3);
    // A pool with a history: experts come and go, and offsets differ.
    let source = parts.0.mixture(1).experts()[0].clone();
    let moe = parts.0.mixture_mut(1);
    let new = moe.push(source).unwrap();
    moe.expert_mut(new).unwrap().logit_offset = -0.75;
    moe.remove(ExpertId(0)).unwrap();
    let dir = tempfile::tempdir().unwrap();
    checkpoint::save(dir.path(), &snapshot(&parts)).unwrap();
    let read: Read = checkpoint::load(dir.path()).unwrap();
    let (model, optimizer, ema) = parts;
    assert_eq!(values(&read.model), values(&model));
    assert_eq!(read.model.config(), model.config());
    for l in 0..2 {
        let (a, b) = (read.model.mixture(l), model.mixture(l));
        assert_eq!((a.ids(), a.next_id()), (b.ids(), b.next_id()));
        let offsets = |m: &mass_model::nn::MoeLayer| {
            let experts = m.experts().iter();
            experts.map(|e| e.logit_offset).collect::<Vec<_>>()
        };
        assert_eq!(offsets(a), offsets(b));
    }
    assert_eq!(logits(&read.model), logits(&model));
    assert_eq!(read.optimizer.state(), optimizer.state());
    assert_eq!(read.optimizer.config(), optimizer.config());
    assert_eq!(read.ema.as_ref(), Some(&ema));
    assert_eq!((read.step, read.state.as_str()), (1, "the caller's"));
}

#[test]
fn a_noisy_router_goes_on_where_its_noise_stood() {
    let mut config = config(3);
    config.block.moe.router = serde_json::from_value(json!({
        "router": "noisy", "std": 0.5, "seed": 3, "inner": { "router": "bias_balanced", "k": 2 },
    }))
    .unwrap();
    let mut model = LanguageModel::new(&config, &mut seeded_rng(1)).unwrap();
    let logits = ndarray::Array2::from_shape_fn((5, 3), |(t, e)| (t * e) as f32 * 0.1);
    let mut plan = RoutingPlan::default();
    let mut route = |model: &mut LanguageModel| {
        let mut router = model.mixture(0).router().clone();
        router.route(logits.view(), None, &mut plan).unwrap();
        router.adapt(&plan).unwrap();
        let weights = plan.weights().to_vec();
        *model.mixture_mut(0).router_mut() = router;
        weights
    };
    route(&mut model);
    let parts = (
        model,
        AdamW::new(AdamWConfig::default()).unwrap(),
        Ema::new(0.5).unwrap(),
    );
    let files = checkpoint::encode(&snapshot(&parts)).unwrap();
    let mut read: Read = checkpoint::decode(&files).unwrap();
    let mut model = parts.0;
    for _ in 0..3 {
        assert_eq!(route(&mut read.model), route(&mut model));
    }
}

#[test]
fn a_model_is_loaded_for_inference_from_its_directory_alone() {
    let dir = tempfile::tempdir().unwrap();
    let parts = trained(3);
    let folder = checkpoint::save(dir.path(), &snapshot(&parts)).unwrap();
    std::fs::remove_file(folder.join("optimizer.safetensors")).unwrap();
    std::fs::remove_file(folder.join("ema.safetensors")).unwrap();
    let model: LanguageModel = checkpoint::load_model(dir.path()).unwrap();
    assert_eq!(logits(&model), logits(&parts.0));
    let error = checkpoint::load::<LanguageModel, String>(dir.path()).unwrap_err();
    assert!(error.to_string().contains("optimizer.safetensors"));
}

#[test]
fn sizes_known_from_a_configuration_are_those_of_the_model() {
    let gmoe = json!({ "gate": "cosine", "projection": 3, "temperature": 0.5 });
    let any = json!({ "router": "top_any", "experts": 2 });
    let kinds = [
        (json!({}), 0),
        (json!({ "gated": true }), 0),
        (json!({ "gated": true, "shared_hidden": 9 }), 0),
        // In each layer a temperature.
        (json!({ "gate": gmoe }), 2),
        (
            json!({ "gate": { "gate": "cosine" }, "router": any, "experts": 2 }),
            0,
        ),
    ];
    for (kind, unknown) in kinds {
        let mut json = serde_json::to_value(config(3)).unwrap();
        let moe = json["block"]["moe"].as_object_mut().unwrap();
        moe.extend(kind.as_object().unwrap().clone());
        let config = serde_json::from_value(json).unwrap();
        let model = LanguageModel::new(&config, &mut seeded_rng(0)).unwrap();
        let least = LanguageModel::values_at_least(&config).unwrap();
        // All but the final norm.
        assert_eq!(least + 2 * 6 + unknown, model.num_values() as u64, "{kind}");

        // Every kind of layer comes back as it was.
        let parts = (
            model,
            AdamW::new(AdamWConfig::default()).unwrap(),
            Ema::new(0.5).unwrap(),
        );
        let files = checkpoint::encode(&snapshot(&parts)).unwrap();
        let read: Read = checkpoint::decode(&files).unwrap();
        assert_eq!(values(&read.model), values(&parts.0), "{kind}");
        assert_eq!(logits(&read.model), logits(&parts.0), "{kind}");
    }
}

#[test]
fn averages_are_not_saved_while_they_are_in_the_model() {
    let (mut model, optimizer, mut ema) = trained(2);
    ema.swap(&mut model).unwrap();
    let parts = (model, optimizer, ema);
    let dir = tempfile::tempdir().unwrap();
    let error = checkpoint::save(dir.path(), &snapshot(&parts)).unwrap_err();
    assert!(matches!(error, ModelError::Config(_)), "{error}");
    assert!(!checkpoint::exists(dir.path()));
}

fn load_into(
    dir: &Path,
    model: &mut LanguageModel,
    pool: PoolMismatch,
) -> Result<Vec<ExpertCounts>, ModelError> {
    checkpoint::load_into(dir, model, LoadOptions { pool })
}

fn fresh(experts: usize) -> LanguageModel {
    LanguageModel::new(&config(experts), &mut seeded_rng(99)).unwrap()
}

#[test]
fn another_number_of_experts_is_an_error_that_names_both() {
    let dir = tempfile::tempdir().unwrap();
    saved(dir.path(), 3);
    let mut model = fresh(5);
    model.mixture_mut(1).remove(ExpertId(4)).unwrap();
    let before = values(&model);
    let error = load_into(dir.path(), &mut model, PoolMismatch::Error).unwrap_err();
    let ModelError::Checkpoint { why, .. } = &error else {
        panic!("{error}");
    };
    let counts = |layer, model| ExpertCounts {
        layer,
        checkpoint: 3,
        model,
    };
    let layers = vec![counts(0, 5), counts(1, 4)];
    assert_eq!(why, &CheckpointError::ExpertCount { layers });
    let message = error.to_string();
    assert!(
        message.contains("mixture layer 1 has 3 experts, the model's has 4"),
        "{message}"
    );
    assert_eq!(values(&model), before);

    // The same number is taken over, ids and all.
    let mut same = fresh(3);
    assert_eq!(
        load_into(dir.path(), &mut same, PoolMismatch::Error).unwrap(),
        []
    );
    assert_eq!(values(&same), values(&trained(3).0));
}

#[test]
fn growing_takes_over_the_larger_pool_or_adds_copies_that_share_their_mass() {
    let dir = tempfile::tempdir().unwrap();
    saved(dir.path(), 3);
    let original = trained(3).0;
    // More in the checkpoint: its pool comes along.
    let mut smaller = fresh(2);
    let differing = load_into(dir.path(), &mut smaller, PoolMismatch::Grow).unwrap();
    assert_eq!(differing.len(), 2);
    assert_eq!(values(&smaller), values(&original));
    // Fewer: copies fill up, twice around for the first expert.
    let mut larger = fresh(7);
    load_into(dir.path(), &mut larger, PoolMismatch::Grow).unwrap();
    let moe = larger.mixture(0);
    assert_eq!(moe.ids(), (0..7).map(ExpertId).collect::<Vec<_>>());
    assert_eq!(moe.next_id(), ExpertId(7));
    for (copy, source) in [(3, 0), (4, 1), (5, 2), (6, 0)] {
        let (copy, source) = (&moe.experts()[copy], &original.mixture(0).experts()[source]);
        assert_eq!(copy.network.fc1.0.values(), source.network.fc1.0.values());
        assert_eq!(copy.gate.values(), source.gate.values());
    }
    let (a, b) = (logits(&larger), logits(&original));
    let largest = b.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    for (a, b) in a.iter().zip(&b) {
        assert!(
            (a - b).abs() <= 1e-6 * largest.max(1.0),
            "{a} instead of {b}"
        );
    }
}

#[test]
fn dropping_keeps_the_oldest_experts_or_the_smaller_pool() {
    let dir = tempfile::tempdir().unwrap();
    saved(dir.path(), 3);
    let original = trained(3).0;
    let mut smaller = fresh(2);
    load_into(dir.path(), &mut smaller, PoolMismatch::Drop).unwrap();
    assert_eq!(smaller.mixture(1).ids(), [ExpertId(0), ExpertId(1)]);
    let whole = values(&original);
    for (name, values) in values(&smaller) {
        assert_eq!(values, whole[&name], "{name}");
    }
    let mut larger = fresh(5);
    load_into(dir.path(), &mut larger, PoolMismatch::Drop).unwrap();
    assert_eq!(values(&larger), whole);
    assert_eq!(larger.mixture(0).next_id(), ExpertId(3));
}

#[test]
fn a_model_of_other_sizes_is_left_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    saved(dir.path(), 3);
    let mut wider = config(3);
    wider.block.moe.hidden = 9;
    let mut model = LanguageModel::new(&wider, &mut seeded_rng(0)).unwrap();
    let before = values(&model);
    for pool in [PoolMismatch::Error, PoolMismatch::Grow, PoolMismatch::Drop] {
        let error = load_into(dir.path(), &mut model, pool).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("blocks.0.moe.experts.0.fc1.weight is [5, 6], not [9, 6]"),
            "{error}"
        );
        assert_eq!(values(&model), before);
    }
}

#[test]
fn other_folders_beside_checkpoints_stay() {
    let dir = tempfile::tempdir().unwrap();
    let notes = dir.path().join("step-by-step-notes");
    std::fs::create_dir(&notes).unwrap();
    for file in ["step-1.log", ".partial-plan", "step-0000000007"] {
        std::fs::write(dir.path().join(file), "mine").unwrap();
    }
    let parts = trained(3);
    for _ in 0..3 {
        checkpoint::save(dir.path(), &snapshot(&parts)).unwrap();
    }
    assert!(notes.is_dir());
    for file in ["step-1.log", ".partial-plan", "step-0000000007"] {
        let kept = std::fs::read(dir.path().join(file)).unwrap();
        assert_eq!(kept, b"mine", "{file}");
    }
    // Of the checkpoints the newest and the one before it.
    let folders = std::fs::read_dir(dir.path()).unwrap();
    let folders = folders.filter(|e| e.as_ref().unwrap().path().is_dir());
    assert_eq!(folders.count(), 3);
    let steps = checkpoint::steps(dir.path());
    assert_eq!(steps.len(), 2);
    // Either is whole, and damage to one leaves the other.
    std::fs::remove_file(steps[1].join("state.json")).unwrap();
    let read = |step: &Path| checkpoint::load_step::<LanguageModel, String>(step);
    let refused = read(&steps[1]).unwrap_err().to_string();
    assert!(refused.contains("state.json"), "{refused}");
    assert_eq!(values(&read(&steps[0]).unwrap().model), values(&parts.0));
    assert!(checkpoint::steps(&dir.path().join("none")).is_empty());
}

#[test]
fn a_state_that_json_would_change_is_refused_and_the_previous_one_stays() {
    #[derive(serde::Serialize, serde::Deserialize)]
    struct State {
        best: Option<f64>,
        by_name: BTreeMap<String, Vec<f32>>,
    }
    let dir = tempfile::tempdir().unwrap();
    let parts = trained(3);
    let save = |best, value| {
        let by_name = BTreeMap::from([("loss".to_owned(), vec![0.5, value])]);
        let Snapshot {
            step,
            model,
            optimizer,
            ema,
            ..
        } = snapshot(&parts);
        let state = &State { best, by_name };
        let snapshot = Snapshot {
            step,
            model,
            optimizer,
            ema,
            state,
        };
        checkpoint::save(dir.path(), &snapshot)
    };
    save(Some(0.25), 1.0).unwrap();
    for (best, value) in [
        (Some(f64::NAN), 1.0),
        (Some(f64::NEG_INFINITY), 1.0),
        (None, f32::INFINITY),
    ] {
        let error = save(best, value).unwrap_err();
        assert!(matches!(error, ModelError::NonFinite(_)), "{error}");
    }
    let read = checkpoint::load::<LanguageModel, State>(dir.path()).unwrap();
    assert_eq!(read.state.best, Some(0.25));
}

#[test]
fn a_model_that_a_checkpoint_would_not_give_back_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let changes: [fn(&mut LanguageModel); 6] = [
        |m| m.blocks.truncate(1),
        |m| m.blocks[1].attention.causal = false,
        |m| m.blocks[0].norm2.eps = 0.25,
        |m| m.norm.eps = 0.25,
        |m| {
            let mut other = m.mixture(1).config().clone();
            other.activation = mass_model::Activation::Silu;
            m.blocks[1].moe = mass_model::nn::MoeLayer::new(&other, &mut seeded_rng(1)).unwrap();
        },
        |m| {
            let first = m.mixture(0).ids()[0];
            m.mixture_mut(0).expert_mut(first).unwrap().logit_offset = f32::NEG_INFINITY;
        },
    ];
    for (i, change) in changes.into_iter().enumerate() {
        let mut parts = trained(3);
        change(&mut parts.0);
        let error = checkpoint::save(dir.path(), &snapshot(&parts)).unwrap_err();
        let expected = matches!(error, ModelError::Config(_) | ModelError::NonFinite(_));
        assert!(expected, "{i}: {error}");
        assert!(!checkpoint::exists(dir.path()));
    }
}

#[test]
fn a_model_that_computes_something_else_is_left_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    saved(dir.path(), 3);
    type Change = fn(&mut mass_model::lm::LanguageModelConfig);
    let changes: [(&str, Change); 4] = [
        ("block.heads is", |c| {
            c.block.heads = if c.block.heads == 1 { 2 } else { 1 }
        }),
        ("block.moe.activation is", |c| {
            c.block.moe.activation = mass_model::Activation::Silu
        }),
        ("block.layer_norm_eps is", |c| c.block.layer_norm_eps = 0.1),
        ("block.moe.router.", |c| {
            c.block.moe.router = mass_routing::RouterConfig::TopK {
                k: 1,
                combine: mass_routing::Combine::Raw,
            };
        }),
    ];
    for (what, change) in changes {
        let mut other = config(3);
        change(&mut other);
        let mut model = LanguageModel::new(&other, &mut seeded_rng(0)).unwrap();
        let before = values(&model);
        let error = load_into(dir.path(), &mut model, PoolMismatch::Grow).unwrap_err();
        assert!(error.to_string().contains(what), "{what}: {error}");
        assert_eq!(values(&model), before, "{what}");
    }
    // How weights were drawn does not matter.
    let mut drawn = config(3);
    drawn.embedding_std = 0.7;
    let mut model = LanguageModel::new(&drawn, &mut seeded_rng(0)).unwrap();
    load_into(dir.path(), &mut model, PoolMismatch::Error).unwrap();
}

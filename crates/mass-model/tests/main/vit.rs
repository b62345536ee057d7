//! Vision transformers on small random models: gradients, frozen trunks, mixtures, files.

use std::path::Path;

use mass_model::growth::Mixtures;
use mass_model::lm::Masked;
use mass_model::optim::{AdamW, AdamWConfig};
use mass_model::vit::{ImageBatch, Resampling, VitClassifier, VitConfig};
use mass_model::{DropoutKeys, ModelError, Parameters, seeded_rng};
use mass_routing::{Combine, RouterConfig};
use serde_json::{Value, json};

const TOP_2: RouterConfig = RouterConfig::TopK {
    k: 2,
    combine: Combine::Renormalised,
};
/// Not the size that the position embeddings are for.
const SIZE: (usize, usize) = (4, 8);
const TOKENS: usize = 9;

fn config() -> VitConfig {
    VitConfig {
        hidden_size: 12,
        num_hidden_layers: 3,
        num_attention_heads: 3,
        intermediate_size: 20,
        hidden_dropout_prob: 0.1,
        attention_probs_dropout_prob: 0.1,
        layer_norm_eps: 1e-6,
        image_size: 6,
        patch_size: 2,
        layer_scale: Some(0.7),
        // Wide enough for gradients that differences in f32 can measure.
        initializer_range: 0.3,
        ..VitConfig::default()
    }
}

/// Three blocks, the last a mixture.
fn model() -> VitClassifier {
    with_mixture(2)
}

/// Three blocks, one a mixture of experts that differ; biases and norms away from where they start.
fn with_mixture(block: usize) -> VitClassifier {
    let mut rng = seeded_rng(5);
    let mut model = VitClassifier::new(&config(), 4, &mut rng).unwrap();
    model.convert(block, 4, TOP_2, &mut rng).unwrap();
    let mut phase = 0.0;
    model.visit_mut("", &mut |name, p| {
        phase += 1.0;
        if p.shape().len() == 1 || name.contains("experts") {
            for (i, x) in p.values_mut().iter_mut().enumerate() {
                // Gate rows far apart: a choice of experts that a small step changes has no derivative.
                let size = if name.ends_with(".gate") { 1.0 } else { 0.1 };
                *x += size * (i as f32 * 1.7 + phase).sin();
            }
        }
    });
    model
}

/// Three images.
fn pixels() -> Vec<f32> {
    (0..3 * 3 * 4 * 8)
        .map(|i| (i as f32 * 0.37).sin())
        .collect()
}

fn images(pixels: &[f32]) -> ImageBatch<'_> {
    ImageBatch::Pixels { pixels, size: SIZE }
}

fn gradients(
    model: &VitClassifier,
    batch: ImageBatch<'_>,
    keys: Option<&mut DropoutKeys>,
) -> Vec<(String, Vec<f32>)> {
    gradients_for(model, batch, &[2, 0, 3], keys)
}

/// Of the parameters that have any.
fn gradients_for(
    model: &VitClassifier,
    batch: ImageBatch<'_>,
    classes: &[u32],
    keys: Option<&mut DropoutKeys>,
) -> Vec<(String, Vec<f32>)> {
    let mut pass = model.train_pass(batch, classes, keys).unwrap();
    let mut all = Vec::new();
    model.visit("", &mut |name, p| {
        let found = p.find_gradient(&mut pass.gradients).unwrap();
        all.extend(found.map(|g| (name, g.clone())));
    });
    all
}

fn unit(v: impl Iterator<Item = f32>) -> Vec<f32> {
    let v: Vec<f32> = v.collect();
    let norm = v.iter().map(|x| x * x).sum::<f32>().sqrt().max(1e-12);
    v.iter().map(|x| x / norm).collect()
}

#[test]
fn gradients_agree_with_central_differences() {
    let pixels = pixels();
    // A last block that is dense computes class tokens alone.
    for (mixture, dropped) in [(2, false), (2, true), (1, true)] {
        let model = with_mixture(mixture);
        // The same keys in every pass: the same network, with the same elements missing.
        let keys = || dropped.then(|| DropoutKeys::new(3, 8));
        let gradients = gradients(&model, images(&pixels), keys().as_mut());
        let loss_at = |which: &str, direction: &[f32], step: f32| {
            let mut moved = model.clone();
            moved.visit_mut("", &mut |name, p| {
                if name == which {
                    let along = p.values_mut().iter_mut().zip(direction);
                    along.for_each(|(x, d)| *x += step * d);
                }
            });
            let pass = moved.train_pass(images(&pixels), &[2, 0, 3], keys().as_mut());
            f64::from(pass.unwrap().loss)
        };
        for (name, gradient) in &gradients {
            let steepest = unit(gradient.iter().copied());
            let other = unit((0..gradient.len()).map(|i| (i as f32 * 1.37 + 0.3).sin()));
            for direction in [steepest, other] {
                let dot = gradient
                    .iter()
                    .zip(&direction)
                    .map(|(g, d)| f64::from(g * d));
                let analytic: f64 = dot.sum();
                let numeric = |h: f32| {
                    let (up, down) = (loss_at(name, &direction, h), loss_at(name, &direction, -h));
                    (up - down) / (2.0 * f64::from(h))
                };
                let errors = [1e-2f32, 3e-3].map(|h| (numeric(h) - analytic).abs());
                assert!(
                    errors[0].min(errors[1]) < 2e-4 + 1e-2 * analytic.abs(),
                    "{name}: gradient {analytic}, off by {errors:?}"
                );
            }
        }
        let size = |part: &str| {
            let found = gradients.iter().find(|(n, _)| n.contains(part)).unwrap();
            found.1.iter().fold(0.0f32, |m, x| m.max(x.abs()))
        };
        // Otherwise the comparison above would be of zeros.
        for part in [
            "moe.experts",
            "blocks.0.scale1",
            "positions",
            "class",
            "patch.weight",
        ] {
            assert!(size(part) > 1e-3, "{part}: {}", size(part));
        }
    }
}

#[test]
fn later_blocks_on_features_are_the_whole_model() {
    let (model, pixels) = (model(), pixels());
    let whole = gradients(&model, images(&pixels), None);
    let logits = model.logits(images(&pixels), None).unwrap().0;
    let states = model.hidden_states(images(&pixels)).unwrap();
    assert_eq!(model.tokens(SIZE).unwrap(), TOKENS);
    assert!(matches!(
        model.tokens((5, SIZE.1)),
        Err(ModelError::Config(_))
    ));
    assert!(model.tokens((usize::MAX, usize::MAX)).is_err());
    for blocks in 0..=2 {
        let rows = model.features(&pixels, SIZE, blocks).unwrap();
        assert_eq!(rows, states[blocks]);
        let batch = ImageBatch::Features {
            rows: &rows,
            tokens: TOKENS,
            blocks,
        };
        assert_eq!(model.logits(batch, None).unwrap().0, logits);
        assert_eq!(model.hidden_states(batch).unwrap(), states[blocks..]);
        let mut trained = Vec::new();
        let mut same = model.clone();
        let part = same.trainable(blocks).unwrap();
        part.visit("", &mut |name, _| trained.push(name));
        // What is frozen has no gradient, and the rest what it has in the whole model.
        let mut whole = whole.clone();
        whole.retain(|(name, _)| trained.contains(name));
        assert_eq!(gradients(&model, batch, None), whole);
        let first = trained.iter().find(|n| n.starts_with("blocks.")).unwrap();
        assert_eq!(first, &format!("blocks.{blocks}.norm1.weight"));
        assert!(!trained.iter().any(|n| n.starts_with("embeddings")));
        assert!(trained.contains(&"head.bias".to_owned()));
    }
}

#[test]
fn an_update_of_the_trainable_part_leaves_the_trunk_alone() {
    let (mut model, pixels) = (model(), pixels());
    let rows = model.features(&pixels, SIZE, 1).unwrap();
    let batch = ImageBatch::Features {
        rows: &rows,
        tokens: TOKENS,
        blocks: 1,
    };
    let before = model.clone();
    let mut optimizer = AdamW::new(AdamWConfig::default()).unwrap();
    let mut pass = model.train_pass(batch, &[2, 0, 3], None).unwrap();
    let mut part = model.trainable(1).unwrap();
    assert_eq!(part.mixture_name(0), "blocks.2.moe");
    let (experts, count) = (part.mixture_mut(0).ids().len(), part.mixtures());
    assert_eq!((experts, count, part.mixture(0).ids().len()), (4, 1, 4));
    optimizer
        .step(&mut part, &mut pass.gradients, 1e-2)
        .unwrap();
    let mut now = Vec::new();
    model.visit("", &mut |_, p| now.push(p.values().to_vec()));
    let mut i = 0;
    before.visit("", &mut |name, p| {
        let trunk = name.starts_with("embeddings") || name.starts_with("blocks.0");
        // Of the last block only the class tokens are read, and they need not choose every expert.
        if !name.contains("experts") {
            assert_eq!(p.values() == now[i], trunk, "{name}");
        }
        i += 1;
    });
    assert_eq!(i, now.len());
}

#[test]
fn threads_do_not_change_a_bit() {
    // As many images as make several pieces of every kernel's work, the largest being dropout's.
    let images_in_all = 300;
    assert!(images_in_all * TOKENS * config().hidden_size > 1 << 14);
    let (model, size) = (model(), 3 * SIZE.0 * SIZE.1);
    let value = |i: usize| (i as f32 * 0.37).sin();
    let pixels: Vec<f32> = (0..images_in_all * size).map(value).collect();
    let classes: Vec<u32> = (0..images_in_all as u32).map(|i| i % 4).collect();
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        let pool = pool.build().unwrap();
        let keys = &mut DropoutKeys::new(2, 2);
        pool.install(|| gradients_for(&model, images(&pixels), &classes, Some(keys)))
    };
    let one = run(1);
    assert_eq!(one, run(2));
    assert_eq!(one, run(5));
}

#[test]
fn dropout_is_a_function_of_seed_and_step() {
    let (model, pixels) = (model(), pixels());
    let run = |seed, step| {
        gradients(
            &model,
            images(&pixels),
            Some(&mut DropoutKeys::new(seed, step)),
        )
    };
    assert_eq!(run(1, 4), run(1, 4));
    assert_ne!(run(1, 4), run(1, 5));
    assert_ne!(run(1, 4), gradients(&model, images(&pixels), None));
    let none = VitConfig {
        hidden_dropout_prob: 0.0,
        attention_probs_dropout_prob: 0.0,
        ..config()
    };
    let model = VitClassifier::new(&none, 4, &mut seeded_rng(1)).unwrap();
    let keys = &mut DropoutKeys::new(1, 4);
    let with = gradients(&model, images(&pixels), Some(keys));
    assert_eq!(with, gradients(&model, images(&pixels), None));
}

#[test]
fn a_mixture_of_copies_computes_what_the_network_did() {
    let (mut rng, pixels) = (seeded_rng(9), pixels());
    let dense = VitClassifier::new(&config(), 4, &mut rng).unwrap();
    let mut mixed = dense.clone();
    mixed.convert(2, 5, TOP_2, &mut rng).unwrap();
    mixed.convert(0, 3, TOP_2, &mut rng).unwrap();
    let before = dense.logits(images(&pixels), None).unwrap().0;
    let (after, traces) = mixed.logits(images(&pixels), None).unwrap();
    for (a, b) in after.iter().zip(&before) {
        assert!((a - b).abs() < 1e-5, "{a} against {b}");
    }
    // A mixture in the last block is of all tokens, a dense network of class tokens alone.
    let with = gradients(&mixed, images(&pixels), None);
    for (name, of_dense) in gradients(&dense, images(&pixels), None) {
        if let Some((_, of_mixed)) = with.iter().find(|(n, _)| *n == name) {
            for (a, b) in of_mixed.iter().zip(&of_dense) {
                assert!((a - b).abs() < 1e-5, "{name}: {a} against {b}");
            }
        }
    }
    assert_eq!((traces.len(), mixed.mixtures()), (2, 2));
    assert_eq!(mixed.mixture_name(1), "blocks.2.moe");
    let expert = mixed.mixture(1).ids()[3];
    let masked = |layer, expert| mixed.logits(images(&pixels), Some(Masked { layer, expert }));
    assert_eq!(masked(1, expert).unwrap().1[1].plan.load(3), 0);
    assert!(matches!(masked(2, expert), Err(ModelError::Config(_))));
    assert!(matches!(
        masked(0, expert),
        Err(ModelError::NoSuchExpert(3))
    ));
    assert!(mixed.convert(2, 5, TOP_2, &mut rng).is_err());
    assert!(mixed.convert(3, 5, TOP_2, &mut rng).is_err());
    // A mixture cannot be frozen: its trace would be missing.
    assert!(mixed.features(&pixels, SIZE, 1).is_err());
    assert!(mixed.trainable(1).is_err());
    assert!(mixed.trainable(0).is_ok());
}

#[test]
fn matrices_decay_and_nothing_else_does() {
    model().visit("", &mut |name, p| {
        let matrix = p.shape().len() == 2 && !name.starts_with("embeddings.positions");
        assert_eq!(p.decays(), matrix || name.ends_with(".gate"), "{name}");
    });
}

#[test]
fn a_wrong_batch_is_refused() {
    let (model, good) = (model(), pixels());
    let of = |pixels: &[f32], size| {
        let batch = ImageBatch::Pixels { pixels, size };
        model.logits(batch, None).unwrap_err()
    };
    let config = |e: ModelError| matches!(e, ModelError::Config(_));
    assert!(config(of(&good, (4, 7))));
    assert!(config(of(&good, (0, 8))));
    assert!(config(of(&good, (usize::MAX - 1, 8))));
    assert!(matches!(of(&good[1..], SIZE), ModelError::Shape { .. }));
    assert!(matches!(of(&[], SIZE), ModelError::Shape { .. }));
    let mut bad = good.clone();
    bad[5] = f32::NAN;
    assert!(of(&bad, SIZE).to_string().contains("pixel value 5"));

    let rows = model.features(&good, SIZE, 2).unwrap();
    let of = |rows: &[f32], tokens, blocks| {
        let batch = ImageBatch::Features {
            rows,
            tokens,
            blocks,
        };
        model.logits(batch, None).unwrap_err()
    };
    assert!(config(of(&rows, TOKENS, 4)));
    assert!(config(of(&rows, TOKENS, 3)));
    assert!(matches!(of(&rows, 0, 2), ModelError::Shape { .. }));
    assert!(matches!(of(&rows, 5, 2), ModelError::Shape { .. }));
    assert!(matches!(of(&rows, usize::MAX, 2), ModelError::Shape { .. }));
    assert!(matches!(of(&[], TOKENS, 2), ModelError::Shape { .. }));
    assert!(
        of(&[f32::INFINITY; 12 * TOKENS], TOKENS, 2)
            .to_string()
            .contains("feature value 0")
    );
    assert!(config(model.features(&good, SIZE, 4).unwrap_err()));
    let losses = |classes: &[u32]| model.losses(images(&good), classes, None);
    assert!(matches!(losses(&[0]), Err(ModelError::Shape { .. })));
    assert!(matches!(losses(&[0, 4, 0]), Err(ModelError::Index { .. })));
    assert_eq!(losses(&[0, 3, 0]).unwrap().len(), 3);
}

#[test]
fn a_wrong_configuration_is_refused() {
    let refused = |change: &dyn Fn(&mut VitConfig)| {
        let mut bad = config();
        change(&mut bad);
        let e = VitClassifier::new(&bad, 2, &mut seeded_rng(0)).unwrap_err();
        e.to_string()
    };
    assert!(refused(&|c| c.num_attention_heads = 5).contains("num_attention_heads 5"));
    assert!(refused(&|c| c.num_hidden_layers = 1 << 31).contains("more than 1048576"));
    assert!(refused(&|c| c.patch_size = 4).contains("patch_size 4"));
    assert!(refused(&|c| c.patch_size = 0).contains("patch_size"));
    assert!(refused(&|c| c.image_size = usize::MAX).contains("image_size"));
    assert!(refused(&|c| c.image_size = (1 << 32) - 2).contains("larger than memory"));
    assert!(refused(&|c| c.hidden_dropout_prob = -0.1).contains("hidden_dropout_prob"));
    assert!(refused(&|c| c.layer_norm_eps = f32::NAN).contains("layer_norm_eps"));
    assert!(refused(&|c| c.layer_scale = Some(f32::NAN)).contains("layer_scale"));
    assert!(VitClassifier::new(&config(), 0, &mut seeded_rng(0)).is_err());
    VitConfig::deit_small().check().unwrap();
    let text = serde_json::to_string(&config()).unwrap();
    assert_eq!(serde_json::from_str::<VitConfig>(&text).unwrap(), config());
}

fn read(config: &Value) -> Result<VitConfig, ModelError> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    VitConfig::read(dir.path())
}

#[test]
fn configurations_of_three_libraries_are_read() {
    let vit = read(&json!({ "model_type": "vit" })).unwrap();
    assert_eq!(vit, VitConfig::default());
    let dino = json!({ "model_type": "dinov2", "hidden_size": 384, "num_attention_heads": 6,
        "mlp_ratio": 4, "image_size": 518, "layerscale_value": 0.5 });
    let dino = read(&dino).unwrap();
    assert_eq!((dino.patch_size, dino.intermediate_size), (14, 1536));
    assert_eq!((dino.layer_norm_eps, dino.layer_scale), (1e-6, Some(0.5)));
    let timm = json!({ "architecture": "deit_small_patch16_224", "embed_dim": 384, "depth": 12,
        "num_heads": 6 });
    let small = VitConfig {
        position_resampling: Resampling::BicubicAntialias,
        ..VitConfig::deit_small()
    };
    assert_eq!(read(&timm).unwrap(), small);

    let refused = |config: Value| read(&config).unwrap_err().to_string();
    let with = |mut base: Value, field: &str, value: Value| {
        base[field] = value;
        refused(base)
    };
    let base = json!({ "model_type": "dinov2" });
    assert!(with(base.clone(), "use_swiglu_ffn", json!(true)).contains("use_swiglu_ffn"));
    assert!(with(base.clone(), "drop_path_rate", json!(0.1)).contains("drop_path_rate"));
    assert!(with(base.clone(), "mlp_ratio", json!(-4)).contains("mlp_ratio"));
    assert!(with(base.clone(), "hidden_act", json!("maxout")).contains("\"hidden_act\""));
    assert!(with(base.clone(), "image_size", json!([224, 224])).contains("\"image_size\""));
    // A size is named as its file names it.
    assert!(with(base.clone(), "hidden_size", json!(0)).contains("\"hidden_size\""));
    assert!(with(base, "model_type", json!("deit")).contains("deit"));
    for (field, value) in [
        ("embed_dim", 0),
        ("depth", 0),
        ("num_heads", 5),
        ("in_chans", 0),
    ] {
        let why = with(timm.clone(), field, json!(value));
        assert!(why.contains(&format!("\"{field}\"")), "{why}");
    }
    assert!(with(timm.clone(), "class_token", json!(false)).contains("class_token"));
    assert!(with(timm.clone(), "global_pool", json!("avg")).contains("global_pool"));
    assert!(with(timm, "depth", json!("12")).contains("\"depth\""));
    assert!(refused(json!({ "architecture": "vit" })).contains("embed_dim"));
    assert!(refused(json!({ "hidden_size": 3 })).contains("model_type"));
    assert!(VitConfig::read(Path::new("/no/such/folder")).is_err());
}

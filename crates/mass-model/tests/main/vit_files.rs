//! Files of pretrained vision transformers: every layout is read back as the model that was written.

use std::collections::BTreeMap;
use std::path::Path;

use crate::hf_names::{timm_names, vit_names};
use mass_model::vit::{Resampling, VitClassifier, VitConfig};
use mass_model::{ModelError, Parameters, seeded_rng};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

/// Layer scale, names in the file, configuration.
type Case<'a> = (Option<f32>, &'a dyn Fn(&str) -> Vec<String>, Value);

type Tensors = BTreeMap<String, (Vec<usize>, Vec<u8>)>;

fn config(layer_scale: Option<f32>, qkv_bias: bool) -> VitConfig {
    VitConfig {
        hidden_size: 8,
        num_hidden_layers: 2,
        num_attention_heads: 2,
        intermediate_size: 16,
        image_size: 6,
        patch_size: 2,
        layer_norm_eps: 1e-6,
        layer_scale,
        qkv_bias,
        ..VitConfig::default()
    }
}

fn original(config: &VitConfig) -> VitClassifier {
    let mut model = VitClassifier::new(config, 3, &mut seeded_rng(4)).unwrap();
    let mut n = 0;
    model.visit_mut("", &mut |_, p| {
        for x in p.values_mut() {
            n = (n * 13 + 5) % 127;
            *x = (n - 63) as f32 / 64.0;
        }
    });
    model
}

fn dinov2_names(name: &str) -> Vec<String> {
    if let Some((block, scale)) = name.split_once(".scale") {
        let block = block.strip_prefix("blocks.").unwrap();
        return vec![format!("encoder.layer.{block}.layer_scale{scale}.lambda1")];
    }
    let names = vit_names(name).into_iter().map(|n| {
        let n = n.strip_prefix("vit.").unwrap_or(&n).to_owned();
        if n.contains("attention.output") {
            return n;
        }
        n.replace("layernorm_before", "norm1")
            .replace("layernorm_after", "norm2")
            .replace("intermediate.dense", "mlp.fc1")
            .replace("output.dense", "mlp.fc2")
    });
    names.collect()
}

fn tensors_of(model: &VitClassifier, names: &dyn Fn(&str) -> Vec<String>) -> Tensors {
    let mut tensors = Tensors::new();
    model.visit("", &mut |name, p| {
        let parts = names(&name);
        let shape = match name.as_str() {
            "embeddings.patch.weight" => vec![8, 3, 2, 2],
            "embeddings.class" => vec![1, 1, 8],
            "embeddings.positions" => vec![1, 10, 8],
            _ => {
                let mut shape = p.shape().to_vec();
                shape[0] /= parts.len();
                shape
            }
        };
        let each = p.len() / parts.len();
        for (name, values) in parts.into_iter().zip(p.values().chunks_exact(each)) {
            let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
            tensors.insert(name, (shape.clone(), bytes));
        }
    });
    tensors
}

fn write(dir: &Path, tensors: &Tensors, config: &Value) {
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let views = tensors.iter().map(|(name, (shape, bytes))| {
        (
            name,
            TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap(),
        )
    });
    let bytes = safetensors::serialize(views, None).unwrap();
    std::fs::write(dir.join("model.safetensors"), bytes).unwrap();
}

fn load(tensors: &Tensors, config: &Value) -> Result<VitClassifier, ModelError> {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), tensors, config);
    VitClassifier::load(dir.path(), 3, &mut seeded_rng(8))
}

fn refused(tensors: &Tensors, config: &Value) -> String {
    load(tensors, config).unwrap_err().to_string()
}

fn values_of(model: &VitClassifier) -> Vec<(String, Vec<f32>)> {
    let mut all = Vec::new();
    model.visit("", &mut |name, p| all.push((name, p.values().to_vec())));
    all
}

fn hf_config(kind: &str, qkv_bias: bool) -> Value {
    json!({ "model_type": kind, "hidden_size": 8, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 16, "mlp_ratio": 2, "image_size": 6,
        "patch_size": 2, "layer_norm_eps": 1e-6, "qkv_bias": qkv_bias })
}

fn timm_config(init_values: Option<f32>, qkv_bias: bool) -> Value {
    json!({ "architecture": "vit", "embed_dim": 8, "depth": 2, "num_heads": 2, "mlp_ratio": 2,
        "img_size": 6, "patch_size": 2, "qkv_bias": qkv_bias, "init_values": init_values })
}

#[test]
fn every_layout_gives_the_same_model() {
    let unprefixed = |n: &str| -> Vec<String> {
        let names = vit_names(n).into_iter();
        names
            .map(|n| n.strip_prefix("vit.").unwrap_or(&n).to_owned())
            .collect()
    };
    let prefixed = |n: &str| -> Vec<String> {
        let names = dinov2_names(n).into_iter();
        names
            .map(|n| {
                if n.starts_with("classifier") {
                    n
                } else {
                    format!("dinov2.{n}")
                }
            })
            .collect()
    };
    for bias in [true, false] {
        let cases: [Case<'_>; 6] = [
            (None, &vit_names, hf_config("vit", bias)),
            (None, &unprefixed, hf_config("vit", bias)),
            (Some(1.0), &dinov2_names, hf_config("dinov2", bias)),
            (Some(1.0), &prefixed, hf_config("dinov2", bias)),
            (None, &timm_names, timm_config(None, bias)),
            (Some(0.5), &timm_names, timm_config(Some(0.5), bias)),
        ];
        for (scale, names, json) in cases {
            let wanted = original(&config(scale, bias));
            let mut tensors = tensors_of(&wanted, names);
            let prefix = if tensors.contains_key("dinov2.layernorm.weight") {
                "dinov2."
            } else {
                ""
            };
            if scale.is_some() && json["model_type"] == "dinov2" {
                tensors.insert(
                    format!("{prefix}embeddings.mask_token"),
                    (vec![1, 8], vec![0; 32]),
                );
            }
            let model = load(&tensors, &json).unwrap_or_else(|e| panic!("{json}: {e}"));
            assert_eq!(values_of(&model), values_of(&wanted), "{json}");
            let position_resampling = match json.get("architecture") {
                Some(_) => Resampling::BicubicAntialias,
                None => Resampling::Bicubic,
            };
            let wanted = VitConfig {
                position_resampling,
                ..config(scale, bias)
            };
            assert_eq!(model.config(), &wanted);
        }
    }
}

#[test]
fn tensors_that_do_not_fit_are_named() {
    let good = tensors_of(&original(&config(None, true)), &vit_names);
    let change = |with: &dyn Fn(&mut Tensors)| {
        let mut tensors = good.clone();
        with(&mut tensors);
        load(&tensors, &hf_config("vit", true))
            .unwrap_err()
            .to_string()
    };
    let positions = "vit.embeddings.position_embeddings";
    let wrong = change(&|t| t.get_mut(positions).unwrap().0 = vec![10, 8]);
    assert!(
        wrong.contains(positions) && wrong.contains("[1, 10, 8]"),
        "{wrong}"
    );
    let missing = change(&|t| {
        t.remove("vit.layernorm.bias");
    });
    assert!(missing.contains("layernorm.bias is missing"), "{missing}");
    let left = change(&|t| {
        t.insert(
            "vit.embeddings.register_tokens".into(),
            (vec![1, 8], vec![0; 32]),
        );
    });
    assert!(left.contains("register_tokens has no place"), "{left}");
    // Biases that the configuration says there are not.
    let e = load(&good, &hf_config("vit", false))
        .unwrap_err()
        .to_string();
    assert!(e.contains(".bias has no place"), "{e}");
    // The head alone may be missing.
    let mut bare = good.clone();
    bare.retain(|n, _| !n.starts_with("classifier"));
    assert_eq!(load(&bare, &hf_config("vit", true)).unwrap().classes(), 3);
}

#[test]
fn configurations_of_other_models_are_refused_by_field() {
    let vit = tensors_of(&original(&config(None, true)), &vit_names);
    let dino = tensors_of(&original(&config(Some(1.0), true)), &dinov2_names);
    let timm = tensors_of(&original(&config(None, true)), &timm_names);
    let with = |mut config: Value, field: &str, value: Value| {
        config[field] = value;
        config
    };
    for (field, value) in [
        ("problem_type", json!("multi_label_classification")),
        ("problem_type", json!("regression")),
        ("model_type", json!("swin")),
        ("layer_norm_eps", json!(null)),
        ("hidden_size", json!(null)),
        ("intermediate_size", json!(null)),
        ("hidden_act", json!("quick_gelu")),
    ] {
        let e = refused(&vit, &with(hf_config("vit", true), field, value));
        assert!(e.contains(field) && e.contains("config.json"), "{e}");
    }
    for (field, value) in [
        ("use_swiglu_ffn", json!(true)),
        ("drop_path_rate", json!(0.1)),
        ("hidden_dropout_prob", json!(0.1)),
        ("layerscale_value", json!(null)),
        ("mlp_ratio", json!(-1)),
    ] {
        let e = refused(&dino, &with(hf_config("dinov2", true), field, value));
        assert!(e.contains(field) && e.contains("config.json"), "{e}");
    }
    for (field, value) in [
        ("act_layer", json!("quick_gelu")),
        ("norm_layer", json!("rmsnorm")),
        ("drop_path_rate", json!(0.1)),
        ("reg_tokens", json!(4)),
        ("class_token", json!(false)),
        ("global_pool", json!("avg")),
        ("no_embed_class", json!(true)),
        ("representation_size", json!(8)),
        ("qkv_bias", json!(null)),
        ("embed_dim", json!("8")),
    ] {
        let e = refused(&timm, &with(timm_config(None, true), field, value));
        assert!(
            e.contains(field) && e.contains("config.json"),
            "{field}: {e}"
        );
    }
    // Said in full and of no effect.
    for (field, value) in [
        ("problem_type", json!("single_label_classification")),
        ("act_layer", json!("gelu")),
        ("drop_path_rate", json!(0)),
        ("norm_layer", json!(null)),
        ("pool", json!("whatever another library keeps there")),
    ] {
        let config = with(timm_config(None, true), field, value);
        load(&timm, &config).unwrap_or_else(|e| panic!("{config}: {e}"));
    }
    // No layer scale, in two ways.
    for none in [json!(null), json!(0)] {
        load(&timm, &with(timm_config(None, true), "init_values", none)).unwrap();
    }
    let e = refused(
        &timm,
        &json!({ "embed_dim": 8, "depth": 2, "num_heads": 2 }),
    );
    assert!(e.contains("model_type"), "{e}");
}

#[test]
fn timms_architectures_say_their_sizes() {
    let read = |config: Value| {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        VitConfig::read(dir.path())
    };
    let base = VitConfig {
        layer_norm_eps: 1e-6,
        position_resampling: Resampling::BicubicAntialias,
        ..VitConfig::default()
    };
    // As timm itself writes it.
    let hub = json!({ "architecture": "deit_small_patch16_224", "num_classes": 1000, "num_features": 384,
        "global_pool": "token", "pretrained_cfg": { "tag": "fb_in1k", "pool_size": null } });
    let small = VitConfig {
        hidden_size: 384,
        num_attention_heads: 6,
        intermediate_size: 1536,
        ..base.clone()
    };
    assert_eq!(read(hub.clone()).unwrap(), small);
    let mut tuned = hub;
    tuned["model_args"] = json!({ "img_size": 96, "act_layer": "gelu_tanh" });
    let wanted = VitConfig {
        image_size: 96,
        hidden_act: mass_model::Activation::GeluTanh,
        ..small
    };
    assert_eq!(read(tuned.clone()).unwrap(), wanted);
    tuned["model_args"] = json!({ "img_size": 96, "swiglu": true });
    let e = read(tuned).unwrap_err().to_string();
    assert!(e.contains("model_args.swiglu"), "{e}");
    // Null overrides what the name says.
    let without =
        json!({ "architecture": "vit_base_patch14_dinov2", "model_args": { "init_values": null } });
    assert_eq!(read(without).unwrap().layer_scale, None);
    let dino = read(json!({ "architecture": "vit_base_patch14_dinov2" })).unwrap();
    let wanted = VitConfig {
        image_size: 518,
        patch_size: 14,
        layer_scale: Some(1e-5),
        ..base
    };
    assert_eq!(dino, wanted);
    for other in [
        "deit3_small_patch16_224",
        "vit_small_patch16_224_clip",
        "resnet50",
        "deit_large_patch16_224",
    ] {
        let e = read(json!({ "architecture": other }))
            .unwrap_err()
            .to_string();
        assert!(e.contains("embed_dim"), "{other}: {e}");
    }
}

#[test]
fn unread_tensors_make_another_model() {
    let vit = tensors_of(&original(&config(None, true)), &vit_names);
    let timm = tensors_of(&original(&config(None, true)), &timm_names);
    let one = || (vec![8], vec![0; 32]);
    let with = |tensors: &Tensors, name: &str| {
        let mut tensors = tensors.clone();
        tensors.insert(name.into(), one());
        tensors
    };
    for name in [
        "vit.pooler.dense.bias",
        "decoder.0.bias",
        "vit.embeddings.mask_token",
    ] {
        load(&with(&vit, name), &hf_config("vit", true)).unwrap();
    }
    load(&with(&timm, "mask_token"), &timm_config(None, true)).unwrap();
    for name in [
        "classifier.dense.bias",
        "adapter.bias",
        "vit.encoder.layer.2.layernorm_before.bias",
    ] {
        let e = refused(&with(&vit, name), &hf_config("vit", true));
        assert!(e.contains(name) && e.contains("has no place"), "{e}");
    }
    for name in [
        "pre_logits.fc.bias",
        "attn_pool.q.bias",
        "dist_token",
        "head.fc.bias",
    ] {
        let e = refused(&with(&timm, name), &timm_config(None, true));
        assert!(e.contains(name) && e.contains("has no place"), "{e}");
    }
}

#[test]
fn a_head_of_other_classes_is_replaced_only_where_that_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    for (names, config) in [
        (
            &vit_names as &dyn Fn(&str) -> Vec<String>,
            hf_config("vit", true),
        ),
        (&timm_names, timm_config(None, true)),
    ] {
        let wanted = original(&self::config(None, true));
        write(dir.path(), &tensors_of(&wanted, names), &config);
        let e = VitClassifier::load(dir.path(), 7, &mut seeded_rng(1)).unwrap_err();
        assert!(e.to_string().contains("is [3, 8]"), "{e}");
        let new = |seed| {
            let rng = &mut seeded_rng(seed);
            VitClassifier::load_with_new_head(dir.path(), 7, rng).unwrap()
        };
        let (one, mut two) = (new(1), new(2));
        assert_eq!(one.classes(), 7);
        let heads = |m: &VitClassifier| {
            let mut values = values_of(m);
            values.retain(|(name, _)| name.starts_with("head."));
            values
        };
        assert_eq!(values_of(&one).len(), values_of(&wanted).len());
        for ((name, a), (_, b)) in values_of(&one).iter().zip(&values_of(&wanted)) {
            assert!(a == b || name.starts_with("head."), "{name}");
        }
        assert_ne!(heads(&one), heads(&two));
        two.draw_head(&mut seeded_rng(1)).unwrap();
        assert_eq!(heads(&one), heads(&two));
    }
}

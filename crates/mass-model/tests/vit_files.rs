//! Files of pretrained vision transformers: every layout is read back as the model that was written.

mod hf_names;

use std::collections::BTreeMap;

use hf_names::{timm_names, vit_names};
use mass_model::vit::{VitClassifier, VitConfig};
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

fn timm_with_scales(name: &str) -> Vec<String> {
    match name.split_once(".scale") {
        Some((block, scale)) => vec![format!("{block}.ls{scale}.gamma")],
        None => timm_names(name),
    }
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

fn load(tensors: &Tensors, config: &Value) -> Result<VitClassifier, ModelError> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let views = tensors.iter().map(|(name, (shape, bytes))| {
        (
            name,
            TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap(),
        )
    });
    let bytes = safetensors::serialize(views, None).unwrap();
    std::fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
    VitClassifier::load(dir.path(), 3, &mut seeded_rng(8))
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
            (None, &timm_with_scales, timm_config(None, bias)),
            (Some(0.5), &timm_with_scales, timm_config(Some(0.5), bias)),
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
            assert_eq!(model.config(), &config(scale, bias));
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

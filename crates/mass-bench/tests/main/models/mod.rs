//! Small models in folders of Hugging Face's layout.

#[path = "../../../../mass-model/tests/main/hf_names/mod.rs"]
mod hf_names;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use mass_bench::glue::sample;
use mass_model::bert::{BertClassifier, BertConfig};
use mass_model::vit::{VitClassifier, VitConfig};
use mass_model::{Parameters, seeded_rng};
use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize};
use serde_json::{Value, json};

/// Tensors by name: shape and bytes.
type Tensors = BTreeMap<String, (Vec<usize>, Vec<u8>)>;

fn tensors(model: &impl Parameters, names: fn(&str) -> Vec<String>) -> Tensors {
    let mut tensors = Tensors::new();
    model.visit("", &mut |name, p| {
        let parts = names(&name);
        let mut shape = match name.as_str() {
            // As the file has it.
            "embeddings.class" => vec![1, 1, p.len()],
            "embeddings.positions" if parts[0].starts_with("vit.") => [&[1], p.shape()].concat(),
            "embeddings.patch.weight" => vec![p.shape()[0], 3, 14, 14],
            _ => p.shape().to_vec(),
        };
        shape[0] /= parts.len();
        let each = p.len() / parts.len();
        for (name, values) in parts.into_iter().zip(p.values().chunks_exact(each)) {
            let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
            tensors.insert(name, (shape.clone(), bytes));
        }
    });
    tensors
}

fn write(path: &Path, tensors: &Tensors) {
    let views = tensors.iter().map(|(name, (shape, bytes))| {
        let view = TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap();
        (name.clone(), view)
    });
    fs::write(path, serialize(views, None).unwrap()).unwrap();
}

pub(crate) fn bert_config() -> BertConfig {
    BertConfig {
        vocab_size: sample::vocabulary().len(),
        hidden_size: 8,
        num_hidden_layers: 2,
        num_attention_heads: 2,
        intermediate_size: 16,
        max_position_embeddings: 128,
        ..BertConfig::default()
    }
}

/// A classifier of as many labels, with the vocabulary of the built-in sample.
pub(crate) fn bert(dir: &Path, labels: usize) {
    fs::create_dir_all(dir).unwrap();
    let model = BertClassifier::new(&bert_config(), labels, &mut seeded_rng(1)).unwrap();
    let mut config = serde_json::to_value(bert_config()).unwrap();
    config["model_type"] = json!("bert");
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    write(
        &dir.join("model.safetensors"),
        &tensors(&model, hf_names::bert_names),
    );
    fs::write(dir.join("vocab.txt"), sample::vocabulary().join("\n")).unwrap();
}

/// A model of images with patches of 14 pixels.
pub(crate) fn vit(dir: &Path) {
    fs::create_dir_all(dir).unwrap();
    let config = VitConfig {
        hidden_size: 8,
        num_hidden_layers: 10,
        num_attention_heads: 2,
        intermediate_size: 16,
        image_size: 28,
        patch_size: 14,
        ..VitConfig::default()
    };
    let model = VitClassifier::new(&config, 2, &mut seeded_rng(2)).unwrap();
    let written = json!({
        "model_type": "vit", "hidden_size": 8, "num_hidden_layers": 10, "num_attention_heads": 2,
        "intermediate_size": 16, "image_size": 28, "patch_size": 14, "layer_norm_eps": config.layer_norm_eps,
    });
    fs::write(dir.join("config.json"), written.to_string()).unwrap();
    write(
        &dir.join("model.safetensors"),
        &tensors(&model, hf_names::vit_names),
    );
}

/// Replaces the one file of weights by two and their index; what they are called.
pub(crate) fn split(dir: &Path) -> Vec<String> {
    let bytes = fs::read(dir.join("model.safetensors")).unwrap();
    let all = SafeTensors::deserialize(&bytes).unwrap();
    let mut parts = [Tensors::new(), Tensors::new()];
    let (mut map, names) = (
        serde_json::Map::new(),
        [1, 2].map(|i| format!("model-0000{i}-of-00002.safetensors")),
    );
    for (i, (name, view)) in all.iter().enumerate() {
        let tensor = (view.shape().to_vec(), view.data().to_vec());
        parts[i % 2].insert(name.to_owned(), tensor);
        map.insert(name.to_owned(), Value::from(names[i % 2].clone()));
    }
    for (name, part) in names.iter().zip(&parts) {
        write(&dir.join(name), part);
    }
    let index = json!({ "metadata": {}, "weight_map": map }).to_string();
    fs::write(dir.join("model.safetensors.index.json"), index).unwrap();
    fs::remove_file(dir.join("model.safetensors")).unwrap();
    names.to_vec()
}

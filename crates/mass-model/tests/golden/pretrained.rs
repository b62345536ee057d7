//! Pretrained models against values computed by PyTorch and transformers, read from $MASS_GOLDEN_DIR.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use super::hf_names::{bert_names, timm_names, vit_names};
use mass_model::bert::{BertClassifier, Targets, TextBatch};
use mass_model::vit::{ImageBatch, VitClassifier};
use mass_model::{Parameters, lm::TrainPass, seeded_rng};
use safetensors::{Dtype, SafeTensors};

fn dir_of(variable: &str) -> PathBuf {
    PathBuf::from(std::env::var_os(variable).unwrap_or_else(|| panic!("{variable} is not set")))
}

/// The tensors of a safetensors file, integers and floats alike as f64, which holds both exactly.
struct Golden(BTreeMap<String, (Vec<usize>, Vec<f64>)>);

impl Golden {
    fn read(path: &str) -> Self {
        let path = dir_of("MASS_GOLDEN_DIR").join(path);
        let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let tensors = file.iter().map(|(name, view)| {
            let words = view.data().as_chunks::<4>().0;
            let values = match view.dtype() {
                Dtype::F32 => words
                    .iter()
                    .map(|b| f64::from(f32::from_le_bytes(*b)))
                    .collect(),
                Dtype::I32 => words
                    .iter()
                    .map(|b| f64::from(i32::from_le_bytes(*b)))
                    .collect(),
                other => panic!("{name} is {other:?}"),
            };
            (name.to_owned(), (view.shape().to_vec(), values))
        });
        Self(tensors.collect())
    }

    fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    fn shape(&self, name: &str) -> &[usize] {
        &self
            .0
            .get(name)
            .unwrap_or_else(|| panic!("no tensor {name}"))
            .0
    }

    fn values(&self, name: &str) -> Vec<f32> {
        self.shape(name);
        self.0[name].1.iter().map(|&x| x as f32).collect()
    }

    fn indices(&self, name: &str) -> Vec<u32> {
        self.shape(name);
        self.0[name].1.iter().map(|&x| x as u32).collect()
    }

    /// The padded batch of a text model.
    fn text(&self) -> TextBatch {
        let mask: Vec<bool> = self
            .indices("attention_mask")
            .iter()
            .map(|&m| m == 1)
            .collect();
        let (ids, types) = (self.indices("input_ids"), self.indices("token_type_ids"));
        TextBatch::padded(ids, types, &mask, self.shape("input_ids")[1]).unwrap()
    }

    /// Compares every gradient of the file with that of the parameter it belongs to. `parts` gives the names in the file
    /// of what is a parameter here, in the order in which they are stacked.
    fn assert_gradients(
        &self,
        model: &impl Parameters,
        mut pass: TrainPass,
        parts: impl Fn(&str) -> Vec<String>,
    ) {
        let mut seen = BTreeSet::new();
        model.visit("", &mut |name, p| {
            let names: Vec<String> = parts(&name)
                .into_iter()
                .map(|n| format!("grad.{n}"))
                .collect();
            let want: Vec<f32> = names.iter().flat_map(|n| self.values(n)).collect();
            seen.extend(names);
            let got = p.gradient(&mut pass.gradients).unwrap();
            assert_close(&format!("gradient of {name}"), got, &want);
        });
        let given: BTreeSet<_> = self
            .0
            .keys()
            .filter(|n| n.starts_with("grad."))
            .cloned()
            .collect();
        assert!(!given.is_empty());
        assert_eq!(seen, given, "every gradient is compared");
    }
}

/// Largest difference relative to the largest value.
fn assert_close(what: &str, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len(), "{what}");
    assert!(got.iter().all(|x| x.is_finite()), "{what} is not finite");
    let largest = want.iter().fold(f32::MIN_POSITIVE, |m, x| m.max(x.abs()));
    let worst = got
        .iter()
        .zip(want)
        .fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
    let relative = worst / largest;
    println!("{what}: off by {relative:e} of the largest value");
    assert!(
        relative <= 1e-5,
        "{what}: off by {worst:e}, largest value {largest:e}"
    );
}

#[test]
fn golden_tiny_bert() {
    let g = Golden::read("tiny-bert/io.safetensors");
    let labels = g.shape("logits")[1];
    let dir = dir_of("MASS_GOLDEN_DIR").join("tiny-bert");
    let model = BertClassifier::load(&dir, labels, &mut seeded_rng(0)).unwrap();
    let batch = g.text();

    let states = model.hidden_states(&batch).unwrap();
    assert!(!g.has(&format!("hidden.{}", states.len())));
    for (l, state) in states.iter().enumerate() {
        let name = format!("hidden.{l}");
        assert_close(&name, state, &g.values(&name));
    }
    let (logits, _) = model.logits(&batch, None).unwrap();
    assert_close("logits", &logits, &g.values("logits"));

    // A regression file has values as labels, and one output.
    let (classes, values) = (g.indices("labels"), g.values("labels"));
    let targets = if labels == 1 {
        Targets::Values(&values)
    } else {
        Targets::Classes(&classes)
    };
    let pass = model.train_pass(&batch, targets, None).unwrap();
    assert_close("loss", &[pass.loss], &g.values("loss"));
    let losses = model.losses(&batch, targets, None).unwrap();
    let mean = losses.iter().sum::<f32>() / losses.len() as f32;
    assert_close("mean of the losses", &[mean], &g.values("loss"));
    g.assert_gradients(&model, pass, bert_names);
}

#[test]
fn golden_minilm_l6() {
    let g = Golden::read("minilm-l6.safetensors");
    let dir = dir_of("MASS_MODELS_DIR").join("minilm-l6");
    let model = BertClassifier::load(&dir, 2, &mut seeded_rng(0)).unwrap();
    let batch = g.text();
    let states = model.hidden_states(&batch).unwrap();
    let last = g.values("last_hidden_state");
    assert_close("last hidden state", states.last().unwrap(), &last);
    assert_close(
        "pooled",
        &model.pooled(&batch).unwrap(),
        &g.values("pooler_output"),
    );
}

/// Height and width of the images of a tensor `[batch, channels, height, width]`.
fn size_of(g: &Golden, name: &str) -> (usize, usize) {
    let shape = g.shape(name);
    (shape[2], shape[3])
}

fn image_classifier(folder: &str, parts: fn(&str) -> Vec<String>) {
    let g = Golden::read(&format!("{folder}/io.safetensors"));
    let dir = dir_of("MASS_GOLDEN_DIR").join(folder);
    let model = VitClassifier::load(&dir, g.shape("logits")[1], &mut seeded_rng(0)).unwrap();
    let (pixels, size) = (g.values("pixel_values"), size_of(&g, "pixel_values"));
    let pixels = &pixels;
    let batch = ImageBatch::Pixels { pixels, size };
    let states = model.hidden_states(batch).unwrap();
    assert!(!g.has(&format!("hidden.{}", states.len())));
    for (l, state) in states.iter().enumerate() {
        let name = format!("hidden.{l}");
        if g.has("hidden.0") {
            assert_close(&name, state, &g.values(&name));
        }
    }
    assert_close(
        "logits",
        &model.logits(batch, None).unwrap().0,
        &g.values("logits"),
    );
    let classes = g.indices("labels");
    let pass = model.train_pass(batch, &classes, None).unwrap();
    assert_close("loss", &[pass.loss], &g.values("loss"));
    g.assert_gradients(&model, pass, parts);
}

#[test]
fn golden_tiny_vit() {
    image_classifier("tiny-vit", vit_names);
}

#[test]
fn golden_tiny_deit_timm() {
    image_classifier("tiny-deit-timm", timm_names);
}

#[test]
fn golden_tiny_dinov2() {
    let g = Golden::read("tiny-dinov2/io.safetensors");
    let dir = dir_of("MASS_GOLDEN_DIR").join("tiny-dinov2");
    let model = VitClassifier::load(&dir, 2, &mut seeded_rng(0)).unwrap();
    let (pixels, size) = (g.values("pixel_values"), size_of(&g, "pixel_values"));
    let batch = ImageBatch::Pixels {
        pixels: &pixels,
        size,
    };
    let states = model.hidden_states(batch).unwrap();
    assert_close("hidden state 1", &states[1], &g.values("hidden_1"));
    let last = model.encoded(batch).unwrap();
    assert_close("last hidden state", &last, &g.values("last_hidden_state"));
    // Smaller images, so that position embeddings are interpolated.
    let (pixels, size) = (
        g.values("pixel_values_small"),
        size_of(&g, "pixel_values_small"),
    );
    let batch = ImageBatch::Pixels {
        pixels: &pixels,
        size,
    };
    let last = model.encoded(batch).unwrap();
    let want = g.values("last_hidden_state_small");
    assert_close("last hidden state of the small image", &last, &want);
}

#[test]
fn golden_vit_s14() {
    let g = Golden::read("vit-s14.safetensors");
    let dir = dir_of("MASS_MODELS_DIR").join("vit-s14");
    let model = VitClassifier::load(&dir, 7, &mut seeded_rng(0)).unwrap();
    let (pixels, size) = (g.values("pixel_values"), size_of(&g, "pixel_values"));
    let batch = ImageBatch::Pixels {
        pixels: &pixels,
        size,
    };
    let last = model.encoded(batch).unwrap();
    let (d, tokens) = (model.config().hidden_size, model.tokens(size).unwrap());
    let (mut class, mut mean) = (Vec::new(), Vec::new());
    for image in last.chunks_exact(tokens * d) {
        class.extend_from_slice(&image[..d]);
        mean.extend((0..d).map(|j| {
            let patches = image[d..].iter().skip(j).step_by(d).map(|&x| f64::from(x));
            (patches.sum::<f64>() / (tokens - 1) as f64) as f32
        }));
    }
    assert_close("class token", &class, &g.values("cls"));
    assert_close("mean of the patches", &mean, &g.values("patch_mean"));
}

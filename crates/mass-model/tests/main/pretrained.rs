//! Files of pretrained weights: those that are read, and those that are refused.

use std::collections::BTreeMap;
use std::path::Path;

use crate::hf_names::bert_names;
use half::{bf16, f16};
use mass_model::bert::{BertClassifier, BertConfig, TextBatch};
use mass_model::pretrained::{PretrainedError, Weights, read_config, weight_files};
use mass_model::{ModelError, Parameters, seeded_rng};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

/// Tensors to be written to a file.
type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn f32s(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

fn write(path: &Path, tensors: &Tensors) {
    let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
        (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

fn config() -> BertConfig {
    BertConfig {
        vocab_size: 11,
        hidden_size: 8,
        num_hidden_layers: 2,
        num_attention_heads: 2,
        intermediate_size: 12,
        max_position_embeddings: 6,
        ..BertConfig::default()
    }
}

fn config_json() -> Value {
    serde_json::to_value(config()).unwrap()
}

fn original() -> BertClassifier {
    let mut model = BertClassifier::new(&config(), 3, &mut seeded_rng(4)).unwrap();
    // Values that f16 and bf16 hold exactly, none of them where a new model starts.
    let mut n = 0;
    model.visit_mut("", &mut |_, p| {
        for x in p.values_mut() {
            n = (n * 13 + 5) % 127;
            *x = (n - 63) as f32 / 64.0;
        }
    });
    model
}

/// The tensors of a model by the names they have in files.
fn tensors_of(model: &BertClassifier) -> Tensors {
    let mut tensors = Tensors::new();
    model.visit("", &mut |name, p| {
        let parts = bert_names(&name);
        let mut shape = p.shape().to_vec();
        shape[0] /= parts.len();
        let each = p.len() / parts.len();
        for (name, values) in parts.into_iter().zip(p.values().chunks_exact(each)) {
            tensors.insert(name, (Dtype::F32, shape.clone(), f32s(values)));
        }
    });
    tensors
}

fn values_of(model: &BertClassifier) -> Vec<(String, Vec<f32>)> {
    let mut all = Vec::new();
    model.visit("", &mut |name, p| all.push((name, p.values().to_vec())));
    all
}

/// A folder with these tensors and this configuration.
fn folder(tensors: &Tensors, config: &Value) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    write(&dir.path().join("model.safetensors"), tensors);
    dir
}

fn load(dir: &Path) -> Result<BertClassifier, ModelError> {
    BertClassifier::load(dir, 3, &mut seeded_rng(8))
}

fn refused(tensors: &Tensors, config: &Value) -> String {
    let dir = folder(tensors, config);
    load(dir.path()).unwrap_err().to_string()
}

#[test]
fn every_type_and_spelling_gives_the_same_model() {
    let (model, plain) = (original(), tensors_of(&original()));
    let wanted = values_of(&model);
    let as_type = |dtype, convert: &dyn Fn(f32) -> [u8; 2]| -> Tensors {
        let halved = plain.iter().map(|(name, (_, shape, bytes))| {
            let words = bytes.as_chunks::<4>().0.iter();
            let bytes = words
                .flat_map(|b| convert(f32::from_le_bytes(*b)))
                .collect();
            (name.clone(), (dtype, shape.clone(), bytes))
        });
        halved.collect()
    };
    let renamed = |rename: &dyn Fn(&str) -> String| -> Tensors {
        plain.iter().map(|(n, t)| (rename(n), t.clone())).collect()
    };
    let mut with_extras = plain.clone();
    let positions = (0..6u64).flat_map(|i| i.to_le_bytes()).collect();
    with_extras.insert(
        "bert.embeddings.position_ids".into(),
        (Dtype::I64, vec![1, 6], positions),
    );
    with_extras.insert(
        "cls.predictions.bias".into(),
        (Dtype::F32, vec![11], vec![0; 44]),
    );
    for (what, tensors) in [
        ("F32", plain.clone()),
        (
            "F16",
            as_type(Dtype::F16, &|x| f16::from_f32(x).to_le_bytes()),
        ),
        (
            "BF16",
            as_type(Dtype::BF16, &|x| bf16::from_f32(x).to_le_bytes()),
        ),
        ("without prefix", renamed(&|n| n.replace("bert.", ""))),
        (
            "gamma and beta",
            renamed(&|n| {
                n.replace("LayerNorm.weight", "LayerNorm.gamma")
                    .replace("LayerNorm.bias", "LayerNorm.beta")
            }),
        ),
        ("tensors of no layer", with_extras),
    ] {
        let dir = folder(&tensors, &config_json());
        assert_eq!(values_of(&load(dir.path()).unwrap()), wanted, "{what}");
    }
    assert_eq!(
        load(folder(&plain, &config_json()).path())
            .unwrap()
            .config(),
        &config()
    );
}

#[test]
fn a_model_in_several_files_is_read_through_its_index() {
    let plain = tensors_of(&original());
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    std::fs::write(at("config.json"), config_json().to_string()).unwrap();
    let mut shards = [Tensors::new(), Tensors::new()];
    let mut map = serde_json::Map::new();
    for (i, (name, tensor)) in plain.iter().enumerate() {
        shards[i % 2].insert(name.clone(), tensor.clone());
        map.insert(name.clone(), json!(format!("model-{}.safetensors", i % 2)));
    }
    for (i, shard) in shards.iter().enumerate() {
        write(&at(&format!("model-{i}.safetensors")), shard);
    }
    let index = |map: &Value| {
        let text = json!({ "metadata": {}, "weight_map": map }).to_string();
        std::fs::write(at("model.safetensors.index.json"), text).unwrap();
    };
    index(&Value::Object(map.clone()));
    assert_eq!(
        values_of(&load(dir.path()).unwrap()),
        values_of(&original())
    );

    let first = plain.keys().next().unwrap();
    let with = |place: Value| {
        let mut map = map.clone();
        map.insert(first.clone(), place);
        index(&Value::Object(map));
        load(dir.path()).unwrap_err().to_string()
    };
    let wrong = with(json!("model-1.safetensors"));
    assert!(
        wrong.contains(first) && wrong.contains("index.json"),
        "{wrong}"
    );
    assert!(with(json!("model-7.safetensors")).contains("model-7"));
    for outside in [json!("../model.safetensors"), json!(""), json!(3)] {
        assert!(with(outside).contains("no name of a file"));
    }
    index(&json!({}));
    assert!(
        load(dir.path())
            .unwrap_err()
            .to_string()
            .contains("weight_map")
    );
}

#[test]
fn pooler_and_head_are_drawn_where_there_are_none() {
    let mut bare = tensors_of(&original());
    bare.retain(|name, _| name.starts_with("bert.e"));
    let dir = folder(&bare, &config_json());
    let load =
        |seed| values_of(&BertClassifier::load(dir.path(), 2, &mut seeded_rng(seed)).unwrap());
    let (one, same, other) = (load(1), load(1), load(2));
    assert_eq!(one, same);
    for (i, (name, values)) in one.iter().enumerate() {
        let drawn = ["pooler.weight", "head.weight"].contains(&name.as_str());
        assert_eq!(*values != other[i].1, drawn, "{name}");
    }
    // A head of another number of classes is not silently thrown away.
    let dir = folder(&tensors_of(&original()), &config_json());
    let e = BertClassifier::load(dir.path(), 2, &mut seeded_rng(1)).unwrap_err();
    assert!(
        e.to_string().contains("tensor classifier.weight is [3, 8]"),
        "{e}"
    );
    // A head without a pooler read something else.
    let mut tokens = bare.clone();
    for (name, tensor) in tensors_of(&original()) {
        if name.starts_with("classifier.") {
            tokens.insert(name, tensor);
        }
    }
    assert!(refused(&tokens, &config_json()).contains("pooler.dense.weight is missing"));
    // Nor is a head of other layers passed over.
    let mut deeper = bare.clone();
    deeper.insert(
        "classifier.dense.bias".into(),
        (Dtype::F32, vec![8], vec![0; 32]),
    );
    let e = refused(&deeper, &config_json());
    assert!(
        e.contains("missing") || e.contains("classifier.dense.bias has no place"),
        "{e}"
    );
    // Half a head is no head.
    bare.insert("classifier.bias".into(), (Dtype::F32, vec![3], vec![0; 12]));
    let e = refused(&bare, &config_json());
    assert!(e.contains("is missing"), "{e}");
}

/// A model tuned for one task begins another with a head of its own, and never with one that merely has the right size.
#[test]
fn a_classifier_is_tuned_again_with_a_new_head() {
    let tuned = tensors_of(&original());
    let new =
        |dir: &Path, labels| BertClassifier::load_with_new_head(dir, labels, &mut seeded_rng(8));
    let head = |model: &BertClassifier| -> Vec<f32> {
        let values = values_of(model).into_iter();
        let head = values.filter(|(name, _)| name.starts_with("head."));
        head.flat_map(|(_, values)| values).collect()
    };
    let without_head = |model: &BertClassifier| {
        let mut values = values_of(model);
        values.retain(|(name, _)| !name.starts_with("head."));
        values
    };
    let dir = folder(&tuned, &config_json());
    for labels in [1, 2, 3, 5] {
        let model = new(dir.path(), labels).unwrap();
        assert_eq!(model.labels(), labels);
        assert_eq!(without_head(&model), without_head(&original()));
        assert_ne!(head(&model), head(&original()), "{labels}");
        // As of a file without a head.
        let mut bare = tuned.clone();
        bare.retain(|name, _| !name.starts_with("classifier."));
        let bare = folder(&bare, &config_json());
        let drawn = BertClassifier::load(bare.path(), labels, &mut seeded_rng(8)).unwrap();
        assert_eq!(values_of(&drawn), values_of(&model));
    }
    // Heads of other kinds, whatever their problem was.
    for (tensor, shape) in [
        ("classifier.dense.weight", vec![8, 8]),
        ("classifier.out_proj.bias", vec![4]),
        ("score.weight", vec![2, 8]),
        ("cls.predictions.bias", vec![11]),
    ] {
        let mut other = tuned.clone();
        other.retain(|name, _| !name.starts_with("classifier."));
        let bytes = vec![0; 4 * shape.iter().product::<usize>()];
        other.insert(tensor.into(), (Dtype::F32, shape, bytes));
        let mut config = config_json();
        config["problem_type"] = json!("multi_label_classification");
        let dir = folder(&other, &config);
        assert!(load(dir.path()).is_err(), "{tensor}");
        let model = new(dir.path(), 2).unwrap();
        assert_eq!(without_head(&model), without_head(&original()), "{tensor}");
    }
    let mut regression = config_json();
    regression["problem_type"] = json!("regression");
    new(folder(&tuned, &regression).path(), 3).unwrap();
    // A head that read every token had no pooler; a new one is drawn.
    let mut tokens = tuned.clone();
    tokens.retain(|name, _| !name.contains("pooler"));
    new(folder(&tokens, &config_json()).path(), 3).unwrap();
    // What is inside the encoder is no head.
    for inside in [
        "bert.encoder.layer.0.adapter.weight",
        "encoder.layer.2.output.dense.bias",
    ] {
        let mut other = tuned.clone();
        other.insert(inside.into(), (Dtype::F32, vec![8], vec![0; 32]));
        let e = new(folder(&other, &config_json()).path(), 3).unwrap_err();
        assert!(e.to_string().contains(inside), "{e}");
    }
}

/// Of a file and an index that does not name it either could be meant.
#[test]
fn a_single_file_beside_an_index_is_refused_unless_the_index_names_it() {
    let all = tensors_of(&original());
    let dir = folder(&all, &config_json());
    let index = |file: &str| {
        let map: serde_json::Map<String, Value> =
            all.keys().map(|name| (name.clone(), json!(file))).collect();
        let text = json!({ "weight_map": map }).to_string();
        std::fs::write(dir.path().join("model.safetensors.index.json"), text).unwrap();
    };
    index("model.safetensors");
    assert_eq!(
        values_of(&load(dir.path()).unwrap()),
        values_of(&original())
    );
    index("model-00001-of-00001.safetensors");
    write(&dir.path().join("model-00001-of-00001.safetensors"), &all);
    let e = load(dir.path()).unwrap_err().to_string();
    assert!(
        e.contains("model.safetensors.index.json: model.safetensors is beside it"),
        "{e}"
    );
    std::fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    assert_eq!(
        values_of(&load(dir.path()).unwrap()),
        values_of(&original())
    );
    let files = weight_files(dir.path()).unwrap();
    assert_eq!(files, [dir.path().join("model-00001-of-00001.safetensors")]);
}

#[test]
fn tensors_that_do_not_fit_are_named() {
    let (good, config) = (tensors_of(&original()), config_json());
    let query = "bert.encoder.layer.1.attention.self.query.weight";
    let change = |with: &dyn Fn(&mut Tensors)| {
        let mut tensors = good.clone();
        with(&mut tensors);
        refused(&tensors, &config)
    };
    let set = |dtype, shape: &[usize], bytes: usize| {
        change(&|t| {
            t.insert(query.into(), (dtype, shape.to_vec(), vec![0; bytes]));
        })
    };
    let missing = change(&|t| {
        t.remove(query);
    });
    assert!(
        missing.contains("layer.1.attention.self.query.weight is missing"),
        "{missing}"
    );
    assert!(set(Dtype::F32, &[8, 4], 128).contains(&format!("{query} is [8, 4]")));
    assert!(set(Dtype::F64, &[8, 8], 512).contains(&format!("{query} is F64")));
    assert!(set(Dtype::I32, &[8, 8], 256).contains(&format!("{query} is I32")));
    let nan =
        change(&|t| t.get_mut(query).unwrap().2[20..24].copy_from_slice(&f32::NAN.to_le_bytes()));
    assert!(
        nan.contains(&format!("{query} is not finite at element 5")),
        "{nan}"
    );
    assert!(nan.contains("model.safetensors"), "{nan}");

    // A configuration of other sizes than the file.
    let of = |field: &str, value: Value| {
        let mut config = config.clone();
        config[field] = value;
        refused(&good, &config)
    };
    assert!(
        of("num_hidden_layers", json!(3))
            .contains("layer.2.attention.self.query.weight is missing")
    );
    assert!(of("num_hidden_layers", json!(1)).contains("bert.encoder.layer.1."));
    assert!(of("vocab_size", json!(12)).contains("word_embeddings.weight is [11, 8]"));
    // Sizes that no memory holds are compared with the file before anything is allocated.
    assert!(of("hidden_size", json!(1u64 << 60)).contains("word_embeddings.weight is [11, 8]"));
    assert!(of("num_hidden_layers", json!(1 << 20)).contains("layer.2.attention"));
    assert!(of("num_hidden_layers", json!(1u64 << 60)).contains("num_hidden_layers"));
}

#[test]
fn fields_that_cannot_be_meant_are_named() {
    let good = tensors_of(&original());
    let of = |field: &str, value: Value| {
        let mut config = config_json();
        config[field] = value;
        refused(&good, &config)
    };
    for (field, value) in [
        ("hidden_size", json!("8")),
        ("hidden_act", json!("maxout")),
        ("hidden_act", json!(null)),
        ("vocab_size", json!(-1)),
        ("pad_token_id", json!(1.5)),
        ("hidden_dropout_prob", json!([])),
        ("is_decoder", json!("no")),
    ] {
        let message = of(field, value);
        assert!(message.contains(&format!("{field:?}")), "{message}");
        assert!(message.contains("config.json"), "{message}");
    }
    for (field, value) in [
        ("model_type", json!("roberta")),
        ("position_embedding_type", json!("relative_key")),
        ("is_decoder", json!(true)),
        ("problem_type", json!("multi_label_classification")),
        ("problem_type", json!("regression")), // of three outputs
        ("num_attention_heads", json!(3)),
    ] {
        let message = of(field, value);
        assert!(message.contains(field), "{message}");
        assert!(message.contains("config.json"), "{message}");
    }
    // Two that are wrong in the same way, among many that nobody reads.
    let mut config = config_json();
    for i in 0..2000 {
        config[format!("a{i}")] = json!(null);
    }
    (config["hidden_size"], config["vocab_size"]) = (json!("8"), json!("8"));
    let message = refused(&good, &config);
    assert!(
        ["hidden_size", "vocab_size"]
            .iter()
            .any(|f| message.contains(f)),
        "{message}"
    );
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(
        dir.path().join("config.json"),
        r#"{"model_type": "roberta"}"#,
    )
    .unwrap();
    let e = BertConfig::read(dir.path()).unwrap_err();
    assert!(e.to_string().contains("model_type"), "{e}");
    std::fs::remove_file(dir.path().join("config.json")).unwrap();
    assert!(matches!(
        read_config::<BertConfig>(dir.path()),
        Err(PretrainedError::Io { .. })
    ));
    for text in ["", "[1, 2]", "{\"hidden_size\": ", "\u{0}"] {
        std::fs::write(dir.path().join("config.json"), text).unwrap();
        let e = read_config::<BertConfig>(dir.path()).unwrap_err();
        assert!(
            matches!(e, PretrainedError::Damaged { .. }),
            "{text:?}: {e}"
        );
    }
}

#[test]
fn damaged_files_are_refused_without_large_allocations() {
    let dir = folder(&tensors_of(&original()), &config_json());
    let path = dir.path().join("model.safetensors");
    let good = std::fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    let open = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        Weights::open(dir.path())
    };
    assert!(open(&good).is_ok());
    for len in [0, 7, 8, header - 1, header, header + 100, good.len() - 1] {
        let e = open(&good[..len]).unwrap_err();
        assert!(matches!(e, PretrainedError::Damaged { .. }), "{len}: {e}");
    }
    let short = open(&good[..good.len() - 1]).unwrap_err().to_string();
    assert!(short.contains("ends within tensor"), "{short}");
    assert!(open(&[&good[..], &[0; 4]].concat()).is_err());
    // Headers that promise more than there is: of themselves, of a tensor, of tensors that overlap.
    for n in [u64::MAX, 1 << 40, good.len() as u64] {
        let mut bytes = good.clone();
        bytes[..8].copy_from_slice(&n.to_le_bytes());
        assert!(matches!(open(&bytes), Err(PretrainedError::Damaged { .. })));
    }
    for (shape, offsets) in [
        (json!([1u64 << 62, 1u64 << 62]), json!([0, 4])),
        (json!([1u64 << 40]), json!([0, 1u64 << 42])),
        (json!([2]), json!([8, 0])),
        (json!([2]), json!([4, 12])),
        (json!([3]), json!([0, 8])),
        (json!([-1]), json!([0, 8])),
    ] {
        let info = json!({ "dtype": "F32", "shape": shape, "data_offsets": offsets });
        let text = json!({ "a": info }).to_string();
        let bytes = [
            &(text.len() as u64).to_le_bytes()[..],
            text.as_bytes(),
            &[0; 8],
        ]
        .concat();
        let e = open(&bytes).unwrap_err();
        assert!(matches!(e, PretrainedError::Damaged { .. }), "{text}: {e}");
    }
    // A name that is there twice, and what is wrong with a tensor is said by its name.
    let info = |shape: Value, offsets: Value| json!({ "dtype": "F32", "shape": shape, "data_offsets": offsets });
    let (six, eight) = (
        info(json!([2, 3]), json!([0, 24])),
        info(json!([8]), json!([0, 24])),
    );
    let strange = json!({ "dtype": "F7", "shape": [2], "data_offsets": [0, 8] });
    for (text, wanted) in [
        (
            format!(r#"{{"bias": {six}, "bias": {six}}}"#),
            "bias is there twice",
        ),
        (
            format!(r#"{{"bias": {eight}}}"#),
            "tensor bias is F32 of shape [8]",
        ),
        (format!(r#"{{"bias": {strange}}}"#), "tensor bias: "),
    ] {
        let len = (text.len() as u64).to_le_bytes();
        let e = open(&[&len[..], text.as_bytes(), &[0; 24]].concat()).unwrap_err();
        assert!(matches!(e, PretrainedError::Damaged { .. }), "{e}");
        assert!(e.to_string().contains(wanted), "{e}");
    }
    std::fs::remove_file(&path).unwrap();
    let absent = load(dir.path()).unwrap_err();
    assert!(matches!(absent, ModelError::Io { .. }));
    assert!(absent.to_string().contains("model.safetensors"), "{absent}");
    // Reading a pipe would wait for ever; opening a socket has an error of its own.
    for name in ["model.safetensors", "config.json"] {
        let path = dir.path().join(name);
        let _ = std::fs::remove_file(&path);
        let _socket = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let refused = load(dir.path()).unwrap_err().to_string();
        assert!(refused.contains("regular"), "{name}: {refused}");
    }
}

#[test]
fn tensors_are_read_by_name() {
    let dir = folder(&tensors_of(&original()), &config_json());
    let weights = Weights::open(dir.path()).unwrap();
    assert_eq!(
        weights.names().count(),
        weights
            .names()
            .collect::<std::collections::HashSet<_>>()
            .len()
    );
    assert_eq!(weights.shape("classifier.weight"), Some(&[3, 8][..]));
    assert_eq!(weights.shape("no.such"), None);
    assert_eq!(weights.read("classifier.bias", &[3]).unwrap().len(), 3);
    let e = weights.read("no.such", &[3]).unwrap_err();
    assert!(matches!(e, PretrainedError::Missing { .. }));
    // What was loaded is a model that runs.
    let batch = TextBatch::packed(vec![1, 2, 3], vec![0; 3], vec![0, 3]);
    let (logits, _) = load(dir.path()).unwrap().logits(&batch, None).unwrap();
    assert!(logits.iter().all(|x| x.is_finite()) && logits.len() == 3);
}

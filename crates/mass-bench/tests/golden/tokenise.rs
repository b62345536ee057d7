//! WordPiece, against transformers and between the two files that a model may have.

use std::path::PathBuf;

use mass_bench::glue::{data::Dataset, task::Task, tokenize::TextTokenizer};
use safetensors::SafeTensors;
use serde_json::Value;

fn variable(name: &str) -> PathBuf {
    PathBuf::from(std::env::var_os(name).unwrap_or_else(|| panic!("${name} is not set")))
}

fn integers(file: &SafeTensors<'_>, name: &str) -> (usize, Vec<u32>) {
    let tensor = file.tensor(name).unwrap();
    assert_eq!(tensor.dtype(), safetensors::Dtype::I32, "{name}");
    let values = tensor.data().as_chunks::<4>().0;
    let values = values.iter().map(|b| u32::from_le_bytes(*b)).collect();
    (tensor.shape()[1], values)
}

#[test]
fn golden_minilm_tokenisation() {
    let golden = variable("MASS_GOLDEN_DIR");
    let model = variable("MASS_MODELS_DIR").join("minilm-l6");
    let read = |name: &str| std::fs::read(golden.join(name)).unwrap();
    let json: Value = serde_json::from_slice(&read("minilm-l6.json")).unwrap();
    let bytes = read("minilm-l6.safetensors");
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let (width, ids) = integers(&file, "input_ids");
    let (_, types) = integers(&file, "token_type_ids");
    let (_, mask) = integers(&file, "attention_mask");
    let texts = json["texts"].as_array().unwrap();
    assert_eq!(ids.len(), texts.len() * width);

    // The same from tokenizer.json, from vocab.txt with its configuration, and from vocab.txt alone.
    let dir = tempfile::tempdir().unwrap();
    let copy = |name: &str| std::fs::copy(model.join(name), dir.path().join(name)).unwrap();
    let mut tokenizers = vec![TextTokenizer::open(&model, 128).unwrap()];
    copy("vocab.txt");
    tokenizers.push(TextTokenizer::open(dir.path(), 128).unwrap());
    copy("tokenizer_config.json");
    tokenizers.push(TextTokenizer::open(dir.path(), 128).unwrap());
    for tokenizer in &tokenizers {
        for (row, text) in texts.iter().enumerate() {
            let (first, second) = (text[0].as_str().unwrap(), text[1].as_str());
            let encoded = tokenizer.encode(first, second).unwrap();
            let here = row * width..(row + 1) * width;
            let real = mask[here.clone()].iter().filter(|&&m| m == 1).count();
            let here = here.start..here.start + real;
            assert_eq!(encoded.ids, ids[here.clone()], "{first}");
            assert_eq!(encoded.types, types[here], "{first}");
        }
    }
}

#[test]
fn golden_vocabulary_file_and_tokenizer_file_agree_on_every_task_that_is_there() {
    let (data, models) = (variable("MASS_DATA_DIR"), variable("MASS_MODELS_DIR"));
    let model = models.join("minilm-l6");
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(model.join("vocab.txt"), dir.path().join("vocab.txt")).unwrap();
    let json = TextTokenizer::open(&model, 128).unwrap();
    let vocab = TextTokenizer::open(dir.path(), 128).unwrap();
    let mut read = 0;
    for task in Task::ALL {
        if !data.join("glue").join(task.name()).is_dir() {
            continue;
        }
        let data = Dataset::read(&data, task).unwrap();
        let a = json.encode_all(&data.train).unwrap();
        let b = vocab.encode_all(&data.train).unwrap();
        let differ = a.iter().zip(&b).position(|(a, b)| a != b);
        assert_eq!(differ.map(|i| &data.train[i]), None, "{task}");
        assert!(a.iter().all(|e| (3..=128).contains(&e.ids.len())), "{task}");
        assert!(a.iter().any(|e| e.types.contains(&1)) == task.layout().second.is_some());
        read += 1;
    }
    assert!(read >= 3, "{read} GLUE tasks under {}", data.display());
}

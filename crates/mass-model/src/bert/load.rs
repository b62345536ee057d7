//! The names that BERT's parameters have in files.

use crate::pretrained::{Head, Part, Weights};

/// The tensors of the file that make up a parameter, without the prefix `bert.`.
pub(super) fn parts(name: &str, shape: &[usize]) -> Vec<Part> {
    let one = |n: String| vec![Part::new(n, shape)];
    match name {
        "embeddings.words" => return one("embeddings.word_embeddings.weight".into()),
        "embeddings.positions" => return one("embeddings.position_embeddings.weight".into()),
        "embeddings.types" => return one("embeddings.token_type_embeddings.weight".into()),
        _ => {}
    }
    // What is left ends in `.weight` or `.bias`.
    let (module, kind) = name.rsplit_once('.').unwrap_or((name, "weight"));
    match module {
        "embeddings.norm" => return one(format!("embeddings.LayerNorm.{kind}")),
        "pooler" => return one(format!("pooler.dense.{kind}")),
        "head" => return one(format!("classifier.{kind}")),
        _ => {}
    }
    let (layer, part) = module
        .strip_prefix("layers.")
        .and_then(|rest| rest.split_once('.'))
        .unwrap_or(("", module));
    let place = format!("encoder.layer.{layer}");
    match part {
        "attention.qkv" => {
            let mut third = shape.to_vec();
            third[0] /= 3;
            ["query", "key", "value"]
                .map(|which| Part::new(format!("{place}.attention.self.{which}.{kind}"), &third))
                .into()
        }
        "attention.out" => one(format!("{place}.attention.output.dense.{kind}")),
        "attention_norm" => one(format!("{place}.attention.output.LayerNorm.{kind}")),
        "ffn.fc1" => one(format!("{place}.intermediate.dense.{kind}")),
        "ffn.fc2" => one(format!("{place}.output.dense.{kind}")),
        _ => one(format!("{place}.output.LayerNorm.{kind}")),
    }
}

/// With the prefix and without, and with the names that layer norm had in TensorFlow.
pub(super) fn spellings(name: &str) -> Vec<String> {
    let old = name
        .replace("LayerNorm.weight", "LayerNorm.gamma")
        .replace("LayerNorm.bias", "LayerNorm.beta");
    let mut names = vec![format!("bert.{name}"), name.to_owned()];
    if old != name {
        names.extend([format!("bert.{old}"), old]);
    }
    names
}

/// What a file need not have: a pretrained encoder comes without a head, and may come without a pooler. A head without a pooler
/// read something else, such as every token.
pub(super) fn optional(weights: &Weights, head: Head) -> impl Fn(&str) -> bool {
    let named = |name: &str| name.starts_with("classifier.");
    let head = head == Head::OfFile && weights.names().any(named);
    move |name| name.starts_with("head.") || (name.starts_with("pooler.") && !head)
}

/// Whether a tensor that is not read makes another model. The heads of pretraining and of answering questions do not, nor the
/// positions 0, 1, 2, ... that old versions of the library stored. With a new head nothing does that is outside the encoder.
pub(super) fn belongs(tensor: &str, head: Head) -> bool {
    let inside = tensor.strip_prefix("bert.");
    let name = inside.unwrap_or(tensor);
    let starts = |with: &[&str]| with.iter().any(|start| name.starts_with(start));
    let of_head = match head {
        Head::OfFile => starts(&["cls.", "qa_outputs."]),
        Head::New => inside.is_none() && !starts(&["embeddings.", "encoder.", "pooler."]),
    };
    !of_head && name != "embeddings.position_ids"
}

//! What Hugging Face's files call a parameter of ours: one name, or several that we hold stacked.

pub(crate) fn bert_names(name: &str) -> Vec<String> {
    let place = |rest: String| vec![format!("bert.{rest}")];
    let embedding = match name {
        "embeddings.words" => "word_embeddings.weight",
        "embeddings.positions" => "position_embeddings.weight",
        "embeddings.types" => "token_type_embeddings.weight",
        "embeddings.norm.weight" => "LayerNorm.weight",
        "embeddings.norm.bias" => "LayerNorm.bias",
        _ => "",
    };
    if !embedding.is_empty() {
        return place(format!("embeddings.{embedding}"));
    }
    let (module, kind) = name.rsplit_once('.').unwrap();
    if module == "head" {
        return vec![format!("classifier.{kind}")];
    }
    if module == "pooler" {
        return place(format!("pooler.dense.{kind}"));
    }
    let (layer, module) = module["layers.".len()..].split_once('.').unwrap();
    let inner = match module {
        "attention.qkv" => {
            return ["query", "key", "value"]
                .map(|w| format!("bert.encoder.layer.{layer}.attention.self.{w}.{kind}"))
                .into();
        }
        "attention.out" => "attention.output.dense",
        "attention_norm" => "attention.output.LayerNorm",
        "ffn.fc1" => "intermediate.dense",
        "ffn.fc2" => "output.dense",
        "ffn_norm" => "output.LayerNorm",
        other => panic!("{other}"),
    };
    place(format!("encoder.layer.{layer}.{inner}.{kind}"))
}

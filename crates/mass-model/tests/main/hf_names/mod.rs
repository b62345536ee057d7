//! What other libraries' files call a parameter of ours: one name, or several that we hold stacked.
#![allow(dead_code)] // not every test needs every family

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

pub(crate) fn vit_names(name: &str) -> Vec<String> {
    let place = |rest: String| vec![format!("vit.{rest}")];
    let embedding = match name {
        "embeddings.class" => "cls_token",
        "embeddings.positions" => "position_embeddings",
        "embeddings.patch.weight" => "patch_embeddings.projection.weight",
        "embeddings.patch.bias" => "patch_embeddings.projection.bias",
        _ => "",
    };
    if !embedding.is_empty() {
        return place(format!("embeddings.{embedding}"));
    }
    let (module, kind) = name.rsplit_once('.').unwrap();
    match module {
        "head" => return vec![format!("classifier.{kind}")],
        "norm" => return place(format!("layernorm.{kind}")),
        _ => {}
    }
    let (block, module) = module["blocks.".len()..].split_once('.').unwrap();
    let inner = match module {
        "attention.qkv" => {
            return ["query", "key", "value"]
                .map(|w| format!("vit.encoder.layer.{block}.attention.attention.{w}.{kind}"))
                .into();
        }
        "attention.out" => "attention.output.dense",
        "norm1" => "layernorm_before",
        "norm2" => "layernorm_after",
        "ffn.fc1" => "intermediate.dense",
        "ffn.fc2" => "output.dense",
        other => panic!("{other}"),
    };
    place(format!("encoder.layer.{block}.{inner}.{kind}"))
}

pub(crate) fn timm_names(name: &str) -> Vec<String> {
    if let Some((block, scale)) = name.split_once(".scale") {
        return vec![format!("{block}.ls{scale}.gamma")];
    }
    let renamed = match name {
        "embeddings.class" => "cls_token".to_owned(),
        "embeddings.positions" => "pos_embed".to_owned(),
        _ => name
            .replace("embeddings.patch.", "patch_embed.proj.")
            .replace("attention.qkv", "attn.qkv")
            .replace("attention.out", "attn.proj")
            .replace("ffn.", "mlp."),
    };
    vec![renamed]
}

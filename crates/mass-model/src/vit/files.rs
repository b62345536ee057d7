//! The configurations of files, and the names that the parameters have in them.

use std::path::Path;

use serde::Deserialize;

use super::VitConfig;
use crate::error::ModelError;
use crate::kernels::activation::Activation;
use crate::pretrained::{Part, activation, read_config};

/// Whose names a file's tensors have, and whose fields its configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// `ViTModel` and `ViTForImageClassification` of Hugging Face.
    Vit,
    /// `Dinov2Model` of Hugging Face.
    Dinov2,
    /// `VisionTransformer` of timm.
    Timm,
}

pub(super) fn read(dir: &Path) -> Result<(VitConfig, Layout), ModelError> {
    let kind: Kind = read_config(dir)?;
    let layout = match (kind.model_type.as_deref(), kind.architecture) {
        (Some("vit"), _) => Layout::Vit,
        (Some("dinov2"), _) => Layout::Dinov2,
        (Some(other), _) => return Err(unsupported(format!("model_type {other:?}"))),
        (None, Some(_)) => Layout::Timm,
        (None, None) => {
            let what = "config.json has neither model_type nor architecture";
            return Err(ModelError::Config(what.into()));
        }
    };
    let config = match layout {
        Layout::Timm => read_config::<Timm>(dir)?.convert()?,
        _ => read_config::<HuggingFace>(dir)?.convert(layout)?,
    };
    Ok((config, layout))
}

fn unsupported(what: impl std::fmt::Display) -> ModelError {
    ModelError::Config(format!("{what} is not supported"))
}

fn hidden_width(dim: usize, ratio: f64) -> Result<usize, ModelError> {
    let width = dim as f64 * ratio;
    if !(1.0..=f64::from(u32::MAX)).contains(&width) {
        return Err(ModelError::Config(format!(
            "mlp_ratio {ratio} of width {dim}"
        )));
    }
    Ok(width as usize)
}

#[derive(Deserialize)]
struct Kind {
    model_type: Option<String>,
    architecture: Option<String>,
}

/// `ViTConfig` and `Dinov2Config`; what their defaults differ in is optional.
#[derive(Deserialize)]
#[serde(default)]
struct HuggingFace {
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    #[serde(with = "activation")]
    hidden_act: Activation,
    hidden_dropout_prob: f32,
    attention_probs_dropout_prob: f32,
    initializer_range: f32,
    layer_norm_eps: Option<f32>,
    image_size: usize,
    patch_size: Option<usize>,
    num_channels: usize,
    qkv_bias: bool,
    /// `ViTConfig` alone.
    intermediate_size: Option<usize>,
    /// `Dinov2Config` alone, and what follows.
    mlp_ratio: Option<f64>,
    layerscale_value: Option<f32>,
    drop_path_rate: f32,
    use_swiglu_ffn: bool,
}

impl Default for HuggingFace {
    fn default() -> Self {
        let base = VitConfig::default();
        Self {
            hidden_size: base.hidden_size,
            num_hidden_layers: base.num_hidden_layers,
            num_attention_heads: base.num_attention_heads,
            hidden_act: base.hidden_act,
            hidden_dropout_prob: base.hidden_dropout_prob,
            attention_probs_dropout_prob: base.attention_probs_dropout_prob,
            initializer_range: base.initializer_range,
            layer_norm_eps: None,
            image_size: base.image_size,
            patch_size: None,
            num_channels: base.num_channels,
            qkv_bias: base.qkv_bias,
            intermediate_size: None,
            mlp_ratio: None,
            layerscale_value: None,
            drop_path_rate: 0.0,
            use_swiglu_ffn: false,
        }
    }
}

impl HuggingFace {
    fn convert(self, layout: Layout) -> Result<VitConfig, ModelError> {
        let dino = layout == Layout::Dinov2;
        if dino && self.use_swiglu_ffn {
            return Err(unsupported("use_swiglu_ffn"));
        }
        if dino && self.drop_path_rate != 0.0 {
            return Err(unsupported(format!(
                "drop_path_rate {}",
                self.drop_path_rate
            )));
        }
        let intermediate_size = if dino {
            hidden_width(self.hidden_size, self.mlp_ratio.unwrap_or(4.0))?
        } else {
            self.intermediate_size.unwrap_or(3072)
        };
        Ok(VitConfig {
            hidden_size: self.hidden_size,
            num_hidden_layers: self.num_hidden_layers,
            num_attention_heads: self.num_attention_heads,
            intermediate_size,
            hidden_act: self.hidden_act,
            hidden_dropout_prob: self.hidden_dropout_prob,
            attention_probs_dropout_prob: self.attention_probs_dropout_prob,
            layer_norm_eps: self
                .layer_norm_eps
                .unwrap_or(if dino { 1e-6 } else { 1e-12 }),
            image_size: self.image_size,
            patch_size: self.patch_size.unwrap_or(if dino { 14 } else { 16 }),
            num_channels: self.num_channels,
            qkv_bias: self.qkv_bias,
            layer_scale: dino.then(|| self.layerscale_value.unwrap_or(1.0)),
            initializer_range: self.initializer_range,
        })
    }
}

/// Arguments of timm's `VisionTransformer`.
#[derive(Deserialize)]
struct Timm {
    embed_dim: usize,
    depth: usize,
    num_heads: usize,
    mlp_ratio: Option<f64>,
    img_size: Option<usize>,
    patch_size: Option<usize>,
    in_chans: Option<usize>,
    qkv_bias: Option<bool>,
    init_values: Option<f32>,
    layer_norm_eps: Option<f32>,
    class_token: Option<bool>,
    global_pool: Option<String>,
}

impl Timm {
    fn convert(self) -> Result<VitConfig, ModelError> {
        if self.class_token == Some(false) {
            return Err(unsupported("a model without class_token"));
        }
        if let Some(pool) = self.global_pool.filter(|p| p != "token") {
            return Err(unsupported(format!("global_pool {pool:?}")));
        }
        let base = VitConfig::default();
        Ok(VitConfig {
            hidden_size: self.embed_dim,
            num_hidden_layers: self.depth,
            num_attention_heads: self.num_heads,
            intermediate_size: hidden_width(self.embed_dim, self.mlp_ratio.unwrap_or(4.0))?,
            layer_norm_eps: self.layer_norm_eps.unwrap_or(1e-6),
            image_size: self.img_size.unwrap_or(base.image_size),
            patch_size: self.patch_size.unwrap_or(base.patch_size),
            num_channels: self.in_chans.unwrap_or(base.num_channels),
            qkv_bias: self.qkv_bias.unwrap_or(true),
            layer_scale: self.init_values,
            ..base
        })
    }
}

/// The tensors of the file that make up a parameter, without a prefix.
pub(super) fn parts(config: &VitConfig, layout: Layout, name: &str, shape: &[usize]) -> Vec<Part> {
    let timm = layout == Layout::Timm;
    let pick = |ours: &str, theirs: &str| if timm { theirs } else { ours }.to_owned();
    let (d, side) = (config.hidden_size, config.patch_size);
    let embedding = match name {
        "embeddings.class" => Some(("embeddings.cls_token", "cls_token", vec![1, 1, d])),
        "embeddings.positions" => {
            let shape = vec![1, shape[0], d];
            Some(("embeddings.position_embeddings", "pos_embed", shape))
        }
        "embeddings.patch.weight" => Some((
            "embeddings.patch_embeddings.projection.weight",
            "patch_embed.proj.weight",
            vec![d, config.num_channels, side, side],
        )),
        "embeddings.patch.bias" => Some((
            "embeddings.patch_embeddings.projection.bias",
            "patch_embed.proj.bias",
            vec![d],
        )),
        _ => None,
    };
    if let Some((ours, theirs, shape)) = embedding {
        return vec![Part::new(pick(ours, theirs), &shape)];
    }
    let one = |n: String| vec![Part::new(n, shape)];
    // What is left ends in `.weight`, `.bias`, or is a layer scale.
    let (module, kind) = name.rsplit_once('.').unwrap_or((name, ""));
    match module {
        "norm" => return one(format!("{}.{kind}", pick("layernorm", "norm"))),
        "head" => return one(format!("{}.{kind}", pick("classifier", "head"))),
        _ => {}
    }
    let (block, part) = name
        .strip_prefix("blocks.")
        .and_then(|rest| rest.split_once('.'))
        .unwrap_or(("", name));
    let place = format!("{}.{block}", pick("encoder.layer", "blocks"));
    let module = part.rsplit_once('.').map_or(part, |(module, _)| module);
    if module == "attention.qkv" && !timm {
        let mut third = shape.to_vec();
        third[0] /= 3;
        return ["query", "key", "value"]
            .map(|which| {
                Part::new(
                    format!("{place}.attention.attention.{which}.{kind}"),
                    &third,
                )
            })
            .into();
    }
    let module = match (layout, module) {
        (Layout::Dinov2, "scale1") => return one(format!("{place}.layer_scale1.lambda1")),
        (Layout::Dinov2, "scale2") => return one(format!("{place}.layer_scale2.lambda1")),
        (Layout::Timm, "scale1") => return one(format!("{place}.ls1.gamma")),
        (Layout::Timm, "scale2") => return one(format!("{place}.ls2.gamma")),
        (Layout::Timm, "attention.qkv") => "attn.qkv",
        (Layout::Timm, "attention.out") => "attn.proj",
        (_, "attention.out") => "attention.output.dense",
        (Layout::Vit, "norm1") => "layernorm_before",
        (Layout::Vit, "norm2") => "layernorm_after",
        (Layout::Vit, "ffn.fc1") => "intermediate.dense",
        (Layout::Vit, "ffn.fc2") => "output.dense",
        (_, "ffn.fc1") => "mlp.fc1",
        (_, "ffn.fc2") => "mlp.fc2",
        (_, other) => other,
    };
    one(format!("{place}.{module}.{kind}"))
}

fn without_prefix(tensor: &str) -> &str {
    let prefixes = ["vit.", "dinov2."];
    let found = prefixes.iter().find_map(|p| tensor.strip_prefix(p));
    found.unwrap_or(tensor)
}

/// With the prefixes of classifiers and without.
pub(super) fn spellings(name: &str) -> Vec<String> {
    ["", "vit.", "dinov2."].map(|p| format!("{p}{name}")).into()
}

/// What a file need not have.
pub(super) fn optional(name: &str) -> bool {
    name.starts_with("head.")
}

/// Whether a tensor is part of the encoder, so that a model which does not read it is another model.
pub(super) fn belongs(tensor: &str) -> bool {
    let name = without_prefix(tensor);
    let encoder = [
        "embeddings.",
        "encoder.",
        "layernorm.",
        "blocks.",
        "patch_embed.",
        "cls_token",
        "pos_embed",
        "dist_token",
        "reg_token",
        "norm.",
        "norm_pre.",
        "fc_norm.",
        "head_dist.",
    ];
    // Only masked-image pretraining uses the mask token.
    encoder.iter().any(|start| name.starts_with(start)) && name != "embeddings.mask_token"
}

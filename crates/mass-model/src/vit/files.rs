//! The configurations of files, and the names that the parameters have in them.

mod timm;

use std::path::Path;

use serde::Deserialize;

use super::{Resampling, VitConfig};
use crate::error::ModelError;
use crate::kernels::activation::Activation;
use crate::pretrained::{
    Head, Part, PretrainedError, activation, checked, config_file, field_error, present,
    read_config,
};

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

pub(super) fn read(dir: &Path, head: Head) -> Result<(VitConfig, Layout), ModelError> {
    let path = &config_file(dir);
    let kind: Kind = read_config(dir)?;
    let layout = match (kind.model_type.as_deref(), kind.architecture) {
        (Some("vit"), _) => Layout::Vit,
        (Some("dinov2"), _) => Layout::Dinov2,
        (Some(other), _) => {
            return Err(unsupported(path, "model_type", format!("{other:?}")).into());
        }
        (None, Some(_)) => Layout::Timm,
        (None, None) => {
            let why = "neither it nor architecture is there";
            return Err(field_error(path, "model_type", why).into());
        }
    };
    let config = match layout {
        Layout::Timm => timm::read(dir)?,
        _ => read_config::<HuggingFace>(dir)?.convert(path, layout, head)?,
    };
    checked(dir, config.check())?;
    Ok((config, layout))
}

fn unsupported(path: &Path, field: &str, value: impl std::fmt::Display) -> PretrainedError {
    field_error(path, field, &format!("{value} is not supported"))
}

/// A size under the name that the file has for it.
fn size(path: &Path, field: &str, value: usize) -> Result<usize, PretrainedError> {
    match value {
        0 => Err(field_error(path, field, "it is zero")),
        _ if u32::try_from(value).is_err() => {
            let why = format!("{value} is larger than any model's");
            Err(field_error(path, field, &why))
        }
        _ => Ok(value),
    }
}

fn hidden_width(path: &Path, dim: usize, ratio: f64) -> Result<usize, PretrainedError> {
    let width = dim as f64 * ratio;
    if !(1.0..=f64::from(u32::MAX)).contains(&width) {
        let why = format!("{ratio} of width {dim}");
        return Err(field_error(path, "mlp_ratio", &why));
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
    #[serde(deserialize_with = "present")]
    layer_norm_eps: Option<f32>,
    image_size: usize,
    #[serde(deserialize_with = "present")]
    patch_size: Option<usize>,
    num_channels: usize,
    qkv_bias: bool,
    problem_type: Option<String>,
    /// `ViTConfig` alone.
    #[serde(deserialize_with = "present")]
    intermediate_size: Option<usize>,
    /// `Dinov2Config` alone, and what follows.
    #[serde(deserialize_with = "present")]
    mlp_ratio: Option<f64>,
    #[serde(deserialize_with = "present")]
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
            problem_type: None,
            intermediate_size: None,
            mlp_ratio: None,
            layerscale_value: None,
            drop_path_rate: 0.0,
            use_swiglu_ffn: false,
        }
    }
}

impl HuggingFace {
    fn convert(
        self,
        path: &Path,
        layout: Layout,
        head: Head,
    ) -> Result<VitConfig, PretrainedError> {
        let dino = layout == Layout::Dinov2;
        match self.problem_type.as_deref() {
            None | Some("single_label_classification") => {}
            // Of a head that is not read.
            Some(_) if head == Head::New => {}
            Some(other) => return Err(unsupported(path, "problem_type", format!("{other:?}"))),
        }
        if dino && self.use_swiglu_ffn {
            return Err(unsupported(path, "use_swiglu_ffn", true));
        }
        if dino && self.drop_path_rate != 0.0 {
            return Err(unsupported(path, "drop_path_rate", self.drop_path_rate));
        }
        // Its feed-forward networks have no dropout, ViT's have.
        if dino && self.hidden_dropout_prob != 0.0 {
            let rate = self.hidden_dropout_prob;
            return Err(unsupported(path, "hidden_dropout_prob", rate));
        }
        let intermediate_size = if dino {
            let dim = size(path, "hidden_size", self.hidden_size)?;
            hidden_width(path, dim, self.mlp_ratio.unwrap_or(4.0))?
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
            position_resampling: Resampling::Bicubic,
            initializer_range: self.initializer_range,
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

/// Whether a tensor is one of a classifier's two.
pub(super) fn is_head(layout: Layout, tensor: &str) -> bool {
    let head = match layout {
        Layout::Timm => "head",
        _ => "classifier",
    };
    tensor
        .strip_prefix(head)
        .is_some_and(|rest| [".weight", ".bias"].contains(&rest))
}

/// Whether a tensor that is not read makes another model. Poolers do not, nor mask tokens and decoders, which only masked-image
/// pretraining uses.
pub(super) fn belongs(layout: Layout, tensor: &str) -> bool {
    let name = without_prefix(tensor);
    let (starts, mask) = match layout {
        Layout::Timm => (&["decoder."][..], "mask_token"),
        _ => (&["pooler.", "decoder."][..], "embeddings.mask_token"),
    };
    !starts.iter().any(|start| name.starts_with(start)) && name != mask
}

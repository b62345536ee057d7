//! timm's `config.json`: the name of an architecture, and the arguments of its `VisionTransformer`.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{Resampling, VitConfig, hidden_width, unsupported};
use crate::error::ModelError;
use crate::kernels::activation::Activation;
use crate::pretrained::{
    PretrainedError, config_file, field_error, from_fields, present, read_config,
};

/// Arguments may stand beside the name, or under `model_args` as timm itself writes those that are not the architecture's own.
#[derive(Deserialize)]
struct File {
    architecture: String,
    #[serde(default)]
    model_args: Map<String, Value>,
    #[serde(flatten)]
    others: Map<String, Value>,
}

/// The arguments that are read.
#[derive(Default, Deserialize, Serialize)]
#[serde(default)]
struct Arguments {
    #[serde(deserialize_with = "present")]
    embed_dim: Option<usize>,
    #[serde(deserialize_with = "present")]
    depth: Option<usize>,
    #[serde(deserialize_with = "present")]
    num_heads: Option<usize>,
    #[serde(deserialize_with = "present")]
    mlp_ratio: Option<f64>,
    #[serde(deserialize_with = "present")]
    img_size: Option<usize>,
    #[serde(deserialize_with = "present")]
    patch_size: Option<usize>,
    #[serde(deserialize_with = "present")]
    in_chans: Option<usize>,
    #[serde(deserialize_with = "present")]
    qkv_bias: Option<bool>,
    #[serde(deserialize_with = "present")]
    layer_norm_eps: Option<f32>,
    /// Null and zero are no layer scale, whatever the architecture has by its name.
    #[serde(deserialize_with = "present")]
    init_values: Option<Option<f32>>,
    act_layer: Option<String>,
}

/// Of an argument that is not read, but would make another model: the value that does not. Null never does.
fn only(argument: &str) -> Option<Value> {
    Some(match argument {
        "global_pool" => "token".into(),
        "pos_embed" => "learn".into(),
        "class_token" | "proj_bias" | "final_norm" => true.into(),
        "no_embed_class" | "dynamic_img_pad" | "pre_norm" | "qk_norm" | "fc_norm"
        | "scale_attn_norm" | "scale_mlp_norm" => false.into(),
        "reg_tokens" | "drop_rate" | "pos_drop_rate" | "patch_drop_rate" | "proj_drop_rate"
        | "attn_drop_rate" | "drop_path_rate" => 0.0.into(),
        "representation_size"
        | "norm_layer"
        | "mlp_layer"
        | "block_fn"
        | "embed_layer"
        | "embed_norm_layer"
        | "attn_layer" => Value::Null,
        _ => return None,
    })
}

/// Whether a value makes another model than the one that is built here.
fn other_model(argument: &str, value: &Value) -> bool {
    let same = |only: &Value| match (only.as_f64(), value.as_f64()) {
        (Some(a), Some(b)) => a == b,
        _ => only == value,
    };
    !value.is_null() && only(argument).is_some_and(|o| !same(&o))
}

/// Whether an argument is one of timm's that is read, looked at, or of no effect on what the model computes.
fn known(argument: &str) -> bool {
    const OF_NO_EFFECT: [&str; 5] = [
        "weight_init",
        "fix_init",
        "dynamic_img_size",
        "strict_img_size",
        "num_classes",
    ];
    let read = serde_json::to_value(Arguments::default()).unwrap_or_default();
    read.get(argument).is_some() || OF_NO_EFFECT.contains(&argument) || only(argument).is_some()
}

pub(super) fn read(dir: &Path) -> Result<VitConfig, ModelError> {
    let path = &config_file(dir);
    let file: File = read_config(dir)?;
    if let Some(argument) = file.model_args.keys().find(|a| !known(a)) {
        let field = format!("model_args.{argument}");
        return Err(field_error(path, &field, "no argument that is known").into());
    }
    let mut all = file.others;
    all.extend(file.model_args);
    if let Some((argument, value)) = all.iter().find(|(a, v)| other_model(a, v)) {
        return Err(unsupported(path, argument, value).into());
    }
    let given: Arguments = from_fields(path, all)?;
    Ok(given.convert(path, named(&file.architecture))?)
}

/// What an architecture's name says of the arguments: `vit_small_patch16_224`, `deit_tiny_patch16_224`,
/// `vit_base_patch14_dinov2`. Nothing of other names, which may be of other models.
fn named(architecture: &str) -> Arguments {
    let parse = || {
        let mut parts = architecture.split('_');
        let family = parts.next().filter(|f| ["vit", "deit"].contains(f))?;
        let (width, depth, heads) = match parts.next()? {
            "tiny" => (192, 12, 3),
            "small" => (384, 12, 6),
            "base" => (768, 12, 12),
            "large" if family == "vit" => (1024, 24, 16),
            _ => return None,
        };
        let patch = parts.next()?.strip_prefix("patch")?.parse().ok()?;
        let (size, scale) = match parts.next()? {
            "dinov2" if family == "vit" => (518, Some(1e-5)),
            size => (size.parse().ok()?, None),
        };
        let arguments = Arguments {
            embed_dim: Some(width),
            depth: Some(depth),
            num_heads: Some(heads),
            patch_size: Some(patch),
            img_size: Some(size),
            init_values: Some(scale),
            ..Arguments::default()
        };
        parts.next().is_none().then_some(arguments)
    };
    parse().unwrap_or_default()
}

impl Arguments {
    fn convert(self, path: &Path, named: Self) -> Result<VitConfig, PretrainedError> {
        let size = |name: &str, given: Option<usize>, named: Option<usize>| {
            let missing = || {
                let why = "it is missing, and the architecture's name does not say it";
                field_error(path, name, why)
            };
            super::size(path, name, given.or(named).ok_or_else(missing)?)
        };
        let hidden_size = size("embed_dim", self.embed_dim, named.embed_dim)?;
        let num_attention_heads = size("num_heads", self.num_heads, named.num_heads)?;
        if !hidden_size.is_multiple_of(num_attention_heads) {
            let why = format!("{num_attention_heads} does not divide embed_dim {hidden_size}");
            return Err(field_error(path, "num_heads", &why));
        }
        let hidden_act = match self.act_layer.as_deref() {
            None | Some("gelu") => Activation::GeluErf,
            Some("gelu_tanh") => Activation::GeluTanh,
            Some("relu") => Activation::Relu,
            Some("silu" | "swish") => Activation::Silu,
            Some(other) => return Err(unsupported(path, "act_layer", format!("{other:?}"))),
        };
        let base = VitConfig::default();
        Ok(VitConfig {
            hidden_size,
            num_hidden_layers: size("depth", self.depth, named.depth)?,
            num_attention_heads,
            intermediate_size: hidden_width(path, hidden_size, self.mlp_ratio.unwrap_or(4.0))?,
            hidden_act,
            layer_norm_eps: self.layer_norm_eps.unwrap_or(1e-6),
            image_size: size(
                "img_size",
                self.img_size.or(named.img_size),
                Some(base.image_size),
            )?,
            patch_size: size(
                "patch_size",
                self.patch_size.or(named.patch_size),
                Some(base.patch_size),
            )?,
            num_channels: size("in_chans", self.in_chans, Some(base.num_channels))?,
            qkv_bias: self.qkv_bias.unwrap_or(true),
            layer_scale: self
                .init_values
                .or(named.init_values)
                .flatten()
                .filter(|&s| s != 0.0),
            position_resampling: Resampling::BicubicAntialias,
            ..base
        })
    }
}

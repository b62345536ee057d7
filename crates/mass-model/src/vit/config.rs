use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::ModelError;
use crate::kernels::activation::Activation;
use crate::param::MOST;
use crate::pretrained::{Head, activation};

use super::files;

/// Sizes and rates of a vision transformer. The default is ViT-B/16.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VitConfig {
    /// Width d of the hidden states.
    pub hidden_size: usize,
    /// Number of blocks, at most 2^20.
    pub num_hidden_layers: usize,
    /// Attention heads; divides the width.
    pub num_attention_heads: usize,
    /// Hidden width of the feed-forward networks.
    pub intermediate_size: usize,
    /// Nonlinearity of the feed-forward networks.
    #[serde(with = "activation")]
    pub hidden_act: Activation,
    /// Rate of dropout on embeddings and on each sublayer's output, while training.
    pub hidden_dropout_prob: f32,
    /// Rate of dropout on attention probabilities, while training.
    pub attention_probs_dropout_prob: f32,
    /// Added to the variance in layer norm.
    pub layer_norm_eps: f32,
    /// Side, in pixels, of the square images that the position embeddings are for; those of other sizes get interpolated
    /// ones.
    pub image_size: usize,
    /// Side of a patch, in pixels; divides the image's.
    pub patch_size: usize,
    /// Channels of an image.
    pub num_channels: usize,
    /// Whether queries, keys and values have a bias.
    pub qkv_bias: bool,
    /// What the factors on the sublayers' outputs start at (layer scale; Touvron and others, arXiv 2103.17239); a model
    /// without has none.
    pub layer_scale: Option<f32>,
    /// How position embeddings are fitted to images of another size.
    pub position_resampling: Resampling,
    /// Standard deviation of drawn matrices.
    pub initializer_range: f32,
}

/// How a grid of position embeddings is brought to another grid: PyTorch's `interpolate(mode="bicubic",
/// align_corners=False)`.
///
/// Of `n` old places and `m` new ones along an axis, new place i is at `(i + 1/2) n / m - 1/2`, and old places weigh in by Keys'
/// cubic kernel `w_a` of their distance, `w_a(x) = (a + 2) |x|³ - (a + 3) x² + 1` for `|x| <= 1` and
/// `a (|x|³ - 5 x² + 8 |x| - 4)` for `1 < |x| < 2`. The same grid is left as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Resampling {
    /// `antialias=False`, of Hugging Face's ViT and DINOv2: a = -3/4 and four neighbours, the outermost place repeated past the
    /// border.
    #[default]
    Bicubic,
    /// `antialias=True`, of timm: a = -1/2, the kernel as much wider as the new grid is coarser, and weights scaled to sum to one
    /// at the border.
    BicubicAntialias,
}

impl Default for VitConfig {
    fn default() -> Self {
        Self {
            hidden_size: 768,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            intermediate_size: 3072,
            hidden_act: Activation::GeluErf,
            hidden_dropout_prob: 0.0,
            attention_probs_dropout_prob: 0.0,
            layer_norm_eps: 1e-12,
            image_size: 224,
            patch_size: 16,
            num_channels: 3,
            qkv_bias: true,
            layer_scale: None,
            position_resampling: Resampling::Bicubic,
            initializer_range: 0.02,
        }
    }
}

impl VitConfig {
    /// The sizes of DeiT-S/16 (Touvron and others, arXiv 2012.12877).
    pub fn deit_small() -> Self {
        Self {
            hidden_size: 384,
            num_attention_heads: 6,
            intermediate_size: 1536,
            layer_norm_eps: 1e-6,
            ..Self::default()
        }
    }

    /// Reads `config.json` of a folder: Hugging Face's for `vit` and `dinov2`, or timm's.
    ///
    /// Of timm's, the arguments `embed_dim`, `depth`, `num_heads`, `mlp_ratio`, `img_size`, `patch_size`, `in_chans`, `qkv_bias`,
    /// `init_values`, `act_layer` (and `layer_norm_eps`) are read, beside `architecture` or under `model_args`; what they leave open
    /// an architecture of the form `vit_small_patch16_224`, `deit_tiny_patch16_224` or `vit_base_patch14_dinov2` says.
    ///
    /// # Errors
    /// [`ModelError::Io`] if it cannot be read; [`ModelError::Checkpoint`] naming the field that is missing or has a wrong
    /// value, or that makes another model (SwiGLU networks, stochastic depth, register tokens, other pooling than by class token,
    /// other problems than one label of several), or sizes and rates that no model can have.
    pub fn read(dir: &Path) -> Result<Self, ModelError> {
        Ok(files::read(dir, Head::OfFile)?.0)
    }

    /// Patches along a side of an image of `image_size`; zero for patches of no size, which [`check`](Self::check) refuses.
    pub fn grid(&self) -> usize {
        self.image_size.checked_div(self.patch_size).unwrap_or(0)
    }

    /// Refuses values that no model can have.
    ///
    /// # Errors
    /// [`ModelError::Config`] naming the field.
    pub fn check(&self) -> Result<(), ModelError> {
        let refuse = |why: String| Err(ModelError::Config(why));
        for (field, size) in [
            ("hidden_size", self.hidden_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("intermediate_size", self.intermediate_size),
            ("image_size", self.image_size),
            ("patch_size", self.patch_size),
            ("num_channels", self.num_channels),
        ] {
            if size == 0 {
                return refuse(format!("{field} is zero"));
            }
            // So that the products below cannot overflow.
            if u32::try_from(size).is_err() {
                return refuse(format!("{field} {size} is larger than any model's"));
            }
        }
        if self.num_hidden_layers > MOST {
            let layers = self.num_hidden_layers;
            return refuse(format!("num_hidden_layers {layers} is more than {MOST}"));
        }
        let patch = self.patch_size.checked_mul(self.patch_size);
        if patch
            .and_then(|p| p.checked_mul(self.num_channels))
            .is_none()
        {
            return refuse(format!(
                "patch_size {} is larger than any model's",
                self.patch_size
            ));
        }
        if !self.hidden_size.is_multiple_of(self.num_attention_heads) {
            return refuse(format!(
                "num_attention_heads {} does not divide hidden_size {}",
                self.num_attention_heads, self.hidden_size
            ));
        }
        if !self.image_size.is_multiple_of(self.patch_size) {
            return refuse(format!(
                "patch_size {} does not divide image_size {}",
                self.patch_size, self.image_size
            ));
        }
        let attention = self.attention_probs_dropout_prob;
        for (field, rate) in [
            ("hidden_dropout_prob", self.hidden_dropout_prob),
            ("attention_probs_dropout_prob", attention),
        ] {
            if !(0.0..1.0).contains(&rate) {
                return refuse(format!("{field} {rate} is not in [0, 1)"));
            }
        }
        for (field, value) in [
            ("layer_norm_eps", self.layer_norm_eps),
            ("initializer_range", self.initializer_range),
        ] {
            if !(value > 0.0 && value.is_finite()) {
                return refuse(format!("{field} {value} is not positive"));
            }
        }
        match self.layer_scale {
            Some(value) if !value.is_finite() => refuse(format!("layer_scale is {value}")),
            _ => Ok(()),
        }
    }
}

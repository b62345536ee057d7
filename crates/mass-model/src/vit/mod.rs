//! Vision transformers (Dosovitskiy and others, arXiv 2010.11929) for classifying images, with mixtures of experts for
//! any of their feed-forward networks: ViT, DeiT and DINOv2, from Hugging Face's files or timm's.
//!
//! ```text
//! x_0 = [class; patches Wᵀ + b] + positions
//! h_l = x_{l-1} + scale1 ⊙ attention(norm1(x_{l-1}))
//! x_l = h_l + scale2 ⊙ mlp(norm2(h_l))                 (the scales in models with layer scale)
//! logits = head(norm(x_L of the class token))
//! ```
//!
//! Images are `[batch, channels, height, width]`, normalised as the model was pretrained with; any height and width that
//! the patch divides will do. Position embeddings are fitted to other sizes than the configuration's by bicubic
//! interpolation ([`Resampling`]), as PyTorch's `interpolate(mode="bicubic", align_corners=False)` does.
//!
//! # A frozen trunk
//! [`features`](VitClassifier::features) computes what leaves the first blocks, once; training passes then start from
//! [`ImageBatch::Features`], and the optimiser updates [`trainable`](VitClassifier::trainable).
//!
//! # Names of parameters
//! `embeddings.patch.{weight,bias}`, `embeddings.class`, `embeddings.positions`; for each block
//! `blocks.L.norm1.{weight,bias}`, `blocks.L.attention.{qkv,out}.{weight,bias}`, `blocks.L.scale1`,
//! `blocks.L.norm2.{weight,bias}`, `blocks.L.ffn.{fc1,fc2}.{weight,bias}`, or in a mixture
//! `blocks.L.moe.experts.E.{gate,fc1.weight,...}`, and `blocks.L.scale2`; `norm.{weight,bias}`, `head.{weight,bias}`.
//! Matrices decay, gate rows too; biases, norms, layer scales, the class token and position embeddings do not.
//!
//! ```
//! use mass_model::vit::{ImageBatch, VitClassifier, VitConfig};
//! use mass_model::optim::{AdamW, AdamWConfig};
//! use mass_model::seeded_rng;
//! use mass_routing::{Combine, RouterConfig};
//!
//! let config = VitConfig { hidden_size: 8, num_hidden_layers: 3, num_attention_heads: 2, intermediate_size: 16,
//!     image_size: 8, patch_size: 4, ..VitConfig::default() };
//! let mut rng = seeded_rng(0);
//! let mut model = VitClassifier::new(&config, 5, &mut rng)?;
//! model.convert(2, 4, RouterConfig::TopP { p: 0.3, combine: Combine::Renormalised }, &mut rng)?;
//!
//! // Two images of 8 x 12 pixels. The first two blocks stay as they are.
//! let pixels: Vec<f32> = (0..2 * 3 * 8 * 12).map(|i| (i as f32 * 0.1).sin()).collect();
//! let rows = model.features(&pixels, (8, 12), 2)?;
//! let batch = ImageBatch::Features { rows: &rows, tokens: model.tokens((8, 12))?, blocks: 2 };
//! let mut pass = model.train_pass(batch, &[3, 1], None)?;
//! let mut optimizer = AdamW::new(AdamWConfig::default())?;
//! optimizer.step(&mut model.trainable(2)?, &mut pass.gradients, 1e-3)?;
//! let after = model.losses(batch, &[3, 1], None)?;
//! assert!((after[0] + after[1]) / 2.0 < pass.loss);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod block;
mod config;
mod files;
mod pass;
mod patches;
mod trainable;

use std::collections::BTreeMap;
use std::path::Path;

use rand_chacha::ChaCha8Rng;

pub use crate::encoder::ClassifierConfig;
use crate::encoder::classifier;
pub use config::{Resampling, VitConfig};
pub use trainable::Trainable;

use crate::error::ModelError;
use crate::nn::{LayerNorm, Linear};
use crate::param::{Param, draw};
use crate::pretrained::{Drawn, Head, Kind, Source, Stored, Weights};
use crate::{mixtures, parameters};
use block::VitBlock;

/// What a model is given: images, or what a frozen trunk made of them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ImageBatch<'a> {
    /// Images, all of one size.
    Pixels {
        /// `[batch, channels, height, width]`
        pixels: &'a [f32],
        /// Height and width in pixels.
        size: (usize, usize),
    },
    /// What left the first blocks.
    Features {
        /// `[batch * tokens, d]`, from [`VitClassifier::features`].
        rows: &'a [f32],
        /// Number of tokens of an image, with the class token.
        tokens: usize,
        /// How many blocks they left.
        blocks: usize,
    },
}

/// A vision transformer with a linear head on the class token.
#[derive(Clone, Debug)]
pub struct VitClassifier {
    patch: Linear,
    class: Param,
    positions: Param,
    blocks: Vec<VitBlock>,
    norm: LayerNorm,
    head: Linear,
    config: ClassifierConfig<VitConfig>,
}

impl VitClassifier {
    /// A model with freshly drawn weights: matrices, class token and positions from N(0, `initializer_range`²), biases zero,
    /// norms one, layer scales as configured.
    ///
    /// # Errors
    /// [`ModelError::Config`] for sizes and rates that no model can have.
    pub fn new(
        config: &VitConfig,
        classes: usize,
        rng: &mut ChaCha8Rng,
    ) -> Result<Self, ModelError> {
        let std = config.initializer_range;
        draw(rng, |rng| {
            Self::build(config, classes, &mut Drawn { std, rng })
        })
    }

    /// Reads `config.json` and the weights of a folder; see [`VitConfig::read`] and [`pretrained`](crate::pretrained).
    ///
    /// Names may begin with `vit.` or `dinov2.`, or not. The head is drawn as by [`new`](Self::new) if the file has none.
    /// Poolers, and the mask tokens and decoders of masked-image pretraining, are passed over.
    ///
    /// # Errors
    /// [`ModelError::Io`] naming the file; [`ModelError::Checkpoint`] naming file and field or tensor, if a field has a
    /// wrong value or makes another model (see [`VitConfig::read`]), or if a tensor is missing, of another shape or type, not
    /// finite, or has no place in the model; [`ModelError::Config`] if there is no class.
    pub fn load(dir: &Path, classes: usize, rng: &mut ChaCha8Rng) -> Result<Self, ModelError> {
        Self::load_with(dir, classes, Head::OfFile, rng)
    }

    /// As [`load`](Self::load), with a head that is drawn whatever the file has: a classifier of ImageNet becomes one of other
    /// classes. What the configuration says of the old head's problem is passed over with it.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_with_new_head(
        dir: &Path,
        classes: usize,
        rng: &mut ChaCha8Rng,
    ) -> Result<Self, ModelError> {
        Self::load_with(dir, classes, Head::New, rng)
    }

    fn load_with(
        dir: &Path,
        classes: usize,
        head: Head,
        rng: &mut ChaCha8Rng,
    ) -> Result<Self, ModelError> {
        let (config, layout) = files::read(dir, head)?;
        let weights = Weights::open(dir)?;
        let std = config.initializer_range;
        let parts = |name: &str, shape: &[usize]| files::parts(&config, layout, name, shape);
        let drawn = Drawn { std, rng };
        let (spellings, optional) = (&files::spellings, &files::optional);
        let mut source = Stored::new(&weights, &parts, spellings, optional, drawn, head);
        let model = Self::build(&config, classes, &mut source)?;
        source.nothing_left(|tensor| {
            files::belongs(layout, tensor) && !(head == Head::New && files::is_head(layout, tensor))
        })?;
        Ok(model)
    }

    /// Replaces the head by a freshly drawn one for as many classes.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn draw_head(&mut self, rng: &mut ChaCha8Rng) -> Result<(), ModelError> {
        let (std, d) = (self.config().initializer_range, self.config().hidden_size);
        self.head = Drawn { std, rng }.linear("head", d, self.classes(), true)?;
        Ok(())
    }

    fn build(
        config: &VitConfig,
        classes: usize,
        source: &mut dyn Source,
    ) -> Result<Self, ModelError> {
        config.check()?;
        if classes == 0 {
            return Err(ModelError::Config("a classifier needs a class".into()));
        }
        let (d, side, grid) = (config.hidden_size, config.patch_size, config.grid());
        let pixels = config.num_channels * side * side;
        let places = [1 + grid * grid, d];
        Ok(Self {
            patch: source.linear("embeddings.patch", pixels, d, true)?,
            class: source.param("embeddings.class", &[d], Kind::Token)?,
            positions: source.param("embeddings.positions", &places, Kind::Token)?,
            blocks: (0..config.num_hidden_layers)
                .map(|b| VitBlock::new(config, &format!("blocks.{b}"), source))
                .collect::<Result<_, _>>()?,
            norm: source.norm("norm", d, config.layer_norm_eps)?,
            head: source.linear("head", d, classes, true)?,
            config: ClassifierConfig {
                encoder: config.clone(),
                outputs: classes,
                mixtures: BTreeMap::new(),
            },
        })
    }

    /// The configuration that the model was made with.
    pub fn config(&self) -> &VitConfig {
        &self.config.encoder
    }

    /// Number of classes.
    pub fn classes(&self) -> usize {
        self.config.outputs
    }

    /// The parameters above the first `blocks` blocks: what is trained on [`ImageBatch::Features`].
    ///
    /// # Errors
    /// [`ModelError::Config`] if there are fewer blocks, or one of the first is a mixture.
    pub fn trainable(&mut self, blocks: usize) -> Result<Trainable<'_>, ModelError> {
        self.check_frozen(blocks)?;
        Ok(Trainable {
            model: self,
            blocks,
        })
    }
}

parameters!(VitClassifier {
    patch as "embeddings.patch",
    class as "embeddings.class",
    positions as "embeddings.positions",
    blocks,
    norm,
    head,
});
mixtures!(VitClassifier { blocks });

classifier!(VitClassifier, VitConfig, "vision transformer", blocks "block");

impl VitClassifier {
    /// Values outside the blocks and the head.
    fn outer_values(c: &VitConfig) -> Option<u64> {
        let side = c.patch_size as u64;
        let grid = c.image_size.checked_div(c.patch_size)? as u64;
        let pixels = side.checked_mul(side)?.checked_mul(c.num_channels as u64)?;
        let rows = grid.checked_mul(grid)?.checked_add(pixels)?;
        rows.checked_mul(c.hidden_size as u64)
    }
}

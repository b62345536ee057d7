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

use mass_routing::RouterConfig;
use rand_chacha::ChaCha8Rng;

pub use crate::encoder::ClassifierConfig;
pub use config::{Resampling, VitConfig};
pub use trainable::Trainable;

use crate::checkpoint::Checkpointed;
use crate::encoder::check_mixtures;
use crate::error::ModelError;
use crate::growth::Mixtures;
use crate::nn::{LayerNorm, Linear, MoeConfig, MoeLayer};
use crate::param::{Param, Parameters, join};
use crate::pretrained::{Blank, Drawn, Head, Kind, Source, Stored, Weights};
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
        Self::build(config, classes, &mut Drawn { std, rng })
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

    /// Makes the feed-forward network of a block, counted from zero, a mixture whose experts are copies of it, with a gate
    /// drawn at random. With weights that sum to one the outputs are at first the same.
    ///
    /// # Errors
    /// [`ModelError::Config`] if there is no such block, it is a mixture already, or `experts` is zero;
    /// [`ModelError::Routing`] if the router's parameters are not valid.
    pub fn convert(
        &mut self,
        block: usize,
        experts: usize,
        router: RouterConfig,
        rng: &mut ChaCha8Rng,
    ) -> Result<(), ModelError> {
        let VitConfig {
            hidden_size,
            intermediate_size,
            hidden_act,
            ..
        } = self.config.encoder;
        let config = MoeConfig::new(hidden_size, intermediate_size, experts, hidden_act, router);
        self.convert_to(block, &config, rng)
    }

    /// As [`convert`](Self::convert), with any gate and routing losses. The sizes and the activation must be the network's.
    ///
    /// # Errors
    /// As [`convert`](Self::convert); [`ModelError::Config`] for a mixture that the network cannot become.
    pub fn convert_to(
        &mut self,
        block: usize,
        mixture: &MoeConfig,
        rng: &mut ChaCha8Rng,
    ) -> Result<(), ModelError> {
        let blocks = self.blocks.len();
        let Some(found) = self.blocks.get_mut(block) else {
            let what = format!("there is no block {block}, there are {blocks}");
            return Err(ModelError::Config(what));
        };
        found.mlp.convert(mixture, rng)?;
        self.config.mixtures.insert(block, mixture.clone());
        Ok(())
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

    fn blocks_with_mixture(&self) -> impl Iterator<Item = (usize, &MoeLayer)> {
        let blocks = self.blocks.iter().enumerate();
        blocks.filter_map(|(b, block)| Some((b, block.mlp.mixture()?)))
    }
}

impl Parameters for VitClassifier {
    fn visit<'a>(&'a self, prefix: &str, f: &mut dyn FnMut(String, &'a Param)) {
        self.patch.visit(&join(prefix, "embeddings.patch"), f);
        f(join(prefix, "embeddings.class"), &self.class);
        f(join(prefix, "embeddings.positions"), &self.positions);
        for (b, block) in self.blocks.iter().enumerate() {
            block.visit(&join(prefix, &format!("blocks.{b}")), f);
        }
        self.norm.visit(&join(prefix, "norm"), f);
        self.head.visit(&join(prefix, "head"), f);
    }

    fn visit_mut(&mut self, prefix: &str, f: &mut dyn FnMut(String, &mut Param)) {
        self.patch.visit_mut(&join(prefix, "embeddings.patch"), f);
        f(join(prefix, "embeddings.class"), &mut self.class);
        f(join(prefix, "embeddings.positions"), &mut self.positions);
        for (b, block) in self.blocks.iter_mut().enumerate() {
            block.visit_mut(&join(prefix, &format!("blocks.{b}")), f);
        }
        self.norm.visit_mut(&join(prefix, "norm"), f);
        self.head.visit_mut(&join(prefix, "head"), f);
    }
}

/// Mixture layers are counted among themselves, bottom first.
impl Mixtures for VitClassifier {
    fn mixtures(&self) -> usize {
        self.blocks_with_mixture().count()
    }

    fn mixture(&self, layer: usize) -> &MoeLayer {
        let found = self.blocks_with_mixture().nth(layer);
        found.expect("a mixture layer of the model").1
    }

    fn mixture_mut(&mut self, layer: usize) -> &mut MoeLayer {
        let blocks = self.blocks.iter_mut();
        let mut mixtures = blocks.filter_map(|b| b.mlp.mixture_mut());
        mixtures.nth(layer).expect("a mixture layer of the model")
    }

    fn mixture_name(&self, layer: usize) -> String {
        let found = self.blocks_with_mixture().nth(layer);
        let (index, _) = found.expect("a mixture layer of the model");
        format!("blocks.{index}.moe")
    }
}

impl Checkpointed for VitClassifier {
    const KIND: &'static str = "vision transformer";
    type Config = ClassifierConfig<VitConfig>;

    fn checkpoint_config(&self) -> &Self::Config {
        &self.config
    }

    fn from_checkpoint_config(config: &Self::Config) -> Result<Self, ModelError> {
        let mut model = Self::build(&config.encoder, config.outputs, &mut Blank)?;
        for (&block, mixture) in &config.mixtures {
            model.convert_to(block, mixture, &mut crate::seeded_rng(0))?;
        }
        Ok(model)
    }

    fn check_config(&self) -> Result<(), ModelError> {
        check_mixtures(self, self.config.mixtures.values())
    }

    fn values_at_least(config: &Self::Config) -> Option<u64> {
        let c = &config.encoder;
        let (d, hidden) = (c.hidden_size, c.intermediate_size);
        let layers = config.layers_at_least(c.num_hidden_layers, d, hidden)?;
        let (side, grid) = (
            c.patch_size as u64,
            c.image_size.checked_div(c.patch_size)? as u64,
        );
        let pixels = side.checked_mul(side)?.checked_mul(c.num_channels as u64)?;
        let rows = grid.checked_mul(grid)?.checked_add(pixels)?;
        layers.checked_add(rows.checked_mul(d as u64)?)
    }
}

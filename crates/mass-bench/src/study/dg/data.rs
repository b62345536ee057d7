//! A set of images as a model takes it in: pixels, or what the frozen blocks made of them.

use mass_model::vit::{ImageBatch, VitClassifier};

use crate::BenchError;
use crate::dg::augment::Augment;
use crate::dg::features::{Features, pixels};
use crate::dg::images::DomainImages;
use crate::rng::{Purpose, stream};

/// Images, and the trunk that is the same in every run.
pub struct Set {
    pub(super) name: String,
    pub(super) images: DomainImages,
    /// Of the images.
    pub(super) digest: u64,
    /// The model as it was read, whose first `frozen` blocks no run changes.
    pub(super) base: VitClassifier,
    pub(super) frozen: usize,
    /// Of every image; `None` where the trunk is computed with each batch, or nothing is frozen.
    pub(super) features: Option<Features>,
    pub(super) augment: Option<Augment>,
    /// Tokens of an image, with the class token.
    pub(super) tokens: usize,
    /// Threshold of the alignment test that the paper gives for this set.
    pub(super) delta: f64,
}

/// A batch of images, ready for a model.
pub struct Input {
    values: Vec<f32>,
    pub(super) classes: Vec<u32>,
}

impl Set {
    /// Some images as they are.
    pub(super) fn plain(&self, which: &[usize]) -> Result<Input, BenchError> {
        let values = match &self.features {
            Some(features) => features.rows(which),
            None => self.through_trunk(pixels(&self.images, which))?,
        };
        Ok(self.input(values, which))
    }

    /// Some images for training, augmented if that is set: a function of them, seed and step alone.
    pub(super) fn training(
        &self,
        which: &[usize],
        seed: u64,
        step: u64,
    ) -> Result<Input, BenchError> {
        let Some(augment) = &self.augment else {
            return self.plain(which);
        };
        let size = self.images.size;
        let mut values = Vec::with_capacity(which.len() * size * size * 3);
        let mut rng = stream(seed, Purpose::Training, step);
        for &image in which {
            let (pixels, aspect) = (self.images.pixels(image), self.images.aspect(image));
            augment.apply(pixels, size, aspect, &mut rng, &mut values);
        }
        let values = self.through_trunk(values)?;
        Ok(self.input(values, which))
    }

    fn input(&self, values: Vec<f32>, which: &[usize]) -> Input {
        Input {
            values,
            classes: which.iter().map(|&i| self.images.class(i)).collect(),
        }
    }

    fn through_trunk(&self, pixels: Vec<f32>) -> Result<Vec<f32>, BenchError> {
        if self.frozen == 0 {
            return Ok(pixels);
        }
        let features = self.base.features(&pixels, self.pixels(), self.frozen);
        features.map_err(|e| BenchError::failed("computing the frozen blocks", e))
    }

    fn pixels(&self) -> (usize, usize) {
        (self.images.size, self.images.size)
    }

    /// An input as the model's.
    pub(super) fn batch<'a>(&self, input: &'a Input) -> ImageBatch<'a> {
        if self.frozen == 0 {
            return ImageBatch::Pixels {
                pixels: &input.values,
                size: self.pixels(),
            };
        }
        ImageBatch::Features {
            rows: &input.values,
            tokens: self.tokens,
            blocks: self.frozen,
        }
    }
}

//! What a frozen trunk makes of every image of a set, computed once.

use std::cell::Cell;
use std::io::{Read, Write};
use std::path::Path;

use mass_model::vit::{VitClassifier, VitConfig};
use mass_model::{ModelError, Parameters};
use serde::{Deserialize, Serialize};

use super::augment::normalise;
use super::images::DomainImages;
use super::{DgError, cache};
use crate::BenchError;
use crate::fnv::Fnv;

/// Goes up when the model computes something else with the same weights, so that features kept before are not used.
const COMPUTATION: u32 = 1;

/// Images that pass the trunk at a time.
const BATCH: usize = 32;

/// Refuses a model of other images than those of red, green and blue.
pub(crate) fn check_channels(model: &VitConfig) -> Result<(), ModelError> {
    match model.num_channels {
        3 => Ok(()),
        channels => Err(ModelError::Config(format!(
            "a model of images with {channels} channels; these have three"
        ))),
    }
}

/// Rows of features of every image.
#[derive(Debug, Clone, PartialEq)]
pub struct Features {
    /// Tokens of an image, with the class token.
    pub tokens: usize,
    /// Width d of a token.
    pub dim: usize,
    /// Number of blocks that they have left.
    pub blocks: usize,
    /// Whether they were read from the cache.
    pub from_cache: bool,
    rows: Vec<f32>,
}

/// What the file of features begins with.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Header {
    images: usize,
    tokens: usize,
    dim: usize,
    blocks: usize,
    set: u64,
    trunk: u64,
}

impl Header {
    fn of(model: &VitClassifier, images: &DomainImages, blocks: usize) -> Result<Self, BenchError> {
        Ok(Self {
            images: images.len(),
            tokens: tokens(model, images)?,
            dim: model.config().hidden_size,
            blocks,
            set: images.digest(),
            trunk: trunk_digest(model, blocks),
        })
    }

    fn values(&self) -> Option<usize> {
        let image = self.tokens.checked_mul(self.dim)?;
        image.checked_mul(self.images)
    }
}

/// Tokens of one image of a set.
fn tokens(model: &VitClassifier, images: &DomainImages) -> Result<usize, BenchError> {
    let tokens = model.tokens((images.size, images.size));
    tokens.map_err(|e| BenchError::failed("cutting images into patches", e))
}

impl Features {
    /// Bytes that the features of a set take, in memory and on disk.
    ///
    /// # Errors
    /// [`BenchError::Failed`] for images that are not made of the model's patches.
    pub fn bytes(model: &VitClassifier, images: &DomainImages) -> Result<u64, BenchError> {
        let tokens = tokens(model, images)? as u64;
        Ok(tokens * model.config().hidden_size as u64 * images.len() as u64 * 4)
    }

    /// The features of every image after the first `blocks` blocks, from `dir` if they are there, else computed on all threads
    /// and kept there. `progress` is told how many images are done; it returns whether to go on.
    ///
    /// The file is named after digests of the [images](DomainImages::digest) and of the trunk's configuration and weights. One that is damaged is replaced.
    ///
    /// # Errors
    /// [`BenchError`]: a model of other than three channels, its own errors, a cache that cannot be written; `Ok(None)` when told to stop.
    pub fn compute(
        model: &VitClassifier,
        images: &DomainImages,
        blocks: usize,
        dir: Option<&Path>,
        progress: &mut dyn FnMut(u64) -> bool,
    ) -> Result<Option<Self>, BenchError> {
        check_channels(model.config())
            .map_err(|e| BenchError::failed("computing the frozen blocks", e))?;
        let header = Header::of(model, images, blocks)?;
        let Some(values) = header.values() else {
            return Err(BenchError::Usage(
                "features of so many images do not fit".into(),
            ));
        };
        let (set, trunk) = (header.set, header.trunk);
        let path = dir.map(|d| d.join(format!("features-{blocks}-{set:016x}-{trunk:016x}.f32")));
        let found = path.as_deref().and_then(|path| stored(path, &header).ok()?);
        let (rows, from_cache) = match found {
            Some(rows) => (rows, true),
            None => {
                let Some(rows) = computed(model, images, blocks, values, progress)? else {
                    return Ok(None);
                };
                if let Some(path) = &path {
                    let fill = |file: &mut dyn Write| {
                        // In pieces: a second copy of everything would be a gigabyte.
                        rows.chunks(1 << 16).try_for_each(|piece| {
                            let bytes: Vec<u8> =
                                piece.iter().flat_map(|x| x.to_le_bytes()).collect();
                            file.write_all(&bytes)
                        })
                    };
                    cache::write(path, &header, fill).map_err(DgError::cache(path))?;
                }
                (rows, false)
            }
        };
        Ok(Some(Self {
            tokens: header.tokens,
            dim: header.dim,
            blocks,
            from_cache,
            rows,
        }))
    }

    /// The rows of some images, one after another: `[images * tokens, d]`.
    #[must_use]
    pub fn rows(&self, images: &[usize]) -> Vec<f32> {
        let image = self.tokens * self.dim;
        let mut rows = Vec::with_capacity(images.len() * image);
        for &i in images {
            rows.extend_from_slice(&self.rows[i * image..][..image]);
        }
        rows
    }
}

fn computed(
    model: &VitClassifier,
    images: &DomainImages,
    blocks: usize,
    values: usize,
    progress: &mut dyn FnMut(u64) -> bool,
) -> Result<Option<Vec<f32>>, BenchError> {
    let failed = |e| BenchError::failed("computing the features of the frozen blocks", e);
    let all: Vec<usize> = (0..images.len()).collect();
    let mut rows = Vec::with_capacity(values);
    for which in all.chunks(BATCH) {
        let pixels = pixels(images, which);
        let size = (images.size, images.size);
        rows.extend(model.features(&pixels, size, blocks).map_err(failed)?);
        if !progress(which.len() as u64) {
            return Ok(None);
        }
    }
    Ok(Some(rows))
}

/// Normalised pixels of some images, `[images, 3, size, size]`.
#[must_use]
pub fn pixels(images: &DomainImages, which: &[usize]) -> Vec<f32> {
    let mut pixels = Vec::with_capacity(which.len() * images.size * images.size * 3);
    for &i in which {
        normalise(images.pixels(i), &mut pixels);
    }
    pixels
}

/// Of the configuration, and of the values of everything below block `blocks`.
fn trunk_digest(model: &VitClassifier, blocks: usize) -> u64 {
    let mut digest = Fnv::default();
    // Heads, activation and epsilon are in no weight.
    digest.eat(format!("{COMPUTATION} {:?}", model.config()).as_bytes());
    model.visit("", &mut |name, param| {
        let block = name
            .strip_prefix("blocks.")
            .and_then(|rest| rest.split('.').next());
        let block: Option<usize> = block.and_then(|b| b.parse().ok());
        if name.starts_with("embeddings.") || block.is_some_and(|b| b < blocks) {
            digest.eat(name.as_bytes());
            for value in param.values() {
                digest.eat(&value.to_le_bytes());
            }
        }
    });
    digest.0
}

fn stored(path: &Path, expected: &Header) -> Result<Option<Vec<f32>>, String> {
    let values = Cell::new(0);
    let fits = |header: &Header| {
        let n = header.values().filter(|_| header == expected);
        let n = n.ok_or_else(|| "it is of other features".to_owned())?;
        values.set(n);
        u64::try_from(n * 4).map_err(|e| e.to_string())
    };
    let take = |file: &mut dyn Read| {
        let mut rows = Vec::with_capacity(values.get());
        let mut piece = vec![0; 1 << 18];
        while rows.len() < values.get() {
            let bytes = piece.len().min((values.get() - rows.len()) * 4);
            file.read_exact(&mut piece[..bytes])?;
            let numbers = piece[..bytes].chunks_exact(4);
            rows.extend(numbers.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])));
        }
        Ok(rows)
    };
    Ok(cache::read(path, fits, take)?.map(|(_, rows)| rows))
}

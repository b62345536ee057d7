//! Forward and training passes.

use dfdx::prelude::{NoneTape, OwnedTape};

use super::patches::{interpolation, patch_grid, patch_rows};
use super::{ImageBatch, VitClassifier};
use crate::encoder::{Course, Wanted};
use crate::error::ModelError;
use crate::kernels::dropout::DropoutKeys;
use crate::kernels::scratch::Scratch;
use crate::mixtures::{Mixtures, attempt, check_masked};
use crate::ops::{Activations, Host, Pass, ROW, Sequences, Training};
use crate::pass::{LayerTrace, Masked, TrainPass, numbers};
use crate::place::{Place, PlacedGradients};

/// Rows, the number of tokens of an image, and the block they are the input of.
struct Entered<R> {
    rows: R,
    tokens: usize,
    block: usize,
}

/// Hidden states, with the number of tokens of an image.
struct Encoded<R> {
    states: R,
    tokens: usize,
}

impl VitClassifier {
    /// Tokens with their positions, and their number for an image.
    fn embed<P: Pass>(
        &self,
        pass: &mut P,
        pixels: &[f32],
        size: (usize, usize),
        course: &mut Course<'_>,
    ) -> Result<(P::Rows, usize), ModelError> {
        let side = self.config.encoder.patch_size;
        let (rows, shape) = patch_rows(pixels, self.config.encoder.num_channels, size, side)?;
        let grid = (size.0 / side, size.1 / side);
        let rows = pass.constant(rows, shape)?;
        let embedded = self.patch.run(pass, rows)?;
        let config = &self.config.encoder;
        let taps = interpolation(config.grid(), grid, config.position_resampling);
        let x = pass.assemble(embedded, &self.class, &self.positions, taps)?;
        let rate = config.hidden_dropout_prob;
        let x = pass.dropout(x, course.dropout(rate)?)?;
        Ok((x, 1 + grid.0 * grid.1))
    }

    /// Where a batch enters the model.
    fn enter<P: Pass>(
        &self,
        pass: &mut P,
        batch: ImageBatch<'_>,
        course: &mut Course<'_>,
    ) -> Result<Entered<P::Rows>, ModelError> {
        let (rows, tokens, blocks) = match batch {
            ImageBatch::Pixels { pixels, size } => {
                let (rows, tokens) = self.embed(pass, pixels, size, course)?;
                return Ok(Entered {
                    rows,
                    tokens,
                    block: 0,
                });
            }
            ImageBatch::Features {
                rows,
                tokens,
                blocks,
            } => (rows, tokens, blocks),
        };
        self.check_frozen(blocks)?;
        let d = self.config.encoder.hidden_size;
        let image = tokens.checked_mul(d).filter(|&n| n > 0);
        if rows.is_empty() || !image.is_some_and(|n| rows.len().is_multiple_of(n)) {
            return Err(ModelError::shape(
                "features",
                &[1, tokens, d],
                &[rows.len()],
            ));
        }
        if let Some(i) = rows.iter().position(|x| !x.is_finite()) {
            return Err(ModelError::NonFinite(format!("feature value {i}")));
        }
        Ok(Entered {
            rows: pass.constant(Scratch::copy_of(rows), (rows.len() / d, d))?,
            tokens,
            block: blocks,
        })
    }

    /// Refuses a number of blocks to leave out that is not there, or that would leave out a mixture: its trace would be
    /// missing and the others' numbers change.
    pub(super) fn check_frozen(&self, blocks: usize) -> Result<(), ModelError> {
        let all = self.blocks.len();
        if blocks > all {
            let what = format!("the first {blocks} blocks are asked for, there are {all}");
            return Err(ModelError::Config(what));
        }
        let mut frozen = self.blocks[..blocks].iter();
        match frozen.position(|b| b.mlp.mixture().is_some()) {
            Some(block) => Err(ModelError::Config(format!(
                "block {block} is a mixture and cannot be among the first {blocks} left out"
            ))),
            None => Ok(()),
        }
    }

    fn encode<P: Pass>(
        &self,
        pass: &mut P,
        entered: Entered<P::Rows>,
        until: usize,
        wanted: Wanted,
        course: &mut Course<'_>,
        observe: &mut dyn FnMut(&P::Rows),
    ) -> Result<Encoded<P::Rows>, ModelError> {
        check_masked(course.masked, self.mixtures())?;
        let Entered {
            rows: mut x,
            tokens,
            block: first,
        } = entered;
        let sequences = Sequences::uniform(pass.shape(&x).0 / tokens, tokens)?;
        let starts: Option<&[usize]> = match wanted {
            Wanted::Every => None,
            Wanted::First => Some(&sequences.offsets()[..sequences.len()]),
        };
        let blocks = self.blocks.get(first..until).unwrap_or_default();
        for (i, block) in blocks.iter().enumerate() {
            observe(&x);
            let keep = starts.filter(|_| i + 1 == blocks.len());
            x = block.run(pass, x, &sequences, keep, course)?;
        }
        x = pass.pick_some(x, starts.filter(|_| blocks.is_empty()))?;
        observe(&x);
        Ok(Encoded { states: x, tokens })
    }

    /// Logits `[batch, classes]`, and the number of tokens of an image.
    fn forward<P: Pass>(
        &self,
        pass: &mut P,
        batch: ImageBatch<'_>,
        course: &mut Course<'_>,
    ) -> Result<Encoded<P::Rows>, ModelError> {
        let entered = self.enter(pass, batch, course)?;
        let (all, first) = (self.blocks.len(), Wanted::First);
        let encoded = self.encode(pass, entered, all, first, course, &mut |_| {})?;
        let class = self.norm.run(pass, encoded.states)?;
        Ok(Encoded {
            states: self.head.run(pass, class)?,
            ..encoded
        })
    }

    /// What leaves the first `until` blocks, without dropout and without a tape.
    fn states(
        &self,
        batch: ImageBatch<'_>,
        until: usize,
        observe: &mut dyn FnMut(&Activations),
    ) -> Result<Activations, ModelError> {
        let (mut pass, every) = (Host(NoneTape), Wanted::Every);
        let course = &mut Course::default();
        let entered = self.enter(&mut pass, batch, course)?;
        let encoded = self.encode(&mut pass, entered, until, every, course, observe)?;
        Ok(encoded.states)
    }

    /// The tokens that enter the first block and the output of each block, `[batch * tokens, d]` each, without dropout.
    ///
    /// # Errors
    /// As [`logits`](Self::logits).
    pub fn hidden_states(&self, batch: ImageBatch<'_>) -> Result<Vec<Vec<f32>>, ModelError> {
        let mut states = Vec::new();
        let mut observe = |x: &Activations| states.push(x.to_vec());
        self.states(batch, self.blocks.len(), &mut observe)?;
        Ok(states)
    }

    /// The output of the last block after the final norm, `[batch * tokens, d]`, without dropout.
    ///
    /// # Errors
    /// As [`logits`](Self::logits).
    pub fn encoded(&self, batch: ImageBatch<'_>) -> Result<Vec<f32>, ModelError> {
        let states = self.states(batch, self.blocks.len(), &mut |_| {})?;
        Ok(self.norm.run(&mut Host(NoneTape), states)?.to_vec())
    }

    /// What leaves the first `blocks` blocks, `[batch * tokens, d]`, without dropout and without a tape: the features of a
    /// frozen trunk, to be kept and given to the later blocks as [`ImageBatch::Features`].
    ///
    /// # Errors
    /// As [`logits`](Self::logits); [`ModelError::Config`] if there are fewer blocks, or one of them is a mixture.
    pub fn features(
        &self,
        pixels: &[f32],
        size: (usize, usize),
        blocks: usize,
    ) -> Result<Vec<f32>, ModelError> {
        self.check_frozen(blocks)?;
        let batch = ImageBatch::Pixels { pixels, size };
        let states = self.states(batch, blocks, &mut |_| {})?;
        Ok(states.to_vec())
    }

    /// Number of tokens of an image of this height and width, with the class token.
    ///
    /// # Errors
    /// [`ModelError::Config`] if the patch does not divide them, or there is no patch.
    pub fn tokens(&self, size: (usize, usize)) -> Result<usize, ModelError> {
        let (rows, cols) = patch_grid(size, self.config.encoder.patch_size)?;
        let patches = rows.checked_mul(cols).and_then(|n| n.checked_add(1));
        patches.ok_or_else(|| {
            ModelError::Config(format!(
                "images of {} x {} do not fit into memory",
                size.0, size.1
            ))
        })
    }

    /// Mean cross-entropy over the images of a batch, nats, and its gradients; without `dropout` nothing is dropped.
    ///
    /// From [`ImageBatch::Features`] only the later blocks, the final norm and the head have gradients: update them alone,
    /// through [`trainable`](Self::trainable). In `token_losses` each row has the loss of its image.
    ///
    /// # Errors
    /// As [`losses`](Self::losses), and [`ModelError::NonFinite`] if the loss is not a number.
    pub fn train_pass(
        &self,
        batch: ImageBatch<'_>,
        classes: &[u32],
        dropout: Option<&mut DropoutKeys>,
    ) -> Result<TrainPass, ModelError> {
        self.train(Host(OwnedTape::default()), batch, classes, dropout)
    }

    /// [`train_pass`](Self::train_pass) on a device, where parameters, gradients and all that is between them stay.
    ///
    /// # Errors
    /// As there; [`ModelError::Cuda`] if the device's memory does not suffice, or it has failed.
    #[cfg(feature = "cuda")]
    pub fn train_pass_on(
        &self,
        device: &mass_cuda::Device,
        batch: ImageBatch<'_>,
        classes: &[u32],
        dropout: Option<&mut DropoutKeys>,
    ) -> Result<TrainPass<crate::ops::CudaGradients>, ModelError> {
        self.train(crate::ops::Cuda::training(device), batch, classes, dropout)
    }

    fn train<P: Training>(
        &self,
        mut pass: P,
        batch: ImageBatch<'_>,
        classes: &[u32],
        dropout: Option<&mut DropoutKeys>,
    ) -> Result<TrainPass<P::Gradients>, ModelError> {
        attempt(self, dropout, |dropout| {
            let mut course = Course::dropping(dropout);
            let logits = self.forward(&mut pass, batch, &mut course)?;
            let (loss, losses) = pass.cross_entropy(logits.states, classes)?;
            let rows = losses
                .into_iter()
                .flat_map(|l| std::iter::repeat_n(l, logits.tokens));
            TrainPass::of(pass, loss, rows.collect(), course.traces)
        })
    }

    /// Logits `[batch, classes]` without dropout, and what each mixture layer did.
    ///
    /// # Errors
    /// [`ModelError::Config`] for an image that patches do not make up, or features of more blocks than there are or of a
    /// mixture; [`ModelError::Shape`] for pixels or features of another number than whole images have,
    /// [`ModelError::NonFinite`] for a NaN or infinity among them or the logits; [`ModelError::NoSuchExpert`] or
    /// [`ModelError::Config`] for a masked expert that is not there.
    pub fn logits(
        &self,
        batch: ImageBatch<'_>,
        masked: Option<Masked>,
    ) -> Result<(Vec<f32>, Vec<LayerTrace>), ModelError> {
        let mut course = Course::masking(masked);
        let logits = self.forward(&mut Host(NoneTape), batch, &mut course)?;
        Ok((numbers("logit", logits.states.to_vec())?, course.traces))
    }

    /// Cross-entropy of each image, nats, without dropout.
    ///
    /// # Errors
    /// As [`logits`](Self::logits); [`ModelError::Shape`] if there is not one class an image, [`ModelError::Index`] for a
    /// class that the head does not have.
    pub fn losses(
        &self,
        batch: ImageBatch<'_>,
        classes: &[u32],
        masked: Option<Masked>,
    ) -> Result<Vec<f32>, ModelError> {
        self.losses_in(&mut Host(NoneTape), batch, classes, masked)
    }

    /// [`losses`](Self::losses) on a device.
    ///
    /// # Errors
    /// As [`train_pass_on`](Self::train_pass_on).
    #[cfg(feature = "cuda")]
    pub fn losses_on(
        &self,
        device: &mass_cuda::Device,
        batch: ImageBatch<'_>,
        classes: &[u32],
        masked: Option<Masked>,
    ) -> Result<Vec<f32>, ModelError> {
        let pass = &mut crate::ops::Cuda::evaluating(device);
        self.losses_in(pass, batch, classes, masked)
    }

    /// [`train_pass`](Self::train_pass) at a place that is chosen when the program runs.
    ///
    /// # Errors
    /// As there; on a device, `ModelError::Cuda` if its memory does not suffice, or it has failed.
    pub fn train_pass_at(
        &self,
        place: &Place,
        batch: ImageBatch<'_>,
        classes: &[u32],
        dropout: Option<&mut DropoutKeys>,
    ) -> Result<TrainPass<PlacedGradients>, ModelError> {
        match place {
            Place::Cpu => Ok(self.train_pass(batch, classes, dropout)?.placed()),
            #[cfg(feature = "cuda")]
            Place::Cuda(device) => {
                let pass = self.train_pass_on(device, batch, classes, dropout)?;
                Ok(pass.placed())
            }
        }
    }

    /// [`losses`](Self::losses) at a place.
    ///
    /// # Errors
    /// As [`train_pass_at`](Self::train_pass_at).
    pub fn losses_at(
        &self,
        place: &Place,
        batch: ImageBatch<'_>,
        classes: &[u32],
        masked: Option<Masked>,
    ) -> Result<Vec<f32>, ModelError> {
        match place {
            Place::Cpu => self.losses(batch, classes, masked),
            #[cfg(feature = "cuda")]
            Place::Cuda(device) => self.losses_on(device, batch, classes, masked),
        }
    }

    /// [`logits`](Self::logits) at a place.
    ///
    /// # Errors
    /// As [`train_pass_at`](Self::train_pass_at).
    pub fn logits_at(
        &self,
        place: &Place,
        batch: ImageBatch<'_>,
        masked: Option<Masked>,
    ) -> Result<(Vec<f32>, Vec<LayerTrace>), ModelError> {
        match place {
            Place::Cpu => self.logits(batch, masked),
            #[cfg(feature = "cuda")]
            Place::Cuda(device) => {
                let pass = &mut crate::ops::Cuda::evaluating(device);
                let mut course = Course::masking(masked);
                let logits = self.forward(pass, batch, &mut course)?.states;
                let values = pass.mirror(&logits);
                Ok((
                    numbers("logit", values.try_values()?.to_vec())?,
                    course.traces,
                ))
            }
        }
    }

    fn losses_in<P: Pass>(
        &self,
        pass: &mut P,
        batch: ImageBatch<'_>,
        classes: &[u32],
        masked: Option<Masked>,
    ) -> Result<Vec<f32>, ModelError> {
        let logits = self.forward(pass, batch, &mut Course::masking(masked))?;
        numbers(ROW, pass.cross_entropy(logits.states, classes)?.1)
    }
}

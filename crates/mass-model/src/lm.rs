//! A causal transformer language model whose feed-forward layers are mixtures of experts.

use dfdx::prelude::{Cpu, NoneTape, OwnedTape, Tape};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::checkpoint::Checkpointed;
use crate::error::ModelError;
use crate::mixtures::{attempt, check_masked, check_mixtures};
use crate::nn::{Block, BlockConfig, LayerNorm, Linear, SelfAttention};
use crate::ops::{Host, Pass, ROW, Rows, Sequences, Training};
use crate::parallel::Meanwhile;
use crate::param::{MOST, Param, draw};
use crate::pass::numbers;
pub use crate::pass::{LayerTrace, Masked, TrainPass};
use crate::place::{Place, PlacedGradients};
use crate::{mixtures, parameters};

/// Sizes of a [`LanguageModel`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LanguageModelConfig {
    /// Number of token ids.
    pub vocab: usize,
    /// Longest sequence (learned positions).
    pub max_seq: usize,
    /// Number of blocks, at most 2^20.
    pub layers: usize,
    /// Standard deviation of token and position embeddings at the start.
    pub embedding_std: f32,
    /// The blocks.
    pub block: BlockConfig,
}

/// A pre-norm decoder with learned positions and an untied head.
#[derive(Clone, Debug)]
pub struct LanguageModel {
    /// Token embeddings, `[vocab, d]`.
    pub tokens: Param,
    /// Position embeddings, `[max_seq, d]`.
    pub positions: Param,
    /// Transformer blocks.
    pub blocks: Vec<Block>,
    /// Final norm.
    pub norm: LayerNorm,
    /// Logits from the final state, `[vocab, d]`.
    pub head: Linear,
    config: LanguageModelConfig,
}

/// A forward pass: logits `[tokens, vocab]`, and what each mixture layer did.
#[derive(Debug)]
pub struct Forwarded<T: Tape<f32, Cpu>> {
    /// `[batch * seq, vocab]`
    pub logits: Rows<T>,
    /// One a mixture layer, bottom first.
    pub layers: Vec<LayerTrace>,
}

impl LanguageModel {
    /// A model with freshly drawn weights: embeddings from N(0, embedding_std²) and the rest as PyTorch's defaults.
    ///
    /// # Errors
    /// [`ModelError::Config`] for sizes that no model can have; the generator is as it was then.
    pub fn new(config: &LanguageModelConfig, rng: &mut ChaCha8Rng) -> Result<Self, ModelError> {
        let &LanguageModelConfig {
            vocab,
            max_seq,
            layers,
            ..
        } = config;
        if vocab == 0 || max_seq == 0 || layers == 0 || layers > MOST {
            let sizes = format!(
                "a model of {layers} layers (at most {MOST}), {vocab} tokens, sequences of {max_seq}; each must be at least 1"
            );
            return Err(ModelError::Config(sizes));
        }
        let (dim, std) = (config.block.moe.dim, config.embedding_std);
        draw(rng, |rng| {
            Ok(Self {
                tokens: Param::normal(&[vocab, dim], std, true, rng)?,
                positions: Param::normal(&[max_seq, dim], std, true, rng)?,
                blocks: (0..layers)
                    .map(|_| Block::new(&config.block, rng))
                    .collect::<Result<_, _>>()?,
                norm: LayerNorm::new(dim, config.block.layer_norm_eps)?,
                head: Linear::new(dim, vocab, false, rng)?,
                config: config.clone(),
            })
        })
    }

    /// The configuration that the model was made with.
    pub fn config(&self) -> &LanguageModelConfig {
        &self.config
    }

    /// The forward pass over sequences of `seq` tokens laid end to end.
    ///
    /// # Errors
    /// [`ModelError::Index`] for a token past the vocabulary, [`ModelError::Shape`] if `seq` does not divide the number of
    /// tokens or is too long, or a parameter does not fit the others, [`ModelError::NoSuchExpert`] or [`ModelError::Config`] for a
    /// masked expert that is not there.
    pub fn forward<T: Tape<f32, Cpu>>(
        &self,
        tokens: &[u32],
        seq: usize,
        masked: Option<Masked>,
        tape: T,
    ) -> Result<Forwarded<T>, ModelError> {
        let mut pass = Host(tape);
        let (logits, layers) = self.run(&mut pass, tokens, seq, masked, None)?;
        let logits = logits.into_tensor(pass.0)?;
        Ok(Forwarded { logits, layers })
    }

    /// [`forward`](Self::forward)
    fn run<P: Pass>(
        &self,
        pass: &mut P,
        tokens: &[u32],
        seq: usize,
        masked: Option<Masked>,
        meanwhile: Option<&Meanwhile>,
    ) -> Result<(P::Rows, Vec<LayerTrace>), ModelError> {
        let &[longest, _] = self.positions.shape() else {
            let found = self.positions.shape();
            return Err(ModelError::shape("position embeddings", &[0, 0], found));
        };
        if tokens.is_empty() || seq == 0 || seq > longest || !tokens.len().is_multiple_of(seq) {
            let what = "tokens and sequence (which divides them, and is at most as long as here)";
            return Err(ModelError::shape(
                what,
                &[tokens.len().max(1), longest],
                &[tokens.len(), seq],
            ));
        }
        check_masked(masked, self.blocks.len())?;
        let sequences = Sequences::uniform(tokens.len() / seq, seq)?;
        let positions: Vec<u32> = (0..seq as u32).cycle().take(tokens.len()).collect();
        let tables = [(&self.tokens, tokens), (&self.positions, &positions)];
        let mut x = pass.embedding(&tables)?;
        let mut layers = Vec::with_capacity(self.blocks.len());
        for block in &self.blocks {
            if let Some(meanwhile) = meanwhile {
                meanwhile.complete(pass, block);
            }
            x = block.run(pass, x, &sequences, masked, &mut layers)?;
        }
        if let Some(meanwhile) = meanwhile {
            meanwhile.complete(pass, &self.norm);
            meanwhile.complete(pass, &self.head);
        }
        let x = self.norm.run(pass, x)?;
        Ok((self.head.run(pass, x)?, layers))
    }

    /// Loss of next-token prediction and its gradients. `tokens` and `targets` are sequences of `seq` laid end to end.
    ///
    /// # Errors
    /// As [`forward`](Self::forward), and [`ModelError::NonFinite`] if the loss is not a number.
    pub fn train_pass(
        &self,
        tokens: &[u32],
        targets: &[u32],
        seq: usize,
    ) -> Result<TrainPass, ModelError> {
        self.train(Host(OwnedTape::default()), tokens, targets, seq)
    }

    fn train<P: Training>(
        &self,
        mut pass: P,
        tokens: &[u32],
        targets: &[u32],
        seq: usize,
    ) -> Result<TrainPass<P::Gradients>, ModelError> {
        let ranks = self.blocks.first().map(|block| block.moe.ranks());
        let meanwhile = ranks.and_then(|ranks| Meanwhile::new(ranks, targets.len() as u64));
        attempt(self, None, |_| {
            let (logits, layers) = self.run(&mut pass, tokens, seq, None, meanwhile.as_ref())?;
            let (loss, token_losses) = pass.cross_entropy(logits, targets)?;
            let made = TrainPass::of(pass, loss, token_losses, layers)?;
            Ok(TrainPass { meanwhile, ..made })
        })
    }

    /// [`train_pass`](Self::train_pass) on a device, where parameters, gradients and all that is between them stay.
    ///
    /// # Errors
    /// As there; [`ModelError::Cuda`] if the device's memory does not suffice, or it has failed.
    #[cfg(feature = "cuda")]
    pub fn train_pass_on(
        &self,
        device: &mass_cuda::Device,
        tokens: &[u32],
        targets: &[u32],
        seq: usize,
    ) -> Result<TrainPass<crate::ops::CudaGradients>, ModelError> {
        self.train(crate::ops::Cuda::training(device), tokens, targets, seq)
    }

    /// [`score`](Self::score) on a device.
    ///
    /// # Errors
    /// As [`train_pass_on`](Self::train_pass_on).
    #[cfg(feature = "cuda")]
    pub fn score_on(
        &self,
        device: &mass_cuda::Device,
        tokens: &[u32],
        targets: &[u32],
        seq: usize,
        masked: Option<Masked>,
    ) -> Result<(Vec<f32>, Vec<LayerTrace>), ModelError> {
        let mut pass = crate::ops::Cuda::evaluating(device);
        let (logits, layers) = self.run(&mut pass, tokens, seq, masked, None)?;
        let losses = pass.cross_entropy(logits, targets)?.1;
        Ok((numbers(ROW, losses)?, layers))
    }

    /// [`train_pass`](Self::train_pass) at a place that is chosen when the program runs.
    ///
    /// # Errors
    /// As there; on a device, `ModelError::Cuda` if its memory does not suffice, or it has failed.
    pub fn train_pass_at(
        &self,
        place: &Place,
        tokens: &[u32],
        targets: &[u32],
        seq: usize,
    ) -> Result<TrainPass<PlacedGradients>, ModelError> {
        match place {
            Place::Cpu => Ok(self.train_pass(tokens, targets, seq)?.placed()),
            #[cfg(feature = "cuda")]
            Place::Cuda(device) => Ok(self.train_pass_on(device, tokens, targets, seq)?.placed()),
        }
    }

    /// [`score`](Self::score) at a place.
    ///
    /// # Errors
    /// As [`train_pass_at`](Self::train_pass_at).
    pub fn score_at(
        &self,
        place: &Place,
        tokens: &[u32],
        targets: &[u32],
        seq: usize,
        masked: Option<Masked>,
    ) -> Result<(Vec<f32>, Vec<LayerTrace>), ModelError> {
        match place {
            Place::Cpu => self.score(tokens, targets, seq, masked),
            #[cfg(feature = "cuda")]
            Place::Cuda(device) => self.score_on(device, tokens, targets, seq, masked),
        }
    }

    /// Negative log-likelihood of each target, nats, without a tape.
    ///
    /// # Errors
    /// As [`forward`](Self::forward), and [`ModelError::NonFinite`] for a token whose loss is NaN or infinite.
    pub fn score(
        &self,
        tokens: &[u32],
        targets: &[u32],
        seq: usize,
        masked: Option<Masked>,
    ) -> Result<(Vec<f32>, Vec<LayerTrace>), ModelError> {
        let mut pass = Host(NoneTape);
        let (logits, layers) = self.run(&mut pass, tokens, seq, masked, None)?;
        let losses = pass.cross_entropy(logits, targets)?.1;
        Ok((numbers(ROW, losses)?, layers))
    }
}

parameters!(LanguageModel {
    tokens,
    positions,
    blocks,
    norm,
    head
});
mixtures!(LanguageModel { blocks });

impl Checkpointed for LanguageModel {
    const KIND: &'static str = "language model";
    type Config = LanguageModelConfig;

    fn checkpoint_config(&self) -> &LanguageModelConfig {
        &self.config
    }

    fn from_checkpoint_config(config: &LanguageModelConfig) -> Result<Self, ModelError> {
        Self::new(config, &mut crate::seeded_rng(0))
    }

    fn check_config(&self) -> Result<(), ModelError> {
        let config = &self.config;
        let differs =
            |what: String| ModelError::Config(format!("{what}, which a checkpoint would not keep"));
        if self.blocks.len() != config.layers {
            let (found, wanted) = (self.blocks.len(), config.layers);
            return Err(differs(format!("{found} blocks, configured {wanted}")));
        }
        let eps = config.block.layer_norm_eps;
        for (i, block) in self.blocks.iter().enumerate() {
            let SelfAttention {
                heads,
                causal,
                dropout,
                ..
            } = block.attention;
            if (heads, causal, dropout) != (config.block.heads, true, 0.0) {
                return Err(differs(format!(
                    "attention of block {i} with {heads} heads, causal {causal}, dropout {dropout}"
                )));
            }
            if [&block.norm1, &block.norm2].iter().any(|n| n.eps != eps) {
                return Err(differs(format!(
                    "a norm of block {i} with another eps than {eps}"
                )));
            }
        }
        let configured = self.blocks.iter().map(|_| &config.block.moe);
        check_mixtures(self, configured)?;
        if self.norm.eps != eps {
            return Err(differs(format!("a norm with another eps than {eps}")));
        }
        Ok(())
    }

    fn values_at_least(config: &LanguageModelConfig) -> Option<u64> {
        let &LanguageModelConfig {
            vocab,
            max_seq,
            layers,
            ref block,
            ..
        } = config;
        let rows = (vocab as u64).checked_mul(2)?.checked_add(max_seq as u64)?;
        let outer = rows.checked_mul(block.moe.dim as u64)?;
        let inner = block.values_at_least()?.checked_mul(layers as u64)?;
        inner.checked_add(outer)
    }
}

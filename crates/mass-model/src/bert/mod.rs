//! BERT (Devlin and others, arXiv 1810.04805) for classifying and scoring sequences, with mixtures of experts for any of
//! its feed-forward networks.
//!
//! ```text
//! h_0 = dropout(norm(word[id] + position[i] + type[t]))
//! a_l = norm(h_{l-1} + dropout(attention(h_{l-1})))
//! h_l = norm(a_l + dropout(mlp(a_l)))
//! logits = head(dropout(tanh(pooler(h_L of the first token))))
//! ```
//!
//! Batches are laid end to end without padding ([`TextBatch`]). Dropout masks are functions of the step
//! ([`DropoutKeys`]), so that a resumed run drops what an uninterrupted one would have.
//!
//! # Names of parameters
//! `embeddings.words`, `embeddings.positions`, `embeddings.types`, `embeddings.norm.{weight,bias}`; for each layer
//! `layers.L.attention.{qkv,out}.{weight,bias}`, `layers.L.attention_norm.{weight,bias}`,
//! `layers.L.ffn.{fc1,fc2}.{weight,bias}`, or in a mixture `layers.L.moe.experts.E.{gate,fc1.weight,...}`, and
//! `layers.L.ffn_norm.{weight,bias}`; `pooler.{weight,bias}`, `head.{weight,bias}`. Matrices decay, gate rows too; biases
//! and norms do not.
//!
//! ```
//! use mass_model::bert::{BertClassifier, BertConfig, Targets, TextBatch};
//! use mass_model::{DropoutKeys, seeded_rng};
//! use mass_routing::{Combine, RouterConfig};
//!
//! let config = BertConfig { vocab_size: 10, hidden_size: 8, num_hidden_layers: 2, num_attention_heads: 2,
//!     intermediate_size: 16, max_position_embeddings: 8, ..BertConfig::default() };
//! let mut rng = seeded_rng(0);
//! let mut model = BertClassifier::new(&config, 3, &mut rng)?;
//! model.convert(1, 4, RouterConfig::TopP { p: 0.5, combine: Combine::Renormalised }, &mut rng)?;
//! let batch = TextBatch::packed(vec![1, 5, 6, 2, 1, 7, 2], vec![0; 7], vec![0, 4, 7]);
//! let pass = model.train_pass(&batch, Targets::Classes(&[2, 0]), Some(&mut DropoutKeys::new(0, 0)))?;
//! assert!(pass.loss > 0.0 && pass.layers.len() == 1);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod batch;
mod config;
mod layer;
mod load;
mod parameters;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use dfdx::prelude::{NoneTape, OwnedTape};
use rand_chacha::ChaCha8Rng;

pub use crate::encoder::ClassifierConfig;
pub use batch::{Targets, TextBatch};
pub use config::BertConfig;

use crate::encoder::{Course, Wanted};
use crate::error::ModelError;
use crate::kernels::dropout::DropoutKeys;
use crate::mixtures::{Mixtures, attempt, check_masked};
use crate::nn::{LayerNorm, Linear};
use crate::ops::{Activations, Host, Pass, ROW, Training};
use crate::optim::Gradients;
use crate::param::{Param, draw};
use crate::pass::{LayerTrace, Masked, TrainPass, numbers};
use crate::place::{Place, PlacedGradients};
use crate::pretrained::{Drawn, Head, Kind, Source, Stored, Weights};
use layer::BertLayer;

/// A BERT encoder with a pooler and a linear head on the first token.
#[derive(Clone, Debug)]
pub struct BertClassifier {
    words: Param,
    positions: Param,
    types: Param,
    norm: LayerNorm,
    layers: Vec<BertLayer>,
    pooler: Linear,
    head: Linear,
    config: ClassifierConfig<BertConfig>,
}

impl BertClassifier {
    /// A model with freshly drawn weights: matrices from N(0, `initializer_range`²), biases zero, norms one, the embedding of
    /// the padding token zero.
    ///
    /// # Errors
    /// [`ModelError::Config`] for sizes and rates that no model can have.
    pub fn new(
        config: &BertConfig,
        labels: usize,
        rng: &mut ChaCha8Rng,
    ) -> Result<Self, ModelError> {
        let std = config.initializer_range;
        let mut model = draw(rng, |rng| {
            Self::build(config, labels, &mut Drawn { std, rng })
        })?;
        let padding = model.padding();
        model.words.values_mut()[padding].fill(0.0);
        Ok(model)
    }

    /// Reads `config.json` and the weights of a folder in Hugging Face's layout; see [`pretrained`](crate::pretrained).
    ///
    /// Names may begin with `bert.` or not, and layer norms may have the names `gamma` and `beta` of old files. The head is the
    /// file's, which must be of as many labels, and drawn as by [`new`](Self::new) if the file has none, and then the pooler
    /// too; [`load_with_new_head`](Self::load_with_new_head) draws one whatever the file has. Heads of pretraining and of question
    /// answering are passed over.
    ///
    /// # Errors
    /// [`ModelError::Io`] naming the file; [`ModelError::Checkpoint`] naming file and field or tensor, if a field has a
    /// wrong value or makes another model (see [`BertConfig::read`]), or if a tensor is missing, of another shape or type, not
    /// finite, or has no place in the model; [`ModelError::Config`] if there is no label.
    pub fn load(dir: &Path, labels: usize, rng: &mut ChaCha8Rng) -> Result<Self, ModelError> {
        Self::load_with(dir, labels, Head::OfFile, rng)
    }

    /// As [`load`](Self::load), with a head that is drawn whatever the file has: a classifier of one task is tuned again for
    /// another. Every tensor beside embeddings, encoder and pooler belongs to the old head and is passed over with it, as is
    /// what the configuration says of its problem. The pooler is the file's, or drawn if it has none.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_with_new_head(
        dir: &Path,
        labels: usize,
        rng: &mut ChaCha8Rng,
    ) -> Result<Self, ModelError> {
        Self::load_with(dir, labels, Head::New, rng)
    }

    fn load_with(
        dir: &Path,
        labels: usize,
        head: Head,
        rng: &mut ChaCha8Rng,
    ) -> Result<Self, ModelError> {
        let config = BertConfig::read_for(dir, labels, head)?;
        let weights = Weights::open(dir)?;
        let optional = load::optional(&weights, head);
        let std = config.initializer_range;
        let drawn = Drawn { std, rng };
        let (parts, spellings) = (&load::parts, &load::spellings);
        let mut source = Stored::new(&weights, parts, spellings, &optional, drawn, head);
        let model = Self::build(&config, labels, &mut source)?;
        source.nothing_left(|tensor| load::belongs(tensor, head))?;
        Ok(model)
    }

    fn build(
        config: &BertConfig,
        labels: usize,
        source: &mut dyn Source,
    ) -> Result<Self, ModelError> {
        config.check()?;
        if labels == 0 {
            return Err(ModelError::Config("a classifier needs a label".into()));
        }
        let d = config.hidden_size;
        let mut table = |name: &str, entries| {
            source.param(&format!("embeddings.{name}"), &[entries, d], Kind::Matrix)
        };
        Ok(Self {
            words: table("words", config.vocab_size)?,
            positions: table("positions", config.max_position_embeddings)?,
            types: table("types", config.type_vocab_size)?,
            norm: source.norm("embeddings.norm", d, config.layer_norm_eps)?,
            layers: (0..config.num_hidden_layers)
                .map(|l| BertLayer::new(config, &format!("layers.{l}"), source))
                .collect::<Result<_, _>>()?,
            pooler: source.linear("pooler", d, d, true)?,
            head: source.linear("head", d, labels, true)?,
            config: ClassifierConfig {
                encoder: config.clone(),
                outputs: labels,
                mixtures: BTreeMap::new(),
            },
        })
    }

    /// Where the padding token's embedding is in the table of words.
    fn padding(&self) -> Range<usize> {
        let BertConfig {
            pad_token_id,
            hidden_size,
            ..
        } = self.config.encoder;
        let start = pad_token_id as usize * hidden_size;
        start..start + hidden_size
    }

    /// The configuration that the model was made with.
    pub fn config(&self) -> &BertConfig {
        &self.config.encoder
    }

    /// Number of outputs.
    pub fn labels(&self) -> usize {
        self.config.outputs
    }

    /// The hidden states of a batch.
    fn encode<P: Pass>(
        &self,
        pass: &mut P,
        batch: &TextBatch,
        wanted: Wanted,
        course: &mut Course<'_>,
        observe: &mut dyn FnMut(&P::Rows),
    ) -> Result<P::Rows, ModelError> {
        check_masked(course.masked, self.mixtures())?;
        let longest = self.config.encoder.max_position_embeddings;
        let (sequences, positions) =
            batch.sequences(longest, self.config.encoder.type_vocab_size)?;
        let tables: [(&Param, &[u32]); 3] = [
            (&self.words, &batch.ids),
            (&self.types, &batch.types),
            (&self.positions, &positions),
        ];
        let x = pass.embedding(&tables)?;
        let x = self.norm.run(pass, x)?;
        let rate = self.config.encoder.hidden_dropout_prob;
        let mut x = pass.dropout(x, course.dropout(rate)?)?;
        let first = &sequences.offsets()[..sequences.len()];
        for (i, layer) in self.layers.iter().enumerate() {
            observe(&x);
            let last = i + 1 == self.layers.len();
            let keep = (last && wanted == Wanted::First).then_some(first);
            x = layer.run(pass, x, &sequences, keep, course)?;
        }
        observe(&x);
        Ok(x)
    }

    /// Logits `[batch, labels]`.
    fn forward<P: Pass>(
        &self,
        pass: &mut P,
        batch: &TextBatch,
        course: &mut Course<'_>,
    ) -> Result<P::Rows, ModelError> {
        let states = self.encode(pass, batch, Wanted::First, course, &mut |_| {})?;
        let pooled = self.pool(pass, states)?;
        let rate = self.config.encoder.head_dropout();
        let pooled = pass.dropout(pooled, course.dropout(rate)?)?;
        self.head.run(pass, pooled)
    }

    /// Mean loss over sequences, and the loss of each.
    fn loss<P: Pass>(
        pass: &mut P,
        logits: P::Rows,
        targets: Targets<'_>,
    ) -> Result<(P::Loss, Vec<f32>), ModelError> {
        match targets {
            Targets::Classes(classes) => pass.cross_entropy(logits, classes),
            Targets::Values(values) => pass.mean_squared_error(logits, values),
        }
    }

    /// What the head reads, of the states of first tokens.
    fn pool<P: Pass>(&self, pass: &mut P, first: P::Rows) -> Result<P::Rows, ModelError> {
        let pooled = self.pooler.run(pass, first)?;
        pass.tanh(pooled)
    }

    /// The embeddings' output and each layer's, `[rows, d]` each, without dropout.
    ///
    /// # Errors
    /// As [`logits`](Self::logits).
    pub fn hidden_states(&self, batch: &TextBatch) -> Result<Vec<Vec<f32>>, ModelError> {
        let mut states = Vec::new();
        let (mut pass, every) = (Host(NoneTape), Wanted::Every);
        let observe = &mut |x: &Activations| states.push(x.to_vec());
        self.encode(&mut pass, batch, every, &mut Course::default(), observe)?;
        Ok(states)
    }

    /// What the head reads: `tanh(pooler(h))` of each sequence's first token, `[batch, d]`, without dropout.
    ///
    /// # Errors
    /// As [`logits`](Self::logits).
    pub fn pooled(&self, batch: &TextBatch) -> Result<Vec<f32>, ModelError> {
        let (mut pass, first) = (Host(NoneTape), Wanted::First);
        let course = &mut Course::default();
        let states = self.encode(&mut pass, batch, first, course, &mut |_| {})?;
        Ok(self.pool(&mut pass, states)?.to_vec())
    }

    /// Mean loss over the sequences of a batch and its gradients; without `dropout` nothing is dropped. The padding token's
    /// embedding has gradient zero wherever it stands, as PyTorch's `padding_idx` has it.
    ///
    /// In `token_losses` each row has the loss of its sequence.
    ///
    /// # Errors
    /// As [`losses`](Self::losses), and [`ModelError::NonFinite`] if the loss is not a number.
    pub fn train_pass(
        &self,
        batch: &TextBatch,
        targets: Targets<'_>,
        dropout: Option<&mut DropoutKeys>,
    ) -> Result<TrainPass, ModelError> {
        self.train(Host(OwnedTape::default()), batch, targets, dropout)
    }

    /// [`train_pass`](Self::train_pass) on a device, where parameters, gradients and all that is between them stay.
    ///
    /// # Errors
    /// As there; [`ModelError::Cuda`] if the device's memory does not suffice, or it has failed.
    #[cfg(feature = "cuda")]
    pub fn train_pass_on(
        &self,
        device: &mass_cuda::Device,
        batch: &TextBatch,
        targets: Targets<'_>,
        dropout: Option<&mut DropoutKeys>,
    ) -> Result<TrainPass<crate::ops::CudaGradients>, ModelError> {
        self.train(crate::ops::Cuda::training(device), batch, targets, dropout)
    }

    fn train<P: Training<Gradients: Gradients>>(
        &self,
        mut pass: P,
        batch: &TextBatch,
        targets: Targets<'_>,
        dropout: Option<&mut DropoutKeys>,
    ) -> Result<TrainPass<P::Gradients>, ModelError> {
        attempt(self, dropout, |dropout| {
            let mut course = Course::dropping(dropout);
            let logits = self.forward(&mut pass, batch, &mut course)?;
            let (loss, losses) = Self::loss(&mut pass, logits, targets)?;
            let spans = batch.offsets.windows(2).zip(losses);
            let rows = spans.flat_map(|(w, l)| std::iter::repeat_n(l, w[1] - w[0]));
            let mut pass = TrainPass::of(pass, loss, rows.collect(), course.traces)?;
            pass.gradients.zero(&self.words, self.padding())?;
            Ok(pass)
        })
    }

    /// Logits `[batch, labels]` without dropout, and what each mixture layer did.
    ///
    /// # Errors
    /// [`ModelError::Config`] or [`ModelError::Shape`] for a batch whose parts do not fit each other or a sequence that is
    /// too long, [`ModelError::Index`] for a token or segment past its table, [`ModelError::NoSuchExpert`] or
    /// [`ModelError::Config`] for a masked expert that is not there, [`ModelError::NonFinite`] for a logit that is NaN or infinite.
    pub fn logits(
        &self,
        batch: &TextBatch,
        masked: Option<Masked>,
    ) -> Result<(Vec<f32>, Vec<LayerTrace>), ModelError> {
        let mut course = Course::masking(masked);
        let logits = self.forward(&mut Host(NoneTape), batch, &mut course)?;
        Ok((numbers("logit", logits.to_vec())?, course.traces))
    }

    /// The loss of each sequence, without dropout.
    ///
    /// # Errors
    /// As [`logits`](Self::logits); [`ModelError::Shape`] if there is not one target a sequence, [`ModelError::Index`] for a
    /// target that is no class, [`ModelError::Config`] for values as targets of a model with several outputs.
    pub fn losses(
        &self,
        batch: &TextBatch,
        targets: Targets<'_>,
        masked: Option<Masked>,
    ) -> Result<Vec<f32>, ModelError> {
        self.losses_in(&mut Host(NoneTape), batch, targets, masked)
    }

    /// [`losses`](Self::losses) on a device.
    ///
    /// # Errors
    /// As [`train_pass_on`](Self::train_pass_on).
    #[cfg(feature = "cuda")]
    pub fn losses_on(
        &self,
        device: &mass_cuda::Device,
        batch: &TextBatch,
        targets: Targets<'_>,
        masked: Option<Masked>,
    ) -> Result<Vec<f32>, ModelError> {
        let pass = &mut crate::ops::Cuda::evaluating(device);
        self.losses_in(pass, batch, targets, masked)
    }

    /// [`train_pass`](Self::train_pass) at a place that is chosen when the program runs.
    ///
    /// # Errors
    /// As there; on a device, `ModelError::Cuda` if its memory does not suffice, or it has failed.
    pub fn train_pass_at(
        &self,
        place: &Place,
        batch: &TextBatch,
        targets: Targets<'_>,
        dropout: Option<&mut DropoutKeys>,
    ) -> Result<TrainPass<PlacedGradients>, ModelError> {
        match place {
            Place::Cpu => Ok(self.train_pass(batch, targets, dropout)?.placed()),
            #[cfg(feature = "cuda")]
            Place::Cuda(device) => {
                let pass = self.train_pass_on(device, batch, targets, dropout)?;
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
        batch: &TextBatch,
        targets: Targets<'_>,
        masked: Option<Masked>,
    ) -> Result<Vec<f32>, ModelError> {
        match place {
            Place::Cpu => self.losses(batch, targets, masked),
            #[cfg(feature = "cuda")]
            Place::Cuda(device) => self.losses_on(device, batch, targets, masked),
        }
    }

    /// [`logits`](Self::logits) at a place.
    ///
    /// # Errors
    /// As [`train_pass_at`](Self::train_pass_at).
    pub fn logits_at(
        &self,
        place: &Place,
        batch: &TextBatch,
        masked: Option<Masked>,
    ) -> Result<(Vec<f32>, Vec<LayerTrace>), ModelError> {
        match place {
            Place::Cpu => self.logits(batch, masked),
            #[cfg(feature = "cuda")]
            Place::Cuda(device) => {
                let pass = &mut crate::ops::Cuda::evaluating(device);
                let mut course = Course::masking(masked);
                let logits = self.forward(pass, batch, &mut course)?;
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
        batch: &TextBatch,
        targets: Targets<'_>,
        masked: Option<Masked>,
    ) -> Result<Vec<f32>, ModelError> {
        let logits = self.forward(pass, batch, &mut Course::masking(masked))?;
        numbers(ROW, Self::loss(pass, logits, targets)?.1)
    }
}

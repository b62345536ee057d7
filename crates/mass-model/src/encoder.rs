//! What the encoders share: a feed-forward sublayer that may be a mixture, and what fixes a classifier.

use std::collections::BTreeMap;

use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::error::ModelError;
use crate::kernels::activation::Activation;
use crate::kernels::dropout::{Dropout, DropoutKeys};
use crate::mixtures::Mixtures;
use crate::nn::{FeedForward, MoeConfig, MoeLayer};
use crate::ops::Pass;
use crate::param::{Param, Parameters, join};
use crate::pass::{LayerTrace, Masked};
use crate::pretrained::Source;

/// Everything that fixes a classifier but for its values: the encoder, the number of outputs, and which feed-forward
/// networks are mixtures. Checkpoints hold it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClassifierConfig<C> {
    /// The encoder.
    pub encoder: C,
    /// Number of labels or classes.
    pub outputs: usize,
    /// The mixtures, by their layer, with the experts they started with.
    pub mixtures: BTreeMap<usize, MoeConfig>,
}

impl<C> ClassifierConfig<C> {
    /// Values of a transformer of this many layers at the least; `None` if there is no such number.
    pub(crate) fn layers_at_least(&self, layers: usize, dim: usize, hidden: usize) -> Option<u64> {
        let (dim, hidden) = (dim as u64, hidden as u64);
        let attention = dim.checked_mul(dim)?.checked_mul(4)?;
        let network = dim.checked_mul(hidden)?.checked_mul(2)?;
        let dense = layers.saturating_sub(self.mixtures.len()) as u64;
        let mut values = attention
            .checked_mul(layers as u64)?
            .checked_add(network.checked_mul(dense)?)?;
        for mixture in self.mixtures.values() {
            values = values.checked_add(mixture.values_at_least()?)?;
        }
        values.checked_add(dim.checked_mul(self.outputs as u64)?)
    }
}

/// What every classifier has: feed-forward networks that become mixtures, and a form in checkpoints.
///
/// `$layers` is the field with its layers, which have an [`Mlp`] each, and `$layer` the word for one of them. The encoder's
/// configuration has `hidden_size`, `intermediate_size`, `hidden_act` and `num_hidden_layers`.
macro_rules! classifier {
    ($model:ident, $encoder:ty, $kind:literal, $layers:ident $layer:literal) => {
        impl $model {
            #[doc = concat!("Makes the feed-forward network of a ", $layer, ", counted from zero, a mixture whose experts are")]
            /// copies of it, with a gate drawn at random. With weights that sum to one the outputs are at first the same.
            ///
            /// # Errors
            #[doc = concat!("[`ModelError::Config`](crate::ModelError::Config) if there is no such ", $layer, ", it is a mixture")]
            /// already, or `experts` is zero; [`ModelError::Routing`](crate::ModelError::Routing) if the router's parameters are not
            /// valid.
            pub fn convert(
                &mut self,
                layer: usize,
                experts: usize,
                router: mass_routing::RouterConfig,
                rng: &mut rand_chacha::ChaCha8Rng,
            ) -> Result<(), crate::ModelError> {
                let c = &self.config.encoder;
                let (dim, hidden) = (c.hidden_size, c.intermediate_size);
                let mixture = crate::nn::MoeConfig::new(dim, hidden, experts, c.hidden_act, router);
                self.convert_to(layer, &mixture, rng)
            }

            /// As [`convert`](Self::convert), with any gate and routing losses. The sizes and the activation must be the network's.
            ///
            /// # Errors
            /// As [`convert`](Self::convert); [`ModelError::Config`](crate::ModelError::Config) for a mixture that the network cannot
            /// become.
            pub fn convert_to(
                &mut self,
                layer: usize,
                mixture: &crate::nn::MoeConfig,
                rng: &mut rand_chacha::ChaCha8Rng,
            ) -> Result<(), crate::ModelError> {
                let layers = self.$layers.len();
                let Some(found) = self.$layers.get_mut(layer) else {
                    let what = format!("there is no {} {layer}, there are {layers}", $layer);
                    return Err(crate::ModelError::Config(what));
                };
                found.mlp.convert(mixture, rng)?;
                self.config.mixtures.insert(layer, mixture.clone());
                Ok(())
            }
        }

        impl crate::checkpoint::Checkpointed for $model {
            const KIND: &'static str = $kind;
            type Config = crate::encoder::ClassifierConfig<$encoder>;

            fn checkpoint_config(&self) -> &Self::Config {
                &self.config
            }

            fn from_checkpoint_config(config: &Self::Config) -> Result<Self, crate::ModelError> {
                let blank = &mut crate::pretrained::Blank;
                let mut model = Self::build(&config.encoder, config.outputs, blank)?;
                for (&layer, mixture) in &config.mixtures {
                    model.convert_to(layer, mixture, &mut crate::seeded_rng(0))?;
                }
                Ok(model)
            }

            fn check_config(&self) -> Result<(), crate::ModelError> {
                crate::mixtures::check_mixtures(self, self.config.mixtures.values())
            }

            fn values_at_least(config: &Self::Config) -> Option<u64> {
                let c = &config.encoder;
                let (dim, hidden) = (c.hidden_size, c.intermediate_size);
                let layers = config.layers_at_least(c.num_hidden_layers, dim, hidden)?;
                layers.checked_add(Self::outer_values(c)?)
            }
        }
    };
}
pub(crate) use classifier;

/// What goes with the rows through an encoder.
#[derive(Default)]
pub(crate) struct Course<'k> {
    /// An expert that takes no part.
    pub(crate) masked: Option<Masked>,
    /// Where masks of dropout come from; nothing is dropped without.
    pub(crate) keys: Option<&'k mut DropoutKeys>,
    /// What the mixtures have done so far, bottom first.
    pub(crate) traces: Vec<LayerTrace>,
}

impl<'k> Course<'k> {
    /// With an expert masked, or none.
    pub(crate) fn masking(masked: Option<Masked>) -> Self {
        Self {
            masked,
            ..Self::default()
        }
    }

    /// With dropout, or without.
    pub(crate) fn dropping(keys: Option<&'k mut DropoutKeys>) -> Self {
        Self {
            keys,
            ..Self::default()
        }
    }

    /// The mask of the next dropout operation.
    pub(crate) fn dropout(&mut self, rate: f32) -> Result<Option<Dropout>, ModelError> {
        self.keys.as_mut().map_or(Ok(None), |keys| keys.next(rate))
    }
}

/// Its parameters are named `ffn.` while it is dense and `moe.` once it is a mixture.
#[derive(Clone, Debug)]
pub(crate) enum Mlp {
    Dense(Box<FeedForward>),
    Mixture(Box<MoeLayer>),
}

impl Mlp {
    pub(crate) fn dense(
        source: &mut dyn Source,
        name: &str,
        dim: usize,
        hidden: usize,
        activation: Activation,
    ) -> Result<Self, ModelError> {
        let fc1 = source.linear(&format!("{name}.ffn.fc1"), dim, hidden, true)?;
        let fc2 = source.linear(&format!("{name}.ffn.fc2"), hidden, dim, true)?;
        let network = FeedForward::from_linear(fc1, fc2, activation)?;
        Ok(Self::Dense(Box::new(network)))
    }

    /// Makes the dense network a mixture whose experts are copies of it.
    pub(crate) fn convert(
        &mut self,
        config: &MoeConfig,
        rng: &mut ChaCha8Rng,
    ) -> Result<(), ModelError> {
        let Self::Dense(network) = self else {
            let what = "the layer is a mixture already";
            return Err(ModelError::Config(what.into()));
        };
        let layer = MoeLayer::from_dense(network, config, rng)?;
        *self = Self::Mixture(Box::new(layer));
        Ok(())
    }

    pub(crate) fn mixture(&self) -> Option<&MoeLayer> {
        match self {
            Self::Dense(_) => None,
            Self::Mixture(layer) => Some(layer),
        }
    }

    /// Rows `keep` may be picked before this sublayer only if it is dense: what a mixture routes and reports is every token.
    pub(crate) fn keep_early<'a>(&self, keep: Option<&'a [usize]>) -> Option<&'a [usize]> {
        keep.filter(|_| self.mixture().is_none())
    }

    /// Rows `keep` of what follows this sublayer, if they have not been picked before it.
    pub(crate) fn keep_late<P: Pass>(
        &self,
        pass: &mut P,
        output: P::Rows,
        keep: Option<&[usize]>,
    ) -> Result<P::Rows, ModelError> {
        pass.pick_some(output, keep.filter(|_| self.mixture().is_some()))
    }

    /// The forward pass; a mixture appends its trace, and is the mixture layer of that index.
    pub(crate) fn run<P: Pass>(
        &self,
        pass: &mut P,
        x: P::Rows,
        course: &mut Course<'_>,
    ) -> Result<P::Rows, ModelError> {
        match self {
            Self::Dense(network) => network.run(pass, x),
            Self::Mixture(layer) => layer.run_traced(pass, x, course.masked, &mut course.traces),
        }
    }
}

/// Which rows of the encoder's output are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    Every,
    /// The first of each sequence, in order: all that a head on the first token reads. The last layer computes no others
    /// once its tokens have attended to each other.
    First,
}

impl Parameters for Mlp {
    fn visit<'a>(&'a self, prefix: &str, f: &mut dyn FnMut(String, &'a Param)) {
        match self {
            Self::Dense(network) => network.visit(&join(prefix, "ffn"), f),
            Self::Mixture(layer) => layer.visit(&join(prefix, "moe"), f),
        }
    }

    fn visit_mut(&mut self, prefix: &str, f: &mut dyn FnMut(String, &mut Param)) {
        match self {
            Self::Dense(network) => network.visit_mut(&join(prefix, "ffn"), f),
            Self::Mixture(layer) => layer.visit_mut(&join(prefix, "moe"), f),
        }
    }
}

impl Mixtures for Mlp {
    fn visit_mixtures<'a>(&'a self, prefix: &str, f: &mut dyn FnMut(String, &'a MoeLayer)) {
        if let Self::Mixture(layer) = self {
            f(join(prefix, "moe"), layer);
        }
    }

    fn visit_mixtures_mut<'a>(
        &'a mut self,
        prefix: &str,
        f: &mut dyn FnMut(String, &'a mut MoeLayer),
    ) {
        if let Self::Mixture(layer) = self {
            f(join(prefix, "moe"), layer);
        }
    }
}

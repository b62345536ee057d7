//! What the encoders share: a feed-forward sublayer that may be a mixture, and what fixes a classifier.

use std::collections::BTreeMap;

use dfdx::prelude::{Cpu, Module, NoneTape, PutTape, SplitTape, Tape};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::error::ModelError;
use crate::growth::Mixtures;
use crate::kernels::activation::Activation;
use crate::lm::{LayerTrace, Masked};
use crate::nn::{FeedForward, MoeConfig, MoeLayer};
use crate::ops::{self, Rows};
use crate::param::{Param, Parameters, join};
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

    pub(crate) fn mixture_mut(&mut self) -> Option<&mut MoeLayer> {
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
    pub(crate) fn keep_late<T: Tape<f32, Cpu>>(
        &self,
        output: Rows<T>,
        keep: Option<&[usize]>,
    ) -> Result<Rows<T>, ModelError> {
        match keep.filter(|_| self.mixture().is_some()) {
            Some(keep) => ops::pick_rows(output, keep),
            None => Ok(output),
        }
    }

    /// The forward pass; a mixture appends its trace, and is the mixture layer of that index.
    pub(crate) fn forward<T: Tape<f32, Cpu>>(
        &self,
        x: Rows<T>,
        masked: Option<Masked>,
        traces: &mut Vec<LayerTrace>,
    ) -> Result<Rows<T>, ModelError> {
        let layer = match self {
            Self::Dense(network) => return network.try_forward(x),
            Self::Mixture(layer) => layer,
        };
        let mask = match masked {
            Some(m) if m.layer == traces.len() => {
                layer.index_of(m.expert)?;
                let others = layer.ids().iter().map(|&id| id != m.expert);
                Some(others.collect::<Vec<_>>())
            }
            _ => None,
        };
        let (gate_input, tape) = x.split_tape();
        let routed = layer.forward_routed(gate_input.clone().put_tape(tape), mask.as_deref())?;
        traces.push(LayerTrace {
            plan: routed.plan,
            gate_input,
        });
        Ok(routed.output)
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

/// A sublayer's output and the residual that it is to be added to, of which rows `keep` are picked, if given. The output has
/// no other rows already.
pub(crate) fn with_residual<T: Tape<f32, Cpu>>(
    output: Rows<T>,
    residual: Rows<NoneTape>,
    keep: Option<&[usize]>,
) -> Result<(Rows<T>, Rows<NoneTape>), ModelError> {
    let Some(keep) = keep else {
        return Ok((output, residual));
    };
    let (output, tape) = output.split_tape();
    let (residual, tape) = ops::pick_rows(residual.put_tape(tape), keep)?.split_tape();
    Ok((output.put_tape(tape), residual))
}

/// Whether a model's mixtures are what its configuration says, which may have changed since it was made.
pub(crate) fn check_mixtures<'a>(
    model: &impl Mixtures,
    configured: impl Iterator<Item = &'a MoeConfig>,
) -> Result<(), ModelError> {
    for (layer, configured) in configured.enumerate() {
        if layer >= model.mixtures() || model.mixture(layer).config() != configured {
            return Err(ModelError::Config(format!(
                "mixture layer {layer} is not what the model's configuration says, which a checkpoint would not keep"
            )));
        }
    }
    Ok(())
}

/// Refuses a masked expert of a mixture layer that is not there.
pub(crate) fn check_masked(masked: Option<Masked>, mixtures: usize) -> Result<(), ModelError> {
    match masked {
        Some(m) if m.layer >= mixtures => Err(ModelError::Config(format!(
            "an expert of mixture layer {} is masked, there are {mixtures}",
            m.layer
        ))),
        _ => Ok(()),
    }
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

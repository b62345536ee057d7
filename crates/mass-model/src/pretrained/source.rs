//! Where the parameters of a new model come from: drawn, or read from files.

use std::collections::BTreeSet;

use rand_chacha::ChaCha8Rng;

use super::{PretrainedError, Weights};
use crate::error::ModelError;
use crate::nn::{LayerNorm, Linear};
use crate::param::Param;

/// What a parameter is, which says how it starts and whether it decays.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Kind {
    /// Drawn from a normal distribution; decays.
    Matrix,
    /// Drawn as a matrix; does not decay. Class token and position embeddings of images.
    Token,
    /// Starts at zero; does not decay.
    Bias,
    /// Starts at a constant; does not decay.
    Scale(f32),
}

impl Kind {
    fn decays(self) -> bool {
        self == Self::Matrix
    }
}

/// Makes the parameters of a model, by their names in the model.
pub(crate) trait Source {
    fn param(&mut self, name: &str, shape: &[usize], kind: Kind) -> Result<Param, ModelError>;

    fn linear(
        &mut self,
        name: &str,
        inp: usize,
        out: usize,
        bias: bool,
    ) -> Result<Linear, ModelError> {
        let weight = self.param(&format!("{name}.weight"), &[out, inp], Kind::Matrix)?;
        let bias = if bias {
            Some(self.param(&format!("{name}.bias"), &[out], Kind::Bias)?)
        } else {
            None
        };
        Ok(Linear { weight, bias })
    }

    fn norm(&mut self, name: &str, dim: usize, eps: f32) -> Result<LayerNorm, ModelError> {
        Ok(LayerNorm {
            weight: self.param(&format!("{name}.weight"), &[dim], Kind::Scale(1.0))?,
            bias: self.param(&format!("{name}.bias"), &[dim], Kind::Bias)?,
            eps,
        })
    }
}

/// Matrices from N(0, std²), biases zero.
pub(crate) struct Drawn<'a> {
    pub(crate) std: f32,
    pub(crate) rng: &'a mut ChaCha8Rng,
}

impl Source for Drawn<'_> {
    fn param(&mut self, name: &str, shape: &[usize], kind: Kind) -> Result<Param, ModelError> {
        let values = shape.iter().try_fold(4usize, |n, &s| n.checked_mul(s));
        if values.is_none_or(|bytes| bytes > isize::MAX as usize) {
            return Err(ModelError::Config(format!(
                "{name} of shape {shape:?} is larger than memory can be"
            )));
        }
        match kind {
            Kind::Matrix | Kind::Token => Param::normal(shape, self.std, kind.decays(), self.rng),
            Kind::Bias => Param::zeros(shape, false),
            Kind::Scale(value) => Param::new(vec![value; shape.iter().product()], shape, false),
        }
    }
}

/// Everything zero: a model whose values are read later.
pub(crate) struct Blank;

impl Source for Blank {
    fn param(&mut self, _name: &str, shape: &[usize], kind: Kind) -> Result<Param, ModelError> {
        Param::zeros(shape, kind.decays())
    }
}

/// Where the head of a model that is read comes from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Head {
    /// The file, or drawn if it has none.
    OfFile,
    /// Drawn, whatever the file has.
    New,
}

/// A tensor of the file that is a parameter of the model, or one of several that are one together.
pub(crate) struct Part {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
}

impl Part {
    pub(crate) fn new(name: impl Into<String>, shape: &[usize]) -> Self {
        Self {
            name: name.into(),
            shape: shape.to_vec(),
        }
    }
}

/// Reads parameters from files, and draws those that the files have none of and need not have.
pub(crate) struct Stored<'a> {
    weights: &'a Weights,
    /// The parts of a parameter, by its name and shape in the model.
    parts: &'a dyn Fn(&str, &[usize]) -> Vec<Part>,
    /// The names a tensor may go by in the file.
    spellings: &'a dyn Fn(&str) -> Vec<String>,
    /// Whether a parameter may be drawn, by its name in the model.
    optional: &'a dyn Fn(&str) -> bool,
    drawn: Drawn<'a>,
    head: Head,
    used: BTreeSet<String>,
}

impl<'a> Stored<'a> {
    pub(crate) fn new(
        weights: &'a Weights,
        parts: &'a dyn Fn(&str, &[usize]) -> Vec<Part>,
        spellings: &'a dyn Fn(&str) -> Vec<String>,
        optional: &'a dyn Fn(&str) -> bool,
        drawn: Drawn<'a>,
        head: Head,
    ) -> Self {
        Self {
            weights,
            parts,
            spellings,
            optional,
            drawn,
            head,
            used: BTreeSet::new(),
        }
    }

    /// An error naming the first tensor that belongs to the model and was not read.
    pub(crate) fn nothing_left(&self, belongs: impl Fn(&str) -> bool) -> Result<(), ModelError> {
        let mut left = self.weights.names().filter(|&n| !self.used.contains(n));
        match left.find(|n| belongs(n)) {
            Some(tensor) => Err(PretrainedError::Unused {
                path: self.weights.file_of(tensor).to_owned(),
                tensor: tensor.to_owned(),
            }
            .into()),
            None => Ok(()),
        }
    }
}

impl Stored<'_> {
    /// The name of a part in the file, as it is spelt there.
    fn find(&self, name: &str) -> Option<String> {
        let mut names = (self.spellings)(name).into_iter();
        names.find(|n| self.weights.shape(n).is_some())
    }

    /// Whether the file has nothing of the layer that a parameter belongs to.
    fn absent(&self, name: &str, shape: &[usize]) -> bool {
        let layer = name.rsplit_once('.').map_or(name, |(layer, _)| layer);
        let both = ["weight", "bias"].map(|kind| format!("{layer}.{kind}"));
        let mut parts = both.iter().flat_map(|n| (self.parts)(n, shape));
        parts.all(|p| self.find(&p.name).is_none())
    }
}

impl Source for Stored<'_> {
    fn param(&mut self, name: &str, shape: &[usize], kind: Kind) -> Result<Param, ModelError> {
        let redrawn = self.head == Head::New && name.starts_with("head.");
        if redrawn || (self.optional)(name) && self.absent(name, shape) {
            return self.drawn.param(name, shape, kind);
        }
        let parts: Vec<_> = (self.parts)(name, shape)
            .into_iter()
            .map(|Part { name, shape }| (self.find(&name).unwrap_or(name), shape))
            .collect();
        let values = self.weights.read_stacked(&parts)?;
        self.used.extend(parts.into_iter().map(|(name, _)| name));
        Param::new(values, shape, kind.decays())
    }
}

//! Where a model computes, chosen when a program runs.

use std::collections::BTreeMap;
use std::ops::Range;

use mass_expand::{Alignment, Reduction};

use crate::error::ModelError;
use crate::gradients::CpuGradients;
use crate::mirror::Mirror;
#[cfg(feature = "cuda")]
use crate::ops::CudaGradients;
use crate::optim::{Due, Gradients, ParameterState, Rule, Sealed};
use crate::param::{Param, Parameters};
use crate::pass::TrainPass;

/// Where a model computes. With the feature `cuda` there is a second place, a device.
///
/// ```
/// use mass_model::Place;
///
/// let place = Place::default();
/// assert_eq!(place.to_string(), "cpu");
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub enum Place {
    /// The processor.
    #[default]
    Cpu,
    /// A GPU.
    #[cfg(feature = "cuda")]
    Cuda(mass_cuda::Device),
}

impl Place {
    /// Opens the place of a name: `cpu`, `cuda` (the first GPU) or `cuda:N`, N from 0.
    ///
    /// # Errors
    /// [`ModelError::Config`] for another name, or for a GPU without the feature `cuda`; `ModelError::Cuda` where there is no such
    /// device, or no driver that will do.
    pub fn open(name: &str) -> Result<Self, ModelError> {
        if name == "cpu" {
            return Ok(Self::Cpu);
        }
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        let number = match name {
            "cuda" => Some(0),
            _ => match name.strip_prefix("cuda:") {
                Some(number) if digits(number) => number.parse().ok(),
                _ => None,
            },
        };
        let Some(number) = number else {
            let what = format!("no device is called {name:?}; there are: cpu, cuda, cuda:N");
            return Err(ModelError::Config(what));
        };
        Self::open_cuda(number)
    }

    #[cfg(feature = "cuda")]
    fn open_cuda(number: usize) -> Result<Self, ModelError> {
        Ok(Self::Cuda(mass_cuda::Device::open(number)?))
    }

    #[cfg(not(feature = "cuda"))]
    fn open_cuda(number: usize) -> Result<Self, ModelError> {
        Err(ModelError::Config(format!(
            "cuda:{number}: mass-model was built without its feature `cuda`"
        )))
    }
}

/// `cpu`, or `cuda:0` and what the card is: its name, compute capability and memory.
impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            #[cfg(feature = "cuda")]
            Self::Cuda(device) => {
                let (ordinal, name) = (device.ordinal(), device.name());
                let (major, minor) = device.compute_capability();
                write!(
                    f,
                    "cuda:{ordinal} {name}, compute capability {major}.{minor}"
                )?;
                match device.memory() {
                    Ok(memory) => write!(f, ", {:.1} GiB", gibibytes(memory.total)),
                    Err(_) => Ok(()),
                }
            }
        }
    }
}

#[cfg(feature = "cuda")]
fn gibibytes(bytes: usize) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

/// Gradients of a pass at a [`Place`].
#[non_exhaustive]
pub enum PlacedGradients {
    /// On the host.
    Cpu(CpuGradients),
    /// On a device.
    #[cfg(feature = "cuda")]
    Cuda(CudaGradients),
}

impl From<CpuGradients> for PlacedGradients {
    fn from(gradients: CpuGradients) -> Self {
        Self::Cpu(gradients)
    }
}

#[cfg(feature = "cuda")]
impl From<CudaGradients> for PlacedGradients {
    fn from(gradients: CudaGradients) -> Self {
        Self::Cuda(gradients)
    }
}

impl<G> TrainPass<G> {
    /// The same with gradients of another kind.
    pub(crate) fn placed<P: From<G>>(self) -> TrainPass<P> {
        TrainPass {
            loss: self.loss,
            token_losses: self.token_losses,
            gradients: self.gradients.into(),
            layers: self.layers,
            meanwhile: self.meanwhile,
        }
    }
}

/// The same call, wherever the gradients are.
macro_rules! either {
    ($self:ident, $g:ident => $call:expr) => {
        match $self {
            PlacedGradients::Cpu($g) => $call,
            #[cfg(feature = "cuda")]
            PlacedGradients::Cuda($g) => $call,
        }
    };
}

impl Sealed for PlacedGradients {}

impl Gradients for PlacedGradients {
    fn add(&mut self, param: &Param, share: &[f32]) -> Result<(), ModelError> {
        either!(self, g => Gradients::add(g, param, share))
    }

    fn copy(&mut self, param: &Param) -> Result<Option<Vec<f32>>, ModelError> {
        either!(self, g => Gradients::copy(g, param))
    }

    fn sums_of_squares(&mut self, params: &[&Param]) -> Result<Vec<Option<f64>>, ModelError> {
        either!(self, g => g.sums_of_squares(params))
    }

    fn zero(&mut self, param: &Param, which: Range<usize>) -> Result<(), ModelError> {
        either!(self, g => Gradients::zero(g, param, which))
    }

    fn update<M: Parameters + ?Sized>(
        &mut self,
        model: &mut M,
        state: &mut BTreeMap<String, ParameterState>,
        rule: &Rule<'_>,
        due: &[Option<Due>],
    ) -> Result<(), ModelError> {
        either!(self, g => g.update(model, state, rule, due))
    }

    fn reach<M: Parameters + ?Sized>(&mut self, model: &M) -> Result<(), ModelError> {
        either!(self, g => g.reach(model))
    }

    fn alignment(&mut self, param: &Param) -> Result<Option<Alignment>, ModelError> {
        either!(self, g => g.alignment(param))
    }

    fn alignment_of(&mut self, a: &Param, b: &Param) -> Result<Alignment, ModelError> {
        either!(self, g => g.alignment_of(a, b))
    }

    fn set(&mut self, param: &Param, gradient: Vec<f32>) -> Result<(), ModelError> {
        either!(self, g => g.set(param, gradient))
    }

    fn hand_on(&mut self, from: &Param, to: &Param) -> Result<(), ModelError> {
        either!(self, g => g.hand_on(from, to))
    }

    fn add_redundancy(
        &mut self,
        rows: &[&Param],
        pairs: &[(usize, usize)],
        reduction: Reduction,
        weight: f64,
    ) -> Result<f64, ModelError> {
        either!(self, g => g.add_redundancy(rows, pairs, reduction, weight))
    }

    fn mean_room(
        &mut self,
        param: &Param,
        mean: Option<&mut Mirror>,
    ) -> Result<Option<Mirror>, ModelError> {
        either!(self, g => g.mean_room(param, mean))
    }

    fn mean_add(&mut self, param: &Param, mean: &mut Mirror, share: f32) -> Result<(), ModelError> {
        either!(self, g => g.mean_add(param, mean, share))
    }

    fn replace(&mut self, param: &Param, mean: Option<Mirror>) -> Result<(), ModelError> {
        either!(self, g => Gradients::replace(g, param, mean))
    }
}

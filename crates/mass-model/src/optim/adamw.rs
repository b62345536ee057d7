use std::collections::BTreeMap;
use std::ops::Range;

use mass_expand::Moments;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::groups::{Group, Select, decide};
use crate::error::ModelError;
use crate::gradients::CpuGradients;
use crate::kernels::adamw::{AdamWStep, update};
use crate::kernels::scratch::give_back;
use crate::kernels::vector::dot;
use crate::kernels::vectorised;
use crate::mirror::Mirror;
use crate::param::{Param, Parameters};
#[cfg(feature = "cuda")]
use {
    crate::ops::CudaGradients,
    mass_cuda::Buffer,
    mass_cuda::kernels::{dots, optimiser},
};

/// Settings of [`AdamW`] but for the learning rate, which is given with each step.
///
/// ```
/// use mass_model::optim::{AdamWConfig, Group, Select};
///
/// // Decay on everything, as many fine-tuning recipes have it, and a head that learns faster.
/// let mut config = AdamWConfig::default().decaying_everything();
/// config.groups.push(Group {
///     name: "head".into(),
///     select: Select::Prefix("head".into()),
///     weight_decay: None,
///     lr_scale: Some(10.0),
/// });
/// # mass_model::optim::AdamW::new(config)?;
/// # Ok::<(), mass_model::ModelError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdamWConfig {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the denominator.
    pub eps: f64,
    /// Decoupled weight decay, on parameters that decay (matrices) and that no group gives another.
    pub weight_decay: f64,
    /// Largest norm of all gradients together; larger ones are scaled down.
    pub clip_norm: Option<f64>,
    /// Parameters with a weight decay or learning rate of their own. Each of the two is settled by the first group that
    /// selects the parameter and speaks of it.
    #[serde(default)]
    pub groups: Vec<Group>,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self {
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.01,
            clip_norm: None,
            groups: Vec::new(),
        }
    }
}

impl AdamWConfig {
    /// The same with weight decay on every parameter that no group so far gives another: vectors too.
    pub fn decaying_everything(mut self) -> Self {
        self.groups.push(Group {
            name: "everything decays".into(),
            select: Select::All,
            weight_decay: Some(self.weight_decay),
            lr_scale: None,
        });
        self
    }
}

/// State of one parameter.
#[derive(Clone, Debug, PartialEq)]
pub struct ParameterState {
    /// Running mean of the gradient.
    pub m: Mirror,
    /// Running mean of its square.
    pub v: Mirror,
    /// Updates made to this parameter.
    pub step: u64,
}

/// AdamW (Loshchilov and Hutter, arXiv 1711.05101) with moments and step count for each parameter by name.
///
/// `m = β1 m + (1-β1) g`, `v = β2 v + (1-β2) g²`, `θ -= lr (m/(1-β1^t) / (√(v/(1-β2^t)) + ε) + λ θ)`, where t counts the
/// updates of that very parameter: a newcomer's first update is as large as anyone's first, where one global count would
/// shrink it. λ and a factor on lr may differ between parameters: see [`Group`]. Clipping scales all gradients by
/// `min(1, clip_norm / ‖g‖)`, the norm taken over every parameter together.
///
/// A parameter without a gradient ([`Param::find_gradient`](crate::Param::find_gradient)) is passed over, as PyTorch passes over
/// one whose `grad` is `None`: its values, moments and step count stay as they are, to the bit. Such are the matrices and biases of
/// an expert that no token of the batch was routed to: nothing was learnt about them, so they neither decay nor move on by
/// momentum. Its gate row is another matter: it is a row of the gate's matrix, which every token is scored by, and has a gradient in
/// every batch, zero or not; like a row of PyTorch's `Linear` it decays and moves. A gradient of zero is a gradient.
#[derive(Clone, Debug)]
pub struct AdamW {
    config: AdamWConfig,
    state: BTreeMap<String, ParameterState>,
}

impl AdamW {
    /// An optimiser without state; state is made as parameters are met.
    ///
    /// # Errors
    /// [`ModelError::Config`] for a beta outside [0, 1), an eps that is not positive in f32 (a gradient of zero would be divided
    /// by zero), or a negative or non-finite setting, also of a group.
    pub fn new(config: AdamWConfig) -> Result<Self, ModelError> {
        let AdamWConfig {
            beta1,
            beta2,
            eps,
            weight_decay,
            clip_norm,
            ref groups,
        } = config;
        for (name, value) in [("beta1", beta1), ("beta2", beta2)] {
            if !(0.0..1.0).contains(&value) {
                return Err(ModelError::Config(format!(
                    "AdamW {name} is {value}, not in [0, 1)"
                )));
            }
        }
        for (name, value) in [
            ("eps", eps),
            ("weight decay", weight_decay),
            ("clip norm", clip_norm.unwrap_or(1.0)),
        ] {
            if !value.is_finite() || value < 0.0 {
                return Err(ModelError::Config(format!(
                    "AdamW {name} is {value}, not a number of at least 0"
                )));
            }
        }
        if eps as f32 <= 0.0 {
            return Err(ModelError::Config(format!(
                "AdamW eps is {eps}, not positive in f32"
            )));
        }
        groups.iter().try_for_each(Group::check)?;
        Ok(Self {
            config,
            state: BTreeMap::new(),
        })
    }

    /// The settings.
    pub fn config(&self) -> &AdamWConfig {
        &self.config
    }

    /// Updates every parameter of `model` that has a gradient, at learning rate `lr`. The gradients are used up: their memory
    /// serves the next backward pass. Returns the norm of all gradients.
    ///
    /// A parameter that has no gradient, because no operation of the backward pass read it, stays as it is with its moments and
    /// its step count: it does not decay either (PyTorch's rule for a gradient of `None`).
    ///
    /// # Errors
    /// [`ModelError::NoGradient`] if no parameter has a gradient, so that nothing could be learnt: the gradients are of another
    /// model, or were used up. [`ModelError::NonFinite`] if a gradient or the learning rate is NaN or infinite, [`ModelError::Config`] for a negative
    /// learning rate, [`ModelError::Shape`] if a parameter
    /// has another size than its moments; no parameter is changed then.
    pub fn step<M: Parameters + ?Sized, G: Gradients>(
        &mut self,
        model: &mut M,
        gradients: &mut G,
        lr: f64,
    ) -> Result<f64, ModelError> {
        if !lr.is_finite() {
            return Err(ModelError::NonFinite(format!("the learning rate {lr}")));
        }
        if lr < 0.0 {
            return Err(ModelError::Config(format!(
                "a learning rate of {lr}; it must not be negative"
            )));
        }
        let (mut names, mut params) = (Vec::new(), Vec::new());
        model.visit("", &mut |name, param| {
            names.push(name);
            params.push(param);
        });
        let (mut squares, mut found) = (0.0, 0_usize);
        let all = gradients.sums_of_squares(&params)?;
        for ((name, param), own) in names.iter().zip(&params).zip(all) {
            if let Some(s) = self.state.get(name)
                && s.m.len() != param.len()
            {
                let what = format!("moments of {name}");
                return Err(ModelError::shape(what, &[param.len()], &[s.m.len()]));
            }
            let Some(own) = own else {
                continue;
            };
            found += 1;
            if !own.is_finite() {
                return Err(ModelError::NonFinite(format!("the gradient of {name}")));
            }
            squares += own;
        }
        if !params.is_empty() && found == 0 {
            let what = format!("each of the optimiser's {} parameters", params.len());
            return Err(ModelError::NoGradient(what));
        }
        let norm = squares.sqrt();
        let gradient_scale = match self.config.clip_norm {
            Some(limit) if norm > limit => limit / norm,
            _ => 1.0,
        };
        let AdamWConfig {
            beta1,
            beta2,
            eps,
            weight_decay,
            ref groups,
            ..
        } = self.config;
        let mut outcome = Ok(());
        model.visit_mut("", &mut |name, param| {
            if outcome.is_err() {
                return;
            }
            let g = match gradients.take(param) {
                Ok(Some(g)) => g,
                Ok(None) => return,
                Err(e) => {
                    outcome = Err(e);
                    return;
                }
            };
            let n = param.len();
            let (decay, lr_scale) = decide(groups, weight_decay, &name, param);
            let state = self.state.entry(name).or_insert_with(|| ParameterState {
                m: vec![0.0; n].into(),
                v: vec![0.0; n].into(),
                step: 0,
            });
            state.step = state.step.saturating_add(1);
            let t = i32::try_from(state.step).unwrap_or(i32::MAX);
            let step = AdamWStep {
                lr: (lr * lr_scale) as f32,
                beta1: beta1 as f32,
                beta2: beta2 as f32,
                take1: (1.0 - beta1) as f32,
                take2: (1.0 - beta2) as f32,
                eps: eps as f32,
                weight_decay: decay as f32,
                bias1: (1.0 - beta1.powi(t)) as f32,
                bias2: (1.0 - beta2.powi(t)) as f32,
                gradient_scale: gradient_scale as f32,
            };
            outcome = G::update(param, g, state, step);
        });
        outcome.map(|()| norm)
    }

    /// Gives every parameter under `newcomer` (a prefix such as `blocks.0.moe.experts.7`) its first state.
    pub fn adopt(&mut self, source: &str, newcomer: &str, moments: Moments) {
        self.forget(newcomer);
        if moments == Moments::Inherit {
            let prefix = format!("{source}.");
            let copies: Vec<_> = self
                .state
                .iter()
                .filter_map(|(name, state)| {
                    let rest = name.strip_prefix(&prefix)?;
                    Some((format!("{newcomer}.{rest}"), state.clone()))
                })
                .collect();
            self.state.extend(copies);
        }
    }

    /// Drops the state of every parameter under a prefix.
    pub fn forget(&mut self, prefix: &str) {
        let prefix = format!("{prefix}.");
        self.state.retain(|name, _| !name.starts_with(&prefix));
    }

    /// State by parameter name.
    pub fn state(&self) -> &BTreeMap<String, ParameterState> {
        &self.state
    }

    /// Replaces all state, as when a checkpoint is loaded.
    ///
    /// # Errors
    /// [`ModelError::Shape`] if a parameter's two moments differ in length.
    pub fn restore(&mut self, state: BTreeMap<String, ParameterState>) -> Result<(), ModelError> {
        for (name, s) in &state {
            if s.m.len() != s.v.len() {
                return Err(ModelError::shape(
                    format!("moments of {name}"),
                    &[s.m.len()],
                    &[s.v.len()],
                ));
            }
        }
        self.state = state;
        Ok(())
    }
}

mod sealed {
    pub trait Sealed {}
}

/// Gradients of a model's parameters, on the host or on a device: what [`AdamW::step`] takes.
pub trait Gradients: sealed::Sealed {
    /// Those of one parameter.
    #[doc(hidden)]
    type Values;

    /// The sum of squares of each parameter's gradient, if there is one.
    #[doc(hidden)]
    fn sums_of_squares(&mut self, params: &[&Param]) -> Result<Vec<Option<f64>>, ModelError>;

    /// Takes a parameter's gradient out.
    #[doc(hidden)]
    fn take(&mut self, param: &Param) -> Result<Option<Self::Values>, ModelError>;

    /// Makes some values of a parameter's gradient zero, if there is one.
    #[doc(hidden)]
    fn zero(&mut self, param: &Param, which: Range<usize>) -> Result<(), ModelError>;

    /// Updates a parameter, where its gradient lies.
    #[doc(hidden)]
    fn update(
        param: &mut Param,
        gradient: Self::Values,
        state: &mut ParameterState,
        step: AdamWStep,
    ) -> Result<(), ModelError>;
}

impl sealed::Sealed for CpuGradients {}

impl Gradients for CpuGradients {
    type Values = Vec<f32>;

    fn sums_of_squares(&mut self, params: &[&Param]) -> Result<Vec<Option<f64>>, ModelError> {
        let mut sums = Vec::with_capacity(params.len());
        for param in params {
            sums.push(param.find_gradient(self)?.map(|g| sum_of_squares(g)));
        }
        Ok(sums)
    }

    fn take(&mut self, param: &Param) -> Result<Option<Vec<f32>>, ModelError> {
        param.take_gradient(self)
    }

    fn zero(&mut self, param: &Param, which: Range<usize>) -> Result<(), ModelError> {
        if let Some(gradient) = param.find_gradient(self)? {
            gradient[which].fill(0.0);
        }
        Ok(())
    }

    fn update(
        param: &mut Param,
        gradient: Vec<f32>,
        state: &mut ParameterState,
        step: AdamWStep,
    ) -> Result<(), ModelError> {
        let (m, v) = (&mut state.m, &mut state.v);
        update(param.values_mut(), &gradient, m, v, step);
        give_back(gradient);
        Ok(())
    }
}

#[cfg(feature = "cuda")]
impl sealed::Sealed for CudaGradients {}

#[cfg(feature = "cuda")]
impl Gradients for CudaGradients {
    type Values = Buffer<f32>;

    fn sums_of_squares(&mut self, params: &[&Param]) -> Result<Vec<Option<f64>>, ModelError> {
        let found: Vec<_> = params.iter().map(|param| self.find(param)).collect();
        let there: Vec<_> = found.iter().flatten().copied().collect();
        let mut sums = dots::sums_of_squares(self.device(), &there)?.into_iter();
        let of = |found: &Option<_>| found.and_then(|_| sums.next());
        Ok(found.iter().map(of).collect())
    }

    fn take(&mut self, param: &Param) -> Result<Option<Buffer<f32>>, ModelError> {
        Ok(self.take(param))
    }

    fn zero(&mut self, param: &Param, which: Range<usize>) -> Result<(), ModelError> {
        self.zero(param, which)
    }

    fn update(
        param: &mut Param,
        gradient: Buffer<f32>,
        state: &mut ParameterState,
        step: AdamWStep,
    ) -> Result<(), ModelError> {
        let device = gradient.device();
        let update = optimiser::Update {
            theta: param.mirror_mut().on_mut(device)?.view_mut(),
            gradient: gradient.view(),
            first: state.m.on_mut(device)?.view_mut(),
            second: state.v.on_mut(device)?.view_mut(),
            step: optimiser::AdamWStep {
                lr: step.lr,
                beta1: step.beta1,
                beta2: step.beta2,
                take1: step.take1,
                take2: step.take2,
                eps: step.eps,
                weight_decay: step.weight_decay,
                bias1: step.bias1,
                bias2: step.bias2,
                gradient_scale: step.gradient_scale,
            },
        };
        Ok(optimiser::adamw(device, &mut [update])?)
    }
}

/// Sum of squares: blocks in f32, their sum in f64, as exact as needed and as fast as memory. The order of the sums does
/// not depend on the number of threads.
pub(crate) fn sum_of_squares(g: &[f32]) -> f64 {
    const PIECE: usize = 1 << 18;
    let piece = |g: &[f32]| -> f64 {
        let block = |c: &[f32]| {
            f64::from(vectorised(
                #[inline(always)]
                || dot(c, c),
            ))
        };
        g.chunks(4096).map(block).sum()
    };
    if g.len() <= PIECE {
        return piece(g);
    }
    let pieces: Vec<f64> = g.par_chunks(PIECE).map(piece).collect();
    pieces.into_iter().sum()
}

use std::collections::{BTreeMap, HashSet};

use mass_expand::Moments;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::gradients::Gradients;
use super::groups::{Group, Select, decide};
use crate::error::ModelError;
use crate::gradients::CpuGradients;
use crate::kernels::adamw::{AdamWStep, update};
use crate::kernels::scratch::give_back;
use crate::kernels::vector::dot;
use crate::kernels::vectorised;
use crate::mirror::Mirror;
use crate::parallel::Ranks;
use crate::param::{Held, Param, Parameters, check_finite, check_names};
#[cfg(feature = "cuda")]
use {
    crate::ops::CudaGradients,
    mass_cuda::kernels::optimiser,
    mass_cuda::{Buffer, Device},
    std::sync::Arc,
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

impl ParameterState {
    /// Refuses moments that no gradients have. The second may have become infinite.
    pub(crate) fn check(&self, name: &str) -> Result<(), ModelError> {
        let (m, v) = (self.m.try_values()?, self.v.try_values()?);
        if m.len() != v.len() {
            let what = format!("moments of {name}");
            return Err(ModelError::shape(what, &[m.len()], &[v.len()]));
        }
        check_finite("first moments", name, m)?;
        match v.iter().find(|v| v.is_nan() || **v < 0.0) {
            Some(v) if v.is_nan() => check_finite("second moments", name, &[*v]),
            Some(v) => Err(ModelError::Config(format!(
                "{v} among the second moments of {name}, which are never negative"
            ))),
            None => Ok(()),
        }
    }
}

/// AdamW (Loshchilov and Hutter, arXiv 1711.05101) with moments and step count for each parameter by name.
///
/// `m = β1 m + (1-β1) g`, `v = β2 v + (1-β2) g²`, `θ -= lr (m/(1-β1^t) / (√(v/(1-β2^t)) + ε) + λ θ)`, where t counts the
/// updates of that very parameter: a newcomer's first update is as large as anyone's first, where one global count would
/// shrink it. λ and a factor on lr may differ between parameters: see [`Group`]. Clipping scales all gradients by
/// `min(1, clip_norm / ‖g‖)`, the norm taken over every parameter together.
///
/// A parameter without a gradient ([`Param::find_gradient`](crate::Param::find_gradient)) is passed over, as PyTorch passes
/// over one whose `grad` is `None`: its values, moments and step count stay as they are, to the bit. Such are the matrices and
/// biases of an expert that no token of the batch was routed to: nothing was learnt about them, so they neither decay nor move
/// on by momentum. Its gate row is another matter: it is a row of the gate's matrix, which every token is scored by, and has a
/// gradient in every batch, zero or not; like a row of PyTorch's `Linear` it decays and moves. A gradient of zero is a
/// gradient.
#[derive(Clone, Debug)]
pub struct AdamW {
    config: AdamWConfig,
    state: BTreeMap<String, ParameterState>,
    /// Who holds the parameters that are not all here.
    ranks: Ranks,
}

impl AdamW {
    /// An optimiser without state; state is made as parameters are met.
    ///
    /// # Errors
    /// [`ModelError::Config`] for a beta outside [0, 1), or 1 when it is rounded to f32, an eps that is not positive in f32 (a
    /// gradient of zero would be divided by zero), or a negative or non-finite setting, also of a group.
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
            if !(value >= 0.0 && (value as f32) < 1.0) {
                return Err(ModelError::Config(format!(
                    "AdamW {name} is {value}, not in [0, 1) in f32"
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
            ranks: Ranks::default(),
        })
    }

    /// Says which ranks hold a part of the model each ([`divide`](crate::parallel::divide)): the norm of all gradients is taken
    /// over all of them.
    pub fn set_ranks(&mut self, ranks: &Ranks) {
        self.ranks = ranks.clone();
    }

    pub(crate) fn state_mut(&mut self) -> &mut BTreeMap<String, ParameterState> {
        &mut self.state
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
    /// model, or were used up. [`ModelError::NonFinite`] if a gradient or the learning rate is NaN or infinite,
    /// [`ModelError::Config`] for a negative learning rate, or one that is too large for f32 as a group scales it, alone, times
    /// the weight decay or over 1 - beta1 (so for eps and weight decay), and for two parameters of one name.
    /// [`ModelError::Shape`] if a parameter has another size than its moments. `ModelError::Cuda` if the memory of a device
    /// does not suffice, or it has failed. No parameter, moment or gradient is changed then, so that the step may be made
    /// again.
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
        check_names(model)?;
        let (mut names, mut params) = (Vec::new(), Vec::new());
        model.visit("", &mut |name, param| {
            names.push(name);
            params.push(param);
        });
        let (mut squares, mut found) = (0.0, Vec::with_capacity(params.len()));
        // Of what this rank holds and others do not.
        let (mut own_squares, mut divided) = (0.0, false);
        let all = gradients.sums_of_squares(&params)?;
        for ((name, param), own) in names.iter().zip(&params).zip(all) {
            if let Some(s) = self.state.get(name)
                && s.m.len() != param.len()
            {
                let what = format!("moments of {name}");
                return Err(ModelError::shape(what, &[param.len()], &[s.m.len()]));
            }
            found.push(own.is_some());
            divided |= param.held() != Held::Everywhere;
            let Some(own) = own else {
                continue;
            };
            if !own.is_finite() {
                return Err(ModelError::NonFinite(format!("the gradient of {name}")));
            }
            match param.held() {
                Held::Everywhere => squares += own,
                _ => own_squares += own,
            }
        }
        if divided {
            // Every group has them all: the first counts.
            let first = self.ranks.rank() == self.ranks.place();
            let mut sum = [if first { own_squares } else { 0.0 }];
            self.ranks.sum(&mut sum)?;
            squares += sum[0];
        }
        if !params.is_empty() && !found.contains(&true) {
            let what = format!("each of the optimiser's {} parameters", params.len());
            return Err(ModelError::NoGradient(what));
        }
        let norm = squares.sqrt();
        let gradient_scale = match self.config.clip_norm {
            Some(limit) if norm > limit => limit / norm,
            _ => 1.0,
        };
        let rule = Rule {
            config: &self.config,
            lr,
            gradient_scale,
        };
        let mut met = HashSet::new();
        let mut due = Vec::with_capacity(params.len());
        for ((name, param), found) in names.iter().zip(&params).zip(found) {
            // One that is met again, by another name, has used its gradient up.
            let first = met.insert(std::ptr::from_ref(*param));
            due.push(match found && first {
                true => Some(rule.of(name, param)?),
                false => None,
            });
        }
        drop((names, params));
        gradients.update(model, &mut self.state, &rule, &due)?;
        Ok(norm)
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
    /// [`ModelError::Shape`] if a parameter's two moments differ in length, [`ModelError::NonFinite`] if one is NaN or a first one
    /// infinite, [`ModelError::Config`] if a second one is negative; that of a device that has failed. Nothing is replaced then.
    pub fn restore(&mut self, state: BTreeMap<String, ParameterState>) -> Result<(), ModelError> {
        state.iter().try_for_each(|(name, s)| s.check(name))?;
        self.state = state;
        Ok(())
    }
}

/// What an update does to every parameter.
#[doc(hidden)]
#[derive(Debug)]
pub struct Rule<'a> {
    config: &'a AdamWConfig,
    lr: f64,
    gradient_scale: f64,
}

/// What an update does to one parameter: its learning rate and weight decay.
#[doc(hidden)]
#[derive(Clone, Copy, Debug)]
pub struct Due {
    lr: f32,
    weight_decay: f32,
}

impl Rule<'_> {
    /// Refuses what is too large for f32.
    fn of(&self, name: &str, param: &Param) -> Result<Due, ModelError> {
        let AdamWConfig {
            ref groups,
            weight_decay,
            eps,
            beta1,
            ..
        } = *self.config;
        let (decay, lr_scale) = decide(groups, weight_decay, name, param);
        let lr = self.lr * lr_scale;
        // The factors of an update, the first of which is the largest.
        let (shrink, rate) = (lr as f32 * decay as f32, lr as f32 / (1.0 - beta1) as f32);
        for (what, value, in_f32) in [
            ("learning rate", lr, lr as f32),
            ("weight decay", decay, decay as f32),
            ("eps", eps, eps as f32),
            ("learning rate times weight decay", lr * decay, shrink),
            ("learning rate over 1 - beta1", lr / (1.0 - beta1), rate),
        ] {
            if !in_f32.is_finite() {
                let what = format!("AdamW {what} of {name} is {value}, too large for f32");
                return Err(ModelError::Config(what));
            }
        }
        Ok(Due {
            lr: lr as f32,
            weight_decay: decay as f32,
        })
    }

    /// The scalars of a parameter's update number `count`, from 1.
    fn step(&self, due: Due, count: u64) -> AdamWStep {
        let &AdamWConfig {
            beta1, beta2, eps, ..
        } = self.config;
        let t = i32::try_from(count).unwrap_or(i32::MAX);
        AdamWStep {
            lr: due.lr,
            beta1: beta1 as f32,
            beta2: beta2 as f32,
            take1: (1.0 - beta1) as f32,
            take2: (1.0 - beta2) as f32,
            eps: eps as f32,
            weight_decay: due.weight_decay,
            bias1: (1.0 - beta1.powi(t)) as f32,
            bias2: (1.0 - beta2.powi(t)) as f32,
            gradient_scale: self.gradient_scale as f32,
        }
    }
}

/// Updates the parameters that are due on the host.
pub(super) fn update_here<M: Parameters + ?Sized>(
    gradients: &mut CpuGradients,
    model: &mut M,
    state: &mut BTreeMap<String, ParameterState>,
    rule: &Rule<'_>,
    due: &[Option<Due>],
) -> Result<(), ModelError> {
    // What a device has changed is read before anything is written: the device may have failed.
    let (mut outcome, mut all) = (Ok(()), due.iter());
    model.visit("", &mut |name, param| {
        if let (Some(Some(_)), Ok(())) = (all.next(), &outcome) {
            outcome = param.try_values().and_then(|_| {
                if let Some(own) = state.get(&name) {
                    own.m.try_values()?;
                    own.v.try_values()?;
                }
                Ok(())
            });
        }
    });
    outcome?;
    let (mut outcome, mut all) = (Ok(()), due.iter());
    model.visit_mut("", &mut |name, param| {
        let (Some(&Some(due)), Ok(())) = (all.next(), &outcome) else {
            return;
        };
        let gradient = match param.take_gradient(gradients) {
            Ok(Some(gradient)) => gradient,
            Ok(None) => return,
            Err(e) => {
                outcome = Err(e);
                return;
            }
        };
        let n = param.len();
        let ParameterState { m, v, step } = state.entry(name).or_insert_with(|| ParameterState {
            m: vec![0.0; n].into(),
            v: vec![0.0; n].into(),
            step: 0,
        });
        *step = step.saturating_add(1);
        let scalars = rule.step(due, *step);
        update(param.values_mut(), &gradient, m, v, scalars);
        give_back(gradient);
    });
    outcome
}

/// Updates the parameters that are due on a device: first all memory is found, then one launch changes everything, and only then is
/// anything noted.
#[cfg(feature = "cuda")]
pub(super) fn update_there<M: Parameters + ?Sized>(
    gradients: &mut CudaGradients,
    model: &mut M,
    state: &mut BTreeMap<String, ParameterState>,
    rule: &Rule<'_>,
    due: &[Option<Due>],
) -> Result<(), ModelError> {
    let device = gradients.device().clone();
    let mut new = BTreeMap::new();
    let (mut outcome, mut all) = (Ok(()), due.iter());
    model.visit_mut("", &mut |name, param| {
        if let (Some(Some(_)), Ok(())) = (all.next(), &outcome) {
            outcome = own_on(&device, name, param, state, &mut new);
        }
    });
    outcome?;

    let mut tasks = Vec::with_capacity(due.len());
    let mut all = due.iter();
    let shared: &M = model;
    shared.visit("", &mut |name, param| {
        let own = state.get(&name).or_else(|| new.get(&name));
        if let (Some(&Some(due)), Some(own)) = (all.next(), own)
            && let Some(gradient) = gradients.find(param)
        {
            let lent = [param.mirror(), &own.m, &own.v].map(Mirror::lend);
            tasks.push((lent, gradient, rule.step(due, own.step.saturating_add(1))));
        }
    });
    let updates = tasks.iter_mut().map(|([theta, m, v], gradient, step)| {
        let [theta, first, second] = [theta, m, v].map(|lent| lent.buffer().view_mut());
        optimiser::Update {
            theta,
            gradient: *gradient,
            first,
            second,
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
        }
    });
    optimiser::adamw(&device, &mut updates.collect::<Vec<_>>())?;
    drop(tasks);

    // Nothing fails from here on.
    state.append(&mut new);
    let mut all = due.iter();
    model.visit_mut("", &mut |name, param| {
        if let (Some(Some(_)), Some(own)) = (all.next(), state.get_mut(&name)) {
            gradients.take(param);
            own.step = own.step.saturating_add(1);
            for values in [param.mirror_mut(), &mut own.m, &mut own.v] {
                values.device_written();
            }
        }
    });
    Ok(())
}

/// Makes room on a device for the update of a parameter: its values and moments lie there, and nobody else holds them. The moments
/// of one that has none yet go to `new`.
#[cfg(feature = "cuda")]
fn own_on(
    device: &Device,
    name: String,
    param: &mut Param,
    state: &mut BTreeMap<String, ParameterState>,
    new: &mut BTreeMap<String, ParameterState>,
) -> Result<(), ModelError> {
    param.mirror_mut().own_on(device)?;
    if let Some(own) = state.get_mut(&name) {
        own.m.own_on(device)?;
        return own.v.own_on(device);
    }
    let zeros = || -> Result<Mirror, ModelError> {
        let zeros = Buffer::zeros(device, param.len())?;
        Ok(Mirror::of_buffer(Arc::new(zeros)))
    };
    let (m, v, step) = (zeros()?, zeros()?, 0);
    new.insert(name, ParameterState { m, v, step });
    Ok(())
}

/// Sum of squares: blocks in f32 (those too large or too small for it in f64), their sum in f64, as exact as needed and as fast as
/// memory. The order of the sums does not depend on the number of threads.
pub(crate) fn sum_of_squares(g: &[f32]) -> f64 {
    const PIECE: usize = 1 << 18;
    // Squares of a block that f32 rounds to subnormal numbers are off by less than 4096 times 2^-150, or 3e-42.
    const LEAST: f32 = 1e-35;
    let piece = |g: &[f32]| -> f64 {
        let block = |c: &[f32]| {
            let sum = vectorised(
                #[inline(always)]
                || dot(c, c),
            );
            let is_zero = || {
                vectorised(
                    #[inline(always)]
                    || c.iter().fold(0, |bits, x| bits | x.to_bits() << 1) == 0,
                )
            };
            match sum {
                LEAST..=f32::MAX => f64::from(sum),
                // Most blocks without a sum have no gradient at all.
                0.0 if is_zero() => 0.0,
                // Squares of numbers that f32 holds are too large for it, or too small.
                _ => c.iter().map(|&x| f64::from(x).powi(2)).sum(),
            }
        };
        g.chunks(4096).map(block).sum()
    };
    if g.len() <= PIECE {
        return piece(g);
    }
    let pieces: Vec<f64> = g.par_chunks(PIECE).map(piece).collect();
    pieces.into_iter().sum()
}

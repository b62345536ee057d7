use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::error::ModelError;
use crate::lineage::{Lineage, tick};
use crate::mirror::Mirror;
use crate::param::{Parameters, check_finite, check_names, reach_devices};

/// Exponential moving average of weights, by parameter name.
///
/// `s = decay s + (1 - decay) θ` after every update (Polyak and Juditsky, 1992), beginning at the first weights seen. The
/// pool may change between two updates: a parameter that was split off another ([`Param::offspring`](crate::Param::offspring))
/// begins at that one's average, any other that appears at its own value ([`adopt`](Self::adopt) gives it the average of another),
/// and one that vanishes is dropped. Averaged are trainable values alone; offsets of logits and the state of routers are the
/// model's own.
///
/// A split also moves values at once: a bisection parts two gate rows, and the offsets with them. The average makes the same
/// move ([`Param::move_to`](crate::Param::move_to)) before it is used again, so that the averaged model after a split is the
/// split of the averaged model. Averaging the move itself would leave rows and offsets that do not belong together for
/// `1 / (1 - decay)` steps.
///
/// ```
/// use mass_model::{Param, Parameters, nn::LayerNorm, optim::Ema};
///
/// let mut model = LayerNorm::new(2, 1e-5)?;
/// let mut ema = Ema::new(0.75)?;
/// ema.update(&model)?;
/// model.visit_mut("", &mut |_, p| p.values_mut().fill(5.0));
/// ema.update(&model)?;
/// assert_eq!(ema.shadow()["weight"], [2.0, 2.0]); // 0.75 * 1 + 0.25 * 5
/// let averaged = ema.evaluate(&mut model, |m| m.weight.values().to_vec())?;
/// assert_eq!(averaged, [2.0, 2.0]);
/// assert_eq!(model.weight.values(), [5.0, 5.0]);
/// # Ok::<(), mass_model::ModelError>(())
/// ```
#[derive(Clone, Debug)]
pub struct Ema {
    config: EmaConfig,
    shadow: BTreeMap<String, Mirror>,
    swapped: bool,
    /// Moves of parameters before this time are in the averages.
    seen: u64,
    /// Newcomers that began at the average of another, with its name.
    adopted: BTreeMap<String, String>,
}

/// By settings and averages, whenever they were seen.
impl PartialEq for Ema {
    fn eq(&self, other: &Self) -> bool {
        let of = |ema: &Self| (ema.config, ema.swapped);
        of(self) == of(other) && self.shadow == other.shadow
    }
}

/// Settings of an [`Ema`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EmaConfig {
    /// How much of the average stays at an update, in [0, 1).
    pub decay: f64,
}

impl Ema {
    /// An average that has seen nothing yet.
    ///
    /// # Errors
    /// [`ModelError::Config`] for a decay outside [0, 1), or one that is 1 when it is rounded to f32.
    pub fn new(decay: f64) -> Result<Self, ModelError> {
        Self::restore(EmaConfig { decay }, BTreeMap::new())
    }

    /// An average as it was saved.
    ///
    /// # Errors
    /// [`ModelError::Config`] for a decay outside [0, 1), or one that is 1 when it is rounded to f32;
    /// [`ModelError::NonFinite`] for an average that is NaN or infinite.
    pub fn restore(
        config: EmaConfig,
        shadow: BTreeMap<String, Vec<f32>>,
    ) -> Result<Self, ModelError> {
        let EmaConfig { decay } = config;
        if !(decay >= 0.0 && (decay as f32) < 1.0) {
            return Err(ModelError::Config(format!(
                "decay of averaged weights is {decay}, not in [0, 1) in f32"
            )));
        }
        for (name, values) in &shadow {
            check_finite("averages", name, values)?;
        }
        let shadow = shadow.into_iter().map(|(name, s)| (name, s.into()));
        Ok(Self {
            config,
            shadow: shadow.collect(),
            swapped: false,
            seen: tick(),
            adopted: BTreeMap::new(),
        })
    }

    /// The settings.
    pub fn config(&self) -> &EmaConfig {
        &self.config
    }

    /// The averages by parameter name (the model's own weights while they are [swapped](Self::swap)), as of the last
    /// [`update`](Self::update) or [`follow`](Self::follow).
    pub fn shadow(&self) -> &BTreeMap<String, Mirror> {
        &self.shadow
    }

    /// Whether the averages are in the model at present.
    pub fn is_swapped(&self) -> bool {
        self.swapped
    }

    /// Takes in the weights after an optimiser's step. It does not look for NaN or infinities among them: the averages have them
    /// then, and what is computed with those is refused, as is a [checkpoint](crate::checkpoint::save) of them.
    ///
    /// # Errors
    /// [`ModelError::Config`] while the averages are in the model or if two parameters have one name, [`ModelError::Shape`] if
    /// a parameter has changed its size, that of a device that has changed the weights and failed; nothing is changed then.
    pub fn update<M: Parameters + ?Sized>(&mut self, model: &M) -> Result<(), ModelError> {
        reach_devices(model)?;
        self.follow(model)?;
        let keep = self.config.decay as f32;
        // Room first, where the weights are: no value has changed if there is none.
        let mut outcome = Ok(());
        model.visit("", &mut |name, param| {
            if let (Ok(()), Some(average)) = (&outcome, self.shadow.get_mut(&name)) {
                outcome = average.join(param.mirror());
            }
        });
        outcome?;
        let mut outcome = Ok(());
        model.visit("", &mut |name, param| {
            if let (Ok(()), Some(average)) = (&outcome, self.shadow.get_mut(&name)) {
                outcome = average.move_towards(param.mirror(), keep);
            }
        });
        outcome?;
        let mut before = std::mem::take(&mut self.shadow);
        model.visit("", &mut |name, param| {
            let average = match before.remove(&name) {
                Some(mut average) => {
                    average.moved(param.mirror());
                    average
                }
                None => param.mirror().twin(),
            };
            self.shadow.insert(name, average);
        });
        let shadow = &self.shadow;
        self.adopted.retain(|name, _| shadow.contains_key(name));
        Ok(())
    }

    /// Takes in what splits did to the model since the last update: parameters that were split off another get its average, and
    /// values that were moved at once move here too. [`update`](Self::update), [`swap`](Self::swap) and checkpoints do so
    /// themselves.
    ///
    /// # Errors
    /// As [`update`](Self::update).
    pub fn follow<M: Parameters + ?Sized>(&mut self, model: &M) -> Result<(), ModelError> {
        self.refuse_swapped()?;
        self.check_sizes(model)?;
        if !self.lags(model) {
            return Ok(());
        }
        // What will be moved is read first: it may lie on a device that has failed.
        let mut outcome = Ok(());
        model.visit("", &mut |name, param| {
            if let (Ok(()), Some(average)) = (&outcome, self.shadow.get(&name))
                && unseen(param.lineage(), self.seen).next().is_some()
            {
                outcome = average.try_values().map(|_| ());
            }
        });
        outcome?;
        let now = tick();
        let mut names = BTreeMap::new();
        model.visit("", &mut |name, param| {
            names.insert(param.lineage().id, name);
        });
        // In the order of their births: a newcomer may itself be the source of the next.
        let mut births = BTreeMap::new();
        model.visit("", &mut |name, param| {
            let Lineage { id, parent, .. } = param.lineage();
            let parent = parent.and_then(|id| names.get(&id));
            if let (Some(parent), false) = (parent, self.shadow.contains_key(&name)) {
                births.insert(*id, (name, parent.clone()));
            }
        });
        for (name, parent) in births.into_values() {
            if let Some(average) = self.shadow.get(&parent) {
                self.shadow.insert(name.clone(), average.clone());
                self.adopted.insert(name, parent);
            }
        }
        model.visit("", &mut |name, param| {
            if let Some(average) = self.shadow.get_mut(&name) {
                for step in unseen(param.lineage(), self.seen) {
                    average.iter_mut().zip(step).for_each(|(s, d)| *s += d);
                }
            }
        });
        self.seen = now;
        Ok(())
    }

    /// Whether a split has done something to the model that is not in the averages yet.
    pub(crate) fn lags<M: Parameters + ?Sized>(&self, model: &M) -> bool {
        let mut lags = false;
        model.visit("", &mut |name, param| {
            let lineage = param.lineage();
            lags |= match self.shadow.contains_key(&name) {
                true => unseen(lineage, self.seen).next().is_some(),
                false => lineage.parent.is_some_and(|_| lineage.id > self.seen),
            };
        });
        lags
    }

    /// Gives every parameter under `newcomer` (a prefix such as `blocks.0.moe.experts.7`) the average of its source. One that was
    /// split off the source has it already.
    pub fn adopt(&mut self, source: &str, newcomer: &str) {
        let prefix = format!("{source}.");
        let copies: Vec<_> = self
            .shadow
            .iter()
            .filter_map(|(name, average)| {
                let rest = name.strip_prefix(&prefix)?;
                let own = format!("{newcomer}.{rest}");
                (self.adopted.get(&own) != Some(name)).then(|| (own, name.clone(), average.clone()))
            })
            .collect();
        for (own, name, average) in copies {
            self.shadow.insert(own.clone(), average);
            self.adopted.insert(own, name);
        }
    }

    fn refuse_swapped(&self) -> Result<(), ModelError> {
        if self.swapped {
            return Err(ModelError::Config(
                "averaged weights are in the model; swap them out before training on".into(),
            ));
        }
        Ok(())
    }

    /// Exchanges weights and averages; a second call brings the weights back. A parameter without an average keeps its
    /// value.
    ///
    /// # Errors
    /// [`ModelError::Config`] if two parameters have one name, [`ModelError::Shape`] if one has changed its size, that of a device
    /// that has changed the weights and failed; nothing is exchanged then.
    pub fn swap<M: Parameters + ?Sized>(&mut self, model: &mut M) -> Result<(), ModelError> {
        reach_devices(model)?;
        if self.swapped {
            self.check_sizes(model)?;
        } else {
            self.follow(model)?;
        }
        model.visit_mut("", &mut |name, param| {
            if let Some(average) = self.shadow.get_mut(&name) {
                std::mem::swap(param.mirror_mut(), average);
            }
        });
        self.swapped = !self.swapped;
        Ok(())
    }

    /// Runs `f` on the model with averaged weights, then brings its own weights back.
    ///
    /// # Errors
    /// As [`swap`](Self::swap), and [`ModelError::Config`] if the averages are in the model already.
    pub fn evaluate<M: Parameters + ?Sized, R>(
        &mut self,
        model: &mut M,
        f: impl FnOnce(&M) -> R,
    ) -> Result<R, ModelError> {
        if self.swapped {
            return Err(ModelError::Config(
                "averaged weights are in the model already".into(),
            ));
        }
        self.swap(model)?;
        let result = f(model);
        self.swap(model)?;
        Ok(result)
    }

    fn check_sizes<M: Parameters + ?Sized>(&self, model: &M) -> Result<(), ModelError> {
        check_names(model)?;
        let mut wrong = None;
        model.visit("", &mut |name, param| {
            if let Some(average) = self.shadow.get(&name)
                && average.len() != param.len()
            {
                wrong.get_or_insert(ModelError::shape(
                    format!("average of {name}"),
                    &[param.len()],
                    &[average.len()],
                ));
            }
        });
        wrong.map_or(Ok(()), Err)
    }
}

/// The moves of a parameter that averages of before `seen` do not have.
fn unseen(lineage: &Lineage, seen: u64) -> impl Iterator<Item = &Vec<f32>> {
    let later = lineage.moves.iter().filter(move |step| step.at > seen);
    later.map(|step| &*step.by)
}

//! The ways in which growth is known to fail, named with their numbers.
//!
//! A run that grows nothing, or grows for the wrong reason, ends without an error. [`Controller::diagnoses`] tells such runs
//! from those that had nothing to grow for.

use std::fmt;

use mass_cpd::Step;
use serde::{Deserialize, Serialize};

use super::params::Trigger;
use super::state::{Average, LayerState};
use super::{Controller, ControllerParams, StopRule};
use crate::{ExpandError, ExpertId};

/// Of a pair's tokens, or of what a router could select, so much is all.
const NEARLY_ALL: f64 = 0.99;

/// Tokens selecting so large a part of all experts leave nothing to choose.
const EVERYBODY: f64 = 0.95;

/// With so large a part of the tokens at a weight that cannot change, the gate learns from the rest alone.
const MOST: f64 = 0.9;

/// Steps that an average has to be of before anything is said of it.
const LEAST_STEPS: u64 = 10;

/// What a layer's router did in one step; see [`Controller::observe_routing`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoutingObservation {
    /// Tokens routed.
    pub tokens: u64,
    /// Pairs of a token and an expert that it was given to: `tokens` times the mean number of experts a token.
    pub assignments: u64,
    /// Tokens whose routing weights are the same whatever the gate says, so that the gate has no gradient of them: with
    /// renormalised weights those of a single expert, whose weight is 1.
    pub constant: u64,
}

/// A known way to fail, seen in a run or in its parameters.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "diagnosis")]
#[non_exhaustive]
pub enum Diagnosis {
    /// The phase, or the run, ends before the trigger can be satisfied, or no pool has room.
    NoSplitReachable {
        /// First step at which the trigger can be satisfied.
        ready: Option<u64>,
        /// First step at which no split may happen any more.
        end: u64,
        /// Splits that the layer with most room has room for.
        room: u64,
    },
    /// The stop rule can never judge a newcomer.
    NoCheckReachable {
        /// First step at which a split can happen.
        first_split: u64,
        /// First step at which a check cannot be made any more.
        end: u64,
        /// Splits that the layer with most room has room for: a check on the training batch comes with a further one.
        room: u64,
    },
    /// A newcomer that the stop rule has not judged yet; after the last step, one that it never judged.
    NotJudged {
        /// The layer.
        layer: usize,
        /// The newcomer.
        expert: ExpertId,
        /// Step of its split.
        born: u64,
        /// Step of its check.
        due: u64,
        /// The last step observed.
        last_step: u64,
    },
    /// The phase is over, and no layer's trigger was ever satisfied.
    NeverTriggered {
        /// Steps on which it could have been.
        live_steps: u64,
        /// Alarms of detectors in them; the alignment test passed none.
        alarms: u64,
        /// The smallest p-value of any stream in them, over its horizon where its detector has one.
        smallest_p: Option<f64>,
    },
    /// The first trigger came on the first step on which it could: what set it off was there before anything could be seen.
    TriggeredAtOnce {
        /// The layer.
        layer: usize,
        /// That step.
        step: u64,
    },
    /// Of the two experts that a split left, one gets all the tokens.
    PairCollapsed {
        /// The layer.
        layer: usize,
        /// The expert that was split.
        source: ExpertId,
        /// The newcomer.
        newcomer: ExpertId,
        /// The one that gets the tokens.
        to: ExpertId,
        /// Its share of the pair's tokens, averaged.
        share: f64,
        /// The last step of that average.
        step: u64,
    },
    /// Tokens select nearly every expert of the pool: `p` is so large that nothing is chosen.
    SelectsEverybody {
        /// The layer.
        layer: usize,
        /// Mean experts a token, averaged.
        active_per_token: f64,
        /// Experts in the pool.
        experts: usize,
    },
    /// Most tokens give the gate no gradient: one expert a token, with renormalised weights.
    GateWithoutGradient {
        /// The layer.
        layer: usize,
        /// Share of the tokens that give it none, averaged.
        share: f64,
        /// Mean experts a token, averaged.
        active_per_token: f64,
    },
}

impl fmt::Display for Diagnosis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::NoSplitReachable { end, room: 0, .. } => write!(
                f,
                "no split can be reached before step {end}: every pool is full from the start"
            ),
            Self::NoSplitReachable { ready, end, .. } => {
                write!(
                    f,
                    "no split can be reached: the trigger cannot be satisfied "
                )?;
                match ready {
                    Some(ready) => write!(f, "before step {ready}")?,
                    None => write!(f, "at all")?,
                }
                write!(f, ", and splits end at step {end}")
            }
            Self::NoCheckReachable {
                first_split,
                end,
                room,
            } => write!(
                f,
                "no newcomer can be checked: the first split can be at step {first_split}, checks end at step {end}, and there \
                 is room for {room} split(s)"
            ),
            Self::NotJudged {
                layer,
                expert,
                born,
                due,
                last_step,
            } => write!(
                f,
                "layer {layer}: expert {expert}, born at step {born}, has not been judged: its check is due at step {due}, and \
                 the last step is {last_step}"
            ),
            Self::NeverTriggered {
                live_steps,
                alarms,
                smallest_p,
            } => {
                write!(
                    f,
                    "nothing was ever triggered in {live_steps} live steps ({alarms} alarms"
                )?;
                match smallest_p {
                    Some(p) => write!(f, ", smallest p {p:.2e})"),
                    None => write!(f, ")"),
                }
            }
            Self::TriggeredAtOnce { layer, step } => write!(
                f,
                "layer {layer}: triggered at step {step}, the first on which it could be"
            ),
            Self::PairCollapsed {
                layer,
                source,
                newcomer,
                to,
                share,
                step,
            } => write!(
                f,
                "layer {layer}: of the pair {source} and {newcomer}, expert {to} got {:.1} % of the tokens (step {step})",
                100.0 * share
            ),
            Self::SelectsEverybody {
                layer,
                active_per_token,
                experts,
            } => write!(
                f,
                "layer {layer}: a token selects {active_per_token:.2} of {experts} experts, nearly all"
            ),
            Self::GateWithoutGradient {
                layer,
                share,
                active_per_token,
            } => write!(
                f,
                "layer {layer}: {:.1} % of the tokens give the gate no gradient, at {active_per_token:.2} experts a token",
                100.0 * share
            ),
        }
    }
}

/// What of a run is kept for its diagnoses alone.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Signs {
    pub(super) first_live: Option<u64>,
    /// Alarms on live steps.
    pub(super) alarms: u64,
    /// Smallest p-value on live steps.
    pub(super) smallest_p: Option<f64>,
}

impl Signs {
    /// Takes note of what a detector said; whether it could have raised an alarm that counts: past its warm-up and its window
    /// full, on a step of the phase.
    pub(super) fn judged(&mut self, outcome: &Step, in_phase: bool) -> bool {
        let known = outcome.statistic.is_some() || outcome.p_value.is_some();
        if in_phase && known {
            self.alarms = self.alarms.saturating_add(outcome.alarm.into());
            let p = outcome.p_horizon.or(outcome.p_value);
            self.smallest_p = self.smallest_p.into_iter().chain(p).reduce(f64::min);
        }
        in_phase && known
    }
}

/// The same of one layer.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LayerSigns {
    pub(super) first_trigger: Option<u64>,
    /// Checks of the stop rule.
    pub(super) checks: u64,
    /// Part of the pool that a token selects, and part of the tokens whose weights are constant.
    pub(super) selected: Average,
    pub(super) constant: Average,
    routed_steps: u64,
    /// Pairs that had collapsed when one of them was removed.
    pub(super) collapsed: Vec<Diagnosis>,
}

impl ControllerParams {
    /// Why no split, or no check of the stop rule, can ever be reached with these parameters; `None` if both can.
    #[must_use]
    pub fn unreachable(&self) -> Option<Diagnosis> {
        let reach = self.reach();
        let room = self.room();
        match (reach.first_split, reach.first_check) {
            (None, _) => Some(Diagnosis::NoSplitReachable {
                ready: reach.ready,
                end: reach.end,
                room,
            }),
            (Some(first_split), None) if self.stop != StopRule::Never => {
                let held_out = matches!(self.stop, StopRule::HeldOut { .. });
                Some(Diagnosis::NoCheckReachable {
                    first_split,
                    end: self.steps.filter(|_| held_out).unwrap_or(reach.end),
                    room,
                })
            }
            _ => None,
        }
    }
}

impl Controller {
    /// Says what a layer's router did in the step under way. No decision depends on it; two of the
    /// [diagnoses](Self::diagnoses) do.
    ///
    /// # Errors
    /// [`ExpandError::Shape`] for a layer that does not exist, [`ExpandError::Parameter`] for more assignments than tokens times
    /// experts, or more constant tokens than tokens. Nothing has changed then.
    ///
    /// # Examples
    /// ```
    /// use mass_expand::{ControllerParams, Diagnosis, RoutingObservation};
    /// let mut controller = ControllerParams::calibrated(1, 4, 8, 2000).check()?;
    /// for _ in 0..10 {
    ///     let routing = RoutingObservation { tokens: 100, assignments: 396, constant: 0 };
    ///     controller.observe_routing(0, &routing)?;
    /// }
    /// assert!(matches!(controller.diagnoses()[..], [Diagnosis::SelectsEverybody { experts: 4, .. }]));
    /// # Ok::<(), mass_expand::ExpandError>(())
    /// ```
    pub fn observe_routing(
        &mut self,
        layer: usize,
        routing: &RoutingObservation,
    ) -> Result<(), ExpandError> {
        let layers = self.layers.len();
        let Some(state) = self.layers.get_mut(layer) else {
            return Err(ExpandError::Shape {
                what: "list of layers",
                got: layers,
                expected: layer.saturating_add(1),
            });
        };
        let RoutingObservation {
            tokens,
            assignments,
            constant,
        } = *routing;
        let (tokens, most) = (tokens as f64, tokens as f64 * state.ids.len() as f64);
        for (name, value, most, expected) in [
            (
                "assignments",
                assignments as f64,
                most,
                "at most tokens times experts",
            ),
            ("constant", constant as f64, tokens, "at most tokens"),
        ] {
            if value > most {
                return Err(ExpandError::Parameter {
                    name,
                    value,
                    expected,
                });
            }
        }
        if tokens > 0.0 {
            let keep = 1.0 - 1.0 / self.params.averaging_steps;
            let signs = &mut state.signs;
            signs.selected.update(assignments as f64 / most, keep);
            signs.constant.update(constant as f64 / tokens, keep);
            signs.routed_steps = signs.routed_steps.saturating_add(1);
        }
        Ok(())
    }

    /// The known ways to fail that show in the parameters and in the steps so far, each with its numbers. Empty is good.
    ///
    /// Averages are over `averaging_steps`. Two things can only be told of a layer whose routing is
    /// [observed](Self::observe_routing): that tokens select every expert, and that the gate has no gradient.
    ///
    /// # Examples
    /// ```
    /// use mass_expand::ControllerParams;
    /// let controller = ControllerParams::paper(1, 8, 16, 500).check()?;
    /// let found = controller.diagnoses();
    /// assert_eq!(
    ///     found[0].to_string(),
    ///     "no split can be reached: the trigger cannot be satisfied before step 59, and splits end at step 50"
    /// );
    /// # Ok::<(), mass_expand::ExpandError>(())
    /// ```
    #[must_use]
    pub fn diagnoses(&self) -> Vec<Diagnosis> {
        let grown = self.layers.iter().any(|layer| layer.expansions > 0);
        let checked = self.layers.iter().any(|layer| layer.signs.checks > 0);
        let unreachable = self.params.unreachable().filter(|d| match d {
            // The parameters tell of a run that begins with step 0; this one may not have.
            Diagnosis::NoSplitReachable { .. } => !grown,
            _ => !checked,
        });
        let no_split = matches!(unreachable, Some(Diagnosis::NoSplitReachable { .. }));
        let mut found: Vec<Diagnosis> = unreachable.into_iter().collect();
        if !no_split {
            found.extend(self.never_triggered());
        }
        for (index, layer) in self.layers.iter().enumerate() {
            found.extend(self.not_judged(index));
            let first = self.params.trigger_in(false);
            let scheduled = matches!(first, Trigger::Schedule { .. });
            if let Some(step) = layer.signs.first_trigger
                && !scheduled
                && self.signs.first_live == Some(step)
            {
                found.push(Diagnosis::TriggeredAtOnce { layer: index, step });
            }
            found.extend(&layer.signs.collapsed);
            found.extend(self.collapsed_pairs(index));
            found.extend(of_routing(index, layer));
        }
        found
    }

    fn never_triggered(&self) -> Option<Diagnosis> {
        let over = self.last_step.is_some_and(|last| {
            let end = self.params.reach().end;
            self.ended || last.saturating_add(1) >= end
        });
        let none = self.layers.iter().all(|l| l.signs.first_trigger.is_none());
        (over && none).then_some(Diagnosis::NeverTriggered {
            live_steps: self.live_steps,
            alarms: self.signs.alarms,
            smallest_p: self.signs.smallest_p,
        })
    }

    fn not_judged(&self, layer: usize) -> Option<Diagnosis> {
        let newest = self.layers[layer].newest?;
        let expert = self.awaiting_check(layer)?;
        Some(Diagnosis::NotJudged {
            layer,
            expert,
            born: newest.born,
            due: self.params.check_due(newest.born),
            last_step: self.last_step?,
        })
    }

    /// Pairs of which both are there and one gets all tokens.
    pub(super) fn collapsed_pairs(&self, layer: usize) -> impl Iterator<Item = Diagnosis> + '_ {
        let state = &self.layers[layer];
        let step = self.last_step.unwrap_or(0);
        state.pairs.iter().filter_map(move |&(source, newcomer)| {
            let of = |id| state.position(id).map(|at| &state.experts[at]);
            let (a, b) = (of(source)?, of(newcomer)?);
            let total = a.load.value + b.load.value;
            let steps = a.averaged_steps.min(b.averaged_steps);
            let (to, larger) = if a.load.value >= b.load.value {
                (source, a.load.value)
            } else {
                (newcomer, b.load.value)
            };
            let share = larger / total;
            (steps >= LEAST_STEPS && total > 0.0 && share >= NEARLY_ALL).then_some(
                Diagnosis::PairCollapsed {
                    layer,
                    source,
                    newcomer,
                    to,
                    share,
                    step,
                },
            )
        })
    }
}

/// What the router's averages say of a layer.
fn of_routing(layer: usize, state: &LayerState) -> Vec<Diagnosis> {
    let signs = &state.signs;
    let experts = state.ids.len();
    let active_per_token = signs.selected.value * experts as f64;
    let mut found = Vec::new();
    if signs.routed_steps < LEAST_STEPS {
        return found;
    }
    if experts > 1 && signs.selected.value >= EVERYBODY {
        found.push(Diagnosis::SelectsEverybody {
            layer,
            active_per_token,
            experts,
        });
    }
    if experts > 1 && signs.constant.value >= MOST {
        found.push(Diagnosis::GateWithoutGradient {
            layer,
            share: signs.constant.value,
            active_per_token,
        });
    }
    found
}

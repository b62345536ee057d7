//! What a training loop tells the controller, what the controller asks for, and what it wants done.

use serde::{Deserialize, Serialize};

use super::event::RemovalReason;
use super::params::{Moments, SplitOperator};
use crate::{ExpandError, ExpertId};

/// One training step, seen after the backward pass and before the optimizer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepObservation<'a> {
    /// Number of the step, larger than the last one's.
    pub step: u64,
    /// Training loss of the step, in nats.
    pub loss: f64,
    /// One entry per mixture layer.
    pub layers: &'a [LayerObservation<'a>],
}

impl<'a> StepObservation<'a> {
    /// All of it at once.
    #[must_use]
    pub const fn new(step: u64, loss: f64, layers: &'a [LayerObservation<'a>]) -> Self {
        Self { step, loss, layers }
    }
}

/// One mixture layer at one step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LayerObservation<'a> {
    /// The layer's active experts, in the order of [`Controller::active`](super::Controller::active).
    pub experts: &'a [ExpertObservation],
    /// Rows of an expert's first weight matrix (the width of the expert), at least 1.
    pub hidden: usize,
    /// Columns of an expert's first weight matrix (the dimension of the model), at least 1.
    pub dim: usize,
}

impl<'a> LayerObservation<'a> {
    /// Experts with a first matrix of `hidden` rows and `dim` columns.
    #[must_use]
    pub const fn new(experts: &'a [ExpertObservation], hidden: usize, dim: usize) -> Self {
        Self {
            experts,
            hidden,
            dim,
        }
    }

    pub(super) fn without_shares(&self) -> bool {
        self.experts.iter().all(|e| e.loss_share.is_none())
    }
}

/// One expert at one step.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ExpertObservation {
    /// Which expert.
    pub id: ExpertId,
    /// Frobenius norm of its gradient (`paper`: of all its parameters; `reference`: of its first matrix).
    pub gradient_norm: f64,
    /// Cosine of its gradient with its weights. If it is `None` although the gradient is not zero, and a rule needs
    /// it, the controller asks with [`Request::Alignment`]; so a loop may compute cosines only when asked.
    pub cosine: Option<f64>,
    /// Tokens routed to it in this step.
    pub load: u64,
    /// Its share of the step's loss, in [0, 1]: routing weight times token loss, summed over its tokens, over the same sum
    /// of all experts of its layer. `None` of every expert where that is not positive, as of a loss of zero: its average then
    /// stays.
    pub loss_share: Option<f64>,
    /// How undecided the routing of its tokens is: the mean over them of the entropy of the gate's distribution, in nats (or
    /// another entropy of what is routed to it, the same for all experts). `None` without tokens: its average then stays.
    pub routing_entropy: Option<f64>,
}

impl ExpertObservation {
    /// What every rule needs; the rest is absent and can be set.
    #[must_use]
    pub const fn new(id: ExpertId, gradient_norm: f64, load: u64) -> Self {
        Self {
            id,
            gradient_norm,
            cosine: None,
            load,
            loss_share: None,
            routing_entropy: None,
        }
    }
}

/// A figure that the controller needs before it can decide.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "request", deny_unknown_fields)]
pub enum Request {
    /// The cosine of this expert's gradient with its weights; answer with [`Answer::Alignment`].
    Alignment {
        /// Layer of the expert.
        layer: usize,
        /// The expert.
        expert: ExpertId,
    },
    /// The loss of the same training batch with this expert masked, and without; answer with [`Answer::MaskedLoss`].
    MaskedLoss {
        /// Layer of the expert.
        layer: usize,
        /// The expert.
        expert: ExpertId,
    },
    /// The same on a held-out probe set with dropout off, and with the gate of the other half as removal would leave it (see
    /// [`Action::Remove`]), as a paired difference with its standard error; answer with
    /// [`Answer::ProbeLoss`] or [`Answer::probe`].
    ProbeLoss {
        /// Layer of the expert.
        layer: usize,
        /// The expert.
        expert: ExpertId,
    },
}

/// The answer to a [`Request`].
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "answer")]
pub enum Answer {
    /// To [`Request::Alignment`].
    Alignment {
        /// Layer of the expert.
        layer: usize,
        /// The expert.
        expert: ExpertId,
        /// The cosine; `None` if gradient or weights are zero.
        cosine: Option<f64>,
    },
    /// To [`Request::MaskedLoss`].
    MaskedLoss {
        /// Layer of the expert.
        layer: usize,
        /// The expert.
        expert: ExpertId,
        /// Loss with the expert masked.
        masked: f64,
        /// Loss with every expert.
        full: f64,
    },
    /// To [`Request::ProbeLoss`].
    ProbeLoss {
        /// Layer of the expert.
        layer: usize,
        /// The expert.
        expert: ExpertId,
        /// Mean of the masked loss less the full loss, over the probe examples.
        difference: f64,
        /// Standard error of that mean.
        standard_error: f64,
    },
}

impl Answer {
    /// The answer to [`Request::ProbeLoss`] from the losses of the probe examples (or sequences): mean and standard
    /// error of the paired differences.
    ///
    /// # Errors
    /// [`ExpandError::Shape`] if the slices differ in length, [`ExpandError::Empty`] with fewer than two examples,
    /// [`ExpandError::NonFinite`].
    ///
    /// # Examples
    /// ```
    /// use mass_expand::{Answer, ExpertId};
    /// let answer = Answer::probe(0, ExpertId(7), &[1.2, 1.4, 1.3], &[1.0, 1.1, 1.2])?;
    /// let Answer::ProbeLoss { difference, standard_error, .. } = answer else { unreachable!() };
    /// assert!((difference - 0.2).abs() < 1e-12);
    /// assert!((standard_error - 0.1 / 3f64.sqrt()).abs() < 1e-12);
    /// # Ok::<(), mass_expand::ExpandError>(())
    /// ```
    pub fn probe(
        layer: usize,
        expert: ExpertId,
        masked: &[f64],
        full: &[f64],
    ) -> Result<Self, ExpandError> {
        if masked.len() != full.len() {
            return Err(ExpandError::Shape {
                what: "full losses",
                got: full.len(),
                expected: masked.len(),
            });
        }
        if masked.len() < 2 {
            return Err(ExpandError::Empty {
                what: "set of at least two probe losses",
            });
        }
        let n = masked.len() as f64;
        let differences = || masked.iter().zip(full).map(|(m, f)| m - f);
        let mean = differences().sum::<f64>() / n;
        let variance = differences().map(|d| (d - mean).powi(2)).sum::<f64>() / (n - 1.0);
        if !(mean.is_finite() && variance.is_finite()) {
            return Err(ExpandError::NonFinite {
                what: "probe losses",
            });
        }
        Ok(Self::ProbeLoss {
            layer,
            expert,
            difference: mean,
            standard_error: (variance / n).sqrt(),
        })
    }
}

/// What the training loop has to do before it runs the optimizer. Actions are to be carried out in the order given.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "action")]
#[non_exhaustive]
pub enum Action {
    /// Make `newcomer` out of `source`: weights, biases, gate row, gradients and optimizer moments.
    Split {
        /// Layer of both.
        layer: usize,
        /// The expert to split.
        source: ExpertId,
        /// The name of the new expert; it goes to the end of the layer's order.
        newcomer: ExpertId,
        /// How.
        operator: SplitOperator,
        /// What the newcomer's optimizer moments start from.
        moments: Moments,
    },
    /// Take `expert` out of the pool. Where it came about by a split that changed the gate, its other half should get the gate
    /// back that it had, unless the expert had no tokens.
    Remove {
        /// Layer of the expert.
        layer: usize,
        /// The expert.
        expert: ExpertId,
        /// Why.
        reason: RemovalReason,
    },
    /// Nothing will be split any more in this layer, or in any (`None`). Newcomers that still await a held-out check
    /// ([`Controller::awaiting_check`](super::Controller::awaiting_check)) are judged all the same, and pruning goes on, if the
    /// controller is called.
    Stop {
        /// The layer; `None` stands for all of them.
        layer: Option<usize>,
        /// Why.
        reason: StopReason,
    },
}

/// Why expansion ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum StopReason {
    /// The pool has `k_max` experts.
    Maximum,
    /// The stop rule found that new experts do not lower the loss.
    NoBenefit,
    /// The expansion phase is over.
    PhaseEnd,
}

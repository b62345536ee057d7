//! A router chosen at run time.

use ndarray::{ArrayView2, ArrayViewMut2};
#[cfg(feature = "serde")]
use serde::{Deserialize, Serialize};

use super::{
    BiasBalanced, ExpertChoice, GateGradient, Loads, Noisy, Router, TargetK, TopAny, TopK, TopP,
};
use crate::{Combine, RoutingError, RoutingPlan};

/// Which router, with which settings: the plain, serialisable form for configuration files. [`build`](Self::build) checks it.
///
/// ```
/// use mass_routing::{Combine, RouterConfig};
///
/// # #[cfg(feature = "serde")] {
/// let config: RouterConfig = serde_json::from_str(r#"{ "router": "top_p", "p": 0.5, "combine": "raw" }"#).unwrap();
/// assert_eq!(config, RouterConfig::TopP { p: 0.5, combine: Combine::Raw });
/// let router = config.build()?;
/// // Or in one line, for command lines.
/// assert_eq!(config, "top_p:p=0.5,combine=raw".parse()?);
/// # }
/// # Ok::<(), mass_routing::RoutingError>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(Serialize, Deserialize),
    serde(tag = "router", rename_all = "snake_case", deny_unknown_fields)
)]
#[non_exhaustive]
pub enum RouterConfig {
    /// [`TopP`].
    TopP {
        /// Mass to reach, in (0, 1].
        p: f32,
        /// How probabilities become weights.
        #[cfg_attr(feature = "serde", serde(default))]
        combine: Combine,
    },
    /// [`TopK`].
    TopK {
        /// Experts per token.
        k: usize,
        /// How probabilities become weights.
        #[cfg_attr(feature = "serde", serde(default))]
        combine: Combine,
    },
    /// [`TopAny`].
    TopAny {
        /// Number of experts; all thresholds start at zero. A layer whose experts bring thresholds of their own may leave it at 0.
        experts: usize,
    },
    /// [`BiasBalanced`].
    BiasBalanced {
        /// Experts per token.
        k: usize,
        /// Step of the bias.
        #[cfg_attr(feature = "serde", serde(default = "bias_rate"))]
        rate: f32,
        /// How probabilities become weights.
        #[cfg_attr(feature = "serde", serde(default))]
        combine: Combine,
    },
    /// [`TargetK`], with its default gains.
    TargetK {
        /// Wanted mean number of experts per token.
        target: f64,
        /// Mass to start from, in (0, 1).
        p: f32,
        /// How probabilities become weights.
        #[cfg_attr(feature = "serde", serde(default))]
        combine: Combine,
    },
    /// [`ExpertChoice`].
    ExpertChoice {
        /// Mean number of experts per token.
        capacity: f64,
        /// How probabilities become weights.
        #[cfg_attr(feature = "serde", serde(default))]
        combine: Combine,
    },
    /// [`Noisy`]: any of the others behind gate noise.
    Noisy {
        /// Standard deviation of the noise on the logits.
        std: f32,
        /// Seed of the noise.
        seed: u64,
        /// The router behind it.
        inner: Box<RouterConfig>,
    },
}

/// Most experts that settings may ask for before there are any.
const MOST_EXPERTS: usize = 1 << 24;

/// Step of a balancing bias: the paper's.
pub(super) const BIAS_RATE: f32 = 1e-3;

#[cfg(feature = "serde")]
fn bias_rate() -> f32 {
    BIAS_RATE
}

impl RouterConfig {
    /// The same for a pool of so many experts: top-any's thresholds, also behind noise.
    pub fn with_experts(self, experts: usize) -> Self {
        match self {
            Self::TopAny { .. } => Self::TopAny { experts },
            Self::Noisy { std, seed, inner } => Self::Noisy {
                std,
                seed,
                inner: Box::new(inner.with_experts(experts)),
            },
            other => other,
        }
    }

    /// The router these settings describe.
    ///
    /// # Errors
    /// As the router's own constructor.
    pub fn build(&self) -> Result<AnyRouter, RoutingError> {
        Ok(match *self {
            Self::TopP { p, combine } => AnyRouter::TopP(TopP::new(p, combine)?),
            Self::TopK { k, combine } => AnyRouter::TopK(TopK::new(k, combine)?),
            Self::TopAny { experts } if experts > MOST_EXPERTS => {
                return Err(RoutingError::InvalidParameter {
                    name: "experts",
                    expected: "at most 2^24",
                    value: experts as f64,
                });
            }
            Self::TopAny { experts } => AnyRouter::TopAny(TopAny::new(vec![0.0; experts])?),
            Self::BiasBalanced { k, rate, combine } => {
                AnyRouter::BiasBalanced(BiasBalanced::new(k, rate, combine)?)
            }
            Self::TargetK { target, p, combine } => {
                AnyRouter::TargetK(TargetK::new(target, p, combine)?)
            }
            Self::ExpertChoice { capacity, combine } => {
                AnyRouter::ExpertChoice(ExpertChoice::new(capacity, combine)?)
            }
            Self::Noisy {
                std,
                seed,
                ref inner,
            } => AnyRouter::Noisy(Box::new(Noisy::new(inner.build()?, std, seed)?)),
        })
    }
}

/// Any router of this crate, with its state; serialisable, so that a checkpoint can hold it.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(Serialize, Deserialize),
    serde(tag = "router", rename_all = "snake_case")
)]
#[non_exhaustive]
pub enum AnyRouter {
    /// [`TopP`].
    TopP(TopP),
    /// [`TopK`].
    TopK(TopK),
    /// [`TopAny`].
    TopAny(TopAny),
    /// [`BiasBalanced`].
    BiasBalanced(BiasBalanced),
    /// [`TargetK`].
    TargetK(TargetK),
    /// [`ExpertChoice`].
    ExpertChoice(ExpertChoice),
    /// [`Noisy`].
    Noisy(Box<Noisy>),
}

impl AnyRouter {
    fn inner(&self) -> &dyn Router {
        match self {
            Self::TopP(router) => router,
            Self::TopK(router) => router,
            Self::TopAny(router) => router,
            Self::BiasBalanced(router) => router,
            Self::TargetK(router) => router,
            Self::ExpertChoice(router) => router,
            Self::Noisy(router) => &**router,
        }
    }

    fn inner_mut(&mut self) -> &mut dyn Router {
        match self {
            Self::TopP(router) => router,
            Self::TopK(router) => router,
            Self::TopAny(router) => router,
            Self::BiasBalanced(router) => router,
            Self::TargetK(router) => router,
            Self::ExpertChoice(router) => router,
            Self::Noisy(router) => &mut **router,
        }
    }
}

impl Router for AnyRouter {
    fn route(
        &mut self,
        logits: ArrayView2<'_, f32>,
        mask: Option<&[bool]>,
        plan: &mut RoutingPlan,
    ) -> Result<(), RoutingError> {
        self.inner_mut().route(logits, mask, plan)
    }

    fn backward(
        &self,
        plan: &RoutingPlan,
        d_weights: &[f32],
        d_logits: &mut ArrayViewMut2<'_, f32>,
    ) -> Result<(), RoutingError> {
        self.inner().backward(plan, d_weights, d_logits)
    }

    fn check_backward(&self, plan: &RoutingPlan) -> Result<(), RoutingError> {
        self.inner().check_backward(plan)
    }

    fn gate_gradient(&self) -> GateGradient {
        self.inner().gate_gradient()
    }

    fn split_expert(&mut self, source: usize, newcomer: usize) {
        self.inner_mut().split_expert(source, newcomer);
    }

    fn adapt_to(&mut self, loads: &Loads) -> Result<(), RoutingError> {
        self.inner_mut().adapt_to(loads)
    }

    fn set_rows_around(&mut self, before: usize, after: usize) {
        self.inner_mut().set_rows_around(before, after);
    }

    fn remove_expert(&mut self, index: usize) {
        self.inner_mut().remove_expert(index);
    }

    fn least_experts(&self) -> usize {
        self.inner().least_experts()
    }

    fn set_training(&mut self, training: bool) {
        self.inner_mut().set_training(training);
    }
}

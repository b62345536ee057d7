//! Usage statistics that merge.

use ndarray::{Array2, ArrayView2};
#[cfg(feature = "serde")]
use serde::{Deserialize, Serialize};

#[cfg(feature = "serde")]
use crate::error::same;
use crate::{RoutingError, RoutingPlan};

/// What has been routed where: accumulates over plans, and merges across batches, threads and ranks.
///
/// All counts are integers, so merging is exact and its order does not matter; the two sums over probabilities are f64.
///
/// # Examples
/// ```
/// use mass_routing::{Combine, Router, RoutingPlan, TopK, UsageStats};
/// use ndarray::array;
///
/// let logits = array![[1.0_f32, 0.0, -1.0], [0.9, 1.0, -1.0]];
/// let mut plan = RoutingPlan::default();
/// TopK::new(1, Combine::Raw)?.route(logits.view(), None, &mut plan)?;
/// let mut usage = UsageStats::new(3);
/// usage.record(&plan)?;
/// assert_eq!(usage.load(), [1, 1, 0]);
/// assert_eq!(usage.dead_experts().collect::<Vec<_>>(), [2]);
/// # Ok::<(), mass_routing::RoutingError>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(Serialize, Deserialize),
    serde(try_from = "UsageParts", into = "UsageParts")
)]
pub struct UsageStats {
    tokens: u64,
    load: Vec<u64>,
    weight: Vec<f64>,
    k_counts: Vec<u64>,
    entropy_sum: f64,
    entropy_tokens: u64,
    co_activation: Option<Array2<u64>>,
}

impl UsageStats {
    /// No tokens yet, `num_experts` experts.
    ///
    /// # Panics
    /// If there is no room for so many counters.
    pub fn new(num_experts: usize) -> Self {
        Self {
            tokens: 0,
            load: vec![0; num_experts],
            weight: vec![0.0; num_experts],
            k_counts: Vec::new(),
            entropy_sum: 0.0,
            entropy_tokens: 0,
            co_activation: None,
        }
    }

    /// Also count, from now on, which experts are chosen together: `K x K` counters of 8 bytes, and `k^2` steps per token.
    ///
    /// # Panics
    /// If there is no room for so many counters.
    pub fn with_co_activation(mut self) -> Self {
        let k = self.num_experts();
        self.co_activation = Some(Array2::zeros((k, k)));
        self
    }

    /// Number of experts.
    pub fn num_experts(&self) -> usize {
        self.load.len()
    }

    /// Adds a plan.
    ///
    /// # Errors
    /// The plan has another number of experts (a pool that grew: call [`grow`](Self::grow) first).
    pub fn record(&mut self, plan: &RoutingPlan) -> Result<(), RoutingError> {
        self.same_experts(plan.num_experts())?;
        self.tokens += plan.num_tokens() as u64;
        for e in 0..plan.num_experts() {
            self.load[e] += plan.load(e) as u64;
            self.weight[e] += plan.weights()[plan.segment(e)]
                .iter()
                .map(|&w| f64::from(w))
                .sum::<f64>();
        }
        for t in 0..plan.num_tokens() {
            let k = plan.k(t);
            if self.k_counts.len() <= k {
                self.k_counts.resize(k + 1, 0);
            }
            self.k_counts[k] += 1;
            if let Some(pairs) = &mut self.co_activation {
                let own = plan.token_offsets()[t] as usize..plan.token_offsets()[t + 1] as usize;
                let experts = &plan.token_experts()[own];
                for &i in experts {
                    for &j in experts {
                        pairs[(i as usize, j as usize)] += 1;
                    }
                }
            }
        }
        if plan.has_probabilities() {
            for row in plan.probabilities().outer_iter() {
                // A skipped token has a row of zeros, and no distribution whose entropy could count.
                if row.iter().any(|&r| r > 0.0) {
                    self.entropy_sum -= row.iter().map(|&r| x_log_x(r.into())).sum::<f64>();
                    self.entropy_tokens += 1;
                }
            }
        }
        Ok(())
    }

    /// Adds what another accumulator has seen.
    ///
    /// # Errors
    /// A different number of experts, or only one of the two counts co-activation.
    pub fn merge(&mut self, other: &Self) -> Result<(), RoutingError> {
        self.same_experts(other.num_experts())?;
        match (&mut self.co_activation, &other.co_activation) {
            (Some(a), Some(b)) => *a += b,
            (None, None) => {}
            _ => {
                return Err(RoutingError::Undefined(
                    "only one of two merged statistics counts co-activation",
                ));
            }
        }
        self.tokens += other.tokens;
        self.load
            .iter_mut()
            .zip(&other.load)
            .for_each(|(a, b)| *a += b);
        self.weight
            .iter_mut()
            .zip(&other.weight)
            .for_each(|(a, b)| *a += b);
        if self.k_counts.len() < other.k_counts.len() {
            self.k_counts.resize(other.k_counts.len(), 0);
        }
        self.k_counts
            .iter_mut()
            .zip(&other.k_counts)
            .for_each(|(a, b)| *a += b);
        self.entropy_sum += other.entropy_sum;
        self.entropy_tokens += other.entropy_tokens;
        Ok(())
    }

    /// Makes room for a pool that has grown; the new experts start with no load.
    ///
    /// # Errors
    /// `num_experts` is below the present number.
    ///
    /// # Panics
    /// If there is no room for so many counters.
    pub fn grow(&mut self, num_experts: usize) -> Result<(), RoutingError> {
        let old = self.num_experts();
        if num_experts < old {
            return Err(RoutingError::ShapeMismatch {
                what: "experts after growth (at least the present number)",
                expected: old,
                found: num_experts,
            });
        }
        self.load.resize(num_experts, 0);
        self.weight.resize(num_experts, 0.0);
        if let Some(pairs) = &mut self.co_activation {
            let present = |i, j| if i < old && j < old { pairs[(i, j)] } else { 0 };
            *pairs = Array2::from_shape_fn((num_experts, num_experts), |(i, j)| present(i, j));
        }
        Ok(())
    }

    /// Tokens seen.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Assignments seen.
    pub fn assignments(&self) -> u64 {
        self.load.iter().sum()
    }

    /// Tokens of each expert.
    pub fn load(&self) -> &[u64] {
        &self.load
    }

    /// Sum of the routing weights of each expert (its importance).
    pub fn importance(&self) -> &[f64] {
        &self.weight
    }

    /// Each expert's share of the assignments; zeros if there are none.
    pub fn load_fractions(&self) -> Vec<f64> {
        let total = self.assignments().max(1) as f64;
        self.load.iter().map(|&l| l as f64 / total).collect()
    }

    /// `counts[k]` is the number of tokens with `k` experts (`counts[0]`: skipped, or chosen by nobody).
    pub fn k_counts(&self) -> &[u64] {
        &self.k_counts
    }

    /// Mean number of experts per token; `None` before the first token.
    pub fn mean_k(&self) -> Option<f64> {
        (self.tokens > 0).then(|| self.assignments() as f64 / self.tokens as f64)
    }

    /// Variance over tokens of the number of experts (divided by `N`); `None` before the first token.
    pub fn variance_k(&self) -> Option<f64> {
        let mean = self.mean_k()?;
        let sum: f64 = self
            .k_counts
            .iter()
            .enumerate()
            .map(|(k, &n)| n as f64 * (k as f64 - mean).powi(2))
            .sum();
        Some(sum / self.tokens as f64)
    }

    /// Mean over tokens of `-sum_e r_e ln r_e`, in nats; `None` if no plan had probabilities.
    pub fn routing_entropy(&self) -> Option<f64> {
        (self.entropy_tokens > 0).then(|| self.entropy_sum / self.entropy_tokens as f64)
    }

    /// Entropy in nats of the distribution of assignments over experts; `ln K` when perfectly balanced, `None` without assignments.
    pub fn load_entropy(&self) -> Option<f64> {
        (self.assignments() > 0)
            .then(|| -self.load_fractions().into_iter().map(x_log_x).sum::<f64>())
    }

    /// Largest load over mean load (1 when perfectly balanced); `None` without assignments.
    pub fn max_load_ratio(&self) -> Option<f64> {
        let total = self.assignments();
        let max = self.load.iter().max()?;
        (total > 0).then(|| *max as f64 * self.num_experts() as f64 / total as f64)
    }

    /// Experts that no token was routed to.
    pub fn dead_experts(&self) -> impl Iterator<Item = usize> + '_ {
        self.load
            .iter()
            .enumerate()
            .filter(|&(_, &l)| l == 0)
            .map(|(e, _)| e)
    }

    /// `K x K`: the number of tokens that chose both experts (the diagonal is the load, if counted from the start); `None` unless
    /// counted.
    pub fn co_activation(&self) -> Option<ArrayView2<'_, u64>> {
        self.co_activation.as_ref().map(|pairs| pairs.view())
    }

    fn same_experts(&self, found: usize) -> Result<(), RoutingError> {
        let expected = self.num_experts();
        if expected == found {
            Ok(())
        } else {
            Err(RoutingError::ShapeMismatch {
                what: "experts of the statistics",
                expected,
                found,
            })
        }
    }
}

/// `x ln x`, continued by 0 at 0.
pub(crate) fn x_log_x(x: f64) -> f64 {
    if x > 0.0 { x * x.ln() } else { 0.0 }
}

/// The unchecked form that serde reads and writes.
#[cfg(feature = "serde")]
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct UsageParts {
    tokens: u64,
    load: Vec<u64>,
    weight: Vec<f64>,
    k_counts: Vec<u64>,
    entropy_sum: f64,
    entropy_tokens: u64,
    co_activation: Option<Vec<u64>>,
}

#[cfg(feature = "serde")]
impl From<UsageStats> for UsageParts {
    fn from(stats: UsageStats) -> Self {
        let UsageStats {
            tokens,
            load,
            weight,
            k_counts,
            entropy_sum,
            entropy_tokens,
            co_activation,
        } = stats;
        let co_activation = co_activation.map(|pairs| pairs.into_iter().collect());
        Self {
            tokens,
            load,
            weight,
            k_counts,
            entropy_sum,
            entropy_tokens,
            co_activation,
        }
    }
}

#[cfg(feature = "serde")]
impl TryFrom<UsageParts> for UsageStats {
    type Error = RoutingError;

    fn try_from(parts: UsageParts) -> Result<Self, RoutingError> {
        let UsageParts {
            tokens,
            load,
            weight,
            k_counts,
            entropy_sum,
            entropy_tokens,
            co_activation,
        } = parts;
        let k = load.len();
        same("importance per expert", k, weight.len())?;
        if let Some(index) = weight.iter().position(|w| !w.is_finite()) {
            return Err(RoutingError::NonFinite {
                what: "importance",
                index,
                value: weight[index],
            });
        }
        if !entropy_sum.is_finite() {
            return Err(RoutingError::NonFinite {
                what: "entropy sum",
                index: 0,
                value: entropy_sum,
            });
        }
        // Wide sums: hostile counters must not overflow here, and leave room for more to be counted.
        const MOST: u128 = 1 << 53;
        let wide = |counts: &mut dyn Iterator<Item = u128>| counts.sum::<u128>();
        let by_expert = wide(&mut load.iter().map(|&l| l.into()));
        let by_token = wide(
            &mut k_counts
                .iter()
                .enumerate()
                .map(|(k, &n)| k as u128 * u128::from(n)),
        );
        let counted = wide(&mut k_counts.iter().map(|&n| n.into()));
        if by_expert != by_token
            || counted != u128::from(tokens)
            || k_counts.iter().skip(k + 1).any(|&n| n > 0)
            || by_expert > MOST
            || counted > MOST
            || entropy_tokens > tokens
        {
            return Err(RoutingError::Undefined(
                "counts per expert, per token and in total contradict each other",
            ));
        }
        let co_activation = match co_activation {
            None => None,
            Some(pairs) => {
                let found = pairs.len();
                let square = Array2::from_shape_vec((k, k), pairs);
                let what = "co-activation counts (K x K)";
                let square = square.map_err(|_| RoutingError::ShapeMismatch {
                    what,
                    expected: k.saturating_mul(k),
                    found,
                })?;
                // The diagonal is the load, or less where it was not counted from the start.
                let fits = |((i, j), &n): ((usize, usize), &u64)| {
                    n == square[(j, i)] && n <= square[(i, i)] && n <= load[i]
                };
                if !square.indexed_iter().all(fits) {
                    return Err(RoutingError::Undefined(
                        "counts of experts chosen together contradict their loads",
                    ));
                }
                Some(square)
            }
        };
        Ok(Self {
            tokens,
            load,
            weight,
            k_counts,
            entropy_sum,
            entropy_tokens,
            co_activation,
        })
    }
}

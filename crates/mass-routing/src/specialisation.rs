//! Do experts specialise? Expert usage against labels of the tokens.

use ndarray::{Array2, ArrayView1, ArrayView2, Axis};
#[cfg(feature = "serde")]
use serde::{Deserialize, Serialize};

use crate::error::same;
use crate::usage::x_log_x;
use crate::{RoutingError, RoutingPlan};

/// How much each label counts in [`jensen_shannon_divergence`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(
    feature = "serde",
    derive(Serialize, Deserialize),
    serde(rename_all = "snake_case")
)]
pub enum LabelWeighting {
    /// Every label that occurs counts the same, however frequent.
    #[default]
    Uniform,
    /// A label counts by its share of the assignments; the divergence is then the mutual information of label and expert.
    Proportional,
}

/// Counts of assignments by label and expert, `L x K`; merges like [`UsageStats`](crate::UsageStats).
///
/// # Examples
/// ```
/// use mass_routing::{
///     Combine, LabelUsage, LabelWeighting, Router, RoutingPlan, TopK, jensen_shannon_divergence, normalized_mutual_information,
/// };
/// use ndarray::array;
///
/// let logits = array![[1.0_f32, 0.0], [0.0, 1.0], [2.0, 0.0]];
/// let mut plan = RoutingPlan::default();
/// TopK::new(1, Combine::Raw)?.route(logits.view(), None, &mut plan)?;
/// let mut usage = LabelUsage::new(2, 2);
/// usage.record(&plan, &[0, 1, 0])?; // label 0 always goes to expert 0, label 1 to expert 1
/// let jsd = jensen_shannon_divergence(usage.contingency().view(), LabelWeighting::Uniform)?;
/// assert!((jsd - 2_f64.ln()).abs() < 1e-12);
/// assert!((normalized_mutual_information(usage.contingency().view())? - 1.0).abs() < 1e-12);
/// # Ok::<(), mass_routing::RoutingError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LabelUsage {
    counts: Array2<u64>,
}

impl LabelUsage {
    /// No assignments yet, for labels `0..num_labels`.
    ///
    /// # Panics
    /// If there is no room for so many counters.
    pub fn new(num_labels: usize, num_experts: usize) -> Self {
        Self {
            counts: Array2::zeros((num_labels, num_experts)),
        }
    }

    /// Adds a plan whose token `t` has the label `labels[t]`. A token with k experts adds k counts.
    ///
    /// # Errors
    /// Lengths that do not fit, or a label out of range; nothing is counted then.
    pub fn record(&mut self, plan: &RoutingPlan, labels: &[usize]) -> Result<(), RoutingError> {
        let (num_labels, num_experts) = self.counts.dim();
        same("labels per token", plan.num_tokens(), labels.len())?;
        same(
            "experts of the label counts",
            num_experts,
            plan.num_experts(),
        )?;
        if let Some(&label) = labels.iter().find(|&&l| l >= num_labels) {
            let expected = "below the number of labels";
            return Err(RoutingError::InvalidParameter {
                name: "label",
                expected,
                value: label as f64,
            });
        }
        for e in 0..num_experts {
            for &t in &plan.tokens()[plan.segment(e)] {
                self.counts[(labels[t as usize], e)] += 1;
            }
        }
        Ok(())
    }

    /// Adds the counts of another table.
    ///
    /// # Errors
    /// A different number of labels or experts.
    pub fn merge(&mut self, other: &Self) -> Result<(), RoutingError> {
        for (what, axis) in [
            ("labels of the merged counts", 0),
            ("experts of the merged counts", 1),
        ] {
            let (expected, found) = (
                self.counts.len_of(Axis(axis)),
                other.counts.len_of(Axis(axis)),
            );
            if expected != found {
                return Err(RoutingError::ShapeMismatch {
                    what,
                    expected,
                    found,
                });
            }
        }
        self.counts += &other.counts;
        Ok(())
    }

    /// The counts, `L x K`.
    pub fn counts(&self) -> ArrayView2<'_, u64> {
        self.counts.view()
    }

    /// The counts as f64, the form the measures below take.
    pub fn contingency(&self) -> Array2<f64> {
        self.counts.mapv(|c| c as f64)
    }
}

/// Generalised Jensen-Shannon divergence between the expert-usage distributions of the labels, in nats.
///
/// # Formula
/// With `P_l` the row of label `l` divided by its sum and `pi_l` its weight (see [`LabelWeighting`]),
/// `JSD = H(sum_l pi_l P_l) - sum_l pi_l H(P_l)`.
///
/// Not normalised: it lies in `[0, H(pi)]`, at most `ln(min(L, K))` with uniform weights and `L` the number of labels that occur; zero
/// iff all labels use the experts alike. Divide by [`jensen_shannon_bound`] for a share of the maximum. Labels without
/// assignments are left out.
///
/// `contingency` is `L x K`: labels by experts, counts or non-negative weights.
///
/// # Source
/// Lin, "Divergence measures based on the Shannon entropy", IEEE Trans. Inf. Theory 37 (1991).
///
/// # Errors
/// A negative, NaN or infinite entry, or no assignment at all.
pub fn jensen_shannon_divergence(
    contingency: ArrayView2<'_, f64>,
    weighting: LabelWeighting,
) -> Result<f64, RoutingError> {
    let (rows, weights) = distributions(contingency, weighting)?;
    let mut mixture = vec![0.0; contingency.ncols()];
    let mut conditional = 0.0;
    for (row, &weight) in rows.iter().zip(&weights) {
        mixture
            .iter_mut()
            .zip(row)
            .for_each(|(m, p)| *m += weight * p);
        conditional += weight * entropy(row);
    }
    // Rounding may leave -1e-17 where the exact value is 0.
    Ok((entropy(&mixture) - conditional).max(0.0))
}

/// The largest value [`jensen_shannon_divergence`] can take for such a table, in nats: `min(H(pi), ln K)`.
///
/// # Errors
/// As [`jensen_shannon_divergence`].
pub fn jensen_shannon_bound(
    contingency: ArrayView2<'_, f64>,
    weighting: LabelWeighting,
) -> Result<f64, RoutingError> {
    let (_, weights) = distributions(contingency, weighting)?;
    Ok(entropy(&weights).min((contingency.ncols() as f64).ln()))
}

/// Mean over all pairs of labels of the two-way Jensen-Shannon divergence (weights 1/2), in nats; at most `ln 2`.
///
/// # Errors
/// As [`jensen_shannon_divergence`], or fewer than two labels that occur.
pub fn pairwise_jensen_shannon_divergence(
    contingency: ArrayView2<'_, f64>,
) -> Result<f64, RoutingError> {
    let (rows, _) = distributions(contingency, LabelWeighting::Uniform)?;
    if rows.len() < 2 {
        return Err(RoutingError::Undefined(
            "a divergence between labels needs two labels with assignments",
        ));
    }
    let mut sum = 0.0;
    for (i, a) in rows.iter().enumerate() {
        for b in &rows[..i] {
            let middle: Vec<f64> = a.iter().zip(b).map(|(a, b)| 0.5 * (a + b)).collect();
            sum += (entropy(&middle) - 0.5 * (entropy(a) + entropy(b))).max(0.0);
        }
    }
    Ok(sum / (rows.len() * (rows.len() - 1) / 2) as f64)
}

/// Mutual information of label and expert divided by the mean of their entropies, in [0, 1].
///
/// # Formula
/// `NMI = I(L; E) / ((H(L) + H(E)) / 2)`, over assignments; the arithmetic normalisation, as scikit-learn's default.
/// `contingency` is `L x K`: labels by experts, counts or non-negative weights.
///
/// # Errors
/// A negative, NaN or infinite entry, no assignment at all, or a single label with a single expert (0 / 0).
pub fn normalized_mutual_information(
    contingency: ArrayView2<'_, f64>,
) -> Result<f64, RoutingError> {
    let information = jensen_shannon_divergence(contingency, LabelWeighting::Proportional)?;
    let total = contingency.sum();
    let marginal = |axis| {
        contingency
            .sum_axis(Axis(axis))
            .mapv(|c| c / total)
            .to_vec()
    };
    let mean = 0.5 * (entropy(&marginal(0)) + entropy(&marginal(1)));
    if mean <= 0.0 {
        return Err(RoutingError::Undefined(
            "mutual information of one label and one expert cannot be normalised",
        ));
    }
    Ok((information / mean).min(1.0))
}

/// Rows divided by their sums, and the weight of each; labels without assignments are left out.
fn distributions(
    contingency: ArrayView2<'_, f64>,
    weighting: LabelWeighting,
) -> Result<(Vec<Vec<f64>>, Vec<f64>), RoutingError> {
    if let Some((index, &value)) = contingency.iter().enumerate().find(|(_, c)| !c.is_finite()) {
        return Err(RoutingError::NonFinite {
            what: "contingency table",
            index,
            value,
        });
    }
    if let Some(&value) = contingency.iter().find(|&&c| c < 0.0) {
        return Err(RoutingError::InvalidParameter {
            name: "contingency",
            expected: "without negative entries",
            value,
        });
    }
    let total = contingency.sum();
    if total <= 0.0 {
        return Err(RoutingError::Undefined(
            "the contingency table holds no assignments",
        ));
    }
    if !total.is_finite() {
        return Err(RoutingError::NonFinite {
            what: "sum of the contingency table",
            index: 0,
            value: total,
        });
    }
    let occurring: Vec<(ArrayView1<'_, f64>, f64)> = contingency
        .outer_iter()
        .map(|row| (row, row.sum()))
        .filter(|&(_, sum)| sum > 0.0)
        .collect();
    let uniform = 1.0 / occurring.len() as f64;
    Ok(occurring
        .into_iter()
        .map(|(row, sum)| {
            let weight = if weighting == LabelWeighting::Uniform {
                uniform
            } else {
                sum / total
            };
            (row.iter().map(|c| c / sum).collect(), weight)
        })
        .unzip())
}

fn entropy(p: &[f64]) -> f64 {
    -p.iter().map(|&p| x_log_x(p)).sum::<f64>()
}

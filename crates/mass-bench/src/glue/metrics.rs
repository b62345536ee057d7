//! The metrics of GLUE, with the conventions of scikit-learn and SciPy at their edges.

/// Predictions that cannot be scored.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MetricError {
    /// Not one prediction a label.
    #[error("{predictions} predictions for {labels} labels")]
    Lengths {
        /// Predictions.
        predictions: usize,
        /// Labels.
        labels: usize,
    },
    /// Outputs that are not so many for each label.
    #[error("{outputs} outputs for {labels} labels, each of which has {width}")]
    Outputs {
        /// Outputs.
        outputs: usize,
        /// Labels.
        labels: usize,
        /// Outputs that a label has.
        width: usize,
    },
    /// Fewer examples than the metric needs.
    #[error("{found} examples, at least {needed} needed")]
    TooFew {
        /// Examples given.
        found: usize,
        /// Examples needed.
        needed: usize,
    },
    /// A class other than 0 and 1 where there are two.
    #[error("class {class} at position {index}; this metric is for classes 0 and 1")]
    NotBinary {
        /// The class.
        class: u32,
        /// Where.
        index: usize,
    },
    /// A value that is NaN or infinite.
    #[error("{what} {index} is not finite")]
    NonFinite {
        /// Prediction or label.
        what: &'static str,
        /// Which one, counted from 0.
        index: usize,
    },
    /// A score where a class is needed, or the other way round.
    #[error("labels of another kind than the task's")]
    Kind,
}

fn same(predictions: usize, labels: usize, needed: usize) -> Result<(), MetricError> {
    if predictions != labels {
        return Err(MetricError::Lengths {
            predictions,
            labels,
        });
    }
    if labels < needed {
        return Err(MetricError::TooFew {
            found: labels,
            needed,
        });
    }
    Ok(())
}

/// Fraction of predictions that are right.
///
/// # Errors
/// [`MetricError`] for different lengths or no examples.
///
/// ```
/// use mass_bench::glue::metrics::accuracy;
/// assert_eq!(accuracy(&[0, 1, 2, 2], &[0, 1, 1, 2])?, 0.75);
/// # Ok::<(), mass_bench::glue::metrics::MetricError>(())
/// ```
pub fn accuracy(predicted: &[u32], gold: &[u32]) -> Result<f64, MetricError> {
    same(predicted.len(), gold.len(), 1)?;
    let right = predicted.iter().zip(gold).filter(|(p, g)| p == g).count();
    Ok(right as f64 / gold.len() as f64)
}

/// F1 of class 1: `2 TP / (2 TP + FP + FN)`; 0 if neither predictions nor labels hold a 1, as scikit-learn's default.
///
/// # Errors
/// [`MetricError`] for different lengths, no examples, or a class above 1.
///
/// ```
/// use mass_bench::glue::metrics::f1;
/// // Two found, one missed, one wrongly found.
/// assert_eq!(f1(&[1, 1, 0, 1, 0], &[1, 1, 1, 0, 0])?, 2.0 / 3.0);
/// # Ok::<(), mass_bench::glue::metrics::MetricError>(())
/// ```
pub fn f1(predicted: &[u32], gold: &[u32]) -> Result<f64, MetricError> {
    same(predicted.len(), gold.len(), 1)?;
    let mut twice_found = 0;
    let mut wrong = 0;
    for (index, (&p, &g)) in predicted.iter().zip(gold).enumerate() {
        if let Some(class) = [p, g].into_iter().find(|&c| c > 1) {
            return Err(MetricError::NotBinary { class, index });
        }
        match (p, g) {
            (1, 1) => twice_found += 2,
            (0, 0) => {}
            _ => wrong += 1,
        }
    }
    Ok(if twice_found == 0 {
        0.0
    } else {
        f64::from(twice_found) / f64::from(twice_found + wrong)
    })
}

/// Matthews correlation, for any number of classes (Gorodkin's R_K):
/// `(c s - Σ_k p_k t_k) / √((s² - Σ p_k²)(s² - Σ t_k²))`, with c right of s examples, p_k predicted and t_k labelled as k.
///
/// 0 if all predictions or all labels are of one class, as scikit-learn.
///
/// # Errors
/// [`MetricError`] for different lengths or no examples.
///
/// ```
/// use mass_bench::glue::metrics::matthews;
/// assert_eq!(matthews(&[1, 0, 1, 0], &[1, 0, 1, 0])?, 1.0);
/// assert_eq!(matthews(&[0, 1, 0, 1], &[1, 0, 1, 0])?, -1.0);
/// assert_eq!(matthews(&[1, 1, 1, 1], &[1, 0, 1, 0])?, 0.0);
/// # Ok::<(), mass_bench::glue::metrics::MetricError>(())
/// ```
pub fn matthews(predicted: &[u32], gold: &[u32]) -> Result<f64, MetricError> {
    same(predicted.len(), gold.len(), 1)?;
    let mut counts = std::collections::BTreeMap::<u32, (i128, i128)>::new();
    let mut right = 0_i128;
    for (&p, &g) in predicted.iter().zip(gold) {
        counts.entry(p).or_default().0 += 1;
        counts.entry(g).or_default().1 += 1;
        right += i128::from(p == g);
    }
    // Whole numbers throughout, so that the cases of zero are exact.
    let s = gold.len() as i128;
    let sum = |f: &dyn Fn(&(i128, i128)) -> i128| counts.values().map(f).sum::<i128>();
    let both = right * s - sum(&|c| c.0 * c.1);
    let predictions = s * s - sum(&|c| c.0 * c.0);
    let labels = s * s - sum(&|c| c.1 * c.1);
    Ok(if predictions == 0 || labels == 0 {
        0.0
    } else {
        both as f64 / (predictions as f64 * labels as f64).sqrt()
    })
}

fn finite(predicted: &[f64], gold: &[f64]) -> Result<(), MetricError> {
    same(predicted.len(), gold.len(), 2)?;
    for (what, values) in [("prediction", predicted), ("label", gold)] {
        if let Some(index) = values.iter().position(|v| !v.is_finite()) {
            return Err(MetricError::NonFinite { what, index });
        }
    }
    Ok(())
}

/// Pearson's correlation; NaN if either side is constant, as SciPy.
///
/// # Errors
/// [`MetricError`] for different lengths, fewer than two examples, or a value that is not finite.
///
/// ```
/// use mass_bench::glue::metrics::pearson;
/// assert!((pearson(&[1.0, 2.0, 3.0], &[2.0, 4.0, 9.0])? - 0.9707253433941511).abs() < 1e-15);
/// assert!(pearson(&[1.0, 1.0], &[1.0, 2.0])?.is_nan());
/// # Ok::<(), mass_bench::glue::metrics::MetricError>(())
/// ```
pub fn pearson(predicted: &[f64], gold: &[f64]) -> Result<f64, MetricError> {
    finite(predicted, gold)?;
    let constant = |v: &[f64]| v.iter().all(|x| *x == v[0]);
    if constant(predicted) || constant(gold) {
        return Ok(f64::NAN);
    }
    let unit = |v: &[f64]| {
        // Scaled first: squares of very large or small values would leave the range of f64.
        let scale = v.iter().fold(0.0_f64, |m, x| m.max(x.abs()));
        let mean = v.iter().map(|x| x / scale).sum::<f64>() / v.len() as f64;
        let centred: Vec<f64> = v.iter().map(|x| x / scale - mean).collect();
        let norm = centred.iter().map(|x| x * x).sum::<f64>().sqrt();
        (centred, norm)
    };
    let ((a, a_norm), (b, b_norm)) = (unit(predicted), unit(gold));
    let dot: f64 = a
        .iter()
        .zip(&b)
        .map(|(x, y)| x / a_norm * (y / b_norm))
        .sum();
    Ok(dot.clamp(-1.0, 1.0))
}

/// Spearman's correlation: Pearson's of the ranks, ties given their mean rank; NaN if either side is constant.
///
/// # Errors
/// As [`pearson`].
///
/// ```
/// use mass_bench::glue::metrics::spearman;
/// // Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4.
/// assert!((spearman(&[0.1, 0.5, 0.5, 9.0], &[1.0, 2.0, 3.0, 4.0])? - 0.9486832980505138).abs() < 1e-15);
/// # Ok::<(), mass_bench::glue::metrics::MetricError>(())
/// ```
pub fn spearman(predicted: &[f64], gold: &[f64]) -> Result<f64, MetricError> {
    finite(predicted, gold)?;
    pearson(&ranks(predicted), &ranks(gold))
}

/// Ranks from 1, ties given their mean.
fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[a].total_cmp(&values[b]));
    let mut ranks = vec![0.0; values.len()];
    let mut from = 0;
    while from < order.len() {
        // `==`, not `total_cmp`: the two zeros are equal.
        let same = |&&i: &&usize| values[i] == values[order[from]];
        let to = from + order[from..].iter().take_while(same).count();
        let mean = (from + 1 + to) as f64 / 2.0;
        for &i in &order[from..to] {
            ranks[i] = mean;
        }
        from = to;
    }
    ranks
}

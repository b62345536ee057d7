//! Scores on images of known classes.

use std::collections::BTreeMap;

use mass_model::Place;
use mass_model::vit::VitClassifier;
use serde::{Deserialize, Serialize};

use super::data::Set;
use crate::BenchError;
use crate::task::{Active, largest};

/// Images scored at a time.
pub(super) const BATCH: usize = 64;

/// How a model did on some images.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(super) struct Score {
    /// Mean over the domains of the part that was classified right.
    pub(super) accuracy: f64,
    /// Mean cross-entropy of an image, nats.
    pub(super) loss: f64,
    /// Mean experts a token; `None` for a dense model.
    pub(super) mean_k: Option<f64>,
}

/// Scores a model on some images, without dropout, noise or augmentation.
pub(super) fn evaluate(
    place: &Place,
    model: &VitClassifier,
    set: &Set,
    which: &[usize],
) -> Result<Score, BenchError> {
    let failed = |e| BenchError::failed("scoring images", e);
    // Right and all, by domain.
    let mut counts: BTreeMap<usize, (usize, usize)> = BTreeMap::new();
    let (mut loss, mut active) = (0.0, Active::default());
    for part in which.chunks(BATCH) {
        let input = set.plain(part)?;
        let (logits, layers) = model
            .logits_at(place, set.batch(&input), None)
            .map_err(failed)?;
        let rows = logits.chunks_exact(model.classes());
        for ((&image, &class), row) in part.iter().zip(&input.classes).zip(rows) {
            let class = class as usize;
            let count = counts.entry(set.images.domain(image)).or_default();
            count.0 += usize::from(largest(row) == class);
            count.1 += 1;
            loss += cross_entropy(row, class);
        }
        active.add(&layers);
    }
    let accuracies = counts
        .values()
        .map(|&(right, all)| right as f64 / all as f64);
    Ok(Score {
        accuracy: accuracies.sum::<f64>() / counts.len() as f64,
        loss: loss / which.len() as f64,
        mean_k: active.mean(),
    })
}

fn cross_entropy(row: &[f32], class: usize) -> f64 {
    let most = f64::from(row[largest(row)]);
    let sum: f64 = row.iter().map(|&v| (f64::from(v) - most).exp()).sum();
    most + sum.ln() - f64::from(row[class])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cross_entropy_of_known_odds() {
        let row = [3f32.ln(), 0.0, 0.0];
        assert!((cross_entropy(&row, 0) - (5f64 / 3.0).ln()).abs() < 1e-6);
        assert!((cross_entropy(&row, 2) - 5f64.ln()).abs() < 1e-6);
        assert_eq!((largest(&row), largest(&[1.0, 2.0, 2.0])), (0, 1));
    }
}

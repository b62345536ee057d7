//! Scores on the development sets.

use std::collections::BTreeMap;

use mass_model::Place;
use mass_model::bert::BertClassifier;
use serde::{Deserialize, Serialize};

use super::data::{Examples, TaskData};
use crate::BenchError;
use crate::glue::GlueError;
use crate::glue::batch::scoring_batches;
use crate::glue::task::{Score, Task};
use crate::task::Active;

/// Examples scored at a time.
const BATCH: usize = 64;

/// How a model did on a task's development sets.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct DevScore {
    /// The headline metric; `None` where it is undefined.
    pub(super) metric: Option<f64>,
    pub(super) accuracy: Option<f64>,
    /// Mean loss an example, of the first set.
    pub(super) loss: f64,
    /// Mean experts a token, of the first set; `None` for a dense model.
    pub(super) mean_k: Option<f64>,
    /// Every metric by name; those of further sets carry the set's name.
    pub(super) metrics: BTreeMap<String, f64>,
}

/// Scores every development set of a task.
pub(super) fn evaluate(
    place: &Place,
    model: &BertClassifier,
    data: &TaskData,
) -> Result<DevScore, BenchError> {
    let mut all = DevScore::default();
    for (index, (name, examples)) in data.dev.iter().enumerate() {
        let (score, loss, mean_k) = one(place, model, data.task, examples)?;
        let prefix = if index == 0 {
            (all.metric, all.accuracy) = (Some(score.metric), score.accuracy);
            (all.loss, all.mean_k) = (loss, mean_k);
            String::new()
        } else {
            format!("{name}.")
        };
        let parts = score.parts.into_iter();
        all.metrics
            .extend(parts.map(|(part, value)| (format!("{prefix}{part}"), value)));
    }
    all.metric = all.metric.filter(|m| m.is_finite());
    all.metrics.retain(|_, value| value.is_finite());
    Ok(all)
}

/// Score, mean loss and mean experts a token of one set.
fn one(
    place: &Place,
    model: &BertClassifier,
    task: Task,
    examples: &Examples,
) -> Result<(Score, f64, Option<f64>), BenchError> {
    let failed = |e| BenchError::failed("scoring the development set", e);
    let width = task.outputs();
    let mut outputs = vec![0.0; examples.len() * width];
    let (mut loss, mut active) = (0.0, Active::default());
    for which in scoring_batches(examples.lengths(), BATCH) {
        let (batch, labels) = examples.batch(&which);
        let (logits, layers) = model.logits_at(place, &batch, None).map_err(failed)?;
        for (&i, row) in which.iter().zip(logits.chunks_exact(width)) {
            outputs[i * width..(i + 1) * width].copy_from_slice(row);
        }
        active.add(&layers);
        loss += labels.loss(&logits, width);
    }
    let score = task
        .score(&outputs, examples.targets())
        .map_err(GlueError::from)?;
    Ok((score, loss / examples.len() as f64, active.mean()))
}

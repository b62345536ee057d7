use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// A line of metrics.jsonl: one logged step of one run.
///
/// Everything but `wall_s` is the same when a run is repeated with its seed.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct MetricLine {
    /// [`super::RunKey`] as text.
    pub run: String,
    /// Training steps made when the line was written. Events count steps from 0.
    pub step: u64,
    /// Loss of the training batch, nats a token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub train_loss: Option<f64>,
    /// Loss on held-out data, nats a token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub test_loss: Option<f64>,
    /// Learning rate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub learning_rate: Option<f64>,
    /// Active experts K.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub experts: Option<usize>,
    /// Mean experts a token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub active_per_token: Option<f64>,
    /// Seconds since the run began.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wall_s: Option<f64>,
    /// Whatever else a study logs.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// A line of events.jsonl: the name of the run, and the event's own fields beside it.
///
/// Events of the expansion engine are [`mass_expand::Event`]: `step`, `layer`, `kind`, and the statistics it was decided on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EventLine<E> {
    /// [`super::RunKey`] as text.
    pub run: String,
    /// What happened; serialises as an object.
    #[serde(flatten)]
    pub event: E,
}

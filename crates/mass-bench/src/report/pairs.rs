use serde::{Deserialize, Serialize};

/// How far the halves of a run's splits have come apart, so many steps after them: means over the pairs of which both are there.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct PairMeans {
    /// Steps since the split: 1, 2, 4, .. 64.
    pub age: u64,
    /// Pairs.
    pub pairs: usize,
    /// `|cos(G, W)|` of the first matrix of the expert that was split; of both halves over those that got a gradient.
    pub source_alignment: Option<f64>,
    /// The same of the newcomer.
    pub new_alignment: Option<f64>,
    /// Tokens that both have over tokens that either has; of pairs that have any.
    pub routing_overlap: Option<f64>,
    /// The newcomer's part of the tokens of both, likewise.
    pub new_share: Option<f64>,
    /// Cosine of the gate rows.
    pub gate_cosine: Option<f64>,
}

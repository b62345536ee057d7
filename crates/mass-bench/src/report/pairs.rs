use std::collections::BTreeMap;

use mass_model::growth::PairFigures;
use serde::{Deserialize, Serialize};

/// The last age at which the halves of a split are looked at, in steps.
const LAST: u64 = 64;

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

/// Sums of figures of pairs by age: pairs, and of each figure its sum and how many have it.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct PairSums(BTreeMap<u64, (usize, [(f64, usize); 5])>);

impl PairSums {
    /// Whether pairs are looked at so many steps after their split.
    pub(crate) fn looks_at(age: u64) -> bool {
        age.is_power_of_two() && age <= LAST
    }

    pub(crate) fn add(&mut self, age: u64, pair: &PairFigures) {
        let (pairs, sums) = self.0.entry(age).or_default();
        *pairs += 1;
        let figures = [
            pair.source_cosine.map(f64::abs),
            pair.new_cosine.map(f64::abs),
            pair.routing_overlap,
            pair.new_share,
            pair.gate_cosine,
        ];
        for (sum, figure) in sums.iter_mut().zip(figures) {
            if let Some(figure) = figure {
                *sum = (sum.0 + figure, sum.1 + 1);
            }
        }
    }

    pub(crate) fn means(&self) -> Vec<PairMeans> {
        let mean = |(sum, n): (f64, usize)| (n > 0).then(|| sum / n as f64);
        let means = self.0.iter().map(|(&age, &(pairs, sums))| {
            let [
                source_alignment,
                new_alignment,
                routing_overlap,
                new_share,
                gate_cosine,
            ] = sums.map(mean);
            PairMeans {
                age,
                pairs,
                source_alignment,
                new_alignment,
                routing_overlap,
                new_share,
                gate_cosine,
            }
        });
        means.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_are_over_the_pairs_that_have_a_figure() {
        let pair = |source_cosine, new_share| PairFigures {
            source_cosine,
            new_cosine: None,
            routing_overlap: Some(0.5),
            new_share,
            gate_cosine: Some(1.0),
        };
        let mut sums = PairSums::default();
        sums.add(4, &pair(Some(-0.25), Some(0.25)));
        sums.add(4, &pair(Some(0.75), None));
        sums.add(1, &pair(None, Some(1.0)));
        let means = sums.means();
        let ages: Vec<(u64, usize)> = means.iter().map(|m| (m.age, m.pairs)).collect();
        assert_eq!(ages, [(1, 1), (4, 2)]);
        // Of the size of the cosine, whatever its sign.
        assert_eq!(means[1].source_alignment, Some(0.5));
        assert_eq!(means[1].new_share, Some(0.25));
        assert_eq!(means[0].source_alignment, None);
        assert_eq!(means[1].new_alignment, None);
        let looked_at: Vec<u64> = (0..200).filter(|&age| PairSums::looks_at(age)).collect();
        assert_eq!(looked_at, [1, 2, 4, 8, 16, 32, 64]);
    }
}

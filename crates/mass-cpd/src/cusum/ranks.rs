//! Scores free of the distribution: sequential ranks, as normal scores.

use serde::{Deserialize, Serialize};

use crate::normal;

/// Most values kept: beyond, two neighbours become one.
const MOST: usize = 128;

/// The distribution of what was seen so far, in bounded memory.
///
/// # Formula
/// The `i`-th value has rank `R_i` among the first `i` (ties: the middle of their ranks), and score `Phi^-1((R_i - 1/2) / i)`.
/// Without a change sequential ranks are independent, and each equally likely to be any, whatever the distribution
/// (Conover, Tercero-Gomez & Cordero-Franco 2017). Up to 128 different values ranks are exact. Beyond, neighbours whose share is small for
/// where they lie are taken together, and ranks among them interpolated.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Ranks {
    /// Ascending.
    values: Vec<f64>,
    weights: Vec<f64>,
    total: f64,
}

impl Ranks {
    pub(super) fn new() -> Self {
        Self {
            values: Vec::with_capacity(MOST + 1),
            weights: Vec::with_capacity(MOST + 1),
            total: 0.0,
        }
    }

    pub(super) fn clear(&mut self) {
        self.values.clear();
        self.weights.clear();
        self.total = 0.0;
    }

    /// Takes `x` in, and gives its score.
    pub(super) fn score(&mut self, x: f64) -> f64 {
        let place = self.values.partition_point(|&v| v < x);
        let mut below: f64 = self.weights[..place].iter().sum();
        self.total += 1.0;
        let mut ties = 1.0;
        if self.values.get(place) == Some(&x) {
            self.weights[place] += 1.0;
            ties = self.weights[place];
        } else {
            if place > 0 && place < self.values.len() {
                // Of values taken together half lie on either side of their mean.
                let half = |w: f64| if w > 1.0 { 0.5 * w } else { 0.0 };
                let (left, right) = (half(self.weights[place - 1]), half(self.weights[place]));
                let (low, high) = (self.values[place - 1], self.values[place]);
                below += (left + right) * ((x - low) / (high - low)) - left;
            }
            self.values.insert(place, x);
            self.weights.insert(place, 1.0);
            if self.values.len() > MOST {
                self.join();
            }
        }
        let share = (below + 0.5 * ties) / self.total;
        -normal::upper_quantile(share)
    }

    /// Takes those two neighbours together that are the lightest for where they lie: finer in the tails.
    fn join(&mut self) {
        let (mut least, mut at, mut before) = (f64::INFINITY, 0, 0.0);
        for (i, pair) in self.weights.windows(2).enumerate() {
            let weight = pair[0] + pair[1];
            let share = (before + 0.5 * weight) / self.total;
            let cost = weight * weight / (share * (1.0 - share));
            if cost < least {
                (least, at) = (cost, i);
            }
            before += pair[0];
        }
        let (a, b) = (self.weights[at], self.weights[at + 1]);
        // A mean of two stays between them, whatever the rounding.
        let (low, high) = (self.values[at], self.values[at + 1]);
        let mean = low + (high - low) * (b / (a + b));
        self.values[at] = mean.max(low).min(high);
        self.weights[at] = a + b;
        self.values.remove(at + 1);
        self.weights.remove(at + 1);
    }

    /// Whether a deserialised state could have come from finite observations; gives the buffers their room back.
    pub(super) fn revive(&mut self) -> bool {
        let ok = self.values.len() == self.weights.len()
            && self.values.len() <= MOST
            && self.values.iter().all(|v| v.is_finite())
            && self.values.windows(2).all(|v| v[0] < v[1])
            && self.weights.iter().all(|w| *w >= 1.0 && w.fract() == 0.0)
            && self.weights.iter().sum::<f64>() == self.total
            && self.total <= crate::error::MOST as f64;
        if ok {
            self.values.reserve_exact(MOST + 1 - self.values.len());
            self.weights.reserve_exact(MOST + 1 - self.weights.len());
        }
        ok
    }
}

#[cfg(test)]
mod tests {
    use super::{MOST, Ranks};
    use crate::normal;

    #[test]
    fn ranks_are_exact_while_all_values_are_kept_and_close_after() {
        let mut ranks = Ranks::new();
        let mut seen: Vec<f64> = Vec::new();
        let mut state = 0.3f64;
        for i in 0..5000 {
            state = 3.99 * state * (1.0 - state);
            seen.push(state);
            let z = ranks.score(state);
            let below = seen.iter().filter(|&&v| v < state).count() as f64;
            let ties = seen.iter().filter(|&&v| v == state).count() as f64;
            let exact = (below + 0.5 * ties) / seen.len() as f64;
            let bound = if i < MOST { 1e-12 } else { 0.01 };
            assert!(
                (normal::cdf(z) - exact).abs() <= bound,
                "{i}: {z} for {exact}"
            );
        }
        assert!(ranks.values.len() == MOST && ranks.revive());
    }

    #[test]
    fn equal_values_share_the_middle_of_their_ranks() {
        let mut ranks = Ranks::new();
        for _ in 0..50 {
            assert_eq!(ranks.score(5.0), 0.0);
        }
        let z = ranks.score(6.0);
        assert!((normal::cdf(z) - 50.5 / 51.0).abs() < 1e-12);
        let z = ranks.score(6.0);
        assert!((normal::cdf(z) - 51.0 / 52.0).abs() < 1e-12);
    }
}

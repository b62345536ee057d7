//! Prediction of each observation from a window that ends some steps before it.

use serde::{Deserialize, Serialize};

use super::score::{ROUNDING, normal_score};
use crate::ring::Ring;

/// The same regression as in the self-starting reference, fitted to a sliding window by rolling sums.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Lagged {
    /// The window and, after it, the gap.
    history: Ring,
    window: usize,
    sums: Sums,
    /// Largest sum of squares since the sums were last made from scratch: what their rounding error is
    /// proportional to.
    peak: f64,
    seen: u64,
}

/// Sums over the window `v_0 .. v_{W-1}` (oldest first) of `v` less `origin`.
#[derive(Clone, Copy, Debug, PartialEq, Default, Serialize, Deserialize)]
struct Sums {
    origin: f64,
    first: f64,
    square: f64,
    /// of `v_j v_{j-1}`
    product: f64,
    /// of `j v_j`
    ramp: f64,
}

impl Lagged {
    pub(crate) fn new(window: usize, gap: usize) -> Self {
        Self {
            history: Ring::new(window + gap),
            window,
            sums: Sums::default(),
            peak: 0.0,
            seen: 0,
        }
    }

    pub(crate) fn clear(&mut self) {
        self.history.clear();
        self.sums = Sums::default();
        self.peak = 0.0;
        self.seen = 0;
    }

    pub(crate) fn seen(&self) -> u64 {
        self.seen
    }

    /// Scores `y` against the window, then moves the window on by one. `None` until the window is full.
    pub(crate) fn update(&mut self, y: f64, prewhiten: bool, drift: bool) -> Option<f64> {
        let z = self
            .history
            .is_full()
            .then(|| self.score(y, prewhiten, drift));
        self.learn(y);
        z
    }

    fn score(&mut self, y: f64, prewhiten: bool, drift: bool) -> f64 {
        let fit = self.fit(y, prewhiten, drift);
        // Where nearly all of the sum of squares is explained, its digits are spent: take them anew.
        if fit.spread < 1e-8 * self.sums.square {
            self.refresh();
            return self.fit(y, prewhiten, drift).z;
        }
        fit.z
    }

    fn fit(&self, y: f64, prewhiten: bool, drift: bool) -> Fit {
        let Sums {
            origin,
            first,
            square,
            product,
            ramp,
        } = self.sums;
        let size = self.window as f64;
        let oldest = self.history.from_oldest(0) - origin;
        let newest = self.history.from_oldest(self.window - 1) - origin;
        let previous = self.history.newest() - origin;
        let y = y - origin;

        // Targets are all values of the window, or, where each needs its predecessor, all but the oldest.
        let (n, sum_y, sum_yy) = if prewhiten {
            (size - 1.0, first - oldest, square - oldest * oldest)
        } else {
            (size, first, square)
        };
        let mean_y = sum_y / n;
        let mut yy = sum_yy - sum_y * mean_y;
        let mut error = y - mean_y;
        let mut leverage = 1.0 + 1.0 / n;
        let mut parameters = 1.0;
        // Time is a target's place in the window, and y's is a window and a gap on.
        let mean_t = if prewhiten {
            0.5 * size
        } else {
            0.5 * (size - 1.0)
        };
        let dt = self.history.len() as f64 - mean_t;
        let per_tt = 12.0 / (n * (n * n - 1.0));
        let yt = ramp - mean_t * sum_y;
        if drift {
            parameters += 1.0;
            error -= yt * per_tt * dt;
            leverage += dt * dt * per_tt;
            yy -= yt * yt * per_tt;
        }
        if prewhiten {
            parameters += 1.0;
            let sum_l = first - newest;
            let mean_l = sum_l / n;
            let mut ll = square - newest * newest - sum_l * mean_l;
            let mut yl = product - sum_y * mean_l;
            let mut dl = previous - mean_l;
            if drift {
                let lt = ramp - (size - 1.0) * newest + sum_l - mean_t * sum_l;
                dl -= lt * per_tt * dt;
                yl -= yt * lt * per_tt;
                ll -= lt * lt * per_tt;
            }
            if ll > 1e-13 * square {
                let phi = yl / ll;
                yy -= phi * yl;
                leverage += dl * dl / ll;
                // Least squares finds too little autocorrelation in a short window (Kendall 1954; with a
                // trend, Tanaka 1984), which the sum of scores would add up.
                let bias = if drift {
                    2.0 + 4.0 * phi
                } else {
                    1.0 + 3.0 * phi
                };
                error -= (phi + bias / n).clamp(-0.99, 0.99) * dl;
            }
        }
        let raw_square = square + origin * (2.0 * first + size * origin);
        let z = if yy > 1e-13 * square && yy > ROUNDING * raw_square && n > parameters {
            normal_score(error, error * error / (yy * leverage), n - parameters)
        } else {
            0.0
        };
        Fit { z, spread: yy }
    }

    fn learn(&mut self, y: f64) {
        self.seen += 1;
        if self.history.len() < self.history.capacity() {
            self.history.push(y);
            if self.history.is_full() {
                self.refresh();
            }
            return;
        }
        let origin = self.sums.origin;
        let at = |i: usize| self.history.from_oldest(i) - origin;
        let (leaving, second, newest) = (at(0), at(1), at(self.window - 1));
        // With no gap, y itself is the next value of the window.
        let entering = if self.window < self.history.capacity() {
            at(self.window)
        } else {
            y - origin
        };
        let sums = &mut self.sums;
        let rest = sums.first - leaving;
        sums.ramp += (self.window - 1) as f64 * entering - rest;
        sums.first = rest + entering;
        sums.square += entering * entering - leaving * leaving;
        sums.product += newest * entering - leaving * second;
        self.peak = self.peak.max(self.sums.square);
        self.history.push(y);
        // Rounding errors pile up, and weigh most when a large value leaves a window of small ones.
        if self.history.at_start() || self.sums.square < 1e-6 * self.peak {
            self.refresh();
        }
    }

    /// Makes the sums from the values, around their mean.
    fn refresh(&mut self) {
        let window = || self.history.ordered().take(self.window);
        let anchor = self.history.from_oldest(0);
        let origin = anchor + window().map(|v| v - anchor).sum::<f64>() / self.window as f64;
        let mut sums = Sums {
            origin,
            ..Sums::default()
        };
        let mut previous = None;
        for (j, v) in window().enumerate() {
            let v = v - origin;
            sums.first += v;
            sums.square += v * v;
            sums.ramp += j as f64 * v;
            sums.product += previous.map_or(0.0, |p| p * v);
            previous = Some(v);
        }
        self.sums = sums;
        self.peak = sums.square;
    }

    /// Whether a deserialised state fits the parameters; gives the buffer its room back.
    pub(crate) fn revive(&mut self, window: usize, gap: usize) -> bool {
        let Sums {
            origin,
            first,
            square,
            product,
            ramp,
        } = self.sums;
        self.window == window
            && self.history.revive(window + gap)
            && self.seen >= self.history.len() as u64
            && [origin, first, square, product, ramp, self.peak]
                .iter()
                .all(|v| v.is_finite())
    }
}

struct Fit {
    z: f64,
    spread: f64,
}

//! Prediction of each observation from a window that ends some steps before it.
//!
//! The same regression as in the self-starting reference, fitted to a sliding window by rolling sums. The
//! window's values are the caller's, so that a bank can keep those of all its streams in one piece.

use serde::{Deserialize, Serialize};

use super::score::{Judged, ROUNDING};

/// Sizes of the reference, what is fitted to it, and what follows from these.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Shape {
    pub(crate) window: usize,
    pub(crate) gap: usize,
    pub(crate) prewhiten: bool,
    pub(crate) drift: bool,
    /// Targets of the regression: all values of the window, or, where each needs its predecessor, all but the
    /// oldest.
    n: f64,
    per_n: f64,
    /// Mean place of a target in the window, reciprocal sum of squares around it, and distance to the value judged.
    mean_t: f64,
    per_tt: f64,
    dt: f64,
    /// `1 + 1 / n (+ dt^2 / tt)`
    leverage: f64,
    dof: f64,
    shrink: f64,
}

impl Shape {
    /// `window` at least 8, or 0 where there is none.
    pub(crate) fn new(window: usize, gap: usize, prewhiten: bool, drift: bool) -> Self {
        if window == 0 {
            return Self::default();
        }
        let size = window as f64;
        let (n, mean_t, lag) = if prewhiten {
            (size - 1.0, 0.5 * size, 1.0)
        } else {
            (size, 0.5 * (size - 1.0), 0.0)
        };
        let dt = size + gap as f64 - mean_t;
        let per_tt = 12.0 / (n * (n * n - 1.0));
        let trend = if drift { 1.0 } else { 0.0 };
        let dof = n - 1.0 - lag - trend;
        Self {
            window,
            gap,
            prewhiten,
            drift,
            n,
            per_n: 1.0 / n,
            mean_t,
            per_tt,
            dt,
            leverage: 1.0 + 1.0 / n + trend * dt * dt * per_tt,
            dof,
            shrink: 2.0 / (8.0 * dof + 3.0),
        }
    }

    /// Values to be kept of each stream: the window, and the gap after it.
    pub(crate) fn capacity(&self) -> usize {
        self.window + self.gap
    }
}

/// Rolling sums over the window, and the place of the ring buffer `values` that goes with them.
#[derive(Clone, Copy, Debug, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Lagged {
    seen: u64,
    /// Where the next value goes, and, once all have been written, where the oldest lies.
    next: usize,
    sums: Sums,
    /// Largest sum of squares since the sums were last made from scratch: what their rounding error is
    /// proportional to.
    peak: f64,
}

/// Sums over the window `v_0 .. v_{W-1}` (oldest first) of `v` less `origin`.
#[derive(Clone, Copy, Debug, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Sums {
    origin: f64,
    first: f64,
    square: f64,
    /// of `v_j v_{j-1}`
    product: f64,
    /// of `j v_j`
    ramp: f64,
}

struct Fit {
    z: f64,
    /// Residual sum of squares.
    rest: f64,
}

impl Lagged {
    pub(crate) fn seen(&self) -> u64 {
        self.seen
    }

    /// The `i`-th value counted from the oldest; all must have been written.
    #[inline]
    fn at(&self, values: &[f64], i: usize) -> f64 {
        let at = self.next + i;
        values[if at >= values.len() {
            at - values.len()
        } else {
            at
        }]
    }

    /// Scores `y` against the window (`None` until there is a full one), then moves the window on by one.
    /// `values` is the stream's own buffer, of `shape.capacity()` values.
    #[inline]
    pub(crate) fn update(&mut self, values: &mut [f64], y: f64, shape: &Shape) -> Option<f64> {
        let z = (self.seen >= values.len() as u64).then(|| self.score(values, y, shape));
        self.learn(values, y, shape);
        z
    }

    fn score(&mut self, values: &[f64], y: f64, shape: &Shape) -> f64 {
        let fit = self.fit(values, y, shape);
        // Where nearly all of the sum of squares is explained, its digits are spent: take them anew.
        if fit.rest < 1e-8 * self.sums.square {
            self.refresh(values, shape);
            return self.fit(values, y, shape).z;
        }
        fit.z
    }

    #[inline]
    fn fit(&self, values: &[f64], y: f64, shape: &Shape) -> Fit {
        let Sums {
            origin,
            first,
            square,
            product,
            ramp,
        } = self.sums;
        let size = shape.window as f64;
        let oldest = self.at(values, 0) - origin;
        let newest = self.at(values, shape.window - 1) - origin;
        let previous = values[if self.next == 0 {
            values.len()
        } else {
            self.next
        } - 1]
            - origin;
        let y = y - origin;

        let Shape {
            per_n,
            mean_t,
            per_tt,
            dt,
            ..
        } = *shape;
        let (sum_y, sum_yy) = if shape.prewhiten {
            (first - oldest, square - oldest * oldest)
        } else {
            (first, square)
        };
        let mean_y = sum_y * per_n;
        let mut rest = sum_yy - sum_y * mean_y;
        let mut error = y - mean_y;
        let mut leverage = shape.leverage;
        let yt = ramp - mean_t * sum_y;
        if shape.drift {
            error -= yt * per_tt * dt;
            rest -= yt * yt * per_tt;
        }
        if shape.prewhiten {
            let sum_l = first - newest;
            let mean_l = sum_l * per_n;
            let mut ll = square - newest * newest - sum_l * mean_l;
            let mut yl = product - sum_y * mean_l;
            let mut dl = previous - mean_l;
            if shape.drift {
                let lt = ramp - (size - 1.0) * newest + sum_l - mean_t * sum_l;
                dl -= lt * per_tt * dt;
                yl -= yt * lt * per_tt;
                ll -= lt * lt * per_tt;
            }
            if ll > 1e-13 * square {
                let per_ll = 1.0 / ll;
                let phi = yl * per_ll;
                rest -= phi * yl;
                leverage += dl * dl * per_ll;
                // Least squares finds too little autocorrelation in a short window (Kendall 1954; with a
                // trend, Tanaka 1984), which the sum of scores would add up.
                let bias = if shape.drift {
                    2.0 + 4.0 * phi
                } else {
                    1.0 + 3.0 * phi
                };
                error -= (phi + bias * per_n).clamp(-0.99, 0.99) * dl;
            }
        }
        let raw_square = square + origin * (2.0 * first + size * origin);
        let z = if rest > 1e-13 * square && rest > ROUNDING * raw_square && shape.dof > 0.0 {
            Judged {
                ratio: error * error / (rest * leverage),
                dof: shape.dof,
                shrink: shape.shrink,
                error,
                ..Judged::NONE
            }
            .score()
        } else {
            0.0
        };
        Fit { z, rest }
    }

    #[inline]
    fn learn(&mut self, values: &mut [f64], y: f64, shape: &Shape) {
        let full = self.seen >= values.len() as u64;
        if full {
            let origin = self.sums.origin;
            let at = |i: usize| self.at(values, i) - origin;
            let (leaving, second, newest) = (at(0), at(1), at(shape.window - 1));
            // With no gap, y itself is the next value of the window.
            let entering = if shape.gap > 0 {
                at(shape.window)
            } else {
                y - origin
            };
            let sums = &mut self.sums;
            let stay = sums.first - leaving;
            sums.ramp += (shape.window - 1) as f64 * entering - stay;
            sums.first = stay + entering;
            sums.square += entering * entering - leaving * leaving;
            sums.product += newest * entering - leaving * second;
            self.peak = self.peak.max(sums.square);
        }
        values[self.next] = y;
        self.seen += 1;
        self.next += 1;
        if self.next == values.len() {
            self.next = 0;
        }
        // Rounding errors pile up, and weigh most when a large value leaves a window of small ones.
        let stale = full && self.sums.square < 1e-6 * self.peak;
        if stale || (self.next == 0 && self.seen >= values.len() as u64) {
            self.refresh(values, shape);
        }
    }

    /// Makes the sums from the values, around their mean.
    fn refresh(&mut self, values: &[f64], shape: &Shape) {
        let window = shape.window;
        let anchor = self.at(values, 0);
        let origin = anchor
            + (0..window)
                .map(|j| self.at(values, j) - anchor)
                .sum::<f64>()
                / window as f64;
        let mut sums = Sums {
            origin,
            ..Sums::default()
        };
        let mut previous = 0.0;
        for j in 0..window {
            let v = self.at(values, j) - origin;
            sums.first += v;
            sums.square += v * v;
            sums.ramp += j as f64 * v;
            // The first has no predecessor, and zero takes its place.
            sums.product += previous * v;
            previous = v;
        }
        self.sums = sums;
        self.peak = sums.square;
    }

    /// The level expected of the next observation if nothing were known of the last ones, and its slope.
    #[inline]
    pub(crate) fn line(&self, values: &[f64], shape: &Shape) -> (f64, f64) {
        if self.seen < values.len() as u64 {
            return (0.0, 0.0);
        }
        let Sums {
            origin,
            first,
            ramp,
            ..
        } = self.sums;
        let size = shape.window as f64;
        let mean = origin + first / size;
        if !shape.drift {
            return (mean, 0.0);
        }
        let middle = 0.5 * (size - 1.0);
        let slope = (ramp - middle * first) * 12.0 / (size * (size * size - 1.0));
        (mean + slope * (size + shape.gap as f64 - middle), slope)
    }

    /// Whether a deserialised state could have come from finite observations.
    pub(crate) fn is_valid(&self, values: &[f64], shape: &Shape) -> bool {
        let Sums {
            origin,
            first,
            square,
            product,
            ramp,
        } = self.sums;
        values.len() == shape.capacity()
            && self.next as u64 == self.seen % values.len() as u64
            && [origin, first, square, product, ramp, self.peak]
                .iter()
                .all(|v| v.is_finite())
            && values.iter().all(|v| v.is_finite())
    }
}

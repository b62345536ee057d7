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
    per_n: f64,
    /// Mean place of a target in the window, reciprocal sum of squares around it, and distance to the value judged.
    mean_t: f64,
    per_tt: f64,
    dt: f64,
    /// `1 + 1 / n (+ dt^2 / tt)`
    leverage: f64,
    pub(super) dof: f64,
    shrink: f64,
    /// Size of the values that rounding is relative to, beside their own: 1 for logarithms, whose zero means nothing.
    unit: f64,
}

/// Errors beyond this many standard errors are learned as this many.
const MOST_LEARNED: f64 = 8.0;

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
            per_n: 1.0 / n,
            mean_t,
            per_tt,
            dt,
            leverage: 1.0 + 1.0 / n + trend * dt * dt * per_tt,
            dof,
            shrink: 2.0 / (8.0 * dof + 3.0),
            unit: 0.0,
        }
    }

    /// Targets of the regression: all values of the window, or, where each needs its predecessor, all but the
    /// oldest.
    pub(super) fn targets(&self) -> usize {
        self.window - usize::from(self.prewhiten)
    }

    /// For logarithms.
    pub(crate) fn of_logarithms(self) -> Self {
        Self { unit: 1.0, ..self }
    }

    /// Weights of the targets, newest first, in the prediction of the level.
    pub(super) fn weights(&self) -> Vec<f64> {
        let trend = if self.drift {
            self.dt * self.per_tt
        } else {
            0.0
        };
        (0..self.targets())
            .map(|i| self.per_n + trend * (0.5 * (self.targets() as f64 - 1.0) - i as f64))
            .collect()
    }

    /// Steps for which the error of a fit is about the same: the far end of a line moves faster than a mean.
    pub(super) fn error_lasts(&self) -> f64 {
        let lasts = self.window as f64 / if self.drift { 3.0 } else { 1.0 };
        lasts.max(1.0)
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
    /// `t^2 / dof`
    ratio: f64,
    /// Residual sum of squares.
    rest: f64,
    error: f64,
    /// Coefficient of the predecessor.
    phi: f64,
    /// `dof` times the square of the prediction's standard error.
    spread: f64,
}

/// Values of a full window that its sums are moved on by, as they were seen.
#[derive(Clone, Copy)]
struct Ends {
    oldest: f64,
    second: f64,
    newest: f64,
    /// The one after it, where there is a gap.
    next: Option<f64>,
    /// The last one seen.
    previous: f64,
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
        if self.seen < values.len() as u64 {
            self.write(values, y, shape, false);
            return None;
        }
        let ends = Ends {
            oldest: self.at(values, 0),
            second: self.at(values, 1),
            newest: self.at(values, shape.window - 1),
            next: (shape.gap > 0).then(|| self.at(values, shape.window)),
            previous: self.at(values, values.len() - 1),
        };
        let mut fit = self.fit(&ends, y, shape);
        // Where nearly all of the sum of squares is explained, its digits are spent: take them anew.
        if fit.rest < 1e-8 * self.sums.square {
            self.refresh(values, shape);
            fit = self.fit(&ends, y, shape);
        }
        let far = |ratio: f64| ratio * shape.dof > MOST_LEARNED * MOST_LEARNED;
        let mut judged = Judged {
            ratio: fit.ratio,
            dof: shape.dof,
            shrink: shape.shrink,
            error: fit.error,
            ..Judged::NONE
        };
        // As in the self-starting reference: by a coefficient over one what is learned would run away
        // from what is observed.
        if far(judged.ratio) && fit.phi.abs() > 1.0 {
            judged = judged.within(y, ends.previous, self.line(values, shape));
        }
        let z = judged.score();
        // A jump is not learned at its full size: as the predecessor of the next value, or in the window, it would have the autoregression
        // explain all that follows. The window's spread grows with each such value, so that a lasting one is followed in time.
        let learned = if far(judged.ratio) {
            let most = MOST_LEARNED * (fit.spread / shape.dof).sqrt();
            y - judged.error + most.copysign(judged.error)
        } else {
            y
        };
        self.learn(values, &ends, learned, shape);
        Some(z)
    }

    #[inline]
    fn fit(&self, ends: &Ends, y: f64, shape: &Shape) -> Fit {
        let Sums {
            origin,
            first,
            square,
            product,
            ramp,
        } = self.sums;
        let size = shape.window as f64;
        let [oldest, newest, previous, y] =
            [ends.oldest, ends.newest, ends.previous, y].map(|v| v - origin);

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
        let mut coefficient = 0.0;
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
                // trend, Tanaka 1984), which the sum of scores would add up. Never by more than two standard
                // errors: where nothing is left unexplained the coefficient is exact.
                let bias = if shape.drift {
                    2.0 + 4.0 * phi
                } else {
                    1.0 + 3.0 * phi
                };
                let mut bias = bias * per_n;
                let most = 4.0 * rest.max(0.0);
                if bias * bias * ll * shape.dof > most {
                    bias = (most * per_ll / shape.dof).sqrt().copysign(bias);
                }
                let corrected = phi + bias;
                coefficient = corrected.clamp(phi.min(-0.99), phi.max(0.99));
                error -= coefficient * dl;
            }
        }
        // No spread at all is taken for that of rounding: what is beyond it is evidence.
        let raw_square = square + origin * (2.0 * first + size * origin) + shape.unit * size;
        let spread = rest.max(1e-13 * square).max(ROUNDING * raw_square);
        let spread = spread * leverage;
        let ratio = if error == 0.0 {
            0.0
        } else {
            (error * error / spread).min(f64::MAX)
        };
        Fit {
            ratio,
            rest,
            error,
            phi: coefficient,
            spread,
        }
    }

    #[inline]
    fn learn(&mut self, values: &mut [f64], ends: &Ends, y: f64, shape: &Shape) {
        // With no gap, y itself is the next value of the window.
        let next = ends.next.unwrap_or(y);
        let sums = &mut self.sums;
        let [leaving, second, newest, entering] =
            [ends.oldest, ends.second, ends.newest, next].map(|v| v - sums.origin);
        let stay = sums.first - leaving;
        sums.ramp += (shape.window - 1) as f64 * entering - stay;
        sums.first = stay + entering;
        sums.square += entering * entering - leaving * leaving;
        sums.product += newest * entering - leaving * second;
        self.peak = self.peak.max(sums.square);
        // Rounding errors pile up, and weigh most when a large value leaves a window of small ones.
        let stale = self.sums.square < 1e-6 * self.peak;
        self.write(values, y, shape, stale);
    }

    #[inline]
    fn write(&mut self, values: &mut [f64], y: f64, shape: &Shape, stale: bool) {
        values[self.next] = y;
        self.seen += 1;
        self.next += 1;
        if self.next == values.len() {
            self.next = 0;
        }
        if stale || self.next == 0 {
            self.refresh(values, shape);
        }
    }

    /// Makes the sums from the values, around their mean.
    #[cold]
    #[inline(never)]
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
            && square >= 0.0
            && values.iter().all(|v| v.is_finite())
    }
}

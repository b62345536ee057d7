//! Prediction of each observation from all before it.
//!
//! The regression `y_t = a + phi y_{t-1} (+ b t)` is fitted afresh at every step to the observations so far. The
//! error of predicting the next one, over its standard error, is a recursive residual (Brown, Durbin & Evans 1975):
//! Student-distributed, and independent of those before it, however few observations the fit has seen. That is
//! what keeps the false-alarm rate of a CUSUM of such scores where it is meant to be, when parameters that
//! were estimated once on a warm-up would inflate it.

use serde::{Deserialize, Serialize};

use super::score::{ROUNDING, normal_score};

/// Moments of `y`, of its predecessor `l`, and of time, over the targets so far.
#[derive(Clone, Copy, Debug, PartialEq, Default, Serialize, Deserialize)]
pub(crate) struct SelfStarting {
    /// Observations, of which the first is no target when it is needed as the predecessor.
    pub(crate) seen: f64,
    pub(crate) previous: f64,
    pub(crate) mean_y: f64,
    pub(crate) mean_l: f64,
    pub(crate) yy: f64,
    pub(crate) yl: f64,
    pub(crate) ll: f64,
    pub(crate) yt: f64,
    pub(crate) lt: f64,
}

impl SelfStarting {
    /// Scores `y` against everything before it, then learns it. The score means something once at least
    /// five observations were seen.
    #[inline(always)]
    pub(crate) fn update<const AR: bool, const DRIFT: bool>(&mut self, y: f64) -> f64 {
        let lag = if AR { 1.0 } else { 0.0 };
        let n = self.seen - lag;
        let (dy, dl) = (y - self.mean_y, self.previous - self.mean_l);

        // Time is centred on the mean of the targets' indices 1..=n; the new one is n + 1.
        let dt = 0.5 * (n + 1.0);
        let mut parameters = 1.0;
        let (mut error, mut leverage) = (dy, 1.0 + 1.0 / n);
        let (mut yy, mut yl, mut ll, mut dl_rest) = (self.yy, self.yl, self.ll, dl);
        if DRIFT {
            parameters += 1.0;
            let per_tt = 12.0 / (n * (n * n - 1.0));
            error -= self.yt * per_tt * dt;
            leverage += dt * dt * per_tt;
            yy -= self.yt * self.yt * per_tt;
            if AR {
                dl_rest -= self.lt * per_tt * dt;
                yl -= self.yt * self.lt * per_tt;
                ll -= self.lt * self.lt * per_tt;
            }
        }
        let size = self.yy + n * self.mean_y * self.mean_y;
        if AR {
            parameters += 1.0;
            // A predecessor that never varied explains nothing.
            let per_ll = if ll > ROUNDING * size { 1.0 / ll } else { 0.0 };
            let phi = yl * per_ll;
            error -= phi * dl_rest;
            leverage += dl_rest * dl_rest * per_ll;
            yy -= phi * yl;
        }
        let spread = yy * leverage;
        let z = normal_score(error, error * error / spread, n - parameters);
        let z = if yy > ROUNDING * size && n > parameters {
            z
        } else {
            0.0
        };

        // Welford's update. Before the first target (only with AR) everything is still zero and must stay so.
        let is_target = self.seen >= lag;
        let share = if is_target { 1.0 / (n + 1.0) } else { 0.0 };
        let keep = if is_target { 1.0 - share } else { 0.0 };
        self.yy += dy * dy * keep;
        self.mean_y += dy * share;
        if AR {
            self.yl += dy * dl * keep;
            self.ll += dl * dl * keep;
            self.mean_l += dl * share;
        }
        if DRIFT {
            self.yt += dy * dt * keep;
            if AR {
                self.lt += dl * dt * keep;
            }
        }
        self.previous = y;
        self.seen += 1.0;
        z
    }

    /// Whether a deserialised state could have come from finite observations.
    pub(crate) fn is_valid(&self) -> bool {
        let Self {
            seen,
            previous,
            mean_y,
            mean_l,
            yy,
            yl,
            ll,
            yt,
            lt,
        } = *self;
        [previous, mean_y, mean_l, yl, yt, lt]
            .iter()
            .all(|v| v.is_finite())
            && [seen, yy, ll].iter().all(|v| v.is_finite() && *v >= 0.0)
            && seen.fract() == 0.0
    }
}

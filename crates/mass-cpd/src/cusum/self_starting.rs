//! Prediction of each observation from all before it.
//!
//! The regression `y_t = a + phi y_{t-1} (+ b t)` is fitted afresh at every step to the observations so far. The
//! error of predicting the next one, over its standard error, is a recursive residual (Brown, Durbin & Evans 1975):
//! Student-distributed, and independent of those before it, however few observations the fit has seen. That is
//! what keeps the false-alarm rate of a CUSUM of such scores where it is meant to be, when parameters that
//! were estimated once on a warm-up would inflate it.

use serde::{Deserialize, Serialize};

use super::score::{Judged, ROUNDING};

/// Products of six values are compared with this, so that spreads down to about 1e-48 are told from none.
const SMALLEST_SPREAD: f64 = 1e-290;

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
    /// Judges `y` against everything before it, then learns it.
    #[inline(always)]
    pub(crate) fn update<const AR: bool, const DRIFT: bool>(&mut self, y: f64) -> Judged {
        let lag = if AR { 1.0 } else { 0.0 };
        let n = self.seen - lag;
        let (dy, dl) = (y - self.mean_y, self.previous - self.mean_l);

        // Time is centred on the mean of the targets' indices 1..=n; the new one is n + 1.
        let dt = 0.5 * (n + 1.0);
        let parameters = 1.0 + lag + if DRIFT { 1.0 } else { 0.0 };
        let dof = n - parameters;
        // With l the predecessor and everything freed from the trend,
        //     t^2 / dof = (dy - yl / ll dl)^2 / ((yy - yl^2 / ll) (1 + 1 / n (+ dt^2 / tt) + dl^2 / ll)),
        // multiplied through, so that one division is left.
        let (mut error, mut yy, mut yl, mut ll, mut dl_free) = (dy, self.yy, self.yl, self.ll, dl);
        let (mut below, mut above) = (n, n + 1.0);
        if DRIFT {
            let per_tt = 12.0 / (n * (n * n - 1.0));
            error -= self.yt * per_tt * dt;
            yy -= self.yt * self.yt * per_tt;
            below *= n - 1.0;
            above *= n + 2.0;
            if AR {
                dl_free -= self.lt * per_tt * dt;
                yl -= self.yt * self.lt * per_tt;
                ll -= self.lt * self.lt * per_tt;
            }
        }
        // Below this the residual sum of squares is rounding noise.
        let noise = ROUNDING * (self.yy + n * self.mean_y * self.mean_y);
        let mut rest = yy;
        let mut enough = yy > noise;
        let mut leverage = above;
        if AR {
            // A predecessor that never varied explains nothing.
            let varies = ll > noise;
            (ll, yl, dl_free) = if varies {
                (ll, yl, dl_free)
            } else {
                (1.0, 0.0, 0.0)
            };
            error = error * ll - yl * dl_free;
            rest = yy * ll - yl * yl;
            leverage = above * ll + below * dl_free * dl_free;
            enough &= rest > noise * ll;
        }
        let spread = rest * leverage;
        // One division for two reciprocals.
        let (targets, wallace) = (n + 1.0, 8.0 * dof + 3.0);
        let both = 1.0 / (targets * wallace);
        let ratio = below * error * error / spread;
        let known = enough && dof > 0.0 && spread > SMALLEST_SPREAD;
        let judged = Judged {
            ratio: if known { ratio } else { 0.0 },
            dof: if known { dof } else { 1.0 },
            shrink: 2.0 * targets * both,
            error,
        };

        // Welford's update. Before the first target (only with AR) everything is still zero and must stay so.
        let is_target = self.seen >= lag;
        let share = if is_target { wallace * both } else { 0.0 };
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
        judged
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

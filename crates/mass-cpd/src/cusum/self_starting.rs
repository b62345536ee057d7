//! Prediction of each observation from all before it.
//!
//! The regression `y_t = a + phi y_{t-1} (+ b t)` is fitted afresh at every step to the observations so far. The
//! error of predicting the next one, over its standard error, is a recursive residual (Brown, Durbin & Evans 1975):
//! Student-distributed, and independent of those before it, however few observations the fit has seen. That is
//! what keeps the false-alarm rate of a CUSUM of such scores where it is meant to be, when parameters that
//! were estimated once on a warm-up would inflate it. Least squares finds too little autocorrelation, by `(1 + 3 phi) / n`
//! (Kendall 1954; Marriott & Pope 1954), with a line by `(2 + 4 phi) / n` (Tanaka 1984): it is added before predicting.
//!
//! An observation whose score is over the limit is cleaned before it is learned (Martin & Thomson 1982): see
//! [`Judged::clean`].

use serde::{Deserialize, Serialize};

use super::score::{Judged, ROUNDING, SPENT};

/// Products of six values are compared with this, so that spreads down to about 1e-48 are told from none.
const SMALLEST_SPREAD: f64 = 1e-290;

/// The largest coefficient that a correction of its bias may lead to.
const LARGEST_PHI: f64 = 0.99;

/// Moments of `y`, of its predecessor `l`, and of time, over the targets so far.
#[derive(Clone, Copy, Debug, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SelfStarting {
    /// Observations learned, of which the first is no target when it is needed as the predecessor.
    pub(crate) seen: f64,
    /// 1 when the predecessor is not as it was observed: cleaned, or missing.
    pub(crate) odd: f64,
    /// The predecessor as it enters the regression.
    pub(crate) previous: f64,
    /// The predecessor as it was observed, while `odd`.
    pub(crate) raw: f64,
    /// Variance of a missing predecessor around its prediction, in variances of the regression's error.
    pub(crate) unsure: f64,
    pub(crate) mean_y: f64,
    pub(crate) mean_l: f64,
    pub(crate) yy: f64,
    pub(crate) yl: f64,
    pub(crate) ll: f64,
    /// Steps since the start, and moments of the targets' times: with drift removed only.
    pub(crate) time: f64,
    pub(crate) mean_t: f64,
    pub(crate) tt: f64,
    pub(crate) yt: f64,
    pub(crate) lt: f64,
}

impl SelfStarting {
    /// Judges `y` against everything before it, then learns it: its score, limited in what is learned once that is after
    /// `warmup` observations.
    #[inline(always)]
    pub(crate) fn update<const AR: bool, const DRIFT: bool>(
        &mut self,
        y: f64,
        limit: f64,
        warmup: f64,
    ) -> f64 {
        let (judged, share) = self.judge::<AR, DRIFT>(y, self.previous);
        if self.is_usual::<AR>() {
            let z = judged.score();
            if z.abs() <= limit || self.seen < warmup {
                self.learn::<AR, DRIFT>(y, share);
                return z;
            }
        }
        self.update_odd::<AR, DRIFT>(y, limit, warmup)
    }

    /// Whether the predecessor is as it was observed, and needs no care: before the first target (only with AR) it is none.
    #[inline(always)]
    pub(crate) fn is_usual<const AR: bool>(&self) -> bool {
        (self.odd == 0.0) & (!AR || self.seen >= 1.0)
    }

    /// The same where the observation is over the limit, or its predecessor was, is missing, or is none.
    #[cold]
    #[inline(never)]
    fn update_odd<const AR: bool, const DRIFT: bool>(
        &mut self,
        y: f64,
        limit: f64,
        warmup: f64,
    ) -> f64 {
        if AR && self.seen == 0.0 {
            self.previous = y;
            self.seen = 1.0;
            self.time += if DRIFT { 1.0 } else { 0.0 };
            return 0.0;
        }
        let limit = if self.seen >= warmup {
            limit
        } else {
            f64::INFINITY
        };
        let (mut judged, share) = self.judge::<AR, DRIFT>(y, self.previous);
        if AR && self.unsure > 0.0 {
            judged = judged.with_more_variance(self.phi::<DRIFT>().powi(2) * self.unsure);
        }
        if AR && judged.score().abs() > limit {
            judged = self.as_possible::<DRIFT>(judged, y, self.previous);
        }
        if AR && self.unsure > 0.0 {
            // Without its predecessor it is no target of the regression.
            let (z, clean, _) = judged.clean(y, limit);
            self.pass_over(y, clean);
            return z;
        }
        let (z, clean, extra) = judged.clean(y, limit);
        if AR && self.odd > 0.0 {
            // The predecessor was far off: either an outlier of the measurement, or one of the process, whose echo this is.
            let (mut echo, _) = self.judge::<AR, DRIFT>(y, self.raw);
            if echo.score().abs() > limit {
                echo = self.as_possible::<DRIFT>(echo, y, self.raw);
            }
            if echo.is_within_reach(self.seen) && echo.score().abs() < z.abs() {
                self.pass_over(y, clean);
                return echo.score();
            }
        }
        self.learn::<AR, DRIFT>(clean, share);
        self.yy += extra;
        self.follow(y, clean);
        z
    }

    /// What was judged by `previous`, by the nearest prediction that is possible if its own is not.
    ///
    /// Predictions come back as predecessors: over a gap, and in observations that are cleaned.
    /// After a jump the cleaned values climb faster and faster, by a coefficient over one.
    /// Left to itself it would lead away from the observations, and never be put right by them.
    /// So it leads no further than the level, the predecessor and the observation lie.
    fn as_possible<const DRIFT: bool>(&self, judged: Judged, y: f64, previous: f64) -> Judged {
        if self.phi::<DRIFT>().abs() <= 1.0 {
            return judged;
        }
        judged.within(y, previous, self.line::<DRIFT>())
    }

    /// A missing observation.
    pub(crate) fn skip<const AR: bool, const DRIFT: bool>(&mut self) {
        if AR && self.seen < 8.0 {
            // Too early for a prediction in its place.
            *self = Self {
                time: self.time + 1.0,
                ..Self::default()
            };
            return;
        }
        if AR {
            // By more than one a long gap would lead to no number at all.
            let phi = self.phi::<DRIFT>().clamp(-1.0, 1.0);
            let (level, slope) = self.line::<DRIFT>();
            self.previous = level + phi * (self.previous - (level - slope));
            self.raw = self.previous;
            self.unsure = 1.0 + phi * phi * self.unsure;
            self.odd = 1.0;
        }
        self.time += 1.0;
    }

    fn pass_over(&mut self, y: f64, clean: f64) {
        self.time += 1.0;
        self.follow(y, clean);
    }

    fn follow(&mut self, y: f64, clean: f64) {
        self.previous = clean;
        self.odd = if clean == y { 0.0 } else { 1.0 };
        self.raw = if clean == y { 0.0 } else { y };
        self.unsure = 0.0;
    }

    /// The coefficient, corrected for its bias.
    fn phi<const DRIFT: bool>(&self) -> f64 {
        let (mut yl, mut ll) = (self.yl, self.ll);
        if DRIFT && self.tt > 0.0 {
            yl -= self.yt * self.lt / self.tt;
            ll -= self.lt * self.lt / self.tt;
        }
        if ll > SPENT * self.ll && ll > ROUNDING * (self.yy + self.seen * self.mean_y * self.mean_y)
        {
            unbiased::<DRIFT>(yl, ll, 1.0 / self.seen) / ll
        } else {
            0.0
        }
    }

    /// The level expected of the next observation if nothing were known of the last ones, and its slope.
    #[inline(always)]
    pub(crate) fn line<const DRIFT: bool>(&self) -> (f64, f64) {
        if DRIFT && self.tt > 0.0 {
            let slope = self.yt / self.tt;
            (self.mean_y + slope * (self.time - self.mean_t), slope)
        } else {
            (self.mean_y, 0.0)
        }
    }

    /// Judges `y` against everything before it, if its predecessor was `previous`; and the share that `y` has in the means
    /// once it is learned.
    #[inline(always)]
    pub(crate) fn judge<const AR: bool, const DRIFT: bool>(
        &self,
        y: f64,
        previous: f64,
    ) -> (Judged, f64) {
        let lag = if AR { 1.0 } else { 0.0 };
        let n = self.seen - lag;
        let (dy, dl) = (y - self.mean_y, previous - self.mean_l);
        let dt = if DRIFT { self.time - self.mean_t } else { 0.0 };
        let parameters = 1.0 + lag + if DRIFT { 1.0 } else { 0.0 };
        let dof = n - parameters;
        // One division for two reciprocals.
        let (targets, wallace) = (n + 1.0, 8.0 * dof + 3.0);
        let both = 1.0 / (targets * wallace);
        let share = wallace * both;
        // With l the predecessor and everything freed from the trend,
        //     t^2 / dof = (dy - yl / ll dl)^2 / ((yy - yl^2 / ll) (1 + 1 / n (+ dt^2 / tt) + dl^2 / ll)),
        // multiplied through, so that one division is left.
        let (mut error, mut yy, mut yl, mut ll, mut dl_free) = (dy, self.yy, self.yl, self.ll, dl);
        let mut above = n + 1.0;
        if DRIFT {
            let per_tt = if self.tt > 0.0 { 1.0 / self.tt } else { 0.0 };
            error -= self.yt * per_tt * dt;
            yy -= self.yt * self.yt * per_tt;
            above += n * (dt * dt * per_tt);
            if AR {
                dl_free -= self.lt * per_tt * dt;
                yl -= self.yt * self.lt * per_tt;
                ll -= self.lt * self.lt * per_tt;
            }
        }
        // A smaller residual sum of squares is rounding noise, and not told from none: the observation itself is rounded
        // as well, and what a regression explains costs digits.
        let rounding = ROUNDING * (self.yy + n * self.mean_y * self.mean_y + y * y);
        let noise = if AR || DRIFT {
            rounding + SPENT * self.yy
        } else {
            rounding
        };
        let mut rest = yy;
        let mut leverage = above;
        if AR {
            // A predecessor that never varied explains nothing.
            let varies = ll > rounding && (!DRIFT || ll > SPENT * self.ll);
            (ll, yl, dl_free) = if varies {
                (ll, yl, dl_free)
            } else {
                (1.0, 0.0, 0.0)
            };
            error = error * ll - unbiased::<DRIFT>(yl, ll, share) * dl_free;
            rest = yy * ll - yl * yl;
            leverage = above * ll + n * dl_free * dl_free;
        } else {
            ll = 1.0;
        }
        let least = noise * ll;
        rest = if rest > least { rest } else { least };
        let spread = rest * leverage;
        let ratio = n * error * error / spread;
        // Without spread an error within rounding is none.
        let known =
            (dof > 0.0) & (spread > SMALLEST_SPREAD) & ((rest > least) | (ratio * dof > 1.0));
        let judged = Judged {
            ratio: if known { ratio } else { 0.0 },
            dof: if known { dof } else { 1.0 },
            shrink: if known { 2.0 * targets * both } else { 0.0 },
            error,
            unit: ll,
            rest,
            leverage,
            per: n * ll,
        };
        (judged, share)
    }

    /// Welford's update; not before there is a predecessor (only with AR).
    #[inline(always)]
    pub(crate) fn learn<const AR: bool, const DRIFT: bool>(&mut self, y: f64, share: f64) {
        let keep = 1.0 - share;
        let (dy, dl) = (y - self.mean_y, self.previous - self.mean_l);
        let dt = self.time - self.mean_t;
        self.yy += dy * dy * keep;
        self.mean_y += dy * share;
        if AR {
            self.yl += dy * dl * keep;
            self.ll += dl * dl * keep;
            self.mean_l += dl * share;
        }
        if DRIFT {
            self.tt += dt * dt * keep;
            self.yt += dy * dt * keep;
            self.mean_t += dt * share;
            self.time += 1.0;
            if AR {
                self.lt += dl * dt * keep;
            }
        }
        self.previous = y;
        self.seen += 1.0;
    }

    /// Whether a deserialised state could have come from finite observations.
    pub(crate) fn is_valid(&self) -> bool {
        let Self {
            seen,
            odd,
            previous,
            raw,
            unsure,
            mean_y,
            mean_l,
            yy,
            yl,
            ll,
            time,
            mean_t,
            tt,
            yt,
            lt,
        } = *self;
        [previous, raw, mean_y, mean_l, yl, mean_t, yt, lt]
            .iter()
            .all(|v| v.is_finite())
            && [seen, unsure, yy, ll, time, tt]
                .iter()
                .all(|v| v.is_finite() && *v >= 0.0)
            && [seen, time].iter().all(|v| v.fract() == 0.0)
            && (odd == 0.0 || odd == 1.0)
    }
}

/// The covariance `yl` with the bias of the coefficient `yl / ll` taken out.
#[inline(always)]
fn unbiased<const DRIFT: bool>(yl: f64, ll: f64, per_n: f64) -> f64 {
    let bias = if DRIFT {
        2.0 * ll + 4.0 * yl
    } else {
        ll + 3.0 * yl
    };
    let corrected = yl + bias * per_n;
    let bound = LARGEST_PHI * ll;
    let highest = if yl > bound { yl } else { bound };
    let lowest = if yl < -bound { yl } else { -bound };
    let corrected = if corrected > highest {
        highest
    } else {
        corrected
    };
    if corrected < lowest {
        lowest
    } else {
        corrected
    }
}

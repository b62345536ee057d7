//! Prediction by an autoregression of any order, from all before.
//!
//! # Formula
//! `y_t = a (+ b t) + phi_1 y_{t-1} + .. + phi_p y_{t-p} + error` by least squares: the triangular factor `R` of the rows
//! `[1, (t,) y_{t-1}, .., y_{t-p} | y_t]` is rotated at every step (Gentleman 1973). With `R' v = x` for the new row `x` and `w` the
//! last column of `R`, the regression on the first `j` columns predicts `sum_{i <= j} w_i v_i` with variance
//! `1 + sum_{i <= j} v_i^2` and leaves the sum of squares `sum_{i > j} w_i^2`: one pass judges by all orders, and Akaike's criterion
//! `n ln(rest / n) + 2 j` chooses. The bias of the coefficients is taken out before predicting (Shaman & Stine 1988).
//!
//! A missing observation is replaced by its prediction, whose variance the filter carries (Kalman 1960); a row with a
//! missing predecessor is judged, not learned.
//!
//! # Stand-ins
//! Predictions come back as predecessors: over a gap, and in observations that are cleaned.
//! After a jump the cleaned values climb faster and faster, and the fit to them can be explosive.
//! Left to itself it would run away from the observations, and never be put right by them.
//! So a stand-in lies where observations have been: see [`Autoregression::possible`].

use serde::{Deserialize, Serialize};

use super::score::{Judged, ROUNDING, SPENT};

/// Highest order.
pub(super) const MOST_ORDER: usize = 8;

/// Columns of the largest row: level, line, predecessors, and the observation.
const WIDTH: usize = MOST_ORDER + 3;

/// Most variances of the error by which a missing predecessor can be off.
/// A regression that explains more has no digits left ([`SPENT`]).
const MOST_UNSURE: f64 = 1.0 / (SPENT * SPENT);

type Row = [f64; WIDTH];
type Lags = [f64; MOST_ORDER];

/// What is fitted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Model {
    pub(super) order: usize,
    pub(super) choose: bool,
    pub(super) drift: bool,
}

impl Model {
    /// Columns before those of the predecessors.
    fn base(&self) -> usize {
        if self.drift { 2 } else { 1 }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Autoregression {
    /// Observations learned, and those before the first that had all its predecessors.
    seen: u64,
    /// Steps since the start, gaps included.
    time: u64,
    /// Rows learned.
    n: u64,
    /// The first observation: taken off all, so that a large level costs no digits.
    origin: f64,
    /// Least and largest observation so far.
    least: f64,
    most: f64,
    /// Predecessors, latest first, as they enter the regression.
    lags: Lags,
    /// The same as they were observed.
    raw: Lags,
    /// Predecessors that there have been since the start.
    known: usize,
    /// Covariance of the predecessors around what stands for them, in variances of the error.
    unsure: [Lags; MOST_ORDER],
    /// How many of the latest steps must pass until no predecessor is a prediction.
    gap: usize,
    factor: [Row; WIDTH],
}

/// An observation judged by the regression.
#[derive(Clone, Copy)]
pub(super) struct Verdict {
    pub(super) judged: Judged,
    phi: Lags,
}

impl Default for Autoregression {
    fn default() -> Self {
        Self {
            seen: 0,
            time: 0,
            n: 0,
            origin: 0.0,
            least: 0.0,
            most: 0.0,
            lags: [0.0; MOST_ORDER],
            raw: [0.0; MOST_ORDER],
            known: 0,
            unsure: [[0.0; MOST_ORDER]; MOST_ORDER],
            gap: 0,
            factor: [[0.0; WIDTH]; WIDTH],
        }
    }
}

impl Autoregression {
    pub(super) fn seen(&self) -> u64 {
        self.seen
    }

    /// Judges `y`, learns it cleaned where its score is over the limit: its score, and, once there is one, the error over its standard
    /// error in units of the regression's.
    pub(super) fn update(&mut self, y: f64, limit: f64, model: &Model) -> (f64, Option<f64>) {
        if self.seen == 0 {
            self.origin = y;
        }
        let p = model.order;
        let y = y - self.origin;
        self.least = self.least.min(y);
        self.most = self.most.max(y);
        let mut verdict = self.judge(y, &self.lags, model);
        let missing = self.gap > 0;
        if missing {
            verdict.judged = verdict
                .judged
                .with_more_variance(self.variance(&verdict.phi, p));
        }
        verdict.judged = self.as_possible(y, limit, &verdict, model);
        let (mut z, clean, extra) = verdict.judged.clean(y, limit);
        let follows = self.known >= p;
        let known = self.n as usize > model.base() + p;
        let mut chosen = verdict.judged;
        let mut learned = !missing && follows;
        if !missing && self.lags[..p] != self.raw[..p] {
            // A predecessor was far off: either an outlier of the measurement, or one of the process, whose echo this is.
            let echo = self.judge(y, &self.raw, model);
            let echo = self.as_possible(y, limit, &echo, model);
            if echo.is_within_reach(self.n as f64) && echo.score().abs() < z.abs() {
                (z, chosen, learned) = (echo.score(), echo, false);
            }
        }
        if learned {
            self.learn(clean, extra, model);
        }
        if missing {
            self.observe_after_gap(&verdict, model);
        }
        self.shift(clean, y);
        self.gap = self.gap.saturating_sub(1);
        self.seen += u64::from(learned || !follows);
        (z, known.then(|| chosen.error / chosen.leverage.sqrt()))
    }

    /// A missing observation.
    pub(super) fn skip(&mut self, model: &Model) {
        let p = model.order;
        if p > 0 && self.n < 8 + 2 * p as u64 {
            // Too early for a prediction in its place.
            let time = self.time + 1;
            *self = Self {
                time,
                ..Self::default()
            };
            return;
        }
        let verdict = self.judge(0.0, &self.lags, model);
        let phi = &verdict.phi;
        let prediction = self.possible(-verdict.judged.error, phi, model);
        let variance = 1.0 + self.variance(phi, p);
        let with = self.with_observation(phi, p);
        self.move_unsure(p);
        if p > 0 {
            // Without a bound an explosive fit would have it overflow in a long gap.
            let part = (MOST_UNSURE / variance).min(1.0);
            self.unsure[0][0] = variance * part;
            for i in 1..p {
                self.unsure[0][i] = with[i - 1] * part.sqrt();
                self.unsure[i][0] = self.unsure[0][i];
            }
            self.keep_covariance(p);
        }
        self.shift(prediction, prediction);
        self.gap = p;
    }

    /// The level expected of the next observation if nothing were known of the last ones, and its slope.
    pub(super) fn line(&self, model: &Model) -> (f64, f64) {
        let q = model.base() + model.order;
        let r = &self.factor;
        if r[0][0] <= 0.0 {
            return (self.origin, 0.0);
        }
        let slope = if model.drift && r[1][1] > 0.0 {
            r[1][q] / r[1][1]
        } else {
            0.0
        };
        let start = (r[0][q] - r[0][1] * if model.drift { slope } else { 0.0 }) / r[0][0];
        (self.origin + start + slope * self.time as f64, slope)
    }

    /// The verdict on `y`.
    /// Where it is over the limit by a prediction that is not possible, the nearest that is counts.
    fn as_possible(&self, y: f64, limit: f64, verdict: &Verdict, model: &Model) -> Judged {
        let judged = verdict.judged;
        if judged.score().abs() <= limit {
            return judged;
        }
        let prediction = y - judged.error;
        let possible = self.possible(prediction, &verdict.phi, model);
        if possible == prediction {
            judged
        } else {
            judged.predicted_as(y, possible)
        }
    }

    /// `value`, or the nearest to it that may stand for an observation.
    ///
    /// A stationary fit may leave the range of the observations by once its width.
    /// What leaves it by a fit that is not stationary is the explosion, and no part of the stream.
    /// A line that is taken off leads out of the range by itself: as far as that is possible.
    fn possible(&self, value: f64, phi: &Lags, model: &Model) -> f64 {
        let (mut low, mut high) = (self.least, self.most);
        if (low..=high).contains(&value) {
            return value;
        }
        if is_stationary(phi) {
            let width = high - low;
            (low, high) = (low - width, high + width);
        }
        if model.drift {
            let level = self.line(model).0 - self.origin;
            (low, high) = (low.min(level), high.max(level));
        }
        value.max(low).min(high)
    }

    fn row(&self, y: f64, lags: &Lags, model: &Model) -> Row {
        let (base, p) = (model.base(), model.order);
        let mut x = [0.0; WIDTH];
        x[0] = 1.0;
        if model.drift {
            x[1] = self.time as f64;
        }
        x[base..base + p].copy_from_slice(&lags[..p]);
        x[base + p] = y;
        x
    }

    fn judge(&self, y: f64, lags: &Lags, model: &Model) -> Verdict {
        let (base, p) = (model.base(), model.order);
        let q = base + p;
        let n = self.n as f64;
        let r = &self.factor;
        let x = self.row(y, lags, model);
        // Squares of the observations themselves, of which the last digits are rounding.
        let square = (0..=q).map(|i| r[i][q] * r[i][q]).sum::<f64>()
            + n * self.origin * self.origin
            + (y + self.origin) * (y + self.origin);
        let varied = square - r[0][q] * r[0][q];
        // A column that the ones before explain has nothing of its own.
        let explains =
            |i: usize| i < base && r[i][i] > 0.0 || r[i][i] * r[i][i] > ROUNDING * square;
        let mut v = [0.0; WIDTH];
        for i in 0..q {
            if explains(i) {
                let rest = (0..i).fold(x[i], |rest, k| rest - r[k][i] * v[k]);
                v[i] = rest / r[i][i];
            }
        }
        // Sums of squares left by each order, from the highest down.
        let mut left = [0.0; MOST_ORDER + 1];
        left[p] = r[q][q] * r[q][q];
        for j in (0..p).rev() {
            left[j] = left[j + 1] + r[base + j][q] * r[base + j][q];
        }
        let noise = ROUNDING * square + SPENT * SPENT * varied.max(0.0);
        let rest = |j: usize| left[j].max(noise);
        let mut order = p;
        if model.choose {
            let mut best = f64::INFINITY;
            for j in 0..=p {
                let criterion = n * rest(j).max(f64::MIN_POSITIVE).ln() + 2.0 * j as f64;
                // More coefficients than a third of the rows can tell are not asked for.
                if criterion < best && 3 * (j + 1) <= self.n as usize {
                    (best, order) = (criterion, j);
                }
            }
            if best == f64::INFINITY {
                order = 0;
            }
        }
        let used = base + order;
        let mut error = y;
        let mut leverage = 1.0;
        for i in 0..used {
            error -= r[i][q] * v[i];
            leverage += v[i] * v[i];
        }
        let mut phi = [0.0; MOST_ORDER];
        for i in (0..order).rev() {
            if explains(base + i) {
                let row = &r[base + i];
                let rest = (i + 1..order).fold(row[q], |rest, k| rest - row[base + k] * phi[k]);
                phi[i] = rest / row[base + i];
            }
        }
        let correction = if n > 0.0 {
            correction(&phi[..order], n, model.drift)
        } else {
            [0.0; MOST_ORDER]
        };
        for i in 0..order {
            // The predecessor freed from level and line.
            let free = (0..base).fold(x[base + i], |free, k| free - r[k][base + i] * v[k]);
            error -= correction[i] * free;
            phi[i] += correction[i];
        }
        let dof = n - used as f64;
        let spread = rest(order) * leverage;
        // Without spread an error within rounding is none.
        let spreads = left[order] > noise || error * error * dof > spread;
        let known = dof > 0.0 && spread > 0.0 && spreads;
        let dof = if known { dof } else { 1.0 };
        Verdict {
            judged: Judged {
                ratio: if known { error * error / spread } else { 0.0 },
                dof,
                shrink: 2.0 / (8.0 * dof + 3.0),
                error,
                unit: 1.0,
                rest: rest(order),
                leverage,
                per: 1.0,
            },
            phi,
        }
    }

    fn learn(&mut self, y: f64, extra: f64, model: &Model) {
        let q = model.base() + model.order;
        let mut x = self.row(y, &self.lags, model);
        let r = &mut self.factor;
        for i in 0..=q {
            let size = (r[i][i] * r[i][i] + x[i] * x[i]).sqrt();
            if size > 0.0 {
                let (c, s) = (r[i][i] / size, x[i] / size);
                for k in i..=q {
                    (r[i][k], x[k]) = (c * r[i][k] + s * x[k], c * x[k] - s * r[i][k]);
                }
            }
        }
        r[q][q] = (r[q][q] * r[q][q] + extra).sqrt();
        self.n += 1;
    }

    fn shift(&mut self, clean: f64, raw: f64) {
        self.lags.copy_within(..MOST_ORDER - 1, 1);
        self.raw.copy_within(..MOST_ORDER - 1, 1);
        self.lags[0] = clean;
        self.raw[0] = raw;
        self.known = (self.known + 1).min(MOST_ORDER);
        self.time += 1;
    }

    /// Variance of the prediction that comes from predecessors that are missing.
    fn variance(&self, phi: &Lags, p: usize) -> f64 {
        (0..p)
            .map(|i| {
                (0..p)
                    .map(|j| phi[i] * self.unsure[i][j] * phi[j])
                    .sum::<f64>()
            })
            .sum::<f64>()
            .max(0.0)
    }

    /// Covariance of what stands for the predecessors with the observation.
    fn with_observation(&self, phi: &Lags, p: usize) -> Lags {
        self.unsure
            .map(|row| row[..p].iter().zip(phi).map(|(u, phi)| u * phi).sum())
    }

    /// What an observation says of the missing ones before it.
    fn observe_after_gap(&mut self, verdict: &Verdict, model: &Model) {
        let (phi, p) = (&verdict.phi, model.order);
        let variance = 1.0 + self.variance(phi, p);
        // An outlier says nothing of its neighbours.
        let error = if verdict.judged.score().abs() <= 4.0 {
            verdict.judged.error
        } else {
            0.0
        };
        let with = self.with_observation(phi, p);
        for i in 0..p {
            let step = with[i] / variance * error;
            if with[i] != 0.0 {
                self.lags[i] = self.possible(self.lags[i] + step, phi, model);
                self.raw[i] = self.possible(self.raw[i] + step, phi, model);
            }
            for j in 0..p {
                self.unsure[i][j] -= with[i] * with[j] / variance;
            }
        }
        self.keep_covariance(p);
        self.move_unsure(p);
    }

    /// Makes a covariance again of what rounding has left of one.
    /// Next to the huge variance of an explosive fit, what is none would grow without end.
    fn keep_covariance(&mut self, p: usize) {
        for i in 0..p {
            self.unsure[i][i] = self.unsure[i][i].max(0.0);
        }
        for i in 0..p {
            for j in (0..p).filter(|&j| j != i) {
                let most = (self.unsure[i][i] * self.unsure[j][j]).sqrt();
                self.unsure[i][j] = self.unsure[i][j].max(-most).min(most);
            }
        }
    }

    /// Makes room for a latest predecessor without error.
    fn move_unsure(&mut self, p: usize) {
        for i in (1..p).rev() {
            for j in (1..p).rev() {
                self.unsure[i][j] = self.unsure[i - 1][j - 1];
            }
        }
        for i in 0..p {
            self.unsure[0][i] = 0.0;
            self.unsure[i][0] = 0.0;
        }
    }

    /// Whether a deserialised state could have come from finite observations.
    pub(super) fn is_valid(&self) -> bool {
        let finite = |values: &[f64]| values.iter().all(|v| v.is_finite());
        self.n <= self.seen
            && self.seen <= self.time
            && self.time <= crate::error::MOST
            && self.known <= MOST_ORDER
            && self.gap <= MOST_ORDER
            && self.origin.is_finite()
            && finite(&[self.least, self.most])
            && self.least <= 0.0
            && self.most >= 0.0
            && finite(&self.lags)
            && finite(&self.raw)
            && self.unsure.iter().all(|row| finite(row))
            && self.factor.iter().all(|row| finite(row))
            && (0..WIDTH).all(|i| self.factor[i][i] >= 0.0)
    }
}

/// Whether an autoregression with these coefficients stays bounded.
/// It does if its partial autocorrelations, by Levinson's recursion from the highest order down,
/// are all under one.
fn is_stationary(phi: &Lags) -> bool {
    let mut phi = *phi;
    for last in (0..MOST_ORDER).rev() {
        let partial = phi[last];
        if partial.is_nan() || partial.abs() >= 1.0 {
            return false;
        }
        let longer = phi;
        for i in 0..last {
            phi[i] = (longer[i] + partial * longer[last - 1 - i]) / (1.0 - partial * partial);
        }
    }
    true
}

/// What is to be added to least-squares coefficients for their bias.
///
/// # Formula
/// Shaman & Stine (1988): with `a_0 = 1`, `a_i = -phi_i`, `n` times the bias of `phi_j` is
///
/// ```text
/// - j phi_j - sum_{i < j, i = j mod 2} a_i - sum_{i = p+1-j..p, i = j mod 2} phi_i - (sum_{i <= m} a_i - sum_{i >= p-m} a_i)
/// ```
///
/// with `m = min(j - 1, p - j)`; the last term is that of an estimated level, and a line has the same again.
fn correction(phi: &[f64], n: f64, drift: bool) -> Lags {
    let p = phi.len();
    let a = |i: usize| if i == 0 { 1.0 } else { -phi[i - 1] };
    let mut change = [0.0; MOST_ORDER];
    for j in 1..=p {
        let mut bias = -(j as f64) * phi[j - 1];
        bias -= (0..j).filter(|i| i % 2 == j % 2).map(a).sum::<f64>();
        bias += (p + 1 - j..=p)
            .filter(|i| i % 2 == j % 2)
            .map(a)
            .sum::<f64>();
        let m = (j - 1).min(p - j);
        let level = (0..=m).map(a).sum::<f64>() - (p - m..=p).map(a).sum::<f64>();
        bias -= if drift { 2.0 * level } else { level };
        change[j - 1] = -bias / n;
    }
    // No correction leads to a unit root.
    let (sum, more): (f64, f64) = (phi.iter().sum(), change.iter().sum());
    let room = 0.99 - sum;
    if more > 0.0 && more > room {
        let part = (room / more).clamp(0.0, 1.0);
        change.iter_mut().for_each(|c| *c *= part);
    }
    change
}

#[cfg(test)]
mod tests {
    use super::{MOST_ORDER, correction, is_stationary};

    #[test]
    fn an_autoregression_is_stationary_while_its_roots_are_in_the_unit_circle() {
        // Products of (1 - r x), by the largest r.
        let of_roots = |roots: &[f64]| {
            let mut a = [0.0; MOST_ORDER + 1];
            a[0] = 1.0;
            for r in roots {
                for i in (1..=MOST_ORDER).rev() {
                    a[i] -= r * a[i - 1];
                }
            }
            std::array::from_fn(|i| -a[i + 1])
        };
        for rest in [&[][..], &[0.5], &[-0.9, 0.9, 0.3], &[0.7; 7]] {
            for (root, stationary) in [(0.98, true), (-0.98, true), (1.02, false), (-1.02, false)] {
                let roots = [&[root], rest].concat();
                assert_eq!(is_stationary(&of_roots(&roots)), stationary, "{roots:?}");
            }
        }
    }

    #[test]
    fn the_bias_is_that_of_the_literature() {
        // Kendall: -(1 + 3 phi) / n; Tjostheim & Paulsen: -(1 + phi_1 + phi_2) / n and -(2 + 4 phi_2) / n.
        let first = correction(&[0.6], 100.0, false);
        assert!((first[0] - 0.028).abs() < 1e-15);
        let second = correction(&[0.5, 0.3], 100.0, false);
        assert!((second[0] - 0.018).abs() < 1e-15 && (second[1] - 0.032).abs() < 1e-15);
        // With a line (Tanaka): -(2 + 4 phi) / n.
        assert!((correction(&[0.6], 100.0, true)[0] - 0.044).abs() < 1e-15);
        // Of order 4, from the expectation worked out numerically: 1 + phi_1 + phi_4 for the first.
        let fourth = correction(&[0.2, 0.1, -0.3, 0.05], 100.0, false);
        assert!((fourth[0] - 0.0125).abs() < 1e-15, "{fourth:?}");
        assert!(
            (fourth[3] - (2.0 + 6.0 * 0.05) / 100.0).abs() < 1e-15,
            "{fourth:?}"
        );
    }
}

//! How likely a CUSUM of scores against a lagged reference alarms without a change.
//!
//! # Formula
//! All scores of a stretch share the errors of one fitted window: `d` of its level, `v` of its scale, and `delta` of its autoregression.
//! With `e` the innovations, `w` their weights in the prediction, `n` targets and `f` degrees of freedom,
//!
//! ```text
//! z_t = W_f((e_t - d_t) / sqrt(v))   W_f Student's ratio to a normal score,   f v ~ chi^2(f)
//! d_t = sum_i w_i e_{t-gap-1-i}      cov(z_t, z_{t+j}) = c_j = (sum_i w_i w_{i+j} - w_{j-gap-1}) / (1 + sum_i w_i^2)
//! ```
//!
//! What counts is the error that the scores share which make up one rise of the sum, `m = 1 + h / min(k, limit - k)` steps of it. The mean of
//! `m` scores has the variance `1/m + 2/m^2 sum_j (m - j) c_j`, of which the second part is put down to `d`. With a gap as long as the
//! rise that is all of the error. With no gap the window takes in each score of the rise before the next is judged,
//! and the second term of `c_j` cancels the first: such scores are as good as independent, as recursive residuals are. The same
//! holds of `v` and `delta`, whose variances are multiplied by the share of pairs of scores of the rise that the
//! gap keeps apart.
//!
//! An error `delta ~ N(0, (1 - phi^2) / n)` makes no score larger, but leaves them a correlation `delta phi^(j-1)`, and their sum over `m` steps
//! the variance `m (1 + 2 delta A)` with `A = sum_j (1 - j/m) phi^(j-1)`. The probability of a rise to `h` falls exponentially in
//! `h`, and a larger variance divides the exponent. `phi` is taken as [`PHI`].
//!
//! Given the errors, the rate of alarms is that of a CUSUM of independent scores with a limit, exact but for the
//! width of a [lattice](crate::run_length::Lattice); an error lasts for `L` steps (the window's length for a level, a third of it for the
//! extended line), and
//!
//! ```text
//! p_N(h) = 1 - E[exp(-L rate(h | d, v, delta))]^(N / L)
//! ```

use std::f64::consts::PI;

use super::lagged::Shape;
use crate::{
    normal,
    run_length::{Lattice, Rate},
};

/// The autocorrelation for which the effect of its estimate's error is calculated. It grows with the true one, from about half as much
/// at zero to one and a half times as much at 0.6.
const PHI: f64 = 0.4;

/// The chart whose alarms are counted.
#[derive(Clone, Copy, Debug)]
pub(super) struct Chart {
    pub(super) k: f64,
    pub(super) limit: f64,
    pub(super) two_sided: bool,
    pub(super) horizon: f64,
}

/// The probability of an alarm, for a threshold that a sum has to be at, and for one that it has to be over.
pub(super) type Alarm = [f64; 2];

/// At each threshold of the lattice.
pub(super) fn alarms(chart: &Chart, shape: &Shape, lattice: &Lattice) -> Vec<Alarm> {
    // Where alarms are rare enough to matter; the number of steps in a rise is taken at a few heights around it.
    let usual = (chart.horizon * chart.k * chart.k / 0.05).ln().max(1.0) / (2.0 * chart.k);
    let heights = [0.6, 1.2, 2.4, 4.8].map(|x| x * usual);
    let tables = heights.map(|h| table(chart, shape, lattice, chart.steps_to(h)));
    (0..=lattice.cells)
        .map(|cell| {
            let h = cell as f64 * lattice.width;
            let octave = (h / heights[0]).log2().clamp(0.0, 3.0);
            let left = (octave as usize).min(2);
            let share = octave - left as f64;
            let between = |a: f64, b: f64| (a.ln() * (1.0 - share) + b.ln() * share).exp();
            let (a, b) = (tables[left][cell], tables[left + 1][cell]);
            [between(a[0], b[0]), between(a[1], b[1])]
        })
        .collect()
}

impl Chart {
    /// Scores that a rise to `h` is made of.
    fn steps_to(&self, h: f64) -> f64 {
        1.0 + h / self.k.min(self.limit - self.k)
    }

    /// What an error of one standard deviation of the coefficient adds to the variance of the sum over a rise to `h`.
    fn excess(&self, h: f64, n: f64) -> f64 {
        let m = self.steps_to(h);
        // The sum over j < m in closed form, for any m.
        let sum = (1.0 - (1.0 - PHI.powf(m)) / (m * (1.0 - PHI))) / (1.0 - PHI);
        2.0 * sum * ((1.0 - PHI * PHI) / n).sqrt()
    }
}

/// The errors that `m` scores in a row share.
struct Shared {
    /// Standard deviation of their common mean.
    level: f64,
    /// Of each around it.
    rest: f64,
    /// Which part of the error of scale and coefficient counts.
    open: f64,
}

impl Shared {
    fn new(shape: &Shape, m: f64) -> Self {
        let m = m.round();
        let gap = shape.gap as f64;
        // Pairs of scores that are further apart than the gap.
        let closed = if m > gap + 1.0 {
            (m - gap) * (m - gap - 1.0) / (m * (m - 1.0))
        } else {
            0.0
        };
        let weights = shape.weights();
        let square: f64 = weights.iter().map(|w| w * w).sum();
        let covariance = |j: usize| {
            let later = weights.get(j..).unwrap_or_default();
            let both: f64 = weights.iter().zip(later).map(|(a, b)| a * b).sum();
            let own = (j > shape.gap)
                .then(|| weights.get(j - shape.gap - 1))
                .flatten();
            (both - own.copied().unwrap_or(0.0)) / (1.0 + square)
        };
        // Scores further apart share nothing.
        let shared = (m as usize).min(weights.len() + shape.gap + 1);
        let pairs: f64 = (1..shared).map(|j| (m - j as f64) * covariance(j)).sum();
        let (level, rest) = if m < 2.0 {
            let share = square / (1.0 + square);
            (share, 1.0 - share)
        } else {
            let common = 2.0 * pairs / (m * (m - 1.0));
            if common > 0.0 {
                (common, 1.0 - common)
            } else {
                // Later scores make up for earlier ones.
                (0.0, (1.0 + (m - 1.0) * common).max(0.1))
            }
        };
        Self {
            level: level.sqrt(),
            rest: rest.sqrt(),
            open: 1.0 - closed,
        }
    }
}

/// The rates given an error of the level, and the weight of that error.
type Weighted = (f64, Vec<Rate>);

/// The probabilities of an alarm where a rise takes `m` steps.
fn table(chart: &Chart, shape: &Shape, lattice: &Lattice, m: f64) -> Vec<Alarm> {
    let shared = Shared::new(shape, m);
    let dof = shape.dof.max(1.0) / shared.open.max(1e-6);
    let student = |z: f64| {
        let a = z * (8.0 * dof + 3.0) / (8.0 * dof + 1.0);
        (dof * (a * a / dof).exp_m1()).sqrt().copysign(z)
    };
    let levels = if shared.level > 0.0 {
        normal_grid()
    } else {
        vec![(0.0, 1.0)]
    };
    let given: Vec<(f64, Vec<Weighted>)> = HERMITE_3
        .iter()
        .map(|&(y, weight)| {
            // Wilson & Hilferty (1931).
            let c = 2.0 / (9.0 * dof);
            let scale = (1.0 - c + y * c.sqrt()).max(0.05).powf(1.5);
            let rates = |x: f64| {
                lattice.rates(|z| {
                    normal::survival((student(z) * scale - shared.level * x) / shared.rest)
                })
            };
            (weight, levels.iter().map(|&(x, w)| (w, rates(x))).collect())
        })
        .collect();
    let lasts = shape.error_lasts();
    (0..=lattice.cells)
        .map(|cell| {
            let h = cell as f64 * lattice.width;
            let coefficient = if shape.prewhiten {
                chart.excess(h, shape.targets() as f64) * shared.open.sqrt()
            } else {
                0.0
            };
            // A single step is the same with any correlation: what is beyond it, is not.
            let exponents = HERMITE_5.map(|(x, w)| (1.0 / (1.0 + coefficient * x).max(0.2), w));
            let exponents = if coefficient > 0.0 {
                &exponents[..]
            } else {
                &[(1.0, 1.0)]
            };
            [Rate::at, Rate::over].map(|of| {
                let mut alarm = 0.0;
                for (scale_weight, by_level) in &given {
                    for (i, (weight, rates)) in by_level.iter().enumerate() {
                        let opposite = &by_level[by_level.len() - 1 - i].1;
                        let log = |rates: &[Rate]| {
                            let first = rates[0].over();
                            (first, (of(&rates[cell]) / first).ln())
                        };
                        let (up, down) = (log(rates), log(opposite));
                        for (exponent, w) in exponents {
                            let rate = |(first, log): (f64, f64)| first * (exponent * log).exp();
                            let both = rate(up) + if chart.two_sided { rate(down) } else { 0.0 };
                            alarm += scale_weight * weight * w * -(-lasts * both).exp_m1();
                        }
                    }
                }
                let stay = (-alarm.clamp(0.0, 1.0 - 1e-15)).ln_1p();
                -(chart.horizon / lasts * stay).exp_m1()
            })
        })
        .collect()
}

/// Nodes and weights of the trapezoidal rule for a standard normal variable, which for so smooth a function is as exact as any.
fn normal_grid() -> Vec<(f64, f64)> {
    const STEP: f64 = 0.8;
    (-6..=6)
        .map(|i| f64::from(i) * STEP)
        .map(|x| (x, STEP * (-0.5 * x * x).exp() / (2.0 * PI).sqrt()))
        .collect()
}

/// Nodes and weights of Gauss-Hermite quadrature for a standard normal variable.
const HERMITE_5: [(f64, f64); 5] = [
    (-2.8569700138728056, 0.011257411327720677),
    (-1.355626179974266, 0.22207592200561257),
    (0.0, 0.5333333333333335),
    (1.355626179974266, 0.22207592200561257),
    (2.8569700138728056, 0.011257411327720677),
];
const HERMITE_3: [(f64, f64); 3] = [
    (-1.7320508075688772, 0.16666666666666666),
    (0.0, 0.6666666666666666),
    (1.7320508075688772, 0.16666666666666666),
];

//! What a sum of scores means: its false-alarm probability over the horizon.
//!
//! # Self-starting reference
//! The scores are independent standard normals, so `p_N(s) = 1 - exp(-N / ARL0(s))` with the exact `ARL0`.
//!
//! # Lagged reference
//! All scores of a stretch share the error of one fitted window, so they are not independent: given that error
//! they are `N(d, v)`, with `d` the error of the level and `v` that of the scale and of the autocorrelation.
//! With `tau^2` the leverage of the new point in the regression and `n` targets in the window,
//!
//! ```text
//! d ~ N(0, tau^2 / (1 + tau^2))
//! log sqrt(v) ~ N(log sqrt(1 / (1 + tau^2)), 1 / (2 n) + (1 + phi) / ((1 - phi) n))
//! p_N(s) = 1 - E[ P(no signal in L steps | d, v) ]^(N / L)
//! ```
//!
//! where the last term is there only with prewhitening (an error of the coefficient leaves the sum of the
//! scores a long-run variance other than one; it grows with the coefficient, for which 0.3 is taken), and `L` is how long one error lasts: the window's
//! length for a level, a third of it for an extended line, whose far end moves faster. The inner probability
//! is exact (the recursion of [`run_length`](crate::run_length)), the expectation a Gauss-Hermite sum.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use super::{
    params::{CalibratedCusumParams, Direction, Drift, Prewhiten, Reference, line_leverage},
    pchip::Pchip,
};
use crate::run_length::{RunLength, Sides, false_alarm_of_block, siegmund};

/// `p_N` as a function of the statistic.
#[derive(Clone, PartialEq)]
pub(crate) struct Calibration {
    p: Pchip,
    /// Beyond the table `log p` goes on in a straight line.
    end: f64,
    log_p_at_end: f64,
    tail_slope: f64,
}

/// Without the table, which would drown the detector it is printed with.
impl fmt::Debug for Calibration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Calibration")
            .field("end", &self.end)
            .finish_non_exhaustive()
    }
}

/// The table has to come down to this for what is beyond it to be told.
const SETTLED: f64 = 0.01;

/// Cells of the table that is looked up at every step.
const CELLS: usize = 512;

impl Calibration {
    /// The calibration that the parameters ask for, shared with every detector that has asked for the same.
    pub(crate) fn of(params: &CalibratedCusumParams) -> Arc<Self> {
        type Known = Vec<(Key, Arc<Calibration>)>;
        static KNOWN: Mutex<Known> = Mutex::new(Vec::new());
        let key = Key::of(params);
        // A poisoned lock only means that another thread died between two pushes: the list is still whole.
        let find = |known: &Known| {
            known
                .iter()
                .find(|(k, _)| *k == key)
                .map(|(_, c)| Arc::clone(c))
        };
        if let Some(found) = find(&KNOWN.lock().unwrap_or_else(PoisonError::into_inner)) {
            return found;
        }
        let made = Arc::new(Self::new(&key));
        let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() == 64 {
            known.remove(0);
        }
        known.push((key, Arc::clone(&made)));
        made
    }

    fn new(key: &Key) -> Self {
        let (log_p, width) = key.tabulate();
        let coarse = Pchip::new(&log_p, width);
        let end = coarse.end();
        let last = log_p.len() - 1;
        let fine_width = end / CELLS as f64;
        let p: Vec<f64> = (0..=CELLS)
            .map(|i| {
                coarse
                    .at(i as f64 * fine_width)
                    .unwrap_or(log_p[last])
                    .exp()
            })
            .collect();
        Self {
            p: Pchip::new(&p, fine_width),
            end,
            log_p_at_end: log_p[last],
            tail_slope: (log_p[last] - log_p[last - 1]) / width,
        }
    }

    /// Whether it says what a high statistic means. Over a long horizon with an uncertain reference even the largest
    /// statistics of the table are reached for certain.
    pub(crate) fn settles(&self) -> bool {
        self.log_p_at_end <= SETTLED.ln()
    }

    /// The probability that a stream without a change reaches `s` within the horizon.
    #[inline]
    pub(crate) fn p(&self, s: f64) -> f64 {
        match self.p.at(s) {
            Some(p) => p,
            None => (self.log_p_at_end + self.tail_slope * (s - self.end)).exp(),
        }
    }

    /// The least statistic whose probability is at most `level`.
    pub(crate) fn threshold(&self, level: f64) -> f64 {
        let (mut low, mut high) = (0.0, 1.0);
        if self.p(low) <= level {
            // Nothing at all is not evidence.
            return f64::MIN_POSITIVE;
        }
        while self.p(high) > level {
            low = high;
            high *= 2.0;
        }
        // Until the two are neighbours, so that `s >= threshold` and `p(s) <= level` say the same.
        loop {
            let middle = 0.5 * (low + high);
            if middle <= low || middle >= high {
                return high;
            }
            if self.p(middle) <= level {
                high = middle;
            } else {
                low = middle;
            }
        }
    }
}

/// All that the calibration depends on.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Key {
    k: f64,
    horizon: u64,
    sides: Sides,
    reference: Reference,
    prewhiten: bool,
    drift: bool,
}

impl Key {
    fn of(params: &CalibratedCusumParams) -> Self {
        Self {
            k: params.k,
            horizon: params.horizon,
            sides: if params.direction == Direction::Both {
                Sides::Two
            } else {
                Sides::One
            },
            reference: params.reference,
            prewhiten: params.prewhiten != Prewhiten::None,
            drift: params.drift == Drift::Remove,
        }
    }

    /// `ln p` at `0, width, 2 width, ..`, down to where a signal is very unlikely.
    fn tabulate(&self) -> (Vec<f64>, f64) {
        // The probability falls by about exp(-2 k) per unit of the statistic.
        let (width, smallest, (wide, widest)) = match self.reference {
            Reference::SelfStarting => ((0.25 / self.k).clamp(0.125, 1.0), 1e-9, (400.0, 400.0)),
            // Each point costs a few dozen runs of the recursion; the table goes on until its slope says something.
            Reference::Lagged { .. } => ((0.5 / self.k).clamp(0.25, 1.0), 1e-7, (30.0, 120.0)),
        };
        let chance = self.sides.number() * self.horizon as f64;
        let mut log_p: Vec<f64> = Vec::new();
        let mut correction = 0.0;
        for i in 0.. {
            let h = i as f64 * width;
            let p = match self.reference {
                Reference::SelfStarting => {
                    let approximate = siegmund::formula(self.k, h, 0.0);
                    // Where the average is beyond any horizon, or the equation large, Siegmund's form is as good up to a
                    // constant factor, which is carried on.
                    if approximate < 1e11
                        && h <= 60.0
                        && let Ok(run) = RunLength::new(self.k, h, 0.0)
                    {
                        correction = (run.average() / approximate).ln();
                    }
                    -(-chance / (approximate * f64::exp(correction))).exp_m1()
                }
                Reference::Lagged { window, gap } => {
                    let (lasts, log_stay) = self.log_survival_of_one_error(window, gap, h);
                    -(chance / lasts * log_stay).exp_m1()
                }
            };
            // Strictly falling, whatever the rounding: beyond the table the slope is carried on.
            let previous = log_p.last().copied().unwrap_or(f64::INFINITY);
            log_p.push(p.ln().min(previous - 1e-12));
            let far = h >= wide && p < SETTLED;
            if i >= 2 && (p < smallest || far || h >= widest) {
                break;
            }
        }
        (log_p, width)
    }

    /// How many steps one error of the reference lasts, and the log probability of no signal in them.
    fn log_survival_of_one_error(&self, window: usize, gap: usize, h: f64) -> (f64, f64) {
        let size = window as f64;
        let n = if self.prewhiten { size - 1.0 } else { size };
        let mut leverage = 1.0 / n;
        let mut lasts = window as u64;
        if self.drift {
            leverage += line_leverage(window, gap, n);
            lasts = (lasts / 3).max(1);
        }
        let share = leverage / (1.0 + leverage);
        let level = share.sqrt();
        let log_scale = 0.5 * (1.0 - share).ln();
        let coefficient_error = if self.prewhiten { 1.3 / 0.7 } else { 0.0 };
        let scale_error = ((0.5 + coefficient_error) / n).sqrt();
        let mut signal = 0.0;
        for (x, wx) in HERMITE_9 {
            for (y, wy) in HERMITE_5 {
                let sd = (log_scale + scale_error * y).exp();
                signal += wx * wy * false_alarm_of_block(self.k, h, level * x, sd, lasts);
            }
        }
        (lasts as f64, (-signal.clamp(0.0, 1.0 - 1e-15)).ln_1p())
    }
}

/// Nodes and weights of Gauss-Hermite quadrature for a standard normal variable.
const HERMITE_9: [(f64, f64); 9] = [
    (-4.512745863399783, 2.2345844007746607e-05),
    (-3.20542900285647, 0.0027891413212317692),
    (-2.07684797867783, 0.04991640676521782),
    (-1.0232556637891326, 0.24409750289493953),
    (0.0, 0.40634920634920635),
    (1.0232556637891326, 0.24409750289493953),
    (2.07684797867783, 0.04991640676521782),
    (3.20542900285647, 0.0027891413212317692),
    (4.512745863399783, 2.2345844007746607e-05),
];
const HERMITE_5: [(f64, f64); 5] = [
    (-2.8569700138728056, 0.011257411327720677),
    (-1.355626179974266, 0.22207592200561257),
    (0.0, 0.5333333333333335),
    (1.355626179974266, 0.22207592200561257),
    (2.8569700138728056, 0.011257411327720677),
];

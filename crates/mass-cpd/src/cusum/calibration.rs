//! What a sum of scores means: its false-alarm probability over the horizon.
//!
//! # Self-starting reference
//! The scores are independent standard normals, so `p_N(s) = 1 - exp(-N / ARL0(s))` with the exact `ARL0`, of scores with
//! the limit where there is one.
//!
//! # Lagged reference
//! All scores of a stretch share the error of one fitted window, so they are not independent: see [`shared_error`].
//!
//! # With a limit
//! A sum of scores that are all at the limit is a multiple of `limit - k` exactly, with a probability of its own. There `p_N` jumps down, and a
//! level within the jump cannot be used up: the threshold is just over the multiple, where `p_N` is less.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use super::{
    lagged::Shape,
    params::{CalibratedCusumParams, Direction, Reference},
    pchip::Pchip,
    shared_error::{self, Alarm, Chart},
};
use crate::{
    normal,
    run_length::{Lattice, Rate, RunLength, Sides, siegmund},
};

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
        let Table { pieces, width } = key.tabulate();
        let parts = CELLS.div_ceil(pieces.iter().map(|piece| piece.len() - 1).sum());
        let fine_width = width / parts as f64;
        let fine: Vec<Vec<f64>> = pieces
            .iter()
            .map(|log_p| {
                let (smooth, last) = (Pchip::new(log_p, width), log_p.len() - 1);
                (0..=last * parts)
                    .map(|i| {
                        smooth
                            .at(i as f64 * fine_width)
                            .unwrap_or(log_p[last])
                            .exp()
                    })
                    .collect()
            })
            .collect();
        let p = Pchip::joined(&fine, fine_width);
        // There is at least one piece of at least two values.
        let last = &pieces[pieces.len() - 1];
        Self {
            end: p.end(),
            p,
            log_p_at_end: last[last.len() - 1],
            tail_slope: (last[last.len() - 1] - last[last.len() - 2]) / width,
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
        // A sum of scores that are all at the limit is where `p` jumps down, and belongs to the upper side, rounded or not.
        match self.p.at(s * (1.0 - 1e-12)) {
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

/// `ln p` at `0, width, 2 width, ..`, cut where it jumps.
struct Table {
    pieces: Vec<Vec<f64>>,
    width: f64,
}

impl Table {
    /// From the probabilities at a lattice's thresholds, down to `smallest`.
    fn on(lattice: &Lattice, alarms: &[Alarm], smallest: f64) -> Self {
        // Strictly falling, whatever the rounding: beyond the table the slope is carried on.
        let mut least = f64::INFINITY;
        let mut falling = |p: f64| {
            least = p.ln().min(least - 1e-12);
            least
        };
        let mut pieces = vec![vec![falling(alarms[0][1])]];
        for (cell, &[at, over]) in alarms.iter().enumerate().skip(1) {
            if let Some(piece) = pieces.last_mut() {
                piece.push(falling(at));
            }
            if at < smallest && cell > 2 {
                break;
            }
            if lattice.has_atom(cell) && cell + 1 < alarms.len() {
                pieces.push(vec![falling(over)]);
            }
        }
        Self {
            pieces,
            width: lattice.width,
        }
    }
}

/// All that the calibration depends on.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Key {
    k: f64,
    /// [`UNLIMITED`] where there is none.
    limit: f64,
    horizon: u64,
    sides: Sides,
    reference: Reference,
    shape: Shape,
}

/// The largest statistic of a lagged reference's table.
const HIGHEST: f64 = 120.0;

/// No score is so large.
const UNLIMITED: f64 = 12.0;

impl Key {
    fn of(params: &CalibratedCusumParams) -> Self {
        Self {
            k: params.k,
            limit: params.score_limit.unwrap_or(UNLIMITED).min(UNLIMITED),
            horizon: params.horizon,
            sides: if params.direction == Direction::Both {
                Sides::Two
            } else {
                Sides::One
            },
            reference: params.reference,
            shape: params.shape(),
        }
    }

    fn tabulate(&self) -> Table {
        match self.reference {
            Reference::SelfStarting if self.limit < UNLIMITED => self.independent_with_limit(),
            Reference::SelfStarting => self.independent_without_limit(),
            Reference::Lagged { .. } => self.with_shared_error(),
        }
    }

    /// The height over which a sum of independent scores comes with a probability of less than `p`. It falls by about exp(-2 k)
    /// per unit, with a limit faster.
    fn highest(&self, p: f64) -> f64 {
        (self.sides.number() * self.horizon as f64 / p).ln() / (2.0 * self.k)
    }

    fn with_shared_error(&self) -> Table {
        let widest = (0.2 / self.k).clamp(0.1, 0.25);
        let chart = Chart {
            k: self.k,
            limit: self.limit,
            two_sided: self.sides == Sides::Two,
            horizon: self.horizon as f64,
        };
        // With an error of the reference it falls more slowly, how much so is seen.
        let mut end = 1.6 * self.highest(1e-7);
        loop {
            end = end.min(HIGHEST);
            let lattice = Lattice::new(self.k, self.limit, widest, end);
            let mut alarms = shared_error::alarms(&chart, &self.shape, &lattice);
            // The error of so wide a lattice is about that for independent scores.
            let coarse = lattice.rates(normal::survival);
            for ((alarm, coarse), exact) in alarms.iter_mut().zip(coarse).zip(independent(&lattice))
            {
                let errors = [exact[0] / coarse.at(), exact[1] / coarse.over()];
                for (p, error) in alarm.iter_mut().zip(errors) {
                    *p = -(error * (-*p).ln_1p()).exp_m1();
                }
            }
            let settles = alarms.last().is_some_and(|last| last[0] <= 0.1 * SETTLED);
            if settles || end == HIGHEST {
                return Table::on(&lattice, &alarms, 1e-7);
            }
            end *= 2.0;
        }
    }

    fn independent_with_limit(&self) -> Table {
        let widest = (0.1 / self.k).clamp(0.05, 0.25);
        let lattice = Lattice::new(self.k, self.limit, widest, self.highest(1e-9));
        let chance = self.sides.number() * self.horizon as f64;
        let alarms: Vec<Alarm> = independent(&lattice)
            .into_iter()
            .map(|rates| rates.map(|rate| -(-chance * rate).exp_m1()))
            .collect();
        Table::on(&lattice, &alarms, 1e-9)
    }

    fn independent_without_limit(&self) -> Table {
        let width = (0.25 / self.k).clamp(0.125, 1.0);
        let chance = self.sides.number() * self.horizon as f64;
        let mut log_p: Vec<f64> = Vec::new();
        let mut correction = 0.0;
        for i in 0.. {
            let h = i as f64 * width;
            let approximate = siegmund::formula(self.k, h, 0.0);
            // Where the average is beyond any horizon, or the equation large, Siegmund's form is as good up to a
            // constant factor, which is carried on.
            if approximate < 1e11
                && h <= 60.0
                && let Ok(run) = RunLength::new(self.k, h, 0.0)
            {
                correction = (run.average() / approximate).ln();
            }
            let p = -(-chance / (approximate * f64::exp(correction))).exp_m1();
            // Strictly falling, whatever the rounding: beyond the table the slope is carried on.
            let previous = log_p.last().copied().unwrap_or(f64::INFINITY);
            log_p.push(p.ln().min(previous - 1e-12));
            if i >= 2 && (p < 1e-9 || h >= 400.0) {
                break;
            }
        }
        Table {
            pieces: vec![log_p],
            width,
        }
    }
}

/// Rates of alarms of independent scores at the lattice's thresholds, without the error that its width makes, which falls with the
/// width's square (Richardson).
fn independent(lattice: &Lattice) -> Vec<[f64; 2]> {
    let fine = lattice.halved().rates(normal::survival);
    let coarse = lattice.rates(normal::survival);
    coarse
        .iter()
        .zip(fine.iter().step_by(2))
        .map(|(coarse, fine)| {
            [Rate::at, Rate::over].map(|of| of(fine) * (of(fine) / of(coarse)).cbrt())
        })
        .collect()
}

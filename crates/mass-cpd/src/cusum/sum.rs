//! One side of the chart, and what both sides share.

use serde::{Deserialize, Serialize};

use super::{CalibratedCusumParams, Direction, Watch};
use crate::{Shift, Step, normal};

/// Scores no further down than this where none is limited: the score of no error at all is not finite.
const LOWEST: f64 = -8.0;

/// The score of an error's size: standard normal where `z` is.
///
/// # Formula
/// `Phi^-1(2 Phi(|z|) - 1)`; no error at all, which only a stream without spread has, is no evidence.
pub(crate) fn of_size(z: f64) -> f64 {
    if z == 0.0 {
        return 0.0;
    }
    let tail = 2.0 * normal::survival(z.abs());
    if tail <= 0.0 {
        return z.abs();
    }
    if tail >= 1.0 {
        return LOWEST;
    }
    normal::upper_quantile(tail).max(LOWEST)
}

/// One side of the chart. While the sum is zero the other fields say nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Sum {
    pub(crate) s: f64,
    /// Step at which the change is thought to begin.
    pub(crate) onset: f64,
    /// Scores since then, and their sum, of falls as well with the sign that they have.
    pub(crate) number: f64,
    pub(crate) scores: f64,
    /// Level of the reference just before.
    pub(crate) base: f64,
    /// Sum of the observations since, less the reference's drift from then on.
    pub(crate) total: f64,
}

impl Sum {
    /// Adds the score `z` beyond the allowance `k`, of the observation `y` at step `count`, when the
    /// reference had this level and slope. `rise` is `z` or, on the side of falls, `-z`.
    ///
    /// The onset is the first step since the sum was zero, but moves to a later one whose score alone
    /// is more likely under a change of its own size than all since are under one change:
    /// `z^2 > (sum z)^2 / n`. So a large step is not blurred by the noise just before.
    ///
    /// Without a branch: whether it starts anew is as good as a coin toss, and a wrong guess costs
    /// more than all the arithmetic. As a weight, since below AVX-512 selects of numbers by one
    /// condition become a branch again.
    #[inline(always)]
    pub(crate) fn add(
        &mut self,
        z: f64,
        rise: f64,
        k: f64,
        y: f64,
        count: f64,
        (level, slope): (f64, f64),
    ) {
        let (number, scores) = (self.number + 1.0, self.scores + z);
        // A sum that stays at zero need not start.
        let since = if self.s > 0.0 { scores * scores } else { 0.0 };
        let starts = if rise * z.abs() * number > since {
            1.0
        } else {
            0.0
        };
        let goes_on = 1.0 - starts;
        self.onset = self.onset * goes_on + count * starts;
        self.number = self.number * goes_on + 1.0;
        self.scores = self.scores * goes_on + z;
        self.base = self.base * goes_on + level * starts;
        self.total = self.total * goes_on + (y - slope * (count - self.onset));
        let s = self.s + (rise - k);
        self.s = if s > 0.0 { s } else { 0.0 };
    }

    pub(crate) fn is_valid(&self, count: u64) -> bool {
        let whole = |v: f64| v >= 0.0 && v.fract() == 0.0 && v <= count as f64;
        self.s.is_finite()
            && self.s >= 0.0
            && whole(self.onset)
            && whole(self.number)
            && (self.number > 0.0 || self.s == 0.0)
            && self.scores.is_finite()
            && self.base.is_finite()
            && self.total.is_finite()
    }
}

/// Both sides of one chart, rises first. As arrays, so that one instruction does for both.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Sides {
    s: [f64; 2],
    onset: [f64; 2],
    number: [f64; 2],
    scores: [f64; 2],
    base: [f64; 2],
    total: [f64; 2],
}

impl Sides {
    pub(crate) fn new([up, down]: [Sum; 2]) -> Self {
        let mut sides = Self::default();
        sides.set(0, up);
        sides.set(1, down);
        sides
    }

    #[inline(always)]
    pub(crate) fn get(&self, i: usize) -> Sum {
        Sum {
            s: self.s[i],
            onset: self.onset[i],
            number: self.number[i],
            scores: self.scores[i],
            base: self.base[i],
            total: self.total[i],
        }
    }

    #[inline(always)]
    pub(crate) fn set(&mut self, i: usize, sum: Sum) {
        self.s[i] = sum.s;
        self.onset[i] = sum.onset;
        self.number[i] = sum.number;
        self.scores[i] = sum.scores;
        self.base[i] = sum.base;
        self.total[i] = sum.total;
    }

    /// [`Sum::add`] for both, each with its allowance.
    #[inline(always)]
    pub(crate) fn add(&mut self, z: f64, k: [f64; 2], y: f64, count: f64, line: (f64, f64)) {
        let signed = [z, -z];
        for i in 0..2 {
            let mut sum = self.get(i);
            sum.add(z, signed[i], k[i], y, count, line);
            self.set(i, sum);
        }
    }
}

/// What the sums say after the score `z`; the probability over the horizon and the alarm are the caller's.
#[inline(always)]
pub(crate) fn report(params: &CalibratedCusumParams, step: &mut Step, sides: &Sides, z: f64) {
    // A side that is not watched stays at zero. By its place, so that it is a load and not a branch.
    let falling = sides.s[0] < sides.s[1];
    let side = sides.get(usize::from(falling));
    step.statistic = Some(side.s);
    step.p_value = Some(match params.direction {
        Direction::Up => normal::quick_survival(z),
        Direction::Down => normal::quick_survival(-z),
        Direction::Both => 2.0 * normal::quick_survival(z.abs()),
    });
    if side.s > 0.0 {
        step.onset = Some(side.onset as i64 as u64);
        step.direction = Some(if falling { Shift::Down } else { Shift::Up });
        step.size_in_deviations = Some(side.scores / side.number);
        if params.watch == Watch::Level {
            step.size = Some(side.total / side.number - side.base);
        }
    }
}

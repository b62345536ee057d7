//! A series prepared for sums over its stretches, and how finely it can be resolved.

use std::cell::OnceCell;

use ndarray::ArrayView1;

use super::double::{Double, Number};
use crate::CpdError;

/// Largest value whose squares can be summed over any series.
const LARGEST: f64 = 1e100;
/// Error of a double-double operation, with room.
const FINE: f64 = 1e-31;
/// How far under what it is compared with an error has to be.
const MARGIN: f64 = 1e-3;

/// A finite series around its median.
///
/// Around the median rather than the mean: a value that dwarfs the others would take their digits with it.
pub(super) struct Series {
    pub(super) y: Vec<f64>,
    median: f64,
    square: f64,
    plain: OnceCell<Prefix<f64>>,
    fine: OnceCell<Prefix<Double>>,
}

impl Series {
    /// The series, or why it cannot be used.
    pub(super) fn new(series: ArrayView1<'_, f64>, needed: usize) -> Result<Self, CpdError> {
        if series.len() < needed || series.is_empty() {
            return Err(CpdError::TooShort {
                got: series.len(),
                needed: needed.max(1),
            });
        }
        for (i, &value) in series.iter().enumerate() {
            crate::error::require_finite(value, i as u64)?;
            if value.abs() > LARGEST {
                return Err(CpdError::TooLarge {
                    count: i as u64 + 1,
                    value,
                    limit: LARGEST,
                });
            }
        }
        let mut y = series.to_vec();
        let middle = y.len() / 2;
        let median = *y.select_nth_unstable_by(middle, f64::total_cmp).1;
        y.clear();
        y.extend(series.iter().map(|x| x - median));
        let square = y.iter().map(|v| v * v).sum();
        Ok(Self {
            y,
            median,
            square,
            plain: OnceCell::new(),
            fine: OnceCell::new(),
        })
    }

    pub(super) fn median(&self) -> f64 {
        self.median
    }

    pub(super) fn len(&self) -> usize {
        self.y.len()
    }

    /// Whether all values are equal.
    pub(super) fn is_constant(&self) -> bool {
        self.y.iter().all(|&v| v == 0.0)
    }

    /// Mean square around the mean, and first autocorrelation.
    pub(super) fn moments(&self) -> (f64, f64) {
        let n = self.y.len() as f64;
        let (mean, square) = mean_and_square(&self.y);
        let product: f64 = self
            .y
            .windows(2)
            .map(|v| (v[0] - mean) * (v[1] - mean))
            .sum();
        let phi = if square > 0.0 { product / square } else { 0.0 };
        (square / n, phi)
    }

    /// Error of sums of squares in `f64` (`plain`) or in [`Double`].
    pub(super) fn rounding(&self, plain: bool) -> f64 {
        let of_one = if plain { f64::EPSILON } else { FINE };
        of_one * self.y.len() as f64 * self.square
    }

    /// Whether differences of sums of squares in `f64` are good to well under `difference`.
    pub(super) fn is_plain(&self, difference: f64) -> bool {
        self.rounding(true) <= MARGIN * difference
    }

    /// The least difference of sums of squares that can be told from rounding at all.
    pub(super) fn resolution(&self) -> f64 {
        self.rounding(false) / MARGIN
    }

    /// Square of the lowest tenth of the differences that are noise.
    pub(super) fn small_square(&self, least: usize) -> f64 {
        let (sizes, _) = self.differences(least);
        sizes.get(sizes.len() / 10).map_or(0.0, |d| d * d)
    }

    pub(super) fn plain(&self) -> &Prefix<f64> {
        self.plain.get_or_init(|| Prefix::new(&self.y))
    }

    pub(super) fn fine(&self) -> &Prefix<Double> {
        self.fine.get_or_init(|| Prefix::new(&self.y))
    }

    /// Sizes of the differences of neighbours that are noise, in order, and the share of neighbours that are equal.
    ///
    /// A jump between two runs of `least` or more equal values is a change of level, not noise. With `least` one
    /// nothing would be noise, so runs count from two values on.
    pub(super) fn differences(&self, least: usize) -> (Vec<f64>, f64) {
        let least = least.max(2);
        let runs: Vec<&[f64]> = self.y.chunk_by(|a, b| a == b).collect();
        let mut sizes: Vec<f64> = runs
            .windows(2)
            .filter(|r| r[0].len() < least || r[1].len() < least)
            .map(|r| (r[1][0] - r[0][0]).abs())
            .collect();
        sizes.sort_unstable_by(f64::total_cmp);
        let pairs = self.y.len() - 1;
        let equal = pairs + 1 - runs.len();
        (sizes, equal as f64 / pairs.max(1) as f64)
    }

    /// The least variance that a stretch of such values can be believed to have.
    ///
    /// * Values that are multiples of `d` have been rounded, by `d^2 / 12` in the mean square (Sheppard); `d` is the
    ///   smallest difference of any two. In a continuous series it is some `n^2` times smaller than the spread.
    /// * Where a share `p` of neighbours are equal, a run of equal values is no more remarkable than `p^length`. With a
    ///   floor of `p^2 / (1 - p^2)` variances its log-likelihood gains no more than that; `p^2 / 3` median squares of the
    ///   differences that are not zero are as much for a fair coin.
    pub(super) fn least_variance(&self, least: usize) -> f64 {
        let mut sorted = self.y.clone();
        sorted.sort_unstable_by(f64::total_cmp);
        let step = sorted
            .windows(2)
            .map(|v| {
                // Under this two values differ by the rounding of decimal fractions.
                let rounding =
                    8.0 * f64::EPSILON * (v[0].abs().max(v[1].abs()) + self.median.abs());
                (v[1] - v[0], rounding)
            })
            .filter(|&(gap, rounding)| gap > rounding)
            .map(|(gap, _)| gap)
            .fold(f64::INFINITY, f64::min);
        let rounded = if step.is_finite() {
            step * step / 12.0
        } else {
            0.0
        };
        let (sizes, equal) = self.differences(least);
        let usual = sizes.get(sizes.len() / 2).copied().unwrap_or(0.0);
        rounded.max(equal * equal * usual * usual / 3.0)
    }
}

/// Sums and sums of squares up to each point.
pub(super) struct Prefix<N> {
    pub(super) sum: Vec<N>,
    pub(super) square: Vec<N>,
}

impl<N: Number> Prefix<N> {
    fn new(y: &[f64]) -> Self {
        let (mut a, mut b) = (N::of(0.0), N::of(0.0));
        let (mut sum, mut square) = (vec![a], vec![b]);
        for &v in y {
            let v = N::of(v);
            a = a + v;
            b = b + v * v;
            sum.push(a);
            square.push(b);
        }
        Self { sum, square }
    }

    /// `sum (y - mean)^2` over `start..end`.
    pub(super) fn squares(&self, start: usize, end: usize) -> N {
        around_mean(
            (end - start) as f64,
            self.sum[end] - self.sum[start],
            self.square[end] - self.square[start],
        )
    }
}

/// `sum (y - mean)^2` of `m` values from their sum and their sum of squares.
#[inline]
pub(super) fn around_mean<N: Number>(m: f64, sum: N, square: N) -> N {
    let rest = square - (sum * sum).over(m);
    let zero = N::of(0.0);
    if rest > zero { rest } else { zero }
}

/// The edges of the segments, both ends of the series among them.
pub(super) fn edges(indices: &[usize], n: usize) -> Vec<usize> {
    std::iter::once(0)
        .chain(indices.iter().copied())
        .chain([n])
        .collect()
}

/// Mean, and sum of squares around it.
pub(super) fn mean_and_square(y: &[f64]) -> (f64, f64) {
    let anchor = y[0];
    let mean = anchor + y.iter().map(|v| v - anchor).sum::<f64>() / y.len() as f64;
    (mean, y.iter().map(|v| (v - mean) * (v - mean)).sum())
}

//! The penalty that the noise of a series asks for, so that its changes do not enter.

use std::f64::consts::{PI, SQRT_2};

use super::{
    cost::{Cost, Costs},
    ladder::Ladder,
    series::{edges, mean_and_square},
};

/// The most autocorrelation that is allowed for by default in the last penalty.
pub(super) const LIMIT: f64 = 0.6;
/// Penalty of a change of level, in units of `log n` long-run variances.
const LEVEL: f64 = 2.75;
/// Share of the whole sum of squares that the last penalty may reach: more would leave out what explains twice as much
/// as it leaves over.
const SHARE: f64 = 2.0 / 3.0;
/// Least step from one penalty to the next.
const STEP: f64 = 1.1;
/// What a change of spread as well has to be worth more.
const SPREAD: f64 = 1.0;
/// The penalty of a change point in the comparison of segmentations, in units of `log n` (Zhang & Siegmund).
const COMPARED: f64 = 3.0;

/// The penalty and the segmentation of [`super::Penalty::Autocorrelated`].
///
/// Penalties are tried from that of the differences of neighbours up to that of the series' whole variance. One is
/// *consistent* when it is no less than what the residuals of its own segmentation ask for. Among the consistent ones,
/// and the last, the one is taken whose segmentation has the least `n log(residual variance) + 3 log n` a change point.
pub(super) fn consistent(costs: &Costs<'_>, limit: f64, min_segment: usize) -> (f64, Vec<usize>) {
    let series = costs.series;
    if series.is_constant() {
        return (0.0, Vec::new());
    }
    let n = series.len() as f64;
    let (variance, phi) = series.moments();
    let phi = phi.clamp(0.0, limit);
    let longest = (1.0 + phi) / (1.0 - phi);
    let floor = series.least_variance(min_segment);
    let (unit, least, most) = match costs.cost {
        Cost::Level => {
            let unit = LEVEL * n.ln();
            let least = differences_variance(&series.differences(min_segment), n);
            let most = (unit * longest).min(SHARE * n) * variance;
            // Residuals that vanish ask for nothing: below this, segmentations would follow every rounding.
            let least = least.max(floor);
            (unit, (unit * least).max(series.resolution()), most)
        }
        Cost::LevelAndSpread => {
            let unit = (LEVEL + SPREAD) * n.ln();
            // Squares of heavy-tailed values vary more than those of normal ones.
            let whole = Residuals::new(costs, &[], floor);
            (unit, unit, unit * longest.max(whole.variance))
        }
    };
    let mut penalty = least.min(most);
    let mut ladder = Ladder::new(costs, min_segment, most);
    let mut seen: Option<(Vec<usize>, Residuals)> = None;
    let mut taken: Option<(f64, f64, Vec<usize>)> = None;
    loop {
        let indices = ladder.best(penalty).to_vec();
        let residuals = match seen {
            Some((before, residuals)) if before == indices => residuals,
            _ => Residuals::new(costs, &indices, floor),
        };
        seen = Some((indices.clone(), residuals));
        let needed = unit * residuals.scale;
        let last = penalty >= most;
        // Rounding must not make a penalty differ from itself.
        if last || needed <= penalty * (1.0 + 1e-12) {
            let found = indices.len() as f64;
            let worth = residuals.log_likelihood + COMPARED * n.ln() * found;
            let done = last || indices.is_empty();
            if taken.as_ref().is_none_or(|t| worth < t.0) {
                taken = Some((worth, penalty, indices));
            }
            if done {
                break;
            }
        }
        let next = (penalty * STEP).max(penalty * (needed / penalty).powf(0.25));
        // Where squares vanish, so may the step.
        penalty = if next > penalty { next.min(most) } else { most };
    }
    taken.map_or((most, Vec::new()), |(_, penalty, indices)| {
        (penalty, indices)
    })
}

/// Variance of independent noise with such differences of neighbours: robust, so that a change is one difference of
/// many.
fn differences_variance((sizes, equal): &(Vec<f64>, f64), n: f64) -> f64 {
    let zeros = (equal * (n - 1.0)).round() as usize;
    let middle = (sizes.len() + zeros) / 2;
    let median = if middle >= zeros {
        sizes.get(middle - zeros).copied().unwrap_or(0.0)
    } else {
        0.0
    };
    // The median size of a normal value is 0.674 standard deviations.
    (median / 0.674_489_750_196_082).powi(2) / 2.0
}

/// What a segmentation leaves over, seen as noise.
#[derive(Clone, Copy)]
struct Residuals {
    /// Variance, one degree of freedom taken for each segment.
    variance: f64,
    /// What is to be reckoned with: see [`Sums::scale`].
    scale: f64,
    /// Minus twice the log-likelihood of the segmentation.
    log_likelihood: f64,
}

impl Residuals {
    /// With [`Cost::LevelAndSpread`] each segment's are divided by its standard deviation, and their squares are a second
    /// series of residuals, of variance one if they are normal; the larger counts.
    fn new(costs: &Costs<'_>, indices: &[usize], floor: f64) -> Self {
        let y = &costs.series.y;
        let n = y.len() as f64;
        let edges = edges(indices, y.len());
        let (mut level, mut spread) = (Sums::default(), Sums::default());
        let mut segment = Vec::new();
        for e in edges.windows(2) {
            segment.clear();
            segment.extend_from_slice(&y[e[0]..e[1]]);
            let (mean, square) = mean_and_square(&segment);
            segment.iter_mut().for_each(|v| *v -= mean);
            if costs.cost == Cost::LevelAndSpread {
                let variance = square / segment.len() as f64 + costs.floor;
                segment.iter_mut().for_each(|v| *v /= variance.sqrt());
                level.add(&segment);
                let mean = square / variance / segment.len() as f64;
                segment
                    .iter_mut()
                    .for_each(|v| *v = (*v * *v - mean) / SQRT_2);
                spread.add(&segment);
            } else {
                level.add(&segment);
            }
        }
        let (variance, scale, log_likelihood) = match costs.cost {
            Cost::Level => (
                level.variance(n).max(floor),
                level.scale(n).max(floor),
                n * (level.squares / n).max(floor).max(f64::MIN_POSITIVE).ln(),
            ),
            Cost::LevelAndSpread => (
                level.variance(n).max(spread.variance(n)).max(1.0),
                level.scale(n).max(spread.scale(n)).max(1.0),
                costs.total(indices).value() + SPREAD * n.ln() * indices.len() as f64,
            ),
        };
        Self {
            variance,
            scale,
            log_likelihood,
        }
    }
}

/// Sums over the residuals of all segments.
#[derive(Default)]
struct Sums {
    segments: f64,
    squares: f64,
    /// Powers of the low cosines, which estimate the long-run variance, and their number.
    cosines: f64,
    number: f64,
    /// Powers of the first cosine of each segment: what one that drifts has.
    drift: f64,
}

impl Sums {
    fn add(&mut self, segment: &[f64]) {
        self.segments += 1.0;
        self.squares += segment.iter().map(|v| v * v).sum::<f64>();
        for j in 1..=cosine_count(segment.len()) {
            let power = cosine_power(segment, j);
            self.cosines += power;
            self.number += 1.0;
            if j == 1 {
                self.drift += power;
            }
        }
    }

    /// Variance, one degree of freedom taken for each segment.
    fn variance(&self, n: f64) -> f64 {
        self.squares / (n - self.segments).max(1.0)
    }

    /// The long-run variance to reckon with, in a series of `n` points.
    ///
    /// A mean square of few cosines is uncertain, so it counts for more: by as much as the square of Student's
    /// statistic is larger than that of a normal one at a probability of about `n^(-LEVEL / 2)`.
    fn scale(&self, n: f64) -> f64 {
        // No cosine, no evidence: not infinity times nothing.
        let long_run = if self.cosines > 0.0 {
            let unit = LEVEL * n.ln();
            let student = self.number * ((unit / self.number).exp() - 1.0) / unit;
            self.cosines / self.number * student
        } else {
            0.0
        };
        self.variance(n)
            .max(long_run)
            .max(self.drift / self.segments)
    }
}

/// Cosines of a segment of `m` points that count as low (Lazarus, Lewis, Stock & Watson, 2018).
fn cosine_count(m: usize) -> usize {
    if m < 4 {
        return 0;
    }
    let count = (0.4 * (m as f64).powf(2.0 / 3.0)).round() as usize;
    count.clamp(1, m / 2)
}

/// `(2 / m) (sum_t r_t cos(pi j (t + 1/2) / m))^2`. The cosines are orthogonal to a constant, so that taking the mean
/// off does not bias it.
fn cosine_power(r: &[f64], j: usize) -> f64 {
    let m = r.len() as f64;
    let turn = PI * j as f64 / m;
    // cos((t + 1) a) = 2 cos(a) cos(t a) - cos((t - 1) a), from t = -1/2.
    let factor = 2.0 * turn.cos();
    let (mut before, mut now) = ((turn / 2.0).cos(), (turn / 2.0).cos());
    let mut sum = 0.0;
    for v in r {
        sum += v * now;
        (before, now) = (now, factor * now - before);
    }
    sum * sum * 2.0 / m
}

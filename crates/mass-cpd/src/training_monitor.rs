//! Monitoring against a training sample, at a level that holds however long one looks.
//!
//! # Formula
//! After `m` training observations with mean `mean_m` and long-run variance `omega^2`, the `k`-th one monitored
//! moves
//!
//! ```text
//! Q_k = sum_{i=1..k} (x_{m+i} - mean_m)          D_k = Q_k / (omega sqrt(m) (1 + k / m))
//! ```
//!
//! Without a change the whole path of `D` is, for large `m`, that of a Brownian motion `W(t)` at
//! `t = k / (m + k)`, so that for any horizon, the infinite one included (`T = 1`),
//!
//! ```text
//! P(sup_k |D_k| >= d) -> P(sup_{t <= T} |W(t)| >= d),   T = N / (m + N)
//!     = 1 - 4/pi sum_j (-1)^j / (2 j + 1) exp(-pi^2 (2 j + 1)^2 T / (8 d^2))
//! ```
//!
//! and `2 (1 - Phi(d / sqrt(T)))` for one side. An alarm is raised when this is at most `alpha`.
//!
//! The long-run variance `omega^2` is the spectral density at zero: the training sample is whitened by a first-order
//! autoregression (its coefficient corrected for bias), the rest is estimated with Bartlett's kernel, and
//! the result is coloured back.
//!
//! # Limits
//! The boundary is that of `gamma = 0` in the source, whose distribution has a closed form; it finds late changes
//! well and very early ones slowly. The theory is for large `m`.
//!
//! # Sources
//! Horvath, Huskova, Kokoszka & Steinebach, J. Statist. Planning Inference 126 (2004); Andrews & Monahan,
//! Econometrica 60 (1992) for the prewhitened long-run variance.

use serde::{Deserialize, Serialize};

use crate::{
    CpdError, Detector, Direction, Shift, Step,
    cusum::{LARGEST, Transform, transform},
    error::{MOST, require},
    normal,
};

/// Which spread the sum of deviations is measured in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Spread {
    /// The long-run standard deviation: for autocorrelated streams.
    #[default]
    LongRun,
    /// The standard deviation: for streams known to be independent.
    Independent,
}

/// Unchecked parameters of [`TrainingMonitor`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainingMonitorParams {
    /// Size `m` of the training sample, in 20..=2^24.
    pub training: usize,
    /// Probability of a false alarm within the horizon, in (0, 0.5].
    pub alpha: f64,
    /// Steps monitored after the training, at least 1; `None` for ever.
    pub horizon: Option<u64>,
    /// What is monitored.
    pub transform: Transform,
    /// Which spread.
    pub spread: Spread,
    /// Which changes count.
    pub direction: Direction,
}

impl Default for TrainingMonitorParams {
    fn default() -> Self {
        Self {
            training: 200,
            alpha: 0.05,
            horizon: None,
            transform: Transform::Identity,
            spread: Spread::LongRun,
            direction: Direction::Both,
        }
    }
}

impl TrainingMonitorParams {
    /// Makes the detector.
    ///
    /// # Errors
    /// [`CpdError::Parameter`] for the first parameter that is out of the range its field states.
    pub fn check(&self) -> Result<TrainingMonitor, CpdError> {
        self.validate()?;
        Ok(TrainingMonitor {
            params: *self,
            sample: Vec::with_capacity(self.training),
            learned: None,
            path: Path::default(),
            count: 0,
        })
    }

    fn validate(&self) -> Result<(), CpdError> {
        require(
            (20..=1 << 24).contains(&self.training),
            "training",
            self.training as f64,
            "in 20..=2^24",
        )?;
        require(
            self.alpha > 0.0 && self.alpha <= 0.5,
            "alpha",
            self.alpha,
            "in (0, 0.5]",
        )?;
        require(
            self.horizon != Some(0),
            "horizon",
            0.0,
            "at least 1, or none",
        )
    }
}

/// Monitoring against a training sample; see the [module's documentation](self) for its equations.
///
/// [`Step::statistic`] is `D_k` (its absolute value for [`Direction::Both`], its negative for
/// [`Direction::Down`]), [`Step::p_value`] the p-value of `Q_k` at this step alone, [`Step::p_horizon`] the
/// probability above, and [`Step::onset`] the step after the last one at which the sum, less an allowance,
/// had its extreme on the other side; of four allowances the one that makes the change most likely. The alarm stays up as long as the evidence does; [`Detector::reset`] starts with a new training sample.
/// After a training sample without any spread each other value is a change, unless it is rounding noise (1e-13 of the level).
/// [`Step::size_in_deviations`] counts in the spread that the parameters name: the long-run one, or the plain one.
///
/// # Examples
/// ```
/// use mass_cpd::{Detector, TrainingMonitorParams};
///
/// let mut detector = TrainingMonitorParams { training: 100, ..Default::default() }.check()?;
/// let mut noise = 0.5f64;
/// let mut alarm = None;
/// for t in 1..=400u64 {
///     noise = (noise * 3.99) * (1.0 - noise);
///     let step = detector.update(noise + if t > 200 { 1.0 } else { 0.0 })?;
///     if step.alarm && alarm.is_none() {
///         alarm = Some(step.count);
///     }
/// }
/// assert!(alarm.is_some_and(|t| t > 200));
/// # Ok::<(), mass_cpd::CpdError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Stored")]
pub struct TrainingMonitor {
    params: TrainingMonitorParams,
    /// The training sample, empty once it has been learned.
    sample: Vec<f64>,
    learned: Option<Learned>,
    path: Path,
    count: u64,
}

/// What the training sample says.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Learned {
    mean: f64,
    spread: f64,
}

/// The sum of deviations and where it had its extremes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Path {
    sum: f64,
    /// Observations in it.
    number: u64,
    /// By [`ALLOWANCES`].
    lowest: [Turn; ALLOWANCES.len()],
    highest: [Turn; ALLOWANCES.len()],
}

/// Where a change may begin: at the last extreme of the sum less so many spreads an observation. Small ones find the beginning of
/// small changes, large ones that of large changes.
const ALLOWANCES: [f64; 4] = [0.0, 0.1, 0.3, 1.0];

/// An extreme of the sum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Turn {
    sum: f64,
    /// Step at which it was reached.
    at: u64,
    /// Observations until then.
    number: u64,
}

impl TrainingMonitor {
    /// The parameters it was made with.
    #[must_use]
    pub fn params(&self) -> &TrainingMonitorParams {
        &self.params
    }

    fn evidence(&self, learned: Learned, step: &mut Step) {
        let m = self.params.training as f64;
        let k = self.path.number as f64;
        let q = self.path.sum / learned.spread;
        let d = q / (m.sqrt() * (1.0 + k / m));
        let z = q / (k * (1.0 + k / m)).sqrt();
        // A finite horizon sees the Brownian motion until T only.
        let reach = self.params.horizon.map_or(1.0, |n| {
            let n = n as f64;
            (n / (m + n)).sqrt()
        });
        let (statistic, p_value, p_horizon) = match self.params.direction {
            Direction::Up => (d, normal::survival(z), one_sided(d / reach)),
            Direction::Down => (-d, normal::survival(-z), one_sided(-d / reach)),
            Direction::Both => (
                d.abs(),
                2.0 * normal::survival(z.abs()),
                two_sided(d.abs() / reach),
            ),
        };
        let rising = match self.params.direction {
            Direction::Up => true,
            Direction::Down => false,
            Direction::Both => d >= 0.0,
        };
        let turns = if rising {
            &self.path.lowest
        } else {
            &self.path.highest
        };
        // The beginning that makes the change most likely.
        let likelihood = |turn: &Turn| {
            let since = (self.path.number - turn.number) as f64;
            let rise = (self.path.sum - turn.sum) / learned.spread;
            if since > 0.0 {
                rise * rise / since
            } else {
                0.0
            }
        };
        let (mut turn, mut most) = (turns[0], likelihood(&turns[0]));
        for other in &turns[1..] {
            let likelihood = likelihood(other);
            if likelihood > most {
                (turn, most) = (*other, likelihood);
            }
        }
        step.statistic = Some(statistic);
        step.p_value = Some(p_value);
        step.p_horizon = Some(p_horizon);
        if turn.number < self.path.number {
            let since = (self.path.number - turn.number) as f64;
            let size = (self.path.sum - turn.sum) / since;
            step.onset = Some(turn.at + 1);
            step.direction = Some(if rising { Shift::Up } else { Shift::Down });
            step.size = Some(size);
            step.size_in_deviations = Some(size / learned.spread);
        }
        step.alarm = p_horizon <= self.params.alpha;
    }
}

impl Detector for TrainingMonitor {
    fn update(&mut self, x: f64) -> Result<Step, CpdError> {
        let y = transform(x, self.params.transform, self.count)?;
        self.count += 1;
        let mut step = Step::silent(self.count);
        let Some(learned) = self.learned else {
            self.sample.push(y);
            if self.sample.len() == self.params.training {
                self.learned = Some(learn(&self.sample, self.params.spread));
                self.sample.clear();
                let start = Turn {
                    at: self.count,
                    ..Turn::default()
                };
                self.path = Path {
                    lowest: [start; ALLOWANCES.len()],
                    highest: [start; ALLOWANCES.len()],
                    ..Path::default()
                };
            }
            return Ok(step);
        };
        let path = &mut self.path;
        path.sum += y - learned.mean;
        path.number += 1;
        let now = Turn {
            sum: path.sum,
            at: self.count,
            number: path.number,
        };
        for (i, allowance) in ALLOWANCES.into_iter().enumerate() {
            let slope = allowance * learned.spread;
            let over = |turn: &Turn| slope * (now.number - turn.number) as f64;
            // The latest of equals: none of them is part of a change that comes after.
            if now.sum - over(&path.lowest[i]) <= path.lowest[i].sum {
                path.lowest[i] = now;
            }
            if now.sum + over(&path.highest[i]) >= path.highest[i].sum {
                path.highest[i] = now;
            }
        }
        self.evidence(learned, &mut step);
        Ok(step)
    }

    fn skip(&mut self) -> Step {
        self.count += 1;
        Step::silent(self.count)
    }

    fn reset(&mut self) {
        self.sample.clear();
        self.learned = None;
        self.path = Path::default();
        self.count = 0;
    }

    fn count(&self) -> u64 {
        self.count
    }
}

/// Below this share of the mean a spread is rounding noise.
const ROUNDING: f64 = 1e-13;

/// Stands for none; sums of observations over it stay finite.
const LEAST_SPREAD: f64 = 1e-200;

/// Mean and spread of a training sample.
fn learn(sample: &[f64], spread: Spread) -> Learned {
    let n = sample.len() as f64;
    let anchor = sample[0];
    let mean = anchor + sample.iter().map(|x| x - anchor).sum::<f64>() / n;
    let deviations: Vec<f64> = sample.iter().map(|x| x - mean).collect();
    let square: f64 = deviations.iter().map(|d| d * d).sum();
    let variance = match spread {
        Spread::Independent => square / (n - 1.0),
        Spread::LongRun => long_run_variance(&deviations, square),
    };
    // A smaller spread is rounding noise: a sample of equal values says that any other is a change.
    Learned {
        mean,
        spread: variance.sqrt().max(ROUNDING * mean.abs()).max(LEAST_SPREAD),
    }
}

/// Prewhitened Bartlett estimate of the spectral density at zero, for deviations from their mean.
pub(crate) fn long_run_variance(deviations: &[f64], square: f64) -> f64 {
    let n = deviations.len() as f64;
    if square <= 0.0 {
        return 0.0;
    }
    let product: f64 = deviations.windows(2).map(|d| d[0] * d[1]).sum();
    let phi = product / square;
    // Kendall's correction; the bound keeps a near-unit root from an infinite variance (Andrews & Monahan).
    let phi = (phi + (1.0 + 3.0 * phi) / n).clamp(-0.97, 0.97);
    let rest: Vec<f64> = deviations.windows(2).map(|d| d[1] - phi * d[0]).collect();
    let autocovariance = |lag: usize| {
        rest.iter()
            .zip(&rest[lag..])
            .map(|(a, b)| a * b)
            .sum::<f64>()
            / (n - 2.0)
    };
    let bandwidth = (4.0 * (n / 100.0).powf(2.0 / 9.0)).floor().min(n - 3.0) as usize;
    let mut density = autocovariance(0);
    for lag in 1..=bandwidth {
        density += 2.0 * (1.0 - lag as f64 / (bandwidth as f64 + 1.0)) * autocovariance(lag);
    }
    // Bartlett's estimate cannot be negative but for the divisor above.
    density.max(0.0) / ((1.0 - phi) * (1.0 - phi))
}

/// `P(sup_{t <= 1} W(t) >= d)`.
fn one_sided(d: f64) -> f64 {
    if d <= 0.0 {
        1.0
    } else {
        2.0 * normal::survival(d)
    }
}

/// `P(sup_{t <= 1} |W(t)| >= d)`, by the series that converges fast at `d`.
fn two_sided(d: f64) -> f64 {
    if d <= 0.0 {
        return 1.0;
    }
    let sign = |j: u32| if j.is_multiple_of(2) { 1.0 } else { -1.0 };
    if d < 1.0 {
        let mut stay = 0.0;
        for j in 0..20 {
            let odd = f64::from(2 * j + 1);
            let e = std::f64::consts::PI * odd / d;
            let term = sign(j) / odd * (-e * e / 8.0).exp();
            stay += term;
            if term.abs() <= 1e-18 * stay {
                break;
            }
        }
        return (1.0 - 4.0 / std::f64::consts::PI * stay).clamp(0.0, 1.0);
    }
    // Reflections: 4 sum_j (-1)^j (1 - Phi((2 j + 1) d)), whose second term is already under 0.3 % at d = 1.
    let mut sum = 0.0;
    for j in 0..20 {
        let term = 4.0 * normal::survival(f64::from(2 * j + 1) * d);
        sum += sign(j) * term;
        if term <= 1e-18 * sum {
            break;
        }
    }
    sum.clamp(0.0, 1.0)
}

/// What a stored detector holds before it has been checked.
#[derive(Deserialize)]
#[serde(rename = "TrainingMonitor", deny_unknown_fields)]
struct Stored {
    params: TrainingMonitorParams,
    sample: Vec<f64>,
    learned: Option<Learned>,
    path: Path,
    count: u64,
}

impl TryFrom<Stored> for TrainingMonitor {
    type Error = CpdError;

    fn try_from(stored: Stored) -> Result<Self, CpdError> {
        stored.params.validate()?;
        let state = |reason| CpdError::State { reason };
        let training = stored.params.training;
        let held = stored.sample.len();
        if held >= training
            || held as u64 > stored.count
            || (stored.learned.is_some() && held > 0)
            || !stored.sample.iter().all(|x| x.abs() <= LARGEST)
        {
            return Err(state("the training sample does not fit the count"));
        }
        if let Some(Learned { mean, spread }) = stored.learned
            && !(mean.is_finite()
                && spread.is_finite()
                && spread >= LEAST_SPREAD
                && stored.path.number <= stored.count
                && stored.count - stored.path.number >= training as u64)
        {
            return Err(state("what was learned is impossible"));
        }
        let Path {
            sum,
            number,
            lowest,
            highest,
        } = stored.path;
        let possible =
            |turn: Turn| turn.sum.is_finite() && turn.at <= stored.count && turn.number <= number;
        if !(sum.is_finite() && lowest.into_iter().chain(highest).all(possible))
            || number > stored.count
            || stored.count > MOST
        {
            return Err(state("the path of the sum is impossible"));
        }
        Ok(Self {
            params: stored.params,
            sample: stored.sample,
            learned: stored.learned,
            path: stored.path,
            count: stored.count,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{one_sided, two_sided};

    #[test]
    fn supremum_of_brownian_motion_has_its_known_quantiles() {
        // Upper 10, 5 and 1 % points of sup |W| on [0, 1]; Horvath et al. print 1.9497, 2.2365 and 2.7912 from
        // simulation.
        for (d, p) in [(1.959_96, 0.10), (2.241_40, 0.05), (2.807_03, 0.01)] {
            assert!((two_sided(d) - p).abs() < 2e-5, "{d}: {}", two_sided(d));
        }
        assert!((one_sided(1.959_964) - 0.05).abs() < 1e-6);
    }

    #[test]
    fn the_two_series_agree_where_they_meet_and_fall() {
        let (left, right) = (two_sided(1.0 - 1e-12), two_sided(1.0));
        assert!((left - right).abs() < 1e-11, "{left} {right}");
        let mut last = 1.0;
        for i in 1..2000 {
            let p = two_sided(f64::from(i) * 0.005);
            assert!(p <= last && p >= 0.0);
            last = p;
        }
    }
}

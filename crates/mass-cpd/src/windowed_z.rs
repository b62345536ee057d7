//! The windowed z detector of the MASS paper, and of its authors' code.
//!
//! # Formula
//! With `m` = `warmup` and `w` = `window`, from the `m`-th observation on
//!
//! ```text
//! z_t = (x_t - mean_t) / sd_t        mean and unbiased standard deviation of the last w values, x_t included
//! s_t = sum of the last w scores z
//! p_t = 1 - Phi(s_t / sqrt(w))
//! ```
//!
//! A flag needs at least `m` observations, a full window of values, and `p_t <= alpha`
//! ([`WindowedZRule::Paper`]) or `p_t < alpha` ([`WindowedZRule::Reference`], which also adds 1e-12 to each
//! `z_t`).
//!
//! # Limits
//! The scores are not independent and the test is repeated at every step, so `alpha` is **not** the rate of
//! false alarms: see [`CalibratedCusum`](crate::CalibratedCusum) for a detector whose level means something.
//!
//! # Source
//! Park & Park, "How Many Experts Are Enough? Towards Optimal Semantic Specialization for
//! Mixture-of-Experts", arXiv 2512.19765, and the code released with it.

use serde::{Deserialize, Serialize};

use crate::{
    CpdError, Detector, Shift, Step,
    error::{MOST, require, require_finite},
    normal,
    ring::{Ring, sum},
};

/// Which of the two published forms of the windowed z detector.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WindowedZRule {
    /// As the paper writes it: a flag when `p <= alpha`.
    #[default]
    Paper,
    /// As the authors' code does it: a flag when `p < alpha`, and 1e-12 added to each score.
    Reference,
}

/// Unchecked parameters of [`WindowedZ`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WindowedZParams {
    /// Observations before the first score (the paper's `T_warm`), at least 1.
    pub warmup: usize,
    /// Length of the window of values and of scores (the paper's `w`), at least 2.
    pub window: usize,
    /// Level of the test at each step, in (0, 1).
    pub alpha: f64,
    /// Which form.
    pub rule: WindowedZRule,
}

impl WindowedZParams {
    /// The detector as the paper writes it.
    #[must_use]
    pub const fn paper(warmup: usize, window: usize, alpha: f64) -> Self {
        Self {
            warmup,
            window,
            alpha,
            rule: WindowedZRule::Paper,
        }
    }

    /// The detector as the authors' code has it.
    #[must_use]
    pub const fn reference(warmup: usize, window: usize, alpha: f64) -> Self {
        Self {
            warmup,
            window,
            alpha,
            rule: WindowedZRule::Reference,
        }
    }

    /// Makes the detector.
    ///
    /// # Errors
    /// [`CpdError::Parameter`] when `warmup` is 0, `window` is under 2 or over 2^24, or `alpha` is not in (0, 1).
    pub fn check(&self) -> Result<WindowedZ, CpdError> {
        self.validate()?;
        Ok(WindowedZ {
            params: *self,
            values: Ring::new(self.window),
            scores: Ring::new(self.window),
            count: 0,
            skipped: 0,
            last_score: None,
        })
    }

    fn validate(&self) -> Result<(), CpdError> {
        require(self.warmup >= 1, "warmup", self.warmup as f64, "at least 1")?;
        require(
            (2..=1 << 24).contains(&self.window),
            "window",
            self.window as f64,
            "in 2..=2^24",
        )?;
        require(
            self.alpha > 0.0 && self.alpha < 1.0,
            "alpha",
            self.alpha,
            "in (0, 1)",
        )
    }
}

/// The windowed z detector; see the [module's documentation](self) for its equations.
///
/// [`Step::statistic`] is `s_t / sqrt(w)`, [`Step::p_value`] its `p_t`; there is no p-value over a horizon and
/// no estimate of the onset; [`Step::size_in_deviations`] is the mean of the last `w` scores. A window without any spread scores zero: a constant stream is no evidence.
///
/// # Examples
/// ```
/// use mass_cpd::{Detector, WindowedZParams};
///
/// let mut detector = WindowedZParams::paper(5, 10, 0.05).check()?;
/// let mut first_alarm = None;
/// for t in 1..=40u64 {
///     let level = if t > 20 { 5.0 } else { 0.0 };
///     let step = detector.update(level + (t % 2) as f64)?;
///     if step.alarm && first_alarm.is_none() {
///         first_alarm = Some(step.count);
///     }
/// }
/// assert!(first_alarm.is_some_and(|t| t > 20));
/// # Ok::<(), mass_cpd::CpdError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Stored")]
pub struct WindowedZ {
    params: WindowedZParams,
    values: Ring,
    scores: Ring,
    count: u64,
    /// Gaps among the steps counted.
    skipped: u64,
    last_score: Option<f64>,
}

impl WindowedZ {
    /// The parameters it was made with.
    #[must_use]
    pub fn params(&self) -> &WindowedZParams {
        &self.params
    }

    /// `z_t` of the last observation; `None` before the end of the warm-up, and after one that is missing.
    #[must_use]
    pub fn last_score(&self) -> Option<f64> {
        self.last_score
    }

    /// Starts the observation count again from zero, and with it the warm-up, but keeps both windows. This is
    /// what the authors' code does to an expert that has just been split.
    pub fn reset_count(&mut self) {
        self.count = 0;
        self.skipped = 0;
        self.last_score = None;
    }

    /// `z_t` of the newest value in the window.
    fn score(&self, x: f64) -> f64 {
        let values = self.values.unordered();
        let n = values.len() as f64;
        // Differences from x itself, in units of the largest: a large level costs no digits, a constant window
        // has a spread of exactly zero, and nothing overflows. Halving first is exact and keeps the difference
        // of two huge numbers finite.
        let far = values
            .iter()
            .fold(0.0f64, |far, &v| far.max((0.5 * v - 0.5 * x).abs()));
        let unit = if far > 0.0 { far } else { 1.0 };
        let shift = sum(values, |v| (0.5 * v - 0.5 * x) / unit) / n;
        let spread = sum(values, |v| {
            let e = (0.5 * v - 0.5 * x) / unit - shift;
            e * e
        });
        let z = if spread > 0.0 {
            -shift / (spread / (n - 1.0)).sqrt()
        } else {
            0.0
        };
        match self.params.rule {
            WindowedZRule::Paper => z,
            WindowedZRule::Reference => z + 1e-12,
        }
    }
}

impl Detector for WindowedZ {
    fn update(&mut self, x: f64) -> Result<Step, CpdError> {
        require_finite(x, self.count)?;
        self.count += 1;
        self.values.push(x);
        let mut step = Step::silent(self.count);
        if self.count - self.skipped < self.params.warmup as u64 {
            return Ok(step);
        }
        let z = self.score(x);
        self.scores.push(z);
        self.last_score = Some(z);
        if self.values.is_full() {
            let statistic =
                sum(self.scores.unordered(), |z| z) / (self.params.window as f64).sqrt();
            let p = normal::survival(statistic);
            step.statistic = Some(statistic);
            step.p_value = Some(p);
            step.direction = Some(if statistic >= 0.0 {
                Shift::Up
            } else {
                Shift::Down
            });
            step.size_in_deviations = Some(statistic / (self.params.window as f64).sqrt());
            step.alarm = match self.params.rule {
                WindowedZRule::Paper => p <= self.params.alpha,
                WindowedZRule::Reference => p < self.params.alpha,
            };
        }
        Ok(step)
    }

    fn skip(&mut self) -> Step {
        self.count += 1;
        self.skipped += 1;
        self.last_score = None;
        Step::silent(self.count)
    }

    fn reset(&mut self) {
        self.reset_count();
        self.values.clear();
        self.scores.clear();
    }

    fn count(&self) -> u64 {
        self.count
    }
}

/// What a stored detector holds before it has been checked.
#[derive(Deserialize)]
#[serde(rename = "WindowedZ", deny_unknown_fields)]
struct Stored {
    params: WindowedZParams,
    values: Ring,
    scores: Ring,
    count: u64,
    /// Gaps among the steps counted.
    skipped: u64,
    last_score: Option<f64>,
}

impl TryFrom<Stored> for WindowedZ {
    type Error = CpdError;

    fn try_from(stored: Stored) -> Result<Self, CpdError> {
        stored.params.validate()?;
        let window = stored.params.window;
        let state = |reason| CpdError::State { reason };
        if !stored.values.is_valid(window) || !stored.scores.is_valid(window) {
            return Err(state("a window does not fit the parameters"));
        }
        if stored.last_score.is_some_and(|z| !z.is_finite()) {
            return Err(state("the last score is not finite"));
        }
        // After `reset_count` the windows hold more than the count says, never less.
        if stored.skipped > stored.count
            || (stored.values.len() as u64) < (stored.count - stored.skipped).min(window as u64)
            || stored.count > MOST
        {
            return Err(state("fewer values are held than were counted"));
        }
        Ok(Self {
            params: stored.params,
            values: stored.values,
            scores: stored.scores,
            count: stored.count,
            skipped: stored.skipped,
            last_score: stored.last_score,
        })
    }
}

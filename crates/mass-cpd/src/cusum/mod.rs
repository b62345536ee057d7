//! CUSUM with a false-alarm probability over a horizon.

mod params;

pub use params::{AfterAlarm, CalibratedCusumParams, Direction, Drift, Reference, Transform};

use serde::{Deserialize, Serialize};

use crate::{CpdError, Detector, Step, error::require_finite, normal, ring::Ring};

/// CUSUM with a false-alarm probability over a horizon.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CalibratedCusum {
    params: CalibratedCusumParams,
    history: Ring,
    count: u64,
    up: f64,
    down: f64,
    onset_up: u64,
    onset_down: u64,
    seen: u64,
    mean: f64,
    sum_sq: f64,
    threshold: f64,
}

fn average_run_length(k: f64, h: f64) -> f64 {
    let d = -k;
    let b = h + 1.166;
    if d == 0.0 {
        b * b
    } else {
        ((-2.0 * d * b).exp() + 2.0 * d * b - 1.0) / (2.0 * d * d)
    }
}

impl CalibratedCusum {
    pub(crate) fn new(params: CalibratedCusumParams) -> Result<Self, CpdError> {
        let capacity = match params.reference {
            Reference::SelfStarting => 1,
            Reference::Lagged { window, gap } => window + gap,
        };
        let sides = if params.direction == Direction::Both {
            2.0
        } else {
            1.0
        };
        let target = -sides * params.horizon as f64 / (-params.alpha).ln_1p();
        let mut threshold = 0.0;
        while average_run_length(params.k, threshold) < target {
            threshold += 0.01;
        }
        Ok(Self {
            params,
            history: Ring::new(capacity),
            count: 0,
            up: 0.0,
            down: 0.0,
            onset_up: 0,
            onset_down: 0,
            seen: 0,
            mean: 0.0,
            sum_sq: 0.0,
            threshold,
        })
    }

    /// The parameters it was made with.
    #[must_use]
    pub fn params(&self) -> &CalibratedCusumParams {
        &self.params
    }

    /// The statistic from which on an alarm is raised.
    #[must_use]
    pub fn threshold(&self) -> f64 {
        self.threshold
    }

    fn score(&mut self, y: f64) -> Option<f64> {
        let z = match self.params.reference {
            Reference::SelfStarting => {
                let sd = (self.sum_sq / (self.seen.max(2) - 1) as f64).sqrt();
                let z = if sd > 0.0 { (y - self.mean) / sd } else { 0.0 };
                let ready = self.seen >= self.params.warmup as u64;
                self.seen += 1;
                let d = y - self.mean;
                self.mean += d / self.seen as f64;
                self.sum_sq += d * (y - self.mean);
                ready.then_some(z)
            }
            Reference::Lagged { window, .. } => {
                let ready = self.history.is_full() && self.seen >= self.params.warmup as u64;
                self.seen += 1;
                let z = ready.then(|| {
                    let mut n = 0.0;
                    let (mut mean, mut ss) = (0.0, 0.0);
                    for v in self.history.ordered().take(window) {
                        n += 1.0;
                        let d = v - mean;
                        mean += d / n;
                        ss += d * (v - mean);
                    }
                    let sd = (ss / (n - 1.0)).sqrt();
                    if sd > 0.0 { (y - mean) / sd } else { 0.0 }
                });
                self.history.push(y);
                z
            }
        };
        z
    }
}

impl Detector for CalibratedCusum {
    fn update(&mut self, x: f64) -> Result<Step, CpdError> {
        require_finite(x, self.count)?;
        let y = match self.params.transform {
            Transform::Identity => x,
            Transform::Log if x > 0.0 => x.ln(),
            Transform::Log => {
                return Err(CpdError::NonPositive {
                    count: self.count + 1,
                    value: x,
                });
            }
        };
        self.count += 1;
        let mut step = Step::silent(self.count);
        let Some(z) = self.score(y) else {
            return Ok(step);
        };
        let k = self.params.k;
        if self.params.direction != Direction::Down {
            if self.up == 0.0 {
                self.onset_up = self.count;
            }
            self.up = (self.up + z - k).max(0.0);
        }
        if self.params.direction != Direction::Up {
            if self.down == 0.0 {
                self.onset_down = self.count;
            }
            self.down = (self.down - z - k).max(0.0);
        }
        let (s, onset, sides) = match self.params.direction {
            Direction::Up => (self.up, self.onset_up, 1.0),
            Direction::Down => (self.down, self.onset_down, 1.0),
            Direction::Both if self.up >= self.down => (self.up, self.onset_up, 2.0),
            Direction::Both => (self.down, self.onset_down, 2.0),
        };
        step.statistic = Some(s);
        step.p_value = Some(match self.params.direction {
            Direction::Up => normal::survival(z),
            Direction::Down => normal::survival(-z),
            Direction::Both => 2.0 * normal::survival(z.abs()),
        });
        step.p_horizon = Some(
            -(-sides * self.params.horizon as f64 / average_run_length(k, s).max(1.0)).exp_m1(),
        );
        step.onset = (s > 0.0).then_some(onset);
        step.alarm = s >= self.threshold;
        if step.alarm {
            match self.params.after_alarm {
                AfterAlarm::Hold => {}
                AfterAlarm::Restart => {
                    self.up = 0.0;
                    self.down = 0.0;
                }
                AfterAlarm::Relearn => {
                    let count = self.count;
                    self.reset();
                    self.count = count;
                }
            }
        }
        Ok(step)
    }

    fn reset(&mut self) {
        self.history.clear();
        self.count = 0;
        self.up = 0.0;
        self.down = 0.0;
        self.onset_up = 0;
        self.onset_down = 0;
        self.seen = 0;
        self.mean = 0.0;
        self.sum_sq = 0.0;
    }

    fn count(&self) -> u64 {
        self.count
    }
}

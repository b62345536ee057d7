use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

use crate::error::ModelError;

/// What the learning rate does after warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decay {
    /// Stays at the peak.
    Constant,
    /// Falls on a straight line.
    #[default]
    Linear,
    /// Falls on half a cosine (SGDR without restarts, arXiv 1608.03983).
    Cosine,
}

/// Learning rate against step: linear warm-up, then constant, linear or cosine decay to a fraction of the peak.
///
/// With `s = min(1, max(0, t - warmup) / (steps - warmup))` for step t = 0, 1, ...:
///
/// ```text
/// lr(t) = peak (t + 1) / warmup                                 t < warmup
///         peak                                                  constant
///         peak (1 - (1 - floor) s)                              linear
///         peak (floor + (1 - floor) (1 + cos(pi s)) / 2)        cosine
/// ```
///
/// ```
/// use mass_model::optim::{Decay, Schedule};
/// let s = Schedule { peak: 1e-2, warmup: 50, steps: 2000, floor: 0.1, decay: Decay::Linear };
/// assert!((s.at(0) - 2e-4).abs() < 1e-12);
/// assert!((s.at(49) - 1e-2).abs() < 1e-12);
/// assert!((s.at(2000) - 1e-3).abs() < 1e-12);
/// let cosine = Schedule { decay: Decay::Cosine, ..s };
/// assert!((cosine.at((50 + 2000) / 2) - 5.5e-3).abs() < 1e-12);
/// assert_eq!(Schedule::constant(3e-4, 1000).at(999), 3e-4);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Schedule {
    /// Largest learning rate.
    pub peak: f64,
    /// Steps of linear warm-up.
    pub warmup: u64,
    /// Steps in all.
    pub steps: u64,
    /// Learning rate at the end as a fraction of the peak; a constant schedule ignores it.
    pub floor: f64,
    /// Shape after warm-up.
    #[serde(default)]
    pub decay: Decay,
}

impl Schedule {
    /// One learning rate from first to last step.
    pub fn constant(peak: f64, steps: u64) -> Self {
        Self {
            peak,
            warmup: 0,
            steps,
            floor: 1.0,
            decay: Decay::Constant,
        }
    }

    /// Checks the numbers, which a configuration file may have brought.
    ///
    /// # Errors
    /// [`ModelError::Config`] for a peak that is negative or not finite, also times the steps of warm-up, a floor outside [0, 1], or
    /// a warm-up longer than the run.
    pub fn check(self) -> Result<Self, ModelError> {
        let Self {
            peak,
            warmup,
            steps,
            floor,
            ..
        } = self;
        let refuse = |what: String| Err(ModelError::Config(format!("learning rate: {what}")));
        if !(peak >= 0.0 && peak.is_finite()) {
            return refuse(format!("peak {peak} is not a number of at least 0"));
        }
        if !(peak * warmup as f64).is_finite() {
            return refuse(format!(
                "peak {peak} times {warmup} steps of warm-up is too large"
            ));
        }
        if !(0.0..=1.0).contains(&floor) {
            return refuse(format!("floor {floor} is not in [0, 1]"));
        }
        if warmup > steps {
            return refuse(format!("{warmup} steps of warm-up in a run of {steps}"));
        }
        Ok(self)
    }

    /// The learning rate of a step, counted from zero; past the last step it stays where it ended.
    pub fn at(&self, step: u64) -> f64 {
        if step < self.warmup {
            return self.peak * (step + 1) as f64 / self.warmup as f64;
        }
        let span = self.steps.saturating_sub(self.warmup).max(1) as f64;
        let done = ((step - self.warmup) as f64 / span).min(1.0);
        let lost = match self.decay {
            Decay::Constant => 0.0,
            Decay::Linear => done,
            Decay::Cosine => (1.0 - (PI * done).cos()) / 2.0,
        };
        self.peak * (1.0 - (1.0 - self.floor) * lost)
    }
}

use serde::{Deserialize, Serialize};

/// Learning rate against step: linear warm-up, then linear decay to a fraction of the peak.
///
/// `lr(t) = peak min(1, (t+1)/warmup) (1 - (1 - floor) max(0, t - warmup)/(steps - warmup))` for step t = 0, 1, ...
///
/// ```
/// use mass_model::optim::Schedule;
/// let s = Schedule { peak: 1e-2, warmup: 50, steps: 2000, floor: 0.1 };
/// assert!((s.at(0) - 2e-4).abs() < 1e-12);
/// assert!((s.at(49) - 1e-2).abs() < 1e-12);
/// assert!((s.at(2000) - 1e-3).abs() < 1e-12);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Schedule {
    /// Largest learning rate.
    pub peak: f64,
    /// Steps of linear warm-up.
    pub warmup: u64,
    /// Steps in all.
    pub steps: u64,
    /// Learning rate at the end as a fraction of the peak.
    pub floor: f64,
}

impl Schedule {
    /// The learning rate of a step, counted from zero.
    pub fn at(&self, step: u64) -> f64 {
        if step < self.warmup {
            return self.peak * (step + 1) as f64 / self.warmup as f64;
        }
        let span = self.steps.saturating_sub(self.warmup).max(1) as f64;
        let done = ((step - self.warmup) as f64 / span).min(1.0);
        self.peak * (1.0 - (1.0 - self.floor) * done)
    }
}

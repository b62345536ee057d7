//! How many observations a detector needs before it can say anything.

use crate::{AnyDetectorParams, Reference};

impl AnyDetectorParams {
    /// Observations up to and including the first that a detector newly made can judge: warm-up over, its window full.
    ///
    /// A phase that ends before so many observations never sees an alarm.
    ///
    /// # Examples
    /// ```
    /// use mass_cpd::{AnyDetectorParams, CalibratedCusumParams, WindowedZParams};
    ///
    /// let windowed: AnyDetectorParams = WindowedZParams::paper(30, 60, 0.01).into();
    /// assert_eq!(windowed.observations_needed(), 60);
    /// // A warm-up of 200, or a window of 128 and its gap of 16 if that were longer; then the first score.
    /// let training: AnyDetectorParams = CalibratedCusumParams::training(1).into();
    /// assert_eq!(training.observations_needed(), 201);
    /// ```
    #[must_use]
    pub fn observations_needed(&self) -> u64 {
        match self {
            Self::WindowedZ(p) => p.warmup.max(p.window) as u64,
            Self::CalibratedCusum(p) => {
                let learned = match p.reference {
                    Reference::SelfStarting => p.warmup,
                    Reference::Lagged { window, gap } => p.warmup.max(window.saturating_add(gap)),
                };
                (learned as u64).saturating_add(1)
            }
            Self::TrainingMonitor(p) => (p.training as u64).saturating_add(1),
        }
    }
}

//! Online and offline change-point detection with calibrated p-values
#![forbid(unsafe_code)]

pub mod bank;
pub mod cusum;
mod detector;
mod error;
mod normal;
#[cfg(feature = "offline")]
pub mod offline;
mod ring;
pub mod run_length;
pub mod training_monitor;
pub mod windowed_z;

pub use bank::{Bank, BankParams, StreamId};
pub use cusum::{
    AfterAlarm, CalibratedCusum, CalibratedCusumParams, Direction, Drift, Reference, Transform,
};
pub use detector::{AnyDetector, AnyDetectorParams, Detector, Step};
pub use error::CpdError;
pub use training_monitor::{Spread, TrainingMonitor, TrainingMonitorParams};
pub use windowed_z::{WindowedZ, WindowedZParams, WindowedZRule};

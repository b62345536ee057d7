//! Change-point detection whose p-values keep their promise.
//!
//! Watch a stream of numbers and be told when it changes, with a stated probability of a false alarm over a stated
//! number of steps; or cut a recorded series into segments.
//!
//! ```
//! use mass_cpd::{CalibratedCusumParams, Detector};
//!
//! // At most a 5 % chance of any false alarm in 1000 steps, on independent or autocorrelated streams.
//! let mut detector = CalibratedCusumParams { horizon: 1000, alpha: 0.05, ..Default::default() }.check()?;
//! let mut noise = 0.5f64;
//! for t in 1..=600u64 {
//!     noise = (noise * 3.99) * (1.0 - noise);
//!     let step = detector.update(noise + if t > 400 { 1.0 } else { 0.0 })?;
//!     if step.alarm {
//!         println!("observation {}: changed at {:?}, p = {:?}", step.count, step.onset, step.p_horizon);
//!     }
//! }
//! # Ok::<(), mass_cpd::CpdError>(())
//! ```
//!
//! | what | for |
//! |---|---|
//! | [`CalibratedCusum`] | the default: a false-alarm probability over a horizon, learned while running |
//! | [`TrainingMonitor`] | a training sample known to be clean, and any horizon, the infinite one included |
//! | [`WindowedZ`] | the rule of the MASS paper and its code, exactly; its level is **not** a false-alarm rate |
//! | [`Bank`] | thousands of calibrated CUSUMs under one false-alarm probability |
//! | [`run_length`] | average run lengths, their distribution, thresholds |
//! | `offline` (feature `offline`) | segmentation of a recorded series |
//!
//! Every parameter struct is checked once into a detector (`check()`), every detector is serialisable and resumes bit
//! for bit, and a bad observation is a typed error that leaves the state as it was.
#![forbid(unsafe_code)]

/// The README, whose example is compiled with the tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

pub mod bank;
pub mod cusum;
mod detector;
mod error;
mod normal;
#[cfg(feature = "offline")]
pub mod offline;
mod readiness;
mod ring;
pub mod run_length;
pub mod training_monitor;
pub mod windowed_z;

pub use bank::{Bank, BankParams, StreamId};
pub use cusum::{
    AfterAlarm, AlarmAt, CalibratedCusum, CalibratedCusumParams, Direction, Drift, Prewhiten,
    Reference, Scores, Transform, Watch,
};
pub use detector::{AnyDetector, AnyDetectorParams, Detector, Shift, Step};
pub use error::CpdError;
pub use training_monitor::{Spread, TrainingMonitor, TrainingMonitorParams};
pub use windowed_z::{WindowedZ, WindowedZParams, WindowedZRule};

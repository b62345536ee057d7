//! CUSUM whose alarms have a known false-alarm probability over a horizon.
//!
//! # Formula
//! An observation `x_t` (or `log x_t`) is predicted from a reference by the regression
//!
//! ```text
//! y_t = a + phi y_{t-1} + b t + error     phi only with `prewhiten`, b only with `Drift::Remove`
//! ```
//!
//! and its error, over the standard error of prediction, turned into a standard normal score `z_t`. Page's
//! recursion sums the scores beyond an allowance `k`, upward and downward,
//!
//! ```text
//! S_t = max(0, S_{t-1} + z_t - k)
//! ```
//!
//! and an alarm is raised when `p_N(S_t) <= alpha`, with `p_N(s)` the probability that a stream without a change
//! reaches `s` anywhere within the horizon of `N` steps: for the self-starting reference
//! `p_N(s) = 1 - exp(-N / ARL0(s))`, with twice the exponent for [`Direction::Both`]. For the lagged reference it
//! also averages over the error of the reference, which all scores of a stretch share. A limit on the scores is part of the calibration.
//!
//! # What is reported
//! [`Step::statistic`](crate::Step::statistic) is the larger of the two sums, [`Step::p_value`](crate::Step::p_value) the marginal p-value of `z_t`,
//! [`Step::p_horizon`](crate::Step::p_horizon) is `p_N(S_t)`, and [`Step::onset`](crate::Step::onset) the first step since the sum was last zero.
//!
//! # Limits
//! A self-starting reference takes in every observation. With `prewhiten` a jump of very many standard deviations makes the
//! fitted autoregression explain what follows it, so that the sum may stay below its threshold: watch such streams by their
//! logarithm, without prewhitening, or against [`Reference::LAGGED`], which no jump enters before its gap is over.
//!
//! A lagged reference learns an error of more than eight standard errors as one of eight, so that a jump, once it is the predecessor or in
//! the window, is not explained by the fitted autoregression. The window's spread grows with every such value, and follows a jump of any
//! size within about a window's length. A window without any spread is taken to have that of rounding: whatever is beyond it is a
//! score far over any limit.
//!
//! # Sources
//! Page, Biometrika 41 (1954); Hawkins, Statistician 36 (1987) for self-starting charts; Brown, Durbin & Evans,
//! JRSS B 37 (1975) for recursive residuals; Wallace, Ann. Math. Statist. 30 (1959) for the normal score;
//! Kendall, Biometrika 41 (1954) for the bias of an estimated autocorrelation.

mod autoregression;
mod calibration;
mod detector;
mod general;
pub(crate) mod lagged;
mod params;
mod pchip;
mod ranks;
pub(crate) mod score;
pub(crate) mod self_starting;
mod shared_error;
mod stored;
pub(crate) mod sum;
mod transform;

pub(crate) use calibration::Calibration;
pub use detector::CalibratedCusum;
pub(crate) use general::General;
pub use params::{
    AfterAlarm, AlarmAt, CalibratedCusumParams, Direction, Drift, Prewhiten, Reference, Scores,
    Transform, Watch,
};
pub(crate) use pchip::split;
pub(crate) use transform::{bounded, transform, transform_all};

//! CUSUM whose alarms have a known false-alarm probability over a horizon.
//!
//! # Formula
//! An observation `x_t` (or `log x_t`) is predicted from a reference by the regression
//!
//! ```text
//! y_t = a + phi_1 y_{t-1} + .. + phi_p y_{t-p} + b t + error     p by `prewhiten`, b only with `Drift::Remove`
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
//! [`Step::p_horizon`](crate::Step::p_horizon) is `p_N(S_t)`. [`Step::onset`](crate::Step::onset) is the first step since the sum was
//! last zero, or a later one whose score alone outweighs all since (`z^2 > (sum z)^2 / n`); [`Step::size`](crate::Step::size) is the mean
//! since then less the level before, and [`Step::size_in_deviations`](crate::Step::size_in_deviations) the mean score, limited as it is.
//!
//! # Outliers and jumps
//! Once the warm-up is over, a self-starting reference learns an observation whose score is over `score_limit` as if it were at the
//! limit, as predecessor of the next one too: a jump of any size neither raises the level by itself nor explains itself through the
//! autoregression. The next observation is judged by the predecessor as learned and, if that was within reach, as observed, and the
//! smaller score counts: so the echo of an outlier in an autoregression is no evidence. A stream without spread has that of rounding (1e-13
//! of its level): any other value is a change.
//!
//! # Spread
//! With [`Watch::Spread`] the scores are `w_t = Phi^-1(2 Phi(|z_t|) - 1)`, standard normal where `z_t` is.
//!
//! # Limits
//! An outlier within the warm-up is learned in full. Right after a gap an autoregression predicts over it and learns nothing, so a stream
//! in which no two observations follow one another is never ready, unless `prewhiten` is `None`.
//!
//! A lagged reference learns an error of more than eight standard errors as one of eight, so that a jump, once it is the predecessor or in
//! the window, is not explained by the fitted autoregression. The window's spread grows with every such value, and follows a jump of any
//! size within about a window's length. A window without any spread is taken to have that of rounding: whatever is beyond it is a
//! score far over any limit.
//!
//! # Sources
//! Page, Biometrika 41 (1954); Hawkins, Statistician 36 (1987) for self-starting charts; Brown, Durbin & Evans,
//! JRSS B 37 (1975) for recursive residuals; Wallace, Ann. Math. Statist. 30 (1959) for the normal score;
//! Kendall, Biometrika 41 (1954) and Shaman & Stine, JASA 83 (1988) for the bias of estimated coefficients; Martin & Thomson, Proc. IEEE 70
//! (1982) for the cleaner; Conover, Tercero-Gomez & Cordero-Franco, Quality Engineering 29 (2017) for sequential normal scores.

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
pub(crate) use transform::{LARGEST, bounded, transform, transform_all};

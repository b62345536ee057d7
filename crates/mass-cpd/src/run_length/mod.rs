//! How long a CUSUM runs before it signals: average, distribution, and thresholds for a wanted false-alarm rate.
//!
//! # Formula
//! Page's one-sided CUSUM of scores `z_t ~ N(mu, 1)` is `S_t = max(0, S_{t-1} + z_t - k)`, and signals when
//! `S_t > h`. Its average run length from the start `S_0 = u` solves the integral equation
//!
//! ```text
//! L(u) = 1 + Phi(k - mu - u) L(0) + integral_0^h phi(x + k - mu - u) L(x) dx
//! ```
//!
//! whose first term is the atom of `S` at zero. The probability of no signal within `n` steps obeys the same
//! equation without the 1: `F_0 = 1`, `F_{n+1}(u) = Phi(k - mu - u) F_n(0) + integral phi(x + k - mu - u) F_n(x) dx`.
//! Both are discretised by Nystroem's method on Gauss-Legendre nodes; the kernel is smooth, so the error falls
//! exponentially in the number of nodes. Siegmund's approximation, with `D = mu - k` and `b = h + 1.166`, is
//!
//! ```text
//! L(0) = (exp(-2 D b) + 2 D b - 1) / (2 D^2),   b^2 when D = 0
//! ```
//!
//! # Sources
//! Page, Biometrika 41 (1954); Brook & Evans, Biometrika 59 (1972); Kemp, JRSS B 23 (1961) for two sides;
//! Siegmund, *Sequential Analysis* (1985).
//!
//! # Examples
//! ```
//! use mass_cpd::run_length::{RunLength, Sides, threshold_for_horizon};
//!
//! // The textbook chart: k = 0.5, h = 4 has an in-control average run length of 335.37.
//! let run = RunLength::new(0.5, 4.0, 0.0)?;
//! assert!((run.average() - 335.37).abs() < 0.01);
//!
//! // The threshold for a false-alarm probability of 0.05 in 1000 steps.
//! let h = threshold_for_horizon(0.5, 1000, 0.05, Sides::One)?;
//! assert!((h - 8.03).abs() < 0.005);
//! # Ok::<(), mass_cpd::CpdError>(())
//! ```

mod lattice;
mod quadrature;
pub(crate) mod siegmund;
mod solver;
mod threshold;

use serde::{Deserialize, Serialize};

pub(crate) use lattice::{Lattice, Rate};
pub use siegmund::{siegmund_average, siegmund_threshold_for_horizon};
pub use solver::RunLength;
pub use threshold::{
    exact_threshold_for_horizon, threshold_for_average, threshold_for_horizon, two_sided_average,
};

use crate::{CpdError, error::require};

/// Whether a chart watches one direction or both.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sides {
    /// Rises only, or falls only.
    One,
    /// Rises and falls, each with its own sum and the same threshold.
    Two,
}

impl Sides {
    pub(crate) fn number(self) -> f64 {
        match self {
            Self::One => 1.0,
            Self::Two => 2.0,
        }
    }
}

/// The largest threshold that the solver takes: its work grows with the third power.
const H_MAX: f64 = 200.0;

fn check_chart(k: f64, h: f64, mu: f64) -> Result<(), CpdError> {
    require((0.0..=10.0).contains(&k), "k", k, "in [0, 10]")?;
    require((0.0..=H_MAX).contains(&h), "h", h, "in [0, 200]")?;
    require((-10.0..=100.0).contains(&mu), "mu", mu, "in [-10, 100]")
}

fn check_horizon(n: u64, alpha: f64) -> Result<(), CpdError> {
    require(n >= 1, "n", n as f64, "at least 1")?;
    require(alpha > 0.0 && alpha < 1.0, "alpha", alpha, "in (0, 1)")
}

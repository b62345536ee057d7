//! How the two thresholds for a horizon are related.

use mass_cpd::run_length::{RunLength, Sides, exact_threshold_for_horizon, threshold_for_horizon};
use proptest::prelude::*;

/// What a start at zero saves: the mean time in which a chart reaches its steady state, of a Brownian motion with drift `-k` that is
/// reflected at zero, `h / k - 1 / k^2`, with Siegmund's correction of `h` for the overshoot.
pub(super) fn saved(k: f64, h: f64) -> f64 {
    (h + 1.166) / k - 1.0 / (k * k)
}

/// The least and the most that `-ln(no signal in n steps) / (n / ARL)` can be where `n / ARL` is `a`.
///
/// The run length is `D` steps and then a geometric time of mean `ARL - D`. So the quotient is `(1 - D/n) / (1 - a D/n)`, but for steps being
/// whole: with `a < 1` a chart from zero signals a little less often, with `a > 1` more often. `D` is known to a quarter and two steps.
pub(super) fn ratio(k: f64, h: f64, n: u64, a: f64) -> (f64, f64) {
    let n = n as f64;
    let of = |d: f64| -(n - d) * f64::ln_1p(-1.0 / (n / a - d)) / a;
    let d = saved(k, h);
    let (low, high) = (of((0.75 * d - 2.0).max(0.0)), of(1.25 * d + 2.0));
    (low.min(high) - 1e-7, low.max(high) + 1e-7)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn a_start_at_zero_saves_the_time_to_the_steady_state(
        k in 0.15..2.0f64, digits in 2.3..6.0f64, rare in 0.1..3.0f64,
    ) {
        let (n, alpha) = (10f64.powf(digits) as u64, 10f64.powf(-rare));
        let a = -f64::ln_1p(-alpha);
        let h = threshold_for_horizon(k, n, alpha, Sides::One).expect("there is one");
        // Nothing is claimed where the horizon is not much longer than that, or the threshold so low that the sum is often over it.
        prop_assume!((h + 1.166) / k < 0.25 * n as f64 && k * h > 3.0);
        let found = -RunLength::new(k, h, 0.0).expect("valid").survival(n).ln() / a;
        let (low, high) = ratio(k, h, n, a);
        prop_assert!((low..=high).contains(&found), "k {k}, n {n}, alpha {alpha}: {found}, not {low} to {high}");

        // In thresholds, as ln ARL grows by nearly 2 k for each unit, and never by much less.
        let exact = exact_threshold_for_horizon(k, n, alpha, Sides::One).expect("there is one");
        let apart = low.ln().abs().max(high.ln().abs()) / (1.5 * k) + 1e-6;
        prop_assert!((h - exact).abs() <= apart, "k {k}, n {n}, alpha {alpha}: {h}, {exact}, {apart}");
        // Steps are whole, which is half a step the other way, a times.
        if a < 0.2 {
            prop_assert!(exact <= h);
        }
    }
}

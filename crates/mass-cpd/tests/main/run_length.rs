//! How the two thresholds for a horizon are related.

use mass_cpd::run_length::{RunLength, Sides, exact_threshold_for_horizon, threshold_for_horizon};
use proptest::prelude::*;

use crate::horizon::ratio;

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

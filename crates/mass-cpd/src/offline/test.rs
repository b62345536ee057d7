//! The maximum-CUSUM test.

use super::series::{edges, mean_and_square};
use crate::training_monitor::long_run_variance;

/// `max_j |S_j - (j / m) S_m| / sqrt(m)` and the `j` that attains it, in 1..m.
pub(super) fn max_cusum(y: &[f64]) -> (f64, usize) {
    let m = y.len() as f64;
    let mean = y.iter().sum::<f64>() / m;
    let (mut sum, mut best, mut at) = (0.0f64, 0.0, 1);
    for (j, v) in y[..y.len() - 1].iter().enumerate() {
        sum += v - mean;
        if sum.abs() > best {
            best = sum.abs();
            at = j + 1;
        }
    }
    (best / m.sqrt(), at)
}

/// Square root of the long-run variance of what a segmentation leaves over.
pub(super) fn long_run_deviation(y: &[f64], indices: &[usize]) -> f64 {
    let edges = edges(indices, y.len());
    let mut rest = Vec::with_capacity(y.len());
    for e in edges.windows(2) {
        let segment = &y[e[0]..e[1]];
        let (mean, _) = mean_and_square(segment);
        rest.extend(segment.iter().map(|v| v - mean));
    }
    let square: f64 = rest.iter().map(|r| r * r).sum();
    // Each level that was fitted has taken a degree of freedom.
    let n = y.len() as f64;
    let fitted = (edges.len() - 1) as f64;
    (long_run_variance(&rest, square) * n / (n - fitted).max(1.0)).sqrt()
}

/// `P(sup |B| >= t)` for a Brownian bridge (Kolmogorov's distribution). No spread is no evidence, unless there
/// is a difference.
pub(super) fn bridge_p_value(t: f64) -> f64 {
    if t.is_nan() || t <= 0.2 {
        return 1.0;
    }
    if t < 0.6 {
        // The other theta series converges fast here.
        let pi = std::f64::consts::PI;
        let stay: f64 = (0..10)
            .map(|j| {
                let odd = f64::from(2 * j + 1);
                (-(odd * pi / t).powi(2) / 8.0).exp()
            })
            .sum();
        return (1.0 - (2.0 * pi).sqrt() / t * stay).clamp(0.0, 1.0);
    }
    let mut p = 0.0;
    for j in 1..=20i32 {
        let term = 2.0 * (-2.0 * f64::from(j * j) * t * t).exp();
        p += if j % 2 == 1 { term } else { -term };
    }
    p.clamp(0.0, 1.0)
}

#[cfg(test)]
mod tests {
    use super::{bridge_p_value, max_cusum};

    #[test]
    fn kolmogorov_s_distribution_has_its_known_quantiles() {
        for (t, p) in [(1.223_85, 0.10), (1.358_10, 0.05), (1.627_62, 0.01)] {
            assert!((bridge_p_value(t) - p).abs() < 1e-5, "{t}");
        }
        assert!((bridge_p_value(0.6 - 1e-12) - bridge_p_value(0.6)).abs() < 1e-10);
        assert_eq!(bridge_p_value(f64::INFINITY), 0.0);
    }

    #[test]
    fn the_largest_cusum_is_where_the_step_is() {
        let mut y = vec![0.0; 30];
        y[12..].fill(1.0);
        assert_eq!(max_cusum(&y).1, 12);
    }
}

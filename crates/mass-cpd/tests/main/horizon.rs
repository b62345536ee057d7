//! How far the two thresholds for a horizon can lie from each other.

/// What a start at zero saves: the mean time in which a chart reaches its steady state, of a Brownian motion with drift `-k` that is
/// reflected at zero, `h / k - 1 / k^2`, with Siegmund's correction of `h` for the overshoot.
pub(crate) fn saved(k: f64, h: f64) -> f64 {
    (h + 1.166) / k - 1.0 / (k * k)
}

/// The least and the most that `-ln(no signal in n steps) / (n / ARL)` can be where `n / ARL` is `a`.
///
/// The run length is `D` steps and then a geometric time of mean `ARL - D`. So the quotient is `(1 - D/n) / (1 - a D/n)`, but for steps being
/// whole: with `a < 1` a chart from zero signals a little less often, with `a > 1` more often. `D` is known to a quarter and two steps.
pub(crate) fn ratio(k: f64, h: f64, n: u64, a: f64) -> (f64, f64) {
    let n = n as f64;
    let of = |d: f64| -(n - d) * f64::ln_1p(-1.0 / (n / a - d)) / a;
    let d = saved(k, h);
    let (low, high) = (of((0.75 * d - 2.0).max(0.0)), of(1.25 * d + 2.0));
    (low.min(high) - 1e-7, low.max(high) + 1e-7)
}

//! The standard normal distribution.

use std::f64::consts::{FRAC_1_SQRT_2, PI};

use std::sync::LazyLock;

use libm::erfc;

use crate::cusum::split;

/// `1 - Phi(x)`, without the cancellation that `1 - cdf` has in the tail.
#[inline]
pub(crate) fn survival(x: f64) -> f64 {
    0.5 * erfc(x * FRAC_1_SQRT_2)
}

/// `Phi(x)`.
pub(crate) fn cdf(x: f64) -> f64 {
    survival(-x)
}

/// The `x` with `1 - Phi(x) = q`, for `q` in (0, 1), to about 1e-15 of its size.
///
/// Wichura's algorithm AS 241 (Applied Statistics 37, 1988).
pub(crate) fn upper_quantile(q: f64) -> f64 {
    let centre = 0.5 - q;
    if centre.abs() <= 0.425 {
        let r = 0.180625 - centre * centre;
        return centre * polynomial(&CENTRE[0], r) / polynomial(&CENTRE[1], r);
    }
    let tail = if centre > 0.0 { q } else { 1.0 - q };
    let r = (-tail.ln()).sqrt();
    let size = if r <= 5.0 {
        polynomial(&TAIL[0], r - 1.6) / polynomial(&TAIL[1], r - 1.6)
    } else {
        polynomial(&FAR_TAIL[0], r - 5.0) / polynomial(&FAR_TAIL[1], r - 5.0)
    };
    size.copysign(centre)
}

fn polynomial(coefficients: &[f64; 8], x: f64) -> f64 {
    coefficients.iter().rev().fold(0.0, |sum, c| sum * x + c)
}

const CENTRE: [[f64; 8]; 2] = [
    [
        3.3871328727963666080,
        1.3314166789178437745e2,
        1.9715909503065514427e3,
        1.3731693765509461125e4,
        4.5921953931549871457e4,
        6.7265770927008700853e4,
        3.3430575583588128105e4,
        2.5090809287301226727e3,
    ],
    [
        1.0,
        4.2313330701600911252e1,
        6.8718700749205790830e2,
        5.3941960214247511077e3,
        2.1213794301586595867e4,
        3.9307895800092710610e4,
        2.8729085735721942674e4,
        5.2264952788528545610e3,
    ],
];
const TAIL: [[f64; 8]; 2] = [
    [
        1.42343711074968357734,
        4.63033784615654529590,
        5.76949722146069140550,
        3.64784832476320460504,
        1.27045825245236838258,
        2.41780725177450611770e-1,
        2.27238449892691845833e-2,
        7.74545014278341407640e-4,
    ],
    [
        1.0,
        2.05319162663775882187,
        1.67638483018380384940,
        6.89767334985100004550e-1,
        1.48103976427480074590e-1,
        1.51986665636164571966e-2,
        5.47593808499534494600e-4,
        1.05075007164441684324e-9,
    ],
];
const FAR_TAIL: [[f64; 8]; 2] = [
    [
        6.65790464350110377720,
        5.46378491116411436990,
        1.78482653991729133580,
        2.96560571828504891230e-1,
        2.65321895265761230930e-2,
        1.24266094738807843860e-3,
        2.71155556874348757815e-5,
        2.01033439929228813265e-7,
    ],
    [
        1.0,
        5.99832206555887937690e-1,
        1.36929880922735805310e-1,
        1.48753612908506148525e-2,
        7.86869131145613259100e-4,
        1.84631831751005468180e-5,
        1.42151175831644588870e-7,
        2.04426310338993978564e-15,
    ],
];

/// The density.
pub(crate) fn density(x: f64) -> f64 {
    (-0.5 * x * x).exp() / (2.0 * PI).sqrt()
}

/// Cells of the table per unit, and where the table ends.
const PER_UNIT: f64 = 32.0;
const END: usize = 12;

/// One cubic a cell, in the cell's own coordinate, through the values and slopes at its ends.
static TABLE: LazyLock<Vec<[f64; 4]>> = LazyLock::new(|| {
    (0..END * PER_UNIT as usize)
        .map(|i| {
            let [left, right] = [i, i + 1].map(|i| i as f64 / PER_UNIT);
            let (p0, p1) = (survival(left), survival(right));
            let (d0, d1) = (-density(left) / PER_UNIT, -density(right) / PER_UNIT);
            let rise = p1 - p0;
            [p0, d0, 3.0 * rise - 2.0 * d0 - d1, d0 + d1 - 2.0 * rise]
        })
        .collect()
});

/// `1 - Phi(x)` to a fraction of 6e-5 of its value (2e-8 of it within two standard deviations), at a tenth of
/// the cost of [`survival`].
#[inline]
pub(crate) fn quick_survival(x: f64) -> f64 {
    let Some((cell, u)) = split(x.abs() * PER_UNIT) else {
        return survival(x);
    };
    let Some(&[c0, c1, c2, c3]) = TABLE.get(cell) else {
        return survival(x);
    };
    let tail = c0 + u * (c1 + u * (c2 + u * c3));
    if x < 0.0 { 1.0 - tail } else { tail }
}

#[cfg(test)]
mod tests {
    use super::{quick_survival, survival, upper_quantile};

    #[test]
    fn the_quantile_is_the_inverse_of_the_tail() {
        for i in -75..75 {
            let x = f64::from(i) * 0.1;
            let back = upper_quantile(survival(x));
            // On the left the tail is next to one, whose digits are spent.
            let bound = 1e-13
                + if x < 0.0 {
                    1e-16 / super::density(x)
                } else {
                    0.0
                };
            assert!((back - x).abs() <= bound * (1.0 + x.abs()), "{x}: {back}");
        }
    }

    #[test]
    fn quick_survival_is_as_exact_as_it_says() {
        for i in -20_000..20_000 {
            let x = f64::from(i) * 1e-3;
            let bound = if x.abs() < 2.0 { 2e-8 } else { 6e-5 };
            assert!(
                (quick_survival(x) / survival(x) - 1.0).abs() <= bound,
                "{x}"
            );
        }
    }
}

//! What is monitored of an observation.

use super::{Transform, score::ln};
use crate::{CpdError, error::require_finite};

/// The largest magnitude whose products, six at a time and summed, stay finite.
pub(crate) const LARGEST: f64 = 1e40;

/// What is monitored of the observation after the first `count`.
#[inline]
pub(crate) fn transform(x: f64, transform: Transform, count: u64) -> Result<f64, CpdError> {
    match transform {
        Transform::Identity if x.abs() <= LARGEST => Ok(x),
        Transform::Log if (f64::MIN_POSITIVE..=f64::MAX).contains(&x) => Ok(ln(x)),
        _ => unusual(x, transform, count),
    }
}

#[cold]
fn unusual(x: f64, transform: Transform, count: u64) -> Result<f64, CpdError> {
    require_finite(x, count)?;
    let (count, value) = (count + 1, x);
    match transform {
        Transform::Identity => Err(CpdError::TooLarge {
            count,
            value,
            limit: LARGEST,
        }),
        Transform::Log if x > 0.0 => Ok(x.ln()),
        Transform::Log => Err(CpdError::NonPositive { count, value }),
    }
}

/// The same for many at once. Says whether all were as usual; if not, the output means nothing.
#[inline]
pub(crate) fn transform_all(xs: &[f64], out: &mut [f64], transform: Transform) -> bool {
    let mut usual = true;
    match transform {
        Transform::Identity => {
            for (y, &x) in out.iter_mut().zip(xs) {
                usual &= x.abs() <= LARGEST;
                *y = x;
            }
        }
        Transform::Log => {
            for (y, &x) in out.iter_mut().zip(xs) {
                usual &= (f64::MIN_POSITIVE..=f64::MAX).contains(&x);
                *y = ln(x);
            }
        }
    }
    usual
}

/// Noise of the model reaches a score of this size once in 10^15 steps.
const CERTAIN: f64 = 8.0;

/// The score with its size limited, and that of a certain one by the other limit.
#[inline(always)]
pub(crate) fn bounded(z: f64, (limit, certain): (f64, f64)) -> f64 {
    let limit = if z.abs() > CERTAIN { certain } else { limit };
    let z = if z > limit { limit } else { z };
    if z < -limit { -limit } else { z }
}

/// The same for one score, which is seldom over the limit.
#[inline(always)]
pub(crate) fn seldom_bounded(z: f64, limits: (f64, f64)) -> f64 {
    #[cold]
    #[inline(never)]
    fn over(z: f64, limits: (f64, f64)) -> f64 {
        bounded(z, limits)
    }
    if z.abs() <= limits.0 {
        z
    } else {
        over(z, limits)
    }
}

//! Arithmetic of two precisions, so that one search serves both.

use std::ops::{Add, Mul, Sub};

/// What sums of squares are computed in: `f64`, or [`Double`] where these would cancel.
pub(super) trait Number:
    Copy + PartialOrd + Add<Output = Self> + Sub<Output = Self> + Mul<Output = Self>
{
    fn of(x: f64) -> Self;
    fn value(self) -> f64;
    /// Divided by `m`.
    fn over(self, m: f64) -> Self;
}

impl Number for f64 {
    #[inline]
    fn of(x: f64) -> Self {
        x
    }

    #[inline]
    fn value(self) -> f64 {
        self
    }

    #[inline]
    fn over(self, m: f64) -> Self {
        self / m
    }
}

/// The unevaluated sum of two `f64`, good to about 104 bits.
///
/// Joldes, Muller & Popescu, ACM Transactions on Mathematical Software 44 (2017), algorithms 6, 12 and 15. (The crate
/// `twofloat` 0.8 divides without the fused step that algorithm 18 needs, which leaves 53 bits.)
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub(super) struct Double {
    // In this order, so that the derived comparison is right: `high` is the sum rounded.
    high: f64,
    low: f64,
}

impl Double {
    /// Of two numbers of which the first is the larger, or zero.
    fn ordered(a: f64, b: f64) -> Self {
        let high = a + b;
        Self {
            high,
            low: b - (high - a),
        }
    }

    fn sum(a: f64, b: f64) -> Self {
        let high = a + b;
        let of_a = high - b;
        let of_b = high - of_a;
        Self {
            high,
            low: (a - of_a) + (b - of_b),
        }
    }

    fn product(a: f64, b: f64) -> Self {
        let high = a * b;
        Self {
            high,
            low: a.mul_add(b, -high),
        }
    }
}

impl Add for Double {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        let high = Self::sum(self.high, other.high);
        let low = Self::sum(self.low, other.low);
        let first = Self::ordered(high.high, high.low + low.high);
        Self::ordered(first.high, low.low + first.low)
    }
}

impl Sub for Double {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        self + Self {
            high: -other.high,
            low: -other.low,
        }
    }
}

impl Mul for Double {
    type Output = Self;

    fn mul(self, other: Self) -> Self {
        let high = Self::product(self.high, other.high);
        let cross = self.high.mul_add(other.low, self.low * other.low);
        let cross = self.low.mul_add(other.high, cross);
        Self::ordered(high.high, high.low + cross)
    }
}

impl Number for Double {
    fn of(x: f64) -> Self {
        Self { high: x, low: 0.0 }
    }

    fn value(self) -> f64 {
        self.high
    }

    fn over(self, m: f64) -> Self {
        let high = self.high / m;
        let back = Self::product(high, m);
        let rest = (self.high - back.high) - back.low + self.low;
        Self::ordered(high, rest / m)
    }
}

#[cfg(test)]
mod tests {
    use super::{Double, Number};

    #[test]
    fn a_hundred_bits_survive_every_operation() {
        // 2^80 + 1 and its like need more than one f64.
        let big = Double::of(2f64.powi(80));
        let one = Double::of(1.0);
        let sum = big + one;
        assert_eq!((sum - big).value(), 1.0);
        assert!(sum > big);
        // (2^50 + 1)^2 = 2^100 + 2^51 + 1.
        let root = Double::of(2f64.powi(50) + 1.0);
        let rest = root * root - Double::of(2f64.powi(100)) - Double::of(2f64.powi(51));
        assert_eq!(rest.value(), 1.0);
        // A third of (3 * 2^80 + 3).
        let three = Double::of(3.0 * 2f64.powi(80)) + Double::of(3.0);
        assert_eq!((three.over(3.0) - big).value(), 1.0);
        for m in [3.0, 7.0, 33.0, 49.0] {
            let back = root.over(m) * Double::of(m) - root;
            assert!(back.value().abs() <= 2f64.powi(50 - 102), "{m}: {back:?}");
        }
    }
}

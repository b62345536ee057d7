//! Monotone cubic interpolation on an even grid (Fritsch & Carlson 1980).

/// One cubic a cell, in the cell's own coordinate in [0, 1]: `c0 + c1 u + c2 u^2 + c3 u^3`.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Pchip {
    cells: Vec<[f64; 4]>,
    per_width: f64,
}

impl Pchip {
    /// One after the other, with a jump where one piece does not end where the next begins; at least two values each.
    pub(super) fn joined(pieces: &[Vec<f64>], width: f64) -> Self {
        Self {
            cells: pieces
                .iter()
                .flat_map(|piece| Self::new(piece, width).cells)
                .collect(),
            per_width: width.recip(),
        }
    }

    /// Through `values` at `0, width, 2 width, ..`; at least two values.
    pub(super) fn new(values: &[f64], width: f64) -> Self {
        let secant: Vec<f64> = values.windows(2).map(|v| v[1] - v[0]).collect();
        let slope = |i: usize| -> f64 {
            if i == 0 {
                return secant[0];
            }
            if i == secant.len() {
                return secant[i - 1];
            }
            let (a, b) = (secant[i - 1], secant[i]);
            // The harmonic mean keeps the cubic within its end points; zero at a turning point.
            if a * b > 0.0 {
                2.0 * a * b / (a + b)
            } else {
                0.0
            }
        };
        let cells = (0..secant.len())
            .map(|i| {
                let (d0, d1) = (slope(i), slope(i + 1));
                [
                    values[i],
                    d0,
                    3.0 * secant[i] - 2.0 * d0 - d1,
                    d0 + d1 - 2.0 * secant[i],
                ]
            })
            .collect();
        Self {
            cells,
            per_width: width.recip(),
        }
    }

    /// The value at `x >= 0`; `None` beyond the last point.
    #[inline]
    pub(super) fn at(&self, x: f64) -> Option<f64> {
        let (cell, u) = split(x * self.per_width)?;
        let [c0, c1, c2, c3] = self.cells.get(cell)?;
        Some(c0 + u * (c1 + u * (c2 + u * c3)))
    }

    pub(super) fn end(&self) -> f64 {
        self.cells.len() as f64 / self.per_width
    }
}

/// A place in a table as its cell and the coordinate in it, in [0, 1]; `None` beyond any table.
///
/// Adding 2^52 leaves the nearest whole number in the low bits: half of what a saturating conversion costs.
#[inline(always)]
pub(crate) fn split(place: f64) -> Option<(usize, f64)> {
    // And half of that again, so that the last bit of a place of 0 is a whole.
    const SHIFT: f64 = 1.5 * 4_503_599_627_370_496.0;
    if place >= 1e6 {
        return None;
    }
    // Half down, so that the nearest whole number is the cell's lower end; a place of 0 is a tie, and goes to the even 0.
    let shifted = (place - 0.5) + SHIFT;
    let cell = (shifted.to_bits() & 0xf_ffff) as usize;
    Some((cell, place - (shifted - SHIFT)))
}

//! Transposition in tiles that fit the registers.

/// Side of a tile: one AVX-512 register of `f32`.
const TILE: usize = 16;

/// `out[cols, rows] = a[rows, cols]ᵀ`.
///
/// # Panics
/// If a slice is shorter than `rows * cols`.
#[inline(always)]
pub fn transpose(a: &[f32], rows: usize, cols: usize, out: &mut [f32]) {
    let (whole_rows, whole_cols) = (rows - rows % TILE, cols - cols % TILE);
    for j in (0..whole_cols).step_by(TILE) {
        for i in (0..whole_rows).step_by(TILE) {
            let mut tile = [[0.0f32; TILE]; TILE];
            for (k, row) in (i..i + TILE).enumerate() {
                let row = &a[row * cols + j..][..TILE];
                for l in 0..TILE {
                    tile[l][k] = row[l];
                }
            }
            for (l, row) in tile.iter().enumerate() {
                out[(j + l) * rows + i..][..TILE].copy_from_slice(row);
            }
        }
    }
    for i in 0..rows {
        let from = if i < whole_rows { whole_cols } else { 0 };
        for j in from..cols {
            out[j * rows + i] = a[i * cols + j];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_changes_sides() {
        for (rows, cols) in [(1, 1), (16, 16), (5, 40), (33, 17), (48, 31), (0, 7)] {
            let a: Vec<f32> = (0..rows * cols).map(|i| i as f32).collect();
            let mut out = vec![-1.0; rows * cols];
            transpose(&a, rows, cols, &mut out);
            for i in 0..rows {
                for j in 0..cols {
                    assert_eq!(out[j * rows + i], a[i * cols + j], "{rows} x {cols}");
                }
            }
        }
    }
}

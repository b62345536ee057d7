//! y = x Wᵀ + b over blocks of rows.

use rayon::prelude::*;

use super::gemm::{Mat, MatMut, Store, gemm};
use super::{ROW_BLOCK, vector, vectorised};

/// Output rows of a weight gradient handled by one task.
const OUT_BLOCK: usize = 64;

/// `y[n, out] = x[n, inp] wᵀ + b`, with `w[out, inp]`.
pub fn forward(x: &[f32], w: &[f32], b: Option<&[f32]>, y: &mut [f32], inp: usize, out: usize) {
    y.par_chunks_mut(ROW_BLOCK * out)
        .zip(x.par_chunks(ROW_BLOCK * inp))
        .for_each(|(y, x)| {
            let rows = y.len() / out;
            if let Some(b) = b {
                for row in y.chunks_exact_mut(out) {
                    row.copy_from_slice(b);
                }
            }
            let store = if b.is_some() {
                Store::Add
            } else {
                Store::Replace
            };
            gemm(
                MatMut::new(y, rows, out),
                Mat::new(x, rows, inp),
                Mat::new(w, out, inp).t(),
                1.0,
                store,
            );
        });
}

/// `dx[n, inp] += dy[n, out] w`.
pub fn backward_input(dy: &[f32], w: &[f32], dx: &mut [f32], inp: usize, out: usize) {
    dx.par_chunks_mut(ROW_BLOCK * inp)
        .zip(dy.par_chunks(ROW_BLOCK * out))
        .for_each(|(dx, dy)| {
            let rows = dy.len() / out;
            gemm(
                MatMut::new(dx, rows, inp),
                Mat::new(dy, rows, out),
                Mat::new(w, out, inp),
                1.0,
                Store::Add,
            );
        });
}

/// `dw[out, inp] += dyᵀ x` and `db[out] += Σ_n dy`.
pub fn backward_weight(
    x: &[f32],
    dy: &[f32],
    dw: &mut [f32],
    db: Option<&mut [f32]>,
    inp: usize,
    out: usize,
) {
    let n = dy.len() / out;
    dw.par_chunks_mut(OUT_BLOCK * inp)
        .enumerate()
        .for_each(|(block, dw)| {
            let (first, rows) = (block * OUT_BLOCK, dw.len() / inp);
            let dy = Mat::strided(&dy[first.min(dy.len())..], n, rows, out).t();
            gemm(
                MatMut::new(dw, rows, inp),
                dy,
                Mat::new(x, n, inp),
                1.0,
                Store::Add,
            );
        });
    if let Some(db) = db {
        sum_rows(dy, db);
    }
}

/// `total[c] += Σ_r rows[r, c]`, in row order.
pub(crate) fn sum_rows(rows: &[f32], total: &mut [f32]) {
    vectorised(
        #[inline(always)]
        || {
            for row in rows.chunks_exact(total.len()) {
                vector::add_assign(total, row);
            }
        },
    );
}

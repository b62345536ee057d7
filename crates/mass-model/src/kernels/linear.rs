//! y = x Wᵀ + b over blocks of rows.

use rayon::prelude::*;

use super::gemm::{Mat, MatMut, Store, gemm};
use super::product::{self, Extras, product};
use super::task_rows;

/// Output rows of a weight gradient handled by one task: few tasks, because each packs all of the inputs.
fn out_block(out: usize) -> usize {
    let tasks = (2 * product::threads()).min(out / 96).max(1);
    out.div_ceil(tasks).next_multiple_of(16)
}

/// `y[n, out] = x[n, inp] wᵀ + b`, with `w[out, inp]`.
pub fn forward(x: &[f32], w: &[f32], b: Option<&[f32]>, y: &mut [f32], inp: usize, out: usize) {
    let rows = task_rows(x.len() / inp);
    y.par_chunks_mut(rows * out)
        .zip(x.par_chunks(rows * inp))
        .for_each(|(y, x)| {
            let rows = y.len() / out;
            let extras = Extras {
                bias: b,
                ..Extras::default()
            };
            let (x, w) = (Mat::new(x, rows, inp), Mat::new(w, out, inp).t());
            product(MatMut::new(y, rows, out), x, w, extras, |_| {});
        });
}

/// `dx[n, inp] = dy[n, out] w`, or the same added to it.
pub fn backward_input(
    dy: &[f32],
    w: &[f32],
    (dx, store): (&mut [f32], Store),
    (inp, out): (usize, usize),
) {
    let rows = task_rows(dy.len() / out);
    dx.par_chunks_mut(rows * inp)
        .zip(dy.par_chunks(rows * out))
        .for_each(|(dx, dy)| {
            let rows = dy.len() / out;
            gemm(
                MatMut::new(dx, rows, inp),
                Mat::new(dy, rows, out),
                Mat::new(w, out, inp),
                1.0,
                store,
            );
        });
}

/// `dw[out, inp] = dyᵀ x`, or the same added to it, and `db[out] += Σ_n dy`.
pub fn backward_weight(
    x: &[f32],
    dy: &[f32],
    dw: &mut [f32],
    db: Option<&mut [f32]>,
    (inp, out): (usize, usize),
    store: Store,
) {
    let n = dy.len() / out;
    let block = out_block(out);
    let part = |i: usize, dw: &mut [f32], sums: Option<&mut [f32]>| {
        let (first, rows) = (i * block, dw.len() / inp);
        let dy = Mat::strided(&dy[first.min(dy.len())..], n, rows, out).t();
        let extras = Extras {
            store,
            sums,
            ..Extras::default()
        };
        product(
            MatMut::new(dw, rows, inp),
            dy,
            Mat::new(x, n, inp),
            extras,
            |_| {},
        );
    };
    let dw = dw.par_chunks_mut(block * inp).enumerate();
    match db {
        None => dw.for_each(|(i, dw)| part(i, dw, None)),
        Some(db) => dw
            .zip(db.par_chunks_mut(block))
            .for_each(|((i, dw), db)| part(i, dw, Some(db))),
    }
}

use dfdx::prelude::{Cpu, Tape};
use rayon::prelude::*;

use super::{Activations, Rows};
use crate::error::ModelError;
use crate::kernels::scratch::Scratch;
use crate::kernels::vector;
use crate::param::Param;

/// `y[i] = Σ_t table_t[ids_t[i]]`: the sum of one row of each table, such as token, position and segment embeddings.
///
/// Each table is `[entries, d]` and comes with one index a row; the output is `[rows, d]`. This is where a tape starts.
///
/// # Errors
/// [`ModelError::Config`] without a table, [`ModelError::Shape`] if widths or numbers of indices differ or there is no row,
/// [`ModelError::Index`] for an index past the end of its table.
pub fn embedding<T: Tape<f32, Cpu>>(
    tables: &[(&Param, &[u32])],
    mut tape: T,
) -> Result<Rows<T>, ModelError> {
    run(&mut tape, tables)?.into_tensor(tape)
}

/// Number of rows, and their width.
pub(super) fn check(tables: &[(&Param, &[u32])]) -> Result<(usize, usize), ModelError> {
    let Some(&(first, ids)) = tables.first() else {
        return Err(ModelError::Config("an embedding needs a table".into()));
    };
    let (n, &[_, d]) = (ids.len(), first.shape()) else {
        return Err(ModelError::shape("embedding table", &[0, 0], first.shape()));
    };
    for &(table, ids) in tables {
        let &[entries, width] = table.shape() else {
            return Err(ModelError::shape("embedding table", &[0, d], table.shape()));
        };
        if width != d {
            let what = "embedding table";
            return Err(ModelError::shape(what, &[entries, d], &[entries, width]));
        }
        if ids.len() != n || n == 0 {
            return Err(ModelError::shape("indices", &[n.max(1)], &[ids.len()]));
        }
        if let Some(position) = ids.iter().position(|&id| id as usize >= entries) {
            return Err(ModelError::Index {
                what: "token",
                index: ids[position],
                position,
                len: entries,
            });
        }
    }
    Ok((n, d))
}

/// [`embedding`]
pub(super) fn run<T: Tape<f32, Cpu>>(
    tape: &mut T,
    tables: &[(&Param, &[u32])],
) -> Result<Activations, ModelError> {
    let (n, d) = check(tables)?;
    let mut read = Vec::with_capacity(tables.len());
    for &(table, ids) in tables {
        read.push((table.try_values()?, ids));
    }
    let mut y = Scratch::take(n * d);
    y.par_chunks_mut(d).enumerate().for_each(|(i, row)| {
        let mut parts = read.iter().map(|(table, ids)| entry(table, ids[i], d));
        row.copy_from_slice(parts.next().unwrap_or_default());
        for part in parts {
            vector::add_assign(row, part);
        }
    });
    let tables: Vec<_> = tables
        .iter()
        .map(|(t, ids)| (t.handle(), ids.to_vec()))
        .collect();
    Activations::output(tape, y, (n, d), move |g, dy| {
        for (handle, ids) in &tables {
            let mut gradient = handle.take(g)?;
            for (row, &id) in dy.chunks_exact(d).zip(ids) {
                vector::add_assign(&mut gradient[id as usize * d..][..d], row);
            }
            handle.put(g, gradient)?;
        }
        Ok(())
    })
}

fn entry(table: &[f32], id: u32, d: usize) -> &[f32] {
    &table[id as usize * d..][..d]
}

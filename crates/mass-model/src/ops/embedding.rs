use dfdx::prelude::{Cpu, PutTape, Tape, TensorFromVec};

use super::{Rows, take_gradient};
use crate::error::ModelError;
use crate::kernels::vector;
use crate::param::Param;

/// `y[i] = table[ids[i]] + positions[i mod seq]`: token embeddings plus learned positions.
///
/// `table: [vocab, d]`, `positions: [at least seq, d]`; the output is `[ids.len(), d]`. This is where a tape starts.
///
/// # Errors
/// [`ModelError::Index`] for a token past the end of the table, [`ModelError::Shape`] if `seq` does not divide the number
/// of tokens or is longer than `positions`.
pub fn embedding<T: Tape<f32, Cpu>>(
    ids: &[u32],
    seq: usize,
    table: &Param,
    positions: &Param,
    mut tape: T,
) -> Result<Rows<T>, ModelError> {
    let (&[vocab, d], &[longest, width]) = (table.shape(), positions.shape()) else {
        return Err(ModelError::shape("embedding table", &[0, 0], table.shape()));
    };
    if width != d {
        return Err(ModelError::shape(
            "position embeddings",
            &[longest, d],
            &[longest, width],
        ));
    }
    if ids.is_empty() || seq == 0 || seq > longest || !ids.len().is_multiple_of(seq) {
        return Err(ModelError::shape(
            "tokens (batch x sequence)",
            &[1, longest],
            &[ids.len(), seq],
        ));
    }
    if let Some(position) = ids.iter().position(|&id| id as usize >= vocab) {
        return Err(ModelError::Index {
            what: "token",
            index: ids[position],
            position,
            len: vocab,
        });
    }
    let mut y = vec![0.0; ids.len() * d];
    for (i, (row, &id)) in y.chunks_exact_mut(d).zip(ids).enumerate() {
        row.copy_from_slice(&table.values()[id as usize * d..][..d]);
        vector::add_assign(row, &positions.values()[(i % seq) * d..][..d]);
    }
    let y = Cpu::default().try_tensor_from_vec(y, (ids.len(), d))?;
    if T::OWNS_TAPE {
        let y_ghost = y.ghost();
        let (ids, table, positions) = (ids.to_vec(), table.handle(), positions.handle());
        tape.add_backward_op(move |g| {
            let dy = take_gradient!(g, y_ghost);
            let (mut dt, mut dp) = (table.take(g)?, positions.take(g)?);
            for (i, (row, &id)) in dy.chunks_exact(d).zip(&ids).enumerate() {
                vector::add_assign(&mut dt[id as usize * d..][..d], row);
                vector::add_assign(&mut dp[(i % seq) * d..][..d], row);
            }
            table.put(g, dt)?;
            positions.put(g, dp)
        });
    }
    Ok(y.put_tape(tape))
}

//! Rows of tables: embeddings, and rows picked out of a matrix.

use super::{Placed, Store, each, given, int, product};
use crate::driver::Arguments;
use crate::{Buffer, CudaError, Device, View, ViewMut};

/// Rows of a list that are added up in one piece.
const PIECE: usize = 64;

/// Refuses an index past the end.
pub(super) fn check(what: &'static str, ids: &[u32], len: usize) -> Result<(), CudaError> {
    match ids.iter().position(|&id| id as usize >= len) {
        None => Ok(()),
        Some(position) => Err(CudaError::Index {
            what,
            index: ids[position] as usize,
            position,
            len,
        }),
    }
}

/// Which row of a table each row of an output is, and for the backward pass, which rows each entry is.
#[derive(Debug)]
pub struct Index {
    ids: Buffer<u32>,
    /// Number of entries of the table.
    entries: usize,
    /// Rows, sorted by entry, ascending within one.
    list: Buffer<u32>,
    /// Where each piece of the list begins, and its end; entries do not share pieces.
    starts: Buffer<u32>,
    /// The entries that are there, and where each one's pieces begin.
    used: Buffer<u32>,
    pieces: Buffer<u32>,
}

impl Index {
    /// Brings indices into a table of so many entries to the device.
    ///
    /// # Errors
    /// [`CudaError::Index`] for one past the end, [`CudaError::TooLarge`] for too many, [`CudaError::OutOfMemory`],
    /// [`CudaError::Call`].
    pub fn new(device: &Device, ids: &[u32], entries: usize) -> Result<Self, CudaError> {
        check("row of a table", ids, entries)?;
        let n = int("rows of an index", ids.len())?;
        let mut list: Vec<u32> = (0..n).collect();
        // Stable: rows of an entry stay in order.
        list.sort_by_key(|&row| ids[row as usize]);
        let (mut starts, mut used, mut pieces) = (Vec::new(), Vec::new(), Vec::new());
        let mut first = 0;
        while first < list.len() {
            let entry = ids[list[first] as usize];
            let same = list[first..]
                .iter()
                .take_while(|&&row| ids[row as usize] == entry)
                .count();
            used.push(entry);
            pieces.push(starts.len() as u32);
            starts.extend(
                (first..first + same)
                    .step_by(PIECE)
                    .map(|start| start as u32),
            );
            first += same;
        }
        pieces.push(starts.len() as u32);
        starts.push(n);
        Ok(Self {
            ids: Buffer::from_slice(device, ids)?,
            entries,
            list: Buffer::from_slice(device, &list)?,
            starts: Buffer::from_slice(device, &starts)?,
            used: Buffer::from_slice(device, &used)?,
            pieces: Buffer::from_slice(device, &pieces)?,
        })
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// The indices.
    pub fn ids(&self) -> View<'_, u32> {
        self.ids.view()
    }

    /// Checks a table and its picked rows; their width.
    fn width(
        &self,
        device: &Device,
        (what, rows): (&'static str, &dyn Placed),
        table: &dyn Placed,
    ) -> Result<u32, CudaError> {
        let width = table.values().checked_div(self.entries).unwrap_or(0);
        given(
            device,
            &[
                ("table", table, product("table", &[width, self.entries])?),
                (what, rows, product("rows", &[width, self.len()])?),
                ("index", &self.ids, self.len()),
            ],
        )?;
        int("width", width)
    }
}

/// `y[i] = table[ids[i]]`, or the same added to it: one table of an embedding, or rows picked out of a matrix.
///
/// # Errors
/// [`CudaError::Length`] if lengths do not fit the index, [`CudaError::Call`], [`CudaError::OtherDevice`].
pub fn forward(
    device: &Device,
    table: View<'_, f32>,
    index: &Index,
    y: ViewMut<'_, f32>,
    store: Store,
) -> Result<(), CudaError> {
    let width = index.width(device, ("y", &y), &table)?;
    let arguments = Arguments::new()
        .view(table)
        .view(index.ids())
        .view_mut(&y)
        .long(y.len());
    each(
        device,
        "embedding_forward",
        y.len(),
        &arguments.int(width).int(store.add()),
    )
}

/// `dtable[ids[i]] += dy[i]`: the rows of an entry in order, 64 at a time, then those sums. To write and not add,
/// clear `dtable` first.
///
/// # Errors
/// As [`forward`], and [`CudaError::OutOfMemory`].
pub fn backward(
    device: &Device,
    dy: View<'_, f32>,
    index: &Index,
    dtable: ViewMut<'_, f32>,
) -> Result<(), CudaError> {
    let (list, starts) = (index.list.view(), index.starts.view());
    let width = index.width(device, ("dy", &dy), &dtable)?;
    let d = width as usize;
    let across = super::grid_y("width in blocks", d.div_ceil(256))?;
    if dy.is_empty() {
        return Ok(());
    }
    let pieces = starts.len() - 1;
    let mut parts = Buffer::<f32>::uninitialised(device, product("partial sums", &[pieces, d])?)?;
    let (pieces, used) = (int("pieces", pieces)?, int("entries", index.used.len())?);
    let arguments = Arguments::new()
        .view(dy)
        .view(list)
        .view(starts)
        .view_mut(&parts.view_mut())
        .int(width);
    device.launch("embedding_parts", (pieces, across), 256, &arguments)?;
    let arguments = Arguments::new()
        .view(parts.view())
        .view(index.used.view())
        .view(index.pieces.view());
    let arguments = arguments.view_mut(&dtable).int(width);
    device.launch("embedding_sums", (used, across), 256, &arguments)
}

//! Sums over vectors and over columns, in two stages of one fixed order.

use super::{given, grid_y, halves, int, product, rows_of};
use crate::driver::Arguments;
use crate::{Buffer, CudaError, Device, View, ViewMut};

/// Values of a vector whose product is summed in single precision.
const BLOCK: usize = 4096;

/// `<a, b>` of each pair: blocks of 4096 in single precision, their sums in double, as mass-model's `sum_of_squares`.
/// Waits for the device.
///
/// # Errors
/// [`CudaError::Length`] if the two of a pair differ in length, [`CudaError::OutOfMemory`], [`CudaError::Call`],
/// [`CudaError::OtherDevice`].
pub fn dots(
    device: &Device,
    pairs: &[(View<'_, f32>, View<'_, f32>)],
) -> Result<Vec<f64>, CudaError> {
    if pairs.is_empty() {
        return Ok(Vec::new());
    }
    let mut table = Vec::with_capacity(8 * pairs.len());
    let mut blocks = 0_usize;
    for (a, b) in pairs {
        given(
            device,
            &[
                ("first of a pair", a, a.len()),
                ("second of a pair", b, a.len()),
            ],
        )?;
        table.extend(
            [a.address(), b.address(), a.len() as u64]
                .into_iter()
                .flat_map(halves),
        );
        table.extend([int("blocks of vectors", blocks)?, 0]);
        blocks += a.len().div_ceil(BLOCK);
    }
    let count = int("vectors", pairs.len())?;
    let table = Buffer::from_slice(device, &table)?;
    let mut parts = Buffer::<f64>::uninitialised(device, blocks)?;
    let mut sums = Buffer::<f64>::uninitialised(device, pairs.len())?;
    let all = int("blocks of vectors", blocks)?;
    let arguments = Arguments::new()
        .view(table.view())
        .int(count)
        .int(all)
        .view_mut(&parts.view_mut());
    super::warps(device, "dot_parts", blocks, &arguments)?;
    let arguments = Arguments::new()
        .view(table.view())
        .view(parts.view())
        .view_mut(&sums.view_mut());
    device.launch("dot_sums", (count, 1), 256, &arguments)?;
    sums.to_vec()
}

/// `Σ x²` of each vector: [`dots`] with itself.
///
/// # Errors
/// As [`dots`].
pub fn sums_of_squares(device: &Device, vectors: &[View<'_, f32>]) -> Result<Vec<f64>, CudaError> {
    let pairs: Vec<_> = vectors.iter().map(|&v| (v, v)).collect();
    dots(device, &pairs)
}

/// The sum of a matrix's columns.
#[derive(Debug)]
pub struct ColumnSum<'a> {
    /// `[rows, cols]`
    pub x: View<'a, f32>,
    /// Multiplied with `x` element by element.
    pub times: Option<View<'a, f32>>,
    /// `[cols]`
    pub y: ViewMut<'a, f32>,
    /// Whether the sums are added to `y`.
    pub store: super::Store,
}

/// `y = Σ_rows x` for each job, or the same added to it: 256 rows at a time, then those sums in order.
///
/// # Errors
/// [`CudaError::Length`] if `x` has not whole rows, [`CudaError::OutOfMemory`], [`CudaError::Call`],
/// [`CudaError::OtherDevice`].
pub fn column_sums(device: &Device, jobs: Vec<ColumnSum<'_>>) -> Result<(), CudaError> {
    let mut table = Vec::with_capacity(12 * jobs.len());
    let (mut blocks, mut parts, mut widest, mut count) = (0_usize, 0_usize, 0_usize, 0_usize);
    for job in &jobs {
        let (n, cols) = (job.x.len(), job.y.len());
        let rows = rows_of("x of column sums", n, cols)?;
        given(
            device,
            &[
                ("x of column sums", &job.x, n),
                ("column sums", &job.y, cols),
            ],
        )?;
        if let Some(times) = &job.times {
            given(device, &[("factor of column sums", times, n)])?;
        }
        if cols == 0 {
            continue;
        }
        let longs = [
            job.x.address(),
            job.times.map_or(0, |t| t.address()),
            job.y.address(),
        ];
        table.extend(longs.into_iter().flat_map(halves));
        let width = int("columns", cols)?;
        let first = [
            int("blocks of column sums", blocks)?,
            int("partial sums", parts)?,
        ];
        table.extend([int("rows", rows)?, width, width, job.store.add()]);
        table.extend(first);
        blocks += rows.div_ceil(256) * cols.div_ceil(256);
        parts += product("partial sums", &[rows.div_ceil(256), cols])?;
        widest = widest.max(cols);
        count += 1;
    }
    if count == 0 {
        return Ok(());
    }
    int("partial sums", parts)?;
    let all = int("blocks of column sums", blocks)?;
    let grid = (
        int("columns", widest.div_ceil(256))?,
        grid_y("column sums", count)?,
    );
    let table = Buffer::from_slice(device, &table)?;
    let mut parts = Buffer::<f32>::uninitialised(device, parts)?;
    if blocks > 0 {
        let arguments = Arguments::new()
            .view(table.view())
            .int(grid.1)
            .view_mut(&parts.view_mut());
        device.launch("column_parts", (all, 1), 256, &arguments)?;
    }
    device.launch(
        "column_sums",
        grid,
        256,
        &Arguments::new().view(table.view()).view(parts.view()),
    )
}

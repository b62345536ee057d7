//! Multi-head self-attention over packed queries, keys and values, of sequences that lie end to end.
//!
//! Probabilities are never stored: of each row and head two numbers are kept, from which the backward pass makes them
//! anew, tile by tile, in the order of a fixed loop.

use super::{Dropout, Store, grid_y, halves, int, mask, product, same_device, warps};
use crate::driver::Arguments;
use crate::{Buffer, CudaError, Device, View, ViewMut};

/// The widest head there is a kernel for.
pub const WIDEST_HEAD: usize = 128;

/// Which rows belong together, and which may be attended to.
#[derive(Debug)]
pub struct Sequences {
    rows: usize,
    keys: Option<Buffer<u32>>,
    /// The offsets, of which tiles are made for each number of heads.
    offsets: Vec<usize>,
}

impl Sequences {
    /// Sequence i is rows `offsets[i]..offsets[i + 1]`; `keys` says of each row whether it may be attended to, all
    /// may without.
    ///
    /// # Errors
    /// [`CudaError::Setting`] for offsets that do not begin at zero or that fall, [`CudaError::Length`] if there is
    /// not one key a row, [`CudaError::TooLarge`], [`CudaError::OutOfMemory`], [`CudaError::Call`].
    pub fn new(
        device: &Device,
        offsets: &[usize],
        keys: Option<&[bool]>,
    ) -> Result<Self, CudaError> {
        if offsets.first() != Some(&0) || offsets.windows(2).any(|w| w[0] > w[1]) {
            return Err(CudaError::Setting {
                what: "offsets of sequences",
                got: format!("{:?}", &offsets[..offsets.len().min(8)]),
                wanted: "begin at 0 and do not fall",
            });
        }
        let rows = offsets[offsets.len() - 1];
        int("rows of sequences", rows)?;
        let keys = match keys {
            None => None,
            Some(keys) => {
                CudaError::check("keys", rows, keys.len())?;
                let keys: Vec<u32> = keys.iter().map(|&k| u32::from(k)).collect();
                Some(Buffer::from_slice(device, &keys)?)
            }
        };
        Ok(Self {
            rows,
            keys,
            offsets: offsets.to_vec(),
        })
    }

    /// Number of rows of all sequences together.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Tiles of so many rows: first row and length of the sequence, first row in it, and where its probabilities
    /// begin (modulo 2³², by which dropout goes).
    fn tiles(&self, device: &Device, heads: u32, side: usize) -> Result<Buffer<u32>, CudaError> {
        let mut tiles = Vec::new();
        let mut position = 0_u32;
        for window in self.offsets.windows(2) {
            let (start, length) = (window[0] as u32, (window[1] - window[0]) as u32);
            for first in (0..length).step_by(side) {
                tiles.extend([start, length, first, position]);
            }
            position = position.wrapping_add(heads.wrapping_mul(length).wrapping_mul(length));
        }
        Buffer::from_slice(device, &tiles)
    }
}

/// Heads, widths and rules.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionShape {
    /// Heads; divides `dim`.
    pub heads: usize,
    /// Model width.
    pub dim: usize,
    /// Whether a token sees only itself and earlier tokens.
    pub causal: bool,
    /// Applied to the attention probabilities. A mask's positions are those of mass-model.
    pub dropout: Option<Dropout>,
}

impl AttentionShape {
    /// The width that a kernel is compiled for: at least that of a head.
    fn compiled(&self) -> Result<usize, CudaError> {
        if self.heads == 0 || self.dim == 0 || !self.dim.is_multiple_of(self.heads) {
            return Err(CudaError::Setting {
                what: "heads of attention",
                got: format!("{} for a width of {}", self.heads, self.dim),
                wanted: "a number of heads that divides the width",
            });
        }
        let width = self.dim / self.heads;
        let compiled = [16, 32, 64, WIDEST_HEAD].into_iter().find(|&d| d >= width);
        compiled.ok_or(CudaError::TooLarge {
            what: "width of a head",
            got: width,
            most: WIDEST_HEAD,
        })
    }

    /// As the kernel's `Attention`.
    fn words(
        &self,
        qkv: View<'_, f32>,
        sequences: &Sequences,
        tiles: &Buffer<u32>,
    ) -> Result<Vec<u32>, CudaError> {
        let (rate, key) = mask(self.dropout)?;
        let scale = 1.0 / ((self.dim / self.heads) as f32).sqrt();
        let keys = sequences.keys.as_ref().map_or(0, |k| k.view().address());
        let addresses = [qkv.address(), keys, tiles.view().address()];
        let numbers = [
            int("heads", self.heads)?,
            int("width", self.dim)?,
            u32::from(self.causal),
            0,
            scale.to_bits(),
            rate.to_bits(),
        ];
        Ok(addresses
            .into_iter()
            .flat_map(halves)
            .chain(numbers)
            .chain(halves(key))
            .collect())
    }

    fn check(&self, rows: usize, all: &[(&'static str, usize, usize)]) -> Result<(), CudaError> {
        for &(what, len, factor) in all {
            CudaError::check(what, product("rows", &[rows, factor])?, len)?;
        }
        Ok(())
    }
}

/// `y = dropout(softmax(Q Kᵀ / √(dim/heads))) V` for each sequence and head.
///
/// `qkv` is `[rows, 3*dim]` (queries, keys, values side by side), `y` is `[rows, dim]`, and `kept: [rows, heads, 2]`
/// receives what [`backward`] needs: the largest score of each row and the inverse of its sum of exponentials. A row
/// that can see no key gives zeros.
///
/// # Errors
/// [`CudaError::Length`] if lengths do not fit, [`CudaError::Setting`] for heads that do not divide the width,
/// [`CudaError::TooLarge`] for heads wider than [`WIDEST_HEAD`], [`CudaError::OutOfMemory`], [`CudaError::Call`],
/// [`CudaError::OtherDevice`].
pub fn forward(
    device: &Device,
    qkv: View<'_, f32>,
    sequences: &Sequences,
    shape: AttentionShape,
    y: ViewMut<'_, f32>,
    kept: ViewMut<'_, f32>,
) -> Result<(), CudaError> {
    same_device(device, &[("qkv", &qkv), ("y", &y), ("kept", &kept)])?;
    let width = shape.compiled()?;
    let all = [
        ("qkv", qkv.len(), 3 * shape.dim),
        ("y", y.len(), shape.dim),
        ("kept", kept.len(), 2 * shape.heads),
    ];
    shape.check(sequences.rows, &all)?;
    let side = if width == WIDEST_HEAD { 32 } else { 64 };
    let tiles = sequences.tiles(device, int("heads", shape.heads)?, side)?;
    if tiles.is_empty() {
        return Ok(());
    }
    let words = shape.words(qkv, sequences, &tiles)?;
    let grid = (
        int("tiles of attention", tiles.len() / 4)?,
        grid_y("heads", shape.heads)?,
    );
    let arguments = Arguments::new()
        .structure(&words)
        .view_mut(&y)
        .view_mut(&kept);
    device.launch(&format!("attention_forward_{width}"), grid, 256, &arguments)
}

/// Writes to `dqkv`, or adds to it, the gradient for an upstream gradient `dy`, given `y` and what [`forward`] kept.
///
/// # Errors
/// As [`forward`].
#[allow(clippy::too_many_arguments)]
pub fn backward(
    device: &Device,
    qkv: View<'_, f32>,
    sequences: &Sequences,
    shape: AttentionShape,
    y: View<'_, f32>,
    kept: View<'_, f32>,
    dy: View<'_, f32>,
    (dqkv, store): (ViewMut<'_, f32>, Store),
) -> Result<(), CudaError> {
    same_device(
        device,
        &[
            ("qkv", &qkv),
            ("y", &y),
            ("kept", &kept),
            ("dy", &dy),
            ("dqkv", &dqkv),
        ],
    )?;
    let width = shape.compiled()?;
    let all = [
        ("qkv", qkv.len(), 3 * shape.dim),
        ("y", y.len(), shape.dim),
        ("kept", kept.len(), 2 * shape.heads),
        ("dy", dy.len(), shape.dim),
        ("dqkv", dqkv.len(), 3 * shape.dim),
    ];
    shape.check(sequences.rows, &all)?;
    let side = if width == WIDEST_HEAD { 16 } else { 32 };
    let tiles = sequences.tiles(device, int("heads", shape.heads)?, side)?;
    if tiles.is_empty() {
        return Ok(());
    }
    let pairs = sequences.rows * shape.heads;
    let mut delta = Buffer::<f32>::uninitialised(device, pairs)?;
    let arguments = Arguments::new()
        .view(dy)
        .view(y)
        .view_mut(&delta.view_mut());
    let arguments = arguments
        .int(int("rows and heads", pairs)?)
        .int(int("width", shape.dim / shape.heads)?);
    warps(device, "attention_delta", pairs, &arguments)?;
    let words = shape.words(qkv, sequences, &tiles)?;
    let grid = (
        int("tiles of attention", tiles.len() / 4)?,
        grid_y("heads", shape.heads)?,
    );
    let arguments = Arguments::new()
        .structure(&words)
        .view(dy)
        .view(kept)
        .view(delta.view())
        .view_mut(&dqkv);
    let arguments = arguments.int(store.add());
    device.launch(&format!("attention_queries_{width}"), grid, 256, &arguments)?;
    device.launch(&format!("attention_keys_{width}"), grid, 256, &arguments)
}

//! Multi-head self-attention over packed queries, keys and values, of sequences that lie end to end.
//!
//! Probabilities are never stored: of each row and head two numbers are kept, from which the backward pass makes them
//! anew, tile by tile, in the order of a fixed loop.

use super::{Dropout, Placed, Store, given, grid_y, halves, int, mask, product, warps};
use crate::driver::Arguments;
use crate::{Buffer, CudaError, Device, View, ViewMut};

/// The widest head there is a kernel for.
pub const WIDEST_HEAD: usize = 256;

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
    fn tiles(&self, heads: u32, side: usize) -> Vec<u32> {
        let mut tiles = Vec::new();
        let mut position = 0_u32;
        for window in self.offsets.windows(2) {
            let (start, length) = (window[0] as u32, (window[1] - window[0]) as u32);
            for first in (0..length).step_by(side) {
                tiles.extend([start, length, first, position]);
            }
            position = position.wrapping_add(heads.wrapping_mul(length).wrapping_mul(length));
        }
        tiles
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
        let compiled = [16, 32, 64, 128, WIDEST_HEAD]
            .into_iter()
            .find(|&d| d >= width);
        compiled.ok_or(CudaError::TooLarge {
            what: "width of a head",
            got: width,
            most: WIDEST_HEAD,
        })
    }

    /// Checks all that a pass is given, each with as many values a row, and makes what its kernels take: their width,
    /// the tiles of so many rows as `side` says of that width, and the kernel's `Attention`.
    fn pass(
        &self,
        device: &Device,
        qkv: View<'_, f32>,
        sequences: &Sequences,
        others: &[(&'static str, &dyn Placed, usize)],
        side: impl Fn(usize) -> usize,
    ) -> Result<Option<Pass>, CudaError> {
        let width = self.compiled()?;
        let (rate, key) = mask(self.dropout)?;
        let (heads, dim) = (int("heads", self.heads)?, int("width", self.dim)?);
        let grid_heads = grid_y("heads", self.heads)?;
        let rows = sequences.rows;
        let mut all = vec![("qkv", &qkv as &dyn Placed, 3 * self.dim)];
        all.extend_from_slice(others);
        for (_, _, values) in &mut all {
            *values = product("values of rows", &[rows, *values])?;
        }
        if let Some(keys) = &sequences.keys {
            all.push(("keys", keys, rows));
        }
        given(device, &all)?;
        let pairs = product("rows and heads", &[rows, self.heads])?;
        int("rows and heads", pairs)?;
        let tiles = sequences.tiles(heads, side(width));
        let grid = (int("tiles of attention", tiles.len() / 4)?, grid_heads);
        if tiles.is_empty() {
            return Ok(None);
        }
        let tiles = Buffer::from_slice(device, &tiles)?;
        let scale = 1.0 / ((self.dim / self.heads) as f32).sqrt();
        let keys = sequences.keys.as_ref().map_or(0, |k| k.view().address());
        let addresses = [qkv.address(), keys, tiles.view().address()];
        let numbers = [
            heads,
            dim,
            u32::from(self.causal),
            0,
            scale.to_bits(),
            rate.to_bits(),
        ];
        let words = addresses
            .into_iter()
            .flat_map(halves)
            .chain(numbers)
            .chain(halves(key));
        Ok(Some(Pass {
            width,
            grid,
            pairs,
            words: words.collect(),
            _tiles: tiles,
        }))
    }
}

/// What the kernels of a pass take.
struct Pass {
    /// The width of heads that they are compiled for.
    width: usize,
    /// Tiles and heads.
    grid: (u32, u32),
    /// Rows times heads.
    pairs: usize,
    /// As the kernel's `Attention`, which points at the tiles.
    words: Vec<u32>,
    _tiles: Buffer<u32>,
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
    let given: [(_, &dyn Placed, _); 2] = [
        ("y", &y, shape.dim),
        ("kept", &kept, shape.heads.saturating_mul(2)),
    ];
    let side = |width| if width > 64 { 32 } else { 64 };
    let Some(pass) = shape.pass(device, qkv, sequences, &given, side)? else {
        return Ok(());
    };
    let arguments = Arguments::new()
        .structure(&pass.words)
        .view_mut(&y)
        .view_mut(&kept);
    let kernel = format!("attention_forward_{}", pass.width);
    device.launch(&kernel, pass.grid, 256, &arguments)
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
    let given: [(_, &dyn Placed, _); 4] = [
        ("y", &y, shape.dim),
        ("kept", &kept, shape.heads.saturating_mul(2)),
        ("dy", &dy, shape.dim),
        ("dqkv", &dqkv, shape.dim.saturating_mul(3)),
    ];
    let side = |width| if width > 64 { 16 } else { 32 };
    let Some(pass) = shape.pass(device, qkv, sequences, &given, side)? else {
        return Ok(());
    };
    let Pass {
        width, grid, pairs, ..
    } = pass;
    let mut delta = Buffer::<f32>::uninitialised(device, pairs)?;
    let arguments = Arguments::new()
        .view(dy)
        .view(y)
        .view_mut(&delta.view_mut());
    let arguments = arguments
        .int(int("rows and heads", pairs)?)
        .int(int("width", shape.dim / shape.heads)?);
    warps(device, "attention_delta", pairs, &arguments)?;
    let arguments = Arguments::new()
        .structure(&pass.words)
        .view(dy)
        .view(kept)
        .view(delta.view())
        .view_mut(&dqkv);
    let arguments = arguments.int(store.add());
    device.launch(&format!("attention_queries_{width}"), grid, 256, &arguments)?;
    device.launch(&format!("attention_keys_{width}"), grid, 256, &arguments)
}

//! Matrix products, many at a time.
//!
//! `c (+)= epilogue(alpha a b)` for each of a table of jobs, in one launch. Each value is one chain of fused
//! multiply-adds over k, in order, whatever the sizes: the same bits for any tile and any other jobs beside it.

use super::{Activation, Store, given, halves, int, product, same_device};
use crate::driver::Arguments;
use crate::{Buffer, CudaError, Device, View, ViewMut};

/// A matrix to be read: element (i, j) is value `i row_stride + j col_stride`.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    values: View<'a, f32>,
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

/// A matrix to be written, row by row.
#[derive(Debug)]
pub struct MatrixMut<'a> {
    values: ViewMut<'a, f32>,
    rows: usize,
    cols: usize,
    row_stride: usize,
}

/// Values that a matrix spans.
fn span(rows: usize, cols: usize, row_stride: usize, col_stride: usize) -> Option<usize> {
    if rows == 0 || cols == 0 {
        return Some(0);
    }
    let last = (rows - 1)
        .checked_mul(row_stride)?
        .checked_add((cols - 1).checked_mul(col_stride)?)?;
    last.checked_add(1)
}

fn fits(what: &'static str, len: usize, span: Option<usize>) -> Result<(), CudaError> {
    match span {
        Some(wanted) if wanted <= len => Ok(()),
        other => Err(CudaError::Length {
            what,
            wanted: other.unwrap_or(usize::MAX),
            got: len,
        }),
    }
}

impl<'a> Matrix<'a> {
    /// A row-major matrix without gaps.
    ///
    /// # Errors
    /// [`CudaError::Length`] if there are fewer than `rows cols` values.
    pub fn new(values: View<'a, f32>, rows: usize, cols: usize) -> Result<Self, CudaError> {
        Self::strided(values, (rows, cols), cols, 1)
    }

    /// A matrix of any strides.
    ///
    /// # Errors
    /// [`CudaError::Length`] if an element lies outside of the values.
    pub fn strided(
        values: View<'a, f32>,
        (rows, cols): (usize, usize),
        row_stride: usize,
        col_stride: usize,
    ) -> Result<Self, CudaError> {
        fits(
            "matrix",
            values.len(),
            span(rows, cols, row_stride, col_stride),
        )?;
        Ok(Self {
            values,
            rows,
            cols,
            row_stride,
            col_stride,
        })
    }

    /// The transposed view.
    pub fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }

    /// Rows and columns.
    pub fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }
}

impl<'a> MatrixMut<'a> {
    /// A row-major matrix without gaps.
    ///
    /// # Errors
    /// [`CudaError::Length`] if there are fewer than `rows cols` values.
    pub fn new(values: ViewMut<'a, f32>, rows: usize, cols: usize) -> Result<Self, CudaError> {
        Self::strided(values, (rows, cols), cols)
    }

    /// A row-major matrix whose rows begin `row_stride` values apart.
    ///
    /// # Errors
    /// [`CudaError::Length`] if an element lies outside of the values, or rows overlap.
    pub fn strided(
        values: ViewMut<'a, f32>,
        (rows, cols): (usize, usize),
        row_stride: usize,
    ) -> Result<Self, CudaError> {
        fits(
            "matrix that is written",
            values.len(),
            span(rows, cols, row_stride, 1),
        )?;
        if rows > 1 && row_stride < cols {
            return Err(CudaError::Length {
                what: "distance of rows",
                wanted: cols,
                got: row_stride,
            });
        }
        Ok(Self {
            values,
            rows,
            cols,
            row_stride,
        })
    }
}

/// What follows a product before it is stored: `v = weight (alpha ab + bias)`, then the nonlinearity or the gate.
#[derive(Debug, Default)]
pub struct Epilogue<'a> {
    /// Added, one a column.
    pub bias: Option<View<'a, f32>>,
    /// Multiplied with each row, after the bias.
    pub row_weight: Option<View<'a, f32>>,
    /// What is done with the result.
    pub then: Then<'a>,
}

/// The last step of an epilogue. Slopes and factors lie as `c` does.
#[derive(Debug, Default)]
pub enum Then<'a> {
    /// Nothing.
    #[default]
    Nothing,
    /// The nonlinearity; its derivative goes to the slopes, if they are wanted.
    Activate(Activation, Option<ViewMut<'a, f32>>),
    /// `c = c v`: the result is the factor of a gated network on what `c` holds. If slopes and factors are given,
    /// `factors = c` (as it was) and `slopes = slopes v`: the derivatives by the factor and by what the nonlinearity
    /// was given.
    Gate(Option<(ViewMut<'a, f32>, ViewMut<'a, f32>)>),
}

/// One product.
#[derive(Debug)]
pub struct Job<'a> {
    /// `[m, k]`, or where rows are picked, any number of rows of width k.
    pub a: Matrix<'a>,
    /// Which rows of `a` are meant, one for each row of `c`; indices must be below `a`'s number of rows, which is not
    /// checked.
    pub rows: Option<View<'a, u32>>,
    /// `[k, n]`
    pub b: Matrix<'a>,
    /// `[m, n]`
    pub c: MatrixMut<'a>,
    /// Factor on the product.
    pub alpha: f32,
    /// Whether it is added to `c`. A gate takes `Replace`.
    pub store: Store,
    /// What follows.
    pub epilogue: Epilogue<'a>,
}

impl<'a> Job<'a> {
    /// `c = a b`.
    pub fn new(a: Matrix<'a>, b: Matrix<'a>, c: MatrixMut<'a>) -> Self {
        Self {
            a,
            rows: None,
            b,
            c,
            alpha: 1.0,
            store: Store::Replace,
            epilogue: Epilogue::default(),
        }
    }

    fn check(&self, device: &Device) -> Result<(), CudaError> {
        let (m, n, k) = (self.c.rows, self.c.cols, self.a.cols);
        same_device(
            device,
            &[
                ("a", &self.a.values),
                ("b", &self.b.values),
                ("c", &self.c.values),
            ],
        )?;
        match &self.rows {
            None => CudaError::check("rows of a", m, self.a.rows)?,
            Some(rows) => given(device, &[("picked rows of a", rows, m)])?,
        }
        CudaError::check("rows of b", k, self.b.rows)?;
        CudaError::check("columns of b", n, self.b.cols)?;
        if let Some(bias) = &self.epilogue.bias {
            given(device, &[("bias", bias, n)])?;
        }
        if let Some(weight) = &self.epilogue.row_weight {
            given(device, &[("weights of rows", weight, m)])?;
        }
        let beside = |what, values: &ViewMut<'_, f32>| {
            same_device(device, &[(what, values)])?;
            fits(what, values.len(), span(m, n, self.c.row_stride, 1))
        };
        match &self.epilogue.then {
            Then::Nothing | Then::Activate(_, None) | Then::Gate(None) => {}
            Then::Activate(_, Some(slopes)) => beside("slopes", slopes)?,
            Then::Gate(Some((slopes, factors))) => {
                beside("slopes", slopes)?;
                beside("factors", factors)?;
            }
        }
        let gate = matches!(self.epilogue.then, Then::Gate(_));
        if gate && self.store == Store::Add {
            return Err(CudaError::Setting {
                what: "store of a gate",
                got: "Add".into(),
                wanted: "Replace, because it multiplies what is there",
            });
        }
        let sizes = [m, n, k, self.c.row_stride];
        let strides = [
            self.a.row_stride,
            self.a.col_stride,
            self.b.row_stride,
            self.b.col_stride,
        ];
        for size in sizes.into_iter().chain(strides) {
            int("size or stride of a product", size)?;
        }
        Ok(())
    }

    /// As the kernel's `Job`.
    fn words(&self, first_tile: u32) -> Result<[u32; WORDS], CudaError> {
        let (act, gate, slope, factor) = match &self.epilogue.then {
            Then::Nothing => (0, 0, 0, 0),
            Then::Activate(act, slopes) => (
                *act as u32,
                0,
                slopes.as_ref().map_or(0, |s| s.address()),
                0,
            ),
            Then::Gate(None) => (0, 1, 0, 0),
            Then::Gate(Some((slopes, factors))) => (0, 1, slopes.address(), factors.address()),
        };
        let addresses = [
            self.a.values.address(),
            self.b.values.address(),
            self.c.values.address(),
            self.epilogue.bias.map_or(0, |b| b.address()),
            slope,
            factor,
            self.rows.map_or(0, |r| r.address()),
            self.epilogue.row_weight.map_or(0, |w| w.address()),
        ];
        let size = |n| int("size or stride of a product", n);
        let rest = [
            size(self.c.rows)?,
            size(self.c.cols)?,
            size(self.a.cols)?,
            size(self.a.row_stride)?,
            size(self.a.col_stride)?,
            size(self.b.row_stride)?,
            size(self.b.col_stride)?,
            size(self.c.row_stride)?,
            first_tile,
            self.store.add(),
            act,
            gate,
            self.alpha.to_bits(),
            0,
        ];
        let mut words = [0; WORDS];
        let all = addresses.into_iter().flat_map(halves).chain(rest);
        words.iter_mut().zip(all).for_each(|(to, from)| *to = from);
        Ok(words)
    }

    fn tiles(&self, side: usize) -> usize {
        self.c.rows.div_ceil(side) * self.c.cols.div_ceil(side)
    }
}

/// Words of the kernel's `Job`.
const WORDS: usize = 30;

/// The side of the tiles that a block computes. Large tiles are fastest where there are enough of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tile {
    /// 32 x 32
    Small,
    /// 64 x 64
    Middle,
    /// 128 x 128
    Large,
}

impl Tile {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Small, Self::Middle, Self::Large];

    fn side(self) -> usize {
        match self {
            Self::Small => 32,
            Self::Middle => 64,
            Self::Large => 128,
        }
    }

    /// Expected time of the jobs, in any unit: rounds of tiles, each as long as a tile takes. What a tile takes
    /// relative to its multiplications (by registers and loads, not measured on a GPU) falls with its side.
    fn cost(self, jobs: &[Job<'_>], multiprocessors: usize) -> f64 {
        let overhead = match self {
            Self::Small => 2.5,
            Self::Middle => 1.4,
            Self::Large => 1.0,
        };
        let side = self.side();
        let tiles: usize = jobs.iter().map(|job| job.tiles(side)).sum();
        let deepest = jobs.iter().map(|job| job.a.cols).max().unwrap_or(0);
        // Two blocks share a multiprocessor.
        let rounds = tiles.div_ceil(2 * multiprocessors) as f64;
        rounds * (side * side * (deepest + 32)) as f64 * overhead
    }

    /// The tile that promises the least time.
    fn best(jobs: &[Job<'_>], multiprocessors: usize) -> Self {
        let cost = |tile: &Self| tile.cost(jobs, multiprocessors);
        let best = Self::ALL
            .into_iter()
            .min_by(|a, b| cost(a).total_cmp(&cost(b)));
        best.unwrap_or(Self::Large)
    }
}

/// Computes all jobs in one launch.
///
/// # Errors
/// [`CudaError::Length`] if shapes do not fit, [`CudaError::Setting`] for a gate that adds, [`CudaError::TooLarge`]
/// for sizes, strides or numbers of tiles beyond 31 bits, [`CudaError::OutOfMemory`], [`CudaError::Call`],
/// [`CudaError::OtherDevice`].
pub fn run(device: &Device, jobs: &[Job<'_>]) -> Result<(), CudaError> {
    run_with(device, jobs, None)
}

/// [`run`] with tiles of a given side: what tests and benches need.
///
/// # Errors
/// As [`run`].
pub fn run_with(device: &Device, jobs: &[Job<'_>], tile: Option<Tile>) -> Result<(), CudaError> {
    for job in jobs {
        job.check(device)?;
    }
    let tile = tile.unwrap_or_else(|| Tile::best(jobs, device.multiprocessors()));
    let side = tile.side();
    let mut table = Vec::with_capacity(jobs.len() * WORDS);
    let mut tiles = 0;
    for job in jobs.iter().filter(|job| job.tiles(side) > 0) {
        table.extend(job.words(int("tiles of products", tiles)?)?);
        tiles += product("tiles of products", &[job.tiles(side)])?;
    }
    let grid = (int("tiles of products", tiles)?, 1);
    match table.len() / WORDS {
        0 => Ok(()),
        1 => device.launch(
            &format!("gemm_{side}"),
            grid,
            256,
            &Arguments::new().structure(&table),
        ),
        count => {
            let table = Buffer::from_slice(device, &table)?;
            let arguments = Arguments::new()
                .view(table.view())
                .int(int("products", count)?);
            device.launch(&format!("gemm_jobs_{side}"), grid, 256, &arguments)
        }
    }
}

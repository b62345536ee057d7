//! Blocked matrix products for x86: what [`gemm`](super::gemm::gemm) and the mixture's products are made of.
//!
//! `B` is packed in blocks that stay in the second-level cache; rows of `A` are read where they lie (a transposed `A` is
//! packed) by register tiles of 6 x 64 (AVX-512) or 6 x 16 (AVX2).
//!
//! # Bits
//! Each element is a chain of fused multiply-adds over a fixed run of steps, and the runs are added in order. Where they are
//! cut depends on the number of steps alone, so an element has the same bits whatever the rows, columns or threads that
//! the product is cut into, and on both instruction sets.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

use std::cell::RefCell;
use std::ops::Range;
use std::sync::LazyLock;

use super::gemm::{Mat, MatMut, Store, portable};
use super::scratch::Scratch;
use super::vector;

/// Most bytes of a packed block of `B`: half of the smallest second-level cache of today's servers.
const BLOCK_BYTES: usize = 512 << 10;

/// Most steps of one chain of multiply-adds.
const CHAIN: usize = 512;

/// Most steps for which `B` is packed at a time, and the same where `A` is packed too.
const STEPS: [usize; 2] = [1024, 512];

/// Columns of a block of `B` are a multiple of this, so that cuts do not depend on the instruction set.
const COLUMN_UNIT: usize = 32;

/// Most rows of a transposed `A` that are packed at a time.
const PACKED_ROWS: usize = 4096;

/// Steps packed at a time: writes are then runs of this many lines.
const PACKED_STEPS: usize = 16;

/// One cache line.
const LINE: usize = 16;

/// How far apart to keep rows of this width, so that they do not fall on few sets of the first-level cache.
pub(crate) fn row_stride(width: usize) -> usize {
    match width % 256 {
        0 => width + LINE,
        _ => width,
    }
}

/// Asks for a slice to be brought near. Nothing depends on it.
#[inline(always)]
pub(crate) fn prefetch(values: &[f32]) {
    #[cfg(target_arch = "x86_64")]
    avx2::prefetch(values);
    #[cfg(not(target_arch = "x86_64"))]
    let _ = values;
}

/// What an instruction set supplies. A value of it is proof that the processor has the instructions.
trait Isa: Copy {
    /// Rows of the register tile.
    const ROWS: usize;
    /// Columns of the register tile.
    const COLS: usize;
    /// `c (+)= scale * a b (+ bias)`, for one tile.
    fn tile(self, t: &Tile<'_>, c: &mut [f32]);
    /// Packs `b[k, n]`, rows `ld` apart, into panels `[n / COLS][k][COLS]`, filled up with zeros to a
    /// multiple of 16 columns.
    fn pack_rows(self, b: &[f32], ld: usize, size: (usize, usize), out: &mut [f32]);
    /// The same for a `b[k, n]` that is stored as `[n][k]`.
    fn pack_columns(self, b: &[f32], ld: usize, size: (usize, usize), out: &mut [f32]);
    /// Packs `a[m, k]`, stored as `[k][m]`, into panels `[m / ROWS][k][ROWS]` of the rows that [`cut`] gives. Adds the sums over
    /// the steps to `sums`.
    fn pack_left(
        self,
        a: &[f32],
        ld: usize,
        size: (usize, usize),
        out: &mut [f32],
        sums: Option<&mut [f32]>,
    );
}

/// The operands of one register tile.
struct Tile<'a> {
    k: usize,
    rows: usize,
    cols: usize,
    /// Row r, step p at `r * lda + p`, or, packed, at `p * ROWS + r`.
    a: &'a [f32],
    lda: usize,
    packed: bool,
    /// Step p, column j at `p * COLS + j`.
    b: &'a [f32],
    ldc: usize,
    scale: f32,
    bias: Option<&'a [f32]>,
    add: bool,
}

impl Tile<'_> {
    /// Panics unless every element of the tile lies in its slice: what the unsafe code rests on.
    #[inline]
    fn check(&self, c: &[f32], most_rows: usize, most_cols: usize) {
        let Self { k, rows, cols, .. } = *self;
        let holds = |len: usize, rows: usize, stride: usize, cols: usize| {
            (rows - 1)
                .checked_mul(stride)
                .and_then(|n| n.checked_add(cols))
                .is_some_and(|n| n <= len)
        };
        let left = match self.packed {
            true => holds(self.a.len(), k.max(1), most_rows, rows),
            false => holds(self.a.len(), rows, self.lda, k),
        };
        assert!(
            (1..=most_rows).contains(&rows)
                && (1..=most_cols).contains(&cols)
                && k > 0
                && left
                && holds(self.b.len(), k, most_cols, most_cols)
                && holds(c.len(), rows, self.ldc, cols)
                && self.bias.is_none_or(|bias| bias.len() >= cols),
            "a tile leaves its slices"
        );
    }
}

/// Panics unless `from` holds `rows` rows of `cols`, `ld` apart, and `out` at least `needed` values.
fn check_pack(from: &[f32], ld: usize, (rows, cols): (usize, usize), out: &[f32], needed: usize) {
    let last = rows.checked_sub(1).and_then(|last| last.checked_mul(ld));
    assert!(
        last.and_then(|last| last.checked_add(cols))
            .is_some_and(|end| end <= from.len())
            && out.len() >= needed,
        "packing leaves its slices"
    );
}

/// Panel `i` of `panels` nearly equal ones: its first row, and how many.
#[inline(always)]
fn cut(m: usize, panels: usize, i: usize) -> (usize, usize) {
    let (q, r) = (m / panels, m % panels);
    (i * q + i.min(r), q + usize::from(i < r))
}

/// `n` in nearly equal parts of at most `most`, a multiple of `unit`.
fn even(n: usize, most: usize, unit: usize) -> usize {
    n.div_ceil(n.div_ceil(most)).next_multiple_of(unit)
}

/// A buffer that begins on a cache line.
#[derive(Default)]
struct Aligned(Vec<f32>);

impl Aligned {
    fn get(&mut self, len: usize) -> &mut [f32] {
        if self.0.len() < len + LINE {
            self.0 = vec![0.0; (len + LINE).next_power_of_two()];
        }
        let skip = self.0.as_ptr().align_offset(64).min(LINE);
        &mut self.0[skip..skip + len]
    }
}

#[derive(Default)]
struct Buffers {
    left: Aligned,
    right: Aligned,
    panel: Aligned,
}

thread_local! {
    static BUFFERS: RefCell<Buffers> = RefCell::default();
}

#[derive(Clone, Copy)]
enum Level {
    #[cfg(target_arch = "x86_64")]
    Avx512(avx512::Avx512),
    #[cfg(target_arch = "x86_64")]
    Avx2(avx2::Avx2),
}

/// The widest instruction set of this processor; `None` where the `gemm` crate has to serve.
static LEVEL: LazyLock<Option<Level>> = LazyLock::new(|| {
    #[cfg(target_arch = "x86_64")]
    return avx512::Avx512::detect()
        .map(Level::Avx512)
        .or_else(|| avx2::Avx2::detect().map(Level::Avx2));
    #[cfg(not(target_arch = "x86_64"))]
    None
});

/// How many threads a product's rows and columns may be cut for: the bits of the `gemm` crate are not known to be free of the
/// cut, which then does not depend on the number of threads.
pub(crate) fn threads() -> usize {
    match *LEVEL {
        Some(_) => rayon::current_num_threads(),
        None => 4,
    }
}

/// What is done besides the product.
pub(crate) struct Extras<'a> {
    /// Multiplies the product.
    pub(crate) scale: f32,
    /// Whether the destination is added to.
    pub(crate) store: Store,
    /// Added to every row.
    pub(crate) bias: Option<&'a [f32]>,
    /// Gains the sums of the rows of a transposed `A` over the steps.
    pub(crate) sums: Option<&'a mut [f32]>,
}

impl Default for Extras<'_> {
    fn default() -> Self {
        Self {
            scale: 1.0,
            store: Store::Replace,
            bias: None,
            sums: None,
        }
    }
}

/// Rows and columns of the destination that have been computed, or are about to be.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    pub(crate) rows: Range<usize>,
    pub(crate) cols: Range<usize>,
}

/// Finished values of a [`Part`]: row `part.rows.start + i` begins at `i * stride` and has `part.cols.len()` values.
pub(crate) struct Finished<'a> {
    data: &'a mut [f32],
    stride: usize,
    pub(crate) part: Part,
}

impl Finished<'_> {
    /// Each row's index, with its values.
    pub(crate) fn rows(&mut self) -> impl Iterator<Item = (usize, &mut [f32])> {
        let width = self.part.cols.len();
        let rows = self.data.chunks_mut(self.stride);
        self.part
            .rows
            .clone()
            .zip(rows.map(move |r| &mut r[..width]))
    }
}

/// Where the product goes.
enum Destination<'a> {
    Matrix(MatMut<'a>),
    /// Nowhere: only `after` sees it.
    Panels,
}

/// `dst = scale * a b + bias`, or the same added to it, on the calling thread. `after` is told of every part once it is finished,
/// while it is in cache.
///
/// # Panics
/// If the shapes do not fit.
pub(crate) fn product(
    dst: MatMut<'_>,
    a: Mat<'_>,
    b: Mat<'_>,
    extras: Extras<'_>,
    after: impl FnMut(Finished<'_>),
) {
    let (m, n) = dst.shape();
    assert_eq!((m, n), (a.shape().0, b.shape().1), "shape of destination");
    run(Destination::Matrix(dst), a, b, extras, |_| {}, after);
}

/// `a b`, part by part: `after` gets each, and nothing is kept. `before` is told which part comes next.
///
/// # Panics
/// If the shapes do not fit.
pub(crate) fn each_part(
    a: Mat<'_>,
    b: Mat<'_>,
    before: impl FnMut(&Part),
    after: impl FnMut(Finished<'_>),
) {
    run(Destination::Panels, a, b, Extras::default(), before, after);
}

fn run(
    dst: Destination<'_>,
    a: Mat<'_>,
    b: Mat<'_>,
    extras: Extras<'_>,
    before: impl FnMut(&Part),
    after: impl FnMut(Finished<'_>),
) {
    assert_eq!(a.shape().1, b.shape().0, "inner sizes differ");
    assert!(
        extras.sums.is_none() || a.layout().2,
        "sums are of a transposed matrix"
    );
    if a.shape().0 == 0 || b.shape().1 == 0 {
        return;
    }
    run_on(*LEVEL, dst, (a, b), extras, before, after);
}

/// [`run`] with an instruction set, or without any.
fn run_on(
    level: Option<Level>,
    dst: Destination<'_>,
    (a, b): (Mat<'_>, Mat<'_>),
    extras: Extras<'_>,
    before: impl FnMut(&Part),
    after: impl FnMut(Finished<'_>),
) {
    let steps = a.shape().1;
    match level {
        #[cfg(target_arch = "x86_64")]
        Some(Level::Avx512(isa)) if steps > 0 => blocked(isa, dst, a, b, extras, before, after),
        #[cfg(target_arch = "x86_64")]
        Some(Level::Avx2(isa)) if steps > 0 => blocked(isa, dst, a, b, extras, before, after),
        _ => whole(dst, a, b, extras, before, after),
    }
}

/// The product by the `gemm` crate, in one part.
fn whole(
    dst: Destination<'_>,
    a: Mat<'_>,
    b: Mat<'_>,
    extras: Extras<'_>,
    mut before: impl FnMut(&Part),
    mut after: impl FnMut(Finished<'_>),
) {
    let (m, n) = (a.shape().0, b.shape().1);
    let part = Part {
        rows: 0..m,
        cols: 0..n,
    };
    before(&part);
    let mut panels;
    let mut dst = match dst {
        Destination::Matrix(dst) => dst,
        Destination::Panels => {
            panels = Scratch::take(m * n);
            MatMut::new(&mut panels, m, n)
        }
    };
    portable(dst.reborrow(), a, b, extras.scale, extras.store);
    let stride = dst.stride();
    let data = dst.into_data();
    if let Some(bias) = extras.bias {
        for row in data.chunks_mut(stride).take(m) {
            vector::add_assign(&mut row[..n], bias);
        }
    }
    if let Some(sums) = extras.sums {
        let (data, ld, _) = a.layout();
        for row in data.chunks(ld).take(a.shape().1) {
            vector::add_assign(&mut sums[..m], &row[..m]);
        }
    }
    after(Finished { data, stride, part });
}

/// The product by register tiles of an instruction set. There must be rows, columns and steps.
#[cfg(target_arch = "x86_64")]
fn blocked<I: Isa>(
    isa: I,
    dst: Destination<'_>,
    a: Mat<'_>,
    b: Mat<'_>,
    mut extras: Extras<'_>,
    mut before: impl FnMut(&Part),
    mut after: impl FnMut(Finished<'_>),
) {
    let ((m, k), n) = (a.shape(), b.shape().1);
    let (left, lda, left_transposed) = a.layout();
    let (right, ldb, right_transposed) = b.layout();
    let add = extras.store == Store::Add;
    let (mut c, ldc) = match dst {
        Destination::Matrix(dst) => {
            let stride = dst.stride();
            (Some(dst.into_data()), stride)
        }
        Destination::Panels => (None, 0),
    };
    let steps = match c {
        Some(_) => even(k, STEPS[usize::from(left_transposed)], 4),
        None => k,
    };
    let most = (BLOCK_BYTES / (4 * steps) / COLUMN_UNIT * COLUMN_UNIT).max(COLUMN_UNIT);
    let columns = even(n, most, COLUMN_UNIT).min(most);
    let height = match left_transposed {
        true => even(m, PACKED_ROWS, 1),
        false => m,
    };
    let ldc = if c.is_some() { ldc } else { columns };
    // Taken out, so that a product inside `after` finds buffers of its own.
    let mut buffers = BUFFERS.take();
    for m0 in (0..m).step_by(height) {
        let ml = height.min(m - m0);
        let panels = ml.div_ceil(I::ROWS);
        for k0 in (0..k).step_by(steps) {
            let kl = steps.min(k - k0);
            let chain = even(kl, CHAIN, 4);
            let (first_steps, last_steps) = (k0 == 0, k0 + kl == k);
            if left_transposed {
                let sums = extras.sums.as_mut().map(|sums| &mut sums[m0..m0 + ml]);
                let packed = buffers.left.get(panels * kl * I::ROWS);
                isa.pack_left(&left[k0 * lda + m0..], lda, (kl, ml), packed, sums);
            }
            for j0 in (0..n).step_by(columns) {
                let nl = columns.min(n - j0);
                let packed = buffers.right.get(kl * nl.next_multiple_of(I::COLS));
                if right_transposed {
                    isa.pack_columns(&right[j0 * ldb + k0..], ldb, (kl, nl), packed);
                } else {
                    isa.pack_rows(&right[k0 * ldb + j0..], ldb, (kl, nl), packed);
                }
                let packed = &*packed;
                for i in 0..panels {
                    let (first, rows) = cut(ml, panels, i);
                    let part = Part {
                        rows: m0 + first..m0 + first + rows,
                        cols: j0..j0 + nl,
                    };
                    if last_steps {
                        before(&part);
                    }
                    let (panel, lda): (&[f32], usize) = if left_transposed {
                        let size = kl * I::ROWS;
                        (&buffers.left.get(panels * size)[i * size..][..size], 0)
                    } else {
                        (&left[(m0 + first) * lda + k0..], lda)
                    };
                    let out = match &mut c {
                        Some(c) => &mut c[part.rows.start * ldc + j0..],
                        None => buffers.panel.get(rows * ldc),
                    };
                    for p in (0..kl).step_by(chain) {
                        let pl = chain.min(kl - p);
                        let begins = first_steps && p == 0;
                        for j in (0..nl).step_by(I::COLS) {
                            let cols = I::COLS.min(nl - j);
                            let tile = Tile {
                                k: pl,
                                rows,
                                cols,
                                a: &panel[if left_transposed { p * I::ROWS } else { p }..],
                                lda,
                                packed: left_transposed,
                                b: &packed[j * kl + p * I::COLS..],
                                ldc,
                                scale: extras.scale,
                                bias: extras.bias.filter(|_| begins).map(|b| &b[j0 + j..]),
                                add: add || !begins,
                            };
                            isa.tile(&tile, &mut out[j..]);
                        }
                    }
                    if last_steps {
                        after(Finished {
                            data: out,
                            stride: ldc,
                            part,
                        });
                    }
                }
            }
        }
    }
    BUFFERS.set(buffers);
}

#[cfg(test)]
mod tests;

//! Matrix products on strided views.

use super::product::{Extras, product};

/// A read-only strided matrix view; `data[i * row_stride + j * col_stride]` is element (i, j).
#[derive(Clone, Copy, Debug)]
pub struct Mat<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

/// A writable strided row-major matrix view.
#[derive(Debug)]
pub struct MatMut<'a> {
    data: &'a mut [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
}

/// Checks that every element of a row-major matrix lies in a slice of `len` values, and that rows do not overlap. Returns the
/// stride of its rows: one that is never used is made harmless.
///
/// # Panics
/// If an element lies outside, also where its position is larger than a number can be, or `row_stride < cols`.
fn checked_stride(len: usize, rows: usize, cols: usize, row_stride: usize) -> usize {
    assert!(
        row_stride >= cols,
        "rows overlap: stride {row_stride}, {cols} columns"
    );
    if rows <= 1 || cols == 0 {
        assert!(rows == 0 || cols <= len, "matrix view leaves its slice");
        return cols;
    }
    let last = (rows - 1)
        .checked_mul(row_stride)
        .and_then(|start| start.checked_add(cols));
    assert!(
        last.is_some_and(|end| end <= len),
        "matrix view leaves its slice"
    );
    row_stride
}

impl<'a> Mat<'a> {
    /// A contiguous row-major matrix.
    ///
    /// # Panics
    /// If `data` is shorter than `rows * cols`.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// A row-major matrix whose rows begin `row_stride` apart.
    ///
    /// # Panics
    /// If `data` is too short or `row_stride < cols`.
    pub fn strided(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        let row_stride = checked_stride(data.len(), rows, cols, row_stride);
        Self {
            data,
            rows,
            cols,
            row_stride,
            col_stride: 1,
        }
    }

    /// Rows and columns.
    pub(crate) fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    /// The values, whether they are stored transposed, and the distance of rows (of columns, if transposed). A single row or
    /// column without gaps counts as transposed: it is stored alike.
    pub(crate) fn layout(&self) -> (&'a [f32], usize, bool) {
        match self.row_stride {
            1 => (self.data, self.col_stride, true),
            stride => (self.data, stride, false),
        }
    }

    /// The transposed view.
    pub fn t(self) -> Self {
        Self {
            data: self.data,
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
        }
    }
}

impl<'a> MatMut<'a> {
    /// A contiguous row-major matrix.
    ///
    /// # Panics
    /// If `data` is shorter than `rows * cols`.
    pub fn new(data: &'a mut [f32], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// A row-major matrix whose rows begin `row_stride` apart.
    ///
    /// # Panics
    /// If `data` is too short or `row_stride < cols`.
    pub fn strided(data: &'a mut [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        let row_stride = checked_stride(data.len(), rows, cols, row_stride);
        Self {
            data,
            rows,
            cols,
            row_stride,
        }
    }

    /// Rows and columns.
    pub(crate) fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    /// The distance of rows.
    pub(crate) fn stride(&self) -> usize {
        self.row_stride
    }

    /// The values.
    pub(crate) fn into_data(self) -> &'a mut [f32] {
        self.data
    }

    /// The same view for a shorter time.
    pub(crate) fn reborrow(&mut self) -> MatMut<'_> {
        MatMut {
            data: self.data,
            ..*self
        }
    }
}

/// Whether a product replaces the destination or is added to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// `dst = a b`
    Replace,
    /// `dst += a b`
    Add,
}

/// `dst = scale * a b`, or `dst += scale * a b`, on the calling thread.
///
/// # Panics
/// If the shapes do not fit.
pub fn gemm(dst: MatMut<'_>, a: Mat<'_>, b: Mat<'_>, scale: f32, store: Store) {
    let extras = Extras {
        scale,
        store,
        ..Extras::default()
    };
    product(dst, a, b, extras, |_| {});
}

/// The same by the `gemm` crate.
pub(super) fn portable(dst: MatMut<'_>, a: Mat<'_>, b: Mat<'_>, scale: f32, store: Store) {
    assert_eq!(a.cols, b.rows, "inner sizes differ");
    assert_eq!(
        (dst.rows, dst.cols),
        (a.rows, b.cols),
        "destination has another shape"
    );
    if dst.rows == 0 || dst.cols == 0 {
        return;
    }
    if a.cols == 0 {
        // An empty sum: the gemm crate would leave the destination as it is.
        if store == Store::Replace {
            for row in dst.data.chunks_mut(dst.row_stride).take(dst.rows) {
                row[..dst.cols].fill(0.0);
            }
        }
        return;
    }
    // SAFETY: the constructors of `Mat` and `MatMut` checked, without overflow, that every element (i, j) with i < rows and
    // j < cols lies in its slice (`t` swaps both pairs alike), so strides that are used are at most the length of a slice and
    // fit an `isize`, as does `cols`, to which unused ones are set; no size is zero here. The sizes were matched above, `dst` is borrowed mutably so it
    // cannot alias `a` or `b`, and no element of `dst` is written twice because rows do not overlap.
    #[allow(unsafe_code)]
    unsafe {
        gemm::gemm(
            dst.rows,
            dst.cols,
            a.cols,
            dst.data.as_mut_ptr(),
            1,
            dst.row_stride as isize,
            store == Store::Add,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            1.0,
            scale,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn agrees_with_a_triple_loop(m in 0usize..20, n in 0usize..20, k in 0usize..20, pad in 0usize..3,
                                     ta: bool, tb: bool, add: bool) {
            let value = |i: usize| ((i * 7919) % 23) as f32 / 7.0 - 1.5;
            let (ar, ac) = if ta { (k, m) } else { (m, k) };
            let (br, bc) = if tb { (n, k) } else { (k, n) };
            let a: Vec<f32> = (0..ar * (ac + pad)).map(value).collect();
            let b: Vec<f32> = (0..br * (bc + pad)).map(|i| value(i + 5)).collect();
            let mut dst: Vec<f32> = (0..m * (n + pad)).map(|i| value(i + 11)).collect();
            let before = dst.clone();
            let view = |d, r, c, t| { let v = Mat::strided(d, r, c, c + pad); if t { v.t() } else { v } };
            let store = if add { Store::Add } else { Store::Replace };
            gemm(MatMut::strided(&mut dst, m, n, n + pad), view(&a, ar, ac, ta), view(&b, br, bc, tb), 0.5, store);
            for i in 0..m {
                for j in 0..n + pad {
                    let at = i * (n + pad) + j;
                    let mut want = if add || j >= n { before[at] } else { 0.0 };
                    if j < n {
                        for l in 0..k {
                            let x = if ta { a[l * (ac + pad) + i] } else { a[i * (ac + pad) + l] };
                            let y = if tb { b[j * (bc + pad) + l] } else { b[l * (bc + pad) + j] };
                            want += 0.5 * x * y;
                        }
                    }
                    prop_assert!((dst[at] - want).abs() < 1e-4);
                }
            }
        }
    }

    /// Sizes whose products wrap around to something small, where arithmetic wraps as in a release build.
    #[test]
    fn a_view_that_leaves_its_slice_is_refused() {
        const HALF: usize = 1 << (usize::BITS / 2);
        let refused = [
            (5, 2, 3, 3),
            (1, HALF + 1, 1, HALF),
            (1, HALF + 1, 1, HALF * 2),
            (1, 2, 1, usize::MAX),
            (1, 3, 1, usize::MAX / 2 + 1),
            (4, usize::MAX, 1, usize::MAX),
            (4, usize::MAX, 2, usize::MAX - 1),
            (4, 2, usize::MAX, usize::MAX),
            (4, 1, usize::MAX, usize::MAX),
            (4, 1, 5, 5),
            (4, 1, 5, usize::MAX),
            (0, 1, 1, 1),
            (0, usize::MAX, 1, 1),
            (8, 3, 2, 1),
        ];
        for (len, rows, cols, stride) in refused {
            let mut data = vec![0.0; len];
            let read = std::panic::catch_unwind(|| Mat::strided(&data, rows, cols, stride).cols);
            assert!(read.is_err(), "{rows} x {cols} at {stride} in {len}");
            let written = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                MatMut::strided(&mut data, rows, cols, stride).cols
            }));
            assert!(written.is_err(), "{rows} x {cols} at {stride} in {len}");
        }
    }

    #[test]
    fn a_stride_that_is_not_used_may_be_anything() {
        let (a, b) = ([2.0, 3.0], [5.0, 7.0]);
        let mut dst = [0.0];
        let row = Mat::strided(&a, 1, 2, usize::MAX);
        let column = Mat::strided(&b, 1, 2, usize::MAX - 1).t();
        let one = MatMut::strided(&mut dst, 1, 1, usize::MAX);
        gemm(one, row, column, 1.0, Store::Replace);
        assert_eq!(dst, [31.0]);
        // Views without elements.
        let none = Mat::strided(&[], usize::MAX, 0, usize::MAX);
        gemm(
            MatMut::new(&mut [], 0, 0),
            Mat::new(&[], 0, 0),
            Mat::new(&[], 0, 0),
            1.0,
            Store::Replace,
        );
        assert_eq!((none.rows, none.t().cols), (usize::MAX, usize::MAX));
        let mut dst = [1.0; 4];
        let empty = Mat::strided(&[], 2, 0, usize::MAX);
        gemm(
            MatMut::new(&mut dst, 2, 2),
            empty,
            Mat::new(&[], 0, 2),
            1.0,
            Store::Replace,
        );
        assert_eq!(dst, [0.0; 4]);
    }
}

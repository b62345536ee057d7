//! Register tile and packing with AVX2 and FMA.
#![allow(unsafe_code)]
// The empty asm blocks that hide a pointer from the optimiser read and write nothing through it.
#![allow(clippy::pointers_in_nomem_asm_block)]

use std::arch::x86_64::*;

use super::{Isa, PACKED_STEPS, Tile, cut};

/// Rows of the tile: with two registers of columns each, 12 of the 16 registers hold sums.
const ROWS: usize = 6;
const COLS: usize = 16;

/// Proof that the processor has AVX2 and FMA.
#[derive(Clone, Copy, Debug)]
pub(super) struct Avx2(());

impl Avx2 {
    pub(super) fn detect() -> Option<Self> {
        (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")).then_some(Self(()))
    }
}

impl Isa for Avx2 {
    const ROWS: usize = ROWS;
    const COLS: usize = COLS;

    #[inline]
    fn tile(self, t: &Tile<'_>, c: &mut [f32]) {
        t.check(c, ROWS, COLS);
        macro_rules! table {
            ($packed:literal) => {
                [
                    tile::<1, $packed>,
                    tile::<2, $packed>,
                    tile::<3, $packed>,
                    tile::<4, $packed>,
                    tile::<5, $packed>,
                    tile::<6, $packed>,
                ]
            };
        }
        type Kernel = unsafe fn(&Tile<'_>, &mut [f32]);
        static AS_IT_LIES: [Kernel; ROWS] = table!(false);
        static PACKED: [Kernel; ROWS] = table!(true);
        let kernels = if t.packed { &PACKED } else { &AS_IT_LIES };
        // SAFETY: `self` is proof of the instructions, and `check` has seen that every element of the operands lies in its
        // slice.
        unsafe { kernels[t.rows - 1](t, c) }
    }

    fn pack_rows(self, b: &[f32], ld: usize, (k, n): (usize, usize), out: &mut [f32]) {
        super::check_pack(b, ld, (k, n), out, k * n.next_multiple_of(COLS));
        // SAFETY: `self` is proof of the instructions; both slices were found to be long enough.
        unsafe { pack_rows(b, ld, k, n, out) }
    }

    fn pack_columns(self, b: &[f32], ld: usize, (k, n): (usize, usize), out: &mut [f32]) {
        super::check_pack(b, ld, (n, k), out, k * n.next_multiple_of(COLS));
        // SAFETY: as for `pack_rows`; here `b` has `n` rows of `k`.
        unsafe { pack_columns(b, ld, k, n, out) }
    }

    fn pack_left(
        self,
        a: &[f32],
        ld: usize,
        (k, m): (usize, usize),
        out: &mut [f32],
        sums: Option<&mut [f32]>,
    ) {
        super::check_pack(a, ld, (k, m), out, m.div_ceil(ROWS) * k * ROWS);
        assert!(sums.as_ref().is_none_or(|s| s.len() >= m));
        let sums = sums.map_or(std::ptr::null_mut(), <[f32]>::as_mut_ptr);
        // SAFETY: `self` is proof of the instructions; all slices were found to be long enough.
        unsafe { pack_left(a, ld, k, m, out, sums) }
    }
}

/// Asks for a slice to be brought into the second-level cache.
#[inline(always)]
pub(super) fn prefetch(values: &[f32]) {
    for line in values.chunks(16) {
        // SAFETY: SSE is part of x86-64, and a prefetch may be of any address.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(line.as_ptr().cast()) };
    }
}

/// # Safety
/// The processor must have AVX2 and FMA, and `t.check(c, ROWS, COLS)` must have passed, with `t.rows == R`,
/// `t.packed == PACKED`.
#[target_feature(enable = "avx2,fma")]
unsafe fn tile<const R: usize, const PACKED: bool>(t: &Tile<'_>, c: &mut [f32]) {
    let (ldc, c) = (t.ldc, c.as_mut_ptr());
    let mut acc = [[_mm256_setzero_ps(); 2]; ROWS];
    let lda = if PACKED { 1 } else { t.lda };
    let step = if PACKED { ROWS } else { 1 };
    let mut b = t.b.as_ptr();
    // SAFETY: reads of `a` are of rows under R and steps under k, reads of `b` of whole steps under k, `c` and `bias` are
    // touched in rows under R and columns under `cols`: `check` has found all of them to be in their slices. Prefetches
    // may be of any address, and pointers that may leave a slice are made by wrapping arithmetic.
    unsafe {
        for i in 0..R {
            _mm_prefetch::<_MM_HINT_T0>(c.wrapping_add(i.wrapping_mul(ldc)).cast());
        }
        // A second base for the last three rows: [base], [base + lda * 4], [base + lda * 8].
        let (mut p0, mut p1) = (t.a.as_ptr(), t.a.as_ptr().wrapping_add(lda.wrapping_mul(3)));
        #[cfg(not(miri))]
        std::arch::asm!("/* {0} */", inout(reg) p1, options(pure, nomem, nostack, preserves_flags));
        macro_rules! one {
            ($p:expr) => {{
                let b0 = _mm256_loadu_ps(b.add($p * COLS));
                let b1 = _mm256_loadu_ps(b.add($p * COLS + 8));
                _mm_prefetch::<_MM_HINT_T0>(b.wrapping_add(($p + 16) * COLS).cast());
                // Unrolled by hand: in a loop LLVM leaves the sums in memory.
                macro_rules! row {
                    ($i:literal $base:ident $r:literal) => {
                        if $i < R {
                            let from = if PACKED {
                                p0.wrapping_add($i + $p * step)
                            } else {
                                $base.wrapping_add(lda.wrapping_mul($r).wrapping_add($p))
                            };
                            let x = _mm256_set1_ps(*from);
                            acc[$i][0] = _mm256_fmadd_ps(x, b0, acc[$i][0]);
                            acc[$i][1] = _mm256_fmadd_ps(x, b1, acc[$i][1]);
                        }
                    };
                }
                row!(0 p0 0);
                row!(1 p0 1);
                row!(2 p0 2);
                row!(3 p1 0);
                row!(4 p1 1);
                row!(5 p1 2);
            }};
        }
        macro_rules! advance {
            ($n:expr) => {
                p0 = p0.wrapping_add($n);
                if !PACKED {
                    p1 = p1.wrapping_add($n);
                }
            };
        }
        for _ in 0..t.k / 4 {
            one!(0);
            one!(1);
            one!(2);
            one!(3);
            b = b.add(4 * COLS);
            advance!(4 * step);
        }
        for _ in 0..t.k % 4 {
            one!(0);
            b = b.add(COLS);
            advance!(step);
        }
        let scale = _mm256_set1_ps(t.scale);
        for (i, sums) in acc.iter_mut().enumerate().take(R) {
            if t.scale != 1.0 {
                *sums = [_mm256_mul_ps(sums[0], scale), _mm256_mul_ps(sums[1], scale)];
            }
            let c = c.add(i * ldc);
            if t.cols == COLS {
                for (half, sum) in sums.iter_mut().enumerate() {
                    if let Some(bias) = t.bias {
                        *sum = _mm256_add_ps(*sum, _mm256_loadu_ps(bias.as_ptr().add(8 * half)));
                    }
                    if t.add {
                        *sum = _mm256_add_ps(*sum, _mm256_loadu_ps(c.add(8 * half)));
                    }
                    _mm256_storeu_ps(c.add(8 * half), *sum);
                }
            } else {
                let mut edge = [0.0f32; COLS];
                _mm256_storeu_ps(edge.as_mut_ptr(), sums[0]);
                _mm256_storeu_ps(edge.as_mut_ptr().add(8), sums[1]);
                for (j, x) in edge.iter().enumerate().take(t.cols) {
                    let x = t.bias.map_or(*x, |bias| x + bias[j]);
                    *c.add(j) = if t.add { x + *c.add(j) } else { x };
                }
            }
        }
    }
}

/// # Safety
/// The processor must have AVX2, `b` hold `n` rows of `k`, and `out` `k` steps of whole panels of columns.
#[target_feature(enable = "avx2,fma")]
unsafe fn pack_columns(b: &[f32], ld: usize, k: usize, n: usize, out: &mut [f32]) {
    let (b, out) = (b.as_ptr(), out.as_mut_ptr());
    for j in (0..n).step_by(8) {
        let cols = 8.min(n - j);
        // SAFETY: rows j..j + cols of `b` and steps under k of the panel of column j, as the caller says; prefetches may
        // be of any address.
        unsafe {
            let panel = out.add(j / COLS * k * COLS + j % COLS);
            let from = b.add(j * ld);
            let whole = if cols == 8 { k / 8 * 8 } else { 0 };
            for p in (0..whole).step_by(8) {
                for i in 0..8 {
                    _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(i * ld + p + 64).cast());
                }
                transpose8(from.add(p), ld, panel.add(p * COLS), COLS);
            }
            for p in whole..k {
                for i in 0..8 {
                    *panel.add(p * COLS + i) = if i < cols { *from.add(i * ld + p) } else { 0.0 };
                }
            }
        }
    }
    if !n.is_multiple_of(COLS) && n % COLS <= 8 {
        for p in 0..k {
            // SAFETY: the second half of the last panel, which no column has reached.
            unsafe {
                _mm256_storeu_ps(out.add((n / COLS * k + p) * COLS + 8), _mm256_setzero_ps())
            };
        }
    }
}

/// 8 rows of 8 columns, transposed in registers: `out[c * stride + r] = a[r * lda + c]`.
///
/// # Safety
/// The processor must have AVX2, and all these elements must lie in the allocations of `a` and `out`.
#[target_feature(enable = "avx2,fma")]
unsafe fn transpose8(a: *const f32, lda: usize, out: *mut f32, stride: usize) {
    // SAFETY: the caller's.
    unsafe {
        let r: [__m256; 8] = std::array::from_fn(|i| _mm256_loadu_ps(a.add(i * lda)));
        // Rows i and i + 4 side by side: their columns 0..4, then their columns 4..8.
        let low: [__m256; 4] =
            std::array::from_fn(|i| _mm256_permute2f128_ps::<0x20>(r[i], r[i + 4]));
        let high: [__m256; 4] =
            std::array::from_fn(|i| _mm256_permute2f128_ps::<0x31>(r[i], r[i + 4]));
        for (half, q) in [low, high].into_iter().enumerate() {
            let (a, b) = (
                _mm256_unpacklo_ps(q[0], q[1]),
                _mm256_unpackhi_ps(q[0], q[1]),
            );
            let (c, d) = (
                _mm256_unpacklo_ps(q[2], q[3]),
                _mm256_unpackhi_ps(q[2], q[3]),
            );
            let to = |column: usize| out.add((4 * half + column) * stride);
            _mm256_storeu_ps(to(0), _mm256_shuffle_ps::<0x44>(a, c));
            _mm256_storeu_ps(to(1), _mm256_shuffle_ps::<0xee>(a, c));
            _mm256_storeu_ps(to(2), _mm256_shuffle_ps::<0x44>(b, d));
            _mm256_storeu_ps(to(3), _mm256_shuffle_ps::<0xee>(b, d));
        }
    }
}

/// # Safety
/// The processor must have AVX2, `b` hold `k` rows of `n`, and `out` `k` steps of whole panels of columns.
#[target_feature(enable = "avx2,fma")]
unsafe fn pack_rows(b: &[f32], ld: usize, k: usize, n: usize, out: &mut [f32]) {
    let (b, out) = (b.as_ptr(), out.as_mut_ptr());
    for p0 in (0..k).step_by(PACKED_STEPS) {
        for j in 0..n.div_ceil(COLS) {
            let cols = (n - j * COLS).min(COLS);
            for p in p0..k.min(p0 + PACKED_STEPS) {
                // SAFETY: row p of `b` up to column n; step p of panel j. Prefetches may be of any address.
                unsafe {
                    let from = b.add(p * ld + j * COLS);
                    let to = out.add((j * k + p) * COLS);
                    let ahead = from.wrapping_add(ld.wrapping_mul(PACKED_STEPS));
                    _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
                    if cols == COLS {
                        _mm256_storeu_ps(to, _mm256_loadu_ps(from));
                        _mm256_storeu_ps(to.add(8), _mm256_loadu_ps(from.add(8)));
                    } else {
                        for i in 0..COLS {
                            *to.add(i) = if i < cols { *from.add(i) } else { 0.0 };
                        }
                    }
                }
            }
        }
    }
}

/// # Safety
/// The processor must have AVX2, `a` hold `k` rows of `m`, `out` `k` steps of whole panels of rows, and `sums`, unless null,
/// `m` values.
#[target_feature(enable = "avx2,fma")]
unsafe fn pack_left(a: &[f32], ld: usize, k: usize, m: usize, out: &mut [f32], sums: *mut f32) {
    let (a, out) = (a.as_ptr(), out.as_mut_ptr());
    let panels = m.div_ceil(ROWS);
    for p0 in (0..k).step_by(PACKED_STEPS) {
        for i in 0..panels {
            let (first, rows) = cut(m, panels, i);
            let mut sum = [0.0f32; ROWS];
            // SAFETY: steps p of `a` and of panel i, columns first..first + rows. Prefetches may be of any address.
            unsafe {
                for p in p0..k.min(p0 + PACKED_STEPS) {
                    let from = a.add(p * ld + first);
                    let to = out.add((i * k + p) * ROWS);
                    _mm_prefetch::<_MM_HINT_T0>(
                        from.wrapping_add(ld.wrapping_mul(PACKED_STEPS)).cast(),
                    );
                    for (l, sum) in sum.iter_mut().enumerate().take(rows) {
                        *to.add(l) = *from.add(l);
                        *sum += *from.add(l);
                    }
                }
                if !sums.is_null() {
                    for (l, sum) in sum.iter().enumerate().take(rows) {
                        *sums.add(first + l) += sum;
                    }
                }
            }
        }
    }
}

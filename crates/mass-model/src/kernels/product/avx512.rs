//! Register tile and packing with AVX-512F.
#![allow(unsafe_code)]
// The empty asm blocks that hide a pointer from the optimiser read and write nothing through it.
#![allow(clippy::pointers_in_nomem_asm_block)]

use std::arch::x86_64::*;

use super::{Isa, PACKED_STEPS, Tile, cut};

/// Rows of the tile. 24 of the 32 registers hold sums. Of the tiles that fit, one that is wide and low runs nearest to the
/// ceiling of the multiply-adds, whether its rows are packed or not.
const ROWS: usize = 6;
/// Columns: four registers.
const COLS: usize = 4 * LANES;
const LANES: usize = 16;
/// How many steps ahead the columns are asked for: from the second-level cache.
const AHEAD: usize = 12;

/// Proof that the processor has AVX-512F.
#[derive(Clone, Copy, Debug)]
pub(super) struct Avx512(());

impl Avx512 {
    pub(super) fn detect() -> Option<Self> {
        is_x86_feature_detected!("avx512f").then_some(Self(()))
    }
}

impl Isa for Avx512 {
    const ROWS: usize = ROWS;
    const COLS: usize = COLS;

    #[inline]
    fn tile(self, t: &Tile<'_>, c: &mut [f32]) {
        t.check(c, ROWS, COLS);
        macro_rules! table {
            ($packed:literal: $($rows:literal)*) => {
                [$([
                    tile::<$rows, 1, $packed>,
                    tile::<$rows, 2, $packed>,
                    tile::<$rows, 3, $packed>,
                    tile::<$rows, 4, $packed>,
                ]),*]
            };
        }
        type Kernel = unsafe fn(&Tile<'_>, &mut [f32]);
        static AS_IT_LIES: [[Kernel; COLS / LANES]; ROWS] = table!(false: 1 2 3 4 5 6);
        static PACKED: [[Kernel; COLS / LANES]; ROWS] = table!(true: 1 2 3 4 5 6);
        let kernels = if t.packed { &PACKED } else { &AS_IT_LIES };
        // SAFETY: `self` is proof of the instructions, and `check` has seen that every element of the operands lies in its
        // slice.
        unsafe { kernels[t.rows - 1][t.cols.div_ceil(LANES) - 1](t, c) }
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

/// # Safety
/// The processor must have AVX-512F, and `t.check(c, ROWS, COLS)` must have passed, with `t.rows == R`,
/// `t.cols.div_ceil(LANES) == V` and `t.packed == PACKED`.
#[target_feature(enable = "avx512f")]
unsafe fn tile<const R: usize, const V: usize, const PACKED: bool>(t: &Tile<'_>, c: &mut [f32]) {
    let (ldc, c) = (t.ldc, c.as_mut_ptr());
    let last = u16::MAX >> (V * LANES - t.cols);
    let mask = |v: usize| if v + 1 == V { last } else { u16::MAX };
    let mut acc = [[_mm512_setzero_ps(); COLS / LANES]; ROWS];
    let lda = if PACKED { 1 } else { t.lda };
    let step = if PACKED { ROWS } else { 1 };
    let a = t.a.as_ptr();
    let mut b = t.b.as_ptr();
    // SAFETY: reads of `a` are of rows under R and steps under k, reads of `b` of whole steps under k, `c` is touched in rows
    // under R and under the mask: `check` has found all of them to be in their slices. Prefetches may be of any address,
    // and pointers that may leave a slice are made by wrapping arithmetic.
    unsafe {
        for i in 0..R {
            for v in 0..V {
                let at = i.wrapping_mul(ldc).wrapping_add(v * LANES);
                _mm_prefetch::<_MM_HINT_T0>(c.wrapping_add(at).cast());
            }
        }
        // One base for three rows: [base], [base + lda * 4], [base + lda * 8]. The empty asm keeps LLVM from making six
        // pointers of them.
        let (mut p0, mut p1) = (a, a);
        if !PACKED {
            p1 = a.wrapping_add(lda.wrapping_mul(3));
            #[cfg(not(miri))]
            std::arch::asm!("/* {0} */", inout(reg) p1, options(pure, nomem, nostack, preserves_flags));
        }
        macro_rules! advance {
            ($n:expr) => {
                p0 = p0.wrapping_add($n);
                if !PACKED {
                    p1 = p1.wrapping_add($n);
                }
            };
        }
        macro_rules! one {
            ($p:expr) => {{
                let mut columns = [_mm512_setzero_ps(); COLS / LANES];
                macro_rules! column {
                    ($v:literal) => {
                        if $v < V {
                            columns[$v] = _mm512_loadu_ps(b.add($p * COLS + $v * LANES));
                            let ahead = b.wrapping_add(($p + AHEAD) * COLS + $v * LANES);
                            _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
                        }
                    };
                }
                column!(0);
                column!(1);
                column!(2);
                column!(3);
                // Unrolled by hand: in a loop LLVM leaves the sums in memory.
                macro_rules! product {
                    ($i:literal $v:literal $x:ident) => {
                        if $v < V {
                            acc[$i][$v] = _mm512_fmadd_ps($x, columns[$v], acc[$i][$v]);
                        }
                    };
                }
                macro_rules! row {
                    ($i:literal $base:ident $r:literal) => {
                        if $i < R {
                            let from = if PACKED {
                                p0.wrapping_add($i + $p * step)
                            } else {
                                $base.wrapping_add(lda.wrapping_mul($r).wrapping_add($p))
                            };
                            let x = _mm512_set1_ps(*from);
                            product!($i 0 x);
                            product!($i 1 x);
                            product!($i 2 x);
                            product!($i 3 x);
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
        if t.scale != 1.0 {
            let scale = _mm512_set1_ps(t.scale);
            for sums in acc.iter_mut().take(R) {
                for sum in sums.iter_mut().take(V) {
                    *sum = _mm512_mul_ps(*sum, scale);
                }
            }
        }
        if let Some(bias) = t.bias {
            for v in 0..V {
                let bias = _mm512_maskz_loadu_ps(mask(v), bias.as_ptr().add(v * LANES));
                for sums in acc.iter_mut().take(R) {
                    sums[v] = _mm512_add_ps(sums[v], bias);
                }
            }
        }
        for (i, sums) in acc.iter_mut().enumerate().take(R) {
            for (v, sum) in sums.iter_mut().enumerate().take(V) {
                let to = c.add(i * ldc + v * LANES);
                if t.add {
                    *sum = _mm512_add_ps(*sum, _mm512_maskz_loadu_ps(mask(v), to));
                }
                _mm512_mask_storeu_ps(to, mask(v), *sum);
            }
        }
    }
}

/// 16 rows of 16 columns, transposed in registers: `out[c * stride + r] = a[r * lda + c]`.
///
/// # Safety
/// The processor must have AVX-512F, and all these elements must lie in the allocations of `a` and `out`.
#[target_feature(enable = "avx512f")]
unsafe fn transpose16(a: *const f32, lda: usize, out: *mut f32, stride: usize) {
    // SAFETY: the caller's.
    unsafe {
        let r: [__m512; 16] = std::array::from_fn(|i| _mm512_loadu_ps(a.add(i * lda)));
        let mut t = [_mm512_setzero_ps(); 16];
        for i in 0..8 {
            t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
            t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
        }
        let d = |x| _mm512_castps_pd(x);
        let low = |x, y| _mm512_castpd_ps(_mm512_unpacklo_pd(d(x), d(y)));
        let high = |x, y| _mm512_castpd_ps(_mm512_unpackhi_pd(d(x), d(y)));
        let mut u = [_mm512_setzero_ps(); 16];
        for i in (0..16).step_by(4) {
            u[i] = low(t[i], t[i + 2]);
            u[i + 1] = high(t[i], t[i + 2]);
            u[i + 2] = low(t[i + 1], t[i + 3]);
            u[i + 3] = high(t[i + 1], t[i + 3]);
        }
        // Lane l of u[4g + c] holds column 4l + c of rows 4g..4g + 4.
        for c in 0..4 {
            let x = _mm512_shuffle_f32x4::<0x88>(u[c], u[4 + c]);
            let y = _mm512_shuffle_f32x4::<0xdd>(u[c], u[4 + c]);
            let z = _mm512_shuffle_f32x4::<0x88>(u[8 + c], u[12 + c]);
            let w = _mm512_shuffle_f32x4::<0xdd>(u[8 + c], u[12 + c]);
            let to = |column: usize| out.add(column * stride);
            _mm512_storeu_ps(to(c), _mm512_shuffle_f32x4::<0x88>(x, z));
            _mm512_storeu_ps(to(8 + c), _mm512_shuffle_f32x4::<0xdd>(x, z));
            _mm512_storeu_ps(to(4 + c), _mm512_shuffle_f32x4::<0x88>(y, w));
            _mm512_storeu_ps(to(12 + c), _mm512_shuffle_f32x4::<0xdd>(y, w));
        }
    }
}

/// # Safety
/// The processor must have AVX-512F, `b` hold `n` rows of `k`, and `out` `k` steps of whole panels of columns.
#[target_feature(enable = "avx512f")]
unsafe fn pack_columns(b: &[f32], ld: usize, k: usize, n: usize, out: &mut [f32]) {
    let (b, out) = (b.as_ptr(), out.as_mut_ptr());
    for j in (0..n).step_by(16) {
        let cols = 16.min(n - j);
        // SAFETY: rows j..j + cols of `b` and steps under k of the panel of column j, as the caller says; prefetches may
        // be of any address.
        unsafe {
            let panel = out.add(j / COLS * k * COLS + j % COLS);
            let from = b.add(j * ld);
            let whole = if cols == 16 { k / 16 * 16 } else { 0 };
            for p in (0..whole).step_by(16) {
                for i in 0..16 {
                    _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(i * ld + p + 64).cast());
                }
                transpose16(from.add(p), ld, panel.add(p * COLS), COLS);
            }
            for p in whole..k {
                for i in 0..16 {
                    *panel.add(p * COLS + i) = if i < cols { *from.add(i * ld + p) } else { 0.0 };
                }
            }
        }
    }
}

/// # Safety
/// The processor must have AVX-512F, `b` hold `k` rows of `n`, and `out` `k` steps of whole panels of columns.
#[target_feature(enable = "avx512f")]
unsafe fn pack_rows(b: &[f32], ld: usize, k: usize, n: usize, out: &mut [f32]) {
    let (b, out) = (b.as_ptr(), out.as_mut_ptr());
    for p0 in (0..k).step_by(PACKED_STEPS) {
        for j in (0..n).step_by(LANES) {
            let mask = u16::MAX >> (LANES - LANES.min(n - j));
            for p in p0..k.min(p0 + PACKED_STEPS) {
                // SAFETY: row p of `b` up to column n, by the mask; step p of the panel of column j. Prefetches may be of any
                // address.
                unsafe {
                    let from = b.add(p * ld + j);
                    let to = out.add((j / COLS * k + p) * COLS + j % COLS);
                    let ahead = from.wrapping_add(ld.wrapping_mul(PACKED_STEPS));
                    _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
                    _mm512_storeu_ps(to, _mm512_maskz_loadu_ps(mask, from));
                }
            }
        }
    }
}

/// # Safety
/// The processor must have AVX-512F, `a` hold `k` rows of `m`, `out` `k` steps of whole panels of rows, and `sums`, unless
/// null, `m` values.
#[target_feature(enable = "avx512f")]
unsafe fn pack_left(a: &[f32], ld: usize, k: usize, m: usize, out: &mut [f32], sums: *mut f32) {
    let (a, out) = (a.as_ptr(), out.as_mut_ptr());
    let panels = m.div_ceil(ROWS);
    for p0 in (0..k).step_by(PACKED_STEPS) {
        for i in 0..panels {
            let (first, rows) = cut(m, panels, i);
            let mask = ((1u32 << rows) - 1) as u16;
            let mut sum = _mm512_setzero_ps();
            // SAFETY: steps p of `a` and of panel i, columns first..first + rows by the mask. Prefetches may be of any address.
            unsafe {
                for p in p0..k.min(p0 + PACKED_STEPS) {
                    let from = a.add(p * ld + first);
                    _mm_prefetch::<_MM_HINT_T0>(
                        from.wrapping_add(ld.wrapping_mul(PACKED_STEPS)).cast(),
                    );
                    let row = _mm512_maskz_loadu_ps(mask, from);
                    sum = _mm512_add_ps(sum, row);
                    _mm512_mask_storeu_ps(out.add((i * k + p) * ROWS), mask, row);
                }
                if !sums.is_null() {
                    let to = sums.add(first);
                    let sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, to));
                    _mm512_mask_storeu_ps(to, mask, sum);
                }
            }
        }
    }
}

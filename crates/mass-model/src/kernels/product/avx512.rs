//! Register tile and packing with AVX-512F.
#![allow(unsafe_code)]
// The empty asm blocks that hide a pointer from the optimiser read and write nothing through it.
#![allow(clippy::pointers_in_nomem_asm_block)]

use std::arch::x86_64::*;

use super::{Isa, PACKED_STEPS, Tile, cut};

/// Rows of the tile: with two registers of columns each, 28 of the 32 registers hold sums.
const ROWS: usize = 14;
const COLS: usize = 32;

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
            ($packed:literal) => {
                [
                    tile::<1, $packed>,
                    tile::<2, $packed>,
                    tile::<3, $packed>,
                    tile::<4, $packed>,
                    tile::<5, $packed>,
                    tile::<6, $packed>,
                    tile::<7, $packed>,
                    tile::<8, $packed>,
                    tile::<9, $packed>,
                    tile::<10, $packed>,
                    tile::<11, $packed>,
                    tile::<12, $packed>,
                    tile::<13, $packed>,
                    tile::<14, $packed>,
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

/// # Safety
/// The processor must have AVX-512F, and `t.check(c, ROWS, COLS)` must have passed, with `t.rows == R`, `t.packed == PACKED`.
#[target_feature(enable = "avx512f")]
unsafe fn tile<const R: usize, const PACKED: bool>(t: &Tile<'_>, c: &mut [f32]) {
    let (ldc, c) = (t.ldc, c.as_mut_ptr());
    let mask = u32::MAX >> (COLS - t.cols);
    let (m0, m1) = (mask as u16, (mask >> 16) as u16);
    let mut acc = [[_mm512_setzero_ps(); 2]; ROWS];
    let lda = if PACKED { 1 } else { t.lda };
    let step = if PACKED { ROWS } else { 1 };
    let a = t.a.as_ptr();
    let mut b = t.b.as_ptr();
    // SAFETY: reads of `a` are of rows under R and steps under k, reads of `b` of whole steps under k, `c` is touched in rows
    // under R and under the mask: `check` has found all of them to be in their slices. Prefetches may be of any address,
    // and pointers that may leave a slice are made by wrapping arithmetic.
    unsafe {
        for i in 0..R {
            let c = c.wrapping_add(i.wrapping_mul(ldc));
            _mm_prefetch::<_MM_HINT_T0>(c.cast());
            _mm_prefetch::<_MM_HINT_T0>(c.wrapping_add(16).cast());
        }
        // One base for three rows: [base], [base + lda * 4], [base + lda * 8]. The empty asm keeps LLVM from making 14
        // pointers of them, which would spill.
        let (mut p0, mut p1, mut p2, mut p3, mut p4) = (a, a, a, a, a);
        if !PACKED {
            macro_rules! base {
                ($p:ident, $g:literal) => {
                    $p = a.wrapping_add(lda.wrapping_mul(3 * $g));
                    #[cfg(not(miri))]
                    std::arch::asm!("/* {0} */", inout(reg) $p, options(pure, nomem, nostack, preserves_flags));
                };
            }
            base!(p1, 1);
            base!(p2, 2);
            base!(p3, 3);
            base!(p4, 4);
        }
        macro_rules! advance {
            ($n:expr) => {
                p0 = p0.wrapping_add($n);
                if !PACKED {
                    p1 = p1.wrapping_add($n);
                    p2 = p2.wrapping_add($n);
                    p3 = p3.wrapping_add($n);
                    p4 = p4.wrapping_add($n);
                }
            };
        }
        macro_rules! one {
            ($p:expr) => {{
                let b0 = _mm512_loadu_ps(b.add($p * COLS));
                let b1 = _mm512_loadu_ps(b.add($p * COLS + 16));
                _mm_prefetch::<_MM_HINT_T0>(b.wrapping_add(($p + 12) * COLS).cast());
                _mm_prefetch::<_MM_HINT_T0>(b.wrapping_add(($p + 12) * COLS + 16).cast());
                // Unrolled by hand: in a loop LLVM leaves the sums in memory.
                macro_rules! row {
                    ($i:literal $base:ident $r:literal) => {
                        if $i < R {
                            let from = if PACKED {
                                p0.wrapping_add($i + $p * step)
                            } else {
                                $base.wrapping_add(lda.wrapping_mul($r).wrapping_add($p))
                            };
                            let x = _mm512_set1_ps(*from);
                            acc[$i][0] = _mm512_fmadd_ps(x, b0, acc[$i][0]);
                            acc[$i][1] = _mm512_fmadd_ps(x, b1, acc[$i][1]);
                        }
                    };
                }
                row!(0 p0 0);
                row!(1 p0 1);
                row!(2 p0 2);
                row!(3 p1 0);
                row!(4 p1 1);
                row!(5 p1 2);
                row!(6 p2 0);
                row!(7 p2 1);
                row!(8 p2 2);
                row!(9 p3 0);
                row!(10 p3 1);
                row!(11 p3 2);
                row!(12 p4 0);
                row!(13 p4 1);
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
                *sums = [_mm512_mul_ps(sums[0], scale), _mm512_mul_ps(sums[1], scale)];
            }
        }
        if let Some(bias) = t.bias {
            let bias = bias.as_ptr();
            let v0 = _mm512_maskz_loadu_ps(m0, bias);
            let v1 = _mm512_maskz_loadu_ps(m1, bias.wrapping_add(16));
            for sums in acc.iter_mut().take(R) {
                *sums = [_mm512_add_ps(sums[0], v0), _mm512_add_ps(sums[1], v1)];
            }
        }
        for (i, sums) in acc.iter_mut().enumerate().take(R) {
            let (c0, c1) = (c.add(i * ldc), c.wrapping_add(i * ldc + 16));
            if t.add {
                sums[0] = _mm512_add_ps(sums[0], _mm512_maskz_loadu_ps(m0, c0));
                sums[1] = _mm512_add_ps(sums[1], _mm512_maskz_loadu_ps(m1, c1));
            }
            _mm512_mask_storeu_ps(c0, m0, sums[0]);
            _mm512_mask_storeu_ps(c1, m1, sums[1]);
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
    if !n.is_multiple_of(COLS) && n % COLS <= 16 {
        for p in 0..k {
            // SAFETY: the second half of the last panel, which no column has reached.
            unsafe {
                _mm512_storeu_ps(out.add((n / COLS * k + p) * COLS + 16), _mm512_setzero_ps())
            };
        }
    }
}

/// # Safety
/// The processor must have AVX-512F, `b` hold `k` rows of `n`, and `out` `k` steps of whole panels of columns.
#[target_feature(enable = "avx512f")]
unsafe fn pack_rows(b: &[f32], ld: usize, k: usize, n: usize, out: &mut [f32]) {
    let (b, out) = (b.as_ptr(), out.as_mut_ptr());
    for p0 in (0..k).step_by(PACKED_STEPS) {
        for j in 0..n.div_ceil(COLS) {
            let mask = u32::MAX >> (COLS - (n - j * COLS).min(COLS));
            let (m0, m1) = (mask as u16, (mask >> 16) as u16);
            for p in p0..k.min(p0 + PACKED_STEPS) {
                // SAFETY: row p of `b` up to column n, by the mask; step p of panel j. Prefetches may be of any address.
                unsafe {
                    let from = b.add(p * ld + j * COLS);
                    let to = out.add((j * k + p) * COLS);
                    let ahead = from.wrapping_add(ld.wrapping_mul(PACKED_STEPS));
                    _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
                    _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(16).cast());
                    _mm512_storeu_ps(to, _mm512_maskz_loadu_ps(m0, from));
                    let second = _mm512_maskz_loadu_ps(m1, from.wrapping_add(16));
                    _mm512_storeu_ps(to.add(16), second);
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

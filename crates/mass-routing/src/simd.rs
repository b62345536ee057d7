//! Vector loops: explicit vectors of the machine's own width, chosen at run time by [`dispatch`].
//!
//! Rows are stored as whole [`Lanes`], so loops need no tails. Sums depend in their last bits on the width of the machine's vectors,
//! never on the number of threads.

use pulp::Simd;

/// Sixteen values: the unit in which rows are stored and selections are made.
pub(crate) type Lanes = [f32; 16];

/// Number of values in [`Lanes`].
pub(crate) const LANES: usize = 16;

/// An instruction set: its vectors, and the two operations on selections that differ most between machines.
pub(crate) trait Machine: Copy {
    /// Its vector operations.
    type Simd: Simd;

    /// Its vector operations.
    fn simd(self) -> Self::Simd;

    /// Bit `i` is set iff `v[i] >= bound`.
    fn at_least(self, v: &Lanes, bound: f32) -> u16;

    /// Writes the lanes of `v` whose bit is set to the front of `values`, and `base +` their numbers to `indices`; returns how many.
    fn compress(
        self,
        mask: u16,
        v: &Lanes,
        base: u32,
        values: &mut [f32; LANES],
        indices: &mut [u32; LANES],
    ) -> usize;

    /// The transpose of a square block.
    #[inline(always)]
    fn transpose(self, rows: &[Lanes; LANES]) -> [Lanes; LANES] {
        std::array::from_fn(|column| std::array::from_fn(|row| rows[row][column]))
    }
}

/// The portable form of the selections.
#[derive(Clone, Copy)]
pub(crate) struct Portable<S>(S);

impl<S: Simd> Machine for Portable<S> {
    type Simd = S;

    #[inline(always)]
    fn simd(self) -> S {
        self.0
    }

    #[inline(always)]
    fn at_least(self, v: &Lanes, bound: f32) -> u16 {
        (0..LANES).fold(0, |mask, i| mask | (u16::from(v[i] >= bound) << i))
    }

    #[inline(always)]
    fn compress(
        self,
        mask: u16,
        v: &Lanes,
        base: u32,
        values: &mut [f32; LANES],
        indices: &mut [u32; LANES],
    ) -> usize {
        compress(mask, v, base, values, indices)
    }
}

#[inline(always)]
fn compress(
    mut mask: u16,
    v: &Lanes,
    base: u32,
    values: &mut [f32; LANES],
    indices: &mut [u32; LANES],
) -> usize {
    let count = mask.count_ones() as usize;
    for to in 0..count {
        let i = mask.trailing_zeros() as usize % LANES;
        values[to] = v[i];
        indices[to] = base + i as u32;
        mask &= mask - 1;
    }
    count
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use pulp::bytemuck::cast;
    use pulp::x86::{V3, V4};

    use super::{LANES, Lanes, Machine, compress};

    const IOTA: [u32; LANES] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];

    impl Machine for V4 {
        type Simd = Self;

        #[inline(always)]
        fn simd(self) -> Self {
            self
        }

        #[inline(always)]
        fn at_least(self, v: &Lanes, bound: f32) -> u16 {
            self.avx512f
                ._mm512_cmple_ps_mask(cast([bound; LANES]), cast(*v))
        }

        #[inline(always)]
        fn compress(
            self,
            mask: u16,
            v: &Lanes,
            base: u32,
            values: &mut [f32; LANES],
            indices: &mut [u32; LANES],
        ) -> usize {
            let numbers = IOTA.map(|i| i + base);
            *values = cast(self.avx512f._mm512_maskz_compress_ps(mask, cast(*v)));
            *indices = cast(
                self.avx512f
                    ._mm512_maskz_compress_epi32(mask, cast(numbers)),
            );
            mask.count_ones() as usize
        }

        #[inline(always)]
        fn transpose(self, rows: &[Lanes; LANES]) -> [Lanes; LANES] {
            // Pairs of rows, then of pairs: afterwards, entry 4 g + c holds column 4 l + c of rows 4 g.. in its l-th quarter.
            let f = self.avx512f;
            let mut quads: [Lanes; LANES] = [[0.0; LANES]; LANES];
            for g in 0..4 {
                let [a, b, c, d] = [
                    rows[4 * g],
                    rows[4 * g + 1],
                    rows[4 * g + 2],
                    rows[4 * g + 3],
                ];
                let low = (
                    cast(f._mm512_unpacklo_ps(cast(a), cast(b))),
                    cast(f._mm512_unpacklo_ps(cast(c), cast(d))),
                );
                let high = (
                    cast(f._mm512_unpackhi_ps(cast(a), cast(b))),
                    cast(f._mm512_unpackhi_ps(cast(c), cast(d))),
                );
                quads[4 * g] = cast(f._mm512_unpacklo_pd(low.0, low.1));
                quads[4 * g + 1] = cast(f._mm512_unpackhi_pd(low.0, low.1));
                quads[4 * g + 2] = cast(f._mm512_unpacklo_pd(high.0, high.1));
                quads[4 * g + 3] = cast(f._mm512_unpackhi_pd(high.0, high.1));
            }
            // Then the quarters.
            let mut columns: [Lanes; LANES] = [[0.0; LANES]; LANES];
            for c in 0..4 {
                let [w, x, y, z] = [quads[c], quads[4 + c], quads[8 + c], quads[12 + c]];
                let even = (
                    f._mm512_shuffle_f32x4::<0x88>(cast(w), cast(x)),
                    f._mm512_shuffle_f32x4::<0x88>(cast(y), cast(z)),
                );
                let odd = (
                    f._mm512_shuffle_f32x4::<0xdd>(cast(w), cast(x)),
                    f._mm512_shuffle_f32x4::<0xdd>(cast(y), cast(z)),
                );
                columns[c] = cast(f._mm512_shuffle_f32x4::<0x88>(even.0, even.1));
                columns[8 + c] = cast(f._mm512_shuffle_f32x4::<0xdd>(even.0, even.1));
                columns[4 + c] = cast(f._mm512_shuffle_f32x4::<0x88>(odd.0, odd.1));
                columns[12 + c] = cast(f._mm512_shuffle_f32x4::<0xdd>(odd.0, odd.1));
            }
            columns
        }
    }

    impl Machine for V3 {
        type Simd = Self;

        #[inline(always)]
        fn simd(self) -> Self {
            self
        }

        #[inline(always)]
        fn at_least(self, v: &Lanes, bound: f32) -> u16 {
            /// "Less or equal, false if one is NaN, no signal."
            const LE: i32 = 18;
            let halves: [[f32; 8]; 2] = cast(*v);
            let bound = cast([bound; 8]);
            let [low, high] = halves.map(|half| {
                let mask = self.avx._mm256_cmp_ps::<LE>(bound, cast(half));
                self.avx._mm256_movemask_ps(mask) as u16
            });
            low | (high << 8)
        }

        #[inline(always)]
        fn compress(
            self,
            mask: u16,
            v: &Lanes,
            base: u32,
            values: &mut [f32; LANES],
            indices: &mut [u32; LANES],
        ) -> usize {
            compress(mask, v, base, values, indices)
        }
    }
}

/// Work to run with the best instruction set of this machine.
pub(crate) trait Task {
    /// Runs; everything below has to be `inline(always)` to be compiled for that instruction set.
    fn run<M: Machine>(self, machine: M);
}

/// Runs a task with the widest vectors the machine has.
pub(crate) fn dispatch(task: impl Task) {
    #[cfg(target_arch = "x86_64")]
    {
        if let Some(v4) = pulp::x86::V4::try_new() {
            return v4.vectorize(Run(task, v4));
        }
        if let Some(v3) = pulp::x86::V3::try_new() {
            return v3.vectorize(Run(task, v3));
        }
    }
    pulp::Arch::new().dispatch(Other(task));
}

struct Run<T, M>(T, M);

impl<T: Task, M: Machine> pulp::NullaryFnOnce for Run<T, M> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        self.0.run(self.1);
    }
}

struct Other<T>(T);

impl<T: Task> pulp::WithSimd for Other<T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        self.0.run(Portable(simd));
    }
}

/// Vectors of the machine's width.
pub(crate) type Vector<M> = <<M as Machine>::Simd as Simd>::f32s;

/// The vectors of a row.
#[inline(always)]
pub(crate) fn vectors<M: Machine>(row: &[Lanes]) -> &[Vector<M>] {
    // Lanes are a multiple of every machine's width, so the second part is empty.
    M::Simd::as_simd_f32s(row.as_flattened()).0
}

/// The vectors of a row, to be written.
#[inline(always)]
pub(crate) fn vectors_mut<M: Machine>(row: &mut [Lanes]) -> &mut [Vector<M>] {
    M::Simd::as_mut_simd_f32s(row.as_flattened_mut()).0
}

/// Folds the vectors with two independent accumulators, which hides the latency of the operation.
#[inline(always)]
pub(crate) fn fold2<V: Copy, A: Copy>(vectors: &[V], zero: A, f: impl Fn(A, V) -> A) -> [A; 2] {
    let (pairs, rest) = vectors.as_chunks::<2>();
    let mut acc = [zero; 2];
    for &[a, b] in pairs {
        acc = [f(acc[0], a), f(acc[1], b)];
    }
    for &v in rest {
        acc[0] = f(acc[0], v);
    }
    acc
}

/// `e^x` of each lane, for `x <= 0`; exactly zero below the smallest normal number.
///
/// Splits `x = n ln 2 + f` with `|f| <= ln(2)/2`, a polynomial for `e^f` and an exponent shift for `2^n`; within 2 units in the last
/// place of the true value (checked against f64 in the tests).
#[inline(always)]
pub(crate) fn exp<M: Machine>(machine: M, x: Vector<M>) -> Vector<M> {
    /// 1.5 * 2^23: adding it rounds to an integer, which is left in the low bits.
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 355.0 / 512.0;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    /// Cephes' minimax coefficients of `(e^f - 1 - f) / f^2`.
    const POLY: [f32; 6] = [
        1.987_569_2e-4,
        1.398_199_9e-3,
        8.333_452e-3,
        4.166_579_6e-2,
        1.666_666_5e-1,
        0.5,
    ];
    let s = machine.simd();
    let splat = |v| s.splat_f32s(v);
    let bounded = s.max_f32s(x, splat(-88.0));
    let shifted = s.mul_add_f32s(bounded, splat(std::f32::consts::LOG2_E), splat(ROUND));
    let n = s.sub_f32s(shifted, splat(ROUND));
    let f = s.mul_add_f32s(
        n,
        splat(-LN2_LOW),
        s.mul_add_f32s(n, splat(-LN2_HIGH), bounded),
    );
    let mut poly = splat(POLY[0]);
    for coefficient in &POLY[1..] {
        poly = s.mul_add_f32s(poly, f, splat(*coefficient));
    }
    let fraction = s.add_f32s(s.mul_add_f32s(poly, s.mul_f32s(f, f), f), splat(1.0));
    let exponent = s.wrapping_dyn_shl_u32s(s.transmute_u32s_f32s(shifted), s.splat_u32s(23));
    let power = s.transmute_f32s_u32s(s.add_u32s(exponent, s.splat_u32s(0x3f80_0000)));
    s.select_f32s(
        s.less_than_f32s(x, splat(-87.3)),
        splat(0.0),
        s.mul_f32s(fraction, power),
    )
}

/// Values on a boundary of 64 bytes, so that no vector straddles two cache lines.
#[derive(Debug, Default)]
pub(crate) struct AlignedRow {
    storage: Vec<f32>,
    chunks: usize,
}

impl AlignedRow {
    /// Sets the length, in [`Lanes`].
    pub(crate) fn resize(&mut self, chunks: usize) {
        self.storage.resize((chunks + 1) * LANES, 0.0);
        self.chunks = chunks;
    }

    #[inline(always)]
    fn start(&self) -> usize {
        self.storage.as_ptr().align_offset(64).min(LANES)
    }

    /// The row.
    #[inline(always)]
    pub(crate) fn get(&self) -> &[Lanes] {
        let start = self.start();
        self.storage
            .get(start..start + self.chunks * LANES)
            .unwrap_or_default()
            .as_chunks()
            .0
    }

    /// The row, to be written.
    #[inline(always)]
    pub(crate) fn get_mut(&mut self) -> &mut [Lanes] {
        let start = self.start();
        self.storage
            .get_mut(start..start + self.chunks * LANES)
            .unwrap_or_default()
            .as_chunks_mut()
            .0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Exp<'a>(&'a [f32], &'a mut Vec<f32>);

    impl Task for Exp<'_> {
        #[inline(always)]
        fn run<M: Machine>(self, machine: M) {
            for &x in self.0 {
                let mut out: [Lanes; 1] = [[0.0; LANES]];
                vectors_mut::<M>(&mut out)[0] = exp(machine, machine.simd().splat_f32s(x));
                self.1.push(out[0][0]);
            }
        }
    }

    #[test]
    fn exp_is_accurate_and_flushes_to_zero() {
        let x: Vec<f32> = (0..=873_000).map(|i| -(i as f32) * 1e-4).collect();
        let mut got = Vec::new();
        dispatch(Exp(&x, &mut got));
        let error = |(&x, &got): (&f32, &f32)| (f64::from(got) / f64::from(x).exp() - 1.0).abs();
        let worst = x.iter().zip(&got).map(error).fold(0.0, f64::max);
        assert!(
            worst < 2.0 * f64::from(f32::EPSILON),
            "relative error {worst:e}"
        );
        assert_eq!(got[0], 1.0);
        got.clear();
        dispatch(Exp(&[-87.4, -1e4, f32::MIN, f32::NEG_INFINITY], &mut got));
        assert_eq!(got, [0.0; 4]);
    }

    struct Compare<'a>(&'a mut Vec<String>);

    impl Task for Compare<'_> {
        #[inline(always)]
        fn run<M: Machine>(self, machine: M) {
            let portable = Portable(machine.simd());
            for seed in 0_u32..2000 {
                let v: Lanes =
                    std::array::from_fn(|i| ((seed.wrapping_mul(2_654_435_761) >> i) % 7) as f32);
                let (mask, expected) = (machine.at_least(&v, 3.0), portable.at_least(&v, 3.0));
                let (mut a, mut b) = (([0.0; LANES], [0; LANES]), ([0.0; LANES], [0; LANES]));
                let n = machine.compress(mask, &v, 32, &mut a.0, &mut a.1);
                let m = portable.compress(expected, &v, 32, &mut b.0, &mut b.1);
                let block: [Lanes; LANES] = std::array::from_fn(|i| v.map(|x| x + 10.0 * i as f32));
                if machine.transpose(&block) != portable.transpose(&block)
                    || mask != expected
                    || n != m
                    || a.0[..n] != b.0[..n]
                    || a.1[..n] != b.1[..n]
                {
                    self.0.push(format!("{v:?}"));
                }
            }
        }
    }

    #[test]
    fn every_instruction_set_of_this_machine_selects_alike() {
        let mut differences = Vec::new();
        dispatch(Compare(&mut differences));
        #[cfg(target_arch = "x86_64")]
        if let Some(v3) = pulp::x86::V3::try_new() {
            v3.vectorize(Run(Compare(&mut differences), v3));
        }
        assert!(differences.is_empty(), "{differences:?}");
    }
}

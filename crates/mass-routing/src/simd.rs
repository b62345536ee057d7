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

    /// Bit `i` is set iff `v[i] >= bounds[i]`.
    fn at_least_each(self, v: &Lanes, bounds: &Lanes) -> u16;

    /// Bit `i` is set iff `v[i] >= bound`.
    #[inline(always)]
    fn at_least(self, v: &Lanes, bound: f32) -> u16 {
        self.at_least_each(v, &[bound; LANES])
    }

    /// Writes the lanes of `v` whose bit is set to the front of `values`, and `base +` their numbers to `indices`; returns how many.
    fn compress(
        self,
        mask: u16,
        v: &Lanes,
        base: u32,
        values: &mut [f32; LANES],
        indices: &mut [u32; LANES],
    ) -> usize;

    /// The entries of `v` whose bit is set, at the front.
    #[inline(always)]
    fn pack(self, mut mask: u16, v: &[u32; LANES]) -> [u32; LANES] {
        let mut packed = [0; LANES];
        for to in &mut packed[..mask.count_ones() as usize] {
            *to = v[mask.trailing_zeros() as usize % LANES];
            mask &= mask - 1;
        }
        packed
    }

    /// Adds one to the entries whose bit is set.
    #[inline(always)]
    fn advance(self, mask: u16, cursors: &mut [u32; LANES]) {
        for (i, cursor) in cursors.iter_mut().enumerate() {
            *cursor += u32::from(mask >> i) & 1;
        }
    }

    /// The transpose of a square of bits: bit `i` of entry `j` becomes bit `j` of entry `i`.
    #[inline(always)]
    fn transpose_bits(self, mut masks: [u16; LANES]) -> [u16; LANES] {
        // Quarters change places, then those of the quarters.
        for (half, low) in [(8, 0x00ff), (4, 0x0f0f), (2, 0x3333), (1, 0x5555)] {
            for i in (0..LANES).filter(|i| i & half == 0) {
                let swap = ((masks[i] >> half) ^ masks[i + half]) & low;
                masks[i] ^= swap << half;
                masks[i + half] ^= swap;
            }
        }
        masks
    }

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
    fn at_least_each(self, v: &Lanes, bounds: &Lanes) -> u16 {
        (0..LANES).fold(0, |mask, i| mask | (u16::from(v[i] >= bounds[i]) << i))
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
        fn at_least_each(self, v: &Lanes, bounds: &Lanes) -> u16 {
            self.avx512f._mm512_cmple_ps_mask(cast(*bounds), cast(*v))
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
        fn pack(self, mask: u16, v: &[u32; LANES]) -> [u32; LANES] {
            cast(self.avx512f._mm512_maskz_compress_epi32(mask, cast(*v)))
        }

        #[inline(always)]
        fn advance(self, mask: u16, cursors: &mut [u32; LANES]) {
            let v = cast(*cursors);
            *cursors = cast(
                self.avx512f
                    ._mm512_mask_add_epi32(v, mask, v, cast([1_u32; LANES])),
            );
        }

        #[inline(always)]
        fn transpose_bits(self, masks: [u16; LANES]) -> [u16; LANES] {
            let v = self.avx512f._mm512_cvtepu16_epi32(cast(masks));
            let mut rows = masks;
            for (i, row) in rows.iter_mut().enumerate() {
                let bit = cast([1_u32 << i; LANES]);
                *row = self.avx512f._mm512_test_epi32_mask(v, bit);
            }
            rows
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
        fn at_least_each(self, v: &Lanes, bounds: &Lanes) -> u16 {
            /// "Less or equal, false if one is NaN, no signal."
            const LE: i32 = 18;
            let halves: [[f32; 8]; 2] = cast(*v);
            let bounds: [[f32; 8]; 2] = cast(*bounds);
            let half = |i: usize| {
                let mask = self
                    .avx
                    ._mm256_cmp_ps::<LE>(cast(bounds[i]), cast(halves[i]));
                self.avx._mm256_movemask_ps(mask) as u16
            };
            half(0) | (half(1) << 8)
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
    #[cfg(test)]
    let Some(task) = forced::take(task) else {
        return;
    };
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

/// Lets a test run the instruction sets that a wider one of its machine hides.
#[cfg(test)]
mod forced {
    use std::cell::Cell;

    use super::{Other, Task};

    /// What tasks run with.
    #[derive(Clone, Copy, Debug)]
    pub(super) enum Level {
        /// The machine's widest vectors, as outside of tests.
        Own,
        /// AVX2.
        #[cfg(target_arch = "x86_64")]
        V3(pulp::x86::V3),
        /// One value at a time: what is left where there is nothing else.
        Portable,
    }

    thread_local! {
        static LEVEL: Cell<Level> = const { Cell::new(Level::Own) };
        /// Tasks that this thread has run.
        static TASKS: Cell<usize> = const { Cell::new(0) };
    }

    /// Every level of this machine.
    pub(super) fn all() -> Vec<Level> {
        #[cfg(target_arch = "x86_64")]
        let v3 = pulp::x86::V3::try_new().map(Level::V3);
        #[cfg(not(target_arch = "x86_64"))]
        let v3 = None;
        [Some(Level::Own), v3, Some(Level::Portable)]
            .into_iter()
            .flatten()
            .collect()
    }

    /// Does `work` with the tasks of this thread at that level. Fails if there were none: those of other threads are out of reach.
    pub(super) fn at<R>(level: Level, work: impl FnOnce() -> R) -> R {
        LEVEL.set(level);
        TASKS.set(0);
        let result = work();
        LEVEL.set(Level::Own);
        assert!(TASKS.get() > 0, "no task ran on this thread");
        result
    }

    /// Runs the task, or hands it back where the level is the machine's own.
    pub(super) fn take<T: Task>(task: T) -> Option<T> {
        TASKS.set(TASKS.get() + 1);
        match LEVEL.get() {
            Level::Own => return Some(task),
            #[cfg(target_arch = "x86_64")]
            Level::V3(v3) => v3.vectorize(super::Run(task, v3)),
            Level::Portable => pulp::WithSimd::with_simd(Other(task), pulp::Scalar),
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use ndarray::Array2;

    use super::forced::Level;
    use super::*;
    use crate::{BiasBalanced, Combine, NonFinite, Router, RoutingError, RoutingPlan, TopK, TopP};

    struct Width<'a>(&'a mut usize);

    impl Task for Width<'_> {
        #[inline(always)]
        fn run<M: Machine>(self, _: M) {
            *self.0 = M::Simd::F32_LANES;
        }
    }

    /// A level forced on `dispatch` is the one that its tasks run with.
    #[test]
    fn a_forced_level_decides_the_width_of_vectors() {
        for level in forced::all() {
            let mut width = 0;
            forced::at(level, || dispatch(Width(&mut width)));
            match level {
                Level::Own => assert!(width > 0),
                #[cfg(target_arch = "x86_64")]
                Level::V3(_) => assert_eq!(width, 8),
                Level::Portable => assert_eq!(width, 1),
            }
        }
    }

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

    /// Of every instruction set, `exp` is within 2 units in the last place, and zero below the normal numbers.
    #[test]
    fn exp_is_accurate_and_flushes_to_zero() {
        let x: Vec<f32> = (0..=873_000).map(|i| -(i as f32) * 1e-4).collect();
        for level in forced::all() {
            let mut got = Vec::new();
            forced::at(level, || dispatch(Exp(&x, &mut got)));
            let error =
                |(&x, &got): (&f32, &f32)| (f64::from(got) / f64::from(x).exp() - 1.0).abs();
            let worst = x.iter().zip(&got).map(error).fold(0.0, f64::max);
            assert!(
                worst < 2.0 * f64::from(f32::EPSILON),
                "{level:?}: relative error {worst:e}"
            );
            assert_eq!(got.len(), x.len(), "{level:?}");
            assert_eq!(got[0], 1.0, "{level:?}");
            got.clear();
            let far = [-87.4, -1e4, f32::MIN, f32::NEG_INFINITY];
            forced::at(level, || dispatch(Exp(&far, &mut got)));
            assert_eq!(got, [0.0; 4], "{level:?}");
        }
    }

    /// Logits in [0, 8), a multiple of 1/512 each, so that some tie. No sum of probabilities is within 3e-6 of 0.3, 0.6 or 0.9.
    fn some_logits(n: usize, k: usize) -> Array2<f32> {
        Array2::from_shape_fn((n, k), |(t, e)| {
            let x = ((t * k + e) as u32).wrapping_mul(2_654_435_761);
            let x = (x ^ (x >> 15)).wrapping_mul(2_246_822_519);
            (x >> 20) as f32 / 512.0
        })
    }

    /// Every instruction set chooses the experts that the machine's own does, by probabilities that are the exact softmax to 1e-6:
    /// in whole tiles of tokens and the rows after them, and row by row, as top-k and under a mask.
    #[test]
    fn every_instruction_set_routes_alike() {
        let sizes = [33, 130]
            .into_iter()
            .flat_map(|n| [5, 16, 40, 128].map(|k| (n, k)));
        for (n, k) in sizes {
            let logits = some_logits(n, k);
            let some: Vec<bool> = (0..k).map(|e| e % 5 != 3).collect();
            let mut routers: Vec<Box<dyn Router>> = vec![
                Box::new(TopK::new(3, Combine::Raw).unwrap()),
                Box::new(BiasBalanced::new(3, 1e-3, Combine::Raw).unwrap()),
            ];
            for p in [0.3, 0.6, 0.9] {
                routers.push(Box::new(TopP::new(p, Combine::Raw).unwrap()));
            }
            for (r, router) in routers.iter_mut().enumerate() {
                for mask in [None, Some(&some[..])] {
                    let mut plan_at = |level| {
                        let mut plan = RoutingPlan::default();
                        forced::at(level, || router.route(logits.view(), mask, &mut plan)).unwrap();
                        plan
                    };
                    let own = plan_at(Level::Own);
                    for level in forced::all() {
                        let what = format!(
                            "{n} x {k}, router {r}, masked {}, {level:?}",
                            mask.is_some()
                        );
                        let plan = plan_at(level);
                        assert_eq!(plan.token_offsets(), own.token_offsets(), "{what}");
                        assert_eq!(plan.token_experts(), own.token_experts(), "{what}");
                        let found = plan.probabilities();
                        for (t, row) in logits.outer_iter().enumerate() {
                            let power = |e: usize| {
                                let used = mask.is_none_or(|m| m[e]);
                                if used { f64::from(row[e]).exp() } else { 0.0 }
                            };
                            let total: f64 = (0..k).map(power).sum();
                            for e in 0..k {
                                let at = (t, e);
                                let exact = power(e) / total;
                                let (r, s) = (found[at], own.probabilities()[at]);
                                assert!(
                                    (f64::from(r) - exact).abs() <= 1e-6 * exact
                                        && (r - s).abs() <= 1e-6 * s,
                                    "{what}: {r} at {at:?} for {exact}, of the machine's own {s}"
                                );
                            }
                        }
                        for ((e, &t), &w) in plan.experts().zip(plan.tokens()).zip(plan.weights()) {
                            assert_eq!(w, found[(t as usize, e as usize)], "{what}");
                        }
                    }
                }
            }
        }
    }

    /// Every instruction set finds the logit that is not finite, in a tile and in the row after the last one, and leaves the tokens
    /// beside it alone.
    #[test]
    fn every_instruction_set_finds_what_is_not_finite() {
        for level in forced::all() {
            for k in [5, 16, 40] {
                for (bad, token) in [(f32::NAN, 20), (f32::NEG_INFINITY, 5), (f32::INFINITY, 32)] {
                    let clean = some_logits(33, k);
                    let mut broken = clean.clone();
                    broken[(token, k - 1)] = bad;
                    let router = TopP::new(0.6, Combine::Raw).unwrap();
                    let route = |mut router: TopP, logits: &Array2<f32>| {
                        let mut plan = RoutingPlan::default();
                        forced::at(level, || router.route(logits.view(), None, &mut plan))
                            .map(|()| plan)
                    };
                    let what = format!("{level:?}, {k} experts, {bad} for token {token}");
                    let error = route(router, &broken).unwrap_err();
                    assert!(
                        matches!(
                            error,
                            RoutingError::NonFiniteLogit { token: t, expert, .. }
                                if (t, expert) == (token, k - 1)
                        ),
                        "{what}: {error}"
                    );
                    let whole = route(router, &clean).unwrap();
                    let rest = route(router.with_non_finite(NonFinite::Skip), &broken).unwrap();
                    assert_eq!((rest.skipped(), rest.k(token)), (1, 0), "{what}");
                    for t in (0..33).filter(|&t| t != token) {
                        let own = |plan: &RoutingPlan| {
                            let own = plan.token_offsets()[t] as usize
                                ..plan.token_offsets()[t + 1] as usize;
                            plan.token_experts()[own].to_vec()
                        };
                        assert_eq!(own(&rest), own(&whole), "{what}, beside it token {t}");
                    }
                }
            }
        }
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
                let numbers: [u32; LANES] = v.map(|x| 3 + x as u32);
                let (mut c, mut d) = (numbers, numbers);
                machine.advance(mask, &mut c);
                portable.advance(mask, &mut d);
                let bits = numbers.map(|x| x.wrapping_mul(seed.wrapping_mul(40_503)) as u16);
                let turned = machine.transpose_bits(bits);
                let bit = |of: &[u16; LANES], i: usize, j: usize| of[i] >> j & 1;
                let all = || (0..LANES).flat_map(|i| (0..LANES).map(move |j| (i, j)));
                if machine.transpose(&block) != portable.transpose(&block)
                    || machine.pack(mask, &numbers)[..n] != portable.pack(mask, &numbers)[..n]
                    || (0..n)
                        .any(|i| f64::from(a.0[i]) + 3.0 != portable.pack(mask, &numbers)[i].into())
                    || c != d
                    || (0..LANES).any(|i| c[i] != numbers[i] + u32::from(mask >> i & 1))
                    || turned != portable.transpose_bits(bits)
                    || all().any(|(i, j)| bit(&turned, i, j) != bit(&bits, j, i))
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

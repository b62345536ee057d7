//! Sixteen tokens at a time: lanes are tokens, so nothing has to be reduced across lanes.

use pulp::Simd;

use crate::Combine;
use crate::simd::{AlignedRow, LANES, Lanes, Machine, Vector, exp, fold2, vectors, vectors_mut};

/// Rows of at most this many experts are routed in tiles.
pub(crate) const WIDEST: usize = 256;

/// Longer rows are summed in the order in which they are outside of tiles.
const NARROW: usize = 128;

/// Rows of at most this many experts are sorted.
const SORTED: usize = 16;

/// Sixteen rows, expert by token.
#[derive(Debug, Default)]
pub(crate) struct Tile {
    /// Logits, then probabilities.
    columns: AlignedRow,
    experts: usize,
    /// Steps of the bracket before thresholds are taken one by one.
    rounds: usize,
    /// Of each token: the smallest probability it takes; infinite where the token takes nothing or is routed by itself.
    values: Lanes,
    /// Of each token: what makes its probabilities weights.
    factors: Lanes,
    /// Of each token: its number of experts.
    counts: Lanes,
    /// One where rounding in f32 could have changed the choice, or where the row holds a logit that is not finite.
    doubtful: Lanes,
    /// Whether the logits of the next tile are known to be finite, or not to be.
    checked: Option<bool>,
    /// Of each expert: the tokens that take it.
    masks: Vec<u16>,
}

impl Tile {
    pub(crate) fn prepare(&mut self, experts: usize) {
        self.experts = experts;
        self.rounds = match experts {
            0..=32 => 3,
            33..=64 => 4,
            65..=128 => 5,
            _ => 8,
        };
        self.checked = None;
        // Sorting takes sixteen, the last of them zeros.
        self.columns.resize(experts.max(SORTED));
        self.columns.get_mut()[experts..].fill([0.0; LANES]);
        self.masks.resize(experts, 0);
    }

    /// Routes sixteen consecutive rows, `logits` holding `16 K` values.
    #[inline(always)]
    pub(crate) fn route<M: Machine>(
        &mut self,
        machine: M,
        logits: &[f32],
        next: Option<&[f32]>,
        target: f32,
        combine: Combine,
    ) {
        let k = self.experts;
        // The first tile of a block; of the others this is known.
        let finite = match self.checked.take() {
            Some(finite) => finite,
            None => all_finite(machine, logits.as_chunks().0),
        };
        let columns = &mut self.columns.get_mut()[..k];
        for (c, columns) in columns.chunks_mut(LANES).enumerate() {
            let mut block = [[0.0; LANES]; LANES];
            for (to, row) in block.iter_mut().zip(logits.chunks_exact(k)) {
                let from = &row[c * LANES..];
                match from.first_chunk() {
                    Some(from) => *to = *from,
                    None => to[..from.len()].copy_from_slice(from),
                }
            }
            let block = machine.transpose(&block);
            match columns.first_chunk_mut() {
                Some(columns) => *columns = block,
                None => columns.copy_from_slice(&block[..columns.len()]),
            }
        }
        let mut broken = [0.0; LANES];
        if !finite {
            for (broken, row) in broken.iter_mut().zip(logits.chunks_exact(k)) {
                *broken = f32::from(u8::from(!row.iter().all(|l| l.is_finite())));
            }
        }
        self.doubtful = broken;
        // Vectors narrower than sixteen lanes do the tokens in several passes.
        let parts = LANES / M::Simd::F32_LANES;
        self.checked = next.map(|_| true);
        let next = next.unwrap_or(logits);
        for part in 0..parts {
            self.part(machine, part, parts, next, target, combine);
        }
        let values = self.values;
        for (mask, column) in self.masks.iter_mut().zip(self.columns.get()) {
            *mask = machine.at_least_each(column, &values);
        }
    }

    /// A tile of which every token is to be routed by itself.
    pub(crate) fn leave(&mut self) {
        self.masks.fill(0);
        self.doubtful = [1.0; LANES];
    }

    #[inline(always)]
    fn part<M: Machine>(
        &mut self,
        machine: M,
        part: usize,
        parts: usize,
        next: &[f32],
        target: f32,
        combine: Combine,
    ) {
        let s = machine.simd();
        let splat = |v| s.splat_f32s(v);
        let (zero, one) = (splat(0.0), splat(1.0));
        let k = self.experts;
        let padded = vectors_mut::<M>(self.columns.get_mut());
        let all = &mut padded[..k * parts];
        let [a, b] = fold(all, part, parts, splat(f32::MIN), |max, v| {
            s.max_f32s(max, v)
        });
        let max = s.max_f32s(a, b);
        // Sums of sixteen, then of those: rounding grows with the depth, not the length. Meanwhile the next tile comes from memory, in
        // the order in which memory is fastest; later its rows are read side by side.
        let mut total = zero;
        let mut size = s.splat_u32s(0);
        let next = M::Simd::as_simd_f32s(next).0;
        let sixteen = all.chunks_mut(16 * parts);
        for (all, next) in sixteen.zip(next.chunks(16 * parts)) {
            let mut subtotal = zero;
            let all = all.iter_mut().skip(part).step_by(parts);
            for (v, next) in all.zip(next.iter().skip(part).step_by(parts)) {
                *v = exp(machine, s.sub_f32s(*v, max));
                subtotal = s.add_f32s(subtotal, *v);
                size = s.max_u32s(size, magnitude(machine, *next));
            }
            total = s.add_f32s(total, subtotal);
        }
        if let Some(checked) = &mut self.checked {
            *checked &= finite(machine, size);
        }
        if k > NARROW {
            total = total_of_row(machine, all.iter().skip(part).step_by(parts));
        }
        let scale = s.div_f32s(one, total);
        for v in all.iter_mut().skip(part).step_by(parts) {
            *v = s.mul_f32s(*v, scale);
        }

        let slack = f32::EPSILON * (k + 8) as f32 * target.max(1.0);
        let (enough, short) = (splat(target + slack), splat(target - slack));
        let value = if k <= SORTED {
            let sorted: [Vector<M>; SORTED] = std::array::from_fn(|e| padded[e * parts + part]);
            cut_sorted(machine, sorted, short)
        } else {
            let top = s.mul_f32s(scale, splat(1.000_000_4));
            let column = Column::<M> {
                all: &padded[..k * parts],
                part,
                parts,
            };
            column.cut(machine, top, target, short, self.rounds)
        };
        // As the row's own sum: one by one, ascending.
        let (mut sum, mut count, mut equal) = (zero, zero, zero);
        for &v in padded[..k * parts].iter().skip(part).step_by(parts) {
            let taken = s.less_than_or_equal_f32s(value, v);
            sum = s.select_f32s(taken, s.add_f32s(sum, v), sum);
            count = s.select_f32s(taken, s.add_f32s(count, one), count);
            equal = s.select_f32s(s.equal_f32s(value, v), s.add_f32s(equal, one), equal);
        }
        // All but the last fall short of the target for sure, and all reach it for sure.
        let sure = s.and_m32s(
            s.less_than_or_equal_f32s(enough, sum),
            s.equal_f32s(equal, one),
        );
        let broken = M::Simd::as_simd_f32s(&self.doubtful).0[part];
        let doubtful = s.or_m32s(s.equal_f32s(broken, one), s.not_m32s(sure));
        let factor = match combine {
            Combine::Raw => one,
            Combine::Renormalised | Combine::StraightThrough => s.div_f32s(one, sum),
        };
        let put = |to: &mut Lanes, value| M::Simd::as_mut_simd_f32s(to).0[part] = value;
        put(
            &mut self.values,
            s.select_f32s(doubtful, splat(f32::INFINITY), value),
        );
        put(&mut self.factors, factor);
        put(&mut self.counts, count);
        put(&mut self.doubtful, s.select_f32s(doubtful, one, zero));
    }

    /// The number of experts of token `i`; `None` if the row has to be routed by itself: rounding might decide, keys tie at the
    /// threshold, or a logit is not finite.
    #[inline(always)]
    pub(crate) fn count(&self, i: usize) -> Option<u32> {
        (self.doubtful[i] == 0.0).then_some(self.counts[i] as u32)
    }

    /// Writes the probabilities of its tokens, row by row.
    #[inline(always)]
    pub(crate) fn keep<M: Machine>(&self, machine: M, scores: &mut [f32]) {
        for (c, columns) in self.columns.get()[..self.experts].chunks(LANES).enumerate() {
            let mut block = [[0.0; LANES]; LANES];
            block[..columns.len()].copy_from_slice(columns);
            let rows = machine.transpose(&block);
            for (row, line) in rows.iter().zip(scores.chunks_exact_mut(self.experts)) {
                let to = &mut line[c * LANES..];
                match to.first_chunk_mut() {
                    Some(to) => *to = *row,
                    None => {
                        let rest = to.len();
                        to.copy_from_slice(&row[..rest]);
                    }
                }
            }
        }
    }

    /// Gives token `i`, which was routed by itself, its experts and weights.
    pub(crate) fn take(&mut self, i: usize, experts: &[u32], weights: &[f32]) {
        self.factors[i] = 1.0;
        let columns = self.columns.get_mut();
        for (&e, &w) in experts.iter().zip(weights) {
            columns[e as usize][i] = w;
            self.masks[e as usize] |= 1 << i;
        }
    }

    /// Of each expert, the tokens that take it.
    #[inline(always)]
    pub(crate) fn masks(&self) -> &[u16] {
        &self.masks
    }

    /// The weights of each expert's tokens; of the others, anything.
    #[inline(always)]
    pub(crate) fn weights<M: Machine>(&self, machine: M) -> impl Iterator<Item = Lanes> {
        let s = machine.simd();
        let parts = LANES / M::Simd::F32_LANES;
        let factors = M::Simd::as_simd_f32s(&self.factors).0;
        vectors::<M>(self.columns.get())
            .chunks_exact(parts)
            .map(move |column| {
                let mut weights = [0.0; LANES];
                let to = M::Simd::as_mut_simd_f32s(&mut weights).0;
                for part in 0..parts {
                    to[part] = s.mul_f32s(column[part], factors[part]);
                }
                weights
            })
    }
}

/// The bits of values without their sign: those of a NaN or an infinity are larger than all others.
#[inline(always)]
fn magnitude<M: Machine>(machine: M, v: Vector<M>) -> <M::Simd as Simd>::u32s {
    let s = machine.simd();
    s.and_u32s(s.transmute_u32s_f32s(v), s.splat_u32s(0x7fff_ffff))
}

/// Whether no magnitude is that of a NaN or an infinity.
#[inline(always)]
fn finite<M: Machine>(machine: M, size: <M::Simd as Simd>::u32s) -> bool {
    let s = machine.simd();
    let infinite = s.greater_than_u32s(size, s.splat_u32s(0x7f7f_ffff));
    s.first_true_m32s(infinite) == M::Simd::F32_LANES
}

/// Whether no value is NaN or infinite.
#[inline(always)]
fn all_finite<M: Machine>(machine: M, values: &[Lanes]) -> bool {
    let s = machine.simd();
    let [a, b] = fold2(vectors::<M>(values), s.splat_u32s(0), |size, v| {
        s.max_u32s(size, magnitude(machine, v))
    });
    finite(machine, s.max_u32s(a, b))
}

/// The sum of a row as [`Row::softmax`](crate::softmax::Row::softmax) forms it, with two vectors of subtotals.
#[inline(always)]
fn total_of_row<'a, M: Machine>(machine: M, row: impl Iterator<Item = &'a Vector<M>>) -> Vector<M> {
    let s = machine.simd();
    let mut half = M::Simd::F32_LANES;
    let mut sums = [s.splat_f32s(0.0); 2 * LANES];
    for (e, &v) in row.enumerate() {
        let sum = &mut sums[e % (2 * half)];
        *sum = s.add_f32s(*sum, v);
    }
    while half > 0 {
        let (low, high) = sums.split_at_mut(half);
        for (low, high) in low.iter_mut().zip(high) {
            *low = s.add_f32s(*low, *high);
        }
        half /= 2;
    }
    sums[0]
}

/// Folds every `parts`-th vector from `part` on with `N` independent accumulators, which hides the latency of the operation.
#[inline(always)]
fn fold<const N: usize, V: Copy, A: Copy>(
    all: &[V],
    part: usize,
    parts: usize,
    zero: A,
    f: impl Fn(A, V) -> A,
) -> [A; N] {
    let mut acc = [zero; N];
    let whole = all.chunks_exact(N * parts);
    let rest = whole.remainder();
    for vectors in whole {
        for (i, acc) in acc.iter_mut().enumerate() {
            *acc = f(*acc, vectors[i * parts + part]);
        }
    }
    for &v in rest.iter().skip(part).step_by(parts) {
        acc[0] = f(acc[0], v);
    }
    acc
}

/// The last of the keys, from the largest on, before which their sum is at most `short`.
#[inline(always)]
fn cut_sorted<M: Machine>(
    machine: M,
    mut keys: [Vector<M>; SORTED],
    short: Vector<M>,
) -> Vector<M> {
    let s = machine.simd();
    // Green's network, spelled out: a loop over it would keep the keys in memory.
    macro_rules! sort {
        ($($a:literal $b:literal,)*) => {$(
            let (a, b) = (keys[$a], keys[$b]);
            (keys[$a], keys[$b]) = (s.max_f32s(a, b), s.min_f32s(a, b));
        )*};
    }
    sort! {
        0 1, 2 3, 4 5, 6 7, 8 9, 10 11, 12 13, 14 15,
        0 2, 1 3, 4 6, 5 7, 8 10, 9 11, 12 14, 13 15,
        0 4, 1 5, 2 6, 3 7, 8 12, 9 13, 10 14, 11 15,
        0 8, 1 9, 2 10, 3 11, 4 12, 5 13, 6 14, 7 15,
        1 2, 3 12, 4 8, 5 10, 6 9, 7 11, 13 14,
        1 4, 2 8, 7 13, 11 14,
        2 4, 3 8, 5 6, 7 12, 9 10, 11 13,
        3 5, 6 8, 7 9, 10 12,
        3 4, 5 6, 7 8, 9 10, 11 12,
        6 7, 8 9,
    }
    let mut value = keys[0];
    let mut sum = keys[0];
    for &key in &keys[1..] {
        value = s.select_f32s(s.less_than_f32s(short, sum), value, key);
        sum = s.add_f32s(sum, key);
    }
    value
}

/// The probabilities of a part's tokens.
struct Column<'a, M: Machine> {
    all: &'a [Vector<M>],
    part: usize,
    parts: usize,
}

impl<M: Machine> Column<'_, M> {
    /// As [`cut_sorted`], up to rounding: brackets the threshold, then takes the keys left in the bracket one by one.
    #[inline(always)]
    fn cut(
        &self,
        machine: M,
        top: Vector<M>,
        target: f32,
        short: Vector<M>,
        rounds: usize,
    ) -> Vector<M> {
        let s = machine.simd();
        let splat = |v| s.splat_f32s(v);
        let (zero, one) = (splat(0.0), splat(1.0));
        // Keys at or above `high` measure `above`, surely less than the target; keys at or above `low`, `below`.
        let (mut high, mut above) = (top, zero);
        let (mut low, mut below) = (zero, one);
        for step in 0..rounds {
            let share = s.div_f32s(s.sub_f32s(splat(target), above), s.sub_f32s(below, above));
            let share = s.min_f32s(s.max_f32s(share, splat(0.05)), splat(0.95));
            let between = if step % 2 == 1 {
                s.mul_add_f32s(s.sub_f32s(low, high), share, high)
            } else {
                s.sqrt_f32s(s.mul_f32s(high, low))
            };
            let far = s.less_than_f32s(low, s.mul_f32s(high, splat(1e-3)));
            let middle = s.select_f32s(far, s.mul_f32s(high, splat(0.35)), between);
            let mass = self.mass(machine, middle);
            let less = s.less_than_f32s(mass, short);
            high = s.select_f32s(less, middle, high);
            above = s.select_f32s(less, mass, above);
            low = s.select_f32s(less, low, middle);
            below = s.select_f32s(less, below, mass);
        }
        let [a, b, c, d] = fold::<4, _, _>(self.all, self.part, self.parts, zero, |value, v| {
            s.select_f32s(s.less_than_f32s(v, high), s.max_f32s(value, v), value)
        });
        let mut value = s.max_f32s(s.max_f32s(a, b), s.max_f32s(c, d));
        loop {
            let [a, b, c, d] = fold::<4, _, _>(
                self.all,
                self.part,
                self.parts,
                (zero, zero),
                |(mass, next), v| {
                    let below = s.less_than_f32s(v, value);
                    (
                        s.select_f32s(below, mass, s.add_f32s(mass, v)),
                        s.select_f32s(below, s.max_f32s(next, v), next),
                    )
                },
            );
            let mass = s.add_f32s(s.add_f32s(a.0, b.0), s.add_f32s(c.0, d.0));
            let next = s.max_f32s(s.max_f32s(a.1, b.1), s.max_f32s(c.1, d.1));
            // Enough, nothing left to take, or not a number.
            let go_on = s.and_m32s(
                s.less_than_or_equal_f32s(mass, short),
                s.less_than_f32s(zero, next),
            );
            if s.first_true_m32s(go_on) == M::Simd::F32_LANES {
                return value;
            }
            value = s.select_f32s(go_on, next, value);
        }
    }

    /// The mass of the keys at or above `bound`.
    #[inline(always)]
    fn mass(&self, machine: M, bound: Vector<M>) -> Vector<M> {
        let s = machine.simd();
        let zero = s.splat_f32s(0.0);
        let [a, b, c, d] = fold::<4, _, _>(self.all, self.part, self.parts, zero, |mass, v| {
            let inside = s.less_than_or_equal_f32s(bound, v);
            s.select_f32s(inside, s.add_f32s(mass, v), mass)
        });
        s.add_f32s(s.add_f32s(a, b), s.add_f32s(c, d))
    }
}

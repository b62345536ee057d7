//! Sixteen tokens at a time, for rows too short to fill vectors: lanes are tokens, so nothing has to be reduced across lanes.

use pulp::Simd;

use crate::simd::{AlignedRow, LANES, Lanes, Machine, Vector, exp, vectors_mut};

/// Rows of at most this many experts are routed in tiles.
pub(crate) const WIDEST: usize = 128;

/// Sixteen rows, expert-major while computing and row-major at the end.
#[derive(Debug, Default)]
pub(crate) struct Tile {
    /// Expert by token: logits, then probabilities.
    columns: AlignedRow,
    /// Token by expert, padded to whole [`Lanes`] with zeros: the probabilities.
    rows: AlignedRow,
    experts: usize,
    /// Steps of the bracket before thresholds are taken one by one.
    rounds: usize,
    /// Of each token: the smallest probability it takes.
    values: Lanes,
    /// One where rounding in f32 could have changed the choice, or where the row holds a logit that is not finite.
    doubtful: Lanes,
}

impl Tile {
    pub(crate) fn prepare(&mut self, experts: usize) {
        self.experts = experts;
        self.rounds = match experts {
            0..=8 => 0,
            9..=16 => 1,
            17..=32 => 2,
            33..=64 => 3,
            _ => 5,
        };
        self.columns.resize(experts);
        self.rows.resize(experts.div_ceil(LANES) * LANES);
        self.rows.get_mut().as_flattened_mut().fill(0.0);
    }

    /// Routes sixteen consecutive rows, `logits` holding `16 K` values.
    #[inline(always)]
    pub(crate) fn route<M: Machine>(&mut self, machine: M, logits: &[f32], target: f32) {
        let k = self.experts;
        let lines: [(&[Lanes], &[f32]); LANES] =
            std::array::from_fn(|i| logits[i * k..(i + 1) * k].as_chunks());
        let (whole, rest) = self.columns.get_mut().as_chunks_mut::<LANES>();
        for (c, columns) in whole.iter_mut().enumerate() {
            *columns = machine.transpose(&std::array::from_fn(|i| lines[i].0[c]));
        }
        for (i, line) in lines.iter().enumerate() {
            rest.iter_mut()
                .zip(line.1)
                .for_each(|(column, &l)| column[i] = l);
        }
        // Vectors narrower than sixteen lanes do the tokens in several passes.
        let parts = LANES / M::Simd::F32_LANES;
        for part in 0..parts {
            self.part(machine, part, parts, target);
        }
        let chunks = k.div_ceil(LANES);
        let rows = self.rows.get_mut();
        for (c, columns) in self.columns.get().chunks(LANES).enumerate() {
            let mut block = [[0.0; LANES]; LANES];
            block[..columns.len()].copy_from_slice(columns);
            let block = machine.transpose(&block);
            for (i, part) in block.into_iter().enumerate() {
                rows[i * chunks + c] = part;
            }
        }
    }

    #[inline(always)]
    fn part<M: Machine>(&mut self, machine: M, part: usize, parts: usize, target: f32) {
        let s = machine.simd();
        let splat = |v| s.splat_f32s(v);
        let all = vectors_mut::<M>(self.columns.get_mut());
        let mut max = splat(f32::MIN);
        let mut size = s.splat_u32s(0);
        for v in all.iter().skip(part).step_by(parts) {
            max = s.max_f32s(max, *v);
            size = s.max_u32s(
                size,
                s.and_u32s(s.transmute_u32s_f32s(*v), s.splat_u32s(0x7fff_ffff)),
            );
        }
        let mut doubtful = s.greater_than_u32s(size, s.splat_u32s(0x7f7f_ffff));
        // Sums of sixteen, then of those: rounding grows with the depth, not the length.
        let mut total = splat(0.0);
        let mut subtotal = splat(0.0);
        for (e, v) in all.iter_mut().skip(part).step_by(parts).enumerate() {
            *v = exp(machine, s.sub_f32s(*v, max));
            subtotal = s.add_f32s(subtotal, *v);
            if e % 16 == 15 {
                total = s.add_f32s(total, subtotal);
                subtotal = splat(0.0);
            }
        }
        let scale = s.div_f32s(splat(1.0), s.add_f32s(total, subtotal));
        for v in all.iter_mut().skip(part).step_by(parts) {
            *v = s.mul_f32s(*v, scale);
        }

        let slack = f32::EPSILON * (self.experts + 8) as f32 * target.max(1.0);
        let (enough, short) = (splat(target + slack), splat(target - slack));
        let (zero, one) = (splat(0.0), splat(1.0));
        // Keys at or above `high` measure `above`, surely less than the target; keys at or above `low`, `below`.
        let mut high = s.mul_f32s(scale, splat(1.000_000_4));
        let mut above = zero;
        let (mut low, mut below) = (zero, one);
        for step in 0..self.rounds {
            let share = s.div_f32s(s.sub_f32s(splat(target), above), s.sub_f32s(below, above));
            let share = s.min_f32s(s.max_f32s(share, splat(0.05)), splat(0.95));
            let between = if step % 2 == 1 {
                s.mul_add_f32s(s.sub_f32s(low, high), share, high)
            } else {
                s.sqrt_f32s(s.mul_f32s(high, low))
            };
            let far = s.less_than_f32s(low, s.mul_f32s(high, splat(1e-3)));
            let middle = s.select_f32s(far, s.mul_f32s(high, splat(0.35)), between);
            let mut mass = zero;
            for v in all.iter().skip(part).step_by(parts) {
                mass = s.add_f32s(
                    mass,
                    s.select_f32s(s.less_than_or_equal_f32s(middle, *v), *v, zero),
                );
            }
            let less = s.less_than_f32s(mass, short);
            high = s.select_f32s(less, middle, high);
            above = s.select_f32s(less, mass, above);
            low = s.select_f32s(less, low, middle);
            below = s.select_f32s(less, below, mass);
        }
        let mut value = zero;
        for v in all.iter().skip(part).step_by(parts) {
            value = s.max_f32s(value, s.select_f32s(s.less_than_f32s(*v, high), *v, zero));
        }
        let mut done = doubtful;
        for _ in 0..self.experts {
            let with_one = s.add_f32s(above, value);
            // Reached by one of the keys equal to `value`, for sure; or reached perhaps: doubtful.
            let sure = s.less_than_or_equal_f32s(enough, with_one);
            let near = s.and_m32s(s.less_than_f32s(short, with_one), s.not_m32s(sure));
            doubtful = s.or_m32s(doubtful, s.and_m32s(near, s.not_m32s(done)));
            done = s.or_m32s(done, s.or_m32s(sure, near));
            if s.first_true_m32s(s.not_m32s(done)) == M::Simd::F32_LANES {
                break;
            }
            let mut equal = zero;
            let mut next = zero;
            for v in all.iter().skip(part).step_by(parts) {
                equal = s.add_f32s(equal, s.select_f32s(s.equal_f32s(*v, value), one, zero));
                next = s.max_f32s(next, s.select_f32s(s.less_than_f32s(*v, value), *v, zero));
            }
            let with_all = s.mul_add_f32s(equal, value, above);
            // Reached, perhaps, by several equal keys, or nothing is left to take: rare, and left to the exact search.
            let odd = s.or_m32s(
                s.less_than_f32s(short, with_all),
                s.less_than_or_equal_f32s(next, zero),
            );
            let odd = s.and_m32s(odd, s.not_m32s(done));
            doubtful = s.or_m32s(doubtful, odd);
            done = s.or_m32s(done, odd);
            above = s.select_f32s(done, above, with_all);
            value = s.select_f32s(done, value, next);
        }
        let mut equal = zero;
        for v in all.iter().skip(part).step_by(parts) {
            equal = s.add_f32s(equal, s.select_f32s(s.equal_f32s(value, *v), one, zero));
        }
        let tied = s.less_than_f32s(one, equal);
        doubtful = s.or_m32s(s.or_m32s(doubtful, tied), s.not_m32s(done));
        Self::put::<M>(&mut self.values, part, value);
        Self::put::<M>(&mut self.doubtful, part, s.select_f32s(doubtful, one, zero));
    }

    #[inline(always)]
    fn put<M: Machine>(to: &mut Lanes, part: usize, value: Vector<M>) {
        let all = M::Simd::as_mut_simd_f32s(to).0;
        all[part] = value;
    }

    /// The smallest probability that token `i` takes, which no other of its experts has; `None` if the row has to be routed by itself:
    /// rounding might decide, keys tie at the threshold, or a logit is not finite.
    #[inline(always)]
    pub(crate) fn threshold(&self, i: usize) -> Option<f32> {
        (self.doubtful[i] == 0.0).then_some(self.values[i])
    }

    /// The probabilities of token `i`, padded with zeros.
    #[inline(always)]
    pub(crate) fn row(&self, i: usize) -> &[Lanes] {
        let chunks = self.experts.div_ceil(LANES);
        &self.rows.get()[i * chunks..(i + 1) * chunks]
    }
}

//! One row of logits, and its softmax in f32 with the maximum subtracted.

use pulp::Simd;

use crate::simd::{AlignedRow, LANES, Machine, exp, fold2, vectors, vectors_mut};

/// The working memory of one row: padded to whole [`Lanes`](crate::simd::Lanes) with logits of minus infinity.
#[derive(Debug, Default)]
pub(crate) struct Row {
    /// The logits; minus infinity where masked.
    pub(crate) logits: AlignedRow,
    /// The softmax (or another score in [0, 1]); zero where masked.
    pub(crate) probabilities: AlignedRow,
    /// The largest logit of an expert in use.
    pub(crate) max: f32,
    /// One where an expert is in use, else zero; only read if there is a mask.
    mask: AlignedRow,
    masked: bool,
}

impl Row {
    /// Prepares for rows of `k` experts.
    pub(crate) fn prepare(&mut self, k: usize, mask: Option<&[bool]>) {
        let chunks = k.div_ceil(LANES);
        self.logits.resize(chunks);
        self.probabilities.resize(chunks);
        self.masked = mask.is_some();
        if let Some(mask) = mask {
            self.mask.resize(chunks);
            let values = self.mask.get_mut().as_flattened_mut();
            for (e, value) in values.iter_mut().enumerate() {
                *value = if mask.get(e).copied().unwrap_or(false) {
                    1.0
                } else {
                    0.0
                };
            }
        }
    }

    /// Takes the logits of one token; false if one in use is NaN or infinite.
    #[inline(always)]
    pub(crate) fn load<M: Machine>(&mut self, machine: M, from: &[f32]) -> bool {
        let s = machine.simd();
        let (whole, rest) = from.as_chunks::<LANES>();
        let logits = self.logits.get_mut();
        if let (false, Some(last)) = (rest.is_empty(), logits.last_mut()) {
            // Finite padding, for the check below; it must not win the maximum.
            *last = [f32::MIN; LANES];
            last[..rest.len()].copy_from_slice(rest);
        }
        logits
            .iter_mut()
            .zip(whole)
            .for_each(|(to, from)| *to = *from);
        let all = vectors_mut::<M>(logits);
        let lowest = s.splat_f32s(f32::NEG_INFINITY);
        if self.masked {
            let zero = s.splat_f32s(0.0);
            for (v, m) in all.iter_mut().zip(vectors::<M>(self.mask.get())) {
                *v = s.select_f32s(s.equal_f32s(*m, zero), s.splat_f32s(f32::MIN), *v);
            }
        }
        // A NaN or an infinity has the largest exponent, whatever its sign.
        let magnitude = s.splat_u32s(0x7fff_ffff);
        let step = |(largest, size), v| {
            let bits = s.and_u32s(s.transmute_u32s_f32s(v), magnitude);
            (s.max_f32s(largest, v), s.max_u32s(size, bits))
        };
        let [a, b] = fold2(all, (lowest, s.splat_u32s(0)), step);
        self.max = s.reduce_max_f32s(s.max_f32s(a.0, b.0));
        let sizes = s.max_u32s(a.1, b.1);
        let infinite = s.splat_u32s(0x7f7f_ffff);
        let finite = s.first_true_m32s(s.greater_than_u32s(sizes, infinite)) == M::Simd::F32_LANES;
        self.pad(from.len());
        finite
    }

    /// Minus infinity where there is no expert or a masked one.
    #[inline(always)]
    fn pad(&mut self, k: usize) {
        if self.masked {
            let mask = self.mask.get().as_flattened();
            let logits = self.logits.get_mut().as_flattened_mut();
            for (l, m) in logits.iter_mut().zip(mask) {
                *l = if *m == 0.0 { f32::NEG_INFINITY } else { *l };
            }
        } else {
            self.logits.get_mut().as_flattened_mut()[k..].fill(f32::NEG_INFINITY);
        }
    }

    /// Fills `probabilities`; returns the largest of them.
    #[inline(always)]
    pub(crate) fn softmax<M: Machine>(&mut self, machine: M) -> f32 {
        let s = machine.simd();
        let max = s.splat_f32s(self.max);
        let logits = vectors::<M>(self.logits.get());
        let r = vectors_mut::<M>(self.probabilities.get_mut());
        let mut total = [s.splat_f32s(0.0); 2];
        let (r_pairs, r_last) = r.as_chunks_mut::<2>();
        let (l_pairs, l_last) = logits.as_chunks::<2>();
        for (r, l) in r_pairs.iter_mut().zip(l_pairs) {
            *r = [
                exp(machine, s.sub_f32s(l[0], max)),
                exp(machine, s.sub_f32s(l[1], max)),
            ];
            total = [s.add_f32s(total[0], r[0]), s.add_f32s(total[1], r[1])];
        }
        for (r, l) in r_last.iter_mut().zip(l_last) {
            *r = exp(machine, s.sub_f32s(*l, max));
            total[0] = s.add_f32s(total[0], *r);
        }
        // The largest entry is e^0 = 1, so the sum is at least 1 and its inverse is the largest probability.
        let scale = 1.0 / s.reduce_sum_f32s(s.add_f32s(total[0], total[1]));
        for r in r {
            *r = s.mul_f32s(*r, s.splat_f32s(scale));
        }
        scale
    }
}

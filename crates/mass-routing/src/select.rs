//! Which experts of a row: the smallest set of a given mass, or the k largest, without sorting the row.
//!
//! Both are a threshold: all keys above it, and of those equal to it the first few. The threshold is found by taking the largest values
//! one by one (usually a few suffice) and then by a bracket that shrinks by interpolation and bisection until few keys are left in it.
//! Every step is one pass over a row that sits in the first-level cache.

use pulp::Simd;

use crate::simd::{LANES, Lanes, Machine, Vector, fold2, vectors};

/// Keys at or above `value` are selected; of those equal to it, the first `ties`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Threshold {
    pub(crate) value: f32,
    pub(crate) ties: usize,
}

impl Threshold {
    /// All keys above zero.
    pub(crate) const POSITIVE: Self = Self {
        value: f32::from_bits(1),
        ties: usize::MAX,
    };
}

/// What a selected key contributes towards the target.
pub(crate) trait Measure {
    fn of(key: f32) -> f32;

    fn vector<M: Machine>(machine: M, keys: Vector<M>) -> Vector<M>;
}

/// Its own value: the target is a mass.
pub(crate) struct Mass;

impl Measure for Mass {
    #[inline(always)]
    fn of(key: f32) -> f32 {
        key
    }

    #[inline(always)]
    fn vector<M: Machine>(_: M, keys: Vector<M>) -> Vector<M> {
        keys
    }
}

/// One: the target is a number.
pub(crate) struct Count;

impl Measure for Count {
    #[inline(always)]
    fn of(_: f32) -> f32 {
        1.0
    }

    #[inline(always)]
    fn vector<M: Machine>(machine: M, _: Vector<M>) -> Vector<M> {
        machine.simd().splat_f32s(1.0)
    }
}

/// Values taken one by one before the bracket; each costs about as much as one step of the bracket.
const ONE_BY_ONE: usize = 6;

/// A bracket with so few keys is sorted.
const FEW: f32 = 12.0;

/// The threshold of the smallest set whose measure, in f64 over the f32 keys, reaches `target`.
///
/// `top` is the largest key. Keys at or below `floor` do not take part; if all others together fall short of the target (which
/// rounding of the keys allows), all of them are selected.
#[inline(always)]
pub(crate) fn threshold<F: Measure, M: Machine>(
    machine: M,
    keys: &[Lanes],
    top: f32,
    floor: f32,
    target: f64,
    candidates: &mut Vec<f32>,
) -> Threshold {
    let mut above = 0.0_f64;
    let mut value = top;
    for _ in 0..ONE_BY_ONE {
        let each = f64::from(F::of(value));
        if above + each >= target {
            return Threshold { value, ties: 1 };
        }
        let (equal, next) = next_below(machine, keys, value);
        for ties in 2..=equal {
            if above + ties as f64 * each >= target {
                return Threshold { value, ties };
            }
        }
        if next <= floor {
            return Threshold {
                value,
                ties: usize::MAX,
            };
        }
        above += equal as f64 * each;
        value = next;
    }
    bracket::<F, M>(machine, keys, value, above, floor, target, candidates)
}

/// The threshold, given that it is at most `high` and that keys above `high` measure `above < target`.
#[inline(always)]
fn bracket<F: Measure, M: Machine>(
    machine: M,
    keys: &[Lanes],
    high: f32,
    above: f64,
    floor: f32,
    target: f64,
    candidates: &mut Vec<f32>,
) -> Threshold {
    // Invariant, up to rounding in f32: keys >= high fall short of the target (or are none below `top`), keys >= low reach it.
    let mut high = (high.next_up(), above as f32, 0.0);
    let mut low = {
        let (lowest, measure, count) = lowest_above::<F, M>(machine, keys, floor, high.0);
        (lowest, high.1 + measure, count)
    };
    let goal = target as f32;
    for step in 0..32 {
        // Written so that a NaN, too, ends the search.
        let reachable = low.1 > high.1;
        if low.2 - high.2 <= FEW || !reachable {
            break;
        }
        let share = if step % 2 == 0 {
            ((goal - high.1) / (low.1 - high.1)).clamp(0.02, 0.98)
        } else {
            0.5
        };
        let middle = high.0 + (low.0 - high.0) * share;
        if middle >= high.0 || middle <= low.0 {
            break;
        }
        let (measure, count) = between::<F, M>(machine, keys, middle, high.0);
        let (measure, count) = (high.1 + measure, high.2 + count);
        if measure < goal {
            high = (middle, measure, count);
        } else {
            low = (middle, measure, count);
        }
    }
    // Exactly, from here: the f32 sums above only served to find a small bracket.
    let exact = exact_at_least::<F>(keys, high.0);
    let (from, from_measure) = if exact < target {
        (high.0, exact)
    } else {
        (f32::INFINITY, 0.0)
    };
    if let Some(found) =
        resolve::<F, M>(machine, keys, low.0, from, from_measure, target, candidates)
    {
        return found;
    }
    // Rounding put the threshold outside the bracket: sort all keys above the floor.
    let found = resolve::<F, M>(
        machine,
        keys,
        floor.next_up(),
        f32::INFINITY,
        0.0,
        target,
        candidates,
    );
    found.unwrap_or(Threshold {
        value: floor.next_up(),
        ties: usize::MAX,
    })
}

/// Number of keys equal to `value`, and the largest key below it (minus infinity if there is none).
#[inline(always)]
fn next_below<M: Machine>(machine: M, keys: &[Lanes], value: f32) -> (usize, f32) {
    let s = machine.simd();
    let (zero, one, lowest) = (
        s.splat_f32s(0.0),
        s.splat_f32s(1.0),
        s.splat_f32s(f32::NEG_INFINITY),
    );
    let bound = s.splat_f32s(value);
    let [a, b] = fold2(vectors::<M>(keys), (zero, lowest), |(equal, next), v| {
        let below = s.select_f32s(s.less_than_f32s(v, bound), v, lowest);
        (
            s.add_f32s(equal, s.select_f32s(s.equal_f32s(v, bound), one, zero)),
            s.max_f32s(next, below),
        )
    });
    (
        s.reduce_sum_f32s(s.add_f32s(a.0, b.0)) as usize,
        s.reduce_max_f32s(s.max_f32s(a.1, b.1)),
    )
}

/// Smallest key above `floor`; measure and number of the keys in `(floor, high)`.
#[inline(always)]
fn lowest_above<F: Measure, M: Machine>(
    machine: M,
    keys: &[Lanes],
    floor: f32,
    high: f32,
) -> (f32, f32, f32) {
    let s = machine.simd();
    let (bound, highest) = (s.splat_f32s(floor), s.splat_f32s(f32::INFINITY));
    let [a, b] = fold2(vectors::<M>(keys), highest, |lowest, v| {
        s.min_f32s(
            lowest,
            s.select_f32s(s.less_than_f32s(bound, v), v, highest),
        )
    });
    let lowest = s.reduce_min_f32s(s.min_f32s(a, b));
    let (measure, count) = between::<F, M>(machine, keys, lowest, high);
    (lowest, measure, count)
}

/// Measure and number of the keys in `[low, high)`.
#[inline(always)]
fn between<F: Measure, M: Machine>(machine: M, keys: &[Lanes], low: f32, high: f32) -> (f32, f32) {
    let s = machine.simd();
    let (zero, one) = (s.splat_f32s(0.0), s.splat_f32s(1.0));
    let (low, high) = (s.splat_f32s(low), s.splat_f32s(high));
    let [a, b] = fold2(vectors::<M>(keys), (zero, zero), |(measure, count), v| {
        let inside = s.and_m32s(s.less_than_or_equal_f32s(low, v), s.less_than_f32s(v, high));
        let value = s.select_f32s(inside, F::vector(machine, v), zero);
        (
            s.add_f32s(measure, value),
            s.add_f32s(count, s.select_f32s(inside, one, zero)),
        )
    });
    (
        s.reduce_sum_f32s(s.add_f32s(a.0, b.0)),
        s.reduce_sum_f32s(s.add_f32s(a.1, b.1)),
    )
}

/// Measure of the keys at or above `low`, summed in f64.
#[inline(always)]
fn exact_at_least<F: Measure>(keys: &[Lanes], low: f32) -> f64 {
    let mut measure = [0.0_f64; LANES];
    for v in keys {
        for i in 0..LANES {
            measure[i] += if v[i] >= low {
                f64::from(F::of(v[i]))
            } else {
                0.0
            };
        }
    }
    measure.into_iter().sum()
}

/// The threshold among the keys in `[low, high)`, those at or above `high` measuring `above`; `None` if they do not reach the target.
#[inline(always)]
fn resolve<F: Measure, M: Machine>(
    machine: M,
    keys: &[Lanes],
    low: f32,
    high: f32,
    above: f64,
    target: f64,
    candidates: &mut Vec<f32>,
) -> Option<Threshold> {
    let mut count = 0;
    candidates.resize(candidates.len().max((keys.len() + 1) * LANES), 0.0);
    for v in keys {
        let mask = machine.at_least(v, low) & !machine.at_least(v, high);
        if mask != 0 {
            let to = candidates[count..].first_chunk_mut()?;
            count += machine.compress(mask, v, 0, to, &mut [0; LANES]);
        }
    }
    let candidates = &mut candidates[..count];
    candidates.sort_unstable_by(|a, b| b.total_cmp(a));
    let mut measure = above;
    let mut ties = 0;
    let mut previous = f32::INFINITY;
    for &value in candidates.iter() {
        ties = if value == previous { ties + 1 } else { 1 };
        previous = value;
        measure += f64::from(F::of(value));
        if measure >= target {
            return Some(Threshold { value, ties });
        }
    }
    None
}

/// The selected experts of the tokens of a block, one after the other, ascending within a token.
#[derive(Debug, Default)]
pub(crate) struct Picks {
    experts: Vec<u32>,
    weights: Vec<f32>,
    len: usize,
}

impl Picks {
    pub(crate) fn clear(&mut self) {
        self.len = 0;
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn experts(&self) -> &[u32] {
        &self.experts[..self.len]
    }

    pub(crate) fn weights(&self) -> &[f32] {
        &self.weights[..self.len]
    }

    pub(crate) fn weights_from(&mut self, from: usize) -> &mut [f32] {
        &mut self.weights[from..self.len]
    }

    /// Makes room for a row of `chunks` [`Lanes`], and the overhang of a vector store.
    #[inline(always)]
    fn reserve(&mut self, chunks: usize) {
        let needed = self.len + (chunks + 1) * LANES;
        if self.experts.len() < needed {
            self.experts.resize(needed.max(self.experts.len() * 2), 0);
            self.weights.resize(self.experts.len(), 0.0);
        }
    }

    pub(crate) fn push(&mut self, expert: u32, weight: f32) {
        self.reserve(0);
        self.experts[self.len] = expert;
        self.weights[self.len] = weight;
        self.len += 1;
    }

    /// Appends the experts whose keys pass the threshold, with their `values` as weights.
    #[inline(always)]
    pub(crate) fn take<M: Machine>(
        &mut self,
        machine: M,
        keys: &[Lanes],
        threshold: Threshold,
        values: &[Lanes],
    ) {
        self.reserve(keys.len());
        let above = threshold.value.next_up();
        let mut ties = threshold.ties;
        for (c, (key, value)) in keys.iter().zip(values).enumerate() {
            let mut mask = machine.at_least(key, threshold.value);
            if mask == 0 {
                continue;
            }
            if threshold.ties != usize::MAX {
                let sure = machine.at_least(key, above);
                let mut equal = mask & !sure;
                mask = sure;
                while equal != 0 && ties > 0 {
                    mask |= equal & equal.wrapping_neg();
                    equal &= equal - 1;
                    ties -= 1;
                }
            }
            let (Some(weights), Some(experts)) = (
                self.weights[self.len..].first_chunk_mut(),
                self.experts[self.len..].first_chunk_mut(),
            ) else {
                unreachable!("reserved above");
            };
            self.len += machine.compress(mask, value, (c * LANES) as u32, weights, experts);
        }
    }
}

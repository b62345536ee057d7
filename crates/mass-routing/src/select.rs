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

    /// The end of the bracket that includes every key above the floor.
    fn lowest<M: Machine>(machine: M, keys: &[Lanes], floor: f32) -> End;

    /// Where to cut the bracket next.
    fn guess(high: End, low: End, goal: f32, step: usize) -> f32;
}

/// The cut by linear interpolation of the measure, a little away from the ends.
#[inline(always)]
fn interpolate(high: End, low: End, goal: f32) -> f32 {
    let share = (goal - high.measure) / (low.measure - high.measure);
    high.value + (low.value - high.value) * share.clamp(0.03, 0.97)
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

    /// All probabilities: their sum is one but for rounding. (With a mass as key, the floor is zero.)
    #[inline(always)]
    fn lowest<M: Machine>(_: M, keys: &[Lanes], floor: f32) -> End {
        End {
            value: floor.next_up(),
            measure: 1.0,
            count: (keys.len() * LANES) as f32,
        }
    }

    /// Probabilities spread over orders of magnitude: first down by factors, then interpolation and geometric means in turn.
    #[inline(always)]
    fn guess(high: End, low: End, goal: f32, step: usize) -> f32 {
        if low.value < 1e-3 * high.value {
            0.35 * high.value
        } else if step.is_multiple_of(2) {
            interpolate(high, low, goal)
        } else {
            (high.value * low.value).sqrt()
        }
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

    #[inline(always)]
    fn lowest<M: Machine>(machine: M, keys: &[Lanes], floor: f32) -> End {
        let s = machine.simd();
        let (bound, highest) = (s.splat_f32s(floor), s.splat_f32s(f32::INFINITY));
        let [a, b] = fold2(vectors::<M>(keys), highest, |lowest, v| {
            s.min_f32s(
                lowest,
                s.select_f32s(s.less_than_f32s(bound, v), v, highest),
            )
        });
        at_least::<Self, M>(machine, keys, s.reduce_min_f32s(s.min_f32s(a, b)))
    }

    #[inline(always)]
    fn guess(high: End, low: End, goal: f32, step: usize) -> f32 {
        if step.is_multiple_of(2) {
            interpolate(high, low, goal)
        } else {
            0.5 * (high.value + low.value)
        }
    }
}

/// Values taken one by one before the bracket; each costs about as much as one step of the bracket.
const ONE_BY_ONE: usize = 3;

/// Rows of so few [`Lanes`] are cheapest one by one to the end.
const SHORT: usize = 1;

/// A bracket with so few keys is sorted.
const FEW: f32 = 8.0;

/// The threshold of the smallest set whose measure, summed in f64 over the f32 keys, reaches `target`.
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
    let mut left = if keys.len() <= SHORT {
        usize::MAX
    } else {
        ONE_BY_ONE
    };
    loop {
        let each = f64::from(F::of(value));
        if above + each >= target {
            return Threshold { value, ties: 1 };
        }
        if left == 0 {
            break;
        }
        left -= 1;
        let (equal, next) = next_below(machine, keys, value);
        if equal > 1 {
            for ties in 2..=equal {
                if above + ties as f64 * each >= target {
                    return Threshold { value, ties };
                }
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

/// One end of the bracket: the keys at or above `value` have this measure and this number.
#[derive(Clone, Copy)]
pub(crate) struct End {
    value: f32,
    measure: f32,
    count: f32,
}

/// The threshold, given that it is at most `highest` and that keys above `highest` measure `above < target`.
#[inline(always)]
fn bracket<F: Measure, M: Machine>(
    machine: M,
    keys: &[Lanes],
    highest: f32,
    above: f64,
    floor: f32,
    target: f64,
    candidates: &mut Vec<f32>,
) -> Threshold {
    // Up to rounding in f32: keys at or above `high` fall short of the target, keys at or above `low` reach it.
    let mut high = End {
        value: highest.next_up(),
        measure: above as f32,
        count: 0.0,
    };
    let mut low = F::lowest(machine, keys, floor);
    let goal = target as f32;
    for step in 0..40 {
        if low.count - high.count <= FEW {
            break;
        }
        let middle = F::guess(high, low, goal, step);
        // Written so that a NaN, too, ends the search.
        let inside = low.value < middle && middle < high.value;
        if !inside {
            break;
        }
        let end = at_least::<F, M>(machine, keys, middle);
        if end.measure < goal {
            high = end;
        } else {
            low = end;
        }
    }
    // The f32 sums have done their work if the keys they leave decide the matter by more than their rounding error.
    let slack = f64::from(f32::EPSILON) * (keys.len() + 8) as f64 * target.max(1.0);
    let start = f64::from(high.measure);
    if let Some(found) = resolve::<F, M>(
        machine, keys, low.value, high.value, start, target, slack, candidates,
    ) {
        return found;
    }
    let exact = exact_at_least::<F>(keys, high.value);
    let (from, start) = if exact < target {
        (high.value, exact)
    } else {
        (f32::INFINITY, 0.0)
    };
    if let Some(found) = resolve::<F, M>(
        machine, keys, low.value, from, start, target, 0.0, candidates,
    ) {
        return found;
    }
    // Rounding put the threshold outside the bracket: sort all keys above the floor.
    let lowest = floor.next_up();
    let found = resolve::<F, M>(
        machine,
        keys,
        lowest,
        f32::INFINITY,
        0.0,
        target,
        0.0,
        candidates,
    );
    found.unwrap_or(Threshold {
        value: lowest,
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

/// Measure and number of the keys at or above `low`, in f32.
#[inline(always)]
fn at_least<F: Measure, M: Machine>(machine: M, keys: &[Lanes], low: f32) -> End {
    let s = machine.simd();
    let (zero, one, bound) = (s.splat_f32s(0.0), s.splat_f32s(1.0), s.splat_f32s(low));
    let [a, b] = fold2(vectors::<M>(keys), (zero, zero), |(measure, count), v| {
        let inside = s.less_than_or_equal_f32s(bound, v);
        let value = s.select_f32s(inside, F::vector(machine, v), zero);
        (
            s.add_f32s(measure, value),
            s.add_f32s(count, s.select_f32s(inside, one, zero)),
        )
    });
    let measure = s.reduce_sum_f32s(s.add_f32s(a.0, b.0));
    End {
        value: low,
        measure,
        count: s.reduce_sum_f32s(s.add_f32s(a.1, b.1)),
    }
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

/// The threshold among the keys in `[low, high)`, those at or above `high` measuring `above`.
///
/// `None` if they do not reach the target, or if the target is within `slack` of a sum that decides.
#[inline(always)]
#[expect(
    clippy::too_many_arguments,
    reason = "the bracket's state, and where to work"
)]
fn resolve<F: Measure, M: Machine>(
    machine: M,
    keys: &[Lanes],
    low: f32,
    high: f32,
    above: f64,
    target: f64,
    slack: f64,
    candidates: &mut Vec<f32>,
) -> Option<Threshold> {
    let mut count = 0;
    if candidates.len() < (keys.len() + 1) * LANES {
        candidates.resize((keys.len() + 1) * LANES, 0.0);
    }
    for v in keys {
        let mask = machine.at_least(v, low) & !machine.at_least(v, high);
        let to = candidates[count..].first_chunk_mut()?;
        count += machine.compress(mask, v, 0, to, &mut [0; LANES]);
    }
    let candidates = &mut candidates[..count];
    if count <= 16 {
        insertion_sort(candidates);
    } else {
        candidates.sort_unstable_by(|a, b| b.total_cmp(a));
    }
    if slack > 0.0 && above >= target - slack {
        return None;
    }
    let mut measure = above;
    let mut ties = 0;
    let mut previous = f32::INFINITY;
    for &value in candidates.iter() {
        ties = if value == previous { ties + 1 } else { 1 };
        previous = value;
        measure += f64::from(F::of(value));
        if measure >= target - slack {
            return (measure >= target + slack).then_some(Threshold { value, ties });
        }
    }
    None
}

/// Sorts a few values, descending.
#[inline(always)]
fn insertion_sort(values: &mut [f32]) {
    for i in 1..values.len() {
        let value = values[i];
        let mut j = i;
        while j > 0 && values[j - 1] < value {
            values[j] = values[j - 1];
            j -= 1;
        }
        values[j] = value;
    }
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
        let from = self.len;
        for (c, (key, value)) in keys.iter().zip(values).enumerate() {
            self.append(machine, machine.at_least(key, threshold.value), c, value);
        }
        if threshold.ties == usize::MAX {
            return;
        }
        // Nearly always there are no more ties than wanted; then all of them have been taken, and rightly.
        let (equal, _) = next_below(machine, keys, threshold.value);
        if equal > threshold.ties {
            self.len = from;
            let mut ties = threshold.ties;
            for (c, (key, value)) in keys.iter().zip(values).enumerate() {
                let mut mask = machine.at_least(key, threshold.value.next_up());
                let mut equal = machine.at_least(key, threshold.value) & !mask;
                while equal != 0 && ties > 0 {
                    mask |= equal & equal.wrapping_neg();
                    equal &= equal - 1;
                    ties -= 1;
                }
                self.append(machine, mask, c, value);
            }
        }
    }

    #[inline(always)]
    fn append<M: Machine>(&mut self, machine: M, mask: u16, chunk: usize, value: &Lanes) {
        let weights = self.weights[self.len..].first_chunk_mut();
        let experts = self.experts[self.len..].first_chunk_mut();
        let (Some(weights), Some(experts)) = (weights, experts) else {
            unreachable!("reserved")
        };
        self.len += machine.compress(mask, value, (chunk * LANES) as u32, weights, experts);
    }
}

//! What a segment costs, and the segmentation that costs least.

use serde::{Deserialize, Serialize};

use super::{
    double::{Double, Number},
    series::{Prefix, Series, around_mean, edges},
};

/// What a segment costs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cost {
    /// `sum (y - mean)^2`: changes of level.
    #[default]
    Level,
    /// `m log(sum (y - mean)^2 / m + v)`: changes of level or spread (twice the negative Gaussian log-likelihood).
    ///
    /// `v` is the least variance that can be believed, without which a run of equal values would have infinite
    /// likelihood: `d^2 / 12` for values that are multiples of `d`, or, where a share `p` of neighbours are equal,
    /// `p^2 / 3` times the median square of the differences that are not zero, whichever is more.
    LevelAndSpread,
}

impl Cost {
    /// Least number of points that a segment needs.
    pub(super) fn least(self) -> usize {
        match self {
            Self::Level => 1,
            Self::LevelAndSpread => 2,
        }
    }
}

/// A series with its cost.
pub(super) struct Costs<'a> {
    pub(super) series: &'a Series,
    pub(super) cost: Cost,
    /// The least variance that can be believed, with [`Cost::LevelAndSpread`].
    pub(super) floor: f64,
}

impl<'a> Costs<'a> {
    pub(super) fn new(series: &'a Series, cost: Cost, min_segment: usize) -> Self {
        let floor = match cost {
            Cost::Level => 0.0,
            Cost::LevelAndSpread => series
                .least_variance(min_segment)
                .max(series.rounding(series.is_plain(series.small_square(min_segment))))
                .max(f64::MIN_POSITIVE),
        };
        Self {
            series,
            cost,
            floor,
        }
    }

    /// Cost of a whole segmentation.
    pub(super) fn total(&self, indices: &[usize]) -> Total {
        let prefix = self.series.fine();
        let mut total = Double::of(0.0);
        for e in edges(indices, self.series.len()).windows(2) {
            let squares = prefix.squares(e[0], e[1]);
            total = total
                + match self.cost {
                    Cost::Level => squares,
                    Cost::LevelAndSpread => spread((e[1] - e[0]) as f64, squares, self.floor),
                };
        }
        Total(total)
    }

    /// The segmentation that costs least with `penalty` for each change point, in arithmetic fine enough for it.
    pub(super) fn best(&self, penalty: f64, min_segment: usize) -> Vec<usize> {
        let n = self.series.len();
        if self.series.is_constant() {
            return Vec::new();
        }
        let table = match (self.cost, self.is_plain(penalty)) {
            (Cost::Level, true) => level(self.series.plain(), None, penalty, min_segment).1,
            (Cost::Level, false) => level(self.series.fine(), None, penalty, min_segment).1,
            (Cost::LevelAndSpread, true) => {
                self.spread(self.series.plain(), None, penalty, min_segment)
                    .1
            }
            (Cost::LevelAndSpread, false) => {
                self.spread(self.series.fine(), None, penalty, min_segment)
                    .1
            }
        };
        trace(n, |end| table[end])
    }

    /// The segmentations that cost least with 0 to `most` change points; fewer where there is no room.
    pub(super) fn best_of_each_number(&self, most: usize, min_segment: usize) -> Vec<Vec<usize>> {
        // Without a penalty, differences the size of the noise have to be told apart.
        let plain = self.is_plain(self.series.small_square(min_segment));
        match (self.cost, plain) {
            (Cost::Level, true) => layers(self.series.len(), most, |before| {
                level(self.series.plain(), Some(before), 0.0, min_segment)
            }),
            (Cost::Level, false) => layers(self.series.len(), most, |before| {
                level(self.series.fine(), Some(before), 0.0, min_segment)
            }),
            (Cost::LevelAndSpread, true) => layers(self.series.len(), most, |before| {
                self.spread(self.series.plain(), Some(before), 0.0, min_segment)
            }),
            (Cost::LevelAndSpread, false) => layers(self.series.len(), most, |before| {
                self.spread(self.series.fine(), Some(before), 0.0, min_segment)
            }),
        }
    }

    /// Whether `f64` is good enough to weigh costs that differ by `difference`.
    fn is_plain(&self, difference: f64) -> bool {
        match self.cost {
            Cost::Level => self.series.is_plain(difference),
            // The floor is over the rounding that was reckoned with.
            Cost::LevelAndSpread => self.floor >= self.series.rounding(true),
        }
    }

    fn spread<N: Number>(
        &self,
        prefix: &Prefix<N>,
        before: Option<&[Option<N>]>,
        penalty: f64,
        min_segment: usize,
    ) -> Table<N> {
        let floor = self.floor;
        search(prefix, before, penalty, min_segment, |m, squares| {
            spread(m, squares, floor)
        })
    }
}

/// A sum of costs, of which differences may be wanted that are far smaller than itself.
#[derive(Clone, Copy)]
pub(super) struct Total(Double);

impl Total {
    pub(super) fn value(self) -> f64 {
        self.0.value()
    }

    pub(super) fn minus(self, other: Self) -> f64 {
        (self.0 - other.0).value()
    }
}

fn level<N: Number>(
    prefix: &Prefix<N>,
    before: Option<&[Option<N>]>,
    penalty: f64,
    min_segment: usize,
) -> Table<N> {
    search(prefix, before, penalty, min_segment, |_, squares| squares)
}

#[inline]
fn spread<N: Number>(m: f64, squares: N, floor: f64) -> N {
    N::of(m * (squares.value() / m + floor).ln())
}

/// Least cost up to each end, `None` where no segmentation ends, and the start of the last segment.
type Table<N> = (Vec<Option<N>>, Vec<usize>);

/// Starts that may still be best, beside what their costs need. As arrays, for loops that take many at once.
struct Starts<N> {
    at: Vec<f64>,
    /// Least cost of all before it, penalties included.
    best: Vec<N>,
    sum: Vec<N>,
    square: Vec<N>,
    /// The end from which on it is given up.
    until: Vec<f64>,
    /// So many are looked through for those given up.
    full: usize,
}

/// Values compared side by side.
const LANES: usize = 8;

impl<N: Number> Starts<N> {
    fn new() -> Self {
        Self {
            at: Vec::new(),
            best: Vec::new(),
            sum: Vec::new(),
            square: Vec::new(),
            until: Vec::new(),
            full: 0,
        }
    }

    #[inline(always)]
    fn push(&mut self, at: usize, best: N, prefix: &Prefix<N>) {
        self.at.push(at as f64);
        self.best.push(best);
        self.sum.push(prefix.sum[at]);
        self.square.push(prefix.square[at]);
        self.until.push(f64::INFINITY);
    }

    /// What all up to `end` costs with the last segment from each start, infinite for those given up.
    #[inline(always)]
    fn values(
        &self,
        end: usize,
        prefix: &Prefix<N>,
        cost: &impl Fn(f64, N) -> N,
        values: &mut Vec<N>,
    ) {
        let n = self.at.len();
        values.resize(n, N::of(f64::INFINITY));
        let (values, at, until) = (&mut values[..n], &self.at[..n], &self.until[..n]);
        let (best, sums, squares) = (&self.best[..n], &self.sum[..n], &self.square[..n]);
        let (sum, square, end) = (prefix.sum[end], prefix.square[end], end as f64);
        for i in 0..n {
            let m = end - at[i];
            let value = best[i] + cost(m, around_mean(m, sum - sums[i], square - squares[i]));
            values[i] = if until[i] > end {
                value
            } else {
                N::of(f64::INFINITY)
            };
        }
    }

    /// Those whose value is no less than the limit are given up from the end `due` on.
    #[inline(always)]
    fn give_up(&mut self, values: &[N], limit: N, due: f64) {
        for (until, &value) in self.until.iter_mut().zip(values) {
            *until = if (value >= limit) & (*until > due) {
                due
            } else {
                *until
            };
        }
    }

    /// Makes room, now and then, of those given up before `end`.
    fn clean(&mut self, end: f64) {
        if self.at.len() < self.full {
            return;
        }
        let mut kept = 0;
        for i in 0..self.at.len() {
            if self.until[i] > end {
                self.at[kept] = self.at[i];
                self.best[kept] = self.best[i];
                self.sum[kept] = self.sum[i];
                self.square[kept] = self.square[i];
                self.until[kept] = self.until[i];
                kept += 1;
            }
        }
        self.at.truncate(kept);
        self.best.truncate(kept);
        self.sum.truncate(kept);
        self.square.truncate(kept);
        self.until.truncate(kept);
        self.full = kept + kept / 8 + 2 * LANES;
    }
}

/// The least value, and the first place where it is.
#[inline(always)]
fn first_least<N: Number>(values: &[N]) -> (N, usize) {
    let mut least = [N::of(f64::INFINITY); LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for (least, &v) in least.iter_mut().zip(chunk) {
            *least = if v < *least { v } else { *least };
        }
    }
    let least = least
        .iter()
        .chain(rest)
        .fold(least[0], |least, &v| if v < least { v } else { least });
    let at = values.iter().position(|&v| v == least);
    (least, at.unwrap_or(0))
}

/// Optimal partitioning, or with the least costs `before` of one segment fewer, one layer of the segment
/// neighbourhood. A start `s` is given up at `t` once `F(s) + cost(s, t) >= F(t)`, where `F` is what starts build on:
/// whatever ends at or after `t + min_segment` is then no worse cut at `t`.
///
/// `cost` takes the number of points of a segment and its sum of squares around its mean.
fn search<N: Number>(
    prefix: &Prefix<N>,
    before: Option<&[Option<N>]>,
    penalty: f64,
    min_segment: usize,
    cost: impl Fn(f64, N) -> N,
) -> Table<N> {
    // With the widest vectors that the processor has; the results are the same bits with any.
    pulp::Arch::new().dispatch(Search {
        prefix,
        before,
        penalty,
        min_segment,
        cost,
    })
}

struct Search<'a, N, C> {
    prefix: &'a Prefix<N>,
    before: Option<&'a [Option<N>]>,
    penalty: f64,
    min_segment: usize,
    cost: C,
}

impl<N: Number, C: Fn(f64, N) -> N> pulp::NullaryFnOnce for Search<'_, N, C> {
    type Output = Table<N>;

    #[inline(always)]
    fn call(self) -> Table<N> {
        let Self {
            prefix,
            before,
            min_segment,
            ..
        } = self;
        let n = prefix.sum.len() - 1;
        let penalty = N::of(self.penalty);
        let mut best: Vec<Option<N>> = vec![None; n + 1];
        let mut from = vec![0; n + 1];
        if before.is_none() {
            best[0] = Some(N::of(0.0) - penalty);
        }
        let mut starts = Starts::new();
        let mut values: Vec<N> = Vec::new();
        for end in min_segment..=n {
            let new = end - min_segment;
            if let Some(best) = before.map_or(best[new], |b| b[new]) {
                starts.push(new, best, prefix);
            }
            if starts.at.is_empty() {
                continue;
            }
            starts.values(end, prefix, &self.cost, &mut values);
            let (least, which) = first_least(&values);
            let total = least + penalty;
            best[end] = Some(total);
            from[end] = starts.at[which] as usize;
            if let Some(limit) = before.map_or(Some(total), |b| b[end]) {
                starts.give_up(&values, limit, (end + min_segment) as f64);
            }
            starts.clean((end + 1) as f64);
        }
        (best, from)
    }
}

/// Layer upon layer of the segment neighbourhood: the change points for each number of them.
fn layers<N: Number>(
    n: usize,
    most: usize,
    layer: impl Fn(&[Option<N>]) -> Table<N>,
) -> Vec<Vec<usize>> {
    let mut before = vec![None; n + 1];
    before[0] = Some(N::of(0.0));
    let mut tables: Vec<Vec<usize>> = Vec::new();
    let mut found = Vec::new();
    while found.len() <= most {
        let (best, from) = layer(&before);
        if best[n].is_none() {
            break;
        }
        tables.push(from);
        let mut depth = tables.len();
        found.push(trace(n, |end| {
            depth -= 1;
            tables[depth][end]
        }));
        before = best;
    }
    found
}

/// Follows the starts back from the end of the series.
fn trace(n: usize, mut from: impl FnMut(usize) -> usize) -> Vec<usize> {
    let mut indices = Vec::new();
    let mut end = from(n);
    while end > 0 {
        indices.push(end);
        end = from(end);
    }
    indices.reverse();
    indices
}

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

/// A start that may still be best, beside what its cost needs.
#[derive(Clone, Copy)]
struct Start<N> {
    at: usize,
    /// Least cost of all before it, penalties included.
    best: N,
    sum: N,
    square: N,
    /// The end from which on it is given up.
    until: usize,
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
    let n = prefix.sum.len() - 1;
    let penalty = N::of(penalty);
    let mut best: Vec<Option<N>> = vec![None; n + 1];
    let mut from = vec![0; n + 1];
    if before.is_none() {
        best[0] = Some(N::of(0.0) - penalty);
    }
    let mut starts: Vec<Start<N>> = Vec::new();
    let mut values: Vec<N> = Vec::new();
    for end in min_segment..=n {
        let new = end - min_segment;
        if let Some(best) = before.map_or(best[new], |b| b[new]) {
            starts.push(Start {
                at: new,
                best,
                sum: prefix.sum[new],
                square: prefix.square[new],
                until: usize::MAX,
            });
        }
        if starts.is_empty() {
            continue;
        }
        let (sum, square) = (prefix.sum[end], prefix.square[end]);
        values.clear();
        values.extend(starts.iter().map(|s| {
            let m = (end - s.at) as f64;
            s.best + cost(m, around_mean(m, sum - s.sum, square - s.square))
        }));
        let (mut least, mut which) = (values[0], 0);
        for (i, &v) in values.iter().enumerate() {
            if v < least {
                (least, which) = (v, i);
            }
        }
        let total = least + penalty;
        best[end] = Some(total);
        from[end] = starts[which].at;
        let limit = before.map_or(Some(total), |b| b[end]);
        let mut kept = 0;
        for i in 0..starts.len() {
            let mut start = starts[i];
            if limit.is_some_and(|limit| values[i] >= limit) {
                start.until = start.until.min(end + min_segment);
            }
            // The next end is `end + 1`.
            if start.until > end + 1 {
                starts[kept] = start;
                kept += 1;
            }
        }
        starts.truncate(kept);
    }
    (best, from)
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

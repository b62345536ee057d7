//! The segmentations that cost least, by penalty, found as they are asked for.

use super::cost::{Costs, Total};

/// A segmentation, and the penalties for which it is known to be the best.
struct Known {
    from: f64,
    to: f64,
    total: Total,
    indices: Vec<usize>,
}

/// The larger the penalty, the fewer change points. What two penalties have in common all between them have, and two
/// segmentations whose numbers differ by one share what is between at the penalty where they tie.
pub(super) struct Ladder<'a> {
    costs: &'a Costs<'a>,
    min_segment: usize,
    /// The last penalty that will be asked for.
    most: f64,
    /// By penalty.
    known: Vec<Known>,
}

impl<'a> Ladder<'a> {
    pub(super) fn new(costs: &'a Costs<'a>, min_segment: usize, most: f64) -> Self {
        Self {
            costs,
            min_segment,
            most,
            known: Vec::new(),
        }
    }

    /// The best for a penalty, which is no less than the one before.
    pub(super) fn best(&mut self, penalty: f64) -> &[usize] {
        let below = loop {
            let above = self.known.partition_point(|k| k.from <= penalty);
            let Some(below) = above.checked_sub(1) else {
                self.run(penalty);
                continue;
            };
            if penalty <= self.known[below].to {
                break below;
            }
            let Some(fewer) = self.known.get(above) else {
                // With none there are none beyond.
                if self.known[below].indices.is_empty() {
                    break below;
                }
                self.run(self.most);
                continue;
            };
            let more = &self.known[below];
            let [many, few] = [more, fewer].map(|k| k.indices.len());
            if many <= few {
                // The same, even where rounding made the one at the larger penalty no smaller.
                self.known[below].to = fewer.from;
                continue;
            }
            let tie = fewer.total.minus(more.total) / (many - few) as f64;
            if !(more.to < tie && tie < fewer.from) {
                // Rounding.
                self.run(penalty);
                continue;
            }
            // While each run finds something new, no other penalty is tried than the one that was asked for.
            let stays = below > 0 && self.known[below - 1].indices.len() == many;
            if many - few > 1 && !stays {
                self.run(penalty);
                continue;
            }
            if many - few > 1 {
                let found = self.run(tie);
                let number = self.known[found].indices.len();
                if few < number && number < many {
                    continue;
                }
                self.known.remove(found);
            }
            // There is nothing between them.
            self.known[below].to = tie;
            self.known[above].from = tie;
        };
        &self.known[below].indices
    }

    /// Runs the search, and says where in the list its result is.
    fn run(&mut self, penalty: f64) -> usize {
        let indices = self.costs.best(penalty, self.min_segment);
        let place = self.known.partition_point(|k| k.from <= penalty);
        let known = Known {
            from: penalty,
            to: penalty,
            total: self.costs.total(&indices),
            indices,
        };
        self.known.insert(place, known);
        place
    }
}

#[cfg(test)]
mod tests {
    use ndarray::Array1;

    use super::Ladder;
    use crate::offline::{Cost, cost::Costs, series::Series};

    #[test]
    fn it_says_what_each_penalty_by_itself_says() {
        let mut state = 0.3f64;
        let mut noise = || {
            state = 3.99 * state * (1.0 - state);
            state - 0.5
        };
        let mut walk = 0.0;
        let series: [Vec<f64>; 3] = [
            (0..400).map(|_| noise()).collect(),
            (0..400)
                .map(|t| noise() + [0.0, 2.0, 0.5, 1.0][t / 100])
                .collect(),
            (0..400)
                .map(|_| {
                    walk += noise();
                    walk
                })
                .collect(),
        ];
        for y in series {
            let series = Series::new(Array1::from(y).view(), 5).unwrap();
            for (cost, least, most) in [
                (Cost::Level, 0.1, 300.0),
                (Cost::LevelAndSpread, 4.0, 600.0),
            ] {
                let costs = Costs::new(&series, cost, 5);
                let mut ladder = Ladder::new(&costs, 5, most);
                let mut penalty: f64 = least;
                while penalty < most {
                    assert_eq!(ladder.best(penalty), costs.best(penalty, 5), "{penalty}");
                    penalty *= 1.1;
                }
                assert_eq!(ladder.best(most), costs.best(most, 5));
            }
        }
    }
}

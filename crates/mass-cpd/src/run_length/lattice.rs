//! A CUSUM of scores with a limit, for every threshold of a lattice at once.
//!
//! # Formula
//! `S_t = max(0, S_{t-1} + min(max(z_t, -limit), limit) - k)` rises by at most `limit - k`, and with a probability
//! of its own by just that. From zero it reaches the multiples of `limit - k` with positive probability: the run length is
//! discontinuous in the threshold there. So these places are states of their own, between them lie cells of
//! width `(limit - k) / m`, and what is in a cell counts as being in its middle, which adds a twelfth of the width's square
//! to the variance of a step.
//!
//! An excursion leaves zero and comes back or signals. With `Q` the transitions among the states under the threshold, `p` those from
//! zero and `q` those to zero,
//!
//! ```text
//! ARL = (1 + p (I - Q)^-1 1) / (1 - p_0 - p (I - Q)^-1 q)
//! ```
//!
//! and as the states are ordered by height, one elimination `I - Q = L U` holds those for all thresholds. All its
//! terms are sums of positive ones; the denominator, which may be far below rounding, is summed from the highest threshold down.

/// What is less likely than this at a step is not followed.
const NEGLIGIBLE: f64 = 1e-15;

/// With a low limit the probability of an excursion falls by a constant factor from each multiple of `limit - k` to the next: after as
/// many as this nothing is left.
const JUMPS: f64 = 256.0;

/// Cells of equal width, of which `jump` make up `limit - k`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lattice {
    k: f64,
    limit: f64,
    pub(crate) jump: usize,
    pub(crate) width: f64,
    pub(crate) cells: usize,
}

/// Signals a step of the stream, for one threshold of the lattice.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rate {
    at: f64,
    over: f64,
}

impl Rate {
    /// Where a sum at the threshold signals.
    pub(crate) fn at(&self) -> f64 {
        self.at
    }

    /// Where it has to be over it. The two differ at multiples of `limit - k`.
    pub(crate) fn over(&self) -> f64 {
        self.over
    }
}

/// A place that the sum can be at: an atom, or the middle of a cell.
#[derive(Clone, Copy)]
struct State {
    /// The cell; of an atom, that above it.
    cell: usize,
    atom: bool,
}

impl State {
    /// In cells.
    fn place(self) -> f64 {
        self.cell as f64 + if self.atom { 0.0 } else { 0.5 }
    }
}

impl Lattice {
    /// Of cells at most `widest` wide, up to a threshold of `end` or a little more.
    pub(crate) fn new(k: f64, limit: f64, widest: f64, end: f64) -> Self {
        // Where a low limit leaves little room, at least four cells to it.
        let jump = ((limit - k) / widest).ceil().max(4.0);
        let width = (limit - k) / jump;
        Self {
            k,
            limit,
            jump: jump as usize,
            width,
            cells: (end.min(JUMPS * (limit - k)) / width).ceil() as usize,
        }
    }

    /// With twice as many cells.
    pub(crate) fn halved(&self) -> Self {
        Self {
            jump: 2 * self.jump,
            width: 0.5 * self.width,
            cells: 2 * self.cells,
            ..*self
        }
    }

    /// Whether the sum can be at a multiple of `limit - k` that is the lower end of this cell.
    pub(crate) fn has_atom(&self, cell: usize) -> bool {
        cell > 0 && cell.is_multiple_of(self.jump)
    }

    fn states(&self) -> Vec<State> {
        (0..self.cells)
            .flat_map(|cell| {
                let atom = self.has_atom(cell).then_some(State { cell, atom: true });
                atom.into_iter().chain([State { cell, atom: false }])
            })
            .collect()
    }

    /// The rates at thresholds `0, width, .., cells * width` of scores that are over `x` with probability `survival(x)`.
    pub(crate) fn rates(&self, survival: impl Fn(f64) -> f64) -> Vec<Rate> {
        let states = self.states();
        let Solved {
            visits,
            time,
            home,
            beyond,
        } = self.eliminate(&states, survival);
        // How likely an excursion comes to a state or higher, from the highest down.
        let mut reaches = vec![beyond; states.len() + 1];
        for i in (0..states.len()).rev() {
            reaches[i] = reaches[i + 1] + visits[i] * home[i];
        }
        let (mut under, mut lasts) = (0, 1.0);
        let mut rates = Vec::with_capacity(self.cells + 1);
        for cell in 0..=self.cells {
            let at = reaches[under] / lasts;
            if self.has_atom(cell) && cell < self.cells {
                lasts += visits[under] * time[under];
                under += 1;
            }
            rates.push(Rate {
                at,
                over: reaches[under] / lasts,
            });
            if cell < self.cells {
                lasts += visits[under] * time[under];
                under += 1;
            }
        }
        rates
    }

    fn eliminate(&self, states: &[State], survival: impl Fn(f64) -> f64) -> Solved {
        let Self {
            k,
            limit,
            jump,
            width,
            cells,
        } = *self;
        let n = states.len();
        let index = |cell: usize| cell + cell / jump;
        let (top, bottom) = (survival(limit), 1.0 - survival(-limit));
        // A score within the limits that moves the sum by between `a` and `b` cells.
        let between = |a: f64, b: f64| {
            let (a, b) = ((a * width + k).max(-limit), (b * width + k).min(limit));
            if a < b {
                (survival(a) - survival(b)).max(0.0)
            } else {
                0.0
            }
        };
        // How many cells down there is something to follow.
        let deepest = (((limit + k) / width).ceil() as usize + 1).min(cells);
        let reach = (1..deepest)
            .find(|&d| 1.0 - survival(k - d as f64 * width) < NEGLIGIBLE)
            .unwrap_or(deepest);
        // From middle to middle only the distance counts.
        let by_distance: Vec<f64> = (0..=reach + jump)
            .map(|i| i as f64 - reach as f64)
            .map(|d| between(d - 0.5, d + 0.5))
            .collect();
        let each_step = |from: State, add: &mut dyn FnMut(usize, f64)| {
            for to in from.cell.saturating_sub(reach)..=(from.cell + jump).min(cells - 1) {
                let p = if from.atom {
                    let d = to as f64 - from.cell as f64;
                    between(d, d + 1.0)
                } else {
                    by_distance[to + reach - from.cell]
                };
                add(index(to), p);
            }
            if from.cell + jump < cells {
                add(index(from.cell + jump) - usize::from(from.atom), top);
            }
            // The lowest score, divided between two middles.
            let place = from.place() - (limit + k) / width;
            if place > 0.0 && reach == deepest {
                let low = (place - 0.5).floor().max(0.0);
                let share = (place - 0.5 - low).max(0.0);
                add(index(low as usize), bottom * (1.0 - share));
                add(index(low as usize + 1), bottom * share);
            }
        };
        let to_zero = |from: State| {
            let score = k - from.place() * width;
            if score < -limit {
                0.0
            } else {
                1.0 - survival(score)
            }
        };
        let beyond = |from: State| {
            let highest = from.cell + jump + usize::from(!from.atom);
            if highest > cells || (highest == cells && from.atom) {
                survival((cells as f64 - from.place()) * width + k)
            } else {
                0.0
            }
        };

        let zero = State {
            cell: 0,
            atom: true,
        };
        let mut visits = vec![0.0; n];
        each_step(zero, &mut |to, p| visits[to] += p);
        let (mut home, mut out) = (vec![0.0; n], vec![0.0; n]);
        let mut time = vec![1.0; n];
        // Row by row Q, and on the diagonal the probability of leaving.
        let below = reach + reach / jump + 2;
        let above = jump + 3;
        let size = below + 1 + above;
        let mut band = vec![0.0; n * size];
        for (i, &from) in states.iter().enumerate() {
            let row = &mut band[i * size..(i + 1) * size];
            home[i] = to_zero(from);
            out[i] = beyond(from);
            let mut leaves = home[i] + out[i];
            each_step(from, &mut |to, p| {
                if to != i {
                    row[to + below - i] += p;
                    leaves += p;
                }
            });
            row[below] = leaves;
        }
        for c in 0..n {
            let (done, rest) = band.split_at_mut((c + 1) * size);
            let lead = &done[c * size + below..];
            let wide = above.min(n - 1 - c);
            visits[c] /= lead[0];
            for (d, p) in lead[1..=wide].iter().enumerate() {
                visits[c + 1 + d] += visits[c] * p;
            }
            for (d, row) in rest.chunks_exact_mut(size).take(below).enumerate() {
                let row_number = c + 1 + d;
                let start = below - 1 - d;
                let factor = row[start] / lead[0];
                if factor == 0.0 {
                    continue;
                }
                for (to, from) in row[start + 1..].iter_mut().zip(&lead[1..=wide]) {
                    *to += factor * from;
                }
                // Coming back to where it was is not leaving.
                if d < wide {
                    row[below] -= 2.0 * factor * lead[1 + d];
                }
                time[row_number] += factor * time[c];
                home[row_number] += factor * home[c];
                out[row_number] += factor * out[c];
            }
        }
        let over = visits.iter().zip(&out).map(|(v, o)| v * o).sum::<f64>();
        Solved {
            visits,
            time,
            home,
            beyond: over + beyond(zero),
        }
    }
}

/// With `I - Q = L U`.
struct Solved {
    /// `p U^-1`
    visits: Vec<f64>,
    /// `L^-1 1`
    time: Vec<f64>,
    /// `L^-1 q`
    home: Vec<f64>,
    /// How likely an excursion comes over the lattice's end.
    beyond: f64,
}

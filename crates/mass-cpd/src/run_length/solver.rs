//! The integral equation and its solution.

use super::{check_chart, quadrature::gauss_legendre};
use crate::{CpdError, normal};

/// The run length of a one-sided CUSUM; see the [module's documentation](super) for the equation.
///
/// # Examples
/// ```
/// use mass_cpd::run_length::RunLength;
///
/// let run = RunLength::new(0.5, 5.0, 1.0)?; // after a shift of one standard deviation
/// assert!((run.average() - 10.38).abs() < 0.005);
/// assert!(run.survival(20) < run.survival(10));
/// assert!((run.false_alarm(1) + run.survival(1) - 1.0).abs() < 1e-15);
/// # Ok::<(), mass_cpd::CpdError>(())
/// ```
#[derive(Clone, Debug)]
pub struct RunLength {
    /// States: zero first, then the quadrature nodes.
    states: Vec<f64>,
    weights: Vec<f64>,
    /// `matrix[i][j]`: probability of going from state `i` to (the neighbourhood of) state `j` without a signal.
    matrix: Vec<f64>,
    /// Probability of a signal from each state.
    signal: Vec<f64>,
    reference: f64,
    h: f64,
    solution: Vec<f64>,
}

impl RunLength {
    /// Sets up the chart with allowance `k` and threshold `h` for scores of mean `mu` and variance one.
    ///
    /// # Errors
    /// [`CpdError::Parameter`] unless `k` is in \[0, 10\], `h` in \[0, 200\] and `mu` in \[-10, 100\].
    pub fn new(k: f64, h: f64, mu: f64) -> Result<Self, CpdError> {
        check_chart(k, h, mu)?;
        let kernel = Kernel::new(k - mu, h);
        let solution = kernel.solve();
        Ok(Self {
            states: kernel.states,
            weights: kernel.weights,
            matrix: kernel.matrix,
            signal: kernel.signal,
            reference: k - mu,
            h,
            solution,
        })
    }

    /// Average number of steps to the signal, from `S_0 = 0`; infinite where it is beyond double precision.
    #[must_use]
    pub fn average(&self) -> f64 {
        self.solution[0]
    }

    /// Average number of steps to the signal from `S_0 = start` (a head start), `start` in `[0, h]`.
    ///
    /// # Errors
    /// [`CpdError::Parameter`] when `start` is outside `[0, h]`.
    pub fn average_from(&self, start: f64) -> Result<f64, CpdError> {
        crate::error::require((0.0..=self.h).contains(&start), "start", start, "in [0, h]")?;
        if self.solution[0].is_infinite() {
            return Ok(f64::INFINITY);
        }
        // Nystroem's interpolation: the equation itself, with the solution at the nodes on the right.
        let reach = self.reference - start;
        let mut sum = 1.0 + normal::cdf(reach) * self.solution[0];
        for ((x, w), l) in self.states[1..]
            .iter()
            .zip(&self.weights)
            .zip(&self.solution[1..])
        {
            sum += w * normal::density(x + reach) * l;
        }
        Ok(sum)
    }

    /// Probability that there is no signal within `n` steps, from `S_0 = 0`.
    #[must_use]
    pub fn survival(&self, n: u64) -> f64 {
        self.log_survival(n).exp()
    }

    /// Probability of a signal within `n` steps, from `S_0 = 0`, without the cancellation of `1 - survival`.
    #[must_use]
    pub fn false_alarm(&self, n: u64) -> f64 {
        -self.log_survival(n).exp_m1()
    }

    fn log_survival(&self, n: u64) -> f64 {
        log_survival(&self.matrix, &self.signal, n)
    }
}

/// Steps the recursion until it decays geometrically, and extends the decay to `n`.
///
/// `d_n`, the probability of a signal at step `n + 1` in units of that of none before, is `signal` at first and then
/// `M d_n / (1 - d_n[0])`: sums of positive terms, as exact where a signal is all but impossible as elsewhere. A row sum of `M`
/// less than one by as much would say nothing of a probability below 1e-16.
fn log_survival(matrix: &[f64], signal: &[f64], n: u64) -> f64 {
    let mut d = signal.to_vec();
    let mut next = vec![0.0; d.len()];
    let (mut log, mut largest, mut steady) = (0.0, f64::NAN, 0);
    for done in 0..n {
        let rate = d[0];
        if rate >= 1.0 {
            return f64::NEG_INFINITY;
        }
        log += (-rate).ln_1p();
        step(matrix, &d, &mut next);
        let scale = (1.0 - rate).recip();
        next.iter_mut().for_each(|x| *x *= scale);
        // At zero alone nothing is seen of a high threshold at first: no path has come near it.
        let top = next.iter().copied().fold(0.0, f64::max);
        let moved = d
            .iter()
            .zip(&next)
            .map(|(d, next)| (next / top - d / largest).abs());
        let moved = moved.fold(0.0, f64::max);
        std::mem::swap(&mut d, &mut next);
        // What is so rare at every state that it underflows is never seen.
        if top == 0.0 {
            return log;
        }
        let same = (d[0] - rate).abs() <= 1e-13 * rate && moved <= 1e-13;
        (steady, largest) = (if same { steady + 1 } else { 0 }, top);
        if steady >= 8 {
            return log + (-d[0]).ln_1p() * (n - done - 1) as f64;
        }
    }
    log
}

fn step(matrix: &[f64], f: &[f64], next: &mut [f64]) {
    for (row, out) in matrix.chunks_exact(f.len()).zip(next) {
        let mut partial = [0.0; 4];
        let (a, b) = (row.chunks_exact(4), f.chunks_exact(4));
        let rest: f64 = a
            .remainder()
            .iter()
            .zip(b.remainder())
            .map(|(x, y)| x * y)
            .sum();
        for (a, b) in a.zip(b) {
            for i in 0..4 {
                partial[i] += a[i] * b[i];
            }
        }
        *out = (partial[0] + partial[1]) + (partial[2] + partial[3]) + rest;
    }
}

struct Kernel {
    states: Vec<f64>,
    weights: Vec<f64>,
    matrix: Vec<f64>,
    /// Probability of a signal from each state.
    signal: Vec<f64>,
}

impl Kernel {
    /// `reference` is `k - mu`.
    fn new(reference: f64, h: f64) -> Self {
        // Nodes lie at most 1.6 h / n apart, so this keeps them within 0.65 of a standard deviation: the
        // Gaussian kernel is then integrated to about 1e-10.
        let n = 14 + (2.4 * h).ceil() as usize;
        let (nodes, weights) = gauss_legendre(n, h);
        let mut states = Vec::with_capacity(n + 1);
        states.push(0.0);
        states.extend(nodes);
        let mut matrix = Vec::with_capacity((n + 1) * (n + 1));
        let mut signal = Vec::with_capacity(n + 1);
        for &from in &states {
            let reach = reference - from;
            signal.push(normal::survival(h + reach));
            matrix.push(normal::cdf(reach));
            matrix.extend(
                states[1..]
                    .iter()
                    .zip(&weights)
                    .map(|(to, w)| w * normal::density(to + reach)),
            );
        }
        Self {
            states,
            weights,
            matrix,
            signal,
        }
    }

    /// Solves `(I - matrix) L = 1` by elimination without a subtraction (Grassmann, Taksar and Heyman, Operations Research 33,
    /// 1985): the diagonal is the probability of leaving a state, the sum of those of going elsewhere and of a signal. So
    /// the average is as exact where a signal is all but impossible as it is elsewhere.
    fn solve(&self) -> Vec<f64> {
        let n = self.states.len();
        let mut go = self.matrix.clone();
        let mut signal = self.signal.clone();
        let mut x = vec![1.0; n];
        let mut leave = vec![0.0; n];
        for column in 0..n {
            let (done, below) = go.split_at_mut((column + 1) * n);
            let lead = &done[column * n..];
            leave[column] = signal[column] + lead[column + 1..].iter().sum::<f64>();
            let (out, time) = (signal[column], x[column]);
            let rest = signal[column + 1..].iter_mut().zip(&mut x[column + 1..]);
            for (row, (signal, x)) in below.chunks_exact_mut(n).zip(rest) {
                let factor = row[column] / leave[column];
                for (to, from) in row[column + 1..].iter_mut().zip(&lead[column + 1..]) {
                    *to += factor * from;
                }
                *signal += factor * out;
                *x += factor * time;
            }
        }
        for i in (0..n).rev() {
            let later = go[i * n + i + 1..(i + 1) * n].iter().zip(&x[i + 1..]);
            let tail: f64 = later.map(|(p, x)| p * x).sum();
            x[i] = (x[i] + tail) / leave[i];
        }
        // A signal whose probability is below the smallest number: never.
        if x.iter().any(|l| !l.is_finite()) {
            x.fill(f64::INFINITY);
        }
        x
    }
}

use ndarray::Array1;

use super::{BayesFilter, Ginc, GincError, Windows, check_tokens};

/// A mean with its standard error.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    /// The mean, nats a token.
    pub mean: f64,
    /// Its standard error, strata (concepts) taken into account; NaN with one window a concept.
    pub standard_error: f64,
}

/// Tables of pairs of more tokens are larger than half a GiB.
const MAX_VOCAB: usize = 1 << 13;

/// The least loss with a fixed number of tokens of context, in nats; exact for the instance.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NgramFloors {
    /// H(x_t): no context.
    pub unigram: f64,
    /// H(x_t | x_{t-1}).
    pub bigram: f64,
    /// H(x_t | x_{t-2}, x_{t-1}).
    pub two_tokens: f64,
}

/// The mean Bayes loss of windows: the least loss any model can have on them in expectation.
///
/// Averages -ln p(token_t | tokens before) over t = 1..=length, that is over what a causal model
/// predicts from a window's inputs; the first token, which no model predicts, is not counted.
///
/// # Errors
/// [`GincError`] when a window holds a token that the filter's mixture cannot emit there.
pub fn bayes_floor(filter: &BayesFilter, windows: &Windows) -> Result<Estimate, GincError> {
    let losses = (0..windows.len())
        .map(|window| {
            let nll = filter.nll(windows.tokens(window))?;
            Ok(nll[1..].iter().sum::<f64>() / windows.length() as f64)
        })
        .collect::<Result<Vec<f64>, GincError>>()?;
    Ok(stratified(&losses, windows.per_concept()))
}

/// Mean over equal strata of `size` consecutive values each, and its standard error.
fn stratified(values: &[f64], size: usize) -> Estimate {
    let strata = (values.len() / size) as f64;
    let mut mean = 0.0;
    let mut variance = 0.0;
    for stratum in values.chunks(size) {
        let n = size as f64;
        let m = stratum.iter().sum::<f64>() / n;
        let s2 = stratum.iter().map(|v| (v - m).powi(2)).sum::<f64>() / (n - 1.0);
        mean += m / strata;
        variance += s2 / n / (strata * strata);
    }
    Estimate {
        mean,
        standard_error: variance.sqrt(),
    }
}

/// Entropies of a token given zero, one or two tokens before it, averaged over the positions of
/// windows of `length + 1` tokens.
///
/// # Formula
/// H(x_t | context) = -Σ p(context, x) ln p(x | context), where p sums over concepts and hidden
/// states and averages over the positions that have that much context.
///
/// # Errors
/// [`GincError::TooShort`] when `length` is below 2: no position has two tokens of context;
/// [`GincError::Parameter`] when it is above 2^32, or the vocabulary has more than 2^13 tokens.
pub fn ngram_floors(ginc: &Ginc, length: usize) -> Result<NgramFloors, GincError> {
    if length < 2 {
        return Err(GincError::TooShort {
            document: length + 1,
            window: 2,
        });
    }
    check_tokens("window", [length])?;
    let vocab = ginc.vocab();
    if vocab > MAX_VOCAB {
        return Err(GincError::Parameter {
            name: "vocab",
            value: vocab.to_string(),
            range: "at most 2^13 where floors are computed",
        });
    }
    let prior = 1.0 / ginc.concepts() as f64;
    // Mean over positions 0..positions of the state distribution, per concept.
    let average = |positions: usize| -> Vec<Array1<f64>> {
        (0..ginc.concepts())
            .map(|concept| {
                let transition = ginc.transition.index_axis(ndarray::Axis(0), concept);
                let mut now = ginc.start.row(concept).to_owned();
                let mut sum = now.clone();
                for _ in 1..positions {
                    now = now.dot(&transition);
                    sum += &now;
                }
                sum * (prior / positions as f64)
            })
            .collect()
    };
    let successors: Vec<Vec<(usize, f64)>> = ginc
        .transition
        .rows()
        .into_iter()
        .map(|row| {
            let positive = row.iter().copied().enumerate();
            positive.filter(|&(_, p)| p > 0.0).collect()
        })
        .collect();
    let token = |state: usize| ginc.emission[state] as usize;

    let mut single = vec![0.0; vocab];
    // Positions 1..=length: the start moved on by one, then averaged.
    let (from_zero, to_last) = (average(length + 1), average(1));
    for (all, first) in from_zero.iter().zip(&to_last) {
        for (state, (a, f)) in all.iter().zip(first).enumerate() {
            single[token(state)] += (a * (length + 1) as f64 - f) / length as f64;
        }
    }

    let mut pair = vec![0.0; vocab * vocab];
    for (concept, mass) in average(length).iter().enumerate() {
        for (h, &m) in mass.iter().enumerate() {
            for &(next, p) in &successors[concept * ginc.states() + h] {
                pair[token(h) * vocab + token(next)] += m * p;
            }
        }
    }

    // One first token at a time, so that vocab^2 numbers are held, not vocab^3.
    let mass = average(length - 1);
    let mut joint_entropy = 0.0;
    let mut context_entropy = 0.0;
    let mut table = vec![0.0; vocab * vocab];
    for first in 0..vocab {
        table.fill(0.0);
        for (concept, mass) in mass.iter().enumerate() {
            for (h0, &m) in mass.iter().enumerate().filter(|&(h, _)| token(h) == first) {
                for &(h1, p1) in &successors[concept * ginc.states() + h0] {
                    for &(h2, p2) in &successors[concept * ginc.states() + h1] {
                        table[token(h1) * vocab + token(h2)] += m * p1 * p2;
                    }
                }
            }
        }
        joint_entropy += entropy(&table);
        context_entropy += table
            .chunks(vocab)
            .map(|row| minus_p_ln_p(row.iter().sum()))
            .sum::<f64>();
    }
    let context: f64 = pair
        .chunks(vocab)
        .map(|row| minus_p_ln_p(row.iter().sum()))
        .sum();
    Ok(NgramFloors {
        unigram: entropy(&single),
        bigram: entropy(&pair) - context,
        two_tokens: joint_entropy - context_entropy,
    })
}

fn entropy(p: &[f64]) -> f64 {
    p.iter().map(|&p| minus_p_ln_p(p)).sum()
}

fn minus_p_ln_p(p: f64) -> f64 {
    if p > 0.0 { -p * p.ln() } else { 0.0 }
}

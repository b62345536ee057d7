//! GINC: a mixture of hidden Markov models whose every probability is known.
//!
//! The generator of Xie et al., "An Explanation of In-context Learning as Implicit Bayesian
//! Inference" ([arXiv 2111.02080](https://arxiv.org/abs/2111.02080)). A hidden state is a pair
//! (entity v, property s), numbered `v * properties + s`. Concept θ moves by
//!
//! ```text
//! T_θ = V ⊗ S_θ                       (entities × properties)²
//! S_θ = Σ_i softmax((U_i - 0.5) / 0.1)_i Perm_i     one U and permutation per property
//! V   = 0.9 I + 0.1 (a matrix of the same construction), shared by all concepts
//! start_θ = softmax((U - 0.5) / 10)   over all states
//! ```
//!
//! and a state emits its own token, always: a table entities × properties of ids drawn from
//! `1..vocab`, whose column 0 is token 0, the delimiter. A document keeps one concept throughout.
//!
//! The tables come from the same random numbers, in the same order, as in the original Python
//! program, so seed 1111 (the default) with vocabulary 50 is the instance its authors released.
//!
//! Because all of this is known, so is the best loss any model can reach: [`BayesFilter`] computes
//! it, and [`ngram_floors`] the best loss with zero, one or two tokens of context.
//!
//! ```
//! use mass_bench::ginc::{BayesFilter, Ginc, GincParams, Windows};
//! use mass_bench::rng::{Purpose, stream};
//!
//! let ginc = Ginc::generate(&GincParams::new(50).check()?);
//! let document = ginc.sample_document(3, 1024, &mut stream(1, Purpose::Training, 0))?;
//! let nll = BayesFilter::of(&ginc).nll(&document.tokens)?;
//! assert_eq!(nll.len(), 1024);
//! // Nats a token: far below the ln 50 = 3.9 of a uniform guess.
//! assert!(nll.iter().sum::<f64>() / 1024.0 < 2.5);
//! # Ok::<(), mass_bench::ginc::GincError>(())
//! ```

mod bayes;
mod corpus;
mod floors;
mod mt19937;
mod params;
mod sample;

use ndarray::{Array2, Array3, ArrayView1, ArrayView2};

pub use bayes::{BayesFilter, FilterState};
pub use corpus::{Corpus, Windows};
pub use floors::{Estimate, NgramFloors, bayes_floor, ngram_floors};
pub use params::{GincParams, ValidGincParams};
pub use sample::Document;

use crate::batch::fits;
use mt19937::Mt19937;
use sample::AliasTable;

/// What can be wrong with GINC parameters, tables or tokens.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum GincError {
    /// A parameter outside its range.
    #[error("GINC {name} is {value}; it must be {range}")]
    Parameter {
        /// The parameter.
        name: &'static str,
        /// The value given.
        value: String,
        /// The range allowed.
        range: &'static str,
    },
    /// Tables whose shapes do not fit together.
    #[error("GINC {table} has shape {found:?}; expected {expected:?}")]
    Shape {
        /// The table.
        table: &'static str,
        /// Its shape.
        found: Vec<usize>,
        /// The shape that fits the other tables.
        expected: Vec<usize>,
    },
    /// A row that is not a probability distribution.
    #[error("GINC {table} row {row} of concept {concept} is not a distribution: {problem}")]
    NotADistribution {
        /// The table.
        table: &'static str,
        /// Concept.
        concept: usize,
        /// Row within the concept.
        row: usize,
        /// A negative or non-finite entry, or the sum.
        problem: String,
    },
    /// A concept index beyond the mixture.
    #[error("concept {concept} does not exist: there are {concepts}")]
    UnknownConcept {
        /// The index given.
        concept: usize,
        /// Concepts in the mixture.
        concepts: usize,
    },
    /// A token outside the vocabulary.
    #[error("token {token} at position {position} is outside the vocabulary of {vocab}")]
    OutOfVocabulary {
        /// The token.
        token: u32,
        /// Where it stands.
        position: usize,
        /// Vocabulary size.
        vocab: usize,
    },
    /// A token that no concept and state could have produced there.
    #[error("token {token} at position {position} has probability zero under every concept")]
    Impossible {
        /// The token.
        token: u32,
        /// Where it stands.
        position: usize,
    },
    /// A sequence or corpus without tokens.
    #[error("{what} is empty")]
    Empty {
        /// What is empty.
        what: &'static str,
    },
    /// Documents too short for the windows asked for.
    #[error("documents of {document} tokens are too short for windows of {window} + 1 tokens")]
    TooShort {
        /// Tokens in a document.
        document: usize,
        /// Tokens in a window.
        window: usize,
    },
}

/// A GINC instance: start distributions, transition matrices and the emission table, all checked.
#[derive(Debug, Clone)]
pub struct Ginc {
    vocab: usize,
    entities: usize,
    properties: usize,
    start: Array2<f64>,
    transition: Array3<f64>,
    emission: Vec<u32>,
    start_tables: Vec<AliasTable>,
    // One per (concept, state), concept major.
    transition_tables: Vec<AliasTable>,
}

impl Ginc {
    /// Draws an instance: the one the original program draws from this seed, on every platform.
    #[must_use]
    pub fn generate(params: &ValidGincParams) -> Self {
        let p = params.params();
        let states = p.entities * p.properties;
        let mut rng = Mt19937::new(p.seed);
        let mut emission: Vec<u32> = (0..states)
            .map(|_| 1 + rng.at_most(p.vocab as u32 - 2))
            .collect();
        for token in emission.iter_mut().step_by(p.properties) {
            *token = 0;
        }
        // The original seeds the shared entity transitions apart, with its seed + 3.
        let mut shared = Mt19937::new(p.seed.wrapping_add(3));
        let mixture = permutation_mixture(p.entities, p.transition_temperature, &mut shared);
        let identity = Array2::<f64>::eye(p.entities);
        let entity = mixture * (1.0 - p.entity_persistence) + identity * p.entity_persistence;

        let mut start = Array2::zeros((p.concepts, states));
        let mut transition = Array3::zeros((p.concepts, states, states));
        for concept in 0..p.concepts {
            let weights = tempered_softmax(states, p.start_temperature, &mut rng);
            start.row_mut(concept).assign(&ArrayView1::from(&weights));
            let property = permutation_mixture(p.properties, p.transition_temperature, &mut rng);
            for ((from, to), value) in transition
                .index_axis_mut(ndarray::Axis(0), concept)
                .indexed_iter_mut()
            {
                *value = property[[from % p.properties, to % p.properties]]
                    * entity[[from / p.properties, to / p.properties]];
            }
        }
        Self::assemble(
            p.vocab,
            p.entities,
            p.properties,
            start,
            transition,
            emission,
        )
    }

    /// An instance from tables made elsewhere, for example by the original Python generator.
    ///
    /// `start` has shape (concepts, states), `transition` (concepts, states, states), rows are the
    /// state left; `emission` gives each state's token. States are numbered
    /// `entity * properties + property`.
    ///
    /// # Errors
    /// [`GincError`] when shapes do not fit, a row is not a distribution (sum within 1e-9 of one), a
    /// token is outside the vocabulary or that has more than 2^20.
    pub fn from_tables(
        vocab: usize,
        properties: usize,
        start: Array2<f64>,
        transition: Array3<f64>,
        emission: Vec<u32>,
    ) -> Result<Self, GincError> {
        check_tables(vocab, start.view(), &transition, &emission)?;
        let states = emission.len();
        if properties == 0 || !states.is_multiple_of(properties) {
            return Err(GincError::Parameter {
                name: "properties",
                value: properties.to_string(),
                range: "a divisor of the number of states",
            });
        }
        let entities = states / properties;
        Ok(Self::assemble(
            vocab, entities, properties, start, transition, emission,
        ))
    }

    fn assemble(
        vocab: usize,
        entities: usize,
        properties: usize,
        start: Array2<f64>,
        transition: Array3<f64>,
        emission: Vec<u32>,
    ) -> Self {
        let start_tables = start.rows().into_iter().map(AliasTable::new).collect();
        let transition_tables = transition.rows().into_iter().map(AliasTable::new).collect();
        Self {
            vocab,
            entities,
            properties,
            start,
            transition,
            emission,
            start_tables,
            transition_tables,
        }
    }

    /// Number of concepts C in the mixture; each has prior probability 1 / C.
    #[must_use]
    pub fn concepts(&self) -> usize {
        self.start.nrows()
    }

    /// Number of hidden states.
    #[must_use]
    pub fn states(&self) -> usize {
        self.emission.len()
    }

    /// Number of entities v.
    #[must_use]
    pub fn entities(&self) -> usize {
        self.entities
    }

    /// Number of properties s.
    #[must_use]
    pub fn properties(&self) -> usize {
        self.properties
    }

    /// Number of token ids, the delimiter 0 included.
    #[must_use]
    pub fn vocab(&self) -> usize {
        self.vocab
    }

    /// Start distributions, shape (concepts, states).
    #[must_use]
    pub fn start(&self) -> ArrayView2<'_, f64> {
        self.start.view()
    }

    /// Transition matrices, shape (concepts, states, states); a row is the state left.
    #[must_use]
    pub fn transition(&self) -> &Array3<f64> {
        &self.transition
    }

    /// The token that each state emits.
    #[must_use]
    pub fn emission(&self) -> &[u32] {
        &self.emission
    }

    /// The entity v of a hidden state.
    #[must_use]
    pub fn entity_of(&self, state: u32) -> usize {
        state as usize / self.properties
    }

    /// The property s of a hidden state.
    #[must_use]
    pub fn property_of(&self, state: u32) -> usize {
        state as usize % self.properties
    }
}

/// Σ_i w_i Perm_i over `n` random permutations of `n` things, w = softmax((U - 0.5) / temperature).
fn permutation_mixture(n: usize, temperature: f64, rng: &mut Mt19937) -> Array2<f64> {
    let weights = tempered_softmax(n, temperature, rng);
    let mut matrix = Array2::zeros((n, n));
    for weight in weights {
        for (row, column) in rng.permutation(n).into_iter().enumerate() {
            matrix[[row, column]] += weight;
        }
    }
    matrix
}

/// softmax((U - 0.5) / temperature) of `n` uniforms.
fn tempered_softmax(n: usize, temperature: f64, rng: &mut Mt19937) -> Vec<f64> {
    let logits: Vec<f64> = (0..n)
        .map(|_| (rng.uniform() - 0.5) / temperature)
        .collect();
    let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let exps: Vec<f64> = logits.iter().map(|l| (l - top).exp()).collect();
    let sum: f64 = exps.iter().sum();
    exps.iter().map(|e| e / sum).collect()
}

/// Refuses so many times so many tokens where that is more than a corpus may have.
fn check_tokens<const N: usize>(name: &'static str, sizes: [usize; N]) -> Result<(), GincError> {
    if fits(sizes) {
        return Ok(());
    }
    Err(GincError::Parameter {
        name,
        value: sizes.map(|size| size.to_string()).join(" x "),
        range: "at most 2^32 tokens",
    })
}

/// Shapes, distributions and token ids of a mixture's tables.
fn check_tables(
    vocab: usize,
    start: ArrayView2<'_, f64>,
    transition: &Array3<f64>,
    emission: &[u32],
) -> Result<(), GincError> {
    if start.is_empty() {
        return Err(GincError::Empty {
            what: "GINC start table",
        });
    }
    let (concepts, states) = start.dim();
    if transition.dim() != (concepts, states, states) {
        return Err(GincError::Shape {
            table: "transition",
            found: transition.shape().to_vec(),
            expected: vec![concepts, states, states],
        });
    }
    if emission.len() != states {
        return Err(GincError::Shape {
            table: "emission",
            found: vec![emission.len()],
            expected: vec![states],
        });
    }
    if vocab > params::MAX_VOCAB {
        return Err(GincError::Parameter {
            name: "vocab",
            value: vocab.to_string(),
            range: "at most 2^20",
        });
    }
    if let Some((position, &token)) = emission
        .iter()
        .enumerate()
        .find(|&(_, &token)| token as usize >= vocab)
    {
        return Err(GincError::OutOfVocabulary {
            token,
            position,
            vocab,
        });
    }
    for (concept, row) in start.rows().into_iter().enumerate() {
        check_distribution("start", concept, 0, row)?;
    }
    for (index, row) in transition.rows().into_iter().enumerate() {
        check_distribution("transition", index / states, index % states, row)?;
    }
    Ok(())
}

fn check_distribution(
    table: &'static str,
    concept: usize,
    row: usize,
    values: ArrayView1<'_, f64>,
) -> Result<(), GincError> {
    let problem = match values.iter().find(|v| !v.is_finite() || **v < 0.0) {
        Some(value) => format!("it holds {value}"),
        None => match values.sum() {
            sum if (sum - 1.0).abs() <= 1e-9 => return Ok(()),
            sum => format!("it sums to {sum}"),
        },
    };
    Err(GincError::NotADistribution {
        table,
        concept,
        row,
        problem,
    })
}

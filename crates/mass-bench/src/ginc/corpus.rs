use ndarray_rand::rand::Rng;

use super::{Ginc, GincError, check_tokens};
use crate::batch::{TokenBatch, draw};

/// Documents of equal length with the hidden states that made them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Corpus {
    document_length: usize,
    concepts: Vec<usize>,
    tokens: Vec<u32>,
    states: Vec<u32>,
}

impl Ginc {
    /// Draws `documents` documents of `length` tokens, each of a concept chosen uniformly.
    ///
    /// The original's training set is 1000 documents of 10240 tokens.
    ///
    /// # Errors
    /// [`GincError::Empty`] when there would be no token, [`GincError::Parameter`] when there would be more than 2^32.
    pub fn sample_corpus(
        &self,
        documents: usize,
        length: usize,
        rng: &mut impl Rng,
    ) -> Result<Corpus, GincError> {
        let all: Vec<usize> = (0..self.concepts()).collect();
        self.sample_corpus_of(&all, documents, length, rng)
    }

    /// As [`Ginc::sample_corpus`], from some of the concepts only: for data that changes later on.
    ///
    /// # Errors
    /// [`GincError::Empty`] when there would be no token or `concepts` is empty;
    /// [`GincError::UnknownConcept`]; [`GincError::Parameter`] when there would be more than 2^32 tokens.
    pub fn sample_corpus_of(
        &self,
        concepts: &[usize],
        documents: usize,
        length: usize,
        rng: &mut impl Rng,
    ) -> Result<Corpus, GincError> {
        if concepts.is_empty() {
            return Err(GincError::Empty {
                what: "the list of concepts",
            });
        }
        if documents == 0 || length == 0 {
            return Err(GincError::Empty { what: "the corpus" });
        }
        check_tokens("corpus", [documents, length])?;
        for &concept in concepts {
            self.check_concept(concept)?;
        }
        let mut corpus = Corpus {
            document_length: length,
            concepts: Vec::with_capacity(documents),
            tokens: Vec::with_capacity(documents * length),
            states: Vec::with_capacity(documents * length),
        };
        for _ in 0..documents {
            let concept = concepts[rng.random_range(0..concepts.len() as u64) as usize];
            corpus.concepts.push(concept);
            self.sample_into(concept, length, rng, &mut corpus.tokens, &mut corpus.states);
        }
        Ok(corpus)
    }
}

impl Corpus {
    /// Number of documents.
    #[must_use]
    pub fn documents(&self) -> usize {
        self.concepts.len()
    }

    /// Tokens in each document.
    #[must_use]
    pub fn document_length(&self) -> usize {
        self.document_length
    }

    /// All tokens, document after document.
    #[must_use]
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// All hidden states, one a token.
    #[must_use]
    pub fn states(&self) -> &[u32] {
        &self.states
    }

    /// Each document's concept.
    #[must_use]
    pub fn concepts(&self) -> &[usize] {
        &self.concepts
    }

    /// The batch of a training step: `rows` windows at random places, a pure function of the arguments.
    ///
    /// # Errors
    /// [`GincError::TooShort`] when a document does not hold one window and its last target;
    /// [`GincError::Empty`] when `rows` or `length` is 0; [`GincError::Parameter`] when there would be
    /// more than 2^32 tokens.
    pub fn batch(
        &self,
        seed: u64,
        step: u64,
        rows: usize,
        length: usize,
    ) -> Result<TokenBatch, GincError> {
        if rows == 0 || length == 0 {
            return Err(GincError::Empty { what: "a batch" });
        }
        check_tokens("batch", [rows, length])?;
        if self.document_length <= length {
            return Err(GincError::TooShort {
                document: self.document_length,
                window: length,
            });
        }
        Ok(draw(
            &self.tokens,
            self.document_length,
            seed,
            step,
            rows,
            length,
        ))
    }
}

/// Evaluation windows: short fresh documents, the same number from each concept.
///
/// A window begins with its concept's start distribution, so the Bayes filter's loss on it is exact.
/// Stratifying by concept takes the largest part of the sampling error away: concepts differ in
/// difficulty by more than documents of one concept do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Windows {
    length: usize,
    per_concept: usize,
    tokens: Vec<u32>,
    states: Vec<u32>,
}

impl Windows {
    /// Draws `per_concept` windows of `length + 1` tokens from each concept, in order of concept.
    ///
    /// # Errors
    /// [`GincError::Empty`] when `per_concept` or `length` is 0; [`GincError::Parameter`] when there would
    /// be more than 2^32 tokens.
    pub fn sample(
        ginc: &Ginc,
        per_concept: usize,
        length: usize,
        rng: &mut impl Rng,
    ) -> Result<Self, GincError> {
        if per_concept == 0 || length == 0 {
            return Err(GincError::Empty {
                what: "the set of evaluation windows",
            });
        }
        let sizes = [ginc.concepts(), per_concept, length.saturating_add(1)];
        check_tokens("set of evaluation windows", sizes)?;
        let total = sizes.iter().product();
        let (mut tokens, mut states) = (Vec::with_capacity(total), Vec::with_capacity(total));
        for window in 0..ginc.concepts() * per_concept {
            ginc.sample_into(
                window / per_concept,
                length + 1,
                rng,
                &mut tokens,
                &mut states,
            );
        }
        Ok(Self {
            length,
            per_concept,
            tokens,
            states,
        })
    }

    /// Number of windows.
    #[must_use]
    pub fn len(&self) -> usize {
        self.tokens.len() / (self.length + 1)
    }

    /// Never: a set holds at least one window.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Tokens predicted in a window.
    #[must_use]
    pub fn length(&self) -> usize {
        self.length
    }

    /// Windows of each concept.
    #[must_use]
    pub fn per_concept(&self) -> usize {
        self.per_concept
    }

    /// The concept of a window.
    #[must_use]
    pub fn concept(&self, window: usize) -> usize {
        window / self.per_concept
    }

    /// The `length + 1` tokens of a window.
    ///
    /// # Panics
    /// When `window >= len()`.
    #[must_use]
    pub fn tokens(&self, window: usize) -> &[u32] {
        &self.tokens[window * (self.length + 1)..][..=self.length]
    }

    /// The `length + 1` hidden states of a window; state t made token t.
    ///
    /// # Panics
    /// When `window >= len()`.
    #[must_use]
    pub fn states(&self, window: usize) -> &[u32] {
        &self.states[window * (self.length + 1)..][..=self.length]
    }

    /// Windows `range` as one batch; what a model is shown and must predict.
    ///
    /// # Panics
    /// When the range reaches beyond `len()`.
    #[must_use]
    pub fn batch(&self, range: std::ops::Range<usize>) -> TokenBatch {
        let mut batch = TokenBatch::with_capacity(range.len(), self.length);
        for window in range {
            batch.push(self.tokens(window));
        }
        batch
    }

    /// The hidden states of the inputs of windows `range`, row major like [`TokenBatch::inputs`].
    ///
    /// # Panics
    /// When the range reaches beyond `len()`.
    #[must_use]
    pub fn input_states(&self, range: std::ops::Range<usize>) -> Vec<u32> {
        range
            .flat_map(|window| &self.states(window)[..self.length])
            .copied()
            .collect()
    }
}

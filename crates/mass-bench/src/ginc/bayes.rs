use ndarray::{Array3, ArrayView2};

use super::{Ginc, GincError, check_tables};

/// The optimal predictor of a GINC mixture: exact inference over concept and hidden state.
///
/// # Formula
/// With a_t(θ, h) the probability of concept θ and state h before token t, given the tokens before,
///
/// ```text
/// l_t = -ln Σ_{θ,h} a_t(θ, h) 1[E(h) = x_t]      nats
/// a_{t+1}(θ, ·) ∝ (a_t(θ, ·) 1[E(·) = x_t]) T_θ
/// a_1(θ, ·) = start_θ / C
/// ```
///
/// Emission is deterministic, so after a token only the few states that emit it carry mass, and
/// only those are visited: a step costs Σ_θ |states of x_t| |states of x_{t+1}|.
#[derive(Debug, Clone)]
pub struct BayesFilter {
    vocab: usize,
    concepts: usize,
    states: usize,
    // (concepts, states)
    start: Vec<f64>,
    // (concepts, states, states)
    transition: Vec<f64>,
    emitters: Vec<Vec<u32>>,
}

impl BayesFilter {
    /// A filter for tables made elsewhere; see [`Ginc::from_tables`] for the shapes.
    ///
    /// # Errors
    /// [`GincError`] when shapes do not fit, a row is not a distribution, a token is outside `vocab` or that is more than 2^20.
    pub fn new(
        vocab: usize,
        start: ArrayView2<'_, f64>,
        transition: &Array3<f64>,
        emission: &[u32],
    ) -> Result<Self, GincError> {
        check_tables(vocab, start, transition, emission)?;
        let mut emitters = vec![Vec::new(); vocab];
        for (state, &token) in emission.iter().enumerate() {
            emitters[token as usize].push(state as u32);
        }
        Ok(Self {
            vocab,
            concepts: start.nrows(),
            states: start.ncols(),
            start: start.iter().copied().collect(),
            transition: transition.iter().copied().collect(),
            emitters,
        })
    }

    /// The filter of an instance.
    #[must_use]
    pub fn of(ginc: &Ginc) -> Self {
        Self::new(ginc.vocab, ginc.start(), &ginc.transition, &ginc.emission)
            .expect("an instance holds checked tables")
    }

    /// -ln p(token_t | tokens before t) for each token of a document read from its beginning, nats.
    ///
    /// # Errors
    /// [`GincError::OutOfVocabulary`] and [`GincError::Impossible`], with the position.
    pub fn nll(&self, tokens: &[u32]) -> Result<Vec<f64>, GincError> {
        let mut state = self.begin();
        tokens.iter().map(|&token| state.observe(token)).collect()
    }

    /// A filter that has seen nothing yet, to be fed token by token.
    #[must_use]
    pub fn begin(&self) -> FilterState<'_> {
        FilterState {
            filter: self,
            position: 0,
            last: None,
            mass: Vec::new(),
            next: Vec::new(),
        }
    }
}

/// A [`BayesFilter`] part of the way through a document.
#[derive(Debug, Clone)]
pub struct FilterState<'a> {
    filter: &'a BayesFilter,
    position: usize,
    last: Option<u32>,
    // p(θ, h | tokens so far), (concepts, emitters of the last token).
    mass: Vec<f64>,
    next: Vec<f64>,
}

impl FilterState<'_> {
    /// Takes the next token in and returns its surprise -ln p(token | tokens before), nats.
    ///
    /// # Errors
    /// [`GincError::OutOfVocabulary`] and [`GincError::Impossible`]; the state is then as before.
    pub fn observe(&mut self, token: u32) -> Result<f64, GincError> {
        let f = self.filter;
        let position = self.position;
        let Some(to) = f.emitters.get(token as usize) else {
            return Err(GincError::OutOfVocabulary {
                token,
                position,
                vocab: f.vocab,
            });
        };
        self.next.clear();
        self.next.resize(f.concepts * to.len(), 0.0);
        for concept in 0..f.concepts {
            let next = &mut self.next[concept * to.len()..][..to.len()];
            match self.last {
                None => {
                    let start = &f.start[concept * f.states..][..f.states];
                    for (value, &state) in next.iter_mut().zip(to) {
                        *value = start[state as usize] / f.concepts as f64;
                    }
                }
                Some(last) => {
                    let from = &f.emitters[last as usize];
                    let mass = &self.mass[concept * from.len()..][..from.len()];
                    for (&m, &h) in mass.iter().zip(from) {
                        let row = (concept * f.states + h as usize) * f.states;
                        let row = &f.transition[row..row + f.states];
                        for (value, &state) in next.iter_mut().zip(to) {
                            *value += m * row[state as usize];
                        }
                    }
                }
            }
        }
        let probability: f64 = self.next.iter().sum();
        if probability <= 0.0 {
            return Err(GincError::Impossible { token, position });
        }
        for value in &mut self.next {
            *value /= probability;
        }
        std::mem::swap(&mut self.mass, &mut self.next);
        self.last = Some(token);
        self.position += 1;
        Ok(-probability.ln())
    }

    /// p(concept | tokens so far); the uniform prior before the first token.
    #[must_use]
    pub fn concept_posterior(&self) -> Vec<f64> {
        let concepts = self.filter.concepts;
        match self.last {
            None => vec![1.0 / concepts as f64; concepts],
            Some(_) => self
                .mass
                .chunks(self.mass.len() / concepts)
                .map(|mass| mass.iter().sum())
                .collect(),
        }
    }

    /// p(next token | tokens so far) for the whole vocabulary: the target a perfect model would output.
    #[must_use]
    pub fn predict(&self) -> Vec<f64> {
        let f = self.filter;
        let mut by_state = vec![0.0; f.states];
        for concept in 0..f.concepts {
            match self.last {
                None => {
                    let start = &f.start[concept * f.states..][..f.states];
                    for (p, s) in by_state.iter_mut().zip(start) {
                        *p += s / f.concepts as f64;
                    }
                }
                Some(last) => {
                    let from = &f.emitters[last as usize];
                    let mass = &self.mass[concept * from.len()..][..from.len()];
                    for (&m, &h) in mass.iter().zip(from) {
                        let row = (concept * f.states + h as usize) * f.states;
                        for (p, t) in by_state.iter_mut().zip(&f.transition[row..]) {
                            *p += m * t;
                        }
                    }
                }
            }
        }
        f.emitters
            .iter()
            .map(|states| states.iter().map(|&s| by_state[s as usize]).sum())
            .collect()
    }
}

//! Batches of token windows that are a pure function of a seed and a step.
//!
//! A training loop that resumes at step 731 asks for batch 731 and gets the one it would have had:
//! no sampler state needs saving.

use ndarray_rand::rand::Rng;

use crate::rng::{Purpose, stream};

/// Next-token prediction windows, row major: `inputs[r * length + t]` predicts `targets[r * length + t]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenBatch {
    /// Number of windows.
    pub rows: usize,
    /// Tokens in a window.
    pub length: usize,
    /// Tokens shown, shape (rows, length).
    pub inputs: Vec<u32>,
    /// Tokens to predict, shape (rows, length): the inputs one position later.
    pub targets: Vec<u32>,
}

/// Most tokens of a batch or a corpus.
const MOST_TOKENS: u64 = 1 << 32;

/// Whether so many times so many tokens are at most 2^32.
pub(crate) fn fits<const N: usize>(sizes: [usize; N]) -> bool {
    let product = |n: u64, size| n.saturating_mul(size as u64);
    sizes.into_iter().fold(1, product) <= MOST_TOKENS
}

impl TokenBatch {
    /// An empty batch with room for `rows` windows of `length` tokens, or for a million tokens where those are more.
    #[must_use]
    pub fn with_capacity(rows: usize, length: usize) -> Self {
        let room = rows.saturating_mul(length).min(1 << 20);
        Self {
            rows: 0,
            length,
            inputs: Vec::with_capacity(room),
            targets: Vec::with_capacity(room),
        }
    }

    /// Adds one window of `length + 1` tokens.
    pub(crate) fn push<T: Copy + Into<u32>>(&mut self, window: &[T]) {
        debug_assert_eq!(window.len(), self.length + 1);
        self.inputs
            .extend(window[..self.length].iter().map(|&t| t.into()));
        self.targets.extend(window[1..].iter().map(|&t| t.into()));
        self.rows += 1;
    }

    /// Batches of one length as one, window after window.
    pub(crate) fn joined(length: usize, batches: &[Self]) -> Self {
        let mut all = Self::with_capacity(batches.iter().map(|b| b.rows).sum(), length);
        for batch in batches {
            all.rows += batch.rows;
            all.inputs.extend(&batch.inputs);
            all.targets.extend(&batch.targets);
        }
        all
    }

    /// Some of the windows.
    ///
    /// # Panics
    /// If there are not so many.
    #[must_use]
    pub fn rows(&self, which: std::ops::Range<usize>) -> Self {
        let tokens = which.start * self.length..which.end * self.length;
        Self {
            rows: which.len(),
            length: self.length,
            inputs: self.inputs[tokens.clone()].to_vec(),
            targets: self.targets[tokens].to_vec(),
        }
    }

    /// Tokens to predict in the whole batch.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.rows * self.length
    }
}

/// Draws `rows` windows of `length + 1` tokens for `step`, uniformly over documents and offsets.
///
/// `tokens` holds documents of `document_length` each, longer than `length`, which the callers check.
pub(crate) fn draw<T: Copy + Into<u32>>(
    tokens: &[T],
    document_length: usize,
    seed: u64,
    step: u64,
    rows: usize,
    length: usize,
) -> TokenBatch {
    debug_assert!(document_length > length && tokens.len() >= document_length);
    let mut rng = stream(seed, Purpose::Batches, step);
    let mut batch = TokenBatch::with_capacity(rows, length);
    let documents = (tokens.len() / document_length) as u64;
    let offsets = (document_length - length) as u64;
    for _ in 0..rows {
        // u64 ranges: usize ones would draw other values on 32-bit machines.
        let document = rng.random_range(0..documents) as usize;
        let start = document * document_length + rng.random_range(0..offsets) as usize;
        batch.push(&tokens[start..=start + length]);
    }
    batch
}

//! Random streams: one per purpose, so that drawing more of one thing never shifts another.

use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};

/// What a random stream is for. Streams of one seed are independent of each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Purpose {
    /// Training documents.
    Training,
    /// Evaluation windows.
    Evaluation,
    /// A second held-out set, for stop rules, so that the test set is never looked at.
    Probe,
    /// Which windows make up a training batch.
    Batches,
    /// Initial weights.
    Weights,
    /// Choices and noise of an expansion method.
    Method,
    /// A third held-out set, which says when a run does best.
    Validation,
    /// Noise that a study adds.
    Noise,
}

/// The ChaCha8 stream of `seed` for a purpose: the same values on every platform.
///
/// `index` separates members of a family (a step, a concept); there are 2^56 of them.
///
/// ```
/// use mass_bench::rng::{Purpose, stream};
/// use rand_chacha::rand_core::RngCore;
/// let mut a = stream(7, Purpose::Training, 0);
/// let mut b = stream(7, Purpose::Evaluation, 0);
/// assert_ne!(a.next_u64(), b.next_u64());
/// assert_eq!(stream(7, Purpose::Training, 3).next_u64(), stream(7, Purpose::Training, 3).next_u64());
/// ```
#[must_use]
pub fn stream(seed: u64, purpose: Purpose, index: u64) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(((purpose as u64) << 56) | (index & ((1 << 56) - 1)));
    rng
}

use std::fmt;

/// What goes wrong between ranks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ParallelError {
    /// Another rank cannot go on.
    #[error("rank {rank} has failed: {message}")]
    Peer {
        /// Which; the lowest, if several.
        rank: usize,
        /// What it says.
        message: String,
    },
    /// Ranks do different things at the same time: they do not run the same program on the same settings.
    #[error("rank {rank} does something else than rank 0: {what}")]
    OutOfStep {
        /// Which; the lowest, if several.
        rank: usize,
        /// What the two do.
        what: String,
    },
    /// Ranks that should agree do not.
    #[error("rank {rank} has {what} {found}, and rank 0 has {expected}")]
    Differ {
        /// Which; the lowest, if several.
        rank: usize,
        /// What they differ in.
        what: String,
        /// What rank 0 has.
        expected: String,
        /// What that rank has.
        found: String,
    },
    /// Something that cannot be done on several ranks.
    #[error("on several ranks: {0}")]
    Unsupported(String),
    /// The ranks have parted after an earlier error.
    #[error("the ranks have parted: there was an error before")]
    Ended,
    /// What carries the data failed, or refused.
    #[error("communication: {0}")]
    Transport(String),
}

/// What carries data between ranks: every rank calls the same method at the same time.
///
/// Nothing outside an implementation knows how. Counts are those of values, one for each rank; what a rank sends to itself is
/// copied.
pub trait Communicator: Send + Sync + fmt::Debug {
    /// The number of this rank, from 0.
    fn rank(&self) -> usize;

    /// How many ranks there are.
    fn size(&self) -> usize;

    /// Sends the same number of words to every rank, `send` in the order of ranks; so is `receive`.
    ///
    /// # Errors
    /// [`ParallelError::Transport`]; so do the others.
    fn words(&self, send: &[u64], receive: &mut [u64]) -> Result<(), ParallelError>;

    /// Sends every rank its own part of `send`; both come with how much is whose.
    ///
    /// # Errors
    /// As [`words`](Self::words).
    fn exchange(
        &self,
        send: (&[f32], &[usize]),
        receive: (&mut [f32], &[usize]),
    ) -> Result<(), ParallelError>;

    /// Sends every rank all of `own`.
    ///
    /// # Errors
    /// As [`words`](Self::words).
    fn gather(&self, own: &[f32], all: &mut [f32], counts: &[usize]) -> Result<(), ParallelError>;

    /// Sends every rank all of `own`.
    ///
    /// # Errors
    /// As [`words`](Self::words).
    fn gather_bytes(
        &self,
        own: &[u8],
        all: &mut [u8],
        counts: &[usize],
    ) -> Result<(), ParallelError>;
}

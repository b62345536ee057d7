//! Batches of similar length that are a pure function of a seed and an epoch.

use ndarray_rand::rand::seq::SliceRandom;

use crate::rng::{Purpose, stream};

/// The batches of one epoch: every example once, in `batch` at a time (the last of the longest group may be fewer).
///
/// Examples are shuffled, taken `sorted_together` batches at a time, sorted by length within, cut into batches, and the
/// batches are shuffled. With 50 there is little spread of length within a batch, which is what padded batches want; with 1
/// the make-up of a batch is a matter of chance alone, which costs nothing where sequences are laid end to end. The same (lengths, batch, seed, epoch) gives the same batches on every machine, so that a run that
/// resumes needs no sampler state.
///
/// # Panics
/// If `batch` or `sorted_together` is zero.
///
/// ```
/// use mass_bench::glue::batch::epoch_batches;
/// let lengths = [5, 9, 5, 9, 5, 9, 5];
/// let batches = epoch_batches(&lengths, 2, 50, 7, 0);
/// assert_eq!(batches, epoch_batches(&lengths, 2, 50, 7, 0));
/// assert_ne!(batches, epoch_batches(&lengths, 2, 50, 7, 1));
/// assert_eq!(batches.len(), 4);
/// ```
#[must_use]
pub fn epoch_batches(
    lengths: &[usize],
    batch: usize,
    sorted_together: usize,
    seed: u64,
    epoch: u64,
) -> Vec<Vec<usize>> {
    assert!(batch > 0 && sorted_together > 0, "a batch of no examples");
    let mut rng = stream(seed, Purpose::Batches, epoch);
    let mut order: Vec<u32> = (0..lengths.len() as u32).collect();
    order.shuffle(&mut rng);
    let mut batches = Vec::with_capacity(lengths.len().div_ceil(batch));
    for group in order.chunks_mut(batch.saturating_mul(sorted_together)) {
        // Stable: equal lengths stay in the order that chance gave them.
        group.sort_by_key(|&i| lengths[i as usize]);
        batches.extend(
            group
                .chunks(batch)
                .map(|b| b.iter().map(|&i| i as usize).collect::<Vec<_>>()),
        );
    }
    batches.shuffle(&mut rng);
    batches
}

/// Batches for scoring: by length, so that a batch takes little more than its longest example times its size.
#[must_use]
pub fn scoring_batches(lengths: &[usize], batch: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|&i| lengths[i]);
    order.chunks(batch.max(1)).map(<[usize]>::to_vec).collect()
}

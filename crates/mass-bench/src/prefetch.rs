//! Batches made ahead, in order, by a thread of their own.

use std::ops::Range;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

/// The batches of a range of steps, and how long their taker had to wait for them.
#[derive(Debug)]
pub struct Prefetched<T> {
    batches: Receiver<T>,
    waited: Duration,
}

impl<T> Iterator for Prefetched<T> {
    type Item = T;

    fn next(&mut self) -> Option<T> {
        let started = Instant::now();
        let batch = self.batches.recv().ok();
        self.waited += started.elapsed();
        batch
    }
}

impl<T> Prefetched<T> {
    /// Time spent waiting so far.
    #[must_use]
    pub fn waited(&self) -> Duration {
        self.waited
    }
}

/// Runs `consume` with an iterator over `make(step)` for every step of a range, of which up to `ahead` are made before they are
/// asked for. Returns when `consume` does, whether it has taken all of them or not.
///
/// ```
/// use mass_bench::prefetch::prefetch;
/// let squares = prefetch(3..6, 2, |step| step * step, |batches| batches.collect::<Vec<_>>());
/// assert_eq!(squares, [9, 16, 25]);
/// ```
///
/// # Panics
/// If `make` or `consume` does.
pub fn prefetch<T: Send, R>(
    steps: Range<u64>,
    ahead: usize,
    mut make: impl FnMut(u64) -> T + Send,
    consume: impl FnOnce(&mut Prefetched<T>) -> R,
) -> R {
    thread::scope(|scope| {
        let (sender, batches) = sync_channel(ahead.min(1 << 16));
        scope.spawn(move || {
            for step in steps {
                // Nobody takes batches any more: the consumer has stopped early.
                if sender.send(make(step)).is_err() {
                    break;
                }
            }
        });
        let waited = Duration::ZERO;
        let mut prefetched = Prefetched { batches, waited };
        let result = consume(&mut prefetched);
        // A maker that waits for room must not be waited for.
        drop(prefetched);
        result
    })
}

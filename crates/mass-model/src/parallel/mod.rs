//! Training on several processes, or threads, at once: ranks.
//!
//! Every rank holds the model and computes a share of each batch, and what the shares say is put together before anybody decides
//! anything:
//!
//! ```text
//! each step, on every rank:
//!     pass = train_pass(own rows)          sums of gradients begin in its backward pass: Ranks::overlapping
//!     reduce(ranks, model, pass, rows)     g = sum_r (n_r / N) g_r, in rank order, in f64: every rank has the same bits
//!     model.adapt_among(ranks, ..)         loads of all ranks
//!     grower.step_among(ranks, ..)         loads, shares of the loss, entropies of all ranks; norms of g
//!     optimizer.step(model, g)             the same on every rank
//! ```
//!
//! [`Communicator`] is all that is asked of what carries the data: four collectives. [`Threads`] are ranks within one process, for
//! tests; `Mpi` (feature `mpi`) those of an MPI library. [`Ranks`] is what everything else uses; by default there is one rank, and
//! nothing is exchanged.
//!
//! # Failures
//! Before its data every collective exchanges one word a pair of ranks: which collective it is, and whether its rank can go on. A
//! rank that cannot calls [`Ranks::fail`], whatever the others wait for: their collective ends with [`ParallelError::Peer`] on
//! every one of them. Ranks that call different collectives, or with other sizes, get [`ParallelError::OutOfStep`].

mod communicator;
mod experts;
#[cfg(feature = "mpi")]
mod mpi;
mod reduce;
mod shared;
mod sums;
mod threads;
mod traffic;

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};
use std::thread::ThreadId;

use serde::Serialize;
use serde::de::DeserializeOwned;

pub use communicator::{Communicator, ParallelError};
pub use experts::{divide, release, whole};
pub(crate) use experts::{least_loaded, move_newcomer};
#[cfg(feature = "mpi")]
pub use mpi::Mpi;
pub use reduce::{check, reduce};
use shared::{Kind, Shared};
pub(crate) use sums::Meanwhile;
pub use threads::Threads;
pub use traffic::{Step, Traffic};

/// Values of one sum at a time: this, twice, is the memory that summing gradients takes.
const BUCKET: usize = 1 << 20;

/// The ranks that train together, as one of them sees them; by default it is alone.
///
/// A clone is the same. Each collective must be called by every rank, in the same order.
///
/// ```
/// use mass_model::parallel::{ParallelError, Ranks, Threads};
///
/// assert_eq!(Ranks::default().size(), 1);
/// let sums = Threads::run(3, |ranks| {
///     let mut values = [1.0, ranks.rank() as f64];
///     ranks.sum(&mut values)?;
///     Ok::<_, ParallelError>(values)
/// });
/// assert!(sums.into_iter().all(|sum| sum == Ok([3.0, 3.0])));
/// ```
#[derive(Clone, Debug, Default)]
pub struct Ranks {
    shared: Option<Arc<Shared>>,
    /// Ranks of a group, among which experts are divided; 0 and 1 say that every rank has all.
    group: usize,
    /// How many gradients are summed at least while the backward pass goes on, if any are.
    overlap: Option<usize>,
}

impl Ranks {
    /// Those that a communicator joins. If it joins one alone, nothing is exchanged.
    pub fn new(communicator: impl Communicator + 'static) -> Self {
        Self {
            shared: Some(Arc::new(Shared::new(communicator))),
            group: 1,
            overlap: None,
        }
    }

    /// The same, in groups of so many ranks: the experts of every mixture are divided among the ranks of a group, and each group
    /// has all of them.
    ///
    /// # Errors
    /// [`ParallelError::Unsupported`] unless the ranks make whole groups.
    pub fn in_groups(mut self, of: usize) -> Result<Self, ParallelError> {
        let size = self.size();
        if of == 0 || !size.is_multiple_of(of) {
            let what = format!("{size} ranks cannot make groups of {of}");
            return Err(ParallelError::Unsupported(what));
        }
        self.group = of;
        Ok(self)
    }

    /// The same, which sum gradients while the backward pass goes on, once there are so many values whose gradients are complete
    /// ([`LanguageModel`](crate::lm::LanguageModel) alone knows when they are); after it what is left. The bits are the same.
    ///
    /// From a training pass on, until [`reduce`] or until the pass is dropped, these gradients are not among those of the pass, and
    /// no other collective may be called: it is refused. Where experts are divided nothing is summed meanwhile, since their tokens
    /// travel then.
    #[must_use]
    pub fn overlapping(mut self, at_least: usize) -> Self {
        self.overlap = Some(at_least);
        self
    }

    /// How many gradients are summed at least while the backward pass goes on; `None` if all are summed after it.
    #[must_use]
    pub fn overlap(&self) -> Option<usize> {
        self.overlap
    }

    /// The ranks of this one's group.
    #[must_use]
    pub fn group(&self) -> std::ops::Range<usize> {
        let of = self.group.max(1);
        let start = self.rank() / of * of;
        start..start + of
    }

    /// The place of this rank in its group.
    #[must_use]
    pub fn place(&self) -> usize {
        self.rank() - self.group().start
    }

    /// Whether experts are divided among ranks.
    #[must_use]
    pub fn divides_experts(&self) -> bool {
        self.group > 1
    }

    /// The number of this one, from 0. The first writes results and checkpoints.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.shared.as_ref().map_or(0, |s| s.communicator.rank())
    }

    /// How many there are.
    #[must_use]
    pub fn size(&self) -> usize {
        self.shared.as_ref().map_or(1, |s| s.communicator.size())
    }

    /// Whether this rank is the first.
    #[must_use]
    pub fn is_first(&self) -> bool {
        self.rank() == 0
    }

    /// Whether there is no other.
    #[must_use]
    pub fn is_alone(&self) -> bool {
        self.size() == 1
    }

    /// The ranks, if there are several.
    fn several(&self) -> Option<&Shared> {
        self.shared.as_deref().filter(|s| s.communicator.size() > 1)
    }

    /// Leaves all collectives to a thread, or takes them back.
    fn leave_to(&self, thread: Option<ThreadId>) {
        if let Some(shared) = &self.shared {
            *shared
                .left_to
                .lock()
                .unwrap_or_else(PoisonError::into_inner) = thread;
        }
    }

    /// What this rank has sent to others so far.
    #[must_use]
    pub fn traffic(&self) -> Traffic {
        let of = |s: &Shared| *s.traffic.lock().unwrap_or_else(PoisonError::into_inner);
        self.several().map(of).unwrap_or_default()
    }

    /// This rank's contiguous share of so many rows: the first ranks have one more where they cannot all have the same.
    #[must_use]
    pub fn share(&self, rows: usize) -> std::ops::Range<usize> {
        part(rows, self.size(), self.rank())
    }

    /// Every rank's bytes, in rank order.
    ///
    /// # Errors
    /// [`ParallelError`]; so do the others.
    pub fn gather_bytes(&self, own: &[u8]) -> Result<Vec<Vec<u8>>, ParallelError> {
        let Some(shared) = self.several() else {
            return Ok(vec![own.to_vec()]);
        };
        let counts = shared.begin(Kind::Bytes, own.len())?;
        let mut all = vec![0; counts.iter().sum()];
        shared.communicator.gather_bytes(own, &mut all, &counts)?;
        shared.sent(own.len());
        let mut rest = &all[..];
        let cut = counts.iter().map(|&n| {
            let (head, tail) = rest.split_at(n);
            rest = tail;
            head.to_vec()
        });
        Ok(cut.collect())
    }

    /// Every rank's value, in rank order, as JSON.
    ///
    /// # Errors
    /// As [`gather_bytes`](Self::gather_bytes), and [`ParallelError::Transport`] for a value that JSON does not have.
    pub fn gather_json<T: Serialize + DeserializeOwned>(
        &self,
        own: &T,
    ) -> Result<Vec<T>, ParallelError> {
        let unreadable = |e: serde_json::Error| ParallelError::Transport(e.to_string());
        let own = serde_json::to_vec(own).map_err(unreadable)?;
        let all = self.gather_bytes(&own)?.into_iter();
        all.map(|one| serde_json::from_slice(&one).map_err(unreadable))
            .collect()
    }

    /// What the first rank has; the others give none.
    ///
    /// # Errors
    /// As [`gather_json`](Self::gather_json); [`ParallelError::Unsupported`], on every rank, if the first has none.
    pub fn of_first<T: Serialize + DeserializeOwned>(
        &self,
        own: Option<&T>,
    ) -> Result<T, ParallelError> {
        let own = own.filter(|_| self.is_first());
        let unreadable = |e: serde_json::Error| ParallelError::Transport(e.to_string());
        let own = own
            .map(serde_json::to_vec)
            .transpose()
            .map_err(unreadable)?;
        let all = self.gather_bytes(&own.unwrap_or_default())?;
        if all[0].is_empty() {
            let what = "the first rank has nothing to hand out";
            return Err(ParallelError::Unsupported(what.into()));
        }
        serde_json::from_slice(&all[0]).map_err(unreadable)
    }

    /// Every rank's numbers, one rank's after another's.
    ///
    /// # Errors
    /// As [`gather_bytes`](Self::gather_bytes).
    pub fn gather_f64(&self, own: &[f64]) -> Result<Vec<f64>, ParallelError> {
        if self.is_alone() {
            return Ok(own.to_vec());
        }
        let all = self.gather_bytes(&to_bytes(own))?;
        Ok(all.iter().flat_map(|one| numbers(one)).collect())
    }

    /// Every rank's values, one rank's after another's.
    ///
    /// # Errors
    /// As [`gather_bytes`](Self::gather_bytes).
    pub fn gather(&self, own: Vec<f32>) -> Result<Vec<f32>, ParallelError> {
        let Some(shared) = self.several() else {
            return Ok(own);
        };
        let counts = shared.begin(Kind::Floats, own.len())?;
        let mut all = vec![0.0; counts.iter().sum()];
        shared.communicator.gather(&own, &mut all, &counts)?;
        shared.sent(own.len() * size_of::<f32>());
        Ok(all)
    }

    /// Adds what all ranks have, in rank order; every rank gets the same bits.
    ///
    /// # Errors
    /// As [`gather_bytes`](Self::gather_bytes).
    pub fn sum(&self, values: &mut [f64]) -> Result<(), ParallelError> {
        let Some(shared) = self.several() else {
            return Ok(());
        };
        let all = self.gather_bytes(&to_bytes(values))?;
        let counts: Vec<usize> = all.iter().map(|one| one.len() / 8).collect();
        shared.same("numbers to add", &counts)?;
        values.fill(0.0);
        for one in &all {
            let pairs = values.iter_mut().zip(numbers(one));
            pairs.for_each(|(sum, x)| *sum += x);
        }
        Ok(())
    }

    /// Whether it is so on any rank.
    ///
    /// # Errors
    /// As [`gather_bytes`](Self::gather_bytes).
    pub fn any(&self, own: bool) -> Result<bool, ParallelError> {
        let mut count = [f64::from(u8::from(own))];
        self.sum(&mut count)?;
        Ok(count[0] > 0.0)
    }

    /// Sends every rank its own part of `send`, which begins with that of the first; returns what was received, in rank order, and
    /// how much from each.
    ///
    /// # Errors
    /// As [`gather_bytes`](Self::gather_bytes); [`ParallelError::Unsupported`], on this rank, if `to` is not one number a rank,
    /// or they do not add up to what is sent.
    pub fn exchange(
        &self,
        send: &[f32],
        to: &[usize],
    ) -> Result<(Vec<f32>, Vec<usize>), ParallelError> {
        let sum = to.iter().try_fold(0_usize, |sum, &n| sum.checked_add(n));
        if to.len() != self.size() || sum != Some(send.len()) {
            let (n, size) = (send.len(), self.size());
            let what = format!("{n} values cannot be sent to {size} ranks in parts of {to:?}");
            return Err(ParallelError::Unsupported(what));
        }
        let Some(shared) = self.several() else {
            return Ok((send.to_vec(), vec![send.len()]));
        };
        let from = shared.begin_to(Kind::Exchange, to)?;
        let mut received = vec![0.0; from.iter().sum()];
        let communicator = &shared.communicator;
        communicator.exchange((send, to), (&mut received, &from))?;
        let others = send.len() - to[self.rank()];
        shared.sent_in_all(others * size_of::<f32>(), self.size() - 1);
        Ok((received, from))
    }

    /// Compares what every rank has with what the first has.
    ///
    /// # Errors
    /// [`ParallelError::Differ`], on every rank, naming the first thing that differs and the first rank that it differs on.
    pub fn agree(&self, all: &[(&str, String)]) -> Result<(), ParallelError> {
        if self.is_alone() {
            return Ok(());
        }
        let own: Vec<(String, String)> = all
            .iter()
            .map(|(what, value)| ((*what).to_owned(), value.clone()))
            .collect();
        let found = self.gather_json(&own)?;
        // By name: settings may be left out on some ranks.
        let by_name: Vec<BTreeMap<&str, &str>> = found
            .iter()
            .map(|one| one.iter().map(|(w, v)| (w.as_str(), v.as_str())).collect())
            .collect();
        for (what, _) in found.iter().flatten() {
            let of = |rank: usize| {
                by_name[rank]
                    .get(what.as_str())
                    .copied()
                    .unwrap_or("nothing")
            };
            if let Some(rank) = (0..found.len()).find(|&rank| of(rank) != of(0)) {
                return Err(ParallelError::Differ {
                    rank,
                    what: what.clone(),
                    expected: of(0).to_owned(),
                    found: of(rank).to_owned(),
                });
            }
        }
        Ok(())
    }

    /// Tells the other ranks that this one cannot go on, whatever they wait for, or will. Nothing is exchanged after that.
    pub fn fail(&self, message: &str) {
        let Some(shared) = self.several() else {
            return;
        };
        // What others are told if this fails too is what their own communication says.
        let _ = shared.begin_with(Kind::Fail, &vec![message.len(); self.size()], message);
    }

    /// Waits until every rank is done.
    ///
    /// # Errors
    /// As [`gather_bytes`](Self::gather_bytes).
    pub fn finish(&self) -> Result<(), ParallelError> {
        match self.several() {
            Some(shared) => shared.begin(Kind::Finish, 0).map(drop),
            None => Ok(()),
        }
    }
}

fn to_bytes(numbers: &[f64]) -> Vec<u8> {
    numbers.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// What [`to_bytes`] wrote.
fn numbers(bytes: &[u8]) -> impl Iterator<Item = f64> + '_ {
    let eight = bytes.chunks_exact(8);
    eight.map(|x| f64::from_le_bytes(x.try_into().expect("eight bytes")))
}

/// The part of `0..n` that is a rank's.
fn part(n: usize, size: usize, rank: usize) -> std::ops::Range<usize> {
    let (each, more) = (n / size, n % size);
    let start = |r: usize| r * each + r.min(more);
    start(rank)..start(rank + 1)
}

//! What the ranks of one process have in common, and how each collective begins.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread::{self, ThreadId};

use super::{Communicator, ParallelError, Traffic};

/// What a collective is for: ranks compare it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub(super) enum Kind {
    Fail = 1,
    Finish,
    Bytes,
    Floats,
    Sum,
    Exchange,
}

const KINDS: [Kind; 6] = [
    Kind::Fail,
    Kind::Finish,
    Kind::Bytes,
    Kind::Floats,
    Kind::Sum,
    Kind::Exchange,
];

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) communicator: Box<dyn Communicator>,
    ended: AtomicBool,
    pub(super) traffic: Mutex<Traffic>,
    /// The thread that alone may call collectives, if there is one.
    pub(super) left_to: Mutex<Option<ThreadId>>,
}

impl Shared {
    pub(super) fn new(communicator: impl Communicator + 'static) -> Self {
        Self {
            communicator: Box::new(communicator),
            ended: AtomicBool::new(false),
            traffic: Mutex::default(),
            left_to: Mutex::default(),
        }
    }

    pub(super) fn begin(&self, kind: Kind, count: usize) -> Result<Vec<usize>, ParallelError> {
        self.begin_to(kind, &vec![count; self.communicator.size()])
    }

    pub(super) fn begin_to(&self, kind: Kind, to: &[usize]) -> Result<Vec<usize>, ParallelError> {
        self.begin_with(kind, to, "")
    }

    /// Tells every rank what comes, and how much of it for that rank; returns how much will come from each.
    pub(super) fn begin_with(
        &self,
        kind: Kind,
        to: &[usize],
        message: &str,
    ) -> Result<Vec<usize>, ParallelError> {
        let size = self.communicator.size();
        if self.ended.load(Ordering::SeqCst) {
            return Err(ParallelError::Ended);
        }
        let left_to = *self.left_to.lock().unwrap_or_else(PoisonError::into_inner);
        if left_to.is_some_and(|id| id != thread::current().id()) {
            let what = "a collective between an overlapping training pass and its reduction";
            return Err(ParallelError::Unsupported(what.into()));
        }
        let send: Vec<u64> = to.iter().flat_map(|&n| [kind as u64, n as u64]).collect();
        let mut received = vec![0; 2 * size];
        self.communicator.words(&send, &mut received)?;
        self.sent_in_all((size - 1) * 16, size - 1);
        let kinds: Vec<u64> = received.chunks_exact(2).map(|word| word[0]).collect();
        let counts: Vec<usize> = received.chunks_exact(2).map(|w| w[1] as usize).collect();
        if let Some(rank) = kinds.iter().position(|&k| k == Kind::Fail as u64) {
            self.ended.store(true, Ordering::SeqCst);
            let failed = |r: usize| kinds[r] == Kind::Fail as u64;
            let lengths = (0..size).map(|r| if failed(r) { counts[r] } else { 0 });
            let lengths: Vec<usize> = lengths.collect();
            let mut all = vec![0; lengths.iter().sum()];
            self.communicator
                .gather_bytes(message.as_bytes(), &mut all, &lengths)?;
            all.truncate(lengths[rank]);
            let message = String::from_utf8_lossy(&all).into_owned();
            return Err(ParallelError::Peer { rank, message });
        }
        if let Some(rank) = kinds.iter().position(|&k| k != kinds[0]) {
            self.ended.store(true, Ordering::SeqCst);
            let name = |k: u64| KINDS.iter().find(|kind| **kind as u64 == k);
            let what = format!("{:?} and {:?}", name(kinds[rank]), name(kinds[0]));
            return Err(ParallelError::OutOfStep { rank, what });
        }
        Ok(counts)
    }

    /// Refuses counts that differ between ranks.
    pub(super) fn same(&self, what: &str, counts: &[usize]) -> Result<(), ParallelError> {
        match counts.iter().position(|&n| n != counts[0]) {
            None => Ok(()),
            Some(rank) => {
                self.ended.store(true, Ordering::SeqCst);
                let what = format!("{} {what}, not {}", counts[rank], counts[0]);
                Err(ParallelError::OutOfStep { rank, what })
            }
        }
    }

    /// Counts bytes that were sent to every other rank.
    pub(super) fn sent(&self, bytes: usize) {
        let others = self.communicator.size() - 1;
        self.sent_in_all(bytes * others, others);
    }

    pub(super) fn sent_in_all(&self, bytes: usize, messages: usize) {
        let mut traffic = self.traffic.lock().unwrap_or_else(PoisonError::into_inner);
        traffic.bytes += bytes as u64;
        traffic.messages += messages as u64;
    }
}

use std::fmt;
use std::sync::{Mutex, PoisonError};

use mpi::Threading;
use mpi::datatype::{Partition, PartitionMut};
use mpi::environment::Universe;
use mpi::topology::{Communicator as _, SimpleCommunicator};
use mpi::traits::{CommunicatorCollectives, Equivalence};

use super::{Communicator, ParallelError};

/// The processes that `mpirun` or `srun` has started, by an MPI library.
///
/// A rank that dies ends the others: MPI libraries see to that. A rank that panics does so too.
pub struct Mpi {
    /// `None` once it is dropped. Calls come one at a time, from whatever thread.
    universe: Mutex<Option<Universe>>,
    rank: usize,
    size: usize,
}

impl fmt::Debug for Mpi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mpi({} of {})", self.rank, self.size)
    }
}

/// So many values as MPI counts them.
///
/// # Panics
/// If they are more, which ends all ranks: the others wait for these already.
fn counts(all: &[usize]) -> (Vec<i32>, Vec<i32>) {
    let (mut counts, mut starts, mut start) = (Vec::new(), Vec::new(), 0_usize);
    let small = |n: usize| i32::try_from(n).expect("no more values at once than MPI can count");
    for &n in all {
        counts.push(small(n));
        starts.push(small(start));
        start += n;
    }
    (counts, starts)
}

impl Mpi {
    /// Joins the others.
    ///
    /// # Errors
    /// [`ParallelError::Transport`] if this process has joined before, or the library cannot be called from threads.
    pub fn join() -> Result<Self, ParallelError> {
        let refused = |what: &str| ParallelError::Transport(what.into());
        let joined = mpi::initialize_with_threading(Threading::Serialized);
        let (universe, provided) = joined.ok_or_else(|| refused("MPI was initialised before"))?;
        if provided < Threading::Serialized {
            return Err(refused(
                "this MPI library can be called by one thread alone",
            ));
        }
        let world = universe.world();
        let [rank, size] = [world.rank(), world.size()].map(|n| n as usize);
        Ok(Self {
            universe: Mutex::new(Some(universe)),
            rank,
            size,
        })
    }

    fn with<R>(&self, call: impl FnOnce(&SimpleCommunicator) -> R) -> R {
        let universe = self.universe.lock();
        let _alone = universe.unwrap_or_else(PoisonError::into_inner);
        call(&SimpleCommunicator::world())
    }

    fn gather_all<T: Equivalence>(
        &self,
        own: &[T],
        all: &mut [T],
        each: &[usize],
    ) -> Result<(), ParallelError> {
        let (each, starts) = counts(each);
        let mut all = PartitionMut::new(all, each, starts);
        self.with(|world| world.all_gather_varcount_into(own, &mut all));
        Ok(())
    }
}

impl Drop for Mpi {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // The others wait for this rank, and so would MPI's own end.
            SimpleCommunicator::world().abort(101);
        }
        let universe = self.universe.get_mut();
        universe.unwrap_or_else(PoisonError::into_inner).take();
    }
}

impl Communicator for Mpi {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn words(&self, send: &[u64], receive: &mut [u64]) -> Result<(), ParallelError> {
        self.with(|world| world.all_to_all_into(send, receive));
        Ok(())
    }

    fn exchange(
        &self,
        (send, to): (&[f32], &[usize]),
        (receive, from): (&mut [f32], &[usize]),
    ) -> Result<(), ParallelError> {
        let ((to, to_starts), (from, from_starts)) = (counts(to), counts(from));
        let send = Partition::new(send, to, to_starts);
        let mut receive = PartitionMut::new(receive, from, from_starts);
        self.with(|world| world.all_to_all_varcount_into(&send, &mut receive));
        Ok(())
    }

    fn gather(&self, own: &[f32], all: &mut [f32], counts: &[usize]) -> Result<(), ParallelError> {
        self.gather_all(own, all, counts)
    }

    fn gather_bytes(
        &self,
        own: &[u8],
        all: &mut [u8],
        counts: &[usize],
    ) -> Result<(), ParallelError> {
        self.gather_all(own, all, counts)
    }
}

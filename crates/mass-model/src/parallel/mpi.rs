use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use mpi::Threading;
use mpi::datatype::{Partition, PartitionMut};
use mpi::environment::Universe;
use mpi::request::{Request, Scope, scope};
use mpi::topology::{Communicator as _, SimpleCommunicator};
use mpi::traits::{CommunicatorCollectives, Equivalence};

use super::{Communicator, ParallelError};

/// The processes that `mpirun` or `srun` has started, by an MPI library.
///
/// A rank that dies ends the others: MPI libraries see to that. A rank that panics does so too.
pub struct Mpi {
    /// `None` once it is dropped. Calls come one at a time, from whatever thread.
    universe: Mutex<Option<Universe>>,
    /// Calls of [`exchange`](Communicator::exchange) and [`gather`](Communicator::gather) return at once then, and are waited for.
    /// MPI does not match such calls with those that wait, so that words and bytes, by which ranks fail, always wait.
    in_background: AtomicBool,
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

/// How long a thread beside one that computes asks again and again, and how long it sleeps then before it asks once more.
const EAGER: Duration = Duration::from_micros(50);
const NAP: Duration = Duration::from_micros(50);

/// Waits as MPI libraries do not: they ask without a pause, and keep a core busy.
fn wait<'a, D: ?Sized, S: Scope<'a>>(mut request: Request<'a, D, S>) {
    let started = Instant::now();
    while let Err(pending) = request.test() {
        request = pending;
        match started.elapsed() < EAGER {
            true => thread::yield_now(),
            false => thread::sleep(NAP),
        }
    }
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
            in_background: AtomicBool::new(false),
            rank,
            size,
        })
    }

    fn with<R>(&self, call: impl FnOnce(&SimpleCommunicator) -> R) -> R {
        let universe = self.universe.lock();
        let _alone = universe.unwrap_or_else(PoisonError::into_inner);
        call(&SimpleCommunicator::world())
    }

    fn gently(&self) -> bool {
        self.in_background.load(Ordering::Relaxed)
    }

    fn gather_all<T: Equivalence>(
        &self,
        own: &[T],
        all: &mut [T],
        each: &[usize],
        gently: bool,
    ) -> Result<(), ParallelError> {
        let (each, starts) = counts(each);
        let mut all = PartitionMut::new(all, each, starts);
        self.with(|world| match gently {
            false => world.all_gather_varcount_into(own, &mut all),
            true => {
                scope(|s| wait(world.immediate_all_gather_varcount_into(s, own, &mut all)));
            }
        });
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
        self.with(|world| match self.gently() {
            false => world.all_to_all_varcount_into(&send, &mut receive),
            true => {
                scope(|s| {
                    wait(world.immediate_all_to_all_varcount_into(s, &send, &mut receive));
                });
            }
        });
        Ok(())
    }

    fn gather(&self, own: &[f32], all: &mut [f32], counts: &[usize]) -> Result<(), ParallelError> {
        self.gather_all(own, all, counts, self.gently())
    }

    fn gather_bytes(
        &self,
        own: &[u8],
        all: &mut [u8],
        counts: &[usize],
    ) -> Result<(), ParallelError> {
        self.gather_all(own, all, counts, false)
    }

    fn in_background(&self, yes: bool) {
        self.in_background.store(yes, Ordering::Relaxed);
    }
}

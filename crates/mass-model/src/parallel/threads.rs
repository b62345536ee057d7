use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use super::{Communicator, ParallelError, Ranks};

/// How long a rank waits for the others before it says that they are gone.
const PATIENCE: Duration = Duration::from_secs(600);

/// Ranks within one process, one a thread: what is true of them is true of those of a cluster, without one.
#[derive(Debug)]
pub struct Threads {
    rank: usize,
    table: Arc<Table>,
}

/// Where ranks leave what they send.
#[derive(Debug)]
struct Table {
    size: usize,
    state: Mutex<State>,
    turned: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// What each rank has left, for each rank.
    left: Vec<Option<Vec<Vec<u8>>>>,
    /// Ranks that have taken theirs.
    taken: usize,
    /// A rank has ended while others wait for it.
    gone: bool,
}

/// A rank that ends, by whatever way.
struct Leaving<'a>(&'a Table);

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.lock().gone = true;
            self.0.turned.notify_all();
        }
    }
}

impl Table {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Threads {
    /// Runs a function on so many ranks and returns what each makes of it. An error of one is told to the others.
    ///
    /// # Panics
    /// If the function does on any of them.
    pub fn run<R: Send, E: From<ParallelError> + std::fmt::Display + Send>(
        size: usize,
        work: impl Fn(&Ranks) -> Result<R, E> + Sync,
    ) -> Vec<Result<R, E>> {
        let table = Arc::new(Table {
            size,
            state: Mutex::new(State {
                left: vec![None; size],
                ..State::default()
            }),
            turned: Condvar::new(),
        });
        std::thread::scope(|scope| {
            let ranks = (0..size).map(|rank| {
                let (work, table) = (&work, Arc::clone(&table));
                scope.spawn(move || {
                    let _leaving = Leaving(&table);
                    let ranks = Ranks::new(Self {
                        rank,
                        table: Arc::clone(&table),
                    });
                    let made = work(&ranks).and_then(|made| {
                        ranks.finish()?;
                        Ok(made)
                    });
                    if let Err(error) = &made {
                        ranks.fail(&error.to_string());
                    }
                    made
                })
            });
            let ranks: Vec<_> = ranks.collect();
            let ends = ranks.into_iter().map(|rank| match rank.join() {
                Ok(made) => made,
                Err(panic) => std::panic::resume_unwind(panic),
            });
            ends.collect()
        })
    }

    /// Leaves something for every rank and takes what they have left for this one.
    fn swap(&self, send: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>, ParallelError> {
        let table = &self.table;
        let wait = |mut state: std::sync::MutexGuard<'_, State>, until: &dyn Fn(&State) -> bool| {
            // A lock that is taken again and again: others change the state meanwhile.
            while !until(&state) {
                let gone = ParallelError::Transport("a rank has ended".into());
                if state.gone {
                    return Err(gone);
                }
                let waited = table.turned.wait_timeout(state, PATIENCE);
                let (next, timed) = waited.unwrap_or_else(PoisonError::into_inner);
                if timed.timed_out() {
                    return Err(gone);
                }
                state = next;
            }
            Ok(())
        };
        let rank = self.rank;
        wait(table.lock(), &|state| state.left[rank].is_none())?;
        table.lock().left[rank] = Some(send);
        table.turned.notify_all();
        wait(table.lock(), &|state| {
            state.left.iter().all(Option::is_some)
        })?;
        let mut state = table.lock();
        let left = state.left.iter();
        let received = left.map(|of| of.as_ref().map_or_else(Vec::new, |of| of[rank].clone()));
        let received = received.collect();
        state.taken += 1;
        if state.taken == table.size {
            state.taken = 0;
            state.left.fill(None);
            table.turned.notify_all();
        }
        Ok(received)
    }

    fn swap_all<T: Copy, const N: usize>(
        &self,
        parts: impl Iterator<Item = Vec<T>>,
        receive: &mut [T],
        bytes: fn(T) -> [u8; N],
        value: fn([u8; N]) -> T,
    ) -> Result<(), ParallelError> {
        let send = parts.map(|part| part.into_iter().flat_map(bytes).collect());
        let received = self.swap(send.collect())?.concat();
        if received.len() != receive.len() * N {
            let what = format!("{} bytes came, not {}", received.len(), receive.len() * N);
            return Err(ParallelError::Transport(what));
        }
        for (to, from) in receive.iter_mut().zip(received.chunks_exact(N)) {
            *to = value(from.try_into().expect("so many bytes"));
        }
        Ok(())
    }
}

impl Communicator for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.table.size
    }

    fn words(&self, send: &[u64], receive: &mut [u64]) -> Result<(), ParallelError> {
        let each = send.len() / self.table.size;
        let parts = send.chunks_exact(each).map(<[u64]>::to_vec);
        self.swap_all(parts, receive, u64::to_le_bytes, u64::from_le_bytes)
    }

    fn exchange(
        &self,
        (send, to): (&[f32], &[usize]),
        (receive, _): (&mut [f32], &[usize]),
    ) -> Result<(), ParallelError> {
        let mut rest = send;
        let parts = to.iter().map(|&n| {
            let (head, tail) = rest.split_at(n);
            rest = tail;
            head.to_vec()
        });
        let parts: Vec<_> = parts.collect();
        let parts = parts.into_iter();
        self.swap_all(parts, receive, f32::to_le_bytes, f32::from_le_bytes)
    }

    fn gather(&self, own: &[f32], all: &mut [f32], _: &[usize]) -> Result<(), ParallelError> {
        let parts = (0..self.table.size).map(|_| own.to_vec());
        self.swap_all(parts, all, f32::to_le_bytes, f32::from_le_bytes)
    }

    fn gather_bytes(&self, own: &[u8], all: &mut [u8], _: &[usize]) -> Result<(), ParallelError> {
        let parts = (0..self.table.size).map(|_| own.to_vec());
        self.swap_all(parts, all, |b: u8| [b], |[b]: [u8; 1]| b)
    }
}

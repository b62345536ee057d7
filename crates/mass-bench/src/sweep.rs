//! Many independent runs on a few threads, with results that do not depend on who finishes first.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::BenchError;
use crate::cli::RunContext;
use crate::report::{ResultStore, Run, reset_peak_rss};
use crate::trainer::{DIVERGED, Outcome};

/// How the runs of a study share the threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// As many at a time as there are threads, each on one: that uses the cores better than threads inside small kernels.
    BySide,
    /// One after another, each on all.
    Alone,
}

/// A run's way of telling that it advances, and of learning that it should stop.
#[derive(Debug)]
pub struct Ticker<'a> {
    done: &'a AtomicU64,
    passed: &'a AtomicU64,
    said: &'a Mutex<String>,
    stop: &'a AtomicBool,
    interrupt: &'a AtomicBool,
}

impl Ticker<'_> {
    /// Counts steps that are not made: an earlier process did, or they are left out.
    pub fn pass_over(&self, steps: u64) {
        self.passed.fetch_add(steps, Ordering::Relaxed);
        self.done.fetch_add(steps, Ordering::Relaxed);
    }

    /// Counts steps and says how it goes; `false` asks the run to save itself and stop.
    pub fn tick(&self, steps: u64, say: impl FnOnce() -> String) -> bool {
        self.done.fetch_add(steps, Ordering::Relaxed);
        *self.said.lock().unwrap_or_else(PoisonError::into_inner) = say();
        !self.stop.load(Ordering::Relaxed) && !self.interrupt.load(Ordering::SeqCst)
    }
}

/// Runs `work` on every planned run.
///
/// Results, metrics and events are written in the order of the plan: the files are the same on any number of threads. A run's
/// checkpoint is removed with that: nothing goes on from it, it would only fill the disk. `work` returns `None` when it stopped
/// because it was asked to. After an error the other runs save themselves and stop.
///
/// # Errors
/// The first error of a run; [`BenchError::Interrupted`] after Ctrl-C.
pub fn sweep<P: Sync>(
    ctx: &mut RunContext,
    store: &mut ResultStore,
    (side, threads): (Side, usize),
    planned: &[P],
    total_steps: u64,
    work: impl Fn(&P, &Ticker<'_>) -> Result<Option<Outcome>, BenchError> + Sync,
) -> Result<(), BenchError> {
    let (next, done, passed, stop) = (
        AtomicUsize::new(0),
        AtomicU64::new(0),
        AtomicU64::new(0),
        AtomicBool::new(false),
    );
    let ranks = ctx.ranks.clone();
    // Several processes do the same things in the same order.
    let side = if ranks.is_alone() { side } else { Side::Alone };
    let workers = match side {
        Side::BySide => threads.clamp(1, planned.len().max(1)),
        Side::Alone => 1,
    };
    let (interrupt, said) = (ctx.interrupt_flag(), Mutex::new(String::new()));
    let failure: Mutex<Option<BenchError>> = Mutex::new(None);
    let fail = |error: BenchError| {
        stop.store(true, Ordering::Relaxed);
        let mut failure = failure.lock().unwrap_or_else(PoisonError::into_inner);
        failure.get_or_insert(error);
    };
    let (send, receive) = channel();
    ctx.progress.start("steps", total_steps);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            let send = send.clone();
            scope.spawn(|| {
                let send = send;
                // One thread a run, or those that the whole process has.
                let own = (side == Side::BySide)
                    .then(|| rayon::ThreadPoolBuilder::new().num_threads(1).build());
                let own = match own.transpose() {
                    Ok(own) => own,
                    Err(e) => return fail(BenchError::failed("starting a thread", e)),
                };
                let ticker = Ticker {
                    done: &done,
                    passed: &passed,
                    said: &said,
                    stop: &stop,
                    interrupt: &interrupt,
                };
                while ticker.tick(0, String::new) {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(plan) = planned.get(index) else {
                        break;
                    };
                    let made = match &own {
                        Some(pool) => pool.install(|| work(plan, &ticker)),
                        None => {
                            // What runs before have kept for use again is not this one's memory.
                            mass_model::release_scratch();
                            reset_peak_rss();
                            work(plan, &ticker)
                        }
                    };
                    match made {
                        Ok(Some(outcome)) => drop(send.send((index, outcome))),
                        Ok(None) => {
                            // Another rank may have been asked.
                            interrupt.store(true, Ordering::SeqCst);
                            break;
                        }
                        Err(e) => return fail(e),
                    }
                }
            });
        }
        drop(send);
        let mut waiting = BTreeMap::new();
        let mut written = 0;
        loop {
            match receive.recv_timeout(Duration::from_millis(200)) {
                Ok((index, outcome)) => {
                    waiting.insert(index, outcome);
                    while let Some(outcome) = waiting.remove(&written) {
                        written += 1;
                        if let Err(e) = write(ctx, store, outcome) {
                            fail(e);
                        }
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            ctx.progress.pass_over(passed.load(Ordering::Relaxed));
            ctx.progress.tick(done.load(Ordering::Relaxed), || {
                let said = said.lock().unwrap_or_else(PoisonError::into_inner);
                format!("{written} of {} runs; {said}", planned.len())
            });
        }
    });
    match failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => ctx.check_interrupt(store.dir()),
    }
}

fn write(ctx: &RunContext, store: &mut ResultStore, outcome: Outcome) -> Result<(), BenchError> {
    let folder = RunContext::checkpoint_dir(store.dir(), &outcome.run.key());
    let line = match outcome.events.last() {
        Some(last) if last["kind"] == DIVERGED => {
            last["why"].as_str().unwrap_or_default().to_owned()
        }
        _ => describe(&outcome.run),
    };
    store.keep(outcome.run, &outcome.metrics, &outcome.events)?;
    if ctx.ranks.is_first() && folder.is_dir() {
        std::fs::remove_dir_all(&folder)
            .map_err(|e| BenchError::failed("removing a checkpoint", e))?;
    }
    ctx.progress.note(&line);
    Ok(())
}

/// The line that stays when a run is done.
fn describe(run: &Run) -> String {
    let metric = run.metric_name.as_deref().unwrap_or("metric");
    let figures = [("loss", run.test_loss), (metric, run.metric)].into_iter();
    let figures = figures.filter_map(|(name, x)| Some(format!("{name} {:.4}, ", x?)));
    let experts = run.experts.map(|k| format!("{k} experts, "));
    let parts: String = figures.chain(experts).collect();
    format!("{}: {parts}{:.1} s", run.key(), run.wall_s.unwrap_or(0.0))
}

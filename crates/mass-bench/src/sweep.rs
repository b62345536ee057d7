//! Many independent runs on a few threads, with results that do not depend on who finishes first.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use mass_expand::Event;

use crate::BenchError;
use crate::cli::RunContext;
use crate::report::{MetricLine, ResultStore, Run};

/// What a finished run leaves.
#[derive(Debug)]
pub struct Outcome {
    /// Its row in results.json.
    pub run: Run,
    /// Its lines in metrics.jsonl.
    pub metrics: Vec<MetricLine>,
    /// Its lines in events.jsonl.
    pub events: Vec<Event>,
}

/// A run's way of telling that it advances, and of learning that it should stop.
#[derive(Debug)]
pub struct Ticker<'a> {
    done: &'a AtomicU64,
    stop: &'a AtomicBool,
    interrupt: &'a AtomicBool,
}

impl Ticker<'_> {
    /// Counts steps; `false` asks the run to save itself and stop.
    pub fn tick(&self, steps: u64) -> bool {
        self.done.fetch_add(steps, Ordering::Relaxed);
        !self.stop.load(Ordering::Relaxed) && !self.interrupt.load(Ordering::SeqCst)
    }
}

/// Runs `work` on every planned run, `threads` at a time, each on one thread of its own.
///
/// Results, metrics and events are written in the order of the plan: the files are the same on any number of threads.
/// `work` returns `None` when it stopped because it was asked to. After an error the other runs save themselves and stop.
///
/// # Errors
/// The first error of a run; [`BenchError::Interrupted`] after Ctrl-C.
pub fn sweep<P: Sync>(
    ctx: &mut RunContext,
    store: &mut ResultStore,
    threads: usize,
    planned: &[P],
    total_steps: u64,
    work: impl Fn(&P, &Ticker<'_>) -> Result<Option<Outcome>, BenchError> + Sync,
) -> Result<(), BenchError> {
    let (next, done, stop) = (
        AtomicUsize::new(0),
        AtomicU64::new(0),
        AtomicBool::new(false),
    );
    let interrupt = ctx.interrupt_flag();
    let failure: Mutex<Option<BenchError>> = Mutex::new(None);
    let fail = |error: BenchError| {
        stop.store(true, Ordering::Relaxed);
        failure
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .get_or_insert(error);
    };
    let (send, receive) = channel();
    ctx.progress.start("steps", total_steps);
    std::thread::scope(|scope| {
        for _ in 0..threads.clamp(1, planned.len().max(1)) {
            let send = send.clone();
            scope.spawn(|| {
                let send = send;
                // One thread a run: runs side by side use the cores better than threads inside small kernels.
                let pool = match rayon::ThreadPoolBuilder::new().num_threads(1).build() {
                    Ok(pool) => pool,
                    Err(e) => return fail(BenchError::failed("starting a thread", e)),
                };
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(plan) = planned.get(index) else {
                        break;
                    };
                    let ticker = Ticker {
                        done: &done,
                        stop: &stop,
                        interrupt: &interrupt,
                    };
                    if !ticker.tick(0) {
                        break;
                    }
                    match pool.install(|| work(plan, &ticker)) {
                        Ok(Some(outcome)) => drop(send.send((index, outcome))),
                        Ok(None) => break,
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
            ctx.progress.tick(done.load(Ordering::Relaxed), || {
                format!("{written} of {} runs", planned.len())
            });
        }
    });
    match failure
        .into_inner()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
    {
        Some(error) => Err(error),
        None => ctx.check_interrupt(store.dir()),
    }
}

fn write(ctx: &RunContext, store: &mut ResultStore, outcome: Outcome) -> Result<(), BenchError> {
    let key = outcome.run.key().to_string();
    let figure = |x: Option<f64>| x.map_or_else(|| "-".to_owned(), |x| format!("{x:.4}"));
    let (loss, wall) = (
        figure(outcome.run.test_loss),
        outcome.run.wall_s.unwrap_or(0.0),
    );
    let experts = outcome.run.experts.unwrap_or(0);
    store.keep(outcome.run, &outcome.metrics, &outcome.events)?;
    ctx.progress.note(&format!(
        "{key}: loss {loss}, {experts} experts, {wall:.1} s"
    ));
    Ok(())
}

/// Where the checkpoints of a run go.
pub fn checkpoint_dir(store: &ResultStore, run: &Run) -> PathBuf {
    RunContext::checkpoint_dir(store.dir(), &run.key())
}

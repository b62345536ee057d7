use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use serde::Serialize;

use super::{Progress, ReproduceArgs, TrainArgs};
use crate::{
    BenchError,
    fnv::Fnv,
    report::{Header, ResultStore},
};

fn header(args: &ReproduceArgs, planned: usize) -> Header {
    Header {
        part: args.shard.part(planned),
        ..Header::new(&args.study, &args.preset.to_string(), args.threads)
    }
}

/// What a running command has besides its arguments: progress display and the interrupt flag.
#[derive(Debug)]
pub struct RunContext {
    /// Where progress goes.
    pub progress: Progress,
    interrupt: Arc<AtomicBool>,
}

impl RunContext {
    /// A context whose interrupt flag nobody has raised.
    #[must_use]
    pub fn new(progress: Progress) -> Self {
        Self {
            progress,
            interrupt: Arc::new(AtomicBool::new(false)),
        }
    }

    /// Raises the flag on Ctrl-C, and where a system ends processes by signals on SIGTERM and SIGHUP; a second one ends the
    /// process at once, with exit code 1.
    ///
    /// # Errors
    /// [`BenchError::Failed`] when the system refuses a handler.
    pub fn watch_signals(&self) -> Result<(), BenchError> {
        let flag = Arc::clone(&self.interrupt);
        ctrlc::set_handler(move || {
            if flag.swap(true, Ordering::SeqCst) {
                std::process::exit(1);
            }
        })
        .map_err(|e| BenchError::failed("setting the handler of signals", e))
    }

    /// The flag itself, for code that runs elsewhere.
    #[must_use]
    pub fn interrupt_flag(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.interrupt)
    }

    /// Whether to stop: ask once a step, write a checkpoint, return [`BenchError::Interrupted`].
    #[must_use]
    pub fn interrupted(&self) -> bool {
        self.interrupt.load(Ordering::SeqCst)
    }

    /// [`BenchError::Interrupted`] when a signal asked to stop.
    ///
    /// # Errors
    /// That one.
    pub fn check_interrupt(&self, out: &Path) -> Result<(), BenchError> {
        if self.interrupted() {
            Err(BenchError::Interrupted {
                out: out.to_owned(),
            })
        } else {
            Ok(())
        }
    }

    /// The output directory of a study, ready to be written to; see [`ResultStore::open`].
    ///
    /// `settings` is everything that changes a run's figures, without what only adds runs; `planned` is how many runs there are.
    ///
    /// # Errors
    /// [`BenchError::Report`].
    pub fn open_store(
        &self,
        args: &ReproduceArgs,
        settings: &impl Serialize,
        planned: usize,
    ) -> Result<ResultStore, BenchError> {
        let header = header(args, planned);
        Ok(ResultStore::open(
            &args.out,
            header,
            settings,
            args.existing(),
        )?)
    }

    /// Whether [`open_store`](Self::open_store) would do, as far as can be told before anything is written.
    ///
    /// # Errors
    /// [`BenchError::Report`].
    pub fn check_store(
        &self,
        args: &ReproduceArgs,
        settings: &impl Serialize,
    ) -> Result<(), BenchError> {
        let header = header(args, 0);
        Ok(ResultStore::check(
            &args.out,
            header,
            settings,
            args.existing(),
        )?)
    }

    /// The output directory of `train`; the study is "train" and the preset "text".
    ///
    /// `settings` is added to by the arguments themselves.
    ///
    /// # Errors
    /// [`BenchError::Report`].
    pub fn open_train_store(
        &self,
        args: &TrainArgs,
        settings: &impl Serialize,
    ) -> Result<ResultStore, BenchError> {
        let header = Header::new("train", "text", args.threads);
        let all = serde_json::json!({ "arguments": args, "settings": settings });
        Ok(ResultStore::open(&args.out, header, &all, args.existing())?)
    }

    /// Where checkpoints of a run belong: a folder of its own below the output directory. Names that are not written in ASCII
    /// are told apart by a digest.
    #[must_use]
    pub fn checkpoint_dir(out: &Path, run: &crate::report::RunKey) -> PathBuf {
        let key = run.to_string();
        let mut name: String = key
            .chars()
            .map(|c| {
                if c.is_ascii_alphanumeric() || c == '.' {
                    c
                } else {
                    '-'
                }
            })
            .collect();
        if !key.is_ascii() {
            let mut digest = Fnv::default();
            digest.eat(key.as_bytes());
            name.push_str(&format!("-{:016x}", digest.0));
        }
        out.join("checkpoints").join(name)
    }
}

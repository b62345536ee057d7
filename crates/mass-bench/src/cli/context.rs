use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use mass_model::Place;
use mass_model::parallel::Ranks;

use super::Progress;
use crate::{BenchError, fnv::Fnv};

/// What a running command has besides its arguments: progress display and the interrupt flag.
#[derive(Debug)]
pub struct RunContext {
    /// Where progress goes.
    pub progress: Progress,
    /// The processes that train together; one, unless there are others.
    pub ranks: Ranks,
    interrupt: Arc<AtomicBool>,
}

/// Most bytes of a folder's name, without a digest.
const LONGEST: usize = 200;

impl RunContext {
    /// A context whose interrupt flag nobody has raised.
    #[must_use]
    pub fn new(progress: Progress) -> Self {
        Self {
            progress,
            ranks: Ranks::default(),
            interrupt: Arc::new(AtomicBool::new(false)),
        }
    }

    /// Raises the flag on Ctrl-C, and where a system ends processes by signals on SIGTERM and SIGHUP; a later one ends the
    /// process at once, with exit code 1. Within a second it is the same one: Slurm sends two at the end of a job's time.
    ///
    /// # Errors
    /// [`BenchError::Failed`] when the system refuses a handler.
    pub fn watch_signals(&self) -> Result<(), BenchError> {
        let flag = Arc::clone(&self.interrupt);
        let mut first = None;
        ctrlc::set_handler(move || {
            flag.store(true, Ordering::SeqCst);
            if first.get_or_insert_with(Instant::now).elapsed() > Duration::from_secs(1) {
                std::process::exit(1);
            }
        })
        .map_err(|e| BenchError::failed("setting the handler of signals", e))
    }

    /// Says which card computes, if one does, and how much of its memory is free.
    pub fn say_where(&self, place: &Place) {
        #[cfg(feature = "cuda")]
        if let Place::Cuda(device) = place {
            let free = match device.memory() {
                Ok(memory) => format!(", {:.1} free", memory.free as f64 / f64::from(1 << 30)),
                Err(_) => String::new(),
            };
            self.progress.note(&format!("on {place}{free}"));
        }
        let _ = place;
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

    /// Where checkpoints of a run belong: a folder of its own below the output directory. Names that are not written in ASCII,
    /// or longer than file systems hold, are told apart by a digest.
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
        if !key.is_ascii() || name.len() > LONGEST {
            name.truncate(LONGEST);
            let mut digest = Fnv::default();
            digest.eat(key.as_bytes());
            name.push_str(&format!("-{:016x}", digest.0));
        }
        out.join("checkpoints").join(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Run;

    #[test]
    fn folders_of_long_names_differ_and_fit() {
        let folder = |setting: String| {
            let run = Run {
                setting: Some(setting),
                ..Run::new("mass", 0)
            };
            RunContext::checkpoint_dir(Path::new(""), &run.key())
        };
        let long = ["a", "b"].map(|end| folder("noisy:std=0.1/".repeat(40) + end));
        assert_ne!(long[0], long[1]);
        for folder in long {
            assert!(folder.file_name().unwrap().len() < 255, "{folder:?}");
        }
        let short = folder("p 0.5".into());
        assert_eq!(short, Path::new("checkpoints/mass-p-0.5-seed0"));
    }
}

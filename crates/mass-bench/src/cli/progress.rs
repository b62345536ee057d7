use std::{
    io::{IsTerminal, Write},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Plain lines come no oftener than this.
const PLAIN_INTERVAL: Duration = Duration::from_secs(10);

/// Progress on standard error: a bar on a terminal, plain lines otherwise, nothing with `--json`.
#[derive(Debug)]
pub struct Progress {
    mode: Mode,
    label: String,
    total: u64,
    done: u64,
}

#[derive(Debug)]
enum Mode {
    Bar(ProgressBar),
    Plain { last: Instant },
    Silent,
}

impl Progress {
    /// What fits: silent when asked for, a bar on a terminal, lines otherwise.
    #[must_use]
    pub fn new(silent: bool) -> Self {
        let mode = if silent {
            Mode::Silent
        } else if std::io::stderr().is_terminal() {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(10));
            let style = ProgressStyle::with_template(
                "{prefix} [{bar:30}] {pos}/{len} {elapsed_precise} eta {eta} {wide_msg}",
            )
            .unwrap_or_else(|_| ProgressStyle::default_bar());
            bar.set_style(style.progress_chars("=> "));
            Mode::Bar(bar)
        } else {
            Mode::Plain {
                last: Instant::now(),
            }
        };
        Self {
            mode,
            label: String::new(),
            total: 0,
            done: 0,
        }
    }

    /// Begins a task of `total` steps.
    pub fn start(&mut self, label: &str, total: u64) {
        label.clone_into(&mut self.label);
        (self.total, self.done) = (total, 0);
        match &mut self.mode {
            Mode::Bar(bar) => {
                bar.reset();
                bar.set_length(total);
                bar.set_prefix(self.label.clone());
                bar.set_message("");
            }
            Mode::Plain { last } => *last = Instant::now(),
            Mode::Silent => {}
        }
    }

    /// `done` steps are done; `message` is called only when it will be shown.
    pub fn tick(&mut self, done: u64, message: impl FnOnce() -> String) {
        self.done = done;
        match &mut self.mode {
            Mode::Bar(bar) => {
                bar.set_position(done);
                bar.set_message(message());
            }
            Mode::Plain { last } if last.elapsed() >= PLAIN_INTERVAL => {
                *last = Instant::now();
                say(&format!(
                    "{} {done}/{} {}",
                    self.label,
                    self.total,
                    message()
                ));
            }
            Mode::Plain { .. } | Mode::Silent => {}
        }
    }

    /// Ends the task with a line that stays.
    pub fn finish(&mut self, line: &str) {
        let line = format!("{}: {line}", self.label);
        self.note(&line);
        if let Mode::Bar(bar) = &self.mode {
            bar.finish_and_clear();
        }
    }

    /// A line that stays, above the bar.
    pub fn note(&self, line: &str) {
        match &self.mode {
            // `println` of a hidden or finished bar writes nothing.
            Mode::Bar(bar) => bar.suspend(|| say(line)),
            Mode::Plain { .. } => say(line),
            Mode::Silent => {}
        }
    }
}

/// A line on standard error. A run goes on when nobody reads it any more.
fn say(line: &str) {
    writeln!(std::io::stderr(), "{line}").ok();
}

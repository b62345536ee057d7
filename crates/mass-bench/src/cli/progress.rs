use std::{
    io::{IsTerminal, Write},
    time::{Duration, Instant},
};

use indicatif::{FormattedDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Plain lines come no oftener than this, after a first one.
const PLAIN_INTERVAL: Duration = Duration::from_secs(10);
/// A task that is done before says nothing of its progress.
const FIRST_LINE: Duration = Duration::from_secs(1);

/// Progress on standard error: a bar on a terminal, plain lines otherwise, nothing with `--json`.
#[derive(Debug)]
pub struct Progress {
    mode: Mode,
    label: String,
    total: u64,
    done: u64,
    /// Steps that count, but took no time here.
    passed: u64,
}

#[derive(Debug)]
enum Mode {
    Bar(ProgressBar),
    Plain {
        begun: Instant,
        /// When a line is due.
        next: Duration,
    },
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
            Mode::plain()
        };
        Self {
            mode,
            label: String::new(),
            total: 0,
            done: 0,
            passed: 0,
        }
    }

    /// Begins a task of `total` steps.
    pub fn start(&mut self, label: &str, total: u64) {
        label.clone_into(&mut self.label);
        (self.total, self.done, self.passed) = (total, 0, 0);
        match &mut self.mode {
            Mode::Bar(bar) => {
                bar.reset();
                bar.set_length(total);
                bar.set_prefix(self.label.clone());
                bar.set_message("");
            }
            plain @ Mode::Plain { .. } => *plain = Mode::plain(),
            Mode::Silent => {}
        }
    }

    /// Of the steps that will be done so many took no time here: an earlier process made them, or a run stopped before them.
    pub fn pass_over(&mut self, steps: u64) {
        if std::mem::replace(&mut self.passed, steps) != steps
            && let Mode::Bar(bar) = &self.mode
        {
            bar.reset_eta();
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
            Mode::Plain { begun, next } => {
                let elapsed = begun.elapsed();
                if elapsed >= *next {
                    *next = elapsed + PLAIN_INTERVAL;
                    let (label, total) = (&self.label, self.total);
                    let left = left(
                        done.saturating_sub(self.passed),
                        total.saturating_sub(done),
                        elapsed,
                    );
                    say(&format!("{label} {done}/{total}{left} {}", message()));
                }
            }
            Mode::Silent => {}
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

impl Mode {
    fn plain() -> Self {
        Self::Plain {
            begun: Instant::now(),
            next: FIRST_LINE,
        }
    }
}

/// How long the rest of a task will take, once that can be said.
fn left(done: u64, rest: u64, elapsed: Duration) -> String {
    match done {
        0 => String::new(),
        _ => {
            let seconds = elapsed.as_secs_f64() * rest as f64 / done as f64;
            let left = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX);
            format!(
                " eta {}",
                FormattedDuration(Duration::from_secs(left.as_secs()))
            )
        }
    }
}

/// A line on standard error. A run goes on when nobody reads it any more.
fn say(line: &str) {
    writeln!(std::io::stderr(), "{line}").ok();
}

#[cfg(test)]
mod tests {
    use super::{Duration, left};

    #[test]
    fn the_rest_takes_as_long_a_step_as_what_is_done() {
        let minute = Duration::from_secs(60);
        assert_eq!(left(0, 10, minute), "");
        assert_eq!(left(20, 0, minute), " eta 00:00:00");
        assert_eq!(left(20, 30, minute), " eta 00:01:30");
        assert!(left(1, u64::MAX, Duration::MAX).starts_with(" eta "));
    }
}

use std::path::PathBuf;

use mass_model::parallel::ParallelError;

use crate::{ginc::GincError, glue::GlueError, report::ReportError, text::TextError};

/// Everything that ends a command, and the exit code it ends with.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BenchError {
    /// An argument that cannot be used; the message says what to give instead.
    #[error("{0}")]
    Usage(String),
    /// Input (a file or a directory) that is missing or unreadable as what it should be.
    #[error("{}: {problem}", path.display())]
    Input {
        /// The path looked at.
        path: PathBuf,
        /// What is wrong with it and how to mend it.
        problem: String,
    },
    /// GINC parameters or tokens that make no sense.
    #[error(transparent)]
    Ginc(#[from] GincError),
    /// A GLUE task, tokenizer or prediction that cannot be used.
    #[error(transparent)]
    Glue(#[from] GlueError),
    /// A text that cannot be trained on.
    #[error(transparent)]
    Text(#[from] TextError),
    /// Results that could not be written or read back.
    #[error(transparent)]
    Report(#[from] ReportError),
    /// Ctrl-C or SIGTERM: what was finished is on disk.
    #[error(
        "interrupted; the same command with --resume continues from {} (in place of --fresh, where that was given)",
        out.display()
    )]
    Interrupted {
        /// The output directory that holds the checkpoint.
        out: PathBuf,
    },
    /// Processes that train together failed, or parted.
    #[error(transparent)]
    Parallel(#[from] mass_model::parallel::ParallelError),
    /// Training whose numbers are numbers no more.
    #[error("{doing}: {source}; training has diverged: a smaller learning rate may help")]
    Diverged {
        /// What was being done.
        doing: String,
        /// What is no number.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A failure below this crate: a model, an optimiser, a device.
    #[error("{doing}: {source}")]
    Failed {
        /// What was being done.
        doing: String,
        /// Why it could not be done.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl BenchError {
    /// What is wrong with a file or a directory, and how to mend it.
    pub fn input(path: impl Into<PathBuf>, problem: impl ToString) -> Self {
        Self::Input {
            path: path.into(),
            problem: problem.to_string(),
        }
    }

    /// Wraps an error of another crate with what was being done; exit code 1.
    pub fn failed(
        doing: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self::Failed {
            doing: doing.into(),
            source: source.into(),
        }
    }

    /// 2 for bad arguments or input, 1 for anything else.
    ///
    /// ```
    /// use mass_bench::BenchError;
    /// assert_eq!(BenchError::Usage("unknown study `x`".into()).exit_code(), 2);
    /// assert_eq!(BenchError::failed("training", "out of memory").exit_code(), 1);
    /// ```
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) | Self::Input { .. } | Self::Ginc(_) | Self::Glue(_) | Self::Text(_) => {
                2
            }
            Self::Report(error) => error.exit_code(),
            // Another process was given something else than this one, or something that several cannot do.
            Self::Parallel(ParallelError::Differ { .. } | ParallelError::Unsupported(_)) => 2,
            Self::Interrupted { .. }
            | Self::Diverged { .. }
            | Self::Failed { .. }
            | Self::Parallel(_) => 1,
        }
    }

    /// The message on a single line, whatever the error below it wrote: a break is a blank, with those beside it.
    ///
    /// ```
    /// use mass_bench::BenchError;
    /// let error = BenchError::Usage("a  b: \n  no such file\n".into());
    /// assert_eq!(error.one_line(), "a  b: no such file");
    /// ```
    #[must_use]
    pub fn one_line(&self) -> String {
        const BREAKS: [char; 7] = [
            '\n', '\u{b}', '\u{c}', '\r', '\u{85}', '\u{2028}', '\u{2029}',
        ];
        let message = self.to_string();
        let mut parts = message.split(BREAKS);
        let mut line = parts.next().unwrap_or_default().to_owned();
        for part in parts.map(str::trim_start).filter(|part| !part.is_empty()) {
            line.truncate(line.trim_end().len());
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(part);
        }
        line
    }
}

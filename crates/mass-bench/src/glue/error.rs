use std::path::PathBuf;

use super::metrics::MetricError;

/// Why a GLUE task cannot be read, tokenised or scored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GlueError {
    /// A file that cannot be opened.
    #[error(
        "{}: {source}; GLUE files are expected as DATA/glue/<Task>/{{train,dev}}.tsv (MNLI: dev_matched.tsv and \
         dev_mismatched.tsv), from https://gluebenchmark.com/tasks",
        path.display()
    )]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file without an example.
    #[error("{}: no examples: the file is empty, or a header and no rows", path.display())]
    Empty {
        /// Which file.
        path: PathBuf,
    },
    /// A line that is not what its task's layout says.
    #[error("{}, line {line}: {problem}", path.display())]
    Line {
        /// Which file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What is wrong with it.
        problem: LineProblem,
    },
    /// More labels than there are should be wrong.
    #[error("{percent} % of the labels cannot be wrong, only 0 to 100")]
    Share {
        /// What was asked for.
        percent: u64,
    },
    /// A tokenizer that cannot be made from its files.
    #[error("{}: {problem}", path.display())]
    Tokenizer {
        /// File or directory.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A text that the tokenizer refuses.
    #[error("tokenising {text:?}: {problem}")]
    Text {
        /// The text, shortened.
        text: String,
        /// What the tokenizer said.
        problem: String,
    },
    /// Predictions that cannot be scored.
    #[error(transparent)]
    Metric(#[from] MetricError),
}

/// What is wrong with a line.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum LineProblem {
    /// Bytes that are no UTF-8.
    #[error("not UTF-8 from byte {column} of the line on")]
    Utf8 {
        /// Counted from 1.
        column: usize,
    },
    /// Too few or too many columns.
    #[error("{found} tab-separated columns, {expected} expected")]
    Columns {
        /// As in the header, or for CoLA 4.
        expected: usize,
        /// In this line.
        found: usize,
    },
    /// A header without a column that the task needs.
    #[error("no column `{0}` in the header")]
    Header(&'static str),
    /// A header that names a needed column twice.
    #[error("column `{0}` stands twice in the header")]
    Twice(&'static str),
    /// An empty label.
    #[error("the label is missing")]
    NoLabel,
    /// A label that the task does not have.
    #[error("unknown label `{found}`; the task has {known}")]
    Label {
        /// The label.
        found: String,
        /// Those there are.
        known: String,
    },
    /// A score that is no number or out of range.
    #[error("score `{found}` is no number from {low} to {high}")]
    Score {
        /// The score.
        found: String,
        /// Least.
        low: f32,
        /// Greatest.
        high: f32,
    },
    /// A sentence without a character.
    #[error("the sentence in column `{0}` is empty")]
    NoText(&'static str),
}

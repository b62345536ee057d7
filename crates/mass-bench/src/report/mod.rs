//! What a study leaves behind: results.json, metrics.jsonl, events.jsonl, report.html, and a table.
//!
//! [`ResultStore`] owns an output directory. results.json is rewritten after every finished run, to a
//! temporary name that is synced and renamed, so a reader never sees half of it and a crash loses at
//! most the run in hand.
//!
//! ```
//! use mass_bench::report::{Existing, Header, ResultStore, Run};
//!
//! let dir = tempfile::tempdir()?;
//! let header = Header::new("synthetic", "smoke", 2);
//! let mut store = ResultStore::open(dir.path(), header, &serde_json::json!({"steps": 10}), Existing::Refuse)?;
//! let mut run = Run::new("static", 0);
//! run.test_loss = Some(1.8);
//! store.push(run.clone())?;
//! assert!(store.finished(&run.key()).is_some());
//! assert_eq!(store.results().summary[0].test_loss_mean, Some(1.8));
//! // One seed has no spread.
//! assert_eq!(store.results().summary[0].test_loss_std, None);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod by_method;
mod curves;
mod decisions;
mod elbow;
mod expansions;
mod frontier;
mod growth;
mod html;
mod join;
mod lines;
mod lock;
mod machine;
mod over_tasks;
mod paired;
mod pairs;
mod paper;
mod ranks;
mod results;
mod store;
mod summary;
mod svg;
mod table;

use std::path::PathBuf;

pub use decisions::Decisions;
pub use expansions::expansions;
pub use join::join;
pub use lines::{EventLine, MetricLine};
pub use machine::{Machine, peak_rss_mib, reset_peak_rss};
pub use over_tasks::{OverTasks, over_tasks};
pub use paired::{Comparison, Paired, comparisons, paired};
pub use pairs::PairMeans;
pub(crate) use pairs::PairSums;
pub use paper::{Reported, reported};
pub use results::{Expansion, Header, Part, Results, Run, RunKey, Usage};
pub use store::{Existing, ResultStore};
pub(crate) use store::{is_name, pretty, write_lines};
pub use summary::{Summary, summarise};
pub use table::{LEFT_OUT, table};

/// Why results could not be written or read back.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReportError {
    /// The file system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// File or directory.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// An output directory that cannot be made or written to.
    #[error("{}: {source}; choose another --out", path.display())]
    Out {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Something in the output directory that would be replaced, and may be of no study.
    #[error("{}: would be replaced, and is not known to be a study's; choose another --out, or remove it yourself", path.display())]
    Foreign {
        /// The file or directory.
        path: PathBuf,
    },
    /// A file of an earlier run that cannot be understood.
    #[error("{}: not readable as results: {problem}; restore it, or remove its directory yourself to begin anew", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What the parser said.
        problem: String,
    },
    /// What an earlier command has left, and nothing says what to do with.
    #[error(
        "{}: holds {what}; --out DIR takes another directory, --resume keeps what is there and goes on, \
         --fresh deletes it and begins anew", path.display()
    )]
    Kept {
        /// The directory.
        path: PathBuf,
        /// What is there.
        what: String,
    },
    /// A directory that another process writes to.
    #[error("{}: in use by process {process}, which has not ended; wait for it, or choose another --out", path.display())]
    InUse {
        /// The directory.
        path: PathBuf,
        /// Its number; empty where the system does not tell.
        process: String,
    },
    /// `--resume` into a directory that holds something else.
    #[error("{}: holds results of another {what}; choose another --out, or --fresh, which deletes them", path.display())]
    OtherSettings {
        /// The directory.
        path: PathBuf,
        /// What differs: study, preset or settings.
        what: String,
    },
    /// A run pushed twice.
    #[error("run {0} is already in the results")]
    Duplicate(String),
    /// A directory that cannot be joined with others.
    #[error("{}: {problem}", path.display())]
    Join {
        /// The directory.
        path: PathBuf,
        /// Why not.
        problem: String,
    },
}

impl ReportError {
    /// 2 when the arguments pointed at the wrong directory, 1 otherwise.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Out { .. }
            | Self::Foreign { .. }
            | Self::Malformed { .. }
            | Self::Kept { .. }
            | Self::InUse { .. }
            | Self::Join { .. }
            | Self::OtherSettings { .. } => 2,
            Self::Io { .. } | Self::Duplicate(_) => 1,
        }
    }
}

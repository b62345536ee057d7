use std::io;
use std::path::{Path, PathBuf};

use super::decode::LARGEST_SQUARE;
use super::images::LeftOut;
use crate::BenchError;

const MEND_LAYOUT: &str =
    "a set is laid out as <domain>/<class>/<image>, with every class in every domain";
const MEND_IMAGE: &str =
    "replace the file, or remove it from the set, or leave it out with --leave-out-damaged";
const MEND_IMAGES: &str =
    "replace the files, or remove them from the set, or leave them out with --leave-out-damaged";
/// Files that a message names; a set of which more is damaged is another kind of thing.
const NAMED: usize = 100;

/// What is wrong with a set of images.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DgError {
    /// A file or directory that cannot be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// Which one.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file of the cache that cannot be written.
    #[error("writing {}: {source}", path.display())]
    Cache {
        /// Which one.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Told to stop before everything was read.
    #[error("interrupted while reading images")]
    Stopped,
    /// A directory that is not laid out as `<domain>/<class>/<image>`.
    #[error("{}: {problem}; {}", path.display(), MEND_LAYOUT)]
    Layout {
        /// Which one.
        path: PathBuf,
        /// What is missing or too many.
        problem: String,
    },
    /// A file that is no whole image.
    #[error("{}: {problem}; {}", path.display(), MEND_IMAGE)]
    Image {
        /// Which one.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// Several files that cannot be read or are no whole images.
    #[error("{}; {}", named(.0), MEND_IMAGES)]
    Images(Vec<LeftOut>),
    /// A side that no square of an image is made with.
    #[error("squares of {0} pixels; the side must be at least 1 and at most {LARGEST_SQUARE}")]
    Size(usize),
    /// A split that cannot be made of these images.
    #[error("{0}")]
    Split(String),
}

/// The files and what is wrong with each.
fn named(files: &[LeftOut]) -> String {
    let each = |file: &LeftOut| format!("{}: {}", file.path.display(), file.problem);
    let mut list: Vec<String> = files.iter().take(NAMED).map(each).collect();
    if files.len() > NAMED {
        list.push(format!("and {} more", files.len() - NAMED));
    }
    format!(
        "{} files are no whole images: {}",
        files.len(),
        list.join("; ")
    )
}

impl DgError {
    /// All that is wrong with the images of a set, in one error; `None` if nothing is.
    pub(crate) fn of_images(mut problems: Vec<LeftOut>) -> Option<Self> {
        match problems.len() {
            0 => None,
            1 => problems
                .pop()
                .map(|LeftOut { path, problem }| Self::Image { path, problem }),
            _ => Some(Self::Images(problems)),
        }
    }

    pub(super) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self + '_ {
        move |source| Self::Io {
            path: path.to_owned(),
            source,
        }
    }

    pub(super) fn cache(path: &Path) -> impl FnOnce(io::Error) -> Self + '_ {
        move |source| Self::Cache {
            path: path.to_owned(),
            source,
        }
    }

    pub(super) fn layout(path: &Path, problem: impl Into<String>) -> Self {
        Self::Layout {
            path: path.to_owned(),
            problem: problem.into(),
        }
    }
}

/// All but what the disk or the user stopped are bad input.
impl From<DgError> for BenchError {
    fn from(error: DgError) -> Self {
        match error {
            DgError::Io { path, source } => Self::Input {
                path,
                problem: source.to_string(),
            },
            DgError::Layout { path, problem } => Self::Input {
                path,
                problem: format!("{problem}; {MEND_LAYOUT}"),
            },
            DgError::Image { path, problem } => Self::Input {
                path,
                problem: format!("{problem}; {MEND_IMAGE}"),
            },
            several @ DgError::Images(_) => Self::Usage(several.to_string()),
            size @ DgError::Size(_) => Self::Usage(size.to_string()),
            DgError::Split(problem) => Self::Usage(problem),
            DgError::Cache { path, source } => {
                Self::failed(format!("writing {}", path.display()), source)
            }
            stopped @ DgError::Stopped => Self::failed("reading images", stopped),
        }
    }
}

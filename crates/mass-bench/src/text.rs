//! Any text file as a byte-level data set.
//!
//! A token is a byte, so the vocabulary is 256, nothing has to be downloaded and a loss converts to
//! bits per byte whatever the language: bits = nats / ln 2. The last part of the file is held out.
//!
//! ```
//! use mass_bench::text::ByteText;
//! let dir = tempfile::tempdir()?;
//! let path = dir.path().join("hello.txt");
//! std::fs::write(&path, "hello, world. ".repeat(50))?;
//!
//! let text = ByteText::read(&path, 16, 0.1)?;
//! let batch = text.batch(0, 0, 4, 16)?;
//! assert_eq!((batch.rows, batch.length), (4, 16));
//! assert_eq!(batch.targets[0], batch.inputs[1]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use crate::batch::{TokenBatch, draw, fits};
use crate::fnv::Fnv;

/// Token ids of a byte-level model.
pub const VOCAB: usize = 256;

/// Why a file cannot be trained on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TextError {
    /// No such file.
    #[error("{}: no such file; give the path of a text file", .0.display())]
    NotFound(PathBuf),
    /// A directory, a socket or the like.
    #[error("{}: not a regular file; give the path of a text file", .0.display())]
    NotAFile(PathBuf),
    /// A file of zero bytes.
    #[error("{}: the file is empty; give a text of some kilobytes at least", .0.display())]
    Empty(PathBuf),
    /// Not text: a NUL byte, or more than one control byte in a hundred.
    #[error("{}: not a text file: {what} at byte {offset}; give plain text", path.display())]
    Binary {
        /// The file.
        path: PathBuf,
        /// Offset of the first byte that is not text.
        offset: usize,
        /// "a NUL byte" or "too many control bytes, the first".
        what: &'static str,
    },
    /// Too little text for one window in each part.
    #[error(
        "{}: {bytes} bytes are too few: the {part} part has {part_bytes} and needs {needed}; \
         give a longer text or a shorter sequence (--seq)", path.display()
    )]
    TooShort {
        /// The file.
        path: PathBuf,
        /// Bytes in the file.
        bytes: usize,
        /// "training" or "held-out".
        part: &'static str,
        /// Bytes in that part.
        part_bytes: usize,
        /// Bytes that it must have: those of a window and its last target, or, to score a run, of several.
        needed: usize,
    },
    /// A share of held-out text outside (0, 1).
    #[error("the held-out fraction is {0}; it must lie strictly between 0 and 1")]
    HeldOut(f64),
    /// No rows or no tokens in a window.
    #[error("a batch of {rows} windows of {length} bytes is empty; both must be at least 1")]
    EmptyBatch {
        /// Windows asked for.
        rows: usize,
        /// Bytes a window.
        length: usize,
    },
    /// More bytes than a batch may have.
    #[error(
        "a batch of {rows} windows of {length} bytes is too large; all of them must be at most 2^32 bytes"
    )]
    LargeBatch {
        /// Windows asked for.
        rows: usize,
        /// Bytes a window.
        length: usize,
    },
    /// The file is there but could not be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// The bytes of a regular file. Another kind is refused unopened: reading a pipe or a device could wait for ever.
pub(crate) fn regular(path: &Path) -> io::Result<Vec<u8>> {
    if !fs::metadata(path)?.is_file() {
        return Err(io::Error::new(NOT_REGULAR, "not a regular file"));
    }
    fs::read(path)
}

/// The kind of error by which [`regular`] refuses a file; reading one has no such error.
const NOT_REGULAR: io::ErrorKind = io::ErrorKind::Unsupported;

/// Reads a file of text, whole. Any encoding will do for a model of bytes.
///
/// # Errors
/// [`TextError::NotFound`], [`TextError::NotAFile`], [`TextError::Empty`], [`TextError::Binary`] and [`TextError::Io`].
pub fn read(path: &Path) -> Result<Vec<u8>, TextError> {
    let bytes = regular(path).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => TextError::NotFound(path.to_owned()),
        NOT_REGULAR => TextError::NotAFile(path.to_owned()),
        _ => TextError::Io {
            path: path.to_owned(),
            source,
        },
    })?;
    if bytes.is_empty() {
        return Err(TextError::Empty(path.to_owned()));
    }
    // What a text does not have is NUL bytes (UTF-16 has them) and more than a few control bytes.
    let is_control = |&b: &u8| b < 0x20 && !b"\t\n\x0b\x0c\r\x1b".contains(&b) || b == 0x7f;
    let first = |test: &dyn Fn(&u8) -> bool| bytes.iter().position(test);
    let controls = bytes.iter().filter(|b| is_control(b)).count();
    let binary = match first(&|&b| b == 0) {
        Some(offset) => Some((offset, "a NUL byte")),
        None if controls * 100 > bytes.len() => {
            first(&is_control).map(|at| (at, "too many control bytes, the first"))
        }
        None => None,
    };
    if let Some((offset, what)) = binary {
        return Err(TextError::Binary {
            path: path.to_owned(),
            offset,
            what,
        });
    }
    Ok(bytes)
}

/// A text as consecutive windows of `length` bytes, `rows` to a batch. A last piece that has not `length` bytes and one more, the
/// last target, is left out. There are no windows of no bytes, and no batches of no rows.
///
/// ```
/// let batches: Vec<_> = mass_bench::text::windows(b"abcdefgh", 2, 3).collect();
/// assert_eq!((batches.len(), batches[0].rows), (1, 2));
/// assert_eq!(batches[0].targets, b"bcdefg".map(u32::from));
/// ```
pub fn windows(bytes: &[u8], rows: usize, length: usize) -> impl Iterator<Item = TokenBatch> {
    let fit = bytes.len().saturating_sub(1).checked_div(length);
    let fit = fit.filter(|_| rows > 0).unwrap_or(0);
    batches(bytes, (0..fit).map(|i| i * length).collect(), rows, length)
}

/// Windows at some places, `rows` to a batch.
fn batches(
    bytes: &[u8],
    starts: Vec<usize>,
    rows: usize,
    length: usize,
) -> impl Iterator<Item = TokenBatch> {
    (0..starts.len()).step_by(rows.max(1)).map(move |first| {
        let starts = &starts[first..];
        let mut batch = TokenBatch::with_capacity(rows.min(starts.len()), length);
        for &start in starts.iter().take(rows) {
            batch.push(&bytes[start..=start + length]);
        }
        batch
    })
}

/// A text split into a training part and a held-out tail.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ByteText {
    bytes: Vec<u8>,
    train: usize,
}

impl ByteText {
    /// Reads a file and holds out its last `held_out` (a fraction).
    ///
    /// Each part must hold at least one window of `length` bytes and the byte after it.
    ///
    /// # Errors
    /// One [`TextError`] variant for each way a file can be unusable.
    pub fn read(path: &Path, length: usize, held_out: f64) -> Result<Self, TextError> {
        if !(held_out > 0.0 && held_out < 1.0) {
            return Err(TextError::HeldOut(held_out));
        }
        if length == 0 {
            return Err(TextError::EmptyBatch { rows: 1, length });
        }
        let bytes = read(path)?;
        let tail = (bytes.len() as f64 * held_out).round() as usize;
        let train = bytes.len() - tail;
        for (part, part_bytes) in [("training", train), ("held-out", tail)] {
            if part_bytes <= length {
                return Err(TextError::TooShort {
                    path: path.to_owned(),
                    bytes: bytes.len(),
                    part,
                    part_bytes,
                    needed: length.saturating_add(1),
                });
            }
        }
        Ok(Self { bytes, train })
    }

    /// The bytes to train on.
    #[must_use]
    pub fn train(&self) -> &[u8] {
        &self.bytes[..self.train]
    }

    /// A digest of all bytes and of where the held-out tail begins.
    #[must_use]
    pub fn digest(&self) -> u64 {
        let mut digest = Fnv::default();
        digest.eat(&(self.train as u64).to_le_bytes());
        digest.eat(&self.bytes);
        digest.0
    }

    /// The tail that is never trained on.
    #[must_use]
    pub fn held_out(&self) -> &[u8] {
        &self.bytes[self.train..]
    }

    /// The batch of a training step: `rows` windows at random places of the training part, a pure
    /// function of the arguments.
    ///
    /// # Errors
    /// [`TextError::EmptyBatch`]; [`TextError::LargeBatch`]; [`TextError::TooShort`] when `length` is longer than what
    /// [`ByteText::read`] was asked to check.
    pub fn batch(
        &self,
        seed: u64,
        step: u64,
        rows: usize,
        length: usize,
    ) -> Result<TokenBatch, TextError> {
        self.check(rows, length, "training", self.train)?;
        if !fits([rows, length]) {
            return Err(TextError::LargeBatch { rows, length });
        }
        Ok(draw(self.train(), self.train, seed, step, rows, length))
    }

    /// The held-out tail as consecutive windows, `rows` to a batch, at most `max_windows` of them,
    /// spread evenly. A last piece shorter than a window is left out.
    ///
    /// # Errors
    /// [`TextError::EmptyBatch`]; [`TextError::TooShort`] when no window fits.
    pub fn held_out_batches(
        &self,
        rows: usize,
        length: usize,
        max_windows: usize,
    ) -> Result<Vec<TokenBatch>, TextError> {
        let tail = self.held_out();
        self.check(rows.min(max_windows), length, "held-out", tail.len())?;
        let fit = (tail.len() - 1) / length;
        let count = fit.min(max_windows);
        let starts: Vec<usize> = (0..count).map(|i| i * fit / count * length).collect();
        Ok(batches(tail, starts, rows, length).collect())
    }

    fn check(
        &self,
        rows: usize,
        length: usize,
        part: &'static str,
        part_bytes: usize,
    ) -> Result<(), TextError> {
        if rows == 0 || length == 0 {
            return Err(TextError::EmptyBatch { rows, length });
        }
        if part_bytes <= length {
            return Err(TextError::TooShort {
                path: PathBuf::from("the text"),
                bytes: self.bytes.len(),
                part,
                part_bytes,
                needed: length.saturating_add(1),
            });
        }
        Ok(())
    }
}

/// A loss in nats a byte as bits a byte.
///
/// ```
/// assert_eq!(mass_bench::text::bits_per_byte(std::f64::consts::LN_2 * 3.0), 3.0);
/// ```
#[must_use]
pub fn bits_per_byte(nats: f64) -> f64 {
    nats / std::f64::consts::LN_2
}

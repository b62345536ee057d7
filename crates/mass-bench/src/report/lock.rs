//! One process at a time writes to a directory of results.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::Write;
use std::path::Path;

use super::ReportError;
use super::store::io_error;

/// The file that is locked, and says by whom. It stays; the lock ends with the process, however that ends.
const NAME: &str = ".lock";

/// Takes a directory for this process, until what is returned is dropped. `None` where the file system has no locks.
///
/// # Errors
/// [`ReportError::InUse`] if another has it, [`ReportError::Io`].
pub(super) fn take(dir: &Path) -> Result<Option<File>, ReportError> {
    let path = dir.join(NAME);
    let mut open = OpenOptions::new();
    let open = open.create(true).truncate(false).read(true).write(true);
    let mut file = open.open(&path).map_err(|e| io_error(&path, e))?;
    match file.try_lock() {
        Ok(()) => {
            // For the message of another process. Nothing depends on it.
            let _ = file.set_len(0);
            let _ = write!(file, "{}", std::process::id());
            Ok(Some(file))
        }
        Err(TryLockError::WouldBlock) => Err(ReportError::InUse {
            path: dir.to_owned(),
            process: fs::read_to_string(&path).unwrap_or_default(),
        }),
        Err(TryLockError::Error(_)) => Ok(None),
    }
}

/// Refuses a directory that another process writes to.
///
/// # Errors
/// As [`take`].
pub(super) fn check(dir: &Path) -> Result<(), ReportError> {
    match dir.join(NAME).exists() {
        true => take(dir).map(drop),
        false => Ok(()),
    }
}

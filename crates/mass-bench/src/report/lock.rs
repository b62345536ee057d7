//! One process at a time writes to a directory of results.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Write};
use std::path::Path;
use std::time::Duration;

use super::ReportError;
use super::store::io_error;

/// The file that is locked, and says by whom. It stays; the lock ends with the process, however that ends.
const NAME: &str = ".lock";

/// Takes a directory for this process, until what is returned is dropped. `None` where the file system has no locks.
///
/// # Errors
/// [`ReportError::InUse`] if another has it, [`ReportError::Foreign`] for a file of this name that is not a study's,
/// [`ReportError::Out`] for a directory that nobody may write to, [`ReportError::Io`].
pub(super) fn take(dir: &Path) -> Result<Option<File>, ReportError> {
    let path = dir.join(NAME);
    is_there(&path)?;
    let mut open = OpenOptions::new();
    let open = open.create(true).truncate(false).read(true).write(true);
    let mut file = open.open(&path).map_err(|source| match source.kind() {
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => ReportError::Out {
            path: path.clone(),
            source,
        },
        _ => io_error(&path, source),
    })?;
    let locked = lock(dir, &file)?;
    if locked {
        // For the message of another process. Nothing depends on it.
        let _ = file.set_len(0);
        let _ = write!(file, "{}", std::process::id());
    }
    Ok(locked.then_some(file))
}

/// Refuses a directory that another process writes to, and writes nothing.
///
/// # Errors
/// As [`take`].
pub(super) fn check(dir: &Path) -> Result<(), ReportError> {
    let path = dir.join(NAME);
    if is_there(&path)? {
        let file = File::open(&path).map_err(|e| io_error(&path, e))?;
        lock(dir, &file)?;
    }
    Ok(())
}

/// Whether there is such a file. One that no study has written is refused: a link to elsewhere, or what is no number of a process.
fn is_there(path: &Path) -> Result<bool, ReportError> {
    let Ok(found) = fs::symlink_metadata(path) else {
        return Ok(false);
    };
    let digits = |text: Vec<u8>| text.iter().all(u8::is_ascii_digit);
    // One that cannot be read may be locked.
    match found.is_file() && fs::read(path).map_or(true, digits) {
        true => Ok(true),
        false => Err(ReportError::Foreign {
            path: path.to_owned(),
        }),
    }
}

fn lock(dir: &Path, file: &File) -> Result<bool, ReportError> {
    // A process that is being started has the locks of the one that starts it, for a moment.
    let mut tries = 10;
    let mut tried = file.try_lock();
    while matches!(tried, Err(TryLockError::WouldBlock)) && tries > 0 {
        std::thread::sleep(Duration::from_millis(10));
        (tries, tried) = (tries - 1, file.try_lock());
    }
    match tried {
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Err(ReportError::InUse {
            path: dir.to_owned(),
            process: fs::read_to_string(dir.join(NAME)).unwrap_or_default(),
        }),
        Err(TryLockError::Error(_)) => Ok(false),
    }
}

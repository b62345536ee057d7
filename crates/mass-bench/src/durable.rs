//! Files and directories that a crash leaves whole: their bytes and their names are synced.

use std::fs::{self, File};
use std::io;
use std::path::Path;

/// Fills a file under a temporary name, syncs it and renames it, so that nobody ever sees a part of it. After an error the
/// temporary file is gone: on a full disk it would keep it full.
pub(crate) fn write(
    path: &Path,
    temporary: &Path,
    fill: impl FnOnce(&mut File) -> io::Result<()>,
) -> io::Result<()> {
    let written = File::create(temporary).and_then(|mut file| {
        fill(&mut file)?;
        file.sync_all()?;
        fs::rename(temporary, path)
    });
    match written {
        Ok(()) => sync_names(path),
        Err(_) => {
            // The first error is the one to report.
            let _ = fs::remove_file(temporary);
        }
    }
    written
}

/// A directory, with those above it that are missing.
pub(crate) fn create_dir_all(dir: &Path) -> io::Result<()> {
    let missing = dir
        .ancestors()
        .take_while(|d| !d.as_os_str().is_empty() && !d.exists());
    let missing: Vec<&Path> = missing.collect();
    fs::create_dir_all(dir)?;
    missing.into_iter().for_each(sync_names);
    Ok(())
}

/// Makes the name of a file or directory last. Not every system can: Windows opens no directory as a file.
fn sync_names(path: &Path) {
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty());
    if let Ok(dir) = File::open(parent.unwrap_or(Path::new("."))) {
        dir.sync_all().ok();
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn what_fails_leaves_the_old_file_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let (path, temporary) = (dir.path().join("file"), dir.path().join("file.tmp"));
        write(&path, &temporary, |file| file.write_all(b"old")).unwrap();
        let full = |file: &mut File| {
            file.write_all(b"ne")?;
            Err(io::ErrorKind::StorageFull.into())
        };
        write(&path, &temporary, full).unwrap_err();
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        create_dir_all(&dir.path().join("a/b")).unwrap();
        assert!(dir.path().join("a/b").is_dir());
    }
}

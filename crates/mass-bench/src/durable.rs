//! Files and directories that a crash leaves whole: their bytes and their names are synced.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

/// Fills a file under a temporary name, syncs it and renames it, so that nobody ever sees a part of it. After an error the
/// temporary file is gone: on a full disk it would keep it full.
pub(crate) fn write(path: &Path, fill: impl FnOnce(&mut File) -> io::Result<()>) -> io::Result<()> {
    let (temporary, mut file) = fresh(path)?;
    let written = fill(&mut file)
        .and_then(|()| file.sync_all())
        .and_then(|()| fs::rename(&temporary, path));
    match written {
        Ok(()) => sync_names(path),
        Err(_) => {
            // The first error is the one to report.
            let _ = fs::remove_file(&temporary);
        }
    }
    written
}

/// A file beside another, under a name that nobody has: what is there may be somebody's, or left by a process of this number that
/// was killed.
fn fresh(path: &Path) -> io::Result<(PathBuf, File)> {
    let mut number = 0_u64;
    loop {
        let mut name = path.as_os_str().to_owned();
        name.push(format!(".{}-{number}.tmp", std::process::id()));
        match File::create_new(&name) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => number += 1,
            made => return made.map(|file| (name.into(), file)),
        }
    }
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
        let path = dir.path().join("file");
        write(&path, |file| file.write_all(b"old")).unwrap();
        let full = |file: &mut File| {
            file.write_all(b"ne")?;
            Err(io::ErrorKind::StorageFull.into())
        };
        write(&path, full).unwrap_err();
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        // Nobody's file is taken for a temporary one.
        for name in [
            "file.tmp".into(),
            format!("file.{}-0.tmp", std::process::id()),
        ] {
            let theirs = dir.path().join(name);
            fs::write(&theirs, b"theirs").unwrap();
            write(&path, |file| file.write_all(b"new")).unwrap();
            assert_eq!(fs::read(&theirs).unwrap(), b"theirs");
            assert_eq!(fs::read(&path).unwrap(), b"new");
        }
        create_dir_all(&dir.path().join("a/b")).unwrap();
        assert!(dir.path().join("a/b").is_dir());
    }
}

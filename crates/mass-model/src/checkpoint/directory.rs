//! Where checkpoints lie: folders that are complete or not there, and the name of the newest.

#[cfg(test)]
mod simulated;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::seal::Seals;
use super::storage::Storage;
use super::{FORMAT, LATEST, SEALS, STATE, broken, manifest};
use crate::error::CheckpointError;
use crate::error::ModelError;

pub(super) fn io(path: &Path) -> impl Fn(std::io::Error) -> ModelError + '_ {
    move |source| ModelError::Io {
        path: path.to_owned(),
        source,
    }
}

/// Writes a file and syncs it to disk.
fn write_synced(storage: &impl Storage, path: &Path, bytes: &[u8]) -> Result<(), ModelError> {
    let written = || {
        let mut file = storage.create(path)?;
        storage.write(&mut file, bytes)?;
        storage.sync(&file)
    };
    written().map_err(io(path))
}

/// Makes the names in a directory last.
fn sync_names(storage: &impl Storage, dir: &Path) -> Result<(), ModelError> {
    storage.sync_dir(dir).map_err(io(dir))
}

/// A directory, with those above it that are missing. The name of each is synced in its parent: a directory whose name is lost
/// takes all that was synced in it along.
fn create_directory(storage: &impl Storage, dir: &Path) -> Result<(), ModelError> {
    let parent = match dir.parent() {
        Some(parent) if parent == Path::new("") => Path::new("."),
        Some(parent) => parent,
        None => return Ok(()),
    };
    if storage.is_dir(dir) {
        // Who made it may not have synced its name. The first checkpoint in it does, where it may.
        return match storage.read(&dir.join(LATEST)) {
            Ok(_) => Ok(()),
            Err(_) => match storage.sync_dir(parent) {
                Err(e) if e.kind() == ErrorKind::PermissionDenied => Ok(()),
                synced => synced.map_err(io(parent)),
            },
        };
    }
    if parent != dir {
        create_directory(storage, parent)?;
    }
    match storage.create_dir(dir) {
        // Made by another process in the meantime.
        Err(_) if storage.is_dir(dir) => {}
        made => made.map_err(io(dir))?,
    }
    sync_names(storage, parent)
}

/// Receives the files of a checkpoint one after the other.
pub(super) type Sink<'a> = dyn FnMut(&str, Vec<u8>) -> Result<(), ModelError> + 'a;

/// What a folder is called until it is complete.
const PARTIAL: &str = ".partial-";

/// Writes a folder under a temporary name, renames it and names it in `latest`. `produce` hands over the files. The folder that
/// `latest` named before stays, for a reader who has read the name and not yet the files; older ones are removed, those that can
/// be. After an error nothing of the new folder is left, and `latest` names what it named; but for an error of the last sync, after
/// which the new folder is complete and named, and older ones are there for a power cut that undoes it.
pub(super) fn write(
    storage: &impl Storage,
    dir: &Path,
    step: u64,
    produce: impl FnOnce(&mut Sink<'_>) -> Result<(), ModelError>,
) -> Result<PathBuf, ModelError> {
    create_directory(storage, dir)?;
    // What a killed process left of a folder would keep a full disk full.
    remove_folders(storage, dir, |name| name.starts_with(PARTIAL));
    let previous = newest(storage, dir).ok();
    // A step saved twice gets a name of its own: the folder that `latest` names is never touched.
    let mut name = format!("step-{step:010}");
    let names = storage.names(dir).map_err(io(dir))?;
    while names.contains(&name) {
        name.push('+');
    }
    let partial = dir.join(format!("{PARTIAL}{name}"));
    let complete = dir.join(&name);
    let pointer = dir.join(".latest");
    let prepare = || {
        storage.create_dir(&partial).map_err(io(&partial))?;
        produce(&mut |file, bytes| write_synced(storage, &partial.join(file), &bytes))?;
        sync_names(storage, &partial)?;
        storage.rename(&partial, &complete).map_err(io(&complete))?;
        // The name of the folder has to last before anything says that it is there.
        sync_names(storage, dir)?;
        write_synced(storage, &pointer, render_pointer(&name).as_bytes())?;
        let latest = dir.join(LATEST);
        storage.rename(&pointer, &latest).map_err(io(&latest))
    };
    if let Err(error) = prepare() {
        // The first error is the one to report. What cannot be removed now is removed by the next checkpoint.
        let _ = storage.remove_dir_all(&partial);
        let _ = storage.remove_dir_all(&complete);
        let _ = storage.remove_file(&pointer);
        return Err(error);
    }
    sync_names(storage, dir)?;
    let kept = [Some(&complete), previous.as_ref()];
    remove_folders(storage, dir, |other| {
        !kept.contains(&Some(&dir.join(other)))
    });
    Ok(complete)
}

/// Removes the folders of checkpoints whose names are `unwanted`, whole or not. What cannot be removed now stays for the next
/// checkpoint to remove: it is no reason to deny this one.
fn remove_folders(storage: &impl Storage, dir: &Path, unwanted: impl Fn(&str) -> bool) {
    for name in storage.names(dir).unwrap_or_default() {
        let path = dir.join(&name);
        let ours = is_step(name.strip_prefix(PARTIAL).unwrap_or(&name));
        if ours && unwanted(&name) && storage.is_dir(&path) {
            let _ = storage.remove_dir_all(&path);
        }
    }
}

/// The folders with names of checkpoints, in the order of their steps.
pub(super) fn steps(storage: &impl Storage, dir: &Path) -> Vec<PathBuf> {
    let mut names = storage.names(dir).unwrap_or_default();
    names.retain(|name| is_step(name) && storage.is_dir(&dir.join(name)));
    names.sort();
    // Past ten digits a name is as much longer as its step is larger.
    names.sort_by_key(|name| name.trim_end_matches('+').len());
    names.iter().map(|name| dir.join(name)).collect()
}

/// Whether a folder has the name of a checkpoint.
fn is_step(name: &str) -> bool {
    name.strip_prefix("step-").is_some_and(|rest| {
        let digits = rest.trim_end_matches('+');
        digits.len() >= 10 && digits.bytes().all(|b| b.is_ascii_digit())
    })
}

/// The name of a folder with its checksum, so that a flipped bit does not name another.
fn render_pointer(name: &str) -> String {
    format!("{name} {:08x}\n", crc32fast::hash(name.as_bytes()))
}

/// The folder that `latest` names.
pub(super) fn newest(storage: &impl Storage, dir: &Path) -> Result<PathBuf, ModelError> {
    let pointer = dir.join(LATEST);
    let bytes = storage.read(&pointer).map_err(io(&pointer))?;
    let text = String::from_utf8_lossy(&bytes);
    let name = text.split(' ').next().unwrap_or_default();
    if !is_step(name) || render_pointer(name).as_bytes() != bytes {
        let found = text.chars().take(80).collect();
        return Err(broken(&pointer, CheckpointError::Pointer { found }));
    }
    let folder = dir.join(name);
    if !storage.is_dir(&folder) {
        let name = name.to_owned();
        return Err(broken(&pointer, CheckpointError::NoFolder { name }));
    }
    Ok(folder)
}

/// The files of one checkpoint, on disk or in memory.
pub(super) enum Source<'a> {
    Folder(PathBuf),
    Memory(&'a BTreeMap<String, Vec<u8>>),
}

impl Source<'_> {
    /// What errors call a file.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        match self {
            Self::Folder(folder) => folder.join(name),
            Self::Memory(_) => PathBuf::from(name),
        }
    }

    fn read(&self, name: &str) -> Result<Cow<'_, [u8]>, ModelError> {
        let path = self.path(name);
        match self {
            Self::Folder(_) => fs::read(&path).map(Cow::Owned).map_err(io(&path)),
            Self::Memory(files) => match files.get(name) {
                Some(bytes) => Ok(Cow::Borrowed(bytes)),
                None => Err(broken(&path, CheckpointError::Absent)),
            },
        }
    }

    pub(super) fn seals(&self) -> Result<Seals, ModelError> {
        let bytes = self.read(SEALS).map_err(|e| self.explain_absence(e))?;
        Seals::parse(&self.path(SEALS), &bytes)
    }

    /// A checkpoint without checksums may be of an older format.
    fn explain_absence(&self, error: ModelError) -> ModelError {
        let absent = match &error {
            ModelError::Io { source, .. } => source.kind() == ErrorKind::NotFound,
            _ => true,
        };
        let state = absent.then(|| self.read(STATE).ok()).flatten();
        match state.and_then(|json| manifest::format_of(&json)) {
            Some(found) if found != FORMAT => {
                let supported = FORMAT;
                broken(
                    &self.path(STATE),
                    CheckpointError::Format { found, supported },
                )
            }
            _ => error,
        }
    }

    /// A file that is as it was written.
    pub(super) fn verified(&self, seals: &Seals, name: &str) -> Result<Cow<'_, [u8]>, ModelError> {
        let bytes = self.read(name)?;
        seals.verify(&self.path(name), name, &bytes)?;
        Ok(bytes)
    }
}

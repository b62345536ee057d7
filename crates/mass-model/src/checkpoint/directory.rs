//! Where checkpoints lie: folders that are complete or not there, and the name of the newest.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use super::seal::Seals;
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
fn write_synced(path: &Path, bytes: &[u8]) -> Result<(), ModelError> {
    let mut file = File::create(path).map_err(io(path))?;
    file.write_all(bytes)
        .and_then(|()| file.sync_all())
        .map_err(io(path))
}

fn sync_directory(path: &Path) -> Result<(), ModelError> {
    File::open(path)
        .and_then(|d| d.sync_all())
        .map_err(io(path))
}

/// Receives the files of a checkpoint one after the other.
pub(super) type Sink<'a> = dyn FnMut(&str, Vec<u8>) -> Result<(), ModelError> + 'a;

/// Writes a folder under a temporary name, renames it, names it in `latest` and removes the others. `produce` hands over the
/// files.
pub(super) fn write(
    dir: &Path,
    step: u64,
    produce: impl FnOnce(&mut Sink<'_>) -> Result<(), ModelError>,
) -> Result<PathBuf, ModelError> {
    fs::create_dir_all(dir).map_err(io(dir))?;
    // A step saved twice gets a name of its own: the folder that `latest` names is never touched.
    let mut name = format!("step-{step:010}");
    while dir.join(&name).exists() {
        name.push('+');
    }
    let partial = dir.join(format!(".partial-{name}"));
    if partial.exists() {
        fs::remove_dir_all(&partial).map_err(io(&partial))?;
    }
    fs::create_dir(&partial).map_err(io(&partial))?;
    produce(&mut |file, bytes| write_synced(&partial.join(file), &bytes))?;
    sync_directory(&partial)?;

    let complete = dir.join(&name);
    fs::rename(&partial, &complete).map_err(io(&complete))?;
    sync_directory(dir)?;
    let pointer = dir.join(".latest");
    write_synced(&pointer, render_pointer(&name).as_bytes())?;
    fs::rename(&pointer, dir.join(LATEST)).map_err(io(&pointer))?;
    sync_directory(dir)?;
    for entry in fs::read_dir(dir).map_err(io(dir))? {
        let entry = entry.map_err(io(dir))?;
        let other = entry.file_name().to_string_lossy().into_owned();
        let ours = is_step(other.strip_prefix(".partial-").unwrap_or(&other));
        if other != name && ours && entry.path().is_dir() {
            fs::remove_dir_all(entry.path()).map_err(io(&entry.path()))?;
        }
    }
    Ok(complete)
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
pub(super) fn newest(dir: &Path) -> Result<PathBuf, ModelError> {
    let pointer = dir.join(LATEST);
    let bytes = fs::read(&pointer).map_err(io(&pointer))?;
    let text = String::from_utf8_lossy(&bytes);
    let name = text.split(' ').next().unwrap_or_default();
    if !is_step(name) || render_pointer(name).as_bytes() != bytes {
        let found = text.chars().take(80).collect();
        return Err(broken(&pointer, CheckpointError::Pointer { found }));
    }
    let folder = dir.join(name);
    if !folder.is_dir() {
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

//! Values of parameters alone, in one file that other programs read too.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use super::directory::io;
use super::storage::{Disk, Storage};
use super::tensors::{F32View, TensorFile, encode};
use crate::error::ModelError;
use crate::param::{Parameters, bring_to_host, check_finite, check_names};

/// Writes the values of all parameters by their names, and nothing else: one safetensors file in `f32`.
///
/// It holds what [`Parameters`] names. What a mixture layer has beside (ids, logit offsets, the state of its router) and an
/// optimiser's state are in a checkpoint: see [`save`](super::save). The file takes the place of another at once or not at all.
///
/// ```
/// use mass_model::checkpoint::{load_safetensors, save_safetensors};
/// use mass_model::{nn::Linear, seeded_rng};
///
/// # let dir = tempfile::tempdir().unwrap();
/// # let path = dir.path().join("head.safetensors");
/// let head = Linear::new(4, 3, true, &mut seeded_rng(0))?;
/// save_safetensors(&path, &head)?;
/// let mut other = Linear::new(4, 3, true, &mut seeded_rng(1))?;
/// load_safetensors(&path, &mut other)?;
/// assert_eq!(head.weight.values(), other.weight.values());
/// # Ok::<(), mass_model::ModelError>(())
/// ```
///
/// # Errors
/// [`ModelError::Config`] if two parameters have one name, [`ModelError::NonFinite`] for a value that is NaN or infinite,
/// [`ModelError::Io`] naming the file that could not be written.
pub fn save_safetensors<M: Parameters + ?Sized>(path: &Path, model: &M) -> Result<(), ModelError> {
    check_names(model)?;
    bring_to_host(model)?;
    let (mut tensors, mut outcome) = (Vec::new(), Ok(()));
    model.visit("", &mut |name, p| {
        if outcome.is_ok() {
            outcome = check_finite("values", &name, p.values());
        }
        let (shape, values) = (p.shape().to_vec(), p.values());
        tensors.push((name, F32View { shape, values }));
    });
    outcome?;
    let bytes = encode(&path.to_string_lossy(), tensors)?;
    let (partial, mut file) = fresh(path).map_err(io(path))?;
    let written = file.write_all(&bytes).and_then(|()| {
        file.sync_all()?;
        fs::rename(&partial, path)
    });
    if let Err(error) = written {
        // The disk may be full: that it is gone matters less than why.
        let _ = fs::remove_file(&partial);
        return Err(io(path)(error));
    }
    let dir = match path.parent() {
        Some(dir) if dir != Path::new("") => dir,
        _ => Path::new("."),
    };
    Disk.sync_dir(dir).map_err(io(dir))
}

/// A file beside another, under a name that nobody has.
fn fresh(path: &Path) -> std::io::Result<(PathBuf, File)> {
    let mut number = 0_u64;
    loop {
        let mut name = path.as_os_str().to_owned();
        name.push(format!(".{}-{number}.partial", std::process::id()));
        match File::create_new(&name) {
            Err(e) if e.kind() == ErrorKind::AlreadyExists => number += 1,
            made => return made.map(|file| (name.into(), file)),
        }
    }
}

/// Reads the values of all parameters from a safetensors file in `f32`, as [`save_safetensors`] writes it.
///
/// # Errors
/// [`ModelError::Config`] if two parameters have one name, [`ModelError::Io`] if the file cannot be read;
/// [`ModelError::Checkpoint`] naming the file, and the tensor where there is one, if a tensor is missing, of another shape or
/// type, has a value that is NaN or infinite, or belongs to no parameter. The model is as it was then.
pub fn load_safetensors<M: Parameters + ?Sized>(
    path: &Path,
    model: &mut M,
) -> Result<(), ModelError> {
    check_names(model)?;
    let bytes = fs::read(path).map_err(io(path))?;
    let file = TensorFile::parse(path, &bytes)?;
    let (mut names, mut outcome) = (BTreeSet::new(), Ok(()));
    model.visit("", &mut |name, p| {
        if outcome.is_ok() {
            outcome = file.check_values(&name, p.shape());
            names.insert(name);
        }
    });
    outcome?;
    file.expect_only(|name| names.contains(name))?;
    let mut outcome = Ok(());
    model.visit_mut("", &mut |name, p| {
        if outcome.is_ok() {
            outcome = file.read_into(&name, p);
        }
    });
    outcome
}

//! Values of parameters alone, in one file that other programs read too.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use super::directory::io;
use super::tensors::{F32View, TensorFile, encode};
use crate::error::ModelError;
use crate::param::{Parameters, bring_to_host};

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
/// [`ModelError::Config`] if two parameters have one name, [`ModelError::Io`] naming the file that could not be written.
pub fn save_safetensors<M: Parameters + ?Sized>(path: &Path, model: &M) -> Result<(), ModelError> {
    bring_to_host(model)?;
    let (mut tensors, mut names, mut twice) = (Vec::new(), BTreeSet::new(), None);
    model.visit("", &mut |name, p| {
        if !names.insert(name.clone()) {
            twice.get_or_insert(name.clone());
        }
        let (shape, values) = (p.shape().to_vec(), p.values());
        tensors.push((name, F32View { shape, values }));
    });
    if let Some(name) = twice {
        let what = format!("two parameters have the name {name:?}, and a file holds one");
        return Err(ModelError::Config(what));
    }
    let bytes = encode(&path.to_string_lossy(), tensors)?;
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = Path::new(&partial);
    let written = File::create(partial).and_then(|mut file| {
        file.write_all(&bytes)?;
        file.sync_all()?;
        fs::rename(partial, path)
    });
    written.map_err(|error| {
        // It may never have been made, or be on a disk that is full: that it is gone matters less than why.
        let _ = fs::remove_file(partial);
        io(path)(error)
    })
}

/// Reads the values of all parameters from a safetensors file in `f32`, as [`save_safetensors`] writes it.
///
/// # Errors
/// [`ModelError::Io`] if the file cannot be read; [`ModelError::Checkpoint`] naming the file, and the tensor where there is one,
/// if a tensor is missing, of another shape or type, or belongs to no parameter. The model is as it was then.
pub fn load_safetensors<M: Parameters + ?Sized>(
    path: &Path,
    model: &mut M,
) -> Result<(), ModelError> {
    let bytes = fs::read(path).map_err(io(path))?;
    let file = TensorFile::parse(path, &bytes)?;
    let (mut names, mut outcome) = (BTreeSet::new(), Ok(()));
    model.visit("", &mut |name, p| {
        if outcome.is_ok() {
            outcome = file.check(&name, p.shape());
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

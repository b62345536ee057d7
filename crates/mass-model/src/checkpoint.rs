//! Checkpoints: a directory that always holds one complete, readable state.
//!
//! ```text
//! DIR/latest                       the name of the newest complete checkpoint
//! DIR/step-0000001200/model.safetensors
//! DIR/step-0000001200/optimizer.safetensors
//! DIR/step-0000001200/state.json   everything else, also the caller's own state
//! ```
//!
//! A checkpoint is written under a temporary name, synced and renamed, and only then named in `latest` (itself replaced
//! by a rename); older ones are removed last. A process killed at any moment leaves the last complete checkpoint readable.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use mass_expand::ExpertId;
use safetensors::tensor::{Dtype, SafeTensors, View};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::ModelError;
use crate::lm::{LanguageModel, LanguageModelConfig};
use crate::optim::{AdamW, AdamWConfig, ParameterState};
use crate::param::Parameters;
use crate::seeded_rng;

const FORMAT: u32 = 1;
const MODEL: &str = "model.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "state.json";
const LATEST: &str = "latest";

/// A checkpoint read back.
#[derive(Debug)]
pub struct Checkpoint<S> {
    /// The model, with as many experts as it had.
    pub model: LanguageModel,
    /// The optimiser with every moment and step count.
    pub optimizer: AdamW,
    /// Steps made.
    pub step: u64,
    /// What the caller saved beside: controller, data position, random state.
    pub state: S,
}

#[derive(Serialize, Deserialize)]
struct Manifest<S> {
    format: u32,
    step: u64,
    model: LanguageModelConfig,
    pools: Vec<Pool>,
    optimizer: AdamWConfig,
    parameter_steps: BTreeMap<String, u64>,
    state: S,
}

#[derive(Serialize, Deserialize)]
struct Pool {
    experts: Vec<ExpertId>,
    next_id: u32,
    logit_offsets: Vec<f32>,
    router: mass_routing::AnyRouter,
}

struct F32View<'a> {
    shape: Vec<usize>,
    values: &'a [f32],
}

impl View for F32View<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Owned(self.values.iter().flat_map(|x| x.to_le_bytes()).collect())
    }
    fn data_len(&self) -> usize {
        self.values.len() * 4
    }
}

fn io(path: &Path) -> impl Fn(std::io::Error) -> ModelError + '_ {
    move |source| ModelError::Io {
        path: path.to_owned(),
        source,
    }
}

fn broken(path: &Path, why: impl std::fmt::Display) -> ModelError {
    ModelError::Checkpoint {
        path: path.to_owned(),
        why: why.to_string(),
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

/// Saves model, optimiser and the caller's `state` as the newest checkpoint of `dir`, and returns its folder.
///
/// # Errors
/// [`ModelError::Io`] naming the file that could not be written; the previous checkpoint is intact then.
pub fn save<S: Serialize>(
    dir: &Path,
    step: u64,
    model: &LanguageModel,
    optimizer: &AdamW,
    state: &S,
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

    let mut tensors = Vec::new();
    model.visit("", &mut |name, p| {
        tensors.push((
            name,
            F32View {
                shape: p.shape().to_vec(),
                values: p.values(),
            },
        ))
    });
    write_tensors(&partial.join(MODEL), tensors)?;
    let moments = optimizer.state().iter().flat_map(|(name, s)| {
        [
            (
                format!("m.{name}"),
                F32View {
                    shape: vec![s.m.len()],
                    values: &s.m,
                },
            ),
            (
                format!("v.{name}"),
                F32View {
                    shape: vec![s.v.len()],
                    values: &s.v,
                },
            ),
        ]
    });
    write_tensors(&partial.join(OPTIMIZER), moments.collect())?;
    let manifest = Manifest {
        format: FORMAT,
        step,
        model: model.config().clone(),
        pools: model
            .blocks
            .iter()
            .map(|b| Pool {
                experts: b.moe.ids().to_vec(),
                next_id: b.moe.next_id().0,
                logit_offsets: b.moe.experts().iter().map(|e| e.logit_offset).collect(),
                router: b.moe.router().clone(),
            })
            .collect(),
        optimizer: optimizer.config().clone(),
        parameter_steps: optimizer
            .state()
            .iter()
            .map(|(name, s)| (name.clone(), s.step))
            .collect(),
        state,
    };
    let path = partial.join(STATE);
    let json = serde_json::to_vec(&manifest).map_err(|e| broken(&path, e))?;
    write_synced(&path, &json)?;
    sync_directory(&partial)?;

    let complete = dir.join(&name);
    fs::rename(&partial, &complete).map_err(io(&complete))?;
    sync_directory(dir)?;
    let pointer = dir.join(".latest");
    write_synced(&pointer, name.as_bytes())?;
    fs::rename(&pointer, dir.join(LATEST)).map_err(io(&pointer))?;
    sync_directory(dir)?;
    for entry in fs::read_dir(dir).map_err(io(dir))? {
        let entry = entry.map_err(io(dir))?;
        let other = entry.file_name().to_string_lossy().into_owned();
        if other != name && (other.starts_with("step-") || other.starts_with(".partial-")) {
            fs::remove_dir_all(entry.path()).map_err(io(&entry.path()))?;
        }
    }
    Ok(complete)
}

fn write_tensors(path: &Path, tensors: Vec<(String, F32View<'_>)>) -> Result<(), ModelError> {
    let bytes = safetensors::serialize(tensors, None).map_err(|e| broken(path, e))?;
    write_synced(path, &bytes)
}

/// Whether `dir` holds a checkpoint.
pub fn exists(dir: &Path) -> bool {
    dir.join(LATEST).is_file()
}

/// Reads the newest checkpoint of `dir`.
///
/// # Errors
/// [`ModelError::Io`] if a file cannot be read; [`ModelError::Checkpoint`] naming the file, and the tensor where there is
/// one, if something is missing, of another shape or type, or damaged.
pub fn load<S: DeserializeOwned>(dir: &Path) -> Result<Checkpoint<S>, ModelError> {
    let pointer = dir.join(LATEST);
    let name = fs::read_to_string(&pointer).map_err(io(&pointer))?;
    if !name.starts_with("step-") || name.contains(['/', '\\']) {
        return Err(broken(&pointer, format!("names no checkpoint: {name:?}")));
    }
    let folder = dir.join(name);
    let path = folder.join(STATE);
    let json = fs::read(&path).map_err(io(&path))?;
    let manifest: Manifest<S> = serde_json::from_slice(&json).map_err(|e| broken(&path, e))?;
    if manifest.format != FORMAT {
        return Err(broken(
            &path,
            format!(
                "format {}, this program reads format {FORMAT}",
                manifest.format
            ),
        ));
    }

    let mut model = LanguageModel::new(&manifest.model, &mut seeded_rng(0))?;
    if manifest.pools.len() != model.blocks.len() {
        return Err(broken(
            &path,
            format!(
                "{} expert pools for {} layers",
                manifest.pools.len(),
                model.blocks.len()
            ),
        ));
    }
    for (block, pool) in model.blocks.iter_mut().zip(manifest.pools) {
        block
            .moe
            .restore_pool(pool.experts, pool.next_id, &pool.logit_offsets, pool.router)
            .map_err(|e| broken(&path, e))?;
    }
    let path = folder.join(MODEL);
    let mut tensors = read_tensors(&path)?;
    let mut outcome = Ok(());
    model.visit_mut("", &mut |name, p| {
        if outcome.is_ok() {
            outcome = take_tensor(&path, &mut tensors, &name, Some(p.shape()))
                .map(|values| p.values_mut().copy_from_slice(&values));
        }
    });
    outcome?;
    nothing_left(&path, &tensors)?;

    let path = folder.join(OPTIMIZER);
    let mut tensors = read_tensors(&path)?;
    let mut state = BTreeMap::new();
    for (name, step) in manifest.parameter_steps {
        let m = take_tensor(&path, &mut tensors, &format!("m.{name}"), None)?;
        let v = take_tensor(&path, &mut tensors, &format!("v.{name}"), Some(&[m.len()]))?;
        state.insert(name, ParameterState { m, v, step });
    }
    nothing_left(&path, &tensors)?;
    let mut wrong = None;
    model.visit("", &mut |name, p| {
        if let Some(s) = state.get(&name)
            && s.m.len() != p.len()
        {
            wrong.get_or_insert(format!(
                "tensor m.{name}: {} values for a parameter of {}",
                s.m.len(),
                p.len()
            ));
        }
    });
    if let Some(why) = wrong {
        return Err(broken(&path, why));
    }
    let mut optimizer = AdamW::new(manifest.optimizer)?;
    optimizer.restore(state)?;
    Ok(Checkpoint {
        model,
        optimizer,
        step: manifest.step,
        state: manifest.state,
    })
}

type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

fn read_tensors(path: &Path) -> Result<Tensors, ModelError> {
    let bytes = fs::read(path).map_err(io(path))?;
    let file = SafeTensors::deserialize(&bytes).map_err(|e| broken(path, e))?;
    let mut tensors = Tensors::new();
    for (name, view) in file.iter() {
        if view.dtype() != Dtype::F32 {
            return Err(broken(
                path,
                format!("tensor {name} is {:?}, not F32", view.dtype()),
            ));
        }
        let values = view
            .data()
            .as_chunks::<4>()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect();
        tensors.insert(name.to_owned(), (view.shape().to_vec(), values));
    }
    Ok(tensors)
}

fn take_tensor(
    path: &Path,
    tensors: &mut Tensors,
    name: &str,
    shape: Option<&[usize]>,
) -> Result<Vec<f32>, ModelError> {
    let (found, values) = tensors
        .remove(name)
        .ok_or_else(|| broken(path, format!("tensor {name} is missing")))?;
    match shape {
        Some(shape) if shape != found => Err(broken(
            path,
            format!("tensor {name} is {found:?}, not {shape:?}"),
        )),
        _ => Ok(values),
    }
}

fn nothing_left(path: &Path, tensors: &Tensors) -> Result<(), ModelError> {
    match tensors.keys().next() {
        Some(name) => Err(broken(
            path,
            format!("tensor {name} belongs to no parameter of this model"),
        )),
        None => Ok(()),
    }
}

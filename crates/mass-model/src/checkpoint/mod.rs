//! Checkpoints: a directory that always holds one complete, readable state.
//!
//! ```text
//! DIR/latest                               the name of the newest complete checkpoint, with a checksum
//! DIR/step-0000001200/model.safetensors    weights
//! DIR/step-0000001200/optimizer.safetensors
//! DIR/step-0000001200/ema.safetensors      averaged weights, if there are any
//! DIR/step-0000001200/state.json           configuration, expert pools, routers, step counts, the caller's own state
//! DIR/step-0000001200/checksums            length and CRC-32 of each of these
//! ```
//!
//! A checkpoint is written under a temporary name, synced and renamed, and only then named in `latest` (itself replaced
//! by a rename). The one before it stays, for a reader who has read `latest` and not yet the files; older ones are removed
//! last. A process killed, or a machine that loses its power, at any moment leaves the last complete checkpoint readable; a
//! full disk leaves it too, and nothing of the one that did not fit.
//!
//! Every file is compared with its checksum before it is parsed, and nothing is allocated by a size that a file claims
//! until its contents bear it out. What does not fit is a [`CheckpointError`] that names the tensor where there is one,
//! inside a [`ModelError::Checkpoint`] that names the file.
//!
//! [`load`] resumes a run to the bit: model, optimiser, averages, routers with their noise, and whatever the caller
//! keeps in `state` (controller, data position, random generators). [`load_model`] reads weights alone, for
//! inference, and [`load_into`] reads them into a model that exists. [`save_safetensors`] and [`load_safetensors`] are for
//! the values of any [`Parameters`](crate::Parameters) alone, in one file.
//!
//! ```
//! use mass_model::checkpoint::{self, Snapshot};
//! use mass_model::lm::LanguageModel;
//! # use mass_model::optim::{AdamW, AdamWConfig};
//! # let config = serde_json::json!({ "vocab": 5, "max_seq": 4, "layers": 1, "embedding_std": 0.1, "block": {
//! #     "heads": 1, "layer_norm_eps": 1e-5, "moe": { "dim": 4, "hidden": 4, "experts": 2, "activation": "relu",
//! #     "router": { "router": "top_p", "p": 0.5 } } } });
//! # let config = serde_json::from_value(config).unwrap();
//! # let model = LanguageModel::new(&config, &mut mass_model::seeded_rng(0))?;
//! # let optimizer = AdamW::new(AdamWConfig::default())?;
//! # let dir = tempfile::tempdir().unwrap();
//! # let dir = dir.path();
//! let snapshot = Snapshot { step: 100, model: &model, optimizer: &optimizer, ema: None, state: &"data position" };
//! checkpoint::save(dir, &snapshot)?;
//! let resumed = checkpoint::load::<LanguageModel, String>(dir)?;
//! assert_eq!((resumed.step, resumed.state.as_str()), (100, "data position"));
//! let model: LanguageModel = checkpoint::load_model(dir)?;
//! # Ok::<(), mass_model::ModelError>(())
//! ```

mod directory;
mod manifest;
mod plain;
mod pool;
mod seal;
mod size;
mod storage;
mod tensors;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use serde_json::value::RawValue;

use crate::error::ModelError;
use crate::mixtures::Mixtures;
use crate::optim::{AdamW, Ema, ParameterState};
use crate::param::{Param, bring_to_host, check_finite, check_names, join};
use directory::{Sink, Source};
use manifest::{Manifest, Pool};
use pool::Reading;
use seal::Seals;
use storage::Disk;
use tensors::{F32View, TensorFile};

pub use crate::error::{CheckpointError, ExpertCounts};
pub use plain::{load_safetensors, save_safetensors};
pub use pool::{LoadOptions, PoolMismatch};

const FORMAT: u64 = 2;
const MODEL: &str = "model.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const AVERAGES: &str = "ema.safetensors";
const STATE: &str = "state.json";
const SEALS: &str = "checksums";
const LATEST: &str = "latest";

/// A model that a checkpoint can hold: it can be made anew from a serialisable configuration.
///
/// Held are the parameters that [`Parameters`](crate::Parameters) names. What else the model has, such as layers of dfdx, belongs into
/// the [state](Snapshot::state), or it is as `from_checkpoint_config` makes it.
pub trait Checkpointed: Mixtures + Sized {
    /// What the model is, in words that stay: a checkpoint of another kind is refused.
    const KIND: &'static str;

    /// Everything that fixes the model but for its values and pools.
    type Config: Serialize + DeserializeOwned;

    /// The configuration it was made with.
    fn checkpoint_config(&self) -> &Self::Config;

    /// A model of a configuration; its values are going to be replaced.
    ///
    /// # Errors
    /// Whatever the configuration leaves to be refused.
    fn from_checkpoint_config(config: &Self::Config) -> Result<Self, ModelError>;

    /// Whether the model still is what its configuration says. What differs would be lost: a checkpoint keeps the configuration and
    /// the values of parameters.
    ///
    /// # Errors
    /// [`ModelError::Config`] naming what differs.
    fn check_config(&self) -> Result<(), ModelError> {
        Ok(())
    }

    /// How many values a model of a configuration holds at the least, with the pools it starts with; `None` if there is no
    /// such number. It is compared with the size of the file, so that a false configuration does not exhaust memory. Without it
    /// the configuration is believed.
    fn values_at_least(config: &Self::Config) -> Option<u64> {
        let _ = config;
        Some(0)
    }
}

/// What a checkpoint is made of.
#[derive(Clone, Copy, Debug)]
pub struct Snapshot<'a, M, S: ?Sized> {
    /// Steps made.
    pub step: u64,
    /// The model.
    pub model: &'a M,
    /// The optimiser.
    pub optimizer: &'a AdamW,
    /// Averaged weights, if the run keeps them.
    pub ema: Option<&'a Ema>,
    /// What the caller needs beside: controller, data position, random state. Serialised as JSON, which has no NaN and no
    /// infinity: a state with either is refused. Nor has it an option in an option: `Some(None)` comes back as `None`.
    pub state: &'a S,
}

impl<'a, M, S: ?Sized> Snapshot<'a, M, S> {
    /// Of a run without averaged weights.
    pub fn new(step: u64, model: &'a M, optimizer: &'a AdamW, state: &'a S) -> Self {
        Self {
            step,
            model,
            optimizer,
            ema: None,
            state,
        }
    }
}

/// A checkpoint read back.
#[derive(Debug)]
pub struct Checkpoint<M, S> {
    /// The model, with as many experts as it had and routers as they stood.
    pub model: M,
    /// The optimiser with every moment and step count.
    pub optimizer: AdamW,
    /// Averaged weights, if the run kept them.
    pub ema: Option<Ema>,
    /// Steps made.
    pub step: u64,
    /// What the caller saved beside.
    pub state: S,
}

/// The files of a checkpoint by name, for those who keep them elsewhere than in a directory.
pub type Files = BTreeMap<String, Vec<u8>>;

fn broken(path: &Path, why: CheckpointError) -> ModelError {
    ModelError::Checkpoint {
        path: path.to_owned(),
        why,
    }
}

/// Saves the newest checkpoint of `dir` and returns its folder.
///
/// # Errors
/// [`ModelError::Io`] naming the file that could not be written, [`ModelError::Config`] if averaged weights are
/// [in the model](Ema::swap), two parameters have one name, or the model
/// [is not what its configuration says](Checkpointed::check_config): it has other parameters than a model that is made of
/// it, of other shapes, or some that decay where its do not. [`ModelError::NonFinite`] for a NaN or an infinity in the state, a
/// weight, a moment, an average or an expert's offset, [`ModelError::Shape`] for moments or averages of another size than their
/// parameter, [`ModelError::Checkpoint`] for whatever else [`load`] would refuse, such as a state that JSON cannot hold or that is
/// nested too deeply. The previous checkpoint is intact then.
pub fn save<M: Checkpointed, S: Serialize + ?Sized>(
    dir: &Path,
    snapshot: &Snapshot<'_, M, S>,
) -> Result<PathBuf, ModelError> {
    directory::write(&Disk, dir, snapshot.step, |sink| produce(snapshot, sink))
}

/// The files that [`save`] would write.
///
/// # Errors
/// As [`save`], but for those of a disk.
pub fn encode<M: Checkpointed, S: Serialize + ?Sized>(
    snapshot: &Snapshot<'_, M, S>,
) -> Result<Files, ModelError> {
    let mut files = Files::new();
    produce(snapshot, &mut |name, bytes| {
        files.insert(name.to_owned(), bytes);
        Ok(())
    })?;
    Ok(files)
}

/// Hands over one file after the other, so that no two are in memory at once; the checksums come last.
fn produce<M: Checkpointed, S: Serialize + ?Sized>(
    snapshot: &Snapshot<'_, M, S>,
    sink: &mut Sink<'_>,
) -> Result<(), ModelError> {
    let &Snapshot {
        step,
        model,
        optimizer,
        ema,
        state,
    } = snapshot;
    if ema.is_some_and(Ema::is_swapped) {
        return Err(ModelError::Config(
            "averaged weights are in the model; swap them out before saving".into(),
        ));
    }
    check_names(model)?;
    model.check_config()?;
    for layer in 0..model.mixtures() {
        let moe = model.mixture(layer);
        for (expert, id) in moe.experts().iter().zip(moe.ids()) {
            let name = join(&model.mixture_name(layer), &format!("experts.{}", id.0));
            expert.check_offset(&name)?;
        }
    }
    // JSON would write null for them, and perhaps be read back as something else.
    let tree = ciborium::Value::serialized(state)
        .map_err(|e| broken(Path::new(STATE), CheckpointError::Json(e.to_string())))?;
    if let Some(value) = non_finite(&tree) {
        return Err(ModelError::NonFinite(format!(
            "a number of the state, {value}"
        )));
    }
    let pool = |layer| {
        let moe = model.mixture(layer);
        Pool {
            experts: moe.ids().to_vec(),
            next_id: moe.next_id().0,
            logit_offsets: moe.experts().iter().map(|e| e.logit_offset).collect(),
            router: moe.router().clone(),
        }
    };
    let steps = optimizer.state().iter();
    let manifest = Manifest {
        format: FORMAT,
        kind: M::KIND.to_owned(),
        step,
        model: manifest::raw(model.checkpoint_config())?,
        pools: (0..model.mixtures()).map(pool).collect(),
        optimizer: optimizer.config().clone(),
        parameter_steps: steps.map(|(name, s)| (name.clone(), s.step)).collect(),
        ema: ema.map(|e| *e.config()),
        state: manifest::raw(state)?,
    };
    let json = manifest.render()?;
    check_readable(model, &json)?;
    bring_to_host(model)?;
    let (mut tensors, mut shapes, mut outcome) = (Vec::new(), BTreeMap::new(), Ok(()));
    model.visit("", &mut |name, p| {
        let (shape, values) = (p.shape().to_vec(), p.values());
        if outcome.is_ok() {
            outcome = check_finite("values", &name, values);
        }
        shapes.insert(name.clone(), shape.clone());
        tensors.push((name, F32View { shape, values }));
    });
    outcome?;
    if let Some(ema) = ema {
        check_averages(ema, &shapes)?;
    }
    // A move that the averages have not made yet would be lost: it is the parameter in memory that knows of it.
    let followed = match ema {
        Some(behind) if behind.lags(model) => {
            let mut ema = behind.clone();
            ema.follow(model)?;
            Some(ema)
        }
        _ => None,
    };
    let ema = followed.as_ref().or(ema);
    write_files(json, tensors, &shapes, (optimizer, ema), sink)
}

type Shapes = BTreeMap<String, Vec<usize>>;

/// Refuses values of another number than their parameter's. What belongs to a parameter that has left the model is kept, whatever
/// its length.
fn check_fits(shapes: &Shapes, what: &str, name: &str, len: usize) -> Result<(), ModelError> {
    match shapes.get(name) {
        Some(shape) if shape.iter().product::<usize>() != len => {
            let what = format!("{what} of {name}");
            Err(ModelError::shape(what, shape, &[len]))
        }
        _ => Ok(()),
    }
}

fn check_averages(ema: &Ema, shapes: &Shapes) -> Result<(), ModelError> {
    ema.shadow().iter().try_for_each(|(name, average)| {
        check_finite("averages", name, average.try_values()?)?;
        check_fits(shapes, "averages", name, average.len())
    })
}

/// The part of [`produce`] that needs no model.
fn write_files(
    json: Vec<u8>,
    tensors: Vec<(String, F32View<'_>)>,
    shapes: &Shapes,
    (optimizer, ema): (&AdamW, Option<&Ema>),
    sink: &mut Sink<'_>,
) -> Result<(), ModelError> {
    for (name, state) in optimizer.state() {
        state.check(name)?;
        check_fits(shapes, "moments", name, state.m.len())?;
    }
    let mut seals = Seals::default();
    let mut seal_and_sink = |name: &str, bytes: Vec<u8>| {
        seals.add(name, &bytes);
        sink(name, bytes)
    };
    seal_and_sink(MODEL, tensors::encode(MODEL, tensors)?)?;

    let flat = |values| F32View {
        shape: vec![<[f32]>::len(values)],
        values,
    };
    let moments = optimizer.state().iter();
    let moments = moments.flat_map(|(name, s)| {
        [
            (format!("m.{name}"), flat(&s.m)),
            (format!("v.{name}"), flat(&s.v)),
        ]
    });
    seal_and_sink(OPTIMIZER, tensors::encode(OPTIMIZER, moments.collect())?)?;

    if let Some(ema) = ema {
        let averages = ema.shadow().iter().map(|(name, values)| {
            let shape = shapes.get(name).cloned();
            let shape = shape.unwrap_or_else(|| vec![values.len()]);
            (name.clone(), F32View { shape, values })
        });
        seal_and_sink(AVERAGES, tensors::encode(AVERAGES, averages.collect())?)?;
    }

    seal_and_sink(STATE, json)?;
    sink(SEALS, seals.render().into_bytes())
}

/// Refuses a model that [`load`] would not make again of what was written of it.
fn check_readable<M: Checkpointed>(model: &M, json: &[u8]) -> Result<(), ModelError> {
    let path = Path::new(STATE);
    let manifest = Manifest::parse(path, json, M::KIND)?;
    manifest::value::<Value>(path, &manifest.state)?;
    let config = manifest::value(path, &manifest.model)?;
    let mut other: M = blank(path, &config, model.num_values() as u64)?;
    Reading::as_saved(path, &other, manifest.pools)?.give_pools(path, &mut other)?;
    let of = |p: &Param| (p.shape().to_vec(), p.decays());
    let mut expected = BTreeMap::new();
    other.visit("", &mut |name, p| drop(expected.insert(name, of(p))));
    let mut found = BTreeMap::new();
    model.visit("", &mut |name, p| drop(found.insert(name, of(p))));
    let names = expected.keys().chain(found.keys());
    let mut differing = names.filter(|&name| expected.get(name) != found.get(name));
    let Some(name) = differing.next() else {
        return Ok(());
    };
    let describe = |of: Option<&(Vec<usize>, bool)>| match of {
        Some((shape, true)) => format!("a parameter of shape {shape:?} that decays"),
        Some((shape, false)) => format!("a parameter of shape {shape:?} that does not decay"),
        None => "none".into(),
    };
    Err(ModelError::Config(format!(
        "{name} is {}, but {} in a model of this configuration, and a checkpoint keeps no more than that",
        describe(found.get(name)),
        describe(expected.get(name))
    )))
}

/// A number in it that is NaN or infinite, if there is one.
fn non_finite(value: &ciborium::Value) -> Option<f64> {
    use ciborium::Value;
    match value {
        Value::Float(x) => (!x.is_finite()).then_some(*x),
        Value::Array(values) => values.iter().find_map(non_finite),
        Value::Map(pairs) => pairs
            .iter()
            .find_map(|(k, v)| non_finite(k).or_else(|| non_finite(v))),
        Value::Tag(_, value) => non_finite(value),
        _ => None,
    }
}

/// Whether `dir` holds a checkpoint.
pub fn exists(dir: &Path) -> bool {
    dir.join(LATEST).is_file()
}

/// Folders of checkpoints in `dir` in the order of their steps, whether they can be read or not; none if there is no such directory.
pub fn steps(dir: &Path) -> Vec<PathBuf> {
    directory::steps(&Disk, dir)
}

/// Reads the newest checkpoint of `dir`.
///
/// # Errors
/// [`ModelError::Io`] if a file cannot be read; [`ModelError::Checkpoint`] naming the file, and the tensor where there is
/// one, if something is missing, of another shape or type, or damaged.
pub fn load<M: Checkpointed, S: DeserializeOwned>(
    dir: &Path,
) -> Result<Checkpoint<M, S>, ModelError> {
    read_all(&Source::Folder(directory::newest(&Disk, dir)?))
}

/// Reads the checkpoint in one of the folders that [`steps`] lists, such as the one before a newest that is damaged.
///
/// # Errors
/// As [`load`].
pub fn load_step<M: Checkpointed, S: DeserializeOwned>(
    folder: &Path,
) -> Result<Checkpoint<M, S>, ModelError> {
    read_all(&Source::Folder(folder.to_owned()))
}

/// Reads a checkpoint from memory.
///
/// # Errors
/// As [`load`].
pub fn decode<M: Checkpointed, S: DeserializeOwned>(
    files: &Files,
) -> Result<Checkpoint<M, S>, ModelError> {
    read_all(&Source::Memory(files))
}

/// Reads the model of the newest checkpoint of `dir` and nothing else: the optimiser's file may be absent.
///
/// # Errors
/// As [`load`].
pub fn load_model<M: Checkpointed>(dir: &Path) -> Result<M, ModelError> {
    let source = Source::Folder(directory::newest(&Disk, dir)?);
    let seals = source.seals()?;
    let manifest = read_manifest(&source, &seals, M::KIND)?;
    read_model(&source, &seals, &manifest.model, manifest.pools)
}

/// Reads the weights, pools and routers of the newest checkpoint of `dir` into a model that exists, and returns the layers
/// in which the numbers of experts differed. What differs otherwise and makes it another function (a width, a number of heads,
/// an activation, a kind of router) is an error. What matters in training alone (dropout, routing losses, how weights are drawn) is
/// the model's own; a router's noise and rates come with its state.
///
/// # Errors
/// As [`load`], [`CheckpointError::Settings`] for a model that computes something else, and [`CheckpointError::ExpertCount`] unless `options` say what to do. After an error the model is as it was.
pub fn load_into<M: Checkpointed>(
    dir: &Path,
    model: &mut M,
    options: LoadOptions,
) -> Result<Vec<ExpertCounts>, ModelError> {
    let source = Source::Folder(directory::newest(&Disk, dir)?);
    let seals = source.seals()?;
    let manifest = read_manifest(&source, &seals, M::KIND)?;
    let bytes = source.verified(&seals, MODEL)?;
    let path = source.path(MODEL);
    let file = TensorFile::parse(&path, &bytes)?;
    let state = source.path(STATE);
    // As a configuration: what was written by an older version may lack a setting.
    let config: M::Config = manifest::value(&state, &manifest.model)?;
    for (layer, pool) in manifest.pools.iter().enumerate().take(model.mixtures()) {
        let config = model.mixture(layer).config();
        for loss in &config.losses {
            if let Some(needed) = loss.lacks(&pool.router, config.gate.is_low_rank()) {
                let what = format!("mixture layer {layer} has a router, but {loss:?} {needed}");
                return Err(broken(&state, CheckpointError::Settings(what)));
            }
        }
    }
    let reading = Reading::fitted(&state, model, manifest.pools, options.pool)?;
    reading.check(model, &file)?;
    let values = |config: &M::Config| serde_json::to_value(config);
    let both = values(&config).and_then(|a| Ok((a, values(model.checkpoint_config())?)));
    let (theirs, ours) = both.map_err(|e| broken(&state, CheckpointError::Json(e.to_string())))?;
    if let Some(what) = contradiction("", &theirs, &ours) {
        return Err(broken(&state, CheckpointError::Settings(what)));
    }
    reading.apply(&state, model, &file)?;
    Ok(reading.differing)
}

/// The first setting by which two models compute different functions, and what it is in either.
fn contradiction(name: &str, theirs: &Value, ours: &Value) -> Option<String> {
    // The number of experts at the start, where learned factors start, what matters in training alone, and what a router is
    // read with anyway.
    const FREE: [&str; 9] = [
        "experts",
        "temperature",
        "layer_scale",
        "losses",
        "initializer_range",
        "embedding_std",
        "seed",
        "std",
        "rate",
    ];
    match (theirs, ours) {
        (Value::Object(a), Value::Object(b)) => {
            let mut keys: Vec<&String> = a.keys().chain(b.keys()).collect();
            keys.retain(|k| !FREE.contains(&k.as_str()) && !k.contains("dropout"));
            keys.into_iter().find_map(|key| {
                let of = |map: &serde_json::Map<String, Value>| map.get(key).cloned();
                let (a, b) = (of(a).unwrap_or_default(), of(b).unwrap_or_default());
                let dot = if name.is_empty() { "" } else { "." };
                contradiction(&format!("{name}{dot}{key}"), &a, &b)
            })
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            a.iter().zip(b).find_map(|(a, b)| contradiction(name, a, b))
        }
        _ if theirs == ours => None,
        _ => Some(format!(
            "{name} is {theirs}, but {ours} in the model to be read into"
        )),
    }
}

fn read_manifest(
    source: &Source<'_>,
    seals: &Seals,
    kind: &'static str,
) -> Result<Manifest, ModelError> {
    let json = source.verified(seals, STATE)?;
    Manifest::parse(&source.path(STATE), &json, kind)
}

/// A model of a configuration that is read from `state`, with so many values saved.
fn blank<M: Checkpointed>(state: &Path, config: &M::Config, saved: u64) -> Result<M, ModelError> {
    /// Values that are allocated on the configuration's word alone. Of the smallest experts each takes a hundred times its four
    /// bytes.
    const UNQUESTIONED: u64 = 1 << 17;
    /// A pool may have shrunk to this fraction of what it started with.
    const SHRUNK: u64 = 64;
    let settings = |why: String| broken(state, CheckpointError::Settings(why));
    match M::values_at_least(config) {
        Some(values) if values <= UNQUESTIONED.max(saved.saturating_mul(SHRUNK)) => {}
        Some(values) => {
            let why = format!("a model of {values} values, with {saved} of them in {MODEL}");
            return Err(settings(why));
        }
        None => return Err(settings("sizes that no model can have".into())),
    }
    M::from_checkpoint_config(config).map_err(|e| settings(e.to_string()))
}

fn read_model<M: Checkpointed>(
    source: &Source<'_>,
    seals: &Seals,
    config: &RawValue,
    pools: Vec<Pool>,
) -> Result<M, ModelError> {
    let bytes = source.verified(seals, MODEL)?;
    let path = source.path(MODEL);
    let file = TensorFile::parse(&path, &bytes)?;
    let state = source.path(STATE);
    let config = manifest::value(&state, config)?;
    let mut model: M = blank(&state, &config, file.num_values())?;
    let reading = Reading::as_saved(&state, &model, pools)?;
    reading.check(&model, &file)?;
    reading.apply(&state, &mut model, &file)?;
    Ok(model)
}

fn read_all<M: Checkpointed, S: DeserializeOwned>(
    source: &Source<'_>,
) -> Result<Checkpoint<M, S>, ModelError> {
    let seals = source.seals()?;
    let mut manifest = read_manifest(source, &seals, M::KIND)?;
    let state = manifest::value(&source.path(STATE), &manifest.state)?;
    let pools = std::mem::take(&mut manifest.pools);
    let model: M = read_model(source, &seals, &manifest.model, pools)?;
    let mut lengths = BTreeMap::new();
    model.visit("", &mut |name, p| {
        lengths.insert(name, p.len());
    });
    let step = manifest.step;
    let (optimizer, ema) = read_optimizer(source, &seals, manifest, &lengths)?;
    Ok(Checkpoint {
        model,
        optimizer,
        ema,
        step,
        state,
    })
}

/// The part of [`read_all`] that needs to know no more of the model than how many values each parameter has.
fn read_optimizer(
    source: &Source<'_>,
    seals: &Seals,
    manifest: Manifest,
    lengths: &BTreeMap<String, usize>,
) -> Result<(AdamW, Option<Ema>), ModelError> {
    let settings = |e: ModelError| {
        broken(
            &source.path(STATE),
            CheckpointError::Settings(e.to_string()),
        )
    };
    // What belongs to a parameter that has left the model is kept, whatever its length.
    let fits = |path: &Path, tensor: String, of: &str, actual: usize| match lengths.get(of) {
        Some(&expected) if expected != actual => {
            let why = CheckpointError::TensorShape {
                name: tensor,
                expected: vec![expected],
                actual: vec![actual],
            };
            Err(broken(path, why))
        }
        _ => Ok(()),
    };

    let bytes = source.verified(seals, OPTIMIZER)?;
    let path = source.path(OPTIMIZER);
    let mut file = TensorFile::parse(&path, &bytes)?;
    let mut states = BTreeMap::new();
    for (name, step) in manifest.parameter_steps {
        let (first, second) = (format!("m.{name}"), format!("v.{name}"));
        let m = file.take(&first)?;
        file.check(&second, &[m.len()])?;
        let v = file.take(&second)?;
        fits(&path, first, &name, m.len())?;
        states.insert(
            name,
            ParameterState {
                m: m.into(),
                v: v.into(),
                step,
            },
        );
    }
    file.expect_only(|_| false)?;
    let mut optimizer = AdamW::new(manifest.optimizer).map_err(settings)?;
    let unfit = |e: ModelError| broken(&path, CheckpointError::Settings(e.to_string()));
    optimizer.restore(states).map_err(unfit)?;

    let mut ema = None;
    if let Some(config) = manifest.ema {
        let bytes = source.verified(seals, AVERAGES)?;
        let path = source.path(AVERAGES);
        let mut file = TensorFile::parse(&path, &bytes)?;
        let mut shadow = BTreeMap::new();
        for name in file.names() {
            let average = file.take(&name)?;
            fits(&path, name.clone(), &name, average.len())?;
            shadow.insert(name, average);
        }
        ema = Some(Ema::restore(config, shadow).map_err(settings)?);
    }
    Ok((optimizer, ema))
}

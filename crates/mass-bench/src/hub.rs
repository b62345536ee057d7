//! Models from the Hugging Face Hub, for machines with a network.
//!
//! Behind the cargo feature `hub`; `cargo xtask data fetch` turns it on. The files go to `MODELS/<name>/`, where studies look for
//! them, once all of them are there and fit each other: a download that broke off leaves nothing there, and the same command
//! goes on from where it ended.

use std::fs;
use std::path::{Path, PathBuf};

use hf_hub::api::sync::{ApiBuilder, ApiError};
use mass_model::pretrained;

use crate::{BenchError, data_check};

/// Models that studies know by a name of their own, and their repositories.
pub const KNOWN: [(&str, &str); 4] = [
    ("minilm-l6", "sentence-transformers/all-MiniLM-L6-v2"),
    ("bert-large-cased", "google-bert/bert-large-cased"),
    ("vit-s14", "facebook/dinov2-small"),
    ("deit-small-patch16-224", "facebook/deit-small-patch16-224"),
];

/// The configuration, without which no model is read.
const CONFIG: &str = "config.json";
/// The weights, in one file.
const SINGLE: &str = "model.safetensors";
/// Which files the weights are in, where they are in several.
const INDEX: &str = "model.safetensors.index.json";
/// Files that are taken where there are some.
const ALSO: [&str; 4] = [
    "tokenizer.json",
    "vocab.txt",
    "tokenizer_config.json",
    "preprocessor_config.json",
];

/// Folder within the models' for what is not complete yet.
const PARTIAL: &str = ".hub";

/// How often a transfer that breaks off is taken up again.
const RETRIES: usize = 3;

/// A model that was downloaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fetched {
    /// The directory it is in.
    pub dir: PathBuf,
    /// A few words on it, as `data check` has them.
    pub summary: String,
}

/// Downloads a model, by one of the names in [`KNOWN`] or its repository (`owner/name`), to a directory of its name in `models`.
///
/// `endpoint` replaces <https://huggingface.co>, as $HF_ENDPOINT does; a token is taken from where Hugging Face's own tools keep
/// it ($HF_HOME).
///
/// # Errors
/// [`BenchError::Usage`] for a name that is none; [`BenchError::Input`] if the directory is there already, cannot be written, or
/// the repository lacks a file or holds one that is damaged; [`BenchError::Failed`] if the server is out of reach or refuses.
pub fn fetch(model: &str, models: &Path, endpoint: Option<&str>) -> Result<Fetched, BenchError> {
    let known = KNOWN.iter().find(|(name, _)| *name == model);
    let repository = known.map_or(model, |(_, repository)| repository);
    let name = known.map_or_else(|| model.rsplit('/').next().unwrap_or(model), |k| k.0);
    check_name(repository)?;
    let dir = models.join(name);
    if dir.exists() {
        return Err(BenchError::input(
            &dir,
            "is there already; remove it to get it again",
        ));
    }
    // The cache wants paths of one kind. It makes its folders itself, with the first file.
    let partial = models.join(PARTIAL).join(name);
    let partial = std::path::absolute(&partial).map_err(|e| BenchError::input(&partial, e))?;

    let whole = partial.join("whole");
    if whole.exists() {
        // Broken off while it was put together: the cache points to files that have been moved out of it.
        fs::remove_dir_all(&partial).map_err(|e| BenchError::input(&partial, e))?;
    }

    let failed = |doing: &str| {
        let doing = format!("{doing} {repository}");
        move |e: ApiError| BenchError::failed(doing, e)
    };
    let mut builder = ApiBuilder::from_env()
        .with_cache_dir(partial.clone())
        .with_retries(RETRIES)
        .with_progress(false);
    if let Some(endpoint) = endpoint {
        builder = builder.with_endpoint(endpoint.trim_end_matches('/').to_owned());
    }
    let api = builder.build().map_err(failed("asking for"))?;
    let api = api.model(repository.to_owned());
    let listed = api.info().map_err(|e| {
        let doing = format!("asking for {repository}");
        let by_hand = dir.display();
        let problem = format!("{e}; without a network its files can be put into {by_hand} by hand");
        BenchError::failed(doing, problem)
    })?;
    let there = |name: &str| listed.siblings.iter().any(|s| s.rfilename == name);
    // Nothing can go on from what was got of such a repository.
    let unusable = |problem: String| {
        fs::remove_dir_all(&partial).ok();
        fs::remove_dir(models.join(PARTIAL)).ok();
        BenchError::input(&dir, problem)
    };
    let has_no = |missing: &str| {
        Err(unusable(format!(
            "the repository {repository} has no {missing}"
        )))
    };
    let mut files = Vec::new();
    let mut get = |file: &str| {
        let path = api
            .get(file)
            .map_err(failed(&format!("getting {file} of")))?;
        let path = path
            .canonicalize()
            .map_err(|e| BenchError::input(&path, e))?;
        files.push((file.to_owned(), path.clone()));
        Ok::<_, BenchError>(path)
    };
    if !there(CONFIG) {
        return has_no(CONFIG);
    }
    get(CONFIG)?;
    // Where there are both, the one file is the whole model, as Hugging Face's own loader has it.
    if there(SINGLE) {
        get(SINGLE)?;
    } else if there(INDEX) {
        let index = get(INDEX)?;
        let shards = pretrained::shards(&index).map_err(|e| unusable(e.to_string()))?;
        if let Some(missing) = shards.keys().find(|shard| !there(shard)) {
            return has_no(missing);
        }
        for shard in shards.keys() {
            get(shard)?;
        }
    } else {
        return has_no(&format!("{SINGLE} and no {INDEX}"));
    }
    for file in ALSO.into_iter().filter(|name| there(name)) {
        get(file)?;
    }

    // Put together beside its place, looked at, and renamed: whatever is in its place is whole.
    fs::create_dir_all(&whole).map_err(|e| BenchError::input(&whole, e))?;
    for (file, from) in files {
        let to = whole.join(&file);
        fs::rename(&from, &to).map_err(|e| BenchError::input(&to, e))?;
    }
    let checked = data_check::model(&whole);
    if checked.is_ok() {
        fs::rename(&whole, &dir).map_err(|e| BenchError::input(&dir, e))?;
    }
    // What is left: pointers to files that are no longer there, or a damaged model, which must not be taken up again.
    fs::remove_dir_all(&partial).map_err(|e| BenchError::input(&partial, e))?;
    // Stays if another model is on its way.
    fs::remove_dir(models.join(PARTIAL)).ok();
    match checked {
        Ok(summary) => Ok(Fetched { dir, summary }),
        Err(problem) => Err(BenchError::input(&dir, format!("{repository}: {problem}"))),
    }
}

/// A repository's name becomes part of an address and of a path.
fn check_name(repository: &str) -> Result<(), BenchError> {
    let part = |p: &str| {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        !p.is_empty() && !p.starts_with('.') && p.chars().all(allowed)
    };
    let parts: Vec<&str> = repository.split('/').collect();
    if parts.len() == 2 && parts.into_iter().all(part) {
        return Ok(());
    }
    let known: Vec<&str> = KNOWN.iter().map(|(name, _)| *name).collect();
    Err(BenchError::Usage(format!(
        "`{repository}` is no model; give owner/name as on https://huggingface.co, or one of {}",
        known.join(", ")
    )))
}

//! Which data sets and models are there, which are missing and where to get them.
//!
//! Everything that a study can use is listed. What is there is read by the loaders that the studies use: every row of a
//! table, every image, every tensor of a model and its tokenizer. What is found is therefore what a study takes. A missing
//! item is no failure, since no study needs them all; an unreadable one is, and so is a given directory that does not exist.

mod datasets;
mod models;

#[cfg(feature = "hub")]
pub(crate) use models::inspect as model;

use std::{
    fmt, fs,
    path::{Path, PathBuf},
};

use crate::{BenchError, cli::directory, text::regular};

/// What was found of one item.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Status {
    /// Readable; a few words on what it holds.
    Found(String),
    /// Not there.
    Missing,
    /// There but not usable: what is wrong.
    Broken(String),
}

/// One data set, part of one, or model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// What it is called: `glue/RTE`.
    pub name: String,
    /// Where it was looked for, when a directory was given.
    pub path: Option<PathBuf>,
    /// What was found.
    pub status: Status,
}

/// Items that come from one source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// Title.
    pub title: &'static str,
    /// The layout expected.
    pub layout: &'static str,
    /// Where to get it.
    pub source: &'static str,
    /// The items.
    pub items: Vec<Item>,
}

/// Everything that was looked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataReport {
    /// The data directory.
    pub data: Option<PathBuf>,
    /// The models directory.
    pub models: Option<PathBuf>,
    /// Groups in a fixed order.
    pub groups: Vec<Group>,
}

/// Looks at the directories given, else at $MASS_DATA_DIR and $MASS_MODELS_DIR; with neither, everything is missing.
///
/// # Errors
/// [`BenchError::Usage`] when a directory that was given, by flag or variable, does not exist.
pub fn check(data: Option<&Path>, models: Option<&Path>) -> Result<DataReport, BenchError> {
    let data = directory("--data", data, "MASS_DATA_DIR")?;
    let models = directory("--models", models, "MASS_MODELS_DIR")?;
    let mut groups = datasets::groups(data.as_deref());
    groups.push(models::group(models.as_deref()));
    Ok(DataReport {
        data,
        models,
        groups,
    })
}

impl DataReport {
    fn broken(&self) -> Vec<&Item> {
        let items = self.groups.iter().flat_map(|g| &g.items);
        items
            .filter(|i| matches!(i.status, Status::Broken(_)))
            .collect()
    }

    /// Fails when something that is there cannot be used.
    ///
    /// # Errors
    /// [`BenchError::Usage`] naming the items.
    pub fn verdict(&self) -> Result<(), BenchError> {
        let broken = self.broken();
        if broken.is_empty() {
            return Ok(());
        }
        let names: Vec<&str> = broken.iter().map(|i| i.name.as_str()).collect();
        Err(BenchError::Usage(format!(
            "not usable: {}; get them again as listed above",
            names.join(", ")
        )))
    }
}

impl fmt::Display for DataReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (flag, variable, dir) in [
            ("--data", "MASS_DATA_DIR", &self.data),
            ("--models", "MASS_MODELS_DIR", &self.models),
        ] {
            match dir {
                Some(dir) => writeln!(f, "{flag}: {}", dir.display())?,
                None => writeln!(f, "{flag}: not given, and ${variable} is not set")?,
            }
        }
        let (mut found, mut missing) = (0, 0);
        for group in &self.groups {
            writeln!(f, "\n{}", group.title)?;
            for item in &group.items {
                let (word, detail) = match &item.status {
                    Status::Found(what) => {
                        found += 1;
                        ("found", what.clone())
                    }
                    Status::Missing => {
                        missing += 1;
                        let path = item.path.as_ref();
                        (
                            "missing",
                            path.map_or_else(String::new, |p| p.display().to_string()),
                        )
                    }
                    Status::Broken(why) => ("BROKEN", why.clone()),
                };
                writeln!(
                    f,
                    "{}",
                    format!("  {word:<8} {:<26} {detail}", item.name).trim_end()
                )?;
            }
            let complete = |i: &Item| matches!(i.status, Status::Found(_));
            if !group.items.iter().all(complete) {
                writeln!(
                    f,
                    "  layout:  {}\n  source:  {}",
                    group.layout, group.source
                )?;
            }
        }
        let broken = self.broken().len();
        writeln!(f, "\n{found} found, {missing} missing, {broken} broken")
    }
}

/// Runs `look` on `path`: missing when it is not there, broken with the reason `look` gives.
fn item(
    name: impl Into<String>,
    path: Option<PathBuf>,
    look: impl FnOnce(&Path) -> Result<String, String>,
) -> Item {
    let status = match &path {
        Some(path) if path.exists() => look(path).map_or_else(Status::Broken, Status::Found),
        _ => Status::Missing,
    };
    Item {
        name: name.into(),
        path,
        status,
    }
}

/// A file's text; an empty or missing file is said to be so.
fn text(path: &Path) -> Result<String, String> {
    let show = path.display();
    let bytes = regular(path).map_err(|e| format!("{show}: {e}"))?;
    let text = String::from_utf8(bytes).map_err(|e| format!("{show}: {e}"))?;
    if text.trim().is_empty() {
        return Err(format!("{show}: the file is empty"));
    }
    Ok(text)
}

/// A file's JSON.
fn json(path: &Path) -> Result<serde_json::Value, String> {
    serde_json::from_str(&text(path)?).map_err(|e| format!("{}: not JSON: {e}", path.display()))
}

/// Names of the files in a directory that end in one of `endings`, sorted.
fn files(dir: &Path, endings: &[&str]) -> Result<Vec<PathBuf>, String> {
    let entries = fs::read_dir(dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    let mut files: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            let name = path.to_string_lossy().to_lowercase();
            endings.iter().any(|ending| name.ends_with(ending)) && path.is_file()
        })
        .collect();
    files.sort();
    Ok(files)
}

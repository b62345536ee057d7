use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::{Group, files, item, json, text};
use crate::dg::folder::{ImageFolder, find_set, images};
use crate::dg::images::LeftOut;
use crate::dg::reported::SETS;
use crate::dg::{DgError, decode};
use crate::glue::data::Dataset;
use crate::glue::task::Task;

const PACS_DOMAINS: [&str; 4] = ["art_painting", "cartoon", "photo", "sketch"];
const PACS_CLASSES: [&str; 7] = [
    "dog", "elephant", "giraffe", "guitar", "horse", "house", "person",
];

pub(super) fn groups(data: Option<&Path>) -> Vec<Group> {
    let under = |name: &str| data.map(|dir| dir.join(name));
    let set = |name: &str| data.map(|dir| find_set(dir, name).unwrap_or_else(|| dir.join(name)));
    let glue = Task::ALL
        .into_iter()
        .map(|task| {
            let name = format!("glue/{task}");
            let path = under(&name);
            item(name, path, |_| {
                glue_task(data.unwrap_or(Path::new("")), task)
            })
        })
        .collect();
    let pacs = PACS_DOMAINS
        .iter()
        .map(|domain| {
            let pacs = set("pacs").map(|dir| dir.join(domain));
            item(format!("pacs/{domain}"), pacs, pacs_domain)
        })
        .collect();
    let others = SETS.into_iter().filter(|name| *name != "pacs");
    let others = others
        .map(|name| item(name, set(name), image_set))
        .collect();
    vec![
        Group {
            title: "GLUE (study glue)",
            layout: "DATA/glue/<Task>/{train,dev}.tsv, tab-separated, as distributed (MNLI: dev_matched.tsv and dev_mismatched.tsv)",
            source: "https://gluebenchmark.com/tasks",
            items: glue,
        },
        Group {
            title: "PACS (study dg)",
            layout: "DATA/pacs/<domain>/<class>/*.jpg, DomainBed's",
            source: "https://github.com/facebookresearch/DomainBed (python -m domainbed.scripts.download)",
            items: pacs,
        },
        Group {
            title: "More of DomainBed (study dg, preset paper; any set in this layout by --task)",
            layout: "DATA/<set>/<domain>/<class>/*.jpg, DomainBed's",
            source: "https://github.com/facebookresearch/DomainBed (python -m domainbed.scripts.download)",
            items: others,
        },
        Group {
            title: "Turing Change Point Dataset (detector tests)",
            layout: "DATA/tcpd/series/<name>.csv with columns t and one of values; annotations.json; published_default_{f1,cover}.tsv",
            source: "https://github.com/alan-turing-institute/TCPD",
            items: vec![item("tcpd", under("tcpd"), tcpd)],
        },
        Group {
            title: "Numenta Anomaly Benchmark (detector tests)",
            layout: "DATA/nab/realKnownCause/*.csv with columns timestamp,value; windows.json",
            source: "https://github.com/numenta/NAB (data/realKnownCause, labels/combined_windows.json)",
            items: vec![item("nab", under("nab"), nab)],
        },
        Group {
            title: "Gradient norms of MoE training (detector tests)",
            layout: "DATA/gradient_norms/*.csv with columns step,norm_0,..,cosine_0,..",
            source: "not published; any training loop can write such columns",
            items: vec![item(
                "gradient_norms",
                under("gradient_norms"),
                gradient_norms,
            )],
        },
    ]
}

/// As the study reads it.
fn glue_task(data: &Path, task: Task) -> Result<String, String> {
    let read = Dataset::read(data, task).map_err(|e| e.to_string())?;
    let mut counts = vec![format!("train.tsv {}", read.train.len())];
    counts.extend(
        read.dev
            .iter()
            .map(|(name, rows)| format!("{name}.tsv {}", rows.len())),
    );
    let mut said = format!("rows: {}", counts.join(", "));
    if !read.skipped.is_empty() {
        said += &format!("; broken lines left out: {}", read.skipped.len());
    }
    Ok(said)
}

fn pacs_domain(dir: &Path) -> Result<String, String> {
    let mut counts = Vec::new();
    let mut files = Vec::new();
    for class in PACS_CLASSES {
        // As the study lists them.
        let found = images(&dir.join(class), &mut Vec::new()).map_err(|e| e.to_string())?;
        if found.is_empty() {
            return Err(format!("{}: no images", dir.join(class).display()));
        }
        counts.push(format!("{class} {}", found.len()));
        files.extend(found);
    }
    all_decode(&files)?;
    Ok(format!("images: {}", counts.join(", ")))
}

/// A whole set in DomainBed's layout.
fn image_set(dir: &Path) -> Result<String, String> {
    let found = ImageFolder::open(dir).map_err(|e| e.to_string())?;
    let (domains, classes) = (found.domains.len(), found.classes.len());
    let files: Vec<PathBuf> = found.files.into_iter().map(|f| f.path).collect();
    all_decode(&files)?;
    let images = files.len();
    Ok(format!(
        "{domains} domains, {classes} classes, {images} images"
    ))
}

/// Decodes every image, as the study does; all that cannot be are named together.
fn all_decode(files: &[PathBuf]) -> Result<(), String> {
    let problem = |path: &PathBuf| {
        let problem = match decode::read_square(path, 1).err()? {
            DgError::Image { problem, .. } => problem,
            DgError::Io { source, .. } => source.to_string(),
            other => other.to_string(),
        };
        let path = path.clone();
        Some(LeftOut { path, problem })
    };
    let problems = files.par_iter().filter_map(problem);
    match DgError::of_images(problems.collect()) {
        Some(error) => Err(error.to_string()),
        None => Ok(()),
    }
}

fn tcpd(dir: &Path) -> Result<String, String> {
    let annotations = json(&dir.join("annotations.json"))?;
    let is_header = |header: &str| header.starts_with("t,");
    let series = csv_files(&dir.join("series"), is_header, "t,<value>")?;
    for file in &series {
        let name = file.file_stem().unwrap_or_default().to_string_lossy();
        if annotations.get(name.as_ref()).is_none() {
            return Err(format!("annotations.json has no entry for {name}"));
        }
    }
    for name in ["published_default_f1.tsv", "published_default_cover.tsv"] {
        text(&dir.join(name))?;
    }
    Ok(format!("{} annotated series", series.len()))
}

fn nab(dir: &Path) -> Result<String, String> {
    json(&dir.join("windows.json"))?;
    let is_header = |header: &str| header == "timestamp,value";
    let series = csv_files(&dir.join("realKnownCause"), is_header, "timestamp,value")?;
    Ok(format!("{} series", series.len()))
}

fn gradient_norms(dir: &Path) -> Result<String, String> {
    let is_header = |header: &str| header.starts_with("step,") && header.contains(",norm_0");
    let series = csv_files(dir, is_header, "step,norm_0,..")?;
    Ok(format!("{} runs", series.len()))
}

/// The CSV files of a directory, at least one, each with the header expected and a row.
fn csv_files(
    dir: &Path,
    is_header: impl Fn(&str) -> bool,
    expected: &str,
) -> Result<Vec<PathBuf>, String> {
    let series = files(dir, &[".csv"])?;
    if series.is_empty() {
        return Err(format!("{}: no .csv files", dir.display()));
    }
    for file in &series {
        let text = text(file)?;
        let mut lines = text.lines();
        if !lines.next().is_some_and(|h| is_header(h.trim())) {
            return Err(format!("{}: the header is not {expected}", file.display()));
        }
        if lines.next().is_none() {
            return Err(format!("{}: a header and no rows", file.display()));
        }
    }
    Ok(series)
}

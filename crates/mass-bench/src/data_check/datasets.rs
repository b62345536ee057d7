use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

use super::{Group, files, item, json, text};
use crate::dg::decode;
use crate::dg::folder::{ImageFolder, find_set, images};
use crate::dg::reported::SETS;

/// A GLUE task: its development files and the columns that are used.
struct Task {
    name: &'static str,
    dev: &'static [&'static str],
    columns: &'static [&'static str],
}

/// The official layout. CoLA alone has no header line.
const GLUE: [Task; 9] = [
    Task {
        name: "CoLA",
        dev: &["dev.tsv"],
        columns: &[],
    },
    Task {
        name: "SST-2",
        dev: &["dev.tsv"],
        columns: &["sentence", "label"],
    },
    Task {
        name: "MRPC",
        dev: &["dev.tsv"],
        columns: &["Quality", "#1 String", "#2 String"],
    },
    Task {
        name: "STS-B",
        dev: &["dev.tsv"],
        columns: &["sentence1", "sentence2", "score"],
    },
    Task {
        name: "QQP",
        dev: &["dev.tsv"],
        columns: &["question1", "question2", "is_duplicate"],
    },
    Task {
        name: "MNLI",
        dev: &["dev_matched.tsv", "dev_mismatched.tsv"],
        columns: &["sentence1", "sentence2", "gold_label"],
    },
    Task {
        name: "QNLI",
        dev: &["dev.tsv"],
        columns: &["question", "sentence", "label"],
    },
    Task {
        name: "RTE",
        dev: &["dev.tsv"],
        columns: &["sentence1", "sentence2", "label"],
    },
    Task {
        name: "WNLI",
        dev: &["dev.tsv"],
        columns: &["sentence1", "sentence2", "label"],
    },
];

const PACS_DOMAINS: [&str; 4] = ["art_painting", "cartoon", "photo", "sketch"];
const PACS_CLASSES: [&str; 7] = [
    "dog", "elephant", "giraffe", "guitar", "horse", "house", "person",
];

pub(super) fn groups(data: Option<&Path>) -> Vec<Group> {
    let under = |name: &str| data.map(|dir| dir.join(name));
    let set = |name: &str| data.map(|dir| find_set(dir, name).unwrap_or_else(|| dir.join(name)));
    let glue = GLUE
        .iter()
        .map(|task| {
            let name = format!("glue/{}", task.name);
            let path = under(&name);
            item(name, path, |dir| glue_task(dir, task))
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

fn glue_task(dir: &Path, task: &Task) -> Result<String, String> {
    let mut counts = Vec::new();
    for file in ["train.tsv"].iter().chain(task.dev) {
        let path = dir.join(file);
        let rows = if task.columns.is_empty() {
            cola_rows(&path)?
        } else {
            tsv_rows(&path, task.columns)?
        };
        counts.push(format!("{file} {rows}"));
    }
    Ok(format!("rows: {}", counts.join(", ")))
}

/// Rows of a table with a header, whose columns must include `columns`.
fn tsv_rows(path: &Path, columns: &[&str]) -> Result<usize, String> {
    let text = text(path)?;
    let mut lines = text.lines();
    let header = lines.next().unwrap_or_default();
    // MRPC is distributed with a byte-order mark.
    let header: Vec<&str> = header.trim_start_matches('\u{feff}').split('\t').collect();
    for column in columns {
        if !header.contains(column) {
            return Err(format!(
                "{}: no column `{column}` in the header",
                path.display()
            ));
        }
    }
    rows(path, lines, header.len())
}

/// CoLA: source, label, original mark, sentence.
fn cola_rows(path: &Path) -> Result<usize, String> {
    let text = text(path)?;
    let label = text.lines().next().and_then(|line| line.split('\t').nth(1));
    if !matches!(label, Some("0" | "1")) {
        return Err(format!(
            "{}: the second column of line 1 is no label 0 or 1",
            path.display()
        ));
    }
    rows(path, text.lines(), 4)
}

/// Counts rows. A few official rows have stray columns, so only short ones are wrong.
fn rows<'a>(
    path: &Path,
    lines: impl Iterator<Item = &'a str>,
    columns: usize,
) -> Result<usize, String> {
    let mut count = 0;
    for line in lines {
        count += 1;
        // QQP has broken lines; a file of another kind has nothing else.
        if count <= 20 && line.split('\t').count() < columns {
            return Err(format!(
                "{}: row {count} has {} of {columns} columns",
                path.display(),
                line.split('\t').count()
            ));
        }
    }
    if count == 0 {
        return Err(format!("{}: a header and no rows", path.display()));
    }
    Ok(count)
}

fn pacs_domain(dir: &Path) -> Result<String, String> {
    let mut counts = Vec::new();
    for class in PACS_CLASSES {
        // As the study lists them.
        let images = images(&dir.join(class), &mut Vec::new()).map_err(|e| e.to_string())?;
        if images.is_empty() {
            return Err(format!("{}: no images", dir.join(class).display()));
        }
        for image in &images {
            check_image(image)?;
        }
        counts.push(format!("{class} {}", images.len()));
    }
    Ok(format!("images: {}", counts.join(", ")))
}

/// A whole set in DomainBed's layout.
fn image_set(dir: &Path) -> Result<String, String> {
    let found = ImageFolder::open(dir).map_err(|e| e.to_string())?;
    let (domains, classes) = (found.domains.len(), found.classes.len());
    for file in &found.files {
        check_image(&file.path)?;
    }
    let images = found.files.len();
    Ok(format!(
        "{domains} domains, {classes} classes, {images} images"
    ))
}

/// Whether the first bytes are those of a format that is read.
fn check_image(path: &Path) -> Result<(), String> {
    let mut magic = Vec::new();
    File::open(path)
        .and_then(|file| file.take(16).read_to_end(&mut magic))
        .map_err(|e| format!("{}: {e}", path.display()))?;
    decode::format(&magic).map_err(|e| format!("{}: {e}", path.display()))?;
    Ok(())
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

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::durable;

use super::growth::drawn;
use super::html::write_reports;
use super::lock;
use super::store::{
    LINES, check_owner, io_error, is_interrupted, lines_of, merged, old_settings, pretty,
    read_results, write_atomically,
};
use super::{MetricLine, Part, ReportError, Results, Run};

/// What a directory of results holds.
struct Kept {
    dir: PathBuf,
    results: Results,
    settings: Value,
    /// Lines of metrics.jsonl and of events.jsonl by the name of their run.
    lines: [HashMap<String, Vec<String>>; 2],
}

impl Kept {
    fn read(dir: &Path) -> Result<Self, ReportError> {
        let path = dir.join("results.json");
        if !path.is_file() {
            let problem = "there is no results.json; give directories that a study has written";
            return Err(refuse(dir, problem));
        }
        let results = read_results(&path)?;
        let settings = old_settings(dir)?;
        let mut lines = [HashMap::new(), HashMap::new()];
        for (name, by_run) in LINES.iter().zip(&mut lines) {
            for line in lines_of(&dir.join(name))? {
                // What is not readable is left out, as when a study is gone on with.
                let value = serde_json::from_str::<Value>(&line).unwrap_or_default();
                if let Some(run) = value["run"].as_str() {
                    let lines: &mut Vec<String> = by_run.entry(run.to_owned()).or_default();
                    lines.push(line);
                }
            }
        }
        Ok(Self {
            dir: dir.to_owned(),
            results,
            settings,
            lines,
        })
    }

    fn runs(&self) -> impl Iterator<Item = (&Self, &Run)> {
        self.results.runs.iter().map(move |run| (self, run))
    }
}

/// Makes the results of a study of those in several directories, its shards, and writes them to `out` with a report; of one
/// directory, makes summary and report anew. Without `out` one directory is written to itself, and several to
/// target/reproduce/STUDY/PRESET. Returns the results and where they are.
///
/// Shards of one split are laid together as the whole study would have made them. A run that two directories have alike is there
/// once. As long as runs of the split study are missing the results say which part they are.
///
/// # Errors
/// [`ReportError::Join`] for directories of different studies, settings, data or splits, with different runs of one name, or if `out` has
/// runs that none of them has; [`ReportError::Malformed`] and [`ReportError::Io`] for what is not readable.
pub fn join(dirs: &[PathBuf], out: Option<&Path>) -> Result<(Results, PathBuf), ReportError> {
    let kept = dirs.iter().map(|dir| Kept::read(dir));
    let kept = kept.collect::<Result<Vec<_>, _>>()?;
    let Some(first) = kept.first() else {
        return Err(refuse(Path::new(""), "there is nothing to join"));
    };
    let split = split(&kept)?;
    let out = match (out, dirs) {
        (Some(out), _) => out.to_owned(),
        (None, [one]) => one.clone(),
        (None, _) => {
            let of = &first.results;
            Path::new("target/reproduce")
                .join(&of.study)
                .join(&of.preset)
        }
    };
    let mut settings = first.settings.clone();
    for other in &kept[1..] {
        let (a, b) = (&first.results, &other.results);
        if (&a.study, &a.preset) != (&b.study, &b.preset) {
            let (study, preset) = (&b.study, &b.preset);
            return Err(refuse(
                &other.dir,
                &format!(
                    "is of {study}, preset {preset}; {} is of {}, preset {}",
                    first.dir.display(),
                    a.study,
                    a.preset
                ),
            ));
        }
        let both = merged(settings, other.settings.clone());
        settings = both.map_err(|what| {
            let first = first.dir.display();
            refuse(&other.dir, &format!("differs from {first} in {what}"))
        })?;
    }
    let mut results = Results {
        runs: Vec::new(),
        part: None,
        ..first.results.clone()
    };
    let mut texts = [String::new(), String::new()];
    let mut told = [HashSet::new(), HashSet::new()];
    let mut order: Vec<(&Kept, &Run)> = kept.iter().flat_map(Kept::runs).collect();
    if let Some(split) = &split {
        let names = split.plan.iter().map(String::as_str);
        let places: HashMap<&str, usize> = names.zip(0..).collect();
        let place = |run: &Run| places.get(run.key().to_string().as_str()).copied();
        order.sort_by_cached_key(|(_, run)| place(run).unwrap_or(places.len()));
    }
    for (from, run) in order {
        let key = run.key();
        let mut run = run.clone();
        let made_on = run
            .machine
            .take()
            .unwrap_or_else(|| from.results.machine.clone());
        run.machine = (made_on != results.machine).then_some(made_on);
        match results.runs.iter().find(|r| r.key() == key) {
            Some(same) if *same == run => {}
            Some(_) => {
                let problem = format!("has another run {key} than a directory before it");
                return Err(refuse(&from.dir, &problem));
            }
            None => results.runs.push(run),
        }
        // Of the first directory that has any: one whose joining was cut short has the run and not its lines.
        for ((text, lines), told) in texts.iter_mut().zip(&from.lines).zip(&mut told) {
            let lines = lines.get(&key.to_string());
            for line in lines
                .filter(|_| told.insert(key.to_string()))
                .into_iter()
                .flatten()
            {
                text.push_str(line);
                text.push('\n');
            }
        }
    }
    // Whole once every run is there, from wherever.
    let made: HashSet<String> = results.runs.iter().map(|r| r.key().to_string()).collect();
    results.part = split.filter(|split| !split.plan.iter().all(|name| made.contains(name)));
    results.summarise();
    write(&kept, &out, &results, &settings, texts)?;
    Ok((results, out))
}

/// Which shards some directories are together; `None` if none of them is one.
fn split(kept: &[Kept]) -> Result<Option<Part>, ReportError> {
    let parts = |k: &Kept| k.results.part.clone().map(|part| (k.dir.clone(), part));
    let mut parts = kept.iter().filter_map(parts);
    let Some((first, mut all)) = parts.next() else {
        return Ok(None);
    };
    for (dir, part) in parts {
        if !all.of_one_split(&part) {
            let problem = format!(
                "is {part} of other runs or of another split than {}",
                first.display()
            );
            return Err(refuse(&dir, &problem));
        }
        all.shards.extend(part.shards);
    }
    all.shards.sort_unstable();
    all.shards.dedup();
    Ok(Some(all))
}

fn write(
    kept: &[Kept],
    out: &Path,
    results: &Results,
    settings: &Value,
    texts: [String; 2],
) -> Result<(), ReportError> {
    check_owner(out)?;
    let there = out.join("results.json");
    nothing_is_lost(out, results)?;
    fs::create_dir_all(out).map_err(|source| ReportError::Out {
        path: out.to_owned(),
        source,
    })?;
    // A directory has several paths.
    let place = |dir: &Path| fs::canonicalize(dir).map_err(|e| io_error(dir, e));
    let own = place(out)?;
    let mut others = Vec::new();
    for from in kept {
        let dir = place(&from.dir)?;
        if own.starts_with(dir.join("patches")) {
            return Err(refuse(
                out,
                "is within the pictures that would be copied there; give another --out",
            ));
        }
        if dir != own {
            others.push(&from.dir);
        }
    }
    if others.len() == kept.len() && is_interrupted(out) {
        let problem = "holds the checkpoint of a run that was interrupted; give another --out";
        return Err(refuse(out, problem));
    }
    let _lock = lock::take(out)?;
    // What a process has finished there meanwhile is not in what was read.
    nothing_is_lost(out, results)?;
    let metrics = texts[0].lines().flat_map(serde_json::from_str);
    let metrics: Vec<MetricLine> = metrics.collect();
    write_atomically(&there, &pretty(results))?;
    write_atomically(&out.join("settings.json"), &pretty(settings))?;
    // Of one directory they are what they were.
    if !others.is_empty() {
        for (name, text) in LINES.iter().zip(&texts) {
            write_atomically(&out.join(name), text)?;
        }
        for from in others {
            copy(&from.join("patches"), &out.join("patches"))?;
        }
    }
    write_reports(out, results, &metrics, &drawn(texts[1].lines()))
}

/// Refuses a directory that has runs which are not among these.
fn nothing_is_lost(out: &Path, results: &Results) -> Result<(), ReportError> {
    let there = out.join("results.json");
    if !there.exists() {
        return Ok(());
    }
    let made = |run: &Run| Run {
        machine: None,
        ..run.clone()
    };
    let joined = |run: &Run| results.runs.iter().any(|r| made(r) == made(run));
    let old = read_results(&there)?;
    match old.runs.iter().find(|run| !joined(run)) {
        Some(lost) => {
            let lost = lost.key();
            let problem = format!("has a run {lost} that would be lost; give another --out");
            Err(refuse(out, &problem))
        }
        None => Ok(()),
    }
}

/// Copies a directory, if it is there. A file may be its own copy by another name, so that none is emptied before it is read.
fn copy(from: &Path, to: &Path) -> Result<(), ReportError> {
    if !from.is_dir() {
        return Ok(());
    }
    fs::create_dir_all(to).map_err(|e| io_error(to, e))?;
    let entries = fs::read_dir(from).and_then(Iterator::collect);
    let entries: Vec<fs::DirEntry> = entries.map_err(|e| io_error(from, e))?;
    for entry in entries {
        let path = entry.path();
        let new = to.join(path.file_name().unwrap_or_default());
        // A link to a folder may lead in a circle, and a device has no end.
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            copy(&path, &new)?;
        } else if path.is_file() {
            let fill = |file: &mut File| io::copy(&mut File::open(&path)?, file).map(drop);
            durable::write(&new, fill).map_err(|e| io_error(&path, e))?;
        } else {
            return Err(refuse(&path, "is neither a file nor a folder; remove it"));
        }
    }
    Ok(())
}

fn refuse(path: &Path, problem: &str) -> ReportError {
    ReportError::Join {
        path: path.to_owned(),
        problem: problem.to_owned(),
    }
}

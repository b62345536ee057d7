use std::{
    collections::HashSet,
    fs::{self, File, OpenOptions},
    io::{self, BufWriter, Write},
    path::{Component, Path, PathBuf},
};

use mass_model::checkpoint;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use crate::durable;

use super::growth::drawn;
use super::html::write_reports;
use super::lock;
use super::machine::CPU;
use super::{EventLine, Header, MetricLine, ReportError, Results, Run, RunKey};

/// What becomes of an output directory that holds finished runs, or checkpoints of runs under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Existing {
    /// It is refused: they may be the work of hours.
    #[default]
    Refuse,
    /// They are kept, and what is missing is added: `--resume`.
    Resume,
    /// They are deleted: `--fresh`.
    Replace,
}

/// The files of lines.
pub(super) const LINES: [&str; 2] = ["metrics.jsonl", "events.jsonl"];

/// The output directory of one study.
///
/// metrics.jsonl and events.jsonl are appended to; [`ResultStore::flush`] pushes what is buffered to
/// disk, which [`ResultStore::push`] does by itself and a checkpoint should do first.
#[derive(Debug)]
pub struct ResultStore {
    dir: PathBuf,
    results: Results,
    /// None of a process that leaves the writing to another.
    files: Option<[BufWriter<File>; 2]>,
    /// Whether lines of an earlier process may be there.
    resumed: bool,
    /// Keeps other processes out of the directory.
    _lock: Option<File>,
}

impl ResultStore {
    /// Opens `dir`, creating it where needed.
    ///
    /// Finished runs and checkpoints are refused, read back or deleted, as `existing` says; a directory without either begins
    /// anew, and one that has names of a study's files and no results of a study is somebody else's, and refused. Finished
    /// runs are read back provided that they were made by the same study and preset with the same `settings`: everything
    /// that changes a run's figures. What only adds runs, such as the number of seeds, does not belong there. Settings are
    /// kept beside the results in settings.json.
    ///
    /// `settings["data"]`, if it is there, says by task what the runs were made from, and `settings["methods"]` by name what they
    /// compare: names may be added, and the ones that both have must agree.
    ///
    /// # Errors
    /// [`ReportError`].
    pub fn open(
        dir: &Path,
        header: Header,
        settings: &impl Serialize,
        existing: Existing,
    ) -> Result<Self, ReportError> {
        Self::check(dir, header.clone(), settings, existing)?;
        durable::create_dir_all(dir).map_err(|source| ReportError::Out {
            path: dir.to_owned(),
            source,
        })?;
        let lock = lock::take(dir)?;
        // As it is now that nobody else writes.
        let (results, settings) = prior(dir, header, settings, existing)?;
        let resume = existing == Existing::Resume;
        // Kept on a resume even without finished runs: the first one may have been interrupted.
        if !resume {
            for stale in [
                "report.html",
                "frontier.svg",
                "metrics.jsonl",
                "events.jsonl",
            ] {
                remove_if_there(&dir.join(stale))?;
            }
            // A later --resume must not go on from checkpoints of what is replaced now.
            for stale in ["checkpoints", "patches"].map(|name| dir.join(name)) {
                if stale.is_dir() {
                    fs::remove_dir_all(&stale).map_err(|e| io_error(&stale, e))?;
                }
            }
        }
        // Results first, by which the directory is known to be ours, and old ones never stand beside new settings.
        write_atomically(&dir.join("results.json"), &pretty(&results))?;
        write_atomically(&dir.join("settings.json"), &pretty(&settings))?;
        Ok(Self {
            files: Some(append_to(dir)?),
            dir: dir.to_owned(),
            results,
            resumed: resume,
            _lock: lock,
        })
    }

    /// The store of a process that leaves the writing to another.
    pub(super) fn follower(dir: &Path, results: Results) -> Self {
        Self {
            dir: dir.to_owned(),
            results,
            files: None,
            resumed: false,
            _lock: None,
        }
    }

    /// Whether [`open`](Self::open) would take the directory, as far as can be told without writing to it: a study asks before it
    /// spends time on its data.
    ///
    /// # Errors
    /// As there.
    pub fn check(
        dir: &Path,
        header: Header,
        settings: &impl Serialize,
        existing: Existing,
    ) -> Result<(), ReportError> {
        lock::check(dir)?;
        prior(dir, header, settings, existing).map(drop)
    }

    /// Refuses a directory that another process writes to, and one in which an earlier command has left something that `existing`
    /// does not say what to do with.
    ///
    /// # Errors
    /// [`ReportError::InUse`], [`ReportError::Kept`].
    pub fn check_kept(dir: &Path, existing: Existing) -> Result<(), ReportError> {
        lock::check(dir)?;
        Self::kept(dir, existing)
    }

    fn kept(dir: &Path, existing: Existing) -> Result<(), ReportError> {
        if existing != Existing::Refuse {
            return Ok(());
        }
        let results = fs::read_to_string(dir.join("results.json")).ok();
        let results = results.and_then(|text| serde_json::from_str::<Value>(&text).ok());
        let runs = results.and_then(|r| r["runs"].as_array().map(Vec::len));
        let what = match runs {
            // Somebody else's: told apart when the directory is opened.
            None => return Ok(()),
            Some(0) if !is_interrupted(dir) => return Ok(()),
            Some(0) => "the checkpoint of a run that was interrupted".to_owned(),
            Some(1) => "a finished run".to_owned(),
            Some(runs) => format!("{runs} finished runs"),
        };
        Err(ReportError::Kept {
            path: dir.to_owned(),
            what,
        })
    }

    /// The directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Everything finished so far.
    #[must_use]
    pub fn results(&self) -> &Results {
        &self.results
    }

    /// Gives the results up.
    #[must_use]
    pub fn into_results(self) -> Results {
        self.results
    }

    /// The finished run with this key, if there is one: `--resume` skips it.
    #[must_use]
    pub fn finished(&self, key: &RunKey) -> Option<&Run> {
        self.results.runs.iter().find(|run| run.key() == *key)
    }

    /// Adds a finished run and rewrites results.json and report.html.
    ///
    /// Figures that are not finite become null, each with an event `non_finite`; their names are
    /// returned so that the caller can say so.
    ///
    /// # Errors
    /// [`ReportError::Duplicate`] when the run is there already; [`ReportError::Io`].
    pub fn push(&mut self, mut run: Run) -> Result<Vec<&'static str>, ReportError> {
        let key = run.key();
        if self.finished(&key).is_some() {
            return Err(ReportError::Duplicate(key.to_string()));
        }
        let dropped = run.drop_non_finite();
        for name in &dropped {
            let line =
                serde_json::json!({ "step": run.steps, "kind": "non_finite", "figure": name });
            self.event(&key.to_string(), &line)?;
        }
        self.results.push(run);
        self.flush()?;
        if self.files.is_some() {
            self.write_results()?;
            self.write_report()?;
        }
        Ok(dropped)
    }

    /// Appends a line to metrics.jsonl.
    ///
    /// # Errors
    /// [`ReportError::Io`].
    pub fn metric(&mut self, line: &MetricLine) -> Result<(), ReportError> {
        self.line(0, line)
    }

    /// Appends a line to events.jsonl.
    ///
    /// # Errors
    /// [`ReportError::Io`].
    pub fn event(&mut self, run: &str, event: &impl Serialize) -> Result<(), ReportError> {
        let run = run.to_owned();
        self.line(1, &EventLine { run, event })
    }

    fn line(&mut self, which: usize, line: &impl Serialize) -> Result<(), ReportError> {
        let Some(files) = &mut self.files else {
            return Ok(());
        };
        append(&mut files[which], line).map_err(|e| io_error(&self.dir.join(LINES[which]), e))
    }

    /// Pushes buffered lines to disk.
    ///
    /// # Errors
    /// [`ReportError::Io`].
    pub fn flush(&mut self) -> Result<(), ReportError> {
        for (file, name) in self.files.iter_mut().flatten().zip(LINES) {
            let flushed = file.flush();
            flushed.map_err(|e| io_error(&self.dir.join(name), e))?;
        }
        Ok(())
    }

    /// Drops the lines of a run from `step` on, before it is done again from there: 0 for a run that
    /// starts anew, the checkpoint's step for one that continues. A half-written last line goes too.
    ///
    /// # Errors
    /// [`ReportError::Io`].
    pub fn rewind(&mut self, key: &RunKey, step: u64) -> Result<(), ReportError> {
        self.flush()?;
        let run = key.to_string();
        let keep = |value: &Value| {
            value["run"].as_str() != Some(&run) || value["step"].as_u64().is_some_and(|s| s < step)
        };
        if self.files.is_some() {
            for name in LINES {
                filter_lines(&self.dir.join(name), keep)?;
            }
            self.files = Some(append_to(&self.dir)?);
        }
        Ok(())
    }

    /// Adds a finished run with all its lines, in place of those that it left if a crash ended it between them and its results.
    ///
    /// # Errors
    /// As [`push`](Self::push).
    pub fn keep(
        &mut self,
        run: Run,
        metrics: &[MetricLine],
        events: &[impl Serialize],
    ) -> Result<(), ReportError> {
        let key = run.key();
        if self.resumed {
            self.rewind(&key, 0)?;
        }
        for line in metrics {
            self.metric(line)?;
        }
        let key = key.to_string();
        for event in events {
            self.event(&key, event)?;
        }
        self.push(run).map(drop)
    }

    /// Every metric line written so far; unreadable lines are left out.
    ///
    /// # Errors
    /// [`ReportError::Io`].
    pub fn metrics(&self) -> Result<Vec<MetricLine>, ReportError> {
        Ok(lines_of(&self.dir.join("metrics.jsonl"))?
            .iter()
            .flat_map(|line| serde_json::from_str(line))
            .collect())
    }

    fn write_results(&self) -> Result<(), ReportError> {
        write_atomically(&self.dir.join("results.json"), &pretty(&self.results))
    }

    fn write_report(&self) -> Result<(), ReportError> {
        let events = lines_of(&self.dir.join("events.jsonl"))?;
        let events = drawn(events.iter().map(String::as_str));
        write_reports(&self.dir, &self.results, &self.metrics()?, &events)
    }
}

/// Whether a directory holds a checkpoint of a run under way.
pub(super) fn is_interrupted(dir: &Path) -> bool {
    let entries = fs::read_dir(dir.join("checkpoints"));
    let mut entries = entries.into_iter().flatten().flatten();
    // A first one that could not be written leaves an empty folder.
    entries.any(|run| !checkpoint::steps(&run.path()).is_empty())
}

/// What an output directory holds that is kept, and the settings as they are going to be.
fn prior(
    dir: &Path,
    header: Header,
    settings: &impl Serialize,
    existing: Existing,
) -> Result<(Results, Value), ReportError> {
    // Through text, as the stored ones went: only what JSON keeps can differ.
    let settings = serde_json::to_string(settings).and_then(|text| serde_json::from_str(&text));
    let mut settings: Value = settings.map_err(|e| ReportError::Malformed {
        path: dir.to_owned(),
        problem: format!("settings: {e}"),
    })?;
    let device = header.machine.device.as_str();
    if let Some(settings) = settings.as_object_mut().filter(|_| device != CPU) {
        settings.insert("devices".into(), [device].into());
    }
    let mut results = Results::new(header);
    let results_path = dir.join("results.json");
    if !(existing == Existing::Resume && results_path.exists()) {
        check_owner(dir)?;
        ResultStore::kept(dir, existing)?;
        return Ok((results, settings));
    }
    let old = read_results(&results_path)?;
    if old.runs.is_empty() && !dir.join("checkpoints").is_dir() {
        // Nothing that could be mixed with anything.
        return Ok((results, settings));
    }
    let differs = |what: String| ReportError::OtherSettings {
        path: dir.to_owned(),
        what,
    };
    if old.study != results.study {
        return Err(differs(format!("study ({})", old.study)));
    }
    if old.preset != results.preset {
        return Err(differs(format!("preset ({})", old.preset)));
    }
    // Without --shard all that is missing is made.
    if let Some(new) = &results.part {
        match &old.part {
            None => return Err(differs("shard (all runs)".into())),
            Some(old) if old.shards != new.shards || old.of != new.of => {
                return Err(differs(format!("shard ({old})")));
            }
            // Another list of runs is dealt out otherwise, and what other shards have made would be made here again.
            Some(old) if !old.of_one_split(new) => {
                let (had, has) = (old.plan.len(), new.plan.len());
                return Err(differs(format!(
                    "the runs that were split ({had} of them, {has} now)"
                )));
            }
            Some(_) => {}
        }
    }
    settings = merged(old_settings(dir)?, settings).map_err(differs)?;
    for mut run in old.runs {
        let made_on = run.machine.take().unwrap_or_else(|| old.machine.clone());
        run.machine = (made_on != results.machine).then_some(made_on);
        results.push(run);
    }
    Ok((results, settings))
}

/// Names that a study gives to what it writes.
const OWN: [&str; 8] = [
    "results.json",
    "settings.json",
    "metrics.jsonl",
    "events.jsonl",
    "report.html",
    "frontier.svg",
    "checkpoints",
    "patches",
];

/// Refuses a directory in which something would be replaced that no study has written: `--out` may name anything.
pub(super) fn check_owner(dir: &Path) -> Result<(), ReportError> {
    match read_json::<Value>(&dir.join("results.json")) {
        Ok(r) if r["study"].is_string() && r["runs"].is_array() => return Ok(()),
        // Cut short, by the settings beside it.
        Err(damaged @ ReportError::Malformed { .. }) if dir.join("settings.json").exists() => {
            return Err(damaged);
        }
        _ => {}
    }
    match OWN
        .map(|name| dir.join(name))
        .into_iter()
        .find(|path| path.exists())
    {
        Some(path) => Err(ReportError::Foreign { path }),
        None => Ok(()),
    }
}

/// The settings of an earlier run.
pub(super) fn old_settings(dir: &Path) -> Result<Value, ReportError> {
    let path = dir.join("settings.json");
    if path.exists() {
        return read_json(&path);
    }
    Err(ReportError::Malformed {
        path,
        problem: "it is missing".into(),
    })
}

/// Settings of both: what they say of data, methods, their rules and tasks is by name, and names may be added; the ones that both have, and all
/// else but the devices, must agree.
///
/// # Errors
/// What differs.
pub(super) fn merged(mut old: Value, mut new: Value) -> Result<Value, String> {
    let by_name = ["data", "methods", "rules", "tasks"];
    let take = |settings: &mut Value, what| {
        let parts = settings.as_object_mut().and_then(|s| s.remove(what));
        let parts = parts.and_then(|p| p.as_object().cloned());
        parts.unwrap_or_default()
    };
    let parts = by_name.map(|what| (what, take(&mut old, what), take(&mut new, what)));
    // A run may go on elsewhere; both are kept.
    let (of_old, of_new) = (taken_devices(&mut old), taken_devices(&mut new));
    let mut devices: Vec<Value> = Vec::new();
    for device in of_old.into_iter().chain(of_new) {
        if !devices.contains(&device) {
            devices.push(device);
        }
    }
    if old != new {
        return Err(format!("setting ({})", first_difference(&old, &new)));
    }
    for (what, mut all, more) in parts {
        let differs = |name: &&String| all.get(*name).is_some_and(|old| *old != more[*name]);
        if let Some(name) = more.keys().find(differs) {
            return Err(format!("{what} ({name} has changed)"));
        }
        all.extend(more);
        if !all.is_empty() {
            new[what] = Value::Object(all);
        }
    }
    if devices != [CPU] {
        new["devices"] = devices.into();
    }
    Ok(new)
}

/// Takes out what settings say of devices: nothing where the processor alone has computed.
fn taken_devices(settings: &mut Value) -> Vec<Value> {
    let devices = settings.as_object_mut().and_then(|s| s.remove("devices"));
    let devices = devices.and_then(|d| d.as_array().cloned());
    devices.unwrap_or_else(|| vec![CPU.into()])
}

/// Indented JSON with a newline at the end.
pub(crate) fn pretty(value: &(impl Serialize + ?Sized)) -> String {
    let mut text = serde_json::to_string_pretty(value).expect("plain structs serialise");
    text.push('\n');
    text
}

/// Writes to a temporary name beside `path`, syncs, renames: never half a file.
pub(super) fn write_atomically(path: &Path, text: &str) -> Result<(), ReportError> {
    let fill = |file: &mut File| file.write_all(text.as_bytes());
    durable::write(path, fill).map_err(|e| io_error(path, e))
}

/// The lines of a file; none of one that is not there.
pub(super) fn lines_of(path: &Path) -> Result<Vec<String>, ReportError> {
    match fs::read(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        read => {
            // A line that is damaged is whoever reads it's to pass over.
            let text = read.map_err(|e| io_error(path, e))?;
            let text = String::from_utf8_lossy(&text);
            Ok(text.lines().map(str::to_owned).collect())
        }
    }
}

/// The files of lines in a directory.
fn append_to(dir: &Path) -> Result<[BufWriter<File>; 2], ReportError> {
    let open = |name| {
        let path = dir.join(name);
        let file = OpenOptions::new().create(true).append(true).open(&path);
        file.map(BufWriter::new).map_err(|e| io_error(&path, e))
    };
    let [metrics, events] = LINES;
    Ok([open(metrics)?, open(events)?])
}

fn append(file: &mut impl Write, line: &impl Serialize) -> io::Result<()> {
    // At once: of one that cannot be written nothing is.
    let mut text = serde_json::to_vec(line)?;
    text.push(b'\n');
    file.write_all(&text)
}

/// A file of these lines, in place of what it was.
pub(crate) fn write_lines(path: &Path, lines: &[impl Serialize]) -> io::Result<()> {
    durable::write(path, |file| {
        let mut out = BufWriter::new(file);
        lines.iter().try_for_each(|line| append(&mut out, line))?;
        out.flush()
    })
}

fn filter_lines(path: &Path, keep: impl Fn(&Value) -> bool) -> Result<(), ReportError> {
    let mut kept = String::new();
    for line in lines_of(path)? {
        if serde_json::from_str(&line).is_ok_and(|value| keep(&value)) {
            kept.push_str(&line);
            kept.push('\n');
        }
    }
    write_atomically(path, &kept)
}

/// Whether a word is the plain name of a folder, and no path.
pub(crate) fn is_name(word: &str) -> bool {
    let first = Path::new(word).components().next();
    matches!(first, Some(Component::Normal(name)) if name == word)
}

/// The results of a study, if they can be what one has written.
pub(super) fn read_results(path: &Path) -> Result<Results, ReportError> {
    let results: Results = read_json(path)?;
    let problem = |problem: String| ReportError::Malformed {
        path: path.to_owned(),
        problem,
    };
    if let Some(part) = &results.part
        && !(part.shards.iter().all(|i| (1..=part.of).contains(i)) && part.of > 0)
    {
        return Err(problem(format!("there is no {part}")));
    }
    // A report is written to the directory of these names.
    if let Some(word) = [&results.study, &results.preset]
        .into_iter()
        .find(|w| !is_name(w))
    {
        return Err(problem(format!(
            "`{word}` is no name of a study or a preset"
        )));
    }
    let mut seen = HashSet::new();
    match results.runs.iter().find(|run| !seen.insert(run.key())) {
        Some(twice) => Err(problem(format!("run {} is there twice", twice.key()))),
        None => Ok(results),
    }
}

pub(super) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, ReportError> {
    let text = fs::read(path).map_err(|e| io_error(path, e))?;
    serde_json::from_slice(&text).map_err(|e| ReportError::Malformed {
        path: path.to_owned(),
        problem: e.to_string(),
    })
}

fn remove_if_there(path: &Path) -> Result<(), ReportError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(io_error(path, e)),
        _ => Ok(()),
    }
}

pub(super) fn io_error(path: &Path, source: io::Error) -> ReportError {
    ReportError::Io {
        path: path.to_owned(),
        source,
    }
}

/// Where two values first differ, and how, for the message.
fn first_difference(old: &Value, new: &Value) -> String {
    fn find(path: &str, old: Option<&Value>, new: Option<&Value>) -> Option<String> {
        if old == new {
            return None;
        }
        if let (Some(Value::Object(a)), Some(Value::Object(b))) = (old, new) {
            let below = |key: &String| match path {
                "" => key.clone(),
                _ => format!("{path}.{key}"),
            };
            let mut keys = a.keys().chain(b.keys());
            return keys.find_map(|key| find(&below(key), a.get(key), b.get(key)));
        }
        let show = |value: Option<&Value>| value.map_or("absent".to_owned(), Value::to_string);
        Some(format!("{path} was {}, now {}", show(old), show(new)))
    }
    find("", Some(old), Some(new)).unwrap_or_default()
}

//! GLUE files as distributed: tab-separated, no quoting (sentences hold single quote marks), one example a line.

use std::path::{Path, PathBuf};

use ndarray_rand::rand::Rng as _;
use ndarray_rand::rand::seq::SliceRandom as _;

use super::error::{GlueError, LineProblem};
use super::task::{Labels, Layout, Target, Task};
use crate::rng::{Purpose, stream};
use crate::text::regular;

/// One example.
#[derive(Debug, Clone, PartialEq)]
pub struct Example {
    /// The sentence, or the first of two.
    pub first: String,
    /// The second.
    pub second: Option<String>,
    /// Its label.
    pub target: Target,
}

/// A task's examples.
#[derive(Debug, Clone, PartialEq)]
pub struct Dataset {
    /// Which task.
    pub task: Task,
    /// Training examples, in the order of the file.
    pub train: Vec<Example>,
    /// Development examples by file name without `.tsv`; the first one's score counts.
    pub dev: Vec<(String, Vec<Example>)>,
    /// Broken lines left out, in the one task whose files have some.
    pub skipped: Vec<Skipped>,
}

/// A line that was left out.
#[derive(Debug, Clone, PartialEq)]
pub struct Skipped {
    /// Which file.
    pub path: PathBuf,
    /// Counted from 1.
    pub line: usize,
    /// What is wrong with it.
    pub problem: LineProblem,
}

/// Of the broken lines of a file that may have some, at most one in so many is left out: more is another format.
const LINES_FOR_ONE_BROKEN: usize = 1000;

impl Dataset {
    /// The files that [`read`](Self::read) reads: the training set, then the development sets.
    #[must_use]
    pub fn files(data: &Path, task: Task) -> Vec<PathBuf> {
        let dir = data.join("glue").join(task.name());
        let names = ["train.tsv"]
            .into_iter()
            .chain(task.dev_files().iter().copied());
        names.map(|name| dir.join(name)).collect()
    }

    /// Whether they are there, without reading them.
    ///
    /// # Errors
    /// [`GlueError::Io`] for the first that is not.
    pub fn there(data: &Path, task: Task) -> Result<(), GlueError> {
        match Self::files(data, task).into_iter().find(|f| !f.is_file()) {
            Some(path) => Err(GlueError::Io {
                path,
                source: std::io::Error::new(std::io::ErrorKind::NotFound, "no such file"),
            }),
            None => Ok(()),
        }
    }

    /// Reads `data/glue/<Task>/`.
    ///
    /// Lines of QQP with another number of columns than the header are left out and listed: the file as distributed has a
    /// score of records broken over several lines. Every other deviation is an error.
    ///
    /// # Errors
    /// [`GlueError`], naming file and line.
    pub fn read(data: &Path, task: Task) -> Result<Self, GlueError> {
        let dir = data.join("glue").join(task.name());
        let mut skipped = Vec::new();
        let train = read(&dir.join("train.tsv"), task, &mut skipped)?;
        let mut dev = Vec::new();
        for name in task.dev_files() {
            let examples = read(&dir.join(name), task, &mut skipped)?;
            dev.push((name.trim_end_matches(".tsv").to_owned(), examples));
        }
        Ok(Self {
            task,
            train,
            dev,
            skipped,
        })
    }

    /// Gives `percent` % of the training examples, rounded, another label than theirs: another class, each as likely, or a number
    /// drawn from the task's range. Which ones, and what they get, is the same for each `seed`; a larger share has the examples of
    /// a smaller one. Development sets stay as they are.
    ///
    /// # Errors
    /// [`GlueError::Share`] for more than 100 %.
    pub fn mislabel(&mut self, percent: u64, seed: u64) -> Result<(), GlueError> {
        if percent > 100 {
            return Err(GlueError::Share { percent });
        }
        let mut rng = stream(seed, Purpose::Noise, 0);
        let mut order: Vec<usize> = (0..self.train.len()).collect();
        order.shuffle(&mut rng);
        let wrong = (order.len() as u64 * percent + 50) / 100;
        for &i in &order[..wrong as usize] {
            let target = &mut self.train[i].target;
            *target = match (*target, self.task.labels()) {
                (Target::Class(class), Labels::Classes(classes)) => {
                    let other = rng.random_range(1..classes.len() as u32);
                    Target::Class((class + other) % classes.len() as u32)
                }
                (_, Labels::Score { low, high }) => Target::Value(rng.random_range(low..=high)),
                (target, _) => target,
            };
        }
        Ok(())
    }
}

fn read(path: &Path, task: Task, skipped: &mut Vec<Skipped>) -> Result<Vec<Example>, GlueError> {
    let bytes = regular(path).map_err(|source| GlueError::Io {
        path: path.to_owned(),
        source,
    })?;
    let (examples, broken) = parse(path, &bytes, task)?;
    skipped.extend(broken);
    Ok(examples)
}

/// The examples in the bytes of a file, and the broken lines left out; `path` is for messages.
///
/// ```
/// use mass_bench::glue::{data::parse, task::{Target, Task}};
/// let file = b"index\tsentence1\tsentence2\tlabel\n0\tIt \"rained.\tIt was wet.\tentailment\n";
/// let (examples, _) = parse("train.tsv".as_ref(), file, Task::Rte)?;
/// assert_eq!(examples[0].first, "It \"rained.");
/// assert_eq!(examples[0].target, Target::Class(0));
/// # Ok::<(), mass_bench::glue::GlueError>(())
/// ```
///
/// # Errors
/// As [`Dataset::read`].
pub fn parse(
    path: &Path,
    bytes: &[u8],
    task: Task,
) -> Result<(Vec<Example>, Vec<Skipped>), GlueError> {
    let text = utf8(path, bytes)?;
    // MRPC is distributed with a byte-order mark.
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let layout = task.layout();
    let mut lines = text.lines().enumerate().map(|(i, line)| (i + 1, line));
    let columns = match layout.columns {
        [] => {
            let (_, header) = lines.next().ok_or_else(|| GlueError::Empty {
                path: path.to_owned(),
            })?;
            header.split('\t').collect()
        }
        columns => columns.to_vec(),
    };
    let fail = |line, problem| GlueError::Line {
        path: path.to_owned(),
        line,
        problem,
    };
    let columns = Columns::find(&columns, &layout).map_err(|problem| fail(1, problem))?;

    let (mut examples, mut broken, mut count) = (Vec::new(), Vec::new(), 0);
    for (number, line) in lines {
        count += 1;
        match columns.example(line, task, &layout) {
            Ok(example) => examples.push(example),
            Err(problem @ LineProblem::Columns { .. }) if layout.broken_lines => {
                broken.push(Skipped {
                    path: path.to_owned(),
                    line: number,
                    problem,
                });
            }
            Err(problem) => return Err(fail(number, problem)),
        }
    }
    if let Some(first) = broken.first()
        && broken.len() * LINES_FOR_ONE_BROKEN > count
    {
        return Err(fail(first.line, first.problem.clone()));
    }
    if examples.is_empty() {
        return Err(GlueError::Empty {
            path: path.to_owned(),
        });
    }
    Ok((examples, broken))
}

fn utf8<'a>(path: &Path, bytes: &'a [u8]) -> Result<&'a str, GlueError> {
    std::str::from_utf8(bytes).map_err(|e| {
        let before = &bytes[..e.valid_up_to()];
        let start = before
            .iter()
            .rposition(|&b| b == b'\n')
            .map_or(0, |i| i + 1);
        GlueError::Line {
            path: path.to_owned(),
            line: before.iter().filter(|&&b| b == b'\n').count() + 1,
            problem: LineProblem::Utf8 {
                column: before.len() - start + 1,
            },
        }
    })
}

/// Positions of the columns that are used.
struct Columns {
    count: usize,
    first: usize,
    second: Option<usize>,
    label: usize,
}

impl Columns {
    fn find(columns: &[&str], layout: &Layout) -> Result<Self, LineProblem> {
        let at = |name: &'static str| {
            let mut found = columns.iter().enumerate().filter(|(_, c)| **c == name);
            match (found.next(), found.next()) {
                (None, _) => Err(LineProblem::Header(name)),
                (Some(_), Some(_)) => Err(LineProblem::Twice(name)),
                (Some((i, _)), None) => Ok(i),
            }
        };
        Ok(Self {
            count: columns.len(),
            first: at(layout.first)?,
            second: layout.second.map(at).transpose()?,
            label: at(layout.label)?,
        })
    }

    fn example(&self, line: &str, task: Task, layout: &Layout) -> Result<Example, LineProblem> {
        let fields: Vec<&str> = line.split('\t').collect();
        if fields.len() != self.count {
            return Err(LineProblem::Columns {
                expected: self.count,
                found: fields.len(),
            });
        }
        let text = |at: usize, name| {
            // QQP holds a few empty questions; elsewhere an empty sentence is a damaged line.
            if fields[at].trim().is_empty() && !layout.broken_lines {
                return Err(LineProblem::NoText(name));
            }
            Ok(fields[at].to_owned())
        };
        Ok(Example {
            first: text(self.first, layout.first)?,
            second: match (self.second, layout.second) {
                (Some(at), Some(name)) => Some(text(at, name)?),
                _ => None,
            },
            target: target(fields[self.label], task)?,
        })
    }
}

fn target(label: &str, task: Task) -> Result<Target, LineProblem> {
    if label.is_empty() {
        return Err(LineProblem::NoLabel);
    }
    match task.labels() {
        Labels::Classes(classes) => classes
            .iter()
            .position(|c| *c == label)
            .map(|c| Target::Class(c as u32))
            .ok_or_else(|| LineProblem::Label {
                found: label.to_owned(),
                known: classes.join(", "),
            }),
        Labels::Score { low, high } => label
            .parse()
            .ok()
            .filter(|score| (low..=high).contains(score))
            .map(Target::Value)
            .ok_or_else(|| LineProblem::Score {
                found: label.to_owned(),
                low,
                high,
            }),
    }
}

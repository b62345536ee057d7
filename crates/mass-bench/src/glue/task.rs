//! The nine tasks: where their files are, what their columns mean, and how they are scored.

use std::fmt;

use super::metrics::{self, MetricError};
use crate::task::largest;

/// A GLUE task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Task {
    /// Corpus of Linguistic Acceptability: is the sentence grammatical?
    Cola,
    /// Stanford Sentiment Treebank: is the review positive?
    Sst2,
    /// Microsoft Research Paraphrase Corpus.
    Mrpc,
    /// Semantic Textual Similarity: a score from 0 to 5.
    Stsb,
    /// Quora Question Pairs.
    Qqp,
    /// Multi-Genre Natural Language Inference.
    Mnli,
    /// Does the sentence answer the question?
    Qnli,
    /// Recognising Textual Entailment.
    Rte,
    /// Winograd Natural Language Inference.
    Wnli,
}

/// What a task's examples are labelled with.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Labels {
    /// One of these, numbered as listed (the order of Hugging Face's `glue` data set).
    Classes(&'static [&'static str]),
    /// A number in this range.
    Score {
        /// Least.
        low: f32,
        /// Greatest.
        high: f32,
    },
}

/// Columns of a file, by name in its header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Every column of a file without a header; none where the first line names them.
    pub columns: &'static [&'static str],
    /// The first sentence.
    pub first: &'static str,
    /// The second, for tasks on pairs.
    pub second: Option<&'static str>,
    /// The label.
    pub label: &'static str,
    /// Whether the files as distributed hold a few broken lines, which everyone leaves out.
    pub broken_lines: bool,
}

impl Task {
    /// All of them, in the order of the benchmark's table.
    pub const ALL: [Self; 9] = [
        Self::Cola,
        Self::Sst2,
        Self::Mrpc,
        Self::Stsb,
        Self::Qqp,
        Self::Mnli,
        Self::Qnli,
        Self::Rte,
        Self::Wnli,
    ];

    /// Their names, which are those of their folders.
    pub const NAMES: [&'static str; 9] = [
        "CoLA", "SST-2", "MRPC", "STS-B", "QQP", "MNLI", "QNLI", "RTE", "WNLI",
    ];

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        Self::NAMES[self as usize]
    }

    /// Its development files; the first one's score counts, the others' are reported beside it.
    #[must_use]
    pub fn dev_files(self) -> &'static [&'static str] {
        match self {
            Self::Mnli => &["dev_matched.tsv", "dev_mismatched.tsv"],
            _ => &["dev.tsv"],
        }
    }

    /// Its columns.
    #[must_use]
    pub fn layout(self) -> Layout {
        let pair = |first, second, label| Layout {
            columns: &[],
            first,
            second: Some(second),
            label,
            broken_lines: false,
        };
        match self {
            Self::Cola => Layout {
                columns: &["source", "label", "author_label", "sentence"],
                first: "sentence",
                second: None,
                label: "label",
                broken_lines: false,
            },
            Self::Sst2 => Layout {
                second: None,
                ..pair("sentence", "", "label")
            },
            Self::Mrpc => pair("#1 String", "#2 String", "Quality"),
            Self::Stsb => pair("sentence1", "sentence2", "score"),
            Self::Qqp => Layout {
                broken_lines: true,
                ..pair("question1", "question2", "is_duplicate")
            },
            Self::Mnli => pair("sentence1", "sentence2", "gold_label"),
            Self::Qnli => pair("question", "sentence", "label"),
            Self::Rte | Self::Wnli => pair("sentence1", "sentence2", "label"),
        }
    }

    /// Its labels.
    #[must_use]
    pub fn labels(self) -> Labels {
        match self {
            Self::Stsb => Labels::Score {
                low: 0.0,
                high: 5.0,
            },
            Self::Mnli => Labels::Classes(&["entailment", "neutral", "contradiction"]),
            Self::Qnli | Self::Rte => Labels::Classes(&["entailment", "not_entailment"]),
            _ => Labels::Classes(&["0", "1"]),
        }
    }

    /// Outputs that a classifier for this task has; one for a regression.
    #[must_use]
    pub fn outputs(self) -> usize {
        match self.labels() {
            Labels::Classes(classes) => classes.len(),
            Labels::Score { .. } => 1,
        }
    }

    /// The name of the headline metric.
    #[must_use]
    pub fn metric_name(self) -> &'static str {
        match self {
            Self::Cola => "matthews",
            Self::Mrpc | Self::Qqp => "f1",
            Self::Stsb => "pearson_spearman",
            _ => "accuracy",
        }
    }

    /// Scores the outputs of a classifier, `[examples, outputs]` row by row, against the labels.
    ///
    /// The class predicted is that of the largest output, ties to the lower class.
    ///
    /// # Errors
    /// [`MetricError`] for outputs that are not finite, of another number than the labels, or labels of the wrong kind.
    pub fn score(self, outputs: &[f32], targets: &[Target]) -> Result<Score, MetricError> {
        let width = self.outputs();
        if !outputs.len().is_multiple_of(width) {
            return Err(MetricError::Outputs {
                outputs: outputs.len(),
                labels: targets.len(),
                width,
            });
        }
        if outputs.len() != targets.len() * width {
            return Err(MetricError::Lengths {
                predictions: outputs.len() / width,
                labels: targets.len(),
            });
        }
        if let Some(index) = outputs.iter().position(|x| !x.is_finite()) {
            return Err(MetricError::NonFinite {
                what: "output",
                index: index / width,
            });
        }
        if self == Self::Stsb {
            let values = targets.iter().map(|t| match *t {
                Target::Value(v) => Ok(f64::from(v)),
                Target::Class(_) => Err(MetricError::Kind),
            });
            let gold = values.collect::<Result<Vec<f64>, _>>()?;
            let predicted: Vec<f64> = outputs.iter().map(|&x| f64::from(x)).collect();
            let pearson = metrics::pearson(&predicted, &gold)?;
            let spearman = metrics::spearman(&predicted, &gold)?;
            return Ok(Score {
                metric: (pearson + spearman) / 2.0,
                accuracy: None,
                parts: vec![("pearson", pearson), ("spearman", spearman)],
            });
        }
        let classes = targets.iter().map(|t| match *t {
            Target::Class(c) => Ok(c),
            Target::Value(_) => Err(MetricError::Kind),
        });
        let gold = classes.collect::<Result<Vec<u32>, _>>()?;
        let class = |row| largest(row) as u32;
        let predicted: Vec<u32> = outputs.chunks_exact(width).map(class).collect();
        let accuracy = metrics::accuracy(&predicted, &gold)?;
        let headline = match self {
            Self::Cola => Some(("matthews", metrics::matthews(&predicted, &gold)?)),
            Self::Mrpc | Self::Qqp => Some(("f1", metrics::f1(&predicted, &gold)?)),
            _ => None,
        };
        Ok(Score {
            metric: headline.map_or(accuracy, |(_, value)| value),
            accuracy: Some(accuracy),
            parts: headline
                .into_iter()
                .chain([("accuracy", accuracy)])
                .collect(),
        })
    }
}

/// The label of an example.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Target {
    /// Class, numbered as in [`Labels::Classes`].
    Class(u32),
    /// Score.
    Value(f32),
}

/// How well a task was solved.
#[derive(Debug, Clone, PartialEq)]
pub struct Score {
    /// The headline: [`Task::metric_name`]. NaN where it is undefined (a correlation with constant predictions).
    pub metric: f64,
    /// Accuracy, for classification.
    pub accuracy: Option<f64>,
    /// Every metric by name.
    pub parts: Vec<(&'static str, f64)>,
}

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

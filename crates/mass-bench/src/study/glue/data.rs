//! A task's examples as the model takes them.

use mass_model::bert::{Targets, TextBatch};

use crate::fnv::Fnv;
use crate::glue::GlueError;
use crate::glue::data::{Dataset, Example};
use crate::glue::task::{Target, Task};
use crate::glue::tokenize::{Encoded, TextTokenizer};

/// Of the training examples, one in so many is held out as a probe for methods that need one ...
const PROBE_EVERY: usize = 20;
/// ... and at most so many.
const PROBE_MOST: usize = 256;

/// Tokenised examples with their labels.
#[derive(Debug, Clone, Default)]
pub(super) struct Examples {
    encoded: Vec<Encoded>,
    targets: Vec<Target>,
    lengths: Vec<usize>,
}

impl Examples {
    fn new(tokenizer: &TextTokenizer, examples: &[Example]) -> Result<Self, GlueError> {
        Ok(Self::from_encoded(
            tokenizer.encode_all(examples)?,
            examples.iter().map(|e| e.target).collect(),
        ))
    }

    fn from_encoded(encoded: Vec<Encoded>, targets: Vec<Target>) -> Self {
        Self {
            lengths: encoded.iter().map(|e| e.ids.len()).collect(),
            encoded,
            targets,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.encoded.len()
    }

    /// Tokens of each example.
    pub(super) fn lengths(&self) -> &[usize] {
        &self.lengths
    }

    pub(super) fn targets(&self) -> &[Target] {
        &self.targets
    }

    /// Some of the examples laid end to end, with their labels.
    pub(super) fn batch(&self, which: &[usize]) -> (TextBatch, Labelled) {
        let (mut ids, mut types, mut offsets) = (Vec::new(), Vec::new(), vec![0]);
        for &i in which {
            ids.extend(&self.encoded[i].ids);
            types.extend(&self.encoded[i].types);
            offsets.push(ids.len());
        }
        let batch = TextBatch::packed(ids, types, offsets);
        (batch, Labelled::of(which.iter().map(|&i| self.targets[i])))
    }

    fn digest(&self, digest: &mut Fnv) {
        digest.eat(&(self.len() as u64).to_le_bytes());
        for (encoded, target) in self.encoded.iter().zip(&self.targets) {
            digest.eat(&(encoded.ids.len() as u64).to_le_bytes());
            for id in encoded.ids.iter().chain(&encoded.types) {
                digest.eat(&id.to_le_bytes());
            }
            match target {
                Target::Class(class) => digest.eat(&class.to_le_bytes()),
                Target::Value(value) => digest.eat(&value.to_le_bytes()),
            }
        }
    }

    /// All but a probe, and the probe: every twentieth example, at most 256.
    pub(super) fn hold_out(&self) -> (Self, Self) {
        let held = |i: usize| i.is_multiple_of(PROBE_EVERY) && i / PROBE_EVERY < PROBE_MOST;
        let part = |wanted: bool| {
            let of = (0..self.len()).filter(|&i| held(i) == wanted);
            let (encoded, targets) = of
                .map(|i| (self.encoded[i].clone(), self.targets[i]))
                .unzip();
            Self::from_encoded(encoded, targets)
        };
        (part(false), part(true))
    }
}

/// The labels of a batch, owned.
#[derive(Debug, Clone)]
pub enum Labelled {
    Classes(Vec<u32>),
    Values(Vec<f32>),
}

impl Labelled {
    /// A data set's labels are all of one kind, which its reader sees to.
    fn of(targets: impl Iterator<Item = Target>) -> Self {
        let (mut classes, mut values) = (Vec::new(), Vec::new());
        for target in targets {
            match target {
                Target::Class(c) => classes.push(c),
                Target::Value(v) => values.push(v),
            }
        }
        if values.is_empty() {
            Self::Classes(classes)
        } else {
            Self::Values(values)
        }
    }

    pub(super) fn targets(&self) -> Targets<'_> {
        match self {
            Self::Classes(c) => Targets::Classes(c),
            Self::Values(v) => Targets::Values(v),
        }
    }
}

/// A task, ready to be trained on.
#[derive(Debug, Clone)]
pub struct TaskData {
    pub(super) task: Task,
    pub(super) train: Examples,
    /// The training examples without the probe, and the probe.
    pub(super) held_out: (Examples, Examples),
    /// By file; the first one's score counts.
    pub(super) dev: Vec<(String, Examples)>,
    /// Of all tokens and labels: other data have another.
    pub(super) digest: u64,
}

impl TaskData {
    pub(super) fn new(tokenizer: &TextTokenizer, data: &Dataset) -> Result<Self, GlueError> {
        let train = Examples::new(tokenizer, &data.train)?;
        let dev = data.dev.iter();
        let dev = dev
            .map(|(name, examples)| Ok((name.clone(), Examples::new(tokenizer, examples)?)))
            .collect::<Result<Vec<_>, GlueError>>()?;
        let mut digest = Fnv::default();
        train.digest(&mut digest);
        dev.iter()
            .for_each(|(_, examples)| examples.digest(&mut digest));
        Ok(Self {
            task: data.task,
            held_out: train.hold_out(),
            train,
            dev,
            digest: digest.0,
        })
    }
}

impl Labelled {
    /// Sum of the losses of logits `[examples, outputs]`: cross-entropy in nats, or squared error.
    pub(super) fn loss(&self, logits: &[f32], outputs: usize) -> f64 {
        let rows = logits.chunks_exact(outputs);
        match self {
            Self::Classes(classes) => rows
                .zip(classes)
                .map(|(row, &c)| {
                    let most = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    let sum: f64 = row.iter().map(|&x| f64::from(x - most).exp()).sum();
                    sum.ln() - f64::from(row[c as usize] - most)
                })
                .sum(),
            Self::Values(values) => rows
                .zip(values)
                .map(|(row, &v)| f64::from(row[0] - v).powi(2))
                .sum(),
        }
    }
}

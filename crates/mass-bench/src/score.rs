//! A text scored by a byte-level language model that `train` has left.

use std::fmt;
use std::path::{Path, PathBuf};

use mass_model::checkpoint;
use mass_model::lm::LanguageModel;
use serde::Serialize;
use serde::de::IgnoredAny;

use crate::BenchError;
use crate::cli::ScoreArgs;
use crate::language::judge;
use crate::report::Run;
use crate::text::{VOCAB, bits_per_byte, read, windows};

/// Windows side by side, which keep the kernels busy.
const ROWS: usize = 16;

/// What a model makes of a text.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Score {
    /// Mean loss of a byte, in bits.
    pub bits_per_byte: f64,
    /// Bytes that were predicted.
    pub bytes: usize,
    /// Bytes at the end that fill no window.
    pub left_out: usize,
    /// Active experts a token, mean of the layers.
    pub experts_per_token: f64,
}

impl fmt::Display for Score {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            bits_per_byte,
            bytes,
            left_out,
            experts_per_token,
        } = self;
        write!(
            f,
            "{bits_per_byte:.4} bits per byte over {bytes} bytes, {experts_per_token:.2} experts a token"
        )?;
        match left_out {
            0 => Ok(()),
            n => write!(
                f,
                "; bytes left out at the end, as they fill no window: {n}"
            ),
        }
    }
}

/// Scores the text in windows of the model's length, each from an empty context.
///
/// # Errors
/// [`BenchError::Input`] for a directory without a checkpoint or with several runs, a model that is not of bytes, and a text
/// shorter than a window; [`BenchError::Usage`] for a checkpoint that is damaged; [`BenchError::Text`] for a file that is no
/// text.
pub fn run(args: &ScoreArgs) -> Result<Score, BenchError> {
    let model = load(&args.checkpoint)?;
    let (vocab, length) = (model.config().vocab, model.config().max_seq);
    if vocab != VOCAB {
        let what = format!("a model of {vocab} tokens; only one of bytes reads a text");
        return Err(BenchError::input(&args.checkpoint, what));
    }
    let text = read(&args.text)?;
    if text.len() <= length {
        let what = format!(
            "{} bytes are too few: the model reads {length} at a time, and one more is its last target",
            text.len()
        );
        return Err(BenchError::input(&args.text, what));
    }
    let place = args.device.open()?;
    let mut run = Run::new("score", 0);
    let bytes = judge(
        &place,
        &model,
        &mut run,
        windows(&text, ROWS, length),
        |_, _| Ok(()),
    )?;
    let (Some(nats), Some(experts_per_token)) = (run.test_loss, run.active_per_token) else {
        unreachable!("`judge` writes both");
    };
    Ok(Score {
        bits_per_byte: bits_per_byte(nats),
        bytes,
        left_out: text.len() - 1 - bytes,
        experts_per_token,
    })
}

/// The model of one checkpoint, of a run's newest, or of the only run's below what `train` had as `--out`.
fn load(dir: &Path) -> Result<LanguageModel, BenchError> {
    let damaged = |e: mass_model::ModelError| BenchError::Usage(e.to_string());
    if checkpoint::exists(dir) {
        return checkpoint::load_model(dir).map_err(damaged);
    }
    if dir.join("state.json").is_file() {
        let read = checkpoint::load_step::<LanguageModel, IgnoredAny>(dir);
        return read.map(|read| read.model).map_err(damaged);
    }
    let found = std::fs::read_dir(dir.join("checkpoints"));
    let found = found.into_iter().flatten().flatten();
    let mut runs: Vec<PathBuf> = found.map(|entry| entry.path()).collect();
    runs.retain(|run| checkpoint::exists(run));
    runs.sort();
    match runs.as_slice() {
        [run] => checkpoint::load_model(run).map_err(damaged),
        [] => Err(BenchError::input(
            dir,
            "no checkpoint; give what `train` had as --out, its checkpoints/RUN, or a step-N of that",
        )),
        several => {
            let names: Vec<_> = several
                .iter()
                .map(|run| run.display().to_string())
                .collect();
            Err(BenchError::input(
                dir,
                format!("several runs; give one of {}", names.join(", ")),
            ))
        }
    }
}

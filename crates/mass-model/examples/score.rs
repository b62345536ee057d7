//! Loads a trained byte-level model from its checkpoint alone and scores a text.
//!
//!     cargo xtask train --text FILE
//!     cargo run --release -p mass-model --example score -- target/train TEXT
//!
//! `target/train` is what `train` was given as `--out`. One run of several there is `target/train/checkpoints/RUN`, one checkpoint
//! of a run `target/train/checkpoints/RUN/step-N`.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use mass_model::lm::LanguageModel;
use mass_model::{checkpoint, release_scratch};
use serde::de::IgnoredAny;

fn main() -> ExitCode {
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [dir, text] = arguments.as_slice() else {
        eprintln!("usage: score CHECKPOINT_DIR TEXT_FILE");
        return ExitCode::from(2);
    };
    match load(dir).and_then(|model| score(&model, text)) {
        Ok(line) => {
            println!("{line}");
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("{e}");
            ExitCode::from(2)
        }
    }
}

/// The model of one checkpoint, of a run's newest, or of the only run's below an output directory.
fn load(dir: &Path) -> Result<LanguageModel, Box<dyn Error>> {
    if checkpoint::exists(dir) {
        return Ok(checkpoint::load_model(dir)?);
    }
    if dir.join("state.json").is_file() {
        let mut files = checkpoint::Files::new();
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            files.insert(name, fs::read(entry.path())?);
        }
        return match checkpoint::decode::<LanguageModel, IgnoredAny>(&files) {
            Ok(checkpoint) => Ok(checkpoint.model),
            Err(e) => Err(format!("{}: {e}", dir.display()).into()),
        };
    }
    let below = fs::read_dir(dir.join("checkpoints")).into_iter().flatten();
    let mut runs: Vec<PathBuf> = below.flatten().map(|entry| entry.path()).collect();
    runs.retain(|run| checkpoint::exists(run));
    runs.sort();
    match runs.as_slice() {
        [run] => Ok(checkpoint::load_model(run)?),
        [] => Err(format!(
            "{}: no checkpoint; give what `train` had as --out, its checkpoints/RUN, or a step-N of that",
            dir.display()
        )
        .into()),
        several => {
            let names: Vec<_> = several.iter().map(|run| run.display().to_string()).collect();
            Err(format!("several runs; give one of\n{}", names.join("\n")).into())
        }
    }
}

fn score(model: &LanguageModel, text: &Path) -> Result<String, Box<dyn Error>> {
    let of_text = |what: String| format!("{}: {what}", text.display());
    let bytes = fs::read(text).map_err(|e| of_text(e.to_string()))?;
    // `train` takes none with them either.
    if let Some(at) = bytes.iter().position(|&b| b == 0) {
        let what = format!("not a text file: a NUL byte at byte {at}; give plain text");
        return Err(of_text(what).into());
    }
    let tokens: Vec<u32> = bytes.iter().map(|&b| u32::from(b)).collect();
    let seq = model.config().max_seq;
    if tokens.len() <= seq {
        let what = format!(
            "{} bytes are too few: the model reads {seq} at a time, and one more is its last target",
            tokens.len()
        );
        return Err(of_text(what).into());
    }
    let (mut nats, mut count, mut active) = (0.0, 0, 0);
    // Windows side by side; sixteen at once keep the kernels busy.
    let windows = (tokens.len() - 1) / seq;
    for first in (0..windows).step_by(16) {
        let (from, to) = (first * seq, (first + 16).min(windows) * seq);
        let (nll, layers) = model.score(&tokens[from..to], &tokens[from + 1..=to], seq, None)?;
        nats += nll.iter().map(|&x| f64::from(x)).sum::<f64>();
        count += nll.len();
        active += layers
            .iter()
            .map(|l| l.plan.num_assignments())
            .sum::<usize>();
    }
    release_scratch();
    let bits = nats / count as f64 / std::f64::consts::LN_2;
    let experts = active as f64 / (count * model.config().layers) as f64;
    let rest = match tokens.len() - 1 - count {
        0 => String::new(),
        rest => format!("; bytes left out at the end, as they fill no window of {seq}: {rest}"),
    };
    Ok(format!(
        "{bits:.4} bits per byte over {count} bytes, {experts:.2} experts a token{rest}"
    ))
}

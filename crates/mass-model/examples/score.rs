//! Loads a trained byte-level model from its checkpoint directory alone and scores a text.
//!
//!     cargo xtask train --text FILE
//!     cargo run --release -p mass-model --example score -- target/train/checkpoints/RUN TEXT

use std::path::Path;
use std::process::ExitCode;

use mass_model::lm::LanguageModel;
use mass_model::{ModelError, checkpoint, release_scratch};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [dir, text] = arguments.as_slice() else {
        eprintln!("usage: score CHECKPOINT_DIR TEXT_FILE");
        return ExitCode::from(2);
    };
    match score(Path::new(dir), Path::new(text)) {
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

fn score(dir: &Path, text: &Path) -> Result<String, ModelError> {
    let model = checkpoint::load_model::<LanguageModel>(dir)?;
    let bytes = std::fs::read(text).map_err(|source| ModelError::Io {
        path: text.to_owned(),
        source,
    })?;
    let tokens: Vec<u32> = bytes.iter().map(|&b| u32::from(b)).collect();
    let seq = model.config().max_seq;
    if tokens.len() <= seq {
        let what = format!(
            "{}: {} bytes are too few, the model reads {seq} at a time",
            text.display(),
            tokens.len()
        );
        return Err(ModelError::Config(what));
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
    let (bits, layers) = (
        nats / count as f64 / std::f64::consts::LN_2,
        model.config().layers,
    );
    Ok(format!(
        "{bits:.4} bits per byte over {count} bytes, {:.2} experts a token",
        active as f64 / (count * layers) as f64
    ))
}

//! What is asked of the reader of checkpoints, whatever bytes it is given; shared by the libFuzzer target, the example
//! `fuzz_checkpoint` and a test.
//!
//! An input is one byte that says which file it stands for and whether the checksums are made to agree with it (else they
//! refuse nearly everything), then the file. The other files are those of a valid checkpoint.

use std::fmt::Write;

use mass_model::ModelError;
use mass_model::checkpoint::{self, Checkpoint, Files, Snapshot};
use mass_model::lm::{LanguageModel, LanguageModelConfig};
use mass_model::optim::{AdamW, AdamWConfig, Ema};
use mass_model::seeded_rng;
use ndarray_rand::rand::Rng;
use serde_json::{Value, json};

/// Marks an input whose checksums are to be right.
pub(crate) const SEALED: u8 = 0x80;

const SEALS: &str = "checksums";

/// A valid checkpoint, into which inputs are put one after the other.
pub(crate) struct Harness {
    files: Files,
    names: Vec<String>,
}

/// What became of an input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It was read.
    Read,
    /// It was refused by an error that names a file.
    Refused,
}

impl Harness {
    /// A model of two layers after one step, with a router that has a state, an optimiser and averages.
    pub(crate) fn new() -> Self {
        let router = json!({
            "router": "noisy", "std": 0.1, "seed": 3, "inner": { "router": "bias_balanced", "k": 1 },
        });
        let moe = json!({
            "dim": 2, "hidden": 2, "experts": 2, "activation": "gelu_erf", "router": router,
        });
        let config = json!({
            "vocab": 3, "max_seq": 2, "layers": 2, "embedding_std": 0.5,
            "block": { "heads": 1, "layer_norm_eps": 1e-5, "moe": moe },
        });
        let config: LanguageModelConfig =
            serde_json::from_value(config).expect("these are all fields");
        let made = || -> Result<Files, ModelError> {
            let mut model = LanguageModel::new(&config, &mut seeded_rng(0))?;
            let mut optimizer = AdamW::new(AdamWConfig::default().decaying_everything())?;
            let mut ema = Ema::new(0.9)?;
            let mut pass = model.train_pass(&[0, 1], &[1, 2], 2)?;
            optimizer.step(&mut model, &mut pass.gradients, 1e-2)?;
            ema.update(&model)?;
            checkpoint::encode(&Snapshot {
                step: 1,
                model: &model,
                optimizer: &optimizer,
                ema: Some(&ema),
                state: &json!({ "position": 17, "names": ["a", "b"] }),
            })
        };
        let files = made().expect("a valid model");
        let names = files.keys().cloned().collect();
        Self { files, names }
    }

    /// Names of the files, in the order of an input's first byte.
    pub(crate) fn names(&self) -> &[String] {
        &self.names
    }

    /// A file as it was written.
    pub(crate) fn file(&self, which: usize) -> &[u8] {
        &self.files[&self.names[which % self.names.len()]]
    }

    /// Puts an input in, reads the checkpoint and takes the input out again.
    ///
    /// # Panics
    /// If the reader does what it must not: an error that names no file, a change that the checksums should have
    /// found, a checkpoint that was read and cannot be written.
    pub(crate) fn run(&mut self, input: &[u8]) -> Outcome {
        let Some((&selector, bytes)) = input.split_first() else {
            return Outcome::Refused;
        };
        let which = usize::from(selector & !SEALED) % self.names.len();
        let name = self.names[which].clone();
        let original = self.files.insert(name.clone(), bytes.to_vec());
        let original = original.unwrap_or_default();
        let sealed = selector & SEALED != 0 && name != SEALS;
        let seals = sealed.then(|| {
            let seals = self.seals();
            self.files.insert(SEALS.into(), seals)
        });
        let read = checkpoint::decode::<LanguageModel, Value>(&self.files);
        if let Some(Some(before)) = seals {
            self.files.insert(SEALS.into(), before);
        }
        let unchanged = original == bytes;
        self.files.insert(name.clone(), original);
        match read {
            Ok(checkpoint) => {
                assert!(sealed || unchanged, "a change of {name} went unnoticed");
                use_it(&checkpoint);
                Outcome::Read
            }
            Err(ModelError::Checkpoint { path, why }) => {
                assert!(!unchanged, "a valid {name} was refused: {why}");
                assert!(self.files.contains_key(&*path.to_string_lossy()));
                Outcome::Refused
            }
            Err(other) => panic!("{name}: an error that names no file: {other}"),
        }
    }

    fn seals(&self) -> Vec<u8> {
        let mut text = String::new();
        // In the order in which they are written.
        for name in self.names.iter().filter(|n| *n != SEALS) {
            let bytes = &self.files[name];
            let crc = crc32fast::hash(bytes);
            writeln!(text, "{crc:08x} {} {name}", bytes.len()).expect("a string");
        }
        let (crc, len) = (crc32fast::hash(text.as_bytes()), text.len());
        writeln!(text, "{crc:08x} {len} {SEALS}").expect("a string");
        text.into_bytes()
    }
}

/// What was read can be used, in so far as its numbers allow, and written again.
fn use_it(checkpoint: &Checkpoint<LanguageModel, Value>) {
    let Checkpoint {
        model,
        optimizer,
        ema,
        step,
        state,
    } = checkpoint;
    let snapshot = Snapshot {
        step: *step,
        model,
        optimizer,
        ema: ema.as_ref(),
        state,
    };
    checkpoint::encode(&snapshot).expect("what was read can be written");
    // Weights may be NaN by now, which is an error or a result, but no panic.
    let _ = model.score(&[0], &[0], 1, None);
}

/// The input of a number: a file with random damage.
#[allow(dead_code, reason = "libFuzzer has inputs of its own")]
pub(crate) fn input(harness: &Harness, number: u64) -> Vec<u8> {
    let mut rng = seeded_rng(number);
    let rng = &mut rng;
    let files: Vec<&[u8]> = (0..harness.names().len())
        .map(|i| harness.file(i))
        .collect();
    let which = rng.random_range(0..files.len());
    let mut bytes = files[which].to_vec();
    // Three in four have checksums that agree.
    let sealed = rng.random_range(0..4) > 0;
    for _ in 0..rng.random_range(1..=4) {
        super::mutate::damage(&mut bytes, &files, rng);
    }
    let selector = which as u8 | if sealed { SEALED } else { 0 };
    bytes.insert(0, selector);
    bytes
}

//! The checkpoint of a run: written as it goes, read back only for a run with the same settings.

use std::path::Path;

use mass_model::checkpoint::{self, Checkpoint, Checkpointed, Snapshot};
use mass_model::optim::AdamW;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::BenchError;

/// What `dir` holds if `resume` is set and there is a checkpoint; `same` says whether it is of a run with these settings.
pub(crate) fn read<M: Checkpointed, S: DeserializeOwned>(
    dir: &Path,
    resume: bool,
    same: impl FnOnce(&S) -> bool,
) -> Result<Option<Checkpoint<M, S>>, BenchError> {
    if !resume || !checkpoint::exists(dir) {
        return Ok(None);
    }
    let input = |problem: String| BenchError::Input {
        path: dir.to_owned(),
        problem,
    };
    let read = checkpoint::load::<M, S>(dir).map_err(|e| input(e.to_string()))?;
    if !same(&read.state) {
        return Err(input(
            "the checkpoint is of a run with other settings or other data; give another --out, or --fresh, which deletes \
             everything in this one"
                .into(),
        ));
    }
    Ok(Some(read))
}

/// Saves where a run stands.
pub(crate) fn write<M: Checkpointed, S: Serialize>(
    dir: &Path,
    step: u64,
    model: &M,
    optimizer: &AdamW,
    state: &S,
) -> Result<(), BenchError> {
    let snapshot = Snapshot {
        step,
        model,
        optimizer,
        ema: None,
        state,
    };
    checkpoint::save(dir, &snapshot)
        .map(|_| ())
        .map_err(|e| BenchError::failed("saving a checkpoint", e))
}

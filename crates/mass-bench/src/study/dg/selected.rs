//! The model that the sources have chosen so far: only the last choice of a run is scored on the target.

use std::path::{Path, PathBuf};

use mass_model::checkpoint::{self, Snapshot};
use mass_model::optim::{AdamW, AdamWConfig};
use mass_model::vit::VitClassifier;

use crate::BenchError;

/// Folders of a run's checkpoint that hold such models begin with this; their step follows.
const FOLDER: &str = "selected-";

/// A model as it was at a step.
pub(super) struct Selected {
    step: u64,
    model: VitClassifier,
}

impl Selected {
    pub(super) fn new(step: u64, model: &VitClassifier) -> Self {
        let model = model.clone();
        Self { step, model }
    }

    pub(super) fn step(&self) -> u64 {
        self.step
    }

    pub(super) fn model(&self) -> &VitClassifier {
        &self.model
    }

    /// Adds it to the checkpoint of its run, unless it is there.
    pub(super) fn write(&self, run: &Path) -> Result<(), BenchError> {
        let dir = folder(run, self.step);
        if checkpoint::exists(&dir) {
            return Ok(());
        }
        // It is not trained any more: its optimiser has nothing to remember.
        let saved = AdamW::new(AdamWConfig::default()).and_then(|optimizer| {
            let snapshot = Snapshot::new(self.step, &self.model, &optimizer, &());
            checkpoint::save(&dir, &snapshot)
        });
        saved
            .map(drop)
            .map_err(|e| BenchError::failed("saving a checkpoint", e))
    }

    /// Reads it back.
    pub(super) fn read(run: &Path, step: u64) -> Result<Self, BenchError> {
        let dir = folder(run, step);
        let model = checkpoint::load_model(&dir).map_err(|e| BenchError::input(dir, e))?;
        Ok(Self { step, model })
    }

    /// Removes those of other steps.
    pub(super) fn remove_others(run: &Path, keep: Option<u64>) -> Result<(), BenchError> {
        let failed = |e| BenchError::failed("removing an older model", e);
        let keep = keep.map(|step| folder(run, step));
        for entry in std::fs::read_dir(run).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if name.starts_with(FOLDER) && Some(&path) != keep.as_ref() {
                std::fs::remove_dir_all(&path).map_err(failed)?;
            }
        }
        Ok(())
    }
}

fn folder(run: &Path, step: u64) -> PathBuf {
    run.join(format!("{FOLDER}{step}"))
}

//! What `state.json` holds, and what a pool of experts has to look like.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use mass_expand::ExpertId;
use mass_routing::AnyRouter;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::broken;
use crate::error::CheckpointError;
use crate::error::ModelError;
use crate::optim::{AdamWConfig, EmaConfig};

/// The configuration of the model and the caller's state are left as they are written: only those who know their types read them, so
/// that the rest is compiled once.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Manifest {
    pub(super) format: u64,
    pub(super) kind: String,
    pub(super) step: u64,
    pub(super) model: Box<RawValue>,
    pub(super) pools: Vec<Pool>,
    pub(super) optimizer: AdamWConfig,
    pub(super) parameter_steps: BTreeMap<String, u64>,
    pub(super) ema: Option<EmaConfig>,
    pub(super) state: Box<RawValue>,
}

/// What is looked at first: whether the rest is of any use.
#[derive(Deserialize)]
struct Head {
    format: u64,
    kind: Option<String>,
}

/// The experts of a mixture layer, in the order of its logits.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Pool {
    pub(super) experts: Vec<ExpertId>,
    pub(super) next_id: u32,
    pub(super) logit_offsets: Vec<f32>,
    pub(super) router: AnyRouter,
}

/// The format alone; `None` if there is none to be read.
pub(super) fn format_of(json: &[u8]) -> Option<u64> {
    serde_json::from_slice::<Head>(json).ok().map(|h| h.format)
}

/// JSON of a value.
pub(super) fn raw<T: Serialize + ?Sized>(value: &T) -> Result<Box<RawValue>, ModelError> {
    serde_json::value::to_raw_value(value).map_err(|e| json_error(Path::new(super::STATE), &e))
}

/// The value of a part of what was read from `path`.
pub(super) fn value<T: DeserializeOwned>(path: &Path, raw: &RawValue) -> Result<T, ModelError> {
    serde_json::from_str(raw.get()).map_err(|e| json_error(path, &e))
}

fn json_error(path: &Path, e: &serde_json::Error) -> ModelError {
    broken(path, CheckpointError::Json(e.to_string()))
}

impl Manifest {
    pub(super) fn render(&self) -> Result<Vec<u8>, ModelError> {
        serde_json::to_vec(self).map_err(|e| json_error(Path::new(super::STATE), &e))
    }

    pub(super) fn parse(path: &Path, json: &[u8], kind: &'static str) -> Result<Self, ModelError> {
        let head: Head = serde_json::from_slice(json).map_err(|e| json_error(path, &e))?;
        if head.format != super::FORMAT {
            let why = CheckpointError::Format {
                found: head.format,
                supported: super::FORMAT,
            };
            return Err(broken(path, why));
        }
        if head.kind.as_deref() != Some(kind) {
            let why = CheckpointError::Kind {
                found: head.kind.unwrap_or_else(|| "model of no kind".into()),
                expected: kind,
            };
            return Err(broken(path, why));
        }
        let manifest: Self = serde_json::from_slice(json).map_err(|e| json_error(path, &e))?;
        for (layer, pool) in manifest.pools.iter().enumerate() {
            pool.check(layer).map_err(|why| broken(path, why))?;
        }
        Ok(manifest)
    }
}

impl Pool {
    fn check(&self, layer: usize) -> Result<(), CheckpointError> {
        let mut seen = BTreeSet::new();
        for id in &self.experts {
            if !seen.insert(id) {
                let expert = id.0;
                return Err(CheckpointError::DuplicateExpert { layer, expert });
            }
        }
        let refuse = |why: String| Err(CheckpointError::Pool { layer, why });
        let Some(last) = seen.last() else {
            return refuse("no experts".into());
        };
        if last.0 >= self.next_id {
            return refuse(format!(
                "expert {} and next id {} do not go together",
                last.0, self.next_id
            ));
        }
        if self.logit_offsets.len() != self.experts.len() {
            return refuse(format!(
                "{} logit offsets for {} experts",
                self.logit_offsets.len(),
                self.experts.len()
            ));
        }
        if let Some(offset) = self.logit_offsets.iter().find(|o| !o.is_finite()) {
            return refuse(format!("logit offset {offset} is not finite"));
        }
        Ok(())
    }
}

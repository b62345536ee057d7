//! Which tensor each parameter is read from, when the pools of checkpoint and model may differ.

use std::collections::BTreeSet;
use std::path::Path;

use mass_expand::{ExpertId, preserve_mass};
use serde::{Deserialize, Serialize};

use super::broken;
use super::manifest::Pool;
use super::tensors::TensorFile;
use crate::error::ModelError;
use crate::error::{CheckpointError, ExpertCounts};
use crate::mixtures::Mixtures;
use crate::param::{check_names, join};

/// What to do when checkpoint and model have different numbers of experts in a layer.
///
/// Whichever of the two sets the number also gives the pool its ids, the id of the next newcomer and the router with its
/// state. Weights, gate rows and logit offsets always come from the checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PoolMismatch {
    /// An error that names both numbers, layer by layer.
    #[default]
    Error,
    /// The larger number. A checkpoint with more experts brings its whole pool along. With fewer, K of them, the model keeps
    /// its size: its first K experts are the checkpoint's, and the i-th of the others (from 0) is a copy of the
    /// (i mod K)-th that shares its routing mass (both logits lowered by log 2), so that `softmax` gives the two together
    /// what it gave the one.
    Grow,
    /// The smaller number. Of a checkpoint with more experts the first ones, the oldest, are kept and the rest of the file
    /// is left unread: the model then computes something else than the one that was saved. With fewer, the model's pool
    /// becomes the checkpoint's.
    Drop,
}

/// How a checkpoint is loaded into a model that exists.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoadOptions {
    /// What to do when numbers of experts differ.
    #[serde(default)]
    pub pool: PoolMismatch,
}

/// Pools as they will be, and where the values of each expert stand.
pub(super) struct Reading {
    layers: Vec<LayerReading>,
    /// The layers in which checkpoint and model differ.
    pub(super) differing: Vec<ExpertCounts>,
}

struct LayerReading {
    /// `blocks.0.moe.experts.`
    prefix: String,
    pool: Pool,
    /// The id in the checkpoint that each expert of the pool is read from.
    sources: Vec<ExpertId>,
    /// Every id of the checkpoint.
    saved: Vec<ExpertId>,
}

impl Reading {
    /// Takes the pools as the checkpoint has them.
    pub(super) fn as_saved<M: Mixtures>(
        path: &Path,
        model: &M,
        pools: Vec<Pool>,
    ) -> Result<Self, ModelError> {
        Self::new(path, model, pools, |_, saved| {
            let sources = saved.experts.clone();
            (saved, sources)
        })
    }

    /// Fits the pools of the checkpoint to those of the model.
    pub(super) fn fitted<M: Mixtures>(
        path: &Path,
        model: &M,
        pools: Vec<Pool>,
        mismatch: PoolMismatch,
    ) -> Result<Self, ModelError> {
        let mut unshared = None;
        let reading = Self::new(path, model, pools, |layer, saved| {
            let own = model.mixture(layer);
            let (theirs, ours) = (saved.experts.len(), own.ids().len());
            let target = match mismatch {
                PoolMismatch::Error | PoolMismatch::Drop => ours.min(theirs),
                PoolMismatch::Grow => ours.max(theirs),
            };
            if target == theirs {
                let sources = saved.experts.clone();
                return (saved, sources);
            }
            let mut sources = saved.experts;
            let mut logit_offsets = saved.logit_offsets;
            sources.truncate(target);
            logit_offsets.truncate(target);
            for i in 0..target.saturating_sub(theirs) {
                sources.push(sources[i % theirs]);
                match preserve_mass(&mut logit_offsets[i % theirs]) {
                    Ok(offset) => logit_offsets.push(offset),
                    Err(e) => {
                        unshared.get_or_insert(e);
                    }
                }
            }
            let pool = Pool {
                experts: own.ids().to_vec(),
                next_id: own.next_id().0,
                logit_offsets,
                router: own.router().clone(),
            };
            (pool, sources)
        })?;
        if let Some(e) = unshared {
            return Err(e.into());
        }
        if mismatch == PoolMismatch::Error && !reading.differing.is_empty() {
            let layers = reading.differing;
            return Err(broken(path, CheckpointError::ExpertCount { layers }));
        }
        Ok(reading)
    }

    fn new<M: Mixtures>(
        path: &Path,
        model: &M,
        pools: Vec<Pool>,
        mut fit: impl FnMut(usize, Pool) -> (Pool, Vec<ExpertId>),
    ) -> Result<Self, ModelError> {
        if pools.len() != model.mixtures() {
            let why = CheckpointError::Layers {
                found: pools.len(),
                expected: model.mixtures(),
            };
            return Err(broken(path, why));
        }
        let (mut layers, mut differing) = (Vec::new(), Vec::new());
        for (layer, saved) in pools.into_iter().enumerate() {
            let counts = ExpertCounts {
                layer,
                checkpoint: saved.experts.len(),
                model: model.mixture(layer).ids().len(),
            };
            if counts.checkpoint != counts.model {
                differing.push(counts);
            }
            let ids = saved.experts.clone();
            let (pool, sources) = fit(layer, saved);
            layers.push(LayerReading {
                prefix: join(&model.mixture_name(layer), "experts."),
                pool,
                sources,
                saved: ids,
            });
        }
        Ok(Self { layers, differing })
    }

    /// Of an expert's parameter: its layer, the expert and the rest of the name.
    fn expert<'n>(&self, name: &'n str) -> Option<(&LayerReading, ExpertId, &'n str)> {
        self.layers.iter().find_map(|layer| {
            let (id, rest) = name.strip_prefix(layer.prefix.as_str())?.split_once('.')?;
            Some((layer, ExpertId(id.parse().ok()?), rest))
        })
    }

    /// Refuses a file that lacks a tensor, or has one of another shape or too many. The model still has its old pools; no
    /// layer may be given its new one before every expert listed is known to be in the file, which bounds its size.
    pub(super) fn check<M: Mixtures>(
        &self,
        model: &M,
        file: &TensorFile<'_>,
    ) -> Result<(), ModelError> {
        check_names(model)?;
        let mut expected = BTreeSet::new();
        let mut outcome = Ok(());
        model.visit("", &mut |name, param| {
            if outcome.is_err() {
                return;
            }
            let mut one = |name: String| {
                let checked = file.check_values(&name, param.shape());
                expected.insert(name);
                checked
            };
            outcome = match self.expert(&name) {
                None => one(name),
                // The first expert stands for all of its layer.
                Some((layer, id, rest)) if self.first_of(model, layer) == Some(id) => layer
                    .sources
                    .iter()
                    .try_for_each(|id| one(format!("{}{}.{rest}", layer.prefix, id.0))),
                Some(_) => Ok(()),
            };
        });
        outcome?;
        file.expect_only(|name| {
            let left_out = |(layer, id, _): (&LayerReading, ExpertId, &str)| {
                layer.saved.contains(&id) && !layer.sources.contains(&id)
            };
            expected.contains(name) || self.expert(name).is_some_and(left_out)
        })
    }

    fn first_of<M: Mixtures>(&self, model: &M, layer: &LayerReading) -> Option<ExpertId> {
        let at = self.layers.iter().position(|l| l.prefix == layer.prefix)?;
        model.mixture(at).ids().first().copied()
    }

    /// Gives the model its pools.
    pub(super) fn give_pools<M: Mixtures>(
        &self,
        path: &Path,
        model: &mut M,
    ) -> Result<(), ModelError> {
        for (layer, LayerReading { pool, .. }) in self.layers.iter().enumerate() {
            let mixture = model.mixture(layer);
            if let Err(e) = mixture.check_router(&pool.router, pool.experts.len()) {
                let why = e.to_string();
                return Err(broken(path, CheckpointError::Pool { layer, why }));
            }
        }
        for (at, LayerReading { pool, .. }) in self.layers.iter().enumerate() {
            model
                .mixture_mut(at)
                .restore_pool(
                    pool.experts.clone(),
                    pool.next_id,
                    &pool.logit_offsets,
                    pool.router.clone(),
                )
                .map_err(|e| broken(path, CheckpointError::Settings(e.to_string())))?;
        }
        Ok(())
    }

    /// Gives the model its pools and values, from a file that has been [checked](Self::check).
    pub(super) fn apply<M: Mixtures>(
        &self,
        path: &Path,
        model: &mut M,
        file: &TensorFile<'_>,
    ) -> Result<(), ModelError> {
        self.give_pools(path, model)?;
        let mut outcome = Ok(());
        model.visit_mut("", &mut |name, param| {
            if outcome.is_err() {
                return;
            }
            let source = self.expert(&name).and_then(|(layer, id, rest)| {
                let at = layer.pool.experts.iter().position(|&i| i == id)?;
                Some(format!("{}{}.{rest}", layer.prefix, layer.sources[at].0))
            });
            outcome = file.read_into(&source.unwrap_or(name), param);
        });
        outcome
    }
}

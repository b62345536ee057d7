//! Filling a plan: rows to selections, a block of tokens at a time, then the grouping by expert.

use ndarray::ArrayView2;
#[cfg(feature = "rayon")]
use rayon::prelude::*;

use super::{Combine, RoutingPlan, WeightRule, group};
use crate::select::{Picks, Threshold};
use crate::simd::{AlignedRow, LANES, Machine, Task, dispatch};
use crate::softmax::Row;
use crate::tile::{self, Tile};
use crate::{NonFinite, RoutingError};

/// What a router does with one token.
pub(crate) trait RowKernel: Sync {
    /// Fills `row.probabilities` from `row.logits` and appends the token's experts, ascending, and their weights to `picks`.
    ///
    /// Has to be `inline(always)`: it is compiled once for every instruction set.
    fn route<M: Machine>(&self, machine: M, row: &mut Row, work: &mut Work, picks: &mut Picks);

    /// The mass to reach and what becomes of the weights, if that is all there is to this router.
    fn tiled(&self) -> Option<(f32, Combine)> {
        None
    }
}

/// Working memory of a [`RowKernel`].
#[derive(Debug, Default)]
pub(crate) struct Work {
    pub(crate) candidates: Vec<f32>,
    pub(crate) keys: AlignedRow,
}

/// What every router does with a batch.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Batch<'a> {
    pub(crate) logits: ArrayView2<'a, f32>,
    pub(crate) mask: Option<&'a [bool]>,
    pub(crate) non_finite: NonFinite,
    pub(crate) keep_scores: bool,
    pub(crate) rule: WeightRule,
}

/// Working memory of [`RoutingPlan`]; no part of its value.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    pub(super) blocks: Vec<Block>,
    /// The tokens each expert has chosen, where experts choose.
    pub(super) chosen: Vec<Vec<u32>>,
}

/// A run of consecutive tokens: the unit of parallel work. Results do not depend on how tokens are cut into blocks.
#[derive(Debug, Default)]
pub(crate) struct Block {
    pub(super) first_token: usize,
    pub(super) picks: Picks,
    pub(super) local: group::Local,
    row: Row,
    tile: Tile,
    /// The token after the last one of the tile.
    tiled_until: usize,
    gathered: Vec<f32>,
    work: Work,
    skipped: usize,
    failed: Option<RoutingError>,
}

/// Below this many logits, starting threads costs more than it saves.
const SERIAL: usize = 1 << 14;

impl Batch<'_> {
    /// Routes and groups; on error the plan is left empty.
    pub(crate) fn route(
        self,
        kernel: &impl RowKernel,
        plan: &mut RoutingPlan,
    ) -> Result<(), RoutingError> {
        let result = self.rows(kernel, plan);
        match result {
            Ok(()) => group::group(plan),
            Err(_) => plan.clear(),
        }
        #[cfg(debug_assertions)]
        if let Err(broken) = plan.validate() {
            unreachable!("broken plan: {broken}");
        }
        result
    }

    /// Fills the blocks of the plan's scratch, `token_offsets` (with the offsets within the block) and the scores.
    pub(crate) fn rows(
        self,
        kernel: &impl RowKernel,
        plan: &mut RoutingPlan,
    ) -> Result<(), RoutingError> {
        let (n, k) = self.logits.dim();
        self.check(n, k)?;
        plan.reset(n, k);
        plan.rule = self.rule;
        match self.mask {
            Some(mask) => plan.in_use.extend_from_slice(mask),
            None => plan.in_use.resize(k, true),
        }
        plan.scores
            .resize(if self.keep_scores { n * k } else { 0 }, 0.0);

        #[cfg(feature = "rayon")]
        let threads = if n * k < SERIAL {
            1
        } else {
            rayon::current_num_threads()
        };
        #[cfg(not(feature = "rayon"))]
        let threads = 1;
        // Some more blocks than threads, so that a thread that was held up does not hold up all.
        let count = if threads == 1 {
            1
        } else {
            (threads * 4).min(n * k / SERIAL).max(1)
        };
        // Whole tiles, so that the cut does not decide which tokens are routed together.
        let size = n.div_ceil(count).next_multiple_of(LANES).max(LANES);
        let count = n.div_ceil(size).max(1);
        let blocks = &mut plan.scratch.blocks;
        blocks.resize_with(count.max(blocks.len()), Block::default);
        blocks.truncate(count.max(1));
        for (b, block) in blocks.iter_mut().enumerate() {
            block.first_token = b * size;
        }
        let offsets = &mut plan.token_offsets[1..];
        if count == 1 {
            blocks[0].fill(self, kernel, offsets, &mut plan.scores);
        }
        #[cfg(feature = "rayon")]
        if count > 1 && self.keep_scores {
            let parts = blocks
                .par_iter_mut()
                .zip(offsets.par_chunks_mut(size))
                .zip(plan.scores.par_chunks_mut(size * k));
            parts.for_each(|((block, offsets), scores)| block.fill(self, kernel, offsets, scores));
        } else if count > 1 {
            let parts = blocks.par_iter_mut().zip(offsets.par_chunks_mut(size));
            parts.for_each(|(block, offsets)| block.fill(self, kernel, offsets, &mut []));
        }
        // The first failure in token order, whichever thread was first in time.
        if let Some(error) = blocks.iter_mut().find_map(|block| block.failed.take()) {
            return Err(error);
        }
        plan.skipped = blocks.iter().map(|block| block.skipped).sum();
        Ok(())
    }

    /// Fills the scores by rows, then lets `choose` fill, for every expert, the list of its tokens, ascending.
    pub(crate) fn choose(
        self,
        kernel: &impl RowKernel,
        plan: &mut RoutingPlan,
        choose: impl FnOnce(&RoutingPlan, &mut [Vec<u32>]) -> Combine,
    ) -> Result<(), RoutingError> {
        if let Err(error) = self.rows(kernel, plan) {
            plan.clear();
            return Err(error);
        }
        let mut chosen = std::mem::take(&mut plan.scratch.chosen);
        chosen.resize_with(plan.num_experts, Vec::new);
        let combine = choose(plan, &mut chosen);
        group::from_choices(plan, &chosen, combine);
        plan.scratch.chosen = chosen;
        #[cfg(debug_assertions)]
        if let Err(broken) = plan.validate() {
            unreachable!("broken plan: {broken}");
        }
        Ok(())
    }

    fn check(&self, n: usize, k: usize) -> Result<(), RoutingError> {
        if k == 0 {
            return Err(RoutingError::NoExperts);
        }
        if n.checked_mul(k).is_none_or(|a| u32::try_from(a).is_err()) {
            return Err(RoutingError::TooLarge {
                tokens: n,
                experts: k,
            });
        }
        if let Some(mask) = self.mask {
            if mask.len() != k {
                return Err(RoutingError::ShapeMismatch {
                    what: "mask per expert",
                    expected: k,
                    found: mask.len(),
                });
            }
            if !mask.contains(&true) {
                return Err(RoutingError::AllExpertsMasked { experts: k });
            }
        }
        Ok(())
    }
}

impl Block {
    fn fill(
        &mut self,
        batch: Batch<'_>,
        kernel: &impl RowKernel,
        offsets: &mut [u32],
        scores: &mut [f32],
    ) {
        self.failed = None;
        self.skipped = 0;
        self.picks.clear();
        self.tiled_until = 0;
        self.row.prepare(batch.logits.ncols(), batch.mask);
        dispatch(Fill {
            block: self,
            batch,
            kernel,
            offsets,
            scores,
        });
        if self.failed.is_none() {
            self.local
                .sort(batch.logits.ncols(), self.first_token, offsets, &self.picks);
        }
    }
}

struct Fill<'a, 'b, K> {
    block: &'a mut Block,
    batch: Batch<'b>,
    kernel: &'a K,
    offsets: &'a mut [u32],
    scores: &'a mut [f32],
}

impl<K: RowKernel> Task for Fill<'_, '_, K> {
    #[inline(always)]
    fn run<M: Machine>(self, machine: M) {
        let Self {
            block,
            batch,
            kernel,
            offsets,
            scores,
        } = self;
        let k = batch.logits.ncols();
        let contiguous = batch.logits.as_slice();
        let tiled = kernel
            .tiled()
            .filter(|_| k <= tile::WIDEST && batch.mask.is_none());
        if tiled.is_some() {
            block.tile.prepare(k);
        }
        let mut scores = scores.chunks_exact_mut(k);
        for (i, offset) in offsets.iter_mut().enumerate() {
            let token = block.first_token + i;
            let mut kept = scores.next();
            if let (Some(all), Some((p, combine))) = (contiguous, tiled) {
                let lane = i % LANES;
                if lane == 0
                    && let Some(rows) = all.get(token * k..(token + LANES) * k)
                {
                    block.tile.route(machine, rows, p);
                    block.tiled_until = token + LANES;
                }
                if token < block.tiled_until
                    && let Some(value) = block.tile.threshold(lane)
                {
                    let row = block.tile.row(lane);
                    let from = block.picks.len();
                    block.picks.take_unique(machine, row, value);
                    combine.apply(block.picks.weights_from(from));
                    if let Some(kept) = &mut kept {
                        kept.copy_from_slice(&row.as_flattened()[..k]);
                    }
                    *offset = block.picks.len() as u32;
                    continue;
                }
            }
            let logits = match contiguous {
                Some(all) => &all[token * k..(token + 1) * k],
                None => {
                    block.gathered.clear();
                    block.gathered.extend(batch.logits.row(token));
                    &block.gathered[..]
                }
            };
            let finite = block.row.load(machine, logits);
            if finite {
                kernel.route(machine, &mut block.row, &mut block.work, &mut block.picks);
            } else if batch.non_finite == NonFinite::Skip {
                block.skipped += 1;
            } else {
                block.failed = Some(non_finite(logits, batch.mask, token));
                return;
            }
            if let Some(kept) = kept {
                if finite {
                    let (whole, rest) = kept.as_chunks_mut::<LANES>();
                    let from = block.row.probabilities.get();
                    whole
                        .iter_mut()
                        .zip(from)
                        .for_each(|(to, from)| *to = *from);
                    rest.copy_from_slice(&from.as_flattened()[whole.len() * LANES..k]);
                } else {
                    kept.fill(0.0);
                }
            }
            *offset = block.picks.len() as u32;
        }
    }
}

#[cold]
fn non_finite(logits: &[f32], mask: Option<&[bool]>, token: usize) -> RoutingError {
    let bad = |&e: &usize| !logits[e].is_finite() && mask.is_none_or(|m| m[e]);
    let Some(expert) = (0..logits.len()).find(bad) else {
        unreachable!("a row is refused for a logit that is not finite")
    };
    RoutingError::NonFiniteLogit {
        token,
        expert,
        value: logits[expert],
    }
}

/// Softmax, then a threshold on some key: the shape of most routers.
pub(crate) struct SoftmaxThen<S> {
    pub(crate) combine: Combine,
    pub(crate) select: S,
}

/// Finds the threshold that selects a token's experts.
pub(crate) trait Select: Sync {
    /// Leaves the keys in `work.keys` if they are not the probabilities.
    fn threshold<M: Machine>(
        &self,
        machine: M,
        row: &Row,
        top: f32,
        work: &mut Work,
    ) -> (Keys, Threshold);

    /// The mass to reach, below one, if that is all there is to the selection.
    fn mass(&self) -> Option<f32> {
        None
    }
}

/// What a threshold applies to.
#[derive(Clone, Copy)]
pub(crate) enum Keys {
    Probabilities,
    Logits,
    Work,
}

impl<S: Select> RowKernel for SoftmaxThen<S> {
    #[inline(always)]
    fn route<M: Machine>(&self, machine: M, row: &mut Row, work: &mut Work, picks: &mut Picks) {
        let top = row.softmax(machine);
        let (keys, threshold) = self.select.threshold(machine, row, top, work);
        let keys = match keys {
            Keys::Probabilities => row.probabilities.get(),
            Keys::Logits => row.logits.get(),
            Keys::Work => work.keys.get(),
        };
        let from = picks.len();
        picks.take(machine, keys, threshold, row.probabilities.get());
        self.combine.apply(picks.weights_from(from));
    }

    fn tiled(&self) -> Option<(f32, Combine)> {
        self.select.mass().map(|p| (p, self.combine))
    }
}

impl Combine {
    pub(crate) fn rule(self) -> WeightRule {
        match self {
            Self::Raw => WeightRule::Softmax,
            Self::Renormalised => WeightRule::Renormalised,
        }
    }

    /// Turns probabilities of the selected experts into weights.
    #[inline(always)]
    pub(crate) fn apply(self, weights: &mut [f32]) {
        if self == Self::Renormalised {
            let sum: f32 = weights.iter().sum();
            // All selected probabilities may have underflowed (top-k after a hugely dominant expert was masked by a bias).
            if sum > 0.0 {
                let scale = 1.0 / sum;
                if scale.is_finite() {
                    weights.iter_mut().for_each(|w| *w *= scale);
                } else {
                    weights.iter_mut().for_each(|w| *w /= sum);
                }
            }
        }
    }
}

//! Filling a plan: rows to selections, a block of tokens at a time, then the grouping by expert.

use super::{Combine, RoutingPlan, WeightRule, group, marks};
use crate::error::same;
use crate::select::{Picks, Threshold};
use crate::simd::{AlignedRow, LANES, Machine, Task, dispatch};
use crate::softmax::Row;
use crate::tile::{self, Tile};
use crate::{NonFinite, RoutingError, threads};
use ndarray::ArrayView2;

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
    pub(super) marks: marks::Marks,
    row: Row,
    tile: Tile,
    gathered: Vec<f32>,
    work: Work,
    skipped: usize,
    failed: Option<RoutingError>,
}

/// Below this many logits, starting threads costs more than it saves.
const SERIAL: usize = 1 << 14;

impl<'a> Batch<'a> {
    /// Routes and groups; on error the plan is left empty.
    pub(crate) fn route(
        self,
        kernel: &impl RowKernel,
        plan: &mut RoutingPlan,
    ) -> Result<(), RoutingError> {
        let result = self.rows(kernel, plan);
        match result {
            Ok(()) if self.tiled(kernel).is_some() => marks::group(plan),
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
        check((n, k), self.mask)?;
        plan.reset(n, k);
        plan.rule = self.rule;
        match self.mask {
            Some(mask) => plan.in_use.extend_from_slice(mask),
            None => plan.in_use.resize(k, true),
        }
        plan.scores
            .resize(if self.keep_scores { n * k } else { 0 }, 0.0);

        let threads = if n * k < SERIAL { 1 } else { threads::count() };
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
        let parts = Parts {
            blocks,
            offsets,
            scores: &mut plan.scores,
            size,
        };
        parts.fill(self, kernel, threads > 1);
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

    /// The logits, the mass to reach and what becomes of the weights, where tokens are routed in tiles.
    fn tiled(self, kernel: &impl RowKernel) -> Option<(&'a [f32], f32, Combine)> {
        let (p, combine) = kernel.tiled()?;
        let fits = self.logits.ncols() <= tile::WIDEST && self.mask.is_none();
        Some((self.logits.to_slice().filter(|_| fits)?, p, combine))
    }
}

/// What can be wrong with a batch but for its logits, `N x K`.
pub(crate) fn check((n, k): (usize, usize), mask: Option<&[bool]>) -> Result<(), RoutingError> {
    possible(n, k)?;
    mask.map_or(Ok(()), |mask| check_mask(mask, k))
}

/// The assignments that a batch may have, whose positions in a plan are 32-bit.
pub(super) fn possible(tokens: usize, experts: usize) -> Result<usize, RoutingError> {
    if experts == 0 {
        return Err(RoutingError::NoExperts);
    }
    let possible = tokens.checked_mul(experts);
    possible
        .filter(|&a| u32::try_from(a).is_ok())
        .ok_or(RoutingError::TooLarge { tokens, experts })
}

/// Refuses a mask that is none of `k` experts, or leaves none in use.
pub(super) fn check_mask(mask: &[bool], k: usize) -> Result<(), RoutingError> {
    same("mask per expert", k, mask.len())?;
    if mask.contains(&true) {
        Ok(())
    } else {
        Err(RoutingError::AllExpertsMasked { experts: k })
    }
}

/// Blocks of `size` tokens, with what they fill.
struct Parts<'a> {
    blocks: &'a mut [Block],
    offsets: &'a mut [u32],
    scores: &'a mut [f32],
    size: usize,
}

impl Parts<'_> {
    fn fill(self, batch: Batch<'_>, kernel: &impl RowKernel, parallel: bool) {
        let Self {
            blocks,
            offsets,
            scores,
            size,
        } = self;
        if let [block] = blocks {
            return block.fill(batch, kernel, offsets, scores);
        }
        let middle = blocks.len() / 2;
        let kept = (middle * size * batch.logits.ncols()).min(scores.len());
        let (b1, b2) = blocks.split_at_mut(middle);
        let (o1, o2) = offsets.split_at_mut(middle * size);
        let (s1, s2) = scores.split_at_mut(kept);
        let part = |blocks, offsets, scores| Parts {
            blocks,
            offsets,
            scores,
            size,
        };
        let (a, b) = (part(b1, o1, s1), part(b2, o2, s2));
        if parallel {
            threads::join(
                || a.fill(batch, kernel, true),
                || b.fill(batch, kernel, true),
            );
        } else {
            a.fill(batch, kernel, false);
            b.fill(batch, kernel, false);
        }
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
        let k = batch.logits.ncols();
        self.row.prepare(k, batch.mask);
        let tiled = batch.tiled(kernel);
        if tiled.is_some() {
            self.tile.prepare(k);
            self.marks.clear(k);
        }
        dispatch(Fill {
            block: self,
            batch,
            kernel,
            tiled,
            offsets,
            scores,
        });
        if self.failed.is_none() && tiled.is_none() {
            self.local.sort(k, self.first_token, offsets, &self.picks);
        }
    }

    /// Routes one token by its row; false if it must not be.
    #[inline(always)]
    fn token<M: Machine>(
        &mut self,
        machine: M,
        batch: &Batch<'_>,
        kernel: &impl RowKernel,
        token: usize,
        kept: Option<&mut [f32]>,
    ) -> bool {
        let k = batch.logits.ncols();
        let logits = match batch.logits.as_slice() {
            Some(all) => &all[token * k..(token + 1) * k],
            None => {
                self.gathered.clear();
                self.gathered.extend(batch.logits.row(token));
                &self.gathered[..]
            }
        };
        let finite = self.row.load(machine, logits);
        if finite {
            kernel.route(machine, &mut self.row, &mut self.work, &mut self.picks);
        } else if batch.non_finite == NonFinite::Skip {
            self.skipped += 1;
        } else {
            self.failed = Some(non_finite(logits, batch.mask, token));
            return false;
        }
        let Some(kept) = kept else { return true };
        if finite {
            let (whole, rest) = kept.as_chunks_mut::<LANES>();
            let from = self.row.probabilities.get();
            whole
                .iter_mut()
                .zip(from)
                .for_each(|(to, from)| *to = *from);
            rest.copy_from_slice(&from.as_flattened()[whole.len() * LANES..k]);
        } else {
            kept.fill(0.0);
        }
        true
    }
}

struct Fill<'a, 'b, K> {
    block: &'a mut Block,
    batch: Batch<'b>,
    kernel: &'a K,
    tiled: Option<(&'b [f32], f32, Combine)>,
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
            tiled,
            offsets,
            scores,
        } = self;
        let k = batch.logits.ncols();
        let Some((logits, p, combine)) = tiled else {
            let mut scores = scores.chunks_exact_mut(k);
            for (token, offset) in (block.first_token..).zip(offsets) {
                if !block.token(machine, &batch, kernel, token, scores.next()) {
                    return;
                }
                *offset = block.picks.len() as u32;
            }
            return;
        };
        let mut chosen = 0;
        let mut scores = scores.chunks_mut(LANES * k);
        for (first, offsets) in (block.first_token..)
            .step_by(LANES)
            .zip(offsets.chunks_mut(LANES))
        {
            let mut kept = scores.next().unwrap_or_default();
            let rows = |first: usize| logits.get(first * k..(first + LANES) * k);
            match rows(first) {
                Some(own) => {
                    let next = rows(first + LANES).filter(|_| offsets.len() == LANES);
                    block.tile.route(machine, own, next, p, combine);
                    if !kept.is_empty() {
                        block.tile.keep(machine, kept);
                    }
                }
                // The last tokens of the batch are not enough for a tile.
                None => block.tile.leave(),
            }
            for (i, offset) in offsets.iter_mut().enumerate() {
                let row;
                (row, kept) = kept.split_at_mut(k.min(kept.len()));
                chosen += match block.tile.count(i) {
                    Some(count) => count,
                    None => {
                        block.picks.clear();
                        let kept = (!row.is_empty()).then_some(row);
                        if !block.token(machine, &batch, kernel, first + i, kept) {
                            return;
                        }
                        let (experts, weights) = (block.picks.experts(), block.picks.weights());
                        block.tile.take(i, experts, weights);
                        experts.len() as u32
                    }
                };
                *offset = chosen;
            }
            block.marks.push(machine, &block.tile);
        }
        block.marks.finish();
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
            Self::StraightThrough => WeightRule::StraightThrough,
        }
    }

    /// Turns probabilities of the selected experts into weights.
    #[inline(always)]
    pub(crate) fn apply(self, weights: &mut [f32]) {
        if self != Self::Raw {
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

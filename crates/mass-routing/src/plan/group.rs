//! Grouping by expert: a counting sort within each block, then concatenation of the blocks' segments.

use super::build::Block;
use super::{Combine, RoutingPlan};
use crate::select::Picks;
use crate::threads;

/// A block's picks sorted by expert.
#[derive(Debug, Default)]
pub(crate) struct Local {
    /// Where each expert's segment starts in `tokens` and `weights`; `K + 1` entries.
    starts: Vec<u32>,
    tokens: Vec<u32>,
    weights: Vec<f32>,
    /// For each pick in token order, its position in `tokens`.
    positions: Vec<u32>,
    /// Working memory: the next free position of each expert, later what leads from a local position to the plan's.
    cursors: Vec<u32>,
}

impl Local {
    /// Sorts `picks`, where `ends[i]` is the end of the picks of token `first_token + i`.
    pub(super) fn sort(&mut self, k: usize, first_token: usize, ends: &[u32], picks: &Picks) {
        // Plain slices from here on: through the vectors, every store would force their pointers to be read again.
        self.starts.clear();
        self.starts.resize(k + 1, 0);
        let starts = &mut self.starts[..];
        for &e in picks.experts() {
            starts[e as usize + 1] += 1;
        }
        for e in 0..k {
            starts[e + 1] += starts[e];
        }
        self.cursors.clear();
        self.cursors.extend_from_slice(&starts[..k]);
        // Every entry is written below: lengths change, contents need no clearing.
        self.tokens.resize(picks.len(), 0);
        self.weights.resize(picks.len(), 0.0);
        self.positions.resize(picks.len(), 0);
        let cursors = &mut self.cursors[..];
        let (tokens, weights) = (&mut self.tokens[..], &mut self.weights[..]);
        let (mut experts, mut values, mut positions) =
            (picks.experts(), picks.weights(), &mut self.positions[..]);
        let mut start = 0;
        for (i, &end) in ends.iter().enumerate() {
            let count = end as usize - start;
            start = end as usize;
            let token = (first_token + i) as u32;
            let (own_experts, own_values, own_positions);
            (own_experts, experts) = experts.split_at(count);
            (own_values, values) = values.split_at(count);
            (own_positions, positions) = std::mem::take(&mut positions).split_at_mut(count);
            for ((&e, &w), position) in own_experts.iter().zip(own_values).zip(own_positions) {
                let cursor = &mut cursors[e as usize];
                let at = *cursor as usize;
                *cursor += 1;
                *position = at as u32;
                tokens[at] = token;
                weights[at] = w;
            }
        }
    }

    fn segment(&self, e: usize) -> std::ops::Range<usize> {
        self.starts[e] as usize..self.starts[e + 1] as usize
    }
}

/// Below this many assignments, one thread copies faster than several can be woken.
pub(super) const SERIAL: usize = 1 << 15;

/// Fills the plan's arrays over assignments from its blocks.
pub(super) fn group(plan: &mut RoutingPlan) {
    let k = plan.num_experts;
    let mut blocks = std::mem::take(&mut plan.scratch.blocks);
    let total: usize = blocks.iter().map(|block| block.picks.len()).sum();

    if let [block] = &mut blocks[..] {
        // Sorted already: trade buffers instead of copying.
        std::mem::swap(&mut plan.tokens, &mut block.local.tokens);
        std::mem::swap(&mut plan.weights, &mut block.local.weights);
        std::mem::swap(&mut plan.token_assignments, &mut block.local.positions);
        std::mem::swap(&mut plan.expert_offsets, &mut block.local.starts);
        plan.token_experts.clear();
        plan.token_experts.extend_from_slice(block.picks.experts());
        plan.scratch.blocks = blocks;
        return;
    }

    let mut next = 0;
    for e in 0..k {
        plan.expert_offsets[e] = next;
        for block in &mut blocks {
            let segment = block.local.segment(e);
            block.local.cursors[e] = next.wrapping_sub(segment.start as u32);
            next += segment.len() as u32;
        }
    }
    plan.expert_offsets[k] = next;

    plan.tokens.resize(total, 0);
    plan.weights.resize(total, 0.0);
    plan.token_assignments.resize(total, 0);
    plan.token_experts.resize(total, 0);
    let parallel = total >= SERIAL;
    let by_token = ByToken {
        blocks: &blocks,
        base: 0,
        offsets: &mut plan.token_offsets[1..],
        assignments: &mut plan.token_assignments,
        experts: &mut plan.token_experts,
    };
    let by_expert = ByExpert {
        blocks: &blocks,
        first: 0,
        ends: &plan.expert_offsets,
        tokens: &mut plan.tokens,
        weights: &mut plan.weights,
    };
    if parallel {
        threads::join(|| by_token.run(true), || by_expert.run(true));
    } else {
        by_token.run(false);
        by_expert.run(false);
    }
    plan.scratch.blocks = blocks;
}

/// Fills the plan's arrays from lists of tokens by expert, each ascending, with weights from the plan's probabilities.
pub(super) fn from_choices(plan: &mut RoutingPlan, chosen: &[Vec<u32>], combine: Combine) {
    let k = plan.num_experts;
    plan.tokens.clear();
    plan.token_offsets.fill(0);
    for (e, tokens) in chosen.iter().enumerate() {
        plan.expert_offsets[e] = plan.tokens.len() as u32;
        plan.tokens.extend_from_slice(tokens);
        tokens
            .iter()
            .for_each(|&t| plan.token_offsets[t as usize + 1] += 1);
    }
    let total = plan.tokens.len();
    plan.expert_offsets[k] = total as u32;
    for t in 0..plan.num_tokens {
        plan.token_offsets[t + 1] += plan.token_offsets[t];
    }
    plan.weights.resize(total, 0.0);
    plan.token_assignments.resize(total, 0);
    plan.token_experts.resize(total, 0);
    let mut cursors = plan.token_offsets[..plan.num_tokens].to_vec();
    for e in 0..k {
        for a in plan.segment(e) {
            let t = plan.tokens[a] as usize;
            let cursor = cursors[t] as usize;
            plan.token_assignments[cursor] = a as u32;
            plan.token_experts[cursor] = e as u32;
            cursors[t] += 1;
        }
    }
    let mut weights = Vec::new();
    for t in 0..plan.num_tokens {
        let own = plan.token_offsets[t] as usize..plan.token_offsets[t + 1] as usize;
        let r = plan.score_row(t).unwrap_or_default();
        weights.clear();
        weights.extend(
            plan.token_experts[own.clone()]
                .iter()
                .map(|&e| r[e as usize]),
        );
        combine.apply(&mut weights);
        for (&a, &w) in plan.token_assignments[own].iter().zip(&weights) {
            plan.weights[a as usize] = w;
        }
    }
}

/// The token-ordered arrays: each block owns a contiguous part of them.
struct ByToken<'a> {
    blocks: &'a [Block],
    base: u32,
    offsets: &'a mut [u32],
    assignments: &'a mut [u32],
    experts: &'a mut [u32],
}

impl ByToken<'_> {
    fn run(self, parallel: bool) {
        let Self {
            blocks,
            base,
            offsets,
            assignments,
            experts,
        } = self;
        match blocks {
            [] => {}
            [block] => {
                offsets.iter_mut().for_each(|o| *o += base);
                experts.copy_from_slice(block.picks.experts());
                for ((to, &position), &e) in assignments
                    .iter_mut()
                    .zip(&block.local.positions)
                    .zip(experts.iter())
                {
                    *to = position.wrapping_add(block.local.cursors[e as usize]);
                }
            }
            _ => {
                let (left, right) = blocks.split_at(blocks.len() / 2);
                let middle = right[0].first_token;
                let picks: usize = left.iter().map(|block| block.picks.len()).sum();
                let (o1, o2) = offsets.split_at_mut(middle - left[0].first_token);
                let (a1, a2) = assignments.split_at_mut(picks);
                let (e1, e2) = experts.split_at_mut(picks);
                let a = ByToken {
                    blocks: left,
                    base,
                    offsets: o1,
                    assignments: a1,
                    experts: e1,
                };
                let base = base + picks as u32;
                let b = ByToken {
                    blocks: right,
                    base,
                    offsets: o2,
                    assignments: a2,
                    experts: e2,
                };
                if parallel {
                    threads::join(|| a.run(true), || b.run(true));
                } else {
                    a.run(false);
                    b.run(false);
                }
            }
        }
    }
}

/// The expert-ordered arrays: each range of experts owns a contiguous part of them.
struct ByExpert<'a> {
    blocks: &'a [Block],
    first: usize,
    /// Offsets of `first..`, with the end of the last.
    ends: &'a [u32],
    tokens: &'a mut [u32],
    weights: &'a mut [f32],
}

impl ByExpert<'_> {
    fn run(self, parallel: bool) {
        let Self {
            blocks,
            first,
            ends,
            mut tokens,
            mut weights,
        } = self;
        let experts = ends.len() - 1;
        if parallel && experts > 1 && tokens.len() >= SERIAL {
            let middle = experts / 2;
            let at = (ends[middle] - ends[0]) as usize;
            let (t1, t2) = tokens.split_at_mut(at);
            let (w1, w2) = weights.split_at_mut(at);
            let a = ByExpert {
                blocks,
                first,
                ends: &ends[..=middle],
                tokens: t1,
                weights: w1,
            };
            let b = ByExpert {
                blocks,
                first: first + middle,
                ends: &ends[middle..],
                tokens: t2,
                weights: w2,
            };
            threads::join(|| a.run(true), || b.run(true));
            return;
        }
        for e in first..first + experts {
            for block in blocks {
                let segment = block.local.segment(e);
                let (t, rest) = std::mem::take(&mut tokens).split_at_mut(segment.len());
                tokens = rest;
                t.copy_from_slice(&block.local.tokens[segment.clone()]);
                let (w, rest) = std::mem::take(&mut weights).split_at_mut(segment.len());
                weights = rest;
                w.copy_from_slice(&block.local.weights[segment]);
            }
        }
    }
}

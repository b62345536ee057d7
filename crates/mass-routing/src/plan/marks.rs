//! Grouping by expert of a batch that was routed in tiles: one bit for every token and expert says who takes whom, so that both orders
//! are packed straight into the plan, sixteen at a time, and nothing is sorted.

use super::RoutingPlan;
use super::build::Block;
use super::group::SERIAL;
use crate::simd::{LANES, Machine, Task, dispatch};
use crate::threads;
use crate::tile::{Tile, WIDEST};

/// Logits of a cut: what is kept of them stays in the second-level cache.
const CUT: usize = 1 << 17;

/// Tokens of a cut at most.
const MOST: usize = 1024;

/// What the tokens of a block choose. A cut is a run of whole tiles that caches hold.
#[derive(Debug, Default)]
pub(crate) struct Marks {
    experts: usize,
    /// Of each tile and expert, the tokens that take it: bit `i` is the `i`-th of the tile.
    masks: Vec<u16>,
    /// Of each cut, expert by expert, the weights of its tokens; at the end room for a vector store.
    weights: Vec<f32>,
    /// Of each cut and expert, the start of its weights; then the end of all.
    runs: Vec<u32>,
    /// Of each cut and expert, the position in the plan of the first of its tokens.
    firsts: Vec<u32>,
    /// Working memory: the weights of the last cut, tile by tile, expert by expert.
    loose: Vec<f32>,
    /// Of each tile of the last cut, where its weights start; then the end of all.
    tiles: Vec<u32>,
}

impl Marks {
    pub(super) fn clear(&mut self, k: usize) {
        self.experts = k;
        self.masks.clear();
        self.runs.clear();
        self.runs.push(0);
        self.tiles.clear();
        self.tiles.push(0);
    }

    /// Tokens of a cut.
    fn tokens(&self) -> usize {
        (CUT / self.experts).clamp(LANES, MOST) / LANES * LANES
    }

    /// The number of assignments.
    fn len(&self) -> usize {
        self.runs.last().map_or(0, |&end| end as usize)
    }

    /// Appends a tile.
    #[inline(always)]
    pub(super) fn push<M: Machine>(&mut self, machine: M, tile: &Tile) {
        if self.tiles.len() > self.tokens() / LANES {
            self.finish();
        }
        let mut at = self.tiles.last().map_or(0, |&end| end as usize);
        let needed = at + (self.experts + 1) * LANES;
        if self.loose.len() < needed {
            self.loose.resize(needed.max(self.loose.len() * 2), 0.0);
        }
        self.masks.extend_from_slice(tile.masks());
        let loose = &mut self.loose[..];
        for (&mask, weights) in tile.masks().iter().zip(tile.weights(machine)) {
            let Some(to) = loose[at..].first_chunk_mut::<LANES>() else {
                unreachable!("reserved")
            };
            *to = pulp::bytemuck::cast(machine.pack(mask, &pulp::bytemuck::cast(weights)));
            at += mask.count_ones() as usize;
        }
        self.tiles.push(at as u32);
    }

    /// Brings the last cut from the order of tiles into that of experts.
    #[inline(always)]
    pub(super) fn finish(&mut self) {
        let (k, tiles) = (self.experts, self.tiles.len() - 1);
        let total = self.tiles.pop().unwrap_or_default() as usize;
        let mut at = self.len();
        let needed = at + total + LANES;
        if self.weights.len() < needed {
            self.weights.resize(needed.max(self.weights.len() * 2), 0.0);
        }
        let masks = &self.masks[self.masks.len() - tiles * k..];
        let (weights, loose) = (&mut self.weights[..], &self.loose[..]);
        for e in 0..k {
            for (next, masks) in self.tiles.iter_mut().zip(masks.chunks_exact(k)) {
                let to = weights[at..].first_chunk_mut::<LANES>();
                let from = loose[*next as usize..].first_chunk();
                let (Some(to), Some(from)) = (to, from) else {
                    unreachable!("reserved")
                };
                *to = *from;
                let count = masks[e].count_ones();
                *next += count;
                at += count as usize;
            }
            self.runs.push(at as u32);
        }
        self.tiles.clear();
        self.tiles.push(0);
    }
}

/// Fills the plan's arrays over assignments from its blocks.
pub(super) fn group(plan: &mut RoutingPlan) {
    let k = plan.num_experts;
    let mut blocks = std::mem::take(&mut plan.scratch.blocks);
    for block in &mut blocks {
        let marks = &mut block.marks;
        marks.firsts.resize(marks.runs.len() - 1, 0);
    }
    let mut next = 0;
    for e in 0..k {
        plan.expert_offsets[e] = next;
        for block in &mut blocks {
            let marks = &mut block.marks;
            let runs = marks.runs.windows(2).skip(e).step_by(k);
            for (first, run) in marks.firsts.iter_mut().skip(e).step_by(k).zip(runs) {
                *first = next;
                next += run[1] - run[0];
            }
        }
    }
    plan.expert_offsets[k] = next;
    let total = next as usize;
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
        // Few pieces: every one of them reads all masks.
        let most = k.div_ceil(2 * threads::count());
        threads::join(|| by_token.run(true), || by_expert.run(most));
    } else {
        by_token.run(false);
        by_expert.run(k);
    }
    plan.scratch.blocks = blocks;
}

/// `first` and the fifteen numbers after it.
#[inline(always)]
fn numbers(first: u32) -> [u32; LANES] {
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15].map(|i| first + i)
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
        let Some(middle) = (self.blocks.len() > 1).then_some(self.blocks.len() / 2) else {
            return dispatch(self);
        };
        let (left, right) = self.blocks.split_at(middle);
        let picks: usize = left.iter().map(|block| block.marks.len()).sum();
        let tokens = right[0].first_token - left[0].first_token;
        let (o1, o2) = self.offsets.split_at_mut(tokens);
        let (a1, a2) = self.assignments.split_at_mut(picks);
        let (e1, e2) = self.experts.split_at_mut(picks);
        let a = ByToken {
            blocks: left,
            base: self.base,
            offsets: o1,
            assignments: a1,
            experts: e1,
        };
        let b = ByToken {
            blocks: right,
            base: self.base + picks as u32,
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

impl Task for ByToken<'_> {
    #[inline(always)]
    fn run<M: Machine>(self, machine: M) {
        let [block] = self.blocks else { return };
        let marks = &block.marks;
        self.offsets.iter_mut().for_each(|o| *o += self.base);
        let k = marks.experts;
        let mut cursors = [[0_u32; LANES]; WIDEST / LANES];
        let mut rows = [[0_u16; LANES]; WIDEST / LANES];
        let chunks = k.div_ceil(LANES);
        let mut at = 0;
        for (firsts, masks) in marks
            .firsts
            .chunks_exact(k)
            .zip(marks.masks.chunks(k * marks.tokens() / LANES))
        {
            cursors.as_flattened_mut()[..k].copy_from_slice(firsts);
            for masks in masks.chunks_exact(k) {
                for (rows, columns) in rows.iter_mut().zip(masks.chunks(LANES)) {
                    let mut square = [0; LANES];
                    square[..columns.len()].copy_from_slice(columns);
                    *rows = machine.transpose_bits(square);
                }
                for i in 0..LANES {
                    for (c, (rows, cursors)) in rows[..chunks].iter().zip(&mut cursors).enumerate()
                    {
                        let mask = rows[i];
                        let count = mask.count_ones() as usize;
                        put(self.assignments, at, count, machine.pack(mask, cursors));
                        let own = machine.pack(mask, &numbers((c * LANES) as u32));
                        put(self.experts, at, count, own);
                        machine.advance(mask, cursors);
                        at += count;
                    }
                }
            }
        }
    }
}

/// Writes `count` values, and anything behind them.
#[inline(always)]
fn put(to: &mut [u32], at: usize, count: usize, values: [u32; LANES]) {
    let to = &mut to[at..];
    match to.first_chunk_mut() {
        Some(to) => *to = values,
        None => to[..count].copy_from_slice(&values[..count]),
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
    /// In pieces of at most `most` experts.
    fn run(self, most: usize) {
        let experts = self.ends.len() - 1;
        if experts <= most {
            return dispatch(self);
        }
        let middle = experts / 2;
        let at = (self.ends[middle] - self.ends[0]) as usize;
        let (t1, t2) = self.tokens.split_at_mut(at);
        let (w1, w2) = self.weights.split_at_mut(at);
        let a = ByExpert {
            blocks: self.blocks,
            first: self.first,
            ends: &self.ends[..=middle],
            tokens: t1,
            weights: w1,
        };
        let b = ByExpert {
            blocks: self.blocks,
            first: self.first + middle,
            ends: &self.ends[middle..],
            tokens: t2,
            weights: w2,
        };
        threads::join(|| a.run(most), || b.run(most));
    }
}

impl Task for ByExpert<'_> {
    #[inline(always)]
    fn run<M: Machine>(self, machine: M) {
        let experts = self.first..self.first + self.ends.len() - 1;
        let mut tokens = [0_u32; MOST + LANES];
        for block in self.blocks {
            let marks = &block.marks;
            let k = marks.experts;
            let size = marks.tokens();
            let mut cut = block.first_token;
            for ((c, firsts), masks) in marks
                .firsts
                .chunks_exact(k)
                .enumerate()
                .zip(marks.masks.chunks(k * size / LANES))
            {
                for e in experts.clone() {
                    let mut at = 0;
                    let mut token = cut as u32;
                    for masks in masks.chunks_exact(k) {
                        let Some(to) = tokens[at..].first_chunk_mut() else {
                            unreachable!("room behind the last")
                        };
                        *to = machine.pack(masks[e], &numbers(token));
                        at += masks[e].count_ones() as usize;
                        token += LANES as u32;
                    }
                    let to = (firsts[e] - self.ends[0]) as usize;
                    self.tokens[to..to + at].copy_from_slice(&tokens[..at]);
                    let from = marks.runs[c * k + e] as usize;
                    self.weights[to..to + at].copy_from_slice(&marks.weights[from..from + at]);
                }
                cut += size;
            }
        }
    }
}

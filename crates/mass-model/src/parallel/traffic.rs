use std::ops::{Add, Sub};

use super::{BUCKET, Ranks, part};
use crate::growth::Mixtures;
use crate::param::Held;

/// What a rank has sent to other ranks. Sums and differences stop at the largest number and at zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes of payload, without what a network adds to a message.
    pub bytes: u64,
    /// Messages, as if each rank sent to each other one directly.
    pub messages: u64,
}

impl Sub for Traffic {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self {
            bytes: self.bytes.saturating_sub(before.bytes),
            messages: self.messages.saturating_sub(before.messages),
        }
    }
}

impl Add for Traffic {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            bytes: self.bytes.saturating_add(other.bytes),
            messages: self.messages.saturating_add(other.messages),
        }
    }
}

/// What decides how much a rank sends in a step of training: a cost model.
///
/// With R ranks in groups of E, so that there are G = R / E groups, a rank sends
///
/// ```text
/// gradients of what every rank has, P values           2 (R - 1) / R  4 P
/// gradients of its experts, Q values, if G > 1         2 (G - 1) / G  4 Q
/// tokens, if E > 1: of each layer, A assignments       4 a A (4 d + 2) + 4 (R - 1) (1 + K / E)
/// losses, and which of n parameters have gradients     (R - 1) (16 + n / 8)
/// small sums of s numbers                              8 (R - 1) s
/// before each collective                               16 (R - 1)
/// ```
///
/// bytes, with a the part of the assignments whose expert is on another rank (1 - 1 / E if experts have the same loads), d the width
/// of a token, and K the experts of a layer. A growing pool makes a small sum of `L (3 K + 3)` numbers a step, and one of `L K` more
/// where experts are divided, as the norm of all gradients makes one. A split that moves an expert to another rank sends its network
/// three times, weights and moments, and gradient; a checkpoint sends every expert so to the first rank.
///
/// ```
/// use mass_model::parallel::Step;
///
/// // 64 experts of width 4 d in one layer, two for each of 4096 tokens of a rank.
/// let (rest, experts) = (5_000_000, 64 * 8 * 512 * 512);
/// let step = |ranks, group| Step {
///     ranks,
///     group,
///     parameters: 300,
///     everywhere: if group > 1 { rest } else { rest + experts },
///     own_experts: if group > 1 { experts / group } else { 0 },
///     layers: 1,
///     experts: 64,
///     dim: 512,
///     assignments: 2.0 * 4096.0,
///     away: 1.0 - 1.0 / group as f64,
///     sums: vec![],
/// };
/// // One copy of the experts in all: their gradients, half a gigabyte, stay where they are, and tokens travel instead.
/// let (apart, alike) = (step(16, 16).traffic(), step(16, 1).traffic());
/// assert!(apart.bytes < alike.bytes / 4);
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// R: all ranks.
    pub ranks: usize,
    /// E: ranks of a group, which divide experts among them; 1 if every rank has all.
    pub group: usize,
    /// n: parameters, matrices and vectors.
    pub parameters: usize,
    /// P: values of the parameters with a gradient that every rank has; without groups those of experts too.
    pub everywhere: usize,
    /// Q: values of the parameters with a gradient of the experts that this rank has, and others do not.
    pub own_experts: usize,
    /// L: mixture layers.
    pub layers: usize,
    /// K: experts of a layer.
    pub experts: usize,
    /// d: width of a token.
    pub dim: usize,
    /// A: assignments of this rank's tokens in a layer: their number, times the experts of each.
    pub assignments: f64,
    /// a: part of these whose expert is on another rank.
    pub away: f64,
    /// Lengths of the small sums of a step, such as that of a growing pool.
    pub sums: Vec<usize>,
}

impl Step {
    /// That of a model whose parameters all have gradients, and whose layers have the same number of experts.
    pub fn of<M: Mixtures>(ranks: &Ranks, model: &M, assignments: f64, away: f64) -> Self {
        let (mut parameters, mut everywhere, mut own_experts) = (0, 0, 0);
        model.visit("", &mut |_, param| {
            parameters += 1;
            match param.held() {
                Held::Everywhere => everywhere += param.len(),
                Held::Here => own_experts += param.len(),
                Held::Elsewhere => {}
            }
        });
        let layers = model.mixtures();
        let first = (layers > 0).then(|| model.mixture(0));
        Self {
            ranks: ranks.size(),
            group: ranks.group().len(),
            parameters,
            everywhere,
            own_experts,
            layers,
            experts: first.map_or(0, |moe| moe.experts().len()),
            dim: first.map_or(0, |moe| moe.config().dim),
            assignments,
            away,
            sums: Vec::new(),
        }
    }

    /// With the small sum of a growing pool.
    #[must_use]
    pub fn growing(mut self) -> Self {
        let of_expert = if self.group > 1 { 4 } else { 3 };
        let of_layer = self.experts.saturating_mul(of_expert).saturating_add(3);
        self.sums.push(self.layers.saturating_mul(of_layer));
        self
    }

    /// With other small sums.
    #[must_use]
    pub fn summing(mut self, lengths: &[usize]) -> Self {
        self.sums.extend(lengths);
        self
    }

    /// What a rank sends in a step, of average rank where they differ. Counts past the largest number are that.
    #[must_use]
    pub fn traffic(&self) -> Traffic {
        if self.ranks < 2 {
            return Traffic::default();
        }
        // In f64, which has every count below 2^53 and overflows nowhere.
        let others = (self.ranks - 1) as f64;
        let buckets = |values: usize| values.div_ceil(BUCKET) as f64;
        let (mut bytes, mut collectives, mut messages) = (0.0, 0.0, 0.0);
        let mut gather = |each: f64| {
            bytes += each * others;
            collectives += 1.0;
            messages += others;
        };
        gather(16.0 + self.parameters.div_ceil(8) as f64);
        self.sums.iter().for_each(|s| gather(8.0 * *s as f64));
        if self.group > 1 {
            // The norm of all gradients.
            gather(8.0);
        }
        if self.group > 1 && self.ranks > self.group {
            gather(8.0);
        }
        collectives += buckets(self.everywhere);
        messages += 2.0 * others * buckets(self.everywhere);
        bytes += 4.0 * 2.0 * self.everywhere as f64 * others / self.ranks as f64;
        let groups = self.ranks / self.group.max(1);
        if self.group > 1 {
            if groups > 1 {
                let of_others = (groups - 1) as f64 / groups as f64;
                bytes += 4.0 * 2.0 * self.own_experts as f64 * of_others;
                collectives += 2.0 * buckets(self.own_experts);
                messages += 2.0 * others * buckets(self.own_experts);
            }
            // Counts, and tokens out, back, and both once more.
            let values = self.away * self.assignments * (4.0 * self.dim as f64 + 2.0);
            let own = part(self.experts, self.group, 0).len();
            let counts = others + (self.group - 1) as f64 * own as f64;
            let layers = self.layers as f64;
            bytes += 4.0 * layers * (values + counts);
            collectives += 5.0 * layers;
            messages += 5.0 * others * layers;
        }
        Traffic {
            bytes: (bytes.round() + 16.0 * others * collectives) as u64,
            messages: (messages + others * collectives) as u64,
        }
    }
}

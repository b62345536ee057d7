//! Experts that lie on several ranks: tokens are sent to them, and what they make of the tokens comes back.
//!
//! ```text
//! forward:    x[t], w  ->  rank of the expert      f_e(x[t])  ->  rank of the token      y[t] = sum_e w f_e(x[t])
//! backward:   dy[t]    ->  rank of the expert      dx, dw     ->  rank of the token
//! ```
//!
//! Of each expert the rows of all ranks lie one rank's after another's, as they would in one process that has the whole batch.

use std::sync::Arc;

use dfdx::prelude::{Cpu, Tape};
use mass_routing::{AnyRouter, RoutingPlan};

use super::gate::Gated;
use super::moe::{Held, TakenExpert, put_all, route_back, take_all};
use super::routing_loss::LossGradients;
use super::{Activations, MoeExpert};
use crate::error::{ModelError, into_dfdx};
use crate::kernels::gemm::Store;
use crate::kernels::moe_ffn::{self as kernel, ExpertWeights, FfnShape, Grouped, Hidden};
use crate::kernels::scratch::Scratch;
use crate::kernels::vector::{add_assign, axpy};
use crate::parallel::Ranks;

/// Who sends what to whom.
struct Routes {
    ranks: Ranks,
    /// For each rank the assignments of this rank's tokens that it computes, those of its experts one after another.
    out: Vec<Vec<u32>>,
    /// For each expert of this rank, how many rows come from each rank.
    counts: Vec<Vec<usize>>,
    /// This rank's part of all tokens.
    part: f32,
}

impl Routes {
    fn new(plan: &RoutingPlan, ranks: &Ranks, owners: &[usize]) -> Result<Self, ModelError> {
        let group = ranks.group();
        let owned = |position: usize| (0..owners.len()).filter(move |&e| owners[e] == position);
        let (mut send, mut to, mut out) = (Vec::new(), Vec::new(), Vec::new());
        for rank in 0..ranks.size() {
            let (before, mut assignments) = (send.len(), Vec::new());
            send.push(plan.num_tokens() as f32);
            if group.contains(&rank) {
                for e in owned(rank - group.start) {
                    send.push(plan.load(e) as f32);
                    assignments.extend(plan.segment(e).map(|a| a as u32));
                }
            }
            to.push(send.len() - before);
            out.push(assignments);
        }
        let (received, from) = ranks.exchange(&send, &to)?;
        let mut counts = vec![vec![0; ranks.size()]; owned(ranks.rank() - group.start).count()];
        let (mut rest, mut all) = (&received[..], 0.0);
        for (rank, n) in from.into_iter().enumerate() {
            let (own, others) = rest.split_at(n);
            rest = others;
            all += f64::from(own.first().copied().unwrap_or(0.0));
            for (counts, &n) in counts.iter_mut().zip(own.get(1..).unwrap_or_default()) {
                counts[rank] = n as usize;
            }
        }
        Ok(Self {
            ranks: ranks.clone(),
            out,
            counts,
            part: (plan.num_tokens() as f64 / all) as f32,
        })
    }

    /// Rows that come from each rank.
    fn incoming(&self) -> Vec<usize> {
        let of = |rank: usize| self.counts.iter().map(|c| c[rank]).sum();
        (0..self.out.len()).map(of).collect()
    }

    /// For each run of rows that comes from one rank for one expert, in the order of the experts: the rank, where the run stands in
    /// what comes from that rank, and its length.
    fn runs(&self) -> Vec<(usize, usize, usize)> {
        let (mut at, mut runs) = (vec![0; self.out.len()], Vec::new());
        for counts in &self.counts {
            for (rank, &n) in counts.iter().enumerate() {
                runs.push((rank, at[rank], n));
                at[rank] += n;
            }
        }
        runs
    }

    /// Sends `width` values of each assignment to its expert's rank; returns those that come here, by expert.
    fn send_out(
        &self,
        width: usize,
        mut put: impl FnMut(usize, &mut Vec<f32>),
    ) -> Result<Vec<f32>, ModelError> {
        let all: usize = self.out.iter().map(Vec::len).sum();
        let mut send = Vec::with_capacity(all * width);
        let assignments = self.out.iter().flatten();
        assignments.for_each(|&a| put(a as usize, &mut send));
        let to: Vec<usize> = self.out.iter().map(|out| out.len() * width).collect();
        let (received, from) = self.ranks.exchange(&send, &to)?;
        let starts = starts(&from);
        let mut rows = Vec::with_capacity(received.len());
        for (rank, at, n) in self.runs() {
            let start = starts[rank] + at * width;
            rows.extend_from_slice(&received[start..start + n * width]);
        }
        Ok(rows)
    }

    /// Sends `width` values of each row back, in the order that it came; returns those of each assignment of this rank's tokens.
    fn send_back(&self, width: usize, rows: &[f32]) -> Result<Vec<f32>, ModelError> {
        let to: Vec<usize> = self.incoming().iter().map(|n| n * width).collect();
        let starts_of = starts(&to);
        let (mut send, mut rest) = (vec![0.0; rows.len()], rows);
        for (rank, at, n) in self.runs() {
            let (own, others) = rest.split_at(n * width);
            let start = starts_of[rank] + at * width;
            send[start..start + own.len()].copy_from_slice(own);
            rest = others;
        }
        let (received, _) = self.ranks.exchange(&send, &to)?;
        let mut of_assignments = vec![0.0; received.len()];
        let assignments = self.out.iter().flatten();
        for (&a, row) in assignments.zip(received.chunks_exact(width)) {
            of_assignments[a as usize * width..][..width].copy_from_slice(row);
        }
        Ok(of_assignments)
    }
}

fn starts(counts: &[usize]) -> Vec<usize> {
    let mut next = 0;
    let start = |n: &usize| {
        next += n;
        next - n
    };
    counts.iter().map(start).collect()
}

/// What comes to this rank's experts, each row a token of its own.
struct Rows {
    x: Vec<f32>,
    weights: Vec<f32>,
    ones: Vec<f32>,
    expert_offsets: Vec<u32>,
    each: Vec<u32>,
    each_end: Vec<u32>,
}

impl Rows {
    fn new(routes: &Routes, received: &[f32], dim: usize) -> Self {
        let n = received.len() / (dim + 1);
        let (mut x, mut weights) = (Vec::with_capacity(n * dim), Vec::with_capacity(n));
        for row in received.chunks_exact(dim + 1) {
            x.extend_from_slice(&row[..dim]);
            weights.push(row[dim]);
        }
        let mut expert_offsets = vec![0];
        for counts in &routes.counts {
            let before = expert_offsets.last().copied().unwrap_or(0);
            expert_offsets.push(before + counts.iter().sum::<usize>() as u32);
        }
        Self {
            x,
            weights,
            ones: vec![1.0; n],
            expert_offsets,
            each: (0..n as u32).collect(),
            each_end: (0..=n as u32).collect(),
        }
    }

    fn len(&self) -> usize {
        self.each.len()
    }

    fn grouped<'a>(&'a self, weights: &'a [f32]) -> Grouped<'a> {
        Grouped {
            expert_offsets: &self.expert_offsets,
            tokens: &self.each,
            weights,
            token_offsets: &self.each_end,
            token_assignments: &self.each,
        }
    }

    fn load(&self, expert: usize) -> u32 {
        self.expert_offsets[expert + 1] - self.expert_offsets[expert]
    }
}

/// The output of a mixture layer whose experts lie on the ranks that `owners` says, by their place in the group.
pub(super) fn run<T: Tape<f32, Cpu>>(
    tape: &mut T,
    x: Activations,
    experts: &[MoeExpert],
    (gated, losses, router): (Gated, LossGradients, AnyRouter),
    plan: Arc<RoutingPlan>,
    shape: FfnShape,
    (ranks, owners): (&Ranks, &[usize]),
) -> Result<Activations, ModelError> {
    let (n, dim) = *x.shape();
    let routes = Routes::new(&plan, ranks, owners)?;
    // Of each assignment its token.
    let tokens: Vec<u32> = plan.tokens().to_vec();
    let row = move |t: u32| t as usize * dim..(t as usize + 1) * dim;
    let of_token = |plan: &RoutingPlan, t: u32| {
        let offsets = &plan.token_offsets()[t as usize..t as usize + 2];
        plan.token_assignments()[offsets[0] as usize..offsets[1] as usize].to_vec()
    };
    let received = routes.send_out(dim + 1, |a, send| {
        send.extend_from_slice(&x[row(tokens[a])]);
        send.push(plan.weights()[a]);
    })?;
    let rows = Rows::new(&routes, &received, dim);
    drop(received);
    let position = ranks.rank() - ranks.group().start;
    let own = experts.iter().zip(owners).filter(|(_, o)| **o == position);
    let own: Vec<&MoeExpert> = own.map(|(expert, _)| expert).collect();
    let weights = own.iter().map(|e| e.network.weights());
    let weights = weights.collect::<Result<Vec<ExpertWeights<'_>>, _>>()?;
    let mut hidden = T::OWNS_TAPE.then(|| Hidden::take(shape, rows.len()));
    let mut made = Scratch::take(rows.len() * dim);
    if rows.len() > 0 {
        let plan = rows.grouped(&rows.ones);
        kernel::forward(&rows.x, &weights, plan, shape, hidden.as_mut(), &mut made);
    }
    let outputs = routes.send_back(dim, &made)?;
    let mut y = Scratch::zeros(n * dim);
    for t in 0..n as u32 {
        let to = &mut y[row(t)];
        for a in of_token(&plan, t) {
            let a = a as usize;
            axpy(plan.weights()[a], &outputs[a * dim..][..dim], to);
        }
    }

    let held: Vec<Held> = own.iter().map(|e| Held::of(&e.network)).collect();
    Activations::output(tape, y, (n, dim), move |g, dy| {
        let Some(mut hidden) = hidden else {
            return Ok(());
        };
        // Of the mean over all tokens, as if one process had them all.
        let part = routes.part;
        let sent = routes.send_out(dim, |a, send| {
            send.extend(dy[row(tokens[a])].iter().map(|d| d * part));
        });
        let dy_rows = sent.map_err(into_dfdx)?;
        let mut taken = take_all(&held, |e| rows.load(e) > 0, g)?;
        let (mut dx_rows, mut dw) = (vec![0.0; rows.len() * dim], vec![0.0; rows.len()]);
        if rows.len() > 0 {
            let weights: Vec<ExpertWeights<'_>> = held.iter().map(Held::weights).collect();
            let mut gradients: Vec<_> = taken.iter_mut().map(TakenExpert::gradients).collect();
            kernel::backward(
                &rows.x,
                &weights,
                rows.grouped(&rows.weights),
                shape,
                &mut hidden,
                &dy_rows,
                (&mut dx_rows, Store::Replace),
                &mut gradients,
                &mut dw,
            );
        }
        put_all(&held, |e| rows.load(e) > 0, taken, g)?;
        let mut back = Vec::with_capacity(rows.len() * (dim + 1));
        for (dx, dw) in dx_rows.chunks_exact(dim).zip(&dw) {
            back.extend_from_slice(dx);
            back.push(*dw);
        }
        let back = routes.send_back(dim + 1, &back).map_err(into_dfdx)?;
        let mut dx = x.take_gradient(g)?;
        if dx.store == Store::Replace {
            dx.values.fill(0.0);
        }
        let mut d_weights = Scratch::take(plan.num_assignments());
        let mut own = vec![0.0; dim];
        for t in 0..n as u32 {
            for a in of_token(&plan, t) {
                let from = &back[a as usize * (dim + 1)..][..dim + 1];
                d_weights[a as usize] = from[dim] / part;
                own.iter_mut().zip(from).for_each(|(o, f)| *o = f / part);
                add_assign(&mut dx.values[row(t)], &own);
            }
        }
        let gate = (&gated, &losses, &router);
        route_back(gate, &plan, (&x, &d_weights), dx.values, g)
    })
}

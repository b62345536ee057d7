//! Experts divided among the ranks of a group.

use mass_expand::ExpertId;

use super::{ParallelError, Ranks};
use crate::error::ModelError;
use crate::growth::Mixtures;
use crate::nn::MoeLayer;
use crate::ops::MoeExpert;
use crate::optim::{AdamW, Gradients, ParameterState};
use crate::param::{Parameters, join};

/// Counts of updates travel as two numbers that f32 has.
const HALF: u64 = 1 << 24;

/// Divides the experts of every mixture among the ranks of a group, in turn: each keeps the networks of its own, weights and
/// moments, and gives up the others. Gate rows and all else stay on every rank.
///
/// Without groups ([`Ranks::in_groups`]) nothing is done.
///
/// # Errors
/// Those of the model.
pub fn divide<M: Mixtures>(
    ranks: &Ranks,
    model: &mut M,
    optimizer: &mut AdamW,
) -> Result<(), ModelError> {
    optimizer.set_ranks(ranks);
    if !ranks.divides_experts() {
        return Ok(());
    }
    for l in 0..model.mixtures() {
        let (experts, owners) = model.mixture_mut(l).experts_and_owners();
        let of = ranks.group().len();
        *owners = (0..experts.len()).map(|e| e % of).collect();
        for (expert, owner) in experts.iter_mut().zip(owners.iter()) {
            if *owner == ranks.place() {
                expert.network.params_mut().try_for_each(|p| p.hold(None))?;
            }
        }
    }
    release(ranks, model, optimizer);
    Ok(())
}

/// Gives up what other ranks hold: after [`whole`].
pub fn release<M: Mixtures>(ranks: &Ranks, model: &mut M, optimizer: &mut AdamW) {
    if !ranks.divides_experts() {
        return;
    }
    for l in 0..model.mixtures() {
        let name = model.mixture_name(l);
        let moe = model.mixture_mut(l);
        moe.set_together(false);
        let ids = moe.ids().to_vec();
        let (experts, owners) = moe.experts_and_owners();
        for ((expert, id), owner) in experts.iter_mut().zip(ids).zip(owners.iter()) {
            if *owner != ranks.place() {
                give_up(
                    expert,
                    &join(&name, &format!("experts.{}", id.0)),
                    optimizer,
                );
            }
        }
    }
}

/// Drops an expert's network, with its moments.
fn give_up(expert: &mut MoeExpert, prefix: &str, optimizer: &mut AdamW) {
    expert.network.visit(prefix, &mut |name, _| {
        optimizer.state_mut().remove(&name);
    });
    expert.network.params_mut().for_each(|p| p.release());
}

/// Brings all experts to the first rank, with their moments, so that it has the model of one process; [`release`] gives them up
/// again. What travels, and the memory that the first rank needs meanwhile, is that of all experts.
///
/// # Errors
/// [`ModelError::Parallel`]; [`ParallelError::Unsupported`] if the experts are not [divided](divide).
pub fn whole<M: Mixtures>(
    ranks: &Ranks,
    model: &mut M,
    optimizer: &mut AdamW,
) -> Result<(), ModelError> {
    if !ranks.divides_experts() {
        return Ok(());
    }
    if (0..model.mixtures()).any(|l| model.mixture(l).owners().is_empty()) {
        let what = "experts cannot be brought together that are not divided";
        return Err(ParallelError::Unsupported(what.into()).into());
    }
    // One expert at a time: no rank needs room for more to send, and no message is larger.
    for l in 0..model.mixtures() {
        let name = model.mixture_name(l);
        let moe = model.mixture_mut(l);
        moe.set_together(ranks.is_first());
        let ids = moe.ids().to_vec();
        let prefix = |e: usize| join(&name, &format!("experts.{}", ids[e].0));
        let (experts, owners) = moe.experts_and_owners();
        let in_first_group = ranks.rank() == ranks.place();
        for (e, expert) in experts
            .iter_mut()
            .enumerate()
            .filter(|(e, _)| owners[*e] != 0)
        {
            let (mut send, mut to) = (Vec::new(), vec![0; ranks.size()]);
            if in_first_group && owners[e] == ranks.place() {
                write(expert, &prefix(e), optimizer, &mut send);
                to[0] = send.len();
            }
            let (received, _) = ranks.exchange(&send, &to)?;
            if ranks.is_first() {
                read(expert, &prefix(e), optimizer, &mut &received[..])?;
            }
        }
    }
    Ok(())
}

/// Hands a newcomer's network, gradient and moments over to the rank in another place of the group.
pub(crate) fn move_newcomer(
    ranks: &Ranks,
    layer: &mut MoeLayer,
    (name, newcomer, to): (&str, ExpertId, usize),
    gradients: &mut impl Gradients,
    optimizer: &mut AdamW,
) -> Result<(), ModelError> {
    let index = layer.index_of(newcomer)?;
    let prefix = join(name, &format!("experts.{}", newcomer.0));
    let (experts, owners) = layer.experts_and_owners();
    let (expert, from) = (&mut experts[index], owners[index]);
    if from == to {
        return Ok(());
    }
    owners[index] = to;
    let (mut send, mut counts) = (Vec::new(), vec![0; ranks.size()]);
    if from == ranks.place() {
        write(expert, &prefix, optimizer, &mut send);
        for param in expert.network.params() {
            let gradient = gradients.copy(param)?;
            send.push(if gradient.is_some() { 1.0 } else { 0.0 });
            send.extend(gradient.unwrap_or_default());
            gradients.replace(param, None)?;
        }
        give_up(expert, &prefix, optimizer);
        counts[ranks.group().start + to] = send.len();
    }
    let (received, _) = ranks.exchange(&send, &counts)?;
    if to == ranks.place() {
        let mut rest = &received[..];
        read(expert, &prefix, optimizer, &mut rest)?;
        for param in expert.network.params() {
            if take(&mut rest, 1)?[0] > 0.0 {
                gradients.set(param, take(&mut rest, param.len())?.to_vec())?;
            }
        }
    }
    Ok(())
}

/// The place in the group whose experts had the fewest tokens; of several the one with fewer experts, and then the first.
pub(crate) fn least_loaded(ranks: &Ranks, owners: &[usize], loads: &[f64]) -> usize {
    let of = |place: usize| {
        let own = owners.iter().zip(loads).filter(move |(o, _)| **o == place);
        own.fold((0.0, 0_usize), |(sum, n), (_, load)| (sum + load, n + 1))
    };
    let least = |a: &usize, b: &usize| {
        let ((a, of_a), (b, of_b)) = (of(*a), of(*b));
        a.total_cmp(&b).then(of_a.cmp(&of_b))
    };
    (0..ranks.group().len()).min_by(least).unwrap_or(0)
}

/// An expert's network: of each parameter the values, and the moments if there are some.
fn write(expert: &MoeExpert, prefix: &str, optimizer: &AdamW, to: &mut Vec<f32>) {
    expert.network.visit(prefix, &mut |name, param| {
        to.extend_from_slice(param.values());
        match optimizer.state().get(&name) {
            Some(ParameterState { m, v, step }) => {
                to.extend([1.0, (step % HALF) as f32, (step / HALF) as f32]);
                to.extend_from_slice(m);
                to.extend_from_slice(v);
            }
            None => to.push(0.0),
        }
    });
}

/// [`write`], read back.
fn read(
    expert: &mut MoeExpert,
    prefix: &str,
    optimizer: &mut AdamW,
    from: &mut &[f32],
) -> Result<(), ModelError> {
    let mut names = Vec::new();
    expert
        .network
        .visit(prefix, &mut |name, _| names.push(name));
    for (param, name) in expert.network.params_mut().zip(names) {
        let n = param.shape().iter().product();
        param.hold(Some(take(from, n)?.to_vec()))?;
        if take(from, 1)?[0] > 0.0 {
            let step = take(from, 2)?;
            let state = ParameterState {
                step: step[0] as u64 + step[1] as u64 * HALF,
                m: take(from, n)?.to_vec().into(),
                v: take(from, n)?.to_vec().into(),
            };
            optimizer.state_mut().insert(name, state);
        }
    }
    Ok(())
}

/// Cuts the front off what was received.
fn take<'a>(rest: &mut &'a [f32], n: usize) -> Result<&'a [f32], ModelError> {
    if rest.len() < n {
        let what = "less of an expert than it has";
        return Err(ParallelError::Transport(what.into()).into());
    }
    let (front, back) = rest.split_at(n);
    *rest = back;
    Ok(front)
}

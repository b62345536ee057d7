use mass_routing::AnyRouter;

use super::{BUCKET, ParallelError, Ranks};
use crate::error::ModelError;
use crate::gradients::CpuGradients;
use crate::growth::Mixtures;
use crate::kernels::scratch::give_back;
use crate::ops::RoutingLoss;
use crate::param::{Held, Param, Parameters};
use crate::pass::TrainPass;
use crate::place::PlacedGradients;

/// Refuses a model whose layers look at a batch as a whole, so that ranks with a share of it each would compute something else.
///
/// # Errors
/// [`ParallelError::Unsupported`], naming what does.
pub fn check<M: Mixtures>(ranks: &Ranks, model: &M) -> Result<(), ModelError> {
    if ranks.is_alone() {
        return Ok(());
    }
    for l in 0..model.mixtures() {
        let moe = model.mixture(l);
        let whole = match innermost(&moe.router()) {
            AnyRouter::ExpertChoice(_) => Some("expert-choice routing, which compares all tokens"),
            _ => None,
        };
        let losses = &moe.config().losses;
        let sorts = |loss: &RoutingLoss| matches!(loss, RoutingLoss::Dirichlet { .. });
        let whole = whole.or(losses
            .iter()
            .any(sorts)
            .then_some("the Dirichlet prior, which sorts all tokens"));
        if let Some(what) = whole {
            let what = format!("{what} of a batch, cannot be computed from shares of it");
            return Err(ParallelError::Unsupported(what).into());
        }
    }
    Ok(())
}

/// The router behind any noise.
fn innermost(router: &AnyRouter) -> &AnyRouter {
    match router {
        AnyRouter::Noisy(noisy) => innermost(noisy.inner()),
        other => other,
    }
}

/// Makes a pass over this rank's share of a batch one over the whole batch, as far as its loss and gradients go: both become the
/// means over the ranks, weighted by `weight`, the number of targets of each share. Token losses and what layers have noted stay
/// those of the share.
///
/// A parameter that has a gradient on any rank has one on every rank afterwards. Returns the sum of the weights.
///
/// # Errors
/// [`ModelError::Parallel`]; [`ParallelError::Unsupported`] for gradients on a device.
pub fn reduce<M: Parameters + ?Sized>(
    ranks: &Ranks,
    model: &M,
    pass: &mut TrainPass<PlacedGradients>,
    weight: u64,
) -> Result<u64, ModelError> {
    if ranks.is_alone() {
        return Ok(weight);
    }
    #[cfg_attr(
        not(feature = "cuda"),
        allow(clippy::infallible_destructuring_match, reason = "there are devices")
    )]
    let gradients = match &mut pass.gradients {
        PlacedGradients::Cpu(gradients) => gradients,
        #[cfg(feature = "cuda")]
        PlacedGradients::Cuda(_) => {
            let what = "gradients on a device, which only processors' are exchanged of yet";
            return Err(ParallelError::Unsupported(what.into()).into());
        }
    };
    let mut params = Vec::new();
    model.visit("", &mut |_, param| params.push(param));
    let mut found = Vec::with_capacity(params.len());
    for param in &params {
        found.push(param.find_gradient(gradients)?.is_some());
    }
    let mut own = Vec::with_capacity(16 + found.len() / 8);
    own.extend((f64::from(pass.loss) * weight as f64).to_le_bytes());
    own.extend(weight.to_le_bytes());
    let bits = |of: &[bool]| of.iter().rev().fold(0, |byte, &b| byte << 1 | u8::from(b));
    own.extend(found.chunks(8).map(bits));
    let (mut loss, mut total, mut weights) = (0.0, 0, Vec::with_capacity(ranks.size()));
    for (rank, other) in ranks.gather_bytes(&own)?.iter().enumerate() {
        if other.len() != own.len() {
            let what = format!("parameters in {} bytes, not {}", other.len(), own.len());
            return Err(ParallelError::OutOfStep { rank, what }.into());
        }
        let eight = |at: usize| other[at..at + 8].try_into().expect("eight bytes");
        loss += f64::from_le_bytes(eight(0));
        let weight = u64::from_le_bytes(eight(8));
        weights.push(weight as f64);
        total += weight;
        for (i, found) in found.iter_mut().enumerate() {
            *found |= other[16 + i / 8] >> (i % 8) & 1 == 1;
        }
    }
    if total == 0 {
        return Err(ModelError::shape("targets of all ranks", &[1], &[0]));
    }
    weights.iter_mut().for_each(|w| *w /= total as f64);
    pass.loss = (loss / total as f64) as f32;
    let there = params.iter().zip(found).filter(|(_, found)| *found);
    let there: Vec<&Param> = there.map(|(param, _)| *param).collect();
    let held = |how: Held| there.iter().copied().filter(move |p| p.held() == how);
    let everywhere: Vec<&Param> = held(Held::Everywhere).collect();
    sum_gradients(ranks, &everywhere, gradients, &weights)?;
    if params.iter().any(|p| p.held() != Held::Everywhere) {
        // Rows of all ranks of a group, each weighted by its part of the batch, are in them already.
        let mut sums = Vec::new();
        for param in held(Held::Here) {
            match param.find_gradient(gradients)? {
                Some(gradient) => sums.extend_from_slice(gradient),
                None => sums.resize(sums.len() + param.len(), 0.0),
            }
        }
        ranks.sum_over_groups(&mut sums)?;
        let mut rest = &sums[..];
        for param in held(Held::Here) {
            let (own, others) = rest.split_at(param.len());
            match param.find_gradient(gradients)? {
                Some(gradient) => gradient.copy_from_slice(own),
                None => param.set_gradient(gradients, own.to_vec())?,
            }
            rest = others;
        }
    }
    Ok(total)
}

/// Small gradients travel together, large ones alone: none is copied that does not have to be.
fn sum_gradients(
    ranks: &Ranks,
    params: &[&Param],
    gradients: &mut CpuGradients,
    weights: &[f64],
) -> Result<(), ModelError> {
    let (mut bucket, mut inside) = (Vec::new(), Vec::new());
    let send = |bucket: &mut Vec<f32>,
                inside: &mut Vec<&Param>,
                gradients: &mut CpuGradients|
     -> Result<(), ModelError> {
        ranks.weighted_sum(bucket, weights)?;
        let mut rest = &bucket[..];
        for param in inside.drain(..) {
            let (own, others) = rest.split_at(param.len());
            match param.find_gradient(gradients)? {
                Some(gradient) => gradient.copy_from_slice(own),
                None => param.set_gradient(gradients, own.to_vec())?,
            }
            rest = others;
        }
        bucket.clear();
        Ok(())
    };
    for &param in params {
        if param.len() >= BUCKET {
            let own = param.take_gradient(gradients)?;
            let mut gradient = own.unwrap_or_else(|| vec![0.0; param.len()]);
            ranks.weighted_sum(&mut gradient, weights)?;
            param.set_gradient(gradients, gradient)?;
            continue;
        }
        if bucket.len() + param.len() > BUCKET {
            send(&mut bucket, &mut inside, gradients)?;
        }
        match param.find_gradient(gradients)? {
            Some(gradient) => bucket.extend_from_slice(gradient),
            None => bucket.resize(bucket.len() + param.len(), 0.0),
        }
        inside.push(param);
    }
    if !inside.is_empty() {
        send(&mut bucket, &mut inside, gradients)?;
    }
    give_back(bucket);
    Ok(())
}

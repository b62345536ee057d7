use std::collections::HashSet;

use mass_routing::AnyRouter;

use super::sums::{Travelling, sum};
use super::{ParallelError, Ranks};
use crate::error::ModelError;
use crate::growth::Mixtures;
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
/// [`ModelError::Parallel`]; [`ParallelError::Unsupported`] for gradients on a device; [`ModelError::Shape`] if no rank has a target,
/// or `weight` is not the number of targets that an overlapping pass had; [`ModelError::Config`] if 64 bits do not count the targets
/// of all ranks. Gradients are lost then.
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
    let mut summed_before = HashSet::new();
    if let Some(meanwhile) = pass.meanwhile.take() {
        let (counted, summed, waiting) = meanwhile.end()?;
        if counted != weight {
            return Err(ModelError::shape(
                "targets of a share",
                &[counted as usize],
                &[weight as usize],
            ));
        }
        for one in summed {
            summed_before.insert(one.arrive(gradients)?.id());
        }
        for one in waiting {
            one.arrive(gradients)?;
        }
    }
    let mut params = Vec::new();
    model.visit("", &mut |_, param| params.push(param));
    params.retain(|param| !summed_before.contains(&param.handle().id()));
    let mut rest = Vec::with_capacity(params.len());
    for param in &params {
        let divided = param.held() != Held::Everywhere;
        rest.push(Travelling::take(param.handle(), divided, gradients)?);
    }
    let loss = f64::from(pass.loss) * weight as f64;
    let (loss, total) = sum(ranks, (loss, weight), &mut rest)?;
    pass.loss = (loss / total as f64) as f32;
    let found: Vec<bool> = rest.iter().map(|one| one.found).collect();
    for one in rest {
        one.arrive(gradients)?;
    }
    let there = params.iter().zip(found).filter(|(_, found)| *found);
    let here: Vec<&Param> = there
        .map(|(param, _)| *param)
        .filter(|p| p.held() == Held::Here)
        .collect();
    if params.iter().any(|p| p.held() != Held::Everywhere) {
        // Rows of all ranks of a group, each weighted by its part of the batch, are in them already.
        let mut sums = Vec::new();
        for param in &here {
            match param.find_gradient(gradients)? {
                Some(gradient) => sums.extend_from_slice(gradient),
                None => sums.resize(sums.len() + param.len(), 0.0),
            }
        }
        ranks.sum_over_groups(&mut sums)?;
        let mut rest = &sums[..];
        for param in &here {
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

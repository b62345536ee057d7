//! What a layer's gradients and routing say of its experts.

use mass_expand::{ExpertObservation, RoutingObservation};
use mass_routing::{GateGradient, Router, RoutingPlan};

use super::GradientNorm;
use crate::error::ModelError;
use crate::mixtures::Mixtures;
use crate::nn::MoeLayer;
use crate::optim::Gradients;
use crate::parallel::Ranks;
use crate::param::{Held, Param};
use crate::pass::{LayerTrace, TrainPass};

/// What a controller is told of each expert of a layer: gradient norm, load and share of the loss. The routing entropy, which
/// one choice alone asks for, is that of [`routing_entropies`].
///
/// The share of the loss is `mass_routing::RoutingPlan::loss_shares`.
///
/// # Errors
/// [`ModelError::Shape`] if there is not one loss a token, or the layer has another number of experts than when it was traced;
/// [`ModelError::NoGradient`] if an expert has tokens but no gradient: the gradients are not those of the pass that was traced;
/// [`ModelError::Routing`] for a loss that is NaN or infinite.
pub fn observe(
    layer: &MoeLayer,
    trace: &LayerTrace,
    token_losses: &[f32],
    gradients: &mut impl Gradients,
    norm: GradientNorm,
) -> Result<Vec<ExpertObservation>, ModelError> {
    observe_with(layer, trace, token_losses, gradients, Some(norm), false)
}

/// [`observe`], with gradient norms of zero where nobody asks for them: they cost a pass over all gradients. With the routing
/// entropy if `entropy`.
fn observe_with(
    layer: &MoeLayer,
    trace: &LayerTrace,
    token_losses: &[f32],
    gradients: &mut impl Gradients,
    norm: Option<GradientNorm>,
    entropy: bool,
) -> Result<Vec<ExpertObservation>, ModelError> {
    let plan = &trace.plan;
    if token_losses.len() != plan.num_tokens() {
        return Err(ModelError::shape(
            "token losses",
            &[plan.num_tokens()],
            &[token_losses.len()],
        ));
    }
    let (traced, experts) = (plan.num_experts(), layer.experts().len());
    if traced != experts {
        return Err(ModelError::shape("experts traced", &[experts], &[traced]));
    }
    let shares = plan.loss_shares(token_losses)?;
    let entropies = match entropy {
        true => routing_entropies(plan)?,
        false => vec![None; experts],
    };
    let squares = match norm {
        Some(norm) => squares(layer, trace, gradients, norm)?,
        None => vec![0.0; experts],
    };
    let mut observed = Vec::with_capacity(shares.len());
    for (e, &id) in layer.ids().iter().enumerate() {
        observed.push(ExpertObservation {
            id,
            gradient_norm: squares[e].sqrt(),
            cosine: None,
            load: plan.load(e) as u64,
            loss_share: shares[e],
            routing_entropy: entropies[e],
        });
    }
    Ok(observed)
}

/// What a controller is told of every layer, of the rows of all ranks: gradients are theirs already.
pub(super) fn observe_among<M: Mixtures, G: Gradients>(
    ranks: &Ranks,
    model: &M,
    pass: &mut TrainPass<G>,
    norm: impl Fn(usize) -> Option<GradientNorm>,
    entropy: bool,
) -> Result<(Vec<Vec<ExpertObservation>>, Vec<RoutingObservation>), ModelError> {
    let (mut observed, mut routing) = (Vec::new(), Vec::new());
    for (l, trace) in pass.layers.iter().enumerate() {
        let (layer, losses) = (model.mixture(l), &pass.token_losses);
        let gradients = &mut pass.gradients;
        observed.push(observe_with(
            layer,
            trace,
            losses,
            gradients,
            norm(l),
            entropy,
        )?);
        routing.push(observe_routing(layer, &trace.plan));
    }
    if ranks.is_alone() {
        return Ok((observed, routing));
    }
    // Sums, in whose place shares and means come again once they are those of all ranks.
    let mut sums = Vec::new();
    for (l, trace) in pass.layers.iter().enumerate() {
        let losses = trace.plan.loss_sums(&pass.token_losses)?;
        for (expert, loss) in observed[l].iter().zip(losses) {
            let load = expert.load as f64;
            sums.extend([load, loss, expert.routing_entropy.unwrap_or(0.0) * load]);
        }
        // Where each rank has the gradients of its own experts alone, those of the first group count.
        for (expert, owner) in observed[l].iter().zip(model.mixture(l).owners()) {
            let own = *owner == ranks.rank();
            sums.push(if own {
                expert.gradient_norm.powi(2)
            } else {
                0.0
            });
        }
        let RoutingObservation {
            tokens,
            assignments,
            constant,
        } = routing[l];
        sums.extend([tokens, assignments, constant].map(|n| n as f64));
    }
    ranks.sum(&mut sums)?;
    let mut rest = &sums[..];
    for (l, (experts, routing)) in observed.iter_mut().zip(&mut routing).enumerate() {
        let (of_experts, after) = rest.split_at(3 * experts.len());
        let (squares, after) = after.split_at(model.mixture(l).owners().len());
        for (expert, square) in experts.iter_mut().zip(squares) {
            expert.gradient_norm = square.sqrt();
        }
        let total: f64 = of_experts.iter().skip(1).step_by(3).sum();
        for (expert, sums) in experts.iter_mut().zip(of_experts.chunks_exact(3)) {
            expert.load = sums[0] as u64;
            expert.loss_share = (total > 0.0).then(|| sums[1] / total);
            expert.routing_entropy = (entropy && sums[0] > 0.0).then(|| sums[2] / sums[0]);
        }
        *routing = RoutingObservation {
            tokens: after[0] as u64,
            assignments: after[1] as u64,
            constant: after[2] as u64,
        };
        rest = &after[3..];
    }
    Ok((observed, routing))
}

/// The sum of squares of each expert's gradient.
fn squares(
    layer: &MoeLayer,
    trace: &LayerTrace,
    gradients: &mut impl Gradients,
    norm: GradientNorm,
) -> Result<Vec<f64>, ModelError> {
    let mut params: Vec<&Param> = Vec::new();
    let mut counts = Vec::with_capacity(layer.experts().len());
    for expert in layer.experts() {
        let before = params.len();
        let here = expert.network.fc1.0.held() != Held::Elsewhere;
        if here {
            params.push(&expert.network.fc1.0);
        }
        if norm == GradientNorm::AllParameters && here {
            params.extend([
                &expert.gate,
                &expert.network.fc1.1,
                &expert.network.fc2.0,
                &expert.network.fc2.1,
            ]);
            params.extend(expert.network.up.iter().flat_map(|(w, b)| [w, b]));
        }
        counts.push(params.len() - before);
    }
    // All at once: a device is waited for once.
    let mut found = gradients.sums_of_squares(&params)?.into_iter();
    let mut squares = Vec::with_capacity(counts.len());
    for (e, (count, id)) in counts.into_iter().zip(layer.ids()).enumerate() {
        let mut sum = 0.0;
        for own in found.by_ref().take(count) {
            match own {
                Some(own) => sum += own,
                None if trace.plan.load(e) == 0 => {}
                None => return Err(ModelError::NoGradient(format!("expert {id}"))),
            }
        }
        squares.push(sum);
    }
    Ok(squares)
}

/// How undecided the routing of each expert's tokens is, in nats; `None` for an expert without tokens.
///
/// ```text
/// entropy[e] = mean over the tokens t of e of  -sum_j r[t, j] ln r[t, j]
/// ```
///
/// with `r[t, ..]` the softmax of the token's logits over all experts in use, whatever the router selected of them.
///
/// # Errors
/// [`ModelError::Config`] for the plan of a router without a softmax: top-any compares each logit with a threshold of its own,
/// which is no distribution over experts.
///
/// # Examples
/// ```
/// use mass_model::growth::routing_entropies;
/// use mass_routing::{Combine, Router, RoutingPlan, TopK};
///
/// let logits = ndarray::array![[0.0_f32, 0.0, -100.0], [100.0, 0.0, 0.0]];
/// let mut plan = RoutingPlan::default();
/// TopK::new(1, Combine::Raw)?.route(logits.view(), None, &mut plan)?;
/// // Both tokens go to expert 0: the first is torn between two, the second is not.
/// let entropies = routing_entropies(&plan)?;
/// assert!((entropies[0].unwrap() - 2f64.ln() / 2.0).abs() < 1e-6);
/// assert_eq!(entropies[1..], [None, None]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn routing_entropies(plan: &RoutingPlan) -> Result<Vec<Option<f64>>, ModelError> {
    if !plan.has_probabilities() {
        let what = "the routing entropy needs a router with a softmax, and one that keeps it";
        return Err(ModelError::Config(what.into()));
    }
    let negative = |&r: &f32| match f64::from(r) {
        r if r > 0.0 => r * r.ln(),
        _ => 0.0,
    };
    // Of each token once, however many experts it has. What was routed nowhere is not looked at.
    let of_token: Vec<f64> = plan
        .probabilities()
        .outer_iter()
        .map(|row| (-row.iter().map(negative).sum::<f64>()).max(0.0))
        .collect();
    let entropies = (0..plan.num_experts()).map(|e| {
        let tokens = &plan.tokens()[plan.segment(e)];
        let sum: f64 = tokens.iter().map(|&t| of_token[t as usize]).sum();
        (!tokens.is_empty()).then(|| sum / tokens.len() as f64)
    });
    Ok(entropies.collect())
}

/// What a controller is told of a layer's router.
///
/// A token's weight is constant where it has one expert, at a weight of 1 but for the rounding of the division. DynMoE's gate,
/// whose gradient goes past the weights, and one that has a loss of its own learn from such tokens all the same.
fn observe_routing(layer: &MoeLayer, plan: &RoutingPlan) -> RoutingObservation {
    let learns_otherwise =
        !layer.config().losses.is_empty() || layer.experts().iter().any(|e| e.threshold.is_some());
    // Straight-through weights are 1 too, and the gate learns from the probability behind them.
    let through = layer.router().gate_gradient() == GateGradient::Always;
    let probabilities = plan.probabilities();
    let weight_of_first = |t: usize| {
        let first = plan.token_offsets()[t] as usize;
        if through && plan.has_probabilities() {
            return probabilities[(t, plan.token_experts()[first] as usize)];
        }
        plan.weights()[plan.token_assignments()[first] as usize]
    };
    let constant = (0..plan.num_tokens())
        .filter(|&t| plan.k(t) == 1 && (weight_of_first(t) - 1.0).abs() < 1e-6)
        .count();
    RoutingObservation {
        tokens: plan.num_tokens() as u64,
        assignments: plan.num_assignments() as u64,
        constant: if learns_otherwise { 0 } else { constant as u64 },
    }
}

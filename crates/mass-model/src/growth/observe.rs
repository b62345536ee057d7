//! What a layer's gradients and routing say of its experts.

use mass_expand::ExpertObservation;

use super::GradientNorm;
use crate::error::ModelError;
use crate::lm::LayerTrace;
use crate::nn::MoeLayer;
use crate::param::{CpuGradients, Param};

/// What a controller is told of each expert of a layer: gradient norm, load and share of the loss.
///
/// The share of the loss is `Σ_t w[t, e] loss[t]` over the tokens routed to the expert, divided by the same over all.
///
/// # Errors
/// [`ModelError::Shape`] if there is not one loss a token, or the layer has another number of experts than when it was traced.
pub fn observe(
    layer: &MoeLayer,
    trace: &LayerTrace,
    token_losses: &[f32],
    gradients: &mut CpuGradients,
    norm: GradientNorm,
) -> Result<Vec<ExpertObservation>, ModelError> {
    observe_with(layer, trace, token_losses, gradients, Some(norm))
}

/// [`observe`], with gradient norms of zero where nobody asks for them: they cost a pass over all gradients.
pub(super) fn observe_with(
    layer: &MoeLayer,
    trace: &LayerTrace,
    token_losses: &[f32],
    gradients: &mut CpuGradients,
    norm: Option<GradientNorm>,
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
    let shares: Vec<f64> = (0..plan.num_experts())
        .map(|e| {
            let segment = plan.segment(e);
            let tokens = &plan.tokens()[segment.clone()];
            let weights = &plan.weights()[segment];
            tokens
                .iter()
                .zip(weights)
                .map(|(&t, &w)| f64::from(w) * f64::from(token_losses[t as usize]))
                .sum()
        })
        .collect();
    let total: f64 = shares.iter().sum();
    let mut observed = Vec::with_capacity(shares.len());
    for (e, (expert, &id)) in layer.experts().iter().zip(layer.ids()).enumerate() {
        let mut squares = match norm {
            Some(_) => square_norm(&expert.fc1.0, gradients)?,
            None => 0.0,
        };
        if norm == Some(GradientNorm::AllParameters) {
            let up = expert.up.iter().flat_map(|(w, b)| [w, b]);
            let rest = [&expert.gate, &expert.fc1.1, &expert.fc2.0, &expert.fc2.1];
            for param in rest.into_iter().chain(up) {
                squares += square_norm(param, gradients)?;
            }
        }
        observed.push(ExpertObservation {
            id,
            gradient_norm: squares.sqrt(),
            cosine: None,
            load: plan.load(e) as u64,
            loss_share: (total > 0.0).then(|| shares[e] / total),
            routing_entropy: None,
        });
    }
    Ok(observed)
}

fn square_norm(param: &Param, gradients: &mut CpuGradients) -> Result<f64, ModelError> {
    // An expert without tokens has no gradient, and is not to be given one: an optimiser passes it over.
    let gradient = param.find_gradient(gradients)?;
    Ok(gradient.map_or(0.0, |g| crate::optim::sum_of_squares(g)))
}

//! The variants of the method, as the experiments set them.

use mass_expand::{ControllerParams, Reduction};
use mass_model::growth::{GradientNorm, GrowerConfig};
use mass_routing::Combine;

use crate::cli::Variant;

/// How a variant turns routing probabilities into weights: the paper takes them as they are, its code renormalises.
pub fn combine(variant: Variant) -> Combine {
    match variant {
        Variant::Paper => Combine::Raw,
        Variant::Reference | Variant::Ours => Combine::Renormalised,
    }
}

/// A variant as its authors set it.
pub fn growth(
    variant: Variant,
    layers: usize,
    experts: usize,
    experts_max: usize,
    steps: u64,
) -> GrowerConfig {
    let (controller, gradient_norm, redundancy_reduction) = match variant {
        Variant::Paper => (
            ControllerParams::paper(layers, experts, experts_max, steps),
            GradientNorm::AllParameters,
            Reduction::Mean,
        ),
        Variant::Reference => (
            ControllerParams::reference(layers, experts, experts_max, steps),
            GradientNorm::Fc1,
            Reduction::Sum,
        ),
        Variant::Ours => (
            ControllerParams::ours(layers, experts, experts_max, steps),
            GradientNorm::AllParameters,
            Reduction::Mean,
        ),
    };
    GrowerConfig {
        controller,
        gradient_norm,
        redundancy_weight: 0.01,
        redundancy_reduction,
    }
}

/// Lets splits happen in the first `percent` of the run, whatever the variant's own timing.
pub fn live_for(config: &mut GrowerConfig, steps: u64, percent: u64) {
    config.controller.phase.live_until = (steps * percent / 100).max(1);
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variants_differ_in_what_the_method_says() {
        let rules = |variant| {
            let g = growth(variant, 2, 6, 16, 2000);
            (
                combine(variant),
                g.gradient_norm,
                g.redundancy_weight,
                g.redundancy_reduction,
            )
        };
        let (all, fc1) = (GradientNorm::AllParameters, GradientNorm::Fc1);
        assert_eq!(
            rules(Variant::Paper),
            (Combine::Raw, all, 0.01, Reduction::Mean)
        );
        assert_eq!(
            rules(Variant::Reference),
            (Combine::Renormalised, fc1, 0.01, Reduction::Sum)
        );
        assert_eq!(
            rules(Variant::Ours),
            (Combine::Renormalised, all, 0.01, Reduction::Mean)
        );
        let named = |variant| growth(variant, 2, 6, 16, 2000).controller;
        assert_eq!(
            named(Variant::Paper),
            ControllerParams::paper(2, 6, 16, 2000)
        );
        assert_eq!(
            named(Variant::Reference),
            ControllerParams::reference(2, 6, 16, 2000)
        );
        assert_eq!(named(Variant::Ours), ControllerParams::ours(2, 6, 16, 2000));
        let mut half = growth(Variant::Paper, 2, 6, 16, 2000);
        live_for(&mut half, 2000, 50);
        assert_eq!(half.controller.phase.live_until, 1000);
    }
}

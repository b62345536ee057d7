//! The variants of the method, as the experiments set them.

use mass_expand::SplitOperator;
use mass_expand::{ControllerParams, Reduction};
use mass_model::growth::{GradientNorm, GrowerConfig};
use mass_model::nn::{GateConfig, MoeConfig, MoeLayer};
use mass_model::{Activation, seeded_rng};
use mass_routing::{Combine, GateGradient, Router, RouterConfig};

use crate::BenchError;
use crate::cli::Variant;

/// How a variant turns routing probabilities into weights: the paper takes them as they are, its code renormalises.
pub fn combine(variant: Variant) -> Combine {
    match variant {
        Variant::Paper => Combine::Raw,
        Variant::Reference | Variant::Ours => Combine::Renormalised,
    }
}

/// The router of a run: what the variant routes by, Top-p of mass `p`, unless another was asked for.
pub fn router(chosen: Option<&RouterConfig>, variant: Variant, p: f32) -> RouterConfig {
    chosen.cloned().unwrap_or(RouterConfig::TopP {
        p,
        combine: combine(variant),
    })
}

/// The gate that a router is made for: cosines for top-any, whose thresholds are set against them.
pub fn gate(router: &RouterConfig) -> GateConfig {
    match router {
        RouterConfig::TopAny { .. } => GateConfig::Cosine {
            projection: None,
            temperature: None,
        },
        _ => GateConfig::Linear,
    }
}

/// Reads `--router`.
///
/// # Errors
/// [`BenchError::Usage`]: what is wrong with it.
pub fn parse_router(text: Option<&str>) -> Result<Option<RouterConfig>, BenchError> {
    let usage = |e: mass_routing::RoutingError| BenchError::Usage(format!("--router: {e}"));
    let Some(text) = text else { return Ok(None) };
    let router: RouterConfig = text.parse().map_err(usage)?;
    router.build().map_err(usage)?;
    Ok(Some(router))
}

/// Refuses a router that a pool of `experts` cannot have, that teaches its gate nothing, or whose pool cannot be split as `growth`
/// says, before results of an earlier run are replaced.
///
/// # Errors
/// [`BenchError::Usage`]: what is wrong with it, and what to choose instead.
pub fn check_router(
    router: &RouterConfig,
    experts: usize,
    growth: Option<&GrowerConfig>,
) -> Result<(), BenchError> {
    let refuse = |what: String| Err(BenchError::Usage(format!("--router {router}: {what}")));
    let config = MoeConfig {
        gate: gate(router),
        ..MoeConfig::new(
            1,
            1,
            experts,
            Activation::Relu,
            router.clone().with_experts(experts),
        )
    };
    let layer = match MoeLayer::new(&config, &mut seeded_rng(0)) {
        Ok(layer) => layer,
        Err(e) => return refuse(e.to_string()),
    };
    let least = layer.router().least_experts();
    if least > experts {
        return refuse(format!(
            "it takes {least} experts a token, and the pool begins with {experts}"
        ));
    }
    if layer.router().gate_gradient() == GateGradient::Never {
        let what = "one expert a token with renormalised weights teaches the gate nothing; add combine=raw, or take more experts";
        return refuse(what.into());
    }
    let bisects = |g: &GrowerConfig| g.controller.operator == SplitOperator::Bisect;
    if config.gate != GateConfig::Linear && growth.is_some_and(bisects) {
        let what = "its gate is not linear, so MASS's variant `ours` cannot bisect its experts; choose --variant paper or reference";
        return refuse(what.into());
    }
    Ok(())
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

//! What is compared, whatever the study: a method is data, and its name says all that tells it from others.

use std::collections::BTreeMap;

use mass_cpd::AnyDetectorParams;
use mass_expand::{ControllerParams, Reduction, SplitOperator, StopRule};
use mass_model::growth::{GradientNorm, GrowerConfig};
use mass_model::nn::{GateConfig, MoeConfig, MoeLayer};
use mass_model::ops::RoutingLoss;
use mass_model::{Activation, ModelError, seeded_rng};
use mass_routing::{Combine, GateGradient, Router, RouterConfig, RoutingError};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::BenchError;
use crate::cli::Variant;
use crate::report::Run;

/// How the feed-forward network of a layer is replaced.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "method", deny_unknown_fields)]
pub enum Method {
    /// Not at all; in domain generalisation that is empirical risk minimisation.
    #[serde(alias = "erm")]
    Dense,
    /// By a fixed pool, each token with its top `k` and weights renormalised, unless another router is chosen.
    Static {
        /// Experts.
        experts: usize,
        /// Experts a token.
        k: usize,
        /// What routes instead.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        router: Option<RouterConfig>,
    },
    /// By DynMoE's pool; see [`dynmoe`](crate::dynmoe).
    #[serde(rename = "dynmoe")]
    DynMoe {
        /// Experts at the start.
        experts: usize,
        /// Experts at most.
        experts_max: usize,
    },
    /// By GMoE's pool: one expert a token behind a cosine gate with noise, and 0.01 times the mean of importance and load loss.
    /// The load loss compares logits with noisy logits; Tutel, which GMoE uses, compares probabilities with noisy logits.
    Gmoe {
        /// Experts.
        experts: usize,
    },
    /// By a pool that MASS grows.
    Mass(Mass),
}

/// One way to run MASS, or an ablation of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mass {
    /// Whose rules.
    pub variant: Variant,
    /// Mass of Top-p.
    pub p: f32,
    /// What routes instead of Top-p of mass `p`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub router: Option<RouterConfig>,
    /// Part of the run in which splits may happen, in percent; `None` for the variant's own.
    pub live_percent: Option<u64>,
    /// Experts at the start.
    pub experts: usize,
    /// Experts at most.
    pub experts_max: usize,
    /// Name of the ablation that this is, of [`ABLATIONS`] or of a study's own; empty for MASS itself.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub ablation: String,
    /// What its name says beside, such as `delta 0.1`; empty if nothing.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub label: String,
    /// Rules that differ from the variant's; see [`overridden`].
    #[serde(default, skip_serializing_if = "Overrides::is_empty")]
    pub overrides: Overrides,
}

/// Steps before and after a split of which a first seed's record has all that the detector behind it saw.
pub(crate) const TRACE: u64 = 30;

/// New values of rules by where they stand in a [`GrowerConfig`], such as `controller.alignment.absolute`.
pub type Overrides = BTreeMap<String, Value>;

/// Sizes of the pools of methods that a study names but does not list.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pool {
    /// Experts at the start.
    pub experts: usize,
    /// Experts at most.
    pub experts_max: usize,
    /// Experts a token, of a static pool.
    pub k: usize,
    /// Mass of Top-p.
    pub p: f32,
    /// Part of the run in which MASS may split, in percent; `None` for the variant's own.
    pub live_percent: Option<u64>,
}

/// MASS itself, no ablation of it.
pub(crate) const MASS: &str = "mass";

/// Its rival with a pool that grows without splits.
pub(crate) const DYNMOE: &str = "dynmoe";

/// What `--methods` may name in every study, beside [`ABLATIONS`]; `erm` is another name of `dense`.
pub const METHODS: &[&str] = &[MASS, "static", "dense", "erm", DYNMOE, "gmoe"];

/// Ablations of MASS and baselines of growth by name: each differs from its variant (the paper's, unless another is asked for)
/// in these rules, as JSON.
pub const ABLATIONS: &[(&str, &str)] = &[
    (
        "detector_only",
        r#"{"controller.trigger": "detector_only"}"#,
    ),
    (
        "alignment_only",
        r#"{"controller.trigger": "alignment_only"}"#,
    ),
    (
        "plain_cloning",
        r#"{"controller.operator": {"clone": {"decomposition": null, "preserve_mass": false}}}"#,
    ),
    ("bisect", r#"{"controller.operator": {"bisect": {}}}"#),
    ("no_redundancy_loss", r#"{"redundancy_weight": 0.0}"#),
    ("no_stop", r#"{"controller.stop": "never"}"#),
    ("inherit_moments", r#"{"controller.moments": "inherit"}"#),
    (
        "schedule",
        r#"{"controller.trigger": {"schedule": {"first": "3 %", "every": "1 %"}}}"#,
    ),
    ("random_expert", r#"{"controller.choice": "random"}"#),
    ("most_loaded", r#"{"controller.choice": "most_loaded"}"#),
    ("loss_share", r#"{"controller.choice": "loss_share"}"#),
];

/// Whether every study has a method of that name.
#[must_use]
pub fn is_known(name: &str) -> bool {
    METHODS.contains(&name) || ABLATIONS.iter().any(|(ablation, _)| *ablation == name)
}

/// The error for a method that does not exist; it lists those that do, and a study's own.
#[must_use]
pub fn unknown(name: &str, own: &[String]) -> BenchError {
    let names = METHODS.iter().chain(ABLATIONS.iter().map(|(name, _)| name));
    let names = names.copied().chain(own.iter().map(String::as_str));
    let names = names.collect::<Vec<_>>().join(", ");
    BenchError::Usage(format!("unknown method `{name}`; there are: {names}"))
}

/// The methods of a name: MASS in every variant or the one that is asked for, anything else once. `None` if there is no such name.
pub fn named(name: &str, pool: &Pool, variant: Option<Variant>) -> Option<Vec<Method>> {
    let &Pool {
        experts,
        experts_max,
        k,
        ..
    } = pool;
    let mass = |variant| Mass::of(variant, pool);
    let method = match name {
        "dense" | "erm" => Method::Dense,
        "static" => Method::top_k(experts, k),
        DYNMOE => Method::DynMoe {
            experts,
            experts_max,
        },
        "gmoe" => Method::Gmoe { experts },
        MASS => {
            let all = Variant::ALL.into_iter();
            let asked = all.filter(|v| variant.is_none_or(|asked| asked == *v));
            return Some(asked.map(|v| Method::Mass(mass(v))).collect());
        }
        _ => {
            let (name, rules) = ABLATIONS.iter().find(|(ablation, _)| *ablation == name)?;
            let overrides = serde_json::from_str(rules).expect("written above");
            Method::Mass(Mass {
                ablation: (*name).to_owned(),
                overrides,
                ..mass(variant.unwrap_or(Variant::Paper))
            })
        }
    };
    Some(vec![method])
}

impl Method {
    /// A static pool whose tokens are routed by Top-p of mass `p`.
    pub(crate) fn top_p(experts: usize, p: f32, combine: Combine) -> Self {
        Self::Static {
            experts,
            k: 1,
            router: Some(RouterConfig::TopP { p, combine }),
        }
    }

    /// A static pool with top-k. A single weight that is renormalised is 1, and teaches the gate nothing: it is left as it is, as by
    /// the authors' code.
    pub(crate) fn top_k(experts: usize, k: usize) -> Self {
        let combine = Combine::Raw;
        let router = (k == 1).then_some(RouterConfig::TopK { k, combine });
        Self::Static { experts, k, router }
    }

    /// What it is called in results.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Dense => "dense",
            Self::Static { .. } => "static",
            Self::DynMoe { .. } => DYNMOE,
            Self::Gmoe { .. } => "gmoe",
            Self::Mass(m) if m.ablation.is_empty() => MASS,
            Self::Mass(m) => &m.ablation,
        }
    }

    /// A run of it, with what tells it from runs of other methods.
    #[must_use]
    pub fn run(&self, seed: u64) -> Run {
        let mut run = Run::new(self.name(), seed);
        match self {
            Self::Dense => {}
            Self::Static { experts, k, router } => {
                run.experts_init = Some(*experts);
                match router {
                    Some(router) => run.setting = Some(router.to_string()),
                    None => run.k = Some(*k),
                }
            }
            Self::DynMoe { experts, .. } => run.experts_init = Some(*experts),
            Self::Gmoe { experts } => (run.experts_init, run.k) = (Some(*experts), Some(1)),
            Self::Mass(m) => {
                run.variant = Some(m.variant.to_string());
                run.setting = Some(m.setting());
                run.experts_init = Some(m.experts);
            }
        }
        run
    }

    /// The mixtures that take the place of networks of `hidden` between `dim`; `None` for the dense model. `seed` is of the noise
    /// of a gate that has some.
    #[must_use]
    pub fn mixture(
        &self,
        dim: usize,
        hidden: usize,
        activation: Activation,
        seed: u64,
    ) -> Option<MoeConfig> {
        let moe = |experts: usize, router: RouterConfig| MoeConfig {
            gate: gate(&router),
            ..MoeConfig::new(
                dim,
                hidden,
                experts,
                activation,
                router.with_experts(experts),
            )
        };
        Some(match *self {
            Self::Dense => return None,
            Self::Static {
                experts,
                k,
                ref router,
            } => {
                let combine = Combine::Renormalised;
                let own = RouterConfig::TopK { k, combine };
                moe(experts, router.clone().unwrap_or(own))
            }
            Self::DynMoe { experts, .. } => moe(experts, RouterConfig::TopAny { experts }),
            Self::Gmoe { experts } => {
                let top_1 = RouterConfig::TopK {
                    k: 1,
                    combine: Combine::Raw,
                };
                let noisy = RouterConfig::Noisy {
                    std: 1.0 / experts as f32,
                    seed,
                    inner: Box::new(top_1),
                };
                MoeConfig {
                    gate: GateConfig::Cosine {
                        projection: Some(256),
                        temperature: Some(0.5),
                    },
                    losses: vec![
                        RoutingLoss::Importance { weight: 0.005 },
                        RoutingLoss::Load { weight: 0.005 },
                    ],
                    ..moe(experts, noisy)
                }
            }
            Self::Mass(ref m) => moe(m.experts, m.router()),
        })
    }

    /// The same with another router, if its routing is a choice: whether it is.
    pub fn routed_by(&mut self, chosen: &RouterConfig) -> bool {
        let router = match self {
            Self::Static { router, .. } => router,
            Self::Mass(m) => &mut m.router,
            Self::Dense | Self::DynMoe { .. } | Self::Gmoe { .. } => return false,
        };
        *router = Some(chosen.clone());
        true
    }

    /// MASS's rules for a run of so many steps in `layers` mixtures, `None` for other methods; `tune` is what a task changes in
    /// them before they are fitted to the length of the run.
    ///
    /// # Errors
    /// [`BenchError::Usage`] for an override that no rules have.
    pub fn growth(
        &self,
        layers: usize,
        steps: u64,
        seed: u64,
        tune: impl FnOnce(&mut GrowerConfig),
    ) -> Result<Option<GrowerConfig>, BenchError> {
        let Self::Mass(m) = self else { return Ok(None) };
        let mut config = rules(m.variant, layers, m.experts, m.experts_max, steps);
        config.controller.seed = seed;
        // One run of each method says what its detectors saw of every split.
        config.controller.trace = if seed == 0 { TRACE } else { 0 };
        tune(&mut config);
        m.fit(&mut config, steps);
        overridden(&config, &m.overrides, steps).map(Some)
    }

    /// Whether it needs data that it is not trained on, to judge newcomers by.
    #[must_use]
    pub fn needs_probe(&self) -> bool {
        let rules = self.growth(1, 1000, 0, |_| ()).ok().flatten();
        rules.is_some_and(|g| {
            let redundant = g.controller.pruning.and_then(|p| p.redundant);
            matches!(g.controller.stop, StopRule::HeldOut { .. }) || redundant.is_some()
        })
    }

    /// Refuses what no run can have, before results of an earlier run are replaced: rules that do not exist or contradict each
    /// other, a pool without experts or with settings that its routing cannot have, and a chosen router that teaches its gate
    /// nothing, that the pool is too small for, or whose pool cannot be split.
    ///
    /// # Errors
    /// [`BenchError::Usage`]: what is wrong, and what to choose instead.
    pub fn check(&self) -> Result<(), BenchError> {
        let refuse = |why: String| BenchError::Usage(format!("{}: {why}", self.name()));
        if let Self::Mass(Mass {
            live_percent: Some(percent @ 101..),
            ..
        }) = self
        {
            let why = format!("splits in {percent} % of the run; it must be at most 100");
            return Err(refuse(why));
        }
        let growth = self.growth(1, 1000, 0, |_| ())?;
        if let Some(growth) = &growth {
            let checked = growth.controller.check();
            checked.map_err(|e| refuse(e.to_string()))?;
        }
        match self {
            Self::Static {
                experts,
                router: Some(router),
                ..
            }
            | Self::Mass(Mass {
                experts,
                router: Some(router),
                ..
            }) => check_router(router, *experts, growth.as_ref()),
            _ => {
                let own = self.mixture(1, 1, Activation::Relu, 0);
                let own = own.map(|config| MoeLayer::new(&config, &mut seeded_rng(0)));
                own.transpose().map(drop).map_err(|e| refuse(e.to_string()))
            }
        }
    }
}

impl Mass {
    /// A variant with Top-p and a pool of which nothing is known but how it begins: at its own time, and four times as large at
    /// most.
    #[must_use]
    pub fn new(variant: Variant, p: f32, experts: usize) -> Self {
        Self {
            variant,
            p,
            router: None,
            live_percent: None,
            experts,
            experts_max: experts.saturating_mul(4),
            ablation: String::new(),
            label: String::new(),
            overrides: Overrides::new(),
        }
    }

    /// A variant in a pool of these sizes.
    #[must_use]
    pub fn of(variant: Variant, pool: &Pool) -> Self {
        Self {
            live_percent: pool.live_percent,
            experts_max: pool.experts_max,
            ..Self::new(variant, pool.p, pool.experts)
        }
    }

    /// Thresholds that a run too short to learn anything still passes: a check that splits are wired up.
    pub(crate) fn loose(&self) -> Overrides {
        let mut loose = Overrides::from([(
            "controller.alignment".to_owned(),
            json!({ "absolute": 1.0 }),
        )]);
        let rules: &[(&str, Value)] = match self.variant {
            Variant::Calibrated => &[
                (
                    "controller.trigger",
                    json!({ "schedule": { "first": "20 %", "every": "20 %" } }),
                ),
                ("controller.stop.held_out.wait", json!(3)),
            ],
            Variant::Ours => &[],
            Variant::Paper | Variant::Reference => &[
                ("controller.watch.expert.windowed_z.alpha", json!(0.5)),
                ("controller.watch.expert.windowed_z.warmup", json!(10)),
                ("controller.watch.expert.windowed_z.window", json!(10)),
            ],
        };
        loose.extend(
            rules
                .iter()
                .map(|(path, v)| ((*path).to_owned(), v.clone())),
        );
        loose
    }

    fn setting(&self) -> String {
        let routing = match &self.router {
            Some(router) => router.to_string(),
            None => format!("p {}", self.p),
        };
        let timing = match self.live_percent {
            Some(percent) => format!("live {percent} %"),
            None => "own timing".into(),
        };
        let label = self.label.as_str();
        let parts = [&routing, &timing, label].into_iter();
        let parts: Vec<&str> = parts.filter(|part| !part.is_empty()).collect();
        parts.join(", ")
    }

    /// What routes: the router that was chosen, or Top-p with the variant's weights. The paper takes probabilities as they are,
    /// its code renormalises; ours does too, but for the gradient.
    fn router(&self) -> RouterConfig {
        let combine = match self.variant {
            Variant::Paper => Combine::Raw,
            Variant::Reference | Variant::Calibrated => Combine::Renormalised,
            Variant::Ours => Combine::StraightThrough,
        };
        let own = RouterConfig::TopP { p: self.p, combine };
        self.router.clone().unwrap_or(own)
    }

    /// Fits rules to the length of the run: the phase, and the horizon that the level is meant over.
    fn fit(&self, config: &mut GrowerConfig, steps: u64) {
        let controller = &mut config.controller;
        if let Some(percent) = self.live_percent {
            controller.phase.live_until = part_of(steps, percent);
        }
        let watch = &mut controller.watch;
        for detector in [&mut watch.expert, &mut watch.layer, &mut watch.loss] {
            if let Some(AnyDetectorParams::CalibratedCusum(cusum)) = detector {
                cusum.horizon = controller.phase.live_until;
            }
        }
    }
}

/// A variant as its authors set it.
fn rules(
    variant: Variant,
    layers: usize,
    experts: usize,
    experts_max: usize,
    steps: u64,
) -> GrowerConfig {
    let of = match variant {
        Variant::Paper => ControllerParams::paper,
        Variant::Reference => ControllerParams::reference,
        Variant::Calibrated => ControllerParams::calibrated,
        Variant::Ours => ControllerParams::ours,
    };
    let mut config = GrowerConfig::new(of(layers, experts, experts_max, steps));
    if variant == Variant::Reference {
        config.gradient_norm = GradientNorm::Fc1;
        config.redundancy_reduction = Reduction::Sum;
    }
    config
}

/// Rules with some of them replaced. A text that ends in ` %`, such as `"20 %"`, stands for that part of the run's steps, at
/// least one.
///
/// ```
/// use mass_bench::method::overridden;
/// use mass_expand::{AlignmentThreshold, ControllerParams, Trigger};
/// use mass_model::growth::GrowerConfig;
///
/// let rules = GrowerConfig::new(ControllerParams::paper(1, 4, 8, 2000));
/// let text = r#"{"controller.alignment.absolute": 0.1,
///     "controller.trigger": {"schedule": {"first": "3 %", "every": 20}}}"#;
/// let new = overridden(&rules, &serde_json::from_str(text)?, 2000)?;
/// assert_eq!(new.controller.alignment, AlignmentThreshold::Absolute(0.1));
/// assert_eq!(new.controller.trigger, Trigger::Schedule { first: 60, every: 20, splits: 1 });
/// assert_eq!(new.controller.stop, rules.controller.stop);
/// // What no rules have is refused.
/// let unknown = serde_json::from_str(r#"{"controller.alignment.delta": 0.1}"#)?;
/// assert!(overridden(&rules, &unknown, 2000).is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`BenchError::Usage`] naming the override that no rules have.
pub fn overridden(
    rules: &GrowerConfig,
    overrides: &Overrides,
    steps: u64,
) -> Result<GrowerConfig, BenchError> {
    let mut config = rules.clone();
    for (path, new) in overrides {
        let refuse = |why: String| BenchError::Usage(format!("rule {path} = {new}: {why}"));
        let mut value = json!(config);
        let place = path.split('.').try_fold(&mut value, |at, name| {
            let inside = at.as_object_mut()?;
            inside.get_mut(name)
        });
        *place.ok_or_else(|| refuse("there is no such rule here".into()))? =
            in_steps(new.clone(), steps);
        config = serde_json::from_value(value).map_err(|e| refuse(e.to_string()))?;
    }
    Ok(config)
}

/// So many percent of a run's steps, at least one.
fn part_of(steps: u64, percent: u64) -> u64 {
    (steps.saturating_mul(percent) / 100).max(1)
}

/// Parts of a run as numbers of steps.
fn in_steps(value: Value, steps: u64) -> Value {
    match value {
        Value::String(text) => {
            let percent = text.strip_suffix(" %").and_then(|n| n.parse::<u64>().ok());
            percent.map_or(Value::String(text), |n| json!(part_of(steps, n)))
        }
        Value::Object(fields) => fields
            .into_iter()
            .map(|(name, value)| (name, in_steps(value, steps)))
            .collect(),
        other => other,
    }
}

/// The gate that a router is made for: cosines for top-any, whose thresholds are set against them.
fn gate(router: &RouterConfig) -> GateConfig {
    match router {
        RouterConfig::TopAny { .. } => GateConfig::Cosine {
            projection: None,
            temperature: None,
        },
        _ => GateConfig::Linear,
    }
}

/// Whether the gate of a router is linear, so that an expert's row in it can be bisected.
pub(crate) fn gate_is_linear(router: &RouterConfig) -> bool {
    gate(router) == GateConfig::Linear
}

/// Reads `--router`.
pub(crate) fn parse_router(text: &str) -> Result<RouterConfig, RoutingError> {
    let router: RouterConfig = text.parse()?;
    router.build()?;
    Ok(router)
}

fn check_router(
    router: &RouterConfig,
    experts: usize,
    growth: Option<&GrowerConfig>,
) -> Result<(), BenchError> {
    let refuse = |what: String| Err(BenchError::Usage(format!("--router {router}: {what}")));
    let router = router.clone().with_experts(experts);
    let config = MoeConfig {
        gate: gate(&router),
        ..MoeConfig::new(1, 1, experts, Activation::Relu, router)
    };
    let layer = match MoeLayer::new(&config, &mut seeded_rng(0)) {
        Ok(layer) => layer,
        Err(ModelError::Routing(RoutingError::TooFewExperts { k, available })) => {
            return refuse(format!(
                "it takes {k} experts a token, and the pool begins with {available}"
            ));
        }
        Err(e) => return refuse(e.to_string()),
    };
    if layer.router().gate_gradient() == GateGradient::Never {
        let what = "one expert a token with renormalised weights teaches the gate nothing; add combine=straight_through or combine=raw, or take more experts";
        return refuse(what.into());
    }
    let bisects = |g: &GrowerConfig| matches!(g.controller.operator, SplitOperator::Bisect(_));
    if config.gate != GateConfig::Linear && growth.is_some_and(bisects) {
        let what = "its gate is not linear, so MASS's variants `calibrated` and `ours` cannot bisect its experts; choose --variant paper or reference";
        return refuse(what.into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use mass_expand::{Choice, Trigger};

    use super::*;

    const POOL: Pool = Pool {
        experts: 6,
        experts_max: 8,
        k: 2,
        p: 0.5,
        live_percent: Some(60),
    };

    fn mass(variant: Variant) -> Method {
        named("mass", &POOL, Some(variant)).unwrap().remove(0)
    }

    fn key(method: &Method) -> String {
        method.run(3).key().to_string()
    }

    #[test]
    fn variants_differ_in_what_the_method_says() {
        let of = |variant| {
            let g = rules(variant, 2, 6, 16, 2000);
            let combine = match mass(variant).mixture(4, 4, Activation::Relu, 0) {
                Some(MoeConfig {
                    router: RouterConfig::TopP { combine, .. },
                    ..
                }) => combine,
                other => panic!("{other:?}"),
            };
            let redundancy = (g.redundancy_weight, g.redundancy_reduction);
            (combine, g.gradient_norm, redundancy, g.controller)
        };
        let (all, fc1) = (GradientNorm::AllParameters, GradientNorm::Fc1);
        let (mean, sum) = ((0.01, Reduction::Mean), (0.01, Reduction::Sum));
        let paper = ControllerParams::paper(2, 6, 16, 2000);
        assert_eq!(of(Variant::Paper), (Combine::Raw, all, mean, paper));
        let code = ControllerParams::reference(2, 6, 16, 2000);
        let renormalised = Combine::Renormalised;
        assert_eq!(of(Variant::Reference), (renormalised, fc1, sum, code));
        let calibrated = ControllerParams::calibrated(2, 6, 16, 2000);
        let expected = (renormalised, all, mean, calibrated);
        assert_eq!(of(Variant::Calibrated), expected);
        let ours = ControllerParams::ours(2, 6, 16, 2000);
        assert_eq!(
            of(Variant::Ours),
            (Combine::StraightThrough, all, mean, ours)
        );
        let probing = Variant::ALL.map(|v| mass(v).needs_probe());
        assert_eq!(probing, [false, false, true, false]);
    }

    #[test]
    fn a_key_tells_methods_apart_and_published_ones_keep_theirs() {
        for (method, name) in [
            (Method::Dense, "dense/seed3"),
            (Method::Gmoe { experts: 6 }, "gmoe/K6/k1/seed3"),
            (
                mass(Variant::Calibrated),
                "mass/calibrated/p 0.5, live 60 %/K6/seed3",
            ),
        ] {
            assert_eq!(key(&method), name);
        }
        let own = Method::Mass(Mass::new(Variant::Paper, 0.9, 5));
        assert_eq!(key(&own), "mass/paper/p 0.9, own timing/K5/seed3");
        let mut pool = named("static", &POOL, None).unwrap().remove(0);
        assert_eq!(key(&pool), "static/K6/k2/seed3");
        pool.routed_by(&"top_p:p=0.3".parse().unwrap());
        assert_eq!(
            key(&pool),
            "static/top_p:p=0.3,combine=renormalised/K6/seed3"
        );
        let labelled = Method::Mass(Mass {
            label: "delta 0.1".into(),
            ..Mass::new(Variant::Paper, 0.5, 5)
        });
        assert_eq!(
            key(&labelled),
            "mass/paper/p 0.5, own timing, delta 0.1/K5/seed3"
        );
        let names = METHODS.iter().chain(ABLATIONS.iter().map(|(name, _)| name));
        let all = names.filter(|name| **name != "erm");
        let all: Vec<Method> = all
            .flat_map(|name| named(name, &POOL, None).unwrap())
            .collect();
        let keys: std::collections::BTreeSet<String> = all.iter().map(key).collect();
        assert_eq!(keys.len(), all.len());
        assert_eq!(named("magic", &POOL, None), None);
        // Written and read back, each is itself.
        for method in all {
            let text = serde_json::to_string(&method).unwrap();
            assert_eq!(serde_json::from_str::<Method>(&text).unwrap(), method);
        }
    }

    #[test]
    fn ablations_differ_from_their_variant_in_what_they_are_called() {
        for (name, _) in ABLATIONS {
            for variant in [None, Some(Variant::Reference)] {
                let method = named(name, &POOL, variant).unwrap().remove(0);
                method.check().unwrap();
                let own = mass(variant.unwrap_or(Variant::Paper));
                let of = |m: &Method| m.growth(2, 2000, 1, |_| ()).unwrap().unwrap();
                assert_ne!(of(&method), of(&own), "{name}");
                of(&method).controller.check().unwrap();
                assert!(key(&method).starts_with(&format!("{name}/")));
            }
        }
        let of = |name| {
            let method = named(name, &POOL, None).unwrap().remove(0);
            method.growth(1, 2000, 1, |_| ()).unwrap().unwrap()
        };
        let (first, every) = (60, 20);
        let schedule = of("schedule").controller;
        assert_eq!(
            schedule.trigger,
            Trigger::Schedule {
                first,
                every,
                splits: 1
            }
        );
        assert_eq!(of("random_expert").controller.choice, Choice::Random);
        assert_eq!(of("no_redundancy_loss").redundancy_weight, 0.0);
        let wrong = Method::Mass(Mass {
            overrides: [("controller.magic".to_owned(), json!(1))].into(),
            ..Mass::new(Variant::Paper, 0.5, 5)
        });
        let refused = wrong.check().unwrap_err().to_string();
        assert!(refused.contains("controller.magic"), "{refused}");
        // Nothing is watched that a detector could raise an alarm on.
        let blind = named("detector_only", &POOL, Some(Variant::Ours)).unwrap();
        let refused = blind[0].check().unwrap_err().to_string();
        assert!(
            refused.starts_with("detector_only: ") && refused.contains("watched"),
            "{refused}"
        );
    }

    /// Runs of the lengths that GLUE's small tasks and the domains of PACS have leave room to judge whoever is split.
    #[test]
    fn short_runs_of_calibrated_rules_can_split_and_judge() {
        for (steps, ready) in [(148, 72), (200, 72), (217, 72), (780, 87), (5000, 200)] {
            let rules = mass(Variant::Calibrated).growth(2, steps, 0, |_| ());
            let controller = rules.unwrap().unwrap().controller;
            let reach = controller.check_reachable().unwrap().reach();
            assert_eq!(reach.first_split, Some(ready), "{steps}");
            assert_eq!(reach.last_split, Some(steps * 6 / 10 - 1));
            let StopRule::HeldOut { wait, .. } = controller.stop else {
                panic!("{:?}", controller.stop);
            };
            // Whoever is born last has its whole wait, and whoever is born first leaves room for another.
            assert!(reach.last_split.unwrap() + wait < steps, "{steps}");
            assert_eq!(reach.first_check, Some(ready + wait), "{steps}");
            assert!(reach.first_check.unwrap() < steps * 6 / 10, "{steps}");
        }
    }

    #[test]
    fn a_chosen_router_that_no_run_can_have_is_refused_with_a_remedy() {
        let routed = |router: &str, variant| {
            let mut method = mass(variant);
            method.routed_by(&router.parse().unwrap());
            method
        };
        for (router, variant, what) in [
            (
                "top_k:k=7",
                Variant::Paper,
                "takes 7 experts a token, and the pool begins with 6",
            ),
            ("top_k:k=1", Variant::Paper, "add combine=straight_through"),
            (
                "noisy:std=0.1/bias_balanced:k=1",
                Variant::Paper,
                "add combine=straight_through",
            ),
            ("top_any", Variant::Calibrated, "cannot bisect"),
            ("top_any", Variant::Ours, "cannot bisect"),
            ("noisy:std=0.1/top_any", Variant::Paper, "behind noise"),
        ] {
            let refused = routed(router, variant).check().unwrap_err().to_string();
            assert!(refused.contains(what), "{router}: {refused}");
        }
        for (router, variant) in [
            ("top_k:k=4", Variant::Paper),
            ("top_any", Variant::Reference),
            ("bias_balanced:k=1,combine=raw", Variant::Calibrated),
        ] {
            let method = routed(router, variant);
            method.check().unwrap();
            let mixture = method.mixture(4, 4, Activation::Relu, 0).unwrap();
            assert_eq!(mixture.gate, gate(&mixture.router));
        }
    }

    #[test]
    fn a_pool_that_no_run_can_have_is_refused() {
        let own = Mass::new(Variant::Paper, 0.5, 4);
        let top_p = |p| Method::Mass(Mass { p, ..own.clone() });
        let live = |live_percent| {
            Method::Mass(Mass {
                live_percent,
                ..own.clone()
            })
        };
        let fixed = |experts, k| Method::Static {
            experts,
            k,
            router: None,
        };
        for method in [top_p(1.0), live(Some(100)), fixed(4, 4), fixed(1, 1)] {
            method.check().unwrap();
        }
        for (method, part) in [
            (top_p(f32::NAN), "p must be"),
            (top_p(0.0), "p must be"),
            (top_p(1.5), "p must be"),
            (live(Some(101)), "101 % of the run"),
            (live(Some(u64::MAX)), "% of the run"),
            (fixed(4, 0), "k must be"),
            (fixed(4, 5), "5"),
            (fixed(0, 1), "0 experts"),
            (Method::Gmoe { experts: 0 }, "0 experts"),
        ] {
            let refused = method.check().unwrap_err().to_string();
            let named = refused.starts_with(&format!("{}: ", method.name()));
            assert!(named && refused.contains(part), "{refused}");
        }
        assert_eq!(
            Mass::new(Variant::Paper, 0.5, usize::MAX).experts_max,
            usize::MAX
        );
        let most = format!("{} %", u64::MAX);
        assert_eq!(in_steps(json!(most), 1000), json!(u64::MAX / 100));
    }

    /// A rival that is set up otherwise than by its authors flatters the method.
    #[test]
    fn rivals_have_their_authors_settings() {
        let of = |method: Method| method.mixture(8, 16, Activation::Relu, 5);
        assert_eq!(of(Method::Dense), None);
        let sizes = |config: &MoeConfig| (config.dim, config.hidden, config.experts);
        let gmoe = of(Method::Gmoe { experts: 6 }).unwrap();
        assert_eq!(sizes(&gmoe), (8, 16, 6));
        let cosine = GateConfig::Cosine {
            projection: Some(256),
            temperature: Some(0.5),
        };
        assert_eq!(gmoe.gate, cosine);
        let top_1 = RouterConfig::TopK {
            k: 1,
            combine: Combine::Raw,
        };
        let noisy = RouterConfig::Noisy {
            std: 1.0 / 6.0,
            seed: 5,
            inner: Box::new(top_1),
        };
        assert_eq!(gmoe.router, noisy);
        let weight = 0.005;
        let losses = [
            RoutingLoss::Importance { weight },
            RoutingLoss::Load { weight },
        ];
        assert_eq!(gmoe.losses, losses);
        let (experts, experts_max) = (6, 8);
        let dynmoe = of(Method::DynMoe {
            experts,
            experts_max,
        });
        let dynmoe = dynmoe.unwrap();
        assert_eq!(sizes(&dynmoe), (8, 16, 6));
        let cosine = GateConfig::Cosine {
            projection: None,
            temperature: None,
        };
        assert_eq!(dynmoe.gate, cosine);
        assert_eq!(dynmoe.router, RouterConfig::TopAny { experts });
        let p = 0.5;
        let calibrated = of(mass(Variant::Calibrated)).unwrap();
        let combine = Combine::Renormalised;
        assert_eq!(calibrated.router, RouterConfig::TopP { p, combine });
        assert!(calibrated.gate == GateConfig::Linear && calibrated.losses.is_empty());
    }
}

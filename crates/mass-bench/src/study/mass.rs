//! How the studies that fine-tune a pretrained model set MASS.

use mass_cpd::AnyDetectorParams;
use mass_expand::{AlignmentThreshold, StopRule, Trigger};
use mass_model::growth::GrowerConfig;
use mass_routing::RouterConfig;
use serde::{Deserialize, Serialize};

use crate::BenchError;
use crate::cli::{Preset, ReproduceArgs, Variant};
use crate::report::Run;
use crate::variants;

/// One way to run MASS.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct MassSetting {
    pub(super) variant: Variant,
    pub(super) p: f32,
    /// What routes instead of Top-p of mass `p`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) router: Option<RouterConfig>,
    /// Part of the run in which splits may happen, in percent; `None` for the variant's own.
    pub(super) live_percent: Option<u64>,
    pub(super) experts: usize,
    pub(super) experts_max: usize,
    /// Thresholds that a run too short to learn anything still passes: a check that splits are wired up.
    pub(super) loose: bool,
}

impl MassSetting {
    /// Writes into a run what tells it apart.
    pub(super) fn describe(&self, run: &mut Run) {
        run.method = "mass".into();
        run.variant = Some(self.variant.to_string());
        run.setting = Some(self.name());
        run.experts_init = Some(self.experts);
    }

    fn name(&self) -> String {
        let routing = match &self.router {
            Some(router) => router.to_string(),
            None => format!("p {}", self.p),
        };
        match self.live_percent {
            Some(percent) => format!("{routing}, live {percent} %"),
            None => format!("{routing}, own timing"),
        }
    }

    /// What routes.
    pub(super) fn router(&self) -> RouterConfig {
        let router = variants::router(self.router.as_ref(), self.variant, self.p);
        router.with_experts(self.experts)
    }

    /// Refuses a router that no run of these settings can have.
    pub(super) fn check_router(&self) -> Result<(), BenchError> {
        let Some(router) = &self.router else {
            return Ok(());
        };
        let rules = self.rules(1, 1000, 0);
        variants::check_router(router, self.experts, Some(&rules))
    }

    /// The variant's rules for `layers` mixtures in a run of so many steps, before [`fit`](Self::fit).
    pub(super) fn rules(&self, layers: usize, steps: u64, seed: u64) -> GrowerConfig {
        let (experts, most) = (self.experts, self.experts_max);
        let mut config = variants::growth(self.variant, layers, experts, most, steps);
        config.controller.seed = seed;
        config
    }

    /// Fits rules to the length of the run: the phase, and the horizon that the level is meant over.
    pub(super) fn fit(&self, config: &mut GrowerConfig, steps: u64) {
        if let Some(percent) = self.live_percent {
            variants::live_for(config, steps, percent);
        }
        let watch = &mut config.controller.watch;
        for detector in [&mut watch.expert, &mut watch.layer, &mut watch.loss] {
            if let Some(AnyDetectorParams::CalibratedCusum(cusum)) = detector {
                cusum.horizon = config.controller.phase.live_until;
            }
        }
        if self.loose {
            self.loosen(config, steps);
        }
    }

    fn loosen(&self, config: &mut GrowerConfig, steps: u64) {
        let controller = &mut config.controller;
        controller.alignment = AlignmentThreshold::Absolute(1.0);
        if let Some(AnyDetectorParams::WindowedZ(z)) = &mut controller.watch.expert {
            (z.alpha, z.warmup, z.window) = (0.5, 10, 10);
        }
        if self.variant == Variant::Ours {
            let every = (steps / 5).max(1);
            controller.trigger = Trigger::Schedule {
                first: every,
                every,
            };
            if let StopRule::HeldOut { wait, .. } = &mut controller.stop {
                *wait = 3;
            }
        }
    }
}

/// Whether a run is among those that `--methods` and `--variant` ask for; a variant is MASS's alone. Without one, `quick` has the
/// paper's and the other presets have all. `dense` is ERM too, as the dense model is called in domain generalisation.
pub(super) fn wanted(run: &Run, args: &ReproduceArgs) -> bool {
    let named = |method: &String| {
        *method == run.method || (method.as_str(), run.method.as_str()) == ("dense", "erm")
    };
    let by_name = args.methods.as_ref().is_none_or(|m| m.iter().any(named));
    let quick = (args.preset == Preset::Quick).then_some(Variant::Paper);
    let asked = args.variant.or(quick).map(|v| v.to_string());
    by_name && (asked.is_none() || run.variant.is_none() || run.variant == asked)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_dense_model_has_two_names_in_domain_generalisation() {
        for (method, kept) in [("dense", true), ("erm", true), ("gmoe", false)] {
            let args = ReproduceArgs::parsed(&["dg", "--preset", "smoke", "--methods", method]);
            assert_eq!(wanted(&Run::new("erm", 0), &args), kept, "{method}");
        }
    }

    /// Runs of the lengths that GLUE's small tasks and the domains of PACS have leave room to judge whoever is split.
    #[test]
    fn short_runs_of_ours_can_split_and_judge() {
        let setting = MassSetting {
            variant: Variant::Ours,
            p: 0.5,
            router: None,
            live_percent: Some(60),
            experts: 6,
            experts_max: 8,
            loose: false,
        };
        for (steps, ready) in [(148, 72), (200, 72), (217, 72), (780, 87), (5000, 200)] {
            let mut config = setting.rules(2, steps, 0);
            setting.fit(&mut config, steps);
            let reach = config.controller.check_reachable().unwrap().reach();
            assert_eq!(reach.first_split, Some(ready), "{steps}");
            assert_eq!(reach.last_split, Some(steps * 6 / 10 - 1));
            let StopRule::HeldOut { wait, .. } = config.controller.stop else {
                panic!("{:?}", config.controller.stop);
            };
            // Whoever is born last has its whole wait, and whoever is born first leaves room for another.
            assert!(reach.last_split.unwrap() + wait < steps, "{steps}");
            assert_eq!(reach.first_check, Some(ready + wait), "{steps}");
            assert!(reach.first_check.unwrap() < steps * 6 / 10, "{steps}");
        }
    }

    #[test]
    fn quick_has_one_variant_and_that_which_is_asked_for() {
        let run = |variant: Option<Variant>| Run {
            variant: variant.map(|v| v.to_string()),
            ..Run::new("mass", 0)
        };
        let all = [Variant::Paper, Variant::Reference, Variant::Ours];
        let kept = |line: &str| {
            let args = ReproduceArgs::parsed(&line.split(' ').collect::<Vec<_>>());
            assert!(wanted(&run(None), &args));
            all.map(|v| wanted(&run(Some(v)), &args))
        };
        assert_eq!(kept("glue --preset quick"), [true, false, false]);
        assert_eq!(
            kept("glue --preset quick --variant ours"),
            [false, false, true]
        );
        assert_eq!(kept("glue --preset full"), [true; 3]);
        assert_eq!(
            kept("glue --preset full --variant reference"),
            [false, true, false]
        );
    }
}

//! The sensitivity study: how far the paper's method depends on each of its settings, on GINC.
//!
//! Every pool begins with 5 experts and has at most 20. The base is the paper's variant, live for the first 30 % of the run; one
//! setting at a time differs from it, and then the three that decide how often a split is triggered, on a grid. Beside them are
//! static pools with the same routing.

use mass_routing::Combine;
use serde_json::{Value, json};

use super::plan::Plan;
use super::synthetic::{POOL, Synthetic, TASKS};
use crate::BenchError;
use crate::cli::{Preset, ReproduceArgs, Variant};
use crate::method::{Mass, Method};

/// Where the settings stand.
const DELTA: &str = "controller.alignment.absolute";
const ALPHA: &str = "controller.watch.expert.windowed_z.alpha";
const WARMUP: &str = "controller.watch.expert.windowed_z.warmup";
const WINDOW: &str = "controller.watch.expert.windowed_z.window";
const REDUNDANCY: &str = "redundancy_weight";

/// The plan of a preset.
///
/// # Errors
/// None: nothing has to be there.
pub fn plan(args: &ReproduceArgs) -> Result<Plan<Synthetic>, BenchError> {
    let family = Synthetic::fresh(args, &TASKS[..1]);
    let (family, seeds) = match args.preset {
        Preset::Smoke => (family.smoke(), 1),
        Preset::Quick => (family, 1),
        Preset::Full | Preset::Paper => (family, 5),
    };
    let statics = [5, 8, 12, 20].map(|experts| Method::top_p(experts, POOL.p, Combine::Raw));
    let mut settings = one_at_a_time();
    match args.preset {
        Preset::Smoke => settings.truncate(2),
        Preset::Quick => {}
        Preset::Full | Preset::Paper => settings.extend(grid()),
    }
    let settings = settings.into_iter().map(Method::Mass);
    let methods = statics.into_iter().chain(settings).collect();
    Ok(Plan::new(family, methods, POOL, seeds))
}

/// The base with some rules changed, called by what they are now.
fn with(rules: &[(&str, &str, Value)]) -> Mass {
    let named = rules.iter().map(|(name, _, value)| match value {
        Value::String(text) => format!("{name} {text}"),
        value => format!("{name} {value}"),
    });
    Mass {
        label: named.collect::<Vec<_>>().join(", "),
        overrides: rules
            .iter()
            .map(|(_, at, value)| ((*at).to_owned(), value.clone()))
            .collect(),
        ..Mass::of(Variant::Paper, &POOL)
    }
}

/// The base (delta 0.001, alpha 0.01, warm-up 5 %, window 9 %, p 0.5, live 30 %, redundancy weight 0.01), and what differs from it in one
/// setting.
fn one_at_a_time() -> Vec<Mass> {
    let of = |name, at, value: Value| with(&[(name, at, value)]);
    let base = || with(&[]);
    let mut all = vec![base()];
    all.extend([0.1, 0.01, 0.0001].map(|delta| of("delta", DELTA, json!(delta))));
    all.extend([0.001, 0.05, 0.1].map(|alpha| of("alpha", ALPHA, json!(alpha))));
    all.extend(["2 %", "15 %"].map(|part| of("warm-up", WARMUP, json!(part))));
    all.extend(["2 %", "5 %", "15 %"].map(|part| of("window", WINDOW, json!(part))));
    all.extend([0.0, 0.1, 1.0].map(|weight| of("redundancy", REDUNDANCY, json!(weight))));
    all.extend([0.3, 0.7, 0.9].map(|p| Mass { p, ..base() }));
    all.extend([5, 10, 20, 60].map(|live| Mass {
        live_percent: Some(live),
        ..base()
    }));
    all
}

/// The threshold of the alignment test by the level of the detector by the length of the expansion phase, without what is above.
fn grid() -> Vec<Mass> {
    let mut all = Vec::new();
    for delta in [0.1, 0.01] {
        for alpha in [0.001, 0.1] {
            for live in [10, 30, 60] {
                all.push(Mass {
                    live_percent: Some(live),
                    ..with(&[
                        ("delta", DELTA, json!(delta)),
                        ("alpha", ALPHA, json!(alpha)),
                    ])
                });
            }
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_setting_is_another_and_says_so() {
        let args = ReproduceArgs::parsed(&["sensitivity", "--preset", "full"]);
        let methods = plan(&args).unwrap().methods(&args).unwrap();
        let rules = methods.iter().map(|m| {
            let rules = m.growth(1, 2000, 0, |_| ()).unwrap();
            format!("{rules:?} {m:?}")
        });
        assert_eq!(rules.collect::<BTreeSet<_>>().len(), methods.len());
        let names: BTreeSet<String> = methods.iter().map(|m| m.run(0).key().to_string()).collect();
        assert_eq!(names.len(), methods.len());
        let base = one_at_a_time().remove(0);
        let changed = with(&[("window", WINDOW, json!("5 %"))]);
        let of = |m: Mass| Method::Mass(m).growth(1, 2000, 0, |_| ()).unwrap().unwrap();
        let (mut base, changed) = (of(base), of(changed));
        assert_ne!(base, changed);
        let Some(mass_cpd::AnyDetectorParams::WindowedZ(z)) = &mut base.controller.watch.expert
        else {
            panic!("{base:?}");
        };
        assert_eq!((z.window, z.warmup, z.alpha), (180, 100, 0.01));
        z.window = 100;
        assert_eq!(base, changed);
    }
}

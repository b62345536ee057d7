//! The regime study: where, if anywhere, the synthetic task has the paper's table.
//!
//! The paper reports static pools on GINC at 2.15 to 2.6 nats, and a fall of 0.4 from 5 to 15 experts. This study trains static
//! pools of 5, 10, 15 and 20 experts with top-2 in other regimes than the synthetic study: narrower experts, a narrower model, other
//! learning rates, shorter and longer training, and some of these together.

use super::plan::Plan;
use super::synthetic::{POOL, Regime, Synthetic, names};
use crate::BenchError;
use crate::cli::{Preset, ReproduceArgs};
use crate::method::Method;

/// Width of the model and of an expert, largest learning rate, steps.
const fn regime(dim: usize, hidden: usize, peak: f64, steps: u64) -> Regime {
    Regime {
        dim,
        hidden,
        peak,
        steps,
        ..Regime::BASE
    }
}

/// The regimes by the name of their task; `expert` and `model` are widths, `rate` the largest learning rate.
const REGIMES: &[(&str, Regime); 22] = &[
    ("base", regime(64, 32, 1e-2, 2000)),
    ("expert-2", regime(64, 2, 1e-2, 2000)),
    ("expert-4", regime(64, 4, 1e-2, 2000)),
    ("expert-8", regime(64, 8, 1e-2, 2000)),
    ("expert-128", regime(64, 128, 1e-2, 2000)),
    ("model-8", regime(8, 32, 1e-2, 2000)),
    ("model-16", regime(16, 32, 1e-2, 2000)),
    ("model-32", regime(32, 32, 1e-2, 2000)),
    ("rate-3e-4", regime(64, 32, 3e-4, 2000)),
    ("rate-1e-3", regime(64, 32, 1e-3, 2000)),
    ("rate-3e-3", regime(64, 32, 3e-3, 2000)),
    ("steps-250", regime(64, 32, 1e-2, 250)),
    ("steps-500", regime(64, 32, 1e-2, 500)),
    ("steps-1000", regime(64, 32, 1e-2, 1000)),
    ("steps-4000", regime(64, 32, 1e-2, 4000)),
    ("model-8-expert-2", regime(8, 2, 1e-2, 2000)),
    ("model-16-expert-2", regime(16, 2, 1e-2, 2000)),
    ("model-16-expert-4", regime(16, 4, 1e-2, 2000)),
    ("rate-1e-3-expert-4", regime(64, 4, 1e-3, 2000)),
    ("rate-1e-3-model-16", regime(16, 32, 1e-3, 2000)),
    ("steps-500-expert-4", regime(64, 4, 1e-2, 500)),
    ("steps-500-model-16", regime(16, 32, 1e-2, 500)),
];

/// What `--task` may name.
pub const TASKS: &[&str] = &names(REGIMES);

/// The plan of a preset.
///
/// # Errors
/// None: nothing has to be there.
pub fn plan(args: &ReproduceArgs) -> Result<Plan<Synthetic>, BenchError> {
    let seeds = match args.preset {
        Preset::Smoke | Preset::Quick => 1,
        Preset::Full | Preset::Paper => 3,
    };
    let methods = [5, 10, 15, 20].map(|experts| Method::Static {
        experts,
        k: 2,
        router: None,
    });
    Ok(Plan {
        family: Synthetic::in_regimes(args, TASKS, REGIMES),
        methods: methods.to_vec(),
        pool: POOL,
        seeds,
        variant: None,
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_regime_is_another() {
        let different: BTreeSet<String> = REGIMES.iter().map(|(_, r)| format!("{r:?}")).collect();
        let names: BTreeSet<&&str> = TASKS.iter().collect();
        assert_eq!(
            (different.len(), names.len()),
            (REGIMES.len(), REGIMES.len())
        );
        let args = ReproduceArgs::parsed(&["regime", "--preset", "full"]);
        let runs = plan(&args).unwrap().runs(&args).unwrap();
        assert_eq!(runs.len(), REGIMES.len() * 4 * 3);
    }
}

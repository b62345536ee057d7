//! The regime study: where, if anywhere, the synthetic task has the paper's table.
//!
//! The paper reports static pools on GINC at 2.15 to 2.6 nats, and a fall of 0.4 from 5 to 15 experts. This study trains static
//! pools of 5, 10, 15 and 20 experts with top-2 in other regimes than the synthetic study: narrower experts, a narrower model, other
//! learning rates, shorter and longer training, and some of these together.

use super::plan::Plan;
use super::synthetic::{POOL, Regime, Synthetic, names, regime};
use crate::BenchError;
use crate::cli::{Preset, ReproduceArgs};
use crate::method::Method;

/// The regimes by the name of their task; `expert` and `model` are widths, `rate` the largest learning rate.
const REGIMES: &[(&str, Regime); 22] = &[
    ("base", Regime::BASE),
    ("expert-2", regime!(hidden: 2)),
    ("expert-4", regime!(hidden: 4)),
    ("expert-8", regime!(hidden: 8)),
    ("expert-128", regime!(hidden: 128)),
    ("model-8", regime!(dim: 8)),
    ("model-16", regime!(dim: 16)),
    ("model-32", regime!(dim: 32)),
    ("rate-3e-4", regime!(peak: 3e-4)),
    ("rate-1e-3", regime!(peak: 1e-3)),
    ("rate-3e-3", regime!(peak: 3e-3)),
    ("steps-250", regime!(steps: 250)),
    ("steps-500", regime!(steps: 500)),
    ("steps-1000", regime!(steps: 1000)),
    ("steps-4000", regime!(steps: 4000)),
    ("model-8-expert-2", regime!(dim: 8, hidden: 2)),
    ("model-16-expert-2", regime!(dim: 16, hidden: 2)),
    ("model-16-expert-4", regime!(dim: 16, hidden: 4)),
    ("rate-1e-3-expert-4", regime!(hidden: 4, peak: 1e-3)),
    ("rate-1e-3-model-16", regime!(dim: 16, peak: 1e-3)),
    ("steps-500-expert-4", regime!(hidden: 4, steps: 500)),
    ("steps-500-model-16", regime!(dim: 16, steps: 500)),
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
    let methods = [5, 10, 15, 20].map(|experts| Method::top_k(experts, 2));
    let family = Synthetic::in_regimes(args, TASKS, REGIMES);
    Ok(Plan::new(family, methods.to_vec(), POOL, seeds))
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

//! The size study: how many experts are enough, by what there is to learn from and how wide an expert is.
//!
//! Static pools of 1 to 32 experts that route as those that grow do, on four sets of GINC and with experts of three widths, each judged at
//! its best held-out step. Beside them the paper's rule and `ours`, with room for as many: whether where they end follows what is
//! enough.

use mass_routing::Combine;

use super::plan::Plan;
use super::synthetic::{POOL, Regime, Synthetic, names, regime};
use crate::BenchError;
use crate::cli::{Preset, ReproduceArgs, Variant};
use crate::method::{Mass, Method, Pool};

/// Documents of 1024 tokens, and the width of an expert.
const fn set(documents: usize, hidden: usize) -> Regime {
    regime!(documents: Some(documents), hidden: hidden)
}

/// The sets by the name of their task.
const SETS: &[(&str, Regime); 12] = &[
    ("25k-expert-8", set(25, 8)),
    ("25k-expert-32", set(25, 32)),
    ("25k-expert-128", set(25, 128)),
    ("51k-expert-8", set(50, 8)),
    ("51k-expert-32", set(50, 32)),
    ("51k-expert-128", set(50, 128)),
    ("102k-expert-8", set(100, 8)),
    ("102k-expert-32", set(100, 32)),
    ("102k-expert-128", set(100, 128)),
    ("204k-expert-8", set(200, 8)),
    ("204k-expert-32", set(200, 32)),
    ("204k-expert-128", set(200, 128)),
];

/// What `--task` may name.
pub const TASKS: &[&str] = &names(SETS);

/// Sizes of static pools.
const POOLS: [usize; 8] = [1, 2, 3, 5, 8, 12, 20, 32];

/// The plan of a preset.
///
/// # Errors
/// None: nothing has to be there.
pub fn plan(args: &ReproduceArgs) -> Result<Plan<Synthetic>, BenchError> {
    let seeds = match args.preset {
        Preset::Smoke | Preset::Quick => 1,
        Preset::Full | Preset::Paper => 5,
    };
    let pool = Pool {
        experts_max: 32,
        ..POOL
    };
    let pools = POOLS.map(|experts| Method::top_p(experts, pool.p, Combine::Renormalised));
    let mass = [Variant::Paper, Variant::Ours].map(|variant| {
        Method::Mass(Mass {
            live_percent: pool.live_percent.filter(|_| variant == Variant::Paper),
            ..Mass::of(variant, &pool)
        })
    });
    let family = Synthetic::in_regimes(args, TASKS, SETS);
    let methods = pools.into_iter().chain(mass).collect();
    Ok(Plan::new(family, methods, pool, seeds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_set_has_every_pool() {
        let args = ReproduceArgs::parsed(&["size", "--preset", "full"]);
        let runs = plan(&args).unwrap().runs(&args).unwrap();
        assert_eq!(runs.len(), SETS.len() * (POOLS.len() + 2) * 5);
        for (name, regime) in SETS {
            let thousands = regime.documents.unwrap() * 1024 / 1000;
            assert_eq!(*name, format!("{thousands}k-expert-{}", regime.hidden));
        }
    }
}

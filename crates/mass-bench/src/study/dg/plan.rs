//! What each preset runs.

use mass_model::Activation;
use mass_model::vit::VitConfig;

use super::{Domains, Model, SAMPLE};
use crate::BenchError;
use crate::cli::{Preset, ReproduceArgs};
use crate::dg::augment::Augment;
use crate::dg::reported::SETS;
use crate::method::{Method, Pool};
use crate::study::plan::Plan;
use crate::study::weights;

/// The folder of the model that quick and full fine-tune.
const SMALL_MODEL: &str = "vit-s14";
/// The folder of the paper's model, DeiT-S/16.
const PAPER_MODEL: &str = "deit-small-patch16-224";

/// The pools that the paper has, and the part of a run in which MASS may split where the variant's own timing is not kept: at
/// its own, detection is live for a few steps of runs as short as these, if at all.
pub(super) const POOL: Pool = Pool {
    experts: 6,
    experts_max: 8,
    k: 1,
    p: 0.3,
    live_percent: Some(60),
};

/// What a preset fine-tunes, on which sets, and the pool that it has.
///
/// # Errors
/// [`BenchError`] if the model is not there, or `--task` names no set.
pub(super) fn family(args: &ReproduceArgs) -> Result<(Domains, Pool), BenchError> {
    let directory = |name| weights::directory(args, name, false).map(Model::Directory);
    let small = |model| Domains {
        args: args.clone(),
        model,
        sets: vec!["pacs".into()],
        targets: None,
        in_turn: false,
        size: 98,
        frozen: 8,
        augment: None,
        steps: 200,
        per_domain: 16,
        learning_rate: 3e-5,
        head_learning_rate: 1e-3,
        weight_decay: 1e-6,
        held_out: 0.2,
        evaluate_every: 50,
        log_every: 10,
        checkpoint_every: 100,
    };
    let (mut family, pool) = match args.preset {
        Preset::Smoke => {
            let family = Domains {
                sets: vec![SAMPLE.into()],
                targets: Some(1),
                size: 16,
                frozen: 1,
                steps: 160,
                per_domain: 8,
                learning_rate: 2e-3,
                head_learning_rate: 2e-3,
                evaluate_every: 20,
                checkpoint_every: 20,
                ..small(Model::Drawn(tiny()))
            };
            let pool = Pool {
                experts: 3,
                experts_max: 5,
                live_percent: Some(90),
                ..POOL
            };
            (family, pool)
        }
        Preset::Quick => {
            let family = Domains {
                targets: Some(1),
                ..small(directory(SMALL_MODEL)?)
            };
            (family, POOL)
        }
        Preset::Full => (small(directory(SMALL_MODEL)?), POOL),
        Preset::Paper => {
            let family = Domains {
                sets: SETS.map(str::to_owned).to_vec(),
                size: 224,
                frozen: 0,
                augment: Some(Augment::default()),
                steps: 5000,
                per_domain: 32,
                head_learning_rate: 3e-5,
                evaluate_every: 300,
                log_every: 50,
                checkpoint_every: 500,
                ..small(directory(PAPER_MODEL)?)
            };
            let pool = Pool {
                live_percent: None,
                ..POOL
            };
            (family, pool)
        }
    };
    family.only()?;
    Ok((family, pool))
}

/// The plan of a preset.
///
/// # Errors
/// [`BenchError`] if the model that it fine-tunes is not there, or `--task` names no set.
pub fn plan(args: &ReproduceArgs) -> Result<Plan<Domains>, BenchError> {
    let (family, pool) = family(args)?;
    let (gmoe, seeds) = match args.preset {
        Preset::Smoke => (vec![3], 1),
        Preset::Quick => (vec![6], 1),
        Preset::Full => (vec![6], 3),
        Preset::Paper => (vec![4, 6, 8], 3),
    };
    let mut methods = vec![Method::Dense];
    methods.extend(gmoe.into_iter().map(|experts| Method::Gmoe { experts }));
    methods.push(Method::DynMoe {
        experts: pool.experts,
        experts_max: pool.experts_max,
    });
    Ok(Plan::fine_tuning(args.preset, family, methods, pool, seeds))
}

/// A model that trains in seconds.
fn tiny() -> VitConfig {
    VitConfig {
        hidden_size: 32,
        num_hidden_layers: 3,
        num_attention_heads: 2,
        intermediate_size: 64,
        hidden_act: Activation::GeluErf,
        layer_norm_eps: 1e-6,
        image_size: 16,
        patch_size: 4,
        // So small a model with 0.02 hardly passes a signal on.
        initializer_range: 0.2,
        ..VitConfig::default()
    }
}

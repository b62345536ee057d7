//! What each preset runs.

use std::sync::OnceLock;

use mass_model::Activation;
use mass_model::bert::BertConfig;

use super::{Glue, Pretrained, Set};
use crate::BenchError;
use crate::cli::{Preset, ReproduceArgs};
use crate::glue::sample;
use crate::glue::task::Task;
use crate::method::{Method, Pool};
use crate::study::plan::Plan;
use crate::study::weights;

/// The folder of the model that quick and full fine-tune.
const SMALL_MODEL: &str = "minilm-l6";
/// The folder of the paper's model.
const PAPER_MODEL: &str = "bert-large-cased";

/// The pools that the paper has, and the part of a run in which MASS may split where the variant's own timing is not kept: at
/// its own, detection is live for a few steps of runs as short as these, if at all.
const POOL: Pool = Pool {
    experts: 8,
    experts_max: 16,
    k: 2,
    p: 0.5,
    live_percent: Some(60),
};

/// What a preset fine-tunes, on which tasks, and the pools that it has.
///
/// # Errors
/// [`BenchError`] if the model is not there.
pub(in crate::study) fn family(args: &ReproduceArgs) -> Result<(Glue, Pool), BenchError> {
    let directory = |name| weights::directory(args, name, true).map(Pretrained::Directory);
    let small = |pretrained| Glue {
        args: args.clone(),
        pretrained,
        model: OnceLock::new(),
        sets: vec![Set::new(Task::Cola, 2), Set::new(Task::Rte, 2)],
        batch: 32,
        max_length: 128,
        learning_rate: 5e-5,
        patience: 4,
        last: false,
        log_every: 10,
        // Three times the weights, a few hundred megabytes.
        checkpoint_every: 200,
    };
    Ok(match args.preset {
        Preset::Smoke => {
            let family = Glue {
                sets: vec![
                    Set::new(Task::Cola, 12),
                    Set::new(Task::Mnli, 8),
                    Set::new(Task::Stsb, 8),
                ],
                batch: 8,
                max_length: 32,
                learning_rate: 2e-3,
                checkpoint_every: 40,
                ..small(Pretrained::Drawn(tiny()))
            };
            let pool = Pool {
                experts: 3,
                experts_max: 5,
                live_percent: Some(90),
                ..POOL
            };
            (family, pool)
        }
        Preset::Quick => (small(directory(SMALL_MODEL)?), POOL),
        Preset::Full => {
            let family = Glue {
                sets: vec![
                    Set::new(Task::Cola, 3),
                    Set::new(Task::Mrpc, 2),
                    Set::new(Task::Rte, 2),
                ],
                ..small(directory(SMALL_MODEL)?)
            };
            (family, POOL)
        }
        Preset::Paper => {
            let family = Glue {
                sets: Task::ALL.map(|t| Set::new(t, paper_epochs(t))).to_vec(),
                learning_rate: 2e-5,
                ..small(directory(PAPER_MODEL)?)
            };
            let pool = Pool {
                live_percent: None,
                ..POOL
            };
            (family, pool)
        }
    })
}

/// The plan of a preset.
///
/// # Errors
/// [`BenchError`] if the model that it fine-tunes is not there.
pub fn plan(args: &ReproduceArgs) -> Result<Plan<Glue>, BenchError> {
    let (mut family, pool) = family(args)?;
    family.only(args.task.as_deref());
    let (static_pools, seeds) = match args.preset {
        Preset::Smoke => (vec![(3, 2)], 1),
        Preset::Quick => (vec![(8, 2)], 1),
        Preset::Full => (vec![(8, 1), (8, 2), (8, 8)], 3),
        Preset::Paper => {
            let pools = [8, 16].map(|experts| [1, 2, 4, 8].map(|k| (experts, k)));
            (pools.concat(), 3)
        }
    };
    let mut methods = vec![Method::Dense];
    for (experts, k) in static_pools {
        let router = None;
        methods.push(Method::Static { experts, k, router });
    }
    methods.push(Method::DynMoe {
        experts: pool.experts,
        experts_max: pool.experts_max,
    });
    Ok(Plan::fine_tuning(args.preset, family, methods, pool, seeds))
}

impl Glue {
    /// Keeps one task; one that the preset has no epochs for gets as many as the paper gives it, but at most three.
    fn only(&mut self, task: Option<&str>) {
        let Some(task) = Task::ALL.into_iter().find(|t| task == Some(t.name())) else {
            return;
        };
        let planned = self.sets.iter().find(|set| set.task == task);
        let epochs = planned.map_or_else(|| paper_epochs(task).min(3), |set| set.epochs);
        self.sets = vec![Set::new(task, epochs)];
    }
}

/// A model that trains in seconds, for the built-in vocabulary.
fn tiny() -> BertConfig {
    BertConfig {
        vocab_size: sample::vocabulary().len(),
        hidden_size: 32,
        num_hidden_layers: 2,
        num_attention_heads: 2,
        intermediate_size: 64,
        hidden_act: Activation::GeluErf,
        hidden_dropout_prob: 0.02,
        attention_probs_dropout_prob: 0.02,
        max_position_embeddings: 32,
        // So small a model with BERT's 0.02 hardly passes a signal on.
        initializer_range: 0.2,
        ..BertConfig::default()
    }
}

/// The paper's epochs.
fn paper_epochs(task: Task) -> u64 {
    match task {
        Task::Mnli | Task::Qnli => 3,
        _ => 10,
    }
}

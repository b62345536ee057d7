//! What each preset runs.

use std::path::Path;

use mass_model::Activation;
use mass_model::bert::BertConfig;
use mass_model::optim::AdamWConfig;
use serde::Serialize;
use serde_json::Value;

use super::data::TaskData;
use super::finetune::FineTuneConfig;
use super::method::{Method, Pretrained, authors_layer};
use crate::BenchError;
use crate::cli::{Preset, ReproduceArgs, Variant};
use crate::glue::sample;
use crate::glue::task::Task;
use crate::report::Run;
use crate::study::has_model;
use crate::study::mass::{MassSetting, wanted};

/// The folder of the model that quick and full fine-tune.
const SMALL_MODEL: &str = "minilm-l6";
/// The folder of the paper's model.
const PAPER_MODEL: &str = "bert-large-cased";

/// Part of a run in which MASS may split, in percent, where the variant's own timing is not kept: at its own, detection is
/// live for a few steps of runs as short as these, if at all.
const LIVE_PERCENT: u64 = 60;

/// What a preset fixes.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Plan {
    pub(super) pretrained: Pretrained,
    /// Tasks with their epochs.
    tasks: Vec<(Task, u64)>,
    seeds: usize,
    methods: Vec<Method>,
    batch: usize,
    pub(super) max_length: usize,
    learning_rate: f64,
    /// Epochs without gain on the development set after which a run stops.
    patience: u64,
    log_every: u64,
    checkpoint_every: u64,
}

/// A run to be made.
pub(super) struct Planned {
    pub(super) run: Run,
    pub(super) task: Task,
    method: Method,
    epochs: u64,
}

impl Plan {
    /// The plan of a preset.
    pub(super) fn of(args: &ReproduceArgs) -> Result<Self, BenchError> {
        let mass = |variant, live_percent| {
            Method::Mass(MassSetting {
                variant,
                p: 0.5,
                router: None,
                live_percent,
                experts: 8,
                experts_max: 16,
                loose: false,
            })
        };
        let every = [Variant::Paper, Variant::Reference, Variant::Ours];
        let dynmoe = Method::DynMoe {
            experts: 8,
            experts_max: 16,
        };
        let pool = |experts, k| Method::Static {
            experts,
            k,
            router: None,
        };
        let small = Self {
            pretrained: Pretrained::Drawn(tiny()),
            tasks: vec![(Task::Cola, 2), (Task::Rte, 2)],
            seeds: 1,
            methods: [Method::Dense, pool(8, 2), dynmoe.clone()]
                .into_iter()
                .chain(every.map(|v| mass(v, Some(LIVE_PERCENT))))
                .collect(),
            batch: 32,
            max_length: 128,
            learning_rate: 5e-5,
            patience: 4,
            log_every: 10,
            // Three times the weights, a few hundred megabytes.
            checkpoint_every: 200,
        };
        let mut plan = match args.preset {
            Preset::Smoke => Self::smoke(small),
            Preset::Quick => Self {
                pretrained: directory(args, SMALL_MODEL)?,
                ..small
            },
            Preset::Full => Self {
                pretrained: directory(args, SMALL_MODEL)?,
                tasks: vec![(Task::Cola, 3), (Task::Mrpc, 2), (Task::Rte, 2)],
                seeds: 3,
                methods: [Method::Dense, pool(8, 1), pool(8, 2), pool(8, 8), dynmoe]
                    .into_iter()
                    .chain(every.map(|v| mass(v, Some(LIVE_PERCENT))))
                    .collect(),
                ..small
            },
            Preset::Paper => {
                let mut methods = vec![Method::Dense];
                for experts in [8, 16] {
                    methods.extend([1, 2, 4, 8].map(|k| pool(experts, k)));
                }
                methods.push(dynmoe);
                methods.extend(every.map(|v| mass(v, None)));
                Self {
                    pretrained: directory(args, PAPER_MODEL)?,
                    tasks: Task::ALL.map(|t| (t, paper_epochs(t))).to_vec(),
                    seeds: 3,
                    methods,
                    learning_rate: 2e-5,
                    ..small
                }
            }
        };
        plan.only(args.task.as_deref());
        if let Some(router) = &args.router {
            plan.methods.iter_mut().for_each(|m| m.routed_by(router));
            // Methods that differed by their routing alone are one now.
            let all = std::mem::take(&mut plan.methods);
            for method in all {
                if !plan
                    .methods
                    .iter()
                    .any(|m| named(m, 0).key() == named(&method, 0).key())
                {
                    plan.methods.push(method);
                }
            }
            let asked = plan.methods.iter().filter(|m| wanted(&named(m, 0), args));
            asked.into_iter().try_for_each(Method::check_router)?;
        }
        Ok(plan)
    }

    /// Every part of the study on the built-in sample, in seconds.
    fn smoke(small: Self) -> Self {
        let mass = |variant| {
            Method::Mass(MassSetting {
                variant,
                p: 0.5,
                router: None,
                live_percent: Some(90),
                experts: 3,
                experts_max: 5,
                loose: true,
            })
        };
        Self {
            tasks: vec![(Task::Cola, 12), (Task::Mnli, 8), (Task::Stsb, 8)],
            methods: vec![
                Method::Dense,
                Method::Static {
                    experts: 3,
                    k: 2,
                    router: None,
                },
                Method::DynMoe {
                    experts: 3,
                    experts_max: 5,
                },
                mass(Variant::Paper),
                mass(Variant::Reference),
                mass(Variant::Ours),
            ],
            batch: 8,
            max_length: 32,
            learning_rate: 2e-3,
            checkpoint_every: 40,
            ..small
        }
    }

    /// Keeps one task; one that the preset has no epochs for gets as many as the paper gives it, but at most three.
    fn only(&mut self, task: Option<&str>) {
        let Some(task) = task.and_then(|t| t.parse::<Task>().ok()) else {
            return;
        };
        let planned = self.tasks.iter().find(|(t, _)| *t == task);
        let epochs = planned.map_or_else(|| paper_epochs(task).min(3), |(_, epochs)| *epochs);
        self.tasks = vec![(task, epochs)];
    }

    /// Every run, in the order in which results list them.
    pub(super) fn runs(&self, args: &ReproduceArgs) -> Vec<Planned> {
        let mut runs = Vec::new();
        for &(task, epochs) in &self.tasks {
            for method in self.methods.iter().filter(|m| wanted(&named(m, 0), args)) {
                for seed in 0..args.seeds.unwrap_or(self.seeds) as u64 {
                    let mut run = named(method, seed);
                    run.task = Some(task.to_string());
                    run.metric_name = Some(task.metric_name().to_owned());
                    runs.push(Planned {
                        run,
                        task,
                        method: method.clone(),
                        epochs,
                    });
                }
            }
        }
        let own = runs.into_iter().enumerate();
        own.filter(|(i, _)| args.shard.owns(*i))
            .map(|(_, run)| run)
            .collect()
    }

    /// Everything that fixes a run; `model` as settings keep it.
    pub(super) fn config(
        &self,
        planned: &Planned,
        data: &TaskData,
        model: &Value,
    ) -> FineTuneConfig {
        FineTuneConfig {
            run: planned.run.key().to_string(),
            seed: planned.run.seed,
            method: planned.method.clone(),
            model: model.clone(),
            data: data.digest,
            outputs: planned.task.outputs(),
            authors_layer: authors_layer(planned.task),
            epochs: planned.epochs,
            patience: self.patience,
            batch: self.batch,
            sorted_together: 1,
            learning_rate: self.learning_rate,
            adamw: AdamWConfig::default().decaying_everything(),
            log_every: self.log_every,
            checkpoint_every: self.checkpoint_every,
        }
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

/// A run of a method with what tells it apart.
fn named(method: &Method, seed: u64) -> Run {
    let mut run = Run::new("dense", seed);
    match method {
        Method::Dense => {}
        Method::Static { experts, k, router } => {
            run.method = "static".into();
            run.experts_init = Some(*experts);
            match router {
                Some(router) => run.setting = Some(router.to_string()),
                None => run.k = Some(*k),
            }
        }
        Method::DynMoe { experts, .. } => {
            run.method = "dynmoe".into();
            run.experts_init = Some(*experts);
        }
        Method::Mass(m) => m.describe(&mut run),
    }
    run
}

/// The directory of a model, which must be there.
fn directory(args: &ReproduceArgs, name: &str) -> Result<Pretrained, BenchError> {
    let preset = args.preset;
    let Some(models) = &args.models else {
        return Err(BenchError::Usage(format!(
            "glue, preset {preset}, needs a pretrained model: give --models DIR (or $MASS_MODELS_DIR) with DIR/{name}/ \
             (config.json, model.safetensors or its index and the files it names, and tokenizer.json or vocab.txt), or --preset smoke, which needs none"
        )));
    };
    let dir = models.join(name);
    if !(has_model(&dir) && has_tokenizer(&dir)) {
        return Err(BenchError::Input {
            path: dir,
            problem: format!(
                "no model there; preset {preset} needs config.json, model.safetensors or its index and the files it names, and \
                 tokenizer.json or vocab.txt, as https://huggingface.co has them; `cargo xtask data fetch {name}` gets them"
            ),
        });
    }
    Ok(Pretrained::Directory(dir))
}

fn has_tokenizer(dir: &Path) -> bool {
    let there = |name: &str| dir.join(name).is_file();
    there("tokenizer.json") || there("vocab.txt")
}

//! The synthetic study: MASS beside static pools on GINC, with the Bayes floor below them.
//!
//! Every run trains the same one-layer causal transformer on the same documents and is scored on the same windows; what
//! differs is the pool of experts and how tokens are routed.

use mass_cpd::AnyDetectorParams;
use mass_expand::AlignmentThreshold;
use mass_model::Activation;
use mass_model::growth::GrowerConfig;
use mass_model::lm::LanguageModelConfig;
use mass_model::nn::{BlockConfig, MoeConfig};
use mass_model::optim::{AdamWConfig, Decay, Schedule};
use mass_routing::{
    Combine, LabelUsage, LabelWeighting, RouterConfig, RoutingError, RoutingPlan,
    jensen_shannon_divergence, normalized_mutual_information,
};
use serde::Serialize;

use crate::batch::TokenBatch;
use crate::cli::{Preset, ReproduceArgs, RunContext, Variant};
use crate::ginc::{BayesFilter, Corpus, Ginc, GincParams, Windows, bayes_floor};
use crate::report::{Results, Run, peak_rss_mib};
use crate::rng::{Purpose, stream};
use crate::sweep::{Outcome, Ticker, checkpoint_dir, sweep};
use crate::trainer::{Feed, Trainer, TrainerConfig, mean};
use crate::{BenchError, variants};

/// What `--methods` may name.
pub const METHODS: &[&str] = &["mass", "static"];

/// What `--task` may name: the size of the vocabulary.
pub const TASKS: &[&str] = &["vocab50", "vocab100", "vocab150"];

/// The vocabulary that a task stands for.
fn vocab_of(task: &str) -> Option<usize> {
    task.strip_prefix("vocab")?.parse().ok()
}

/// Seed of the documents and windows, the same for every run.
const DATA_SEED: u64 = 2512;

/// Spread of the embeddings at the start. At this learning rate the loss depends on it (K = 20, k = 2, seed 0, 2000 steps:
/// 1.871 at 0.1, 1.814 at 0.2, 1.799 at 0.3, 1.821 at 0.5, 1.834 at 1), the same for every method.
const EMBEDDING_STD: f32 = 0.3;

/// Sequence length, and batch of sequences.
const SEQ: usize = 64;
const BATCH: usize = 16;

/// What a preset fixes.
#[derive(Debug, Clone, Serialize)]
struct Plan {
    steps: u64,
    documents: usize,
    document_length: usize,
    windows_per_concept: usize,
    seeds: usize,
    vocabs: &'static [usize],
    static_experts: &'static [usize],
    static_k: &'static [usize],
    mass: Vec<MassSetting>,
    experts_init: usize,
    experts_max: usize,
    /// What routes instead of each method's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    router: Option<RouterConfig>,
}

/// One way to run MASS.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct MassSetting {
    variant: Variant,
    p: f32,
    /// Fraction of the run in which splits may happen, in percent; `None` for the variant's own.
    live_percent: Option<u64>,
    /// Thresholds that a run too short to learn anything still passes: a check that splits are wired up.
    loose: bool,
}

impl MassSetting {
    fn name(&self, router: Option<&RouterConfig>) -> String {
        let live = self.live_percent.map_or_else(
            || "own timing".to_owned(),
            |percent| format!("live {percent} %"),
        );
        match router {
            Some(router) => format!("{router}, {live}"),
            None => format!("p {}, {live}", self.p),
        }
    }
}

impl Plan {
    fn of(preset: Preset) -> Self {
        let setting = |variant, p, live_percent| MassSetting {
            variant,
            p,
            live_percent,
            loose: false,
        };
        let loose = |variant| MassSetting {
            loose: true,
            ..setting(variant, 0.5, Some(90))
        };
        let quick = Self {
            steps: 2000,
            documents: 400,
            document_length: 10_240,
            windows_per_concept: 100,
            seeds: 2,
            vocabs: &[50],
            static_experts: &[5, 10, 15, 20],
            static_k: &[2],
            mass: vec![
                setting(Variant::Paper, 0.5, None),
                setting(Variant::Paper, 0.5, Some(30)),
                setting(Variant::Reference, 0.5, Some(30)),
                setting(Variant::Ours, 0.5, None),
                setting(Variant::Ours, 0.9, None),
            ],
            experts_init: 5,
            experts_max: 20,
            router: None,
        };
        let mut every = Vec::new();
        for p in [0.5, 0.9] {
            for variant in [Variant::Paper, Variant::Reference, Variant::Ours] {
                every.push(setting(variant, p, None));
                if variant != Variant::Ours {
                    every.push(setting(variant, p, Some(30)));
                }
            }
        }
        match preset {
            Preset::Smoke => Self {
                steps: 120,
                documents: 20,
                document_length: 2048,
                windows_per_concept: 8,
                seeds: 1,
                static_experts: &[3, 6],
                mass: vec![
                    loose(Variant::Paper),
                    loose(Variant::Reference),
                    setting(Variant::Ours, 0.5, Some(90)),
                ],
                experts_init: 3,
                experts_max: 6,
                ..quick
            },
            Preset::Quick => quick,
            Preset::Full => Self {
                seeds: 5,
                vocabs: &[50, 100, 150],
                static_k: &[1, 2, 4, 8],
                mass: every,
                ..quick
            },
            Preset::Paper => Self {
                steps: 10_000,
                documents: 1000,
                seeds: 5,
                vocabs: &[50, 100, 150],
                static_k: &[1, 2, 4, 8],
                mass: every,
                ..quick
            },
        }
    }

    /// The preset's plan, with the router that was asked for.
    fn chosen(args: &ReproduceArgs) -> Self {
        Self {
            router: args.router.clone(),
            ..Self::of(args.preset)
        }
    }

    /// Every run, in the order in which results list them.
    fn runs(&self, args: &ReproduceArgs) -> Vec<Planned> {
        let wanted = |method: &str| {
            args.methods
                .as_ref()
                .is_none_or(|m| m.iter().any(|m| m == method))
        };
        let mut runs = Vec::new();
        let asked = args.task.as_deref().and_then(vocab_of);
        let vocabs: Vec<usize> = asked.map_or_else(|| self.vocabs.to_vec(), |vocab| vec![vocab]);
        for &vocab in &vocabs {
            let task = (vocabs.len() > 1 || asked.is_some()).then(|| format!("vocab{vocab}"));
            let seeds = 0..args.seeds.unwrap_or(self.seeds) as u64;
            let new = |method: &str, seed, experts| {
                let mut run = Run::new(method, seed);
                (run.task, run.experts_init) = (task.clone(), Some(experts));
                run
            };
            if wanted("static") {
                for &experts in self.static_experts {
                    for &k in self.static_k.iter().filter(|&&k| k <= experts) {
                        for seed in seeds.clone() {
                            let mut run = new("static", seed, experts);
                            match &self.router {
                                Some(router) => run.setting = Some(router.to_string()),
                                None => run.k = Some(k),
                            }
                            runs.push(Planned {
                                run,
                                vocab,
                                mass: None,
                            });
                        }
                    }
                }
            }
            if wanted("mass") {
                for mass in self
                    .mass
                    .iter()
                    .filter(|m| args.variant.is_none_or(|v| v == m.variant))
                {
                    for seed in seeds.clone() {
                        let mut run = new("mass", seed, self.experts_init);
                        run.variant = Some(mass.variant.to_string());
                        run.setting = Some(mass.name(self.router.as_ref()));
                        runs.push(Planned {
                            run,
                            vocab,
                            mass: Some(mass.clone()),
                        });
                    }
                }
            }
        }
        if self.router.is_some() {
            // Runs that differed by their routing alone are one now.
            let mut seen = std::collections::BTreeSet::new();
            runs.retain(|planned: &Planned| seen.insert(planned.run.key().to_string()));
        }
        runs.into_iter()
            .enumerate()
            .filter(|(i, _)| args.shard.owns(*i))
            .map(|(_, run)| run)
            .collect()
    }
}

/// A run to be made.
struct Planned {
    run: Run,
    vocab: usize,
    mass: Option<MassSetting>,
}

/// Documents and windows of one vocabulary, with the floor of the best possible predictor on those windows.
struct Data {
    vocab: usize,
    ginc: Ginc,
    corpus: Corpus,
    windows: Windows,
    probe: TokenBatch,
    bayes_loss: f64,
}

impl Data {
    fn generate(vocab: usize, plan: &Plan) -> Result<Self, BenchError> {
        let ginc = Ginc::generate(&GincParams::new(vocab).check()?);
        let rng = |purpose| stream(DATA_SEED, purpose, vocab as u64);
        let corpus = ginc.sample_corpus(
            plan.documents,
            plan.document_length,
            &mut rng(Purpose::Training),
        )?;
        let windows = Windows::sample(
            &ginc,
            plan.windows_per_concept,
            SEQ,
            &mut rng(Purpose::Evaluation),
        )?;
        let probe = Windows::sample(
            &ginc,
            (plan.windows_per_concept / 5).max(4),
            SEQ,
            &mut rng(Purpose::Probe),
        )?;
        let bayes_loss = bayes_floor(&BayesFilter::of(&ginc), &windows)?.mean;
        let probe = probe.batch(0..probe.len());
        Ok(Self {
            vocab,
            ginc,
            corpus,
            windows,
            probe,
            bayes_loss,
        })
    }
}

/// Whether the choices leave a run; nothing is read.
///
/// # Errors
/// [`BenchError::Usage`] if not.
pub fn check(args: &ReproduceArgs) -> Result<(), BenchError> {
    let plan = Plan::chosen(args);
    let runs = plan.runs(args);
    super::some_run(!runs.is_empty())?;
    let Some(router) = &plan.router else {
        return Ok(());
    };
    runs.iter().try_for_each(|planned| {
        let config = config(&plan, planned);
        let experts = config.model.block.moe.experts;
        variants::check_router(router, experts, config.growth.as_ref())
    })
}

/// Makes the runs.
///
/// # Errors
/// [`BenchError`]: whatever the first failing run ends with, or that it was interrupted.
pub fn run(args: &ReproduceArgs, ctx: &mut RunContext) -> Result<Results, BenchError> {
    check(args)?;
    let plan = Plan::chosen(args);
    let mut runs = plan.runs(args);
    let mut settings = serde_json::to_value(&plan)
        .map_err(|e| BenchError::failed("describing the settings", e))?;
    // More seeds of the same plan only add runs.
    settings.as_object_mut().map(|s| s.remove("seeds"));
    let mut store = ctx.open_store(args, &settings)?;
    runs.retain(|planned| store.finished(&planned.run.key()).is_none());
    let mut data = Vec::new();
    for vocab in TASKS.iter().filter_map(|task| vocab_of(task)) {
        if runs.iter().any(|r| r.vocab == vocab) {
            data.push(Data::generate(vocab, &plan)?);
        }
    }
    let dir = |run: &Run| checkpoint_dir(&store, run);
    let folders: Vec<_> = runs.iter().map(|planned| dir(&planned.run)).collect();
    let work: Vec<_> = runs.into_iter().zip(folders).collect();
    let total = work.len() as u64 * plan.steps;
    sweep(
        ctx,
        &mut store,
        args.threads,
        &work,
        total,
        |(planned, folder), ticker| {
            let data = data
                .iter()
                .find(|d| d.vocab == planned.vocab)
                .expect("generated above");
            let mut trainer = Trainer::open(config(&plan, planned), folder, args.resume)?;
            one(&mut trainer, planned, data, folder, ticker)
        },
    )?;
    Ok(store.into_results())
}

fn one(
    trainer: &mut Trainer,
    planned: &Planned,
    data: &Data,
    folder: &std::path::Path,
    ticker: &Ticker<'_>,
) -> Result<Option<Outcome>, BenchError> {
    ticker.tick(trainer.step());
    let seed = planned.run.seed;
    let batch = |step| Ok(data.corpus.batch(seed, step, BATCH, SEQ)?);
    let mut feed = Feed {
        batch: &batch,
        probe: &data.probe,
        on_step: &mut |_, _| ticker.tick(1),
    };
    if !trainer.run(&mut feed, folder)? {
        return Ok(None);
    }
    let score = evaluate(trainer, data)?;
    let (steps, wall_s) = (trainer.step(), trainer.wall_s());
    let tokens = steps * (BATCH * SEQ) as u64;
    let run = Run {
        experts: Some(trainer.experts()),
        active_per_token: Some(score.mean_k),
        test_loss: Some(score.loss),
        bayes_loss: Some(data.bayes_loss),
        jsd_entity: score.jsd_entity,
        jsd_property: score.jsd_property,
        nmi: score.nmi,
        steps: Some(steps),
        tokens: Some(tokens),
        detection_live_steps: trainer.live_steps(),
        wall_s: Some(wall_s),
        tokens_per_s: (wall_s > 0.0).then(|| tokens as f64 / wall_s),
        peak_rss_mib: peak_rss_mib(),
        expansions: trainer.expansions(),
        diagnoses: trainer.diagnoses(),
        ..planned.run.clone()
    };
    Ok(Some(Outcome {
        run,
        metrics: trainer.metrics().to_vec(),
        events: trainer.events().to_vec(),
    }))
}

fn config(plan: &Plan, planned: &Planned) -> TrainerConfig {
    let combine = planned
        .mass
        .as_ref()
        .map_or(Combine::Renormalised, |m| variants::combine(m.variant));
    let own = match &planned.mass {
        Some(m) => RouterConfig::TopP { p: m.p, combine },
        None => RouterConfig::TopK {
            k: planned.run.k.unwrap_or(1),
            combine,
        },
    };
    let experts = planned.run.experts_init.unwrap_or(plan.experts_init);
    let router = plan.router.clone().unwrap_or(own).with_experts(experts);
    let moe = MoeConfig {
        gate: variants::gate(&router),
        ..MoeConfig::new(64, 32, experts, Activation::GeluErf, router)
    };
    TrainerConfig {
        run: planned.run.key().to_string(),
        model: LanguageModelConfig {
            vocab: planned.vocab,
            max_seq: SEQ,
            layers: 1,
            embedding_std: EMBEDDING_STD,
            block: BlockConfig {
                heads: 4,
                layer_norm_eps: 1e-5,
                moe,
            },
        },
        adamw: AdamWConfig {
            beta1: 0.9,
            beta2: 0.99,
            eps: 1e-8,
            weight_decay: 0.01,
            clip_norm: None,
            groups: Vec::new(),
        },
        schedule: Schedule {
            peak: 1e-2,
            warmup: 50.min(plan.steps / 4),
            steps: plan.steps,
            floor: 0.1,
            decay: Decay::Linear,
        },
        growth: planned
            .mass
            .as_ref()
            .map(|m| growth(m, plan, experts, planned.run.seed)),
        seed: planned.run.seed,
        log_every: 20,
        checkpoint_every: 500.min(plan.steps / 3).max(1),
    }
}

/// The rules of a way to run MASS, for one mixture layer that starts with `experts` experts.
fn growth(setting: &MassSetting, plan: &Plan, experts: usize, seed: u64) -> GrowerConfig {
    let steps = plan.steps;
    let mut config = variants::growth(setting.variant, 1, experts, plan.experts_max, steps);
    config.controller.seed = seed;
    if let Some(percent) = setting.live_percent {
        variants::live_for(&mut config, steps, percent);
    }
    if setting.loose {
        config.controller.alignment = AlignmentThreshold::Absolute(1.0);
        if let Some(AnyDetectorParams::WindowedZ(detector)) = &mut config.controller.watch.expert {
            detector.alpha = 0.5;
        }
    }
    config
}

struct Score {
    loss: f64,
    mean_k: f64,
    jsd_entity: Option<f64>,
    jsd_property: Option<f64>,
    nmi: Option<f64>,
}

/// Which experts the tokens of each hidden state went to.
struct Specialisation {
    by_entity: LabelUsage,
    by_property: LabelUsage,
    by_state: LabelUsage,
}

impl Specialisation {
    fn new(ginc: &Ginc, experts: usize) -> Self {
        Self {
            by_entity: LabelUsage::new(ginc.entities(), experts),
            by_property: LabelUsage::new(ginc.properties(), experts),
            by_state: LabelUsage::new(ginc.states(), experts),
        }
    }

    /// Adds a plan whose token `t` was emitted by `states[t]`.
    fn record(
        &mut self,
        plan: &RoutingPlan,
        states: &[u32],
        ginc: &Ginc,
    ) -> Result<(), RoutingError> {
        let labels = |f: &dyn Fn(u32) -> usize| states.iter().map(|&s| f(s)).collect::<Vec<_>>();
        self.by_entity
            .record(plan, &labels(&|s| ginc.entity_of(s)))?;
        self.by_property
            .record(plan, &labels(&|s| ginc.property_of(s)))?;
        self.by_state.record(plan, &labels(&|s| s as usize))
    }

    /// How far experts differ between entities, and between properties: Jensen-Shannon divergence.
    fn divergences(&self) -> [Option<f64>; 2] {
        [&self.by_entity, &self.by_property].map(|usage| {
            jensen_shannon_divergence(usage.contingency().view(), LabelWeighting::Uniform).ok()
        })
    }

    /// Mutual information of experts and states.
    fn information(&self) -> Option<f64> {
        normalized_mutual_information(self.by_state.contingency().view()).ok()
    }
}

/// Test loss, active experts a token, and how far experts specialise on the hidden states behind the tokens.
fn evaluate(trainer: &Trainer, data: &Data) -> Result<Score, BenchError> {
    const WINDOWS: usize = 50;
    let failed = |e: Box<dyn std::error::Error + Send + Sync>| BenchError::failed("evaluation", e);
    let (windows, ginc) = (&data.windows, &data.ginc);
    let mut specialisation = Specialisation::new(ginc, trainer.experts());
    let (mut total, mut tokens) = (0.0, 0);
    let (mut assignments, mut routed) = (0, 0);
    for start in (0..windows.len()).step_by(WINDOWS) {
        let range = start..(start + WINDOWS).min(windows.len());
        let batch = windows.batch(range.clone());
        let (nll, layers) = trainer
            .model
            .score(&batch.inputs, &batch.targets, batch.length, None)
            .map_err(|e| failed(e.into()))?;
        total += mean(&nll) * nll.len() as f64;
        tokens += nll.len();
        let states = windows.input_states(range);
        for trace in &layers {
            assignments += trace.plan.num_assignments();
            routed += trace.plan.num_tokens();
            specialisation
                .record(&trace.plan, &states, ginc)
                .map_err(|e| failed(e.into()))?;
        }
    }
    let [jsd_entity, jsd_property] = specialisation.divergences();
    Ok(Score {
        loss: total / tokens as f64,
        mean_k: assignments as f64 / routed as f64,
        jsd_entity,
        jsd_property,
        nmi: specialisation.information(),
    })
}

#[cfg(test)]
mod tests {
    use mass_routing::Router;
    use ndarray::Array2;

    use super::*;
    use crate::ginc::GincParams;

    /// Experts that know the entity and nothing else differ between entities as far as they can, and not between properties.
    #[test]
    fn a_chosen_router_makes_one_run_of_those_that_differ_by_their_routing() {
        let runs = |more: &[&str]| {
            let line = [
                "synthetic",
                "--preset",
                "full",
                "--seeds",
                "1",
                "--task",
                "vocab50",
            ];
            let args = ReproduceArgs::parsed(&[&line[..], more].concat());
            (
                Plan::chosen(&args),
                Plan::chosen(&args).runs(&args),
                check(&args),
            )
        };
        let (plan, own, _) = runs(&[]);
        assert!(serde_json::to_value(&plan).unwrap().get("router").is_none());
        let (plan, chosen, checked) = runs(&["--router", "expert_choice:capacity=1.5"]);
        checked.unwrap();
        assert_eq!(
            serde_json::to_value(&plan).unwrap()["router"]["capacity"],
            1.5
        );
        // 4 sizes of the static pool, each with up to 4 k, and MASS with two p, each in 5 ways.
        assert_eq!((own.len(), chosen.len()), (4 * 4 - 1 + 10, 4 + 5));
        for planned in &chosen {
            assert!(
                planned
                    .run
                    .key()
                    .to_string()
                    .contains("expert_choice:capacity=1.5")
            );
            let router = config(&plan, planned).model.block.moe.router;
            assert_eq!(
                router.to_string(),
                "expert_choice:capacity=1.5,combine=renormalised"
            );
        }
        let refused = runs(&["--router", "top_k:k=6"]).2.unwrap_err().to_string();
        assert!(
            refused.contains("takes 6 experts a token, and the pool begins with 5"),
            "{refused}"
        );
    }

    #[test]
    fn experts_of_entities_are_told_from_experts_of_properties() {
        let ginc = Ginc::generate(&GincParams::new(50).check().unwrap());
        let (entities, properties) = (ginc.entities(), ginc.properties());
        let states: Vec<u32> = (0..ginc.states() as u32).collect();
        let top_1 = RouterConfig::TopK {
            k: 1,
            combine: Combine::Raw,
        };
        let specialised = |experts: usize, expert: &dyn Fn(u32) -> usize| {
            let mut logits = Array2::<f32>::zeros((states.len(), experts));
            for &s in &states {
                logits[[s as usize, expert(s)]] = 9.0;
            }
            let mut router = top_1.build().unwrap();
            let mut plan = RoutingPlan::default();
            router.route(logits.view(), None, &mut plan).unwrap();
            let mut specialisation = Specialisation::new(&ginc, experts);
            specialisation.record(&plan, &states, &ginc).unwrap();
            (specialisation.divergences(), specialisation.information())
        };
        let most = |labels: usize| (labels as f64).ln();
        let ([by_entity, by_property], _) = specialised(entities, &|s| ginc.entity_of(s));
        assert!((by_entity.unwrap() - most(entities)).abs() < 1e-9);
        assert!(by_property.unwrap().abs() < 1e-9, "{by_property:?}");
        let ([by_entity, by_property], _) = specialised(properties, &|s| ginc.property_of(s));
        assert!(by_entity.unwrap().abs() < 1e-9, "{by_entity:?}");
        assert!((by_property.unwrap() - most(properties)).abs() < 1e-9);
        // An expert for each state tells all there is to know of it, one for each entity a part.
        let (_, all) = specialised(states.len(), &|s| s as usize);
        assert!((all.unwrap() - 1.0).abs() < 1e-9, "{all:?}");
        let (_, part) = specialised(entities, &|s| ginc.entity_of(s));
        let expected = 2.0 * most(entities) / (most(entities) + most(states.len()));
        assert!((part.unwrap() - expected).abs() < 1e-9, "{part:?}");
    }
}

//! The synthetic study: MASS beside static pools on GINC, with the Bayes floor below them.
//!
//! Every run trains the same one-layer causal transformer on the same documents and is scored on the same windows; what
//! differs is the pool of experts and how tokens are routed.

use mass_model::Place;
use mass_model::lm::{LanguageModel, LanguageModelConfig};
use mass_model::optim::{AdamWConfig, Decay, Schedule};
use mass_routing::{
    Combine, LabelUsage, LabelWeighting, RoutingError, RoutingPlan, jensen_shannon_divergence,
    normalized_mutual_information,
};
use ndarray::ArrayView1;
use serde::Serialize;
use serde_json::{Value, json};

use super::plan::{Assignment, Family, Plan, Planned};
use crate::BenchError;
use crate::batch::TokenBatch;
use crate::cli::{Preset, ReproduceArgs, RunContext, Variant};
use crate::ginc::{BayesFilter, Corpus, Ginc, GincParams, Windows, bayes_floor};
use crate::language::{Language, dense, judge, with};
use crate::method::{Mass, Method, Overrides, Pool};
use crate::report::{Run, Usage};
use crate::rng::{Purpose, stream};
use crate::sweep::Side;
use crate::task::Recipe;

/// What `--task` may name: the size of the vocabulary, or that of what there is to learn from.
pub const TASKS: &[&str] = &["vocab50", "vocab100", "vocab150", "51k", "410k", "1.6m"];

/// Sets of few tokens, all of a vocabulary of 50, and how many documents of 1024 tokens they have.
const FINITE: [(&str, usize); 3] = [("51k", 50), ("410k", 400), ("1.6m", 1600)];

/// Steps between looks at held-out data, where a run is judged at its best.
const LOOK: u64 = 100;

/// Seed of the documents and windows, the same for every run.
pub(super) const DATA_SEED: u64 = 2512;

/// Spread of the embeddings at the start. At this learning rate the loss depends on it (K = 20, k = 2, seed 0, 2000 steps:
/// 1.871 at 0.1, 1.814 at 0.2, 1.799 at 0.3, 1.821 at 0.5, 1.834 at 1), the same for every method.
const EMBEDDING_STD: f32 = 0.3;

/// Sequence length, and batch of sequences.
pub(super) const SEQ: usize = 64;
pub(super) const BATCH: usize = 16;

/// What is trained, and how.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Regime {
    /// Width of the model, and of an expert.
    pub(super) dim: usize,
    pub(super) hidden: usize,
    /// Largest learning rate.
    pub(super) peak: f64,
    pub(super) steps: u64,
    /// Sequences of a batch.
    pub(super) batch: usize,
    /// Noise in gradients; see [`Language::gradient_noise`].
    pub(super) gradient_noise: f32,
    /// Documents of 1024 tokens that there are, if they are few; else as many as the set has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) documents: Option<usize>,
}

impl Regime {
    /// That of every study but the one that looks for others.
    pub(crate) const BASE: Self = Self {
        dim: 64,
        hidden: 32,
        peak: 1e-2,
        steps: 2000,
        batch: BATCH,
        gradient_noise: 0.0,
        documents: None,
    };

    /// The model, with a network in place of its mixture.
    pub(super) fn model(&self, vocab: usize) -> LanguageModelConfig {
        LanguageModelConfig {
            embedding_std: EMBEDDING_STD,
            ..dense(vocab, SEQ, self.dim, self.hidden)
        }
    }

    pub(crate) fn recipe(&self) -> Recipe {
        let steps = self.steps;
        Recipe {
            adamw: AdamWConfig {
                beta1: 0.9,
                beta2: 0.99,
                eps: 1e-8,
                weight_decay: 0.01,
                clip_norm: None,
                groups: Vec::new(),
            },
            schedule: Schedule {
                peak: self.peak,
                warmup: 50.min(steps / 4),
                steps,
                floor: 0.1,
                decay: Decay::Linear,
            },
            log_every: 20,
            checkpoint_every: 500.min(steps / 3).max(1),
        }
    }
}

/// That of the base but for some fields.
macro_rules! regime {
    ($($field:ident: $value:expr),*) => {
        Regime { $($field: $value,)* ..Regime::BASE }
    };
}
pub(super) use regime;

/// What grows in the studies that change one thing after another on these data.
pub(super) const POOL: Pool = Pool {
    experts: 5,
    experts_max: 20,
    k: 2,
    p: 0.5,
    live_percent: Some(30),
};

/// The names of regimes.
pub(super) const fn names<const N: usize>(
    regimes: &[(&'static str, Regime); N],
) -> [&'static str; N] {
    let mut names = [""; N];
    let mut i = 0;
    while i < N {
        names[i] = regimes[i].0;
        i += 1;
    }
    names
}

/// GINC in several vocabularies, with so much of it to train on and to be scored on.
#[derive(Debug, Clone)]
pub struct Synthetic {
    place: Place,
    pub(super) regime: Regime,
    /// Sets of a vocabulary of 50 that are trained on in another regime.
    regimes: &'static [(&'static str, Regime)],
    /// Steps of a run at most.
    longest: u64,
    documents: usize,
    document_length: usize,
    windows_per_concept: usize,
    /// Its sets, of [`TASKS`].
    sets: &'static [&'static str],
    /// The set that `--task` names.
    asked: Option<String>,
}

impl Synthetic {
    /// The data of the presets `quick` and `full`: so many that no batch comes twice.
    pub(super) fn fresh(args: &ReproduceArgs, sets: &'static [&'static str]) -> Self {
        Self {
            place: args.place.clone(),
            regime: Regime::BASE,
            regimes: &[],
            longest: u64::MAX,
            documents: 400,
            document_length: 10_240,
            windows_per_concept: 100,
            sets,
            asked: args.task.clone(),
        }
    }

    /// Those in other regimes; in the preset `smoke` the first, and all as short as the other studies'.
    pub(super) fn in_regimes(
        args: &ReproduceArgs,
        names: &'static [&'static str],
        regimes: &'static [(&'static str, Regime)],
    ) -> Self {
        let all = Self {
            regimes,
            ..Self::fresh(args, names)
        };
        match args.preset {
            Preset::Smoke => Self {
                sets: &names[..1],
                ..all.smoke()
            },
            _ => all,
        }
    }

    /// How a set is trained on.
    fn regime_of(&self, set: &str) -> Regime {
        let other = self.regimes.iter().find(|(name, _)| *name == set);
        let regime = other.map_or(self.regime, |(_, regime)| *regime);
        let few = FINITE.iter().find(|(name, _)| *name == set);
        Regime {
            steps: regime.steps.min(self.longest),
            documents: regime.documents.or(few.map(|(_, documents)| *documents)),
            ..regime
        }
    }

    /// The data of the preset `smoke`.
    pub(super) fn smoke(self) -> Self {
        Self {
            longest: 120,
            documents: 20,
            document_length: 2048,
            windows_per_concept: 8,
            ..self
        }
    }
}

/// The plan of a preset.
///
/// # Errors
/// None: nothing has to be there.
pub fn plan(args: &ReproduceArgs) -> Result<Plan<Synthetic>, BenchError> {
    let quick = Synthetic::fresh(args, &TASKS[..1]);
    let mass = |variant, p, live_percent| Mass {
        live_percent,
        experts_max: 20,
        ..Mass::new(variant, p, 5)
    };
    let quick_mass = vec![
        mass(Variant::Paper, 0.5, None),
        mass(Variant::Paper, 0.5, Some(30)),
        mass(Variant::Reference, 0.5, Some(30)),
        mass(Variant::Calibrated, 0.5, None),
        mass(Variant::Calibrated, 0.9, None),
        mass(Variant::Ours, 0.5, None),
    ];
    let pools: &[usize] = &[5, 10, 15, 20];
    let all_k: &[usize] = &[1, 2, 4, 8];
    let (family, seeds, pools, k, mass) = match args.preset {
        Preset::Smoke => (quick.smoke(), 1, &[3, 6][..], &[2][..], smoke_mass()),
        Preset::Quick => (quick, 2, pools, &[2][..], quick_mass),
        Preset::Full => (
            Synthetic {
                sets: TASKS,
                ..quick
            },
            5,
            pools,
            all_k,
            every(),
        ),
        Preset::Paper => {
            let family = Synthetic {
                regime: regime!(steps: 10_000),
                documents: 1000,
                sets: TASKS,
                ..quick
            };
            (family, 5, pools, all_k, every())
        }
    };
    let mut methods = Vec::new();
    for &experts in pools {
        for &k in k.iter().filter(|&&k| k <= experts) {
            methods.push(Method::top_k(experts, k));
        }
    }
    let pool = Pool {
        experts: mass[0].experts,
        experts_max: mass[0].experts_max,
        ..POOL
    };
    if matches!(args.preset, Preset::Full | Preset::Paper) {
        methods.extend(pools.iter().flat_map(|&experts| pools_by_top_p(experts)));
        let (experts, experts_max) = (pool.experts, pool.experts_max);
        methods.push(Method::DynMoe {
            experts,
            experts_max,
        });
    }
    methods.extend(mass.into_iter().map(Method::Mass));
    Ok(Plan::new(family, methods, pool, seeds))
}

/// Static pools that route as those that grow do.
fn pools_by_top_p(experts: usize) -> [Method; 2] {
    [0.5, 0.9].map(|p| Method::top_p(experts, p, Combine::Renormalised))
}

/// Every variant from 3, 5 and 8 experts on, and from 5 with more experts a token; `paper` and `reference` live for longer too, and
/// `ours` that grows on plateaus of the loss.
fn every() -> Vec<Mass> {
    let mut every = Vec::new();
    for (experts, p) in [(3, 0.5), (5, 0.5), (8, 0.5), (5, 0.9)] {
        let mass = |variant, live_percent| Mass {
            live_percent,
            experts_max: 20,
            ..Mass::new(variant, p, experts)
        };
        for variant in Variant::ALL {
            every.push(mass(variant, None));
            if matches!(variant, Variant::Paper | Variant::Reference) {
                every.push(mass(variant, Some(30)));
            }
        }
    }
    every.push(Mass {
        live_percent: Some(60),
        label: "on plateaus".to_owned(),
        overrides: Overrides::from([("controller.trigger".to_owned(), on_plateau())]),
        experts_max: 20,
        ..Mass::new(Variant::Ours, 0.5, 5)
    });
    every
}

/// A split whenever the training loss has not fallen by a hundredth in 20 steps.
pub(super) fn on_plateau() -> Value {
    json!({ "plateau": { "patience": 20, "threshold": 0.01 } })
}

/// Thresholds that a run too short to learn anything still passes: a check that splits are wired up.
fn smoke_mass() -> Vec<Mass> {
    let mass = |variant| {
        let loose = match variant {
            // The level stays what it is over the variant's own phase.
            Variant::Ours => json!({}),
            Variant::Calibrated => json!({
                "controller.watch.expert.calibrated_cusum.horizon": "30 %",
                "controller.watch.layer.calibrated_cusum.horizon": "30 %",
                "controller.watch.loss.calibrated_cusum.horizon": "30 %",
            }),
            _ => json!({
                "controller.alignment": { "absolute": 1.0 },
                "controller.watch.expert.windowed_z.alpha": 0.5,
            }),
        };
        Mass {
            live_percent: Some(90),
            experts_max: 6,
            overrides: serde_json::from_value(loose).expect("an object"),
            ..Mass::new(variant, 0.5, 3)
        }
    };
    Variant::ALL.map(mass).to_vec()
}

/// The vocabulary that a task stands for.
fn vocab_of(task: &str) -> Option<usize> {
    task.strip_prefix("vocab")?.parse().ok()
}

/// Documents and windows of one vocabulary, with the floor of the best possible predictor on those windows.
pub struct Data {
    vocab: usize,
    ginc: Ginc,
    corpus: Corpus,
    windows: Windows,
    probe: TokenBatch,
    /// Where a run is judged at its best: what says when that is.
    validation: Option<TokenBatch>,
    bayes_loss: f64,
}

impl Family for Synthetic {
    type Data = Data;
    type Task<'a> = Language<'a>;

    const SIDE: Side = Side::BySide;

    fn settings(&self) -> Result<Value, BenchError> {
        let mut settings = json!({
            "steps": self.regime_of("").steps,
            "documents": self.documents,
            "document_length": self.document_length,
            "windows_per_concept": self.windows_per_concept,
        });
        if !self.regimes.is_empty() {
            for assignment in self.assignments()? {
                settings["tasks"][&assignment.set] = json!(self.regime_of(&assignment.set));
            }
        }
        Ok(settings)
    }

    fn assignments(&self) -> Result<Vec<Assignment>, BenchError> {
        let sets: Vec<&str> = match &self.asked {
            Some(set) => vec![set],
            None => self.sets.to_vec(),
        };
        // The only set of a preset has no name, asked for by it or not: its runs are the same.
        let named = self.sets.len() > 1 || sets != self.sets;
        let assignment = |set: &str| Assignment {
            task: named.then(|| set.to_owned()),
            set: set.to_owned(),
            ..Assignment::default()
        };
        Ok(sets.into_iter().map(assignment).collect())
    }

    fn read(&self, set: &str, _: &mut RunContext) -> Result<Data, BenchError> {
        let vocab = vocab_of(set).unwrap_or(50);
        let few = self.regime_of(set).documents;
        let ginc = Ginc::generate(&GincParams::new(vocab).check()?);
        let rng = |purpose| stream(DATA_SEED, purpose, vocab as u64);
        let many = (self.documents, self.document_length);
        let (documents, length) = few.map_or(many, |documents| (documents, 1024));
        let corpus = ginc.sample_corpus(documents, length, &mut rng(Purpose::Training))?;
        let sample = |windows, purpose| Windows::sample(&ginc, windows, SEQ, &mut rng(purpose));
        let windows = sample(self.windows_per_concept, Purpose::Evaluation)?;
        let probe = sample((self.windows_per_concept / 5).max(4), Purpose::Probe)?;
        let bayes_loss = bayes_floor(&BayesFilter::of(&ginc), &windows)?.mean;
        let probe = probe.batch(0..probe.len());
        let validation = match few {
            Some(_) => {
                let validation = sample(self.windows_per_concept, Purpose::Validation)?;
                Some(validation.batch(0..validation.len()))
            }
            None => None,
        };
        Ok(Data {
            validation,
            vocab,
            ginc,
            corpus,
            windows,
            probe,
            bayes_loss,
        })
    }

    fn digest(&self, _: &Data) -> Option<u64> {
        None
    }

    fn task<'a>(
        &'a self,
        data: &'a Data,
        planned: &'a Planned,
    ) -> Result<Language<'a>, BenchError> {
        let regime = self.regime_of(&planned.assignment.set);
        let seed = planned.run.seed;
        Ok(Language {
            place: self.place.clone(),
            model: with(regime.model(data.vocab), &planned.method, seed),
            recipe: regime.recipe(),
            seed,
            gradient_noise: regime.gradient_noise,
            draw: Box::new(move |step| Ok(data.corpus.batch(seed, step, regime.batch, SEQ)?)),
            probe: &data.probe,
            judge: Box::new(|place, model, run| evaluate(place, model, data, run)),
            validation: data.validation.as_ref().map(|batch| (LOOK, batch)),
            stream: None,
        })
    }
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

    /// Which share of each entity's and property's slots each expert got.
    fn usage(&self) -> Usage {
        let shares = |usage: &LabelUsage| {
            let share =
                |slots: u64, all: u64| (slots as f64 / all.max(1) as f64 * 1e4).round() / 1e4;
            let counts = usage.counts();
            let of_expert = |of_labels: ArrayView1<'_, u64>| {
                let shares = of_labels.iter().zip(counts.rows());
                shares
                    .map(|(slots, label)| share(*slots, label.sum()))
                    .collect()
            };
            counts.columns().into_iter().map(of_expert).collect()
        };
        Usage {
            entity: shares(&self.by_entity),
            property: shares(&self.by_property),
        }
    }

    /// Mutual information of experts and states.
    fn information(&self) -> Option<f64> {
        normalized_mutual_information(self.by_state.contingency().view()).ok()
    }
}

/// Test loss, active experts a token, and how far experts specialise on the hidden states behind the tokens.
fn evaluate(
    place: &Place,
    model: &LanguageModel,
    data: &Data,
    run: &mut Run,
) -> Result<(), BenchError> {
    const WINDOWS: usize = 50;
    let (windows, ginc) = (&data.windows, &data.ginc);
    let mut specialisation = Specialisation::new(ginc, run.experts.unwrap_or(1));
    let starts = (0..windows.len()).step_by(WINDOWS);
    let ranges: Vec<_> = starts
        .map(|s| s..(s + WINDOWS).min(windows.len()))
        .collect();
    let batches = ranges.iter().map(|range| windows.batch(range.clone()));
    judge(place, model, run, batches, |index, layer| {
        let states = windows.input_states(ranges[index].clone());
        let recorded = specialisation.record(&layer.plan, &states, ginc);
        recorded.map_err(|e| BenchError::failed("counting states", e))
    })?;
    run.bayes_loss = Some(data.bayes_loss);
    [run.jsd_entity, run.jsd_property] = specialisation.divergences();
    run.nmi = specialisation.information();
    run.usage = (run.seed == 0).then(|| specialisation.usage());
    Ok(())
}

#[cfg(test)]
mod tests {
    use mass_routing::Router;
    use ndarray::Array2;

    use super::*;
    use crate::ginc::GincParams;
    use crate::study::{noise, regime};

    #[test]
    fn a_short_run_is_trained_as_its_task_says() {
        for (study, task) in [
            ("noise", "noise-10"),
            ("noise", "batch-64"),
            ("regime", "model-8"),
        ] {
            let args = ReproduceArgs::parsed(&[study, "--preset", "smoke", "--task", task]);
            let plan = if study == "noise" {
                noise::plan
            } else {
                regime::plan
            };
            let family = plan(&args).unwrap().family;
            let (base, own) = (family.regime_of("base"), family.regime_of(task));
            assert_eq!((base.steps, own.steps), (120, 120));
            assert_ne!(base, own, "{task}");
            // Who changes what a task is must not go on with runs of the old one.
            assert_eq!(family.settings().unwrap()["tasks"][task], json!(own));
        }
    }

    #[test]
    fn a_chosen_router_makes_one_run_of_those_that_differ_by_their_routing() {
        let runs = |more: &[&str]| {
            let line = "synthetic --preset full --seeds 1 --task vocab50";
            let line: Vec<&str> = line.split(' ').chain(more.iter().copied()).collect();
            let args = ReproduceArgs::parsed(&line);
            plan(&args)?.runs(&args)
        };
        let own = runs(&[]).unwrap();
        let chosen = runs(&["--router", "expert_choice:capacity=1.5"]).unwrap();
        // 4 sizes of the static pool, each with up to 4 k and two p; DynMoE; MASS from three sizes in 6 ways, from one with another
        // p, and on plateaus.
        assert_eq!(
            (own.len(), chosen.len()),
            (4 * 4 - 1 + 8 + 1 + 25, 4 + 1 + 19)
        );
        for planned in &chosen {
            if matches!(planned.method, Method::DynMoe { .. }) {
                continue;
            }
            let key = planned.run.key().to_string();
            assert!(key.contains("expert_choice:capacity=1.5"), "{key}");
            let moe = planned
                .method
                .mixture(4, 4, mass_model::Activation::Relu, 0);
            assert_eq!(
                moe.unwrap().router.to_string(),
                "expert_choice:capacity=1.5,combine=renormalised"
            );
        }
        let refused = runs(&["--router", "top_k:k=6"]).unwrap_err().to_string();
        assert!(
            refused.contains("takes 6 experts a token, and the pool begins with 5"),
            "{refused}"
        );
    }

    /// Experts that know the entity and nothing else differ between entities as far as they can, and not between properties.
    #[test]
    fn experts_of_entities_are_told_from_experts_of_properties() {
        let ginc = Ginc::generate(&GincParams::new(50).check().unwrap());
        let (entities, properties) = (ginc.entities(), ginc.properties());
        let states: Vec<u32> = (0..ginc.states() as u32).collect();
        let top_1 = mass_routing::RouterConfig::TopK {
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
            let usage = specialisation.usage();
            let of = |map: &[Vec<f64>]| (map.len(), map[0].len());
            assert_eq!(
                (of(&usage.entity), of(&usage.property)),
                ((experts, entities), (experts, properties))
            );
            // Of each entity a whole, shared by its experts.
            let of_first: f64 = usage.entity.iter().map(|row| row[0]).sum();
            assert!((of_first - 1.0).abs() < 1e-3 * experts as f64, "{of_first}");
            if states.iter().all(|&s| expert(s) == ginc.entity_of(s)) {
                let one = |e: usize, map: &[Vec<f64>], l: usize| (map[e][l] * 1e4) as i64;
                assert!((0..experts).all(|e| one(e, &usage.entity, e) == 10_000
                    && one(e, &usage.entity, (e + 1) % experts) == 0));
                let part = (1e4 / experts as f64).round() as i64;
                assert!((0..properties).all(|p| (one(0, &usage.property, p) - part).abs() <= 1));
            }
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

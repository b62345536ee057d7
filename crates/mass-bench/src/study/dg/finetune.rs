//! Training on all domains but one, scored now and then on what they hold out; or on one domain after the other.

use std::path::{Path, PathBuf};

use mass_cpd::AnyDetectorParams;
use mass_expand::{AlignmentThreshold, StopRule};
use mass_model::growth::{GrowerConfig, LossOn, Mixtures};
use mass_model::optim::{AdamW, AdamWConfig, Group, Schedule, Select};
use mass_model::vit::VitClassifier;
use mass_model::{DropoutKeys, Masked, ModelError, Place, PlacedGradients, TrainPass};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::Domains;
use super::data::{Input, Set};
use super::in_turn::InTurn;
use super::patches;
use super::score::{Score, evaluate};
use super::selected::Selected;
use crate::BenchError;
use crate::cli::RunContext;
use crate::dg::split::Split;
use crate::dynmoe::DynMoeConfig;
use crate::method::Method;
use crate::report::{LEFT_OUT, Run};
use crate::rng::{Purpose, stream};
use crate::study::plan::Planned;
use crate::task::{Finished, Recipe, Scored, Task};

/// Images of each source domain that judge newcomers.
const PROBE: usize = 32;

/// The blocks that GMoE replaces, of the 12 of DeiT-S, counted from zero as in its released code.
const AUTHORS_BLOCKS: [usize; 2] = [8, 10];
const AUTHORS_DEPTH: usize = 12;

/// A model as it was scored during training.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
struct Figures {
    step: u64,
    /// On what the source domains hold out.
    sources: Score,
    /// On the domain that was left out; `None` as long as training goes on.
    target: Option<Score>,
    /// Mean experts of a mixture layer; `None` for a dense model.
    experts: Option<f64>,
}

/// What scoring has found so far.
#[derive(Default, Serialize, Deserialize)]
pub struct Progress {
    /// The model that the source domains chose: the first of those that scored best on what they hold out.
    best: Option<Figures>,
    /// The model at the end.
    last: Option<Figures>,
    /// The model of `best`, which lies beside a checkpoint.
    #[serde(skip)]
    selected: Option<Selected>,
    /// Of domains that follow one another: when each one's part ended, and what the model made then of every domain.
    #[serde(default)]
    pub(super) ends: Vec<(u64, Vec<Score>)>,
}

/// A model on a set of which one domain is left out, or whose domains follow one another.
pub struct FineTune<'a> {
    pub(super) place: Place,
    pub(super) set: &'a Set,
    method: &'a Method,
    /// How domains follow one another; `None` if all are there from the start.
    pub(super) in_turn: Option<InTurn>,
    pub(super) seed: u64,
    pub(super) split: Split,
    recipe: Recipe,
    per_domain: usize,
    evaluate_every: u64,
    identity: Value,
    /// Where pictures of routed patches go.
    patches: PathBuf,
}

impl<'a> FineTune<'a> {
    /// On a split, of whose source domains some images judge newcomers: of the first alone where domains follow one another.
    pub(super) fn new(
        domains: &Domains,
        set: &'a Set,
        planned: &'a Planned,
        mut split: Split,
    ) -> Result<Self, BenchError> {
        let (method, key, seed) = (&planned.method, planned.run.key(), planned.run.seed);
        let depth = set.base.config().num_hidden_layers;
        let blocks = mixture_blocks(depth);
        let first = blocks.first().filter(|_| *method != Method::Dense);
        if first.is_some_and(|block| *block < set.frozen) {
            return Err(BenchError::Usage(format!(
                "{key}: in a model of {depth} blocks the mixtures are blocks {blocks:?}, counted from 0, and this preset does not \
                 train the first {}; it needs a deeper model",
                set.frozen
            )));
        }
        if method.needs_probe() {
            let first = if domains.in_turn {
                1
            } else {
                split.train.len()
            };
            split = split.with_probe(first, PROBE);
            // The spread of their losses is needed too.
            if split.probe.len() < 2 {
                return Err(BenchError::Usage(format!(
                    "{key}: the source domains of {} are too small to keep two training images for judging newcomers by, which \
                     MASS's variant `calibrated` does; --methods or --variant leave it out",
                    set.name
                )));
            }
        }
        let mut adamw = AdamWConfig {
            weight_decay: domains.weight_decay,
            ..AdamWConfig::default()
        }
        .decaying_everything();
        adamw.groups.push(Group {
            name: "head".into(),
            select: Select::Prefix("head".into()),
            weight_decay: None,
            lr_scale: Some(domains.head_learning_rate / domains.learning_rate),
        });
        let folder = RunContext::checkpoint_dir(Path::new(""), &key);
        let patches = domains.args.out.join("patches");
        Ok(Self {
            place: domains.args.place.clone(),
            set,
            method,
            in_turn: domains.in_turn.then(|| InTurn::new(domains, set, &split)),
            seed,
            recipe: Recipe {
                adamw,
                schedule: Schedule::constant(domains.learning_rate, domains.steps),
                log_every: domains.log_every,
                checkpoint_every: domains.checkpoint_every,
            },
            per_domain: domains.per_domain,
            evaluate_every: domains.evaluate_every,
            identity: json!({
                "images": set.digest,
                "frozen": set.frozen,
                "target": split.target,
                "held_out": domains.held_out,
                "per_domain": domains.per_domain,
                "evaluate_every": domains.evaluate_every,
            }),
            patches: patches.join(folder.file_name().unwrap_or_default()),
            split,
        })
    }
}

impl Task for FineTune<'_> {
    type Model = VitClassifier;
    type Batch = Input;
    type Progress = Progress;

    const LAYERS_APART: bool = true;

    fn recipe(&self) -> &Recipe {
        &self.recipe
    }

    fn place(&self) -> &Place {
        &self.place
    }

    fn identity(&self) -> Value {
        self.identity.clone()
    }

    /// A head drawn anew; the blocks that GMoE chose, at the same part of the depth, are mixtures whose experts are copies of
    /// their networks.
    fn model(&self) -> Result<VitClassifier, ModelError> {
        let mut model = self.set.base.clone();
        model.draw_head(&mut stream(self.seed, Purpose::Weights, 0))?;
        let mut rng = stream(self.seed, Purpose::Weights, 1);
        for block in mixture_blocks(model.config().num_hidden_layers) {
            let c = model.config();
            // Each layer draws noise of its own.
            let noise = self.seed.wrapping_mul(1000).wrapping_add(block as u64);
            let (dim, hidden, act) = (c.hidden_size, c.intermediate_size, c.hidden_act);
            if let Some(mixture) = self.method.mixture(dim, hidden, act, noise) {
                model.convert_to(block, &mixture, &mut rng)?;
            }
        }
        Ok(model)
    }

    fn tune(&self, rules: &mut GrowerConfig) {
        tune(rules, self.recipe.schedule.steps, self.set.delta);
    }

    fn dynmoe(&self, experts_max: usize) -> DynMoeConfig {
        DynMoeConfig::vision(experts_max)
    }

    fn batches(&self) -> Box<dyn FnMut(u64) -> Result<Input, BenchError> + Send + '_> {
        Box::new(|step| {
            let which = match &self.in_turn {
                Some(in_turn) => in_turn.batch(&self.split, self.seed, step),
                None => self.split.batch(self.seed, step, self.per_domain),
            };
            self.set.training(&which, self.seed, step)
        })
    }

    fn tokens(&self, input: &Input) -> u64 {
        (input.classes.len() * self.set.tokens) as u64
    }

    fn pass(
        &self,
        model: &VitClassifier,
        input: &Input,
        step: u64,
    ) -> Result<TrainPass<PlacedGradients>, ModelError> {
        let mut keys = DropoutKeys::new(self.seed, step);
        model.train_pass_at(
            &self.place,
            self.set.batch(input),
            &input.classes,
            Some(&mut keys),
        )
    }

    /// An image each.
    fn losses(
        &self,
        model: &VitClassifier,
        input: &Input,
        on: LossOn,
        masked: Option<Masked>,
    ) -> Result<Vec<f64>, ModelError> {
        let of = |input: &Input| {
            model.losses_at(&self.place, self.set.batch(input), &input.classes, masked)
        };
        let mut found = Vec::new();
        match on {
            LossOn::Batch => found = of(input)?,
            LossOn::Probe => {
                for part in self.split.probe.chunks(input.classes.len().max(1)) {
                    let plain = self.set.plain(part);
                    let plain = plain.map_err(|e| ModelError::Config(e.to_string()))?;
                    found.extend(of(&plain)?);
                }
            }
        }
        Ok(found.into_iter().map(f64::from).collect())
    }

    fn update(
        &self,
        optimizer: &mut AdamW,
        model: &mut VitClassifier,
        gradients: &mut PlacedGradients,
        rate: f64,
    ) -> Result<f64, ModelError> {
        optimizer.step(&mut model.trainable(self.set.frozen)?, gradients, rate)
    }

    /// On what the sources hold out; at the end, the selected model and the last on the target. Of domains in turn: on every one,
    /// whenever one has ended.
    fn score(
        &self,
        model: &VitClassifier,
        step: u64,
        progress: &mut Progress,
    ) -> Result<Option<Scored>, BenchError> {
        if let Some(in_turn) = &self.in_turn {
            return in_turn.score(self, model, step, &mut progress.ends);
        }
        let ended = step == self.recipe.schedule.steps;
        if !(ended || step.is_multiple_of(self.evaluate_every)) {
            return Ok(None);
        }
        let sources = evaluate(&self.place, model, self.set, &self.split.held_out)?;
        let mut extra = Map::new();
        extra.insert("source_validation".into(), json!(sources.accuracy));
        extra.insert("source_validation_loss".into(), json!(sources.loss));
        let layers = model.mixtures();
        let experts: usize = (0..layers).map(|l| model.mixture(l).ids().len()).sum();
        let figures = Figures {
            step,
            sources,
            target: None,
            experts: (layers > 0).then(|| experts as f64 / layers as f64),
        };
        let best = progress.best.as_ref();
        if best.is_none_or(|best| sources.accuracy > best.sources.accuracy) {
            progress.best = Some(figures);
            progress.selected = Some(Selected::new(step, model));
        }
        let mut test_loss = None;
        if ended {
            let on_target = |model| evaluate(&self.place, model, self.set, &self.split.test);
            let target = on_target(model)?;
            extra.insert("target_accuracy".into(), json!(target.accuracy));
            test_loss = Some(target.loss);
            progress.last = Some(Figures {
                target: Some(target),
                ..figures
            });
            if let (Some(best), Some(selected)) = (&mut progress.best, &progress.selected) {
                best.target = Some(if best.step == step {
                    target
                } else {
                    on_target(selected.model())?
                });
            }
        }
        Ok(Some(Scored {
            test_loss,
            extra,
            stop: false,
        }))
    }

    fn save(
        &self,
        dir: &Path,
        step: u64,
        progress: &Progress,
        written: bool,
    ) -> Result<(), BenchError> {
        // The model itself is the selected one as long as no step has been made since.
        let before = progress.selected.as_ref().filter(|s| s.step() < step);
        match (written, before) {
            (false, Some(selected)) => selected.write(dir),
            (false, None) => Ok(()),
            (true, before) => Selected::remove_others(dir, before.map(Selected::step)),
        }
    }

    fn load(
        &self,
        dir: &Path,
        step: u64,
        model: &VitClassifier,
        progress: &mut Progress,
    ) -> Result<(), BenchError> {
        progress.selected = match progress.best {
            Some(best) if best.step == step => Some(Selected::new(step, model)),
            Some(best) => Some(Selected::read(dir, best.step)?),
            None => None,
        };
        Ok(())
    }

    /// The figures of the selected model, and how the one at the end routes patches of images that it was not trained on.
    fn finish(&self, end: &Finished<'_, Self>, run: &mut Run) -> Result<(), BenchError> {
        if let Some(in_turn) = &self.in_turn {
            return in_turn.finish(self, end, run);
        }
        let (best, last) = (end.progress.best, end.progress.last);
        let target = best.and_then(|b| b.target);
        // Of two layers the mean; the exact figure is among the metrics.
        let experts = best.and_then(|b| b.experts);
        run.experts = experts.map(|e| e.round() as usize);
        run.active_per_token = target.and_then(|t| t.mean_k);
        run.test_loss = target.map(|t| t.loss);
        run.accuracy = target.map(|t| t.accuracy);
        run.metric = run.accuracy;
        let left_out = self.set.images.left_out.len();
        let of = [&self.split.held_out[..], &self.split.test].concat();
        let layers = patches::route(&self.place, end.model, self.set, &of)?;
        let information = |which: usize| {
            let of = layers.iter().filter_map(|l| l.information()[which]);
            let values: Vec<f64> = of.collect();
            (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
        };
        let last_target = last.and_then(|l| l.target);
        for (name, value) in [
            ("selected_step", best.map(|b| b.step as f64)),
            ("source_validation", best.map(|b| b.sources.accuracy)),
            ("experts_mean", experts),
            ("last_accuracy", last_target.map(|t| t.accuracy)),
            ("last_source_validation", last.map(|l| l.sources.accuracy)),
            ("waiting_for_data", end.waiting),
            (LEFT_OUT, (left_out > 0).then_some(left_out as f64)),
            ("nmi_class", information(0)),
            ("nmi_domain", information(1)),
        ] {
            run.metrics.extend(value.map(|v| (name.to_owned(), v)));
        }
        if layers.is_empty() {
            return Ok(());
        }
        patches::write(&layers, self.set, &self.patches)
    }
}

/// The blocks that become mixtures in a model of `depth` blocks.
pub(super) fn mixture_blocks(depth: usize) -> Vec<usize> {
    let mut blocks = AUTHORS_BLOCKS.map(|b| b * depth / AUTHORS_DEPTH).to_vec();
    blocks.dedup();
    blocks
}

/// The paper's settings for vision: `T_warm = max(100, 5 %)`, `w = max(200, 9 %)`, threshold `delta`.
///
/// Warm-up and window of a run of a few hundred steps would outlast it: there they are at most a tenth and a fifth of it.
pub(super) fn tune(rules: &mut GrowerConfig, steps: u64, delta: f64) {
    let controller = &mut rules.controller;
    controller.alignment = AlignmentThreshold::Absolute(delta);
    if let StopRule::Patience {
        checks_after_expansions,
        ..
    } = &mut controller.stop
    {
        *checks_after_expansions = 0;
    }
    if let Some(AnyDetectorParams::WindowedZ(z)) = &mut controller.watch.expert {
        let part = |percent: u64, at_least: u64, share: u64| {
            let wanted = (steps * percent / 100).max(at_least);
            wanted.min(steps / share).max(10) as usize
        };
        (z.warmup, z.window) = (part(5, 100, 10), part(9, 200, 5));
    }
}

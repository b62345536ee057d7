//! What each preset runs.

use std::path::{Component, Path, PathBuf};
use std::sync::atomic::Ordering;

use mass_model::Activation;
use mass_model::ModelError;
use mass_model::optim::{AdamWConfig, Group, Select};
use mass_model::vit::{VitClassifier, VitConfig};
use serde::Serialize;

use super::data::Set;
use super::method::Method;
use super::trainer::TrainerConfig;
use crate::BenchError;
use crate::cli::{Preset, ReproduceArgs, RunContext, Variant};
use crate::dg::DgError;
use crate::dg::augment::Augment;
use crate::dg::features::check_channels;
use crate::dg::folder::{ImageFolder, find_set};
use crate::dg::images::{BadImages, DomainImages, PIECE};
use crate::dg::reported::SETS;
use crate::dg::sample;
use crate::report::Run;
use crate::rng::{Purpose, stream};
use crate::study::mass::{MassSetting, wanted};
use crate::study::{has_model, unusable_model};

/// The folder of the model that quick and full fine-tune.
const SMALL_MODEL: &str = "vit-s14";
/// The folder of the paper's model, DeiT-S/16.
const PAPER_MODEL: &str = "deit-small-patch16-224";

/// Name of the generated set.
pub(super) const SAMPLE: &str = "sample";

/// Part of a run in which MASS may split, in percent, where the variant's own timing is not kept: at its own, detection is
/// live for a few steps of runs as short as these, if at all.
const LIVE_PERCENT: u64 = 60;

/// What a preset fixes.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Plan {
    model: Model,
    sets: Vec<String>,
    /// How many domains are targets, the first of them; `None` for all.
    targets: Option<usize>,
    seeds: usize,
    methods: Vec<Method>,
    /// Side of the images in pixels.
    size: usize,
    /// Blocks that are not trained.
    frozen: usize,
    augment: Option<Augment>,
    steps: u64,
    per_domain: usize,
    learning_rate: f64,
    head_learning_rate: f64,
    weight_decay: f64,
    held_out: f64,
    evaluate_every: u64,
    log_every: u64,
    checkpoint_every: u64,
}

/// Where the weights come from.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Model {
    /// A small model with drawn weights, the same in every run.
    Drawn(VitConfig),
    /// A directory in Hugging Face's or timm's layout.
    Directory(PathBuf),
}

impl Model {
    /// What is wrong with the model: of one that is read, its configuration is input too.
    fn problem(&self, error: ModelError) -> BenchError {
        match (error, self) {
            (ModelError::Config(problem), Self::Directory(dir)) => BenchError::Input {
                path: dir.clone(),
                problem,
            },
            (other, _) => unusable_model(other, "reading the model"),
        }
    }
}

/// A run to be made.
pub(super) struct Planned {
    pub(super) run: Run,
    pub(super) set: String,
    target: usize,
    method: Method,
}

impl Plan {
    /// The plan of a preset.
    pub(super) fn of(args: &ReproduceArgs) -> Result<Self, BenchError> {
        let mass = |variant, live_percent| {
            Method::Mass(MassSetting {
                variant,
                p: 0.3,
                router: None,
                live_percent,
                experts: 6,
                experts_max: 8,
                loose: false,
            })
        };
        let every = [Variant::Paper, Variant::Reference, Variant::Ours];
        let dynmoe = Method::DynMoe {
            experts: 6,
            experts_max: 8,
        };
        let gmoe = |experts| Method::Gmoe { experts };
        let small = |model| Self {
            model,
            sets: vec!["pacs".into()],
            targets: None,
            seeds: 3,
            methods: [Method::Erm, gmoe(6), dynmoe.clone()]
                .into_iter()
                .chain(every.map(|v| mass(v, Some(LIVE_PERCENT))))
                .collect(),
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
        let mut plan = match args.preset {
            Preset::Smoke => Self::smoke(small(Model::Drawn(tiny()))),
            Preset::Quick => Self {
                targets: Some(1),
                seeds: 1,
                ..small(directory(args, SMALL_MODEL)?)
            },
            Preset::Full => small(directory(args, SMALL_MODEL)?),
            Preset::Paper => Self {
                sets: SETS.map(str::to_owned).to_vec(),
                methods: [Method::Erm, gmoe(4), gmoe(6), gmoe(8), dynmoe.clone()]
                    .into_iter()
                    .chain(every.map(|v| mass(v, None)))
                    .collect(),
                size: 224,
                frozen: 0,
                augment: Some(Augment::default()),
                steps: 5000,
                per_domain: 32,
                head_learning_rate: 3e-5,
                evaluate_every: 300,
                log_every: 50,
                checkpoint_every: 500,
                ..small(directory(args, PAPER_MODEL)?)
            },
        };
        plan.only(args)?;
        if let Some(router) = &args.router {
            for method in &mut plan.methods {
                if let Method::Mass(m) = method {
                    m.router = Some(router.clone());
                    if wanted(&named(&Method::Mass(m.clone()), 0), args) {
                        m.check_router()?;
                    }
                }
            }
        }
        Ok(plan)
    }

    /// Every part of the study on generated images, in seconds.
    fn smoke(small: Self) -> Self {
        let mass = |variant| {
            Method::Mass(MassSetting {
                variant,
                p: 0.3,
                router: None,
                live_percent: Some(90),
                experts: 3,
                experts_max: 5,
                loose: true,
            })
        };
        Self {
            sets: vec![SAMPLE.into()],
            targets: Some(1),
            seeds: 1,
            methods: vec![
                Method::Erm,
                Method::Gmoe { experts: 3 },
                Method::DynMoe {
                    experts: 3,
                    experts_max: 5,
                },
                mass(Variant::Paper),
                mass(Variant::Reference),
                mass(Variant::Ours),
            ],
            size: 16,
            frozen: 1,
            steps: 160,
            per_domain: 8,
            learning_rate: 2e-3,
            head_learning_rate: 2e-3,
            evaluate_every: 20,
            checkpoint_every: 20,
            ..small
        }
    }

    /// Keeps the set that `--task` names; a target within it is kept by [`runs`](Self::runs).
    fn only(&mut self, args: &ReproduceArgs) -> Result<(), BenchError> {
        let Some((set, target)) = args.task.as_deref().map(parts) else {
            return Ok(());
        };
        if !is_name(set) {
            return Err(BenchError::Usage(format!(
                "--task {set}: a set is named by its folder in --data"
            )));
        }
        let generated = args.preset == Preset::Smoke;
        if generated != (set == SAMPLE) {
            return Err(BenchError::Usage(format!(
                "--task {set}, preset {}: smoke has the generated set `{SAMPLE}` alone, and the other presets do not have it",
                args.preset
            )));
        }
        // DomainBed's downloader writes some names in capitals; a set has one name here.
        let known = SETS.iter().find(|known| set == known.to_uppercase());
        self.sets = vec![known.map_or(set, |known| known).to_owned()];
        if target.is_some() {
            self.targets = None;
        }
        Ok(())
    }

    /// Where the model's files are, if it has any.
    pub(super) fn directory(&self) -> Option<&Path> {
        match &self.model {
            Model::Drawn(_) => None,
            Model::Directory(dir) => Some(dir),
        }
    }

    /// Every run, in the order in which results list them. Sets are listed, not read.
    pub(super) fn runs(&self, args: &ReproduceArgs) -> Result<Vec<Planned>, BenchError> {
        let only = args.task.as_deref().and_then(|task| parts(task).1);
        let mut runs = Vec::new();
        for set in &self.sets {
            let domains = match set.as_str() {
                SAMPLE => sample::DOMAINS.map(str::to_owned).to_vec(),
                name => ImageFolder::open(&set_dir(args, name)?)?.domains,
            };
            let mut targets: Vec<usize> = (0..domains.len()).collect();
            match only {
                Some(only) => targets.retain(|&d| domains[d] == only),
                None => targets.truncate(self.targets.unwrap_or(usize::MAX)),
            }
            if targets.is_empty() {
                return Err(BenchError::Usage(format!(
                    "--task {set}/{}: the domains of {set} are {}",
                    only.unwrap_or_default(),
                    domains.join(", ")
                )));
            }
            for target in targets {
                for method in self.methods.iter().filter(|m| wanted(&named(m, 0), args)) {
                    for seed in 0..args.seeds.unwrap_or(self.seeds) as u64 {
                        let mut run = named(method, seed);
                        run.task = Some(format!("{set}/{}", domains[target]));
                        run.metric_name = Some("accuracy".into());
                        runs.push(Planned {
                            run,
                            set: set.clone(),
                            target,
                            method: method.clone(),
                        });
                    }
                }
            }
        }
        let own = runs.into_iter().enumerate();
        Ok(own
            .filter(|(i, _)| args.shard.owns(*i))
            .map(|(_, run)| run)
            .collect())
    }

    /// A set with the model for its classes, without features yet.
    pub(super) fn read(
        &self,
        args: &ReproduceArgs,
        name: &str,
        ctx: &mut RunContext,
    ) -> Result<Set, BenchError> {
        let images = if name == SAMPLE {
            sample::images(self.size, 24)
        } else {
            decoded(&set_dir(args, name)?, self.size, args, ctx)?
        };
        let mut rng = stream(0, Purpose::Weights, 0);
        let classes = images.classes.len();
        let base = match &self.model {
            Model::Drawn(config) => VitClassifier::new(config, classes, &mut rng),
            Model::Directory(dir) => VitClassifier::load_with_new_head(dir, classes, &mut rng),
        };
        let base = base.map_err(|e| self.model.problem(e))?;
        let (patch, size) = (base.config().patch_size, self.size);
        check_channels(base.config()).map_err(|e| self.model.problem(e))?;
        if !size.is_multiple_of(patch) || self.frozen > base.config().num_hidden_layers {
            return Err(BenchError::Usage(format!(
                "a model of {} blocks with patches of {patch} pixels does not fit this preset, which has images of {size} pixels \
                 and freezes {} blocks",
                base.config().num_hidden_layers,
                self.frozen
            )));
        }
        let tokens = base.tokens((size, size));
        let tokens = tokens.map_err(|e| BenchError::failed("cutting images into patches", e))?;
        Ok(Set {
            name: name.to_owned(),
            tokens,
            digest: images.digest(),
            images,
            base,
            frozen: self.frozen,
            features: None,
            augment: self.augment,
            delta: delta(name),
        })
    }

    /// Everything that fixes a run.
    pub(super) fn config(&self, planned: &Planned, set: &Set) -> TrainerConfig {
        let mut adamw = AdamWConfig {
            weight_decay: self.weight_decay,
            ..AdamWConfig::default()
        }
        .decaying_everything();
        adamw.groups.push(Group {
            name: "head".into(),
            select: Select::Prefix("head".into()),
            weight_decay: None,
            lr_scale: Some(self.head_learning_rate / self.learning_rate),
        });
        TrainerConfig {
            run: planned.run.key().to_string(),
            seed: planned.run.seed,
            method: planned.method.clone(),
            target: planned.target,
            held_out: self.held_out,
            steps: self.steps,
            per_domain: self.per_domain,
            learning_rate: self.learning_rate,
            adamw,
            evaluate_every: self.evaluate_every,
            log_every: self.log_every,
            checkpoint_every: self.checkpoint_every,
            images: set.digest,
            frozen: self.frozen,
        }
    }

    /// Steps of a run.
    pub(super) fn steps(&self) -> u64 {
        self.steps
    }
}

/// Whether a set is the name of a folder and not a way to one.
fn is_name(set: &str) -> bool {
    let mut parts = Path::new(set).components();
    matches!(
        (parts.next(), parts.next()),
        (Some(Component::Normal(_)), None)
    )
}

/// "pacs/sketch" as a set and a target, "pacs" as a set.
fn parts(task: &str) -> (&str, Option<&str>) {
    match task.split_once('/') {
        Some((set, target)) => (set, Some(target)),
        None => (task, None),
    }
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

/// A run of a method with what tells it apart.
fn named(method: &Method, seed: u64) -> Run {
    let mut run = Run::new("erm", seed);
    match method {
        Method::Erm => {}
        Method::Gmoe { experts } => {
            run.method = "gmoe".into();
            (run.experts_init, run.k) = (Some(*experts), Some(1));
        }
        Method::DynMoe { experts, .. } => {
            run.method = "dynmoe".into();
            run.experts_init = Some(*experts);
        }
        Method::Mass(m) => m.describe(&mut run),
    }
    run
}

/// Threshold of the alignment test that the paper gives for a set.
pub(super) fn delta(set: &str) -> f64 {
    match set {
        "pacs" | "vlcs" => 0.002,
        _ => 0.001,
    }
}

/// Where what was read once is kept.
pub(super) fn cache(args: &ReproduceArgs) -> PathBuf {
    args.out.join("cache")
}

/// The images of a directory.
fn decoded(
    dir: &Path,
    size: usize,
    args: &ReproduceArgs,
    ctx: &mut RunContext,
) -> Result<DomainImages, BenchError> {
    let (flag, bar) = (ctx.interrupt_flag(), &mut ctx.progress);
    let mut progress = |done, all| {
        if done <= PIECE {
            bar.start("files", all as u64);
        }
        bar.tick(done as u64, || format!("{}: decoding", dir.display()));
        !flag.load(Ordering::SeqCst)
    };
    let bad = match args.leave_out_damaged {
        true => BadImages::LeaveOut,
        false => BadImages::Refuse,
    };
    let cache = cache(args);
    match DomainImages::read_with(dir, size, bad, Some(&cache), &mut progress) {
        Err(DgError::Stopped) => Err(BenchError::Interrupted {
            out: args.out.clone(),
        }),
        read => Ok(read?),
    }
}

/// The directory of a set.
fn set_dir(args: &ReproduceArgs, name: &str) -> Result<PathBuf, BenchError> {
    let Some(data) = &args.data else {
        return Err(BenchError::Usage(format!(
            "dg, preset {}, needs data: give --data DIR (or $MASS_DATA_DIR) with DIR/{name}/<domain>/<class>/*.jpg, or \
             --preset smoke, which needs none",
            args.preset
        )));
    };
    find_set(data, name).ok_or_else(|| BenchError::Input {
        path: data.join(name),
        problem: "no such directory; it should hold <domain>/<class>/*.jpg as DomainBed's \
                  `python -m domainbed.scripts.download` lays it out; --task names another set"
            .into(),
    })
}

/// The directory of a model, which must be there.
fn directory(args: &ReproduceArgs, name: &str) -> Result<Model, BenchError> {
    let preset = args.preset;
    let Some(models) = &args.models else {
        return Err(BenchError::Usage(format!(
            "dg, preset {preset}, needs a pretrained model: give --models DIR (or $MASS_MODELS_DIR) with DIR/{name}/ \
             (config.json, and model.safetensors or its index and the files it names), or --preset smoke, which needs none"
        )));
    };
    let dir = models.join(name);
    if !has_model(&dir) {
        return Err(BenchError::Input {
            path: dir,
            problem: format!(
                "no model there; preset {preset} needs config.json, and model.safetensors or its index and the files it names, as https://huggingface.co has them; \
                 `cargo xtask data fetch {name}` gets them"
            ),
        });
    }
    Ok(Model::Directory(dir))
}

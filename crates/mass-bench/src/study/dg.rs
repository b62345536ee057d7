//! The domain-generalisation study: MASS in two blocks of a pretrained vision transformer, beside the dense model (ERM), GMoE and
//! DynMoE, on image sets in DomainBed's layout.
//!
//! One domain is left out; a model is trained on the others together, a fifth of each held out. Of the models scored on the way the
//! first that does best on what is held out is the run's, and its accuracy on the domain that was left out is the run's figure:
//! nothing is chosen by the target. Where the first blocks are frozen, what they make of every image is computed once and kept.

mod data;
mod finetune;
pub mod in_turn;
mod patches;
mod plan;
mod score;
mod selected;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use mass_model::ModelError;
use mass_model::vit::{VitClassifier, VitConfig};
use serde_json::{Value, json};

use super::plan::{Assignment, Family, Planned};
use super::weights::{self, unusable_model};
use crate::BenchError;
use crate::cli::{Preset, ReproduceArgs, RunContext};
use crate::dg::DgError;
use crate::dg::augment::Augment;
use crate::dg::features::{Features, check_channels};
use crate::dg::folder::{ImageFolder, find_set};
use crate::dg::images::{BadImages, DomainImages, PIECE, Source};
use crate::dg::reported::SETS;
use crate::dg::sample;
use crate::dg::split::Split;
use crate::report::is_name;
use crate::rng::{Purpose, stream};
use crate::sweep::Side;
use data::Set;
use finetune::FineTune;
pub use plan::plan;

/// What `--task` may name: a set, or a set and the domain that is left out. Other folders in DomainBed's layout may be named too.
pub const TASKS: &[&str] = &[
    "pacs",
    "pacs/art_painting",
    "pacs/cartoon",
    "pacs/photo",
    "pacs/sketch",
    "vlcs",
    "vlcs/Caltech101",
    "vlcs/LabelMe",
    "vlcs/SUN09",
    "vlcs/VOC2007",
    "office_home",
    "office_home/Art",
    "office_home/Clipart",
    "office_home/Product",
    "office_home/Real World",
    "terra_incognita",
    "terra_incognita/location_100",
    "terra_incognita/location_38",
    "terra_incognita/location_43",
    "terra_incognita/location_46",
    "sample",
    "sample/bright",
    "sample/dark",
    "sample/noisy",
    "sample/striped",
];

/// Features that would take more than this are computed with each batch instead of being kept.
const MOST_FEATURES: u64 = 4 << 30;

/// Name of the generated set.
const SAMPLE: &str = "sample";

/// Sets of images, each of whose domains is left out in turn, for one pretrained model.
#[derive(Debug)]
pub struct Domains {
    args: ReproduceArgs,
    model: Model,
    sets: Vec<String>,
    /// How many domains are targets, the first of them; `None` for all.
    targets: Option<usize>,
    /// Whether domains follow one another, and none is left out.
    in_turn: bool,
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
#[derive(Debug, Clone, PartialEq)]
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
            (ModelError::Config(problem), Self::Directory(dir)) => BenchError::input(dir, problem),
            (other, _) => unusable_model(other, "reading the model"),
        }
    }
}

impl Domains {
    /// Keeps the set that `--task` names; a target within it is kept by [`assignments`](Family::assignments).
    fn only(&mut self) -> Result<(), BenchError> {
        let Some((set, target)) = self.args.task.as_deref().map(parts) else {
            return Ok(());
        };
        if !is_name(set) {
            return Err(BenchError::Usage(format!(
                "--task {set}: a set is named by its folder in --data"
            )));
        }
        let generated = self.args.preset == Preset::Smoke;
        if generated != (set == SAMPLE) {
            return Err(BenchError::Usage(format!(
                "--task {set}, preset {}: smoke has the generated set `{SAMPLE}` alone, and the other presets do not have it",
                self.args.preset
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

    /// Where what was read once is kept.
    fn cache(&self) -> PathBuf {
        self.args.out.join("cache")
    }

    fn interrupted(&self) -> BenchError {
        BenchError::Interrupted {
            out: self.args.out.clone(),
        }
    }

    /// The directory of a set.
    fn set_dir(&self, name: &str) -> Result<PathBuf, BenchError> {
        let Some(data) = &self.args.data else {
            return Err(BenchError::Usage(format!(
                "{}, preset {}, needs data: give --data DIR (or $MASS_DATA_DIR) with DIR/{name}/<domain>/<class>/*.jpg, or \
                 --preset smoke, which needs none",
                self.args.study, self.args.preset
            )));
        };
        let set = find_set(data, name).ok_or_else(|| {
            let problem = "no such directory; it should hold <domain>/<class>/*.jpg as DomainBed's \
                           `python -m domainbed.scripts.download` lays it out; --task names another set";
            BenchError::input(data.join(name), problem)
        })?;
        // Results there would be a domain of the next run.
        let real = |path: &Path| path.canonicalize().ok();
        // Absolute: of a relative one the directory that it begins in is none of its ancestors.
        let out = std::path::absolute(&self.args.out).ok();
        let out = out.and_then(|out| out.ancestors().find_map(real));
        match out.zip(real(&set)) {
            Some((out, folder)) if out.starts_with(&folder) => Err(BenchError::Usage(format!(
                "--out {}: is within the images of {name}; give a directory elsewhere",
                self.args.out.display()
            ))),
            _ => Ok(set),
        }
    }

    /// The images of a directory.
    fn decoded(&self, dir: &Path, ctx: &mut RunContext) -> Result<DomainImages, BenchError> {
        let (flag, bar) = (ctx.interrupt_flag(), &mut ctx.progress);
        let mut progress = |done, all| {
            if done <= PIECE {
                bar.start("files", all as u64);
            }
            bar.tick(done as u64, || format!("{}: decoding", dir.display()));
            !flag.load(Ordering::SeqCst)
        };
        let bad = match self.args.leave_out_damaged {
            true => BadImages::LeaveOut,
            false => BadImages::Refuse,
        };
        let cache = self.cache();
        match DomainImages::read_with(dir, self.size, bad, Some(&cache), &mut progress) {
            Err(DgError::Stopped) => Err(self.interrupted()),
            read => Ok(read?),
        }
    }
}

impl Family for Domains {
    type Data = Set;
    type Task<'a> = FineTune<'a>;

    const SIDE: Side = Side::Alone;
    const KEPT: bool = false;

    fn dense(&self) -> &'static str {
        if self.in_turn { "dense" } else { "erm" }
    }

    fn settings(&self) -> Result<Value, BenchError> {
        let model = match &self.model {
            Model::Drawn(config) => json!({ "drawn": config }),
            Model::Directory(dir) => weights::settings(dir)?,
        };
        Ok(json!({
            "model": model,
            "size": self.size,
            "frozen": self.frozen,
            "augment": self.augment,
            "steps": self.steps,
            "per_domain": self.per_domain,
            "learning_rate": self.learning_rate,
            "head_learning_rate": self.head_learning_rate,
            "weight_decay": self.weight_decay,
            "held_out": self.held_out,
            "evaluate_every": self.evaluate_every,
            "log_every": self.log_every,
        }))
    }

    /// Sets are listed, not read.
    fn assignments(&self) -> Result<Vec<Assignment>, BenchError> {
        let only = self.args.task.as_deref().and_then(|task| parts(task).1);
        let mut assignments = Vec::new();
        let assignment = |set: &String, part, task| Assignment {
            set: set.clone(),
            part,
            task: Some(task),
            metric: Some("accuracy"),
        };
        for set in &self.sets {
            let domains = match set.as_str() {
                SAMPLE => sample::DOMAINS.map(str::to_owned).to_vec(),
                name => ImageFolder::open(&self.set_dir(name)?)?.domains,
            };
            if self.in_turn {
                assignments.push(assignment(set, 0, set.clone()));
                continue;
            }
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
            let of_target = |part| assignment(set, part, format!("{set}/{}", domains[part]));
            assignments.extend(targets.into_iter().map(of_target));
        }
        Ok(assignments)
    }

    /// Images with the model for their classes, without features yet.
    fn read(&self, name: &str, ctx: &mut RunContext) -> Result<Set, BenchError> {
        let images = if name == SAMPLE {
            sample::images(self.size, 24)
        } else {
            self.decoded(&self.set_dir(name)?, ctx)?
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

    fn digest(&self, set: &Set) -> Option<u64> {
        Some(set.digest)
    }

    /// What the frozen blocks make of the images.
    fn prepare(&self, mut set: Set, ctx: &mut RunContext) -> Result<Set, BenchError> {
        let (images, name) = (&set.images, &set.name);
        let from = match &images.source {
            Source::Generated => "generated".to_owned(),
            Source::Decoded => "decoded".to_owned(),
            Source::Cache => "from the cache".to_owned(),
            Source::Repaired(why) => format!("decoded again: {why}"),
        };
        ctx.progress.note(&format!(
            "{name}: {} images of {} classes in {} domains, {from}; {} other files passed over",
            images.len(),
            images.classes.len(),
            images.domains.len(),
            images.passed_over
        ));
        for file in &images.left_out {
            let (path, problem) = (file.path.display(), &file.problem);
            ctx.progress
                .note(&format!("{name}: left out: {path}: {problem}"));
        }
        if set.frozen == 0 || set.augment.is_some() {
            return Ok(set);
        }
        let bytes = Features::bytes(&set.base, images)?;
        if bytes > MOST_FEATURES {
            ctx.progress.note(&format!(
                "{name}: the features of the frozen blocks would take {} MiB; they are computed with each batch",
                bytes >> 20
            ));
            return Ok(set);
        }
        let (flag, progress) = (ctx.interrupt_flag(), &mut ctx.progress);
        progress.start("images", images.len() as u64);
        let mut done = 0;
        // Generated images are quicker through the blocks than through a disk.
        let cache = (name != SAMPLE).then(|| self.cache());
        let features = Features::compute(
            &set.base,
            images,
            set.frozen,
            cache.as_deref(),
            &mut |more| {
                done += more;
                progress.tick(done, || format!("{name}: features"));
                !flag.load(Ordering::SeqCst)
            },
        )?;
        let features = features.ok_or_else(|| self.interrupted())?;
        if features.from_cache {
            progress.note(&format!("{name}: features from the cache"));
        }
        set.features = Some(features);
        Ok(set)
    }

    fn task<'a>(&'a self, set: &'a Set, planned: &'a Planned) -> Result<FineTune<'a>, BenchError> {
        let target = (!self.in_turn).then_some(planned.assignment.part);
        let split = Split::of(&set.images, target, self.held_out, planned.run.seed)?;
        FineTune::new(self, set, planned, split)
    }
}

/// "pacs/sketch" as a set and a target, "pacs" as a set.
fn parts(task: &str) -> (&str, Option<&str>) {
    match task.split_once('/') {
        Some((set, target)) => (set, Some(target)),
        None => (task, None),
    }
}

/// Threshold of the alignment test that the paper gives for a set.
fn delta(set: &str) -> f64 {
    match set {
        "pacs" | "vlcs" => 0.002,
        _ => 0.001,
    }
}

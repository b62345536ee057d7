use std::collections::BTreeMap;
use std::fmt;

use mass_expand::{Diagnosis, Watched};
use mass_model::Place;
use serde::{Deserialize, Serialize};

use super::{Comparison, Decisions, Machine, PairMeans, Summary, comparisons, summarise};

/// What a results.json is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Study.
    pub study: String,
    /// Preset.
    pub preset: String,
    /// Where the runs are made.
    pub machine: Machine,
    /// Which part of the runs is made; `None` for all.
    pub part: Option<Part>,
}

/// Which of a study's runs results hold, where they are not all: those of some shards.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// The shards, counted from 1.
    pub shards: Vec<usize>,
    /// Into how many the study is split.
    pub of: usize,
    /// The names of all runs that were split, in the order of the results.
    pub plan: Vec<String>,
}

impl Part {
    /// Whether both are of the same runs, split alike.
    pub(super) fn of_one_split(&self, other: &Self) -> bool {
        (self.of, &self.plan) == (other.of, &other.plan)
    }

    /// Runs that these shards have when they are finished.
    #[must_use]
    pub fn planned(&self) -> usize {
        let own = |run: &usize| self.shards.contains(&(run % self.of.max(1) + 1));
        (0..self.plan.len()).filter(own).count()
    }
}

/// "shard 2 of 3", "shards 1, 3 of 4".
impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shards: Vec<String> = self.shards.iter().map(usize::to_string).collect();
        let word = if shards.len() == 1 { "shard" } else { "shards" };
        write!(f, "{word} {} of {}", shards.join(", "), self.of)
    }
}

impl Header {
    /// A header for this machine.
    #[must_use]
    pub fn new(study: &str, preset: &str, threads: usize) -> Self {
        Self {
            study: study.to_owned(),
            preset: preset.to_owned(),
            machine: Machine::this(threads),
            part: None,
        }
    }

    /// The same of runs that a device computes.
    #[must_use]
    pub fn on(mut self, place: &Place) -> Self {
        self.machine.device = place.to_string();
        self
    }
}

/// The whole of results.json.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Results {
    /// Study.
    pub study: String,
    /// Preset.
    pub preset: String,
    /// Version of this crate.
    pub version: String,
    /// Where the runs were made, but for those that name another.
    pub machine: Machine,
    /// Which part of the study's runs these are; absent if they are all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub part: Option<Part>,
    /// Finished runs, in the order they were made.
    pub runs: Vec<Run>,
    /// Means over seeds, one entry a method and setting.
    pub summary: Vec<Summary>,
    /// MASS against its rivals, paired over tasks and seeds; empty for studies whose runs have no metric.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub comparisons: Vec<Comparison>,
}

impl Results {
    /// No run yet.
    #[must_use]
    pub fn new(header: Header) -> Self {
        Self {
            study: header.study,
            preset: header.preset,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            machine: header.machine,
            part: header.part,
            runs: Vec::new(),
            summary: Vec::new(),
            comparisons: Vec::new(),
        }
    }

    /// Adds a run and brings the summary up to date.
    pub(super) fn push(&mut self, run: Run) {
        self.runs.push(run);
        self.summarise();
    }

    /// Brings the summary up to date.
    pub(super) fn summarise(&mut self) {
        self.summary = summarise(&self.runs);
        self.comparisons = comparisons(&self.study, &self.runs);
    }
}

/// One finished run. A figure that a study does not have is `None`, never 0.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// Method: mass, dense, erm, static, dynmoe, gmoe, or an ablation by name.
    pub method: String,
    /// Variant of the method's rules: paper, reference, calibrated, ours.
    pub variant: Option<String>,
    /// What tells runs of one method apart besides the other fields, such as `live 30 %`.
    pub setting: Option<String>,
    /// Task within the study.
    pub task: Option<String>,
    /// Seed.
    pub seed: u64,
    /// Experts a token may use at most, of static top-k.
    pub k: Option<usize>,
    /// Experts at the start K_0.
    pub experts_init: Option<usize>,
    /// Active experts K at the end, or when the model was best; of several mixture layers the most (`train`) or the rounded mean
    /// (`dg`).
    pub experts: Option<usize>,
    /// Mean experts a token used in the test.
    pub active_per_token: Option<f64>,
    /// Mean test loss: nats a token, or of GLUE nats an example (squared error for scores).
    pub test_loss: Option<f64>,
    /// The least loss any model can reach on the test set, nats a token.
    pub bayes_loss: Option<f64>,
    /// Accuracy, 0 to 1.
    pub accuracy: Option<f64>,
    /// The task's own metric.
    pub metric: Option<f64>,
    /// Its name.
    pub metric_name: Option<String>,
    /// Every metric of the task by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metrics: BTreeMap<String, f64>,
    /// The epoch whose figures these are, counted from 1, of studies that choose the best.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub best_epoch: Option<u64>,
    /// Jensen-Shannon divergence of expert usage between entities.
    pub jsd_entity: Option<f64>,
    /// The same between properties.
    pub jsd_property: Option<f64>,
    /// Normalised mutual information between expert and hidden state.
    pub nmi: Option<f64>,
    /// Training steps.
    pub steps: Option<u64>,
    /// Training tokens.
    pub tokens: Option<u64>,
    /// Steps for which change-point detection could have fired.
    pub detection_live_steps: Option<u64>,
    /// Wall time of the run, seconds.
    pub wall_s: Option<f64>,
    /// Training tokens a second.
    pub tokens_per_s: Option<f64>,
    /// Peak resident memory, MiB; of the last sitting, where a run was interrupted. Runs side by side in one process share
    /// it.
    pub peak_rss_mib: Option<f64>,
    /// Where this run was made, if not where the last of the study's were: a resumed study may have moved.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub machine: Option<Machine>,
    /// What computed it, in order, of a run that was resumed on another device.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<String>,
    /// Which experts took what, of studies that know what is behind a token, for seed 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
    /// Every expansion, in order.
    #[serde(default)]
    pub expansions: Vec<Expansion>,
    /// What the tests of the controller said; of a pool that has some.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decisions: Option<Decisions>,
    /// How far the halves of splits have come apart, by steps since the split.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pairs: Vec<PairMeans>,
    /// Known ways to fail that the controller of a pool that grows saw in this run.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub diagnoses: Vec<Diagnosis>,
}

/// How the slots of each entity and of each property were divided among the experts: a row for each expert, a column for each entity
/// or property. Columns add up to 1, but for rounding to four digits and for those without a slot.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Usage {
    /// Experts by entities.
    pub entity: Vec<Vec<f64>>,
    /// Experts by properties.
    pub property: Vec<Vec<f64>>,
}

/// One expert that became two.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Expansion {
    /// Training step.
    pub step: u64,
    /// Layer.
    pub layer: usize,
    /// The expert that was split.
    pub source: usize,
    /// The newcomer's index.
    pub new: usize,
    /// The stream whose alarm set it off; `None` where no detector had a part in it, as on a schedule.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub watched: Option<Watched>,
    /// The expert whose norm that is, if it is one's: not always the source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flagged: Option<usize>,
    /// p-value of that alarm.
    pub p_value: Option<f64>,
    /// Cosine between the source's gradient and weights.
    pub cosine: Option<f64>,
}

/// What tells runs of a study apart.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RunKey {
    /// Method.
    pub method: String,
    /// Variant.
    pub variant: Option<String>,
    /// Setting.
    pub setting: Option<String>,
    /// Task.
    pub task: Option<String>,
    /// Experts at the start.
    pub experts_init: Option<usize>,
    /// Experts a token.
    pub k: Option<usize>,
    /// Seed.
    pub seed: u64,
}

/// `mass/paper/live 30 %/K5/seed0`: the `run` of metrics.jsonl and events.jsonl.
impl fmt::Display for RunKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.method)?;
        let parts = [&self.variant, &self.setting, &self.task];
        for part in parts.into_iter().flatten() {
            write!(f, "/{part}")?;
        }
        if let Some(experts) = self.experts_init {
            write!(f, "/K{experts}")?;
        }
        if let Some(k) = self.k {
            write!(f, "/k{k}")?;
        }
        write!(f, "/seed{}", self.seed)
    }
}

impl RunKey {
    /// The key that runs of one method and setting have in common.
    pub(crate) fn over_tasks(self) -> Self {
        Self {
            seed: 0,
            task: None,
            ..self
        }
    }

    /// The key's text without its seed.
    pub(crate) fn without_seed(&self) -> String {
        let text = self.to_string();
        let seed = format!("/seed{}", self.seed);
        text.strip_suffix(&seed).map_or(text.clone(), str::to_owned)
    }
}

impl Run {
    /// A run of a method with a seed and no figure yet.
    #[must_use]
    pub fn new(method: &str, seed: u64) -> Self {
        Self {
            method: method.to_owned(),
            seed,
            ..Self::default()
        }
    }

    /// What tells this run apart.
    #[must_use]
    pub fn key(&self) -> RunKey {
        RunKey {
            method: self.method.clone(),
            variant: self.variant.clone(),
            setting: self.setting.clone(),
            task: self.task.clone(),
            experts_init: self.experts_init,
            k: self.k,
            seed: self.seed,
        }
    }

    /// Turns figures that are not finite into `None` and returns their names: JSON has no NaN.
    pub(super) fn drop_non_finite(&mut self) -> Vec<&'static str> {
        let mut dropped = Vec::new();
        for (name, value) in [
            ("active_per_token", &mut self.active_per_token),
            ("test_loss", &mut self.test_loss),
            ("bayes_loss", &mut self.bayes_loss),
            ("accuracy", &mut self.accuracy),
            ("metric", &mut self.metric),
            ("jsd_entity", &mut self.jsd_entity),
            ("jsd_property", &mut self.jsd_property),
            ("nmi", &mut self.nmi),
            ("wall_s", &mut self.wall_s),
            ("tokens_per_s", &mut self.tokens_per_s),
            ("peak_rss_mib", &mut self.peak_rss_mib),
        ] {
            if value.is_some_and(|v| !v.is_finite()) {
                *value = None;
                dropped.push(name);
            }
        }
        if self.metrics.values().any(|v| !v.is_finite()) {
            self.metrics.retain(|_, v| v.is_finite());
            dropped.push("metrics");
        }
        let shares = self
            .usage
            .iter()
            .flat_map(|u| u.entity.iter().chain(&u.property));
        if shares.flatten().any(|v| !v.is_finite()) {
            self.usage = None;
            dropped.push("usage");
        }
        if self
            .decisions
            .as_ref()
            .is_some_and(|d| !d.by_chance.is_finite())
        {
            self.decisions = None;
            dropped.push("decisions");
        }
        for expansion in &mut self.expansions {
            for (name, value) in [
                ("expansions.p_value", &mut expansion.p_value),
                ("expansions.cosine", &mut expansion.cosine),
            ] {
                if value.is_some_and(|v| !v.is_finite()) {
                    *value = None;
                    dropped.push(name);
                }
            }
        }
        dropped
    }
}

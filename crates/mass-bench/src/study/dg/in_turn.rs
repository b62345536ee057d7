//! The study of domains that follow one another: a pretrained vision transformer, as in [the domain-generalisation study](super), is
//! trained on the images of one domain after the other, in the order of their names.
//!
//! What is asked is what [the continual study](super::super::continual) asks of concepts and texts.

use mass_model::growth::Mixtures;
use mass_model::vit::VitClassifier;
use ndarray_rand::rand::Rng as _;
use serde_json::{Map, json};

use super::data::Set;
use super::finetune::FineTune;
use super::plan::family;
use super::score::{BATCH, Score, evaluate};
use super::{Domains, SAMPLE};
use crate::BenchError;
use crate::cli::{Preset, ReproduceArgs};
use crate::dg::split::Split;
use crate::method::{Method, Pool};
use crate::report::Run;
use crate::rng::{Purpose, stream};
use crate::study::continual::{self, slots_of, tell};
use crate::study::plan::Plan;
use crate::task::{Finished, Scored};

/// What `--task` may name; other folders in DomainBed's layout may be named too.
pub const TASKS: &[&str] = &["pacs", "vlcs", "office_home", "terra_incognita", SAMPLE];

/// The plan of a preset.
///
/// # Errors
/// [`BenchError`] if the model that it fine-tunes is not there, or `--task` names no set.
pub fn plan(args: &ReproduceArgs) -> Result<Plan<Domains>, BenchError> {
    if let Some((set, _)) = args.task.as_deref().and_then(|task| task.split_once('/')) {
        return Err(BenchError::Usage(format!(
            "--task {set}: all domains of a set follow one another, none is left out; name the set alone"
        )));
    }
    let (mut domains, pool) = family(args)?;
    // Steps of each domain, of which sets have four; then pools that leave room to grow again.
    let (each, first_to, experts_max, seeds) = match args.preset {
        Preset::Smoke => (20, 4, 5, 1),
        Preset::Quick => (200, 9, 12, 1),
        Preset::Full => (200, 9, 12, 3),
        Preset::Paper => (1250, 9, 12, 3),
    };
    domains.in_turn = true;
    domains.steps = 4 * each;
    domains.evaluate_every = each;
    let pool = Pool {
        experts_max,
        live_percent: Some(100),
        ..pool
    };
    let mut methods = vec![Method::Dense];
    methods.extend(continual::methods(
        &pool,
        &[pool.experts, experts_max],
        domains.steps,
        first_to,
    ));
    Ok(Plan::new(domains, methods, pool, seeds))
}

/// How the domains of a set follow one another.
pub struct InTurn {
    /// Steps after which a domain's part ends.
    ends: Vec<u64>,
    /// Images of a batch.
    batch: usize,
    /// Images of each domain that are not trained on.
    held_out: Vec<Vec<usize>>,
}

impl InTurn {
    pub(super) fn new(domains: &Domains, set: &Set, split: &Split) -> Self {
        let n = set.images.domains.len();
        let of_domain = |d: usize| {
            let held_out = split.held_out.iter().copied();
            held_out.filter(|&i| set.images.domain(i) == d).collect()
        };
        Self {
            ends: (1..=n as u64)
                .map(|d| domains.steps * d / n as u64)
                .collect(),
            // As many as a batch has in which all domains but one are.
            batch: domains.per_domain * (n - 1).max(1),
            held_out: (0..n).map(of_domain).collect(),
        }
    }

    /// The images of a step's batch, all of one domain.
    pub(super) fn batch(&self, split: &Split, seed: u64, step: u64) -> Vec<usize> {
        let part = self.ends.partition_point(|end| *end <= step);
        let members = &split.train[part.min(self.ends.len() - 1)];
        let mut rng = stream(seed, Purpose::Batches, step);
        let draw = |_| members[rng.random_range(0..members.len())];
        (0..self.batch).map(draw).collect()
    }

    /// On every domain, whenever one has ended.
    pub(super) fn score(
        &self,
        of: &FineTune<'_>,
        model: &VitClassifier,
        step: u64,
        ends: &mut Vec<(u64, Vec<Score>)>,
    ) -> Result<Option<Scored>, BenchError> {
        if !self.ends.contains(&step) {
            return Ok(None);
        }
        let on = |which: &Vec<usize>| evaluate(&of.place, model, of.set, which);
        let scores = self.held_out.iter().map(on);
        let scores = scores.collect::<Result<Vec<_>, _>>()?;
        let mut extra = Map::new();
        let each = |of: fn(&Score) -> f64| json!(scores.iter().map(of).collect::<Vec<_>>());
        extra.insert("loss_by_kind".into(), each(|s| s.loss));
        extra.insert("accuracy_by_kind".into(), each(|s| s.accuracy));
        ends.push((step, scores));
        Ok(Some(Scored {
            extra,
            ..Scored::default()
        }))
    }

    /// Figures are means over all domains at the end of the run.
    pub(super) fn finish(
        &self,
        of: &FineTune<'_>,
        end: &Finished<'_, FineTune<'_>>,
        run: &mut Run,
    ) -> Result<(), BenchError> {
        let Some((_, last)) = end.progress.ends.last() else {
            return Ok(());
        };
        let mean = |values: Vec<f64>| {
            let n = values.len() as f64;
            (n > 0.0).then(|| values.iter().sum::<f64>() / n)
        };
        run.test_loss = mean(last.iter().map(|s| s.loss).collect());
        run.accuracy = mean(last.iter().map(|s| s.accuracy).collect());
        run.metric = run.accuracy;
        run.active_per_token = mean(last.iter().filter_map(|s| s.mean_k).collect());
        let layers = 0..end.model.mixtures();
        let experts = layers.map(|l| end.model.mixture(l).ids().len() as f64);
        let experts = mean(experts.collect());
        run.experts = experts.map(|e| e.round() as usize);
        let (new, old) = (last.len() - 1, &last[..last.len() - 1]);
        for (name, value) in [
            ("experts_mean", experts),
            ("waiting_for_data", end.waiting),
            ("new_accuracy", Some(last[new].accuracy)),
            (
                "old_accuracy",
                mean(old.iter().map(|s| s.accuracy).collect()),
            ),
        ] {
            run.metrics.extend(value.map(|v| (name.to_owned(), v)));
        }
        let losses = |(step, scores): &(u64, Vec<Score>)| {
            let of: Vec<f64> = scores.iter().map(|s| s.loss).collect();
            (*step, of)
        };
        let losses: Vec<(u64, Vec<f64>)> = end.progress.ends.iter().map(losses).collect();
        let domains: Vec<usize> = (0..self.held_out.len()).collect();
        let parts: Vec<&[usize]> = domains.chunks(1).collect();
        tell(&parts, &losses, run, |young, kinds| {
            let slots = |&kind: &usize| self.slots(of, end.model, kind, young);
            kinds.iter().map(slots).collect()
        })
    }

    /// The routed slots of a domain's held-out images that some experts have, and all.
    fn slots(
        &self,
        of: &FineTune<'_>,
        model: &VitClassifier,
        domain: usize,
        experts: &[(usize, usize)],
    ) -> Result<(usize, usize), BenchError> {
        let (mut theirs, mut all) = (0, 0);
        for part in self.held_out[domain].chunks(BATCH) {
            let input = of.set.plain(part)?;
            let routed = model.logits_at(&of.place, of.set.batch(&input), None);
            let (_, layers) = routed.map_err(|e| BenchError::failed("routing images", e))?;
            let found = slots_of(model, &layers, experts);
            (theirs, all) = (theirs + found.0, all + found.1);
        }
        Ok((theirs, all))
    }
}

//! The study of domains that follow one another: a pretrained vision transformer, as in [the domain-generalisation study](super), is
//! trained on the images of one domain after the other, in the order of their names.
//!
//! What is asked is what [the continual study](super::super::continual) asks of concepts and texts.

use mass_model::growth::{GrowerConfig, LossOn, Mixtures};
use mass_model::optim::AdamW;
use mass_model::vit::VitClassifier;
use mass_model::{Masked, ModelError, Place, PlacedGradients, TrainPass};
use ndarray_rand::rand::Rng as _;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::data::{Input, Set};
use super::leave_out::LeaveOut;
use super::plan::family;
use super::score::{BATCH, Score, evaluate};
use super::{Domains, SAMPLE};
use crate::BenchError;
use crate::cli::{Preset, ReproduceArgs, RunContext};
use crate::dg::folder::ImageFolder;
use crate::dg::split::Split;
use crate::dynmoe::DynMoeConfig;
use crate::method::{Method, Pool};
use crate::report::Run;
use crate::rng::{Purpose, stream};
use crate::study::continual::{self, slots_of, tell};
use crate::study::plan::{Assignment, Family, Plan, Planned};
use crate::sweep::Side;
use crate::task::{Finished, Recipe, Scored, Task};

/// What `--task` may name; other folders in DomainBed's layout may be named too.
pub const TASKS: &[&str] = &["pacs", "vlcs", "office_home", "terra_incognita", SAMPLE];

/// Sets whose domains follow one another.
#[derive(Debug)]
pub struct InTurn(Domains);

/// The plan of a preset.
///
/// # Errors
/// [`BenchError`] if the model that it fine-tunes is not there, or `--task` names no set.
pub fn plan(args: &ReproduceArgs) -> Result<Plan<InTurn>, BenchError> {
    if let Some((set, _)) = args.task.as_deref().and_then(|task| task.split_once('/')) {
        return Err(BenchError::Usage(format!(
            "--task {set}: all domains of a set follow one another, none is left out; name the set alone"
        )));
    }
    let (mut domains, pool) = family(args)?;
    // Steps of each domain, of which sets have four; then pools that leave room to grow again.
    let (each, first_to, experts_max, seeds) = match args.preset {
        Preset::Smoke => (20, 4, 5, 1),
        Preset::Quick => (100, 9, 12, 1),
        Preset::Full => (200, 9, 12, 3),
        Preset::Paper => (1250, 9, 12, 3),
    };
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
    Ok(Plan {
        family: InTurn(domains),
        methods,
        pool,
        seeds,
        variant: None,
    })
}

impl Family for InTurn {
    type Data = Set;
    type Task<'a> = OneByOne<'a>;

    const SIDE: Side = Domains::SIDE;
    const KEPT: bool = Domains::KEPT;

    fn settings(&self) -> Result<Value, BenchError> {
        self.0.settings()
    }

    fn assignments(&self) -> Result<Vec<Assignment>, BenchError> {
        let assignment = |set: &String| Assignment {
            set: set.clone(),
            part: 0,
            task: Some(set.clone()),
            metric: Some("accuracy"),
        };
        Ok(self.0.sets.iter().map(assignment).collect())
    }

    fn there(&self, set: &str) -> Result<(), BenchError> {
        if set != SAMPLE {
            ImageFolder::open(&self.0.set_dir(set)?)?;
        }
        Ok(())
    }

    fn read(&self, set: &str, ctx: &mut RunContext) -> Result<Set, BenchError> {
        self.0.read(set, ctx)
    }

    fn digest(&self, set: &Set) -> Option<u64> {
        self.0.digest(set)
    }

    fn prepare(&self, set: Set, ctx: &mut RunContext) -> Result<Set, BenchError> {
        self.0.prepare(set, ctx)
    }

    fn task<'a>(&'a self, set: &'a Set, planned: &'a Planned) -> Result<OneByOne<'a>, BenchError> {
        OneByOne::new(&self.0, set, planned)
    }
}

/// What the model made of each domain's held-out images when a domain's part of the run ended.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Ends(Vec<(u64, Vec<Score>)>);

/// A model on a set's domains, one after another.
pub struct OneByOne<'a> {
    all: LeaveOut<'a>,
    /// Steps after which a domain's part ends.
    ends: Vec<u64>,
    /// Images of a batch.
    batch: usize,
    /// Images of each domain that are not trained on.
    held_out: Vec<Vec<usize>>,
}

impl<'a> OneByOne<'a> {
    fn new(domains: &Domains, set: &'a Set, planned: &'a Planned) -> Result<Self, BenchError> {
        let split = Split::all(&set.images, domains.held_out, planned.run.seed)?;
        // Newcomers are judged by what there is at first.
        let all = LeaveOut::new(domains, set, planned, (split, 1))?;
        let n = set.images.domains.len();
        let of_domain = |d: usize| {
            let held_out = all.split.held_out.iter().copied();
            held_out.filter(|&i| set.images.domain(i) == d).collect()
        };
        Ok(Self {
            ends: (1..=n as u64)
                .map(|d| domains.steps * d / n as u64)
                .collect(),
            // As many as a batch has in which all domains but one are.
            batch: domains.per_domain * (n - 1).max(1),
            held_out: (0..n).map(of_domain).collect(),
            all,
        })
    }

    /// The images of a step's batch, all of one domain.
    pub(super) fn images_of(&self, step: u64) -> Vec<usize> {
        let part = self.ends.partition_point(|end| *end <= step);
        let members = &self.all.split.train[part.min(self.ends.len() - 1)];
        let mut rng = stream(self.all.seed, Purpose::Batches, step);
        let draw = |_| members[rng.random_range(0..members.len())];
        (0..self.batch).map(draw).collect()
    }

    /// The routed slots of a domain's held-out images that some experts have, and all.
    fn slots(
        &self,
        model: &VitClassifier,
        domain: usize,
        experts: &[(usize, usize)],
    ) -> Result<(usize, usize), BenchError> {
        let (mut theirs, mut all) = (0, 0);
        for part in self.held_out[domain].chunks(BATCH) {
            let (set, place) = (self.all.set, &self.all.place);
            let input = set.plain(part)?;
            let routed = model.logits_at(place, set.batch(&input), None);
            let (_, layers) = routed.map_err(|e| BenchError::failed("routing images", e))?;
            let of = slots_of(model, &layers, experts);
            (theirs, all) = (theirs + of.0, all + of.1);
        }
        Ok((theirs, all))
    }
}

impl Task for OneByOne<'_> {
    type Model = VitClassifier;
    type Batch = Input;
    type Progress = Ends;

    const LAYERS_APART: bool = true;

    fn recipe(&self) -> &Recipe {
        self.all.recipe()
    }

    fn place(&self) -> &Place {
        self.all.place()
    }

    fn identity(&self) -> Value {
        self.all.identity()
    }

    fn model(&self) -> Result<VitClassifier, ModelError> {
        self.all.model()
    }

    fn tune(&self, rules: &mut GrowerConfig) {
        self.all.tune(rules);
    }

    fn dynmoe(&self, experts_max: usize) -> DynMoeConfig {
        self.all.dynmoe(experts_max)
    }

    fn batches(&self) -> Box<dyn FnMut(u64) -> Result<Input, BenchError> + Send + '_> {
        Box::new(|step| {
            let which = self.images_of(step);
            self.all.set.training(&which, self.all.seed, step)
        })
    }

    fn tokens(&self, input: &Input) -> u64 {
        self.all.tokens(input)
    }

    fn pass(
        &self,
        model: &VitClassifier,
        input: &Input,
        step: u64,
    ) -> Result<TrainPass<PlacedGradients>, ModelError> {
        self.all.pass(model, input, step)
    }

    fn losses(
        &self,
        model: &VitClassifier,
        input: &Input,
        on: LossOn,
        masked: Option<Masked>,
    ) -> Result<Vec<f64>, ModelError> {
        self.all.losses(model, input, on, masked)
    }

    fn update(
        &self,
        optimizer: &mut AdamW,
        model: &mut VitClassifier,
        gradients: &mut PlacedGradients,
        rate: f64,
    ) -> Result<f64, ModelError> {
        self.all.update(optimizer, model, gradients, rate)
    }

    /// On every domain, whenever one has ended.
    fn score(
        &self,
        model: &VitClassifier,
        step: u64,
        ends: &mut Ends,
    ) -> Result<Option<Scored>, BenchError> {
        if !self.ends.contains(&step) {
            return Ok(None);
        }
        let (place, set) = (&self.all.place, self.all.set);
        let of = |which: &Vec<usize>| evaluate(place, model, set, which);
        let scores = self
            .held_out
            .iter()
            .map(of)
            .collect::<Result<Vec<_>, _>>()?;
        let mut extra = Map::new();
        let each = |of: fn(&Score) -> f64| json!(scores.iter().map(of).collect::<Vec<_>>());
        extra.insert("loss_by_kind".into(), each(|s| s.loss));
        extra.insert("accuracy_by_kind".into(), each(|s| s.accuracy));
        ends.0.push((step, scores));
        Ok(Some(Scored {
            extra,
            ..Scored::default()
        }))
    }

    /// Figures are means over all domains at the end of the run.
    fn finish(&self, end: &Finished<'_, Self>, run: &mut Run) -> Result<(), BenchError> {
        let Some((_, last)) = end.progress.0.last() else {
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
        let losses: Vec<(u64, Vec<f64>)> = end.progress.0.iter().map(losses).collect();
        let domains: Vec<usize> = (0..self.held_out.len()).collect();
        let parts: Vec<&[usize]> = domains.chunks(1).collect();
        tell(&parts, &losses, run, |young, kinds| {
            let of = |&kind: &usize| self.slots(end.model, kind, young);
            kinds.iter().map(of).collect()
        })
    }
}

//! What a study runs, and the running of it.

use std::collections::BTreeMap;
use std::path::Path;

use mass_model::Activation;
use mass_routing::RouterConfig;
use serde_json::{Value, json};

use crate::BenchError;
use crate::cli::{Preset, ReproduceArgs, RunContext, Variant};
use crate::fnv::Fnv;
use crate::method::{Mass, Method, Pool, named};
use crate::report::{ResultStore, Results, Run};
use crate::sweep::{Side, sweep};
use crate::task::Task;
use crate::trainer::Trainer;

/// Methods to be compared on tasks of one family: a study, in one preset.
#[derive(Debug)]
pub struct Plan<F> {
    /// The tasks.
    pub family: F,
    /// The methods, in the order of the results.
    pub methods: Vec<Method>,
    /// What methods begin with that `--methods` names and the list above does not have.
    pub pool: Pool,
    /// Seeds of each method.
    pub seeds: usize,
    /// The variant of MASS that is run unless another is asked for; `None` for all.
    pub variant: Option<Variant>,
}

/// Something to be learnt from one of a family's sets of data.
#[derive(Debug, Clone, Default)]
pub struct Assignment {
    /// The set.
    pub set: String,
    /// Which part of it, where it has several.
    pub part: usize,
    /// What results call it; `None` if there is but one.
    pub task: Option<String>,
    /// What its metric is called.
    pub metric: Option<&'static str>,
}

/// A run to be made.
#[derive(Debug, Clone)]
pub struct Planned {
    /// Its row in the results, without figures.
    pub run: Run,
    /// The method.
    pub method: Method,
    /// Data and task.
    pub assignment: Assignment,
}

/// Tasks of one kind: where their data come from, and what model learns from them.
pub trait Family: Sync {
    /// A set of data that several runs share.
    type Data: Sync;
    /// A run's task.
    type Task<'a>: Task
    where
        Self: 'a;

    /// Whether runs are small enough to be made side by side, each on one thread of its own.
    const SIDE: Side;
    /// Whether all sets fit in memory at once. Those that do not are read again, one after another.
    const KEPT: bool = true;

    /// What the method `dense` is called.
    fn dense(&self) -> &'static str {
        "dense"
    }

    /// Everything that changes a run's figures beside the method and the data. What only adds runs does not belong there.
    ///
    /// # Errors
    /// [`BenchError::Input`] for pretrained weights that cannot be read.
    fn settings(&self) -> Result<Value, BenchError>;

    /// The tasks, those of one set together, in the order of the results.
    ///
    /// # Errors
    /// [`BenchError`] if `--task` names none of them, or data are missing.
    fn assignments(&self) -> Result<Vec<Assignment>, BenchError>;

    /// Whether a set is there, without reading it.
    ///
    /// # Errors
    /// [`BenchError`]: which file is missing.
    fn there(&self, set: &str) -> Result<(), BenchError> {
        let _ = set;
        Ok(())
    }

    /// Refuses weights that cannot be read for a set. It is asked once, before results of an earlier run are replaced.
    ///
    /// # Errors
    /// [`BenchError::Input`]: what is wrong with them.
    fn readable(&self, set: &str) -> Result<(), BenchError> {
        let _ = set;
        Ok(())
    }

    /// Reads a set.
    ///
    /// # Errors
    /// [`BenchError`]: what is missing or damaged, or that it was interrupted.
    fn read(&self, set: &str, ctx: &mut RunContext) -> Result<Self::Data, BenchError>;

    /// A digest of what was read; `None` for data that settings alone determine.
    fn digest(&self, data: &Self::Data) -> Option<u64>;

    /// Computes what all runs on a set need of it.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    fn prepare(&self, data: Self::Data, ctx: &mut RunContext) -> Result<Self::Data, BenchError> {
        let _ = ctx;
        Ok(data)
    }

    /// The task of a run.
    ///
    /// # Errors
    /// [`BenchError::Usage`] for one that data or model do not allow.
    fn task<'a>(
        &'a self,
        data: &'a Self::Data,
        planned: &'a Planned,
    ) -> Result<Self::Task<'a>, BenchError>;
}

impl<F> Plan<F> {
    /// MASS in all the variants that are among `methods`.
    pub(super) fn new(family: F, methods: Vec<Method>, pool: Pool, seeds: usize) -> Self {
        Self {
            family,
            methods,
            pool,
            seeds,
            variant: None,
        }
    }

    /// MASS in every variant after its rivals; in `quick` the paper's alone unless another is asked for, and in `smoke` with
    /// thresholds that runs too short to learn anything pass.
    pub(super) fn fine_tuning(
        preset: Preset,
        family: F,
        rivals: Vec<Method>,
        pool: Pool,
        seeds: usize,
    ) -> Self {
        let mass = Variant::ALL.map(|variant| {
            let mut mass = Mass::of(variant, &pool);
            if preset == Preset::Smoke {
                mass.overrides = mass.loose();
            }
            Method::Mass(mass)
        });
        Self {
            variant: (preset == Preset::Quick).then_some(Variant::Paper),
            ..Self::new(
                family,
                rivals.into_iter().chain(mass).collect(),
                pool,
                seeds,
            )
        }
    }
}

impl<F: Family> Plan<F> {
    /// The methods that were asked for.
    ///
    /// # Errors
    /// [`BenchError::Usage`] for a router or rules that no run can have.
    pub fn methods(&self, args: &ReproduceArgs) -> Result<Vec<Method>, BenchError> {
        let variant = args.variant.or(self.variant);
        let of_variant = |m: &Method| match m {
            Method::Mass(m) => variant.is_none_or(|v| v == m.variant),
            _ => true,
        };
        let mut methods = self.methods.clone();
        methods.retain(of_variant);
        if let Some(names) = &args.methods {
            let canonical = |name: &str| if name == "erm" { "dense" } else { name }.to_owned();
            let names: Vec<String> = names.iter().map(|name| canonical(name)).collect();
            methods.retain(|m| names.iter().any(|name| name == m.name()));
            for name in &names {
                if !methods.iter().any(|m| m.name() == name) {
                    let more = named(name, &self.pool, variant);
                    methods.extend(more.ok_or_else(|| {
                        let of = variant.map_or(String::new(), |v| format!(" of --variant {v}"));
                        let what = format!("--methods names `{name}`, which is no method{of} here");
                        BenchError::Usage(what)
                    })?);
                }
            }
        }
        let grows = methods.iter().any(|m| matches!(m, Method::Mass(_)));
        let mut routed = args.router.is_none();
        if let Some(router) = &args.router {
            (methods, routed) = by(router, methods);
        }
        // What would change nothing was not meant so.
        let variant = args.variant.is_none() || grows;
        for (flag, heard) in [("--router", routed), ("--variant", variant)] {
            if !heard && !args.of_all {
                let what = "changes nothing of these methods; leave it out or choose others";
                return Err(BenchError::Usage(format!("{flag} {what} by --methods")));
            }
        }
        if let Some(text) = &args.setting {
            let has_it = |m: &Method| m.run(0).setting.is_some_and(|s| s.contains(text));
            methods.retain(has_it);
        }
        methods.iter().try_for_each(Method::check)?;
        Ok(methods)
    }

    /// Every run, in the order in which results list them, shards aside.
    ///
    /// # Errors
    /// As [`methods`](Self::methods) and [`Family::assignments`].
    pub fn runs(&self, args: &ReproduceArgs) -> Result<Vec<Planned>, BenchError> {
        let methods = self.methods(args)?;
        let mut runs = Vec::new();
        for assignment in self.family.assignments()? {
            for method in &methods {
                for seed in 0..args.seeds.unwrap_or(self.seeds) as u64 {
                    let mut run = method.run(seed);
                    if *method == Method::Dense {
                        self.family.dense().clone_into(&mut run.method);
                    }
                    run.task.clone_from(&assignment.task);
                    run.metric_name = assignment.metric.map(str::to_owned);
                    runs.push(Planned {
                        run,
                        method: method.clone(),
                        assignment: assignment.clone(),
                    });
                }
            }
        }
        let mut folders = BTreeMap::new();
        for planned in &runs {
            let key = planned.run.key();
            let folder = RunContext::checkpoint_dir(Path::new(""), &key);
            if let Some(other) = folders.insert(folder, key.to_string()) {
                return Err(BenchError::Usage(format!(
                    "{other} and {key} would share a folder for what they keep; give tasks names that differ in more than \
                     punctuation"
                )));
            }
        }
        Ok(runs)
    }

    /// The runs of this shard: at least one, but of a study that is one of all.
    fn own(&self, args: &ReproduceArgs) -> Result<Vec<Planned>, BenchError> {
        let runs = self.runs(args)?.into_iter().enumerate();
        let own = runs.filter(|(i, _)| args.shard.owns(*i));
        let own: Vec<Planned> = own.map(|(_, planned)| planned).collect();
        if own.is_empty() && !args.of_all {
            return Err(BenchError::Usage(
                "these choices of --methods, --setting, --variant, --task and --shard leave no run"
                    .into(),
            ));
        }
        Ok(own)
    }

    /// Whether there is a run, whose needs are there; nothing is read. A shard may have none of a study that is one of all.
    ///
    /// # Errors
    /// [`BenchError`]: what is wrong or missing.
    pub fn check(&self, args: &ReproduceArgs) -> Result<bool, BenchError> {
        let runs = self.own(args)?;
        sets(&runs).try_for_each(|set| self.family.there(set))?;
        Ok(!runs.is_empty())
    }

    /// Makes the runs.
    ///
    /// # Errors
    /// [`BenchError`]: data or a model that are missing or damaged, whatever the first failing run ends with, or that it was
    /// interrupted.
    pub fn run(&self, args: &ReproduceArgs, ctx: &mut RunContext) -> Result<Results, BenchError> {
        let mut runs = self.own(args)?;
        let mut settings = self.family.settings()?;
        for planned in &runs {
            let name = planned.run.key().over_tasks().without_seed();
            settings["methods"][name] = json!(planned.method);
        }
        let names = self
            .runs(args)?
            .into_iter()
            .map(|p| p.run.key().to_string());
        let header = args.header(names.collect());
        if !F::KEPT && ctx.ranks.is_first() {
            // So much takes long to read: whether the results can be kept is asked before.
            ResultStore::check(&args.out, header.clone(), &settings, args.existing())?;
        }
        // Everything is read before the first run: a damaged file of the last set should not show after hours. And before anything
        // of an earlier run is replaced.
        let mut data = BTreeMap::new();
        let names: Vec<String> = sets(&runs).map(str::to_owned).collect();
        for set in &names {
            let read = self.family.read(set, ctx)?;
            for planned in runs.iter().filter(|r| r.assignment.set == *set) {
                let rules = rules(&self.family.task(&read, planned)?, &planned.method)?;
                settings["rules"][planned.run.key().without_seed()] = json!(rules);
            }
            if let Some(digest) = self.family.digest(&read) {
                settings["data"][set] = json!(format!("{digest:016x}"));
            }
            if F::KEPT || names.len() == 1 {
                data.insert(set.clone(), read);
            }
        }
        if !args.resume {
            self.family.readable(&names[0])?;
        }
        let (ranks, existing) = (ctx.ranks.clone(), args.existing());
        let mut store = ResultStore::open_among(&ranks, &args.out, header, &settings, existing)?;
        runs.retain(|planned| store.finished(&planned.run.key()).is_none());
        for set in &names {
            let of_set = |planned: &&Planned| planned.assignment.set == *set;
            let of_set: Vec<Planned> = runs.iter().filter(of_set).cloned().collect();
            if of_set.is_empty() {
                continue;
            }
            let read = match data.remove(set) {
                Some(read) => read,
                None => self.family.read(set, ctx)?,
            };
            let read = self.family.prepare(read, ctx)?;
            self.train(args, &of_set, &read, &mut store, ctx)?;
        }
        Ok(store.into_results())
    }

    /// Makes the runs on one set.
    fn train(
        &self,
        args: &ReproduceArgs,
        runs: &[Planned],
        data: &F::Data,
        store: &mut ResultStore,
        ctx: &mut RunContext,
    ) -> Result<(), BenchError> {
        let tasks = runs.iter().map(|planned| self.family.task(data, planned));
        let tasks = tasks.collect::<Result<Vec<_>, _>>()?;
        let steps = |task: &F::Task<'_>| task.recipe().schedule.steps;
        let total = tasks.iter().map(steps).sum();
        let out = store.dir().to_owned();
        let (work, ranks): (Vec<_>, _) = (runs.iter().zip(&tasks).collect(), ctx.ranks.clone());
        sweep(
            ctx,
            store,
            (F::SIDE, args.threads),
            &work,
            total,
            |(planned, task), ticker| {
                let key = planned.run.key();
                let folder = RunContext::checkpoint_dir(&out, &key);
                let (run, method) = (&planned.run, &planned.method);
                let mut trainer =
                    Trainer::open_among(&ranks, *task, (run, method), &folder, args.resume)?;
                ticker.pass_over(trainer.step());
                let keep = F::SIDE == Side::BySide;
                let on_step = &mut |_, loss| ticker.tick(1, || format!("{key}: loss {loss:.3}"));
                let trained = trainer.train(&folder, keep, on_step);
                if !matches!(trained, Ok(false)) {
                    // A run that ended early counts in full.
                    ticker.pass_over(steps(task) - trainer.step());
                }
                trainer.conclude(trained)
            },
        )
    }
}

/// The sets of some runs, in order.
fn sets(runs: &[Planned]) -> impl Iterator<Item = &str> {
    let first = |i: usize| i == 0 || runs[i].assignment.set != runs[i - 1].assignment.set;
    let firsts = (0..runs.len()).filter(move |&i| first(i));
    firsts.map(|i| runs[i].assignment.set.as_str())
}

/// A digest of what a method is made of on a task, its seed apart: of the optimiser and its schedule, sizes, routing, and rules of
/// growth. A name may come to mean another thing in another version of this program.
fn rules<T: Task>(task: &T, method: &Method) -> Result<String, BenchError> {
    let recipe = task.recipe();
    let growth = method.growth(1, recipe.schedule.steps, 0, |rules| task.tune(rules))?;
    let mixture = method.mixture(1, 1, Activation::Relu, 0);
    let all = json!([recipe, task.identity()["model"], mixture, growth]);
    let mut digest = Fnv::default();
    digest.eat(all.to_string().as_bytes());
    Ok(format!("{:016x}", digest.0))
}

/// The same with a router that was chosen, and whether it is any one's choice. Methods that differed by their routing alone are
/// one then.
fn by(router: &RouterConfig, methods: Vec<Method>) -> (Vec<Method>, bool) {
    let mut all: Vec<Method> = Vec::new();
    let mut heard = false;
    for mut method in methods {
        heard |= method.routed_by(router);
        let key = method.run(0).key();
        if !all.iter().any(|m| m.run(0).key() == key) {
            all.push(method);
        }
    }
    (all, heard)
}

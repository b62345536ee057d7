//! The continual study: kinds of data that appear after the expansion phase, or follow one another.
//!
//! Every run trains the model of the synthetic study on data that change. Pools that grow early, or whose detectors stay on with a
//! false-alarm budget of their own, are beside static pools and DynMoE. What is asked: how soon after a change a pool grows, how
//! often before it, what becomes of the loss on old and new kinds, and which experts the newest kind got.

use mass_expand::{ControllerParams, Watch};
use mass_model::LayerTrace;
use mass_model::growth::Mixtures;
use mass_routing::Combine;
use serde_json::{Value, json};

use super::plan::{Assignment, Family, Plan, Planned};
use super::synthetic::{BATCH, DATA_SEED, POOL, Regime, SEQ, regime};
use crate::BenchError;
use crate::batch::{TokenBatch, draw};
use crate::cli::{Preset, ReproduceArgs, RunContext, Variant};
use crate::fnv::Fnv;
use crate::ginc::{Ginc, GincParams, Windows};
use crate::glue::data::{Dataset, Example};
use crate::glue::task::Task as GlueTask;
use crate::language::{Language, Stream, judge, scored, with};
use crate::method::{DYNMOE, Mass, Method, Overrides, Pool};
use crate::report::Run;
use crate::rng::{Purpose, stream};
use crate::sweep::Side;

/// What `--task` may name: a concept that appears among four others, one that takes their place, five one after another; and
/// sentences of four tasks of GLUE, read as bytes, one task after another, or all from the beginning, which does not change.
pub const TASKS: &[&str] = &["appear", "switch", "stream", "texts", "texts-mixed"];

/// A part of a run: where it ends, in percent, and the kinds of data that it has.
type Part = (u64, &'static [usize]);

/// The parts of each task's runs.
const PARTS: [&[Part]; 5] = [
    &[(50, &[0, 1, 2, 3]), (100, &[0, 1, 2, 3, 4])],
    &[(50, &[0, 1, 2, 3]), (100, &[4])],
    &[(20, &[0]), (40, &[1]), (60, &[2]), (80, &[3]), (100, &[4])],
    &[(25, &[0]), (50, &[1]), (75, &[2]), (100, &[3])],
    &[(100, &[0, 1, 2, 3])],
];

/// The kinds of text: examples of grammar books, pairs from the news, premises of inference, captions and headlines.
const TEXTS: [GlueTask; 4] = [
    GlueTask::Cola,
    GlueTask::Mrpc,
    GlueTask::Rte,
    GlueTask::Stsb,
];

/// Held-out windows of each kind.
const WINDOWS: usize = 100;

/// Data that change.
#[derive(Debug)]
pub struct Continual {
    args: ReproduceArgs,
    regime: Regime,
    tokens: usize,
    tasks: Vec<&'static str>,
}

/// Whether a task's data are read, not generated.
pub(super) fn is_of_texts(task: &str) -> bool {
    task.starts_with("texts")
}

/// The plan of a preset.
///
/// # Errors
/// None: nothing has to be there.
pub fn plan(args: &ReproduceArgs) -> Result<Plan<Continual>, BenchError> {
    let (steps, tokens, seeds, tasks) = match args.preset {
        Preset::Smoke => (120, 20_000, 1, &TASKS[1..2]),
        Preset::Quick => (2000, 1_000_000, 2, &TASKS[..3]),
        Preset::Full | Preset::Paper => (4000, 2_000_000, 5, TASKS),
    };
    let asked = TASKS.iter().find(|t| args.task.as_deref() == Some(**t));
    let pool = Pool {
        live_percent: Some(100),
        ..POOL
    };
    let mut methods = methods(&pool, &[5, 12, 20], steps, 12);
    let all = alarms(steps);
    let loss = Watch {
        expert: None,
        layer: None,
        ..all.clone()
    };
    for (of, watch) in [("the loss", loss), ("all", all)] {
        methods.push(Method::Mass(ours_by_alarms(&pool, steps, 12, of, watch)));
    }
    let family = Continual {
        regime: regime!(steps: steps),
        tokens,
        tasks: asked.map_or_else(|| tasks.to_vec(), |task| vec![*task]),
        args: args.clone(),
    };
    Ok(Plan::new(family, methods, pool, seeds))
}

/// Static pools of these sizes, DynMoE, and pools that grow.
pub(super) fn methods(pool: &Pool, sizes: &[usize], steps: u64, first_to: usize) -> Vec<Method> {
    let fixed = |&experts: &usize| Method::top_p(experts, pool.p, Combine::Renormalised);
    let dynmoe = Method::DynMoe {
        experts: pool.experts,
        experts_max: pool.experts_max,
    };
    let grown = grown(pool, steps, first_to).into_iter().map(Method::Mass);
    sizes
        .iter()
        .map(fixed)
        .chain([dynmoe])
        .chain(grown)
        .collect()
}

/// A pool that grows by its variant's own timing, under this label, by these rules.
fn relabelled(variant: Variant, pool: &Pool, label: &str, rules: &[(&str, Value)]) -> Mass {
    Mass {
        label: label.to_owned(),
        live_percent: None,
        overrides: rules
            .iter()
            .map(|(at, value)| ((*at).to_owned(), value.clone()))
            .collect::<Overrides>(),
        ..Mass::of(variant, pool)
    }
}

/// The detectors of `calibrated` for what is left after the first phase, in which a false alarm has this chance at most.
fn alarms(steps: u64) -> Watch {
    ControllerParams::calibrated_watch(0.05, steps * 9 / 10).shortened(steps)
}

/// `ours` that has grown to `first_to`, and goes on by the alarms of what is watched.
fn ours_by_alarms(pool: &Pool, steps: u64, first_to: usize, of: &str, watch: Watch) -> Mass {
    let (first, every) = ((steps / 200).max(1), (steps / 1000).max(1));
    let splits = (first_to - pool.experts) as u64;
    let schedule = json!({ "schedule_then_detector": { "first": first, "every": every } });
    relabelled(
        Variant::Ours,
        pool,
        &format!("{first_to}, then by alarms of {of}"),
        &[
            ("controller.phase.continual", json!(watch)),
            ("controller.unused", json!("skip")),
            ("controller.trigger", schedule),
            ("controller.phase.live_until", json!(first + splits * every)),
        ],
    )
}

/// The paper's rule and its code's as they are meant, and live to the end; `calibrated` and `ours` as they are, and with alarms
/// that go on. `ours` leaves itself room for them: it grows to `first_to` first.
fn grown(pool: &Pool, steps: u64, first_to: usize) -> Vec<Mass> {
    let confined = |variant| relabelled(variant, pool, "", &[]);
    let all = alarms(steps);
    let of_both = Watch {
        expert: None,
        ..all.clone()
    };
    vec![
        confined(Variant::Paper),
        Mass::of(Variant::Paper, pool),
        Mass::of(Variant::Reference, pool),
        confined(Variant::Calibrated),
        relabelled(
            Variant::Calibrated,
            pool,
            "alarms go on",
            &[("controller.phase.continual", json!(all))],
        ),
        Mass {
            experts_max: first_to,
            ..relabelled(Variant::Ours, pool, &format!("to {first_to}"), &[])
        },
        confined(Variant::Ours),
        ours_by_alarms(pool, steps, first_to, "loss and layer", of_both),
    ]
}

/// What a task's runs are trained and scored on.
pub struct Data {
    parts: &'static [Part],
    vocab: usize,
    /// Documents of each part, and how long one is.
    documents: Vec<(Vec<u32>, usize)>,
    kinds: Vec<TokenBatch>,
    probe: TokenBatch,
    digest: Option<u64>,
}

impl Family for Continual {
    type Data = Data;
    type Task<'a> = Language<'a>;

    const SIDE: Side = Side::BySide;

    fn settings(&self) -> Result<Value, BenchError> {
        Ok(json!({ "steps": self.regime.steps, "tokens": self.tokens, "windows": WINDOWS }))
    }

    fn assignments(&self) -> Result<Vec<Assignment>, BenchError> {
        let assignment = |task: &&str| Assignment {
            set: (*task).to_owned(),
            task: Some((*task).to_owned()),
            ..Assignment::default()
        };
        Ok(self.tasks.iter().map(assignment).collect())
    }

    fn there(&self, set: &str) -> Result<(), BenchError> {
        if !is_of_texts(set) {
            return Ok(());
        }
        let data = self.data_dir()?;
        let there = |task| Ok(Dataset::there(data, task)?);
        TEXTS.into_iter().try_for_each(there)
    }

    fn read(&self, set: &str, _: &mut RunContext) -> Result<Data, BenchError> {
        let task = TASKS.iter().position(|t| *t == set).unwrap_or(0);
        let parts = PARTS[task];
        match set.starts_with("texts") {
            true => self.texts(parts),
            false => self.concepts(parts),
        }
    }

    fn digest(&self, data: &Data) -> Option<u64> {
        data.digest
    }

    fn task<'a>(
        &'a self,
        data: &'a Data,
        planned: &'a Planned,
    ) -> Result<Language<'a>, BenchError> {
        let (seed, steps) = (planned.run.seed, self.regime.steps);
        let end = |(percent, _): &Part| steps * percent / 100;
        let ends: Vec<u64> = data.parts.iter().map(end).collect();
        let part_of = ends.clone();
        Ok(Language {
            place: self.args.place.clone(),
            model: with(self.regime.model(data.vocab), &planned.method, seed),
            recipe: self.regime.recipe(),
            seed,
            gradient_noise: 0.0,
            draw: Box::new(move |step| {
                let part = part_of.partition_point(|end| *end <= step);
                let (tokens, length) = &data.documents[part.min(part_of.len() - 1)];
                Ok(draw(tokens, *length, seed, step, BATCH, SEQ))
            }),
            probe: &data.probe,
            judge: Box::new(|place, model, run| {
                judge(place, model, run, data.kinds.iter().cloned(), |_, _| Ok(())).map(drop)
            }),
            validation: None,
            stream: (data.parts.len() > 1).then(|| Stream {
                ends,
                kinds: &data.kinds,
                tell: Box::new(|place, model, ends, run| {
                    let parts: Vec<&[usize]> = data.parts.iter().map(|part| part.1).collect();
                    tell(&parts, ends, run, |young, kinds| {
                        let of = |kind: &usize| {
                            let (_, layers) = scored(place, model, &data.kinds[*kind])?;
                            Ok(slots_of(model, &layers, young))
                        };
                        kinds.iter().map(of).collect()
                    })
                }),
            }),
        })
    }
}

impl Continual {
    fn data_dir(&self) -> Result<&std::path::Path, BenchError> {
        self.args.data.as_deref().ok_or_else(|| {
            BenchError::Usage(
                "continual, task texts, needs data: give --data DIR (or $MASS_DATA_DIR) with DIR/glue/<Task>/{train,dev}.tsv, or \
                 --task appear, switch or stream, which need none"
                    .into(),
            )
        })
    }

    /// Concepts of GINC.
    fn concepts(&self, parts: &'static [Part]) -> Result<Data, BenchError> {
        const LENGTH: usize = 1024;
        let vocab = 50;
        let ginc = Ginc::generate(&GincParams::new(vocab).check()?);
        let mut documents = Vec::with_capacity(parts.len());
        for (i, (_, kinds)) in parts.iter().enumerate() {
            let mut rng = stream(DATA_SEED, Purpose::Training, i as u64);
            let number = (self.tokens / LENGTH).max(1);
            let corpus = ginc.sample_corpus_of(kinds, number, LENGTH, &mut rng)?;
            documents.push((corpus.tokens().to_vec(), LENGTH));
        }
        let sample = |windows, purpose| {
            Windows::sample(&ginc, windows, SEQ, &mut stream(DATA_SEED, purpose, 0))
        };
        let windows = sample(WINDOWS, Purpose::Evaluation)?;
        let kind = |kind: usize| windows.batch(kind * WINDOWS..(kind + 1) * WINDOWS);
        // To judge newcomers by: of what there is at first.
        let probe = sample(WINDOWS / 5, Purpose::Probe)?;
        let probe = probe.batch(0..parts[0].1.len() * (WINDOWS / 5));
        Ok(Data {
            parts,
            vocab,
            documents,
            kinds: (0..ginc.concepts()).map(kind).collect(),
            probe,
            digest: None,
        })
    }

    /// Sentences as bytes: to train on those of training sets, held out those of development sets.
    fn texts(&self, parts: &'static [Part]) -> Result<Data, BenchError> {
        let mut digest = Fnv::default();
        let (mut trained, mut kinds, mut probes) = (Vec::new(), Vec::new(), Vec::new());
        for task in TEXTS {
            let dir = self.data_dir()?;
            let data = Dataset::read(dir, task)?;
            let train = bytes(&data.train);
            let held_out: Vec<u8> = data.dev.iter().flat_map(|(_, dev)| bytes(dev)).collect();
            let few = |what: &str, file: usize, found: usize| {
                let problem = format!("{found} bytes of {what} text are too few for this study");
                BenchError::input(&Dataset::files(dir, task)[file], problem)
            };
            if train.len() <= SEQ {
                return Err(few("training", 0, train.len()));
            }
            let mut windows = held_out.chunks_exact(SEQ + 1);
            let mut batch = |rows| {
                let mut batch = TokenBatch::with_capacity(rows, SEQ);
                windows.by_ref().take(rows).for_each(|w| batch.push(w));
                (batch.rows == rows).then_some(batch)
            };
            let taken = (batch(WINDOWS), batch(WINDOWS / 5));
            let (Some(kind), Some(probe)) = taken else {
                return Err(few("held-out", 1, held_out.len()));
            };
            kinds.push(kind);
            probes.push(probe);
            for text in [&train, &held_out] {
                digest.eat(&(text.len() as u64).to_le_bytes());
                digest.eat(text);
            }
            trained.push(train);
        }
        let document = |(_, kinds): &Part| {
            let bytes = kinds.iter().flat_map(|&kind| &trained[kind]);
            let document: Vec<u32> = bytes.map(|&byte| byte.into()).collect();
            let length = document.len();
            (document, length)
        };
        let first: Vec<TokenBatch> = parts[0].1.iter().map(|&k| probes[k].clone()).collect();
        Ok(Data {
            parts,
            vocab: crate::text::VOCAB,
            documents: parts.iter().map(document).collect(),
            kinds,
            probe: TokenBatch::joined(SEQ, &first),
            digest: Some(digest.0),
        })
    }
}

/// Sentences, one a line.
fn bytes(examples: &[Example]) -> Vec<u8> {
    let mut text = Vec::new();
    for example in examples {
        for sentence in std::iter::once(&example.first).chain(&example.second) {
            text.extend_from_slice(sentence.as_bytes());
            text.push(b'\n');
        }
    }
    text
}

/// Writes into a run's `metrics`, with `L_c` the loss on kind c, nats a token:
///
/// - `new_loss`, `old_loss`: `L_c` at the end, of the kinds that only the last part has, and the mean of the others.
/// - `forgetting`: mean over the others of `L_c` at the end less `L_c` when the last part before it that has c ended.
/// - `splits_before`, `splits_after` the first change, and `delay`, the steps from it to the next split if there is one; not of
///   DynMoE, whose experts come without a split.
/// - `new_on_newcomers`, `old_on_newcomers`: the part of the routed slots of new and old kinds that experts born after the first
///   change have.
///
/// `parts` are the kinds of data in each part of the run, `ends` the step after which it ended and what `L_c` was then. `slots` counts
/// the routed slots of some kinds: those that some experts (a layer and a number) have, and all.
pub(super) fn tell(
    parts: &[&[usize]],
    ends: &[(u64, Vec<f64>)],
    run: &mut Run,
    slots: impl Fn(&[(usize, usize)], &[usize]) -> Result<Vec<(usize, usize)>, BenchError>,
) -> Result<(), BenchError> {
    let Some((first_change, _)) = ends.first() else {
        return Ok(());
    };
    let (_, at_end) = &ends[ends.len() - 1];
    let before = &parts[..parts.len() - 1];
    let last_with = |kind| before.iter().rposition(|kinds| kinds.contains(&kind));
    let (mut old, mut new, mut lost) = (Vec::new(), Vec::new(), Vec::new());
    for (kind, loss) in at_end.iter().enumerate() {
        match last_with(kind) {
            Some(part) => {
                old.push(kind);
                lost.push(loss - ends[part].1[kind]);
            }
            None => new.push(kind),
        }
    }
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let losses = |kinds: &[usize]| mean(&kinds.iter().map(|k| at_end[*k]).collect::<Vec<_>>());
    let later = |e: &&crate::report::Expansion| e.step >= *first_change;
    let after = run.expansions.iter().filter(later).count();
    let mut metrics = vec![
        ("old_loss", losses(&old)),
        ("new_loss", losses(&new)),
        ("forgetting", mean(&lost)),
    ];
    if run.method != DYNMOE {
        metrics.push(("splits_before", (run.expansions.len() - after) as f64));
        metrics.push(("splits_after", after as f64));
    }
    if let Some(next) = run.expansions.iter().find(later) {
        metrics.push(("delay", (next.step - first_change) as f64));
    }
    if after > 0 {
        let born = run.expansions.iter().filter(later);
        let young: Vec<(usize, usize)> = born.map(|e| (e.layer, e.new)).collect();
        let share = |kinds: &[usize]| -> Result<f64, BenchError> {
            let counts = slots(&young, kinds)?.into_iter();
            let (theirs, all) = counts.fold((0, 0), |sum, of| (sum.0 + of.0, sum.1 + of.1));
            Ok(theirs as f64 / all as f64)
        };
        metrics.push(("new_on_newcomers", share(&new)?));
        metrics.push(("old_on_newcomers", share(&old)?));
    }
    let named = metrics
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value));
    run.metrics.extend(named);
    Ok(())
}

/// The routed slots in some layers that some experts have, and all.
pub(super) fn slots_of(
    model: &impl Mixtures,
    layers: &[LayerTrace],
    experts: &[(usize, usize)],
) -> (usize, usize) {
    let (mut theirs, mut all) = (0, 0);
    for (l, layer) in layers.iter().enumerate() {
        all += layer.plan.num_assignments();
        let ids = model.mixture(l).ids().iter().enumerate();
        let own = ids.filter(|(_, id)| experts.contains(&(l, id.0 as usize)));
        theirs += own.map(|(place, _)| layer.plan.load(place)).sum::<usize>();
    }
    (theirs, all)
}

/// Alarms that go on must be ready before every change: the first phase may end, or a split make detectors begin anew, at the
/// change before it.
#[cfg(test)]
pub(super) fn every_change_is_seen(
    method: &Method,
    ends: &[u64],
    tune: impl FnOnce(&mut mass_model::growth::GrowerConfig),
) {
    let (changes, steps) = (&ends[..ends.len() - 1], ends[ends.len() - 1]);
    let rules = method.growth(1, steps, 0, tune).unwrap();
    let Some(controller) = rules.map(|rules| rules.controller) else {
        return;
    };
    let Some(watch) = controller.phase.continual else {
        return;
    };
    let needed = watch.loss.unwrap().observations_needed();
    let mut from = controller.phase.live_until;
    for &change in changes {
        if change < from {
            continue;
        }
        let ready = from + needed;
        assert!(ready < change, "{}: {ready}, {change}", method.run(0).key());
        from = change;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_method_has_rules_of_its_own_and_every_task_ends_with_the_run() {
        let args = ReproduceArgs::parsed(&["continual", "--preset", "full"]);
        let plan = plan(&args).unwrap();
        let runs = plan.runs(&args).unwrap();
        assert_eq!(runs.len(), TASKS.len() * 5 * 14);
        for method in plan.methods(&args).unwrap() {
            if let Some(rules) = method.growth(1, 4000, 0, |_| ()).unwrap() {
                rules.controller.check_reachable().unwrap();
            }
            for parts in PARTS {
                let ends = parts.iter().map(|(percent, _)| 4000 * percent / 100);
                every_change_is_seen(&method, &ends.collect::<Vec<_>>(), |_| ());
            }
        }
        for parts in PARTS {
            assert!(parts.is_sorted_by(|a, b| a.0 < b.0));
            assert_eq!(parts.last().unwrap().0, 100);
        }
    }

    #[test]
    fn a_text_that_is_too_short_is_named_with_its_directory() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("glue/CoLA");
        std::fs::create_dir_all(&folder).unwrap();
        let (short, long) = (
            "gj04\t1\t\tIt.\n",
            format!("gj04\t1\t\t{}\n", "a".repeat(SEQ)),
        );
        let mut args = ReproduceArgs::parsed(&["continual", "--task", "texts"]);
        args.data = Some(dir.path().to_owned());
        let continual = plan(&args).unwrap().family;
        for (train, file) in [(short, "train.tsv"), (&long, "dev.tsv")] {
            std::fs::write(folder.join("train.tsv"), train).unwrap();
            std::fs::write(folder.join("dev.tsv"), short).unwrap();
            match continual.texts(PARTS[3]).err().unwrap() {
                BenchError::Input { path, .. } => assert_eq!(path, folder.join(file)),
                other => panic!("{other}"),
            }
        }
    }

    #[test]
    fn a_row_of_a_table_can_be_made_again_alone() {
        let of = |setting: &str| {
            let line = ["continual", "--task", "texts", "--setting", setting];
            let args = ReproduceArgs::parsed(&line);
            let methods = plan(&args).unwrap().methods(&args).unwrap();
            methods.iter().map(|m| m.run(0).setting).collect::<Vec<_>>()
        };
        let only = "p 0.5, own timing, 12, then by alarms of loss and layer";
        assert_eq!(of("loss and layer"), [Some(only.to_owned())]);
        assert_eq!(of("then by alarms").len(), 3);
        assert!(of("loss and layers").is_empty());
    }
}

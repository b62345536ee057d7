//! A byte-level language model on one's own text, with a pool of experts that grows while it learns.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use mass_model::Place;
use mass_model::growth::{Grower, GrowerConfig};
use mass_model::optim::{AdamW, AdamWConfig, Decay, Schedule};
use serde_json::json;

use crate::BenchError;
use crate::batch::TokenBatch;
use crate::cli::{RunContext, TrainArgs, Variant};
use crate::language::{Language, dense, judge, with};
use crate::method::{MASS, Mass, Method, Pool, gate_is_linear, named};
use crate::report::{Header, ResultStore, Results, Run};
use crate::task::Recipe;
use crate::text::{ByteText, TextError, VOCAB, bits_per_byte};
use crate::trainer::Trainer;

/// Part of the run in which experts may be split, in percent. The paper's own timing leaves detection live for 1 % of the run, which
/// hardly ever grows.
const LIVE_PERCENT: u64 = 30;

/// Most held-out windows that are scored.
const MAX_WINDOWS: usize = 4096;

/// Trains, and reports bits per byte on the held-out tail.
///
/// # Errors
/// [`BenchError::Text`] for a file that is no text, [`BenchError::Usage`] for settings that no run can have, else what
/// training ends with.
pub fn run(args: &TrainArgs, ctx: &mut RunContext) -> Result<Results, BenchError> {
    let text = ByteText::read(&args.text, args.seq, args.held_out)?;
    let (method, run) = method(args)?;
    method.check()?;
    let data = format!("{:016x}", text.digest());
    let (probe, test) = held_out(&text, args)?;
    // After what was mistyped: nobody deletes a run for the sake of a text that is not there.
    if ctx.ranks.is_first() {
        ResultStore::check_kept(&args.out, args.existing())?;
    }
    let place = args.device.open()?;
    let mut task = task(args, &method, &text, &probe, &test);
    task.place = place;
    ctx.say_where(&task.place);
    let rules = check(&task, &method, args.seed)?;
    let header = Header::new("train", "text", args.threads).on(&task.place);
    let settings = json!({ "arguments": args, "settings": { "text": data } });
    let ranks = ctx.ranks.clone();
    let mut store = ResultStore::open_among(&ranks, &args.out, header, &settings, args.existing())?;
    if store.finished(&run.key()).is_some() {
        return Ok(store.into_results());
    }
    let folder = RunContext::checkpoint_dir(store.dir(), &run.key());
    let mut trainer = Trainer::open_among(&ranks, &task, (&run, &method), &folder, args.resume)?;
    if let Some(diagnosis) = rules.and_then(|g| g.controller.unreachable()) {
        ctx.progress.note(&format!("as set, {diagnosis}"));
    }
    let before = trainer.step();
    if args.resume {
        ctx.progress.note(&match before {
            0 => format!("nothing to resume in {}: beginning anew", folder.display()),
            step => format!("resumed after {step} of {} steps", args.steps),
        });
    }
    ctx.progress.start("training", args.steps as u64);
    ctx.progress.pass_over(before);
    let (flag, progress) = (ctx.interrupt_flag(), &mut ctx.progress);
    let complete = trainer.train(&folder, true, &mut |step, loss| {
        progress.tick(step, || format!("{:.3} bits per byte", bits_per_byte(loss)));
        !flag.load(Ordering::SeqCst)
    })?;
    if !complete {
        return Err(BenchError::Interrupted {
            out: args.out.clone(),
        });
    }
    let (sent, made) = (ranks.traffic(), trainer.step() - before);
    if made > 0 && !ranks.is_alone() {
        ctx.progress.note(&format!(
            "of {} processes the first sent {:.1} kB in {:.1} messages a step",
            ranks.size(),
            sent.bytes as f64 / 1e3 / made as f64,
            sent.messages as f64 / made as f64
        ));
    }
    let layers = trainer.experts();
    let layers: Vec<String> = layers.iter().map(|ids| ids.len().to_string()).collect();
    let outcome = trainer.finish()?;
    let mut counts = BTreeMap::new();
    for event in &outcome.events {
        let kind = event["kind"].as_str().unwrap_or_default();
        *counts.entry(kind).or_insert(0usize) += 1;
    }
    let events = counts.iter().map(|(kind, n)| format!("{n} {kind}"));
    let events: Vec<String> = events.collect();
    ctx.progress.finish(&format!(
        "{:.4} bits per byte on {} held-out bytes (byte frequencies alone: {:.4}); experts by layer {}, {:.2} active a \
         token; events: {}; checkpoint in {}",
        outcome.run.metric.unwrap_or(f64::NAN),
        test.iter().map(TokenBatch::tokens).sum::<usize>(),
        unigram_bits(&text, &test),
        layers.join(" "),
        outcome.run.active_per_token.unwrap_or(f64::NAN),
        if events.is_empty() { "none".into() } else { events.join(", ") },
        folder.display(),
    ));
    for diagnosis in &outcome.run.diagnoses {
        ctx.progress.note(&diagnosis.to_string());
    }
    store.keep(outcome.run, &outcome.metrics, &outcome.events)?;
    Ok(store.into_results())
}

/// The method and what its run is called. A directory has one run, whose arguments are beside it in settings.json.
fn method(args: &TrainArgs) -> Result<(Method, Run), BenchError> {
    let (experts, experts_max) = args.pool();
    let pool = Pool {
        experts,
        experts_max,
        k: 2.min(experts),
        p: args.p.unwrap_or(0.5) as f32,
        live_percent: Some(LIVE_PERCENT),
    };
    let bisects = args.router.as_ref().is_none_or(gate_is_linear);
    let own = match args.method.as_str() {
        MASS if bisects => Variant::Ours,
        _ => Variant::Paper,
    };
    let found = named(&args.method, &pool, Some(args.variant.unwrap_or(own)));
    let Some(mut method) = found.and_then(|found| found.into_iter().next()) else {
        return Err(crate::method::unknown(&args.method, &[]));
    };
    // What would change nothing was not meant so.
    let grows = matches!(method, Method::Mass(_));
    let pooled = !matches!(method, Method::Dense);
    let enlarges = grows || matches!(method, Method::DynMoe { .. });
    let routed = args.router.as_ref().is_none_or(|r| method.routed_by(r));
    for (flag, heard) in [
        ("--router", routed),
        ("--p", args.p.is_none() || grows),
        ("--variant", args.variant.is_none() || grows),
        ("--experts", args.experts.is_none() || pooled),
        ("--experts-max", args.experts_max.is_none() || enlarges),
    ] {
        if !heard {
            return Err(BenchError::Usage(format!(
                "{flag} changes nothing of --method {}; leave it out",
                args.method
            )));
        }
    }
    let mut run = method.run(args.seed);
    if let Method::Mass(Mass { router, .. }) = &method {
        run.setting = router.as_ref().map(ToString::to_string);
    }
    Ok((method, run))
}

/// Refuses what no run can have before results of an earlier one are replaced; the rules of growth, where there are some.
fn check(
    task: &Language<'_>,
    method: &Method,
    seed: u64,
) -> Result<Option<GrowerConfig>, BenchError> {
    let usage = |e: mass_model::ModelError| BenchError::Usage(e.to_string());
    let router = task.model.block.moe.router.build();
    router.map_err(|e| usage(e.into()))?;
    AdamW::new(task.recipe.adamw.clone()).map_err(usage)?;
    let (layers, steps) = (task.model.layers, task.recipe.schedule.steps);
    let rules = method.growth(layers, steps, seed, |_| ())?;
    let grower = rules.clone().map(Grower::new).transpose();
    grower.map_err(usage)?;
    Ok(rules)
}

/// Windows of the held-out tail: every eighth (of a short tail every second), at most 64 of them, for the expansion engine to
/// judge newcomers by, the others to be scored.
fn held_out(
    text: &ByteText,
    args: &TrainArgs,
) -> Result<(TokenBatch, Vec<TokenBatch>), BenchError> {
    let windows = text.held_out_batches(1, args.seq, MAX_WINDOWS)?;
    // Two at least to judge newcomers by, since their losses need a spread.
    let every = (windows.len() / 2).min(8);
    if every < 2 {
        return Err(BenchError::Text(TextError::TooShort {
            path: args.text.clone(),
            bytes: text.train().len() + text.held_out().len(),
            part: "held-out",
            part_bytes: text.held_out().len(),
            needed: 4 * args.seq + 1,
        }));
    }
    let mut probe = Vec::new();
    let mut test = Vec::new();
    for (i, window) in windows.into_iter().enumerate() {
        if i % every == 0 && probe.len() < 64 {
            probe.push(window);
        } else {
            test.push(window);
        }
    }
    let joined = |windows: &[TokenBatch]| TokenBatch::joined(args.seq, windows);
    Ok((
        joined(&probe),
        test.chunks(args.batch).map(joined).collect(),
    ))
}

fn task<'a>(
    args: &'a TrainArgs,
    method: &Method,
    text: &'a ByteText,
    probe: &'a TokenBatch,
    test: &'a [TokenBatch],
) -> Language<'a> {
    let mut model = dense(VOCAB, args.seq, args.dim, args.hidden);
    (model.layers, model.block.heads) = (args.layers, args.heads);
    let steps = args.steps as u64;
    Language {
        place: Place::Cpu,
        model: with(model, method, args.seed),
        gradient_noise: 0.0,
        recipe: Recipe {
            adamw: AdamWConfig {
                beta1: 0.9,
                beta2: 0.99,
                eps: 1e-8,
                weight_decay: 0.01,
                clip_norm: Some(1.0),
                groups: Vec::new(),
            },
            schedule: Schedule {
                peak: args.lr,
                warmup: 100.min(steps / 10),
                steps,
                floor: 0.1,
                decay: Decay::Linear,
            },
            log_every: (steps / 200).max(1),
            checkpoint_every: (steps / 10).max(50),
        },
        seed: args.seed,
        draw: Box::new(move |step| Ok(text.batch(args.seed, step, args.batch, args.seq)?)),
        probe,
        judge: Box::new(|place, model, run| {
            judge(place, model, run, test.iter().cloned(), |_, _| Ok(()))?;
            run.metric = run.test_loss.map(bits_per_byte);
            run.metric_name = Some("bits_per_byte".into());
            Ok(())
        }),
        validation: None,
        stream: None,
    }
}

/// Bits per byte of the held-out bytes under the byte frequencies of the training part (add-one).
fn unigram_bits(text: &ByteText, test: &[TokenBatch]) -> f64 {
    let mut counts = [1.0f64; VOCAB];
    for &byte in text.train() {
        counts[byte as usize] += 1.0;
    }
    let total: f64 = counts.iter().sum();
    let targets = || test.iter().flat_map(|b| &b.targets);
    let nats: f64 = targets().map(|&t| -(counts[t as usize] / total).ln()).sum();
    bits_per_byte(nats / targets().count() as f64)
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use mass_model::checkpoint;
    use mass_model::growth::Mixtures;
    use mass_routing::AnyRouter;

    use super::*;
    use crate::cli::{Cli, Command};
    use crate::method::{ABLATIONS, METHODS};
    use crate::trainer::tests::resumes_to_the_same_bits;

    fn parsed(path: &std::path::Path, more: &[&str]) -> Result<TrainArgs, BenchError> {
        let path = path.to_str().unwrap();
        let line = ["mass-bench", "train", "--text", path, "--seq", "8"];
        match Cli::try_parse_from(line.iter().chain(more)) {
            Ok(Cli {
                command: Command::Train(args),
            }) => args.check().map(|()| args),
            Ok(other) => panic!("{other:?}"),
            Err(error) => Err(BenchError::Usage(error.to_string())),
        }
    }

    fn arguments(path: &std::path::Path, more: &[&str]) -> TrainArgs {
        parsed(path, more).unwrap()
    }

    /// A small model's task, of these choices.
    fn with_task(choices: &[&str], look: impl FnOnce(&Language<'_>, &Method, &Run)) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("text");
        std::fs::write(&path, "to route or not to route ".repeat(40)).unwrap();
        let small = "--dim 16 --layers 2 --heads 2 --hidden 16 --batch 2";
        let pool = match choices {
            ["--method", "dense" | "erm", ..] => "",
            ["--method", "static" | "gmoe", ..] => " --experts 3",
            _ => " --experts 3 --experts-max 4",
        };
        let small = small.to_owned() + pool;
        let steps = ["--steps", "12"];
        let steps: &[&str] = if choices.contains(&"--steps") {
            &[]
        } else {
            &steps
        };
        let small: Vec<&str> = small
            .split(' ')
            .chain(steps.iter().chain(choices).copied())
            .collect();
        let args = arguments(&path, &small);
        let text = ByteText::read(&args.text, args.seq, args.held_out).unwrap();
        let (probe, test) = super::held_out(&text, &args).unwrap();
        let (method, run) = method(&args).unwrap();
        method.check().unwrap();
        let task = task(&args, &method, &text, &probe, &test);
        check(&task, &method, args.seed).unwrap();
        look(&task, &method, &run);
    }

    /// The model that these choices leave.
    fn trained(choices: &[&str], look: impl FnOnce(&Trainer<'_, Language<'_>>)) {
        with_task(choices, |task, method, run| {
            let dir = tempfile::tempdir().unwrap();
            let mut trainer = Trainer::open(task, run, method, dir.path(), false).unwrap();
            assert!(trainer.train(dir.path(), false, &mut |_, _| true).unwrap());
            look(&trainer);
            let outcome = trainer.finish().unwrap();
            assert!(outcome.run.metric.unwrap() > 0.0 && outcome.run.key() == run.key());
        });
    }

    #[test]
    fn every_method_resumes_to_the_same_bits() {
        for choices in [
            "--method dense",
            "--method dynmoe",
            "--method gmoe",
            "--method static --router noisy:std=0.2/target_k:target=1.5,p=0.9,combine=raw",
            "--method schedule",
            "--method schedule --variant calibrated --steps 60",
        ] {
            let choices: Vec<&str> = choices.split(' ').collect();
            with_task(&choices, |task, method, _| {
                resumes_to_the_same_bits(task, method, &[3, 10]);
            });
        }
    }

    /// Steps are made again only where no checkpoint of them is whole, and what might be one is not deleted.
    #[test]
    fn a_run_goes_on_from_a_checkpoint_that_is_whole_or_not_at_all() {
        with_task(&[], |task, method, run| {
            let dir = tempfile::tempdir().unwrap();
            let (at, latest) = (dir.path(), dir.path().join("latest"));
            let open = || Trainer::open(task, run, method, at, true);
            let refused = || open().err().unwrap().to_string();
            for stop in [3, 5] {
                let mut trainer = open().unwrap();
                assert!(
                    !trainer
                        .train(at, false, &mut |step, _| step < stop)
                        .unwrap()
                );
            }
            let steps = checkpoint::steps(at);
            let damage = |step: &std::path::Path| std::fs::write(step.join("state.json"), "{");
            let pointer = std::fs::read(&latest).unwrap();
            std::fs::remove_file(&latest).unwrap();
            assert_eq!(open().unwrap().step(), 5);
            damage(&steps[1]).unwrap();
            assert_eq!(open().unwrap().step(), 3);
            std::fs::write(&latest, pointer).unwrap();
            let message = refused();
            for part in [&steps[1], &steps[0], &latest] {
                assert!(message.contains(part.to_str().unwrap()), "{message}");
            }
            std::fs::remove_file(&latest).unwrap();
            damage(&steps[0]).unwrap();
            assert!(refused().contains("--fresh"));
            assert_eq!(checkpoint::steps(at), steps);
        });
    }

    #[test]
    fn every_method_trains_on_a_text() {
        let ablations = ABLATIONS.iter().map(|(name, _)| name);
        for name in METHODS.iter().chain(ablations) {
            trained(&["--method", name], |trainer| {
                assert_eq!(trainer.step(), 12)
            });
        }
        let path = std::path::Path::new("text");
        let args = arguments(path, &["--method", "magic"]);
        let refused = method(&args).unwrap_err().to_string();
        assert!(refused.contains("unknown method `magic`"), "{refused}");
    }

    #[test]
    fn ours_is_what_a_text_is_trained_by_where_it_can_be() {
        let variant = |choices: &[&str]| {
            let (method, _) = method(&arguments(std::path::Path::new("text"), choices)).unwrap();
            method.check().unwrap();
            method.run(0).variant.unwrap()
        };
        assert_eq!(variant(&[]), "ours");
        assert_eq!(variant(&["--router", "top_k:k=2"]), "ours");
        assert_eq!(variant(&["--variant", "reference"]), "reference");
        // Cosines cannot be bisected, and ablations are of the paper's rules.
        assert_eq!(variant(&["--router", "top_any"]), "paper");
        assert_eq!(variant(&["--method", "detector_only"]), "paper");
    }

    #[test]
    fn every_router_trains_and_those_that_balance_themselves_move() {
        for text in [
            "top_p:p=0.6",
            "top_k:k=2",
            "top_any",
            "bias_balanced:k=1,rate=0.01,combine=raw",
            "target_k:target=1.5,p=0.9,combine=raw",
            "expert_choice:capacity=1.1,combine=raw",
            "noisy:std=0.3/bias_balanced:k=2",
        ] {
            trained(&["--router", text], |trainer| {
                let model = trainer.model();
                for layer in 0..model.mixtures() {
                    let moe = model.mixture(layer);
                    let moved = |bias: &[f32]| {
                        bias.len() == moe.ids().len() && bias.iter().any(|&b| b != 0.0)
                    };
                    match &*moe.router() {
                        AnyRouter::BiasBalanced(r) => assert!(moved(r.bias()), "{r:?}"),
                        AnyRouter::TargetK(r) => assert!(r.p() < 0.9, "{r:?}"),
                        AnyRouter::Noisy(noisy) => match noisy.inner() {
                            AnyRouter::BiasBalanced(r) => assert!(moved(r.bias()), "{r:?}"),
                            other => panic!("{other:?}"),
                        },
                        AnyRouter::TopAny(r) => {
                            assert_eq!(r.thresholds().len(), moe.ids().len())
                        }
                        _ => {}
                    }
                }
            });
        }
    }

    #[test]
    fn a_router_is_part_of_what_a_run_is() {
        let path = std::path::Path::new("text");
        let plain = serde_json::to_value(arguments(path, &[])).unwrap();
        assert!(plain.get("router").is_none());
        // Sizes of the pool are written where they are not given, too.
        assert_eq!(
            (&plain["experts"], &plain["experts_max"]),
            (&json!(4), &json!(16))
        );
        let again: TrainArgs = serde_json::from_value(plain.clone()).unwrap();
        assert_eq!((again.experts, again.experts_max), (None, None));
        let chosen = arguments(path, &["--router", "top_k:k=2"]);
        assert_eq!(
            chosen.router.as_ref().unwrap().to_string(),
            "top_k:k=2,combine=renormalised"
        );
        assert_ne!(serde_json::to_value(&chosen).unwrap(), plain);
    }

    #[test]
    fn a_router_that_no_run_can_have_is_refused_with_a_remedy() {
        let path = std::path::Path::new("text");
        for (router, what) in [
            ("topk:k=2", "there are top_p, top_k"),
            ("top_k:k=0", "k must be at least 1"),
            ("top_p:p=1.5", "p must be in (0, 1]"),
            ("noisy:std=-1/top_k:k=2", "std must be"),
        ] {
            let refused = parsed(path, &["--router", router]).unwrap_err();
            assert!(matches!(refused, BenchError::Usage(_)));
            let text = refused.to_string();
            assert!(text.contains("--router") && text.contains(what), "{text}");
        }
        // p belongs to Top-p.
        let line = [
            "mass-bench",
            "train",
            "--text",
            "t",
            "--p",
            "0.3",
            "--router",
            "top_k:k=2",
        ];
        assert!(Cli::try_parse_from(line).is_err());
    }

    #[test]
    fn newcomers_are_judged_by_text_that_is_neither_trained_on_nor_scored() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("text");
        // 200 held-out windows of 8 bytes, 16, 5 and 4; every four letters are a number, so that windows differ.
        for (held_out, probes) in [(1601, 25), (129, 2), (41, 3), (33, 2)] {
            let letter = |n: usize| char::from(b'a' + (n % 26) as u8);
            let word = |i: usize| [i / 17576, i / 676, i / 26, i].map(letter);
            let all: String = (0..held_out * 10 / 4 + 10).flat_map(word).collect();
            std::fs::write(&path, &all[..held_out * 10]).unwrap();
            let args = arguments(&path, &[]);
            let text = ByteText::read(&path, args.seq, args.held_out).unwrap();
            let (probe, test) = super::held_out(&text, &args).unwrap();
            let windows = |batch: &TokenBatch| -> Vec<Vec<u32>> {
                batch.inputs.chunks(8).map(<[u32]>::to_vec).collect()
            };
            let scored: Vec<_> = test.iter().flat_map(windows).collect();
            assert_eq!(probe.rows, probes, "{held_out}");
            assert_eq!(probe.rows + scored.len(), (held_out - 1) / 8);
            assert!(test.iter().all(|b| b.rows * 8 == b.targets.len()));
            let tail: Vec<u32> = text.held_out().iter().map(|&b| b.into()).collect();
            for window in windows(&probe) {
                assert!(!scored.contains(&window));
                assert!(tail.windows(8).any(|w| w == window));
            }
        }
        // Three windows cannot be shared.
        std::fs::write(&path, "a".repeat(250)).unwrap();
        let args = arguments(&path, &[]);
        let text = ByteText::read(&path, args.seq, args.held_out).unwrap();
        let refused = super::held_out(&text, &args).unwrap_err().to_string();
        assert!(refused.contains("25 and needs 33"), "{refused}");
    }
}

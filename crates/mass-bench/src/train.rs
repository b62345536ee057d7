//! A byte-level language model on one's own text, with a pool of experts that grows while it learns.

use std::collections::BTreeMap;

use mass_model::checkpoint;
use mass_model::growth::Grower;
use mass_model::lm::LanguageModelConfig;
use mass_model::nn::{BlockConfig, MoeConfig};
use mass_model::optim::{AdamW, AdamWConfig, Decay, Schedule};
use mass_model::{Activation, ModelError};

use crate::batch::TokenBatch;
use crate::cli::{RunContext, TrainArgs};
use crate::report::{ResultStore, Results, Run, peak_rss_mib};
use crate::sweep::checkpoint_dir;
use crate::text::{ByteText, TextError, VOCAB, bits_per_byte};
use crate::trainer::{Feed, Trainer, TrainerConfig, mean};
use crate::{BenchError, variants};

/// Part of the run in which experts may be split, in percent.
const LIVE_PERCENT: u64 = 30;

/// Most held-out windows that are scored.
const MAX_WINDOWS: usize = 4096;

/// Trains, and reports bits per byte on the held-out tail.
///
/// # Errors
/// [`BenchError::Text`] for a file that is no text, [`BenchError::Usage`] for settings that no run can have, else what
/// training ends with.
pub fn run(args: &TrainArgs, ctx: &mut RunContext) -> Result<Results, BenchError> {
    ResultStore::check_kept(&args.out, args.existing())?;
    let text = ByteText::read(&args.text, args.seq, args.held_out)?;
    let mut run = Run::new("mass", args.seed);
    run.variant = Some(args.variant.to_string());
    run.setting = args.router.as_ref().map(ToString::to_string);
    run.experts_init = Some(args.experts);
    let config = config(args, run.key().to_string());
    check(&config)?;
    variants::check_router(
        &config.model.block.moe.router,
        args.experts,
        config.growth.as_ref(),
    )?;
    let data = format!("{:016x}", text.digest());
    let (probe, test) = held_out(&text, args)?;
    let mut store = ctx.open_train_store(args, &serde_json::json!({ "text": data }))?;
    if store.finished(&run.key()).is_some() {
        return Ok(store.into_results());
    }
    let growth = config.growth.as_ref();
    if let Some(diagnosis) = growth.and_then(|g| g.controller.unreachable()) {
        ctx.progress.note(&format!("as set, {diagnosis}"));
    }
    let folder = checkpoint_dir(&store, &run);
    let mut trainer = Trainer::open(config, &folder, args.resume)?;
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(args.threads)
        .build()
        .map_err(|e| BenchError::failed("starting threads", e))?;

    ctx.progress.start("training", args.steps as u64);
    let flag = ctx.interrupt_flag();
    let progress = &mut ctx.progress;
    let complete = pool.install(|| {
        trainer.run(
            &mut Feed {
                batch: &|step| Ok(text.batch(args.seed, step, args.batch, args.seq)?),
                probe: &probe,
                on_step: &mut |step, loss| {
                    progress.tick(step, || format!("{:.3} bits per byte", bits_per_byte(loss)));
                    !flag.load(std::sync::atomic::Ordering::SeqCst)
                },
            },
            &folder,
        )
    })?;
    if !complete {
        return Err(BenchError::Interrupted {
            out: args.out.clone(),
        });
    }

    let (mut total, mut bytes, mut assignments, mut routed) = (0.0, 0usize, 0usize, 0usize);
    for batch in &test {
        let (nll, layers) = pool
            .install(|| {
                trainer
                    .model
                    .score(&batch.inputs, &batch.targets, batch.length, None)
            })
            .map_err(|e| BenchError::failed("scoring the held-out tail", e))?;
        total += mean(&nll) * nll.len() as f64;
        bytes += nll.len();
        for layer in &layers {
            assignments += layer.plan.num_assignments();
            routed += layer.plan.num_tokens();
        }
    }
    let loss = total / bytes as f64;
    let (steps, wall_s) = (trainer.step(), trainer.wall_s());
    let tokens = steps * (args.batch * args.seq) as u64;
    run = Run {
        experts: Some(trainer.experts()),
        active_per_token: Some(assignments as f64 / routed as f64),
        test_loss: Some(loss),
        metric: Some(bits_per_byte(loss)),
        metric_name: Some("bits_per_byte".into()),
        steps: Some(steps),
        tokens: Some(tokens),
        detection_live_steps: trainer.live_steps(),
        wall_s: Some(wall_s),
        tokens_per_s: (wall_s > 0.0).then(|| tokens as f64 / wall_s),
        peak_rss_mib: peak_rss_mib(),
        expansions: trainer.expansions(),
        diagnoses: trainer.diagnoses(),
        ..run
    };
    let mut counts = BTreeMap::new();
    for event in trainer.events() {
        let kind = serde_json::to_value(event)
            .ok()
            .and_then(|v| v["kind"].as_str().map(str::to_owned));
        *counts.entry(kind.unwrap_or_default()).or_insert(0usize) += 1;
    }
    let events: Vec<String> = counts
        .iter()
        .map(|(kind, n)| format!("{n} {kind}"))
        .collect();
    let layers: Vec<String> = trainer
        .experts_by_layer()
        .iter()
        .map(usize::to_string)
        .collect();
    ctx.progress.finish(&format!(
        "{:.4} bits per byte on {bytes} held-out bytes (byte frequencies alone: {:.4}); experts by layer {}, {:.2} active a \
         token; events: {}; checkpoint in {}",
        bits_per_byte(loss),
        unigram_bits(&text, &test),
        layers.join(" "),
        assignments as f64 / routed as f64,
        if events.is_empty() { "none".into() } else { events.join(", ") },
        folder.display(),
    ));
    for diagnosis in &run.diagnoses {
        ctx.progress.note(&diagnosis.to_string());
    }
    debug_assert!(checkpoint::exists(&folder));
    store.keep(run, trainer.metrics(), trainer.events())?;
    Ok(store.into_results())
}

/// Refuses what no run can have before results of an earlier one are replaced.
fn check(config: &TrainerConfig) -> Result<(), BenchError> {
    let made = || -> Result<(), ModelError> {
        config.model.block.moe.router.build()?;
        AdamW::new(config.adamw.clone())?;
        config.growth.clone().map(Grower::new).transpose()?;
        Ok(())
    };
    made().map_err(|e| BenchError::Usage(e.to_string()))
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

fn config(args: &TrainArgs, run: String) -> TrainerConfig {
    let router = variants::router(args.router.as_ref(), args.variant, args.p as f32);
    let router = router.with_experts(args.experts);
    let moe = MoeConfig {
        gate: variants::gate(&router),
        ..MoeConfig::new(
            args.dim,
            args.hidden,
            args.experts,
            Activation::GeluErf,
            router,
        )
    };
    let steps = args.steps as u64;
    let mut growth = variants::growth(
        args.variant,
        args.layers,
        args.experts,
        args.experts_max,
        steps,
    );
    // The paper's own timing leaves detection live for 1 % of the run, which hardly ever grows.
    variants::live_for(&mut growth, steps, LIVE_PERCENT);
    growth.controller.seed = args.seed;
    TrainerConfig {
        run,
        model: LanguageModelConfig {
            vocab: VOCAB,
            max_seq: args.seq,
            layers: args.layers,
            embedding_std: 0.1,
            block: BlockConfig {
                heads: args.heads,
                layer_norm_eps: 1e-5,
                moe,
            },
        },
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
        growth: Some(growth),
        seed: args.seed,
        log_every: (steps / 200).max(1),
        checkpoint_every: (steps / 10).max(50),
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
    use mass_model::growth::Mixtures;
    use mass_routing::AnyRouter;

    use super::*;
    use crate::cli::{Cli, Command};

    fn parsed(path: &std::path::Path, more: &[&str]) -> Result<TrainArgs, BenchError> {
        let path = path.to_str().unwrap();
        let line = ["mass-bench", "train", "--text", path, "--seq", "8"];
        match Cli::parse_from(line.iter().chain(more)).command {
            Command::Train(command) => command.check(),
            _ => panic!("another command"),
        }
    }

    fn arguments(path: &std::path::Path, more: &[&str]) -> TrainArgs {
        parsed(path, more).unwrap()
    }

    /// A small model some steps on, routed as asked for.
    fn trained(router: &str) -> Trainer {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("text");
        std::fs::write(&path, "to route or not to route ".repeat(40)).unwrap();
        let small = "--dim 16 --layers 2 --heads 2 --hidden 16 --experts 3 --experts-max 4 --batch 2 --steps 6";
        let small: Vec<&str> = small.split(' ').chain(["--router", router]).collect();
        let args = arguments(&path, &small);
        let text = ByteText::read(&args.text, args.seq, args.held_out).unwrap();
        let (probe, _) = super::held_out(&text, &args).unwrap();
        let folder = dir.path().join("checkpoint");
        let config = config(&args, "run".into());
        let growth = config.growth.as_ref();
        variants::check_router(&config.model.block.moe.router, args.experts, growth).unwrap();
        let mut trainer = Trainer::open(config, &folder, false).unwrap();
        let mut feed = Feed {
            batch: &|step| Ok(text.batch(args.seed, step, args.batch, args.seq)?),
            probe: &probe,
            on_step: &mut |_, _| true,
        };
        assert!(trainer.run(&mut feed, &folder).unwrap());
        trainer
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
            let trainer = trained(text);
            for layer in 0..trainer.model.mixtures() {
                let moe = trainer.model.mixture(layer);
                let moved =
                    |bias: &[f32]| bias.len() == moe.ids().len() && bias.iter().any(|&b| b != 0.0);
                match &*moe.router() {
                    AnyRouter::BiasBalanced(router) => assert!(moved(router.bias()), "{router:?}"),
                    AnyRouter::TargetK(router) => assert!(router.p() < 0.9, "{router:?}"),
                    AnyRouter::Noisy(noisy) => match noisy.inner() {
                        AnyRouter::BiasBalanced(router) => {
                            assert!(moved(router.bias()), "{router:?}")
                        }
                        other => panic!("{other:?}"),
                    },
                    AnyRouter::TopAny(router) => {
                        assert_eq!(router.thresholds().len(), moe.ids().len())
                    }
                    _ => {}
                }
            }
        }
    }

    #[test]
    fn a_router_is_part_of_what_a_run_is() {
        let path = std::path::Path::new("text");
        let plain = serde_json::to_value(arguments(path, &[])).unwrap();
        assert!(plain.get("router").is_none());
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
        let checked = |router: &str, variant: &str| {
            let args = arguments(path, &["--router", router, "--variant", variant]);
            let config = config(&args, "run".into());
            let router = &config.model.block.moe.router;
            variants::check_router(router, args.experts, config.growth.as_ref())
        };
        for (router, variant, what) in [
            (
                "top_k:k=5",
                "paper",
                "takes 5 experts a token, and the pool begins with 4",
            ),
            ("top_k:k=1", "paper", "add combine=raw"),
            (
                "noisy:std=0.1/bias_balanced:k=1",
                "paper",
                "add combine=raw",
            ),
            ("top_any", "ours", "cannot bisect"),
            ("noisy:std=0.1/top_any", "paper", "behind noise"),
        ] {
            let refused = checked(router, variant).unwrap_err().to_string();
            assert!(refused.contains(what), "{router}: {refused}");
        }
        checked("top_k:k=4", "paper").unwrap();
        checked("top_any", "reference").unwrap();
        checked("bias_balanced:k=1,combine=raw", "ours").unwrap();
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

//! Several ranks do what one does.

use std::time::{Duration, Instant};

use mass_expand::{
    BisectParams, Choice, ControllerParams, EventKind, SplitOperator, StopRule, Trigger,
};
use mass_model::growth::{Grower, GrowerConfig, LossOn, Mixtures};
use mass_model::lm::LanguageModel;
use mass_model::nn::GateConfig;
use mass_model::ops::RoutingLoss;
use mass_model::optim::Gradients;
use mass_model::optim::{AdamW, AdamWConfig};
use mass_model::parallel::{self, ParallelError, Ranks, Step, Threads, Traffic};
use mass_model::{Masked, ModelError, Parameters, Place, seeded_rng};
use mass_routing::losses::BalanceCount;
use mass_routing::{Combine, RouterConfig};

use crate::growing::{SEQ, all_values, config};

const ROWS: usize = 8;

/// The batch of a step.
fn batch(step: u64) -> (Vec<u32>, Vec<u32>) {
    let token = |i: u64| ((i * i + 3 * i * step + step) % 11) as u32;
    let tokens = (ROWS * SEQ) as u64;
    (
        (0..tokens).map(token).collect(),
        (1..=tokens).map(token).collect(),
    )
}

/// How a run goes.
struct Recipe {
    router: RouterConfig,
    gate: GateConfig,
    losses: Vec<RoutingLoss>,
    controller: ControllerParams,
    steps: u64,
}

impl Recipe {
    /// Splits on a timetable, of which those that did not help are undone.
    fn new(router: RouterConfig) -> Self {
        let mut controller = ControllerParams::paper(2, 3, 6, 40);
        controller.trigger = Trigger::Schedule {
            first: 4,
            every: 5,
            splits: 1,
        };
        controller.choice = Choice::MostLoaded;
        controller.phase.live_from = 0;
        controller.phase.live_until = 30;
        Self {
            router,
            gate: GateConfig::Linear,
            losses: Vec::new(),
            controller,
            steps: 40,
        }
    }
}

/// What a run leaves: the losses, what happened, and the bits of the weights.
type Left = (Vec<f32>, Vec<(u64, String)>, String);

fn train(ranks: &Ranks, recipe: &Recipe) -> Result<Left, ModelError> {
    let mut config = config(recipe.router.clone());
    config.block.moe.gate = recipe.gate;
    config.block.moe.losses.clone_from(&recipe.losses);
    let mut model = LanguageModel::new(&config, &mut seeded_rng(5))?;
    parallel::check(ranks, &model)?;
    model.set_ranks(ranks);
    let clip = AdamWConfig {
        clip_norm: Some(0.5),
        ..AdamWConfig::default()
    };
    let mut optimizer = AdamW::new(clip)?;
    parallel::divide(ranks, &mut model, &mut optimizer)?;
    let mut grower = Grower::new(GrowerConfig::new(recipe.controller.clone()))?;
    let (mut losses, mut events) = (Vec::new(), Vec::new());
    for step in 0..recipe.steps {
        let (tokens, targets) = batch(step);
        let rows = ranks.share(ROWS);
        let own = rows.start * SEQ..rows.end * SEQ;
        let (tokens, targets) = (&tokens[own.clone()], &targets[own.clone()]);
        let mut pass = model.train_pass_at(&Place::Cpu, tokens, targets, SEQ)?;
        let all = parallel::reduce(ranks, &model, &mut pass, own.len() as u64)?;
        assert!(ranks.is_alone() || all == (ROWS * SEQ) as u64);
        model.adapt_among(ranks, &pass.layers)?;
        let score = |m: &LanguageModel, on, masked: Option<Masked>| {
            assert_eq!(on, LossOn::Batch);
            let own = m.score(tokens, targets, SEQ, masked)?.0;
            let own: Vec<f64> = own.into_iter().map(f64::from).collect();
            Ok(ranks.gather_f64(&own)?)
        };
        let made = grower.step_among(ranks, step, &mut model, &mut optimizer, &mut pass, score)?;
        events.extend(made.into_iter().map(|e| (step, name(&e.kind))));
        optimizer.step(&mut model, &mut pass.gradients, 1e-3)?;
        losses.push(pass.loss);
    }
    if ranks.divides_experts() {
        // Each rank has held a part of the experts, and no other.
        let moe = model.mixture(0);
        for (expert, owner) in moe.experts().iter().zip(moe.owners()) {
            let here = !expert.network.fc1.0.values().is_empty();
            assert_eq!(here, *owner == ranks.place());
        }
        let counts = (0..ranks.group().len())
            .map(|place| moe.owners().iter().filter(|o| **o == place).count());
        assert!(counts.clone().min() > Some(0), "{:?}", moe.owners());
        parallel::whole(ranks, &mut model, &mut optimizer)?;
        if !ranks.is_first() {
            return Ok((losses, events, String::new()));
        }
    }
    Ok((losses, events, format!("{:?}", all_values(&model))))
}

/// What happened to which expert, without figures.
fn name(event: &EventKind) -> String {
    let value = serde_json::to_value(event).unwrap();
    let of = |key: &str| {
        value
            .get(key)
            .map_or(String::new(), |v| format!(" {key} {v}"))
    };
    let kind = value["kind"].as_str().unwrap_or_default().to_owned();
    kind + &of("layer") + &of("source") + &of("newcomer") + &of("expert")
}

/// Trains on one rank and on several, and compares.
fn same_on_any_number(recipe: &Recipe) -> Vec<(u64, String)> {
    let alone = train(&Ranks::default(), recipe).unwrap();
    for size in [2, 3, 4] {
        let all = Threads::run(size, |ranks| train(ranks, recipe));
        let all: Vec<Left> = all.into_iter().map(Result::unwrap).collect();
        // To the bit between ranks.
        assert!(all.iter().all(|one| *one == all[0]), "{size} ranks");
        assert_eq!(all[0].1, alone.1, "{size} ranks");
        near(&all[0], &alone, &format!("{size} ranks"));
    }
    for (size, group) in [(2, 2), (3, 3), (4, 2), (4, 4)] {
        let all = Threads::run(size, |ranks| {
            train(&ranks.clone().in_groups(group)?, recipe)
        });
        let all: Vec<Left> = all.into_iter().map(Result::unwrap).collect();
        let what = format!("{size} ranks in groups of {group}");
        for one in &all {
            assert_eq!((&one.0, &one.1), (&all[0].0, &alone.1), "{what}");
        }
        near(&all[0], &alone, &what);
    }
    alone.1
}

/// Sums that are made in the course of the backward pass have the bits of those made after it, whichever parameters travel together,
/// and where some ranks have no gradient of a parameter.
#[test]
fn gradients_that_travel_during_the_backward_pass_are_the_same() {
    let top_1 = RouterConfig::TopK {
        k: 1,
        combine: Combine::Raw,
    };
    for recipe in [Recipe::new(top_p()), Recipe::new(top_1)] {
        for size in [2, 3, 8] {
            let run = |at_least: Option<usize>| {
                let all = Threads::run(size, |ranks| {
                    let ranks = match at_least {
                        Some(at_least) => ranks.clone().overlapping(at_least),
                        None => ranks.clone(),
                    };
                    Ok::<_, ModelError>((train(&ranks, &recipe)?, ranks.traffic()))
                });
                let mut all = all.into_iter().map(Result::unwrap);
                let first = all.next().unwrap();
                assert!(all.all(|other| other.0 == first.0));
                first
            };
            let after = run(None);
            for (at_least, messages) in [(1, true), (1000, true), (1 << 20, false)] {
                let meanwhile = run(Some(at_least));
                assert_eq!(meanwhile.0, after.0, "{size} ranks, {at_least}");
                // More sums, if there were any on the way.
                assert_eq!(meanwhile.1.messages > after.1.messages, messages);
            }
        }
    }
}

fn near(one: &Left, other: &Left, what: &str) {
    for (step, (a, b)) in one.0.iter().zip(&other.0).enumerate() {
        assert!((a - b).abs() < 1e-5, "{what}, step {step}: {a}, {b}");
    }
}

fn top_p() -> RouterConfig {
    RouterConfig::TopP {
        p: 0.6,
        combine: Combine::Renormalised,
    }
}

#[test]
fn a_pool_grows_and_shrinks_alike_on_any_number_of_ranks() {
    let mut recipe = Recipe::new(top_p());
    // Every second newcomer has to go.
    recipe.controller.stop = StopRule::Never;
    recipe.controller.operator = SplitOperator::Bisect(BisectParams::default());
    let events = same_on_any_number(&recipe);
    assert!(events.len() > 3, "{events:?}");
    let removing = Recipe {
        steps: 60,
        ..Recipe::new(top_p())
    };
    let events = same_on_any_number(&removing);
    let of = |what: &str| events.iter().filter(|(_, e)| e.contains(what)).count();
    assert!(of("expand") + of("split") > 0, "{events:?}");
}

#[test]
fn routers_that_learn_draw_noise_or_balance_do_so_of_the_whole_batch() {
    let top_k = RouterConfig::TopK {
        k: 2,
        combine: Combine::Raw,
    };
    let noisy = |inner| RouterConfig::Noisy {
        std: 0.3,
        seed: 7,
        inner: Box::new(inner),
    };
    let losses = vec![
        RoutingLoss::Balance {
            weight: 0.1,
            count: BalanceCount::First,
        },
        RoutingLoss::Importance { weight: 0.1 },
        RoutingLoss::Load { weight: 0.1 },
        RoutingLoss::RouterZ { weight: 0.1 },
        RoutingLoss::Entropy { weight: 0.1 },
        RoutingLoss::DiverseAndSimple { weight: 0.1 },
    ];
    let gmoe = Recipe {
        gate: GateConfig::Cosine {
            projection: Some(8),
            temperature: Some(0.5),
        },
        losses,
        ..Recipe::new(noisy(top_k))
    };
    same_on_any_number(&gmoe);
    let balanced = RouterConfig::BiasBalanced {
        k: 2,
        rate: 0.01,
        combine: Combine::Raw,
    };
    same_on_any_number(&Recipe::new(noisy(balanced)));
    let text = "target_k:target=1.5,p=0.9,combine=raw";
    same_on_any_number(&Recipe::new(text.parse().unwrap()));
}

#[test]
fn what_looks_at_a_whole_batch_is_refused() {
    let dirichlet = Recipe {
        losses: vec![RoutingLoss::Dirichlet {
            weight: 0.1,
            alpha: 0.5,
        }],
        ..Recipe::new(top_p())
    };
    let choice = Recipe::new("expert_choice:capacity=1.1,combine=raw".parse().unwrap());
    for (recipe, what) in [(&dirichlet, "Dirichlet"), (&choice, "expert-choice")] {
        for refused in Threads::run(2, |ranks| train(ranks, recipe)) {
            let refused = refused.unwrap_err().to_string();
            assert!(refused.contains(what), "{refused}");
        }
    }
}

#[test]
fn sums_are_weighted_and_the_same_on_every_rank() {
    for size in [1, 2, 3, 5] {
        // Fewer values than ranks, none, and more than travel at once.
        for n in [0, 1, 2, 7, (1 << 20) + 3] {
            let value = |rank: usize, i: usize| ((i * 7 + rank * 13) % 29) as f32 - 11.3;
            let weights: Vec<f64> = (0..size).map(|r| (r + 1) as f64 / 2.0).collect();
            let sums = Threads::run(size, |ranks| {
                let mut own: Vec<f32> = (0..n).map(|i| value(ranks.rank(), i)).collect();
                ranks.weighted_sum(&mut own, &weights)?;
                Ok::<_, ParallelError>(own)
            });
            for sum in sums {
                let sum = sum.unwrap();
                let right = |i: usize| -> f32 {
                    let terms = (0..size).map(|r| weights[r] * f64::from(value(r, i)));
                    terms.sum::<f64>() as f32
                };
                assert!((0..n).all(|i| sum[i] == right(i)), "{size} {n}");
            }
        }
    }
}

#[test]
fn shares_are_contiguous_and_as_even_as_can_be() {
    for (rows, size) in [(8, 3), (3, 4), (0, 2), (16, 4)] {
        let shares = Threads::run(size, |ranks| Ok::<_, ParallelError>(ranks.share(rows)));
        let shares: Vec<_> = shares.into_iter().map(Result::unwrap).collect();
        let all: Vec<usize> = shares.iter().flat_map(Clone::clone).collect();
        assert_eq!(all, (0..rows).collect::<Vec<_>>());
        let lengths = shares.iter().map(ExactSizeIterator::len);
        assert!(lengths.clone().max().unwrap() - lengths.min().unwrap() <= 1);
    }
}

/// Whatever the others wait for, all end, soon, and know who it was.
#[test]
fn a_rank_that_fails_ends_all() {
    type Wait = fn(&Ranks) -> Result<(), ParallelError>;
    let waits: [Wait; 6] = [
        |ranks| ranks.finish(),
        |ranks| ranks.sum(&mut [1.0]),
        |ranks| ranks.weighted_sum(&mut [1.0; 10], &[1.0; 3]),
        |ranks| ranks.gather(vec![1.0]).map(drop),
        |ranks| ranks.gather_bytes(&[1, 2]).map(drop),
        |ranks| ranks.exchange(&[1.0; 3], &[1, 1, 1]).map(drop),
    ];
    for wait in waits {
        let started = Instant::now();
        let ends = Threads::run(3, |ranks| match ranks.rank() {
            1 => Err(ParallelError::Unsupported("this".into())),
            _ => wait(ranks).and_then(|()| wait(ranks)),
        });
        assert!(started.elapsed() < Duration::from_secs(20));
        for (rank, end) in ends.into_iter().enumerate() {
            let error = end.unwrap_err().to_string();
            assert!(error.contains("several ranks: this"), "{error}");
            assert!(rank == 1 || error.contains("rank 1 has failed"), "{error}");
        }
    }
}

#[test]
fn ranks_that_do_different_things_say_so() {
    let ends = Threads::run(2, |ranks| match ranks.rank() {
        0 => ranks.sum(&mut [1.0]),
        _ => ranks.weighted_sum(&mut [1.0; 4], &[1.0; 2]),
    });
    for end in ends {
        let error = end.unwrap_err();
        assert!(
            matches!(error, ParallelError::OutOfStep { rank: 1, .. }),
            "{error}"
        );
    }
    let ends = Threads::run(2, |ranks| {
        ranks.weighted_sum(&mut vec![1.0; 4 + ranks.rank()], &[1.0; 2])
    });
    for end in ends {
        let error = end.unwrap_err().to_string();
        assert!(error.contains("5 values to add, not 4"), "{error}");
    }
    let ends = Threads::run(3, |ranks| ranks.sum(&mut vec![1.0; 1 + ranks.rank()]));
    for end in ends {
        let error = end.unwrap_err();
        assert!(
            matches!(error, ParallelError::OutOfStep { rank: 1, .. }),
            "{error}"
        );
        assert!(error.to_string().contains("2 numbers to add, not 1"));
    }
    let ends = Threads::run(3, |ranks| {
        let seed = usize::from(ranks.rank() == 2);
        ranks.agree(&[("the version", "1".into()), ("the seed", seed.to_string())])
    });
    for end in ends {
        let error = end.unwrap_err().to_string();
        assert_eq!(error, "rank 2 has the seed 1, and rank 0 has 0");
    }
}

#[test]
fn a_loss_that_is_no_number_ends_all_ranks() {
    for (group, overlap) in [(1, None), (2, None), (1, Some(1)), (2, Some(1))] {
        fails(group, overlap);
    }
}

fn fails(group: usize, overlap: Option<usize>) {
    let recipe = Recipe::new(top_p());
    let ends = Threads::run(2, |ranks| {
        let ranks = ranks.clone().in_groups(group)?;
        let ranks = &match overlap {
            Some(at_least) => ranks.overlapping(at_least),
            None => ranks,
        };
        let mut model = LanguageModel::new(&config(recipe.router.clone()), &mut seeded_rng(5))?;
        if ranks.rank() == 1 {
            model.head.weight.values_mut()[0] = f32::NAN;
        }
        model.set_ranks(ranks);
        let mut optimizer = AdamW::new(AdamWConfig::default())?;
        parallel::divide(ranks, &mut model, &mut optimizer)?;
        let (tokens, targets) = batch(0);
        let mut pass = model.train_pass_at(&Place::Cpu, &tokens, &targets, SEQ)?;
        parallel::reduce(ranks, &model, &mut pass, 1)
    });
    let errors: Vec<String> = ends
        .into_iter()
        .map(|e| e.unwrap_err().to_string())
        .collect();
    assert_eq!(errors[1], "the training loss is not finite");
    assert_eq!(
        errors[0],
        "rank 1 has failed: the training loss is not finite"
    );
}

#[test]
fn counts_of_what_is_sent_stop_at_the_largest_number() {
    let of = |bytes, messages| Traffic { bytes, messages };
    assert_eq!(of(0, 5) - of(1, 2), of(0, 3));
    assert_eq!(of(u64::MAX, 5) + of(1, 2), of(u64::MAX, 7));
    let step = Step {
        ranks: 4,
        group: 2,
        parameters: usize::MAX,
        everywhere: usize::MAX,
        own_experts: usize::MAX,
        layers: usize::MAX,
        experts: usize::MAX,
        dim: usize::MAX,
        assignments: 1.0,
        away: 0.5,
        sums: vec![usize::MAX],
    };
    let step = step.growing();
    assert_eq!(step.sums, [usize::MAX; 2]);
    assert_eq!(step.traffic(), of(u64::MAX, u64::MAX));
}

/// What is sent is what the cost model says, by ranks, groups, experts, width and experts a token.
#[test]
fn what_is_sent_is_what_the_cost_model_says() {
    for (size, group) in [(2, 1), (4, 1), (2, 2), (4, 2), (4, 4)] {
        for (dim, experts, k) in [(12, 4, 4), (24, 8, 8), (12, 16, 2)] {
            let router = RouterConfig::TopK {
                k,
                combine: Combine::Raw,
            };
            let mut config = config(router);
            (config.block.moe.dim, config.block.moe.experts) = (dim, experts);
            let sent = Threads::run(size, |ranks| {
                let ranks = &ranks.clone().in_groups(group)?;
                let mut model = LanguageModel::new(&config, &mut seeded_rng(5))?;
                let mut optimizer = AdamW::new(AdamWConfig::default())?;
                model.set_ranks(ranks);
                parallel::divide(ranks, &mut model, &mut optimizer)?;
                let controller = ControllerParams::paper(2, experts, experts, 40);
                let mut grower = Grower::new(GrowerConfig::new(controller))?;
                let (mut away, mut assignments, mut values) = (0.0, 0.0, [0; 2]);
                for step in 0..2 {
                    let (tokens, targets) = batch(step);
                    let rows = ranks.share(ROWS);
                    let own = rows.start * SEQ..rows.end * SEQ;
                    let (tokens, targets) = (&tokens[own.clone()], &targets[own.clone()]);
                    let mut pass = model.train_pass_at(&Place::Cpu, tokens, targets, SEQ)?;
                    parallel::reduce(ranks, &model, &mut pass, own.len() as u64)?;
                    model.adapt_among(ranks, &pass.layers)?;
                    let none = |_: &LanguageModel, _, _| Ok(vec![1.0]);
                    grower.step_among(ranks, step, &mut model, &mut optimizer, &mut pass, none)?;
                    // An expert without tokens has no gradients, and none are sent.
                    model.visit("", &mut |name, param| {
                        if pass.gradients.copy(param).unwrap().is_some() {
                            let own = group > 1 && name.contains(".fc");
                            values[usize::from(own)] += param.len();
                        }
                    });
                    optimizer.step(&mut model, &mut pass.gradients, 1e-3)?;
                    for layer in &pass.layers {
                        let owners = model.mixture(0).owners();
                        let of = |e: &usize| layer.plan.load(*e) as f64;
                        let away_to =
                            |e: &usize| owners.get(*e).is_some_and(|o| *o != ranks.place());
                        away += (0..experts).filter(away_to).map(|e| of(&e)).sum::<f64>();
                        assignments += layer.plan.num_assignments() as f64;
                    }
                }
                // Two steps of two layers.
                let of_layer = assignments / 4.0;
                let step = Step {
                    everywhere: values[0] / 2,
                    own_experts: values[1] / 2,
                    ..Step::of(ranks, &model, of_layer, away / assignments)
                }
                .growing();
                Ok::<_, ModelError>((ranks.traffic(), step.traffic()))
            });
            let sent: Vec<(Traffic, Traffic)> = sent.into_iter().map(Result::unwrap).collect();
            let sum = |of: fn(&(Traffic, Traffic)) -> u64| sent.iter().map(of).sum::<u64>() as f64;
            for (what, counted, model) in [
                ("bytes", sum(|t| t.0.bytes), sum(|t| t.1.bytes)),
                ("messages", sum(|t| t.0.messages), sum(|t| t.1.messages)),
            ] {
                let ratio = counted / (2.0 * model);
                let case = (size, group, dim, experts, k);
                assert!((ratio - 1.0).abs() < 0.02, "{case:?} {what}: {ratio}");
            }
        }
    }
}

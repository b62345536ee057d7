//! What would be lost, or wrong without a word, is refused.

use dfdx::prelude::*;
use mass_model::bert::{BertClassifier, BertConfig};
use mass_model::checkpoint::{self, Checkpointed, Snapshot, load_safetensors, save_safetensors};
use mass_model::growth::Mixtures;
use mass_model::lm::LanguageModel;
use mass_model::nn::{Block, FeedForward, LayerNorm, Linear, MoeConfig, MoeLayer};
use mass_model::ops::{self, Gate, RoutingLoss, Sequences};
use mass_model::optim::{AdamW, AdamWConfig, Ema, EmaConfig, GradientAccumulator, ParameterState};
use mass_model::parallel::{self, Ranks, Threads};
use mass_model::{
    Activation, CpuGradients, ModelError, Param, Parameters, Place, parameters, seeded_rng,
};
use serde_json::json;

use crate::saved::{snapshot, trained};

struct Pair {
    a: Param,
    b: Param,
}
parameters!(Pair { a as "w", b as "w" });

struct One {
    a: Param,
}
parameters!(One { a });

fn one(value: f32) -> One {
    let a = Param::new(vec![value; 4], &[4], true).unwrap();
    One { a }
}

fn given(model: &One, gradient: f32) -> CpuGradients {
    let mut gradients = CpuGradients::leaky();
    model
        .a
        .set_gradient(&mut gradients, vec![gradient; 4])
        .unwrap();
    gradients
}

#[track_caller]
fn says<T>(result: Result<T, ModelError>, part: &str) {
    match result {
        Ok(_) => panic!("not refused: {part}"),
        Err(e) => assert!(e.to_string().contains(part), "{e}"),
    }
}

#[test]
fn two_parameters_of_one_name_are_refused_by_whatever_keeps_by_name() {
    let mut pair = Pair {
        a: Param::ones(&[2], true).unwrap(),
        b: Param::ones(&[3], true).unwrap(),
    };
    let twice = "two parameters have the name \"w\"";
    let mut gradients = CpuGradients::leaky();
    for p in [&pair.a, &pair.b] {
        p.set_gradient(&mut gradients, vec![1.0; p.len()]).unwrap();
    }
    let mut accumulator = GradientAccumulator::new();
    says(accumulator.add(&pair, &mut gradients, 1.0), twice);
    assert_eq!(accumulator.batches(), 0);
    let mut optimizer = AdamW::new(AdamWConfig::default()).unwrap();
    says(optimizer.step(&mut pair, &mut gradients, 0.1), twice);
    let mut ema = Ema::new(0.5).unwrap();
    says(ema.update(&pair), twice);
    says(ema.swap(&mut pair), twice);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.safetensors");
    says(save_safetensors(&path, &pair), twice);
    says(load_safetensors(&path, &mut pair), twice);
    assert_eq!(pair.b.values(), [1.0; 3]);
}

/// Whose parameters bear one name, in checkpoints.
struct Twins {
    a: Linear,
    b: Linear,
}
parameters!(Twins { a as "w", b as "w" });
mass_model::mixtures!(Twins {});

impl Checkpointed for Twins {
    const KIND: &'static str = "twins";
    type Config = ();

    fn checkpoint_config(&self) -> &() {
        &()
    }

    fn from_checkpoint_config((): &()) -> Result<Self, ModelError> {
        let linear = || Linear::new(2, 2, false, &mut seeded_rng(0));
        let (a, b) = (linear()?, linear()?);
        Ok(Self { a, b })
    }
}

#[test]
fn a_checkpoint_that_could_not_be_read_is_not_written() {
    let optimizer = AdamW::new(AdamWConfig::default()).unwrap();
    let twins = Twins::from_checkpoint_config(&()).unwrap();
    let twice = checkpoint::encode(&Snapshot::new(1, &twins, &optimizer, &()));
    says(twice, "two parameters have the name \"w.weight\"");

    let dir = tempfile::tempdir().unwrap();
    let good = checkpoint::save(dir.path(), &snapshot(&trained(3))).unwrap();
    type Change = fn(&mut LanguageModel);
    let changes: [(Change, &str); 6] = [
        (
            |m| m.head = Linear::new(6, 7, true, &mut seeded_rng(1)).unwrap(),
            "head.bias is a parameter of shape [7] that does not decay, but none",
        ),
        (
            |m| m.head = Linear::new(6, 8, false, &mut seeded_rng(1)).unwrap(),
            "head.weight is a parameter of shape [8, 6]",
        ),
        (
            |m| m.blocks[0].attention.qkv.bias = None,
            "blocks.0.attention.qkv.bias is none",
        ),
        (
            |m| {
                let first = m.mixture(0).ids()[0];
                let expert = m.mixture_mut(0).expert_mut(first).unwrap();
                expert.threshold = Some(Param::zeros(&[1], false).unwrap());
            },
            "threshold",
        ),
        (
            |m| m.tokens = Param::new(m.tokens.values().to_vec(), &[7, 6], false).unwrap(),
            "tokens is a parameter of shape [7, 6] that does not decay",
        ),
        (
            |m| m.norm.weight.values_mut()[2] = f32::NAN,
            "NaN among the values of norm.weight",
        ),
    ];
    for (change, part) in changes {
        let mut parts = trained(3);
        change(&mut parts.0);
        // Neither moments nor averages of other sizes are what is refused.
        let optimizer = AdamW::new(AdamWConfig::default()).unwrap();
        let ema = Ema::new(0.5).unwrap();
        says(
            checkpoint::save(dir.path(), &snapshot(&(parts.0, optimizer, ema))),
            part,
        );
    }
    let mut parts = trained(3);
    let state = |m: f32, n: usize| ParameterState {
        m: vec![m; n].into(),
        v: vec![0.5; n].into(),
        step: 1,
    };
    let states = [("norm.weight".to_owned(), state(0.5, 5))];
    parts.1.restore(states.into()).unwrap();
    says(
        checkpoint::save(dir.path(), &snapshot(&parts)),
        "moments of norm.weight",
    );
    let mut deep = json!(0);
    for _ in 0..200 {
        deep = json!([deep]);
    }
    let parts = trained(3);
    says(
        checkpoint::save(dir.path(), &Snapshot::new(2, &parts.0, &parts.1, &deep)),
        "recursion limit",
    );
    assert!(good.is_dir());
    checkpoint::load::<LanguageModel, String>(dir.path()).unwrap();
}

#[test]
fn numbers_that_no_run_has_are_refused_where_they_come_in() {
    let state = |m: f32, v: f32| ParameterState {
        m: vec![m].into(),
        v: vec![v].into(),
        step: 1,
    };
    let mut optimizer = AdamW::new(AdamWConfig::default()).unwrap();
    for (m, v, part) in [
        (f32::NAN, 1.0, "NaN among the first moments of a"),
        (1.0, f32::NAN, "NaN among the second moments of a"),
        (1.0, -1.0, "-1 among the second moments of a"),
    ] {
        says(optimizer.restore([("a".into(), state(m, v))].into()), part);
    }
    let averages = [("a".to_owned(), vec![0.0, f32::NAN])];
    let restored = Ema::restore(EmaConfig { decay: 0.5 }, averages.into());
    says(restored, "NaN among the averages of a");
    // One in f32, so that averages would never move.
    says(Ema::new(0.999_999_99), "0.99999999");

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.safetensors");
    says(
        save_safetensors(&path, &one(f32::NAN)),
        "NaN among the values of a",
    );
    let values: Vec<u8> = [1.0, 2.0, f32::INFINITY, 3.0]
        .iter()
        .flat_map(|x: &f32| x.to_le_bytes())
        .collect();
    let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![4], &values);
    let bytes = safetensors::serialize([("a", view.unwrap())], None).unwrap();
    std::fs::write(&path, bytes).unwrap();
    let mut model = one(5.0);
    says(
        load_safetensors(&path, &mut model),
        "tensor a has a value that is not finite",
    );
    assert_eq!(model.a.values(), [5.0; 4]);
}

#[test]
fn updates_that_f32_cannot_hold_are_refused_and_large_gradients_are_clipped() {
    let config = |beta1, weight_decay| AdamWConfig {
        beta1,
        weight_decay,
        ..AdamWConfig::default()
    };
    for (config, lr, part) in [
        (config(0.9, 1e30), 1e30, "learning rate times weight decay"),
        (config(0.999, 0.0), 3e38, "learning rate over 1 - beta1"),
    ] {
        let mut model = one(1.0);
        let mut gradients = given(&model, 1.0);
        let mut optimizer = AdamW::new(config).unwrap();
        says(optimizer.step(&mut model, &mut gradients, lr), part);
        assert_eq!(model.a.values(), [1.0; 4]);
    }
    let clipped = AdamWConfig {
        clip_norm: Some(1.0),
        ..AdamWConfig::default()
    };
    let mut model = one(1.0);
    let mut gradients = given(&model, 1e20);
    let mut optimizer = AdamW::new(clipped).unwrap();
    let norm = optimizer.step(&mut model, &mut gradients, 0.1).unwrap();
    assert!((norm / 2e20 - 1.0).abs() < 1e-6, "{norm}");
    assert!((optimizer.state()["a"].m[0] - 0.05).abs() < 1e-6);
}

#[test]
fn what_an_accumulator_refuses_it_still_has() {
    let mut model = one(1.0);
    let mut accumulator = GradientAccumulator::new();
    accumulator
        .add(&model, &mut given(&model, 3.0), 1e308)
        .unwrap();
    says(
        accumulator.add(&model, &mut given(&model, 3.0), 1e308),
        "in sum inf",
    );
    let a = Param::ones(&[5], true).unwrap();
    let old = std::mem::replace(&mut model.a, a);
    let mut gradients = CpuGradients::leaky();
    says(
        accumulator.mean_into(&model, &mut gradients),
        "accumulated gradient of a",
    );
    assert_eq!(accumulator.batches(), 1);
    model.a = old;
    accumulator.mean_into(&model, &mut gradients).unwrap();
    assert_eq!(*model.a.gradient(&mut gradients).unwrap(), [3.0; 4]);
}

#[test]
fn what_is_no_number_is_refused_once_it_has_been_averaged() {
    // Also beside a weight of which the first is nothing in f32.
    for weight in [1.0, 1e-9] {
        let mut model = one(1.0);
        let mut gradients = given(&model, f32::NAN);
        let mut accumulator = GradientAccumulator::new();
        accumulator.add(&model, &mut gradients, weight).unwrap();
        accumulator
            .add(&model, &mut given(&model, 1.0), 1.0)
            .unwrap();
        accumulator.mean_into(&model, &mut gradients).unwrap();
        let mut optimizer = AdamW::new(AdamWConfig::default()).unwrap();
        says(
            optimizer.step(&mut model, &mut gradients, 0.1),
            "the gradient of a",
        );
        assert_eq!(model.a.values(), [1.0; 4]);
    }

    let mut parts = trained(3);
    let weights = parts.0.norm.weight.values().to_vec();
    parts.0.norm.weight.values_mut().fill(f32::NAN);
    parts.2.update(&parts.0).unwrap();
    parts.0.norm.weight.values_mut().copy_from_slice(&weights);
    let saved = checkpoint::encode(&snapshot(&parts));
    says(saved, "NaN among the averages of norm.weight");
    parts.2.swap(&mut parts.0).unwrap();
    let scored = parts.0.score(&[1, 2], &[2, 3], 2, None);
    says(scored, "not finite");
}

fn moe(experts: usize, router: serde_json::Value) -> MoeConfig {
    serde_json::from_value(json!({
        "dim": 4, "hidden": 3, "experts": experts, "activation": "relu", "router": router,
    }))
    .unwrap()
}

fn top_k(k: usize) -> serde_json::Value {
    json!({ "router": "top_k", "k": k, "combine": "raw" })
}

#[test]
fn a_destroyed_model_says_so() {
    // A ReLU between: NaN does not become zero on the way.
    let mut network = FeedForward::new(4, 3, Activation::Relu, false, &mut seeded_rng(0)).unwrap();
    network.visit_mut("", &mut |name, p| {
        if name == "fc1.bias" {
            p.values_mut().fill(f32::NAN);
        }
    });
    let x: Tensor<(usize, usize), f32, Cpu> = Cpu::default().ones_like(&(2, 4));
    let y = network.try_forward(x.clone()).unwrap().as_vec();
    assert!(y.iter().all(|y| y.is_nan()), "{y:?}");

    let logits = x.clone() * f32::NAN;
    says(
        ops::cross_entropy(logits.clone(), &[0, 1]),
        "the loss of row 0",
    );
    says(ops::token_losses(logits, &[0, 1]), "the loss of row 0");
    let (mut model, _, _) = trained(3);
    model.head.weight.values_mut().fill(f32::NAN);
    says(model.score(&[1, 2], &[2, 3], 2, None), "the loss of row 0");
    says(model.train_pass(&[1, 2], &[2, 3], 2), "the training loss");

    let mut layer = MoeLayer::new(&moe(2, top_k(1)), &mut seeded_rng(0)).unwrap();
    let mut twin = layer.experts()[0].offspring();
    twin.logit_offset = f32::NAN;
    says(layer.push(twin), "the logit offset NaN of a newcomer");
    assert_eq!(layer.ids().len(), 2);

    let mut norm = LayerNorm::new(4, 1e-5).unwrap();
    norm.eps = -1.0;
    says(norm.try_forward(x.clone()), "eps -1");
    says(
        ops::layer_norm(x, &norm.weight, &norm.bias, f32::NAN),
        "eps NaN",
    );
}

#[test]
fn a_mixture_takes_no_loss_or_gate_that_it_has_no_room_for() {
    let layer = MoeLayer::new(&moe(2, top_k(1)), &mut seeded_rng(0)).unwrap();
    let run = |gate: &Gate, losses: &[RoutingLoss], threshold: Option<Param>| {
        let mut experts = layer.experts().to_vec();
        experts[1].threshold = threshold;
        let x: Tensor<(usize, usize), f32, Cpu> = Cpu::default().ones_like(&(2, 4));
        let router = &mut layer.router().clone();
        let x = x.trace(CpuGradients::leaky());
        ops::moe_ffn(x, &experts, (gate, losses), None, router, Activation::Relu)
    };
    let zeros = |shape: &[usize]| Param::zeros(shape, false).unwrap();
    let load = RoutingLoss::Load { weight: 0.1 };
    says(
        run(&Gate::Linear, &[load], None),
        "needs noisy top-k routing",
    );
    let z = RoutingLoss::RouterZ { weight: f32::NAN };
    says(run(&Gate::Linear, &[z], None), "its weight must be finite");
    says(
        run(&Gate::Linear, &[], Some(zeros(&[3]))),
        "threshold of expert 1",
    );
    let low_rank = |anchors, query: &[usize]| Gate::LowRank {
        query: zeros(query),
        anchors,
        scale: 1.0,
    };
    says(
        run(&low_rank(usize::MAX, &[2, 4]), &[], None),
        "larger than memory",
    );
    for shape in [&[4][..], &[4, 1, 4]] {
        says(run(&low_rank(1, shape), &[], None), "query projection");
    }
    let cosine = |projection, log_scale| Gate::Cosine {
        projection,
        log_scale,
    };
    says(
        run(&cosine(None, Some(zeros(&[3]))), &[], None),
        "log scale",
    );
    let flat = Some((zeros(&[4]), zeros(&[4])));
    says(run(&cosine(flat, None), &[], None), "projection of a gate");
}

/// Fields that anybody may set.
#[test]
fn parameters_of_no_shape_are_refused_where_they_are_used() {
    let part = "expected shape [0, 0], got []";
    let scalar = || Param::new(vec![1.0], &[], true).unwrap();
    let (weight, bias) = (scalar(), None);
    let fc = Linear { weight, bias };
    says(
        FeedForward::from_linear(fc.clone(), fc, Activation::Relu),
        part,
    );
    let (mut model, _, _) = trained(3);
    model.positions = scalar();
    says(model.forward(&[1, 2], 2, None, NoneTape), part);
}

#[test]
fn sizes_that_memory_has_no_room_for_are_refused() {
    let rng = &mut seeded_rng(0);
    let before = rng.clone();
    let room = "larger than memory has room for";
    says(Param::zeros(&[1 << 50], true), room);
    says(Param::uniform(&[1 << 50], 1.0, true, rng), room);
    says(Linear::new(1 << 25, 1 << 25, true, rng), room);
    for batch in [1 << 36, 1 << 44, usize::MAX] {
        says(Sequences::uniform(batch, 1), "fewer than 2^32");
    }
    let most = "at most 1048576";
    let dense = FeedForward::new(4, 3, Activation::Relu, false, &mut seeded_rng(1)).unwrap();
    let many = moe(1 << 40, top_k(1));
    says(MoeLayer::new(&many, rng), most);
    says(MoeLayer::from_dense(&dense, &many, rng), most);
    let mut deep = crate::saved::config(2);
    deep.layers = 1 << 40;
    says(LanguageModel::new(&deep, rng), most);
    let bert = BertConfig {
        vocab_size: 1 << 50,
        hidden_size: 4,
        num_attention_heads: 1,
        ..BertConfig::default()
    };
    says(BertClassifier::new(&bert, 2, rng), room);
    assert_eq!(*rng, before);
}

#[test]
fn a_refused_construction_leaves_the_generator_as_it_was() {
    let rng = &mut seeded_rng(0);
    let before = rng.clone();
    let too_much = json!({ "router": "top_p", "p": 2.0, "combine": "raw" });
    assert!(MoeLayer::new(&moe(2, too_much.clone()), rng).is_err());
    let dense = FeedForward::new(4, 3, Activation::Relu, false, &mut seeded_rng(1)).unwrap();
    assert!(MoeLayer::from_dense(&dense, &moe(2, too_much), rng).is_err());
    for (heads, eps) in [(4, 1e-5), (2, -1.0)] {
        let mut config = crate::saved::config(2);
        (config.block.heads, config.block.layer_norm_eps) = (heads, eps);
        assert!(Block::new(&config.block, rng).is_err());
        assert!(LanguageModel::new(&config, rng).is_err());
    }
    assert_eq!(*rng, before);
}

#[test]
fn a_router_and_its_pool_belong_together() {
    let rng = &mut seeded_rng(0);
    let top_any = |n: usize| json!({ "router": "top_any", "experts": n });
    says(MoeLayer::new(&moe(2, top_k(5)), rng), "5");
    says(
        MoeLayer::new(&moe(2, top_any(7)), rng),
        "top-any routing of 7 experts in a layer of 2",
    );
    MoeLayer::new(&moe(2, top_any(0)), rng).unwrap();
    let mut layer = MoeLayer::new(&moe(2, top_k(2)), rng).unwrap();
    let first = layer.ids()[0];
    says(layer.remove(first), "2");
    assert_eq!(layer.ids().len(), 2);

    // A plan of evaluation, before the router has ever trained.
    let with_bias = |n: usize| {
        let bias = vec![0.0; n];
        json!({ "router": "bias_balanced", "k": 1, "rate": 0.1, "combine": "raw", "bias": bias })
    };
    let balanced =
        |k: usize| json!({ "router": "bias_balanced", "k": k, "rate": 0.1, "combine": "raw" });
    let mut layer = MoeLayer::new(&moe(3, balanced(1)), rng).unwrap();
    let x: Tensor<(usize, usize), f32, Cpu> = Cpu::default().ones_like(&(2, 4));
    let plan = layer.forward_routed(x, None).unwrap().plan;
    says(layer.adapt(&plan), "experts that this router has routed");

    let optimizer = AdamW::new(AdamWConfig::default()).unwrap();
    for (router, part) in [
        (top_k(1), "a router of another kind"),
        (balanced(4), "4 experts"),
        (
            with_bias(5),
            "a router with biases of 5 experts, of which there are 3",
        ),
    ] {
        let mut config = crate::saved::config(3);
        config.block.moe.router = serde_json::from_value(balanced(1)).unwrap();
        let mut model = LanguageModel::new(&config, rng).unwrap();
        *model.mixture_mut(0).router_mut() = serde_json::from_value(router).unwrap();
        let saved = checkpoint::encode(&Snapshot::new(1, &model, &optimizer, &()));
        says(saved, part);
    }
}

#[test]
fn a_file_that_lies_beside_stays() {
    let dir = tempfile::tempdir().unwrap();
    let beside = dir.path().join("a.safetensors.partial");
    std::fs::write(&beside, "mine").unwrap();
    save_safetensors(&dir.path().join("a.safetensors"), &one(1.0)).unwrap();
    assert_eq!(std::fs::read(&beside).unwrap(), b"mine");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
}

#[test]
fn what_ranks_cannot_exchange_is_refused() {
    let alone = Ranks::default();
    for to in [&[][..], &[2], &[1, 0]] {
        assert!(alone.exchange(&[1.0], to).is_err());
    }
    for to in [&[][..], &[5, 5], &[1], &[usize::MAX, 2]] {
        for outcome in Threads::run(2, |ranks| ranks.exchange(&[1.0], to)) {
            let error = outcome.unwrap_err().to_string();
            assert!(error.contains("cannot be sent to 2 ranks"), "{error}");
        }
    }
    for weights in [&[][..], &[1.0], &[1.0; 3]] {
        for outcome in Threads::run(2, |ranks| ranks.weighted_sum(&mut [1.0], weights)) {
            let error = outcome.unwrap_err().to_string();
            assert!(error.contains("values of 2 ranks"), "{error}");
        }
    }
    for outcome in Threads::run(2, |ranks| {
        let (mut model, mut optimizer, _) = trained(3);
        let ranks = ranks.clone().in_groups(2)?;
        parallel::whole(&ranks, &mut model, &mut optimizer)
    }) {
        says(outcome, "not divided");
    }
    for outcome in Threads::run(2, |ranks| {
        let (model, _, _) = trained(3);
        let mut pass = model.train_pass_at(&Place::Cpu, &[1, 2], &[2, 3], 2)?;
        parallel::reduce(ranks, &model, &mut pass, u64::MAX)
    }) {
        says(outcome, "64 bits");
    }
    for outcome in Threads::run(2, |ranks| ranks.of_first::<u32>(None)) {
        let error = outcome.unwrap_err().to_string();
        assert!(error.contains("nothing to hand out"), "{error}");
    }
}

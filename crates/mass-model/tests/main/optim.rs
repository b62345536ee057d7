//! Optimiser groups, schedules, accumulated gradients and averaged weights.

use std::collections::BTreeMap;

use mass_expand::{ExpertId, Moments};
use mass_model::growth::Mixtures;
use mass_model::lm::{LanguageModel, LanguageModelConfig};
use mass_model::nn::{BlockConfig, MoeConfig};
use mass_model::optim::{
    AdamW, AdamWConfig, Decay, Ema, GradientAccumulator, Group, Schedule, Select,
};
use mass_model::{Activation, CpuGradients, ModelError, Param, Parameters, seeded_rng};
use mass_routing::{Combine, RouterConfig};

const SEQ: usize = 8;

fn model() -> LanguageModel {
    let router = RouterConfig::TopP {
        p: 0.6,
        combine: Combine::Renormalised,
    };
    let moe = serde_json::json!({
        "dim": 12, "hidden": 10, "experts": 3,
        "activation": Activation::GeluErf, "router": router,
    });
    let moe: MoeConfig = serde_json::from_value(moe).unwrap();
    let config = LanguageModelConfig {
        vocab: 11,
        max_seq: SEQ,
        layers: 2,
        embedding_std: 0.02,
        block: BlockConfig {
            heads: 2,
            layer_norm_eps: 1e-5,
            moe,
        },
    };
    LanguageModel::new(&config, &mut seeded_rng(5)).unwrap()
}

/// Tokens and targets of `rows` sequences.
fn batch(rows: usize) -> (Vec<u32>, Vec<u32>) {
    let token = |i: usize| ((i * i + 3 * i) % 11) as u32;
    (
        (0..rows * SEQ).map(token).collect(),
        (1..=rows * SEQ).map(token).collect(),
    )
}

/// Named vectors and matrices.
struct Bag(Vec<(String, Param)>);

impl Bag {
    /// Matrices of ones under names that end in `weight` or `gate`, vectors of ones under the others.
    fn of(names: &[&str]) -> Self {
        let param = |name: &&str| {
            let matrix = name.ends_with("weight") || name.ends_with("gate");
            (name.to_string(), Param::ones(&[2, 3], matrix).unwrap())
        };
        Self(names.iter().map(param).collect())
    }

    fn values(&self) -> BTreeMap<String, Vec<f32>> {
        let mut all = BTreeMap::new();
        self.visit("", &mut |name, p| {
            all.insert(name, p.values().to_vec());
        });
        all
    }

    fn gradients(&self, value: f32) -> CpuGradients {
        let mut gradients = CpuGradients::leaky();
        for (_, p) in &self.0 {
            p.set_gradient(&mut gradients, vec![value; p.len()])
                .unwrap();
        }
        gradients
    }
}

impl Parameters for Bag {
    fn visit<'a>(&'a self, _: &str, f: &mut dyn FnMut(String, &'a Param)) {
        self.0.iter().for_each(|(name, p)| f(name.clone(), p));
    }
    fn visit_mut(&mut self, _: &str, f: &mut dyn FnMut(String, &mut Param)) {
        self.0.iter_mut().for_each(|(name, p)| f(name.clone(), p));
    }
}

fn group(select: Select, weight_decay: Option<f64>, lr_scale: Option<f64>) -> Group {
    Group {
        name: "a rule".into(),
        select,
        weight_decay,
        lr_scale,
    }
}

/// With a gradient of zero an update is decay alone: `θ (1 - lr λ)`, which tells λ.
fn decay_of(config: AdamWConfig, names: &[&str]) -> Vec<f64> {
    let mut bag = Bag::of(names);
    let mut gradients = bag.gradients(0.0);
    let lr = 0.5;
    AdamW::new(config)
        .unwrap()
        .step(&mut bag, &mut gradients, lr)
        .unwrap();
    let lambda = |p: &Param| ((1.0 - f64::from(p.values()[0])) / lr * 1e4).round() / 1e4;
    bag.0.iter().map(|(_, p)| lambda(p)).collect()
}

#[test]
fn groups_give_each_parameter_the_decay_of_the_first_rule_that_speaks_of_it() {
    let names = [
        "blocks.1.fc1.weight",
        "blocks.1.fc1.bias",
        "blocks.10.fc1.weight",
        "gate",
        "other_gate",
    ];
    let base = AdamWConfig {
        weight_decay: 0.1,
        ..AdamWConfig::default()
    };
    let with = |groups| AdamWConfig {
        groups,
        ..base.clone()
    };
    assert_eq!(decay_of(base.clone(), &names), [0.1, 0.0, 0.1, 0.1, 0.1]);
    assert_eq!(
        decay_of(base.clone().decaying_everything(), &names),
        [0.1; 5]
    );
    let prefix = Select::Prefix("blocks.1".into());
    assert_eq!(
        decay_of(with(vec![group(prefix.clone(), Some(0.3), None)]), &names),
        [0.3, 0.3, 0.1, 0.1, 0.1]
    );
    assert_eq!(
        decay_of(
            with(vec![group(Select::Suffix("gate".into()), Some(0.0), None)]),
            &names
        ),
        [0.1, 0.0, 0.1, 0.0, 0.1]
    );
    let several = Select::AnyOf(vec![Select::Vectors, Select::Contains("_ga".into())]);
    assert_eq!(
        decay_of(with(vec![group(several, Some(0.2), None)]), &names),
        [0.1, 0.2, 0.1, 0.1, 0.2]
    );
    // The first rule that speaks of decay wins; one that only speaks of the learning rate leaves decay open. A factor of
    // two on the learning rate doubles what decay takes off.
    let rules = vec![
        group(prefix, None, Some(2.0)),
        group(Select::Matrices, Some(0.4), None),
        group(Select::All, Some(0.05), None),
    ];
    assert_eq!(decay_of(with(rules), &names), [0.8, 0.1, 0.4, 0.4, 0.4]);
}

#[test]
fn a_learning_rate_factor_scales_the_update_and_zero_freezes() {
    let names = ["a.weight", "b.weight", "c.weight"];
    // Betas that f32 holds exactly.
    let config = AdamWConfig {
        beta1: 0.5,
        beta2: 0.75,
        weight_decay: 0.0,
        groups: vec![
            group(Select::Prefix("b".into()), None, Some(0.25)),
            group(Select::Prefix("c".into()), None, Some(0.0)),
        ],
        ..AdamWConfig::default()
    };
    let mut bag = Bag::of(&names);
    let mut gradients = bag.gradients(3.0);
    let mut optimizer = AdamW::new(config).unwrap();
    let norm = optimizer.step(&mut bag, &mut gradients, 0.5).unwrap();
    assert!((norm - 3.0 * 18f64.sqrt()).abs() < 1e-6, "{norm}");
    let moved: Vec<f32> = bag.0.iter().map(|(_, p)| 1.0 - p.values()[0]).collect();
    // The first update of Adam is the learning rate, whatever the gradient.
    assert!((moved[0] - 0.5).abs() < 1e-6, "{moved:?}");
    assert!((moved[1] - 0.125).abs() < 1e-6, "{moved:?}");
    assert_eq!(moved[2], 0.0);
}

#[test]
fn settings_that_are_no_numbers_are_refused_by_name() {
    let of = |groups| AdamWConfig {
        groups,
        ..AdamWConfig::default()
    };
    let cases = [
        (
            AdamWConfig {
                beta2: 1.0,
                ..AdamWConfig::default()
            },
            "beta2",
        ),
        (
            AdamWConfig {
                eps: f64::NAN,
                ..AdamWConfig::default()
            },
            "eps",
        ),
        (
            // Zero in f32.
            AdamWConfig {
                eps: 1e-50,
                ..AdamWConfig::default()
            },
            "eps",
        ),
        (
            of(vec![group(Select::All, Some(-1.0), None)]),
            "\"a rule\": weight decay",
        ),
        (
            of(vec![group(Select::All, None, Some(f64::INFINITY))]),
            "\"a rule\": learning-rate factor",
        ),
    ];
    for (config, part) in cases {
        let error = AdamW::new(config).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
    let mut bag = Bag::of(&["a.weight"]);
    let before = bag.values();
    let mut gradients = bag.gradients(1.0);
    let mut optimizer = AdamW::new(AdamWConfig::default()).unwrap();
    assert!(matches!(
        optimizer.step(&mut bag, &mut gradients, f64::NAN),
        Err(ModelError::NonFinite(_))
    ));
    assert_eq!(bag.values(), before);
    // Moments of another size: restored from elsewhere.
    optimizer.step(&mut bag, &mut gradients, 0.1).unwrap();
    let mut gradients = bag.gradients(1.0);
    let before = bag.values();
    let mut state = optimizer.state().clone();
    let s = state.get_mut("a.weight").unwrap();
    s.m.pop();
    assert!(optimizer.restore(state.clone()).is_err());
    state.get_mut("a.weight").unwrap().v.pop();
    optimizer.restore(state).unwrap();
    let error = optimizer.step(&mut bag, &mut gradients, 0.1).unwrap_err();
    assert!(error.to_string().contains("moments of a.weight"), "{error}");
    assert_eq!(bag.values(), before);
}

#[test]
fn settings_that_f32_cannot_hold_are_refused_before_anything_changes() {
    for (lr, decay, lr_scale, what) in [
        (1e-3, None, Some(1e300), "learning rate of b"),
        (1e300, None, None, "learning rate of a"),
        (1e-3, Some(1e300), None, "weight decay of b"),
    ] {
        let mut model = Bag::of(&["a", "b"]);
        let before = model.values();
        let groups = vec![group(Select::Prefix("b".into()), decay, lr_scale)];
        let config = AdamWConfig {
            groups,
            ..AdamWConfig::default()
        };
        let mut optimizer = AdamW::new(config).unwrap();
        let mut gradients = model.gradients(1.0);
        let refused = optimizer.step(&mut model, &mut gradients, lr);
        let error = refused.unwrap_err();
        assert!(matches!(error, ModelError::Config(_)), "{error}");
        assert!(error.to_string().contains(what), "{error}");
        assert_eq!(model.values(), before);
        assert!(optimizer.state().is_empty());
        // The gradients are still there.
        let mut plain = AdamW::new(AdamWConfig::default()).unwrap();
        plain.step(&mut model, &mut gradients, 1e-3).unwrap();
    }
}

#[test]
fn clipping_scales_all_gradients_by_their_common_norm() {
    // With beta1 = 0 and a huge eps, the update is lr g / eps: it shows the gradient used.
    let config = AdamWConfig {
        beta1: 0.0,
        beta2: 0.0,
        eps: 1e6,
        weight_decay: 0.0,
        clip_norm: Some(1.0),
        groups: Vec::new(),
    };
    for (value, used) in [(2.0f32, 1.0 / 12f64.sqrt()), (0.01, 0.01)] {
        let mut bag = Bag::of(&["a.weight", "b.bias"]);
        let mut gradients = bag.gradients(value);
        let norm = AdamW::new(config.clone())
            .unwrap()
            .step(&mut bag, &mut gradients, 1e5)
            .unwrap();
        assert!((norm - f64::from(value) * 12f64.sqrt()).abs() < 1e-5);
        for (_, p) in &bag.0 {
            let moved = (1.0 - f64::from(p.values()[0])) * 10.0;
            assert!((moved - used).abs() < 1e-5, "{moved} instead of {used}");
        }
    }
}

/// Squares that f32 rounds to zero or to subnormal numbers.
#[test]
fn tiny_gradients_have_their_norm() {
    for value in [0.0, 1e-30, 1e-23, 1e-22, 1e-19, 1e-15_f32] {
        let mut bag = Bag::of(&["a.weight"]);
        let mut gradients = bag.gradients(value);
        let mut optimizer = AdamW::new(AdamWConfig::default()).unwrap();
        let norm = optimizer.step(&mut bag, &mut gradients, 0.1).unwrap();
        let exact = f64::from(value) * 6f64.sqrt();
        assert!((norm - exact).abs() <= 1e-6 * exact, "{norm} for {exact}");
    }
}

#[test]
fn schedules_warm_up_alike_and_end_at_their_floor() {
    let linear = Schedule {
        peak: 0.4,
        warmup: 10,
        steps: 110,
        floor: 0.25,
        decay: Decay::Linear,
    };
    let cosine = Schedule {
        decay: Decay::Cosine,
        ..linear
    };
    let constant = Schedule {
        decay: Decay::Constant,
        ..linear
    };
    for s in [linear, cosine, constant] {
        s.check().unwrap();
        assert!((s.at(0) - 0.04).abs() < 1e-12);
        assert!((s.at(9) - 0.4).abs() < 1e-12);
        assert!((s.at(10) - 0.4).abs() < 1e-12);
        let end = if s.decay == Decay::Constant { 0.4 } else { 0.1 };
        for t in [110, 111, u64::MAX] {
            assert!((s.at(t) - end).abs() < 1e-12, "{s:?} at {t}");
        }
        for t in 10..110 {
            assert!(s.at(t + 1) <= s.at(t));
        }
    }
    // A quarter of the way: three quarters of the line, (1 + cos 45°)/2 of the cosine.
    assert!((linear.at(35) - 0.4 * (1.0 - 0.75 * 0.25)).abs() < 1e-12);
    let part = (1.0 + (0.5f64).sqrt()) / 2.0;
    assert!((cosine.at(35) - 0.4 * (0.25 + 0.75 * part)).abs() < 1e-12);
    let bad = [
        Schedule {
            peak: f64::NAN,
            ..linear
        },
        // Its warm-up is infinite.
        Schedule {
            peak: 1e308,
            ..linear
        },
        Schedule {
            floor: 1.5,
            ..linear
        },
        Schedule {
            warmup: 111,
            ..linear
        },
    ];
    for s in bad {
        assert!(matches!(s.check(), Err(ModelError::Config(_))), "{s:?}");
    }
    let old = r#"{"peak":0.1,"warmup":1,"steps":2,"floor":0.5}"#;
    assert_eq!(
        serde_json::from_str::<Schedule>(old).unwrap().decay,
        Decay::Linear
    );
}

fn all_gradients(
    model: &LanguageModel,
    gradients: &mut CpuGradients,
) -> BTreeMap<String, Vec<f32>> {
    let mut all = BTreeMap::new();
    model.visit("", &mut |name, p| {
        all.insert(name, p.gradient(gradients).unwrap().clone());
    });
    all
}

#[test]
fn micro_batches_of_unequal_size_give_the_gradient_of_the_whole_batch() {
    let model = model();
    let (tokens, targets) = batch(6);
    let mut whole = model.train_pass(&tokens, &targets, SEQ).unwrap();
    let whole = all_gradients(&model, &mut whole.gradients);
    let mut accumulator = GradientAccumulator::new();
    let mut last = None;
    for rows in [0..1, 1..4, 4..6] {
        let range = rows.start * SEQ..rows.end * SEQ;
        let mut pass = model
            .train_pass(&tokens[range.clone()], &targets[range.clone()], SEQ)
            .unwrap();
        accumulator
            .add(&model, &mut pass.gradients, range.len() as f64)
            .unwrap();
        last = Some(pass);
    }
    assert_eq!(accumulator.batches(), 3);
    let mut pass = last.unwrap();
    accumulator.mean_into(&model, &mut pass.gradients).unwrap();
    assert_eq!(accumulator.batches(), 0);
    let mean = all_gradients(&model, &mut pass.gradients);
    for (name, want) in &whole {
        let largest = want.iter().fold(0.0f32, |m, x| m.max(x.abs()));
        assert!(largest > 0.0, "{name}");
        for (got, want) in mean[name].iter().zip(want) {
            assert!(
                (got - want).abs() <= 1e-5 * largest,
                "{name}: {got} instead of {want}"
            );
        }
    }
    // One micro-batch alone passes through unchanged.
    let mut pass = model.train_pass(&tokens, &targets, SEQ).unwrap();
    accumulator.add(&model, &mut pass.gradients, 7.0).unwrap();
    accumulator.mean_into(&model, &mut pass.gradients).unwrap();
    assert_eq!(all_gradients(&model, &mut pass.gradients), whole);
}

#[test]
fn an_accumulator_follows_a_parameter_set_that_changes() {
    let mut bag = Bag::of(&["a.weight", "b.weight"]);
    let mut accumulator = GradientAccumulator::new();
    let mut gradients = bag.gradients(4.0);
    assert!(accumulator.mean_into(&bag, &mut gradients).is_err());
    for weight in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        assert!(accumulator.add(&bag, &mut gradients, weight).is_err());
    }
    accumulator.add(&bag, &mut gradients, 1.0).unwrap();
    bag.0.remove(1);
    bag.0
        .push(("c.weight".into(), Param::ones(&[1], true).unwrap()));
    let mut gradients = bag.gradients(8.0);
    accumulator.add(&bag, &mut gradients, 1.0).unwrap();
    accumulator.mean_into(&bag, &mut gradients).unwrap();
    let mut mean = |i: usize| bag.0[i].1.gradient(&mut gradients).unwrap().clone();
    assert_eq!(mean(0), [6.0; 6]);
    assert_eq!(mean(1), [4.0]);
    accumulator.add(&bag, &mut gradients, 1.0).unwrap();
    bag.0[1].1 = Param::ones(&[2], true).unwrap();
    let error = accumulator.add(&bag, &mut gradients, 1.0).unwrap_err();
    assert!(error.to_string().contains("c.weight"), "{error}");
}

#[test]
fn averages_follow_a_pool_that_changes_and_swap_out_again() {
    let mut model = model();
    let mut ema = Ema::new(0.9).unwrap();
    ema.update(&model).unwrap();
    let first = model.head.weight.values().to_vec();
    model
        .head
        .weight
        .values_mut()
        .iter_mut()
        .for_each(|x| *x += 1.0);
    ema.update(&model).unwrap();
    for (s, x) in ema.shadow()["head.weight"].iter().zip(&first) {
        assert!((s - (x + 0.1)).abs() < 1e-6, "{s} and {x}");
    }

    // An expert comes, with its own values or its source's average; another goes.
    let source = model.mixture(0).experts()[0].clone();
    let new = model.mixture_mut(0).push(source).unwrap();
    model.mixture_mut(0).remove(ExpertId(1)).unwrap();
    let name = |id: ExpertId| format!("blocks.0.moe.experts.{}", id.0);
    model
        .mixture_mut(0)
        .expert_mut(new)
        .unwrap()
        .gate
        .values_mut()[0] = 50.0;
    let mut adopting = ema.clone();
    adopting.adopt(&name(ExpertId(0)), &name(new));
    let gate = format!("{}.gate", name(new));
    assert_eq!(
        adopting.shadow()[&gate],
        ema.shadow()["blocks.0.moe.experts.0.gate"]
    );
    ema.update(&model).unwrap();
    assert_eq!(ema.shadow()[&gate][0], 50.0);
    assert!(
        !ema.shadow()
            .keys()
            .any(|k| k.starts_with(&name(ExpertId(1))))
    );

    // In for evaluation and out again, to the bit.
    let before = model.head.weight.values().to_vec();
    let averages = ema.shadow()["head.weight"].clone();
    let seen = ema
        .evaluate(&mut model, |m| m.head.weight.values().to_vec())
        .unwrap();
    assert_eq!(seen, averages);
    assert_eq!(model.head.weight.values(), before);
    assert_eq!(ema.shadow()["head.weight"], averages);
    ema.swap(&mut model).unwrap();
    assert!(ema.is_swapped());
    assert!(ema.update(&model).is_err());
    assert!(ema.evaluate(&mut model, |_| ()).is_err());
    ema.swap(&mut model).unwrap();
    ema.update(&model).unwrap();

    for decay in [-0.1, 1.0, f64::NAN] {
        assert!(matches!(Ema::new(decay), Err(ModelError::Config(_))));
    }
    model.norm.bias = Param::zeros(&[3], false).unwrap();
    let error = ema.update(&model).unwrap_err();
    assert!(error.to_string().contains("norm.bias"), "{error}");
}

#[test]
fn a_newcomer_inherits_moments_or_starts_without() {
    let mut bag = Bag::of(&["experts.1.gate", "experts.10.gate"]);
    let mut optimizer = AdamW::new(AdamWConfig::default()).unwrap();
    let mut gradients = bag.gradients(1.0);
    optimizer.step(&mut bag, &mut gradients, 0.1).unwrap();
    optimizer.adopt("experts.1", "experts.2", Moments::Inherit);
    let state = optimizer.state();
    assert_eq!(state["experts.2.gate"], state["experts.1.gate"]);
    assert_eq!(state.len(), 3);
    optimizer.adopt("experts.1", "experts.2", Moments::Zero);
    assert!(!optimizer.state().contains_key("experts.2.gate"));
    optimizer.forget("experts.1");
    assert!(optimizer.state().contains_key("experts.10.gate"));
    assert_eq!(optimizer.state().len(), 1);
}

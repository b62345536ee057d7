//! Layers of this crate as parts of dfdx models.

use std::collections::BTreeMap;

use dfdx::nn::modules::{
    AddInto, GeneralizedResidual, Linear, ReLU, Repeated, Residual, SplitInto,
};
use dfdx::optim::{Adam, AdamConfig};
use dfdx::prelude::*;
use mass_expand::{BisectParams, SplitOperator};
use mass_model::growth::split_expert;
use mass_model::nn::{self, FeedForward, MoeConfig, MoeLayer};
use mass_model::optim::{AdamW, AdamWConfig, GradientAccumulator};
use mass_model::{
    Activation, CpuGradients, LayerTrace, ModelError, Param, Parameters, last_error, seeded_rng,
};
use mass_routing::{Combine, RouterConfig};

const D: usize = 8;

type X = Tensor<(usize, Const<D>), f32, Cpu>;

fn moe(seed: u64) -> MoeLayer {
    let router = RouterConfig::TopP {
        p: 0.6,
        combine: Combine::Renormalised,
    };
    let config = MoeConfig::new(D, 12, 3, Activation::GeluErf, router);
    MoeLayer::new(&config, &mut seeded_rng(seed)).unwrap()
}

fn head<const I: usize, const O: usize>(dev: &Cpu) -> Linear<I, O, f32, Cpu> {
    dev.build_module::<dfdx::nn::builders::Linear<I, O>, f32>()
}

fn input(dev: &Cpu, rows: usize) -> X {
    dev.sample_normal_like(&(rows, Const::<D>))
}

/// Bits of every gradient, `None` where there is none.
fn bits<M: Parameters>(model: &M, g: &mut CpuGradients) -> BTreeMap<String, Option<Vec<u32>>> {
    let mut all = BTreeMap::new();
    model.visit("", &mut |name, p| {
        let found = p.find_gradient(g).unwrap();
        all.insert(name, found.map(|g| g.iter().map(|x| x.to_bits()).collect()));
    });
    all
}

fn assert_some_and_not_zero(all: &BTreeMap<String, Option<Vec<u32>>>) {
    assert!(!all.is_empty());
    let none = all.iter().find(|(_, bits)| bits.is_none());
    assert_eq!(none, None);
    // An expert may be without tokens.
    let of = |bits: &Vec<u32>| bits.iter().filter(|&&b| f32::from_bits(b) != 0.0).count();
    let (nonzero, every) = all
        .values()
        .flatten()
        .fold((0, 0), |(n, e), bits| (n + of(bits), e + bits.len()));
    assert!(2 * nonzero > every, "{nonzero} of {every} are not zero");
}

#[test]
fn gradients_are_the_same_whoever_named_the_leaves() {
    let dev = Cpu::default();
    let x = input(&dev, 20);
    let (below, layer, above) = (head::<D, D>(&dev), moe(1), head::<D, 3>(&dev));
    let loss = |x: Tensor<(usize, Const<D>), f32, Cpu, OwnedTape<f32, Cpu>>| {
        let h = layer.try_forward(below.forward(x)).unwrap();
        above.forward(h).square().mean()
    };
    let mut leaky = loss(x.leaky_trace()).backward();
    let expected = bits(&layer, &mut leaky);
    assert_some_and_not_zero(&expected);
    let roads = [
        above.alloc_grads(),
        below.alloc_grads(),
        (below.clone(), above.clone()).alloc_grads(),
        CpuGradients::leaky(),
    ];
    for (road, gradients) in roads.into_iter().enumerate() {
        let mut g = loss(x.clone().trace(gradients)).backward();
        assert_eq!(bits(&layer, &mut g), expected, "road {road}");
        if road != 1 {
            assert_eq!(
                g.get(&above.weight).array(),
                leaky.get(&above.weight).array()
            );
        }
        if road != 0 {
            assert_eq!(
                g.get(&below.weight).array(),
                leaky.get(&below.weight).array()
            );
        }
    }
}

/// Every kind of layer and gate, below and above dfdx's own.
#[test]
fn every_layer_keeps_its_gradients() {
    let dev = Cpu::default();
    let rng = &mut seeded_rng(4);
    let cosine = serde_json::json!({
        "dim": D, "hidden": 6, "experts": 3, "activation": "silu", "gated": true, "shared_hidden": 4,
        "router": { "router": "top_any", "experts": 3 },
        "gate": { "gate": "cosine", "projection": 5, "temperature": 0.5 },
    });
    let cosine: MoeConfig = serde_json::from_value(cosine).unwrap();
    let cosine = MoeLayer::new(&cosine, rng).unwrap();
    let norm = nn::LayerNorm::new(D, 1e-5).unwrap();
    let network = FeedForward::new(D, 6, Activation::Silu, true, rng).unwrap();
    let linear = nn::Linear::new(D, D, true, rng).unwrap();
    let above = head::<D, 3>(&dev);
    let x = input(&dev, 9);
    let run = |gradients: CpuGradients| {
        let h = linear.try_forward(x.clone().trace(gradients)).unwrap();
        let h = norm.try_forward(h).unwrap();
        let h = network.try_forward(h).unwrap();
        let h = cosine.try_forward(h).unwrap();
        let h: Tensor<(usize, Const<D>), f32, Cpu, _> = h.reshape_like(&(9, Const));
        let mut g = above.forward(h).square().mean().backward();
        [
            bits(&linear, &mut g),
            bits(&norm, &mut g),
            bits(&network, &mut g),
            bits(&cosine, &mut g),
        ]
    };
    let expected = run(CpuGradients::leaky());
    // Only an expert that no token chose may be without.
    let found = |of_an_expert: bool| {
        let all = expected.iter().flatten();
        let of = all.filter(move |(name, _)| name.starts_with("experts.") == of_an_expert);
        of.map(|(_, g)| g.is_some())
    };
    assert!(found(false).all(|found| found) && found(true).any(|found| found));
    assert_eq!(run(above.alloc_grads()), expected);
}

/// dfdx's documented loop: one set of gradients, zeroed after each step.
#[test]
fn dfdx_optimises_its_layers_and_ours_the_mixture() {
    let dev = Cpu::seed_from_u64(3);
    let mut model = (head::<D, D>(&dev), moe(2), head::<D, 1>(&dev));
    let x = input(&dev, 64);
    let target = x
        .clone()
        .slice((.., ..1))
        .square()
        .realize::<(usize, Const<1>)>();
    let mut adam = Adam::new(&model, AdamConfig::default());
    let mut adamw = AdamW::new(AdamWConfig::default()).unwrap();
    let mut gradients = model.alloc_grads();
    let (mut losses, mut accumulated) = (Vec::new(), Vec::new());
    for _ in 0..60 {
        let before = model.1.clone();
        let y = model.forward_mut(x.clone().trace(gradients));
        let loss = (y - target.clone()).square().mean();
        losses.push(loss.array());
        gradients = loss.backward();
        adam.update(&mut model, &gradients).unwrap();
        let norm = adamw.step(&mut model.1, &mut gradients, 1e-2).unwrap();
        assert!(norm > 0.0);
        model.zero_grads(&mut gradients);
        accumulated.push(bits(&model.1, &mut gradients));
        let moved = |a: &Param, b: &Param| a.values() != b.values();
        for (a, b) in before.experts().iter().zip(model.1.experts()) {
            assert!(moved(&a.gate, &b.gate) && moved(&a.network.fc1.0, &b.network.fc1.0));
        }
    }
    assert!(losses[59] < 0.5 * losses[0], "{losses:?}");
    // What the optimiser used up is gone.
    let left = accumulated.iter().flat_map(|step| step.values());
    assert!(left.into_iter().all(Option::is_none));
}

/// Two backward passes without an optimiser between them add up, as dfdx's own gradients do.
#[test]
fn gradients_add_up_over_passes() {
    let dev = Cpu::default();
    let (layer, above) = (moe(5), head::<D, 2>(&dev));
    let x = input(&dev, 12);
    let pass = |g: CpuGradients| {
        let h = layer.try_forward(x.clone().trace(g)).unwrap();
        above.forward(h).square().mean().backward()
    };
    let mut once = pass(above.alloc_grads());
    let mut twice = pass(pass(above.alloc_grads()));
    layer.visit("", &mut |name, p| {
        let (one, two) = (
            p.gradient(&mut once).unwrap(),
            p.gradient(&mut twice).unwrap(),
        );
        for (one, two) in one.iter().zip(two) {
            assert!(
                (2.0 * one - *two).abs() <= 1e-5 * one.abs().max(1e-3),
                "{name}"
            );
        }
    });
    assert!(
        (once.get(&above.weight) * 2.0 - twice.get(&above.weight))
            .abs()
            .sum::<Rank0, _>()
            .array()
            < 1e-4
    );
}

/// A newcomer is no leaf of the gradients that came before it, and becomes one.
#[test]
fn an_expert_that_joins_keeps_its_gradient() {
    let dev = Cpu::default();
    let (mut layer, above) = (moe(6), head::<D, 2>(&dev));
    let x = input(&dev, 16);
    let pass = |layer: &MoeLayer, g: CpuGradients, traces: &mut Vec<LayerTrace>| {
        let h = layer
            .forward_traced(x.clone().trace(g), None, traces)
            .unwrap();
        above.forward(h).square().mean().backward()
    };
    let mut traces = Vec::new();
    let mut gradients = pass(&layer, above.alloc_grads(), &mut traces);
    let source = layer.ids()[0];
    split_expert(
        &mut layer,
        source,
        SplitOperator::Bisect(BisectParams::default()),
        &traces[0],
        &mut gradients,
    )
    .unwrap();
    let newcomer = layer.experts()[3].clone();
    assert!(
        layer.experts()[3]
            .network
            .fc1
            .0
            .find_gradient(&mut gradients)
            .unwrap()
            .is_some()
    );
    AdamW::new(AdamWConfig::default())
        .unwrap()
        .step(&mut layer, &mut gradients, 1e-2)
        .unwrap();
    above.zero_grads(&mut gradients);
    let mut gradients = pass(&layer, gradients, &mut Vec::new());
    assert_some_and_not_zero(&bits(&layer, &mut gradients));
    assert_ne!(
        layer.experts()[3].network.fc1.0.values(),
        newcomer.network.fc1.0.values()
    );
}

#[test]
fn a_gradient_that_was_never_written_is_not_zero() {
    let mut layer = moe(7);
    let mut optimizer = AdamW::new(AdamWConfig::default()).unwrap();
    let fc1 = |layer: &MoeLayer| layer.experts()[0].network.fc1.0.values().to_vec();
    let before = fc1(&layer);
    let mut none = CpuGradients::leaky();
    let refused = optimizer.step(&mut layer, &mut none, 1e-2).unwrap_err();
    assert!(matches!(&refused, ModelError::NoGradient(_)), "{refused}");
    assert!(refused.to_string().contains("has no gradient"), "{refused}");
    let param = &layer.experts()[0].network.fc1.0;
    assert!(matches!(
        param.gradient(&mut none),
        Err(ModelError::NoGradient(_))
    ));
    assert!(param.find_gradient(&mut none).unwrap().is_none());
    // A parameter of one value has a mark that is no gradient either.
    let one = Param::zeros(&[1], false).unwrap();
    assert!(one.find_gradient(&mut none).unwrap().is_none());
    one.set_gradient(&mut none, vec![0.0]).unwrap();
    assert_eq!(one.gradient(&mut none).unwrap(), &[0.0]);
    one.clear_gradient(&mut none).unwrap();
    assert!(one.find_gradient(&mut none).unwrap().is_none());
    assert!(matches!(
        one.set_gradient(&mut none, vec![0.0; 2]),
        Err(ModelError::Shape { .. })
    ));
    assert_eq!((fc1(&layer), optimizer.state().len()), (before, 0));

    // One expert has one: the others stay as they are.
    let mut some = CpuGradients::leaky();
    let fc1 = &layer.experts()[1].network.fc1.0;
    fc1.set_gradient(&mut some, vec![1.0; fc1.len()]).unwrap();
    let before = layer.clone();
    optimizer.step(&mut layer, &mut some, 1e-2).unwrap();
    let names: Vec<_> = optimizer.state().keys().cloned().collect();
    assert_eq!(names, ["experts.1.fc1.weight"]);
    assert_eq!(
        layer.experts()[0].network.fc1.0.values(),
        before.experts()[0].network.fc1.0.values()
    );
    assert_ne!(
        layer.experts()[1].network.fc1.0.values(),
        before.experts()[1].network.fc1.0.values()
    );
    // And it has been used up.
    assert!(matches!(
        optimizer.step(&mut layer, &mut some, 1e-2),
        Err(ModelError::NoGradient(_))
    ));

    // In the mean over micro-batches what is missing everywhere stays missing, and counts as zero where others have it.
    let mut accumulator = GradientAccumulator::new();
    for value in [None, Some(4.0)] {
        let mut batch = CpuGradients::leaky();
        let (a, b) = (&layer.experts()[0].gate, &layer.experts()[1].gate);
        a.set_gradient(&mut batch, vec![1.0; D]).unwrap();
        if let Some(value) = value {
            b.set_gradient(&mut batch, vec![value; D]).unwrap();
        }
        accumulator.add(&layer, &mut batch, 1.0).unwrap();
    }
    let mut mean = CpuGradients::leaky();
    accumulator.mean_into(&layer, &mut mean).unwrap();
    assert_eq!(
        layer.experts()[0].gate.gradient(&mut mean).unwrap(),
        &[1.0; D]
    );
    assert_eq!(
        layer.experts()[1].gate.gradient(&mut mean).unwrap(),
        &[2.0; D]
    );
    assert!(
        layer.experts()[2]
            .gate
            .find_gradient(&mut mean)
            .unwrap()
            .is_none()
    );
}

#[test]
fn layers_are_parts_of_dfdx_models() {
    let dev = Cpu::default();
    let x = input(&dev, 5);
    let same = |y: &X, z: &X| assert_eq!(y.as_vec(), z.as_vec());
    let (a, b) = (moe(8), moe(9));
    let alone = Module::forward(&a, x.clone());

    let linear = head::<D, D>(&dev);
    let chain = (linear.clone(), moe(8));
    same(
        &chain.forward(x.clone()),
        &Module::forward(&a, linear.forward(x.clone())),
    );
    let chain = (moe(8), ReLU, head::<D, 2>(&dev));
    assert_eq!(*chain.forward(x.clone()).shape(), (5, Const::<2>));
    assert_eq!(chain.num_trainable_params(), D * 2 + 2);

    let residual = Residual(moe(8));
    same(&residual.forward(x.clone()), &(alone.clone() + x.clone()));
    let nested = Residual((head::<D, D>(&dev), Residual((moe(8), moe(9)))));
    assert_eq!(*nested.forward(x.clone()).shape(), (5, Const::<D>));
    let repeated = Repeated::<MoeLayer, 2> {
        modules: vec![moe(8), moe(9)],
    };
    same(
        &repeated.forward(x.clone()),
        &Module::forward(&b, alone.clone()),
    );
    let both = GeneralizedResidual {
        f: moe(8),
        r: head::<D, D>(&dev),
    };
    same(
        &both.forward(x.clone()),
        &(alone.clone() + both.r.forward(x.clone())),
    );
    let (left, right) = SplitInto((moe(8), moe(9))).forward(x.clone());
    same(&left, &alone);
    same(&right, &Module::forward(&b, x.clone()));
    let sum = AddInto((moe(8), head::<D, D>(&dev))).forward((x.clone(), x.clone()));
    assert_eq!(*sum.shape(), (5, Const::<D>));

    // Under a tape, to be changed, and with every gradient reached.
    let mut deep = (
        Residual((head::<D, D>(&dev), moe(8))),
        nn::LayerNorm::new(D, 1e-5).unwrap(),
        Residual(FeedForward::new(D, 6, Activation::Relu, false, &mut seeded_rng(1)).unwrap()),
        moe(9),
        head::<D, 2>(&dev),
    );
    let (gradients, x) = (deep.alloc_grads(), input(&dev, 64));
    let mut g = deep
        .forward_mut(x.trace(gradients))
        .square()
        .mean()
        .backward();
    assert_some_and_not_zero(&bits(&deep.0.0.1, &mut g));
    assert_some_and_not_zero(&bits(&deep.1, &mut g));
    assert_some_and_not_zero(&bits(&deep.3, &mut g));
    assert_ne!(g.get(&deep.0.0.0.weight).array(), [[0.0; D]; D]);
}

#[test]
fn a_layer_works_on_the_last_axis() {
    let dev = Cpu::default();
    let (layer, linear) = (
        moe(3),
        nn::Linear::new(D, 5, true, &mut seeded_rng(0)).unwrap(),
    );
    let rows: Tensor<(usize, usize), f32, Cpu> = dev.sample_normal_like(&(6, D));
    let (y, z) = (
        layer.try_forward(rows.clone()).unwrap(),
        linear.try_forward(rows.clone()).unwrap(),
    );
    let cube = rows.clone().reshape_like(&(2, 3, Const::<D>));
    let out = layer.try_forward(cube.clone()).unwrap();
    assert_eq!(
        (*out.shape(), out.as_vec()),
        ((2, 3, Const::<D>), y.as_vec())
    );
    let out = linear.try_forward(cube).unwrap();
    assert_eq!((*out.shape(), out.as_vec()), ((2, 3, 5), z.as_vec()));
    let fixed: Tensor<Rank2<6, D>, f32, Cpu> = rows.clone().realize();
    assert_eq!(layer.try_forward(fixed).unwrap().as_vec(), y.as_vec());
    let one: Tensor<Rank1<D>, f32, Cpu> =
        dev.tensor_from_vec(rows.as_vec()[..D].to_vec(), (Const,));
    assert_eq!(linear.try_forward(one).unwrap().as_vec(), z.as_vec()[..5]);
    // A view that is not contiguous.
    let turned: Tensor<(usize, usize), f32, Cpu> = dev.sample_normal_like(&(D, 6));
    let turned = turned.permute::<(usize, usize), Axes2<1, 0>>();
    let plain = dev.tensor_from_vec(turned.as_vec(), (6, D));
    let (a, b) = (layer.try_forward(turned), layer.try_forward(plain));
    assert_eq!(a.unwrap().as_vec(), b.unwrap().as_vec());
}

#[test]
fn what_a_layer_refused_inside_a_model_is_known() {
    let dev = Cpu::default();
    let model = (head::<4, 4>(&dev), moe(0));
    let x: Tensor<(usize, Const<4>), f32, Cpu> = dev.zeros_like(&(3, Const));
    assert!(last_error().is_none());
    assert!(model.try_forward(x).is_err());
    let refused = last_error().unwrap();
    assert!(matches!(refused, ModelError::Shape { .. }), "{refused}");
    assert!(last_error().is_none());
    let nan: X = dev.tensor_from_vec(vec![f32::NAN; 2 * D], (2, Const));
    assert!(Residual(moe(0)).try_forward(nan).is_err());
    assert!(matches!(last_error(), Some(ModelError::Routing(_))));
    let point: Tensor<(), f32, Cpu> = dev.zeros();
    assert!(matches!(
        moe(0).try_forward(point),
        Err(ModelError::Shape { .. })
    ));
}

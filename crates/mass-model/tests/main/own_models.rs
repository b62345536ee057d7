//! Models of one's own: their parameters, mixtures, growth, checkpoints and plain files.

use dfdx::prelude::*;
use mass_expand::{ControllerParams, EventKind, Reduction, Trigger};
use mass_model::checkpoint::{
    self, CheckpointError, Checkpointed, Snapshot, load_safetensors, save_safetensors,
};
use mass_model::growth::{GradientNorm, Grower, GrowerConfig, Mixtures};
use mass_model::nn::{FeedForward, LayerNorm, Linear, MoeConfig, MoeLayer};
use mass_model::optim::{AdamW, AdamWConfig};
use mass_model::{
    Activation, ModelError, Param, Parameters, TrainPass, mixtures, ops, parameters, seeded_rng,
};
use mass_routing::{Combine, RouterConfig};

const D: usize = 6;

fn config() -> MoeConfig {
    let router = RouterConfig::TopP {
        p: 0.6,
        combine: Combine::Renormalised,
    };
    MoeConfig::new(D, 8, 2, Activation::GeluErf, router)
}

struct Deep {
    first: Linear,
    layers: Vec<MoeLayer>,
    extra: Option<MoeLayer>,
    norm: LayerNorm,
    scale: Param,
    inner: Vec<Inner>,
}

struct Inner {
    network: FeedForward,
    mixture: MoeLayer,
}

parameters!(Inner { network as "", mixture as "moe" });
mixtures!(Inner { mixture as "moe" });
parameters!(Deep { first, layers, extra, norm as "last.norm", scale, inner });
mixtures!(Deep {
    layers,
    extra,
    inner
});

fn deep(extra: bool) -> Deep {
    let rng = &mut seeded_rng(0);
    let mut moe = || MoeLayer::new(&config(), &mut seeded_rng(1)).unwrap();
    Deep {
        first: Linear::new(D, D, false, rng).unwrap(),
        layers: vec![moe(), moe()],
        extra: extra.then(&mut moe),
        norm: LayerNorm::new(D, 1e-5).unwrap(),
        scale: Param::ones(&[D], false).unwrap(),
        inner: vec![Inner {
            network: FeedForward::new(D, 4, Activation::Relu, false, rng).unwrap(),
            mixture: moe(),
        }],
    }
}

#[test]
fn a_struct_names_its_parameters_and_mixtures() {
    for extra in [false, true] {
        let mut model = deep(extra);
        let mut names = Vec::new();
        model.visit("", &mut |name, _| names.push(name));
        let mut changed = Vec::new();
        model.visit_mut("", &mut |name, _| changed.push(name));
        assert_eq!(names, changed);
        for name in [
            "first.weight",
            "layers.1.experts.0.gate",
            "last.norm.bias",
            "scale",
            "inner.0.fc1.bias",
            "inner.0.moe.experts.1.fc2.weight",
        ] {
            assert!(names.contains(&name.to_owned()), "{name} among {names:?}");
        }
        assert_eq!(names.contains(&"extra.experts.0.gate".to_owned()), extra);
        let found: Vec<_> = (0..model.mixtures())
            .map(|l| model.mixture_name(l))
            .collect();
        let mut expected = vec!["layers.0", "layers.1", "extra", "inner.0.moe"];
        expected.retain(|name| extra || *name != "extra");
        assert_eq!(found, expected);
        for (l, name) in expected.into_iter().enumerate() {
            let id = model.mixture(l).ids()[0];
            model
                .mixture_mut(l)
                .expert_mut(id)
                .unwrap()
                .gate
                .values_mut()
                .fill(7.0);
            model.visit("", &mut |param, p| {
                if param == format!("{name}.experts.0.gate") {
                    assert_eq!(p.values(), [7.0; D]);
                }
            });
        }
        model.visit("below", &mut |name, _| {
            assert!(name.starts_with("below."), "{name}")
        });
    }
}

#[test]
fn a_layer_is_a_model() {
    let mut layer = MoeLayer::new(&config(), &mut seeded_rng(0)).unwrap();
    assert_eq!(
        (layer.mixtures(), layer.mixture_name(0)),
        (1, String::new())
    );
    let mut controller = ControllerParams::paper(1, 2, 4, 40);
    controller.trigger = Trigger::Schedule {
        first: 3,
        every: 4,
        splits: 1,
    };
    controller.choice = mass_expand::Choice::MostLoaded;
    controller.phase.live_from = 0;
    controller.phase.live_until = 30;
    let mut grower = Grower::new(GrowerConfig {
        controller,
        gradient_norm: GradientNorm::AllParameters,
        redundancy_weight: 0.01,
        redundancy_reduction: Reduction::Mean,
    })
    .unwrap();
    let mut optimizer = AdamW::new(AdamWConfig::default()).unwrap();
    let dev = Cpu::default();
    let x: Tensor<(usize, usize), f32, Cpu> = dev.sample_normal_like(&(24, D));
    let mut splits = 0;
    for step in 0..12 {
        let mut traces = Vec::new();
        let y = layer
            .forward_traced(x.leaky_trace(), None, &mut traces)
            .unwrap();
        let (loss, each) = ops::cross_entropy(y, &[1; 24]).unwrap();
        let mut pass = TrainPass::new(loss, each, traces).unwrap();
        let losses = |m: &MoeLayer, _, masked: Option<_>| {
            let y = m.forward_traced(x.clone(), masked, &mut Vec::new())?;
            let each = ops::token_losses(y, &[1; 24])?;
            Ok(each.into_iter().map(f64::from).collect())
        };
        let events = grower
            .step(step, &mut layer, &mut optimizer, &mut pass, losses)
            .unwrap();
        let split = |e: &&mass_expand::Event| matches!(e.kind, EventKind::Split { .. });
        splits += events.iter().filter(split).count();
        optimizer
            .step(&mut layer, &mut pass.gradients, 1e-2)
            .unwrap();
    }
    assert!(splits > 0);
    let mut names = Vec::new();
    layer.visit("", &mut |name, _| names.push(name));
    // Moments of newcomers carry the names of their parameters.
    names.sort_unstable();
    assert_eq!(optimizer.state().keys().cloned().collect::<Vec<_>>(), names);
}

/// All that a model gives to be kept in checkpoints.
struct Kept {
    mixture: MoeLayer,
    head: Linear,
    config: MoeConfig,
}

parameters!(Kept { mixture, head });
mixtures!(Kept { mixture });

impl Checkpointed for Kept {
    const KIND: &'static str = "kept";
    type Config = MoeConfig;

    fn checkpoint_config(&self) -> &MoeConfig {
        &self.config
    }

    fn from_checkpoint_config(config: &MoeConfig) -> Result<Self, ModelError> {
        let rng = &mut seeded_rng(2);
        Ok(Self {
            mixture: MoeLayer::new(config, rng)?,
            head: Linear::new(config.dim, 3, true, rng)?,
            config: config.clone(),
        })
    }
}

#[test]
fn a_model_of_ones_own_comes_back_with_a_pool_that_changed() {
    let mut model = Kept::from_checkpoint_config(&config()).unwrap();
    let twin = model.mixture.experts()[0].clone();
    let id = model.mixture.push(twin).unwrap();
    model.mixture.expert_mut(id).unwrap().logit_offset = -0.5;
    let first = model.mixture.ids()[0];
    model.mixture.remove(first).unwrap();
    let optimizer = AdamW::new(AdamWConfig::default()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let snapshot = Snapshot {
        step: 1,
        model: &model,
        optimizer: &optimizer,
        ema: None,
        state: &(),
    };
    checkpoint::save(dir.path(), &snapshot).unwrap();
    let back: Kept = checkpoint::load_model(dir.path()).unwrap();
    assert_eq!(back.mixture.ids(), model.mixture.ids());
    assert_eq!(back.mixture.experts()[1].logit_offset, -0.5);
    let x: Tensor<(usize, usize), f32, Cpu> = Cpu::default().sample_normal_like(&(5, D));
    let run = |m: &Kept| {
        m.head
            .try_forward(m.mixture.try_forward(x.clone()).unwrap())
            .unwrap()
            .as_vec()
    };
    assert_eq!(run(&back), run(&model));
}

fn values<M: Parameters>(model: &M) -> Vec<f32> {
    let mut all = Vec::new();
    model.visit("", &mut |_, p| all.extend_from_slice(p.values()));
    all
}

#[test]
fn values_of_any_parameters_go_to_a_file_and_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let model = deep(true);
    save_safetensors(&path, &model).unwrap();
    let mut other = deep(true);
    other.visit_mut("", &mut |_, p| p.values_mut().fill(0.5));
    load_safetensors(&path, &mut other).unwrap();
    assert_eq!(values(&other), values(&model));
    save_safetensors(&path, &other).unwrap();
    let files = std::fs::read_dir(dir.path()).unwrap().count();
    assert_eq!(files, 1, "nothing is left beside the file");

    // A tensor too many, one missing, one of another shape: the file, the tensor, and a model as it was.
    let refused = |model: &mut dyn FnMut() -> Result<(), ModelError>| match model() {
        Err(ModelError::Checkpoint { path: file, why }) => {
            assert_eq!(file, path);
            why
        }
        other => panic!("{other:?}"),
    };
    let mut fewer = deep(false);
    let before = values(&fewer);
    let why = refused(&mut || load_safetensors(&path, &mut fewer));
    assert!(
        matches!(&why, CheckpointError::UnknownTensor { name } if name.starts_with("extra.")),
        "{why}"
    );
    assert_eq!(values(&fewer), before);
    let mut more = deep(true);
    more.layers
        .push(MoeLayer::new(&config(), &mut seeded_rng(1)).unwrap());
    let before = values(&more);
    let why = refused(&mut || load_safetensors(&path, &mut more));
    assert!(
        matches!(&why, CheckpointError::MissingTensor { name } if name.starts_with("layers.2.")),
        "{why}"
    );
    assert_eq!(values(&more), before);
    let mut wider = deep(true);
    wider.scale = Param::ones(&[2, 3], true).unwrap();
    let before = values(&wider);
    let why = refused(&mut || load_safetensors(&path, &mut wider));
    let shapes = CheckpointError::TensorShape {
        name: "scale".into(),
        expected: vec![2, 3],
        actual: vec![6],
    };
    assert_eq!(why, shapes);
    assert_eq!(values(&wider), before);

    let whole = std::fs::read(&path).unwrap();
    for len in [0, 7, 8, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&path, &whole[..len]).unwrap();
        let why = refused(&mut || load_safetensors(&path, &mut other));
        assert!(matches!(why, CheckpointError::Header(_)), "{len}: {why}");
    }
    std::fs::remove_file(&path).unwrap();
    assert!(matches!(
        load_safetensors(&path, &mut other),
        Err(ModelError::Io { .. })
    ));
    let nowhere = dir.path().join("no/folder");
    assert!(matches!(
        save_safetensors(&nowhere, &other),
        Err(ModelError::Io { .. })
    ));
    assert!(matches!(
        save_safetensors(dir.path(), &other),
        Err(ModelError::Io { .. })
    ));

    struct Twice(Param, Param);
    impl Parameters for Twice {
        fn visit<'a>(&'a self, _: &str, f: &mut dyn FnMut(String, &'a Param)) {
            f("p".into(), &self.0);
            f("p".into(), &self.1);
        }
        fn visit_mut(&mut self, _: &str, f: &mut dyn FnMut(String, &mut Param)) {
            f("p".into(), &mut self.0);
            f("p".into(), &mut self.1);
        }
    }
    let param = || Param::ones(&[2], false).unwrap();
    let twice = save_safetensors(&path, &Twice(param(), param())).unwrap_err();
    assert!(twice.to_string().contains("\"p\""), "{twice}");
    assert!(!path.exists());
}

#[test]
fn a_loss_that_is_no_number_makes_no_pass() {
    let dev = Cpu::default();
    for value in [f32::NAN, f32::INFINITY] {
        let loss: Tensor<(), f32, Cpu> = dev.tensor_from_vec(vec![value], ());
        let pass = TrainPass::new(loss.leaky_trace(), vec![], vec![]);
        assert!(matches!(pass.err(), Some(ModelError::NonFinite(_))));
    }
}

/// What a refusal of a size says: the size, and what it has to be.
#[test]
fn sizes_that_cannot_be_are_refused_with_the_rule() {
    let rng = &mut seeded_rng(0);
    let zero = "at least 1";
    let large = "larger than memory";
    let cases = [
        (Param::zeros(&[0, 3], true).map(drop), "[0, 3]", zero),
        (Param::ones(&[2, 0], true).map(drop), "[2, 0]", zero),
        (Param::uniform(&[0], 1.0, true, rng).map(drop), "[0]", zero),
        (Param::zeros(&[usize::MAX, 2], true).map(drop), "2]", large),
        (
            Param::zeros(&[usize::MAX / 4, 1], true).map(drop),
            "1]",
            large,
        ),
        (
            Param::uniform(&[2], -1.0, true, rng).map(drop),
            "-1",
            "at least 0",
        ),
        (
            Param::uniform(&[2], f32::NAN, true, rng).map(drop),
            "NaN",
            "finite",
        ),
        (
            Param::normal(&[2], f32::INFINITY, true, rng).map(drop),
            "inf",
            "finite",
        ),
        (Linear::new(0, 3, true, rng).map(drop), "0 to 3", zero),
        (
            LayerNorm::new(0, 1e-5).map(drop),
            "0 values",
            "at least one",
        ),
        (LayerNorm::new(3, -1.0).map(drop), "eps -1", "positive"),
    ];
    for (refused, size, rule) in cases {
        let Err(ModelError::Config(words)) = refused else {
            panic!("{size} is not refused");
        };
        assert!(words.contains(size) && words.contains(rule), "{words}");
    }
}

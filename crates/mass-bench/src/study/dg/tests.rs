use std::path::Path;

use mass_cpd::AnyDetectorParams;
use mass_expand::AlignmentThreshold;
use mass_model::nn::{GateConfig, MoeConfig};
use mass_model::ops::RoutingLoss;
use mass_model::optim::AdamWConfig;
use mass_model::vit::{VitClassifier, VitConfig};
use mass_routing::{Combine, RouterConfig};

use super::data::Set;
use super::method::{Method, growth, mixture_blocks};
use super::plan::{Plan, delta};
use super::trainer::{TrainerConfig, check};
use crate::cli::{ReproduceArgs, Variant};
use crate::dg::images::{BadImages, DomainImages};
use crate::dg::sample;
use crate::rng::{Purpose, stream};
use crate::study::mass::MassSetting;

fn setting(variant: Variant) -> MassSetting {
    MassSetting {
        variant,
        p: 0.3,
        router: None,
        live_percent: Some(60),
        experts: 6,
        experts_max: 8,
        loose: false,
    }
}

#[test]
fn mixtures_are_where_gmoe_has_them_and_scale_with_the_depth() {
    assert_eq!(mixture_blocks(12), [8, 10]);
    assert_eq!(mixture_blocks(24), [16, 20]);
    assert_eq!(mixture_blocks(3), [2]);
}

#[test]
fn rules_are_those_of_vision_and_short_runs_shorten_them() {
    for variant in [Variant::Paper, Variant::Reference] {
        for (steps, warmup, window) in [(5000, 250, 450), (2000, 100, 200), (200, 20, 40)] {
            let rules = growth(&setting(variant), 2, steps, 0.002, 0).controller;
            let Some(AnyDetectorParams::WindowedZ(z)) = rules.watch.expert else {
                panic!("{:?}", rules.watch.expert);
            };
            assert_eq!((z.warmup, z.window), (warmup, window), "{steps}");
            assert_eq!(rules.phase.live_until, steps * 60 / 100);
            assert_eq!(rules.alignment, AlignmentThreshold::Absolute(0.002));
            assert_eq!((rules.k_max, rules.experts), (8, vec![6, 6]));
        }
    }
    for variant in [Variant::Paper, Variant::Reference, Variant::Ours] {
        for steps in [80, 200, 5000] {
            let rules = growth(&setting(variant), 2, steps, 0.002, 0);
            rules.controller.check().unwrap();
        }
    }
}

/// An empty file, with the directories that it is in.
fn put(dir: &Path, name: &str) {
    let path = dir.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, "").unwrap();
}

/// A directory with what looks like the model, for sets to be put beside.
fn models() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    put(dir.path(), "vit-s14/config.json");
    put(dir.path(), "vit-s14/model.safetensors");
    dir
}

/// The full preset on a set of that directory.
fn full(dir: &Path, task: &str) -> ReproduceArgs {
    let at = dir.to_str().unwrap();
    ReproduceArgs::parsed(&[
        "dg", "--preset", "full", "--task", task, "--data", at, "--models", at,
    ])
}

#[test]
fn a_set_has_one_name_however_domainbed_writes_it() {
    let dir = models();
    for domain in ["here", "there"] {
        put(dir.path(), &format!("PACS/{domain}/dog/a.png"));
    }
    for task in ["pacs", "PACS", "PACS/there"] {
        let args = full(dir.path(), task);
        let runs = Plan::of(&args).unwrap().runs(&args).unwrap();
        assert!(!runs.is_empty());
        for planned in runs {
            assert_eq!(planned.set, "pacs", "{task}");
            assert!(planned.run.task.unwrap().starts_with("pacs/"), "{task}");
        }
    }
    assert_eq!((delta("pacs"), delta("terra_incognita")), (0.002, 0.001));
}

/// Runs keep what is theirs in folders named after their domains, less punctuation.
#[test]
fn domains_that_differ_in_punctuation_alone_are_refused() {
    let dir = models();
    let checked = |domain: &str| {
        put(dir.path(), &format!("toy/{domain}/dog/a.png"));
        super::check(&full(dir.path(), "toy"))
    };
    assert!(checked("real world").is_err(), "one domain");
    checked("clip art").unwrap();
    let refused = checked("real_world").unwrap_err();
    assert_eq!(refused.exit_code(), 2);
    assert!(refused.to_string().contains("share a folder"), "{refused}");
}

fn model(blocks: usize) -> VitClassifier {
    let config = VitConfig {
        hidden_size: 8,
        num_hidden_layers: blocks,
        num_attention_heads: 2,
        intermediate_size: 16,
        image_size: 8,
        patch_size: 4,
        ..VitConfig::default()
    };
    VitClassifier::new(&config, 4, &mut stream(0, Purpose::Weights, 0)).unwrap()
}

/// A rival that is set up otherwise than by its authors flatters the method.
#[test]
fn rivals_have_their_authors_settings() {
    let of = |method: Method| method.mixture(&model(3), 5);
    assert_eq!(of(Method::Erm), None);
    let sizes = |config: &MoeConfig| (config.dim, config.hidden, config.experts);
    let gmoe = of(Method::Gmoe { experts: 6 }).unwrap();
    assert_eq!(sizes(&gmoe), (8, 16, 6));
    let cosine = GateConfig::Cosine {
        projection: Some(256),
        temperature: Some(0.5),
    };
    assert_eq!(gmoe.gate, cosine);
    let top_1 = RouterConfig::TopK {
        k: 1,
        combine: Combine::Raw,
    };
    let noisy = RouterConfig::Noisy {
        std: 1.0 / 6.0,
        seed: 5,
        inner: Box::new(top_1),
    };
    assert_eq!(gmoe.router, noisy);
    let weight = 0.005;
    let losses = [
        RoutingLoss::Importance { weight },
        RoutingLoss::Load { weight },
    ];
    assert_eq!(gmoe.losses, losses);

    let experts = 6;
    let dynmoe = Method::DynMoe {
        experts,
        experts_max: 8,
    };
    let dynmoe = of(dynmoe).unwrap();
    assert_eq!(sizes(&dynmoe), (8, 16, 6));
    let cosine = GateConfig::Cosine {
        projection: None,
        temperature: None,
    };
    assert_eq!(dynmoe.gate, cosine);
    assert_eq!(dynmoe.router, RouterConfig::TopAny { experts });

    for (variant, combine) in [
        (Variant::Paper, Combine::Raw),
        (Variant::Reference, Combine::Renormalised),
        (Variant::Ours, Combine::Renormalised),
    ] {
        let mass = of(Method::Mass(setting(variant))).unwrap();
        assert_eq!(mass.router, RouterConfig::TopP { p: 0.3, combine });
        assert_eq!(mass.gate, GateConfig::Linear);
        assert!(mass.losses.is_empty());
    }
}

/// What cannot be run is refused before results of an earlier study are replaced.
#[test]
fn sets_and_models_that_are_too_small_are_refused_beforehand() {
    let config = |method| TrainerConfig {
        run: "a run".into(),
        seed: 0,
        method,
        target: 0,
        held_out: 0.2,
        steps: 10,
        per_domain: 2,
        learning_rate: 1e-3,
        adamw: AdamWConfig::default(),
        evaluate_every: 5,
        log_every: 5,
        checkpoint_every: 5,
        images: 0,
        frozen: 0,
    };
    let set = |blocks, frozen, per_class| {
        let images = sample::images(8, per_class);
        Set {
            name: "sample".into(),
            digest: images.digest(),
            images,
            base: model(blocks),
            frozen,
            features: None,
            augment: None,
            tokens: 5,
            delta: 0.001,
        }
    };
    let gmoe = || Method::Gmoe { experts: 3 };
    let ours = || Method::Mass(setting(Variant::Ours));
    for method in [Method::Erm, gmoe(), ours()] {
        check(&config(method), &set(12, 8, 8)).unwrap();
    }
    // Of 10 blocks the mixtures would be the seventh and the ninth.
    assert_eq!(mixture_blocks(10), [6, 8]);
    check(&config(Method::Erm), &set(10, 8, 8)).unwrap();
    for method in [gmoe(), ours()] {
        let refused = check(&config(method), &set(10, 8, 8)).unwrap_err();
        assert_eq!(refused.exit_code(), 2);
        assert!(refused.to_string().contains("[6, 8]"), "{refused}");
    }
    // A fifth of four images is none.
    let refused = check(&config(Method::Erm), &set(12, 8, 1)).unwrap_err();
    assert_eq!(refused.exit_code(), 2);
    assert!(refused.to_string().contains("4 images"), "{refused}");
    // One source domain of seven images: a quarter of the six that are trained on is one.
    let dir = tempfile::tempdir().unwrap();
    for (domain, images) in [("here", 7), ("there", 7)] {
        std::fs::create_dir_all(dir.path().join(domain).join("dog")).unwrap();
        for i in 0..images {
            let path = dir.path().join(format!("{domain}/dog/{i}.png"));
            image::RgbImage::new(8, 8).save(path).unwrap();
        }
    }
    let mut two = set(12, 8, 8);
    two.images = DomainImages::read(dir.path(), 8, BadImages::Refuse, None).unwrap();
    check(&config(gmoe()), &two).unwrap();
    let refused = check(&config(ours()), &two).unwrap_err();
    assert_eq!(refused.exit_code(), 2);
    assert!(
        refused.to_string().contains("judging newcomers"),
        "{refused}"
    );
}

//! A run that stops at any step and goes on ends as one that never stopped.

use mass_model::bert::BertConfig;
use serde_json::json;
use std::sync::OnceLock;

use super::data::TaskData;
use super::finetune::{FineTune, Pretrained, at_depth};
use super::{Glue, Set, plan};
use crate::cli::{ReproduceArgs, Variant};
use crate::glue::sample;
use crate::glue::task::Task;
use crate::glue::tokenize::TextTokenizer;
use crate::method::{Mass, Method, Pool, named};
use crate::task::Task as _;
use crate::trainer::Trainer;
use crate::trainer::tests::resumes_to_the_same_bits;

const POOL: Pool = Pool {
    experts: 3,
    experts_max: 5,
    k: 2,
    p: 0.5,
    live_percent: Some(90),
};

fn data(task: Task) -> TaskData {
    let tokenizer = TextTokenizer::from_vocabulary(&sample::vocabulary(), true, 16).unwrap();
    TaskData::new(&tokenizer, &sample::dataset(task)).unwrap()
}

fn family(task: Task, patience: u64) -> Glue {
    Glue {
        args: ReproduceArgs::parsed(&["glue", "--preset", "smoke"]),
        pretrained: Pretrained::Drawn(BertConfig {
            vocab_size: sample::vocabulary().len(),
            hidden_size: 16,
            num_hidden_layers: 2,
            num_attention_heads: 2,
            intermediate_size: 24,
            max_position_embeddings: 16,
            initializer_range: 0.2,
            ..BertConfig::default()
        }),
        model: OnceLock::new(),
        sets: vec![Set::new(task, 3)],
        batch: 8,
        max_length: 16,
        learning_rate: 1e-3,
        patience,
        last: false,
        log_every: 7,
        checkpoint_every: 1000,
    }
}

fn mass(variant: Variant) -> Method {
    let mut mass = Mass::of(variant, &POOL);
    mass.overrides = mass.loose();
    Method::Mass(mass)
}

fn of(name: &str) -> Method {
    named(name, &POOL, None).unwrap().remove(0)
}

#[test]
fn every_method_resumes_to_the_same_bits() {
    let routed = |mut method: Method, router: &str| {
        method.routed_by(&router.parse().unwrap());
        method
    };
    let methods = [
        Method::Dense,
        of("static"),
        of("dynmoe"),
        of("gmoe"),
        mass(Variant::Paper),
        mass(Variant::Reference),
        mass(Variant::Calibrated),
        mass(Variant::Ours),
        routed(
            mass(Variant::Calibrated),
            "bias_balanced:k=1,rate=0.01,combine=raw",
        ),
        routed(
            of("static"),
            "noisy:std=0.2/target_k:target=1.5,p=0.9,combine=raw",
        ),
    ];
    let (family, data) = (family(Task::Stsb, 9), data(Task::Stsb));
    for method in methods {
        let task = FineTune::new(&family, &data, &method, (4, 3)).unwrap();
        // In the middle of an epoch, at its end, and after the pool has grown.
        let per_epoch = task.recipe().schedule.steps / 3;
        resumes_to_the_same_bits(&task, &method, &[5, per_epoch, 2 * per_epoch + 3]);
    }
}

#[test]
fn a_chosen_router_names_the_run_and_any_method_may_be_named() {
    let runs = |more: &[&str]| {
        let line = ["glue", "--preset", "smoke", "--task", "STS-B"];
        let args = ReproduceArgs::parsed(&[&line[..], more].concat());
        plan(&args).unwrap().runs(&args)
    };
    let keys = |more: &[&str]| -> Vec<String> {
        let runs = runs(more).unwrap();
        runs.iter().map(|r| r.run.key().to_string()).collect()
    };
    let (own, chosen) = (keys(&[]), keys(&["--router", "bias_balanced:k=2"]));
    assert_eq!(own.len(), chosen.len());
    for (own, chosen) in own.iter().zip(&chosen) {
        let has_a_choice = own.starts_with("static") || own.starts_with("mass");
        assert_eq!(own != chosen, has_a_choice, "{own} and {chosen}");
        let named = chosen.contains("bias_balanced:k=2,rate=0.001,combine=renormalised");
        assert_eq!(named, has_a_choice, "{chosen}");
    }
    let refused = |more: &[&str]| runs(more).unwrap_err().to_string();
    let text = refused(&["--router", "top_any"]);
    assert!(text.contains("cannot bisect"), "{text}");
    runs(&["--router", "top_any", "--variant", "paper"]).unwrap();
    let text = refused(&["--router", "top_k:k=1"]);
    assert!(text.contains("add combine=straight_through"), "{text}");
    // A router that nobody heeds was not meant so.
    let text = refused(&["--router", "top_k:k=1", "--methods", "dense,dynmoe,gmoe"]);
    assert!(text.contains("changes nothing"), "{text}");
    // What the preset does not list has its pools, whatever the study calls the dense model.
    assert_eq!(
        keys(&["--methods", "gmoe,erm,plain_cloning"]),
        [
            "dense/STS-B/seed0",
            "gmoe/STS-B/K3/k1/seed0",
            "plain_cloning/paper/p 0.5, live 90 %/STS-B/K3/seed0"
        ]
    );
    assert_eq!(
        keys(&["--methods", "schedule", "--variant", "calibrated"]),
        ["schedule/calibrated/p 0.5, live 90 %/STS-B/K3/seed0"]
    );
}

/// Quick has one variant of MASS and that which is asked for.
#[test]
fn quick_has_one_variant_and_that_which_is_asked_for() {
    let variants = |preset: &str, more: &str| {
        let line = format!("glue --preset {preset} --methods mass {more}");
        let args = ReproduceArgs::parsed(&line.split_whitespace().collect::<Vec<_>>());
        let mut plan = plan(&ReproduceArgs::parsed(&["glue", "--preset", "smoke"])).unwrap();
        plan.variant = (preset == "quick").then_some(Variant::Paper);
        let methods = plan.methods(&args).unwrap();
        let variants = methods.iter().map(|m| m.run(0).variant.unwrap());
        variants.collect::<Vec<_>>().join(" ")
    };
    assert_eq!(variants("quick", ""), "paper");
    assert_eq!(variants("quick", "--variant ours"), "ours");
    assert_eq!(variants("full", ""), "paper reference calibrated ours");
    assert_eq!(variants("full", "--variant reference"), "reference");
}

#[test]
fn a_run_stops_after_epochs_without_gain_and_stays_stopped() {
    let data = data(Task::Cola);
    let dir = tempfile::tempdir().unwrap();
    let mut family = family(Task::Cola, 1);
    // Nothing is learnt, so that no epoch gains anything over the first.
    family.learning_rate = 0.0;
    family.checkpoint_every = 1;
    let dense = Method::Dense;
    let task = FineTune::new(&family, &data, &dense, (4, 3)).unwrap();
    let run = dense.run(4);
    let open = |task| Trainer::open(task, &run, &dense, dir.path(), true);
    let mut tuner = open(&task).unwrap();
    assert!(tuner.train(dir.path(), false, &mut |_, _| true).unwrap());
    let step = tuner.step();
    assert_eq!(step, task.recipe().schedule.steps / 3 * 2);
    assert_eq!(tuner.finish().unwrap().run.best_epoch, Some(1));
    let mut again = open(&task).unwrap();
    assert!(again.train(dir.path(), false, &mut |_, _| true).unwrap());
    assert_eq!(again.step(), step);
    // A checkpoint of other settings or other data is refused.
    let mut other = data.clone();
    other.digest += 1;
    let other_data = FineTune::new(&family, &other, &dense, (4, 3)).unwrap();
    let other_epochs = FineTune::new(&family, &data, &dense, (4, 4)).unwrap();
    assert!(open(&other_data).is_err() && open(&other_epochs).is_err());
    let other = dense.run(5);
    assert!(Trainer::open(&task, &other, &dense, dir.path(), true).is_err());
}

#[test]
fn methods_that_judge_newcomers_hold_out_a_probe_that_they_are_not_trained_on() {
    let data = data(Task::Rte);
    let (rest, probe) = &data.held_out;
    assert_eq!(rest.len() + probe.len(), data.train.len());
    assert_eq!(probe.len(), data.train.len().div_ceil(20));
    let family = family(Task::Rte, 9);
    let held_out = |method: &Method| {
        let task = FineTune::new(&family, &data, method, (0, 3)).unwrap();
        std::ptr::eq(task.examples(), rest)
    };
    assert!(held_out(&mass(Variant::Calibrated)));
    for method in [
        Method::Dense,
        mass(Variant::Paper),
        mass(Variant::Reference),
        mass(Variant::Ours),
    ] {
        assert!(!held_out(&method));
    }
}

#[test]
fn the_mixture_is_at_the_authors_part_of_the_depth() {
    let layers = [
        (10, 24),
        (11, 24),
        (10, 12),
        (11, 12),
        (10, 6),
        (11, 6),
        (11, 1),
    ];
    let found = layers.map(|(layer, depth)| at_depth(layer, depth));
    assert_eq!(found, [10, 11, 5, 6, 3, 3, 0]);
}

#[test]
fn a_checkpoint_does_not_hold_where_the_model_lies() {
    let root = tempfile::tempdir().unwrap();
    let at = |dir: &str, weights: &str| {
        let dir = root.path().join(dir);
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("config.json"), "{}").unwrap();
        std::fs::write(dir.join("model.safetensors"), weights).unwrap();
        Pretrained::Directory(dir).settings().unwrap()
    };
    let here = at("data/minilm", "123456789");
    assert_eq!(here, at("models/minilm", "123456789"));
    assert_ne!(here, at("models/other", "123456789"));
    assert_ne!(here, at("models/minilm", "123456780"));
    // The CRC-32 of these nine digits that every description of it gives.
    let file = json!({ "bytes": 9, "crc32": "cbf43926" });
    assert_eq!(here["model.safetensors"], file);
    let missing = Pretrained::Directory(root.path().join("none")).settings();
    assert!(missing.unwrap_err().to_string().contains("config.json"));
    let tokenizer = TextTokenizer::from_vocabulary(&sample::vocabulary(), true, 16).unwrap();
    let mut set = sample::dataset(Task::Cola);
    let digest = |set: &_| TaskData::new(&tokenizer, set).unwrap().digest;
    let before = digest(&set);
    assert_eq!(digest(&set), before);
    set.train.swap(0, 1);
    assert_ne!(digest(&set), before);
}

#[test]
fn a_missing_file_is_named_with_its_layout_and_its_source() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("minilm-l6");
    std::fs::create_dir_all(&model).unwrap();
    for file in ["config.json", "model.safetensors", "vocab.txt"] {
        std::fs::write(model.join(file), "").unwrap();
    }
    let at = dir.path().to_str().unwrap();
    let full = ["glue", "--preset", "full", "--data", at, "--models", at];
    let args = ReproduceArgs::parsed(&full);
    let error = plan(&args).unwrap().check(&args).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    let error = error.to_string();
    for part in [
        "glue/CoLA/train.tsv",
        "DATA/glue/<Task>",
        "gluebenchmark.com",
    ] {
        assert!(error.contains(part), "{error}");
    }
}

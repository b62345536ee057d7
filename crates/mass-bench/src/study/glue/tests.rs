//! A run that stops at any step and goes on ends as one that never stopped.

use mass_model::Parameters;
use mass_model::bert::BertConfig;
use mass_model::optim::AdamWConfig;
use serde_json::json;

use super::data::TaskData;
use super::finetune::{FineTuneConfig, FineTuner, train_of};
use super::method::{Method, Pretrained, at_depth};
use super::plan::Plan;
use crate::cli::{ReproduceArgs, Variant};
use crate::glue::sample;
use crate::glue::task::Task;
use crate::glue::tokenize::TextTokenizer;
use crate::study::mass::MassSetting;

fn data(task: Task) -> TaskData {
    let tokenizer = TextTokenizer::from_vocabulary(&sample::vocabulary(), true, 16).unwrap();
    TaskData::new(&tokenizer, &sample::dataset(task)).unwrap()
}

fn pretrained() -> Pretrained {
    Pretrained::Drawn(BertConfig {
        vocab_size: sample::vocabulary().len(),
        hidden_size: 16,
        num_hidden_layers: 2,
        num_attention_heads: 2,
        intermediate_size: 24,
        max_position_embeddings: 16,
        initializer_range: 0.2,
        ..BertConfig::default()
    })
}

fn config(method: Method, task: Task, patience: u64) -> FineTuneConfig {
    FineTuneConfig {
        run: "a run".into(),
        seed: 4,
        method,
        model: pretrained().settings().unwrap(),
        data: 7,
        authors_layer: 10,
        outputs: task.outputs(),
        epochs: 3,
        patience,
        batch: 8,
        sorted_together: 1,
        learning_rate: 1e-3,
        adamw: AdamWConfig::default().decaying_everything(),
        log_every: 7,
        checkpoint_every: 1000,
    }
}

/// What a run leaves: weights, and all it would write but the time.
fn left(tuner: &FineTuner<'_>) -> (Vec<f32>, String) {
    let mut weights = Vec::new();
    tuner
        .model()
        .visit("", &mut |_, p| weights.extend(p.values()));
    let text = format!(
        "{:?} {:?} {:?} {} {:?} {:?}",
        tuner.best(),
        tuner.metrics(),
        tuner.events(),
        tuner.tokens(),
        tuner.live_steps(),
        tuner.expansions(),
    );
    (weights, text)
}

#[test]
fn every_method_resumes_to_the_same_bits() {
    let mass = |variant| {
        Method::Mass(MassSetting {
            variant,
            p: 0.5,
            router: None,
            live_percent: Some(90),
            experts: 3,
            experts_max: 5,
            loose: true,
        })
    };
    let pool = Method::Static {
        experts: 3,
        k: 2,
        router: None,
    };
    let routed = |mut method: Method, router: &str| {
        method.routed_by(&router.parse().unwrap());
        method
    };
    let methods = [
        Method::Dense,
        pool.clone(),
        Method::DynMoe {
            experts: 3,
            experts_max: 5,
        },
        mass(Variant::Paper),
        mass(Variant::Reference),
        mass(Variant::Ours),
        routed(
            mass(Variant::Ours),
            "bias_balanced:k=1,rate=0.01,combine=raw",
        ),
        routed(pool, "noisy:std=0.2/target_k:target=1.5,p=0.9,combine=raw"),
    ];
    let task = Task::Stsb;
    let data = data(task);
    for method in methods {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (dir.path().join("one"), dir.path().join("two"));
        let config = config(method, task, 9);
        let mut whole = FineTuner::open(config.clone(), &pretrained(), &data, &one, false).unwrap();
        assert!(whole.run(&one, &mut |_, _| true).unwrap());
        // In the middle of an epoch, at its end, and after the pool has grown.
        let per_epoch = whole.steps() / config.epochs;
        for stop in [5, per_epoch, 2 * per_epoch + 3] {
            let mut part =
                FineTuner::open(config.clone(), &pretrained(), &data, &two, true).unwrap();
            assert!(!part.run(&two, &mut |step, _| step < stop).unwrap());
        }
        let mut rest = FineTuner::open(config.clone(), &pretrained(), &data, &two, true).unwrap();
        assert_eq!(rest.step(), 2 * per_epoch + 3);
        assert!(rest.run(&two, &mut |_, _| true).unwrap());
        let (whole, rest) = (left(&whole), left(&rest));
        assert_eq!(whole.1, rest.1, "{:?}", config.method);
        assert!(whole.0 == rest.0, "weights of {:?}", config.method);
    }
}

#[test]
fn a_chosen_router_routes_what_has_a_choice_and_names_the_run() {
    let args = |more: &[&str]| {
        let line = ["glue", "--preset", "smoke", "--task", "STS-B"];
        ReproduceArgs::parsed(&[&line[..], more].concat())
    };
    let keys = |more: &[&str]| -> Vec<String> {
        let args = args(more);
        let runs = Plan::of(&args).unwrap().runs(&args);
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
    let method = |router: &str| {
        let mut method = Method::Mass(MassSetting {
            variant: Variant::Ours,
            p: 0.5,
            router: None,
            live_percent: None,
            experts: 3,
            experts_max: 5,
            loose: false,
        });
        method.routed_by(&router.parse().unwrap());
        method.mixture().unwrap().1.to_string()
    };
    assert_eq!(method("top_any"), "top_any:experts=3");
    let refused = |more: &[&str]| Plan::of(&args(more)).unwrap_err().to_string();
    let text = refused(&["--router", "top_any"]);
    assert!(text.contains("cannot bisect"), "{text}");
    Plan::of(&args(&["--router", "top_any", "--variant", "paper"])).unwrap();
    let text = refused(&["--router", "top_k:k=1"]);
    assert!(text.contains("add combine=raw"), "{text}");
    // Nobody is asked to route otherwise.
    Plan::of(&args(&[
        "--router",
        "top_k:k=1",
        "--methods",
        "dense,dynmoe",
    ]))
    .unwrap();
}

#[test]
fn a_run_stops_after_epochs_without_gain_and_stays_stopped() {
    let task = Task::Cola;
    let data = data(task);
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(Method::Dense, task, 1);
    // Nothing is learnt, so that no epoch gains anything over the first.
    config.learning_rate = 0.0;
    config.checkpoint_every = 1;
    let mut tuner =
        FineTuner::open(config.clone(), &pretrained(), &data, dir.path(), false).unwrap();
    assert!(tuner.run(dir.path(), &mut |_, _| true).unwrap());
    assert_eq!(tuner.step(), tuner.steps() / config.epochs * 2);
    assert_eq!(tuner.best().unwrap().epoch, 1);
    let step = tuner.step();
    let mut again =
        FineTuner::open(config.clone(), &pretrained(), &data, dir.path(), true).unwrap();
    assert!(again.run(dir.path(), &mut |_, _| true).unwrap());
    assert_eq!(again.step(), step);
    // A checkpoint of other settings or other data is refused.
    for change in [
        |c: &mut FineTuneConfig| c.seed += 1,
        |c: &mut FineTuneConfig| c.data += 1,
    ] {
        let mut other = config.clone();
        change(&mut other);
        assert!(FineTuner::open(other, &pretrained(), &data, dir.path(), true).is_err());
    }
}

#[test]
fn methods_that_judge_newcomers_hold_out_a_probe_that_they_are_not_trained_on() {
    let data = data(Task::Rte);
    let (rest, probe) = &data.held_out;
    assert_eq!(rest.len() + probe.len(), data.train.len());
    assert_eq!(probe.len(), data.train.len().div_ceil(20));
    let mass = |variant| {
        Method::Mass(MassSetting {
            variant,
            p: 0.5,
            router: None,
            live_percent: None,
            experts: 3,
            experts_max: 5,
            loose: false,
        })
    };
    let of = |method| train_of(&config(method, Task::Rte, 9), &data);
    assert!(std::ptr::eq(of(mass(Variant::Ours)), rest));
    for method in [
        Method::Dense,
        mass(Variant::Paper),
        mass(Variant::Reference),
    ] {
        assert!(std::ptr::eq(of(method), &data.train));
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
    let error = super::check(&ReproduceArgs::parsed(&full)).unwrap_err();
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

//! A field that a configuration does not have is an error: under a name that is mistyped the default would stay in its place.

use std::collections::BTreeMap;

use mass_model::Activation;
use mass_model::bert::{BertConfig, ClassifierConfig};
use mass_model::checkpoint::LoadOptions;
use mass_model::growth::{GradientNorm, GrowerConfig};
use mass_model::lm::LanguageModelConfig;
use mass_model::nn::{BlockConfig, GateConfig, MoeConfig};
use mass_model::ops::RoutingLoss;
use mass_model::optim::{AdamWConfig, Decay, EmaConfig, Group, Schedule, Select};
use mass_model::vit::VitConfig;
use mass_routing::{Combine, RouterConfig};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::growing::grower;

/// Every object in a value by its place, but for those in a place that is `open`.
fn objects(place: &str, value: &Value, open: &[&str], found: &mut Vec<String>) {
    match value {
        _ if open.contains(&place) => {}
        Value::Object(map) => {
            found.push(place.to_owned());
            for (name, value) in map {
                objects(&format!("{place}/{name}"), value, open, found);
            }
        }
        Value::Array(values) => {
            for (i, value) in values.iter().enumerate() {
                objects(&format!("{place}/{i}"), value, open, found);
            }
        }
        _ => {}
    }
}

/// Fails unless a field more is refused wherever the configuration has fields. `open` are maps whose names are free, and what
/// others write.
fn closed<T: Serialize + DeserializeOwned>(config: &T, open: &[&str]) {
    let what = std::any::type_name::<T>();
    let value = serde_json::to_value(config).unwrap();
    serde_json::from_value::<T>(value.clone()).unwrap_or_else(|e| panic!("{what}: {e}"));
    let mut places = Vec::new();
    objects("", &value, open, &mut places);
    assert!(!places.is_empty(), "{what}");
    for place in places {
        let mut more = value.clone();
        let object = more.pointer_mut(&place).unwrap().as_object_mut().unwrap();
        object.insert("no_such_field".into(), json!(1));
        let refused = serde_json::from_value::<T>(more);
        assert!(refused.is_err(), "{what}: {place:?} takes any field");
    }
}

#[test]
fn a_field_that_is_not_there_is_refused() {
    let router = RouterConfig::TopP {
        p: 0.5,
        combine: Combine::Raw,
    };
    let mut moe = MoeConfig::new(4, 8, 2, Activation::Relu, router);
    moe.losses = vec![
        RoutingLoss::Entropy { weight: 0.1 },
        RoutingLoss::RouterZ { weight: 0.1 },
    ];
    closed(&moe, &[]);
    moe.gate = GateConfig::Cosine {
        projection: Some(3),
        temperature: None,
    };
    let block = BlockConfig {
        heads: 2,
        layer_norm_eps: 1e-5,
        moe: moe.clone(),
    };
    closed(
        &LanguageModelConfig {
            vocab: 5,
            max_seq: 4,
            layers: 1,
            embedding_std: 0.1,
            block,
        },
        &[],
    );
    closed(&VitConfig::default(), &[]);
    let mixtures = BTreeMap::from([(0, moe)]);
    // The fields of Hugging Face's files are not ours alone.
    let encoder = BertConfig::default();
    let of_text = ClassifierConfig {
        encoder,
        outputs: 2,
        mixtures: mixtures.clone(),
    };
    closed(&of_text, &["/encoder", "/mixtures"]);
    let of_images = ClassifierConfig {
        encoder: VitConfig::default(),
        outputs: 2,
        mixtures,
    };
    closed(&of_images, &["/mixtures"]);
    let mut adamw = AdamWConfig::default();
    adamw.groups.push(Group {
        name: "head".into(),
        select: Select::Prefix("head".into()),
        weight_decay: None,
        lr_scale: Some(2.0),
    });
    // Which parameters: one of several names.
    closed(&adamw, &["/groups/0/select"]);
    let grower = serde_json::to_value(grower()).unwrap();
    let rules: GrowerConfig = serde_json::from_value(grower["config"].clone()).unwrap();
    // The controller's rules are tested where they are.
    closed(&rules, &["/controller"]);
    closed(&LoadOptions::default(), &[]);
    closed(
        &Schedule {
            peak: 1.0,
            warmup: 1,
            steps: 2,
            floor: 0.1,
            decay: Decay::Linear,
        },
        &[],
    );
    let ema = mass_model::optim::Ema::new(0.9).unwrap();
    let ema: &EmaConfig = ema.config();
    closed(ema, &[]);
    // One of several words, and not an object.
    assert!(serde_json::from_value::<GradientNorm>(json!({"no_such": 1})).is_err());
}

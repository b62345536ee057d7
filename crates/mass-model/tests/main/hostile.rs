//! Checkpoints whose checksums are right and whose contents are wrong.

use std::path::Path;

use mass_model::checkpoint::CheckpointError as E;
use serde_json::json;

use crate::saved::damage::{
    VICTIM, bytes, case, f64_of, manifest, only, refuse_all, rewrite, seal,
};

const MODEL: &str = "model.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";

#[test]
fn false_contents_are_refused_by_the_name_of_the_file_and_the_tensor() {
    let header_length = |n: u64| {
        move |f: &Path| {
            bytes(f, MODEL, &|b| b[..8].copy_from_slice(&n.to_le_bytes()));
            seal(f);
        }
    };
    let pool = |key: &'static str, value: serde_json::Value| {
        move |f: &Path| manifest(f, &|json| json["pools"][1][key] = value.clone())
    };
    let model = |key: &'static str, value: serde_json::Value| {
        move |f: &Path| manifest(f, &|json| json["model"][key] = value.clone())
    };

    let cases = vec![
        case(
            "truncated and sealed",
            MODEL,
            |f| {
                bytes(f, MODEL, &|b| b.truncate(b.len() - 4));
                seal(f)
            },
            |e| matches!(e, E::Header(_)),
        ),
        case(
            "flipped bit in a sealed header",
            MODEL,
            |f| {
                bytes(f, MODEL, &|b| b[9] ^= 0x40);
                seal(f)
            },
            |e| matches!(e, E::Header(_)),
        ),
        case(
            "a header longer than the file",
            MODEL,
            header_length(1 << 20),
            |e| matches!(e, E::Header(_)),
        ),
        case(
            "a header of 2^63 bytes",
            MODEL,
            header_length(1 << 63),
            |e| matches!(e, E::Header(_)),
        ),
        case("a header of no bytes", MODEL, header_length(0), |e| {
            matches!(e, E::Header(_))
        }),
        case(
            "an empty file",
            MODEL,
            |f| {
                bytes(f, MODEL, &|b| b.clear());
                seal(f)
            },
            |e| matches!(e, E::Header(_)),
        ),
        case(
            "missing tensor",
            MODEL,
            |f| rewrite(f, MODEL, &|name, raw| (name != VICTIM).then_some(raw)),
            |e| matches!(e, E::MissingTensor { name } if name == VICTIM),
        ),
        case(
            "missing moment",
            OPTIMIZER,
            |f| {
                rewrite(f, OPTIMIZER, &|name, raw| {
                    (name != "v.head.weight").then_some(raw)
                })
            },
            |e| matches!(e, E::MissingTensor { name } if name == "v.head.weight"),
        ),
        case(
            "one tensor too many",
            MODEL,
            |f| {
                manifest(f, &|json| {
                    for key in ["experts", "logit_offsets"] {
                        json["pools"][1][key].as_array_mut().unwrap().pop();
                    }
                })
            },
            |e| matches!(e, E::UnknownTensor { name } if name.starts_with("blocks.1.moe.experts.2.")),
        ),
        case(
            "one moment too many",
            OPTIMIZER,
            |f| {
                manifest(f, &|json| {
                    json["parameter_steps"]
                        .as_object_mut()
                        .unwrap()
                        .remove("tokens");
                })
            },
            |e| matches!(e, E::UnknownTensor { name } if name == "m.tokens"),
        ),
        case(
            "wrong shape",
            MODEL,
            |f| {
                rewrite(f, MODEL, &|name, raw| {
                    only(name, raw.clone(), (raw.0, vec![raw.1[0], 1], raw.2))
                })
            },
            |e| matches!(e, E::TensorShape { name, expected, actual } if name == VICTIM && expected == &[5] && actual == &[5, 1]),
        ),
        case(
            "a moment of another size",
            OPTIMIZER,
            |f| {
                rewrite(f, OPTIMIZER, &|name, raw| {
                    let bias = name.ends_with("norm.bias") && !name.contains("blocks");
                    Some(if bias {
                        (raw.0, vec![1], vec![0; 4])
                    } else {
                        raw
                    })
                })
            },
            |e| matches!(e, E::TensorShape { name, expected, actual } if name == "m.norm.bias" && expected == &[6] && actual == &[1]),
        ),
        case(
            "an average of another size",
            "ema.safetensors",
            |f| {
                rewrite(f, "ema.safetensors", &|name, raw| {
                    Some(if name == "norm.bias" {
                        (raw.0, vec![1], vec![0; 4])
                    } else {
                        raw
                    })
                })
            },
            |e| matches!(e, E::TensorShape { name, .. } if name == "norm.bias"),
        ),
        case(
            "double precision",
            MODEL,
            |f| rewrite(f, MODEL, &|name, raw| only(name, raw, f64_of(40))),
            |e| matches!(e, E::TensorType { name, dtype } if name == VICTIM && dtype == "F64"),
        ),
        case(
            "half precision moments",
            OPTIMIZER,
            |f| {
                rewrite(f, OPTIMIZER, &|name, raw| {
                    let half = (
                        safetensors::Dtype::F16,
                        vec![raw.2.len() / 2],
                        raw.2.clone(),
                    );
                    Some(if name == "m.head.weight" { half } else { raw })
                })
            },
            |e| matches!(e, E::TensorType { name, dtype } if name == "m.head.weight" && dtype == "F16"),
        ),
        case(
            "another format",
            "state.json",
            |f| manifest(f, &|json| json["format"] = json!(77)),
            |e| matches!(e, E::Format { found: 77, .. }),
        ),
        case(
            "the first format, which had no checksums",
            "state.json",
            |f| {
                manifest(f, &|json| json["format"] = json!(1));
                std::fs::remove_file(f.join("checksums")).unwrap();
            },
            |e| matches!(e, E::Format { found: 1, .. }),
        ),
        case(
            "another kind of model",
            "state.json",
            |f| manifest(f, &|json| json["kind"] = json!("image classifier")),
            |e| matches!(e, E::Kind { found, .. } if found == "image classifier"),
        ),
        case(
            "half a JSON file",
            "state.json",
            |f| {
                bytes(f, "state.json", &|b| b.truncate(b.len() / 2));
                seal(f)
            },
            |e| matches!(e, E::Json(_)),
        ),
        case(
            "the state of another program",
            "state.json",
            |f| manifest(f, &|json| json["state"] = json!([1])),
            |e| matches!(e, E::Json(_)),
        ),
        case(
            "a pool too few",
            "state.json",
            |f| {
                manifest(f, &|json| {
                    json["pools"].as_array_mut().unwrap().pop();
                })
            },
            |e| {
                matches!(
                    e,
                    E::Layers {
                        found: 1,
                        expected: 2
                    }
                )
            },
        ),
        case(
            "duplicated ids",
            "state.json",
            pool("experts", json!([0, 1, 1])),
            |e| {
                matches!(
                    e,
                    E::DuplicateExpert {
                        layer: 1,
                        expert: 1
                    }
                )
            },
        ),
        case(
            "an id that is yet to come",
            "state.json",
            pool("next_id", json!(2)),
            |e| matches!(e, E::Pool { layer: 1, .. }),
        ),
        case(
            "no experts",
            "state.json",
            pool("experts", json!([])),
            |e| matches!(e, E::Pool { layer: 1, .. }),
        ),
        case(
            "an offset too few",
            "state.json",
            pool("logit_offsets", json!([0.0])),
            |e| matches!(e, E::Pool { layer: 1, .. }),
        ),
        case(
            "a router of another kind",
            "state.json",
            pool(
                "router",
                json!({ "router": "top_k", "k": 1, "combine": "raw" }),
            ),
            |e| matches!(e, E::Pool { layer: 1, why } if why.contains("another kind")),
        ),
        case(
            "a weight that is no number",
            MODEL,
            |f| {
                rewrite(f, MODEL, &|name, raw| {
                    let nan = f32::NAN.to_le_bytes().repeat(raw.2.len() / 4);
                    only(name, raw.clone(), (raw.0, raw.1, nan))
                })
            },
            |e| matches!(e, E::NonFinite { name } if name == VICTIM),
        ),
        case(
            "an infinite offset",
            "state.json",
            pool("logit_offsets", json!([0.0, 1e39, 0.0])),
            |e| matches!(e, E::Json(_)),
        ),
        case(
            "ten million experts",
            MODEL,
            |f| {
                manifest(f, &|json| {
                    json["pools"][0]["experts"] = (0..100_000).collect();
                    json["pools"][0]["logit_offsets"] = vec![0.0; 100_000].into();
                    json["pools"][0]["next_id"] = json!(100_000);
                })
            },
            |e| matches!(e, E::MissingTensor { name } if name.starts_with("blocks.0.moe.experts.3.")),
        ),
        case(
            "a huge vocabulary",
            "state.json",
            model("vocab", json!(1u64 << 40)),
            |e| matches!(e, E::Settings(_)),
        ),
        case(
            "a vocabulary past all numbers",
            "state.json",
            model("vocab", json!(u64::MAX)),
            |e| matches!(e, E::Settings(_)),
        ),
        case("no layers", "state.json", model("layers", json!(0)), |e| {
            matches!(e, E::Settings(_))
        }),
        case(
            "heads that do not divide the width",
            "state.json",
            |f| manifest(f, &|json| json["model"]["block"]["heads"] = json!(4)),
            |e| matches!(e, E::Settings(_)),
        ),
        case(
            "an optimiser's impossible setting",
            "state.json",
            |f| manifest(f, &|json| json["optimizer"]["beta1"] = json!(1.5)),
            |e| matches!(e, E::Settings(_)),
        ),
        case(
            "an average's impossible setting",
            "state.json",
            |f| manifest(f, &|json| json["ema"]["decay"] = json!(-1.0)),
            |e| matches!(e, E::Settings(_)),
        ),
    ];
    refuse_all(cases);
}

//! Values computed by PyTorch, read from $MASS_GOLDEN_DIR.

use std::path::PathBuf;

use dfdx::prelude::*;
use mass_model::nn::{MoeConfig, MoeLayer};
use mass_model::ops::{MoeExpert, Network};
use mass_model::optim::{AdamW, AdamWConfig};
use mass_model::{Activation, CpuGradients, Param, Parameters, seeded_rng};
use mass_routing::{Combine, RouterConfig};
use safetensors::SafeTensors;

struct Golden {
    bytes: Vec<u8>,
    json: serde_json::Value,
}

impl Golden {
    fn load(name: &str) -> Self {
        let dir = PathBuf::from(
            std::env::var_os("MASS_GOLDEN_DIR").expect("MASS_GOLDEN_DIR names the golden values"),
        );
        let read = |ext: &str| {
            let path = dir.join(format!("{name}.{ext}"));
            std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
        };
        Self {
            bytes: read("safetensors"),
            json: serde_json::from_slice(&read("json")).unwrap(),
        }
    }

    fn tensor(&self, name: &str) -> (Vec<usize>, Vec<f32>) {
        let tensors = SafeTensors::deserialize(&self.bytes).unwrap();
        let view = tensors
            .tensor(name)
            .unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(view.dtype(), safetensors::Dtype::F32, "{name}");
        let values = view
            .data()
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
            .collect();
        (view.shape().to_vec(), values)
    }

    fn values(&self, name: &str) -> Vec<f32> {
        self.tensor(name).1
    }
}

/// Largest difference relative to the largest value.
fn assert_close(what: &str, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len(), "{what}");
    let largest = want
        .iter()
        .fold(0.0f32, |m, x| m.max(x.abs()))
        .max(f32::MIN_POSITIVE);
    let worst = got
        .iter()
        .zip(want)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0f32, f32::max);
    assert!(
        worst <= 1e-5 * largest,
        "{what}: off by {worst:e}, largest value {largest:e}"
    );
}

#[test]
fn golden_moe_ffn() {
    let g = Golden::load("moe_ffn");
    let size = |k: &str| usize::try_from(g.json[k].as_u64().unwrap()).unwrap();
    let (n, d, h, experts) = (size("tokens"), size("d"), size("hidden"), size("experts"));
    let p = g.json["p"].as_f64().unwrap() as f32;
    for threads in [1, 2, 3] {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        for (combine_name, combine) in [
            ("raw", Combine::Raw),
            ("renormalised", Combine::Renormalised),
        ] {
            for (act_name, activation) in [
                ("relu", Activation::Relu),
                ("gelu_erf", Activation::GeluErf),
                ("gelu_tanh", Activation::GeluTanh),
            ] {
                let row = |name: &str, e: usize, shape: &[usize], decays| {
                    let len: usize = shape.iter().product();
                    Param::new(g.values(name)[e * len..][..len].to_vec(), shape, decays).unwrap()
                };
                let pool_of = (0..experts)
                    .map(|e| MoeExpert {
                        gate: row("gate", e, &[d], true),
                        logit_offset: 0.0,
                        threshold: None,
                        network: Network {
                            fc1: (row("fc1_w", e, &[h, d], true), row("fc1_b", e, &[h], false)),
                            fc2: (row("fc2_w", e, &[d, h], true), row("fc2_b", e, &[d], false)),
                            up: None,
                        },
                    })
                    .collect();
                let router = RouterConfig::TopP { p, combine };
                let config = MoeConfig::new(d, h, experts, activation, router);
                let layer = MoeLayer::from_experts(&config, pool_of, &mut seeded_rng(0)).unwrap();
                let (x, y, mut grads) = pool.install(|| {
                    let dev = Cpu::default();
                    let x = dev.tensor_from_vec(g.values("x"), (n, d));
                    let y = layer.try_forward(x.clone().leaky_traced()).unwrap();
                    let values = y.as_vec();
                    // <dy, y> has dy for its gradient with respect to y.
                    let dy = dev.tensor_from_vec(g.values("dy"), (n, d));
                    let grads: CpuGradients = (y * dy).sum::<Rank0, _>().backward();
                    (x, values, grads)
                });
                let key = |what: &str| format!("{combine_name}.{act_name}.{what}");
                let check =
                    |what: &str, got: &[f32]| assert_close(&key(what), got, &g.values(&key(what)));
                check("y", &y);
                check("dx", &grads.get(&x).as_vec());
                let mut collect = |pick: &dyn Fn(&MoeExpert) -> &Param| {
                    let mut all = Vec::new();
                    for e in layer.experts() {
                        all.extend_from_slice(pick(e).gradient(&mut grads).unwrap());
                    }
                    all
                };
                check("dgate", &collect(&|e| &e.gate));
                check("dfc1_w", &collect(&|e| &e.network.fc1.0));
                check("dfc1_b", &collect(&|e| &e.network.fc1.1));
                check("dfc2_w", &collect(&|e| &e.network.fc2.0));
                check("dfc2_b", &collect(&|e| &e.network.fc2.1));
            }
        }
    }
}

struct One(Param);

impl Parameters for One {
    fn visit<'a>(&'a self, _: &str, f: &mut dyn FnMut(String, &'a Param)) {
        f("p".into(), &self.0);
    }
    fn visit_mut(&mut self, _: &str, f: &mut dyn FnMut(String, &mut Param)) {
        f("p".into(), &mut self.0);
    }
}

#[test]
fn golden_adamw() {
    let g = Golden::load("adamw");
    let number = |v: &serde_json::Value| v.as_f64().unwrap();
    assert_eq!(g.json["decoupled"], true);
    let config = AdamWConfig {
        beta1: number(&g.json["betas"][0]),
        beta2: number(&g.json["betas"][1]),
        eps: number(&g.json["eps"]),
        weight_decay: number(&g.json["weight_decay"]),
        clip_norm: None,
        groups: Vec::new(),
    };
    let (shape, first) = g.tensor("p0");
    let mut model = One(Param::new(first, &shape, true).unwrap());
    let mut optimiser = AdamW::new(config).unwrap();
    let names: Vec<String> = SafeTensors::deserialize(&g.bytes)
        .unwrap()
        .names()
        .into_iter()
        .map(str::to_owned)
        .collect();
    let steps = names.iter().filter(|n| n.starts_with('g')).count();
    assert!(steps > 0);
    for t in 0..steps {
        let mut grads = CpuGradients::leaky();
        model
            .0
            .set_gradient(&mut grads, g.values(&format!("g{t}")))
            .unwrap();
        optimiser
            .step(&mut model, &mut grads, number(&g.json["lr"]))
            .unwrap();
        assert_close(
            &format!("step {t}"),
            model.0.values(),
            &g.values(&format!("p{}", t + 1)),
        );
    }
}

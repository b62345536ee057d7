//! Settings of routers, in JSON and in one line, and what they say of a router.

use mass_routing::losses::BalanceCount;
use mass_routing::{
    AnyRouter, BiasBalanced, Combine, ExpertChoice, GateGradient, Router, RouterConfig,
    RoutingError, RoutingPlan, TargetK, TopAny, UsageStats,
};
use ndarray::Array2;
use serde_json::{Value, json};

/// One of every kind.
fn all() -> Vec<RouterConfig> {
    let of = |combine| {
        [
            RouterConfig::TopP { p: 0.3, combine },
            RouterConfig::TopK { k: 2, combine },
            RouterConfig::TopAny { experts: 3 },
            RouterConfig::BiasBalanced {
                k: 1,
                rate: 0.02,
                combine,
            },
            RouterConfig::TargetK {
                target: 1.5,
                p: 0.4,
                combine,
            },
            RouterConfig::ExpertChoice {
                capacity: 1.1,
                combine,
            },
        ]
    };
    let mut all: Vec<_> = Combine::ALL.into_iter().flat_map(of).collect();
    let noisy = |(i, inner): (usize, &RouterConfig)| RouterConfig::Noisy {
        std: 0.25,
        seed: 7 + i as u64,
        inner: Box::new(inner.clone()),
    };
    let behind: Vec<_> = all.iter().enumerate().map(noisy).collect();
    all.extend(behind);
    all
}

/// Adds a field to each object of a document in turn.
fn with_a_field_too_many(value: &Value) -> Vec<Value> {
    let mut found = Vec::new();
    let Value::Object(fields) = value else {
        return found;
    };
    let mut whole = value.clone();
    whole["surplus"] = json!(1);
    found.push(whole);
    for (key, inner) in fields {
        for changed in with_a_field_too_many(inner) {
            let mut whole = value.clone();
            whole[key] = changed;
            found.push(whole);
        }
    }
    found
}

#[test]
fn a_field_that_nobody_knows_is_refused_in_every_setting_and_state() {
    for config in all() {
        let text = serde_json::to_value(&config).unwrap();
        assert_eq!(
            serde_json::from_value::<RouterConfig>(text.clone()).unwrap(),
            config
        );
        for changed in with_a_field_too_many(&text) {
            let refused = serde_json::from_value::<RouterConfig>(changed.clone());
            assert!(
                refused.unwrap_err().to_string().contains("surplus"),
                "{changed}"
            );
        }
        let state = serde_json::to_value(config.build().unwrap()).unwrap();
        serde_json::from_value::<AnyRouter>(state.clone()).unwrap();
        for changed in with_a_field_too_many(&state) {
            let refused = serde_json::from_value::<AnyRouter>(changed.clone());
            assert!(
                refused.unwrap_err().to_string().contains("surplus"),
                "{changed}"
            );
        }
    }
    let usage = serde_json::to_value(UsageStats::new(2)).unwrap();
    for changed in with_a_field_too_many(&usage) {
        assert!(serde_json::from_value::<UsageStats>(changed).is_err());
    }
    assert!(serde_json::from_value::<BalanceCount>(json!("third")).is_err());
}

#[test]
fn one_line_holds_every_setting() {
    for config in all() {
        assert_eq!(config.to_string().parse::<RouterConfig>().unwrap(), config);
    }
    let combine = Combine::Renormalised;
    for (text, config) in [
        ("top_p:p=0.5", RouterConfig::TopP { p: 0.5, combine }),
        (
            " top-k : k = 2 , combine = raw",
            RouterConfig::TopK {
                k: 2,
                combine: Combine::Raw,
            },
        ),
        ("top_any", RouterConfig::TopAny { experts: 0 }),
        (
            "bias_balanced:k=2",
            RouterConfig::BiasBalanced {
                k: 2,
                rate: 1e-3,
                combine,
            },
        ),
        (
            "target_k:target=3",
            RouterConfig::TargetK {
                target: 3.0,
                p: 0.5,
                combine,
            },
        ),
    ] {
        assert_eq!(text.parse::<RouterConfig>().unwrap(), config, "{text}");
    }
    let behind = "noisy:std=0.1/top_any"
        .parse::<RouterConfig>()
        .unwrap()
        .with_experts(5);
    assert_eq!(behind.to_string(), "noisy:std=0.1,seed=0/top_any:experts=5");
}

#[test]
fn a_line_that_is_no_setting_says_what_is_wrong_with_it() {
    for (text, what) in [
        ("", "there are top_p, top_k"),
        ("topp:p=0.5", "there is no `topp`"),
        ("top_p", "top_p needs p"),
        ("top_p:p", "`p` is not SETTING=VALUE"),
        ("top_p:p=half", "p is `half`"),
        ("top_k:k=-1", "k is `-1`"),
        ("top_k:k=2.5", "k is `2.5`"),
        ("top_k:p=0.5", "top_k has no `p`; it has k, combine"),
        ("top_k:k=1,k=2", "`k` is given twice"),
        ("top_k:k=1,combine=sum", "combine is `sum`"),
        ("top_k:k=1/top_p:p=0.5", "only noisy"),
        ("noisy:std=0.1", "needs a router behind it"),
        ("noisy:std=0.1/", "there is no ``"),
        ("noisy:std=0.1/top_p:q=1", "top_p has no `q`"),
        ("expert_choice:k=1", "it has capacity, combine"),
    ] {
        let error = text.parse::<RouterConfig>().unwrap_err();
        assert!(matches!(error, RoutingError::InvalidText { .. }));
        assert!(error.to_string().contains(what), "{text}: {error}");
    }
    let deep = "noisy:std=0.1/".repeat(1 << 16) + "top_any";
    assert!(matches!(
        deep.parse::<RouterConfig>(),
        Err(RoutingError::InvalidText { .. })
    ));
}

/// `ceil(N c / K)` in whole numbers, `c` in hundredths.
fn exact(n: usize, hundredths: usize, k: usize) -> usize {
    (n * hundredths).div_ceil(100 * k).min(n)
}

#[test]
fn an_expert_takes_as_many_tokens_as_the_written_factor_says() {
    let tokens_of = |n: usize, k: usize, capacity: f64| {
        let logits = Array2::from_shape_fn((n, k), |(t, e)| ((t * 7 + e * 5) % 13) as f32 * 0.1);
        let mut plan = RoutingPlan::default();
        let mut router = ExpertChoice::new(capacity, Combine::Raw).unwrap();
        router.route(logits.view(), None, &mut plan).unwrap();
        (0..k).for_each(|e| assert_eq!(plan.load(e), plan.load(0)));
        plan.load(0)
    };
    assert_eq!(tokens_of(100, 10, 1.1), 11);
    for (n, k) in [(100, 10), (7, 3), (50, 7), (10, 1), (64, 8), (90, 9)] {
        for hundredths in (1..=300).chain([1000, 100_000]) {
            let capacity = hundredths as f64 / 100.0;
            let expected = exact(n, hundredths, k);
            assert_eq!(tokens_of(n, k, capacity), expected, "{n} x {k}, {capacity}");
            let short = (hundredths as f32 / 100.0).into();
            assert_eq!(
                tokens_of(n, k, short),
                expected,
                "{n} x {k}, {capacity} in f32"
            );
        }
    }
    // A factor that is a sum of others, and the smallest and largest there are.
    assert_eq!(tokens_of(10, 1, 0.1 + 0.2), 3);
    assert_eq!(tokens_of(10, 2, f64::MIN_POSITIVE), 1);
    assert_eq!(tokens_of(10, 2, f64::MAX), 10);
    assert_eq!(tokens_of(10, 1, 0.300001), 4);
    assert_eq!(tokens_of(0, 2, 1.1), 0);
}

#[test]
fn a_router_says_whether_the_gate_can_learn_from_its_weights() {
    use GateGradient::{Always, FromSeveralExperts, Never};
    let says = |text: &str| {
        let router = text.parse::<RouterConfig>().unwrap().build().unwrap();
        router.gate_gradient()
    };
    for (text, expected) in [
        ("top_k:k=1", Never),
        ("top_k:k=2", FromSeveralExperts),
        ("top_k:k=1,combine=raw", Always),
        ("bias_balanced:k=1", Never),
        ("bias_balanced:k=3", FromSeveralExperts),
        ("bias_balanced:k=1,combine=raw", Always),
        ("top_p:p=0.1", FromSeveralExperts),
        ("target_k:target=1", FromSeveralExperts),
        ("target_k:target=1,combine=raw", Always),
        ("expert_choice:capacity=1", FromSeveralExperts),
        ("top_any", Always),
        ("noisy:std=0.1/top_k:k=1", Never),
        ("noisy:std=0.1/top_k:k=1,combine=raw", Always),
    ] {
        assert_eq!(says(text), expected, "{text}");
    }
}

#[test]
fn a_batch_says_how_many_of_its_tokens_teach_the_gate() {
    // Torn between two experts, and sure of one.
    let logits = [0.1_f32, 0.0, -9.0, 9.0, 0.0, 0.0];
    let teaching = |text: &str| {
        let mut router = text
            .parse::<RouterConfig>()
            .unwrap()
            .with_experts(3)
            .build()
            .unwrap();
        let mut plan = RoutingPlan::default();
        router.route_slice(&logits, 3, None, &mut plan).unwrap();
        let taught = plan.tokens_teaching_gate();
        // As the gradient says.
        let d_weights: Vec<f32> = (0..plan.num_assignments())
            .map(|a| 1.0 + a as f32)
            .collect();
        let mut d = [0.0; 6];
        router.backward_slice(&plan, &d_weights, &mut d).unwrap();
        let moved = d
            .chunks(3)
            .filter(|d| d.iter().any(|d| d.abs() > 1e-12))
            .count();
        assert_eq!(taught, moved, "{text}: {d:?}");
        taught
    };
    assert_eq!(teaching("top_k:k=1"), 0);
    assert_eq!(teaching("top_k:k=2"), 2);
    assert_eq!(teaching("top_k:k=1,combine=raw"), 2);
    assert_eq!(teaching("top_p:p=0.6"), 1);
    assert_eq!(teaching("top_p:p=0.6,combine=raw"), 2);
    assert_eq!(teaching("top_any"), 2);
    let mut alone = RoutingPlan::default();
    let mut raw = "top_k:k=1,combine=raw"
        .parse::<RouterConfig>()
        .unwrap()
        .build()
        .unwrap();
    raw.route_slice(&[0.3, 0.4], 1, None, &mut alone).unwrap();
    assert_eq!(alone.tokens_teaching_gate(), 0);
}

#[test]
fn a_newcomer_has_what_was_learned_of_its_source() {
    let mut plan = RoutingPlan::default();
    let mut router = AnyRouter::BiasBalanced(BiasBalanced::new(1, 0.5, Combine::Raw).unwrap());
    router
        .route_slice(&[0.0, 1.0, 2.0, 0.0, 1.0, 2.0], 3, None, &mut plan)
        .unwrap();
    router.adapt(&plan).unwrap();
    let bias = |router: &AnyRouter| match router {
        AnyRouter::BiasBalanced(b) => b.bias().to_vec(),
        other => panic!("{other:?}"),
    };
    assert_eq!(bias(&router), [0.5, 0.5, -0.5]);
    router.split_expert(2, 3);
    assert_eq!(bias(&router), [0.5, 0.5, -0.5, -0.5]);
    router.remove_expert(0);
    router.split_expert(0, 3);
    assert_eq!(bias(&router), [0.5, -0.5, -0.5, 0.5]);
    // One that left from the end without a word is forgotten.
    router.split_expert(0, 3);
    assert_eq!(bias(&router), [0.5, -0.5, -0.5, 0.5]);
    // Before the first batch there is nothing to inherit, and the newcomer has its place.
    let mut fresh = AnyRouter::BiasBalanced(BiasBalanced::new(1, 0.5, Combine::Raw).unwrap());
    fresh.split_expert(1, 2);
    assert_eq!(bias(&fresh), [0.0; 3]);

    let mut any = TopAny::new(vec![0.1, 0.2]).unwrap();
    any.split_expert(1, 2);
    assert_eq!(any.thresholds(), [0.1, 0.2, 0.2]);
    let noisy = mass_routing::Noisy::new(AnyRouter::TopAny(any), 0.1, 0).unwrap();
    let mut noisy = AnyRouter::Noisy(Box::new(noisy));
    noisy.split_expert(0, 3);
    let AnyRouter::Noisy(noisy) = noisy else {
        panic!()
    };
    let AnyRouter::TopAny(inner) = noisy.inner() else {
        panic!()
    };
    assert_eq!(inner.thresholds(), [0.1, 0.2, 0.2, 0.1]);
}

#[test]
fn a_place_in_the_noise_that_is_none_is_refused() {
    let read = |position: [u64; 2]| {
        serde_json::from_value::<AnyRouter>(json!({
            "router": "noisy", "inner": { "router": "top_k", "k": 1 },
            "std": 0.5, "seed": 1, "position": position, "training": true,
        }))
    };
    let last = read([u64::MAX, 15]).unwrap();
    let written = serde_json::to_value(last).unwrap();
    assert_eq!(written["position"], json!([u64::MAX, 15]));
    let refused = read([0, 16]).unwrap_err().to_string();
    assert!(refused.contains("2^68"), "{refused}");
}

#[test]
fn rows_around_are_no_more_than_can_be_drawn() {
    let inner = AnyRouter::TopK(mass_routing::TopK::new(1, Combine::Raw).unwrap());
    let mut noisy = mass_routing::Noisy::new(inner, 0.1, 0).unwrap();
    for around in [(1 << 60, 0), (0, 1 << 31)] {
        noisy.set_rows_around(around.0, around.1);
        let refused = noisy.route_slice(&[1.0, 2.0], 2, None, &mut RoutingPlan::default());
        let named = matches!(refused, Err(RoutingError::TooLarge { .. }));
        assert!(named, "{around:?}: {refused:?}");
    }
}

#[test]
fn a_steered_p_stays_within_its_limits() {
    let mut router = TargetK::new(3.0, 1e-5, Combine::Raw).unwrap();
    assert_eq!(router.p(), 1e-3);
    router = router.with_gains(1.7e308, 1.7e308).unwrap();
    let mut plan = RoutingPlan::default();
    router.route_slice(&[9.0, 1.0], 2, None, &mut plan).unwrap();
    let refused = router.adapt(&plan);
    let named = matches!(refused, Err(RoutingError::NonFinite { .. }));
    assert!(named && router.p() == 1e-3, "{refused:?}");
    let written = serde_json::to_value(&router).unwrap();
    assert_eq!(
        serde_json::from_value::<TargetK>(written.clone()).unwrap(),
        router
    );
    for x in [json!(0.0), json!(1e300)] {
        let mut other = written.clone();
        other["x"] = x;
        assert!(serde_json::from_value::<TargetK>(other).is_err());
    }
}

#[test]
fn a_mask_of_another_length_is_named_as_that() {
    let mut plan = RoutingPlan::default();
    let mut router = mass_routing::TopK::new(2, Combine::Raw).unwrap();
    let refused = router.route_slice(&[1.0, 2.0, 3.0], 3, Some(&[true]), &mut plan);
    let named = matches!(refused, Err(RoutingError::ShapeMismatch { .. }));
    assert!(named, "{refused:?}");
}

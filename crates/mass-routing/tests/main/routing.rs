//! What every plan promises, against brute force on random and on extreme logits.

use mass_routing::{
    AnyRouter, BiasBalanced, Combine, ExpertChoice, Loads, Noisy, NonFinite, Router, RouterConfig,
    RoutingError, RoutingPlan, TargetK, TopAny, TopK, TopP,
};
use ndarray::{Array2, ArrayView2, array};
use proptest::prelude::*;

/// Sizes on both sides of every internal boundary: vector width, block of tokens, algorithm.
fn case() -> impl Strategy<Value = (Array2<f32>, Vec<bool>, f32)> {
    (
        1_usize..40,
        prop_oneof![
            1_usize..20,
            Just(33),
            Just(64),
            Just(100),
            Just(257),
            Just(300),
            Just(515)
        ],
    )
        .prop_flat_map(|(n, k)| {
            let spread = prop_oneof![Just(0.5_f32), Just(2.0), Just(10.0), Just(1e4)];
            let quantum = prop_oneof![Just(0.0_f32), Just(1.0)];
            let logits = proptest::collection::vec(-1.0_f32..1.0, n * k);
            let some = proptest::collection::vec(prop::bool::weighted(0.8), k);
            let mask = prop_oneof![some, Just(vec![true; k])];
            let p = prop_oneof![0.01_f32..1.0, Just(1.0), Just(0.5)];
            (logits, mask, p, spread, quantum, 0..k).prop_map(
                move |(v, mut mask, p, spread, quantum, keep)| {
                    // Rounded to whole numbers there are many ties.
                    let shape = |x: f32| {
                        if quantum > 0.0 {
                            (x * spread.min(4.0)).round()
                        } else {
                            x * spread
                        }
                    };
                    mask[keep] = true;
                    (
                        Array2::from_shape_vec((n, k), v.into_iter().map(shape).collect()).unwrap(),
                        mask,
                        p,
                    )
                },
            )
        })
}

fn route(
    router: &mut dyn Router,
    logits: ArrayView2<'_, f32>,
    mask: Option<&[bool]>,
) -> RoutingPlan {
    let mut plan = RoutingPlan::default();
    router.route(logits, mask, &mut plan).unwrap();
    plan.validate().unwrap();
    plan
}

fn experts_of(plan: &RoutingPlan, t: usize) -> &[u32] {
    &plan.token_experts()[plan.token_offsets()[t] as usize..plan.token_offsets()[t + 1] as usize]
}

fn weights_of(plan: &RoutingPlan, t: usize) -> Vec<f32> {
    let own = plan.token_offsets()[t] as usize..plan.token_offsets()[t + 1] as usize;
    plan.token_assignments()[own]
        .iter()
        .map(|&a| plan.weights()[a as usize])
        .collect()
}

/// A mask that leaves everything in use is not given at all: most models have none, and whole tiles of tokens are then routed
/// at a time.
fn partial(mask: &[bool]) -> Option<&[bool]> {
    mask.contains(&false).then_some(mask)
}

/// Experts sorted by descending key, ties to the lower index.
fn ranked(keys: impl Iterator<Item = f32>) -> Vec<(u32, f32)> {
    let mut all: Vec<(u32, f32)> = keys.enumerate().map(|(e, k)| (e as u32, k)).collect();
    // Not total_cmp: 0 and -0 tie.
    all.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap().then(a.0.cmp(&b.0)));
    all
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn probabilities_are_the_softmax((logits, mask, p) in case()) {
        let plan = route(&mut TopP::new(p, Combine::Raw).unwrap(), logits.view(), partial(&mask));
        for (row, r) in logits.outer_iter().zip(plan.probabilities().outer_iter()) {
            let used = || row.iter().zip(&mask).filter(|(_, m)| **m).map(|(l, _)| f64::from(*l));
            let max = used().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = used().map(|l| (l - max).exp()).sum();
            for ((&l, &m), &r) in row.iter().zip(&mask).zip(r) {
                let x = f64::from(l) - max;
                let exact = if m { x.exp() / sum } else { 0.0 };
                // x is rounded to f32 before the exponential.
                let tolerance = f64::from(f32::EPSILON) * (6.0 + x.abs()) * exact;
                prop_assert!((f64::from(r) - exact).abs() <= tolerance + 1e-37, "{r} for {exact}");
                prop_assert!(m || r == 0.0);
            }
        }
    }

    #[test]
    fn top_p_takes_the_smallest_set_of_the_mass((logits, mask, p) in case()) {
        let plan = route(&mut TopP::new(p, Combine::Raw).unwrap(), logits.view(), partial(&mask));
        for t in 0..plan.num_tokens() {
            let ranked = ranked(plan.probabilities().row(t).iter().copied());
            let mut mass = 0.0_f64;
            let mut expected = Vec::new();
            for (e, r) in ranked {
                if r == 0.0 || (p < 1.0 && mass >= f64::from(p)) {
                    break;
                }
                mass += f64::from(r);
                expected.push(e);
            }
            expected.sort_unstable();
            prop_assert!(!expected.is_empty());
            prop_assert_eq!(experts_of(&plan, t), &expected[..]);
            for (&e, w) in expected.iter().zip(weights_of(&plan, t)) {
                prop_assert_eq!(w, plan.probabilities()[(t, e as usize)]);
            }
        }
    }

    #[test]
    fn top_k_takes_the_largest((logits, mask, _) in case(), share in 0.0_f64..1.0) {
        let available = mask.iter().filter(|&&m| m).count();
        let k = 1 + (share * (available - 1) as f64).round() as usize;
        let plan = route(&mut TopK::new(k, Combine::Renormalised).unwrap(), logits.view(), partial(&mask));
        for t in 0..plan.num_tokens() {
            let keys = logits.row(t).iter().zip(&mask).map(|(&l, &m)| if m { l } else { f32::NEG_INFINITY }).collect::<Vec<_>>();
            let mut expected: Vec<u32> = ranked(keys.into_iter()).into_iter().take(k).map(|(e, _)| e).collect();
            expected.sort_unstable();
            prop_assert_eq!(experts_of(&plan, t), &expected[..]);
        }
    }

    #[test]
    fn renormalised_weights_sum_to_one((logits, mask, p) in case()) {
        let plan = route(&mut TopP::new(p, Combine::Renormalised).unwrap(), logits.view(), partial(&mask));
        for t in 0..plan.num_tokens() {
            let weights = weights_of(&plan, t);
            let sum: f64 = weights.iter().map(|&w| f64::from(w)).sum();
            // The roundings of a sum in f32, of its inverse and of a product, each at most half an epsilon.
            let roundings = (weights.len() + 1) as f64;
            prop_assert!((sum - 1.0).abs() <= roundings * f64::from(f32::EPSILON) / 2.0 * 1.01, "{sum}");
        }
    }

    #[test]
    fn permuting_experts_permutes_the_plan((logits, mask, p) in case(), seed in any::<u64>()) {
        let k = logits.ncols();
        // Ties go to the lower index, which a permutation moves: part them by rank instead.
        let logits = Array2::from_shape_fn(logits.dim(), |(t, e)| logits[(t, e)] % 8.0 + e as f32 * 1e-3);
        let mut order: Vec<usize> = (0..k).collect();
        order.sort_by_key(|&e| (e as u64 + 1).wrapping_mul(seed | 1));
        let permuted = Array2::from_shape_fn(logits.dim(), |(t, e)| logits[(t, order[e])]);
        let permuted_mask: Vec<bool> = order.iter().map(|&e| mask[e]).collect();
        let mut router = TopK::new(1, Combine::Raw).unwrap();
        let mut top_p = TopP::new(p, Combine::Raw).unwrap();
        for router in [&mut router as &mut dyn Router, &mut top_p] {
            let a = route(router, logits.view(), Some(&mask));
            let b = route(router, permuted.view(), Some(&permuted_mask));
            for t in 0..logits.nrows() {
                let mut back: Vec<u32> = experts_of(&b, t).iter().map(|&e| order[e as usize] as u32).collect();
                back.sort_unstable();
                if experts_of(&a, t) != back {
                    // Logits that differ may have equal probabilities, which tie; and the sums of the two orders may differ in the last
                    // bit, which matters only where the mass is p but for rounding.
                    let r = |experts: &[u32]| {
                        let mut r: Vec<f32> = experts.iter().map(|&e| a.probabilities()[(t, e as usize)]).collect();
                        r.sort_by(f32::total_cmp);
                        r
                    };
                    let (ours, theirs) = (r(experts_of(&a, t)), r(&back));
                    let tied = ours.len() == theirs.len() && ours.iter().zip(&theirs).all(|(a, b)| (a - b).abs() <= 1e-6 * a);
                    let mass: f64 = ours.iter().map(|&r| f64::from(r)).sum();
                    let gap = (mass - f64::from(p)).abs().min((mass - f64::from(ours[0]) - f64::from(p)).abs());
                    prop_assert!(tied || gap < 1e-6, "token {t}: {:?} and {back:?}", experts_of(&a, t));
                }
            }
        }
    }

    #[test]
    fn the_number_of_threads_changes_nothing(seed in any::<u32>(), k in prop_oneof![Just(5_usize), Just(16), Just(40), Just(200), Just(300)]) {
        let n = 40_000 / k + 77;
        let logits = Array2::from_shape_fn((n, k), |(t, e)| {
            let x = (t as u32).wrapping_mul(2_654_435_761).wrapping_add(e as u32 * 40_503).wrapping_add(seed).wrapping_mul(2_246_822_519);
            (x >> 8) as f32 / 4e6
        });
        let plans: Vec<RoutingPlan> = [1, 2, 3, 5].into_iter().map(|threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| route(&mut TopP::new(0.7, Combine::Renormalised).unwrap(), logits.view(), None))
        }).collect();
        for plan in &plans[1..] {
            prop_assert_eq!(plan.tokens(), plans[0].tokens());
            prop_assert_eq!(plan.weights(), plans[0].weights());
            prop_assert_eq!(plan.expert_offsets(), plans[0].expert_offsets());
            prop_assert_eq!(plan.token_assignments(), plans[0].token_assignments());
            prop_assert_eq!(plan.token_offsets(), plans[0].token_offsets());
            prop_assert_eq!(plan.token_experts(), plans[0].token_experts());
            prop_assert_eq!(plan.probabilities(), plans[0].probabilities());
        }
    }

    #[test]
    fn a_masked_pool_routes_like_the_smaller_one((logits, mask, p) in case()) {
        let used: Vec<usize> = (0..mask.len()).filter(|&e| mask[e]).collect();
        let mut garbage = logits.clone();
        for (e, &m) in mask.iter().enumerate() {
            if !m {
                garbage.column_mut(e).fill(f32::NAN);
            }
        }
        let small = Array2::from_shape_fn((logits.nrows(), used.len()), |(t, e)| logits[(t, used[e])]);
        let mut router = TopP::new(p, Combine::Raw).unwrap();
        let a = route(&mut router, garbage.view(), Some(&mask));
        let b = route(&mut router, small.view(), None);
        for t in 0..logits.nrows() {
            let chosen: Vec<u32> = experts_of(&b, t).iter().map(|&e| used[e as usize] as u32).collect();
            let mass: f64 = weights_of(&a, t).iter().map(|&w| f64::from(w)).sum();
            // Sums of another order: equal but for the last bit.
            if experts_of(&a, t) != chosen {
                let least = weights_of(&a, t).into_iter().fold(1.0, f32::min);
                let gap = (mass - f64::from(p)).abs().min((mass - f64::from(least) - f64::from(p)).abs());
                prop_assert!(gap < 1e-6);
            }
        }
    }

    #[test]
    fn every_router_keeps_its_promises_and_survives_json((logits, mask, p) in case(), seed in any::<u64>()) {
        let k = logits.ncols();
        let configs = [
            RouterConfig::TopP { p, combine: Combine::Raw },
            RouterConfig::TopK { k: 1, combine: Combine::Renormalised },
            RouterConfig::TopAny { experts: k },
            RouterConfig::BiasBalanced { k: 1, rate: 1e-3, combine: Combine::Raw },
            RouterConfig::TargetK { target: 2.0, p: p.min(0.9), combine: Combine::Raw },
            RouterConfig::ExpertChoice { capacity: 1.5, combine: Combine::Renormalised },
            RouterConfig::Noisy { std: 0.5, seed, inner: Box::new(RouterConfig::TopP { p, combine: Combine::Raw }) },
        ];
        for config in configs {
            let text = serde_json::to_string(&config).unwrap();
            prop_assert_eq!(&serde_json::from_str::<RouterConfig>(&text).unwrap(), &config);
            let mut router = config.build().unwrap();
            let plan = route(&mut router, logits.view(), Some(&mask));
            router.adapt(&plan).unwrap();
            for (&e, &w) in plan.token_experts().iter().zip(plan.weights()) {
                prop_assert!(mask[e as usize]);
                prop_assert!((0.0..=1.0 + 1e-6).contains(&w));
            }
            // The state survives: the same next plan.
            let mut copy: AnyRouter = serde_json::from_str(&serde_json::to_string(&router).unwrap()).unwrap();
            let (a, b) = (route(&mut router, logits.view(), None), route(&mut copy, logits.view(), None));
            prop_assert_eq!(a.tokens(), b.tokens());
            prop_assert_eq!(a.weights(), b.weights());
        }
    }

    #[test]
    fn experts_choose_their_best_tokens((logits, mask, _) in case(), capacity in 0.2_f64..3.0) {
        let plan = route(&mut ExpertChoice::new(capacity, Combine::Raw).unwrap(), logits.view(), Some(&mask));
        let available = mask.iter().filter(|&&m| m).count();
        let n = logits.nrows();
        let count = ((n as f64 * capacity / available as f64).ceil() as usize).min(n);
        for (e, &used) in mask.iter().enumerate() {
            if !used {
                prop_assert_eq!(plan.load(e), 0);
                continue;
            }
            let mut expected: Vec<u32> = ranked(plan.probabilities().column(e).iter().copied()).into_iter().take(count).map(|(t, _)| t).collect();
            expected.sort_unstable();
            prop_assert_eq!(&plan.tokens()[plan.segment(e)], &expected[..]);
        }
    }
}

#[test]
fn ties_go_to_the_lower_index() {
    let flat = Array2::<f32>::zeros((3, 70));
    let plan = route(
        &mut TopP::new(0.5, Combine::Raw).unwrap(),
        flat.view(),
        None,
    );
    let half: Vec<u32> = (0..35).collect();
    assert!(
        (0..3).all(|t| experts_of(&plan, t) == half
            || experts_of(&plan, t) == (0..36).collect::<Vec<u32>>())
    );
    let plan = route(&mut TopK::new(33, Combine::Raw).unwrap(), flat.view(), None);
    assert_eq!(experts_of(&plan, 1), (0..33).collect::<Vec<u32>>());
    let plan = route(&mut TopK::new(1, Combine::Raw).unwrap(), flat.view(), None);
    assert_eq!(plan.load(0), 3);
}

/// Experts whose mass is exactly p are enough: of equal logits over a power of two of experts, where every probability and every
/// sum is exact in f32, Top-p with p = 1/2 takes the first half.
#[test]
fn a_mass_of_exactly_p_is_reached() {
    for k in [4, 16, 64, 128] {
        // A whole tile of tokens, and three after it.
        let flat = Array2::<f32>::zeros((19, k));
        let plan = route(
            &mut TopP::new(0.5, Combine::Raw).unwrap(),
            flat.view(),
            None,
        );
        let half: Vec<u32> = (0..k as u32 / 2).collect();
        for t in 0..19 {
            assert_eq!(experts_of(&plan, t), half, "{k} experts, token {t}");
        }
    }
}

#[test]
fn extreme_inputs_behave() {
    let mut top_p = TopP::new(0.9, Combine::Renormalised).unwrap();
    // No tokens.
    let plan = route(&mut top_p, Array2::zeros((0, 4)).view(), None);
    assert_eq!(
        (
            plan.num_tokens(),
            plan.num_assignments(),
            plan.expert_offsets().len()
        ),
        (0, 0, 5)
    );
    assert_eq!((plan.mean_k(), plan.probabilities().dim()), (0.0, (0, 4)));
    // One expert; one token.
    let plan = route(&mut top_p, array![[-3e38_f32], [3e38], [0.0]].view(), None);
    assert_eq!(plan.weights(), [1.0; 3]);
    // Logits of +-1e4 and the ends of the range: the softmax underflows, and p = 1 takes what is left of it.
    for large in [1e4, f32::MAX] {
        let logits = array![[large, -large, 0.0], [-large, -large, -large]];
        let plan = route(
            &mut TopP::new(1.0, Combine::Raw).unwrap(),
            logits.view(),
            None,
        );
        assert_eq!(experts_of(&plan, 0), [0]);
        assert_eq!(experts_of(&plan, 1), [0, 1, 2]);
        // Top-k still has to find three, by their logits.
        let plan = route(
            &mut TopK::new(2, Combine::Raw).unwrap(),
            logits.view(),
            None,
        );
        assert_eq!(
            (experts_of(&plan, 0), experts_of(&plan, 1)),
            (&[0, 2][..], &[0, 1][..])
        );
        assert_eq!(weights_of(&plan, 0), [1.0, 0.0]);
    }
    // p = 1 takes everybody.
    let plan = route(
        &mut TopP::new(1.0, Combine::Raw).unwrap(),
        Array2::from_shape_fn((5, 90), |(t, e)| (t * e) as f32 * 0.2).view(),
        None,
    );
    assert!((0..5).all(|t| plan.k(t) == 90));
    // Rows of another layout.
    let logits = array![[3.0_f32, 0.0], [0.0, 1.0], [2.0, 1.0]];
    let columns = logits.t().as_standard_layout().into_owned();
    let (a, b) = (
        route(&mut top_p, logits.view(), None),
        route(&mut top_p, columns.t(), None),
    );
    assert_eq!((a.tokens(), a.weights()), (b.tokens(), b.weights()));
}

#[test]
fn a_plan_is_reused_across_sizes() {
    let mut plan = RoutingPlan::default();
    let mut router = TopP::new(0.6, Combine::Raw).unwrap();
    for (n, k) in [(700, 64), (3, 5), (0, 2), (900, 40), (1, 300), (40, 7)] {
        let logits = Array2::from_shape_fn((n, k), |(t, e)| ((t * 31 + e * 17) % 23) as f32 * 0.3);
        router.route(logits.view(), None, &mut plan).unwrap();
        plan.validate().unwrap();
        let fresh = route(&mut router, logits.view(), None);
        assert_eq!(
            (plan.tokens(), plan.weights(), plan.token_assignments()),
            (fresh.tokens(), fresh.weights(), fresh.token_assignments())
        );
        let copy = plan.clone();
        assert_eq!(
            (copy.tokens(), copy.probabilities()),
            (plan.tokens(), plan.probabilities())
        );
    }
}

/// Rows of a view that is not contiguous are routed one by one and sorted, those of an array in tiles and packed: to the same plan.
#[test]
fn how_logits_lie_in_memory_changes_nothing() {
    for k in [3, 16, 17, 64, 128, 129, 200, 256, 257] {
        // Over 1024 tokens: several cuts of a block.
        let n = if k == 16 { 2500 } else { 600 };
        let logits = Array2::from_shape_fn((n, k), |(t, e)| {
            let x = ((t * k + e) as u32).wrapping_mul(2_654_435_761);
            (x ^ (x >> 15)) as f32 / u32::MAX as f32 * 8.0
        });
        let across = logits.t().as_standard_layout().into_owned();
        for combine in [Combine::Raw, Combine::Renormalised] {
            let mut router = TopP::new(0.6, combine).unwrap();
            let (tiled, single) = (
                route(&mut router, logits.view(), None),
                route(&mut router, across.t(), None),
            );
            assert_eq!(tiled.expert_offsets(), single.expert_offsets(), "{k}");
            assert_eq!(tiled.token_offsets(), single.token_offsets(), "{k}");
            assert_eq!(tiled.tokens(), single.tokens(), "{k}");
            assert_eq!(tiled.token_experts(), single.token_experts(), "{k}");
            assert_eq!(tiled.token_assignments(), single.token_assignments());
            for (a, b) in tiled.weights().iter().zip(single.weights()) {
                // Up to 128 experts, tiles sum in an order of their own.
                assert!(a == b || k <= 128 && (a - b).abs() <= 1e-6 * b, "{k}");
            }
        }
    }
}

#[test]
fn non_finite_logits_are_named_or_skipped() {
    for (k, bad) in [(3, f32::NAN), (40, f32::INFINITY), (300, f32::NEG_INFINITY)] {
        let mut logits = Array2::<f32>::zeros((200, k));
        logits[(150, k - 1)] = bad;
        logits[(170, 0)] = bad;
        let mut plan = RoutingPlan::default();
        let error = TopP::new(0.5, Combine::Raw)
            .unwrap()
            .route(logits.view(), None, &mut plan)
            .unwrap_err();
        assert!(
            matches!(error, RoutingError::NonFiniteLogit { token: 150, expert, .. } if expert == k - 1),
            "{error}"
        );
        assert_eq!((plan.num_tokens(), plan.num_assignments()), (0, 0));
        let mut skip = TopP::new(0.5, Combine::Raw)
            .unwrap()
            .with_non_finite(NonFinite::Skip);
        let plan = route(&mut skip, logits.view(), None);
        assert_eq!((plan.skipped(), plan.k(150), plan.k(170)), (2, 0, 0));
        assert!(plan.probabilities().row(150).iter().all(|&r| r == 0.0));
        assert!((0..200).all(|t| t == 150 || t == 170 || plan.k(t) > 0));
    }
    let mut choice = ExpertChoice::new(1.0, Combine::Raw)
        .unwrap()
        .with_non_finite(NonFinite::Skip);
    let plan = route(
        &mut choice,
        array![[f32::NAN, 0.0], [0.0, 0.0]].view(),
        None,
    );
    assert_eq!((plan.k(0), plan.k(1)), (0, 2));
}

#[test]
fn bad_parameters_and_shapes_are_named() {
    for p in [0.0, -0.1, 1.1, f32::NAN, f32::INFINITY] {
        assert!(matches!(
            TopP::new(p, Combine::Raw),
            Err(RoutingError::InvalidParameter { name: "p", .. })
        ));
        assert!(TargetK::new(2.0, p, Combine::Raw).is_err());
    }
    assert!(TopK::new(0, Combine::Raw).is_err());
    assert!(BiasBalanced::new(1, f32::NAN, Combine::Raw).is_err());
    assert!(TargetK::new(0.5, 0.5, Combine::Raw).is_err());
    assert!(
        TargetK::new(2.0, 0.5, Combine::Raw)
            .unwrap()
            .with_gains(-1.0, 1.0)
            .is_err()
    );
    assert!(ExpertChoice::new(0.0, Combine::Raw).is_err());
    assert!(TopAny::new(vec![0.0, f32::NAN]).is_err());
    let bad_noise = RouterConfig::Noisy {
        std: -1.0,
        seed: 0,
        inner: Box::new(RouterConfig::TopK {
            k: 1,
            combine: Combine::Raw,
        }),
    };
    assert!(bad_noise.build().is_err());

    let mut plan = RoutingPlan::default();
    let logits = Array2::<f32>::zeros((2, 3));
    let mut top_p = TopP::new(0.5, Combine::Raw).unwrap();
    let masked = top_p.route(logits.view(), Some(&[false; 3]), &mut plan);
    assert_eq!(masked, Err(RoutingError::AllExpertsMasked { experts: 3 }));
    let short = top_p.route(logits.view(), Some(&[true; 2]), &mut plan);
    assert!(matches!(
        short,
        Err(RoutingError::ShapeMismatch {
            expected: 3,
            found: 2,
            ..
        })
    ));
    assert_eq!(
        top_p.route(Array2::zeros((2, 0)).view(), None, &mut plan),
        Err(RoutingError::NoExperts)
    );
    let few = TopK::new(3, Combine::Raw).unwrap().route(
        logits.view(),
        Some(&[true, false, true]),
        &mut plan,
    );
    assert_eq!(few, Err(RoutingError::TooFewExperts { k: 3, available: 2 }));
    assert!(
        few.unwrap_err()
            .to_string()
            .contains("k = 3 experts, but only 2")
    );
    let any = TopAny::new(vec![0.0; 2])
        .unwrap()
        .route(logits.view(), None, &mut plan);
    assert!(matches!(any, Err(RoutingError::ShapeMismatch { .. })));
    for text in [
        r#"{"router":"top_p","p":0.0,"combine":"raw"}"#,
        r#"{"router":"top_k","k":0,"combine":"raw"}"#,
        r#"{"router":"target_k","target":2.0,"proportional":0.1,"integral":0.1,"previous_error":0.0,"x":0.0,"top_p":{"p":7.0}}"#,
        r#"{"router":"expert_choice","capacity":-1.0}"#,
        r#"{"router":"bias_balanced","k":1,"rate":0.0}"#,
        r#"{"router":"nobody"}"#,
    ] {
        assert!(serde_json::from_str::<AnyRouter>(text).is_err(), "{text}");
    }
}

#[test]
fn the_balancing_bias_balances_and_noise_is_seeded() {
    let logits = Array2::from_shape_fn((512, 8), |(t, e)| {
        ((t * 37 + e * 101) % 97) as f32 / 97.0 + if e == 0 { 1.5 } else { 0.0 }
    });
    let mut router = BiasBalanced::new(2, 5e-3, Combine::Renormalised).unwrap();
    let before = route(&mut router, logits.view(), None).load(0);
    for _ in 0..400 {
        let plan = route(&mut router, logits.view(), None);
        router.adapt(&plan).unwrap();
    }
    let after = route(&mut router, logits.view(), None).load(0);
    assert!(
        before > 500 && after < 160,
        "{before} then {after}; even would be 128"
    );
    // An expert that leaves takes its bias along, also behind noise; one that comes has none.
    let learned = router.bias().to_vec();
    let mut noisy = Noisy::new(AnyRouter::BiasBalanced(router.clone()), 0.0, 1).unwrap();
    router.remove_expert(0);
    noisy.remove_expert(0);
    assert_eq!(router.bias(), &learned[1..]);
    assert_eq!(noisy.inner(), &AnyRouter::BiasBalanced(router.clone()));
    route(&mut router, logits.view(), None);
    assert_eq!(router.bias(), [&learned[1..], &[0.0]].concat());
    assert_eq!((router.least_experts(), noisy.least_experts()), (2, 2));

    let config = |seed| RouterConfig::Noisy {
        std: 1.0,
        seed,
        inner: Box::new(RouterConfig::TopK {
            k: 1,
            combine: Combine::Raw,
        }),
    };
    let first = |seed, training| {
        let mut router = config(seed).build().unwrap();
        router.set_training(training);
        route(&mut router, logits.view(), None).tokens().to_vec()
    };
    assert_eq!(first(1, true), first(1, true));
    assert_ne!(first(1, true), first(2, true));
    assert_eq!(first(1, false), first(2, false));
}

/// The noise of the gate has mean zero and the standard deviation asked for while training, and there is none in evaluation.
#[test]
fn gate_noise_has_the_standard_deviation_asked_for() {
    let zeros = Array2::<f32>::zeros((2000, 8));
    let inner = AnyRouter::TopK(TopK::new(1, Combine::Raw).unwrap());
    let mut router = Noisy::new(inner, 0.25, 7).unwrap();
    route(&mut router, zeros.view(), None);
    let noise: Vec<f64> = router
        .noisy_logits()
        .iter()
        .map(|&l| f64::from(l))
        .collect();
    assert_eq!(noise.len(), zeros.len());
    let n = noise.len() as f64;
    let mean = noise.iter().sum::<f64>() / n;
    let variance = noise.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
    // Standard errors: 0.002 and 0.0014.
    assert!(mean.abs() < 0.01, "mean {mean}");
    assert!(
        (variance.sqrt() - 0.25).abs() < 0.01,
        "standard deviation {}",
        variance.sqrt()
    );
    router.set_training(false);
    route(&mut router, zeros.view(), None);
    assert!(router.noisy_logits().iter().all(|&l| l == 0.0));
}

/// Two steps of the controller are those of its formula: `x = ln(p / (1 - p))` moves by `K_p (e_t - e_{t-1}) + K_i e_t`, from `e_0 = 0`
/// and with `e_t = ln(target / mean k_t)`.
#[test]
fn target_k_takes_the_steps_of_its_formula() {
    let logits = Array2::from_shape_fn((6, 8), |(t, e)| ((t * 5 + e * 3) % 8) as f32);
    let default = TargetK::new(3.0, 0.6, Combine::Raw).unwrap();
    let other = default.clone().with_gains(0.5, 0.1).unwrap();
    // Worked out with a calculator: after a batch of 4 experts per token, and after one of 2.
    for (mut router, gains, by_hand) in [
        (default, (0.2, 0.3), [0.565_035_48, 0.627_590_32]),
        (other, (0.5, 0.1), [0.557_952_35, 0.650_213_08]),
    ] {
        let mut x = (0.6_f64 / 0.4).ln();
        let mut previous = 0.0;
        for (k, by_hand) in [4, 2].into_iter().zip(by_hand) {
            let plan = route(
                &mut TopK::new(k, Combine::Raw).unwrap(),
                logits.view(),
                None,
            );
            router.adapt(&plan).unwrap();
            let error = (3.0_f64 / k as f64).ln();
            x += gains.0 * (error - previous) + gains.1 * error;
            previous = error;
            let (got, want) = (f64::from(router.p()), 1.0 / (1.0 + (-x).exp()));
            assert!((got - want).abs() < 1e-6, "k {k}: {got} for {want}");
            assert!((got - by_hand).abs() < 1e-6, "k {k}: {got} for {by_hand}");
        }
    }
}

/// The balancing bias moves against loads as compared with their mean over the experts in use, and not at all where an expert is
/// masked.
#[test]
fn the_balancing_bias_ignores_masked_experts() {
    // Loads of 14, none, 7 and 3: their mean is 8 over the three in use, and would be 6 over all four.
    let logits = Array2::from_shape_fn((24, 4), |(t, e)| {
        let first = if t < 14 {
            0
        } else if t < 21 {
            2
        } else {
            3
        };
        if e == 1 {
            9.0
        } else if e == first {
            1.0
        } else {
            0.0
        }
    });
    let rate = 0.01;
    let mut router = BiasBalanced::new(1, rate, Combine::Raw).unwrap();
    let plan = route(&mut router, logits.view(), Some(&[true, false, true, true]));
    assert_eq!([0, 1, 2, 3].map(|e| plan.load(e)), [14, 0, 7, 3]);
    router.adapt(&plan).unwrap();
    assert_eq!(router.bias(), [-rate, 0.0, rate, rate]);
}

/// Probabilities so small that the reciprocal of their sum overflows are renormalised all the same.
#[test]
fn weights_of_all_but_impossible_experts_are_renormalised() {
    let logits = Array2::from_shape_fn((8, 8), |(t, e)| match (t, e) {
        (0, 0) => -87.0,
        (0, _) => 0.0,
        (_, 0) => -1000.0,
        (t, e) if t == e => 50.0,
        _ => 0.0,
    });
    let mut router = ExpertChoice::new(1.0, Combine::Renormalised).unwrap();
    let plan = route(&mut router, logits.view(), None);
    assert_eq!(experts_of(&plan, 0), [0]);
    let r = plan.probabilities()[(0, 0)];
    assert!(r > 0.0 && (1.0 / r).is_infinite(), "{r:e}");
    assert_eq!(weights_of(&plan, 0), [1.0]);
}

/// A balancing bias may select experts whose probability is zero in f32; there is nothing to divide by then.
#[test]
fn weights_of_impossible_experts_are_zero() {
    let logits = array![[0.0_f32, -200.0]];
    let mut router = BiasBalanced::new(1, 0.6, Combine::Renormalised).unwrap();
    let plan = route(&mut router, logits.view(), None);
    assert_eq!(
        (experts_of(&plan, 0), plan.weights()),
        (&[0][..], &[1.0][..])
    );
    router.adapt(&plan).unwrap();
    let plan = route(&mut router, logits.view(), None);
    assert_eq!(
        (experts_of(&plan, 0), plan.weights()),
        (&[1][..], &[0.0][..])
    );
}

/// Nothing is learned from a batch without assignments, and no step that overflows is taken: the state stays one that can be saved.
#[test]
fn target_k_stays_finite() {
    let mut router = TargetK::new(2.0, 0.5, Combine::Raw).unwrap();
    let fresh = router.clone();
    let nobody = RoutingPlan::from_assignments(2, 2, []).unwrap();
    router.adapt(&nobody).unwrap();
    assert_eq!(router, fresh);

    let loads = |tokens, assignments| Loads {
        tokens,
        of_experts: vec![assignments],
        in_use: vec![true],
    };
    let mut steep = TargetK::new(1e3, 0.5, Combine::Raw)
        .unwrap()
        .with_gains(f64::MAX, f64::MAX)
        .unwrap();
    let before = steep.clone();
    let refused = steep.adapt_to(&loads(1, 1));
    assert!(
        matches!(refused, Err(RoutingError::NonFinite { .. })),
        "{refused:?}"
    );
    let mut far = TargetK::new(f64::MAX, 0.5, Combine::Raw).unwrap();
    assert!(far.adapt_to(&loads(2, 1)).is_err());
    for (router, before) in [(steep, before), (far.clone(), far)] {
        assert_eq!(router, before);
        let text = serde_json::to_string(&router).unwrap();
        assert_eq!(serde_json::from_str::<TargetK>(&text).unwrap(), before);
    }
}

#[test]
fn a_bias_learns_only_from_loads_that_fit_it() {
    let mut router = BiasBalanced::new(1, f32::MAX, Combine::Raw).unwrap();
    route(&mut router, array![[1.0_f32, 0.0]].view(), None);
    let loads = |in_use| Loads {
        tokens: 1,
        of_experts: vec![1, 0],
        in_use,
    };
    let refused = router.adapt_to(&loads(vec![]));
    assert!(
        matches!(refused, Err(RoutingError::ShapeMismatch { .. })),
        "{refused:?}"
    );
    assert_eq!(router.bias(), [0.0; 2]);
    // As far as f32 reaches, and no further.
    for _ in 0..2 {
        router.adapt_to(&loads(vec![true; 2])).unwrap();
        assert_eq!(router.bias(), [-f32::MAX, f32::MAX]);
    }
}

/// A batch that is refused leaves no trace: nothing is learned, and the noise of the next is what it would have been.
#[test]
fn a_refused_batch_changes_no_router() {
    let logits = Array2::from_shape_fn((4, 3), |(t, e)| (t * e) as f32 * 0.1);
    let mut nan = logits.clone();
    nan[(3, 2)] = f32::NAN;
    let row = array![[0.0_f32]];
    let huge = row.broadcast((1, 1 << 40)).unwrap();
    for inner in ["top_k:k=2", "bias_balanced:k=2,rate=0.1"] {
        for text in [inner.to_owned(), format!("noisy:std=0.5,seed=3/{inner}")] {
            let mut router = text.parse::<RouterConfig>().unwrap().build().unwrap();
            let saved = serde_json::to_value(&router).unwrap();
            let mut plan = RoutingPlan::default();
            for (logits, mask) in [
                (nan.view(), None),
                (logits.view(), Some(&[true; 2][..])),
                (logits.view(), Some(&[true, false, false][..])),
                (huge, None),
            ] {
                plan.clone_from(&RoutingPlan::from_assignments(1, 1, []).unwrap());
                router.route(logits, mask, &mut plan).unwrap_err();
                assert_eq!(plan.num_experts(), 0, "{text}");
                assert_eq!(serde_json::to_value(&router).unwrap(), saved, "{text}");
            }
            // More rows around it than there can be draws; without noise it does not matter how many there are.
            router.set_rows_around(usize::MAX, 0);
            let around = router.route(logits.view(), None, &mut plan);
            assert_eq!(around.is_err(), text.starts_with("noisy"), "{around:?}");
            router.set_training(false);
            route(&mut router, logits.view(), None);
        }
    }
}

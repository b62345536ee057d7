//! Plans made outside, and routing without ndarray.

use mass_routing::losses::routing_entropy;
use mass_routing::ndarray::{Array2, ArrayView2};
use mass_routing::{
    AnyRouter, Combine, ExpertChoice, PlanParts, Router, RoutingError, RoutingPlan, TopAny, TopK,
    TopP,
};
use proptest::prelude::*;

/// What another framework would hand over, in an order of its own.
fn assignments(plan: &RoutingPlan) -> Vec<(usize, usize, f32)> {
    let experts = plan.experts();
    let mut all: Vec<_> = (experts.zip(plan.tokens()).zip(plan.weights()))
        .map(|((e, &t), &w)| (t as usize, e as usize, w))
        .collect();
    all.reverse();
    all.rotate_left(plan.num_assignments() / 3);
    all
}

fn logits(n: usize, k: usize) -> Array2<f32> {
    Array2::from_shape_fn((n, k), |(t, e)| {
        ((t * 31 + e * 17 + t * e) % 23) as f32 * 0.17
    })
}

fn same_plan(a: &RoutingPlan, b: &RoutingPlan) {
    assert_eq!(a.expert_offsets(), b.expert_offsets());
    assert_eq!(a.tokens(), b.tokens());
    assert_eq!(a.weights(), b.weights());
    assert_eq!(a.token_offsets(), b.token_offsets());
    assert_eq!(a.token_assignments(), b.token_assignments());
    assert_eq!(a.token_experts(), b.token_experts());
    assert_eq!(a.in_use(), b.in_use());
    assert_eq!(a.probabilities(), b.probabilities());
}

proptest! {
    #[test]
    fn a_plan_from_assignments_is_the_plan_they_came_from(n in 0_usize..40, k in 2_usize..9, raw in any::<bool>(), choice in 0..3) {
        let combine = if raw { Combine::Raw } else { Combine::Renormalised };
        let mut router: Box<dyn Router> = match choice {
            0 => Box::new(TopP::new(0.6, combine).unwrap()),
            1 => Box::new(TopK::new(2, combine).unwrap()),
            _ => Box::new(ExpertChoice::new(1.3, combine).unwrap()),
        };
        let mut mask = vec![true; k];
        mask[0] = k < 4;
        let mut plan = RoutingPlan::default();
        router.route(logits(n, k).view(), Some(&mask), &mut plan).unwrap();

        let bare = RoutingPlan::from_assignments(n, k, assignments(&plan)).unwrap();
        prop_assert_eq!(bare.validate(), Ok(()));
        let softmax = plan.probabilities().iter().copied().collect::<Vec<_>>();
        let made = bare.with_mask(&mask).unwrap().with_probabilities(&softmax, combine).unwrap();
        prop_assert_eq!(made.validate(), Ok(()));
        same_plan(&plan, &made);
        prop_assert_eq!(made.tokens_teaching_gate(), plan.tokens_teaching_gate());

        let d_weights: Vec<f32> = (0..plan.num_assignments()).map(|a| (a % 7) as f32 - 3.0).collect();
        let (mut d, mut d_made) = (vec![0.0; n * k], vec![0.0; n * k]);
        router.backward_slice(&plan, &d_weights, &mut d).unwrap();
        made.backward_slice(&d_weights, &mut d_made).unwrap();
        prop_assert_eq!(&d, &d_made);
        let mut from_views = Array2::zeros((n, k));
        router.backward(&plan, &d_weights, &mut from_views.view_mut()).unwrap();
        prop_assert_eq!(from_views.iter().copied().collect::<Vec<_>>(), d);
        routing_entropy(&made, 1.0, &mut from_views.view_mut()).unwrap();
    }
}

#[test]
fn assignments_that_are_none_of_the_batch_are_refused_by_name() {
    let make = |n, k, list: &[(usize, usize, f32)]| {
        RoutingPlan::from_assignments(n, k, list.iter().copied()).unwrap_err()
    };
    assert_eq!(make(3, 0, &[]), RoutingError::NoExperts);
    let (tokens, experts) = (1 << 20, 1 << 12);
    assert_eq!(
        make(tokens, experts, &[]),
        RoutingError::TooLarge { tokens, experts }
    );
    assert_eq!(
        make(usize::MAX, 2, &[]),
        RoutingError::TooLarge {
            tokens: usize::MAX,
            experts: 2
        }
    );
    let at = |index, token, expert, what: &str, error: RoutingError| match error {
        RoutingError::InvalidAssignment {
            index: i,
            token: t,
            expert: e,
            what: w,
        } => {
            assert_eq!((i, t, e), (index, token, expert));
            assert!(w.contains(what), "{w}");
        }
        other => panic!("{other}"),
    };
    at(1, 2, 0, "tokens", make(2, 2, &[(0, 0, 1.0), (2, 0, 1.0)]));
    at(0, 0, 5, "experts", make(2, 2, &[(0, 5, 1.0)]));
    at(
        2,
        1,
        1,
        "before",
        make(2, 2, &[(1, 1, 0.5), (0, 1, 1.0), (1, 1, 0.5)]),
    );
    for weight in [f32::NAN, f32::INFINITY] {
        let error = make(2, 2, &[(1, 0, 0.5), (0, 1, weight)]);
        assert!(
            matches!(
                error,
                RoutingError::NonFinite {
                    what: "weight",
                    index: 1,
                    ..
                }
            ),
            "{error}"
        );
    }
    // An empty plan is a plan.
    let plan = RoutingPlan::from_assignments(3, 2, []).unwrap();
    assert_eq!(
        (
            plan.num_tokens(),
            plan.num_experts(),
            plan.num_assignments()
        ),
        (3, 2, 0)
    );
    assert_eq!(plan.validate(), Ok(()));
}

#[test]
fn what_is_said_of_a_plan_has_to_be_so() {
    let plan = || RoutingPlan::from_assignments(2, 2, [(0, 0, 1.0), (1, 1, 0.7)]).unwrap();
    assert!(matches!(
        plan().with_mask(&[true]),
        Err(RoutingError::ShapeMismatch { .. })
    ));
    assert_eq!(
        plan().with_mask(&[false; 2]).unwrap_err(),
        RoutingError::AllExpertsMasked { experts: 2 }
    );
    let masked = plan().with_mask(&[true, false]).unwrap_err();
    assert!(
        matches!(
            masked,
            RoutingError::InvalidAssignment {
                index: 1,
                token: 1,
                expert: 1,
                ..
            }
        ),
        "{masked}"
    );

    let r = [0.9, 0.1, 0.3, 0.7];
    assert!(matches!(
        plan().with_probabilities(&r[..2], Combine::Raw),
        Err(RoutingError::ShapeMismatch { .. })
    ));
    // Token 0's weight of 1 is not 0.9.
    let not_raw = plan().with_probabilities(&r, Combine::Raw).unwrap_err();
    assert!(
        matches!(
            not_raw,
            RoutingError::InvalidAssignment {
                index: 0,
                token: 0,
                expert: 0,
                ..
            }
        ),
        "{not_raw}"
    );
    let not_one = plan()
        .with_probabilities(&r, Combine::Renormalised)
        .unwrap_err();
    assert!(
        matches!(
            not_one,
            RoutingError::InvalidAssignment {
                index: 1,
                token: 1,
                expert: 1,
                ..
            }
        ),
        "{not_one}"
    );
    for bad in [f32::NAN, f32::NEG_INFINITY] {
        let r = [0.9, bad, 0.3, 0.7];
        let error = plan().with_probabilities(&r, Combine::Raw).unwrap_err();
        assert!(
            matches!(error, RoutingError::NonFinite { index: 1, .. }),
            "{error}"
        );
    }
    let error = plan()
        .with_probabilities(&[1.5, 0.1, 0.3, 0.7], Combine::Raw)
        .unwrap_err();
    assert!(
        matches!(
            error,
            RoutingError::InvalidParameter {
                name: "probability",
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn a_gradient_that_nobody_knows_is_an_error_before_the_work_is_done() {
    let plan = RoutingPlan::from_assignments(2, 2, [(0, 0, 1.0), (1, 1, 1.0)]).unwrap();
    assert_eq!(plan.check_backward(), Err(RoutingError::GradientUnknown));
    let mut d = [0.0; 4];
    assert_eq!(
        plan.backward_slice(&[1.0; 2], &mut d),
        Err(RoutingError::GradientUnknown)
    );
    assert_eq!(plan.tokens_teaching_gate(), 0);

    let mut plan = RoutingPlan::default();
    let mut router = TopP::new(0.5, Combine::Raw)
        .unwrap()
        .with_probabilities(false);
    router
        .route_slice(&[0.3, 0.1, 0.2, 0.9], 2, None, &mut plan)
        .unwrap();
    assert_eq!(
        router.check_backward(&plan),
        Err(RoutingError::ProbabilitiesNotKept)
    );
    let kept = router.with_probabilities(true);
    let mut kept = mass_routing::AnyRouter::TopP(kept);
    kept.route_slice(&[0.3, 0.1, 0.2, 0.9], 2, None, &mut plan)
        .unwrap();
    assert_eq!(kept.check_backward(&plan), Ok(()));
}

#[test]
fn slices_route_as_views_do_and_are_checked() {
    let (n, k) = (7, 5);
    let logits = logits(n, k);
    let flat: Vec<f32> = logits.iter().copied().collect();
    let (mut a, mut b) = (RoutingPlan::default(), RoutingPlan::default());
    let mut router = TopP::new(0.6, Combine::Raw).unwrap();
    router.route(logits.view(), None, &mut a).unwrap();
    router.route_slice(&flat, k, None, &mut b).unwrap();
    same_plan(&a, &b);
    assert_eq!(
        router.route_slice(&flat, 0, None, &mut b),
        Err(RoutingError::NoExperts)
    );
    assert_eq!(b.num_tokens(), 0);
    let uneven = router.route_slice(&flat[1..], k, None, &mut a).unwrap_err();
    assert!(
        matches!(
            uneven,
            RoutingError::ShapeMismatch {
                expected: 30,
                found: 34,
                ..
            }
        ),
        "{uneven}"
    );
    assert_eq!((a.num_tokens(), a.num_experts()), (0, 0));
    router.route_slice(&[], k, None, &mut a).unwrap();
    assert_eq!((a.num_tokens(), a.num_experts()), (0, k));

    router.route_slice(&flat, k, None, &mut a).unwrap();
    let d_weights = vec![1.0; a.num_assignments()];
    let short = router
        .backward_slice(&a, &d_weights, &mut vec![0.0; n * k - 1])
        .unwrap_err();
    for wrong in [0, n * k + 1, n * k + k] {
        let refused = router.backward_slice(&a, &d_weights, &mut vec![0.0; wrong]);
        assert!(refused.is_err(), "{wrong}");
    }
    assert!(
        matches!(
            short,
            RoutingError::ShapeMismatch {
                expected: 35,
                found: 34,
                ..
            }
        ),
        "{short}"
    );
}

#[test]
fn the_gradient_of_a_large_batch_has_the_same_bits_on_any_number_of_threads() {
    for (n, k) in [(4096, 24), (3, 40_000), (1, 70_000)] {
        let logits = logits(n, k);
        let routers: [Box<dyn Router + Sync>; 3] = [
            Box::new(TopP::new(0.4, Combine::Raw).unwrap()),
            Box::new(TopP::new(0.4, Combine::Renormalised).unwrap()),
            Box::new(TopAny::new(vec![1.0; k]).unwrap()),
        ];
        for mut router in routers {
            let mut plan = RoutingPlan::default();
            router.route(logits.view(), None, &mut plan).unwrap();
            let d_weights: Vec<f32> = (0..plan.num_assignments())
                .map(|a| ((a * 37) % 101) as f32 * 0.013 - 0.6)
                .collect();
            let on = |threads| {
                let pool = rayon::ThreadPoolBuilder::new()
                    .num_threads(threads)
                    .build()
                    .unwrap();
                let mut d = Array2::from_elem((n, k), 0.25);
                pool.install(|| router.backward(&plan, &d_weights, &mut d.view_mut()))
                    .unwrap();
                d
            };
            let one = on(1);
            assert!(one.iter().any(|&d| d != 0.25));
            assert_eq!(one, on(2));
            assert_eq!(one, on(5));
            // A piece of it by itself, which no other thread shares.
            let rows = 2.min(n);
            let mut few = RoutingPlan::default();
            let part: ArrayView2<'_, f32> = logits.slice(mass_routing::ndarray::s![..rows, ..]);
            router.route(part, None, &mut few).unwrap();
            let mut own = vec![0.0; few.num_assignments()];
            for t in 0..rows {
                let entries = few.token_offsets()[t] as usize..few.token_offsets()[t + 1] as usize;
                let there = plan.token_offsets()[t] as usize;
                for (i, at) in entries.enumerate() {
                    own[few.token_assignments()[at] as usize] =
                        d_weights[plan.token_assignments()[there + i] as usize];
                }
            }
            let mut d = Array2::from_elem((rows, k), 0.25);
            router.backward(&few, &own, &mut d.view_mut()).unwrap();
            assert_eq!(d, one.slice(mass_routing::ndarray::s![..rows, ..]));
        }
    }
}

#[test]
fn shares_of_the_loss_are_those_of_weights_times_losses() {
    let mut plan = RoutingPlan::default();
    let mut router = TopP::new(0.7, Combine::Renormalised).unwrap();
    router.route(logits(17, 5).view(), None, &mut plan).unwrap();
    let losses: Vec<f32> = (0..17).map(|t| 0.25 * (t % 5) as f32).collect();
    let shares = plan.loss_shares(&losses).unwrap();
    // Weights of a token sum to one, so the experts' losses to the batch's.
    let total: f64 = losses.iter().copied().map(f64::from).sum();
    for (e, share) in shares.iter().enumerate() {
        let own = (0..plan.num_assignments()).filter(|&a| plan.expert_of(a) == e);
        let loss = own
            .map(|a| f64::from(plan.weights()[a]) * f64::from(losses[plan.tokens()[a] as usize]));
        assert!((share.unwrap() - loss.sum::<f64>() / total).abs() < 1e-6);
    }
    assert_eq!(plan.loss_shares(&[0.0; 17]).unwrap(), [None; 5]);
    assert_eq!(RoutingPlan::default().loss_shares(&[]).unwrap(), []);

    let refused = plan.loss_shares(&losses[1..]);
    let Err(RoutingError::ShapeMismatch { found, .. }) = refused else {
        panic!("{refused:?}");
    };
    assert_eq!(found, 16);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut losses = losses.clone();
        losses[3] = bad;
        let refused = plan.loss_shares(&losses);
        assert!(
            matches!(refused, Err(RoutingError::NonFinite { index: 3, .. })),
            "{refused:?}"
        );
    }
}

#[test]
fn parts_have_sizes_scores_and_a_mask_that_a_plan_can_have() {
    let router = AnyRouter::TopK(TopK::new(1, Combine::Raw).unwrap());
    let tokens = 1 << (usize::BITS - 1);
    let none = PlanParts {
        expert_offsets: vec![0; 3],
        ..PlanParts::default()
    };
    assert_eq!(
        RoutingPlan::from_parts(tokens, none, &router).unwrap_err(),
        RoutingError::TooLarge { tokens, experts: 2 }
    );
    let error = |second, in_use: Option<[bool; 2]>| {
        let parts = PlanParts {
            expert_offsets: vec![0, 1, 1],
            tokens: vec![0],
            weights: vec![0.6],
            scores: vec![0.6, second],
            in_use: in_use.map(Vec::from),
        };
        RoutingPlan::from_parts(1, parts, &router).err()
    };
    assert_eq!(error(0.4, None), None);
    assert_eq!(error(0.4, Some([true, false])), None);
    let nan = error(f32::NAN, None);
    assert!(
        matches!(nan, Some(RoutingError::NonFinite { index: 1, .. })),
        "{nan:?}"
    );
    for score in [-0.5, 1.5] {
        let outside = error(score, None);
        let named = matches!(
            outside,
            Some(RoutingError::InvalidParameter { name: "score", .. })
        );
        assert!(named, "{outside:?}");
    }
    assert_eq!(
        error(0.4, Some([false; 2])),
        Some(RoutingError::AllExpertsMasked { experts: 2 })
    );
    let masked = error(0.4, Some([false, true]));
    let named = matches!(
        masked,
        Some(RoutingError::InvalidAssignment { expert: 0, .. })
    );
    assert!(named, "{masked:?}");
}

//! Every gradient against finite differences, away from selection boundaries.

use mass_routing::losses::{
    BalanceCount, Reduction, dirichlet_prior, diverse_and_simple, gshard_balance, importance, load,
    redundancy, router_z, routing_entropy,
};
use mass_routing::{
    BiasBalanced, Combine, CosineGate, ExpertChoice, LowRankGate, Router, RoutingError,
    RoutingPlan, TopAny, TopK, TopP,
};
use ndarray::{Array1, Array2, ArrayView2, array};
use proptest::prelude::*;
use proptest::test_runner::TestCaseResult;

const H: f32 = 0.02;

/// Compares `gradient` with a five-point difference quotient of `f` at `x`; `f` is `None` where it has crossed a boundary.
/// A case of which half is at a boundary is rejected: too many of those end the test.
fn check(
    what: &str,
    x: &Array2<f32>,
    gradient: &Array2<f32>,
    f: impl Fn(&Array2<f32>) -> Option<f64>,
) -> TestCaseResult {
    check_by(H, what, x, gradient, f)
}

fn check_by(
    h: f32,
    what: &str,
    x: &Array2<f32>,
    gradient: &Array2<f32>,
    f: impl Fn(&Array2<f32>) -> Option<f64>,
) -> TestCaseResult {
    let mut compared = 0;
    for (at, &got) in gradient.indexed_iter() {
        let value = |step: f32| {
            let mut moved = x.clone();
            moved[at] += step * h;
            f(&moved)
        };
        let (Some(a), Some(b), Some(c), Some(d)) =
            (value(-2.0), value(-1.0), value(1.0), value(2.0))
        else {
            continue;
        };
        let expected = (8.0 * (c - b) - (d - a)) / (12.0 * f64::from(h));
        prop_assert!(
            (f64::from(got) - expected).abs() < 1e-4 * (1.0 + expected.abs()),
            "{what} at {at:?}: {got} for {expected}"
        );
        compared += 1;
    }
    prop_assume!(compared * 2 > gradient.len(), "{}", what);
    Ok(())
}

fn matrix(n: usize, k: usize, spread: f32) -> impl Strategy<Value = Array2<f32>> {
    proptest::collection::vec(-spread..spread, n * k)
        .prop_map(move |v| Array2::from_shape_vec((n, k), v).unwrap())
}

fn plan_of(
    router: &mut dyn Router,
    logits: ArrayView2<'_, f32>,
    mask: Option<&[bool]>,
) -> RoutingPlan {
    let mut plan = RoutingPlan::default();
    router.route(logits, mask, &mut plan).unwrap();
    plan
}

fn same_selection(a: &RoutingPlan, b: &RoutingPlan) -> bool {
    a.tokens() == b.tokens() && a.expert_offsets() == b.expert_offsets()
}

/// Gradient of `sum_{t,e} upstream w_{t,e}` for any router whose weights are a function of the logits.
fn check_router(
    what: &str,
    router: &mut dyn Router,
    logits: &Array2<f32>,
    upstream: &Array2<f32>,
    mask: Option<&[bool]>,
) -> TestCaseResult {
    let plan = plan_of(router, logits.view(), mask);
    let d_weights: Vec<f32> = plan
        .experts()
        .zip(plan.tokens())
        .map(|(e, &t)| upstream[(t as usize, e as usize)])
        .collect();
    let mut gradient = Array2::zeros(logits.dim());
    router
        .backward(&plan, &d_weights, &mut gradient.view_mut())
        .unwrap();
    // It is added to what is there.
    let mut twice = gradient.clone();
    router
        .backward(&plan, &d_weights, &mut twice.view_mut())
        .unwrap();
    assert!(
        twice
            .iter()
            .zip(&gradient)
            .all(|(t, g)| (t - 2.0 * g).abs() <= 1e-6)
    );
    let router = std::cell::RefCell::new(router);
    check(what, logits, &gradient, |moved| {
        let moved = plan_of(*router.borrow_mut(), moved.view(), mask);
        let value = moved.experts().zip(moved.tokens()).zip(moved.weights());
        same_selection(&plan, &moved).then(|| {
            value
                .map(|((e, &t), &w)| f64::from(upstream[(t as usize, e as usize)]) * f64::from(w))
                .sum()
        })
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn routing_weights(logits in matrix(5, 9, 2.0), upstream in matrix(5, 9, 1.0), p in 0.2_f32..0.95) {
        let mask = [true, true, false, true, true, true, true, false, true];
        for mask in [None, Some(&mask[..])] {
            for combine in [Combine::Raw, Combine::Renormalised] {
                check_router("top-p", &mut TopP::new(p, combine).unwrap(), &logits, &upstream, mask)?;
                check_router("top-k", &mut TopK::new(3, combine).unwrap(), &logits, &upstream, mask)?;
                check_router("bias", &mut BiasBalanced::new(2, 1e-3, combine).unwrap(), &logits, &upstream, mask)?;
                check_router("choice", &mut ExpertChoice::new(1.0, combine).unwrap(), &logits, &upstream, mask)?;
            }
        }
    }

    /// Straight-through weights are those of the renormalised, and their gradient is that of raw weights with the same upstream.
    #[test]
    fn straight_through(logits in matrix(5, 9, 2.0), upstream in matrix(5, 9, 1.0), p in 0.2_f32..0.95) {
        let mask = [true, true, false, true, true, true, true, false, true];
        for mask in [None, Some(&mask[..])] {
            let of = |combine: Combine| -> Vec<Box<dyn Router>> {
                vec![
                    Box::new(TopP::new(p, combine).unwrap()),
                    Box::new(TopK::new(1, combine).unwrap()),
                    Box::new(TopK::new(3, combine).unwrap()),
                    Box::new(BiasBalanced::new(2, 1e-3, combine).unwrap()),
                    Box::new(ExpertChoice::new(1.0, combine).unwrap()),
                ]
            };
            let [raw, renormalised, through] = Combine::ALL.map(of);
            for ((mut raw, mut renormalised), mut through) in raw.into_iter().zip(renormalised).zip(through) {
                let plans = [&mut raw, &mut renormalised, &mut through].map(|r| plan_of(r.as_mut(), logits.view(), mask));
                prop_assert_eq!(plans[2].weights(), plans[1].weights());
                prop_assert!(same_selection(&plans[2], &plans[0]));
                let d_weights: Vec<f32> = plans[0].experts().zip(plans[0].tokens()).map(|(e, &t)| upstream[(t as usize, e as usize)]).collect();
                let gradients = [(&raw, &plans[0]), (&through, &plans[2])].map(|(router, plan)| {
                    let mut gradient = Array2::zeros(logits.dim());
                    router.backward(plan, &d_weights, &mut gradient.view_mut()).unwrap();
                    gradient
                });
                prop_assert_eq!(&gradients[0], &gradients[1]);
                prop_assert_eq!(plans[2].tokens_teaching_gate(), plans[0].tokens_teaching_gate());
                prop_assert_eq!(through.gate_gradient(), raw.gate_gradient());
            }
        }
    }

    /// Straight-through: the gradient is that of `sum upstream (s - G) / k` over the active pairs with k held fixed.
    #[test]
    fn top_any(cosines in matrix(6, 5, 1.0), upstream in matrix(6, 5, 1.0), thresholds in proptest::collection::vec(-0.5_f32..0.5, 5)) {
        let mut router = TopAny::new(thresholds.clone()).unwrap();
        let plan = plan_of(&mut router, cosines.view(), None);
        let d_weights: Vec<f32> = plan.experts().zip(plan.tokens()).map(|(e, &t)| upstream[(t as usize, e as usize)]).collect();
        let sigmoid = |x: f32| 1.0 / (1.0 + (-f64::from(x)).exp());
        let value = |cosines: &Array2<f32>, thresholds: &Array2<f32>| {
            let pairs = plan.experts().zip(plan.tokens()).map(|(e, &t)| (t as usize, e as usize));
            Some(pairs.map(|at| f64::from(upstream[at]) * (sigmoid(cosines[at]) - sigmoid(thresholds[(0, at.1)])) / plan.k(at.0) as f64).sum())
        };
        let row = Array2::from_shape_vec((1, 5), thresholds).unwrap();
        let mut d_cosines = Array2::zeros(cosines.dim());
        router.backward(&plan, &d_weights, &mut d_cosines.view_mut()).unwrap();
        check("cosines", &cosines, &d_cosines, |c| value(c, &row))?;
        let mut d_thresholds = Array1::zeros(5);
        router.backward_thresholds(&plan, &d_weights, &mut d_thresholds.view_mut()).unwrap();
        let d_thresholds = d_thresholds.into_shape_with_order((1, 5)).unwrap();
        check("thresholds", &row, &d_thresholds, |g| value(&cosines, g))?;
    }

    #[test]
    fn losses_on_logits(logits in matrix(6, 5, 2.0)) {
        let mask = [true, false, true, true, true];
        for mask in [None, Some(&mask[..])] {
            let route = |l: &Array2<f32>| plan_of(&mut TopP::new(0.6, Combine::Raw).unwrap(), l.view(), mask);
            let plan = route(&logits);
            for count in [BalanceCount::First, BalanceCount::Selected] {
                let mut d = Array2::zeros(logits.dim());
                gshard_balance(&plan, count, 1.0, &mut d.view_mut()).unwrap();
                let first = |p: &RoutingPlan| -> Vec<usize> {
                    p.probabilities().outer_iter().map(|r| (0..5).fold(0, |b, e| if r[e] > r[b] { e } else { b })).collect()
                };
                check("balance", &logits, &d, |l| {
                    let moved = route(l);
                    let mut sink = Array2::zeros(l.dim());
                    (same_selection(&plan, &moved) && first(&plan) == first(&moved))
                        .then(|| gshard_balance(&moved, count, 1.0, &mut sink.view_mut()).unwrap())
                })?;
            }
            let mut d = Array2::zeros(logits.dim());
            routing_entropy(&plan, 1.0, &mut d.view_mut()).unwrap();
            check("entropy", &logits, &d, |l| Some(routing_entropy(&route(l), 1.0, &mut Array2::zeros(l.dim()).view_mut()).unwrap()))?;
            let mut d = Array2::zeros(logits.dim());
            router_z(logits.view(), mask, 1.0, &mut d.view_mut()).unwrap();
            check("z", &logits, &d, |l| Some(router_z(l.view(), mask, 1.0, &mut Array2::zeros(l.dim()).view_mut()).unwrap()))?;
        }
    }

    /// The gradient of the Dirichlet prior, where no move of a logit changes the order of an expert's probabilities over the batch: at
    /// such a change the loss has a kink. Probabilities that are neighbours in that order are at least a factor of 2 apart, but for
    /// the jitter.
    #[test]
    fn the_dirichlet_prior(jitter in matrix(4, 5, 0.1)) {
        let logits = Array2::from_shape_fn((4, 5), |(t, e)| 0.8 * ((3 * t + 2 * e) % 7) as f32 + 0.05 * (t * e) as f32 + jitter[(t, e)]);
        let alpha = [2.0, 0.9, 1.5, 2.5, 3.0];
        let mask = [true, false, true, true, true];
        for mask in [None, Some(&mask[..])] {
            let route = |l: &Array2<f32>| plan_of(&mut TopP::new(0.6, Combine::Raw).unwrap(), l.view(), mask);
            let order = |p: &RoutingPlan| -> Vec<Vec<usize>> {
                p.probabilities().columns().into_iter().map(|c| { let mut o: Vec<usize> = (0..4).collect(); o.sort_by(|&a, &b| c[a].total_cmp(&c[b])); o }).collect()
            };
            let plan = route(&logits);
            let start = order(&plan);
            let mut d = Array2::zeros(logits.dim());
            dirichlet_prior(&plan, &alpha, 20.0, &mut d.view_mut()).unwrap();
            check("dirichlet", &logits, &d, |l| {
                let moved = route(l);
                assert_eq!(order(&moved), start, "the order has changed");
                Some(20.0 * dirichlet_prior(&moved, &alpha, 1.0, &mut Array2::zeros(l.dim()).view_mut()).unwrap())
            })?;
        }
    }

    #[test]
    fn losses_on_scores(scores in matrix(7, 4, 1.0), noise in matrix(7, 4, 0.5)) {
        let mask = [true, true, false, true];
        let scores = scores.mapv(|s| s + 1.5);
        for mask in [None, Some(&mask[..])] {
            let mut d = Array2::zeros(scores.dim());
            importance(scores.view(), mask, 1.0, &mut d.view_mut()).unwrap();
            check("importance", &scores, &d, |s| Some(importance(s.view(), mask, 1.0, &mut Array2::zeros(s.dim()).view_mut()).unwrap()))?;

            let noisy = &scores + &noise;
            let value = |scores: &Array2<f32>, noisy: &Array2<f32>| {
                let (mut a, mut b) = (Array2::zeros(scores.dim()), Array2::zeros(scores.dim()));
                let loss = load(scores.view(), noisy.view(), mask, 2, 0.4, 1.0, &mut a.view_mut(), &mut b.view_mut()).unwrap();
                (loss, a, b)
            };
            let (_, d, d_noisy) = value(&scores, &noisy);
            check("load, scores", &scores, &d, |s| Some(value(s, &noisy).0))?;
            let kth = |d: &Array2<f32>| d.mapv(|d| d != 0.0);
            check("load, noisy scores", &noisy, &d_noisy, |s| {
                let (loss, _, moved) = value(&scores, s);
                (kth(&moved) == kth(&d_noisy)).then_some(loss)
            })?;
        }
    }

    #[test]
    fn losses_on_gate_weights(gate in matrix(4, 6, 1.0)) {
        // Norms away from zero, where curvature is beyond any difference quotient.
        let gate = Array2::from_shape_fn(gate.dim(), |(i, j)| gate[(i, j)] + if i == j { 2.0 } else { 0.0 });
        let pairs = [(0, 1), (2, 3), (1, 2)];
        for reduction in [Reduction::Mean, Reduction::Sum] {
            let mut d = Array2::zeros(gate.dim());
            redundancy(gate.view(), &pairs, reduction, 1.0, &mut d.view_mut()).unwrap();
            check("redundancy", &gate, &d, |g| Some(redundancy(g.view(), &pairs, reduction, 1.0, &mut Array2::zeros(g.dim()).view_mut()).unwrap()))?;
        }
        let columns = gate.t().to_owned();
        for mask in [None, Some(&[true, false, true, true][..])] {
            let mut d = Array2::zeros(columns.dim());
            // A small step: the norm has a kink where the columns are orthogonal.
            diverse_and_simple(columns.view(), mask, 1.0, &mut d.view_mut()).unwrap();
            check_by(0.002, "diverse", &columns, &d, |w| Some(diverse_and_simple(w.view(), mask, 1.0, &mut Array2::zeros(w.dim()).view_mut()).unwrap()))?;
        }
    }

    #[test]
    fn gates(x in matrix(4, 6, 1.0), weight in matrix(3, 6, 1.0), experts in matrix(3, 5, 1.0), upstream in matrix(4, 5, 1.0), scale in -0.5_f32..0.5) {
        let weight = Array2::from_shape_fn(weight.dim(), |(i, j)| weight[(i, j)] + if i == j { 2.0 } else { 0.0 });
        let x = Array2::from_shape_fn(x.dim(), |(i, j)| x[(i, j)] + if i % 3 == j { 3.0 } else { 0.0 });
        let experts = Array2::from_shape_fn(experts.dim(), |(i, j)| experts[(i, j)] + if i == j % 3 { 2.0 } else { 0.0 });
        let bias = array![[0.3_f32, -0.1, 0.2]];
        let value = |x: &Array2<f32>, w: &Array2<f32>, b: &Array2<f32>, s: &Array2<f32>, scale: &Array2<f32>| {
            let gate = CosineGate::new(s.view()).unwrap().with_projection(w.view(), b.row(0)).unwrap().with_log_scale(scale[(0, 0)]).unwrap();
            let forward = gate.forward(x.view()).unwrap();
            Some(forward.logits().iter().zip(&upstream).map(|(l, u)| f64::from(l * u)).sum())
        };
        let gate = CosineGate::new(experts.view()).unwrap().with_projection(weight.view(), bias.row(0)).unwrap().with_log_scale(scale).unwrap();
        let forward = gate.forward(x.view()).unwrap();
        let g = gate.backward(x.view(), &forward, upstream.view()).unwrap();
        let scale = array![[scale]];
        check("cosine x", &x, &g.x, |x| value(x, &weight, &bias, &experts, &scale))?;
        check("cosine experts", &experts, &g.experts, |s| value(&x, &weight, &bias, s, &scale))?;
        let (d_weight, d_bias) = g.projection.unwrap();
        check("cosine projection", &weight, &d_weight, |w| value(&x, w, &bias, &experts, &scale))?;
        check("cosine bias", &bias, &d_bias.into_shape_with_order((1, 3)).unwrap(), |b| value(&x, &weight, b, &experts, &scale))?;
        check("cosine scale", &scale, &array![[g.log_scale.unwrap()]], |s| value(&x, &weight, &bias, &experts, s))?;

        // The same numbers as 5 experts with 1 anchor, and as one with 5.
        let anchors = experts.t().to_owned();
        for (per_expert, upstream) in [(1, upstream.clone()), (5, upstream.columns().into_iter().next().unwrap().to_owned().insert_axis(ndarray::Axis(1)))] {
            let value = |x: &Array2<f32>, q: &Array2<f32>, a: &Array2<f32>| {
                let gate = LowRankGate::new(q.view(), a.view(), per_expert).unwrap().with_scale(3.0).unwrap().with_saturation(4.0, 2.0).unwrap();
                let forward = gate.forward(x.view()).unwrap();
                Some(forward.logits().iter().zip(&upstream).map(|(l, u)| f64::from(l * u)).sum())
            };
            let gate = LowRankGate::new(weight.view(), anchors.view(), per_expert).unwrap().with_scale(3.0).unwrap().with_saturation(4.0, 2.0).unwrap();
            let forward = gate.forward(x.view()).unwrap();
            let g = gate.backward(x.view(), &forward, upstream.view()).unwrap();
            check("low rank x", &x, &g.x, |x| value(x, &weight, &anchors))?;
            check("low rank query", &weight, &g.query, |q| value(&x, q, &anchors))?;
            check("low rank anchors", &anchors, &g.anchors, |a| value(&x, &weight, a))?;
        }
    }
}

#[test]
fn equal_gate_rows_have_no_redundancy_gradient() {
    let gate = array![[1.0_f32, 2.0, -1.0], [1.0, 2.0, -1.0]];
    let mut d = Array2::zeros(gate.dim());
    let loss = redundancy(
        gate.view(),
        &[(0, 1)],
        Reduction::Mean,
        1.0,
        &mut d.view_mut(),
    )
    .unwrap();
    assert!((loss - 1.0).abs() < 1e-12);
    assert!(d.iter().all(|d| d.abs() < 1e-7), "{d}");
}

#[test]
fn bad_input_is_named() {
    let logits = array![[1.0_f32, 2.0], [0.0, 1.0]];
    let mut router = TopP::new(0.9, Combine::Raw)
        .unwrap()
        .with_probabilities(false);
    let plan = plan_of(&mut router, logits.view(), None);
    let mut d = Array2::zeros((2, 2));
    let weights = vec![1.0; plan.num_assignments()];
    assert_eq!(
        router.backward(&plan, &weights, &mut d.view_mut()),
        Err(RoutingError::ProbabilitiesNotKept)
    );
    assert_eq!(
        routing_entropy(&plan, 1.0, &mut d.view_mut()),
        Err(RoutingError::ProbabilitiesNotKept)
    );
    let plan = plan_of(
        &mut TopP::new(0.9, Combine::Raw).unwrap(),
        logits.view(),
        None,
    );
    let mut narrow = Array2::zeros((2, 1));
    assert!(matches!(
        plan.backward(&weights, &mut narrow.view_mut()),
        Err(RoutingError::ShapeMismatch { .. })
    ));
    assert!(matches!(
        plan.backward(&[], &mut d.view_mut()),
        Err(RoutingError::ShapeMismatch { .. })
    ));
    assert!(matches!(
        routing_entropy(&plan, 1.0, &mut narrow.view_mut()),
        Err(RoutingError::ShapeMismatch { .. })
    ));
    assert!(matches!(
        gshard_balance(&plan, BalanceCount::First, f32::NAN, &mut d.view_mut()),
        Err(RoutingError::InvalidParameter { .. })
    ));
    assert!(dirichlet_prior(&plan, &[1.0, -1.0], 1.0, &mut d.view_mut()).is_err());
    assert!(dirichlet_prior(&plan, &[1.0], 1.0, &mut d.view_mut()).is_err());
    for huge in [[f64::MAX, f64::MAX], [1e8, 1e8], [1.0, 1e5]] {
        assert!(dirichlet_prior(&plan, &huge, 1.0, &mut d.view_mut()).is_err());
    }
    // Beside 1 it vanishes in a sum, but is no zero.
    let mut sink = d.clone();
    assert!(dirichlet_prior(&plan, &[1.0, 1e-17], 1.0, &mut sink.view_mut()).is_ok());
    let nan = array![[1.0_f32, f32::NAN], [0.0, 0.0]];
    let named = router_z(nan.view(), None, 1.0, &mut d.view_mut());
    assert!(matches!(
        named,
        Err(RoutingError::NonFiniteLogit {
            token: 0,
            expert: 1,
            ..
        })
    ));
    assert!(router_z(nan.view(), Some(&[true, false]), 1.0, &mut d.view_mut()).is_ok());
    assert!(importance(nan.view(), None, 1.0, &mut d.view_mut()).is_err());
    assert!(matches!(
        importance(logits.view(), Some(&[false; 2]), 1.0, &mut d.view_mut()),
        Err(RoutingError::AllExpertsMasked { .. })
    ));
    let mut e = d.clone();
    let mut loads_of = |scores: &Array2<f32>, k, std| {
        load(
            scores.view(),
            scores.view(),
            None,
            k,
            std,
            1.0,
            &mut d.view_mut(),
            &mut e.view_mut(),
        )
    };
    let level = array![[1.0_f32, 1.0], [0.0, 1.0]];
    // Densities beyond f32, and beyond f64.
    for std in [1e-40, 1e-310] {
        let refused = loads_of(&level, 1, std);
        assert!(
            matches!(refused, Err(RoutingError::NonFinite { .. })),
            "{refused:?}"
        );
    }
    let mut loads = |k, std| loads_of(&logits, k, std);
    assert!(matches!(
        loads(3, 1.0),
        Err(RoutingError::TooFewExperts { k: 3, available: 2 })
    ));
    assert!(loads(0, 1.0).is_err() && loads(1, 0.0).is_err() && loads(1, 1.0).is_ok());
    assert!(
        redundancy(
            logits.view(),
            &[(0, 2)],
            Reduction::Sum,
            1.0,
            &mut e.view_mut()
        )
        .is_err()
    );
    assert!(
        redundancy(
            logits.view(),
            &[(1, 1)],
            Reduction::Sum,
            1.0,
            &mut e.view_mut()
        )
        .is_err()
    );
    assert!(diverse_and_simple(nan.view(), None, 1.0, &mut e.view_mut()).is_err());
    assert!(CosineGate::new(nan.view()).is_err());
    assert!(
        CosineGate::new(logits.view())
            .unwrap()
            .with_log_scale(f32::INFINITY)
            .is_err()
    );
    assert!(
        CosineGate::new(logits.view())
            .unwrap()
            .forward(Array2::zeros((1, 3)).view())
            .is_err()
    );
    assert!(LowRankGate::new(logits.view(), logits.view(), 3).is_err());
    assert!(LowRankGate::new(logits.view(), Array2::zeros((2, 3)).view(), 1).is_err());
    assert!(
        LowRankGate::new(logits.view(), logits.view(), 1)
            .unwrap()
            .with_scale(0.0)
            .is_err()
    );
    // No tokens: no loss, no gradient, no error.
    let none = plan_of(
        &mut TopP::new(0.9, Combine::Raw).unwrap(),
        Array2::zeros((0, 2)).view(),
        None,
    );
    let mut empty = Array2::zeros((0, 2));
    assert_eq!(routing_entropy(&none, 1.0, &mut empty.view_mut()), Ok(0.0));
    assert_eq!(
        gshard_balance(&none, BalanceCount::First, 1.0, &mut empty.view_mut()),
        Ok(0.0)
    );
    assert_eq!(none.backward(&[], &mut empty.view_mut()), Ok(()));
}

#[test]
fn gates_take_what_f32_holds() {
    let x = array![[1e20_f32, 0.0], [-2e30, 2e30], [3.0, 4.0]];
    let experts = array![[1.0_f32, 0.0], [0.0, 1.0]];
    let gate = CosineGate::new(experts.view()).unwrap();
    let forward = gate.forward(x.view()).unwrap();
    let half = std::f32::consts::FRAC_1_SQRT_2;
    for (found, want) in forward
        .logits()
        .iter()
        .zip([1.0, 0.0, -half, half, 0.6, 0.8])
    {
        assert!((found - want).abs() < 1e-6, "{found} for {want}");
    }
    let ones = Array2::ones((3, 2));
    let back = gate.backward(x.view(), &forward, ones.view()).unwrap();
    assert!(back.x.iter().all(|v| v.is_finite()));
    // Of (1e20, 0): along it none, across it 1 / 1e20. Of (-2e30, 2e30): half of both, over its norm.
    for ((row, column), want) in [((0, 0), 0.0), ((0, 1), 1e-20), ((1, 0), 3.535_534e-31)] {
        let found = back.x[(row, column)];
        assert!((found - want).abs() <= 1e-5 * want, "{found} for {want}");
    }
    // The forward pass of a gate of another width.
    let experts = array![[1.0_f32, 0.0], [0.0, 1.0], [1.0, 1.0]];
    let wide = CosineGate::new(experts.view()).unwrap();
    let projected = array![[1.0_f32, 0.0], [0.0, 1.0], [1.0, 1.0]];
    let bias = Array1::zeros(3);
    let wide = wide.with_projection(projected.view(), bias.view()).unwrap();
    assert!(matches!(
        wide.backward(x.view(), &forward, ones.view()),
        Err(RoutingError::ShapeMismatch { .. })
    ));
}

/// A low-rank gate keeps within its scale, and has its gradient, where squares overflow or vanish in f32.
#[test]
fn norms_of_a_low_rank_gate_may_be_of_any_size() {
    let query = array![[1.0_f32, 0.0], [0.0, 1.0]];
    for (size, saturation) in [(1e-25_f32, 1e-30_f32), (1e20, 1.0), (2e38, 1.0)] {
        let anchors = array![[size, 0.0], [0.0, size]];
        let gate = LowRankGate::new(query.view(), anchors.view(), 1).unwrap();
        let gate = gate.with_saturation(saturation, saturation).unwrap();
        let x = array![[0.0_f32, size]];
        let forward = gate.forward(x.view()).unwrap();
        assert_eq!(forward.logits(), array![[0.0, 1.0]], "{size}");
        let back = gate.backward(x.view(), &forward, array![[1.0_f32, 1.0]].view());
        let back = back.unwrap();
        // Turning x by an angle turns the score of the other anchor by as much: 1 / |x|.
        let (along, across) = (back.x[(0, 1)], back.x[(0, 0)]);
        assert!((across * size - 1.0).abs() < 1e-2, "{size}: {across}");
        assert!(along.abs() <= 1e-6 * across, "{size}: {along}");
    }
}

/// A forward pass of a gate with other anchors to an expert, or of another rank, is no forward pass of this one.
#[test]
fn a_low_rank_gate_knows_its_forward_pass() {
    let of = |rank: usize, per_expert: usize| {
        let query = Array2::<f32>::ones((rank, 3));
        let anchors = Array2::<f32>::ones((4, rank));
        let x = Array2::<f32>::ones((1, 3));
        let gate = LowRankGate::new(query.view(), anchors.view(), per_expert).unwrap();
        let forward = gate.forward(x.view()).unwrap();
        let theirs = Array2::<f32>::ones((4, 2));
        let query = Array2::<f32>::ones((2, 3));
        let gate = LowRankGate::new(query.view(), theirs.view(), 1).unwrap();
        let upstream = Array2::<f32>::ones((1, 4 / per_expert));
        gate.backward(x.view(), &forward, upstream.view()).map(drop)
    };
    assert_eq!(of(2, 1), Ok(()));
    for (rank, per_expert) in [(2, 4), (2, 2), (3, 1)] {
        let refused = of(rank, per_expert);
        let named = matches!(refused, Err(RoutingError::ShapeMismatch { .. }));
        assert!(named, "{rank}, {per_expert}: {refused:?}");
    }
}

/// The scale of a cosine gate is the exponential of its parameter up to 100, where it stops and the parameter's gradient is zero.
#[test]
fn the_scale_of_a_cosine_gate_stops_at_100() {
    let x = array![[3.0_f32, 4.0]];
    let experts = array![[1.0_f32, 0.0], [0.0, 2.0]];
    let upstream = array![[1.0_f32, 1.0]];
    // Where it is free, the derivative of the sum of the logits is that sum.
    for (scale, stopped, slope) in [(50.0_f32, 50.0_f32, 70.0_f32), (200.0, 100.0, 0.0)] {
        let gate = CosineGate::new(experts.view())
            .unwrap()
            .with_log_scale(scale.ln())
            .unwrap();
        let forward = gate.forward(x.view()).unwrap();
        for (found, cosine) in forward.logits().iter().zip([0.6_f32, 0.8]) {
            let want = stopped * cosine;
            assert!((found - want).abs() < 1e-3, "{found} for {want}");
        }
        let gradients = gate.backward(x.view(), &forward, upstream.view()).unwrap();
        let found = gradients.log_scale.unwrap();
        assert!((found - slope).abs() < 1e-3, "{found} for {slope}");
    }
}

/// A gradient that is none reaches its token's row, and no other token's.
#[test]
fn a_nan_among_the_gradients_of_weights_stays_in_its_row() {
    let logits = array![[1.0f32, 0.5, 0.2], [0.1, 0.9, 0.4]];
    let routers: [Box<dyn Router>; 4] = [
        Box::new(TopK::new(2, Combine::Renormalised).unwrap()),
        Box::new(TopP::new(0.9, Combine::Raw).unwrap()),
        Box::new(TopP::new(0.9, Combine::StraightThrough).unwrap()),
        Box::new(TopAny::new(vec![0.0; 3]).unwrap()),
    ];
    for mut router in routers {
        let plan = plan_of(&mut *router, logits.view(), None);
        let gradient = |first: f32| {
            let of = |&t: &u32| if t == 0 { first } else { 1.5 + t as f32 };
            let d_weights: Vec<f32> = plan.tokens().iter().map(of).collect();
            let mut d = Array2::zeros((2, 3));
            router
                .backward(&plan, &d_weights, &mut d.view_mut())
                .unwrap();
            d
        };
        let (sound, broken) = (gradient(1.0), gradient(f32::NAN));
        assert!(broken.row(0).iter().any(|d| d.is_nan()), "{broken}");
        assert_eq!(broken.row(1), sound.row(1));
    }
}

/// Finite tokens and weights whose product is none are refused, not passed on as NaN.
#[test]
fn a_projection_that_overflows_is_refused() {
    let x = array![[1.0_f32, 1.0], [1e30, 1e30]];
    let weight = array![[1e30_f32, 1e30], [1.0, 0.0]];
    let experts = array![[1.0_f32, 0.0], [0.0, 1.0]];
    let bias = Array1::zeros(2);
    let cosine = CosineGate::new(experts.view()).unwrap();
    let nan = weight.mapv(|_| f32::NAN);
    let refused = cosine
        .clone()
        .with_projection(nan.view(), bias.view())
        .unwrap_err();
    assert!(
        refused.to_string().starts_with("projection is NaN"),
        "{refused}"
    );
    let cosine = cosine.with_projection(weight.view(), bias.view()).unwrap();
    let low_rank = LowRankGate::new(weight.view(), experts.view(), 1).unwrap();
    for refused in [
        cosine.forward(x.view()).map(drop),
        low_rank.forward(x.view()).map(drop),
    ] {
        let named = matches!(refused, Err(RoutingError::NonFiniteLogit { token: 1, .. }));
        assert!(named, "{refused:?}");
    }
    // Nor is a saturation whose inverse is infinite, which would make NaN of a token of zeros.
    let gate = || LowRankGate::new(experts.view(), experts.view(), 1).unwrap();
    assert!(gate().with_saturation(1e-39, 1.0).is_err());
    assert!(gate().with_saturation(1.0, 1e-39).is_err());
    let least = gate()
        .with_saturation(f32::MIN_POSITIVE, f32::MIN_POSITIVE)
        .unwrap();
    least.forward(Array2::zeros((1, 2)).view()).unwrap();
}

#[test]
fn thresholds_have_a_gradient_from_plans_of_top_any_alone() {
    let logits = array![[1.0_f32, 0.5]];
    let mut router = TopAny::new(vec![0.0; 2]).unwrap();
    let gradient = |router: &TopAny, plan: &RoutingPlan| {
        let d_weights = vec![1.0; plan.num_assignments()];
        let mut d = Array1::zeros(2);
        router
            .backward_thresholds(plan, &d_weights, &mut d.view_mut())
            .map(|()| d)
    };
    let own = plan_of(&mut router, logits.view(), None);
    assert!(gradient(&router, &own).unwrap().iter().all(|&d| d < 0.0));
    let other = plan_of(
        &mut TopK::new(1, Combine::Raw).unwrap(),
        logits.view(),
        None,
    );
    assert!(matches!(
        gradient(&router, &other),
        Err(RoutingError::Undefined(_))
    ));
}

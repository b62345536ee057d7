//! A batch that several processes have routed a part of each.

use mass_routing::losses::{
    BalanceCount, gshard_balance, gshard_balance_among, importance, importance_among, load,
    load_among,
};
use mass_routing::{
    AnyRouter, BiasBalanced, Combine, Loads, Noisy, Router, RoutingError, RoutingPlan, TargetK,
    TopK,
};
use ndarray::{Array2, ArrayView2, concatenate, s};

const TOKENS: usize = 12;
const EXPERTS: usize = 4;

fn logits() -> Array2<f32> {
    Array2::from_shape_fn((TOKENS, EXPERTS), |(t, e)| {
        ((t * 7 + e * 5) % 11) as f32 / 4.0 - (e * t) as f32 / 20.0
    })
}

/// Uneven parts.
const PARTS: [std::ops::Range<usize>; 3] = [0..5, 5..6, 6..TOKENS];

fn plan(logits: ArrayView2<'_, f32>) -> RoutingPlan {
    let mut plan = RoutingPlan::default();
    let mut router = TopK::new(2, Combine::Raw).unwrap();
    router.route(logits, None, &mut plan).unwrap();
    plan
}

/// A loss of a part, given what adds up all parts' sums.
type OfPart<'a> = &'a dyn Fn(
    ArrayView2<'_, f32>,
    &mut Array2<f32>,
    &mut dyn FnMut(&mut [f64]),
) -> Result<f64, RoutingError>;

/// The gradients of the parts, weighted by their tokens, one after another.
fn gradient_of_parts(loss: OfPart<'_>) -> Array2<f32> {
    let logits = logits();
    let part = |range: &std::ops::Range<usize>| logits.slice(s![range.clone(), ..]).to_owned();
    // What each part has to add, and then the gradients with the sums of all.
    let mut all: Vec<f64> = Vec::new();
    for range in &PARTS {
        let (own, mut d) = (part(range), Array2::zeros((range.len(), EXPERTS)));
        let mut add = |values: &mut [f64]| {
            all.resize(values.len(), 0.0);
            all.iter_mut().zip(values).for_each(|(sum, x)| *sum += *x);
        };
        loss(own.view(), &mut d, &mut add).unwrap();
    }
    let gradients = PARTS.map(|range| {
        let (own, mut d) = (part(&range), Array2::zeros((range.len(), EXPERTS)));
        loss(own.view(), &mut d, &mut |values| {
            values.copy_from_slice(&all)
        })
        .unwrap();
        d * (range.len() as f32 / TOKENS as f32)
    });
    let views = gradients.each_ref().map(|g| g.view());
    concatenate(ndarray::Axis(0), &views).unwrap()
}

fn near(parts: &Array2<f32>, whole: &Array2<f32>) {
    assert!(whole.iter().any(|d| d.abs() > 1e-4));
    for (a, b) in parts.iter().zip(whole) {
        assert!((a - b).abs() < 1e-6, "{a}, {b}");
    }
}

#[test]
fn losses_of_parts_have_the_gradient_of_the_whole() {
    let all = logits();
    let whole = |loss: &dyn Fn(&mut Array2<f32>)| {
        let mut d = Array2::zeros(all.dim());
        loss(&mut d);
        d
    };
    for count in [BalanceCount::First, BalanceCount::Selected] {
        let parts = gradient_of_parts(&|own, d, sum| {
            let sum = |values: &mut [f64]| -> Result<(), RoutingError> {
                sum(values);
                Ok(())
            };
            gshard_balance_among(&plan(own), count, 0.5, &mut d.view_mut(), sum)
        });
        let whole = whole(&|d| {
            gshard_balance(&plan(all.view()), count, 0.5, &mut d.view_mut()).unwrap();
        });
        near(&parts, &whole);
    }
    let parts = gradient_of_parts(&|own, d, sum| {
        let sum = |values: &mut [f64]| -> Result<(), RoutingError> {
            sum(values);
            Ok(())
        };
        importance_among(own, None, 0.5, &mut d.view_mut(), sum)
    });
    let whole_of_importance = whole(&|d| {
        importance(all.view(), None, 0.5, &mut d.view_mut()).unwrap();
    });
    near(&parts, &whole_of_importance);
    let parts = gradient_of_parts(&|own, d, sum| {
        let sum = |values: &mut [f64]| -> Result<(), RoutingError> {
            sum(values);
            Ok(())
        };
        let mut noisy = Array2::zeros(d.dim());
        let into = (&mut d.view_mut(), &mut noisy.view_mut());
        let loss = load_among((own, own), None, (2, 0.5), 0.5, into, sum);
        *d += &noisy;
        loss
    });
    let whole_of_load = whole(&|d| {
        let mut noisy = Array2::zeros(d.dim());
        let (scores, d_noisy) = (all.view(), &mut noisy.view_mut());
        load(
            scores,
            scores,
            None,
            2,
            0.5,
            0.5,
            &mut d.view_mut(),
            d_noisy,
        )
        .unwrap();
        *d += &noisy;
    });
    near(&parts, &whole_of_load);
}

#[test]
fn noise_is_that_of_the_rows_place_in_the_whole_batch() {
    let all = logits();
    let noisy = || {
        let inner = AnyRouter::TopK(TopK::new(2, Combine::Raw).unwrap());
        Noisy::new(inner, 0.7, 3).unwrap()
    };
    let mut plan = RoutingPlan::default();
    let mut whole = noisy();
    for _ in 0..2 {
        whole.route(all.view(), None, &mut plan).unwrap();
    }
    for range in PARTS {
        let mut part = noisy();
        part.set_rows_around(range.start, TOKENS - range.end);
        let own = all.slice(s![range.clone(), ..]);
        for _ in 0..2 {
            part.route(own, None, &mut plan).unwrap();
        }
        let expected = whole.noisy_logits();
        assert_eq!(part.noisy_logits(), expected.slice(s![range, ..]));
    }
}

#[test]
fn routers_learn_from_the_loads_of_all_parts_what_they_learn_from_the_whole() {
    let all = logits();
    let sums = |plan_of: &dyn Fn(ArrayView2<'_, f32>) -> RoutingPlan| {
        let mut sum: Option<Loads> = None;
        for range in PARTS {
            let own = Loads::of(&plan_of(all.slice(s![range, ..])));
            match &mut sum {
                None => sum = Some(own),
                Some(sum) => {
                    sum.tokens += own.tokens;
                    let pairs = sum.of_experts.iter_mut().zip(own.of_experts);
                    pairs.for_each(|(a, b)| *a += b);
                }
            }
        }
        sum.unwrap()
    };
    let loads = sums(&|own| plan(own));
    assert_eq!(loads, Loads::of(&plan(all.view())));
    assert_eq!(loads.assignments(), 2 * TOKENS as u64);
    let of_experts = vec![u64::MAX, 1];
    let too_many = Loads {
        of_experts,
        ..loads.clone()
    };
    assert_eq!(too_many.assignments(), u64::MAX);
    let routers = [
        AnyRouter::BiasBalanced(BiasBalanced::new(2, 0.1, Combine::Raw).unwrap()),
        AnyRouter::TargetK(TargetK::new(1.5, 0.9, Combine::Raw).unwrap()),
    ];
    for router in routers {
        let (mut by_plan, mut plan) = (router.clone(), RoutingPlan::default());
        by_plan.route(all.view(), None, &mut plan).unwrap();
        let mut by_loads = by_plan.clone();
        by_loads.adapt_to(&Loads::of(&plan)).unwrap();
        by_plan.adapt(&plan).unwrap();
        assert!(by_loads == by_plan && by_plan != router);
    }
}

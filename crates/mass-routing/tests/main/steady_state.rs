//! Once its buffers have grown, a plan allocates nothing; losses and noise allocate for a batch, not for its tokens.

use mass_routing::losses::{self, BalanceCount};
use mass_routing::{
    AnyRouter, BiasBalanced, Combine, Noisy, Router, RoutingError, RoutingPlan, TopAny, TopK, TopP,
};
use ndarray::{Array2, ArrayViewMut2};

#[test]
fn routing_again_allocates_nothing() {
    for (n, k) in [(300, 8), (200, 64), (90, 150), (16, 900)] {
        let logits = Array2::from_shape_fn((n, k), |(t, e)| ((t * 31 + e * 17) % 23) as f32 * 0.3);
        let routers: [Box<dyn Router>; 3] = [
            Box::new(TopP::new(0.7, Combine::Renormalised).unwrap()),
            Box::new(TopK::new(2, Combine::Raw).unwrap()),
            Box::new(BiasBalanced::new(2, 1e-3, Combine::Raw).unwrap()),
        ];
        for mut router in routers {
            let mut plan = RoutingPlan::default();
            let mut d_logits = Array2::zeros((n, k));
            // Twice: buffers change places between the plan and its scratch.
            for _ in 0..2 {
                router.route(logits.view(), None, &mut plan).unwrap();
            }
            let d_weights = vec![1.0; plan.num_assignments()];
            let allocated = allocation_counter::measure(|| {
                router.route(logits.view(), None, &mut plan).unwrap();
                router
                    .backward(&plan, &d_weights, &mut d_logits.view_mut())
                    .unwrap();
            });
            assert_eq!(allocated.count_total, 0, "{n} x {k}");
        }
    }
}

#[test]
fn losses_and_noise_allocate_for_the_batch_alone() {
    type Loss = fn(&RoutingPlan, &mut ArrayViewMut2<'_, f32>) -> Result<f64, RoutingError>;
    let of: [(&str, Loss); 7] = [
        ("balance, first", |plan, d| {
            losses::gshard_balance(plan, BalanceCount::First, 0.1, d)
        }),
        ("balance, selected", |plan, d| {
            losses::gshard_balance(plan, BalanceCount::Selected, 0.1, d)
        }),
        ("importance", |plan, d| {
            losses::importance(plan.probabilities(), None, 0.1, d)
        }),
        ("load", |plan, d| {
            let r = plan.probabilities();
            let mut noisy = Array2::zeros(r.dim());
            losses::load(r, r, None, 2, 0.1, 0.1, d, &mut noisy.view_mut())
        }),
        ("router z", |plan, d| {
            losses::router_z(plan.probabilities(), None, 0.1, d)
        }),
        ("entropy", |plan, d| losses::routing_entropy(plan, 0.1, d)),
        ("softmax", |plan, d| {
            let r = plan.probabilities();
            losses::softmax_backward(r, r, d).map(|()| 0.0)
        }),
    ];
    // More than twenty experts, which a stable sort would need memory for.
    let k = 30;
    let any = AnyRouter::TopAny(TopAny::new(vec![0.0; k]).unwrap());
    // So little that no token changes its experts, whose number would make buffers grow.
    let mut noisy = Noisy::new(any, 1e-3, 1).unwrap();
    let mut counts = [10, 400].map(|n| {
        let logits = Array2::from_shape_fn((n, k), |(t, e)| {
            ((t * 31 + e * 17) % 23) as f32 * 0.1 - 1.05
        });
        let mut plan = RoutingPlan::default();
        let mut d_logits = Array2::zeros((n, k));
        let mut router = TopP::new(0.7, Combine::Raw).unwrap();
        router.route(logits.view(), None, &mut plan).unwrap();
        let mut counts: Vec<u64> = of
            .iter()
            .map(|(name, loss)| {
                let counted = allocation_counter::measure(|| {
                    loss(&plan, &mut d_logits.view_mut()).expect(name);
                });
                counted.count_total
            })
            .collect();
        for _ in 0..3 {
            noisy.route(logits.view(), None, &mut plan).unwrap();
        }
        let counted = allocation_counter::measure(|| {
            noisy.route(logits.view(), None, &mut plan).unwrap();
            let d_weights = [0.1; 400 * 30];
            let d_weights = &d_weights[..plan.num_assignments()];
            noisy
                .backward(&plan, d_weights, &mut d_logits.view_mut())
                .unwrap();
        });
        counts.push(counted.count_total);
        counts
    });
    let (many, few) = counts.split_last_mut().unwrap();
    assert_eq!(many, &few[0], "in the order of the list, then noise");
}

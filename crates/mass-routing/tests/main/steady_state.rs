//! Once its buffers have grown, a plan allocates nothing.

use mass_routing::{BiasBalanced, Combine, Router, RoutingPlan, TopK, TopP};
use ndarray::Array2;

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

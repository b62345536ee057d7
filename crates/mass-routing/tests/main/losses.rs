//! Losses against values worked out by hand.

use mass_routing::losses::{BalanceCount, dirichlet_prior, gshard_balance, router_z};
use mass_routing::{Combine, Router, RoutingError, RoutingPlan, TopP};
use ndarray::{Array2, array};

fn top_p(p: f32, logits: &Array2<f32>, mask: Option<&[bool]>) -> RoutingPlan {
    let mut plan = RoutingPlan::default();
    TopP::new(p, Combine::Raw)
        .unwrap()
        .route(logits.view(), mask, &mut plan)
        .unwrap();
    plan
}

/// The Dirichlet prior compares an expert's sorted probabilities with the distribution function of its marginal,
/// `Beta(alpha_e, A - alpha_e)`, at 1/2 and 1 where there are two tokens; whatever the weight, the loss is returned without it.
#[test]
fn the_dirichlet_prior_has_the_value_of_its_formula() {
    let logits = array![[0.2_f32, 0.3, 0.5], [0.4, 0.4, 0.2]].mapv(f32::ln);
    let plan = top_p(0.9, &logits, None);
    for (alpha, gaps) in [
        // Beta(1, 2) for all: F(x) = 2 x - x^2, so F(0.2, 0.3, 0.4, 0.5) = 0.36, 0.51, 0.64, 0.75.
        (
            [1.0, 1.0, 1.0],
            [[0.14_f64, 0.36], [-0.01, 0.36], [0.14, 0.25]],
        ),
        // Beta(2, 2): F(x) = 3 x^2 - 2 x^3, so F(0.2, 0.4) = 0.104, 0.352.
        // Beta(1, 3): F(x) = 1 - (1 - x)^3, so F(0.2, 0.3, 0.4, 0.5) = 0.488, 0.657, 0.784, 0.875.
        (
            [2.0, 1.0, 1.0],
            [[0.396_f64, 0.648], [-0.157, 0.216], [0.012, 0.125]],
        ),
    ] {
        let want = gaps.as_flattened().iter().map(|g| g * g).sum::<f64>() / 6.0;
        let mut d = Array2::zeros((2, 3));
        let loss = dirichlet_prior(&plan, &alpha, 3.0, &mut d.view_mut()).unwrap();
        assert!((loss - want).abs() < 1e-6, "{alpha:?}: {loss} for {want}");
    }
    let mut d = Array2::zeros((2, 3));
    let loss = dirichlet_prior(&plan, &[1.0; 3], 1.0, &mut d.view_mut()).unwrap();
    assert!((loss - 0.060_166_67).abs() < 1e-6, "{loss}");
}

/// GShard's balance loss counts the experts in use alone: of two experts that all tokens are torn between, it is 1 where only the
/// first counts and 2 where both do, and its gradient pushes towards the other.
#[test]
fn the_balance_loss_is_over_the_experts_in_use() {
    let logits = Array2::<f32>::zeros((2, 3));
    let plan = top_p(0.9, &logits, Some(&[true, false, true]));
    assert_eq!(plan.token_experts(), [0, 2, 0, 2]);
    // 2 / 2^2 (2 tokens of the first expert x 2 probabilities of 1/2).
    let mut d = Array2::<f32>::zeros((2, 3));
    let first = gshard_balance(&plan, BalanceCount::First, 2.0, &mut d.view_mut()).unwrap();
    assert!((first - 1.0).abs() < 1e-12, "{first}");
    // Weight 2 times r_e (g_e - sum r g), g = (1, 0, 0), r = (1/2, 0, 1/2).
    assert_eq!(d, array![[0.5, 0.0, -0.5], [0.5, 0.0, -0.5]]);
    // The same from both experts; g is even, so there is nothing to push.
    let mut d = Array2::<f32>::zeros((2, 3));
    let selected = gshard_balance(&plan, BalanceCount::Selected, 2.0, &mut d.view_mut()).unwrap();
    assert!((selected - 2.0).abs() < 1e-12, "{selected}");
    assert_eq!(d, Array2::<f32>::zeros((2, 3)));
}

#[test]
fn logits_that_are_refused_leave_the_gradient_as_it_was() {
    let logits = array![[1.0_f32, 2.0], [0.0, f32::NAN]];
    let mut d = Array2::<f32>::zeros((2, 2));
    let refused = router_z(logits.view(), None, 1.0, &mut d.view_mut());
    let named = matches!(
        refused,
        Err(RoutingError::NonFiniteLogit {
            token: 1,
            expert: 1,
            ..
        })
    );
    assert!(named, "{refused:?}");
    let large = Array2::from_elem((1, 2), 3e38_f32);
    let mut one = Array2::<f32>::zeros((1, 2));
    let refused = router_z(large.view(), None, 4.0, &mut one.view_mut());
    let named = matches!(refused, Err(RoutingError::NonFinite { .. }));
    assert!(named && one == Array2::<f32>::zeros((1, 2)), "{refused:?}");
    assert_eq!(d, Array2::<f32>::zeros((2, 2)));
    router_z(logits.view(), Some(&[true, false]), 1.0, &mut d.view_mut()).unwrap();
}

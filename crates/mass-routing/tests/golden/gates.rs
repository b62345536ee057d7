//! Cosine and top-any gates against values computed elsewhere; every size comes from the files.

use super::values::Golden;
use mass_routing::losses::{BalanceCount, diverse_and_simple, gshard_balance, importance, load};
use mass_routing::{Combine, CosineGate, Router, RoutingPlan, TopAny, TopK};
use ndarray::{Array1, Array2, ArrayBase, Axis, Data, Dimension};

fn assert_close<S, T, D>(
    what: &str,
    got: &ArrayBase<S, D>,
    expected: &ArrayBase<T, D>,
    tolerance: f32,
) where
    S: Data<Elem = f32>,
    T: Data<Elem = f32>,
    D: Dimension,
{
    assert_eq!(got.shape(), expected.shape(), "{what}");
    for (i, (g, e)) in got.iter().zip(expected).enumerate() {
        assert!(
            (g - e).abs() <= tolerance * (1.0 + e.abs()),
            "{what}[{i}]: {g} for {e}"
        );
    }
}

#[test]
fn golden_cosine_router() {
    let golden = Golden::open("cosine_router");
    let x = golden.matrix("x");
    let (proj_w, proj_b, sim) = (
        golden.matrix("proj_w"),
        golden.vector("proj_b"),
        golden.matrix("sim"),
    );
    assert_eq!(proj_w.nrows() as f64, golden.number("proj_dim"));
    let gate = CosineGate::new(sim.view())
        .and_then(|g| g.with_projection(proj_w.view(), proj_b.view()))
        .and_then(|g| g.with_log_scale(golden.scalar("log_scale")))
        .unwrap();
    let forward = gate.forward(x.view()).unwrap();
    assert_close("logits", &forward.logits(), &golden.matrix("logits"), 2e-6);

    let mut plan = RoutingPlan::default();
    TopK::new(1, Combine::Raw)
        .unwrap()
        .route(forward.logits(), None, &mut plan)
        .unwrap();
    let scores = golden.matrix("scores");
    assert_close("scores", &plan.probabilities(), &scores, 2e-6);

    // The upstream gradient is that of the logits.
    let (n, k) = scores.dim();
    let gradients = gate
        .backward(x.view(), &forward, golden.matrix("upstream").view())
        .unwrap();
    assert_close("dx", &gradients.x, &golden.matrix("dx"), 2e-5);
    assert_close("dsim", &gradients.experts, &golden.matrix("dsim"), 2e-5);
    let (d_weight, d_bias) = gradients.projection.unwrap();
    assert_close("dproj_w", &d_weight, &golden.matrix("dproj_w"), 2e-5);
    assert_close("dproj_b", &d_bias, &golden.vector("dproj_b"), 2e-5);
    let d_scale = golden.scalar("dlog_scale");
    assert!((gradients.log_scale.unwrap() - d_scale).abs() <= 2e-5 * (1.0 + d_scale.abs()));

    let mut d = Array2::zeros((n, k));
    let balance = gshard_balance(&plan, BalanceCount::First, 1.0, &mut d.view_mut()).unwrap();
    assert!(
        (balance as f32 - golden.scalar("gshard_loss")).abs() < 2e-6,
        "{balance}"
    );
    let keys: Vec<_> = golden
        .names()
        .filter(|name| name.starts_with("load_importance_loss_k"))
        .collect();
    assert!(!keys.is_empty(), "no load and importance losses");
    for key in keys {
        let top: usize = key
            .trim_start_matches("load_importance_loss_k")
            .parse()
            .unwrap();
        let std = golden.number("gate_noise") / k as f64;
        let mut other = d.clone();
        let load = load(
            scores.view(),
            scores.view(),
            None,
            top,
            std,
            1.0,
            &mut d.view_mut(),
            &mut other.view_mut(),
        );
        let importance = importance(scores.view(), None, 1.0, &mut d.view_mut()).unwrap();
        let loss = 0.5 * (importance + load.unwrap());
        assert!(
            (loss as f32 - golden.scalar(&key)).abs() < 2e-6,
            "{key}: {loss}"
        );
    }
}

#[test]
fn golden_dynmoe_gate() {
    let golden = Golden::open("dynmoe_gate");
    let (x, sim, upstream) = (
        golden.matrix("x"),
        golden.matrix("sim"),
        golden.matrix("upstream"),
    );
    let gate = CosineGate::new(sim.view()).unwrap();
    let forward = gate.forward(x.view()).unwrap();
    let active = golden.matrix("train_active");
    let (n, k) = active.dim();

    let eval_thresholds = golden.floats("eval_thresholds");
    let thresholds = training_thresholds(&golden, &active, &upstream);
    let mut router = TopAny::new(thresholds).unwrap();
    let mut plan = RoutingPlan::default();
    router.route(forward.logits(), None, &mut plan).unwrap();
    assert_eq!(chosen(&plan), active);
    let counts = golden.integers("train_k");
    assert!((0..n).all(|t| plan.k(t) as i64 == counts[t]));

    // Upstream is the gradient of the signs, before the division by k.
    let d_weights: Vec<f32> = plan
        .experts()
        .zip(plan.tokens())
        .map(|(e, &t)| upstream[(t as usize, e as usize)] * plan.k(t as usize) as f32)
        .collect();
    let mut d_logits = Array2::zeros((n, k));
    router
        .backward(&plan, &d_weights, &mut d_logits.view_mut())
        .unwrap();
    let gradients = gate.backward(x.view(), &forward, d_logits.view()).unwrap();
    assert_close("dx", &gradients.x, &golden.matrix("dx"), 2e-5);
    assert_close("dsim", &gradients.experts, &golden.matrix("dsim"), 2e-5);
    let mut d_thresholds = Array1::zeros(k);
    router
        .backward_thresholds(&plan, &d_weights, &mut d_thresholds.view_mut())
        .unwrap();
    assert_close(
        "dthresholds",
        &d_thresholds,
        &golden.vector("dthresholds"),
        2e-5,
    );

    router.set_thresholds(&eval_thresholds).unwrap();
    router.set_training(false);
    router.route(forward.logits(), None, &mut plan).unwrap();
    let (counts, scores) = (golden.integers("eval_k"), golden.matrix("eval_scores"));
    for (t, row) in scores.axis_iter(Axis(0)).enumerate() {
        assert_eq!(plan.k(t) as i64, counts[t], "token {t}");
        let own = &plan.token_experts()
            [plan.token_offsets()[t] as usize..plan.token_offsets()[t + 1] as usize];
        if row.iter().all(|&s| s == 0.0 || s == 1.0) {
            assert!(
                (0..k).all(|e| own.contains(&(e as u32)) == (row[e] == 1.0)),
                "token {t}"
            );
        } else {
            // Nobody took it: the file holds the raw scores, of which the largest decides.
            let best = (0..k).fold(0, |best, e| if row[e] > row[best] { e } else { best });
            assert_eq!(own, [best as u32], "token {t}");
            for (e, &s) in row.iter().enumerate() {
                assert!((1.0 / (1.0 + (-forward.logits()[(t, e)]).exp()) - s).abs() < 1e-6);
            }
        }
    }

    let mut d = Array2::zeros(sim.dim());
    let loss = diverse_and_simple(sim.view(), None, 1.0, &mut d.view_mut()).unwrap() as f32;
    let expected = golden.scalar("diverse_simple_loss");
    assert!(
        (loss - expected).abs() < 2e-6 * expected,
        "{loss} for {expected}"
    );
    assert_close(
        "diverse_simple_grad",
        &d,
        &golden.matrix("diverse_simple_grad"),
        2e-6,
    );
}

/// The thresholds of the training pass.
///
/// The reference raises the thresholds in place, by the same amount for every expert, between its training and its evaluation pass; a
/// file written after that holds the raised ones under both names. The amount follows from the file itself: training gradients are
/// `-sigmoid'(G_e) sum_t upstream active`, which gives `|G_e|`.
fn training_thresholds(golden: &Golden, active: &Array2<f32>, upstream: &Array2<f32>) -> Vec<f32> {
    let stored = golden.floats("thresholds");
    if stored != golden.floats("eval_thresholds") {
        return stored;
    }
    let gradient = golden.floats("dthresholds");
    let sums = (active * upstream).sum_axis(Axis(0));
    let magnitude = |e: usize| {
        let slope = f64::from(-gradient[e] / sums[e]).min(0.25);
        // s (1 - s) = slope, s >= 1/2.
        let s = 0.5 + (0.25 - slope).sqrt();
        (s / (1.0 - s)).ln()
    };
    // The expert whose derivative is farthest from its flat top tells the magnitude best; its sign is the one that suits all.
    let best = (0..stored.len())
        .max_by(|&a, &b| magnitude(a).total_cmp(&magnitude(b)))
        .unwrap();
    let misfit = |raise: f64| -> f64 {
        (0..stored.len())
            .map(|e| ((f64::from(stored[e]) - raise).abs() - magnitude(e)).abs())
            .sum()
    };
    let raise = [magnitude(best), -magnitude(best)]
        .map(|g| f64::from(stored[best]) - g)
        .into_iter()
        .min_by(|a, b| misfit(*a).total_cmp(&misfit(*b)))
        .unwrap();
    stored
        .iter()
        .map(|g| (f64::from(*g) - raise) as f32)
        .collect()
}

fn chosen(plan: &RoutingPlan) -> Array2<f32> {
    let mut out = Array2::zeros((plan.num_tokens(), plan.num_experts()));
    for (e, &t) in plan.experts().zip(plan.tokens()) {
        out[(t as usize, e as usize)] = 1.0;
    }
    out
}

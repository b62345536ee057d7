//! Top-p against values computed elsewhere; every size and every p comes from the files.

use super::values::Golden;
use mass_routing::{Combine, Router, RoutingPlan, TopP};

#[test]
fn golden_top_p() {
    let golden = Golden::open("top_p");
    let logits = golden.matrix("logits");
    let (n, k) = logits.dim();
    let names: Vec<String> = golden
        .names()
        .filter(|name| name.starts_with("selected_"))
        .collect();
    assert!(!names.is_empty(), "no case in the file");
    for name in names {
        let text = name.trim_start_matches("selected_");
        let p: f32 = text.parse().expect("p in the key");
        let selected = golden.matrix(&name);
        let count = golden.integers(&format!("k_{text}"));
        for (combine, key) in [
            (Combine::Raw, "raw"),
            (Combine::Renormalised, "renormalised"),
        ] {
            let expected = golden.matrix(&format!("{key}_{text}"));
            let mut plan = RoutingPlan::default();
            TopP::new(p, combine)
                .unwrap()
                .route(logits.view(), None, &mut plan)
                .unwrap();
            let mut weights = ndarray::Array2::<f32>::zeros((n, k));
            let mut chosen = ndarray::Array2::<f32>::zeros((n, k));
            for (a, e) in plan.experts().enumerate() {
                let at = (plan.tokens()[a] as usize, e as usize);
                weights[at] = plan.weights()[a];
                chosen[at] = 1.0;
            }
            assert_eq!(chosen, selected, "p = {p}");
            for (t, &expected) in count.iter().enumerate() {
                assert_eq!(plan.k(t) as i64, expected, "k of token {t}, p = {p}");
            }
            for (at, &w) in weights.indexed_iter() {
                assert!(
                    (w - expected[at]).abs() <= 1e-6,
                    "{key}, p = {p}, {at:?}: {w} for {}",
                    expected[at]
                );
            }
        }
    }
}

//! Usage statistics and specialisation measures against brute force and known values.

use mass_routing::{
    Combine, LabelUsage, LabelWeighting, Router, RoutingError, RoutingPlan, TopK, TopP, UsageStats,
    jensen_shannon_bound, jensen_shannon_divergence, normalized_mutual_information,
    pairwise_jensen_shannon_divergence,
};
use ndarray::{Array2, array};
use proptest::prelude::*;

fn logits(n: usize, k: usize) -> impl Strategy<Value = Array2<f32>> {
    proptest::collection::vec(-4.0_f32..4.0, n * k)
        .prop_map(move |v| Array2::from_shape_vec((n, k), v).unwrap())
}

fn top_p(logits: &Array2<f32>) -> RoutingPlan {
    let mut plan = RoutingPlan::default();
    TopP::new(0.6, Combine::Raw)
        .unwrap()
        .route(logits.view(), None, &mut plan)
        .unwrap();
    plan
}

proptest! {
    #[test]
    fn merging_parts_equals_the_whole((a, b) in (logits(9, 5), logits(4, 5))) {
        let mut whole = UsageStats::new(5).with_co_activation();
        let mut part = whole.clone();
        let mut other = whole.clone();
        whole.record(&top_p(&a)).unwrap();
        whole.record(&top_p(&b)).unwrap();
        part.record(&top_p(&a)).unwrap();
        other.record(&top_p(&b)).unwrap();
        part.merge(&other).unwrap();
        prop_assert_eq!(part.load(), whole.load());
        prop_assert_eq!(part.k_counts(), whole.k_counts());
        prop_assert_eq!(part.co_activation(), whole.co_activation());
        prop_assert!((part.routing_entropy().unwrap() - whole.routing_entropy().unwrap()).abs() < 1e-12);
        prop_assert!((part.mean_k().unwrap() - whole.mean_k().unwrap()).abs() < 1e-12);
        let text = serde_json::to_string(&part).unwrap();
        prop_assert_eq!(serde_json::from_str::<UsageStats>(&text).unwrap(), part);
    }

    #[test]
    fn counts_equal_brute_force(a in logits(12, 4)) {
        let plan = top_p(&a);
        let mut usage = UsageStats::new(4).with_co_activation();
        usage.record(&plan).unwrap();
        let mut pairs = Array2::<u64>::zeros((4, 4));
        let mut entropy = 0.0;
        for t in 0..12 {
            let chosen: Vec<usize> = (0..4).filter(|&e| plan.tokens()[plan.segment(e)].contains(&(t as u32))).collect();
            for &i in &chosen {
                for &j in &chosen {
                    pairs[(i, j)] += 1;
                }
            }
            entropy -= plan.probabilities().row(t).iter().map(|&r| f64::from(r) * f64::from(r).ln()).sum::<f64>() / 12.0;
        }
        prop_assert_eq!(usage.co_activation().unwrap(), pairs.view());
        prop_assert!((usage.routing_entropy().unwrap() - entropy).abs() < 1e-9);
        let variance = (0..12).map(|t| (plan.k(t) as f64 - plan.mean_k()).powi(2)).sum::<f64>() / 12.0;
        prop_assert!((usage.variance_k().unwrap() - variance).abs() < 1e-12);
    }

    #[test]
    fn divergences_stay_in_their_bounds(counts in proptest::collection::vec(0_u8..9, 12)) {
        let table = Array2::from_shape_vec((3, 4), counts.into_iter().map(f64::from).collect()).unwrap();
        prop_assume!(table.sum() > 0.0);
        for weighting in [LabelWeighting::Uniform, LabelWeighting::Proportional] {
            let jsd = jensen_shannon_divergence(table.view(), weighting).unwrap();
            prop_assert!(jsd >= 0.0 && jsd <= jensen_shannon_bound(table.view(), weighting).unwrap() + 1e-12);
        }
        // Mutual information is symmetric in its arguments.
        if let (Ok(a), Ok(b)) = (normalized_mutual_information(table.view()), normalized_mutual_information(table.t())) {
            prop_assert!((a - b).abs() < 1e-12 && (0.0..=1.0).contains(&a));
        }
    }
}

#[test]
fn known_divergences() {
    let same = array![[1.0, 3.0], [2.0, 6.0]];
    assert!(jensen_shannon_divergence(same.view(), LabelWeighting::Uniform).unwrap() < 1e-15);
    assert!(normalized_mutual_information(same.view()).unwrap() < 1e-15);
    // Three labels, three experts of their own: ln 3; an empty label changes nothing.
    let apart = array![
        [5.0, 0.0, 0.0],
        [0.0, 1.0, 0.0],
        [0.0, 0.0, 2.0],
        [0.0, 0.0, 0.0]
    ];
    assert!(
        (jensen_shannon_divergence(apart.view(), LabelWeighting::Uniform).unwrap() - 3_f64.ln())
            .abs()
            < 1e-12
    );
    assert!((pairwise_jensen_shannon_divergence(apart.view()).unwrap() - 2_f64.ln()).abs() < 1e-12);
    assert!((normalized_mutual_information(apart.view()).unwrap() - 1.0).abs() < 1e-12);
    // Counts 40 10 / 10 40: I = ln 2 - H(0.8), both entropies ln 2.
    let mixed = array![[40.0, 10.0], [10.0, 40.0]];
    let h = -(0.8 * 0.8_f64.ln() + 0.2 * 0.2_f64.ln());
    let expected = 1.0 - h / 2_f64.ln();
    assert!((normalized_mutual_information(mixed.view()).unwrap() - expected).abs() < 1e-12);
}

#[test]
fn bad_input_is_named() {
    let empty = Array2::<f64>::zeros((2, 3));
    assert!(matches!(
        jensen_shannon_divergence(empty.view(), LabelWeighting::Uniform),
        Err(RoutingError::Undefined(_))
    ));
    assert!(matches!(
        normalized_mutual_information(array![[3.0]].view()),
        Err(RoutingError::Undefined(_))
    ));
    assert!(matches!(
        pairwise_jensen_shannon_divergence(array![[3.0, 1.0]].view()),
        Err(RoutingError::Undefined(_))
    ));
    let nan = array![[1.0, f64::NAN]];
    assert!(matches!(
        normalized_mutual_information(nan.view()),
        Err(RoutingError::NonFinite { index: 1, .. })
    ));
    let negative = array![[1.0, -1.0]];
    let result = jensen_shannon_divergence(negative.view(), LabelWeighting::Uniform);
    assert!(matches!(result, Err(RoutingError::InvalidParameter { .. })));

    let mut plan = RoutingPlan::default();
    TopK::new(1, Combine::Raw)
        .unwrap()
        .route(array![[1.0, 2.0]].view(), None, &mut plan)
        .unwrap();
    let mut usage = UsageStats::new(3);
    assert!(matches!(
        usage.record(&plan),
        Err(RoutingError::ShapeMismatch {
            expected: 3,
            found: 2,
            ..
        })
    ));
    assert!(matches!(
        usage.grow(2),
        Err(RoutingError::ShapeMismatch { .. })
    ));
    assert!(
        usage
            .merge(&UsageStats::new(3).with_co_activation())
            .is_err()
    );
    let mut labels = LabelUsage::new(2, 2);
    assert!(matches!(
        labels.record(&plan, &[2]),
        Err(RoutingError::InvalidParameter { .. })
    ));
    assert!(matches!(
        labels.record(&plan, &[]),
        Err(RoutingError::ShapeMismatch { .. })
    ));
    assert!(labels.merge(&LabelUsage::new(3, 2)).is_err());
    assert_eq!(labels.counts().sum(), 0);
    for text in [
        r#"{"tokens":1,"load":[1],"weight":[],"k_counts":[0,1],"entropy_sum":0,"entropy_tokens":0,"co_activation":null}"#,
        r#"{"tokens":1,"load":[2],"weight":[0],"k_counts":[0,1],"entropy_sum":0,"entropy_tokens":0,"co_activation":null}"#,
        r#"{"tokens":1,"load":[1],"weight":[0],"k_counts":[0,1],"entropy_sum":0,"entropy_tokens":0,"co_activation":[1,1]}"#,
        r#"{"tokens":0,"load":[0],"weight":[0],"k_counts":[],"entropy_sum":0,"entropy_tokens":0,"co_activation":[18446744073709551615]}"#,
        r#"{"tokens":2,"load":[1,1],"weight":[0,0],"k_counts":[0,2],"entropy_sum":0,"entropy_tokens":0,"co_activation":[1,2,2,1]}"#,
        r#"{"tokens":2,"load":[2,2],"weight":[0,0],"k_counts":[0,0,2],"entropy_sum":0,"entropy_tokens":0,"co_activation":[2,2,1,2]}"#,
        r#"{"tokens":1,"load":[5],"weight":[0],"k_counts":[0,0,0,0,0,1],"entropy_sum":0,"entropy_tokens":0,"co_activation":null}"#,
        r#"{"tokens":2,"load":[18446744073709551615,1],"weight":[0,0],"k_counts":[0,2],"entropy_sum":0,"entropy_tokens":0,"co_activation":null}"#,
    ] {
        assert!(serde_json::from_str::<UsageStats>(text).is_err(), "{text}");
    }
}

#[test]
fn a_grown_pool_keeps_its_counts() {
    let mut plan = RoutingPlan::default();
    let mut router = TopK::new(2, Combine::Renormalised).unwrap();
    router
        .route(array![[3.0, 2.0, 1.0]].view(), None, &mut plan)
        .unwrap();
    let mut usage = UsageStats::new(3).with_co_activation();
    usage.record(&plan).unwrap();
    usage.grow(4).unwrap();
    router
        .route(array![[0.0, 0.0, 1.0, 2.0]].view(), None, &mut plan)
        .unwrap();
    usage.record(&plan).unwrap();
    // A pool that grew, and pairs counted since, are read back.
    let late = usage.clone().with_co_activation();
    for usage in [&usage, &late] {
        let text = serde_json::to_string(usage).unwrap();
        assert_eq!(&serde_json::from_str::<UsageStats>(&text).unwrap(), usage);
    }
    assert_eq!(usage.load(), [1, 1, 1, 1]);
    assert_eq!(usage.co_activation().unwrap()[(0, 1)], 1);
    assert_eq!(usage.co_activation().unwrap()[(0, 3)], 0);
    assert_eq!(usage.max_load_ratio(), Some(1.0));
    assert!((usage.load_entropy().unwrap() - 4_f64.ln()).abs() < 1e-12);
    assert!((usage.importance().iter().sum::<f64>() - 2.0).abs() < 1e-6);
}

//! The metrics of GLUE against values worked out by hand, and their properties.

use mass_bench::glue::metrics::{MetricError, accuracy, f1, matthews, pearson, spearman};
use mass_bench::glue::task::{Target, Task};
use proptest::prelude::*;

#[test]
fn values_worked_out_by_hand() {
    // TP 3, FP 1, FN 2, TN 4.
    let predicted = [1, 1, 1, 1, 0, 0, 0, 0, 0, 0];
    let gold = [1, 1, 1, 0, 1, 1, 0, 0, 0, 0];
    assert_eq!(accuracy(&predicted, &gold), Ok(0.7));
    assert_eq!(f1(&predicted, &gold), Ok(6.0 / 9.0));
    // (TP TN - FP FN) / sqrt((TP+FP)(TP+FN)(TN+FP)(TN+FN)) = (12 - 2) / sqrt(4 * 5 * 5 * 6)
    let binary = matthews(&predicted, &gold).unwrap();
    assert!((binary - 10.0 / 600f64.sqrt()).abs() < 1e-15);
    // Three classes, labels 0 0 1 1 2 2, predictions 0 1 1 1 2 0: c = 4, s = 6, p = (2, 3, 1), t = (2, 2, 2);
    // (24 - 12) / sqrt((36 - 14)(36 - 12)).
    let three = matthews(&[0, 1, 1, 1, 2, 0], &[0, 0, 1, 1, 2, 2]).unwrap();
    assert!((three - 12.0 / 528f64.sqrt()).abs() < 1e-15);
    // Deviations (-1, 0, 1) and (-4/3, 2/3, 2/3): 2 / sqrt(2 * 24/9).
    let r = pearson(&[1.0, 2.0, 3.0], &[1.0, 3.0, 3.0]).unwrap();
    assert!((r - 0.866_025_403_784_438_6).abs() < 1e-15);
    // Ranks 1.5 1.5 3 4 and 2 1 3.5 3.5: covariances -1*-.5 + -1*-1.5 + .5*1 + 1.5*1 = 4; squares 4.5 and 4.5.
    let rho = spearman(&[2.0, 2.0, 5.0, 9.0], &[3.0, 1.0, 4.0, 4.0]).unwrap();
    assert!((rho - 4.0 / 4.5).abs() < 1e-15);
    // Zeros of both signs are equal.
    assert_eq!(
        spearman(&[0.0, -0.0, 1.0], &[1.0, 2.0, 3.0]),
        spearman(&[0.0, 0.0, 1.0], &[1.0, 2.0, 3.0])
    );
}

#[test]
fn edges_are_those_of_scikit_learn_and_scipy() {
    // No 1 anywhere: F1 is 0; a single class: Matthews is 0.
    assert_eq!(f1(&[0, 0], &[0, 0]), Ok(0.0));
    assert_eq!(f1(&[0, 0], &[1, 0]), Ok(0.0));
    for (predicted, gold) in [([1, 1], [1, 1]), ([0, 0], [0, 1]), ([0, 1], [1, 1])] {
        assert_eq!(matthews(&predicted, &gold), Ok(0.0));
    }
    for constant in [0.0, 3.5, -1e300] {
        assert!(pearson(&[constant; 3], &[1.0, 2.0, 3.0]).unwrap().is_nan());
        assert!(spearman(&[1.0, 2.0, 3.0], &[constant; 3]).unwrap().is_nan());
    }
    // Values whose squares leave the range of f64.
    for scale in [1e200, 1e-200] {
        let scaled = [1.0, 2.0, 3.0].map(|x: f64| x * scale);
        assert!((pearson(&scaled, &[1.0, 2.0, 3.0]).unwrap() - 1.0).abs() < 1e-15);
    }
}

#[test]
fn what_cannot_be_scored_is_refused() {
    let few = |found, needed| Err(MetricError::TooFew { found, needed });
    assert_eq!(accuracy(&[], &[]), few(0, 1));
    assert_eq!(f1(&[], &[]), few(0, 1));
    assert_eq!(matthews(&[], &[]), few(0, 1));
    assert_eq!(pearson(&[1.0], &[1.0]), few(1, 2));
    assert_eq!(spearman(&[1.0], &[1.0]), few(1, 2));
    let lengths = MetricError::Lengths {
        predictions: 1,
        labels: 2,
    };
    assert_eq!(accuracy(&[1], &[1, 0]), Err(lengths.clone()));
    assert_eq!(pearson(&[1.0], &[1.0, 0.0]), Err(lengths));
    let class = |class, index| Err(MetricError::NotBinary { class, index });
    assert_eq!(f1(&[1, 2], &[1, 0]), class(2, 1));
    assert_eq!(f1(&[1, 1], &[3, 0]), class(3, 0));
    for (bad, what) in [(f64::NAN, "prediction"), (f64::INFINITY, "prediction")] {
        let error = MetricError::NonFinite { what, index: 1 };
        assert_eq!(pearson(&[1.0, bad], &[1.0, 2.0]), Err(error.clone()));
        assert_eq!(spearman(&[1.0, bad], &[1.0, 2.0]), Err(error));
    }
}

#[test]
fn a_task_scores_the_outputs_of_its_classifier() {
    let classes = |c: &[u32]| c.iter().map(|&c| Target::Class(c)).collect::<Vec<_>>();
    // Predicted 1, 0, 0 (a tie), 1.
    let outputs = [0.1, 0.2, 3.0, -1.0, 0.5, 0.5, -2.0, -1.0];
    let gold = classes(&[1, 0, 1, 1]);
    let cola = Task::Cola.score(&outputs, &gold).unwrap();
    assert_eq!(cola.accuracy, Some(0.75));
    assert_eq!(cola.metric, matthews(&[1, 0, 0, 1], &[1, 0, 1, 1]).unwrap());
    let mrpc = Task::Mrpc.score(&outputs, &gold).unwrap();
    assert_eq!((mrpc.metric, mrpc.accuracy), (0.8, Some(0.75)));
    assert_eq!(Task::Rte.score(&outputs, &gold).unwrap().metric, 0.75);
    let mnli = Task::Mnli.score(&[0.0, 0.0, 1.0, 2.0, 0.0, 1.0], &classes(&[2, 1]));
    assert_eq!(mnli.unwrap().metric, 0.5);
    let values: Vec<Target> = [1.0, 3.0, 3.0].map(Target::Value).to_vec();
    let stsb = Task::Stsb.score(&[1.0, 2.0, 3.0], &values).unwrap();
    assert_eq!(stsb.accuracy, None);
    assert_eq!(stsb.metric, (stsb.parts[0].1 + stsb.parts[1].1) / 2.0);
    assert!(
        Task::Stsb
            .score(&[1.0, 1.0, 1.0], &values)
            .unwrap()
            .metric
            .is_nan()
    );

    assert_eq!(
        Task::Stsb.score(&[1.0, 2.0], &classes(&[0, 1])),
        Err(MetricError::Kind)
    );
    assert_eq!(
        Task::Rte.score(&[1.0, 2.0], &[Target::Value(1.0)]),
        Err(MetricError::Kind)
    );
    assert!(matches!(
        Task::Rte.score(&[1.0, f32::NAN], &classes(&[1])),
        Err(MetricError::NonFinite { index: 0, .. })
    ));
    assert_eq!(
        Task::Cola.score(&[1.0, 2.0, 3.0], &classes(&[1])),
        Err(MetricError::Outputs {
            outputs: 3,
            labels: 1,
            width: 2
        })
    );
    assert!(matches!(
        Task::Rte.score(&[1.0, 2.0], &classes(&[1, 0])),
        Err(MetricError::Lengths {
            predictions: 1,
            labels: 2
        })
    ));
}

fn two_lists(values: std::ops::Range<u32>) -> impl Strategy<Value = (Vec<u32>, Vec<u32>)> {
    (2..60usize).prop_flat_map(move |n| {
        let list = || proptest::collection::vec(values.clone(), n);
        (list(), list())
    })
}

proptest! {
    #[test]
    fn classification_metrics_stay_in_range_and_ignore_order((p, g) in two_lists(0..2), by in 0..60usize) {
        let by = by % p.len();
        let turn = |v: &[u32]| [&v[by..], &v[..by]].concat();
        for metric in [accuracy, f1, matthews] {
            let value = metric(&p, &g).unwrap();
            prop_assert!((-1.0..=1.0).contains(&value));
            prop_assert_eq!(value, metric(&turn(&p), &turn(&g)).unwrap());
        }
        // Exchanging the sides changes neither F1 nor Matthews; exchanging the classes turns neither.
        prop_assert_eq!(f1(&p, &g), f1(&g, &p));
        prop_assert_eq!(matthews(&p, &g), matthews(&g, &p));
        let flip = |v: &[u32]| v.iter().map(|x| 1 - x).collect::<Vec<_>>();
        prop_assert_eq!(matthews(&flip(&p), &flip(&g)), matthews(&p, &g));
        let turned = matthews(&flip(&p), &g).unwrap() + matthews(&p, &g).unwrap();
        prop_assert!(turned.abs() < 1e-12);
    }

    #[test]
    fn a_perfect_prediction_scores_one((_, g) in two_lists(0..4)) {
        prop_assert_eq!(accuracy(&g, &g), Ok(1.0));
        let mixed = g.iter().any(|c| *c != g[0]);
        prop_assert_eq!(matthews(&g, &g), Ok(f64::from(u8::from(mixed))));
    }

    #[test]
    fn correlations_ignore_scale_and_rank_ignores_growth((p, g) in two_lists(0..30), scale in 0.1..50f64) {
        let floats = |v: &[u32]| v.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
        let (p, g) = (floats(&p), floats(&g));
        let scaled: Vec<f64> = p.iter().map(|x| 3.0 - scale * x).collect();
        let cubed: Vec<f64> = p.iter().map(|x| (x - 9.0).powi(3)).collect();
        for metric in [pearson, spearman] {
            let (value, turned) = (metric(&p, &g).unwrap(), metric(&scaled, &g).unwrap());
            prop_assert!(value.is_nan() == turned.is_nan());
            prop_assert!(value.is_nan() || (value + turned).abs() < 1e-9);
            prop_assert!(value.is_nan() || value.abs() <= 1.0);
        }
        let (value, grown) = (spearman(&p, &g).unwrap(), spearman(&cubed, &g).unwrap());
        prop_assert!(value.is_nan() && grown.is_nan() || value == grown);
    }
}

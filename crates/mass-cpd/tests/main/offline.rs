//! Segmentation of recorded series.
#![cfg(feature = "offline")]

use mass_cpd::{
    CpdError,
    offline::{BinarySegmentationParams, Cost, PeltParams, Penalty},
    run_length::{
        RunLength, Sides, exact_threshold_for_horizon, threshold_for_average, threshold_for_horizon,
    },
};
use ndarray::{Array1, ArrayView1, array};
use ndarray_rand::{
    rand::{Rng, SeedableRng},
    rand_distr::StandardNormal,
};
use proptest::prelude::*;
use rand_chacha::ChaCha8Rng;

fn cut(params: PeltParams, series: &[f64]) -> Vec<usize> {
    params
        .check()
        .expect("valid")
        .segment(ArrayView1::from(series))
        .expect("a series")
        .indices()
}

/// Least cost over all segmentations, by trying every last start: no pruning.
fn least_cost(series: &[f64], penalty: f64, least: usize) -> f64 {
    let n = series.len();
    let mut best = vec![f64::INFINITY; n + 1];
    best[0] = -penalty;
    for end in least..=n {
        for start in 0..=end - least {
            best[end] = best[end].min(best[start] + level_cost(&series[start..end]) + penalty);
        }
    }
    best[n]
}

fn level_cost(segment: &[f64]) -> f64 {
    let mean = segment.iter().sum::<f64>() / segment.len() as f64;
    segment.iter().map(|v| (v - mean) * (v - mean)).sum()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn pruning_loses_nothing(
        series in prop::collection::vec(-5.0..5.0f64, 8..90),
        penalty in 0.5..60.0f64,
        min_segment in 1usize..7,
    ) {
        let params = PeltParams { penalty: Penalty::Value(penalty), min_segment, ..Default::default() };
        let found = cut(params, &series);
        let mut edges = vec![0];
        edges.extend(&found);
        edges.push(series.len());
        prop_assert!(edges.windows(2).all(|e| e[1] - e[0] >= min_segment));
        let cost: f64 = edges.windows(2).map(|e| level_cost(&series[e[0]..e[1]])).sum();
        let cost = cost + penalty * found.len() as f64;
        let least = least_cost(&series, penalty, min_segment);
        prop_assert!((cost - least).abs() <= 1e-9 * (1.0 + least.abs()), "{cost} {least}");
    }

    #[test]
    fn a_change_of_units_moves_no_change_point(
        series in prop::collection::vec(-5.0..5.0f64, 20..120),
        scale in 0.01..100.0f64,
        shift in -100.0..100.0f64,
    ) {
        let moved: Vec<f64> = series.iter().map(|x| scale * x + shift).collect();
        for cost in [Cost::Level, Cost::LevelAndSpread] {
            let params = PeltParams { cost, ..Default::default() };
            prop_assert_eq!(cut(params, &series), cut(params, &moved));
        }
    }

    #[test]
    fn p_values_are_probabilities_and_the_level_is_kept_to(
        series in prop::collection::vec(-5.0..5.0f64, 20..200), jump in 0.0..10.0f64,
    ) {
        let half = series.len() / 2;
        let series: Array1<f64> =
            series.iter().enumerate().map(|(t, x)| x + if t >= half { jump } else { 0.0 }).collect();
        let alpha = 0.02;
        let binary = BinarySegmentationParams { alpha, ..Default::default() }.check().unwrap();
        let found = binary.segment(series.view()).unwrap();
        prop_assert!(found.change_points.iter().all(|c| (0.0..=alpha).contains(&c.p_value)));
        prop_assert!(found.segments().iter().all(|s| s.len() >= 5));
        let pelt = PeltParams::default().check().unwrap().segment(series.view()).unwrap();
        prop_assert!(pelt.change_points.iter().all(|c| (0.0..=1.0).contains(&c.p_value)));
    }
}

#[test]
fn binary_segmentation_keeps_its_level_on_autocorrelated_noise() {
    let binary = BinarySegmentationParams::default().check().unwrap();
    for phi in [0.0, 0.3, 0.6] {
        let found = (0..1000)
            .filter(|&seed| {
                let mut rng = ChaCha8Rng::seed_from_u64(seed);
                let mut x = 0.0;
                let series: Array1<f64> = (0..300)
                    .map(|_| {
                        let shock: f64 = rng.sample(StandardNormal);
                        x = phi * x + shock;
                        x
                    })
                    .collect();
                !binary
                    .segment(series.view())
                    .unwrap()
                    .change_points
                    .is_empty()
            })
            .count();
        // 0.05, and three standard errors of the simulation.
        assert!(found <= 71, "phi {phi}: {found} of 1000");
    }
}

#[test]
fn a_change_of_spread_alone_is_found_when_asked_for() {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let series: Vec<f64> = (0..400)
        .map(|t| rng.sample::<f64, _>(StandardNormal) * if t < 200 { 1.0 } else { 5.0 })
        .collect();
    let found = cut(
        PeltParams {
            cost: Cost::LevelAndSpread,
            ..Default::default()
        },
        &series,
    );
    assert!(found.len() == 1 && found[0].abs_diff(200) < 10, "{found:?}");
}

#[test]
fn a_constant_series_has_no_change_points() {
    for level in [0.0, 0.1, -1e90] {
        let series = Array1::from_elem(50, level);
        assert!(cut(PeltParams::default(), series.as_slice().unwrap()).is_empty());
        let binary = BinarySegmentationParams::default().check().unwrap();
        assert!(
            binary
                .segment(series.view())
                .unwrap()
                .change_points
                .is_empty()
        );
    }
}

#[test]
fn a_strided_view_is_as_good_as_a_slice() {
    let series: Array1<f64> = (0..200)
        .map(|t| f64::from(t / 100) + f64::from(t * 37 % 11) / 50.0)
        .collect();
    let every_other = series.slice(ndarray::s![..;2]);
    let pelt = PeltParams::default().check().unwrap();
    assert_eq!(pelt.segment(every_other).unwrap().indices(), [50]);
    let owned = every_other.to_owned();
    assert_eq!(pelt.segment(owned.view()), pelt.segment(every_other));
}

#[test]
fn each_kind_of_bad_input_has_its_error() {
    let pelt = PeltParams::default().check().unwrap();
    assert_eq!(
        pelt.segment(array![1.0].view()),
        Err(CpdError::TooShort { got: 1, needed: 5 })
    );
    let series = array![0.0, 1.0, f64::NAN, 0.0, 1.0, 2.0];
    assert!(matches!(
        pelt.segment(series.view()),
        Err(CpdError::NonFinite { count: 3, .. })
    ));
    let series = array![0.0, 1.0, 1e200, 0.0, 1.0, 2.0];
    assert!(matches!(
        pelt.segment(series.view()),
        Err(CpdError::TooLarge { count: 3, .. })
    ));
    let binary = BinarySegmentationParams::default().check().unwrap();
    assert!(matches!(
        binary.segment(series.view()),
        Err(CpdError::TooShort { needed: 10, .. })
    ));
    let name = |result: Result<(), CpdError>| match result {
        Err(CpdError::Parameter { name, .. }) => name,
        other => panic!("{other:?}"),
    };
    let d = PeltParams::default();
    let pelt = |p: PeltParams| name(p.check().map(|_| ()));
    assert_eq!(
        pelt(PeltParams {
            min_segment: 0,
            ..d
        }),
        "min_segment"
    );
    assert_eq!(
        pelt(PeltParams {
            min_segment: 1,
            cost: Cost::LevelAndSpread,
            ..d
        }),
        "min_segment"
    );
    assert_eq!(
        pelt(PeltParams {
            penalty: Penalty::Value(f64::NAN),
            ..d
        }),
        "penalty.value"
    );
    assert_eq!(
        pelt(PeltParams {
            penalty: Penalty::Autocorrelated { limit: 1.0 },
            ..d
        }),
        "penalty.limit"
    );
    let b = BinarySegmentationParams::default();
    let binary = |p: BinarySegmentationParams| name(p.check().map(|_| ()));
    assert_eq!(
        binary(BinarySegmentationParams { alpha: 0.0, ..b }),
        "alpha"
    );
    assert_eq!(
        binary(BinarySegmentationParams {
            min_segment: 1,
            ..b
        }),
        "min_segment"
    );

    let run = |k, h, mu| name(RunLength::new(k, h, mu).map(|_| ()));
    assert_eq!(run(f64::NAN, 1.0, 0.0), "k");
    assert_eq!(run(0.5, -1.0, 0.0), "h");
    assert_eq!(run(0.5, 1.0, f64::INFINITY), "mu");
    assert_eq!(
        name(threshold_for_horizon(0.5, 0, 0.05, Sides::One).map(|_| ())),
        "n"
    );
    assert_eq!(
        name(threshold_for_average(0.5, 0.5, Sides::One).map(|_| ())),
        "average"
    );
    // Where no threshold at all is enough.
    for average in [1.0, 2.0] {
        assert_eq!(threshold_for_average(0.0, average, Sides::One), Ok(0.0));
    }
    assert_eq!(
        exact_threshold_for_horizon(0.0, 1, 0.5, Sides::One),
        Ok(0.0)
    );
    // Without an allowance no threshold up to 200 keeps a million steps quiet.
    assert!(matches!(
        threshold_for_horizon(0.0, 1_000_000, 0.01, Sides::One),
        Err(CpdError::NotFound { .. })
    ));
}

#[test]
fn a_jump_without_any_noise_is_found_by_both() {
    let steps = |levels: &[f64]| -> Vec<f64> { levels.iter().flat_map(|&l| [l; 50]).collect() };
    let binary = BinarySegmentationParams::default().check().expect("valid");
    for (levels, want) in [(&[0.0, 1.0][..], &[50][..]), (&[0.1, 0.7, 0.3], &[50, 100])] {
        let series = steps(levels);
        assert_eq!(cut(PeltParams::default(), &series), want);
        let found = binary
            .segment(Array1::from(series).view())
            .expect("long enough");
        assert_eq!(found.indices(), want);
    }
    let constant = Array1::from_elem(100, 0.1);
    assert!(
        binary
            .segment(constant.view())
            .expect("long enough")
            .indices()
            .is_empty()
    );
}

#[test]
fn squares_that_vanish_and_segments_past_counting_are_no_trouble() {
    let spread = PeltParams {
        cost: Cost::LevelAndSpread,
        ..PeltParams::default()
    };
    let mut tiny = vec![0.0; 10];
    tiny.extend([1e-158, -1e-158].repeat(5));
    cut(spread, &tiny);
    let slope: Vec<f64> = (0..1000).map(|t| f64::from(t) * 1e-163).collect();
    cut(PeltParams::default(), &slope);
    let endless = BinarySegmentationParams {
        min_segment: usize::MAX,
        ..BinarySegmentationParams::default()
    };
    let found = endless
        .check()
        .and_then(|b| b.segment(Array1::from(tiny).view()));
    assert!(found.is_err());
}

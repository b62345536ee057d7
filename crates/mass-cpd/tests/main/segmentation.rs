//! What segmentation has to find whatever the number of changes, the scale and the grain of a series.
#![cfg(feature = "offline")]

use mass_cpd::{
    CpdError,
    offline::{
        BinarySegmentationParams, Cost, PeltParams, Penalty, PenaltyPathParams,
        SegmentNeighbourhoodParams, Segmentation,
    },
};
use ndarray::{Array1, ArrayView1};
use ndarray_rand::{
    rand::{Rng, SeedableRng},
    rand_distr::{Exp1, StandardNormal},
};
use proptest::prelude::*;
use rand_chacha::ChaCha8Rng;

/// AR(1) noise of standard deviation one.
fn noise(seed: u64, n: usize, phi: f64) -> Vec<f64> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut last: f64 = rng.sample(StandardNormal);
    (0..n)
        .map(|_| {
            let shock: f64 = rng.sample(StandardNormal);
            last = phi * last + (1.0 - phi * phi).sqrt() * shock;
            last
        })
        .collect()
}

fn pelt(params: PeltParams, series: &[f64]) -> Segmentation {
    let pelt = params.check().expect("valid");
    pelt.segment(ArrayView1::from(series)).expect("a series")
}

fn binary(series: &[f64]) -> Segmentation {
    let binary = BinarySegmentationParams::default().check().expect("valid");
    binary.segment(ArrayView1::from(series)).expect("a series")
}

fn spread(series: &[f64]) -> Vec<usize> {
    let params = PeltParams {
        cost: Cost::LevelAndSpread,
        ..PeltParams::default()
    };
    pelt(params, series).indices()
}

/// Whether exactly these changes are found, each within `margin`.
fn all_found(found: &[usize], want: &[usize], margin: usize) -> bool {
    found.len() == want.len()
        && found
            .iter()
            .zip(want)
            .all(|(a, b)| a.abs_diff(*b) <= margin)
}

/// Of 20 seeds, those in which PELT and binary segmentation find every change of `level`, and nothing else.
fn seeds_found(n: usize, sd: f64, phi: f64, level: impl Fn(usize) -> f64) -> (usize, usize) {
    let want: Vec<usize> = (1..n).filter(|&t| level(t) != level(t - 1)).collect();
    let mut right = (0, 0);
    for seed in 0..20 {
        let series: Vec<f64> = noise(seed, n, phi)
            .iter()
            .enumerate()
            .map(|(t, e)| level(t) + sd * e)
            .collect();
        let default = pelt(PeltParams::default(), &series).indices();
        right.0 += usize::from(all_found(&default, &want, 3));
        right.1 += usize::from(all_found(&binary(&series).indices(), &want, 3));
    }
    right
}

#[test]
fn the_number_of_changes_hides_none_of_them() {
    let square = |half: usize| move |t: usize| ((t / half) % 2) as f64;
    let stairs = |half: usize| move |t: usize| (t / half) as f64;
    for (n, half) in [(400, 40), (600, 30), (600, 20), (1000, 25), (150, 50)] {
        for phi in [0.0, 0.3] {
            for (name, right) in [
                ("square", seeds_found(n, 0.1, phi, square(half))),
                ("stairs", seeds_found(n, 0.1, phi, stairs(half))),
            ] {
                assert!(
                    right.0 >= 19 && right.1 >= 18,
                    "{name}, n {n}, half {half}, phi {phi}: {right:?} of 20"
                );
            }
        }
    }
    // Strong autocorrelation, and levels that are not equal.
    let right = seeds_found(500, 0.1, 0.6, |t| [0.0, 1.0, -1.0, 2.0, 0.5][t / 100]);
    assert!(right.0 >= 19 && right.1 >= 18, "{right:?} of 20");
    // A step in the units of any noise, down to none at all.
    for sd in [0.2, 1e-3, 1e-9, 0.0] {
        let right = seeds_found(400, sd, 0.0, square(40));
        assert!(right.0 >= 19 && right.1 >= 18, "sd {sd}: {right:?} of 20");
    }
}

#[test]
fn without_a_change_hardly_any_is_found() {
    for (phi, most) in [(0.0, 6), (0.3, 6), (0.6, 9)] {
        for n in [60, 200, 600] {
            let with = (0..100)
                .filter(|&seed| {
                    let found = pelt(PeltParams::default(), &noise(seed, n, phi)).indices();
                    !found.is_empty()
                })
                .count();
            assert!(with <= most, "n {n}, phi {phi}: {with} of 100");
        }
    }
}

#[test]
fn a_season_is_no_change() {
    for n in [60, 200, 600] {
        let season: Vec<f64> = noise(3, n, 0.0)
            .iter()
            .enumerate()
            .map(|(t, e)| (t as f64 * std::f64::consts::PI / 6.0).sin() + 0.3 * e)
            .collect();
        assert!(pelt(PeltParams::default(), &season).indices().is_empty());
    }
}

#[test]
fn values_that_dwarf_the_others_take_no_digits_with_them() {
    let levels = |big: f64| -> Vec<f64> {
        let side = |level: f64| (0..100).map(move |t| level + if t % 2 == 0 { 0.5 } else { -0.5 });
        [big, -big]
            .into_iter()
            .chain(side(-10.0))
            .chain(side(10.0))
            .collect()
    };
    let cut = |series: &[f64], min_segment: usize| {
        let params = PeltParams {
            penalty: Penalty::Value(20.0),
            min_segment,
            ..PeltParams::default()
        };
        pelt(params, series).indices()
    };
    for power in [10, 20, 31, 35, 40] {
        let series = levels(2f64.powi(power));
        // The outliers fill up their segment; once it is cut off, nothing is gained by putting more into it.
        assert_eq!(cut(&series, 5), [5, 102], "2^{power}");
        assert_eq!(cut(&series, 1), [1, 2, 102], "2^{power}");
        let given = |changes, min_segment| {
            let params = SegmentNeighbourhoodParams {
                changes,
                min_segment,
                ..Default::default()
            };
            let method = params.check().expect("valid");
            method
                .segment(ArrayView1::from(&series))
                .expect("a series")
                .indices()
        };
        assert_eq!(given(3, 1), [1, 2, 102], "2^{power}");
        // Wherever they stand.
        let mut series = series;
        series.rotate_left(60);
        assert!(cut(&series, 1).contains(&42), "2^{power}");
    }
    // A level far from zero, and one far from the other.
    let far: Vec<f64> = levels(0.0).iter().map(|x| x + 2f64.powi(45)).collect();
    assert_eq!(cut(&far[2..], 5), [100]);
    let mut three = levels(0.0)[2..].to_vec();
    three.extend((0..100).map(|t| 1e9 + if t % 2 == 0 { 0.5 } else { -0.5 }));
    assert_eq!(cut(&three, 5), [100, 200]);
    assert_eq!(
        pelt(PeltParams::default(), &three).indices(),
        [100, 200],
        "default"
    );
    // Past what can be told, that is said.
    let series = levels(1e30);
    let params = PeltParams {
        penalty: Penalty::Value(20.0),
        ..PeltParams::default()
    };
    let refused = params
        .check()
        .expect("valid")
        .segment(ArrayView1::from(&series));
    assert!(
        matches!(refused, Err(CpdError::LostInRounding { penalty, .. }) if penalty == 20.0),
        "{refused:?}"
    );
}

/// Least penalised cost in integers, all of it times `27720 = lcm(1..=12)`.
fn exact_least(series: &[i64], penalty: i128, least: usize) -> i128 {
    let n = series.len();
    let mut best: Vec<Option<i128>> = vec![None; n + 1];
    best[0] = Some(-penalty);
    for end in least..=n {
        best[end] = (0..=end - least)
            .filter_map(|start| Some(best[start]? + exact_cost(&series[start..end]) + penalty))
            .min();
    }
    best[n].expect("a segmentation")
}

fn exact_cost(segment: &[i64]) -> i128 {
    let (sum, square) = segment.iter().fold((0i128, 0i128), |(a, b), &v| {
        (a + i128::from(v), b + i128::from(v) * i128::from(v))
    });
    27720 * square - sum * sum * (27720 / segment.len() as i128)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn mixed_scales_cost_what_exact_arithmetic_says(
        series in prop::collection::vec(
            (-9i64..=9, prop::sample::select(vec![1i64, 1, 1, 1000, 1 << 28])).prop_map(|(v, s)| v * s),
            4..=12,
        ),
        penalty in 1i128..100,
        min_segment in 1usize..4,
    ) {
        let floats: Vec<f64> = series.iter().map(|&v| v as f64).collect();
        let params =
            PeltParams { penalty: Penalty::Value(penalty as f64), min_segment, ..Default::default() };
        let found = pelt(params, &floats);
        let cost: i128 = found.segments().into_iter().map(|r| exact_cost(&series[r])).sum();
        let cost = cost + 27720 * penalty * found.change_points.len() as i128;
        prop_assert_eq!(cost, exact_least(&series, 27720 * penalty, min_segment));
    }

    #[test]
    fn each_number_of_changes_has_its_least_cost(
        series in prop::collection::vec(-9i64..=9, 9..=12), min_segment in 1usize..4,
    ) {
        let floats = Array1::from_iter(series.iter().map(|&v| v as f64));
        let changes = 2;
        let method = SegmentNeighbourhoodParams { changes, min_segment, ..Default::default() };
        let each = method.check().unwrap().segment_each(floats.view()).unwrap();
        prop_assert_eq!(each.len(), 3);
        let cost = |cut: &Segmentation| -> i128 {
            cut.segments().into_iter().map(|r| exact_cost(&series[r])).sum()
        };
        let n = series.len();
        let two = (min_segment..=n)
            .flat_map(|a| (a + min_segment..=n).map(move |b| (a, b)))
            .filter(|&(_, b)| b + min_segment <= n)
            .map(|(a, b)| exact_cost(&series[..a]) + exact_cost(&series[a..b]) + exact_cost(&series[b..]))
            .min();
        prop_assert_eq!(Some(cost(&each[2])), two);
        let one = (min_segment..=n - min_segment)
            .map(|a| exact_cost(&series[..a]) + exact_cost(&series[a..]))
            .min();
        prop_assert_eq!(Some(cost(&each[1])), one);
        prop_assert!(each[0].indices().is_empty());
        prop_assert_eq!(&method.check().unwrap().segment(floats.view()).unwrap(), &each[2]);
    }

    #[test]
    fn the_path_is_what_single_penalties_give(
        series in prop::collection::vec(-5.0..5.0f64, 12..80),
        min_segment in 2usize..6,
        with_spread in any::<bool>(),
    ) {
        let cost = if with_spread { Cost::LevelAndSpread } else { Cost::Level };
        let params = PenaltyPathParams { cost, min_segment, ..PenaltyPathParams::between(0.5, 200.0) };
        let path = params.check().unwrap().segment(ArrayView1::from(&series)).unwrap();
        prop_assert_eq!((path[0].from, path[path.len() - 1].to), (0.5, 200.0));
        for pair in path.windows(2) {
            prop_assert_eq!(pair[0].to, pair[1].from);
            let numbers = (pair[0].segmentation.change_points.len(), pair[1].segmentation.change_points.len());
            prop_assert!(numbers.0 > numbers.1);
            prop_assert!(pair[0].cost < pair[1].cost);
        }
        for range in &path {
            prop_assert!(range.from <= range.to);
            let between = (range.from * range.to).sqrt();
            let penalty = Penalty::Value(between);
            let alone = pelt(PeltParams { cost, penalty, min_segment }, &series);
            if range.to > range.from * (1.0 + 1e-6) {
                prop_assert_eq!(alone.indices(), range.segmentation.indices(), "{}", between);
            }
        }
    }
}

#[test]
fn values_with_a_grain_are_noise_like_any_other() {
    let multiples = |a: usize, b: usize, n: usize| -> Vec<f64> {
        (0..n)
            .map(|t| f64::from(u8::from(t % a == 0 || t % b == 0)))
            .collect()
    };
    for (a, b) in [(7, 11), (3, 13), (5, 17), (9, 10), (23, 31)] {
        for (scale, shift) in [(1.0, 0.0), (0.1, 0.3), (1e-9, 0.0), (1e9, -4e9), (3.0, 1e6)] {
            let series: Vec<f64> = multiples(a, b, 1001)
                .iter()
                .map(|x| x * scale + shift)
                .collect();
            assert_eq!(spread(&series), [0usize; 0], "{a} {b}, {scale} {shift}");
            let level = pelt(PeltParams::default(), &series).indices();
            assert_eq!(level, [0usize; 0], "{a} {b}, {scale} {shift}");
        }
    }
    let mut some = 0;
    for seed in 0..20 {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        // Coins, small counts, rounded noise, and rain: mostly nothing.
        let coins: Vec<f64> = (0..600)
            .map(|_| f64::from(u8::from(rng.random_bool(0.1))))
            .collect();
        let rounded: Vec<f64> = noise(seed, 600, 0.0)
            .iter()
            .map(|x| (2.0 * x).round() / 10.0)
            .collect();
        let rain: Vec<f64> = (0..600)
            .map(|_| {
                let amount: f64 = rng.sample(Exp1);
                if rng.random_bool(0.7) { 0.0 } else { amount }
            })
            .collect();
        for series in [coins, rounded, rain] {
            some += usize::from(!spread(&series).is_empty());
        }
    }
    assert!(some <= 6, "{some} of 60");
}

#[test]
fn levels_and_spreads_of_any_magnitude_are_told_apart() {
    let alternating = |centre: f64, size: f64| {
        (0..100).map(move |t| centre + if t % 2 == 0 { size } else { -size })
    };
    for (centre, small, large) in [
        (1e6, 1.0, 30.0),
        (1e6, 1.0, 3.0),
        (1e3, 1e-3, 1e-2),
        (1e9, 1.0, 100.0),
        (1e-3, 1e-9, 1e-7),
        (-1e12, 0.5, 8.0),
        (1e6, 30.0, 1.0),
    ] {
        let series: Vec<f64> = alternating(0.0, small)
            .chain(alternating(centre, small))
            .chain(alternating(centre, large))
            .collect();
        assert_eq!(spread(&series), [100, 200], "{centre} {small} {large}");
        let coins = noise(1, 300, 0.0);
        let at_random: Vec<f64> = series
            .iter()
            .zip(&coins)
            .enumerate()
            .map(|(t, (x, e))| {
                let middle = if t < 100 { 0.0 } else { centre };
                middle + (x - middle).abs().copysign(*e)
            })
            .collect();
        let found = spread(&at_random);
        assert!(
            all_found(&found, &[100, 200], 2),
            "{centre} {small} {large}: {found:?}"
        );
        let normal: Vec<f64> = series
            .iter()
            .zip(&coins)
            .enumerate()
            .map(|(t, (x, e))| {
                let middle = if t < 100 { 0.0 } else { centre };
                middle + (x - middle).abs() * e
            })
            .collect();
        let found = spread(&normal);
        assert!(
            all_found(&found, &[100, 200], 5),
            "{centre} {small} {large}: {found:?}"
        );
    }
    // A sensor that hangs, and a step without any noise.
    let mut hangs = vec![5.0; 100];
    hangs.extend(noise(2, 100, 0.0).iter().map(|e| 5.0 + e));
    assert!(all_found(&spread(&hangs), &[100], 2));
    let steps: Vec<f64> = (0..120).map(|t| [0.1, 0.7, 0.3][t / 40]).collect();
    assert_eq!(spread(&steps), [40, 80]);
}

#[test]
fn a_segmentation_says_what_its_segments_are_like() {
    let series = [1e6, 1e6 + 2.0, 1e6, 1e6 + 2.0, 3.0, 3.0, 3.0, 3.0, 3.0];
    let params = PeltParams {
        penalty: Penalty::Value(10.0),
        min_segment: 2,
        ..PeltParams::default()
    };
    let cut = pelt(params, &series);
    assert_eq!(cut.segments(), [0..4, 4..9]);
    assert_eq!(cut.penalty, Some(10.0));
    assert_eq!(cut.summaries[0].mean, 1e6 + 1.0);
    assert!((cut.summaries[0].deviation - (4.0f64 / 3.0).sqrt()).abs() < 1e-12);
    assert_eq!(
        (cut.summaries[1].mean, cut.summaries[1].deviation),
        (3.0, 0.0)
    );
    // With the default it is the penalty that was chosen: the same one gives the same cuts.
    let series: Vec<f64> = noise(4, 300, 0.3)
        .iter()
        .enumerate()
        .map(|(t, e)| e + 3.0 * ((t / 60) % 2) as f64)
        .collect();
    let default = pelt(PeltParams::default(), &series);
    let penalty = default.penalty.expect("PELT has a penalty");
    let params = PeltParams {
        penalty: Penalty::Value(penalty),
        ..PeltParams::default()
    };
    assert_eq!(pelt(params, &series), default);
    assert_eq!(default.summaries.len(), default.change_points.len() + 1);
    let again: Segmentation =
        serde_json::from_str(&serde_json::to_string(&default).unwrap()).unwrap();
    assert_eq!(again, default);
}

#[test]
fn parameters_out_of_range_and_misspelt_ones_are_refused() {
    let name = |result: Result<(), CpdError>| match result {
        Err(CpdError::Parameter { name, .. }) => name,
        other => panic!("{other:?}"),
    };
    let number = SegmentNeighbourhoodParams::default();
    let check = |p: SegmentNeighbourhoodParams| name(p.check().map(|_| ()));
    assert_eq!(
        check(SegmentNeighbourhoodParams {
            min_segment: 0,
            ..number
        }),
        "min_segment"
    );
    assert_eq!(
        check(SegmentNeighbourhoodParams {
            changes: usize::MAX,
            ..number
        }),
        "changes"
    );
    let series = Array1::from(noise(0, 14, 0.0));
    let two = SegmentNeighbourhoodParams {
        changes: 2,
        ..number
    };
    assert_eq!(
        two.check().unwrap().segment(series.view()),
        Err(CpdError::TooShort {
            got: 14,
            needed: 15
        })
    );
    let path =
        |least: f64, most: f64| name(PenaltyPathParams::between(least, most).check().map(|_| ()));
    assert_eq!(path(0.0, 1.0), "least");
    assert_eq!(path(f64::NAN, 1.0), "least");
    assert_eq!(path(2.0, 1.0), "most");
    assert_eq!(path(2.0, f64::INFINITY), "most");
    let short = PenaltyPathParams {
        min_segment: 0,
        ..PenaltyPathParams::between(1.0, 2.0)
    };
    assert_eq!(name(short.check().map(|_| ())), "min_segment");

    fn refused<T: serde::de::DeserializeOwned>(json: &str) {
        match serde_json::from_str::<T>(json) {
            Err(error) => assert!(error.to_string().contains("unknown field"), "{error}"),
            Ok(_) => panic!("{json} was taken"),
        }
    }
    refused::<PeltParams>(r#"{"min_segmnt": 3}"#);
    refused::<PeltParams>(r#"{"penalty": {"autocorrelated": {"limit": 0.5, "limt": 1}}}"#);
    refused::<BinarySegmentationParams>(r#"{"alhpa": 1}"#);
    refused::<SegmentNeighbourhoodParams>(r#"{"change": 1}"#);
    refused::<PenaltyPathParams>(r#"{"least": 1, "most": 2, "min_segments": 3}"#);
    let path: PenaltyPathParams = serde_json::from_str(r#"{"least": 1, "most": 2}"#).unwrap();
    assert_eq!(path, PenaltyPathParams::between(1.0, 2.0));
}

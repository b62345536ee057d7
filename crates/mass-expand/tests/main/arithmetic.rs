//! Properties of the arithmetic of a split.

use mass_expand::{
    Alignment, BisectDirection, BisectParams, Decomposition, ExpandError, Reduction, absorb_mass,
    alignment, bisect, bisect_slice, decompose, divide_gradient, preserve_mass,
    project_onto_weights, redundancy_gradient, redundancy_loss, redundancy_shares,
};
use ndarray::{Array2, arr2};
use proptest::prelude::*;

const MODES: [Decomposition; 2] = [Decomposition::Whole, Decomposition::Rowwise];

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter()
        .zip(b)
        .map(|(&x, &y)| f64::from(x) * f64::from(y))
        .sum()
}

fn norm(a: &[f32]) -> f64 {
    dot(a, a).sqrt()
}

/// A gradient and weights of one shape, with entries away from zero often enough to be no special case.
fn matrices() -> impl Strategy<Value = ((usize, usize), Vec<f32>, Vec<f32>)> {
    (1usize..6, 1usize..80).prop_flat_map(|(rows, columns)| {
        let matrix = prop::collection::vec(-10.0f32..10.0, rows * columns);
        (Just((rows, columns)), matrix.clone(), matrix)
    })
}

proptest! {
    #[test]
    fn cosine_is_that_of_exact_arithmetic((_, g, w) in matrices()) {
        let a = alignment(&g, &w).unwrap();
        prop_assert!((a.dot - dot(&g, &w)).abs() <= 1e-5 * norm(&g) * norm(&w));
        prop_assert!((a.gradient_norm - norm(&g)).abs() <= 1e-6 * norm(&g));
        match a.cosine {
            Some(c) => prop_assert!((c - dot(&g, &w) / norm(&g) / norm(&w)).abs() < 1e-5),
            None => prop_assert!(norm(&g) == 0.0 || norm(&w) == 0.0),
        }
    }

    #[test]
    fn alignment_does_not_depend_on_scale((_, g, w) in matrices(), exponent in -80i32..90) {
        // Powers of two are exact, so the cosine agrees, into the ranges where squares of f32 vanish and overflow.
        let factor = 2f32.powi(exponent);
        let scaled: Vec<f32> = g.iter().map(|x| x * factor).collect();
        let (a, b) = (alignment(&g, &w).unwrap(), alignment(&scaled, &w).unwrap());
        prop_assert_eq!(a.cosine.is_some(), b.cosine.is_some());
        if let (Some(a), Some(b)) = (a.cosine, b.cosine) {
            prop_assert!((a - b).abs() < 1e-6);
        }
    }

    #[test]
    fn parts_add_up_and_are_orthogonal((shape, g, w) in matrices()) {
        for mode in MODES {
            let (mut aligned, mut rejected) = (vec![0.0; g.len()], vec![0.0; g.len()]);
            decompose(&g, &w, shape, mode, &mut aligned, &mut rejected).unwrap();
            for i in 0..g.len() {
                let scale = aligned[i].abs().max(g[i].abs()).max(1e-30);
                prop_assert!((aligned[i] + rejected[i] - g[i]).abs() <= 2e-7 * scale);
            }
            // A row whose own square is comparable with the reference's 1e-12 is not quite projected, by design.
            let rows: Vec<std::ops::Range<usize>> = match mode {
                Decomposition::Whole => std::iter::once(0..g.len()).collect(),
                Decomposition::Rowwise => (0..shape.0).map(|r| r * shape.1..(r + 1) * shape.1).collect(),
            };
            for row in rows {
                let (r, w, g) = (&rejected[row.clone()], &w[row.clone()], &g[row]);
                if norm(w) > 1e-2 {
                    prop_assert!(dot(r, w).abs() <= 2e-6 * norm(g) * norm(w));
                }
            }
        }
    }

    #[test]
    fn division_gives_the_newcomer_all_and_the_source_the_aligned_part((shape, g, w) in matrices()) {
        for mode in MODES {
            let (mut source, mut newcomer) = (g.clone(), vec![0.0; g.len()]);
            divide_gradient(&mut source, &mut newcomer, &w, shape, Some(mode)).unwrap();
            let mut aligned = g.clone();
            project_onto_weights(&mut aligned, &w, shape, mode).unwrap();
            prop_assert_eq!(&newcomer, &g);
            for (s, a) in source.iter().zip(&aligned) {
                prop_assert!((s - a).abs() <= 1e-6 * a.abs());
            }
        }
        let (mut source, mut newcomer) = (g.clone(), vec![0.0; g.len()]);
        divide_gradient(&mut source, &mut newcomer, &w, shape, None).unwrap();
        prop_assert_eq!(&source, &g);
        prop_assert_eq!(&newcomer, &g);
    }

    #[test]
    fn redundancy_gradient_is_the_derivative(
        gate in prop::collection::vec(-2.0f32..2.0, 4 * 7),
        reduction in prop_oneof![Just(Reduction::Mean), Just(Reduction::Sum)],
    ) {
        let dim = 7;
        prop_assume!(gate.chunks(dim).all(|row| norm(row) > 0.5));
        let pairs = [(0, 1), (1, 3), (0, 2)];
        let loss = |gate: &[f32]| {
            let rows: Vec<&[f32]> = gate.chunks(dim).collect();
            redundancy_loss(&rows, &pairs, reduction).unwrap()
        };
        let mut gradient = vec![0.0f32; gate.len()];
        let mut slices: Vec<&mut [f32]> = gradient.chunks_mut(dim).collect();
        let rows: Vec<&[f32]> = gate.chunks(dim).collect();
        let value = redundancy_gradient(&rows, &pairs, reduction, 1.0, &mut slices).unwrap();
        prop_assert_eq!(value, loss(&gate));
        for i in 0..gate.len() {
            let (mut up, mut down) = (gate.clone(), gate.clone());
            up[i] += 1e-2;
            down[i] -= 1e-2;
            let step = f64::from(up[i]) - f64::from(down[i]);
            let numeric = (loss(&up) - loss(&down)) / step;
            prop_assert!(
                (numeric - f64::from(gradient[i])).abs() < 5e-3,
                "element {}: {} against {}", i, gradient[i], numeric
            );
        }
    }

    #[test]
    fn mass_is_preserved_through_repeated_splits(offset in -5.0f32..5.0, splits in 1usize..6) {
        let mut offsets = vec![offset];
        for _ in 0..splits {
            let newcomer = preserve_mass(&mut offsets[0]).unwrap();
            offsets.push(newcomer);
        }
        let mass: f64 = offsets.iter().map(|&o| f64::from(o).exp()).sum();
        prop_assert!((mass / f64::from(offset).exp() - 1.0).abs() < 1e-5);
        let mut kept = offsets[0];
        for &removed in offsets[1..].iter().rev() {
            absorb_mass(&mut kept, removed).unwrap();
        }
        prop_assert!((kept - offset).abs() < 1e-5);
    }
}

/// A dense mixture in raw combine: every expert contributes with its softmax weight (p = 1).
fn mixture(
    gate: &[Vec<f32>],
    offsets: &[f32],
    experts: &[(Vec<f32>, Vec<f32>)],
    x: &[f32],
) -> Vec<f64> {
    let logits: Vec<f64> = gate
        .iter()
        .zip(offsets)
        .map(|(w, &o)| dot(w, x) + f64::from(o))
        .collect();
    let high = logits.iter().fold(f64::MIN, |a, &b| a.max(b));
    let total: f64 = logits.iter().map(|l| (l - high).exp()).sum();
    let mut y = vec![0.0; x.len()];
    for ((first, second), logit) in experts.iter().zip(&logits) {
        let weight = (logit - high).exp() / total;
        let hidden: Vec<f64> = first
            .chunks(x.len())
            .map(|row| dot(row, x).max(0.0))
            .collect();
        for (out, row) in y.iter_mut().zip(second.chunks(hidden.len())) {
            *out += weight
                * row
                    .iter()
                    .zip(&hidden)
                    .map(|(&a, b)| f64::from(a) * b)
                    .sum::<f64>();
        }
    }
    y
}

proptest! {
    #[test]
    fn a_duplicated_layer_with_mass_preserved_gives_the_same_output(
        values in prop::collection::vec(-1.0f32..1.0, 3 * 4 + 3 * 2 * 20 + 4),
        source in 0usize..3,
    ) {
        let (dim, hidden) = (4, 5);
        let mut gate: Vec<Vec<f32>> = values[..12].chunks(dim).map(<[f32]>::to_vec).collect();
        let mut experts: Vec<(Vec<f32>, Vec<f32>)> = values[12..132]
            .chunks(2 * dim * hidden)
            .map(|e| (e[..dim * hidden].to_vec(), e[dim * hidden..].to_vec()))
            .collect();
        let x = &values[132..];
        let mut offsets = vec![0.0f32; 3];
        let before = mixture(&gate, &offsets, &experts, x);

        gate.push(gate[source].clone());
        experts.push(experts[source].clone());
        let newcomer = preserve_mass(&mut offsets[source]).unwrap();
        offsets.push(newcomer);
        let after = mixture(&gate, &offsets, &experts, x);
        for (b, a) in before.iter().zip(&after) {
            prop_assert!((b - a).abs() <= 1e-6, "{} became {}", b, a);
        }
        // Without the offset the pair gains mass, so the test above can fail.
        let doubled = mixture(&gate, &[0.0; 4], &experts, x);
        let moved: f64 = before.iter().zip(&doubled).map(|(b, d)| (b - d).abs()).sum();
        let spread: f64 = before.iter().map(|b| b.abs()).sum();
        prop_assert!(moved > 1e-6 || spread < 1e-2);
    }

    #[test]
    fn the_first_decomposed_update_breaks_the_tie(
        row in prop::collection::vec(0.1f32..1.0, 6),
        gradient in prop::collection::vec(-1.0f32..1.0, 6),
    ) {
        for mode in MODES {
            // Equal rows: the redundancy gradient is zero, and would stay so.
            let rows: [&[f32]; 2] = [&row, &row];
            let (mut first, mut second) = (vec![0.0f32; 6], vec![0.0f32; 6]);
            redundancy_gradient(&rows, &[(0, 1)], Reduction::Sum, 1.0, &mut [&mut first, &mut second]).unwrap();
            prop_assert!(norm(&first) < 1e-6 && norm(&second) < 1e-6);

            let (mut source, mut newcomer) = (gradient.clone(), vec![0.0; 6]);
            divide_gradient(&mut source, &mut newcomer, &row, (1, 6), Some(mode)).unwrap();
            let rejected: Vec<f32> = newcomer.iter().zip(&source).map(|(n, s)| n - s).collect();
            prop_assume!(norm(&rejected) > 0.1);
            let update = |g: &[f32]| -> Vec<f32> { row.iter().zip(g).map(|(w, g)| w - 0.1 * g).collect() };
            let (a, b) = (update(&source), update(&newcomer));
            prop_assert!(a != b);
            let rows: [&[f32]; 2] = [&a, &b];
            let (mut first, mut second) = (vec![0.0f32; 6], vec![0.0f32; 6]);
            redundancy_gradient(&rows, &[(0, 1)], Reduction::Sum, 1.0, &mut [&mut first, &mut second]).unwrap();
            prop_assert!(norm(&first) > 1e-5 && norm(&second) > 1e-5);
        }
    }

    #[test]
    fn bisection_divides_at_the_mean_along_the_first_component(
        noise in prop::collection::vec(-1.0f32..1.0, 60 * 3),
        centre in -3.0f32..3.0,
        offset in -1.0f32..1.0,
    ) {
        // Stretched sixfold along the second axis.
        let mut tokens = Array2::from_shape_vec((60, 3), noise).unwrap();
        tokens.column_mut(1).mapv_inplace(|v| 6.0 * v + centre);
        let gate = [0.3, -0.2, 0.1];
        let halves = bisect(tokens.view(), &gate, offset, BisectParams::default()).unwrap();
        prop_assert!((norm(&halves.direction) - 1.0).abs() < 1e-5);
        prop_assert!(halves.direction[1] > 0.9);
        prop_assert!(halves.explained > 0.5 && halves.explained <= 1.0 + 1e-6);
        let mut projections = Vec::new();
        for token in tokens.rows() {
            let x = token.to_vec();
            let logit = |row: &[f32], offset: f32| dot(row, &x) + f64::from(offset);
            let gap = logit(&halves.source_row, halves.source_offset)
                - logit(&halves.newcomer_row, halves.newcomer_offset);
            let t = dot(&halves.direction, &x);
            projections.push(t);
            // 2 * strength nats per standard deviation.
            prop_assert!((gap - 6.0 * (t - halves.mean) / halves.std).abs() < 1e-3);
            let middle = (logit(&halves.source_row, halves.source_offset)
                + logit(&halves.newcomer_row, halves.newcomer_offset)) / 2.0;
            prop_assert!((middle - logit(&gate, offset)).abs() < 1e-3);
        }
        let mean = projections.iter().sum::<f64>() / 60.0;
        let std = (projections.iter().map(|t| (t - mean).powi(2)).sum::<f64>() / 59.0).sqrt();
        prop_assert!((mean - halves.mean).abs() < 1e-4 && (std - halves.std).abs() < 1e-4);

        let kept = bisect(tokens.view(), &gate, offset, BisectParams { preserve_mass: true, ..Default::default() }).unwrap();
        let gained: f64 = tokens.rows().into_iter().map(|token| {
            let x = token.to_vec();
            let a = dot(&kept.source_row, &x) + f64::from(kept.source_offset);
            let b = dot(&kept.newcomer_row, &x) + f64::from(kept.newcomer_offset);
            a.max(b) + (-(a - b).abs()).exp().ln_1p() - dot(&gate, &x) - f64::from(offset)
        }).sum::<f64>() / 60.0;
        prop_assert!(gained.abs() < 1e-3, "mean log mass moved by {}", gained);
    }
}

#[test]
fn the_first_component_is_found_where_the_farthest_token_is_orthogonal_to_it() {
    let mut tokens = Array2::zeros((40, 2));
    for i in 0..40 {
        tokens[[i, 0]] = if i % 2 == 0 { 4.0f32 } else { -4.0 };
    }
    tokens[[0, 0]] = 0.0;
    tokens[[1, 0]] = 0.0;
    tokens[[0, 1]] = 5.0;
    tokens[[1, 1]] = -5.0;
    let halves = bisect(tokens.view(), &[0.0, 0.0], 0.0, BisectParams::default()).unwrap();
    assert!(halves.direction[0] > 0.999, "{:?}", halves.direction);
}

#[test]
fn tokens_may_be_divided_along_the_gate_row_or_anyhow() {
    let tokens = arr2(&[[4.0f32, 0.5], [-4.0, -0.5], [2.0, 1.0], [-2.0, -1.0]]);
    let along = |direction, row: &[f32]| {
        let params = BisectParams {
            direction,
            ..BisectParams::default()
        };
        bisect(tokens.view(), row, 0.0, params)
    };
    let halves = along(BisectDirection::GateRow, &[0.0, -2.0]).unwrap();
    assert_eq!(halves.direction, [0.0, -1.0]);
    // The boundary is steeper along it: both logits of a token differ by its coordinate alone.
    assert_eq!((halves.source_row[0], halves.newcomer_row[0]), (0.0, 0.0));
    let nothing = along(BisectDirection::GateRow, &[0.0, 0.0]);
    assert!(matches!(nothing, Err(ExpandError::NoSpread { tokens: 4 })));

    let drawn: Vec<Vec<f32>> = (1..200)
        .map(|i| {
            along(BisectDirection::Random, &[i as f32, 0.5])
                .unwrap()
                .direction
        })
        .collect();
    let again = along(BisectDirection::Random, &[1.0, 0.5]).unwrap();
    assert_eq!(again.direction, drawn[0]);
    for u in &drawn {
        assert!((u[0].hypot(u[1]) - 1.0).abs() < 1e-6, "{u:?}");
    }
    // Uniform on the circle: its mean is nearly zero, and each coordinate's square is a half.
    let mean = |f: &dyn Fn(&[f32]) -> f32| drawn.iter().map(|u| f(u)).sum::<f32>() / 199.0;
    assert!(mean(&|u| u[0]).abs() < 0.2 && mean(&|u| u[1]).abs() < 0.2);
    assert!((mean(&|u| u[0] * u[0]) - 0.5).abs() < 0.1);
}

#[test]
fn a_view_that_is_not_contiguous_gives_the_same_halves() {
    let wide = arr2(&[[1.0f32, 9.0, 2.0], [2.0, 9.0, -1.0], [4.0, 9.0, 0.5]]);
    let strided = wide.slice(ndarray::s![.., ..;2]);
    let packed = strided.to_owned();
    let params = BisectParams::default();
    assert_eq!(
        bisect(strided, &[0.1, 0.2], 0.0, params).unwrap(),
        bisect(packed.view(), &[0.1, 0.2], 0.0, params).unwrap()
    );
    let slice = packed.as_slice().expect("standard layout");
    assert_eq!(
        bisect(strided, &[0.1, 0.2], 0.0, params),
        bisect_slice(slice, &[0.1, 0.2], 0.0, params)
    );
    for (inputs, row) in [(&slice[1..], &[0.1, 0.2][..]), (slice, &[]), (&[], &[])] {
        let refused = bisect_slice(inputs, row, 0.0, params);
        let shape =
            matches!(refused, Err(ExpandError::Shape { got, .. }) if got == slice.len() - 1);
        let empty = matches!(refused, Err(ExpandError::Empty { .. }));
        assert!(if row.is_empty() { empty } else { shape }, "{refused:?}");
    }
    let refused = bisect_slice(&[], &[0.1, 0.2], 0.0, params);
    assert_eq!(refused, Err(ExpandError::NoSpread { tokens: 0 }));
}

#[test]
fn zero_gradient_and_zero_weights_are_defined() {
    for columns in [3, 64, 5000] {
        let (zero, one) = (vec![0.0f32; 2 * columns], vec![1.0f32; 2 * columns]);
        assert_eq!(alignment(&zero, &one).unwrap().cosine, None);
        assert_eq!(alignment(&one, &zero).unwrap().cosine, None);
        assert_eq!(alignment(&zero, &one).unwrap().gradient_norm, 0.0);
        for mode in MODES {
            let mut gradient = zero.clone();
            project_onto_weights(&mut gradient, &one, (2, columns), mode).unwrap();
            assert_eq!(gradient, zero);
            let mut gradient = one.clone();
            project_onto_weights(&mut gradient, &zero, (2, columns), mode).unwrap();
            assert_eq!(gradient, zero);
        }
    }
    let rows: [&[f32]; 2] = [&[0.0, 0.0], &[1.0, 0.0]];
    assert_eq!(
        redundancy_loss(&rows, &[(0, 1)], Reduction::Sum).unwrap(),
        0.0
    );
    assert_eq!(redundancy_loss(&rows, &[], Reduction::Mean).unwrap(), 0.0);
}

#[test]
fn huge_and_tiny_entries_keep_their_norms() {
    for value in [1e-30f32, 1e-22, 1e25, 3e38] {
        let a = alignment(&vec![value; 5000], &vec![1.0; 5000]).unwrap();
        let want = f64::from(value) * 5000f64.sqrt();
        assert!((a.gradient_norm / want - 1.0).abs() < 1e-6, "{value}");
        assert!((a.cosine.unwrap() - 1.0).abs() < 1e-6, "{value}");
        for mode in MODES {
            let mut gradient = vec![value; 5000];
            project_onto_weights(&mut gradient, &vec![1.0; 5000], (5, 1000), mode).unwrap();
            assert!(
                gradient.iter().all(|g| (g / value - 1.0).abs() < 1e-5),
                "{value}"
            );
        }
    }
}

#[test]
fn nan_and_infinity_are_refused_wherever_they_stand() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for at in [0, 31, 32, 4095, 4096, 9000] {
            let good = vec![0.5f32; 9001];
            let mut spoilt = good.clone();
            spoilt[at] = bad;
            let refused = |what| Err(ExpandError::NonFinite { what });
            assert_eq!(
                alignment(&spoilt, &good),
                refused("gradient").map(|()| unreachable!())
            );
            assert_eq!(
                alignment(&good, &spoilt),
                refused("weight").map(|()| unreachable!())
            );
            for (mode, shape) in [
                (MODES[0], (1, 9001)),
                (MODES[1], (1, 9001)),
                (MODES[1], (9001, 1)),
            ] {
                let mut gradient = spoilt.clone();
                assert_eq!(
                    project_onto_weights(&mut gradient, &good, shape, mode),
                    refused("gradient")
                );
                let mut gradient = good.clone();
                assert_eq!(
                    project_onto_weights(&mut gradient, &spoilt, shape, mode),
                    refused("weight")
                );
                // Against zero weights an infinity gives NaN and is found as well.
                let mut gradient = spoilt.clone();
                assert_eq!(
                    project_onto_weights(&mut gradient, &vec![0.0; 9001], shape, mode),
                    refused("gradient")
                );
            }
        }
    }
    // 9e38 / 2 along weights of which the largest is 1.
    for mode in MODES {
        let (mut gradient, weight) = ([3e38f32; 5], [1.0f32, 0.5, 0.5, 0.5, 0.5]);
        let refused = project_onto_weights(&mut gradient, &weight, (1, 5), mode);
        assert!(
            matches!(refused, Err(ExpandError::NonFinite { .. })),
            "{refused:?}"
        );
        assert_eq!(gradient, [3e38; 5]);
    }
    assert_eq!(
        preserve_mass(&mut f32::NAN.clone()),
        Err(ExpandError::NonFinite {
            what: "logit offset"
        })
    );
    assert!(absorb_mass(&mut 0.0, f32::INFINITY).is_err());
    let nan = arr2(&[[0.0f32, 1.0], [f32::NAN, 2.0]]);
    let refused = bisect(nan.view(), &[0.0, 0.0], 0.0, BisectParams::default());
    assert_eq!(
        refused,
        Err(ExpandError::NonFinite {
            what: "gate inputs"
        })
    );
}

#[test]
fn wrong_shapes_are_refused() {
    assert!(matches!(
        alignment(&[], &[]),
        Err(ExpandError::Empty { .. })
    ));
    assert!(matches!(
        alignment(&[1.0], &[1.0, 2.0]),
        Err(ExpandError::Shape {
            got: 2,
            expected: 1,
            ..
        })
    ));
    let mode = Decomposition::Whole;
    assert!(matches!(
        project_onto_weights(&mut [], &[], (0, 3), mode),
        Err(ExpandError::Empty { .. })
    ));
    assert!(matches!(
        project_onto_weights(&mut [1.0; 4], &[1.0; 4], (2, 3), mode),
        Err(ExpandError::Shape {
            got: 4,
            expected: 6,
            ..
        })
    ));
    assert!(matches!(
        project_onto_weights(&mut [1.0; 4], &[1.0; 4], (usize::MAX, 3), mode),
        Err(ExpandError::Shape { .. })
    ));
    assert!(divide_gradient(&mut [1.0; 4], &mut [0.0; 3], &[1.0; 4], (2, 2), None).is_err());
    let rows: [&[f32]; 3] = [&[1.0, 0.0], &[1.0], &[]];
    let pair = |pairs: &[(usize, usize)]| redundancy_loss(&rows, pairs, Reduction::Sum);
    assert!(matches!(
        pair(&[(0, 0)]),
        Err(ExpandError::Pair { rows: 3, .. })
    ));
    assert!(matches!(
        pair(&[(0, 9)]),
        Err(ExpandError::Pair { second: 9, .. })
    ));
    assert!(matches!(pair(&[(0, 1)]), Err(ExpandError::Shape { .. })));
    assert!(matches!(pair(&[(2, 0)]), Err(ExpandError::Empty { .. })));
    let mut gradient = [0.0f32; 2];
    assert!(matches!(
        redundancy_gradient(
            &rows[..1],
            &[],
            Reduction::Sum,
            f64::NAN,
            &mut [&mut gradient]
        ),
        Err(ExpandError::Parameter { name: "weight", .. })
    ));
}

#[test]
fn tokens_that_cannot_be_divided_are_refused() {
    let params = BisectParams::default();
    let one = arr2(&[[1.0f32, 2.0]]);
    assert_eq!(
        bisect(one.view(), &[0.0, 0.0], 0.0, params),
        Err(ExpandError::NoSpread { tokens: 1 })
    );
    let same = arr2(&[[1.0f32, 2.0], [1.0, 2.0]]);
    assert_eq!(
        bisect(same.view(), &[0.0, 0.0], 0.0, params),
        Err(ExpandError::NoSpread { tokens: 2 })
    );
    assert!(matches!(
        bisect(same.view(), &[0.0], 0.0, params),
        Err(ExpandError::Shape { .. })
    ));
    assert!(matches!(
        bisect(same.view(), &[], 0.0, params),
        Err(ExpandError::Empty { .. })
    ));
    for strength in [0.0, -1.0, f64::NAN] {
        let refused = bisect(
            same.view(),
            &[0.0, 0.0],
            0.0,
            BisectParams { strength, ..params },
        );
        assert!(matches!(
            refused,
            Err(ExpandError::Parameter {
                name: "strength",
                ..
            })
        ));
    }
}

#[test]
fn tokens_too_far_apart_or_too_close_are_refused() {
    let far = arr2(&[[3e38f32], [-3e38], [-3e38]]);
    assert!(matches!(
        bisect(far.view(), &[1.0], 0.0, BisectParams::default()),
        Err(ExpandError::NonFinite { .. })
    ));
    let close = arr2(&[[0.0f32], [1e-39]]);
    assert!(matches!(
        bisect(close.view(), &[1.0], 0.0, BisectParams::default()),
        Err(ExpandError::NoSpread { .. })
    ));
}

#[test]
fn shares_of_the_redundancy_loss_add_up_to_its_gradient() {
    let rows: [&[f32]; 4] = [
        &[1.0, 0.5, -2.0],
        &[0.3, 0.5, 1.0],
        &[0.0; 3],
        &[2.0, 1.0, -4.0],
    ];
    let pairs = [(0, 1), (1, 3), (0, 2), (3, 0)];
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        a.iter()
            .zip(b)
            .map(|(a, b)| f64::from(*a) * f64::from(*b))
            .sum()
    };
    let products = pairs.map(|(i, j)| {
        let (a, b) = (rows[i], rows[j]);
        [dot(a, a), dot(a, b), dot(b, b)]
    });
    for reduction in [Reduction::Mean, Reduction::Sum] {
        let mut wanted = [[0.0_f32; 3]; 4];
        let mut views: Vec<&mut [f32]> = wanted.iter_mut().map(|g| &mut g[..]).collect();
        let loss = redundancy_gradient(&rows, &pairs, reduction, 0.7, &mut views).unwrap();
        let (same, shares) = redundancy_shares(&products, &pairs, reduction, 0.7).unwrap();
        // The products of rows at hand are taken in single precision.
        assert!((loss - same).abs() < 1e-6, "{loss} {same}");
        let mut sums = [[0.0_f64; 3]; 4];
        for share in shares {
            for (sum, x) in sums[share.gradient].iter_mut().zip(rows[share.row]) {
                *sum += share.factor * f64::from(*x);
            }
        }
        for (sum, wanted) in sums.iter().flatten().zip(wanted.iter().flatten()) {
            assert!((sum - f64::from(*wanted)).abs() < 1e-6, "{sum} {wanted}");
        }
    }
    let mean = Reduction::Mean;
    assert!(redundancy_shares(&products[..3], &pairs, mean, 1.0).is_err());
    assert!(redundancy_shares(&products, &pairs, mean, f64::NAN).is_err());
    assert!(redundancy_shares(&[[1.0; 3]], &[(2, 2)], mean, 1.0).is_err());
    for bad in [f64::NAN, f64::INFINITY, -1.0] {
        // An inner product may be negative.
        for at in [0, 1, 2].into_iter().filter(|&at| at != 1 || bad != -1.0) {
            let mut products = [1.0; 3];
            products[at] = bad;
            assert!(redundancy_shares(&[products], &[(0, 1)], mean, 1.0).is_err());
            let [gg, gw, ww] = products;
            assert!(Alignment::of_products(gg, gw, ww).is_err());
        }
    }
    assert_eq!(Alignment::of_products(0.0, 0.0, 1.0).unwrap().cosine, None);
    // Rounded sums may be a little off; what no two vectors have is no inner product.
    assert_eq!(
        Alignment::of_products(1.0, 1.001, 1.0).unwrap().cosine,
        Some(1.0)
    );
    for (gg, gw, ww) in [(1.0, 5.0, 1.0), (1.0, -1.5, 1.0), (0.0, 1.0, 1.0)] {
        let refused = Alignment::of_products(gg, gw, ww);
        assert!(
            matches!(refused, Err(ExpandError::Parameter { .. })),
            "{refused:?}"
        );
    }
}

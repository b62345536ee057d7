//! The generator, its filter and its floors.
#![allow(clippy::unwrap_used)]

use mass_bench::ginc::{
    BayesFilter, Ginc, GincError, GincParams, ValidGincParams, Windows, bayes_floor, ngram_floors,
};
use mass_bench::rng::{Purpose, stream};
use ndarray::{Array2, Array3, Axis, array};
use proptest::prelude::*;

fn instance(vocab: usize, seed: u32) -> Ginc {
    Ginc::generate(&GincParams::new(vocab).seed(seed).check().unwrap())
}

fn small() -> impl Strategy<Value = GincParams> {
    (2usize..40, 1usize..5, 1usize..5, 2usize..6, any::<u32>()).prop_map(
        |(vocab, concepts, entities, properties, seed)| GincParams {
            concepts,
            entities,
            properties,
            ..GincParams::new(vocab).seed(seed)
        },
    )
}

/// The filter written the plain way: every concept and state, in probability space.
fn dense_nll(ginc: &Ginc, tokens: &[u32]) -> Vec<f64> {
    let mut mass = ginc.start().to_owned() / ginc.concepts() as f64;
    let mut out = Vec::new();
    for &token in tokens {
        for (state, &emitted) in ginc.emission().iter().enumerate() {
            if emitted != token {
                mass.column_mut(state).fill(0.0);
            }
        }
        out.push(-mass.sum().ln());
        mass /= mass.sum();
        for concept in 0..ginc.concepts() {
            let transition = ginc.transition().index_axis(Axis(0), concept);
            let next = mass.row(concept).dot(&transition);
            mass.row_mut(concept).assign(&next);
        }
    }
    out
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn tables_are_distributions_of_the_stated_form(params in small()) {
        let ginc = Ginc::generate(&params.clone().check().unwrap());
        for row in ginc.start().rows() {
            prop_assert!((row.sum() - 1.0).abs() < 1e-12);
            // softmax of numbers within 0.05 of zero
            let uniform = 1.0 / ginc.states() as f64;
            prop_assert!(row.iter().all(|p| (p / uniform).ln().abs() <= 0.1 + 1e-12));
        }
        for row in ginc.transition().rows() {
            prop_assert!((row.sum() - 1.0).abs() < 1e-12);
            prop_assert!(row.iter().all(|p| *p >= 0.0));
        }
        for concept in ginc.transition().axis_iter(Axis(0)) {
            // Mixtures of permutations are doubly stochastic.
            for column in concept.columns() {
                prop_assert!((column.sum() - 1.0).abs() < 1e-12);
            }
            // T = V kron S: summing properties out leaves V whatever the property left from.
            let n = ginc.properties();
            for (from, row) in concept.rows().into_iter().enumerate() {
                for entity in 0..ginc.entities() {
                    let got: f64 = row.iter().skip(entity * n).take(n).sum();
                    let first = ginc.transition().index_axis(Axis(0), 0);
                    let v: f64 = first.row(from / n * n).iter().skip(entity * n).take(n).sum();
                    prop_assert!((got - v).abs() < 1e-12);
                    if entity == from / n {
                        prop_assert!(got >= params.entity_persistence - 1e-12);
                    }
                }
            }
        }
        for (state, &token) in ginc.emission().iter().enumerate() {
            prop_assert_eq!(token == 0, ginc.property_of(state as u32) == 0);
            prop_assert!((token as usize) < ginc.vocab());
        }
    }

    #[test]
    fn tokens_are_the_emission_of_possible_states(params in small(), length in 1usize..200) {
        let ginc = Ginc::generate(&params.check().unwrap());
        let concept = ginc.concepts() - 1;
        let mut rng = stream(5, Purpose::Training, 0);
        let document = ginc.sample_document(concept, length, &mut rng).unwrap();
        prop_assert_eq!(document.tokens.len(), length);
        prop_assert_eq!(document.concept, concept);
        for (&token, &state) in document.tokens.iter().zip(&document.states) {
            prop_assert_eq!(token, ginc.emission()[state as usize]);
            prop_assert_eq!(
                ginc.entity_of(state) * ginc.properties() + ginc.property_of(state),
                state as usize
            );
        }
        for pair in document.states.windows(2) {
            prop_assert!(ginc.transition()[[concept, pair[0] as usize, pair[1] as usize]] > 0.0);
        }
    }

    #[test]
    fn sparse_filter_equals_the_dense_one(params in small(), length in 1usize..60) {
        let ginc = Ginc::generate(&params.check().unwrap());
        let mut rng = stream(9, Purpose::Evaluation, 1);
        let document = ginc.sample_document(0, length, &mut rng).unwrap();
        let nll = BayesFilter::of(&ginc).nll(&document.tokens).unwrap();
        for (got, want) in nll.iter().zip(dense_nll(&ginc, &document.tokens)) {
            prop_assert!((got - want).abs() < 1e-9, "{} {}", got, want);
        }
    }

    #[test]
    fn prediction_is_a_distribution_that_agrees_with_the_surprise(params in small()) {
        let ginc = Ginc::generate(&params.check().unwrap());
        let filter = BayesFilter::of(&ginc);
        let mut rng = stream(2, Purpose::Evaluation, 0);
        let document = ginc.sample_document(0, 30, &mut rng).unwrap();
        let mut state = filter.begin();
        for &token in &document.tokens {
            let prediction = state.predict();
            prop_assert!((prediction.iter().sum::<f64>() - 1.0).abs() < 1e-9);
            let nll = state.observe(token).unwrap();
            prop_assert!((prediction[token as usize].ln() + nll).abs() < 1e-9);
            prop_assert!((state.concept_posterior().iter().sum::<f64>() - 1.0).abs() < 1e-9);
        }
    }
}

#[test]
fn transition_frequencies_match_the_matrix() {
    let ginc = instance(50, 4);
    let document = ginc
        .sample_document(2, 400_000, &mut stream(1, Purpose::Training, 0))
        .unwrap();
    let n = ginc.states();
    let mut counts = Array2::<f64>::zeros((n, n));
    for pair in document.states.windows(2) {
        counts[[pair[0] as usize, pair[1] as usize]] += 1.0;
    }
    for (state, row) in counts.rows().into_iter().enumerate() {
        let visits = row.sum();
        assert!(visits > 1000.0);
        for (to, count) in row.iter().enumerate() {
            let p = ginc.transition()[[2, state, to]];
            let sd = (visits * p * (1.0 - p)).sqrt();
            assert!(
                (count - visits * p).abs() <= 6.0 * sd + 3.0,
                "{state}->{to}"
            );
        }
    }
}

#[test]
fn same_seed_same_instance_other_seed_another() {
    let (a, b, c) = (instance(50, 1), instance(50, 1), instance(50, 2));
    assert_eq!(a.transition(), b.transition());
    assert_eq!(a.emission(), b.emission());
    assert_ne!(a.transition(), c.transition());
    assert_ne!(a.emission(), c.emission());
}

#[test]
fn values_are_stable_across_releases() {
    // A change of these is a change of every published synthetic figure.
    let ginc = instance(50, 0);
    let document = ginc
        .sample_document(0, 12, &mut stream(0, Purpose::Training, 0))
        .unwrap();
    assert_eq!(ginc.emission()[..10], EMISSION_0);
    assert_eq!(document.tokens, TOKENS_0);
}
const EMISSION_0: [u32; 10] = [0, 48, 1, 4, 4, 40, 10, 20, 22, 37];
const TOKENS_0: [u32; 12] = [0, 43, 19, 28, 47, 0, 43, 13, 15, 19, 15, 21];

#[test]
fn the_filter_recovers_the_concept() {
    let ginc = instance(50, 3);
    let filter = BayesFilter::of(&ginc);
    let mut right = 0;
    for document in 0..50 {
        let concept = document % 5;
        let mut rng = stream(3, Purpose::Evaluation, document as u64);
        let sample = ginc.sample_document(concept, 512, &mut rng).unwrap();
        let mut state = filter.begin();
        for &token in &sample.tokens {
            state.observe(token).unwrap();
        }
        let posterior = state.concept_posterior();
        right += usize::from(posterior[concept] > 0.99);
    }
    assert!(right >= 48, "{right} of 50");
}

#[test]
fn the_filter_beats_every_wrong_model() {
    // Bayes loss under the true mixture is below the loss of a filter for another instance.
    let (ginc, other) = (instance(50, 6), instance(50, 6 + 1));
    let document = ginc
        .sample_document(1, 4096, &mut stream(1, Purpose::Evaluation, 0))
        .unwrap();
    let own: f64 = BayesFilter::of(&ginc)
        .nll(&document.tokens)
        .unwrap()
        .iter()
        .sum();
    // The other instance cannot even emit some pairs; its loss is infinite there.
    match BayesFilter::of(&other).nll(&document.tokens) {
        Ok(nll) => assert!(nll.iter().sum::<f64>() > own),
        Err(error) => assert!(matches!(
            error,
            GincError::Impossible { .. } | GincError::OutOfVocabulary { .. }
        )),
    }
}

#[test]
fn floors_fall_with_context_and_agree_with_sampling() {
    let ginc = instance(50, 2);
    let floors = ngram_floors(&ginc, 64).unwrap();
    let windows = Windows::sample(&ginc, 100, 64, &mut stream(2, Purpose::Evaluation, 0)).unwrap();
    let bayes = bayes_floor(&BayesFilter::of(&ginc), &windows).unwrap();
    assert!(floors.unigram > floors.bigram && floors.bigram > floors.two_tokens);
    assert!(floors.two_tokens > bayes.mean && bayes.mean > 0.0);

    // Counting in a large stratified sample: plug-in entropies are biased low by about
    // (cells) / 2n, which is 50 * 49 / 2 / 1.3e6 nats for pairs.
    let many = Windows::sample(&ginc, 4000, 64, &mut stream(8, Purpose::Evaluation, 0)).unwrap();
    let (mut one, mut two) = (vec![0f64; 50], Array2::<f64>::zeros((50, 50)));
    for w in 0..many.len() {
        for pair in many.tokens(w).windows(2) {
            one[pair[1] as usize] += 1.0;
            two[[pair[0] as usize, pair[1] as usize]] += 1.0;
        }
    }
    let entropy = |counts: &[f64]| {
        let n: f64 = counts.iter().sum();
        let plog = |c: &f64| if *c > 0.0 { c / n * (c / n).ln() } else { 0.0 };
        -counts.iter().map(plog).sum::<f64>()
    };
    let rows: Vec<f64> = two.rows().into_iter().map(|r| r.sum()).collect();
    let bigram = entropy(two.as_slice().unwrap()) - entropy(&rows);
    assert!((entropy(&one) - floors.unigram).abs() < 0.01);
    assert!((bigram - floors.bigram).abs() < 0.01, "{bigram} {floors:?}");
}

#[test]
fn two_token_floor_of_a_chain_with_known_entropy() {
    // One concept, tokens = states: a first-order chain, so a second token of context adds nothing.
    let start = array![[0.5, 0.5]];
    let transition = Array3::from_shape_vec((1, 2, 2), vec![0.9, 0.1, 0.1, 0.9]).unwrap();
    let ginc = Ginc::from_tables(2, 2, start, transition, vec![0, 1]).unwrap();
    let floors = ngram_floors(&ginc, 16).unwrap();
    let h = -(0.9f64 * 0.9f64.ln() + 0.1 * 0.1f64.ln());
    assert!((floors.unigram - 2f64.ln()).abs() < 1e-12);
    assert!((floors.bigram - h).abs() < 1e-12);
    assert!((floors.two_tokens - h).abs() < 1e-12);
}

/// The floor of a chain whose every step has the same entropy, and the spread of a sample's mean around it.
#[test]
fn bayes_floor_of_a_chain_with_known_entropy() {
    // Two concepts that are the same one, so that strata count.
    let start = array![[0.5, 0.5], [0.5, 0.5]];
    let chain = [0.9, 0.1, 0.1, 0.9];
    let transition = Array3::from_shape_vec((2, 2, 2), [chain, chain].concat()).unwrap();
    let ginc = Ginc::from_tables(2, 2, start, transition, vec![0, 1]).unwrap();
    let windows = Windows::sample(&ginc, 2000, 4, &mut stream(0, Purpose::Evaluation, 0)).unwrap();
    let floor = bayes_floor(&BayesFilter::of(&ginc), &windows).unwrap();
    let entropy = -(0.9f64 * 0.9f64.ln() + 0.1 * 0.1f64.ln());
    let variance = 0.9 * 0.1 * 9f64.ln().powi(2);
    let error = (variance / (4.0 * 4000.0)).sqrt();
    assert!((floor.mean - entropy).abs() < 4.0 * error, "{floor:?}");
    assert!(
        (floor.standard_error / error - 1.0).abs() < 0.08,
        "{floor:?}"
    );
}

#[test]
fn windows_are_stratified_and_reproducible() {
    let ginc = instance(50, 0);
    let draw = || Windows::sample(&ginc, 3, 8, &mut stream(0, Purpose::Evaluation, 0)).unwrap();
    let windows = draw();
    assert_eq!(windows, draw());
    assert_eq!(windows.len(), 15);
    assert_eq!(windows.concept(0), 0);
    assert_eq!(windows.concept(14), 4);
    let batch = windows.batch(2..5);
    assert_eq!((batch.rows, batch.length, batch.tokens()), (3, 8, 24));
    assert_eq!(batch.inputs[8..16], windows.tokens(3)[..8]);
    assert_eq!(batch.targets[8..16], windows.tokens(3)[1..]);
    assert_eq!(windows.input_states(3..4), windows.states(3)[..8]);
}

#[test]
fn corpus_batches_are_pieces_of_one_document() {
    let ginc = instance(50, 0);
    let corpus = ginc
        .sample_corpus(7, 40, &mut stream(0, Purpose::Training, 0))
        .unwrap();
    assert_eq!(corpus.documents(), 7);
    assert_eq!(corpus.tokens().len(), 280);
    let batch = corpus.batch(1, 17, 50, 39).unwrap();
    assert_eq!(batch, corpus.batch(1, 17, 50, 39).unwrap());
    assert_ne!(batch, corpus.batch(1, 18, 50, 39).unwrap());
    assert_ne!(batch, corpus.batch(2, 17, 50, 39).unwrap());
    // Only one offset fits, so each row is a whole document.
    for row in batch.inputs.chunks(39) {
        let found = (0..7).any(|d| &corpus.tokens()[d * 40..][..39] == row);
        assert!(found);
    }
    assert_eq!(
        corpus.batch(1, 0, 4, 40),
        Err(GincError::TooShort {
            document: 40,
            window: 40
        })
    );
    let only = ginc
        .sample_corpus_of(&[3], 5, 10, &mut stream(0, Purpose::Training, 0))
        .unwrap();
    assert_eq!(only.concepts(), [3; 5]);
}

#[test]
fn parameters_out_of_range_are_named() {
    let ok = GincParams::new(50);
    let cases = [
        (
            GincParams {
                vocab: 1,
                ..ok.clone()
            },
            "vocab",
        ),
        (
            GincParams {
                vocab: usize::MAX,
                ..ok.clone()
            },
            "vocab",
        ),
        (
            GincParams {
                concepts: 0,
                ..ok.clone()
            },
            "concepts",
        ),
        (
            GincParams {
                entities: 0,
                ..ok.clone()
            },
            "entities",
        ),
        (
            GincParams {
                properties: 1,
                ..ok.clone()
            },
            "properties",
        ),
        (
            GincParams {
                entities: usize::MAX,
                ..ok.clone()
            },
            "at most 2^27",
        ),
        (
            GincParams {
                transition_temperature: 0.0,
                ..ok.clone()
            },
            "transition_temperature",
        ),
        (
            GincParams {
                transition_temperature: 1e-310,
                ..ok.clone()
            },
            "transition_temperature",
        ),
        (
            GincParams {
                start_temperature: f64::NAN,
                ..ok.clone()
            },
            "start_temperature",
        ),
        (
            GincParams {
                entity_persistence: 1.5,
                ..ok.clone()
            },
            "entity_persistence",
        ),
    ];
    for (params, name) in cases {
        let error = params.check().unwrap_err();
        assert!(matches!(error, GincError::Parameter { .. }));
        assert!(error.to_string().contains(name), "{error}");
    }
}

#[test]
fn params_round_trip_and_hostile_json_is_refused() {
    let valid = GincParams::new(100).check().unwrap();
    let json = serde_json::to_string(&valid).unwrap();
    assert_eq!(
        serde_json::from_str::<ValidGincParams>(&json).unwrap(),
        valid
    );
    let hostile = json.replace("\"vocab\":100", "\"vocab\":0");
    let error = serde_json::from_str::<ValidGincParams>(&hostile).unwrap_err();
    assert!(error.to_string().contains("vocab"));
}

#[test]
fn hostile_tables_are_refused() {
    let start = array![[0.5, 0.5]];
    let transition = Array3::from_elem((1, 2, 2), 0.5);
    let new = |v: usize, s: &Array2<f64>, t: &Array3<f64>, e: &[u32]| {
        BayesFilter::new(v, s.view(), t, e).map(|_| ())
    };
    assert_eq!(new(2, &start, &transition, &[0, 1]), Ok(()));
    assert!(matches!(
        new(2, &Array2::zeros((0, 0)), &transition, &[]),
        Err(GincError::Empty { .. })
    ));
    assert!(matches!(
        new(2, &start, &Array3::from_elem((2, 2, 2), 0.5), &[0, 1]),
        Err(GincError::Shape {
            table: "transition",
            ..
        })
    ));
    assert!(matches!(
        new(2, &start, &transition, &[0]),
        Err(GincError::Shape {
            table: "emission",
            ..
        })
    ));
    assert!(matches!(
        new(2, &start, &transition, &[0, 2]),
        Err(GincError::OutOfVocabulary {
            token: 2,
            position: 1,
            vocab: 2
        })
    ));
    for bad in [
        array![[0.5, 0.6]],
        array![[f64::NAN, 1.0]],
        array![[-0.5, 1.5]],
    ] {
        assert!(matches!(
            new(2, &bad, &transition, &[0, 1]),
            Err(GincError::NotADistribution { table: "start", .. })
        ));
    }
    let mut bad = transition.clone();
    bad[[0, 1, 1]] = 0.4;
    assert!(matches!(
        new(2, &start, &bad, &[0, 1]),
        Err(GincError::NotADistribution {
            table: "transition",
            concept: 0,
            row: 1,
            ..
        })
    ));
    assert!(matches!(
        Ginc::from_tables(2, 3, start, transition, vec![0, 1]),
        Err(GincError::Parameter {
            name: "properties",
            ..
        })
    ));
}

#[test]
fn impossible_and_unknown_tokens_leave_the_filter_as_it_was() {
    // State 0 goes to 1 and back, always; token 2 is never emitted.
    let start = array![[1.0, 0.0]];
    let transition = Array3::from_shape_vec((1, 2, 2), vec![0.0, 1.0, 1.0, 0.0]).unwrap();
    let filter = BayesFilter::new(3, start.view(), &transition, &[0, 1]).unwrap();
    assert_eq!(filter.nll(&[0, 1, 0]).unwrap(), [0.0; 3]);
    assert_eq!(filter.nll(&[]).unwrap(), Vec::<f64>::new());
    let impossible = |token, position| Err(GincError::Impossible { token, position });
    assert_eq!(filter.nll(&[1]), impossible(1, 0));
    assert_eq!(filter.nll(&[0, 0]), impossible(0, 1));
    assert_eq!(filter.nll(&[0, 2]), impossible(2, 1));
    assert_eq!(
        filter.nll(&[0, 3]),
        Err(GincError::OutOfVocabulary {
            token: 3,
            position: 1,
            vocab: 3
        })
    );
    let mut state = filter.begin();
    state.observe(0).unwrap();
    state.observe(0).unwrap_err();
    state.observe(9).unwrap_err();
    assert_eq!(state.observe(1), Ok(0.0));
}

#[test]
fn empty_requests_are_errors() {
    let ginc = instance(50, 0);
    let rng = &mut stream(0, Purpose::Training, 0);
    assert!(matches!(
        ginc.sample_document(0, 0, rng),
        Err(GincError::Empty { .. })
    ));
    assert_eq!(
        ginc.sample_document(5, 10, rng),
        Err(GincError::UnknownConcept {
            concept: 5,
            concepts: 5
        })
    );
    assert!(matches!(
        ginc.sample_corpus(0, 10, rng),
        Err(GincError::Empty { .. })
    ));
    assert!(matches!(
        ginc.sample_corpus(1, 0, rng),
        Err(GincError::Empty { .. })
    ));
    assert!(matches!(
        ginc.sample_corpus_of(&[], 1, 1, rng),
        Err(GincError::Empty { .. })
    ));
    assert!(matches!(
        ginc.sample_corpus_of(&[9], 1, 1, rng),
        Err(GincError::UnknownConcept { .. })
    ));
    assert!(matches!(
        Windows::sample(&ginc, 0, 8, rng),
        Err(GincError::Empty { .. })
    ));
    assert!(matches!(
        Windows::sample(&ginc, 8, 0, rng),
        Err(GincError::Empty { .. })
    ));
    assert!(matches!(
        ngram_floors(&ginc, 1),
        Err(GincError::TooShort { .. })
    ));
    let corpus = ginc.sample_corpus(1, 10, rng).unwrap();
    assert!(matches!(
        corpus.batch(0, 0, 0, 4),
        Err(GincError::Empty { .. })
    ));
    assert!(matches!(
        corpus.batch(0, 0, 4, 0),
        Err(GincError::Empty { .. })
    ));
}

#[test]
fn sizes_that_no_memory_holds_are_refused() {
    let most = usize::MAX;
    let ginc = instance(50, 0);
    let rng = &mut stream(0, Purpose::Training, 0);
    let corpus = ginc.sample_corpus(1, 10, rng).unwrap();
    let start = array![[1.0]];
    let transition = Array3::from_elem((1, 1, 1), 1.0);
    for (refused, part) in [
        (ginc.sample_document(0, most, rng).err(), "document"),
        (ginc.sample_corpus(most, 10, rng).err(), "corpus"),
        (ginc.sample_corpus(1, most, rng).err(), "corpus"),
        (Windows::sample(&ginc, most, 8, rng).err(), "windows"),
        (Windows::sample(&ginc, 8, most, rng).err(), "windows"),
        (corpus.batch(0, 0, most, 4).err(), "batch"),
        (ngram_floors(&ginc, most).err(), "window"),
        (ngram_floors(&instance(8193, 0), 8).err(), "vocab"),
        (
            BayesFilter::new(most, start.view(), &transition, &[0]).err(),
            "vocab",
        ),
    ] {
        let error = refused.unwrap();
        assert!(matches!(error, GincError::Parameter { .. }), "{error}");
        assert!(error.to_string().contains(part), "{error}");
    }
}

//! Golden values, read from $MASS_GOLDEN_DIR.

use std::path::PathBuf;

use mass_bench::ginc::{BayesFilter, Ginc, GincParams};
use ndarray::{Array2, Array3};
use safetensors::{Dtype, SafeTensors};

fn golden(name: &str) -> PathBuf {
    let dir = std::env::var_os("MASS_GOLDEN_DIR")
        .expect("set MASS_GOLDEN_DIR to the directory of golden values");
    PathBuf::from(dir).join(name)
}

fn read(name: &str) -> Vec<u8> {
    let path = golden(name);
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn floats(file: &SafeTensors<'_>, name: &str) -> (Vec<usize>, Vec<f64>) {
    let view = file.tensor(name).expect(name);
    assert_eq!(view.dtype(), Dtype::F64, "{name}");
    let values = view
        .data()
        .chunks_exact(8)
        .map(|b| f64::from_le_bytes(b.try_into().expect("8 bytes")))
        .collect();
    (view.shape().to_vec(), values)
}

fn ids(file: &SafeTensors<'_>, name: &str) -> (Vec<usize>, Vec<u32>) {
    let view = file.tensor(name).expect(name);
    assert_eq!(view.dtype(), Dtype::I32, "{name}");
    let values = view
        .data()
        .chunks_exact(4)
        .map(|b| i32::from_le_bytes(b.try_into().expect("4 bytes")))
        .map(|id| u32::try_from(id).expect("ids are not negative"))
        .collect();
    (view.shape().to_vec(), values)
}

#[test]
fn golden_ginc() {
    let about: serde_json::Value = serde_json::from_slice(&read("ginc.json")).expect("ginc.json");
    let bytes = read("ginc.safetensors");
    let file = SafeTensors::deserialize(&bytes).expect("ginc.safetensors");
    let vocab = about["vocab"].as_u64().expect("vocab") as usize;
    let (shape, start) = floats(&file, "start");
    let (concepts, states) = (shape[0], shape[1]);
    assert_eq!(about["concepts"].as_u64(), Some(concepts as u64));
    let start = Array2::from_shape_vec((concepts, states), start).expect("start");
    let (_, transition) = floats(&file, "transition");
    let transition =
        Array3::from_shape_vec((concepts, states, states), transition).expect("transition");
    let (_, emission) = ids(&file, "emission");
    let (shape, tokens) = ids(&file, "tokens");
    let (documents, length) = (shape[0], shape[1]);
    let (_, hidden) = ids(&file, "states");
    let (_, concept) = ids(&file, "concept");
    let (shape, expected) = floats(&file, "bayes_nll");
    assert_eq!(shape, [documents, length]);

    let filter =
        BayesFilter::new(vocab, start.view(), &transition, &emission).expect("a valid mixture");
    let mut total = 0.0;
    for (document, tokens) in tokens.chunks(length).enumerate() {
        let nll = filter.nll(tokens).expect("possible tokens");
        for (t, (got, want)) in nll.iter().zip(&expected[document * length..]).enumerate() {
            assert!((got - want).abs() <= 1e-9, "{document}, {t}: {got} {want}");
        }
        total += nll.iter().sum::<f64>();

        // The hidden states are numbered as ours are, and their moves are possible in the concept.
        let hidden = &hidden[document * length..][..length];
        for (&state, &token) in hidden.iter().zip(tokens) {
            assert_eq!(emission[state as usize], token);
        }
        for pair in hidden.windows(2) {
            let at = [
                concept[document] as usize,
                pair[0] as usize,
                pair[1] as usize,
            ];
            assert!(transition[at] > 0.0);
        }
    }
    let mean = total / (documents * length) as f64;
    let want = about["mean_bayes_nll"].as_f64().expect("mean_bayes_nll");
    assert!((mean - want).abs() <= 1e-9, "{mean} {want}");

    // The tables have the form that our own generator gives them.
    let properties = emission
        .iter()
        .skip(1)
        .position(|&t| t == 0)
        .map_or(states, |p| p + 1);
    let ginc = Ginc::from_tables(vocab, properties, start, transition, emission).expect("tables");
    for state in 0..states as u32 {
        let delimiter = ginc.emission()[state as usize] == 0;
        assert_eq!(delimiter, ginc.property_of(state) == 0);
    }

    // Drawn by the original program's random numbers (its first draws are the emission table), the
    // whole instance must come out of the seed again.
    let params = GincParams {
        concepts,
        entities: ginc.entities(),
        properties,
        ..GincParams::new(vocab)
    };
    let seed = about["seed"].as_u64().expect("seed") as u32;
    let ours = Ginc::generate(&params.seed(seed).check().expect("valid parameters"));
    assert_eq!(ours.emission(), ginc.emission());
    for (got, want) in ours.start().iter().zip(ginc.start()) {
        assert!((got - want).abs() <= 1e-12, "start {got} {want}");
    }
    for (got, want) in ours.transition().iter().zip(ginc.transition()) {
        assert!((got - want).abs() <= 1e-12, "transition {got} {want}");
    }
}
